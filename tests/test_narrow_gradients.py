"""Gradients of whole models in bf16, on every backend that supports it: every product of two matrices is in bf16."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

import treadle
from tests.backend_checks import needs_torch, needs_tvm
from tests.op_checks import EPSILON, Array
from treadle.compiled import Compiled
from treadle.ir.errors import BackendError
from treadle.ir.graph import Graph
from treadle.ir.interpreter import interpret
from treadle.ir.transforms.gradients import GRADIENT, gradient_graph
from treadle.ir.transforms.training_losses import LOSS, with_cross_entropy
from treadle.passes.framework.manager import PassManager
from treadle.passes.pipelines import RECOGNITION
from treadle.passes.stages import Merge, Precision, Recognize, Stage, passes_of, run
from treadle.program.weights import initial_weights
from treadle.resolving import resolve

pytestmark = pytest.mark.usefixtures("quickly_planned")


SMALL = {"layers": 2, "dim": 64, "heads": 4, "vocab": 80}


@cache
def gradients(family: str) -> Graph:
    graph = with_cross_entropy(resolve(family, **SMALL).graph, "logits")
    return gradient_graph(PassManager(RECOGNITION).run(graph).graph, LOSS, [*graph.parameters])


@cache
def batch(family: str) -> dict[str, Array]:
    tokens = np.random.default_rng(0).integers(0, SMALL["vocab"], (3, 11))
    return {**initial_weights(resolve(family, **SMALL).graph), "tokens": tokens, "targets": np.roll(tokens, -1, 1)}


def stages(dtype: str | None) -> list[Stage]:
    """Return the stages of a gradient's graph."""
    return [Recognize(), Merge(), *([] if dtype is None else [Precision(dtype, computed=True)])]


def compiled(family: str, backend: str, dtype: str | None) -> Compiled:
    return treadle.compile(gradients(family), backend=backend, passes=passes_of(stages(dtype)))


@cache
def wanted(family: str) -> dict[str, Array]:
    return dict(compiled(family, "numpy", None)(**batch(family)))


def assert_within_rounding(got: dict[str, Array], family: str) -> None:
    """Assert that the norm of each gradient's difference is within rounding.

    About ten products in a row round their factors by at most half of bf16's spacing.

    A gradient that is 0 apart from rounding, such as the gradient of a bias that softmax ignores, is compared relative
    to the other gradients.
    """
    expected = wanted(family)
    assert list(got) == list(expected)
    most = max(np.linalg.norm(v) for name, v in expected.items() if name.startswith(GRADIENT))
    off = {n: float(np.linalg.norm(got[n] - v) / max(np.linalg.norm(v), 1e-2 * most)) for n, v in expected.items()}
    assert all(v < 4 * EPSILON["bf16"] for v in off.values()), max(off.items(), key=lambda each: each[1])
    assert max(off.values()) > EPSILON["f32"] * 64, "something was rounded"


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(
    "backend", ["interpreter", pytest.param("torch", marks=needs_torch), pytest.param("tvm", marks=needs_tvm)]
)
def test_gradients_in_bf16_are_those_in_float32_but_for_rounding(backend: str, family: str) -> None:
    if backend == "interpreter":
        made = run(gradients(family), stages("bf16")).graph
        assert_within_rounding(dict(interpret(made, batch(family), {})), family)
        return
    exe = compiled(family, backend, "bf16")
    assert_within_rounding(dict(exe(**batch(family))), family)
    left = [
        node
        for _, node in exe.graph.walk()
        if node.op.name in ("linear", "matmul") and node.op.attributes["to"] is None
    ]
    assert not left, "products of two matrices are narrow"


def test_numpy_says_that_it_has_no_bf16() -> None:
    with pytest.raises(BackendError, match="cannot run"):
        compiled("gpt2", "numpy", "bf16")

"""ONNX round trip: a model that is exported, imported and optimized is the same model, fused as before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from tests.onnx_files import weights_of
from tests.test_models import ZOO, in_turns
from tests.test_onnx_export import two_sizes
from treadle.backends.onnx.exporter import export_onnx
from treadle.frontends.onnx_import.importer import import_onnx
from treadle.ir.analysis.drawn_inputs import draw_inputs
from treadle.ir.graph import Graph
from treadle.ir.interpreter import interpret
from treadle.ir.ops.merged_products import Projections
from treadle.ir.ops.products import Linear, MatMul
from treadle.passes.framework.manager import PassManager
from treadle.passes.pipelines import DEFAULT

Array = np.ndarray[Any, Any]

TOLERANCE = 1e-6
"""In float64: an attribute such as a norm's eps is a float32 in ONNX, with a relative error of 6e-8."""

FUSED = ("attention", "layer_norm", "rms_norm", "gelu", "gelu_tanh", "activated_linear", "gated_linear")
WEIGHTS = "multiplied weights"


def run_ops(graph: Graph) -> Counter[str]:
    """Count the nodes of each fused op in one run, and the weights that are multiplied alone or merged with others,
    calls multiplied.

    A norm counts the same with and without its residual: the first norm of a block includes the previous block's sum
    only after blocks are inlined.
    """
    known: dict[str, Counter[str]] = {}
    for function in graph.functions.values():
        found: Counter[str] = Counter()
        for node in function.nodes:
            name = node.op.name.removeprefix("add_")
            found += known[node.op.callee] if node.op.callee is not None else Counter([name])
            if isinstance(node.op, Projections):
                found[WEIGHTS] += node.op.count
            elif isinstance(node.op, Linear | MatMul) and (node.inputs[1].weight or node.inputs[1].literal):
                found[WEIGHTS] += 1
        known[function.name] = found
    return Counter({name: known["main"][name] for name in (*FUSED, WEIGHTS) if known["main"][name]})


@dataclass(frozen=True)
class Declared:
    """A model of the zoo, its optimized graph, its weights, and inputs with the results in float64."""

    graph: Graph
    optimized: Graph
    weights: Mapping[str, Array]
    answers: Sequence[tuple[Mapping[str, Array], Mapping[str, Array]]]


@lru_cache(maxsize=1)  # all opsets of a model come in sequence
def declared_model(name: str) -> Declared:
    graph = ZOO[name][0].graph()
    optimized = PassManager(DEFAULT).run(graph).graph
    weights = weights_of(graph)
    own = {n: weights[n] for n in graph.parameters}
    drawn = [draw_inputs(graph, sizes, [seed]) for seed, sizes in enumerate(two_sizes(optimized))]
    return Declared(graph, optimized, weights, [(x, interpret(graph, x, own, float64=True)) for x in drawn])


# The whole CLIP is large, and its towers are tested.
@pytest.mark.parametrize(("name", "opset"), [(name, opset) for name, opset in in_turns((17, 23)) if name != "clip"])
def test_a_saved_model_is_read_back_equal(name: str, opset: int, tmp_path: Path) -> None:
    declared = declared_model(name)
    optimized = declared.optimized
    made = export_onnx(optimized, declared.weights, tmp_path / "model.onnx", opset=opset)
    back = import_onnx(made.path)
    again = PassManager(DEFAULT).run(back.graph).graph
    assert run_ops(again) == run_ops(optimized)
    for inputs, expected in declared.answers:
        given = {n: np.asarray(back.weights[n]) for n in again.parameters}
        answers = interpret(again, {v.name: inputs[v.name] for v in again.main.inputs}, given, float64=True)
        for output, right in expected.items():
            worst = np.abs(answers[output] - right).max() / np.abs(right).max()
            assert worst < TOLERANCE, f"{output} at {[x.shape for x in inputs.values()]}"

"""Declarations that are too large are refused, before minutes of tracing or a full memory."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import pytest

import treadle as t
from treadle.frontends.dsl import MOST_REPETITIONS
from treadle.ir.builder import Builder
from treadle.ir.errors import FrontendError, UsageError
from treadle.ir.graph import Graph
from treadle.program import weights
from treadle.program.weights import initial_weights
from treadle.resolving import resolve


@t.model
def deep(x: Annotated[t.Tensor, t.f32["B 4"]], *, layers: int = 2) -> t.Tensor:
    for _ in t.stack("h", layers):
        x = t.relu(x)
    return x


def test_a_stack_has_a_maximum_of_repetitions() -> None:
    with pytest.raises(FrontendError, match=r"stack 'h' has more than 10,000 repetitions") as caught:
        resolve(deep, layers=100_000)
    assert caught.value.received == "100,000"
    assert "test_large_declarations.py" in (caught.value.source or "")
    assert len(resolve(deep, layers=MOST_REPETITIONS).graph.main.nodes) == MOST_REPETITIONS


def test_weights_that_memory_cannot_hold_are_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    b = Builder(Graph("wide"))
    b.outputs(y=b.matmul(b.input("x", "f32[B, 1000]"), b.parameter("w", "f32[1000, 1000]")))
    monkeypatch.setattr(weights, "machine_memory", lambda: 3_999_999)
    with pytest.raises(UsageError, match="the weights of wide need more memory than this machine has") as caught:
        t.compile(b.graph, backend="numpy")
    assert caught.value.received == "4 MB of weights, 4 MB of memory"
    for memory in (4_000_000, None):
        monkeypatch.setattr(weights, "machine_memory", lambda memory=memory: memory)
        assert initial_weights(b.graph)["w"].dtype == np.float32


def test_the_machine_reports_its_memory() -> None:
    memory = weights.machine_memory()
    assert memory is None or memory > 1 << 28

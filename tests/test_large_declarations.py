"""Declarations that are too large are refused, before minutes of tracing or a full memory."""

from __future__ import annotations

import tracemalloc
from typing import Annotated

import numpy as np
import pytest

import treadle as t
from treadle.backends import made_weights
from treadle.backends.registry import find_backend
from treadle.frontends.dsl import MOST_REPETITIONS
from treadle.ir.analysis.cost import parameter_bytes
from treadle.ir.builder import Builder
from treadle.ir.errors import BackendError, FrontendError, UsageError
from treadle.ir.graph import Graph
from treadle.ir.transforms.encoded_weights import encode_weights
from treadle.program import weights
from treadle.program.program import Program
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
    with pytest.raises(UsageError, match="the weights of wide need more memory than is free") as caught:
        t.compile(b.graph, backend="numpy")
    assert caught.value.received == "4 MB of weights, 4 MB of free memory"
    for memory in (4_000_000, None):
        monkeypatch.setattr(weights, "machine_memory", lambda memory=memory: memory)
        assert initial_weights(b.graph)["w"].dtype == np.float32


def _quantized(name: str, scheme: str) -> Program:
    """Return a program of four equal products, the weights of which are quantized."""
    b = Builder(Graph(name))
    x = b.input("x", "f32[B, 1536]")
    for layer in range(4):
        gain, weight = b.parameter(f"gain.{layer}", "f32[1536]"), b.parameter(f"w.{layer}", "f32[1536, 1536]")
        x = b.linear(b.rms_norm(x, gain), weight)
    b.outputs(y=x)
    return Program.of(b.graph, quantize=scheme).optimize()


@pytest.mark.parametrize("scheme", ["int8-weights", "int4", "int8"])
def test_each_weight_is_quantized_when_it_is_drawn(scheme: str) -> None:
    """The numbers of only one weight are in memory while it is quantized, with the temporary arrays of some blocks, and
    a copy if the weight is smoothed.
    """
    program, numbers = _quantized("deep", scheme), 1536 * 1536 * 4
    program.weights()  # imports, and remembers rules
    tracemalloc.start()
    found, seed = program.weights()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    stored = sum(array.nbytes for array in found.values())
    assert seed == 0
    assert stored < 4 * numbers / 3
    assert peak - stored < 3.5 * numbers
    expected = encode_weights(program.graph, initial_weights(program.graph))
    assert found.keys() == expected.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, expected[name])


def test_memory_for_quantized_weights_is_for_blocks_and_the_numbers_of_one_weight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program, numbers = _quantized("deep", "int4"), 1536 * 1536 * 4
    stored = parameter_bytes(program.graph)
    monkeypatch.setattr(weights, "machine_memory", lambda: stored + numbers)
    assert sum(array.nbytes for array in program.weights()[0].values()) == stored
    with pytest.raises(UsageError, match="the weights of deep need more memory") as caught:
        initial_weights(program.graph)
    assert caught.value.received == "37.8 MB of weights, 15.8 MB of free memory"
    monkeypatch.setattr(weights, "machine_memory", lambda: stored + numbers - 1)
    with pytest.raises(UsageError, match="the weights of deep need more memory than is free") as caught:
        program.weights()
    assert caught.value.received == "6.37 MB of weights, 9.44 MB of numbers to quantize, 15.8 MB of free memory"


def test_the_machine_reports_its_memory() -> None:
    memory = weights.machine_memory()
    assert memory is None or memory > 1 << 28


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_decoded_weights_that_memory_cannot_hold_are_refused(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend without kernels that read blocks decodes them, so the numbers of all weights are in memory."""
    if find_backend(backend).available():
        pytest.skip(f"needs {backend}")
    program, needed = _quantized("deep", "int8-weights"), 4 * 1536 * 1536 * 4
    monkeypatch.setattr(made_weights, "free_memory", lambda: needed - 1)
    with pytest.raises(BackendError, match="the weights that are derived for deep need more memory than is") as caught:
        t.compile(program.source, backend=backend, quantize="int8-weights")
    assert caught.value.received == f"{needed:,} bytes are required, {needed - 1:,} are free"
    assert caught.value.hint == 'backend="tvm", which reads quantized weights'
    for free in (needed, None):
        monkeypatch.setattr(made_weights, "free_memory", lambda free=free: free)
        t.compile(program.source, backend=backend, quantize="int8-weights")


def test_weights_that_are_only_read_need_no_further_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    b = Builder(Graph("plain"))
    b.outputs(y=b.matmul(b.input("x", "f32[B, 10]"), b.parameter("w", "f32[10, 10]")))
    monkeypatch.setattr(made_weights, "free_memory", lambda: 0)
    t.compile(b.graph, backend="numpy")

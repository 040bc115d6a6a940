"""Weights in oneDNN's layout: which weights are packed, and that products with them give unchanged results."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.op_checks import held
from tests.rounding_bounds import assert_within, bounded
from treadle.backends.made_weights import recipes_of
from treadle.backends.registry import find_backend
from treadle.ir.builder import Builder, Expr
from treadle.ir.graph import Function, Graph
from treadle.ir.target import Target
from treadle.ir.transforms.inline import inline_calls
from treadle.ir.types import DType, bf16, f16, f32, f64
from treadle.program.weights import initial_weights

torch = pytest.importorskip("torch")

from treadle.backends.torch import backend as torch_backend
from treadle.backends.torch.packing import ACTIVATIONS, can_pack

pytestmark = pytest.mark.skipif(not can_pack(), reason="PyTorch has no oneDNN for this CPU")

K, N = 32, 48

Array = np.ndarray[Any, Any]


def graph_of(*, dtype: DType = f32) -> tuple[Builder, Expr]:
    b = Builder(Graph("g"))
    return b, b.input("x", dtype["B", "S", K])


def names(graph: Graph) -> dict[str, str]:
    """Return the names of the packed weights, with the axes of each layout."""
    lowered = find_backend("torch").lower(graph, Target("cpu")).graph  # type: ignore[attr-defined]
    packed = {name: v.layout for name, v in lowered.main.parameters.items() if v.layout is not None}
    recipes = recipes_of(lowered)
    assert {layout.kind for layout in packed.values()} <= {"onednn"}
    return {str(recipes[name]): "k n" if layout.transposed else "n k" for name, layout in packed.items()}


def source(graph: Graph) -> str:
    return find_backend("torch").compile(graph, Target("cpu"), initial_weights(graph)).source


@pytest.mark.parametrize("weight_axes", ["n k", "k n"])
@pytest.mark.parametrize("activation", [*ACTIVATIONS, "relu", "quick_gelu"])
@pytest.mark.parametrize("biased", [True, False])
def test_activated_products(activation: str, weight_axes: str, biased: bool) -> None:
    b, x = graph_of()
    weight = b.parameter("w", f32[(N, K) if weight_axes == "n k" else (K, N)])
    bias = b.parameter("bias", f32[N]) if biased else None
    b.outputs(y=b.activated_linear(x, weight, bias, activation=activation, weight_axes=weight_axes))
    assert names(b.graph) == {"w": weight_axes}
    text = source(b.graph)
    assert text.count("kernels.linear(") == 1
    assert ("F.relu(" in text) == (activation == "relu")
    close_to_its_meaning(b.graph, np.random.default_rng(0).standard_normal((2, 3, K), np.float32))


@pytest.mark.parametrize("activation", [*ACTIVATIONS, "relu"])
def test_a_row_with_nan_is_nan(activation: str) -> None:
    """oneDNN's own relu returns 0 for NaN."""
    b, x = graph_of()
    b.outputs(y=b.activated_linear(x, b.parameter("w", f32[N, K]), None, activation=activation))
    array = np.ones((2, 1, K), np.float32)
    array[0, 0, 0] = np.nan
    close_to_its_meaning(b.graph, array)


@pytest.mark.parametrize("shape", [(1, 1, K), (2, 3, K), (1, 67, K)])
def test_linear_and_matmul_of_any_size(shape: tuple[int, ...]) -> None:
    b, x = graph_of()
    y = b.linear(x, b.parameter("a", f32[N, K]), b.parameter("b", f32[N]))
    b.outputs(y=b.matmul(y, b.parameter("c", f32[N, K])))
    assert names(b.graph) == {"a": "n k", "c": "k n"}
    close_to_its_meaning(b.graph, np.random.default_rng(0).standard_normal(shape, np.float32))


def test_rows_that_do_not_lie_side_by_side() -> None:
    b = Builder(Graph("g"))
    x = b.rearrange(b.input("x", f32[K, "S"]), pattern="k s -> s k")
    b.outputs(y=b.linear(x, b.parameter("a", f32[N, K]), None))
    close_to_its_meaning(b.graph, np.random.default_rng(0).standard_normal((K, 5), np.float32))


@pytest.mark.parametrize(("n", "k", "packed"), [(32, 32, True), (31, 33, False)])
def test_a_weight_of_1024_elements_is_worth_packing(n: int, k: int, packed: bool) -> None:
    b = Builder(Graph("g"))
    b.outputs(y=b.linear(b.input("x", f32["B", k]), b.parameter("w", f32[n, k]), None))
    assert (names(b.graph) == {"w": "n k"}) is packed


def test_a_weight_that_something_else_reads_stays_as_it_is() -> None:
    b = Builder(Graph("tied"))
    table = b.parameter("table", f32[N, K])
    b.outputs(y=b.linear(b.embedding(table, b.input("ids", "i64[B]")), table, None))
    assert names(b.graph) == {}
    b, x = graph_of()
    w = b.parameter("w", f32[K, K])
    b.outputs(y=b.linear(x, w, None) + b.matmul(x, w))  # one in its own layout, one transposed
    assert names(b.graph) == {}
    b, x = graph_of()
    w = b.parameter("w", f32[N, K])
    b.outputs(y=b.linear(x, w, None), w=w)
    assert names(b.graph) == {}


@pytest.mark.parametrize("dtype", [f64, f16])
def test_other_dtypes_are_left_to_pytorch(dtype: DType) -> None:
    b, x = graph_of(dtype=dtype)
    b.outputs(y=b.linear(x, b.parameter("w", dtype[N, K]), None))
    assert names(b.graph) == {}


def test_bfloat16_is_packed() -> None:
    b, x = graph_of(dtype=bf16)
    b.outputs(y=b.cast(b.linear(x, b.parameter("w", bf16[N, K]), None), to=f32))
    assert names(b.graph) == {"w": "n k"}
    rng = np.random.default_rng(0)
    weight, rows = (held(rng.standard_normal(shape), bf16) for shape in ((N, K), (2, 3, K)))
    tensors = [torch.from_numpy(x).bfloat16() for x in (weight, rows)]
    exe = find_backend("torch").compile(b.graph, Target("cpu"), {"w": tensors[0]})
    (wanted,) = bounded(b.graph, {"x": rows}, {"w": weight}).values()
    assert_within(exe(x=tensors[1])["y"], wanted, "y")


@pytest.mark.parametrize("second", ["another weight", "what is computed"])
def test_a_block_reads_packed_weights_if_all_its_calls_bring_such(second: str) -> None:
    graph = Graph("blocks")
    block = Function("h")
    graph.add_function(block)
    inside = Builder(graph, block)
    inside.outputs(y=inside.linear(inside.input("x", f32["B", K]), inside.parameter("w", f32[K, K]), None))
    b = Builder(graph)
    x = b.input("x", f32["B", K])
    weights = [b.parameter(f"h.{i}.w", f32[K, K]) for i in range(2)]
    if second == "what is computed":
        weights[1] = b.linear(b.input("z", f32[K, K]), weights[1], None)
    for w in weights:
        (x,) = b.call(block, [x, w])
    b.outputs(y=x)
    found = names(graph)
    assert found == ({"h.0.w": "n k", "h.1.w": "n k"} if second == "another weight" else {"h.1.w": "n k"})
    close(graph, {v.name: np.random.default_rng(0).standard_normal((K, K), np.float32) for v in graph.main.inputs})


def test_without_onednn_nothing_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_backend, "can_pack", lambda: False)
    b, x = graph_of()
    b.outputs(y=b.activated_linear(x, b.parameter("w", f32[N, K]), None, activation="silu"))
    assert "F.silu(F.linear(" in source(b.graph)
    close_to_its_meaning(b.graph, np.random.default_rng(0).standard_normal((2, 3, K), np.float32))


def close_to_its_meaning(graph: Graph, x: Array) -> None:
    close(graph, {"x": x})


def close(graph: Graph, inputs: dict[str, Array]) -> None:
    """Compare on random weights, within the rounding of the graph's ops. A graph with calls is inlined first."""
    rng = np.random.default_rng(1)
    weights = {n: (rng.standard_normal(w.shape) / 4).astype(w.dtype) for n, w in initial_weights(graph).items()}
    made = find_backend("torch").compile(graph, Target("cpu"), weights)(**inputs)
    for name, wanted in bounded(inline_calls(graph), inputs, weights).items():
        assert_within(made[name], wanted, name)


def test_a_bias_that_is_one_number_for_all_rows_is_read_as_such() -> None:
    """oneDNN reads a bias as contiguous, but an expanded bias has a single element in memory."""
    b, x = graph_of()
    weight = b.parameter("w", f32[N, K])
    b.outputs(y=b.linear(x, weight, b.expand(b.constant(0.5, f32), shape=(N,))))
    assert names(b.graph) == {"w": "n k"}
    rng = np.random.default_rng(0)
    w, given = (rng.standard_normal(shape).astype(np.float32) for shape in ((N, K), (2, 3, K)))
    found = find_backend("torch").compile(b.graph, Target("cpu"), {"w": w})(x=given)["y"]
    assert np.max(np.abs(found - (given @ w.T + 0.5))) < 1e-4

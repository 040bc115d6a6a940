"""Merged projections, scales folded into weights, and the reverse of both."""

from __future__ import annotations

import numpy as np
import pytest

from treadle.backends.registry import find_backend
from treadle.ir.analysis.following import follow
from treadle.ir.builder import Builder, Expr
from treadle.ir.graph import Graph
from treadle.ir.interpreter import interpret
from treadle.ir.target import Target
from treadle.ir.types import f16, f32
from treadle.models.gpt2 import gpt2
from treadle.passes.cleanup.common_subexpressions import CommonSubexpressions
from treadle.passes.cleanup.dead_code import DeadCode
from treadle.passes.cleanup.decompose import Decompose
from treadle.passes.framework.manager import Optimized, Pass, PassManager
from treadle.passes.lowering.hoist_weights import HoistWeights
from treadle.passes.lowering.legalize import Legalize
from treadle.passes.pipelines import DEFAULT
from treadle.passes.products.fold_scale import FoldScale
from treadle.passes.products.merge_projections import MergeProjections
from treadle.passes.products.unfold_scale import UnfoldScale
from treadle.program.weights import initial_weights
from treadle.resolving import resolve

BACKENDS = ("numpy", "torch", "tvm")


def projections(*, transposed: bool = False, biases: str = "qkv", widths: tuple[int, int, int] = (6, 4, 4)) -> Graph:
    """Return a program with q, k and v of one x, each used further as in attention; `biases` selects which have a
    bias.
    """
    graph = Graph("projections")
    b = Builder(graph)
    x = b.input("x", f32["B", "S", 8])
    results = {}
    for name, width in zip("qkv", widths, strict=True):
        b.scope = f"attn.{name}"
        bias = b.parameter(f"{name}.bias", f32[width]) if name in biases else None
        if transposed:
            y = b.matmul(x, b.parameter(f"{name}.weight", f32[8, width]))
            y = y if bias is None else y + bias
        else:
            y = b.linear(x, b.parameter(f"{name}.weight", f32[width, 8]), bias)
        y.value.name = name
        results[name] = b.sin(y)
    b.outputs(**results)
    return graph


def ops(graph: Graph) -> list[str]:
    return [node.op.name for _, node in graph.walk()]


def run(graph: Graph, *passes: Pass) -> Optimized:
    return PassManager([*passes], certify=True).run(graph)


@pytest.mark.parametrize("biases", ["", "qkv", "qv"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_merged_and_restored_give_the_same(backend: str, transposed: bool, biases: str) -> None:
    found = find_backend(backend)
    if found.available() is not None:
        pytest.skip(str(found.available()))
    graph = projections(transposed=transposed, biases=biases)
    merged = run(graph, MergeProjections())
    assert sorted(ops(merged.graph)) == ["projections", "sin", "sin", "sin"]
    restored = run(merged.graph, Decompose(("projections",)))
    assert sorted(ops(restored.graph)) == sorted(ops(graph))
    inputs = {"x": np.random.default_rng(0).standard_normal((2, 3, 8), np.float32)}
    weights = {
        n: np.random.default_rng(1).standard_normal(w.shape, np.float32) for n, w in initial_weights(graph).items()
    }
    wanted = interpret(graph, inputs, weights)
    for each in (merged.graph, restored.graph):
        made = found.compile(each, Target("cpu"), weights)(**inputs)
        for name in wanted:
            np.testing.assert_allclose(made[name], wanted[name], rtol=1e-5, atol=1e-6)


def test_the_merged_program_reads_like_the_one_before() -> None:
    text = str(run(projections(), MergeProjections()).graph)
    lines = [line.split("  #")[0].strip() for line in text.splitlines() if " = " in line and "normal" not in line]
    assert lines[0] == ("q, k, v = projections(x, $q.weight, $k.weight, $v.weight, $q.bias, $k.bias, $v.bias, count=3)")


def test_heads_may_still_be_split() -> None:
    graph = run(resolve(gpt2, layers=1).graph, *DEFAULT).graph
    assert "projections" in ops(graph)
    assert follow(graph, "heads").split()


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_product_runs(backend: str) -> None:
    found = find_backend(backend)
    if found.available() is not None:
        pytest.skip(str(found.available()))
    graph = run(projections(biases="qv"), MergeProjections()).graph
    source = found.compile(graph, Target("cpu"), initial_weights(graph)).source
    body = source.split("def main")[1]
    product = {"numpy": "kernels.linear(", "torch": "F.linear(", "tvm": "matmul"}[backend]
    assert body.split("return")[0].count(product) == 1
    assert "concat(q.weight, k.weight, v.weight, axis=0)" in source.split("def main")[0]


def test_the_log_tells_every_projection_and_the_scope_is_the_attentions() -> None:
    optimized = run(projections(), MergeProjections())
    assert [event.scope for event in optimized.log[0].matches] == ["attn.q", "attn.k", "attn.v"]
    assert {node.scope for _, node in optimized.graph.walk() if node.op.name == "projections"} == {"attn"}


def test_a_weight_that_something_else_reads_is_refused() -> None:
    graph = projections()
    b = Builder(graph)
    graph.main.outputs["also"] = b.exp(b.expr(graph.parameters["k.weight"])).value
    optimized = run(graph, MergeProjections())
    (refusal,) = optimized.log[0].refusals
    assert refusal.reason == "its weight is read by exp too, and would be stored twice"
    assert ops(optimized.graph).count("projections") == 1  # of q and v only
    assert ops(optimized.graph).count("linear") == 1


def test_constants_are_no_weights_that_are_joined_when_they_are_bound() -> None:
    graph = Graph("g")
    b = Builder(graph)
    x = b.input("x", f32["B", 8])
    eyes = [b.constant(np.eye(8, dtype=np.float32) * n) for n in (2, 3)]
    b.outputs(p=b.linear(x, eyes[0], None), q=b.linear(x, eyes[1], None))
    optimized = run(graph, MergeProjections())
    assert ops(optimized.graph) == ["linear", "linear"]
    reasons = {refusal.reason for refusal in optimized.log[0].refusals}
    assert reasons == {"its weight is a constant, and would be joined in every run"}


def test_a_bias_that_is_computed_after_the_first_product_is_refused() -> None:
    graph = Graph("g")
    b = Builder(graph)
    x = b.input("x", f32["B", 8])
    p, q, v = (b.parameter(name, f32[4, 8]) for name in "pqv")
    first = b.linear(x, p, None)
    shift = b.tanh(b.parameter("shift", f32[4]))
    b.outputs(p=first, q=b.linear(x, q, shift), v=b.linear(x, v, None))
    optimized = run(graph, MergeProjections())
    assert ops(optimized.graph) == ["projections", "tanh", "linear"]
    (refusal,) = optimized.log[0].refusals
    assert refusal.reason == "its bias is computed"


def test_a_weight_that_is_an_output_is_refused() -> None:
    graph = projections(biases="")
    graph.main.outputs["w"] = graph.parameters["k.weight"]
    (refusal,) = run(graph, MergeProjections()).log[0].refusals
    assert refusal.reason == "its weight is an output as well, and would be stored twice"


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_that_share_weights_share_the_joined_one(backend: str) -> None:
    found = find_backend(backend)
    if found.available() is not None:
        pytest.skip(str(found.available()))
    graph = Graph("albert")
    b = Builder(graph)
    x = b.input("x", f32["B", 8])
    weights = [b.parameter(name, f32[8, 8]) for name in "qk"]
    for _ in range(2):
        q, k = (b.linear(x, w, None) for w in weights)
        x = b.sin(q * k)
    b.outputs(y=x)
    merged = run(graph, MergeProjections()).graph
    assert ops(merged).count("projections") == 2
    lowered = PassManager((Legalize(), HoistWeights())).run(merged).graph
    assert len(lowered.derived_weights) == 1
    inputs = {"x": np.random.default_rng(0).standard_normal((3, 8), np.float32)}
    drawn = initial_weights(graph)
    made = found.compile(merged, Target("cpu"), drawn)(**inputs)["y"]
    np.testing.assert_allclose(made, interpret(graph, inputs, drawn)["y"], rtol=1e-5, atol=1e-6)


def test_products_of_different_values_stay_apart() -> None:
    graph = Graph("g")
    b = Builder(graph)
    x, y = b.input("x", f32["B", 8]), b.input("y", f32["B", 8])
    weights = [b.parameter(name, f32[4, 8]) for name in "uv"]
    b.outputs(p=b.linear(x, weights[0], None), q=b.linear(y, weights[1], None))
    assert ops(run(graph, MergeProjections()).graph) == ["linear", "linear"]


def test_a_matrix_that_is_computed_is_no_projection() -> None:
    graph = Graph("g")
    b = Builder(graph)
    x, keys = b.input("x", f32[4, 8]), b.input("keys", f32[8, 8])
    b.outputs(p=b.matmul(x, keys), q=b.matmul(x, b.exp(keys)))
    assert ops(run(graph, MergeProjections()).graph) == ["matmul", "exp", "matmul"]


# -- scales ----------------------------------------------------------------------------------------------------


def scaled_logits(k: int, n: int, *, norm: str = "", by: float = 0.125) -> Graph:
    graph = Graph("logits")
    b = Builder(graph)
    x: Expr = b.input("x", f32["B", k])
    if norm == "rms_norm":
        x = b.rms_norm(x, b.parameter("norm.weight", f32[k]))
    elif norm == "layer_norm":
        x = b.layer_norm(x, b.parameter("norm.weight", f32[k]), b.parameter("norm.bias", f32[k]))
    b.outputs(logits=b.linear(x, b.parameter("head.weight", f32[n, k]), None) * by)
    return graph


@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm"])
def test_logits_are_scaled_in_the_weight_of_the_norm(norm: str) -> None:
    graph = scaled_logits(8, 32, norm=norm)
    optimized = run(graph, FoldScale())
    assert ops(optimized.graph)[-2:] == [norm, "linear"]
    inputs = {"x": np.random.default_rng(0).standard_normal((3, 8), np.float32)}
    weights = initial_weights(graph)
    np.testing.assert_allclose(
        interpret(optimized.graph, inputs, weights)["logits"],
        interpret(graph, inputs, weights)["logits"],
        rtol=1e-5,
        atol=1e-7,
    )
    back = run(optimized.graph, UnfoldScale())
    assert ops(back.graph) == [norm, "mul", "linear"]


def test_a_wide_product_is_scaled_before_it() -> None:
    assert ops(run(scaled_logits(8, 32), FoldScale()).graph) == ["mul", "linear"]


def test_by_its_cost_a_narrow_product_is_scaled_after_it() -> None:
    optimized = run(scaled_logits(32, 8), FoldScale())
    assert ops(optimized.graph) == ["linear", "mul"]
    (refusal,) = optimized.log[0].refusals
    assert refusal.reason == "scaling 32 elements per row before the product is not faster on cpu than 8 after it"


def test_half_precision_is_not_scaled_up_before_a_product() -> None:
    graph = Graph("g")
    b = Builder(graph)
    x = b.input("x", f16["B", 4])
    b.outputs(y=b.linear(x, b.parameter("w", f16[16, 4]), None) * 8.0)
    optimized = run(graph, FoldScale())
    assert ops(optimized.graph) == ["linear", "mul"]
    (refusal,) = optimized.log[0].refusals
    assert refusal.reason == "a scale by 8 stays after the product: x times the scale may be out of range for f16"


def test_a_scale_that_leaves_the_range_of_numbers_stays_where_it_is() -> None:
    """1e9 * 1e30 is infinite in float32; (1e9 * 1e-9) * 1e30 is not."""
    graph = scaled_logits(8, 32, by=1e30)
    optimized = run(graph, FoldScale())
    assert ops(optimized.graph) == ["linear", "mul"]
    (refusal,) = optimized.log[0].refusals
    assert refusal.reason == "a scale by 1e+30 stays after the product: x times the scale may be out of range for f32"
    weights = {"head.weight": np.full((32, 8), 1e-9, np.float32)}
    made = interpret(optimized.graph, {"x": np.full((1, 8), 1e9, np.float32)}, weights)
    assert np.isfinite(made["logits"]).all()


def test_the_default_pipeline_does_both() -> None:
    assert any(isinstance(each, MergeProjections) for each in DEFAULT)
    assert any(isinstance(each, FoldScale) for each in DEFAULT)
    again = PassManager([*DEFAULT, CommonSubexpressions(), DeadCode()]).run(projections()).graph
    assert ops(again).count("projections") == 1

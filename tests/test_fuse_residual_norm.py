"""Residual + norm: a sum and its norm become one op. Near misses stay, with reasons. Numbers and kernels are the
same.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import treadle as t
from tests.backend_checks import needs_tvm
from tests.pass_programs import assert_same_numbers, optimize, program
from treadle.explaining.fusion import explain_fusion
from treadle.ir.builder import Builder
from treadle.ir.graph import Graph
from treadle.ir.text.parser import parse_graph
from treadle.passes.cleanup.decompose import Decompose
from treadle.passes.framework.manager import PassManager
from treadle.passes.fusion.fuse_residual_norm import FuseResidualNorm
from treadle.passes.pipelines import DEFAULT

X = "f32[B, S, 8]"
TAKES = f"x: {X}, r: {X}, w: f32[8], c: f32[8]"
LARGE = 2.0**-18
"""Tolerance for sums of a few dozen products in f32, added in any order."""

CASES = {
    "layer norm": (
        ["s = add(x, r)", "n = layer_norm(s, w, c, eps=0.1)", "return y = n"],
        ["n, s = add_layer_norm(x, r, w, c, eps=0.1)", "return y = n"],
    ),
    "rms norm without a weight": (
        ["s = add(x, r)", "n = rms_norm(s)", "return y = n"],
        ["n, s = add_rms_norm(x, r)", "return y = n"],
    ),
    "the sum goes on": (
        ["s = add(x, r)", "n = rms_norm(s, w)", "t = tanh(n)", "z = add(s, t)", "return y = z"],
        ["n, s = add_rms_norm(x, r, w)", "t = tanh(n)", "z = add(s, t)", "return y = z"],
    ),
    "a chain of them": (
        ["s = add(x, r)", "n = rms_norm(s, w)", "t = tanh(n)", "z = add(s, t)", "m = rms_norm(z, c)", "return y = m"],
        ["n, s = add_rms_norm(x, r, w)", "t = tanh(n)", "m, z = add_rms_norm(s, t, c)", "return y = m"],
    ),
    "read before the norm": (
        ["s = add(x, r)", "t = tanh(s)", "n = layer_norm(s, w)", "z = mul(n, t)", "return y = z"],
        ["n, s = add_layer_norm(x, r, w)", "t = tanh(s)", "z = mul(n, t)", "return y = z"],
    ),
    "its own residual": (
        ["s = add(x, x)", "n = layer_norm(s, w, c)", "return y = n"],
        ["n, s = add_layer_norm(x, x, w, c)", "return y = n"],
    ),
    "two norms of one sum": (
        ["s = add(x, r)", "n = layer_norm(s, w)", "m = layer_norm(s, c)", "z = mul(n, m)", "return y = z"],
        ["n, s = add_layer_norm(x, r, w)", "m = layer_norm(s, c)", "z = mul(n, m)", "return y = z"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_before_and_after(name: str) -> None:
    before, after = (program(TAKES, f"y: {X}", *lines) for lines in CASES[name])
    optimized = optimize(before, FuseResidualNorm())
    assert optimized.graph == parse_graph(after)
    assert parse_graph(str(optimized.graph)) == optimized.graph
    assert_same_numbers(optimized.source, optimized.graph)


def test_a_sum_that_is_an_output_is_the_second_result() -> None:
    lines = ["s = add(x, r)", "n = rms_norm(s, w)"]
    optimized = optimize(program(TAKES, f"y: {X}, z: {X}", *lines, "return y = n, z = s"), FuseResidualNorm())
    fused = "n, s = add_rms_norm(x, r, w)"
    assert optimized.graph == parse_graph(program(TAKES, f"y: {X}, z: {X}", fused, "return y = n, z = s"))
    assert_same_numbers(optimized.source, optimized.graph)


REFUSED = {
    "a bias": (
        ["s = add(x, $b)", "n = layer_norm(s, w)", "return y = n"],
        "the addend is a weight, f32[8], not a residual",
    ),
    "a table": (
        ["s = add($p, m)", "n = layer_norm(s, w)", "return y = n"],
        "the addend is a weight, f32[4, 8], not a residual",
    ),
    "a number": (
        ["s = add(x, 1.5)", "n = rms_norm(s, w)", "return y = n"],
        "the addend is a constant, f32[], not a residual",
    ),
    "a row": (
        ["s = add(x, c)", "n = layer_norm(s, w)", "return y = n"],
        "the sum broadcasts f32[8] to f32[B, S, 8]",
    ),
    "a cast": (
        ["h = cast(x, to=f16)", "s = add(h, h)", "f = cast(s, to=f32)", "n = layer_norm(f, w)", "return y = n"],
        "the sum is cast from f16 to f32 before it is normalized",
    ),
    "a weight that comes late": (
        ["s = add(x, r)", "q = reduce_sum(s, axes=[0, 1])", "n = layer_norm(s, q)", "return y = n"],
        "the sum is read, by reduce_sum, before weight is computed",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_each_near_miss_says_why(name: str) -> None:
    lines, reason = REFUSED[name]
    gives = "y: f32[4, 8]" if name == "a table" else f"y: {X}"
    takes = TAKES + (", m: f32[4, 8]" if name == "a table" else "")
    before = program(takes, gives, *lines, weights=["b: f32[8]", "p: f32[4, 8]"])
    optimized = optimize(before, FuseResidualNorm())
    assert optimized.graph == parse_graph(before)
    (event,) = optimized.log[0].refusals
    assert event.reason == reason


def test_a_second_norm_of_one_sum_is_told() -> None:
    optimized = optimize(program(TAKES, f"y: {X}", *CASES["two norms of one sum"][0]), FuseResidualNorm())
    assert [event.reason for event in optimized.log[0].refusals] == ["the sum is already fused with another layer_norm"]
    assert [event.rule for event in optimized.log[0].matches] == ["add-layer-norm"]


def test_a_weight_that_is_a_sum_comes_with_the_norm_of_it() -> None:
    """t becomes a result of the first norm's op, which comes after the place where the second op would have to be."""
    vectors = "x: f32[8], r: f32[8]"
    lines = ["t = add(x, r)", "u = exp(x)", "v = exp(r)", "s = add(u, v)", "z = tanh(s)"]
    norms = ["n = rms_norm(t)", "m = rms_norm(s, t)", "return y = z, n = n, m = m"]
    optimized = optimize(program(vectors, "y: f32[8], n: f32[8], m: f32[8]", *lines, *norms), FuseResidualNorm())
    assert [event.rule for event in optimized.log[0].matches] == ["add-rms-norm"]
    (refusal,) = optimized.log[0].refusals
    assert refusal.reason == "the sum is read, by tanh, before weight is computed"
    assert_same_numbers(optimized.source, optimized.graph)


@pytest.mark.parametrize("name", CASES)
def test_every_case_is_certified(name: str) -> None:
    before = program(TAKES, f"y: {X}", *CASES[name][0])
    certified = PassManager([FuseResidualNorm()], certify=True).run(parse_graph(before))
    assert certified.log[0].certificates
    assert certified.log[0].changes == sum("_norm(" in line and "add_" in line for line in CASES[name][1])
    assert not any("not certified" in c.note for c in certified.log[0].certificates)


# -- models ------------------------------------------------------------------------------------------------------------

SMALL = {"layers": 2, "dim": 32, "heads": 4, "vocab": 50}


def ops(graph: Graph) -> dict[str, int]:
    found: dict[str, int] = {}
    for _, node in graph.walk():
        found[node.op.name] = found.get(node.op.name, 0) + 1
    return found


@pytest.mark.parametrize(
    ("model", "op", "count", "norms"),
    [("bert", "add_layer_norm", 2, 1), ("gpt2", "add_layer_norm", 1, 2), ("llama", "add_rms_norm", 1, 2)],
)
def test_blocks_of_models(model: str, op: str, count: int, norms: int) -> None:
    """The first norm of a block, and the model's last norm, read a sum of another function."""
    found = ops(t.compile(model, **SMALL).graph)
    assert found[op] == count
    assert found[op.removeprefix("add_")] == norms


def test_decomposed_models_are_fused_again() -> None:
    graph = t.compile("bert", **SMALL).graph
    apart = PassManager([Decompose(("add_layer_norm", "layer_norm", "embedding_sum"))]).run(graph).graph
    assert not {"add_layer_norm", "layer_norm", "embedding_sum"} & ops(apart).keys()
    assert PassManager(DEFAULT).run(apart).graph == graph


def test_explain_lists_each_site() -> None:
    explanation = explain_fusion("gpt2", layers=2)
    report = [v for block in explanation.blocks for v in block.verdicts if v.kind == "residual"]
    assert [(v.status, v.op, v.rules) for v in report] == [("fused", "add_layer_norm", ("add-layer-norm",))]
    b = Builder(Graph("toy"))
    x, r = b.input("x", "f16[B, 8]"), b.input("r", "f16[B, 8]")
    b.outputs(y=b.rms_norm((x + r).cast("f32")), z=b.layer_norm(x + b.parameter("bias", "f16[8]")))
    (verdict,) = [v for v in explain_fusion(b.graph).blocks[0].verdicts if v.kind == "residual"]
    assert verdict.status == "refused"
    assert verdict.reason == "the sum is cast from f16 to f32 before it is normalized"


def test_explain_notes_a_second_norm_of_a_sum() -> None:
    lines = ["s = add(x, r)", "n = layer_norm(s, w)", "m = rms_norm(s, w)", "y = mul(n, m)", "return y = y"]
    verdicts = explain_fusion(parse_graph(program(TAKES, f"y: {X}", *lines))).blocks[0].verdicts
    (verdict,) = [v for v in verdicts if v.kind == "residual"]
    assert (verdict.status, verdict.op) == ("fused", "add_layer_norm")
    assert verdict.notes == ("the sum is already fused with another layer_norm",)


@needs_tvm
@pytest.mark.parametrize("model", ["bert", "gpt2", "llama"])
def test_tvm_has_the_kernels_that_it_had(model: str) -> None:
    """The sum stays at the end of the kernel of the preceding product."""
    without = [each for each in DEFAULT if each.name != "fuse-residual-norm"]
    sources = [t.compile(model, backend="tvm", passes=passes, **SMALL).source for passes in (without, DEFAULT)]
    before, after = (re.findall(r"^#? *\S*\[.*\] = (\w+)\(", s, re.M) for s in sources)
    assert len(before) > 8
    assert before == after
    assert any(kernel.endswith("_add") for kernel in after)


def test_onnx_and_back(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    from treadle.backends.onnx.exporter import export_onnx

    made = t.compile("bert", **SMALL)
    export_onnx(made.graph, made.weights, tmp_path / "bert.onnx")
    again = t.compile(tmp_path / "bert.onnx")
    found = ops(again.graph)
    assert (found["add_layer_norm"], found["layer_norm"], found["embedding_sum"]) == (4, 1, 1)
    tokens = np.random.default_rng(0).integers(0, 50, (2, 5))
    np.testing.assert_allclose(again(tokens=tokens)["hidden"], made(tokens=tokens)["hidden"], atol=LARGE)

"""Attention that also returns its probabilities: the op, programs that become it or do not, and ONNX in both
directions.

Two implementations of a few layers in float32 round each operation to 2^-24, in sums of tens of terms. The tolerance of
2e-5 is far above that, and far below the effect of a mistake.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import treadle
from tests.pass_programs import assert_same_numbers, optimize, program
from treadle.backends.registry import find_backend
from treadle.explaining.fusion import explain_fusion
from treadle.ir.analysis.cost import node_cost
from treadle.ir.analysis.encounters import Paired
from treadle.ir.analysis.following import follow
from treadle.ir.attention.attention_terms import BooleanMask, TensorBias
from treadle.ir.builder import Builder
from treadle.ir.composites import body_of
from treadle.ir.graph import Graph
from treadle.ir.interpreter import interpret
from treadle.ir.ops.attention import AttentionWithProbabilities
from treadle.ir.target import Target
from treadle.ir.text.parser import parse_graph
from treadle.ir.types import f32, i64
from treadle.passes.certificates import certifying as certificates
from treadle.passes.cleanup.decompose import Decompose
from treadle.passes.framework.manager import PassManager
from treadle.passes.fusion.attention.fuse_attention import FuseAttention
from treadle.passes.pipelines import DEFAULT

Array = np.ndarray[Any, Any]
ROOM = 2e-5
RNG = np.random.default_rng(0)
NAME = "attention_with_probabilities"


def names(graph: Graph) -> list[str]:
    return [node.op.name for _, node in graph.walk()]


# -- the op ----------------------------------------------------------------------------------------------------


def test_probabilities_are_what_the_values_are_weighted_by() -> None:
    """Probabilities of a row without keys are zeros; in every other row they sum to 1."""
    q, k, v = (RNG.standard_normal(shape) for shape in ((2, 4, 3, 5), (2, 2, 6, 5), (2, 2, 6, 7)))
    keep = RNG.random((2, 4, 3, 6)) < 0.5
    keep[1, 2, 0] = False
    keep[0, 0, 0] = True
    out, p = AttentionWithProbabilities(terms=(BooleanMask(),)).reference(q, k, v, keep)
    wanted = keep.any(-1).astype(float)
    np.testing.assert_allclose(p.sum(-1), wanted, rtol=0, atol=1e-14)
    assert not p[~keep].any()
    assert not out[1, 2, 0].any()
    np.testing.assert_allclose(out, p @ np.repeat(v, 2, axis=1), rtol=0, atol=1e-14)


@pytest.mark.parametrize("backend", ["numpy", "torch", "tvm"])
@pytest.mark.parametrize("mask", ["bool", "f32"])
def test_a_row_without_keys_gives_zeros_twice_on_every_backend(backend: str, mask: str) -> None:
    found = find_backend(backend)
    if (missing := found.available()) is not None:
        pytest.skip(missing)
    b = Builder(Graph("g"))
    q, k, v = b.input("q", "f32[2, 4, 3, 8]"), b.input("k", "f32[2, 2, 6, 8]"), b.input("v", "f32[2, 2, 6, 8]")
    term = BooleanMask("b s t") if mask == "bool" else TensorBias("b s t")
    out, p = b.attention_with_probabilities(q, k, v, b.input("m", f"{mask}[2, 3, 6]"), terms=(term,))
    b.outputs(out=out, p=p)
    keep = np.ones((2, 3, 6), np.bool_)
    keep[1, 1], keep[0, 2, 3:] = False, False
    given = {n: RNG.standard_normal(s).astype(np.float32) for n, s in (("q", (2, 4, 3, 8)), ("k", (2, 2, 6, 8)))}
    given |= {"v": RNG.standard_normal((2, 2, 6, 8)).astype(np.float32)}
    given |= {"m": keep if mask == "bool" else np.where(keep, 0, -np.inf).astype(np.float32)}
    made = found.compile(b.graph, Target("cpu"), {})(**given)
    assert not np.asarray(made["out"])[1, :, 1].any()
    assert not np.asarray(made["p"])[1, :, 1].any()
    assert np.asarray(made["p"])[0, :, 0].all()
    for name, wanted in interpret(b.graph, given, float64=True).items():
        np.testing.assert_allclose(made[name], wanted, rtol=0, atol=ROOM, err_msg=name)


def test_it_costs_what_attention_does_and_writes_the_probabilities() -> None:
    def cost(op: str) -> Any:
        b = Builder(Graph("g"))
        q, k, v = (b.input(n, "f32[2, 4, 64, 8]") for n in "qkv")
        made = getattr(b, op)(q, k, v, terms=["causal"])
        b.outputs(y=made[0] if isinstance(made, tuple) else made)
        return node_cost(b.graph.main.nodes[0], {})

    with_them, without = cost(NAME), cost("attention")
    assert with_them.flops == without.flops
    assert with_them.bytes - without.bytes == 2 * 4 * 64 * 64 * 4


def test_no_step_of_a_generation_gives_a_whole_row_of_probabilities() -> None:
    """The keys' axis of the returned probabilities covers the whole sequence, but a step computes only a part of it."""

    def graph(op: str) -> Graph:
        b = Builder(Graph("g"))
        x = b.rearrange(b.input("x", "f32[B, S, 8]"), pattern="b s d -> b 1 s d")
        made = getattr(b, op)(x, x, x, terms=["causal"])
        b.outputs(**({"y": made[0], "p": made[1]} if isinstance(made, tuple) else {"y": made}))
        return b.graph

    assert follow(graph("attention"), "S").step()
    verdict = follow(graph(NAME), "S").step()
    assert not verdict
    assert Paired(in_output=True) in [e.kind for e in verdict.against]


def test_softmax_stays_whole_where_no_row_can_be_empty() -> None:
    types = [f32["B", 2, "S", 4]] * 3
    ops = [n.op.name for n in body_of(AttentionWithProbabilities(terms=["causal"]), types).nodes]  # type: ignore[arg-type]
    assert "softmax" in ops
    masked = AttentionWithProbabilities(terms=["causal", "padding"])  # type: ignore[arg-type]
    assert "softmax" not in [n.op.name for n in body_of(masked, [*types, i64["B"]]).nodes]


# -- programs that become the op -------------------------------------------------------------------------------

SCORES = (
    'kt = rearrange(k, pattern="b h t d -> b h d t")',
    "scores = matmul(q, kt)",
    "scaled = mul(scores, 0.35355338)",
    "n = iota(size=S)",
    'i = rearrange(n, pattern="s -> s 1")',
    "keep = less_equal(n, i)",
    "masked = where(keep, scaled, -inf)",
    "p = softmax(masked)",
)
TAKES = "q: f32[B, 4, S, 8], k: f32[B, 4, S, 8], v: f32[B, 4, S, 8]"
OUT = "y: f32[B, 4, S, 8]"

FORMS = {
    "as they are": (
        f"{OUT}, p: f32[B, 4, S, S]",
        ("out = matmul(p, v)", "return y = out, p = p"),
        ("out, p = attention_with_probabilities(q, k, v, terms=[causal])", "return y = out, p = p"),
    ),
    "transposed, before the product": (
        f"{OUT}, p: f32[B, S, 4, S]",
        ('moved = rearrange(p, pattern="b h s t -> b s h t")', "out = matmul(p, v)", "return y = out, p = moved"),
        (
            "out, p = attention_with_probabilities(q, k, v, terms=[causal])",
            'moved = rearrange(p, pattern="b h s t -> b s h t")',
            "return y = out, p = moved",
        ),
    ),
    "twice, and cast": (
        f"{OUT}, p: f32[B, 4, S, S], half: f16[B, 4, S, S]",
        ("half = cast(p, to=f16)", "out = matmul(p, v)", "return y = out, p = p, half = half"),
        (
            "out, p = attention_with_probabilities(q, k, v, terms=[causal])",
            "half = cast(p, to=f16)",
            "return y = out, p = p, half = half",
        ),
    ),
    "of heads beside rows": (
        f"{OUT}, p: f32[B, 4, S, S]",
        (
            'flat = rearrange(p, pattern="b h s t -> (b h) s t")',
            'values = rearrange(v, pattern="b h t e -> (b h) t e")',
            "product = matmul(flat, values)",
            'shown = rearrange(flat, pattern="(b h=4) s t -> b h s t")',
            'out = rearrange(product, pattern="(b h=4) s e -> b h s e")',
            "return y = out, p = shown",
        ),
        ("out, p = attention_with_probabilities(q, k, v, terms=[causal])", "return y = out, p = p"),
    ),
}


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_returned_probabilities_become_the_second_result(form: str) -> None:
    gives, lines, expected = FORMS[form]
    text = program(TAKES, gives, *SCORES, *lines)
    optimized = optimize(text, FuseAttention())
    assert optimized.graph == parse_graph(program(TAKES, gives, *expected)), str(optimized.graph)
    (match,) = optimized.log[0].matches[:1]
    assert (match.rule, match.op) == ("attention-with-probabilities", "matmul")
    assert optimized.log[0].refusals == []
    assert_same_numbers(parse_graph(text), optimized.graph)


def test_results_have_the_names_that_someone_gave_or_say_what_they_are() -> None:
    gives, lines, _ = FORMS["as they are"]
    (node,) = optimize(program(TAKES, gives, *SCORES, *lines), FuseAttention()).graph.main.nodes
    assert [v.name for v in node.results] == ["out", "p"]
    b = Builder(Graph("g"))
    q, k, v = (b.input(n, "f32[B, 4, S, 8]") for n in "qkv")
    p = b.softmax(q @ b.rearrange(k, pattern="b h t d -> b h d t"))
    b.outputs(y=b.matmul(p, v), p=p)
    (node,) = PassManager([FuseAttention()]).run(b.graph).graph.main.nodes
    assert [v.name for v in node.results] == ["attention", "probabilities"]


def test_both_results_are_certified() -> None:
    gives, lines, _ = FORMS["as they are"]
    optimized = PassManager([FuseAttention()], certify=True).run(parse_graph(program(TAKES, gives, *SCORES, *lines)))
    found = optimized.log[0].certificates
    assert [c.rule for c in found] == ["fuse-attention"] * 2
    assert all(c.cases and not c.note.startswith("not certified") for c in found)


def test_wrong_probabilities_alone_are_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the second result would differ from the probabilities, the softmax is kept; the first result stays fused."""
    right = AttentionWithProbabilities.reference
    monkeypatch.setattr(
        AttentionWithProbabilities, "reference", lambda *given: (right(*given)[0], right(*given)[1] * 1.5)
    )
    gives, lines, _ = FORMS["as they are"]
    monkeypatch.setattr(certificates, "_known", {})  # forget the certificates of other tests
    text = program(TAKES, gives, *SCORES, *lines)
    optimized = PassManager([FuseAttention()], certify=True).run(parse_graph(text))
    report = [e for e in optimized.log[0].refusals if "rolled back" in e.reason]
    assert [e.op for e in report] == ["softmax"]
    outputs = {name: v.node.op.name for name, v in optimized.graph.main.outputs.items() if v.node is not None}
    assert outputs == {"y": NAME, "p": "softmax"}


def test_rows_without_keys_stay_nan_in_both() -> None:
    gives, lines, _ = FORMS["as they are"]
    masked = [line.replace("where(keep,", "where(given,") for line in SCORES if "iota" not in line]
    masked = [line for line in masked if not line.startswith(("i =", "keep ="))]
    text = program(f"{TAKES}, given: bool[B, 1, S, S]", gives, *masked, *lines)
    before = parse_graph(text)
    after = optimize(text, FuseAttention()).graph
    assert NAME in names(after)
    inputs = {n: RNG.standard_normal((2, 4, 3, 8)) for n in "qkv"}
    given = np.ones((2, 1, 3, 3), np.bool_)
    given[1, 0, 2] = False
    with np.errstate(invalid="ignore"):
        wanted, got = (interpret(g, {**inputs, "given": given}, float64=True) for g in (before, after))
    for name in ("y", "p"):
        assert np.isnan(wanted[name][1, :, 2]).all()
        np.testing.assert_allclose(got[name], wanted[name], rtol=0, atol=1e-6)


BLOCK = """graph g {
  symbols B, S
  block h(x: f32[B, 2, S, 4], v: f32[B, 2, S, 4]) -> (x: f32[B, 2, S, 4], p: f32[B, 2, S, S])
  {
    xt = rearrange(x, pattern="b h t d -> b h d t")
    scores = matmul(x, xt)
    scaled = mul(scores, 0.5)
    p = softmax(scaled)
    out = matmul(p, v)
    return x = out, p = p
  }
  main(x: f32[B, 2, S, 4], v: f32[B, 2, S, 4]) -> (GIVES) {
    one, p = h(x, v) with h.0
    two, r = h(one, v) with h.1
    LAST
  }
}"""


def block(gives: str, *last: str) -> str:
    return BLOCK.replace("GIVES", f"y: f32[B, 2, S, 4], p: f32[B, 2, S, S], {gives}").replace(
        "LAST", "\n    ".join(last)
    )


def test_results_of_a_block_are_followed_to_all_its_calls() -> None:
    moved = 'm = rearrange(r, pattern="b h s t -> b s t h")'
    text = block("r: f32[B, S, S, 2]", moved, "return y = two, p = p, r = m")
    optimized = optimize(text, FuseAttention())
    assert names(optimized.graph).count(NAME) == 1
    assert "softmax" not in names(optimized.graph)
    assert_same_numbers(parse_graph(text), optimized.graph)


def test_probabilities_of_the_last_call_alone() -> None:
    """The probabilities of the first call are unused."""
    text = block("z: f32[B, 2, S, 4]", "z = neg(one)", "return y = two, p = r, z = z")
    optimized = optimize(text, FuseAttention())
    assert names(optimized.graph).count(NAME) == 1
    assert "softmax" not in names(optimized.graph)
    assert_same_numbers(parse_graph(text), optimized.graph)


# -- near misses -----------------------------------------------------------------------------------------------

USED = {
    "averaged over heads": (
        "p: f32[B, S, S]",
        ("mean = reduce_mean(p, axes=[1])", "out = matmul(p, v)", "return y = out, p = mean"),
        "the probabilities are used elsewhere, by reduce_mean",
    ),
    "returned, and used as well": (
        "p: f32[B, 4, S, S], z: f32[B, 4, S, S]",
        ("more = mul(p, p)", "out = matmul(p, v)", "return y = out, p = p, z = more"),
        "the probabilities are used elsewhere, by mul",
    ),
    "transposed, and used then": (
        "z: f32[B, 4, S, 8]",
        ('m = rearrange(p, pattern="b h s t -> b h t s")', "out = matmul(p, v)", "z = matmul(m, q)",
         "return y = out, z = z"),
        "the probabilities are used elsewhere, by rearrange",
    ),
    "returned alone": (
        "p: f32[B, 4, S, S]",
        ("return y = v, p = p",),
        "the probabilities are an output, and are not multiplied with values",
    ),
    "returned before they are changed": (
        "p: f32[B, 4, S, S]",
        ("fewer = mul(p, 0.5)", "out = matmul(fewer, v)", "return y = out, p = p"),
        "the probabilities are multiplied by a constant before the product with the values",
    ),
}  # fmt: skip


@pytest.mark.parametrize("miss", USED, ids=str)
def test_probabilities_that_are_used_inside_are_left_alone(miss: str) -> None:
    gives, lines, reason = USED[miss]
    text = program(TAKES, f"{OUT}, {gives}", *SCORES, *lines)
    optimized = optimize(text, FuseAttention())
    assert optimized.graph == parse_graph(text)
    (event,) = optimized.log[0].refusals
    assert reason in event.reason


def test_a_block_whose_probabilities_one_call_uses_is_left_alone() -> None:
    text = block("r: f32[B, 2, S, S]", "more = mul(r, 2.0)", "return y = two, p = p, r = more")
    optimized = optimize(text, FuseAttention())
    assert optimized.graph == parse_graph(text)
    (event,) = optimized.log[0].refusals
    assert "an output of a block that is used where it is called" in event.reason


def test_probabilities_wider_than_attention_are_left_alone() -> None:
    """The softmax in float32 is cast to float16 for the product. Returned float32 probabilities prevent the fusion."""
    lines = ("wide = cast(scores, to=f32)", "p = softmax(wide)", "half = cast(p, to=f16)", "out = matmul(half, v)")
    takes, gives = TAKES.replace("f32", "f16"), "y: f16[B, 4, S, 8], p: {}[B, 4, S, S]"
    for returned, dtype in (("p", "f32"), ("half", "f16")):
        text = program(takes, gives.format(dtype), *SCORES[:2], *lines, f"return y = out, p = {returned}")
        optimized = optimize(text, FuseAttention())
        if dtype == "f16":
            assert NAME in names(optimized.graph)
        else:
            (event,) = optimized.log[0].refusals
            assert "returned in f32, but attention is in f16" in event.reason
            assert NAME not in names(optimized.graph)


def test_probabilities_that_nobody_asks_for_are_plain_attention() -> None:
    text = program(TAKES, OUT, *SCORES, "out = matmul(p, v)", "return y = out")
    assert names(optimize(text, FuseAttention()).graph) == ["attention"]


@pytest.mark.parametrize("number", range(len(AttentionWithProbabilities.samples)))
def test_decomposed_it_is_recognised_again(number: int) -> None:
    sample = AttentionWithProbabilities.samples[number]
    op = AttentionWithProbabilities(**sample.attributes)
    b = Builder(Graph("g"))
    named = zip(op.operand_names(len(sample.types)), sample.types, strict=True)
    made = b.emit(op, [b.input(n, t).value for n, t in named if t is not None])
    b.outputs(y=b.expr(made.results[0]), p=b.expr(made.results[1]))
    apart = PassManager([Decompose()]).run(b.graph).graph
    assert NAME not in names(apart)
    again = PassManager(DEFAULT).run(apart)
    assert [n for n in names(again.graph) if "attention" in n] == [NAME], again.log.explain()


# -- ONNX ------------------------------------------------------------------------------------------------------


def exported(graph: Graph, opset: int, path: Path) -> Any:
    from treadle.backends.onnx.exporter import export_onnx

    return export_onnx(graph, {}, path, opset=opset)


@pytest.mark.parametrize("opset", [17, 23])
@pytest.mark.parametrize("number", range(len(AttentionWithProbabilities.samples)))
def test_onnx_gives_both_results(number: int, opset: int, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from tests.onnx_models import answers, runtime
    from tests.op_checks import Case
    from treadle.frontends.onnx_import.importer import import_onnx

    case = Case.of(NAME, number)
    path = tmp_path / "p.onnx"
    made = exported(case.forward_graph(), opset, path)
    starts_later = case.op.attributes["start"] != 0  # the operator cannot express a start
    assert made.operators.get("Attention", 0) == (opset >= 23 and not starts_later)
    got = runtime(str(path), case.inputs)
    for n, wanted in enumerate(case.widened.results):
        np.testing.assert_allclose(got[f"y{n}"], wanted, rtol=0, atol=ROOM)
    if opset >= 23:
        back = import_onnx(path)
        assert (NAME in names(back.graph)) == (not starts_later)
        for answer in answers(back, case.inputs):
            for n, wanted in enumerate(case.widened.results):
                np.testing.assert_allclose(answer[f"y{n}"], wanted, rtol=0, atol=ROOM)


# -- Hugging Face models ---------------------------------------------------------------------------------------


def bert() -> Any:
    """Return a BERT of two layers that returns its last hidden states and the attention probabilities of each layer."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tests.hf_models import TINY

    model = TINY["bert"].build()
    model.set_attn_implementation("eager")

    class WithAttentions(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any) -> tuple[Any, ...]:
            out = self.model(input_ids, attention_mask, output_attentions=True, return_dict=True)
            return (out[0], *out.attentions)

    return WithAttentions().eval()


def drawn(batch: int, length: int) -> dict[str, Array]:
    from tests.onnx_exports import draw

    return draw("bert", 1, B=batch, S=length)


def wanted_of(module: Any, inputs: dict[str, Array]) -> list[Array]:
    import torch

    with torch.no_grad():
        return [x.numpy() for x in module(*(torch.from_numpy(x) for x in inputs.values()))]


def assert_every_layer(graph: Graph, layers: int) -> None:
    explanation = explain_fusion(graph)
    assert explanation.counts.get(NAME) == layers, str(explanation)
    assert "softmax" not in explanation.counts
    assert f"fused into {NAME} by attention-with-probabilities" in str(explanation)


def test_bert_with_its_attentions_through_torch_export() -> None:
    module = bert()
    import torch

    example = {name: torch.from_numpy(x) for name, x in drawn(2, 5).items()}
    model = treadle.from_torch(module, example, dynamic={"input_ids": "B S", "attention_mask": "B S"})
    layers = len(wanted_of(module, drawn(2, 5))) - 1
    assert_every_layer(model.graph, layers)
    for backend in ("numpy", "torch", "tvm"):
        if find_backend(backend).available() is not None:
            continue
        exe = treadle.compile(model, backend=backend, certify=backend == "numpy")
        for sizes in ((2, 5), (3, 7)):
            inputs = drawn(*sizes)
            got = list(exe(**inputs).values())
            wanted = wanted_of(module, inputs)
            assert len(got) == len(wanted) == layers + 1
            for ours, theirs in zip(got, wanted, strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=0, atol=ROOM)


@pytest.mark.parametrize("dynamo", [False, True])
def test_bert_with_its_attentions_through_onnx(dynamo: bool, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    module = bert()
    import torch

    from tests.onnx_models import runtime
    from tests.remembered_exports import remember_functions

    remember_functions()
    inputs = drawn(2, 5)
    layers = len(wanted_of(module, inputs)) - 1
    path = tmp_path / "bert.onnx"
    outputs = ["y", *(f"p{n}" for n in range(layers))]
    axes = {"input_ids": {0: "B", 1: "S"}, "attention_mask": {0: "B", 1: "S"}}
    options: dict[str, Any] = {"input_names": list(axes), "output_names": outputs, "opset_version": 18}
    options |= (
        {"dynamo": True, "dynamic_shapes": tuple(axes.values()), "verbose": False}
        if dynamo
        else {"dynamo": False, "dynamic_axes": axes}
    )
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, tuple(torch.from_numpy(x) for x in inputs.values()), str(path), **options)
    exe = treadle.compile(str(path), backend="torch")
    assert_every_layer(exe.optimized.source, layers)
    for sizes in ((2, 5), (3, 7)):
        inputs = drawn(*sizes)
        got, wanted = exe(**inputs), wanted_of(module, inputs)
        for name, theirs in zip(outputs, wanted, strict=True):
            np.testing.assert_allclose(got[name], theirs, rtol=0, atol=ROOM, err_msg=name)
    again = exported_again(exe, tmp_path / "again.onnx")
    answered = runtime(str(again), inputs)
    for name, theirs in zip(outputs, wanted, strict=True):
        np.testing.assert_allclose(answered[name], theirs, rtol=0, atol=ROOM, err_msg=name)


def exported_again(exe: Any, path: Path) -> Path:
    """Export the optimized graph to ONNX, where attention with probabilities of S keys is a Softmax between products.
    Return the path.
    """
    from treadle.backends.onnx.exporter import export_onnx

    made = export_onnx(exe.graph, exe.weights, path, opset=23)
    assert made.operators["Softmax"] == len(exe.graph.main.outputs) - 1
    return path


def test_probabilities_that_are_cut_before_they_are_returned_are_only_handed_out() -> None:
    lines = ["out = matmul(p, v)", "one = slice(p, axis=1, start=0, stop=1)", "return y = out, p = one"]
    optimized = optimize(program(TAKES, f"{OUT}, p: f32[B, 1, S, S]", *SCORES, *lines), FuseAttention())
    assert names(optimized.graph) == [NAME, "slice"]

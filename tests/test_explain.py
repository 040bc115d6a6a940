"""`treadle explain MODEL fusion`: every candidate site, its status, and the reason."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.golden import Golden
from tests.pass_programs import GELU, program
from treadle import compile as compile_model
from treadle.cli import app
from treadle.explaining.fusion import explain_fusion, parse_expected
from treadle.explaining.fusion_verdicts import FusionVerdict, judge
from treadle.ir.builder import Builder
from treadle.ir.errors import TreadleError, UsageError
from treadle.ir.graph import Graph
from treadle.ir.source_lines import SourceLine
from treadle.ir.text.parser import parse_graph
from treadle.passes.cleanup.round_trips import round_trip_at
from treadle.passes.framework.pass_log import Event, PassLog
from treadle.passes.framework.rewrite import Match, Rewrite
from treadle.passes.products.fuse_linear import FuseLinear
from treadle.passes.sites.fusion_sites import find_sites

MODEL = """import math

import treadle as t


def norm(x, axis=-1):
    m = x - t.reduce_mean(x, axes=(axis,), keep=True)
    return m * t.rsqrt(t.reduce_mean(m * m, axes=(axis,), keep=True) + 1e-5)


def heads(x):
    return t.rearrange(x, pattern="b s (h=2 d) -> b h s d")


def attend(x, axis=-1):
    q, k, v = heads(x), heads(x * 2.0), heads(x * 3.0)
    scores = q @ t.rearrange(k, pattern="b h s d -> b h d s") * 0.25
    return t.rearrange(t.softmax(scores, axis=axis) @ v, pattern="b h s d -> b s (h d)")


def gelu(x, c=math.sqrt(2)):
    return x / 2 * (1 + t.erf(x / c))


def dense(x):
    return x @ t.rearrange(t.parameter("w", 32, 32), pattern="o i -> i o") + t.parameter("b", 32)


@t.model
def toy(x: t.f32["B S 32"]):
    for _ in t.stack("h", 3):
        x += attend(norm(x))
        x += gelu(dense(x))
    return gelu(norm(attend(x, axis=-2), axis=1), 1.5)
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "toy.py").write_text(MODEL, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return "toy.py:toy"


def run_explain(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["explain", *arguments])
    return result.exit_code, result.output


def test_fused_and_refused_sites_are_told_by_block(toy: str, golden: Golden) -> None:
    code, text = run_explain(toy, "fusion")
    assert code == 0
    golden("explain/fused_and_refused.txt", text)


def test_lines_break_between_words_and_places(toy: str, golden: Golden) -> None:
    explanation = explain_fusion(toy)
    golden("explain/at_60_columns.txt", explanation.text(60))
    assert explanation.text(10_000) == str(explanation)
    for each in (explanation, explain_fusion("gpt2"), explain_fusion("t5")):
        text = each.text(80)
        assert max(map(len, text.splitlines())) <= 80
        assert [w for w in text.split() if w != "from"] == [w for w in str(each).split() if w != "from"]


def test_a_place_that_does_not_fit_has_a_line_of_its_own() -> None:
    place = "src/model/blocks/attention.py:1041  decoder.layers.11.self_attention"
    verdict = FusionVerdict(
        "attention", "fused", "attention", ("fuse-attention",), places=(place, place, "a.py:1  b", place)
    )
    assert list(verdict.lines(80)) == [
        "  4 x attention      fused into attention by fuse-attention",
        f"    from      {place}",
        f"    also at   {place};",
        "              a.py:1  b;",
        f"              {place}",
    ]


def test_the_place_of_an_edge_stands_below_it() -> None:
    near = FusionVerdict(
        "gate", "nearly", rules=("merged-gate",), matched=("mul",), edge="operand 1 of mul", at="m.py:9", reason="no",
        hint="yes", notes=("and",), places=("m.py:7",),
    )  # fmt: skip
    assert list(near.lines()) == [
        "  gate           not fused    m.py:7",
        "    rule      merged-gate",
        "    matched   mul",
        "    edge      operand 1 of mul",
        "    at        m.py:9",
        "    why       no",
        "    try       yes",
        "    note      and",
    ]


def test_json_says_the_same(toy: str) -> None:
    code, text = run_explain(toy, "fusion", "--json")
    facts = json.loads(text)
    assert (code, facts["model"], facts["met"]) == (0, "toy", True)
    assert facts["fused_ops"] == {"attention": 3, "layer_norm": 3, "activated_linear": 3}
    main = next(block for block in facts["blocks"] if block["function"] == "main")
    by_kind = {site["kind"]: site for site in main["sites"]}
    assert {site["status"] for site in main["sites"]} == {"refused", "nearly"}
    gelu = by_kind["activation"]
    assert gelu["matched"] == ["mul", "mul", "add", "erf", "div"]
    assert (gelu["rules"], gelu["edge"]) == (["gelu-erf"], "operand 1 of div")
    assert gelu["reason"] == "expected constant 1.41421, found constant 1.5"
    assert gelu["hint"] == "1.4142135623730951 as operand 1 of div"
    assert gelu["places"] == ["toy.py:22"]
    inner = [site for block in facts["blocks"] if block["function"] != "main" for site in block["sites"]]
    assert {site["status"] for site in inner} == {"fused"}
    assert sum(block["calls"] for block in facts["blocks"] if block["function"] != "main") == 3


@pytest.mark.parametrize(
    ("expected", "code"),
    [(["attention=3"], 0), (["attention=3", "gelu=3"], 0), (["attention=4"], 1), (["attention=3", "gelu=4"], 1)],
)
def test_a_count_that_differs_ends_with_1(toy: str, expected: list[str], code: int) -> None:
    options = [word for each in expected for word in ("--expect", each)]
    found, text = run_explain(toy, "fusion", *options)
    assert found == code
    assert ("NOT MET, there are 3" in text) == (code == 1)
    _, said = run_explain(toy, "fusion", "--json", *options)
    assert json.loads(said)["met"] == (code == 0)


def test_certificates_are_printed_where_asked_for(toy: str) -> None:
    assert "fuse-attention" in run_explain(toy, "fusion", "--certify")[1].split("a run has")[1]
    facts = json.loads(run_explain(toy, "fusion", "--certify", "--json")[1])
    assert {"gelu-erf", "layer-norm", "fuse-attention"} <= {c["rule"] for c in facts["certificates"]}
    assert "certificates" not in json.loads(run_explain(toy, "fusion", "--json")[1])


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_ops_that_are_fused_already_are_sites(name: str) -> None:
    explanation = explain_fusion(name, expect={"attention": 12} if name == "gpt2" else None)
    kinds = {v.kind for block in explanation.blocks for v in block.verdicts}
    assert {"attention", "normalization", "linear"} <= kinds
    statuses = {v.status for block in explanation.blocks for v in block.verdicts if v.op == "attention"}
    assert statuses == {"already"}
    assert explanation.met


def test_a_site_of_an_onnx_file_has_its_nodes_name(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    body = """
        [scores] s = MatMul (q, k)
        [probabilities] p = Softmax <axis = 1> (s)
        [values] y = MatMul (p, v)
    """
    signature = "(float[B,H,S,8] q, float[B,H,8,S] k, float[B,H,S,8] v) => (float[B,H,S,8] y)"
    text = f'<ir_version: 9, opset_import: ["": 18]> attention {signature} {{ {body} }}'
    path = tmp_path / "attention.onnx"
    onnx.save(onnx.parser.parse_model(text), path)
    code, said = run_explain(str(path), "fusion", "--json", "--expect", "attention=1")
    facts = json.loads(said)
    (site,) = facts["blocks"][-1]["sites"]
    assert (code, site["kind"], site["status"]) == (1, "attention", "refused")
    assert "probabilities" in site["places"][0]
    assert facts["expected"] == [{"op": "attention", "expected": 1, "found": 0}]
    onnx.save(onnx.parser.parse_model(text.replace("axis = 1", "axis = 3")), path)
    assert run_explain(str(path), "fusion", "--expect", "attention=1")[0] == 0


# -- quantized models -------------------------------------------------------------------------------------------------


def quantized(folder: Path, *excluded: str) -> Path:
    """Attention as ONNX Runtime's quantizer writes it, with QuantizeLinear and DequantizeLinear around each node."""
    onnx = pytest.importorskip("onnx")
    quantization = pytest.importorskip("onnxruntime.quantization")
    body = """
        [q] q0 = MatMul (x, wq)
        [k] k0 = MatMul (x, wk)
        [v] v0 = MatMul (x, wv)
        [kt] kt0 = Transpose <perm = [0, 2, 1]> (k0)
        [scores] s = MatMul (q0, kt0)
        [scaled] s1 = Div (s, c)
        [probabilities] p = Softmax <axis = -1> (s1)
        [values] o = MatMul (p, v0)
        [out] y = MatMul (o, wo)
    """
    text = f'<ir_version: 8, opset_import: ["": 17]> quantized (float[B,S,8] x) => (float[B,S,8] y) {{ {body} }}'
    model = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal((8, 8)).astype(np.float32) for name in ("wq", "wk", "wv", "wo")}
    for name, array in {**weights, "c": np.float32(2.0).reshape(())}.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.save(model, folder / "float.onnx")

    class Samples(quantization.CalibrationDataReader):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.left = [{"x": rng.standard_normal((2, 5, 8)).astype(np.float32)} for _ in range(2)]

        def get_next(self) -> Any:
            return self.left.pop() if self.left else None

    path = folder / "quantized.onnx"
    quantization.quantize_static(folder / "float.onnx", path, Samples(), nodes_to_exclude=list(excluded))
    return path


@pytest.mark.parametrize(
    ("excluded", "dropped"),
    [
        ((), 3),
        (("probabilities", "scores", "values"), 0),
        (("probabilities", "values"), 1),
        (("scores", "values"), 2),
    ],
)
def test_attention_of_a_quantized_model_is_fused(excluded: tuple[str, ...], dropped: int, tmp_path: Path) -> None:
    path = quantized(tmp_path, *excluded)
    explanation = explain_fusion(path)
    found = {v.kind: v for block in explanation.blocks for v in block.verdicts}
    assert found["attention"].status == "fused"
    assert "scale" not in found
    log = compile_model(path, backend="numpy").log.explain()
    assert log.count("a rounding inside attention is dropped") == dropped


def test_a_value_is_followed_through_a_round_trip_and_not_through_half_of_one() -> None:
    b = Builder(Graph("g"))
    x, bias = b.input("x", "f32[B, 8]"), b.input("bias", "f32[8]")
    steps = b.minimum(b.maximum(b.round(x / 0.25) + 3.0, -128.0), 127.0)
    back = (steps.cast("i8").cast("i32") - 3).cast("f32") * 0.25
    beside = b.round(x / 0.25) * 0.25 + bias
    b.outputs(back=back, beside=beside)
    trip = round_trip_at(back.value.node)
    assert trip is not None
    assert (trip.value, trip.dtype.name, len(trip.nodes)) == (x.value, "i8", 10)
    assert [node for node in b.graph.main.nodes if round_trip_at(node) is not None] == [
        trip.nodes[1],
        trip.nodes[0],
    ]


# -- invalid questions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gpt2", "weather"], "unknown subject to explain"),
        (["gpt2", "atention"], "one of fusion, layouts, storage, memory"),
        (["gpt2"], "one of fusion, layouts, storage, memory"),
        (["gpt2", "storage", "--sizes", "B=2"], "`sizes=` only applies together with `memory=`"),
        (["gpt2", "fusion", "--sizes", "B=2"], "explain fusion does not take sizes"),
        (["gpt2", "storage", "--svg", "a.svg"], "--svg applies to memory and sharding only"),
        (["gpt2", "memory", "--expect", "attention=2"], "--expect applies to fusion only"),
        (["gpt2", "fusion", "--expect", "attention"], "an expected count must be OP=NUMBER"),
        (["gpt2", "fusion", "--expect", "attention=-1"], "an expected count must be OP=NUMBER"),
        (["gpt2", "fusion", "--set", "passes=3"], "--set passes= is not part of a model's configuration"),
        (["gpt2", "fusion", "--expect", "=3"], "an expected count must be OP=NUMBER"),
        (["gpt2", "fusion", "--expect", "atention=3"], "unknown op 'atention'"),
        (["no-such-model", "fusion"], "there is no model"),
        (["gpt2.treadle", "fusion"], "an artifact does not record how it was compiled"),
    ],
)
def test_unexplained_cases_are_named(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["explain", *arguments])
    assert result.exit_code == 2
    assert said in result.output + (result.stderr if result.stderr_bytes else "")


def test_a_negative_count_is_refused() -> None:
    with pytest.raises(UsageError, match="0 or more"):
        explain_fusion("gpt2", expect={"attention": -1})


def test_expected_counts_are_read() -> None:
    assert parse_expected(["attention=12", " gelu = 0 "]) == {"attention": 12, "gelu": 0}
    with pytest.raises(TreadleError):
        parse_expected(["attention=1_0"])


# -- sites ------------------------------------------------------------------------------------------------------------


def kinds(graph: Graph) -> list[str]:
    return [site.kind for site in find_sites(graph)]


def spelled(*lines: str, x: str = "f32[B, S, 8]", more: str = "") -> list[str]:
    return kinds(parse_graph(program(f"x: {x}{more}", f"y: {x}", *lines)))


def test_a_softmax_is_attention_between_two_products_only() -> None:
    k = 'k = rearrange(x, pattern="b s d -> b d s")'
    products = [k, "s = matmul(x, k)", "p = softmax(s)", "o = matmul(p, x)", "return y = o"]
    assert spelled(*products) == ["attention"]
    assert spelled("p = softmax(x)", "return y = p") == []
    assert spelled("p = softmax(x)", k, "o = matmul(p, k)", "q = matmul(o, x)", "return y = q") == []


def test_a_softmax_that_is_spelled_out_counts_as_well() -> None:
    lines = [
        'k = rearrange(x, pattern="b s d -> b d s")',
        "s = matmul(x, k)",
        "m = reduce_max(s, axes=[-1], keep=true)",
        "c = sub(s, m)",
        "e = exp(c)",
        "t = reduce_sum(e, axes=[-1], keep=true)",
        "p = div(e, t)",
        "o = matmul(p, x)",
        "return y = o",
    ]
    assert spelled(*lines) == ["attention"]


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        (GELU, ["activation"]),
        (["a = tanh(x)", "b = add(a, 1.0)", "h = mul(x, 0.5)", "c = mul(h, b)", "return y = c"], ["activation"]),
        (["a = sigmoid(x)", "c = mul(x, a)", "return y = c"], ["activation"]),
        (["z = exp(x)", "a = sigmoid(z)", "c = mul(x, a)", "return y = c"], []),  # a gate of something else
        (["a = tanh(x)", "return y = a"], []),
        (["a = erf(x)", "return y = a"], []),
    ],
)
def test_an_activation_is_gated_by_what_it_is_of(lines: list[str], found: list[str]) -> None:
    assert spelled(*lines) == found


def test_a_mean_of_squares_is_a_normalization_where_it_is_divided_by() -> None:
    mean = ["s = mul(x, x)", "m = reduce_mean(s, axes=[-1], keep=true)"]
    assert spelled(*mean, "e = add(m, 1e-05)", "r = rsqrt(e)", "o = mul(x, r)", "return y = o") == ["normalization"]
    assert spelled(*mean, "e = add(m, 1e-05)", "r = sqrt(e)", "o = div(x, r)", "return y = o") == ["normalization"]
    assert spelled(*mean, "o = sub(x, m)", "return y = o") == []


def test_a_product_is_linear_with_a_weight_transposed_only() -> None:
    """A weight in the layout that matmul takes is left to matmul."""
    lines = ['k = rearrange($w, pattern="o i -> i o")', "a = matmul(x, k)", "return y = a"]

    def by(*lines: str, more: str = "") -> list[str]:
        takes, gives = f"x: f32[B, S, 8]{more}", "y: f32[B, S, 8]"
        return kinds(parse_graph(program(takes, gives, *lines, weights=["w: f32[8, 8]"])))

    assert by(*lines) == ["linear"]
    assert by("a = matmul(x, $w)", "return y = a") == []
    assert by(lines[0].replace("$w", "w2"), *lines[1:], more=", w2: f32[8, 8]") == []


def test_a_turn_is_a_rotary_site() -> None:
    b = Builder(Graph("g"))
    x, angles = b.input("x", "f32[B, S, 8]"), b.input("angles", "f32[S, 8]")
    half = b.concat(-b.slice(x, axis=-1, start=4, stop=8), b.slice(x, axis=-1, start=0, stop=4), axis=-1)
    b.outputs(y=x * b.cos(angles) + half * b.sin(angles))
    assert kinds(b.graph) == ["rotary"]


# -- reasons ----------------------------------------------------------------------------------------------------------


def only(graph: Graph, **options: Any) -> Any:
    (verdict,) = [v for block in explain_fusion(graph, **options).blocks for v in block.verdicts]
    return verdict


def test_a_value_used_elsewhere_names_its_reader_and_what_to_do() -> None:
    b = Builder(Graph("g"))
    x = b.input("x", "f32[B, S, 8]")
    b.source = SourceLine("model.py", 5)
    gate = b.erf(x * 0.5**0.5) + 1.0
    y = x * 0.5 * gate
    b.source = SourceLine("model.py", 9)
    b.outputs(y=y, z=b.exp(gate))
    verdict = only(b.graph)
    assert (verdict.status, verdict.reason) == ("refused", "the add is used elsewhere, by exp (model.py:9)")
    assert verdict.hint == "let that exp read another value"
    assert verdict.places == ("model.py:5",)


def test_a_pipeline_without_the_pass_is_told() -> None:
    text = program("x: f32[B, S, 8]", "y: f32[B, S, 8]", *GELU)
    assert only(parse_graph(text), passes=[FuseLinear()]).reason == "the pipeline has no fuse-gelu"


def test_unread_values_are_reported() -> None:
    b = Builder(Graph("g"))
    x = b.input("x", "f32[B, S, 8]")
    b.source = SourceLine("model.py", 1)
    _ = x * 0.5 * (b.erf(x * 0.5**0.5) + 1.0)
    b.source = SourceLine("model.py", 2)
    b.outputs(y=-x)
    assert only(b.graph).reason == "other passes removed it"


def test_a_rewrite_that_fails_its_certificate_is_a_refused_site() -> None:
    @dataclass(frozen=True)
    class FuseGelu(Rewrite):
        """gelu by erf --> gelu by tanh, which is not the same"""

        def pattern(self, p: Any, x: Any, c: Any) -> Any:
            return (x * 0.5) * (p.erf(x * p.near(0.5**0.5)) + 1)

        def rewrite(self, b: Builder, m: Match) -> Any:
            return b.gelu_tanh(m.x)

    text = program("x: f32[B, S, 8]", "y: f32[B, S, 8]", *GELU)
    verdict = only(parse_graph(text), passes=[FuseGelu()], certify=True)
    assert verdict.status == "refused" and "its certificate failed" in verdict.reason
    assert only(parse_graph(text), passes=[FuseGelu()], certify=False).status == "fused"


def test_events_that_name_no_nodes_are_of_the_site_at_their_line(toy: str) -> None:
    """Events of an artifact name no nodes, nor do events of a pass that does not report its nodes."""
    optimized = explain_fusion(toy).optimized

    def bare(events: list[Event]) -> list[Event]:
        return [replace(event, original_nodes=frozenset()) for event in events]

    log = PassLog(
        replace(r, matches=bare(r.matches), refusals=bare(r.refusals), near_misses=bare(r.near_misses))
        for r in optimized.log
    )
    whole, partial = ({s.anchor: v for s, v in judge(each)} for each in (optimized, replace(optimized, log=log)))
    assert {v.status for v in partial.values()} > {"fused", "refused"}
    assert [(v.status, v.rules) for v in partial.values()] == [(whole[s].status, whole[s].rules) for s in partial]


@pytest.mark.parametrize(("count", "more"), [(4, ""), (5, " and 1 more"), (6, " and 2 more")])
def test_equal_sites_are_told_once_with_all_their_places(count: int, more: str) -> None:
    b = Builder(Graph("g"))
    x = b.input("x", "f32[B, S, 8]")
    for line in range(1, count + 1):
        b.source = SourceLine("model.py", line)
        x = x * 0.5 * (b.erf(x * 0.5**0.5) + 1.0)
    b.outputs(y=x)
    verdict = only(b.graph)
    assert verdict.places == tuple(f"model.py:{line}" for line in range(1, count + 1))
    text = str(explain_fusion(b.graph))
    assert f"{count} x activation" in text
    assert re.search(rf"also at.* model\.py:4{more}$", text, re.MULTILINE), text


def test_a_table_that_is_cut_is_no_residual() -> None:
    """Such a table holds positions of a longer context, which are added to embeddings."""

    def found(weight: str, *lines: str) -> list[str]:
        norm = ["a = add(x, p)", "n = rms_norm(a)", "return y = n"]
        takes = f"x: f32[4, 8]{', p: f32[4, 8]' if not weight else ''}"
        weights = [weight] if weight else []
        return kinds(parse_graph(program(takes, "y: f32[4, 8]", *lines, *norm, weights=weights)))

    assert "residual" in found("")
    assert "residual" not in found("w: f32[9, 8]", "p = slice($w, axis=0, start=0, stop=4)")

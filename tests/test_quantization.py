"""Quantization of a model's weights: the plan, its checker, its application, its costs, and its report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import treadle
from tests.pass_programs import program
from treadle.backends.registry import backend_names, find_backend
from treadle.cli import app
from treadle.explaining.quantization import explain_quantization
from treadle.frontends.declarations import Model
from treadle.ir.encodings.encoding import FORMS, Encoding, parse_encoding
from treadle.ir.errors import GraphError, PassError, UsageError
from treadle.ir.graph import Graph
from treadle.ir.interpreter import interpret
from treadle.ir.text.parser import parse_graph
from treadle.models.bert import bert
from treadle.models.gpt2 import gpt2
from treadle.models.llama import llama
from treadle.passes.framework.manager import Pass, PassManager
from treadle.passes.pipelines import DEFAULT
from treadle.passes.quantization.plan_checking import check_quantization
from treadle.passes.quantization.planning import SCHEMES, plan_quantization
from treadle.passes.quantization.quantization_plan import QuantizationPlan, numbered_names
from treadle.passes.quantization.quantize import QuantizeWeights
from treadle.reporting.compilations import compiled_lines
from treadle.verifying import verify_model

Array = np.ndarray[Any, Any]

MODELS: dict[str, Model] = {
    "llama": llama.configure(vocab=96, dim=64, heads=4, kv_heads=2, layers=3, hidden=128, tied=True),
    "bert": bert.configure(vocab=96, dim=64, heads=4, layers=3, hidden=128),
    "gpt2": gpt2.configure(vocab=96, context=16, dim=64, heads=4, layers=3),
}
EVERY = """graph every {
  symbols B, S
  parameters {
    across: f32[64, 8]
    along: f32[8, 64]
    both: f32[64, 64]
    computed: f32[8, 64]
    whole: f32[1, 64]
    odd: f32[8, 40]
    stack: f32[3, 64, 8]
    table: f32[9, 64]
    tied: f32[7, 64]
    lost: f32[8, 64]
    half: f16[8, 64]
    blocks: f32[8, 64] as q8_0
    bias: f32[8]
    returned: f32[8, 64]
  }

  block twice(x: f32[B, S, 64]) -> (y: f32[B, S, 64])
    weights w: f32[8, 64], v: f32[64, 8]
  {
    h = linear(x, $w)
    y = linear(h, $v)
    return y = y
  }

  main(x: f32[B, S, 64], i: i64[B, S], z: f32[B, S, 40], n: f16[B, S, 64]) -> (
    logits: f32[B, S, 7], a: f32[B, S, 8], b: f32[B, S, 8], c: f32[B, S, 64], d: f32[B, S, 8], e: f32[3, S, 8],
    f: f16[B, S, 8], g: f32[B, S, 8], r: f32[8, 64]
  ) {
    y = twice(x) with {w: $along, v: $across}
    picked = gather($table, i)
    rows = gather($tied, i)
    sum = add(picked, rows)
    logits = linear(sum, $tied)
    a = matmul(y, $across)
    t = mul($computed, $whole)
    b = linear(x, t, $bias)
    m = matmul(x, $both)
    c = linear(m, $both)
    d = linear(z, $odd)
    row = slice(x, axis=0, start=0, stop=1)
    row_2 = rearrange(row, pattern="1 s d -> s d")
    three = expand(row_2, shape=[3, S, 64])
    e = matmul(three, $stack)
    f = linear(n, $half)
    held = decode($blocks, of=q8_0)
    g = linear(x, held)
    back = linear(x, $returned)
    g_2 = add(g, back)
    return logits = logits, a = a, b = b, c = c, d = d, e = e, f = f, g = g_2, r = $returned
  }
}
"""


@pytest.fixture(scope="module")
def every() -> Graph:
    return parse_graph(EVERY)


def optimized(name: str) -> Graph:
    return PassManager(DEFAULT).run(MODELS[name].graph()).graph


def run(model: str, backend: str, **options: Any) -> Array:
    made = treadle.compile(MODELS[model], backend=backend, seed=4, **options)
    inputs = {p.name: np.arange(10).reshape(2, 5) % (2 if "type" in p.name else 16) for p in made.inputs}
    return np.asarray(next(iter(made(**inputs).values())), np.float64)


# -- the plan ------------------------------------------------------------------------------------------------------


def test_explanations_of_each_weight(every: Graph) -> None:
    plan = plan_quantization(every, "int4")
    check_quantization(plan, every)
    message = {w.name: (str(w.encoding), w.reason) for w in plan.weights}
    assert message == {
        "across": ("None", "products sum along both of its axes"),
        "along": ("int4_groups(32)", "multiplied by linear"),
        "both": ("None", "products sum along both of its axes"),
        "computed": ("None", "mul reads its elements"),
        "whole": ("None", "mul reads its elements"),
        "odd": ("int8_rows", "multiplied by linear, an output"),
        "stack": ("None", "not a matrix: it has rank 3"),
        "table": ("None", "gather looks up rows of it, but no product reads it whole"),
        "tied": ("int8_rows", "multiplied by linear, an output; gather looks up rows of it"),
        "lost": ("None", "nothing reads it"),
        "half": ("None", "its elements are f16, but only f32 is quantized"),
        "blocks": ("None", "stored as q8_0 already"),
        "bias": ("None", "not a matrix: it has rank 1"),
        "returned": ("None", "the caller reads its elements"),
    }
    assert set(plan.encodings) == {"along", "odd", "tied"}
    assert plan.bytes_before - plan.bytes == sum(
        every.parameters[n].type.bytes_at({}) - every.parameters[n].type.as_encoded(e).bytes_at({})
        for n, e in plan.encodings.items()
    )
    encodings = {w.name: str(w.encoding) for w in plan_quantization(every, "int8-weights").weights if w.encoding}
    assert encodings == {"along": "int8_rows", "odd": "int8_rows", "tied": "int8_rows"}


def test_a_weight_that_is_only_joined_with_another_says_so() -> None:
    lines = ["j = concat($v, $w, axis=0)", "y = linear(x, j)", "return y = y"]
    graph = parse_graph(program("x: f32[B, 8]", "y: f32[B, 6]", *lines, weights=["v: f32[2, 8]", "w: f32[4, 8]"]))
    reasons = {each.reason for each in plan_quantization(graph, "int8").weights}
    assert reasons == {"concat copies its elements, but no product reads it whole"}


def test_a_line_that_is_no_whole_number_of_groups_stays() -> None:
    text = """graph g {
      symbols B
      parameters { w: f32[64, 40]
        v: f32[8, 64] }
      main(x: f32[B, 40]) -> (y: f32[B, 8]) { h = linear(x, $w) y = linear(h, $v) return y = y }
    }"""
    plan = plan_quantization(parse_graph(text), "int4")
    assert [w.reason for w in plan.weights] == [
        "an axis of 40 is not an integer number of int4_groups blocks",
        "multiplied by linear, an output",
    ]


ODD = """graph odd {
  symbols B
  parameters { a: f32[40, 40]  b: f32[40, 40]  c: f32[8, 40] }
  main(x: f32[B, 40]) -> (y: f32[B, 8]) { h = linear(x, $a) g = linear(h, $b) y = linear(g, $c) return y = y }
}"""
MISFIT = "f32[40, 40], an axis of 40 is not an integer number of int4_groups blocks"


def test_weights_whose_sizes_a_scheme_does_not_take_are_reported() -> None:
    graph = parse_graph(ODD)
    weights = {name: np.ones(value.type.evaluate({}), np.float32) for name, value in graph.parameters.items()}
    made = treadle.compile(graph, weights=weights, quantize="int4", backend="numpy")
    lines = list(compiled_lines(made, 1.0))
    (at,) = (i for i, line in enumerate(lines) if line.startswith("odd, int4: 1 of 3 weights in blocks"))
    assert lines[at + 1 : at + 3] == [f"not quantized: {name}: {MISFIT}" for name in "ab"]
    assert "not quantized" not in "".join(compiled_lines(treadle.compile(graph, weights=weights), 1.0))


def test_a_scheme_that_fits_no_matrix_is_refused() -> None:
    graph = parse_graph(ODD.replace("return y = y", "z = softmax(y, axis=1) return y = z"))
    for scheme in ("int4", "int4-int8"):
        with pytest.raises(UsageError, match=f"{scheme} quantizes nothing of odd") as caught:
            treadle.compile(graph, quantize=scheme, backend="numpy")
        assert caught.value.received is not None
        assert caught.value.received.splitlines()[0] == f"a: {MISFIT}"
        assert str(caught.value.hint).startswith('quantize="int8-weights"')
    assert treadle.compile(graph, quantize="int8-weights", backend="numpy").weights


def test_a_head_has_eight_bits_also_if_its_logits_are_capped() -> None:
    """Elementwise ops average no rounding errors; the sum over the logits of a softmax does."""
    text = """graph g {
      symbols B
      parameters { h: f32[96, 64] w: f32[48, 96] }
      main(x: f32[B, 64]) -> (capped: f32[B, 48]) {
        hidden = linear(x, $h)
        y = linear(hidden, $w)
        small = div(y, 30.0)
        bounded = tanh(small)
        capped = mul(bounded, 30.0)
        return capped = capped
      }
    }"""
    encodings = plan_quantization(parse_graph(text), "int4").encodings
    assert {name: str(each) for name, each in encodings.items()} == {"h": "int4_groups(32)", "w": "int8_rows"}


def test_numbers_of_layers_are_in_order() -> None:
    assert numbered_names(["a.0.b", "a.2.b", "a.1.b", "a.4.b"]) == "a.{0..2,4}.b"


def test_weights_that_lie_the_other_way_have_blocks_along_their_first_axis() -> None:
    text = """graph g {
      symbols B
      parameters { w: f32[64, 48] }
      main(x: f32[B, 64]) -> (y: f32[B, 48]) { y = matmul(x, $w) z = softmax(y, axis=1) return y = z }
    }"""
    graph = parse_graph(text)
    for scheme, encoding in (("int8-weights", "int8_rows(axis=0)"), ("int4", "int4_groups(32, axis=0)")):
        plan = plan_quantization(graph, scheme)
        assert {n: str(e) for n, e in plan.encodings.items()} == {"w": encoding}
        check_quantization(plan, graph)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", MODELS)
def test_every_matrix_of_a_model_is_planned(name: str, scheme: str) -> None:
    graph = optimized(name)
    plan = plan_quantization(graph, scheme)
    check_quantization(plan, graph)
    stay = {w.name for w in plan.weights if w.type.rank == 2 and w.encoding is None}
    assert stay == {"llama": set(), "gpt2": {"wpe.weight"}}.get(
        name, {f"embeddings.{part}.weight" for part in ("word", "position", "token_type")}
    )
    assert plan.bytes < plan.bytes_before * (0.6 if name != "gpt2" else 0.5)


def test_a_scheme_that_would_round_nothing_of_a_model_in_blocks_is_refused() -> None:
    """Weights in blocks are not quantized again, so only the activations that they multiply could be rounded."""
    graph = parse_graph("""graph g {
      symbols M
      parameters { w: f32[8, 64] as q4_1 }
      main(x: f32[M, 64]) -> (y: f32[M, 8]) {
        w = decode($w, of=q4_1)
        y = linear(x, w)
        return y = y
      }
    }""")
    weights = {"w": Encoding("q4_1").sample(np.random.default_rng(0), (8, 64))}
    for scheme in ("int4", "int8-weights"):
        with pytest.raises(UsageError, match=f"{scheme} quantizes nothing of g: its matrices are in blocks") as error:
            treadle.compile(graph, weights=weights, quantize=scheme)
        assert error.value.received == "1 in q4_1"
        assert error.value.hint is not None
        assert 'quantize="int8"' in error.value.hint
    for scheme in ("int8", "int4-int8"):
        made = treadle.compile(graph, weights=weights, quantize=scheme)
        assert "encode(x, to=int8_groups(32))" in str(made.graph)


def test_four_bits_beside_rounded_activations() -> None:
    """4-bit groups with rounded groups of activations, and 8-bit rows of the logits' weight with rounded rows."""
    plan = plan_quantization(optimized("llama"), "int4-int8")
    check_quantization(plan, optimized("llama"))
    assert plan.encodings == plan_quantization(optimized("llama"), "int4").encodings
    assert {str(a.encoding) for a in plan.activations} == {"int8_groups(32)", "uint8_rows"}
    (logits,) = [a for a in plan.activations if str(a.encoding) == "uint8_rows"]
    assert logits.function == "main"
    exact, near = (run("llama", "numpy", quantize=scheme) for scheme in ("int4", "int4-int8"))
    assert 0 < np.abs(near - exact).max() < 5e-2 * np.abs(exact).max()


def test_an_unknown_scheme_is_refused(every: Graph) -> None:
    with pytest.raises(PassError, match="unknown quantization 'int3'") as error:
        plan_quantization(every, "int3")
    assert error.value.hint == "one of int8-weights, int8, int4, int4-int8, as-stored"
    with pytest.raises(UsageError, match="unknown quantization scheme 'int3'"):
        treadle.compile(MODELS["llama"], quantize="int3")


# -- the checker ---------------------------------------------------------------------------------------------------


def changed(plan: QuantizationPlan, weight: str, /, **fields: Any) -> QuantizationPlan:
    weights = tuple(replace(w, **fields) if w.name == weight else w for w in plan.weights)
    return replace(plan, weights=weights)


EIGHT = Encoding("int8_rows")


@pytest.mark.parametrize(
    ("name", "fields", "what"),
    [
        ("along", {"encoding": EIGHT.along(0)}, "does not sum over the axis of its blocks"),
        ("both", {"encoding": EIGHT}, "does not sum over the axis of its blocks"),
        ("computed", {"encoding": EIGHT}, "mul, of main does not sum over the axis of its blocks"),
        ("returned", {"encoding": EIGHT}, "returned is an output, and must not be in blocks"),
        ("bias", {"encoding": EIGHT}, "bias is f32[8], not a matrix of numbers"),
        ("blocks", {"encoding": EIGHT}, "blocks is f32[8, 64] as q8_0, not a matrix of numbers"),
        ("tied", {"encoding": EIGHT.along(0)}, "gather would split its blocks"),
        ("tied", {"reason": ""}, "tied has no reason"),
        (
            "tied",
            {"type": parse_graph(EVERY).parameters["along"].type},
            "tied is f32[7, 64], but is planned as f32[8, 64]",
        ),
        ("tied", {"name": "other"}, "other must be planned once"),
        ("tied", {"name": "along"}, "must be planned once"),
    ],
)
def test_a_wrong_plan_is_caught(every: Graph, name: str, fields: dict[str, Any], what: str) -> None:
    plan = changed(plan_quantization(every, "int8-weights"), name, **fields)
    with pytest.raises(PassError, match="the quantization plan is wrong") as error:
        check_quantization(plan, every)
    assert what in str(error.value)


def test_a_plan_that_the_planner_would_not_make_may_be_right(every: Graph) -> None:
    """The checker judges the effect of a plan, not whether the planner would choose it."""
    table = changed(plan_quantization(every, "int8-weights"), "table", encoding=EIGHT, reason="it is large")
    check_quantization(table, every)
    check_quantization(changed(table, "tied", encoding=None, reason="precious"), every)


# -- applied -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["int8-weights", "int4"])
@pytest.mark.parametrize("name", MODELS)
def test_the_numbers_are_those_of_the_rounded_weights(name: str, scheme: str) -> None:
    made = treadle.compile(MODELS[name], quantize=scheme, seed=4, certify=True)
    plan = plan_quantization(optimized(name), scheme)
    drawn = treadle.compile(MODELS[name], seed=4).weights
    rounded = {n: (e.decode(e.encode(w)) if (e := plan.encodings.get(n)) else w) for n, w in drawn.items()}
    for weight, array in made.weights.items():
        encoding = plan.encodings.get(weight)
        assert made.graph.parameters[weight].type.encoding == encoding
        assert (array.dtype == np.uint8) == (encoding is not None)
    inputs = {p.name: np.arange(10).reshape(2, 5) % (2 if "type" in p.name else 16) for p in made.inputs}
    wanted = interpret(optimized(name), inputs, rounded)
    for output, array in interpret(made.graph, inputs, dict(made.weights)).items():
        np.testing.assert_array_equal(array, wanted[output])
    for output, array in made(**inputs).items():
        np.testing.assert_allclose(array, wanted[output], rtol=0, atol=2e-5 * np.abs(wanted[output]).max())


@pytest.mark.parametrize("backend", backend_names())
@pytest.mark.parametrize(("scheme", "least"), [("int8-weights", 0.999), ("int8", 0.999), ("int4", 0.97)])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_stay_near(name: str, scheme: str, least: float, backend: str) -> None:
    if (reason := find_backend(backend).available()) is not None:
        pytest.skip(f"backend {backend}: {reason}")
    plain, rounded = run(name, backend), run(name, backend, quantize=scheme)
    cosine = (plain * rounded).sum() / np.sqrt((plain**2).sum() * (rounded**2).sum())
    assert least < cosine < 1 - 1e-9


@pytest.mark.parametrize("name", MODELS)
def test_quantized_models_fuse_like_float_models(name: str) -> None:
    made = PassManager((*DEFAULT, QuantizeWeights("int4"))).run(MODELS[name].graph())
    nodes = [[n.op.name for n in f.nodes if not n.op.decodes] for f in made.graph.functions.values()]
    assert nodes == [[n.op.name for n in f.nodes] for f in optimized(name).functions.values()]
    (record,) = [r for r in made.log if r.name == "quantize-weights"]
    assert record.changes == len(plan_quantization(optimized(name), "int4").encodings)
    assert record.notes[0].startswith(f"{made.graph.name}, int4: ")


def test_with_bf16_products_multiply_decoded_numbers_in_bf16() -> None:
    made = treadle.compile(MODELS["llama"], quantize="int8-weights", dtype="bf16", backend="torch", seed=4)
    block = made.graph.functions["layer"]
    (node,) = [n for n in block.nodes if n.op.name == "projections"]
    casts = [v.node for v in node.inputs[1:4]]
    assert [n.op.name for n in casts if n is not None] == ["cast"] * 3
    assert all(n is not None and n.inputs[0].node is not None and n.inputs[0].node.op.decodes for n in casts)
    plain = run("llama", "torch", quantize="int8-weights")
    both = run("llama", "torch", quantize="int8-weights", dtype="bf16")
    assert 0 < np.abs(plain - both).max() < 0.05 * np.abs(plain).max()


def test_weights_of_the_caller_are_rounded_or_taken_as_blocks() -> None:
    floats = dict(treadle.compile(MODELS["llama"], seed=4).weights)
    made = treadle.compile(MODELS["llama"], quantize="int4", weights=floats)
    again = treadle.compile(MODELS["llama"], quantize="int4", weights=dict(made.weights))
    for name, array in made.weights.items():
        np.testing.assert_array_equal(again.weights[name], array)
    floats["layer.1.mlp.up.weight"] = floats["layer.1.mlp.up.weight"].copy()
    floats["layer.1.mlp.up.weight"][3, 7] = np.nan
    with pytest.raises(GraphError, match="int4_groups holds finite values") as error:
        treadle.compile(MODELS["llama"], quantize="int4", weights=floats)
    assert "weight layer.1.mlp.up.weight" in str(error.value)
    assert "nan at [3, 7]" in str(error.value)


def test_an_artifact_holds_the_blocks(tmp_path: Path) -> None:
    made = treadle.compile(MODELS["llama"], quantize="int4", seed=4)
    made.save(tmp_path / "small.treadle")
    plain = treadle.compile(MODELS["llama"], seed=4)
    plain.save(tmp_path / "plain.treadle")
    again = treadle.load_artifact(tmp_path / "small.treadle")
    tokens = np.array([[3, 1, 4]])
    np.testing.assert_array_equal(again(tokens=tokens)["logits"], made(tokens=tokens)["logits"])
    held = sum(a.nbytes for a in made.weights.values())
    saved = (tmp_path / "plain.treadle").stat().st_size - (tmp_path / "small.treadle").stat().st_size
    assert saved > 0.8 * (sum(a.nbytes for a in plain.weights.values()) - held)


def test_a_session_generates_with_rounded_weights() -> None:
    made = treadle.compile(MODELS["llama"], quantize="int8-weights", seed=4)
    session = made.session(rows=1, capacity=8)
    row = session.open()
    stepped = session.prefill({row: [3, 1]})[row]
    whole = made(tokens=np.array([[3, 1]]))["logits"][0, -1]
    np.testing.assert_allclose(stepped, whole, rtol=0, atol=1e-5 * np.abs(whole).max())


def test_verify_holds_backends_against_the_rounded_model() -> None:
    report = verify_model(MODELS["gpt2"], quantize="int4", backends=["numpy"])
    assert report.passed


def test_verify_takes_an_artifact_with_blocks(tmp_path: Path) -> None:
    treadle.compile(MODELS["gpt2"], quantize="int4", backend="numpy").save(tmp_path / "model.treadle")
    report = verify_model(tmp_path / "model.treadle", backends=["numpy"])
    assert report.passed and report.rewrites.exceeds is False


# -- the report ----------------------------------------------------------------------------------------------------


def test_a_plan_prints_with_layers_folded() -> None:
    message = str(explain_quantization(MODELS["llama"], quantize="int4"))
    lines = message.splitlines()
    assert lines[0] == "llama, int4: 22 of 29 weights in blocks, 70,528 bytes of 468,736"
    assert lines[2].split() == ["weight", "type", "encoding", "bytes", "was", "why"]
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in lines[3:]}
    assert rows["layer.{0..2}.attn.q.weight"] == "f32[64, 64] int4_groups(32) 6,912 49,152 multiplied by linear"
    assert rows["norm.weight"] == "f32[64] stays 256 256 not a matrix: it has rank 1"
    assert len(rows) == 11


def test_the_command_line_plans_and_quantizes() -> None:
    small = [word for pair in ("layers=2", "dim=64", "heads=4", "vocab=96") for word in ("--set", pair)]
    runner = CliRunner()
    planned = runner.invoke(app, ["explain", "gpt2", "quantization", "--quantize", "int4", *small, "--json"])
    assert planned.exit_code == 0, planned.output
    facts = json.loads(planned.stdout)
    assert facts["scheme"] == "int4"
    assert {w["encoding"] for w in facts["weights"]} == {None, "int8_rows", "int4_groups(32)"}
    by_default = runner.invoke(app, ["explain", "gpt2", "quantization", *small])
    assert "gpt2, int8-weights: 13 of 36 weights in blocks" in by_default.stdout
    shown = runner.invoke(app, ["inspect", "gpt2", "--quantize", "int8-weights", *small])
    assert "decode($attn.q.weight, of=int8_rows)" in shown.stdout
    wrong = runner.invoke(app, ["compile", "gpt2", "--quantize", "int2", *small])
    assert wrong.exit_code != 0


@pytest.mark.parametrize("part", ["", "[:, -1:]", "[:, -1]", "[:, asked]", "[0, 2]"])
@pytest.mark.parametrize("passes", [DEFAULT, []], ids=["cut", "whole"])
def test_a_product_whose_part_is_an_output_has_eight_bits(part: str, passes: Sequence[Pass]) -> None:
    small = {"layers": 1, "dim": 64, "heads": 4, "vocab": 96}
    exe = treadle.compile("gpt2", quantize="int4", outputs=[f"logits{part}"], passes=passes, **small)
    assert exe.graph.parameters["wte.weight"].type.encoding == EIGHT


def test_a_file_that_is_quantized_already_is_told_as_it_is(tmp_path: Path) -> None:
    made = treadle.compile(MODELS["llama"], quantize="int4", seed=4)
    plan = explain_quantization(made.graph)
    assert {w.reason for w in plan.weights if w.type.encoding is not None} == {
        "stored as int4_groups(32) already",
        "stored as int8_rows already",
    }
    assert plan.encodings == {}
    head = str(plan).splitlines()[0]
    assert head.startswith("llama, int8-weights: 22 of 29 weights in blocks, 22 of them already, 70,528 bytes")
    made.save(tmp_path / "model.treadle")
    with pytest.raises(UsageError, match="an artifact does not record how it was compiled"):
        explain_quantization(tmp_path / "model.treadle")


def test_the_documentation_lists_every_form() -> None:
    page = (Path(__file__).parent.parent / "docs" / "quantization.md").read_text(encoding="utf-8")
    grammar = (Path(__file__).parent.parent / "docs" / "ir-grammar.md").read_text(encoding="utf-8")
    for name in FORMS:
        assert f"`{name}" in page, name
        assert name in grammar, name
    assert parse_encoding("int4_groups(32)").bits(64) == 4.5

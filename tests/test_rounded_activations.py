"""Activations that are rounded to 8-bit rows at every call: the plan, its checker, exact products, and the ops that
read them.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import treadle
from tests.backend_checks import graph_of
from tests.test_quantization import EVERY, MODELS
from treadle.backends.numpy.backend import NumpyBackend
from treadle.backends.registry import backend_names, find_backend
from treadle.explaining.quantization import explain_quantization
from treadle.ir.analysis.tolerances import coarsest_spacing
from treadle.ir.builder import Builder, Expr
from treadle.ir.encodings.encoding import Encoding, parse_encoding
from treadle.ir.errors import BackendError, PassError, RuleError
from treadle.ir.graph import Graph
from treadle.ir.interpreter import interpret
from treadle.ir.ops.blocks import GROUPS, ROWS, STEPS, EncodedLinear, rounded_for
from treadle.ir.target import Target
from treadle.ir.text.parser import parse_graph
from treadle.ir.types import f32, parse_type
from treadle.passes.capabilities import PRIMITIVES, Capabilities
from treadle.passes.framework.facts import INITIAL, LEGAL
from treadle.passes.framework.manager import PassManager
from treadle.passes.lowering.multiply_blocks import MultiplyBlocks
from treadle.passes.pipelines import DEFAULT
from treadle.passes.products.narrow_products import NarrowProducts
from treadle.passes.quantization.plan_checking import check_encoded_products, check_quantization
from treadle.passes.quantization.planning import plan_quantization
from treadle.passes.quantization.quantize import QuantizeWeights
from treadle.passes.stages import Recognize, run
from treadle.verifying import verify_model

Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def every() -> Graph:
    return parse_graph(EVERY)


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


# -- the plan ------------------------------------------------------------------------------------------------------


def test_what_becomes_of_each_value_that_weights_multiply(every: Graph) -> None:
    plan = plan_quantization(every, "int8")
    check_quantization(plan, every)
    message = {(a.function, a.name): (str(a.encoding), a.reason) for a in plan.activations}
    assert message == {
        ("twice", "x"): (
            "uint8_rows",
            "linear multiplies it with int8_rows; not smoothed: no norm with a gain produces it",
        ),
        ("twice", "h"): ("None", "linear multiplies it with numbers, as across is stored"),
        ("main", "sum"): (
            "uint8_rows",
            "linear multiplies it with int8_rows; not smoothed: no norm with a gain produces it",
        ),
        ("main", "y"): ("None", "matmul multiplies it with numbers, as across is stored"),
        ("main", "x"): (
            "int8_groups(32)",
            "linear multiplies it with q8_0; linear multiplies it with the result of mul, not with a weight; matmul"
            " multiplies it with numbers, as both is stored; linear multiplies it with numbers, as returned is stored",
        ),
        ("main", "m"): ("None", "linear multiplies it with numbers, as both is stored"),
        ("main", "z"): (
            "uint8_rows",
            "linear multiplies it with int8_rows; not smoothed: no norm with a gain produces it",
        ),
        ("main", "three"): ("None", "matmul multiplies it with numbers, as stack is stored"),
        ("main", "n"): (
            "None",
            "its elements are f16, but only f32 is quantized; linear multiplies it with numbers, as half is stored",
        ),
    }
    assert plan.encodings == plan_quantization(every, "int8-weights").encodings
    assert plan_quantization(every, "int8-weights").activations == ()


def test_what_the_plan_says_as_json(every: Graph) -> None:
    facts = json.loads(json.dumps(plan_quantization(every, "int8").as_dict()))
    assert (facts["scheme"], facts["bytes"], facts["bytes_before"]) == ("int8", 36252, 40000)
    message = {each["name"]: each for part in ("weights", "activations") for each in facts[part] if each["name"] != "x"}
    held = {"bytes": 64 * 8 + 8 * 4, "bytes_before": 64 * 8 * 4}
    named = {"name": "along", "type": "f32[8, 64]", "encoding": "int8_rows", "reason": "multiplied by linear"}
    assert message["along"] == {**named, **held}
    assert message["sum"] == {
        **{"function": "main", "name": "sum", "type": "f32[B, S, 64]", "encoding": "uint8_rows", "products": [4]},
        "reason": "linear multiplies it with int8_rows; not smoothed: no norm with a gain produces it",
    }
    assert {message[name]["encoding"] for name in ("across", "h", "n")} == {None}
    assert plan_quantization(every, "int8-weights").as_dict().keys() == {
        "model",
        "scheme",
        "bytes",
        "bytes_before",
        "weights",
    }


@pytest.mark.parametrize("name", MODELS)
def test_every_product_with_weights_of_a_model_reads_rounded_rows(name: str) -> None:
    graph = run(MODELS[name].graph(), [Recognize()]).graph  # as at the stage `quantize`
    plan = plan_quantization(graph, "int8")
    check_quantization(plan, graph)
    assert plan.activations
    assert all(a.encoding == STEPS for a in plan.activations)
    shown = str(explain_quantization(MODELS[name], quantize="int8"))
    for each in plan.activations:
        assert f"{each.name}, of {each.function}" in shown
    assert [b["gain"] for b in json.loads(json.dumps(plan.as_dict()))["balances"]] == [b.gain for b in plan.balances]
    fed = [a for a in plan.activations if a.reason.endswith("; smoothed")]
    assert len({(b.gain, b.shift) for b in plan.balances}) == len(plan.balances) >= 4
    assert fed


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"function": "none"}, "x of none has no function"),
        ({"products": ()}, "x of twice has no products, or no reason"),
        ({"reason": ""}, "x of twice has no products, or no reason"),
        ({"products": (1,)}, "node 1 of twice does not read x: f32[B, S, 64] first"),
        ({"products": (9,)}, "node 9 of twice does not read x"),
        ({"type": f32[3, 64]}, "node 0 of twice does not read x: f32[3, 64] first"),
        ({"products": (0, 0)}, "x of twice is planned twice for node 0"),
    ],
)
def test_a_wrong_plan_is_caught(every: Graph, fields: dict[str, Any], what: str) -> None:
    plan = plan_quantization(every, "int8")
    first, *others = plan.activations
    with pytest.raises(PassError, match="the quantization plan is wrong") as error:
        check_quantization(replace(plan, activations=(replace(first, **fields), *others)), every)
    assert what in str(error.value)


@pytest.mark.parametrize("reader", ["relu", "computed", "output"])
def test_rounded_rows_that_no_product_with_encoded_weights_reads_are_caught(reader: str) -> None:
    def block(b: Builder) -> Expr:
        x = b.decode(b.encode(b.input("x", f32["M", 64]), to="int8_rows"), of="int8_rows")
        if reader == "relu":
            return b.relu(x)
        return x if reader == "output" else b.linear(x, b.parameter("w", f32[9, 64]))

    with pytest.raises(PassError, match="the quantized graph is wrong"):
        check_encoded_products(graph_of(block))


def test_products_of_rounded_rows_are_left_in_float32() -> None:
    both = PassManager((*DEFAULT, QuantizeWeights("int8"), NarrowProducts())).run(MODELS["llama"].graph())
    (record,) = [r for r in both.log if r.name == "narrow-products"]
    assert record.changes == 0
    assert {r.reason for r in record.refusals} == {"x is rounded to blocks already"}


# -- meaning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", [ROWS, STEPS])
def test_the_product_is_one_of_whole_numbers(encoding: Encoding) -> None:
    x, w, bias = normal(3, 5, 40) + 1, normal(7, 40, seed=1), normal(7)
    held, weight = encoding.encode(x), ROWS.encode(w)
    rows, columns = (a.view(e.block.record(40))[..., 0] for a, e in ((held, encoding), (weight, ROWS)))
    zero = rows["zero"][..., None].astype(int) if encoding == STEPS else 0
    (q, s), (p, t) = (rows["q"].astype(int) - zero, rows["scale"]), (columns["q"].astype(int), columns["scale"])
    sums = np.einsum("bsk,nk->bsn", q, p).astype(np.float32)
    op = EncodedLinear()
    np.testing.assert_array_equal(op.reference(held, weight, None), sums * (s[..., None] * t))
    np.testing.assert_array_equal(op.reference(held, weight, bias), sums * (s[..., None] * t) + bias)
    near = encoding.decode(held) @ ROWS.decode(weight).T + bias
    np.testing.assert_allclose(op.reference(held, weight, bias), near, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("backend", "taken"), [(PRIMITIVES, [5, 6]), (Capabilities(takes=lambda weight: True), [2, 5, 6])]
)
def test_products_that_stay_stand_in_nobodys_way(backend: Capabilities, taken: list[int]) -> None:
    """Products of unquantized numbers, of blocks that do not fit, along another axis, or of unsupported blocks do not
    prevent the rounding of others.
    """
    b = Builder(Graph("g"))
    x = b.input("x", f32["M", 64])
    rows, groups = (b.decode(b.encode(x, to=to), of=to) for to in ("uint8_rows", "int8_groups(32)"))
    four, eight, across = (
        b.decode(b.parameter(f"w{n}", parse_type(f"f32[64, 64] as {of}")), of=of)
        for n, of in enumerate(("int4_groups(32)", "int8_rows", "int8_rows(axis=0)"))
    )
    made = [b.linear(x, eight), b.linear(rows, four), b.linear(groups, four), b.linear(groups, eight)]
    made += [b.matmul(rows, eight), b.linear(rows, eight), b.matmul(rows, across)]
    b.outputs(**{f"y{n}": y for n, y in enumerate(made)})
    results = PassManager([MultiplyBlocks(backend)]).run(b.graph, facts=INITIAL | {LEGAL}).graph.main.results
    ops = [v.node.op.name for v in results if v.node is not None]
    assert [n for n, op in enumerate(ops) if op == "encoded_linear"] == taken
    assert len(ops) == len(made)


def test_other_encodings_are_refused() -> None:
    b = Builder(Graph("g"))
    x = b.input("x", f32["M", 64])
    rows = b.encode(x, to="int8_rows")
    with pytest.raises(RuleError, match="weight is not encoded as int8_rows"):
        b.encoded_linear(rows, b.encode(b.parameter("w", f32[32, 64]), to="int4_groups(32)"))
    with pytest.raises(RuleError, match="x is not encoded as uint8_rows or int8_rows"):
        b.encoded_linear(x, rows)
    four = b.parameter("v", parse_type("f32[32, 64] as q4_1"))
    with pytest.raises(RuleError, match=r"int8_rows and q4_1 have no product of integers"):
        b.encoded_linear(rows, four, of="q4_1")
    with pytest.raises(RuleError, match=r"x is not encoded as int8_groups\(32\)"):
        b.encoded_linear(rows, four, of="q4_1", rows="int8_groups(32)")


def test_what_each_encoding_of_a_weight_has_its_activations_rounded_to() -> None:
    message = {text: str(rounded_for(parse_encoding(text))) for text in FORMS_OF_WEIGHTS}
    assert message == FORMS_OF_WEIGHTS


FORMS_OF_WEIGHTS = {
    "int8_rows": "uint8_rows",
    **dict.fromkeys(("q4_0", "q4_1", "q5_0", "q5_1", "q8_0"), "int8_groups(32)"),
    **dict.fromkeys(("q2_k", "q3_k", "q4_k", "q5_k", "q6_k"), "int8_groups(32)"),
    **dict.fromkeys(("int4_groups(32)", "int4_groups(256)", "int8_groups(64)"), "int8_groups(32)"),
    **dict.fromkeys(("int4_groups(16)", "q8_0(axis=0)", "q4_k(axis=0)"), "None"),
}


@pytest.mark.parametrize("text", [text for text, rounded in FORMS_OF_WEIGHTS.items() if rounded.endswith("(32)")])
def test_the_product_of_groups_is_one_of_whole_numbers_in_each(text: str) -> None:
    encoding, rng = parse_encoding(text), np.random.default_rng(0)
    x, held, bias = normal(3, 5, 512), encoding.sample(rng, (7, 512)), normal(7)
    op, rows = EncodedLinear(of=encoding, rows=GROUPS), GROUPS.encode(x)
    record = np.ascontiguousarray(rows).view(GROUPS.block.record(32))
    meant = np.zeros((3, 5, 7))
    q, d, c = encoding.block.parts(held.reshape(-1).view(encoding.block.record(encoding.elements(512))))
    p = q.astype(int).reshape(7, 32, 16)  # 16 adjacent elements always share their scales
    d, c = (np.repeat(each.reshape(7, -1), 32 * 7 // each.size, axis=1) for each in (d, c))
    for part in range(32):
        g = record["q"][..., part // 2, part % 2 * 16 : part % 2 * 16 + 16].astype(int)
        sums = np.einsum("bsk,nk->bsn", g, p[:, part])
        more = sums * d[:, part].astype(float) + g.sum(-1)[..., None] * c[:, part].astype(float)
        meant += record["scale"][..., part // 2, None].astype(float) * more
    np.testing.assert_array_equal(op.reference(rows, held, None), meant.astype(np.float32))
    np.testing.assert_array_equal(op.reference(rows, held, bias), meant.astype(np.float32) + bias)
    near = GROUPS.decode(rows) @ encoding.decode(held).T
    np.testing.assert_allclose(op.reference(rows, held, None), near, rtol=0, atol=1e-5 * np.abs(near).max())


@pytest.mark.parametrize("rows", [(2, 5), (1, 1)], ids=str)
@pytest.mark.parametrize("backend", backend_names())
@pytest.mark.parametrize("name", MODELS)
def test_backends_multiply_whole_numbers(name: str, backend: str, rows: tuple[int, int]) -> None:
    """Results are close to NumPy's integer arithmetic: an activation that differs by a bit before rounding may be
    rounded to the next step.
    """
    if (reason := find_backend(backend).available()) is not None:
        pytest.skip(f"backend {backend}: {reason}")
    made = treadle.compile(MODELS[name], backend=backend, quantize="int8", seed=4)
    exact = treadle.compile(MODELS[name], backend="numpy", quantize="int8", seed=4)
    inputs = {p.name: np.arange(rows[0] * rows[1]).reshape(rows) % (2 if "type" in p.name else 16) for p in made.inputs}
    for output, wanted in exact(**inputs).items():
        np.testing.assert_allclose(made(**inputs)[output], wanted, rtol=0, atol=5e-3 * np.abs(wanted).max())
        meant = interpret(made.graph, inputs, dict(made.weights))[output]
        np.testing.assert_allclose(wanted, meant, rtol=0, atol=5e-3 * np.abs(wanted).max())


def test_numpy_and_torch_keep_what_they_multiply_in_bytes() -> None:
    for backend in ("numpy", "torch"):
        if find_backend(backend).available() is not None:
            continue
        made = treadle.compile(MODELS["llama"], backend=backend, quantize="int8", seed=4)
        assert "encoded_linear" in made.source
        assert ".linear(" not in made.source.replace("encoded_linear(", "")
        assert "activated" not in made.source


@pytest.mark.parametrize("backend", backend_names())
def test_a_row_that_is_not_finite_is_lost_alone(backend: str) -> None:
    if (reason := find_backend(backend).available()) is not None:
        pytest.skip(f"backend {backend}: {reason}")
    graph = graph_of(lambda b: b.linear(b.input("x", f32["M", 64]), b.parameter("w", f32[9, 64])))
    rounded = PassManager((*DEFAULT, QuantizeWeights("int8"))).run(graph).graph
    x, w = normal(6, 64), normal(9, 64, seed=1)
    exe = find_backend(backend).compile(rounded, Target("cpu"), {"w": ROWS.encode(w)})
    wanted = np.asarray(exe(x=x)["y"]).copy()
    wanted[[1, 4]] = np.nan
    x[1, 5], x[4, 63] = np.inf, np.nan
    np.testing.assert_array_equal(np.asarray(exe(x=x)["y"]), wanted)


def test_other_blocks_of_what_is_computed_have_no_form_in_pytorch() -> None:
    torch = find_backend("torch")
    if (reason := torch.available()) is not None:
        pytest.skip(f"backend torch: {reason}")

    def block(b: Builder) -> Expr:
        return b.decode(b.encode(b.input("x", f32["M", 64]), to="int4_groups(32)"), of="int4_groups(32)")

    with pytest.raises(BackendError, match="int4_groups"):
        torch.compile(graph_of(block), Target("cpu"), {})
    x = normal(3, 64)
    near = NumpyBackend().compile(graph_of(block), Target("cpu"), {})(x=x)["y"]
    assert 0 < np.abs(near - x).max() < 0.5


def test_a_session_goes_on_as_the_whole_text_says() -> None:
    made = treadle.compile(MODELS["llama"], quantize="int8", seed=4)
    session = made.session(rows=1, capacity=8)
    row = session.open()
    stepped = session.prefill({row: [3, 1]})[row]
    whole = made(tokens=np.array([[3, 1]]))["logits"][0, -1]
    np.testing.assert_allclose(stepped, whole, rtol=0, atol=5e-3 * np.abs(whole).max())


@pytest.mark.parametrize("name", MODELS)
def test_verify_allows_for_a_step_of_a_row_and_no_more(name: str) -> None:
    """Rounding to 255 steps counts like rounding to a dtype with that spacing."""
    report = verify_model(MODELS[name], quantize="int8", backends=["numpy"])
    assert report.passed
    graph = treadle.compile(MODELS[name], quantize="int8", seed=4).graph
    assert coarsest_spacing(graph) == 2 / 255
    assert coarsest_spacing(treadle.compile(MODELS[name], quantize="int8-weights", seed=4).graph) == 2.0**-23


def test_an_artifact_rounds_as_the_model_does(tmp_path: Path) -> None:
    made = treadle.compile(MODELS["llama"], quantize="int8", seed=4)
    made.save(tmp_path / "small.treadle")
    again, tokens = treadle.load_artifact(tmp_path / "small.treadle"), np.array([[3, 1, 4]])
    assert str(again.graph) == str(made.graph)
    np.testing.assert_array_equal(again(tokens=tokens)["logits"], made(tokens=tokens)["logits"])

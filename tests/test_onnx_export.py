"""ONNX export: every op and every model in ONNX Runtime against the reference, at every opset."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.backend_checks import assert_near, graph_of, message
from tests.error_texts import raises_freely
from tests.onnx_files import exported, in_runtime, run, session, weights_of
from tests.op_checks import DTYPES, EPSILON, TESTED, Array, Case
from tests.rounding_bounds import Bounded, assert_within, bounded
from tests.test_models import ZOO, in_turns
from tests.test_op_suite import dtypes_of, shared_dtypes
from treadle.backends.onnx.exporter import (
    NEWEST_OPSET,
    OLDEST_OPSET,
    Exported,
    export_onnx,
)
from treadle.backends.onnx.spelling import SPELLINGS, in_ops
from treadle.ir.analysis.drawn_inputs import draw_inputs
from treadle.ir.attention.attention_terms import Alibi, BooleanMask, Causal, Padding, TensorBias, Window
from treadle.ir.builder import Builder, Expr
from treadle.ir.errors import BackendError
from treadle.ir.graph import Graph
from treadle.ir.interpreter import interpret
from treadle.ir.op_registry import OPS
from treadle.ir.types import bf16
from treadle.passes.framework.manager import PassManager
from treadle.passes.pipelines import DEFAULT

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
onnx_reference = pytest.importorskip("onnx.reference")


NEWEST = min(NEWEST_OPSET, onnx.defs.onnx_opset_version())
EVERY_OPSET = range(OLDEST_OPSET, NEWEST + 1)

MODEL_TOLERANCE = 2e-5
"""Tolerance of max|a - b| / max|b|, with the argument of tests/test_huggingface_models.py: some sums of tens of float32
products.
"""


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    ort.set_default_logger_severity(4)
    yield
    ort.set_default_logger_severity(2)


# -- every op ----------------------------------------------------------------------------------------------------

SINCE = {"fold_windows": 16, "index_add": 16, "scatter_add": 16}
"""Ops that have no form before an opset."""

FORMATS_SINCE = {"bf16": 13, "f8e4m3fn": 19, "f8e4m3fnuz": 19, "f8e5m2": 19, "f8e5m2fnuz": 19, "f4e2m1": 23}
"""The first opset in which an op rounds to a float format."""

NO_KERNEL = {("erf", "f64"), ("gelu", "f64"), ("round_to", "f4e2m1")}
"""Operators of the standard that ONNX Runtime's CPU kernels lack: compared with onnx's own reference instead."""

OP_OPSETS = [13, 17, 23, NEWEST]


def is_refused(case: Case, opset: int) -> str | None:
    """Return the text of the refusal, if the op has no form at the opset."""
    format = case.op.attributes.get("format")
    if format is not None and opset < FORMATS_SINCE[format]:
        return f"ONNX has no Cast of {format} at opset {opset}"
    return f"opset {opset} has no scatter with reduction='add'" if opset < SINCE.get(case.op.name, 0) else None


@pytest.mark.parametrize("opset", OP_OPSETS)
@pytest.mark.parametrize("name", TESTED)
def test_every_op(name: str, opset: int, tmp_path: Path) -> None:
    """Every sample, in every dtype at the default opset, and in its share of the dtypes at the oldest. At the other
    two, samples take turns, in their own dtypes.
    """
    dtypes = {13: shared_dtypes, 23: dtypes_of}.get(opset, lambda *_: [None])
    samples = range(len(OPS[name].samples))
    if opset not in (13, 23):
        samples = samples[(opset == NEWEST) % len(samples) :: 2]
    for number in samples:
        for dtype in dtypes(name, number):
            case = Case.of(name, number, dtype)
            graph = case.forward_graph()
            refused = is_refused(case, opset)
            if refused is not None:
                with raises_freely(BackendError, match=refused):
                    export_onnx(graph, {}, tmp_path / "op.onnx", opset=opset)
                continue
            made = export_onnx(graph, {}, tmp_path / "op.onnx", opset=opset)
            for output, (got, wanted) in answers(case, graph, made.path).items():
                what = f"{name}-{number}-{dtype} at {opset}"
                value = graph.main.outputs[output]
                assert value.type.dtype is bf16 or got.dtype == value.type.dtype.numpy, what
                assert_within(got, wanted, what)


@pytest.mark.parametrize("opset", [OLDEST_OPSET, 23])
def test_an_op_said_in_ops_of_ours_rounds_once(opset: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In 16 bits, a decomposition with three roundings would exceed the error bound of one op."""
    monkeypatch.setitem(SPELLINGS, "sigmoid", in_ops(lambda b, x: b.reciprocal(b.exp(-x) + 1.0)))
    test_every_op("sigmoid", opset, tmp_path)


def answers(case: Case, graph: Graph, path: Path) -> dict[str, tuple[Array, Bounded]]:
    """Return a file's results and bounds, in ONNX Runtime, or in onnx's reference if a kernel is missing."""
    wanted = bounded(graph, case.inputs, narrow=computes_in_bf16(graph))
    floats = {v.type.dtype.name for v in graph.main.inputs}
    names = (case.op.name, case.op.attributes.get("activation"))
    kinds_used = (*floats, case.op.attributes.get("format"))
    unknown = any((name, kind) in NO_KERNEL for name in names for kind in kinds_used)
    if unknown:
        with pytest.raises(Exception, match="NOT_IMPLEMENTED"):
            session(path)
        if "f64" in floats:  # its erf is computed in float32
            wanted = {n: Bounded(y.exact, y.moved * (EPSILON["f32"] / EPSILON["f64"])) for n, y in wanted.items()}
    elif not computes_in_bf16(graph):
        made = run(session(path), case.inputs)
        return {n: (made[n], as_in_onnx_runtime(y)) for n, y in wanted.items()}
    onnx.checker.check_model(str(path), full_check=True)
    ml_dtypes = pytest.importorskip("ml_dtypes")
    kinds = {v.name: v.type.dtype for v in graph.main.inputs}
    given = {n: x.astype(ml_dtypes.bfloat16) if kinds[n] is bf16 else x for n, x in case.inputs.items()}
    with np.errstate(all="ignore"):
        made = onnx_reference.ReferenceEvaluator(str(path)).run(None, given)
    plain = [x.astype(np.float32) if x.dtype == ml_dtypes.bfloat16 else x for x in map(np.asarray, made)]
    return {n: (y, wanted[n]) for n, y in zip(graph.main.outputs, plain, strict=True)}


def as_in_onnx_runtime(wanted: Bounded) -> Bounded:
    """Widen bounds: its float32 sigmoid and tanh are accurate to a spacing at 1, not at the element."""
    if not wanted.is_float:
        return wanted
    largest = np.max(np.abs(wanted.exact), initial=1.0, where=np.isfinite(wanted.exact))
    return Bounded(wanted.exact, wanted.moved + EPSILON["f32"] * largest)


def computes_in_bf16(graph: Graph) -> bool:
    return any(v.type.dtype is bf16 for _, node in graph.walk() for v in (*node.inputs, *node.results))


# -- every model -------------------------------------------------------------------------------------------------


def two_sizes(graph: Graph) -> list[dict[str, int]]:
    """Return the smallest sizes at which no input is empty, and other sizes that all differ."""
    found = []
    for first, step in ((1, 0), (2, 3)):
        sizes = {}
        for number, (symbol, bounds) in enumerate(graph.symbols.items()):
            size = max(bounds.lower, first + step * number, least_size(graph, symbol))
            sizes[symbol] = size if bounds.upper is None else min(bounds.upper, size)
        found.append(sizes)
    return found


def least_size(graph: Graph, symbol: str) -> int:
    """Return the smallest size of a symbol at which no input is empty: 2, if an axis has size N-1. Operators of ONNX
    Runtime refuse empty axes.
    """
    sizes = [size.as_linear for value in graph.main.inputs for size in value.type.shape]
    return max([-(-(1 - each[2]) // each[1]) for each in sizes if each is not None and each[0] == symbol], default=1)


def assert_same_model(graph: Graph, opened: Any, weights: Mapping[str, Array], declared: Graph) -> None:
    for seed, sizes in enumerate(two_sizes(graph)):
        inputs = draw_inputs(declared, sizes, [seed])
        made = run(opened, inputs)
        expected = interpret(declared, inputs, {n: weights[n] for n in declared.parameters}, float64=True)
        assert made.keys() == expected.keys()
        for name, right in expected.items():
            assert made[name].shape == right.shape
            worst = np.abs(made[name] - right).max() / np.abs(right).max()
            assert worst < MODEL_TOLERANCE, f"{name} at {sizes}"


# The whole CLIP is not run at both: it is large, and its two towers are tested separately.
# Opset 13 has no Reshape to sizes that may be 0, such as the number of images.
ONLY_AT_23 = ("clip", "llava", "idefics3", "qwen2_vl", "qwen2_vl_vision")


@pytest.mark.parametrize(
    ("name", "opset"), [(name, opset) for name, opset in in_turns((23, 13)) if opset == 23 or name not in ONLY_AT_23]
)
def test_every_model(name: str, opset: int, tmp_path: Path) -> None:
    declared = ZOO[name][0].graph()
    graph = PassManager(DEFAULT).run(declared).graph
    weights = weights_of(declared)
    made = export_onnx(graph, weights, tmp_path / "model.onnx", opset=opset)
    assert_same_model(graph, session(made.path), weights, declared)
    attends = made.operators.get("Attention", 0)
    assert attends == (sum(n.op.name == "attention" for _, n in unfolded(graph)) if opset >= 23 else 0)


def unfolded(graph: Graph) -> Iterator[tuple[Any, Any]]:
    from treadle.ir.transforms.inline import inline_calls

    return inline_calls(graph).walk()


@pytest.mark.parametrize("opset", EVERY_OPSET)
def test_every_opset(opset: int, tmp_path: Path) -> None:
    """A graph with every composite that a later opset has as an operator, and with computed sizes."""

    def build(b: Builder) -> dict[str, Expr]:
        x, lengths = b.input("x", "f32[B, S, 8]"), b.input("lengths", "i64[B]")
        n = b.layer_norm(b.gelu(x), None, None)
        heads = b.rearrange(b.rms_norm(n, None), pattern="b s (h=2 d) -> b h s d")
        turned = b.rotary(heads, b.positions(b.reduce_max(n, axes=(2,))), b.constant([1.0, 0.1]))
        a = b.attention(turned, turned, heads, lengths, terms=(Causal(), Padding()))
        y = b.linear(b.rearrange(a, pattern="b h s d -> b s (h d)"), b.constant(np.eye(8, dtype=np.float32)), None)
        return {"y": y, "mean": b.reduce_mean(b.silu(y), axes=(1,)), "flat": b.reshape(y, shape=("B*S", 8))}

    graph = graph_of(build)
    opened = session(export_onnx(graph, {}, tmp_path / "m.onnx", opset=opset).path)
    assert onnx.load(str(tmp_path / "m.onnx")).opset_import[0].version == opset
    for sizes in ({"B": 1, "S": 1}, {"B": 3, "S": 4}):
        rng = np.random.default_rng(opset)
        inputs = {
            "x": rng.standard_normal((sizes["B"], sizes["S"], 8), np.float32),
            "lengths": np.arange(sizes["B"]),  # the first row sees no key
        }
        made, expected = run(opened, inputs), interpret(graph, inputs, float64=True)
        for name, right in expected.items():
            assert_near(made[name], right)
        assert not made["y"][0].any()


# -- attention ---------------------------------------------------------------------------------------------------


def test_standard_operators_from_their_opset_on(tmp_path: Path) -> None:
    def build(b: Builder) -> Expr:
        x = b.input("x", "f32[2, 3, 8]")
        heads = b.rearrange(b.rms_norm(b.layer_norm(b.gelu(x), None, None), None), pattern="b s (h=2 d) -> b h s d")
        turned = b.rotary(heads, b.constant(np.zeros((2, 3)), DTYPES["i64"]), b.constant([1.0, 0.1]))
        made: Expr = b.attention(turned, turned, heads, terms=(Causal(),))
        return made

    names = ("LayerNormalization", "Gelu", "RMSNormalization", "RotaryEmbedding", "Attention")
    found = {
        opset: [name for name in names if exported(graph_of(build), tmp_path, opset=opset)[0].operators.get(name)]
        for opset in (16, 17, 19, 20, 22, 23, NEWEST)
    }
    assert found == {
        16: [],
        17: ["LayerNormalization"],
        19: ["LayerNormalization"],
        20: ["LayerNormalization", "Gelu"],
        22: ["LayerNormalization", "Gelu"],
        23: [*names],
        NEWEST: [*names],
    }


def test_queries_without_visible_keys_return_zeros(tmp_path: Path) -> None:
    """If a mask, an infinite bias or both hide all keys of a query, its result is zeros, as in ONNX Runtime."""
    q = np.random.default_rng(0).standard_normal((2, 2, 3, 4)).astype(np.float32)
    mask = np.array([[True, False, False], [False, False, False], [False, True, True]])
    bias = np.where(mask[::-1], np.float32(0.5), -np.float32(np.inf))
    for terms, given in (
        ((BooleanMask("s t"),), {"mask": mask}),
        ((TensorBias("s t"),), {"bias": bias}),
        ((BooleanMask("s t"), TensorBias("s t"), Causal()), {"mask": mask, "bias": bias}),
    ):

        def build(b: Builder) -> Expr:
            x = b.input("q", "f32[2,2,3,4]")
            kinds = {"mask": "bool[3,3]", "bias": "f32[3,3]"}
            made: Expr = b.attention(x, x, x, *[b.input(n, kinds[n]) for n in given], terms=terms)  # noqa: B023
            return made

        graph, inputs = graph_of(build), {"q": q, **given}
        expected = interpret(graph, inputs, float64=True)["y"]
        assert (expected == 0).all(axis=(0, 1, 3)).any()
        for opset in (22, 23):
            assert_near(in_runtime(graph, tmp_path, inputs, opset=opset)["y"], expected)


@pytest.mark.parametrize(("queries", "guarded"), [(20, True), (4, False)])
def test_a_window_that_leaves_queries_without_keys_is_guarded(queries: int, guarded: bool, tmp_path: Path) -> None:
    """Opset 20 has no operator for attention. If some of 20 queries see none of the 4 keys, the decomposition has a
    further Where.
    """

    def build(b: Builder) -> Expr:
        q, k = b.input("q", f"f32[1, 1, {queries}, 4]"), b.input("k", "f32[1, 1, 4, 4]")
        made: Expr = b.attention(q, k, k, terms=(Window(3),))
        return made

    graph, rng = graph_of(build), np.random.default_rng(0)
    given = {
        "q": rng.standard_normal((1, 1, queries, 4), np.float32),
        "k": rng.standard_normal((1, 1, 4, 4), np.float32),
    }
    made, _ = exported(graph, tmp_path, opset=20)
    assert made.operators["Where"] == 1 + guarded
    np.testing.assert_allclose(run(session(made.path), given)["y"], interpret(graph, given)["y"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("keys", "kept"), [("S", False), ("5", True)])
def test_probabilities_have_the_axes_of_the_graph(keys: str, kept: bool, tmp_path: Path) -> None:
    """onnx infers that probabilities of a symbolic number of keys are empty, so the operator is spelled out."""
    b = Builder(Graph("pool"))
    q, k = b.input("q", "f32[B, 1, 2, 4]"), b.input("k", f"f32[B, 1, {keys}, 4]")
    out, probabilities = b.attention_with_probabilities(q, k, k)
    b.outputs(out=out, probabilities=probabilities)
    made, _ = exported(b.graph, tmp_path, opset=23)
    assert made.operators.get("Attention", 0) == kept
    axes = {each.name: each.shape for each in session(made.path).get_outputs()}
    assert axes == {"out": ["B", 1, 2, 4], "probabilities": ["B", 1, 2, int(keys) if kept else keys]}
    same_at(b.graph, tmp_path, 23, {"B": 2, "S": 5}, {"B": 1, "S": 3} if not kept else {"B": 1})


def test_one_mask_for_all_layers(tmp_path: Path) -> None:
    """A computation that layers share, from the same lengths, is in the file once."""

    def build(b: Builder) -> Expr:
        x, lengths = b.input("x", "f32[B, 2, S, 4]"), b.input("lengths", "i64[B]")
        for layer in range(3):
            with b.scoped(f"h.{layer}"):
                slopes = b.constant([0.5, 0.25])
                x = x + b.attention(x, x, x, lengths, slopes, terms=(Causal(), Window(3), Padding(), Alibi()))
        return x

    made, model = exported(graph_of(build), tmp_path)
    masks = {node.input[3] for node in model.graph.node if node.op_type == "Attention"}
    assert (made.operators["Attention"], len(masks)) == (3, 1)
    assert {node.name for node in model.graph.node if node.op_type == "Attention"} == {
        f"h.{layer}.Attention" for layer in range(3)
    }


# -- sizes and moves -----------------------------------------------------------------------------------------------


def same_at(graph: Graph, folder: Path, opset: int, *every: Mapping[str, int]) -> Exported:
    """Assert that a graph of floats returns the reference's numbers at these sizes."""
    made = export_onnx(graph, {}, folder / "model.onnx", opset=opset)
    opened = session(made.path)
    for sizes in every:
        inputs = draw_inputs(graph, sizes, [len(sizes)])
        got, expected = run(opened, inputs), interpret(graph, inputs, float64=True)
        for name, right in expected.items():
            assert got[name].shape == right.shape, f"{name} at {sizes}"
            assert_near(got[name], right)
    return made


@pytest.mark.parametrize("opset", [14, 15, 23])
def test_sizes_are_expressions(opset: int, tmp_path: Path) -> None:
    """Products, differences that may be 0, quotients rounded down, and a symbol that follows only from 2*T + 1."""

    def build(b: Builder) -> dict[str, Expr]:
        x, z = b.input("x", "f32[B, S, 6]"), b.input("z", "f32[2*T+1]")
        tail = b.slice(x, axis=1, start=1)
        return {
            "flat": b.reshape(x, shape=("3*S", "2*B")),
            "tail": tail,
            "joined": b.rearrange(tail, pattern="b s d -> (b s) d"),
            "apart": b.rearrange(b.rearrange(tail, pattern="b s d -> (s b) d"), pattern="(s b=B) d -> d b s"),
            "halves": b.windows(x, axis=1, size=2, stride=2),
            "ends": b.slice(x, axis=1, start=-1),
            "middle": b.slice(z, axis=0, start="T", stop="T+1"),
            "padded": b.pad(z, axis=0, before="S", after="T-1", value=-2.0),
            "spread": b.expand(b.slice(z, axis=0, stop=1), shape=("S*T", None)),
            "counted": b.iota(size="(B+T)//2-S*0", dtype=DTYPES["f32"]) * b.size(value="B*S-T", dtype=DTYPES["f32"]),
            "down": b.iota(size="9+(0-S)//4", dtype=DTYPES["f32"]),
        }

    graph = graph_of(build)
    same_at(graph, tmp_path, opset, {"B": 3, "S": 4, "T": 2}, {"B": 1, "S": 2, "T": 1}, {"B": 2, "S": 5, "T": 6})


@pytest.mark.parametrize("dtype", ["f32", "f64"])
@pytest.mark.parametrize("saturate", [True, False])
def test_values_beyond_bf16_become_the_largest_number_or_infinite(saturate: bool, dtype: str, tmp_path: Path) -> None:
    graph = graph_of(lambda b: b.round_to(b.input("x", f"{dtype}[8]"), format="bf16", saturate=saturate))
    x = np.array([1 + 2.0**-8, 3.4e38, -3.4e38, np.inf, -np.inf, np.nan, 1e-45, -0.0], DTYPES[dtype].numpy)
    made, wanted = in_runtime(graph, tmp_path, {"x": x})["y"], interpret(graph, {"x": x})["y"]
    assert np.isfinite(wanted[1:5]).all() == saturate
    np.testing.assert_array_equal(made, wanted)
    np.testing.assert_array_equal(np.signbit(made[6:]), np.signbit(wanted[6:]))


@pytest.mark.parametrize("opset", [14, 23])
def test_an_axis_that_may_be_empty(opset: int, tmp_path: Path) -> None:
    def build(b: Builder) -> dict[str, Expr]:
        tail = b.slice(b.input("x", "f32[B, S, 6]"), axis=1, start=1)
        joined = b.rearrange(tail, pattern="b s d -> (b s) d")
        apart = b.rearrange(joined, pattern="n (h=2 d) -> h n d")
        return {"joined": joined, "sum": b.reduce_sum(joined, axes=(0,)), "apart": apart}

    same_at(graph_of(build), tmp_path, opset, {"B": 2, "S": 1}, {"B": 2, "S": 3})


def test_an_axis_that_may_be_empty_is_refused_where_reshape_cannot_say_so(tmp_path: Path) -> None:
    def build(b: Builder) -> Expr:
        tail = b.slice(b.input("x", "f32[B, S, 2]"), axis=1, start=1)
        made: Expr = b.rearrange(tail, pattern="b s (c=2 d) -> (c s) (b d)")
        return made

    text = message(lambda: export_onnx(graph_of(build), {}, tmp_path / "m.onnx", opset=13))
    assert "Reshape of opset 13 does not support sizes that may be 0" in text
    assert "opset=14" in text
    assert not list(tmp_path.iterdir())
    same_at(graph_of(build), tmp_path, 14, {"B": 2, "S": 1}, {"B": 2, "S": 4})


REARRANGES = [
    ("f32[B, S, 12]", "b s (h=3 d) -> b h s d", ["Reshape", "Transpose"]),
    ("f32[B, 3, S, 4]", "b h s d -> b s (h d)", ["Transpose", "Reshape"]),
    ("f32[B, S, 12]", "b s (h=3 d) -> b s h d", ["Reshape"]),
    ("f32[B, S, 12]", "b s d -> b s d", ["Identity"]),
    ("f32[B, S]", "b s -> b 1 s 1", ["Unsqueeze"]),
    ("f32[B, 1, S, 1]", "b 1 s 1 -> b s", ["Squeeze"]),
    ("f32[B, S, 4]", "b s d -> (b s) d", ["Reshape"]),
    ("f32[B, S, 4]", "b s d -> s (b d)", ["Transpose", "Reshape"]),
    ("f32[B, 1, S]", "b 1 s -> s 1 b", ["Transpose"]),
    ("f32[B, S, 4]", "b s d -> d 1 b s", ["Transpose", "Unsqueeze"]),
    ("f32[B, S, 6]", "b s (g=1 r) -> b g s r", ["Unsqueeze"]),
    ("f32[6, 6]", "(a b=3) (c=3 d) -> (c a) d b", ["Reshape", "Transpose", "Reshape"]),
    ("f32[B, S, 4]", "b s d -> (b s d)", ["Reshape"]),
    ("f32[B, 4, S]", "b (c=2 d) s -> c (b s) d", ["Reshape", "Transpose", "Reshape"]),
    ("f32[1, 1]", "1 1 ->", ["Squeeze"]),
    ("f32[]", "-> 1 1", ["Unsqueeze"]),
]


@pytest.mark.parametrize(("type", "pattern", "operators"), REARRANGES, ids=[p for _, p, _ in REARRANGES])
def test_a_rearrange_is_few_nodes(type: str, pattern: str, operators: list[str], tmp_path: Path) -> None:
    """It needs no arithmetic of shapes, even with two symbolic axes."""
    graph = graph_of(lambda b: b.rearrange(b.input("x", type), pattern=pattern))
    made = same_at(graph, tmp_path, 13, {"B": 2, "S": 5}, {"B": 1, "S": 1})
    assert made.operators == Counter(operators)


@pytest.mark.parametrize("opset", [13, 23])
@pytest.mark.parametrize(("type", "shape"), [("f32[1]", ()), ("f32[1, 1, 1]", ()), ("f32[]", (1, 1)), ("f32[]", ())])
def test_reshapes_to_and_from_rank_0(type: str, shape: tuple[int, ...], opset: int, tmp_path: Path) -> None:
    graph = graph_of(lambda b: b.reshape(b.input("x", type), shape=shape) * 2.0)
    made = same_at(graph, tmp_path, opset, {}, {})
    assert "Reshape" not in made.operators


@pytest.mark.parametrize("dtype", ["f32", "f16", "f64", "i64", "i8", "u8"])
def test_division_rounds_down(dtype: str, tmp_path: Path) -> None:
    """Integers round down where C truncates. Floats round as in NumPy: 1 // 0.1 is 9, because 0.1 is slightly more than
    a tenth.
    """
    numpy = DTYPES[dtype].numpy
    pairs = [(7, 2), (-7, 2), (7, -2), (-7, -2), (6, 3), (-6, 3), (0, 5), (5, 7), (-5, 7)]
    if dtype.startswith("f"):
        pairs += [(1.0, 0.1), (-1.0, 0.1), (4.0, np.inf), (-4.0, np.inf), (4.0, 0.0), (-4.0, 0.0), (np.inf, 2.0)]
    if dtype == "u8":
        pairs = [(abs(a), abs(b)) for a, b in pairs]
    x, y = (np.array(side, numpy) for side in zip(*pairs, strict=True))

    def build(b: Builder) -> dict[str, Expr]:
        n, m = (b.input(name, f"{dtype}[{len(pairs)}]") for name in ("x", "y"))
        return {"quotient": b.floor_divide(n, m), "rest": b.mod(n, m)}

    for opset in (13, 23):
        made = in_runtime(graph_of(build), tmp_path, {"x": x, "y": y}, opset=opset)
        with np.errstate(all="ignore"):
            np.testing.assert_array_equal(made["quotient"], np.floor_divide(x, y), strict=True)
            np.testing.assert_array_equal(made["rest"], np.mod(x, y), strict=True)

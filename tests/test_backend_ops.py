"""Backend behavior beyond the op suite: results that libraries leave undefined, emitted code, and ops that a backend
lacks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.backend_checks import assert_near, compiled, each_backend, graph_of, message, needs_torch, needs_tvm
from tests.op_checks import EPSILON, TESTED, Case, held, refusal
from treadle.backends.numpy import attention_kernels
from treadle.backends.numpy import kernels as numpy_kernels
from treadle.backends.python.axis_spelling import einsum_letters
from treadle.backends.registry import find_backend
from treadle.entry_functions import compile
from treadle.ir.attention.attention_terms import BooleanMask, Causal, MaskTerm, Padding, TensorBias, Term, Window
from treadle.ir.builder import Builder, Expr
from treadle.ir.composites import body_of
from treadle.ir.errors import BackendError
from treadle.ir.graph import Graph
from treadle.ir.interpreter import interpret
from treadle.ir.op_registry import OPS, op
from treadle.ir.operation import Composite, Operand, Primitive
from treadle.ir.ops.attention import Attention
from treadle.ir.ops.error_function import erf
from treadle.ir.ops.rounding import FORMATS
from treadle.ir.types import DTYPES

ROOT = Path(__file__).resolve().parent.parent

# -- meanings that libraries leave open ------------------------------------------------------------------------------


def attention_graph(
    *terms: Term, op: str = "attention", dtype: str = "f32", groups: int = 2, width: int = 4, **attributes: Any
) -> Graph:
    def build(b: Builder) -> Mapping[str, Expr]:
        shapes = {"q": "2,4,S,8", "k": f"2,{groups},T,8", "v": f"2,{groups},T,{width}"}
        q, k, v = (b.input(n, f"{dtype}[{shape}]") for n, shape in shapes.items())
        types = {"lengths": "i64[2]", "mask": "bool[2,4,S,T]", "bias": f"{dtype}[2,4,S,T]"}
        extra = [b.input(o.name, types[o.name]) for term in terms for o in term.operands]
        made = b.apply(op, q, k, v, *extra, terms=terms, **attributes)
        return {"y": made[0], "p": made[1]} if isinstance(made, tuple) else {"y": made}

    return graph_of(build, "attention")


def attention_inputs(queries: int, keys: int, **extra: Any) -> dict[str, Any]:
    rng = np.random.default_rng(3)
    shapes = {"q": (2, 4, queries, 8), "k": (2, 2, keys, 8), "v": (2, 2, keys, 4)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()} | extra


_FAR = np.zeros((2, 4, 3, 3), np.float32)
_FAR[:, :, 1] = -np.inf

MASKED = {
    "padding": ((Padding(),), attention_inputs(3, 5, lengths=np.array([0, 5])), (0, slice(None))),
    "padding and window": (
        (Padding(), Window(2)),
        attention_inputs(40, 40, lengths=np.array([3, 39])),
        (0, slice(4, 40)),
    ),
    "bias": ((TensorBias(),), attention_inputs(3, 3, bias=_FAR), (slice(None), slice(1, 2))),
    "window": ((Causal(), Window(2)), attention_inputs(6, 3), (slice(None), slice(5, 6))),
    "mask": ((BooleanMask(),), attention_inputs(3, 3, mask=np.zeros((2, 4, 3, 3), bool)), (slice(None), slice(None))),
}


FLOATS = [name for name, dtype in DTYPES.items() if dtype.is_float]
ATTENTIONS = ["attention", "attention_with_probabilities"]


def assert_attends(backend: str, graph: Graph, given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Run a backend on inputs in the graph's dtypes, compare the outputs with the op's meaning, and return them."""
    if refusal(backend, graph):
        return {}
    inputs = {v.name: held(given[v.name], v.type.dtype) for v in graph.main.inputs}
    found = compiled(backend, graph)(**inputs)
    # Scores and probabilities may be rounded to the dtype: scores near 4 by up to 2 spacings, multiplied by e^2 for
    # values of 2.
    tolerance = 32 * max(EPSILON[v.type.dtype.name] for v in graph.main.inputs if v.type.dtype.is_float)
    for name, wanted in interpret(graph, inputs, float64=True).items():
        np.testing.assert_allclose(np.asarray(found[name], np.float64), wanted, rtol=0, atol=tolerance, err_msg=name)
    return dict(found)


@each_backend
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("op", ATTENTIONS)
@pytest.mark.parametrize("case", MASKED)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_query_that_sees_no_key_gets_zeros(
    case: str, softcap: float | None, op: str, dtype: str, backend: str
) -> None:
    terms, given, (row, query) = MASKED[case]
    for out in assert_attends(backend, attention_graph(*terms, op=op, dtype=dtype, softcap=softcap), given).values():
        np.testing.assert_array_equal(out[row, :, query], np.zeros_like(out[row, :, query]))


@each_backend
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("op", ATTENTIONS)
@pytest.mark.parametrize("scale", [-0.5, 0.0, -0.0])
@pytest.mark.parametrize("case", ["causal", "causal, all of one shape", *MASKED])
def test_a_mask_stays_one_whatever_the_scale(case: str, scale: float, op: str, dtype: str, backend: str) -> None:
    """PyTorch applies the scale also to the mask of its `is_causal`."""
    terms, given, _ = MASKED[case] if case in MASKED else ((Causal(),), attention_inputs(5, 5), ())
    if case == "causal, all of one shape":  # PyTorch uses another kernel here
        given |= {name: np.repeat(given["k"], 2, axis=1) for name in ("k", "v")}
    for softcap in (None, 5.0):
        _, groups, _, width = given["v"].shape
        shape = {"groups": groups, "width": width}
        graph = attention_graph(*terms, op=op, dtype=dtype, scale=scale, softcap=softcap, **shape)
        assert_attends(backend, graph, given)


@needs_torch
@pytest.mark.parametrize("op", ATTENTIONS)
@pytest.mark.parametrize("case", MASKED)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_no_row_without_keys_reaches_a_product_in_torch(
    case: str, softcap: float | None, op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's product in bfloat16 may spread NaN from one row to others, on some CPUs and at some sizes."""
    import torch

    from treadle.backends.torch import attention_kernels as torch_kernels

    seen = []

    def watched(p: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        seen.append(bool(p.isfinite().all()))
        return weighted(p, v)

    def watched_whole(*operands: torch.Tensor, attn_mask: torch.Tensor, **options: Any) -> torch.Tensor:
        keeps = attn_mask if attn_mask.dtype == torch.bool else attn_mask > -math.inf
        seen.append(bool(keeps.any(-1).all()))
        return whole(*operands, attn_mask=attn_mask, **options)

    weighted, whole = torch_kernels._weighted, torch_kernels.F.scaled_dot_product_attention
    monkeypatch.setattr(torch_kernels, "_weighted", watched)
    monkeypatch.setattr(torch_kernels.F, "scaled_dot_product_attention", watched_whole)
    terms, given, _ = MASKED[case]
    compiled("torch", attention_graph(*terms, op=op, softcap=softcap))(**given)
    assert seen == [True]


@each_backend
def test_attention_in_small_ops_may_have_a_negative_scale(backend: str) -> None:
    """The passes turn these ops into a single causal attention."""

    def build(b: Builder) -> Expr:
        q, k, v = (b.input(n, "f32[1,2,5,8]") for n in "qkv")
        scores = b.einsum(q, k, equation="b h s d, b h t d -> b h s t") * -0.25
        keep = b.constant(np.tri(5, dtype=bool))
        p = b.softmax(b.where(keep, scores, b.constant(-math.inf, scores.dtype)))
        made: Expr = b.matmul(p, v)
        return made

    graph = graph_of(build)
    exe = compile(graph, backend=backend)
    assert any(isinstance(n.op, Attention) for n in exe.optimized.graph.main.nodes)
    rng = np.random.default_rng(0)
    given = {n: rng.standard_normal((1, 2, 5, 8)).astype(np.float32) for n in "qkv"}
    assert_near(exe(**given)["y"], interpret(graph, given, float64=True)["y"])


@dataclass(frozen=True, repr=False)
class EveryOther(MaskTerm):
    """A term that no backend knows: keys at even positions."""

    name = "every_other"

    def reference(self, i: Any, j: Any, *operands: Any) -> Any:
        return j % 2 == 0

    def body(self, grid: Any, *operands: Expr) -> Expr:
        kept: Expr = grid.b.equal(grid.b.mod(grid.j, 2), 0)
        return kept


@each_backend
def test_attention_with_an_unknown_term_is_run_by_its_body(backend: str) -> None:
    graph = attention_graph(EveryOther())
    exe = compiled(backend, graph)
    assert "kernels.attention" not in exe.source
    given = attention_inputs(3, 5)
    assert_near(exe(**given).y, interpret(graph, given, float64=True)["y"])


def test_numpy_attention_is_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    given = attention_inputs(7, 5, lengths=np.array([2, 5]))
    whole = compiled("numpy", attention_graph(Causal(), Padding()))(**given).y
    for scores in (1, 4 * 5 * 2, 4 * 5 * 7):
        monkeypatch.setattr(attention_kernels, "SCORES", scores)
        assert_near(compiled("numpy", attention_graph(Causal(), Padding()))(**given).y, whole.astype(np.float64))


@each_backend
def test_ties_go_to_the_lower_index(backend: str) -> None:
    def build(b: Builder) -> dict[str, Expr]:
        x = b.input("x", "f32[N]")
        values, indices = b.top_k(x, k=4)
        return {"values": values, "indices": indices, "first": b.argmax(x, axis=0)}

    x = np.zeros(100, np.float32)
    x[[70, 90]] = 1
    out = compiled(backend, graph_of(build))(x=x)
    np.testing.assert_array_equal(out.indices, [70, 90, 0, 1])
    np.testing.assert_array_equal(out["values"], [1, 1, 0, 0])
    assert out.first == 70


@each_backend
def test_integers_are_divided_towards_minus_infinity(backend: str) -> None:
    def build(b: Builder) -> dict[str, Expr]:
        x, y = b.input("x", "i64[4]"), b.input("y", "i64[4]")
        return {"quotient": b.floor_divide(x, y), "rest": b.mod(x, y), "by_constant": b.floor_divide(x, 2)}

    x, y = np.array([7, -7, 7, -7]), np.array([2, 2, -2, -2])
    out = compiled(backend, graph_of(build))(x=x, y=y)
    np.testing.assert_array_equal(out.quotient, [3, -4, -4, 3])
    np.testing.assert_array_equal(out.rest, [1, 1, -1, -1])
    np.testing.assert_array_equal(out.by_constant, [3, -4, 3, -4])


@each_backend
@pytest.mark.parametrize("value", [0.1, -0.0, float("inf"), float("-inf"), 1e30, 3.0])
def test_scalar_constants_keep_the_dtype(value: float, backend: str) -> None:
    def build(b: Builder) -> dict[str, Expr]:
        x = b.input("x", "f32[2]")
        both_constant = b.where(x > 0.0, b.constant(value, x.dtype), b.constant(1.0, x.dtype))
        power = b.pow(b.constant(value, x.dtype), x)
        return {"sum": x + value, "power": power, "chosen": both_constant}

    x = np.array([1.0, -2.0], np.float32)
    out = compiled(backend, graph_of(build))(x=x)
    single = np.float32(value)
    assert {array.dtype for array in out.values()} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(out.sum, x + single)
    np.testing.assert_array_equal(out.chosen, np.array([single, 1], np.float32))
    with np.errstate(all="ignore"):
        np.testing.assert_allclose(out.power, np.power(single, x), rtol=2.0**-21)


@each_backend
@pytest.mark.parametrize("value", [0.0, -0.0, 0.5, float("inf"), float("-inf"), float("nan")])
def test_pad_fills_with_any_number(value: float, backend: str) -> None:
    graph = graph_of(lambda b: b.pad(b.input("x", "f32[1]"), axis=0, before=1, value=value))
    filled, one = compiled(backend, graph)(x=np.ones(1, np.float32)).y
    np.testing.assert_array_equal([filled, one], [value, 1])
    assert np.signbit(filled) == np.signbit(value)


@each_backend
@pytest.mark.parametrize("dtype", ["f16", "f32", "f64"])
def test_the_sign_of_nan_is_nan(dtype: str, backend: str) -> None:
    graph = graph_of(lambda b: b.sign(b.input("x", f"{dtype}[4]")))
    x = np.array([np.nan, -np.inf, 0.0, 3.0], DTYPES[dtype].numpy)
    np.testing.assert_array_equal(compiled(backend, graph)(x=x).y, np.array([np.nan, -1, 0, 1], x.dtype), strict=True)


@each_backend
@pytest.mark.parametrize("name", FORMATS)
def test_a_zero_of_a_narrower_format_has_the_sign_that_it_can_have(name: str, backend: str) -> None:
    graph = graph_of(lambda b: b.round_to(b.input("x", "f32[3]"), format=name))
    y = compiled(backend, graph)(x=np.array([-0.0, -1e-30, 0.0], np.float32)).y
    small = 0.0 if name != "bf16" else y[1]  # bf16 can hold y
    np.testing.assert_array_equal(y, [0.0, small, 0.0])
    assert np.signbit(y).tolist() == ([False] * 3 if name.endswith("uz") else [True, True, False])


@each_backend
@pytest.mark.parametrize("condition", [True, False])
def test_where_takes_a_constant_condition(condition: bool, backend: str) -> None:
    def build(b: Builder) -> Expr:
        made: Expr = b.where(b.constant(condition), b.input("x", "bool[2]"), b.input("y", "bool[2]"))
        return made

    x = np.array([True, False])
    np.testing.assert_array_equal(compiled(backend, graph_of(build))(x=x, y=~x).y, x if condition else ~x)


@each_backend
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_normalization_of_f16_squares_in_f32(name: str, backend: str) -> None:
    """The square of 800 overflows f16. The result may differ only by f16's own spacing."""
    graph = graph_of(lambda b: b.apply(name, b.input("x", "f16[4]")))
    x = np.array([400, -400, 800, -800], np.float16)
    expected = np.array([1, -1, 2, -2]) / np.sqrt(2.5)
    for made in (compiled(backend, graph)(x=x).y, interpret(graph, {"x": x})["y"]):
        assert made.dtype == np.float16
        np.testing.assert_allclose(made, expected, rtol=2.0**-10)


NUMBERS = [
    *(0.1, -1 / 3, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 65519.0, 1e-7, -0.0, float("inf")),
    *(1 + 2.0**-11, 1 + 2.0**-11 + 2.0**-30, -1 - 3 * 2.0**-11 + 2.0**-30, 65520 - 2.0**-20, 2.0**-25 + 2.0**-60),
]
"""The numbers include ties of bf16, which round to the even neighbor, numbers that are subnormal in f16, and numbers so
near to ties of f16 that rounding them to float32 yields the tie.
"""


@each_backend
@pytest.mark.parametrize(("source", "to"), list(product(FLOATS, FLOATS)))
def test_a_cast_rounds_as_its_reference_does(source: str, to: str, backend: str) -> None:
    graph = graph_of(lambda b: b.cast(b.input("x", f"{source}[{len(NUMBERS)}]"), to=to))
    if refusal(backend, graph):
        assert "NumPy has no bf16" in message(lambda: compiled(backend, graph))
        return
    with np.errstate(over="ignore"):  # bf16 has larger numbers than f16
        x = held(np.array(NUMBERS), DTYPES[source])
        # PyTorch converts through float32
        between = x.astype(np.float32) if (source, to, backend) == ("f64", "f16", "torch") else x
        expected = held(between, DTYPES[to])
    np.testing.assert_array_equal(compiled(backend, graph)(x=x).y, expected, strict=True)


EQUATIONS = ["bhsd,bhtd->bhst", "ij,jk->ki", "ab,cd->dbca", "abc,cb->a", "ij,kj->", "i,i->i", "abx,bcy->ca"]


@pytest.mark.parametrize("equation", EQUATIONS)
def test_numpy_einsum_through_matmul(equation: str) -> None:
    rng = np.random.default_rng(0)
    sizes = {c: 2 + i for i, c in enumerate(sorted(set(equation) - set(",->")))}
    operands = [rng.standard_normal([sizes[c] for c in term]) for term in equation.split("->")[0].split(",")]
    np.testing.assert_allclose(
        numpy_kernels.einsum(equation, *operands), np.einsum(equation, *operands), rtol=1e-13, atol=1e-13
    )


def test_einsum_names_become_letters() -> None:
    assert einsum_letters("b heads s d, b heads t d -> b heads s t") == "bhsd,bhtd->bhst"
    assert einsum_letters("... head h, h -> ... head") == "...ha,a->...h"


def test_float32_erf() -> None:
    x = np.linspace(-6, 6, 100_001, dtype=np.float32)
    made = numpy_kernels.erf(x)
    assert made.dtype == np.float32
    assert np.max(np.abs(made - erf(x.astype(np.float64)))) < 3.2e-7  # less than three float32 roundings at 1


# -- ops without a form ------------------------------------------------------------------------------------------------


@pytest.fixture
def tripled() -> Iterator[Graph]:
    """A graph with a primitive that no backend has code for."""

    @op("triple", axes="... -> ...", dtypes="f -> f")
    class Triple(Primitive):
        """y = 3 x"""

        x = Operand()

        def reference(self, x: Any) -> Any:
            return 3 * x

    yield graph_of(lambda b: b.triple(b.input("x", "f32[N]")))
    OPS.pop("triple", None)


@pytest.mark.parametrize(
    ("backend", "said", "place"),
    [
        pytest.param(
            "torch", "PyTorch cannot express triple", "SPELLINGS of backends/torch/spelling.py", marks=needs_torch
        ),
        pytest.param(
            "tvm",
            "triple has no kernel for f32",
            "FUNCTIONS of backends/tvm/kernels/arithmetic/vector_math.py",
            marks=needs_tvm,
        ),
    ],
)
def test_a_primitive_without_code_is_refused_with_the_table_to_add_it_to(
    backend: str, said: str, place: str, tripled: Graph
) -> None:
    with pytest.raises(BackendError) as caught:
        compiled(backend, tripled)
    assert said in str(caught.value.received)
    assert str(caught.value.hint).startswith('backend="numpy" runs every op by its reference; to add code for triple:')
    assert f"{place} (docs/adding-an-op.md)" in str(caught.value.hint)
    table, path = place.split(" of ")
    assert re.search(rf"^{table}\b", (ROOT / path).read_text("utf-8"), re.MULTILINE)


def test_a_primitive_without_code_runs_on_numpy_by_its_reference(tripled: Graph) -> None:
    graph = tripled
    exe = compiled("numpy", graph)  # runs by the op's reference
    assert "reference.triple(x)" in exe.source
    assert exe(x=np.ones(2, np.float32)).y.tolist() == [3, 3]


def test_every_primitive_of_every_body_has_a_form_in_torch() -> None:
    torch_backend = find_backend("torch")
    refused = []
    for case in [Case.of(name, number) for name in TESTED for number in range(len(OPS[name].samples))]:
        (node,) = case.forward_graph().main.nodes
        nodes = [node, *(body_of(case.op, case.types).nodes if isinstance(case.op, Composite) else ())]
        refused += [why for n in nodes if (why := torch_backend.supports(n)) is not None]
    assert refused == []

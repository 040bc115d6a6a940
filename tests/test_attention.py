"""Attention's terms and meaning, compared with PyTorch, Hugging Face and direct loops.

In float64, sums of a few terms of order one agree to about 1e-15; 1e-12 leaves room for their order.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest

import treadle.ir.ops  # noqa: F401  (registers the ops)
from treadle.ir.attention.attention_terms import (
    Alibi,
    BooleanMask,
    Causal,
    Padding,
    Segments,
    T5Relative,
    TensorBias,
    Term,
    Window,
)
from treadle.ir.attention.distance_buckets import t5_buckets
from treadle.ir.attention.masking import (
    Biases,
    Masks,
    alibi,
    attend,
    boolean_mask,
    causal,
    padding,
    segments,
    t5_relative,
    tensor_bias,
    window,
)
from treadle.ir.attention.seen_keys import live_pairs
from treadle.ir.attention.term_text import parse_term
from treadle.ir.builder import Builder, Expr
from treadle.ir.composites import body_of
from treadle.ir.errors import GraphError, ParseError
from treadle.ir.graph import Graph
from treadle.ir.interpreter import interpret, interpret_body
from treadle.ir.ops.attention import Attention
from treadle.ir.samples import Sample
from treadle.ir.types import Type, f64, parse_type

Array = np.ndarray[Any, Any]
EXACT = 1e-12


def draw(*shapes: tuple[int, ...], seed: int = 0) -> list[Array]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape) for shape in shapes]


def grouped_inputs(queries: int = 7, keys: int = 7) -> list[Array]:
    """Return inputs with six query heads, two key/value heads, and e != d."""
    return draw((2, 6, queries, 5), (2, 2, keys, 5), (2, 2, keys, 4))


def torch_attention(q: Array, k: Array, v: Array, **options: Any) -> Array:
    torch = pytest.importorskip("torch")
    options = {n: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for n, x in options.items()}
    out = torch.nn.functional.scaled_dot_product_attention(
        *(torch.from_numpy(x) for x in (q, k, v)), enable_gqa=True, **options
    )
    return np.asarray(out)


def gradients(op: Attention, operands: list[Array], seed: Array, through_body: bool = False) -> list[Array | None]:
    """Return the gradients of sum(seed * op(operands)) by every operand, as the op builds them."""
    b = Builder(Graph("gradients"))
    inputs = [b.input(f"x{n}", Type(_dtype(x), _dtype(x)[x.shape].dims)) for n, x in enumerate(operands)]
    g = b.input("g", f64[seed.shape])
    if through_body:
        made = super(Attention, op).gradient(b, [g], inputs, [])
    else:
        made = op.gradient(b, [g], inputs, [b.apply(Attention, *inputs, **op.attributes)])
    present = {f"d{n}": x for n, x in enumerate(made) if x is not None}
    for n, x in present.items():
        assert x.type == inputs[int(n[1:])].type
    b.outputs(**present)
    values = interpret(b.graph, {f"x{n}": x for n, x in enumerate(operands)} | {"g": seed})
    return [values.get(f"d{n}") for n in range(len(operands))]


def _dtype(x: Array) -> Any:
    return {"f": f64, "i": parse_type("i64[]").dtype, "b": parse_type("bool[]").dtype}[x.dtype.kind]


def cases() -> list[Any]:
    return [pytest.param(sample, id=str(n)) for n, sample in enumerate(Attention.samples)]


# -- meaning -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (4, 7), (7, 4)])
def test_equals_torch(queries: int, keys: int) -> None:
    q, k, v = grouped_inputs(queries, keys)
    assert np.allclose(Attention().reference(q, k, v), torch_attention(q, k, v), rtol=0, atol=EXACT)
    assert np.allclose(
        Attention(terms=(Causal(),), scale=0.3).reference(q, k, v),
        torch_attention(q, k, v, is_causal=True, scale=0.3),
        rtol=0,
        atol=EXACT,
    )


def test_equals_torch_under_a_boolean_mask() -> None:
    q, k, v = grouped_inputs()
    mask = np.random.default_rng(1).random((2, 6, 7, 7)) < 0.5
    mask[..., 0] = True
    found = Attention(terms=(BooleanMask(),)).reference(q, k, v, mask)
    assert np.allclose(found, torch_attention(q, k, v, attn_mask=mask), rtol=0, atol=EXACT)


def test_equals_torch_under_a_float_mask() -> None:
    q, k, v = grouped_inputs(4, 7)
    (bias,) = draw((6, 4, 7), seed=1)
    bias[:, :, 3] = -np.inf
    found = Attention(terms=(TensorBias("h s t"),)).reference(q, k, v, bias)
    assert np.allclose(found, torch_attention(q, k, v, attn_mask=bias[None]), rtol=0, atol=EXACT)


Seen = Callable[[int, int, int], bool]
LENGTHS = np.array([3, 6])
QUERY_SEGMENTS = np.array([[0, 0, 1, 1, 1], [2, 2, 2, 0, 0]])
KEY_SEGMENTS = np.array([[0, 1, 1, 0, 0, 1], [2, 0, 0, 2, 2, 5]])
MASKS: dict[str, tuple[tuple[Term, ...], list[Array], Seen]] = {
    "causal": ((Causal(),), [], lambda b, i, j: j <= i),
    "window": ((Window(2),), [], lambda b, i, j: -2 < i - j < 2),
    "causal window": ((Window(3), Causal()), [], lambda b, i, j: i - 3 < j <= i),
    "padding": ((Padding(),), [LENGTHS], lambda b, i, j: j < LENGTHS[b]),
    "segments": (
        (Segments(),),
        [QUERY_SEGMENTS, KEY_SEGMENTS],
        lambda b, i, j: bool(QUERY_SEGMENTS[b, i] == KEY_SEGMENTS[b, j]),
    ),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_are_what_they_say(name: str) -> None:
    """Masks equal a loop over rows, queries and the keys that each query may see."""
    terms, operands, sees = MASKS[name]
    q, k, v = draw((2, 1, 5, 3), (2, 1, 6, 3), (2, 1, 6, 3))
    wanted = np.zeros((2, 1, 5, 3))
    for b, i in product(range(2), range(5)):
        seen = [j for j in range(6) if sees(b, i, j)]
        weights = np.exp([q[b, 0, i] @ k[b, 0, j] for j in seen])
        wanted[b, 0, i] = sum(w * v[b, 0, j] for w, j in zip(weights, seen, strict=True)) / weights.sum()
    found = Attention(terms=terms, scale=1.0).reference(q, k, v, *operands)
    assert np.allclose(found, wanted, rtol=0, atol=EXACT)


def test_biases_and_softcap_by_hand() -> None:
    """The soft-cap is applied before biases and masks."""
    q, k, v = draw((1, 2, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4))
    slopes = np.array([0.5, 0.25])
    i, j = np.arange(3)[:, None], np.arange(3)
    scores = 2 * np.tanh(0.7 * np.einsum("bhsd,bhtd->bhst", q, k) / 2)
    scores = np.where(j <= i, scores + slopes[:, None, None] * (j - i), -np.inf)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    found = Attention(terms=(Alibi(), Causal()), scale=0.7, softcap=2.0).reference(q, k, v, slopes)
    assert np.allclose(found, np.einsum("bhst,bhtd->bhsd", weights, v), rtol=0, atol=EXACT)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_t5_buckets_are_hugging_faces(bidirectional: bool) -> None:
    torch = pytest.importorskip("torch")
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    bucket = t5.T5Attention._relative_position_bucket
    offsets = np.arange(-700, 701)
    for shape in [(32, 128), (32, 20), (64, 128), (16, 100), (8, 5), (7, 9), (128, 512), (32, 600)]:
        wanted = bucket(torch.from_numpy(offsets), bidirectional, *shape)
        assert np.array_equal(t5_buckets(offsets, *shape, bidirectional), wanted), shape


@pytest.mark.parametrize("bidirectional", [True, False])
def test_t5_bias_is_hugging_faces(bidirectional: bool) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    config = transformers.T5Config(
        num_heads=4, d_model=8, d_kv=2, relative_attention_num_buckets=12, relative_attention_max_distance=15,
        is_decoder=not bidirectional,
    )  # fmt: skip
    layer = t5.T5Attention(config, has_relative_attention_bias=True)
    layer.is_decoder = not bidirectional
    with torch.no_grad():
        wanted = np.asarray(layer.compute_bias(40, 40))[0]
        table = np.asarray(layer.relative_attention_bias.weight)
    term = T5Relative(12, 15, bidirectional)
    i, j = np.arange(40)[:, None], np.arange(40)
    assert np.array_equal(term.reference(i, j, table), wanted)


def test_the_body_of_symbolic_sizes() -> None:
    """One body serves every size; the number of heads is fixed."""
    op = Attention(terms=(Window(3), T5Relative(8, 6), Alibi()))
    types = ["f64[B,4,S,3]", "f64[B,2,T,3]", "f64[B,2,T,3]", "f64[8,4]", "f64[4]"]
    graph = Graph("body")
    graph.functions["main"] = body_of(op, [parse_type(t) for t in types])
    names = op.operand_names(5)
    for s, t in [(4, 6), (5, 2)]:
        operands = draw((2, 4, s, 3), (2, 2, t, 3), (2, 2, t, 3), (8, 4), (4,))
        found = interpret(graph, dict(zip(names, operands, strict=True)))
        assert np.allclose(found["out0"], op.reference(*operands), rtol=0, atol=EXACT)


# -- fully masked rows ---------------------------------------------------------------------------------------


def masked_rows() -> tuple[Attention, list[Array]]:
    """Return attention and inputs in which row 0 sees no key, and the last queries of row 1 are past the window of its
    two keys.
    """
    op = Attention(terms=(Causal(), Window(2), Padding(), Alibi()), softcap=4.0)
    return op, [*grouped_inputs(), np.array([0, 2]), *draw((6,), seed=5)]


def test_a_query_that_sees_nothing_gives_zeros() -> None:
    op, operands = masked_rows()
    for found in (op.reference(*operands), interpret_body(op, operands)):
        assert np.array_equal(found[0], np.zeros_like(found[0]))
        assert np.array_equal(found[1, :, 3:], np.zeros_like(found[1, :, 3:]))
        assert np.all(found[1, :, :3] != 0)


@pytest.mark.parametrize("through_body", [False, True], ids=["closed form", "body"])
def test_a_query_that_sees_nothing_has_gradient_zero(through_body: bool) -> None:
    op, operands = masked_rows()
    (seed,) = draw((2, 6, 7, 4), seed=9)
    g_q, g_k, g_v, g_lengths, g_slopes = gradients(op, operands, seed, through_body)
    assert g_lengths is None
    for g in (g_q, g_k, g_v):
        assert g is not None
        assert np.array_equal(g[0], np.zeros_like(g[0]))
        assert np.all(np.isfinite(g[1]))
    assert g_q is not None
    assert g_slopes is not None
    assert np.array_equal(g_q[1, :, 3:], np.zeros_like(g_q[1, :, 3:]))
    assert np.all(g_q[1, :, 1] != 0)  # no other query sees two keys
    assert np.all(g_slopes != 0)


def test_a_bias_of_minus_infinity_masks() -> None:
    q, k, v = grouped_inputs()
    bias = np.zeros(7)
    bias[2] = -np.inf
    op = Attention(terms=(TensorBias("t"),))
    mask = Attention(terms=(BooleanMask("t"),))
    assert np.allclose(op.reference(q, k, v, bias), mask.reference(q, k, v, bias == 0), rtol=0, atol=EXACT)
    bias[:] = -np.inf
    assert np.array_equal(op.reference(q, k, v, bias), np.zeros((2, 6, 7, 4)))
    (seed,) = draw((2, 6, 7, 4), seed=9)
    for g in gradients(op, [q, k, v, bias], seed):
        assert g is not None
        assert np.array_equal(g, np.zeros_like(g))


# -- gradients -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", [case for case in cases() if "to" not in case.values[0].attributes])
def test_gradients_are_finite_differences(sample: Sample) -> None:
    """Central differences with step 1e-5 are off by about 1e-10 (third derivative) and 1e-11 (rounding)."""
    op = Attention(**sample.attributes)
    operands = [x for x in sample.draw(1) if x is not None]
    (seed,) = draw(op.reference(*operands).shape, seed=2)
    made = gradients(op, operands, seed)
    body = gradients(op, operands, seed, through_body=True)
    for n, x in enumerate(operands):
        if x.dtype.kind != "f":
            assert made[n] is None
            continue
        difference = np.zeros_like(x)
        for at in np.ndindex(x.shape):
            shifted = [y.copy() for y in operands]
            shifted[n][at] = x[at] + 1e-5
            up = op.reference(*shifted)
            shifted[n][at] = x[at] - 1e-5
            difference[at] = np.sum(seed * (up - op.reference(*shifted))) / 2e-5
        g, through_body = made[n], body[n]
        assert g is not None
        assert through_body is not None
        assert np.allclose(g, difference, rtol=1e-7, atol=1e-7)
        assert np.allclose(g, through_body, rtol=0, atol=EXACT)


@pytest.mark.parametrize("through_body", [False, True], ids=["closed form", "body"])
def test_one_value_as_several_operands_counts_once_each(through_body: bool) -> None:
    """attention(x, x, x): the sum of the gradients of the three operands is the gradient of x."""
    (x,) = draw((1, 2, 4, 3))
    (seed,) = draw((1, 2, 4, 3), seed=2)
    op = Attention(terms=(Causal(),))
    wanted = sum(g for g in gradients(op, [x, x, x], seed) if g is not None)
    b = Builder(Graph("tied"))
    e, g = b.input("x", f64[x.shape]), b.input("g", f64[x.shape])
    if through_body:
        made = super(Attention, op).gradient(b, [g], [e, e, e], [])
    else:
        made = op.gradient(b, [g], [e, e, e], [b.attention(e, e, e, terms=op.terms)])
    present = [m for m in made if m is not None]
    total = present[0]
    for part in present[1:]:
        total = total + part
    b.outputs(y=total)
    assert np.allclose(interpret(b.graph, {"x": x, "g": seed})["y"], wanted, rtol=0, atol=EXACT)


# -- rules and cost ------------------------------------------------------------------------------------------


def test_the_rule_follows_the_terms() -> None:
    assert Attention().axis_rule([]) == "b (g r) s [d], b g [t] [d], b g [t] e -> b (g r) s e"
    assert Attention().positional == frozenset()
    op = Attention(terms=(Causal(), Padding(), TensorBias("h t")))
    assert op.axis_rule([]) == "b (g r) s [d], b g [t<=s] [d], b g [t<=s] e, b, (g r) [t] -> b (g r) s e"
    assert op.positional == {"s", "t"}
    assert Attention(terms=(Window(1),)).axis_rule([]).count("[t<=s]") == 2
    assert Attention(terms=(Window(2),)).axis_rule([]).count("[t<=s]") == 0


def test_two_terms_of_a_kind_have_operands_of_their_own() -> None:
    op = Attention(terms=(TensorBias("t"), Segments(), TensorBias("h"), Segments()))
    names = op.operand_names(9)
    assert names == ["q", "k", "v", "bias", "query_segments", "key_segments", "bias2", "query_segments2",
                     "key_segments2"]  # fmt: skip


TERM_SETS: list[tuple[Term, ...]] = [
    (), (Causal(),), (Window(1),), (Window(3),), (Causal(), Window(3)), (Causal(), Window(3), Window(2)),
]  # fmt: skip


@pytest.mark.parametrize("terms", TERM_SETS, ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(6, 6), (3, 8), (8, 3), (1, 1)])
def test_live_pairs_counts_what_the_masks_keep(terms: tuple[Term, ...], queries: int, keys: int) -> None:
    i, j = np.arange(queries)[:, None], np.arange(keys)
    keep = np.ones((queries, keys), np.bool_)
    for term in terms:
        keep &= term.reference(i, j)
    assert live_pairs(terms, queries, keys) == keep.sum()


def test_live_pairs_of_a_later_part_are_those_of_its_rows() -> None:
    for terms in ((), (Causal(),), (Causal(), Window(3))):
        for start, count in ((0, 2), (2, 4), (5, 1), (5, 9)):
            rows = [live_pairs(terms, start + i + 1, 6) - live_pairs(terms, start + i, 6) for i in range(count)]
            assert live_pairs(terms, count, 6, start) == sum(rows)


def test_live_pairs_of_endless_text_are_counted_at_once() -> None:
    size = 10**12
    assert live_pairs((Causal(),), size, size) == size * (size + 1) // 2
    assert live_pairs((Causal(), Window(4)), size, size) == 4 * size - 6


def test_flops_count_live_pairs() -> None:
    """Each pair costs 2 d and 2 e operations for the two products, and five in between; the soft-cap adds three, a bias
    one.
    """
    types = [parse_type(t) for t in ("f32[B,4,S,8]", "f32[B,2,S,8]", "f32[B,2,S,6]")]
    sizes = {"B": 3, "S": 100}
    assert Attention().flops_at(types, sizes) == 3 * 4 * 100 * 100 * (2 * 14 + 5)
    assert Attention(terms=(Causal(),)).flops_at(types, sizes) == 3 * 4 * 5050 * (2 * 14 + 5)
    capped = Attention(terms=(Causal(), Window(1), Alibi()), softcap=1.0)
    assert capped.flops_at([*types, parse_type("f32[4]")], sizes) == 3 * 4 * 100 * (2 * 14 + 5 + 3 + 1)


# -- text ----------------------------------------------------------------------------------------------------

TEXTS = {
    "causal": Causal(),
    "window(128)": Window(128),
    "padding": Padding(),
    "segments": Segments(),
    "mask(b s t)": BooleanMask("b s t"),
    "bias(h s t)": TensorBias("h s t"),
    "t5_relative(32, 128, bidirectional)": T5Relative(32, 128, True),
    "t5_relative(16, 64)": T5Relative(16, 64),
    "alibi": Alibi(),
}


@pytest.mark.parametrize("text", TEXTS)
def test_terms_print_and_parse_back(text: str) -> None:
    assert str(TEXTS[text]) == text
    assert parse_term(text) == TEXTS[text]
    assert parse_term(f"  {text} ") == TEXTS[text]


def test_every_term_is_written_above() -> None:
    def kinds(cls: type[Term]) -> set[type[Term]]:
        # tests declare further kinds
        below = [kind for kind in cls.__subclasses__() if kind.__module__.startswith("treadle.")]
        return {cls} if not below else set().union(*map(kinds, below))

    assert {type(term) for term in TEXTS.values()} == kinds(Term)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("causal(3)", "cannot read '3'"),
        ("window", "size is missing"),
        ("window(x)", "size must be an integer, is 'x'"),
        ("window(" + "9" * 5000 + ")", "size must be an integer"),
        ("windw(3)", "unknown term of attention 'windw'"),
        ("window(3", "not a term of attention"),
        ("t5_relative(8, 4, sideways)", "cannot read 'sideways'"),
    ],
)
def test_text_that_is_no_term_is_refused(text: str, message: str) -> None:
    with pytest.raises(ParseError) as error:
        parse_term(text)
    assert message in error.value.what


@pytest.mark.parametrize(
    "make",
    [
        lambda: Window(0),
        lambda: parse_term("window(-1)"),
        lambda: Window(2**31),
        lambda: TensorBias(""),
        lambda: TensorBias("t h"),
        lambda: BooleanMask("b b"),
        lambda: BooleanMask("x"),
        lambda: T5Relative(3, 9, True),
        lambda: T5Relative(8, 2, True),
        lambda: T5Relative(1, 9),
        lambda: T5Relative(32, 10**12),
    ],
)
def test_terms_out_of_range_are_refused(make: Callable[[], Term]) -> None:
    with pytest.raises(GraphError) as error:
        make()
    assert error.value.received is not None
    assert "test_attention.py" in (error.value.source or "")


def test_terms_are_given_as_text_too() -> None:
    op = Attention(terms=["causal", Window(2)])  # type: ignore[arg-type]
    assert op == Attention(terms=(Causal(), Window(2)))
    assert hash(op) == hash(dataclasses.replace(op))


@pytest.mark.parametrize("terms", [(5,), "causal", 5, (("causal",),)])
def test_terms_must_be_a_sequence(terms: Any) -> None:
    with pytest.raises(GraphError, match=r"attention: terms must be a tuple of terms, is"):
        Attention(terms=terms)


# -- masking -------------------------------------------------------------------------------------------------


def builder() -> tuple[Builder, list[Expr]]:
    b = Builder(Graph("masking"))
    return b, [b.input("q", "f32[2,4,5,8]"), b.input("k", "f32[2,2,5,8]"), b.input("v", "f32[2,2,5,8]")]


def test_attend_orders_terms_and_operands() -> None:
    b, (q, k, v) = builder()
    lengths, ids = b.input("lengths", "i64[2]"), b.input("ids", "i64[2,5]")
    slopes, x, m = b.input("slopes", "f32[4]"), b.input("x", "f32[4,5,5]"), b.input("m", "bool[2,5]")
    masks = causal & window(3) & padding(lengths) & segments(ids) & boolean_mask(m, "b t")
    table = b.input("table", "f32[32,4]")
    biases = alibi(slopes) + tensor_bias(x, "h s t") + t5_relative(table, bidirectional=True)
    out = attend(b, q, k, v, masks=masks, biases=biases, scale=1.0, softcap=30.0)
    node = out.value.node
    assert node is not None
    assert node.op == Attention(
        terms=(
            *(Causal(), Window(3), Padding(), Segments(), BooleanMask("b t")),
            *(Alibi(), TensorBias("h s t"), T5Relative(32, 128, True)),
        ),
        scale=1.0,
        softcap=30.0,
    )
    assert node.operands == tuple(e.value for e in (q, k, v, lengths, ids, ids, m, slopes, x, table))
    assert str(masks) == "causal & window(3) & padding & segments & mask(b t)"
    assert str(biases) == "alibi + bias(h s t) + t5_relative(32, 128, bidirectional)"
    assert t5_relative(table).entries == ((T5Relative(), (table,)),)  # omitted attributes have defaults


def test_attend_without_terms() -> None:
    b, (q, k, v) = builder()
    for masks in (None, Masks()):
        node = attend(b, q, k, v, masks=masks).value.node
        assert node is not None
        assert node.op == Attention()
        assert math.isclose(Attention().scale_for(64), 0.125)


def test_masks_and_biases_do_not_mix() -> None:
    b, (q, k, v) = builder()
    slopes = b.input("slopes", "f32[4]")
    with pytest.raises(GraphError, match="masks intersect with masks only") as error:
        causal & alibi(slopes)
    assert "test_attention.py" in (error.value.source or "")
    with pytest.raises(GraphError, match="biases add to biases only"):
        alibi(slopes) + causal
    with pytest.raises(GraphError, match="masks intersect with masks only"):
        attend(b, q, k, v, masks=alibi(slopes))  # type: ignore[arg-type]
    with pytest.raises(GraphError) as mismatch:
        causal & slopes
    assert "bias=t.alibi(x)" in (mismatch.value.hint or "")


def test_masks_are_combined_by_their_signs_alone() -> None:
    """In Python, `a and b` returns b, so a mask could be lost without an error, and a model could look ahead."""
    for careless in (lambda: causal and window(3), lambda: not causal, lambda: bool(Biases())):
        with pytest.raises(GraphError, match="have no truth value"):
            careless()
    with pytest.raises(GraphError, match="masks do not add up"):
        causal + window(3)
    with pytest.raises(GraphError, match="masks are not callable"):
        causal()
    with pytest.raises(GraphError, match="lengths must be a tensor"):
        padding(None)

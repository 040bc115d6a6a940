"""Attention over a cache. For rows of any length in any slot, the results equal attention over the whole sequence of
each row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from tests.backend_checks import assert_near
from treadle.backends.registry import find_backend
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
from treadle.ir.attention.cached_positions import live_positions
from treadle.ir.attention.seen_keys import live_pairs
from treadle.ir.builder import Builder
from treadle.ir.composites import body_of
from treadle.ir.errors import BackendError, GraphError, RuleError
from treadle.ir.graph import Graph
from treadle.ir.interpreter import interpret, interpret_function
from treadle.ir.ops.attention import Attention
from treadle.ir.ops.cached_attention import CachedAttention
from treadle.ir.target import Target
from treadle.ir.types import Type, parse_type

Array = np.ndarray[Any, Any]
HEADS, GROUPS, D, E = 6, 2, 8, 5
BACKENDS = ("interpreter", "numpy", "torch", "tvm")

# Terms, and the capacity of a ring that holds all keys that a chunk of 3 queries sees; None: no ring.
DECODERS: dict[str, tuple[tuple[Term, ...], int | None]] = {
    "causal": ((Causal(),), None),
    "window": ((Causal(), Window(5)), None),
    "ring": ((Causal(), Window(5)), 7),
    "alibi": ((Causal(), Alibi()), None),
    "alibi in a ring": ((Window(4), Causal(), Alibi()), 6),
    "t5": ((Causal(), T5Relative(8, 5)), None),
    "t5 in a ring": ((Causal(), Window(6), T5Relative(8, 5)), 8),
}


def operand_types(terms: tuple[Term, ...], keys: str) -> list[str]:
    sizes = {"b": "B", "h": str(HEADS), "s": "S", "t": keys}
    dtypes = {"f": "f32", "i64": "i64", "bool": "bool"}
    taken = [o for term in terms for o in term.operands]
    return [
        f"{dtypes[o.dtype]}[{','.join(sizes.get(a, a.removeprefix('buckets')) for a in o.axes.split())}]" for o in taken
    ]


def cached_graph(terms: tuple[Term, ...], **options: Any) -> Graph:
    """Return a graph with symbolic sizes for everything that a session changes: rows, queries, slots and capacity."""
    b = Builder(Graph("cached"))
    given = [
        b.input("q", f"f32[B,{HEADS},S,{D}]"),
        b.input("k", f"f32[R,{GROUPS},C,{D}]"),
        b.input("v", f"f32[R,{GROUPS},C,{E}]"),
        b.input("rows", "i64[B]"),
        b.input("start", "i64[B]"),
        *(b.input(f"x{n}", type) for n, type in enumerate(operand_types(terms, "C"))),
    ]
    b.outputs(y=b.cached_attention(*given, terms=terms, **options))
    return b.graph


def runner(name: str, graph: Graph) -> Any:
    if name == "interpreter":
        return lambda **given: interpret(graph, given)
    backend = find_backend(name)
    if (reason := backend.available()) is not None:
        pytest.skip(f"backend {name}: {reason}")
    return backend.compile(graph, Target("cpu"), {})


class Text:
    """A whole sequence: its queries, keys and values, and the result of attention over them."""

    def __init__(self, rng: np.random.Generator, length: int, terms: tuple[Term, ...], given: list[Array]) -> None:
        self.q, self.k, self.v = (
            rng.standard_normal((1, heads, length, width)).astype(np.float32)
            for heads, width in ((HEADS, D), (GROUPS, D), (GROUPS, E))
        )
        wide = [x.astype(np.float64) if x.dtype.kind == "f" else x for x in (self.q, self.k, self.v, *given)]
        self.y = Attention(terms=terms).reference(*wide)

    def write(self, k: Array, v: Array, slot: int, past: int) -> None:
        """Write the keys and values before position `past` into a slot, in order; a ring keeps only the last ones."""
        for x, cache in ((self.k, k), (self.v, v)):
            at = np.arange(max(0, past - cache.shape[2]), past)
            cache[slot][:, at % cache.shape[2]] = x[0][:, at]


def learned(rng: np.random.Generator, terms: tuple[Term, ...]) -> list[Array]:
    """Return operands of terms that depend on neither row nor position: slopes and tables."""
    shapes = [[HEADS if a == "h" else 8 for a in o.axes.split()] for term in terms for o in term.operands]
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", DECODERS)
def test_chunks_over_a_cache_make_the_whole_sequence(name: str, backend: str) -> None:
    """Rows of different lengths in different slots are computed chunk after chunk; everything that is not written is
    NaN.
    """
    terms, ring = DECODERS[name]
    rng = np.random.default_rng(1)
    run = runner(backend, cached_graph(terms, ring=ring is not None))
    given = learned(rng, terms)
    texts = [Text(rng, length, terms, given) for length in (17, 12, 9)]
    for s in (1, 2, 3):
        for past in ((0, 0, 0), (14, 0, 6), (3, 9, 5), (8, 8, 1)):
            slots = rng.permutation(5)[:3]
            k = np.full((5, GROUPS, ring or 20, D), np.nan, np.float32)
            v = np.full((5, GROUPS, ring or 20, E), np.nan, np.float32)
            for text, slot, at in zip(texts, slots, past, strict=True):
                text.write(k, v, slot, at + s)
            q = np.concatenate([t.q[:, :, at : at + s] for t, at in zip(texts, past, strict=True)])
            made = run(
                q=q, k=k, v=v, rows=slots, start=np.array(past), **{f"x{n}": x for n, x in enumerate(given)}
            ).get("y")
            meant = np.concatenate([t.y[:, :, at : at + s] for t, at in zip(texts, past, strict=True)])
            assert_near(made, meant)


CROSS: list[tuple[Term, ...]] = [
    (Padding(),),
    (Padding(), TensorBias("h t"), T5Relative(8, 5, True)),
    (Segments(), Padding(), BooleanMask("b s t")),
    (Causal(), Segments()),
    (TensorBias("b h s t"), Causal(), BooleanMask("t"), Padding(), Window(6)),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"softcap": 1.5}, {"scale": -0.75}])
def test_each_row_is_attention_at_its_positions(options: Mapping[str, Any], backend: str) -> None:
    """The result equals attention over a sequence in which each row's queries are at the same positions. Operands with
    an axis of keys have an element for each key, by its index.
    """
    rng = np.random.default_rng(2)
    for terms in CROSS:
        run = runner(backend, cached_graph(terms, **options))
        for count, slots, start in ((1, 1, [4]), (2, 4, [7, 0]), (3, 3, [2, 9, 9])):
            s, capacity = int(rng.integers(1, 4)), 12
            sizes = {"B": count, "S": s, "C": capacity}
            given = [_drawn(rng, parse_type(text), sizes) for text in operand_types(terms, "C")]
            q = rng.standard_normal((count, HEADS, s, D)).astype(np.float32)
            k = rng.standard_normal((slots, GROUPS, capacity, D)).astype(np.float32)
            v = rng.standard_normal((slots, GROUPS, capacity, E)).astype(np.float32)
            rows = rng.integers(0, slots, count)
            passed = {f"x{n}": x for n, x in enumerate(given)}
            made = run(q=q, k=k, v=v, rows=rows, start=np.array(start), **passed)["y"]
            for b, (slot, past) in enumerate(zip(rows, start, strict=True)):
                op, own = (
                    Attention(terms=terms, **options),
                    [_before(x, o.axes, b, past) for x, o in _with(terms, given)],
                )
                whole = np.concatenate([np.zeros((1, HEADS, past, D)), q[b : b + 1]], axis=2)
                meant = op.reference(whole, *(x[slot, None].astype(np.float64) for x in (k, v)), *own)
                assert_near(made[b], meant[0, :, past:])


def _drawn(rng: np.random.Generator, type: Type, sizes: Mapping[str, int]) -> Array:
    shape = tuple(size.evaluate(sizes) for size in type.shape)
    if type.dtype.is_float:
        return rng.standard_normal(shape).astype(np.float32)
    return (
        rng.random(shape) < 0.75 if type.dtype.name == "bool" else rng.integers(0, 14 if len(shape) == 1 else 3, shape)
    )


def _with(terms: tuple[Term, ...], given: list[Array]) -> list[tuple[Array, Any]]:
    return list(zip(given, (o for term in terms for o in term.operands), strict=True))


def _before(x: Array, axes: str, b: int, past: int) -> Array:
    """Return the operand of one row, with `past` queries inserted before the row's own queries."""
    for at, axis in enumerate(axes.split()):
        if axis == "b":
            x = np.take(x, [b], axis=at)
        if axis == "s":
            x = np.concatenate([np.repeat(np.take(x, [0], axis=at), past, axis=at), x], axis=at)
    return x


def test_a_ring_keeps_the_last_positions() -> None:
    """The positions of the keys in each slot of a ring of 4 that was written up to position 6."""
    k = np.zeros((1, 1, 4, 1))
    v = np.arange(4.0).reshape(1, 1, 4, 1)  # the value of a key is the number of its slot
    bias = np.full(4, -np.inf)
    op = CachedAttention(terms=(Causal(), Alibi(), TensorBias("t")), scale=1.0, ring=True)
    q, rows, start = np.zeros((1, 1, 1, 1)), np.array([0]), np.array([6])
    alone = [
        op.reference(q, k, v, rows, start, np.array([1.0]), np.where(np.arange(4) == j, 0.0, bias)) for j in range(4)
    ]
    assert [float(x[0, 0, 0, 0]) for x in alone] == [0, 1, 2, 3]  # positions 4, 5, 6 and 3: each is seen
    (mean,) = op.reference(q, k, v, rows, start, np.array([100.0]), np.zeros(4)).ravel()
    assert mean == pytest.approx(2.0), "the nearest key, at position 6, is in slot 2"


def test_live_positions_hold_every_pair_that_is_kept_and_end_with_one() -> None:
    rng = np.random.default_rng(3)
    for _ in range(300):
        start, s, capacity = (int(rng.integers(low, 12)) for low in (-2, 1, 1))
        ring = bool(rng.integers(2))
        terms: list[Term] = [Causal()] if ring or rng.integers(2) else []
        terms += [Window(int(rng.integers(1, 8)))] if rng.integers(2) else []
        lengths = [int(rng.integers(0, 14))] if rng.integers(2) else []
        live = live_positions(terms, start, s, capacity, lengths, ring=ring)
        i, j = start + np.arange(s)[:, None], np.arange(-30, 30)
        keep = (j >= 0) & ((start + s - capacity <= j) & (j < start + s) if ring else j < capacity)
        for mask in [*(term.reference(i, j) for term in terms), *(j < n for n in lengths)]:
            keep = keep & mask
        kept = j[np.broadcast_to(keep, (s, len(j))).any(axis=0)]
        assert list(kept) == list(live) or (s > 1 and set(kept) <= set(live)), (
            terms,
            start,
            s,
            capacity,
            lengths,
            ring,
        )
        assert len(live) <= capacity


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_that_sees_no_key_gives_zeros(backend: str) -> None:
    run = runner(backend, cached_graph((Causal(), Padding())))
    k, v = np.full((2, GROUPS, 4, D), np.inf, np.float32), np.full((2, GROUPS, 4, E), np.nan, np.float32)
    k[0], v[0] = 1, 1
    q = np.ones((3, HEADS, 1, D), np.float32)
    made = run(q=q, k=k, v=v, rows=np.array([0, 1, 0]), start=np.array([2, 3, -1]), x0=np.array([4, 0, 4]))["y"]
    assert_near(made, np.array([1.0, 0.0, 0.0])[:, None, None, None] * np.ones((3, HEADS, 1, E)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("slot", [-1, 3, 2**40])
def test_a_row_outside_the_slots_is_an_error(backend: str, slot: int) -> None:
    run = runner(backend, cached_graph((Causal(),)))
    k, v = np.ones((3, GROUPS, 4, D), np.float32), np.ones((3, GROUPS, 4, E), np.float32)
    q = np.ones((2, HEADS, 1, D), np.float32)
    with pytest.raises((BackendError, GraphError)) as caught:
        run(q=q, k=k, v=v, rows=np.array([1, slot]), start=np.array([0, 1]))
    assert f"index {slot} is outside an axis of size 3" in str(caught.value)
    if backend != "interpreter":
        assert caught.value.received == f"{slot} in input rows"
    assert np.isfinite(run(q=q, k=k, v=v, rows=np.array([1, 2]), start=np.array([0, 1]))["y"]).all()


def test_terms_that_show_what_is_not_written_are_refused() -> None:
    types = [parse_type(t) for t in ("f32[1,2,1,4]", "f32[3,2,8,4]", "f32[3,2,8,4]", "i64[1]", "i64[1]")]
    with pytest.raises(RuleError, match="needs causal or padding") as caught:
        CachedAttention(terms=(Window(4),)).infer(types)
    assert "terms=(causal, ...)" in (caught.value.hint or "")
    assert CachedAttention(terms=(Window(1),)).infer(types)[0] == types[0]  # only its own position: equal to causal


def test_the_cost_is_a_bound() -> None:
    """For a slot that is full up to the queries, the cost counts all pairs and no more; for a window, its width."""
    types = [parse_type(t) for t in ("f32[2,6,1,8]", "f32[3,2,64,8]", "f32[3,2,64,5]", "i64[2]", "i64[2]")]
    pair = Attention(terms=(Causal(),)).flops_at([parse_type(f"f32[1,1,1,{n}]") for n in (8, 8, 5)], {})
    assert CachedAttention(terms=(Causal(),)).flops_at(types, {}) == 2 * 6 * 64 * (pair or 0)
    assert CachedAttention(terms=(Causal(), Window(9))).flops_at(types, {}) == 2 * 6 * 9 * (pair or 0)
    assert live_pairs((Causal(), Window(9)), 64, 64) <= 64 * 9


def test_the_body_sees_no_nan_that_the_reference_does_not_see() -> None:
    op = CachedAttention(terms=(Causal(), Window(3)))
    types = [parse_type(t) for t in ("f64[1,2,2,4]", "f64[2,1,9,4]", "f64[2,1,9,4]", "i64[1]", "i64[1]")]
    rng = np.random.default_rng(4)
    q, k, v = (rng.standard_normal(t.evaluate({})) for t in types[:3])
    k[:, :, [0, 1, 6, 7, 8]], v[:, :, [0, 1, 6, 7, 8]] = np.nan, -np.inf
    given = [q, k, v, np.array([1]), np.array([4])]
    (made,) = interpret_function(body_of(op, types), given, {})
    assert np.isfinite(made).all()
    np.testing.assert_allclose(made, op.reference(*given), rtol=1e-12)


def test_pytorch_computes_rows_that_have_come_equally_far_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    import treadle.backends.torch.attention_kernels as kernels

    calls: list[tuple[int, ...]] = []
    attention = kernels.attention

    def counted(q: Any, k: Any, v: Any, **given: Any) -> Any:
        assert k._base is not None and v._base is not None, "a copy of the cache"
        calls.append((k.shape[0], k.shape[2], len(given["masks"])))
        return attention(q, k, v, **given)

    monkeypatch.setattr(kernels, "attention", counted)
    q, k, v = torch.randn(4, 2, 1, 8), torch.randn(6, 2, 32, 8), torch.randn(6, 2, 32, 8)
    rows = torch.tensor([2, 3, 4, 0])
    for start, expected in (
        ([9, 9, 9, 9], [(3, 10, 0), (1, 10, 0)]),
        ([9, 9, 3, 3], [(2, 10, 0), (1, 4, 0), (1, 4, 0)]),
    ):
        calls.clear()
        kernels.cached_attention(q, k, v, rows, torch.tensor(start), terms=("causal",), scale=0.5)
        assert calls == expected

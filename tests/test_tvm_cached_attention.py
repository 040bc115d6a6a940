"""Attention over a cache on the TVM backend has the same bits as attention over whole sequences, for any chunks and any
other rows.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from tests.backend_checks import graph_of
from treadle.backends.bfloat16 import rounded, widened
from treadle.backends.registry import find_backend
from treadle.backends.tvm.executable import KernelExecutable
from treadle.backends.tvm.kernels.attention.cached_attention import CachedFlashAttention, steps_at_once
from treadle.backends.tvm.kernels.attention.scratch import BLOCK, SPAN
from treadle.backends.tvm.kernels.isa import ISAS, host_isa, runs_here
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
from treadle.ir.builder import Builder, Expr
from treadle.ir.errors import BackendError
from treadle.ir.target import Target

_missing = find_backend("tvm").available()
if _missing is not None:
    pytest.skip(_missing, allow_module_level=True)

Array = np.ndarray[Any, Any]
SMALL = [name for name in ("x86-64-v3", "x86-64-v2") if runs_here(ISAS[name])]
D, E, LONGEST, SLOTS = 32, 48, 300, 5

TERMS: dict[str, tuple[Term, ...]] = {
    "causal": (Causal(),),
    "window": (Causal(), Window(70)),
    "padding": (Padding(),),
    "causal padding": (Padding(), Causal()),
    "segments": (Segments(), Causal()),
    "mask": (Causal(), BooleanMask("b s t")),
    "bias": (Causal(), TensorBias("b h t")),
    "alibi": (Causal(), Alibi()),
    "t5": (T5Relative(32, 100), Causal()),
    "t5 both ways": (T5Relative(16, 40, True), Padding()),
    "bias of queries": (TensorBias("b s"), Causal()),
    "many": (Window(150), Segments(), T5Relative(8, 20), Alibi(), Padding(), TensorBias("b t"), Causal()),
}
CASES = [(name, False) for name in TERMS] + [(name, True) for name in ("window", "alibi", "t5")]


def operands(terms: tuple[Term, ...], keys: str, heads: int, queries: str) -> list[tuple[str, str]]:
    """Return the axes of the terms' operands, and their types."""
    sizes = {"b": "B", "h": str(heads), "s": queries, "t": keys}
    dtypes = {"f": "f32", "i64": "i64", "bool": "bool"}
    taken = [o for term in terms for o in term.operands]
    return [
        (o.axes, f"{dtypes[o.dtype]}[{','.join(sizes.get(a, a.removeprefix('buckets')) for a in o.axes.split())}]")
        for o in taken
    ]


def whole_graph(terms: tuple[Term, ...], heads: int, groups: int, **options: Any) -> Any:
    def build(b: Builder) -> Expr:
        types = [f"f32[B,{heads},S,{D}]", f"f32[B,{groups},S,{D}]", f"f32[B,{groups},S,{E}]"]
        types += [type for _, type in operands(terms, "S", heads, "S")]
        made: Expr = b.attention(*(b.input(f"x{n}", t) for n, t in enumerate(types)), terms=terms, **options)
        return made

    return graph_of(build, "whole")


def cached_graph(
    terms: tuple[Term, ...], heads: int, groups: int, queries: str, held: str = "f32", **options: Any
) -> Any:
    def build(b: Builder) -> Expr:
        types = [f"f32[B,{heads},{queries},{D}]", f"{held}[R,{groups},C,{D}]", f"{held}[R,{groups},C,{E}]"]
        types += ["i64[B]", "i64[B]"]
        types += [type for _, type in operands(terms, "C", heads, queries)]
        made: Expr = b.cached_attention(*(b.input(f"x{n}", t) for n, t in enumerate(types)), terms=terms, **options)
        return made

    return graph_of(build, "cached")


def compiled(graph: Any, target: str = "cpu", threads: int | None = None) -> KernelExecutable:
    made = find_backend("tvm").compile(graph, Target(target, threads=threads), {})
    assert isinstance(made, KernelExecutable)
    return made


def kernel_of(exe: KernelExecutable) -> CachedFlashAttention:
    (kernel,) = [kernel for kernel in exe.kernels if isinstance(kernel, CachedFlashAttention)]
    return kernel


def call(exe: KernelExecutable, given: list[Array]) -> Array:
    return np.asarray(exe(**{f"x{n}": x for n, x in enumerate(given)}).y)


class Texts:
    """Sequences of one length, and the result of plain attention for each."""

    def __init__(
        self,
        terms: tuple[Term, ...],
        heads: int,
        groups: int,
        target: str = "cpu",
        longest: int = LONGEST,
        **options: Any,
    ) -> None:
        self.longest = longest
        rng, count = np.random.default_rng(len(terms) + heads), 4
        self.is_causal = Causal() in terms
        sizes = {"b": count, "h": heads, "s": longest, "t": longest}
        self.q, self.k, self.v = (
            rng.standard_normal((count, n, longest, width)).astype(np.float32)
            for n, width in ((heads, D), (groups, D), (groups, E))
        )
        self.axes = [axes.split() for axes, _ in operands(terms, "S", heads, "S")]
        self.given: list[Array] = []
        for axes, type in operands(terms, "S", heads, "S"):
            shape = [sizes.get(a, 0) or int(a.removeprefix("buckets")) for a in axes.split()]
            if type.startswith("f32"):
                self.given.append(rng.standard_normal(shape).astype(np.float32))
            elif type.startswith("bool"):
                self.given.append(rng.random(shape) < 0.75)
            else:
                low, high = (longest // 2, longest) if axes == "b" else (0, 2)
                self.given.append(rng.integers(low, high, shape))
        whole = compiled(whole_graph(terms, heads, groups, **options), target)
        self.y = call(whole, [self.q, self.k, self.v, *self.given])

    def step(self, rng: np.random.Generator, past: list[int], s: int, capacity: int) -> tuple[list[Array], Array]:
        """Return the operands of a step of rows at these positions, in slots full of NaN, and the expected result."""
        texts = rng.permutation(len(self.q))[: len(past)]
        slots = rng.permutation(SLOTS)[: len(past)]
        k, v = (np.full((SLOTS, x.shape[1], capacity, x.shape[3]), np.nan, np.float32) for x in (self.k, self.v))
        for x, cache_ in ((self.k, k), (self.v, v)):
            for text, slot, at in zip(texts, slots, past, strict=True):
                # Without causal, a query sees all keys of its row.
                written = np.arange(max(0, at + s - capacity), at + s if self.is_causal else self.longest)
                cache_[slot][:, written % capacity] = x[text][:, written]
        rows = [(text, slice(at, at + s)) for text, at in zip(texts, past, strict=True)]
        given = [self._of_rows(x, axes, rows, capacity) for x, axes in zip(self.given, self.axes, strict=True)]
        q, y = (np.stack([x[text][:, at] for text, at in rows]) for x in (self.q, self.y))
        return [q, k, v, slots, np.array(past), *given], y

    def _of_rows(self, x: Array, axes: list[str], rows: list[tuple[int, slice]], capacity: int) -> Array:
        if "b" not in axes:
            return x
        parts = []
        for text, at in rows:
            part = x[text]
            if "s" in axes:
                part = part[(slice(None),) * (axes.index("s") - 1) + (at,)]
            if "t" in axes:
                part = np.concatenate([part, np.ones((*part.shape[:-1], capacity - self.longest), part.dtype)], axis=-1)
            parts.append(part)
        return np.stack(parts)


@cache
def texts(name: str, heads: int, groups: int, target: str = "cpu", softcap: float | None = None) -> Texts:
    return Texts(TERMS[name], heads, groups, target, softcap=softcap)


def steps(
    rng: np.random.Generator, s: int, count: int, times: int, longest: int = LONGEST, every: int = BLOCK
) -> list[list[int]]:
    """Draw positions of rows, some of them near multiples of `every`, such as the starts of blocks."""
    edges = [x for n in range(0, longest, every) for x in (n - 1, n, n + 1) if 0 <= x <= longest - s]
    anywhere = rng.integers(0, longest - s + 1, (times, count))
    made: list[list[int]] = np.where(
        rng.random((times, count)) < 0.5, anywhere, rng.choice(edges, (times, count))
    ).tolist()
    return made


@pytest.mark.parametrize(("name", "ring"), CASES)
def test_chunks_have_the_bits_of_the_whole(name: str, ring: bool) -> None:
    terms, rng = TERMS[name], np.random.default_rng(0)
    if ring:
        terms = (*terms, *([Window(70)] if name != "window" else []))
    heads, groups = 6, 2
    held = Texts(terms, heads, groups) if ring else texts(name, heads, groups)
    exe = compiled(cached_graph(terms, heads, groups, "S", ring=ring))
    assert kernel_of(exe).shared == 0
    for s in (1, 2, 5, 16, 21, 64, 150):
        for count in (1, 3):
            capacity = (int(rng.integers(70 + s - 1, 70 + s + 90))) if ring else LONGEST + int(rng.integers(0, 50))
            for past in steps(rng, s, count, 2):
                given, wanted = held.step(rng, past, s, capacity)
                np.testing.assert_array_equal(call(exe, given), wanted, err_msg=f"{s} {past} {capacity}")


@pytest.mark.parametrize(("name", "ring"), CASES)
def test_a_step_has_the_bits_of_the_whole(name: str, ring: bool) -> None:
    terms, rng = TERMS[name], np.random.default_rng(1)
    if ring:
        terms = (*terms, *([Window(70)] if name != "window" else []))
    held = Texts(terms, 6, 2) if ring else texts(name, 6, 2)
    exe = compiled(cached_graph(terms, 6, 2, "1", ring=ring))
    assert kernel_of(exe).shared == 3
    for count in (1, 2, 3):
        capacity = int(rng.integers(70, 170)) if ring else LONGEST + int(rng.integers(0, 50))
        for past in steps(rng, 1, count, 6):
            given, wanted = held.step(rng, past, 1, capacity)
            np.testing.assert_array_equal(call(exe, given), wanted, err_msg=f"{past} {capacity}")


LONG = 3 * SPAN + 70
LONG_WINDOW = SPAN + 200


@pytest.mark.parametrize(
    ("name", "ring", "target"),
    [(name, False, "cpu") for name in ("causal", "window", "many", "t5 both ways")]
    + [("causal", True, "cpu"), ("alibi", True, "cpu")]
    + [("causal", False, target) for target in SMALL],
)
def test_parts_of_spans_merge_as_in_the_whole(name: str, ring: bool, target: str) -> None:
    terms, rng = TERMS[name], np.random.default_rng(7)
    if ring:
        terms = (*terms, Window(LONG_WINDOW))
    held = Texts(terms, 6, 2, target, LONG)
    one, several = (compiled(cached_graph(terms, 6, 2, queries, ring=ring), target) for queries in ("1", "S"))
    for s, exe in ((1, one), (2, several), (40, several), (700, several)):
        for past in steps(rng, s, 2, 5 if s == 1 else 2, LONG, SPAN):
            capacity = int(rng.integers(LONG_WINDOW, LONG_WINDOW + 90)) + s - 1 if ring else LONG
            given, wanted = held.step(rng, past, s, capacity)
            np.testing.assert_array_equal(call(exe, given), wanted, err_msg=f"{s} {past} {capacity}")


@pytest.mark.parametrize("held", ["bf16", "f16"])
@pytest.mark.parametrize("queries", ["1", "S"])
@pytest.mark.parametrize(
    ("name", "ring", "target"),
    [("causal", False, "cpu"), ("many", False, "cpu"), ("alibi", True, "cpu")]
    + [("causal", False, target) for target in SMALL],
)
def test_16_bits_are_widened_as_they_are_read(name: str, ring: bool, target: str, queries: str, held: str) -> None:
    """The results have the same bits as with a float32 cache that holds the rounded numbers."""
    terms, rng = TERMS[name], np.random.default_rng(9)
    if ring:
        terms = (*terms, Window(70))
    text = Texts(terms, 6, 2, target)
    wide, narrow = (compiled(cached_graph(terms, 6, 2, queries, dtype, ring=ring), target) for dtype in ("f32", held))
    assert (kernel_of(narrow).cache, kernel_of(wide).cache) == (held, "f32")
    for past in steps(rng, 5, 2, 4):
        given, _ = text.step(rng, past, 1 if queries == "1" else 5, 80 if ring else LONGEST)
        given[1:3] = [widened(rounded(x)) if held == "bf16" else x.astype(np.float16) for x in given[1:3]]
        wanted = call(wide, [*given[:1], *(x.astype(np.float32) for x in given[1:3]), *given[3:]])
        np.testing.assert_array_equal(call(narrow, given), wanted)
        assert wanted.any()


def test_threads_that_share_spans_do_not_change_bits() -> None:
    rng = np.random.default_rng(8)
    held = Texts((Causal(),), 3, 1, longest=LONG)
    exes = [compiled(cached_graph((Causal(),), 3, 1, "1"), threads=n) for n in (1, 2)]
    for past in ([LONG - 1], [SPAN, SPAN - 1, 3 * SPAN + 5], [0, 2 * SPAN + 1, 17]):
        given, wanted = held.step(rng, past, 1, LONG)
        for exe in exes:
            np.testing.assert_array_equal(call(exe, given), wanted)


@pytest.mark.parametrize("target", ["cpu", *SMALL])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (8, 1), (4, 1), (18, 2)])
def test_heads_that_share_keys_on_each_instruction_set(heads: int, groups: int, target: str) -> None:
    rng = np.random.default_rng(2)
    held = texts("causal", heads, groups, target, 2.0)
    exe = compiled(cached_graph((Causal(),), heads, groups, "1", softcap=2.0), target)
    alike = heads // groups
    assert kernel_of(exe).shared == (alike if alike <= steps_at_once(ISAS.get(target, host_isa())) else 0)
    for past in steps(rng, 1, 2, 4):
        given, wanted = held.step(rng, past, 1, LONGEST)
        np.testing.assert_array_equal(call(exe, given), wanted)


@pytest.mark.parametrize("queries", ["1", "S"])
def test_neither_threads_nor_company_change_bits(queries: str) -> None:
    rng, held = np.random.default_rng(3), texts("causal", 6, 2)
    s = 1 if queries == "1" else 7
    one, two = (compiled(cached_graph((Causal(),), 6, 2, queries), threads=n) for n in (1, 2))
    given, wanted = held.step(rng, [290, 3, 120, 0], s, LONGEST)
    np.testing.assert_array_equal(call(one, given), wanted)
    np.testing.assert_array_equal(call(two, given), wanted)
    q, k, v, rows, start = given
    for b in range(4):
        alone = [q[b : b + 1], k, v, rows[b : b + 1], start[b : b + 1]]
        np.testing.assert_array_equal(call(two, alone), wanted[b : b + 1])


@pytest.mark.parametrize("queries", ["1", "S"])
def test_every_row_is_computed_whatever_the_others_cost(queries: str) -> None:
    """No task is left out when work is shared by cost: for rows of any lengths, of length 0, and for more rows than
    there are slots of memory.
    """
    rng, terms = np.random.default_rng(4), (Padding(), Causal())
    exe = compiled(cached_graph(terms, 6, 2, queries))
    k, v = (rng.standard_normal((SLOTS, 2, LONGEST, n)).astype(np.float32) for n in (D, E))
    for count in (1, 7, 40):
        q = rng.standard_normal((count, 6, 1 if queries == "1" else 4, D)).astype(np.float32)
        rows, start = rng.integers(0, SLOTS, count), rng.integers(-5, LONGEST + 20, count) * rng.integers(0, 2, count)
        lengths = rng.integers(0, 2, count) * LONGEST
        whole = call(exe, [q, k, v, rows, start, lengths])
        for b in range(count):
            one = slice(b, b + 1)
            np.testing.assert_array_equal(call(exe, [q[one], k, v, rows[one], start[one], lengths[one]]), whole[one])
        assert not whole[lengths == 0].any()


@pytest.mark.parametrize("start", [-(2**63), -(2**40), 2**40, 2**62, 2**63 - 40, 2**63 - 2, 2**63 - 1])
@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("queries", ["1", "S"])
def test_positions_far_away_read_nothing_outside(start: int, ring: bool, queries: str) -> None:
    rng, terms = np.random.default_rng(5), (Causal(), Window(33), T5Relative(8, 20))
    exe = compiled(cached_graph(terms, 6, 2, queries, ring=ring))
    q = rng.standard_normal((1, 6, 1, D)).astype(np.float32)
    k, v = (rng.standard_normal((2, 2, 33, n)).astype(np.float32) for n in (D, E))
    made = call(exe, [q, k, v, np.array([1]), np.array([start]), np.ones((8, 6), np.float32)])
    assert np.isfinite(made).all()
    assert not made.any() or (ring and start in (2**40, 2**62))


def test_a_row_outside_the_slots_is_told_and_the_others_go_on() -> None:
    rng, held = np.random.default_rng(6), texts("causal", 6, 2)
    exe = compiled(cached_graph((Causal(),), 6, 2, "1"))
    given, wanted = held.step(rng, [9, 4], 1, LONGEST)
    with pytest.raises(BackendError, match=f"cached_attention: index {SLOTS} is outside an axis of size {SLOTS}"):
        call(exe, [*given[:3], np.array([given[3][0], SLOTS]), *given[4:]])
    np.testing.assert_array_equal(call(exe, given), wanted)


def test_cases_without_a_kernel_run_by_the_body() -> None:
    terms = (Causal(), Window(9), TensorBias("b t"))
    assert kernel_of(compiled(cached_graph(terms, 6, 2, "1")))
    exe = compiled(cached_graph(terms, 6, 2, "1", ring=True))
    assert not [kernel for kernel in exe.kernels if isinstance(kernel, CachedFlashAttention)]


@pytest.mark.parametrize("queries", ["1", "S"])
def test_arm64_is_assembled(queries: str) -> None:
    exe = compiled(cached_graph(TERMS["many"], 6, 2, queries), "arm64")
    assert "fmla" in exe.assembly(kernel_of(exe).title)

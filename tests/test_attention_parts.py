"""Attention in parts: for any split of the keys, the merged parts and their gradients equal those of attention.

Everything is computed in float64 by the ops' references, so the split changes only the order of some sums.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

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
from treadle.ir.graph import Graph
from treadle.ir.interpreter import interpret
from treadle.ir.transforms.differentiate import backward
from treadle.ir.types import i64

B, H, G, S, T, D, E = 2, 4, 2, 7, 12, 3, 5

TERMS: dict[str, tuple[Term, ...]] = {
    "none": (),
    "causal": (Causal(),),
    "window": (Causal(), Window(4)),
    "padding": (Padding(),),
    "segments": (Segments(), Causal()),
    "mask": (BooleanMask("b s t"), TensorBias("h t")),
    "distances": (T5Relative(8, 6, True), Alibi()),
}
SPLITS = [(T,), (5, 7), (1, 4, 7), (3, 3, 3, 3), (1,) * T]


def inputs(terms: tuple[Term, ...]) -> tuple[list[str], list[np.ndarray[Any, Any]]]:
    """Return types and values of q, k, v and the terms' operands; one row has length 0."""
    rng, sizes = np.random.default_rng(0), {"b": B, "h": H, "s": S, "t": T}
    types = [f"f64[{B},{H},{S},{D}]", f"f64[{B},{G},{T},{D}]", f"f64[{B},{G},{T},{E}]"]
    values = [rng.standard_normal((B, n, s, d)) for n, s, d in ((H, S, D), (G, T, D), (G, T, E))]
    for operand in (o for term in terms for o in term.operands):
        shape = [sizes.get(axis) or int(axis.removeprefix("buckets")) for axis in operand.axes.split()]
        dtype = {"f": "f64", "i64": "i64", "bool": "bool"}[operand.dtype]
        types.append(f"{dtype}[{','.join(map(str, shape))}]")
        if dtype == "f64":
            values.append(rng.standard_normal(shape))
        elif dtype == "bool":
            values.append(rng.random(shape) < 0.4)
        else:
            values.append(np.array([0, 9]) if shape == [B] else rng.integers(0, 2, shape))
    return types, values


def split(b: Builder, x: Expr, axes: str, start: int, stop: int) -> Expr:
    names = axes.split()
    return b.slice(x, axis=names.index("t"), start=start, stop=stop) if "t" in names else x


def in_parts(
    b: Builder, terms: tuple[Term, ...], sizes: tuple[int, ...], q: Expr, k: Expr, v: Expr, *given: Expr
) -> Any:
    """Compute attention in parts and merge three parts at a time, so that merged parts are merged again."""
    parts, at = [], 0
    taken = [operand.axes for term in terms for operand in term.operands]
    for size in sizes:
        here = (at, at + size)
        offset = b.expand(b.constant(at, i64), shape=(B,))
        own = [split(b, x, axes, *here) for x, axes in zip(given, taken, strict=True)]
        keys, values = (split(b, x, "b g t d", *here) for x in (k, v))
        parts.append(b.attention_parts(q, keys, values, offset, *own, terms=terms, softcap=3.0))
        at += size
    while len(parts) > 1:
        some, parts = parts[:3], parts[3:]
        parts.insert(0, b.merge_parts(*(stacked(b, x) for x in zip(*some, strict=True))))
    return parts[0]


def stacked(b: Builder, parts: tuple[Expr, ...]) -> Expr:
    return b.concat(*(b.rearrange(x, pattern="... -> 1 ...") for x in parts), axis=0)


def whole(b: Builder, terms: tuple[Term, ...], sizes: tuple[int, ...], *operands: Expr) -> Expr:
    made: Expr = b.attention(*operands, terms=terms, softcap=3.0)
    return made


def merged(b: Builder, terms: tuple[Term, ...], sizes: tuple[int, ...], *operands: Expr) -> Expr:
    made: Expr = in_parts(b, terms, sizes, *operands)[0]
    return made


def results(build: Any, name: str, sizes: tuple[int, ...]) -> dict[str, Any]:
    """Return y, and the gradient of each float operand."""
    types, values = inputs(TERMS[name])
    b = Builder(Graph("attention"))
    y = build(b, TERMS[name], sizes, *(b.input(f"x{n}", t) for n, t in enumerate(types)))
    given, floats = list(b.function.inputs), [v for v in b.function.inputs if v.type.dtype.is_float]
    found = backward(b, list(b.function.nodes), {y.value: b.input("seed", y.type)})
    b.outputs(y=y, **{v.name: found[v] for v in floats})
    seed = np.random.default_rng(1).standard_normal((B, H, S, E))
    return dict(interpret(b.graph, {**{v.name: x for v, x in zip(given, values, strict=True)}, "seed": seed}))


@cache
def wanted(name: str) -> dict[str, Any]:
    return results(whole, name, (T,))


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_merged_parts_are_attention_and_so_are_their_gradients(name: str, sizes: tuple[int, ...]) -> None:
    found = results(merged, name, sizes)
    assert found.keys() == wanted(name).keys() >= {"y", "x0", "x1", "x2"}
    for result, x in wanted(name).items():
        np.testing.assert_allclose(found[result], x, rtol=0, atol=1e-12, err_msg=result)


def test_a_part_of_which_a_query_sees_nothing_says_so() -> None:
    b = Builder(Graph("part"))
    q, k, v = (b.input(n, f"f32[1,1,3,{d}]") for n, d in (("q", 2), ("k", 2), ("v", 4)))
    out, largest, total = b.attention_parts(q, k, v, b.input("offset", "i64[1]"), terms=(Causal(),))
    b.outputs(out=out, max=largest, sum=total)
    rng = np.random.default_rng(2)
    given = {n: rng.standard_normal((1, 1, 3, d)).astype(np.float32) for n, d in (("q", 2), ("k", 2), ("v", 4))}
    made = interpret(b.graph, {**given, "offset": np.array([2])})
    assert not made["out"][0, 0, :2].any()
    np.testing.assert_array_equal(made["max"][0, 0, :2], -np.inf)
    np.testing.assert_array_equal(made["sum"][0, 0], [0, 0, 1])
    np.testing.assert_array_equal(made["out"][0, 0, 2], given["v"][0, 0, 0])

"""Attentions with masks and biases drawn at random: fills, addends and scales of every size, in every order.

    drawn = draw_attention(seed)       # drawn.graph, drawn.inputs(float64), drawn.text

Queries, keys and biases are multiples of 1/8 and scales are powers of two, so the order of additions does not change a
sum. If every key of a row is masked, only the masks' numbers remain, exactly, in f16 and in f32. The first row of every
mask keeps no key; the second is padded on the left.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from treadle.ir.builder import Builder, Expr
from treadle.ir.graph import Graph
from treadle.ir.types import DType, f16, f32, f64

Array = np.ndarray[Any, Any]

ROWS, HEADS, QUERIES, SIZE = 3, 2, 4, 4
NUMBERS = (-1e4, -1e9, -1e30, -3.4028234663852886e38, -math.inf)
"""Numbers by which models mask, if the dtype can hold them; f16 also uses its own lowest number."""


@dataclass
class DrawnAttention:
    """A graph, with arrays for its inputs and a description of the drawn parts."""

    graph: Graph
    arrays: dict[str, Array] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return ", ".join(self.words)


def draw_attention(seed: int) -> DrawnAttention:
    """Draw an attention with up to five steps between its two products."""
    return _Drawing(np.random.default_rng(seed)).run()


class _Drawing:
    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.keys = QUERIES if rng.random() < 0.7 else 5
        self.t = "S" if self.keys == QUERIES else "T"
        self.dtype: DType = self.one(*[f32] * 7, f16, f16, f64)
        self.b = Builder(Graph("drawn"))
        self.drawn = DrawnAttention(self.b.graph)
        self.say(f"{self.dtype}, {self.keys} keys")

    def say(self, words: str) -> None:
        self.drawn.words.append(words)

    def chance(self, of: float) -> bool:
        return bool(self.rng.random() < of)

    def one(self, *of: Any) -> Any:
        return of[int(self.rng.integers(len(of)))]

    def eighths(self, shape: tuple[int, ...], most: int = 8) -> Array:
        return self.rng.integers(-most, most + 1, shape) / 8

    def input(self, name: str, axes: str, array: Array, dtype: DType | str) -> Expr:
        name = f"{name}{len(self.drawn.arrays)}"
        self.drawn.arrays[name] = array
        return self.b.input(name, f"{dtype}[{axes}]")

    # -- the whole ---------------------------------------------------------------------------------------------------

    def run(self) -> DrawnAttention:
        b = self.b
        q = self.input("q", f"B, {HEADS}, S, {SIZE}", self.eighths((ROWS, HEADS, QUERIES, SIZE)), self.dtype)
        k, v = (
            self.input(name, f"B, {HEADS}, {self.t}, {SIZE}", self.eighths((ROWS, HEADS, self.keys, SIZE)), self.dtype)
            for name in "kv"
        )
        x = q @ b.rearrange(k, pattern="b h t d -> b h d t") * 0.5
        if self.chance(0.15):
            self.say("soft-cap")
            x = b.tanh(x / 4.0) * 4.0
        sign = 1.0
        for _ in range(int(self.rng.integers(1, 6))):
            step: Callable[[Expr, float], tuple[Expr, float]] = self.one(
                self.fill, self.fill, self.add_mask, self.add_bias, self.scale, self.widen
            )
            x, sign = step(x, sign)
        if sign < 0:
            self.say("negated")
            x = -x
        p = self.softmax(x)
        if p.dtype is not v.dtype:
            p = p.cast(v.dtype)
        outputs = {"y": p @ v}
        if self.chance(0.15):
            self.say("probabilities")
            outputs["p"] = p
        b.outputs(**outputs)
        return self.drawn

    def softmax(self, x: Expr) -> Expr:
        b = self.b
        kind = self.one("plain", "plain", "zeros for NaN", "guarded", "masked_softmax")
        self.say(kind)
        if kind == "guarded":
            peak = b.reduce_max(x, axes=(-1,), keep=True)
            weights = b.exp(x - b.where(peak > -math.inf, peak, 0.0))
            total = b.reduce_sum(weights, axes=(-1,), keep=True)
            return weights / b.where(total > 0.0, total, 1.0)
        if kind == "masked_softmax":
            return b.masked_softmax(x)
        p = b.softmax(x)
        return b.where(b.not_equal(p, p), 0.0, p) if kind == "zeros for NaN" else p

    # -- steps ---------------------------------------------------------------------------------------------------------

    def fill(self, x: Expr, sign: float) -> tuple[Expr, float]:
        number, (keep, what) = self.number(x), self.condition()
        self.say(f"fill {what} {number:g}")
        fill = self.b.constant(sign * number, x.dtype)
        return (
            self.b.where(self.b.logical_not(keep), fill, x) if self.chance(0.3) else self.b.where(keep, x, fill)
        ), sign

    def add_mask(self, x: Expr, sign: float) -> tuple[Expr, float]:
        b, number, (keep, what) = self.b, self.added_number(x), self.condition()
        zero, low = b.constant(0, x.dtype), b.constant(number, x.dtype)
        kind = self.one("where", "times", "nested", "masked bias", "input")
        if kind == "times" and math.isfinite(number):
            mask = (1.0 - keep.cast(x.dtype)) * number
        elif kind == "nested":
            other, more = self.condition()
            what = f"{what} over {more}"
            mask = b.where(keep, b.where(other, zero, low), b.constant(self.added_number(x), x.dtype))
        elif kind == "masked bias":
            mask = b.where(keep, self.bias(x.dtype), low)
        elif kind == "input" and math.isfinite(number):
            kept = self.rng.random((ROWS, 1, 1, self.keys)) < 0.6
            kept[0] = False
            mask = self.input("mask", f"B, 1, 1, {self.t}", np.where(kept, 0.0, number), x.dtype)
            what = "of its own"
        else:
            mask = b.where(keep, zero, low)
        self.say(f"add {kind} {what} {number:g}")
        return (x + mask if sign > 0 else x - mask), sign

    def add_bias(self, x: Expr, sign: float) -> tuple[Expr, float]:
        self.say("bias")
        return x + self.bias(x.dtype), sign

    def scale(self, x: Expr, sign: float) -> tuple[Expr, float]:
        by = self.one(0.5, 2.0, -1.0, -0.5)
        self.say(f"times {by:g}")
        return x * by, sign * math.copysign(1.0, by)

    def widen(self, x: Expr, sign: float) -> tuple[Expr, float]:
        if x.dtype is not f16:
            return self.fill(x, sign)
        self.say("in f32")
        return x.cast("f32"), sign

    # -- parts of an attention -----------------------------------------------------------------------------------------

    def number(self, x: Expr) -> float:
        least = -x.dtype.greatest
        return float(self.one(*(n for n in (*NUMBERS, least) if x.dtype.holds(n))))

    def added_number(self, x: Expr) -> float:
        """Draw a number to add to scores. Numbers next to which f16 would keep some digits of the scores are
        excluded.
        """
        return float(self.one(-x.dtype.greatest, -math.inf)) if x.dtype is f16 else self.number(x)

    def condition(self) -> tuple[Expr, str]:
        b = self.b
        i, j = b.rearrange(b.iota(size="S"), pattern="s -> s 1"), b.iota(size=self.t)
        kind = self.one("causal", "causal", "rows", "rows", "whole", "padding", "left", "window", "queries", "both")
        if kind in ("causal", "both"):
            keep = j <= i
        elif kind == "window":
            keep = (j > i - 2) & (i > j - 2)
        elif kind in ("padding", "left"):
            lengths = self.input("lengths", "B", np.array([0 if kind == "padding" else 9, 2, 4]), "i64")
            lengths = b.rearrange(lengths, pattern="b -> b 1 1 1")
            keep = j < lengths if kind == "padding" else j >= lengths
        if kind in ("rows", "both"):
            kept = self.rng.random((ROWS, self.keys)) < 0.6
            kept[0], kept[1] = False, np.arange(self.keys) >= 2
            rows = b.rearrange(self.input("rows", f"B, {self.t}", kept, "bool"), pattern="b t -> b 1 1 t")
            keep = rows if kind == "rows" else keep & rows
        elif kind == "queries":
            kept = np.arange(ROWS)[:, None] + np.arange(QUERIES) > 1
            keep = b.rearrange(self.input("queries", "B, S", kept, "bool"), pattern="b s -> b 1 s 1")
        elif kind == "whole":
            kept = self.rng.random((ROWS, HEADS, QUERIES, self.keys)) < 0.5
            kept[0, 0] = False
            keep = self.input("whole", f"B, {HEADS}, S, {self.t}", kept, "bool")
        return keep, kind

    def bias(self, dtype: DType) -> Expr:
        """A bias by head, by distance with a slope for each head, or by row."""
        b, kind = self.b, self.one("heads", "alibi", "rows")
        if kind == "alibi":
            i, j = b.rearrange(b.iota(size="S"), pattern="s -> s 1"), b.iota(size=self.t)
            slopes = b.rearrange(b.constant(np.array([0.5, 0.25]), dtype), pattern="h -> h 1 1")
            return slopes * (j - i).cast(dtype)
        if kind == "heads":
            return b.constant(self.eighths((HEADS, 1, 1)), dtype)
        return self.input("bias", f"B, 1, 1, {self.t}", self.eighths((ROWS, 1, 1, self.keys)), dtype)

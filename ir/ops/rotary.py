"""Rotary position embeddings: pairs of a head's dimensions, rotated by an angle that grows with the position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from treadle.ir.builder import Builder, Expr
from treadle.ir.errors import RuleError
from treadle.ir.op_registry import op
from treadle.ir.operation import Composite, Grads, Operand
from treadle.ir.samples import S
from treadle.ir.types import Type

LAYOUTS = ("half", "interleaved")


@op("rotary", axes="b h s [d], b s, [f] -> b h s [d]", dtypes="f, i, f1 -> f", linear="x")
class Rotary(Composite):
    """y_i = x_i cos a_i - x_j sin a_i,   y_j = x_j cos a_i + x_i sin a_i,   a_i = positions[b, s] frequencies[i]

    RoPE (Su et al. 2021). x [b, h, s, d], positions [b, s], frequencies [f] in radians per position. The first 2f of
    the d dimensions are rotated, in f pairs (i, j); the others are unchanged. Products of rotated queries and keys
    depend only on the difference of their positions. Angles are computed in the frequencies' dtype, which should be f32
    or wider for any dtype of x.

    layout  the dimensions of a pair: "half" (i, i + f), as Hugging Face and GPT-NeoX store heads, or "interleaved"
            (2i, 2i + 1), as the paper, Llama's own code and GGUF do

    With g = dL/dy:   dL/dx is g rotated back,   dL/da_i = sum over h of g_j y_i - g_i y_j
    """

    x = Operand()
    positions = Operand()
    frequencies = Operand()
    layout: str = "half"

    def check(self, types: Sequence[Type | None]) -> None:
        if self.layout not in LAYOUTS:
            raise RuleError(f"unknown layout {self.layout!r}", hint="one of " + ", ".join(LAYOUTS))
        x, _, frequencies = types
        if x is None or frequencies is None or x.rank != 4 or frequencies.rank != 1:
            return  # the axis rule refuses any other rank
        d, f = x.shape[3].constant, frequencies.shape[0].constant
        if d is None or f is None:
            raise RuleError("d and the number of frequencies must be constants")
        if 2 * f > d:
            raise RuleError(f"{f} frequencies rotate {2 * f} dimensions, but x has {d}")

    def reference(self, x: Any, positions: Any, frequencies: Any) -> Any:
        f = frequencies.shape[0]
        angles = positions.astype(frequencies.dtype)[:, None, :, None] * frequencies
        cos, sin = np.cos(angles).astype(x.dtype), np.sin(angles).astype(x.dtype)
        first, second = self._pairs(f)
        y = x.copy()
        y[..., first] = x[..., first] * cos - x[..., second] * sin
        y[..., second] = x[..., second] * cos + x[..., first] * sin
        return y

    def _pairs(self, f: int) -> tuple[slice, slice]:
        """Return two slices: the first dimensions of all pairs, and the second dimensions."""
        if self.layout == "half":
            return slice(0, f), slice(f, 2 * f)
        return slice(0, 2 * f, 2), slice(1, 2 * f, 2)

    def body(self, b: Builder, x: Expr, positions: Expr, frequencies: Expr) -> Expr:
        angles = b.einsum(positions.cast(frequencies.dtype), frequencies, equation="b s, f -> b s f")
        cos, sin = (
            b.rearrange(turned, pattern="b s f -> b 1 s f").cast(x.dtype) for turned in (b.cos(angles), b.sin(angles))
        )
        first, second = self._split(b, x, frequencies)
        turned = [first * cos - second * sin, second * cos + first * sin]
        return self._joined(b, turned, x, frequencies)

    def _split(self, b: Builder, x: Expr, frequencies: Expr) -> tuple[Expr, Expr]:
        """Return the first and the second elements of all pairs, [b, h, s, f] each."""
        first, second = self._pairs(frequencies.shape[0].constant or 0)
        one, other = (b.slice(x, axis=3, start=p.start, stop=p.stop, stride=p.step or 1) for p in (first, second))
        return one, other

    def _joined(self, b: Builder, pairs: Sequence[Expr], x: Expr, frequencies: Expr) -> Expr:
        """Return the pairs in their layout, followed by the dimensions of x that are not rotated."""
        f, d = frequencies.shape[0].constant or 0, x.shape[3].constant or 0
        if self.layout == "half":
            parts = list(pairs)
        else:
            halves = b.concat(*[b.rearrange(part, pattern="b h s f -> b h s f 1") for part in pairs], axis=4)
            parts = [b.rearrange(halves, pattern="b h s f two -> b h s (f two)")]
        if 2 * f < d:
            parts.append(b.slice(x, axis=3, start=2 * f))
        return parts[0] if len(parts) == 1 else b.concat(*parts, axis=3)

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        (g,), (_, positions, frequencies), (y,) = grads, inputs, outputs
        g_x = b.rotary(g, positions, -frequencies, layout=self.layout)
        (g_first, g_second), (first, second) = (self._split(b, v, frequencies) for v in (g, y))
        g_angles = b.reduce_sum(g_second * first - g_first * second, axes=(1,), keep=False).cast(frequencies.dtype)
        g_frequencies = b.einsum(g_angles, positions.cast(frequencies.dtype), equation="b s f, b s -> f")
        return [g_x, None, g_frequencies]

    samples = [
        S("f32[2,3,5,8]", "i64[2,5] < 9", "f32[4]"),
        S("f32[2,3,5,8]", "i64[2,5] < 9", "f32[4]", layout="interleaved"),
        S("f32[2,2,3,7]", "i64[2,3] < 9", "f32[2]"),
        S("f32[1,2,3,6]", "i32[1,3] < 9", "f32[2]", layout="interleaved"),
    ]
    errors = [
        (S("f32[2,3,5,8]", "i64[2,5]", "f32[5]"), "5 frequencies rotate 10 dimensions, but x has 8"),
        (S("f32[2,3,5,8]", "i64[2,5]", "f32[4]", layout="pairs"), "unknown layout 'pairs'"),
        (S("f32[2,3,5,8]", "i64[2,4]", "f32[4]"), "axis s sizes disagree: 5 in x, 4 in positions"),
        (S("f32[2,3,5,8]", "f32[2,5]", "f32[4]"), "positions must be an integer"),
        (S("f32[2,5,8]", "i64[2,5]", "f32[4]"), "x must have rank 4, has rank 3"),
        (S("f32[2,3,5,D]", "i64[2,5]", "f32[4]"), "must be constants"),
    ]

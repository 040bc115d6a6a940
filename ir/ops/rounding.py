"""Rounding: to integers, to steps of a scale, and to float formats that are narrower than the dtype of the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from treadle.ir.builder import Builder, Expr
from treadle.ir.errors import RuleError
from treadle.ir.op_registry import op
from treadle.ir.operation import Composite, Grads, Operand, Primitive
from treadle.ir.ops.axis_names import axis_letters
from treadle.ir.samples import S
from treadle.ir.types import Type


@op("round", axes="... -> ...", dtypes="f -> f")
class Round(Primitive):
    """y = the integer nearest to x, the even one if two integers are equally near; no gradient flows"""

    x = Operand()
    stops_gradient = True

    def reference(self, x: Any) -> Any:
        return np.rint(x)

    samples = [S("f32[2,3]"), S("f32[]")]
    errors = [(S("i64[2]"), "x must be a float, is i64")]


@op("fake_quantize", axes="..., ..., ... -> ...", dtypes="f, f, f -> f")
class FakeQuantize(Composite):
    """y = scale (clip(round(x / scale) + zero, least, greatest) - zero), as QuantizeLinear and DequantizeLinear compute

    The result has one of greatest - least + 1 values, the steps of an integer type: quantization with a given scale and
    zero point, in the dtype of x. No gradient flows.

    scale, zero      the distance of two steps, and the integer that stands for 0
    least, greatest  the range of the integers
    """

    x = Operand()
    scale = Operand()
    zero = Operand()
    least: int = -128
    greatest: int = 127

    def check(self, types: Sequence[Type | None]) -> None:
        if not self.least < self.greatest:
            raise RuleError(f"there are no steps from {self.least} to {self.greatest}")

    def body(self, b: Builder, x: Expr, scale: Expr, zero: Expr) -> Any:
        steps = b.round(x / scale) + zero
        return (b.minimum(b.maximum(steps, float(self.least)), float(self.greatest)) - zero) * scale

    def reference(self, x: Any, scale: Any, zero: Any) -> Any:
        steps = np.rint(x / scale) + zero
        clipped = np.minimum(
            np.maximum(steps, np.asarray(self.least, steps.dtype)), np.asarray(self.greatest, steps.dtype)
        )
        return (clipped - zero) * scale

    samples = [
        S("f32[2,3]", "f32[1] > 0", "f32[1]"),
        S("f32[4,2,3]", "f32[2,1] > 0", "f32[2,1]", least=0, greatest=15),
    ]
    errors = [
        (S("f32[2]", "f32[]", "f32[]", least=3, greatest=3), "there are no steps from 3 to 3"),
        (S("i64[2]", "f32[]", "f32[]"), "x must be a float, is i64"),
    ]


@dataclass(frozen=True)
class FloatFormat:
    """A binary float format as a set of numbers, without the order of its bits.

    fraction   the number of bits after the leading one
    least      the exponent of the least normal number; smaller numbers have the spacing of numbers of that exponent
    largest    the largest finite number
    beyond     the result for a larger number without saturation: inf, nan, or None (always saturates)
    signed     True if the format has numbers below zero
    minus_zero True if the format has both +0 and -0
    """

    fraction: int
    least: int
    largest: float
    beyond: float | None
    signed: bool = True
    minus_zero: bool = True


FORMATS = {
    "bf16": FloatFormat(7, -126, (2 - 2.0**-7) * 2.0**127, np.inf),
    "f8e4m3fn": FloatFormat(3, -6, 448.0, np.nan),
    "f8e4m3fnuz": FloatFormat(3, -7, 240.0, np.nan, minus_zero=False),
    "f8e5m2": FloatFormat(2, -14, 57344.0, np.inf),
    "f8e5m2fnuz": FloatFormat(2, -15, 57344.0, np.nan, minus_zero=False),
    "f4e2m1": FloatFormat(1, 0, 6.0, None),
}
"""Formats by name: bf16; the 8-bit formats of Micikevicius et al. 2022 (fn: finite, no inf) and of Noune et al. 2022
(fnuz: one NaN, one zero); the 4-bit format of the OCP microscaling formats, which has neither inf nor NaN.
"""


@op("round_to", axes="... -> ...", dtypes="f -> f")
class RoundTo(Primitive):
    """y = the number of a narrower float format nearest to x, ties to the even one, in the dtype of x

    format     a name of `FORMATS`
    saturate   numbers above the format's largest, including infinity, become the largest; otherwise they become inf or
               NaN, whichever the format has. A NaN stays NaN; in a format without NaN it becomes 0.

    The op equals a cast to the format and back. The gradient passes unchanged, as through a cast.
    """

    x = Operand()
    format: str
    saturate: bool = False

    def check(self, types: Sequence[Type | None]) -> None:
        if self.format not in FORMATS:
            raise RuleError(f"unknown float format {self.format!r}", hint="one of " + ", ".join(FORMATS))

    def reference(self, x: Any) -> Any:
        known = FORMATS[self.format]
        wide = np.asarray(x, np.float64)
        finite = np.where(np.isfinite(wide), wide, 0)
        _, above = np.frexp(finite)  # |x| is in [2^(above - 1), 2^above)
        spacing = np.maximum(above - 1, known.least) - known.fraction
        y = np.ldexp(np.rint(np.ldexp(finite, -spacing)), spacing)
        past = np.isinf(wide) | (np.abs(y) > known.largest)
        beyond = known.largest if self.saturate or known.beyond is None else known.beyond
        y = np.where(past, np.copysign(beyond, wide), y)
        y = np.where(np.isnan(wide), 0.0 if known.beyond is None else np.nan, y)
        if not known.minus_zero:
            y = y + 0.0
        return y.astype(np.asarray(x).dtype)

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        return grads

    samples = [
        S("f32[2,3]", format="bf16"),
        S("f32[4]", format="f8e4m3fn", saturate=True),
        S("f32[4]", format="f8e4m3fnuz"),
        S("f32[]", format="f8e5m2"),
        S("f32[2,2]", format="f8e5m2fnuz", saturate=True),
        S("f32[5]", format="f4e2m1"),
    ]
    errors = [
        (S("f32[2]", format="f8"), "unknown float format 'f8'"),
        (S("i64[2]", format="bf16"), "x must be a float, is i64"),
    ]


@op("round_scaled", dtypes="f -> f")
class RoundScaled(Composite):
    """y = round_to(x / s, format) s, where s = max of |x| / the format's largest number, for each group

    format  a name of `FORMATS`
    group   the number of neighbors on the last axis that share s; 0: all of the axis

    It is the rounding of an operand of products of narrow floats. A group of zeros remains zeros.
    """

    is_word = False
    x = Operand()
    format: str
    group: int = 0

    def check(self, types: Sequence[Type | None]) -> None:
        (x,) = types
        size = None if x is None else x.shape[-1].constant
        if self.format not in FORMATS:
            raise RuleError(f"unknown float format {self.format!r}", hint="one of " + ", ".join(FORMATS))
        if self.group and (size is None or self.group < 0 or size % self.group):
            raise RuleError(f"groups of {self.group} do not divide the last axis", received=str(x))

    def axis_rule(self, ranks: Sequence[int | None]) -> str:
        *names, last = axis_letters(ranks[0] or 0)
        return " -> ".join([" ".join([*names, f"[{last}]"])] * 2)

    def body(self, b: Builder, x: Expr) -> Any:
        *names, last = axis_letters(x.rank)
        whole, parts = " ".join([*names, f"(g {last}={self.group})"]), " ".join([*names, "g", last])
        y = b.rearrange(x, pattern=f"{whole} -> {parts}") if self.group else x
        scale = b.reduce_max(b.abs(y), axes=(-1,), keep=True) / b.constant(FORMATS[self.format].largest, x.dtype)
        zero = b.equal(scale, b.constant(0.0, x.dtype))
        scale = b.where(zero, b.constant(1.0, x.dtype), scale)
        y = b.round_to(y / scale, format=self.format, saturate=True) * scale
        return b.rearrange(y, pattern=f"{parts} -> {whole}") if self.group else y

    def reference(self, x: Any) -> Any:
        y = x.reshape(*x.shape[:-1], -1, self.group) if self.group else x
        largest = x.dtype.type(FORMATS[self.format].largest)
        scale = np.abs(y).max(axis=-1, keepdims=True) / largest
        scale = np.where(scale == 0, x.dtype.type(1), scale)
        made = RoundTo(format=self.format, saturate=True).reference(y / scale) * scale
        return made.reshape(x.shape)

    samples = [S("f32[2,3,8]", format="f8e4m3fn"), S("f32[2,8]", format="f8e4m3fn", group=4)]
    errors = [
        (S("f32[2]", format="f8"), "unknown float format 'f8'"),
        (S("f32[2,8]", format="f8e4m3fn", group=3), "groups of 3 do not divide the last axis"),
    ]

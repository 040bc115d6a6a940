"""ONNX operators on quantized tensors, in IR ops that are exact if the operator computes on integers.

    QuantizeLinear      saturate(round(x / scale) + zero_point)
    DequantizeLinear    (x - zero_point) * scale
    of com.microsoft: QuantizeLinear and DequantizeLinear, with 4- and 16-bit integers in any opset
    MatMulInteger       (a - a_zero_point) (b - b_zero_point), in 32-bit integers

Products of 8-bit integers are summed in f64, which is exact up to 2^53 and uses the CPU's float units.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from treadle.frontends.onnx_import.operators import MICROSOFT, Made, OnnxSite, operator
from treadle.frontends.onnx_import.quantized_weights import (
    check_steps,
    dequantized_weight,
    is_stored_weight,
    stored_array,
)
from treadle.frontends.onnx_import.rules.casts import converted
from treadle.frontends.onnx_import.rules.elements import Element, named
from treadle.frontends.onnx_import.rules.products import convolution
from treadle.frontends.onnx_import.values import Known, QuantizedSteps
from treadle.frontends.recipes.matrix_products import matmul
from treadle.ir.builder import Builder, Expr
from treadle.ir.sizing.sizes import ONE, Size, product
from treadle.ir.tensors.shapes import reshaped
from treadle.ir.types import f32, f64, i32, i64

# -- scales and zero points ----------------------------------------------------------------------------------------


def spread(site: OnnxSite, x: Expr, like: Sequence[Size], axis: int, block: int) -> Expr:
    """Broadcast scales or zero points to a tensor's sizes: one for the tensor, one per position of an axis, or one per
    block.
    """
    b, rank = site.b, len(like)
    if product(x.shape) == ONE and x.rank <= 1:
        return reshaped(b, x, [])[0]
    axis = site.axis(axis, rank)
    if x.rank == 1 and not block:
        if x.shape[0] != like[axis]:
            site.mismatched(f"{x.shape[0]} scales do not fit an axis of {like[axis]}", x.shape[0], like[axis])
        return reshaped(b, x, [x.shape[0] if i == axis else ONE for i in range(rank)])[0]
    if x.rank != rank or not block:
        site.malformed(f"scales of shape [{', '.join(map(str, x.shape))}] do not fit blocks of {block}")
    times = x.shape[axis]
    apart, _ = reshaped(b, x, [*x.shape[: axis + 1], ONE, *x.shape[axis + 1 :]])
    again = b.expand(apart, shape=(*x.shape[: axis + 1], Size.of(block), *x.shape[axis + 1 :]))
    whole, _ = reshaped(b, again, [*x.shape[:axis], times * block, *x.shape[axis + 1 :]])
    if whole.shape[axis] != like[axis]:
        whole = b.slice(whole, axis=axis, stop=like[axis])
    return whole


def saturated(b: Builder, x: Expr, to: Element) -> Expr:
    """Convert integers that are stored in a float dtype to an integer type. They are clamped to its range."""
    assert to.least is not None
    assert to.greatest is not None
    held = b.minimum(b.maximum(x, float(to.least)), float(to.greatest))
    return held.cast(to.carrier)


@operator("QuantizeLinear", domain=MICROSOFT)
@operator("QuantizeLinear", latest=28, first=10)
def _quantize(site: OnnxSite) -> Made:
    x, scale = site.value(0), site.value(1)
    axis, block = site.int("axis", 1), site.int("block_size", 0)
    saturate, asked, precision = bool(site.int("saturate", 1)), site.int("output_dtype", 0), site.int("precision", 0)
    to = site.element(2) if site.has(2) else site.importer.element(asked or 2)
    if asked and asked != to.number:
        site.malformed("output_dtype differs from the zero point's")
    check_steps(site, 1, 2)
    b, scope, source = site.b, site.b.scope, site.b.source

    def build() -> Expr:
        before = b.scope, b.source
        b.scope, b.source = scope, source
        dividing = site.importer.element(precision).carrier if precision else scale.expr(b).dtype
        ratio = x.expr(b).cast(dividing) / spread(site, scale.expr(b).cast(dividing), x.shape, axis, block)
        made = quantized(site, ratio, to, 2, axis, block, saturate).expr(b)
        b.scope, b.source = before
        return made

    if to.format is not None or x.content is not None:
        return Known(to, expr=build())
    made = Known.later(to, x.shape, build)  # a DequantizeLinear does not read it, but x and its steps
    if not precision:
        made.steps = QuantizedSteps(x, scale, site.value(2) if site.has(2) else None, axis, block)
    return made


def quantized(
    site: OnnxSite, ratio: Expr, to: Element, zero_point: int, axis: int, block: int, saturate: bool
) -> Known:
    """Quantize: round the ratio x / scale, add the zero point in that input, and clamp to the type's range."""
    b = site.b
    zero = site.maybe(zero_point)
    if to.format is not None:
        if zero is not None:
            ratio = ratio + spread(site, zero.cast(ratio.dtype), ratio.shape, axis, block)
        return Known(to, expr=converted(b, ratio, named("FLOAT"), to, saturate=saturate))
    wide = ratio if ratio.dtype in (f32, f64) else ratio.cast(f32)
    steps = b.round(wide)
    if zero is not None:
        steps = steps + spread(site, zero.cast(wide.dtype), wide.shape, axis, block)
    return Known(to, expr=saturated(b, steps, to))


@operator("DequantizeLinear", domain=MICROSOFT, weighs=is_stored_weight)
@operator("DequantizeLinear", latest=28, first=10, weighs=is_stored_weight)
def _dequantize(site: OnnxSite) -> Made:
    b = site.b
    axis, block, asked = site.int("axis", 1), site.int("block_size", 0), site.int("output_dtype", 0)
    held = site.element(0)
    to = site.importer.element(asked) if asked else site.element(1)
    check_steps(site, 1, 2)
    if site.has(2) and site.element(2) != held:
        site.malformed(f"the zero point is {site.element(2)}, the quantized values are {held}")
    if not held.is_int and held.format is None:
        site.malformed(f"{held} is not a quantized type")
    if is_stored_weight(site) and (weight := dequantized_weight(site, axis, block, to)) is not None:
        return weight
    if (rounded := _rounded(site, axis, block, to)) is not None:
        return rounded
    scale, x, zero = site.x(1), site.x(0), site.maybe(2)
    if zero is not None:
        if held.is_int:  # at most 8 bits, so the difference fits
            zero, x = zero.cast(i64 if held.bits == 32 else i32), x.cast(i64 if held.bits == 32 else i32)
        x = x - spread(site, zero, x.shape, axis, block)
    wide = f64 if scale.dtype is f64 else f32
    y = x.cast(wide) * spread(site, scale.cast(wide), x.shape, axis, block)
    return Known(to, expr=converted(b, y, named(wide.name), to) if to.carrier is not wide else y)


def _rounded(site: OnnxSite, axis: int, block: int, to: Element) -> Known | None:
    """Return a value that is quantized and dequantized with the same scale and zero point, as one op. Return None if
    the operand is not the result of such a QuantizeLinear.
    """
    steps, held = site.value(0).steps, site.element(0)
    zero = site.value(2) if site.has(2) else None
    if steps is None or steps.block or block or held.bits > 16 or held.least is None or held.greatest is None:
        return None
    if to.carrier is not f32 or steps.x.type.carrier is not f32 or steps.scale.type.carrier is not f32:
        return None
    if not (_equal(steps.scale, site.value(1)) and _equal(steps.zero, zero)):
        return None
    x = steps.x.expr(site.b)
    scale, points = _as_weight(site, steps.scale), _as_weight(site, steps.zero)
    if scale is None or points is None:
        return None
    if scale.rank and (axis != steps.axis or len(steps.x.shape) == 0):
        return None
    like = x.shape
    made = site.b.fake_quantize(
        x,
        spread(site, scale, like, axis, 0),
        spread(site, points, like, axis, 0) if points.rank else points,
        least=held.least,
        greatest=held.greatest,
    )
    return Known(to, expr=made)


def _equal(a: Known | None, b: Known | None) -> bool:
    """Return True if two operands have equal elements that are known at import, or both are absent."""
    if a is b:
        return True
    arrays = [None if v is None else stored_array(v) for v in (a, b)]
    return all(x is not None for x in arrays) and np.array_equal(*arrays)  # type: ignore[arg-type]


def _as_weight(site: OnnxSite, value: Known | None) -> Expr | None:
    """Return a scale or a zero point as a weight, so that layers that differ only in it share kernels; None if it is
    not known at import. An absent zero point is 0.
    """
    found = np.zeros((), np.float32) if value is None else stored_array(value)
    if found is None:
        return None
    numbers = np.asarray(found, np.float32)
    numbers = numbers.reshape(()) if numbers.size == 1 and numbers.ndim <= 1 else numbers
    key = ("steps", numbers.shape, numbers.tobytes())
    if key not in site.importer.dequantized:
        name = "zero_point" if value is None else value.name or "scale"
        type = f32[numbers.shape] if numbers.shape else f32[()]
        site.importer.dequantized[key] = site.importer.computed_weight(f"{name}_f32", type, lambda: numbers)
    made: Expr = site.importer.dequantized[key]
    return made


@operator("DynamicQuantizeLinear", latest=11, first=11)
def _dynamic_quantize(site: OnnxSite) -> Made:
    """Quantize to u8. Scale and zero point follow from the tensor's own range, extended to contain 0."""
    b, x = site.b, site.x(0)
    y, scale, zero = dynamically_quantized(b, x)
    return [y, scale, zero]


def dynamically_quantized(b: Builder, x: Expr) -> tuple[Expr, Expr, Expr]:
    """Return x as u8, the scale, and the zero point, from the tensor's own range."""
    byte = named("UINT8")
    axes = tuple(range(x.rank))
    low = b.minimum(b.reduce_min(x, axes=axes), 0.0)
    high = b.maximum(b.reduce_max(x, axes=axes), 0.0)
    # If all elements are zero, the range is empty: the scale is 1, as in ONNX Runtime.
    scale = b.where(high > low, (high - low) / 255.0, b.constant(1.0, x.dtype))
    zero = b.round(b.minimum(b.maximum(0.0 - low / scale, 0.0), 255.0))
    return saturated(b, b.round(x / scale) + zero, byte), scale, zero.cast(byte.carrier)


# -- products ------------------------------------------------------------------------------------------------------


def centered(site: OnnxSite, position: int, zero_point: int, axis: int) -> Expr:
    """Return a quantized operand minus its zero point, in f64. If there are several zero points, they run along the
    axis.
    """
    x = site.x(position).cast(f64)
    if not site.has(zero_point):
        return x
    zero = site.x(zero_point).cast(f64)
    if zero.rank == 1 and zero.shape[0] != ONE:
        zero, _ = reshaped(site.b, zero, [zero.shape[0] if i == axis % x.rank else ONE for i in range(x.rank)])
    elif zero.rank <= 1:
        zero, _ = reshaped(site.b, zero, [])
    return x - zero


def in_int32(z: Expr, terms: Size) -> Expr:
    """Return exact sums of `terms` products of bytes as i32. Sums that do not fit lose their upper bits."""
    count = terms.constant
    fits = count is not None and count * 255 * 255 < 2**31
    return z.cast(i32) if fits else z.cast(i64).cast(i32)


@operator("MatMulInteger", latest=10, first=10)
def _matmul_integer(site: OnnxSite) -> Made:
    x, y = centered(site, 0, 2, -2), centered(site, 1, 3, -1)
    return in_int32(matmul(site.b, x, y), x.shape[-1])


@operator("ConvInteger", latest=10, first=10)
def _conv_integer(site: OnnxSite) -> Made:
    x, weight = centered(site, 0, 2, 1), centered(site, 1, 3, 0)
    return in_int32(convolution(site, x, weight, None), product(weight.shape[1:]))


@operator("QLinearMatMul", latest=21, first=10)
def _quantized_matmul(site: OnnxSite) -> Made:
    """Product of quantized operands. Inputs: a, its scale and zero point, b, its scale and zero point, and the result's
    scale and zero point.
    """
    if any(len(site.shape(i)) > 1 for i in (1, 2, 4, 5, 6, 7)):
        site.refuse("scales of more than one axis are not supported")
    z = matmul(site.b, centered(site, 0, 2, -2), centered(site, 3, 5, -1))
    scale = [site.x(i).cast(f64) for i in (1, 4, 6)]
    along = [
        reshaped(site.b, s, [] if product(s.shape) == ONE else [*s.shape, ONE] if k == 0 else s.shape)[0]
        for k, s in enumerate(scale)
    ]
    ratio = z * along[0] * along[1] / along[2]
    return quantized(site, ratio, site.element(7), 7, -1, 0, True)

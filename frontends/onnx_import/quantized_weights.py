"""Quantized constants of ONNX files: DequantizeLinear of a constant becomes a weight in blocks, or a plain weight.

    w[n, k] = scale[n, g] (q[n, k] - zero[n, g])        g: the group of k

A matrix of integers of at most 8 bits stays quantized, with its integers and scales, as blocks of an encoding
(`treadle.ir.encodings`). The blocks are along the axis that products sum: the axis without the scales of channels, or
the axis of `block_size`; for one scale of the whole matrix, the axis that its reader sums. Other constants, such as
biases and convolution kernels, are decoded when the file is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from treadle.files.shown_names import printable
from treadle.frontends.mapped_tensors import TensorRecord
from treadle.frontends.onnx_import.operators import OnnxSite
from treadle.frontends.onnx_import.rules.elements import Element
from treadle.frontends.onnx_import.values import IN_PLACE, Array, Known
from treadle.frontends.quantized.quantized_weights import GroupedIntegers
from treadle.ir.builder import Expr
from treadle.ir.ops.blocks import Decode
from treadle.ir.types import f32

_LARGEST = float(np.finfo(np.float32).max)


def stored_array(value: Known) -> Array | None:
    """Return the elements of a tensor of the file, or of a value that is known at import; None for other values."""
    if value.stored is not None:
        return value.stored.array()
    return None if value.content is None or value.is_symbolic else value.content


def is_stored_weight(site: OnnxSite) -> bool:
    """Return True if a DequantizeLinear reads a tensor of the file that is large enough to be a weight."""
    value = site.value(0)
    return value.type.is_int and value.stored is not None and value.stored.count > IN_PLACE


@dataclass(frozen=True)
class _Steps:
    """The scales and zero points of a constant. Their shape is (), [channels of `axis`], or one per block of `axis`.

    block  the length of a block; 0: one scale per tensor or channel
    """

    scale: Array
    zero: Array
    axis: int
    block: int

    def spread(self, steps: Array, shape: Sequence[int]) -> Array:
        """Return an array that broadcasts to a tensor's shape."""
        if self.block:
            return np.repeat(steps, self.block, axis=self.axis).take(np.arange(shape[self.axis]), axis=self.axis)
        if steps.ndim == 0:
            return steps
        return steps.reshape([-1 if i == self.axis else 1 for i in range(len(shape))])

    def of_lines(self, steps: Array, line: int, shape: Sequence[int]) -> Array:
        """Return one number per group of each line of a matrix along an axis: [lines, groups]."""
        if self.block:
            return np.moveaxis(steps, line, -1)
        return np.broadcast_to(steps.reshape(-1, 1), (shape[1 - line], 1))


def dequantized_weight(site: OnnxSite, axis: int, block: int, to: Element) -> Known | None:
    """Return a dequantized constant as a weight. Return None if its scale or zero point is not known at import."""
    stored = site.value(0).stored
    assert stored is not None
    scale, zero = (stored_array(site.value(i)) if site.has(i) else None for i in (1, 2))
    if scale is None or (site.has(2) and zero is None):
        return None
    steps = _steps(site, scale, zero, axis, block)
    line = _line(site, steps)
    key = (stored.name, *(site.value(i).name for i in (1, 2) if site.has(i)), steps.axis, block, line, to.name)
    found = site.importer.dequantized.get(key)
    if found is None:
        found = site.importer.dequantized[key] = _weight(site, steps, line, to)
    return found


def _steps(site: OnnxSite, scale: Array, zero: Array | None, axis: int, block: int) -> _Steps:
    """Return checked scales and zero points. Raises FrontendError if they contradict the constant's shape, and for
    scales that make numbers infinite.
    """
    stored = site.value(0).stored
    assert stored is not None
    rank = len(stored.shape)
    wide = scale.astype(np.float32)
    largest = float(np.abs(wide).max(initial=0))
    if largest * 2.0 ** min(site.value(0).type.bits, 32) > _LARGEST:
        site.malformed(f"the scale {printable(site.node.input[1])} has the number {largest:g}: weights may be infinite")
    points = np.zeros(scale.shape, np.int64) if zero is None else zero.astype(np.int64)
    if not block and wide.size == 1 and wide.ndim <= 1:
        return _Steps(wide.reshape(()), points.reshape(()), 0, 0)
    axis = site.axis(axis, rank)
    expected = (
        [-(-n // block) if i == axis else n for i, n in enumerate(stored.shape)] if block else [stored.shape[axis]]
    )
    if list(wide.shape) != expected:
        found = ", ".join(map(str, wide.shape))
        what = f"blocks of {block} along axis {axis}" if block else f"the {stored.shape[axis]} channels of axis {axis}"
        site.malformed(f"scales of shape [{found}] do not fit {what} of {printable(stored.name)}")
    return _Steps(wide, points, axis, block)


def _line(site: OnnxSite, steps: _Steps) -> int | None:
    """Return the axis of a matrix along which blocks are stored; None for a constant that is decoded."""
    value = site.value(0)
    if value.rank != 2 or value.type.bits > 8:
        return None
    if steps.block:
        return steps.axis
    return 1 - steps.axis if steps.scale.ndim else site.importer.summed_axis(site.node.output[0])


def _weight(site: OnnxSite, steps: _Steps, line: int | None, to: Element) -> Known:
    stored = site.value(0).stored
    assert stored is not None
    integers = None if line is None else _integers(site, steps, line)
    form = None if integers is None else integers.form
    if form is None or integers is None or line is None:
        if line is not None:
            reason = "blocks are not whole" if integers is None else integers.why_decoded
            site.importer.notes.decoded.append(f"{printable(stored.name)} is decoded when read: {reason}")
        wide = stored.array().astype(np.int64) - steps.spread(steps.zero, stored.shape)
        numbers = wide.astype(np.float32) * steps.spread(steps.scale, stored.shape)
        return site.importer.computed_tensor(_weight_name(stored.name), numbers, to)
    type = f32[stored.shape].as_encoded(form.along(0 if line == 0 else -1))

    def blocks() -> Array:
        return np.moveaxis(integers.blocks(), -1, line)

    weight = site.importer.computed_weight(_weight_name(stored.name), type, blocks)
    decoded: Expr = site.b.apply(Decode, weight, of=type.encoding)
    return Known(to, expr=decoded if to.carrier is f32 else decoded.cast(to.carrier))


def _weight_name(stored: str) -> str:
    """Return the name of a weight, from the name of its integers: quantizers append `_quantized`."""
    name = stored.removesuffix("_quantized")
    return name if name and name != stored else f"{stored}_dequantized"


def _integers(site: OnnxSite, steps: _Steps, line: int) -> GroupedIntegers | None:
    """Return a matrix as integers in groups along an axis, or None if a group is shorter than the others."""
    value, stored = site.value(0), site.value(0).stored
    assert stored is not None
    least = value.type.least or 0
    size = stored.shape[line]
    if steps.block and size % steps.block:
        return None
    scales, zeros = (steps.of_lines(each, line, stored.shape) for each in (steps.scale, steps.zero))
    bits, half = value.type.bits, 1 << (value.type.bits - 1)
    zeros = zeros - least
    moved = 0
    if bits == 8 and not (zeros == half).all():  # blocks without a zero point, if the differences fit
        q = np.moveaxis(stored.array(), line, -1)
        if (zeros == zeros.flat[0]).all():
            moved = half - int(zeros.flat[0])
            if int(q.min()) - least + moved < 0 or int(q.max()) - least + moved > 255:
                moved = 0

    def codes(rows: slice) -> Array:
        lines = np.moveaxis(stored.array(), line, -1)[rows]
        made: Array = (lines.astype(np.int16) + (moved - least)).astype(np.uint8)
        return np.ascontiguousarray(made)

    first = TensorRecord(stored.name, "i8", stored.shape, 0, stored.count)
    return GroupedIntegers(
        first,
        f"{value.type} with scales",
        (stored.shape[1 - line], size),
        bits,
        steps.block or size,
        codes,
        lambda: (np.ascontiguousarray(scales), np.ascontiguousarray(zeros + moved)),
    )


def check_steps(site: OnnxSite, scale: int, zero: int) -> None:
    """Check the scale and the zero point of a node, in these inputs, as far as they are known at import.

    Raises FrontendError for a scale that is NaN, infinite or zero, and for a scale or zero point of another dtype or
    shape than the operator allows.
    """
    value = site.value(scale)
    name = printable(site.node.input[scale])
    if not value.type.is_float:
        site.malformed(f"the scale {name} is {value.type}, not a float")
    found = stored_array(value)
    if found is not None and not (np.isfinite(found) & (found != 0)).all():
        bad: Any = np.ravel(found)[~np.ravel(np.isfinite(found) & (found != 0))][0]
        site.malformed(f"the scale {name} has the number {float(bad):g}, but scales are finite and not zero")
    if site.has(zero):
        other = site.value(zero)
        single = all(v.rank <= 1 and all(n.constant == 1 for n in v.shape) for v in (value, other))
        if not single and other.shape != value.shape:
            shapes = " and ".join(f"[{', '.join(map(str, v.shape))}]" for v in (value, other))
            site.malformed(
                f"the scale {name} and the zero point {printable(site.node.input[zero])} have the shapes {shapes}"
            )

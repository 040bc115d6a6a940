"""ATen operators over windows: pooling, unfold, im2col, and the views of as_strided."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cmp_to_key

import numpy as np

from treadle.frontends.torch_export.operators import Made, TorchSite, operator
from treadle.frontends.torch_export.shapes import expanded
from treadle.ir.builder import Expr
from treadle.ir.ops.axis_names import axis_letters
from treadle.ir.ops.pooling import padding_for_ceil
from treadle.ir.sizing.sizes import ONE, ZERO, Size, product
from treadle.ir.tensors.shapes import permuted, reshaped

# -- pooling -------------------------------------------------------------------------------------------------------


def _each(site: TorchSite, name: str, count: int, default: Sequence[int]) -> tuple[int, ...]:
    numbers = site.integers(name) or tuple(default)
    return numbers * count if len(numbers) == 1 else numbers


def _windowing(
    site: TorchSite, count: int
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return kernel, strides, dilations and padding of a pool over the last axes."""
    kernel = _each(site, "kernel_size", count, ())
    strides = _each(site, "stride", count, kernel)
    return kernel, strides, _each(site, "dilation", count, (1,)), _each(site, "padding", count, (0,))


def _after(
    site: TorchSite, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int], pads: Sequence[int]
) -> tuple[int, ...]:
    """Return the padding after each axis, including the padding that a last, partial window needs."""
    if not site.flag("ceil_mode"):
        return tuple(pads)
    return tuple(padding_for_ceil(*along) for along in zip(kernel, strides, dilations, pads, strict=True))


def _max_pool(count: int, *names: str) -> None:
    @operator(*names)
    def _pooled(site: TorchSite) -> Made:
        """Build max pooling. Padding does not count as an element of a window."""
        x = site.x("self")
        kernel, strides, dilations, pads = _windowing(site, count)
        after = _after(site, kernel, strides, dilations, pads)
        y = site.b.max_pool(x, kernel=kernel, strides=strides, dilations=dilations, padding=(*pads, *after))
        return [y, None] if len(site.vals) > 1 else y


_max_pool(1, "max_pool1d.default", "max_pool1d_with_indices.default")
_max_pool(2, "max_pool2d.default", "max_pool2d_with_indices.default")


def _average_pool(count: int, name: str) -> None:
    @operator(name)
    def _pooled(site: TorchSite) -> Made:
        """Build average pooling. Zeros around x count as elements unless `count_include_pad` is false. The padding of a
        last, partial window never counts.
        """
        b, x = site.b, site.x("self")
        kernel, strides, _, pads = _windowing(site, count)
        before, after = pads, _after(site, kernel, strides, (1,) * count, pads)
        divisor = site.given("divisor_override")
        if site.flag("count_include_pad") or divisor is not None:
            for axis, pad in enumerate(pads, start=x.rank - count):
                if pad:
                    x = b.pad(x, axis=axis, before=pad, after=pad)
            before, after = (0,) * count, tuple(n - p for n, p in zip(after, pads, strict=True))
        if divisor is None:
            return b.average_pool(x, kernel=kernel, strides=strides, padding=(*before, *after))
        sums = b.sum_pool(x, kernel=kernel, strides=strides, padding=(*before, *after))
        return sums / float(site.integer("divisor_override"))


_average_pool(1, "avg_pool1d.default")
_average_pool(2, "avg_pool2d.default")


def _adaptive(count: int, *names: str) -> None:
    @operator(*names)
    def _pooled(site: TorchSite) -> Made:
        """Compute the requested number of means. Equal parts are means; unequal parts are a product with the weight of
        each element.
        """
        b, x = site.b, site.x("self")
        for axis, wanted in enumerate(site.shape()[x.rank - count :], start=x.rank - count):
            size = x.shape[axis]
            part = size.divide(wanted)
            if part is not None:
                apart, _ = reshaped(b, x, [*x.shape[:axis], wanted, part, *x.shape[axis + 1 :]])
                x = x if part == ONE else b.reduce_mean(apart, axes=(axis + 1,))
            elif size.constant is not None and wanted.constant is not None:
                x = _meant(site, x, axis, size.constant, wanted.constant)
            else:
                site.refuse(
                    f"{size} elements cannot be split into {wanted} parts",
                    "a size of 1, or an axis that is not symbolic",
                )
        return x


_adaptive(1, "adaptive_avg_pool1d.default")
_adaptive(2, "adaptive_avg_pool2d.default", "_adaptive_avg_pool2d.default")


def _meant(site: TorchSite, x: Expr, axis: int, size: int, count: int) -> Expr:
    """Return the means of `count` parts of an axis; the parts overlap if `count` does not divide the size."""
    weights = np.zeros((count, size))
    for i in range(count):
        first, last = i * size // count, -(-(i + 1) * size // count)
        weights[i, first:last] = 1 / (last - first)
    *names, new = axis_letters(x.rank + 1)
    result = [new if i == axis else n for i, n in enumerate(names)]
    equation = f"{' '.join(names)}, {new} {names[axis]} -> {' '.join(result)}"
    return site.b.einsum(x, site.b.constant(weights, x.dtype), equation=equation)


# -- windows as tensors --------------------------------------------------------------------------------------------


@operator("unfold.default")
def _unfold(site: TorchSite) -> Made:
    """Return the windows of an axis, with the elements of each window along a new last axis."""
    x, size, step = site.x("self"), site.size("size"), site.integer("step")
    if x.rank == 0:
        site.refuse("a scalar is not supported", "x.reshape(1)")
    return site.b.windows(x, axis=site.axis("dimension"), size=size, stride=step)


@operator("im2col.default")
def _columns(site: TorchSite) -> Made:
    """F.unfold: [b, c, n, m] -> [b, (c k l), (n m)], each window of k x l as a column."""
    b, x = site.b, site.x("self")
    kernel, dilations, pads, strides = (_each(site, n, 2, ()) for n in ("kernel_size", "dilation", "padding", "stride"))
    for i in range(2):
        axis = x.rank - 2 + i
        if pads[i]:
            x = b.pad(x, axis=axis, before=pads[i], after=pads[i])
    for i in range(2):
        # The elements of an axis's windows become the last axis. So the next axis to split is one position further from
        # the end.
        x = b.windows(x, axis=x.rank - 2, size=kernel[i], stride=strides[i], dilation=dilations[i])
    return b.rearrange(x, pattern="... c n m k l -> ... (c k l) (n m)")


# -- views by strides ----------------------------------------------------------------------------------------------


@operator("as_strided.default")
def _as_strided(site: TorchSite) -> Made:
    """Return the elements offset + i s0 + j s1 + ... of a contiguous tensor, by reshapes and windows."""
    b, x, shape = site.b, site.x("self"), site.shape()
    val = site.node.args[0].meta["val"]
    if not val.is_contiguous() or site.importer.symbols.size(val.storage_offset()) != ZERO:
        site.refuse("a tensor that is itself a view is not supported", "use slices, unfold, reshape and permute of it")
    strides, offset = [Size.of(n) for n in site.given("stride")], site.size("storage_offset", 0)
    if any(n == ZERO for n in shape):
        return expanded(b, b.constant(0, x.dtype), shape)
    steps = {i: s.constant for i, s in enumerate(strides)}
    moving = [i for i, n in enumerate(shape) if n != ONE and steps[i] != 0]
    flat, _ = reshaped(b, x, [product(x.shape)])
    reach = sum(((shape[i] - 1) * strides[i] for i in moving), start=ONE)
    order = _outermost_first(site, moving, strides)
    for place, i in enumerate(order):
        axis = flat.rank - 1
        inner = sum(((shape[k] - 1) * strides[k] for k in order[place + 1 :]), start=ONE)
        whole = flat.shape[axis]
        if place == 0 and (offset != ZERO or whole != shape[i] * strides[i]):
            flat = b.slice(flat, axis=axis, start=offset, stop=offset + reach)
            whole = reach
        if whole == shape[i] * strides[i]:
            flat, _ = reshaped(b, flat, [*flat.shape[:axis], shape[i], strides[i]])
            continue
        step = steps[i]
        if step is None:
            site.refuse(
                f"a stride of {strides[i]} over {whole} elements is not supported",
                "slices, unfold, reshape and permute",
            )
        if whole != (shape[i] - 1) * step + inner:
            flat = b.slice(flat, axis=axis, stop=(shape[i] - 1) * step + inner)
        flat = b.windows(flat, axis=axis, size=inner, stride=step)
    if flat.shape[-1] != ONE:
        first = ZERO if order else offset
        flat = b.slice(flat, axis=flat.rank - 1, start=first, stop=first + 1)
    made, _ = reshaped(b, flat, [shape[i] for i in order])
    made = permuted(b, made, [order.index(i) for i in moving])
    made, _ = reshaped(b, made, [n if i in moving else ONE for i, n in enumerate(shape)])
    return expanded(b, made, shape)


def _outermost_first(site: TorchSite, axes: Sequence[int], strides: Sequence[Size]) -> list[int]:
    def compare(i: int, k: int) -> int:
        if strides[i] == strides[k]:
            return i - k
        for first, second, sign in ((i, k, -1), (k, i, 1)):
            if site.is_at_least(strides[first], strides[second]):
                return sign
        site.refuse(f"it is unknown which stride is larger, {strides[i]} or {strides[k]}")

    return sorted(axes, key=cmp_to_key(compare))

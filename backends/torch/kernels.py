"""PyTorch kernels that emitted source calls, if one expression does not suffice."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from treadle.backends.torch.attention_kernels import (  # noqa: F401  emitted source
    alibi,
    attention,
    attention_in_blocks,
    attention_with_probabilities,
    cached_attention,
    causal,
    laid_out,
    padding,
    segments,
    t5_relative,
    window,
)
from treadle.backends.torch.encoded_rows import (  # noqa: F401  emitted source
    decode_groups,
    decode_int4_groups,
    decode_int8_rows,
    decode_uint8_rows,
    encode_groups,
    encode_int8_rows,
    encode_uint8_rows,
    encoded_linear,
    group_linear,
)
from treadle.backends.torch.indexed_kernels import (  # noqa: F401  emitted source
    append,
    embedding,
    in_sum_dtype,
    index_add,
    scatter_add,
    take,
    take_along_axis,
)
from treadle.ir.ops.rounding import FORMATS

# -- element by element --------------------------------------------------------------------------------------


def round_to(x: Tensor, format: str, *, saturate: bool) -> Tensor:
    """Round to the nearest numbers of a narrower float format. The result has the dtype of x; see
    `treadle.ir.ops.rounding`.
    """
    known = FORMATS[format]
    wide = x.double()
    finite = torch.where(wide.isfinite(), wide, 0.0)
    spacing = (torch.frexp(finite).exponent - 1).clamp(min=known.least) - known.fraction
    y = torch.ldexp(torch.round(torch.ldexp(finite, -spacing)), spacing)
    beyond = known.largest if saturate or known.beyond is None else known.beyond
    y = torch.where(wide.isinf() | (y.abs() > known.largest), torch.full_like(wide, beyond).copysign(wide), y)
    y = torch.where(wide.isnan(), 0.0 if known.beyond is None else math.nan, y)
    return (y if known.minus_zero else y + 0.0).to(x.dtype)


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x)"""
    return x * torch.sigmoid(1.702 * x)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none", algorithm: str = "") -> Tensor:
    """Multiply x by the transpose of a weight that `treadle.backends.torch.packing` packed, with oneDNN's fused
    activation.
    """
    row = None if bias is None else bias.contiguous()  # oneDNN ignores the bias's strides
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, row, activation, [], algorithm)
    return y


# -- along an axis -------------------------------------------------------------------------------------------


def cumsum(x: Tensor, axis: int, *, exclusive: bool, reverse: bool) -> Tensor:
    """Return running sums: of the elements up to each one, or from each one on if `reverse`. If `exclusive`, the
    element itself is not included.
    """
    terms = x.flip(axis) if reverse else x
    sums = torch.cumsum(terms, axis, dtype=x.dtype)
    if exclusive:
        sums = torch.cat((torch.zeros_like(sums.narrow(axis, 0, 1)), sums.narrow(axis, 0, x.shape[axis] - 1)), axis)
    return sums.flip(axis) if reverse else sums


def top_k(x: Tensor, k: int, axis: int) -> tuple[Tensor, Tensor]:
    """Return the k greatest elements, greatest first, and their positions. Among equal elements, the first position
    comes first.

    torch.topk may choose any of several equal elements, so all elements are sorted.
    """
    values, indices = torch.sort(x, dim=axis, descending=True, stable=True)
    return values.narrow(axis, 0, k), indices.narrow(axis, 0, k)


def fold_windows(x: Tensor, axis: int, size: int, stride: int, dilation: int) -> Tensor:
    """Return the sum of windows, each added at its original positions. The elements of a window are along the last
    axis.
    """
    axis %= x.dim() - 1
    shape = [*x.shape[:-1]]
    shape[axis] = size
    summed = in_sum_dtype(x)
    y = summed.new_zeros(shape)
    moved, reach = y.movedim(axis, 0), (x.shape[axis] - 1) * stride + 1
    for k in range(x.shape[-1]):
        first = k * dilation
        moved[first : first + reach : stride] += summed[..., k].movedim(axis, 0)
    return y.to(x.dtype)


# -- rotary positions ----------------------------------------------------------------------------------------


def rotary(x: Tensor, positions: Tensor, frequencies: Tensor, layout: str) -> Tensor:
    """Rotate pairs of dimensions of x [b, h, s, d] by positions [b, s] times frequencies [f]. Dimensions after the
    rotated ones are unchanged.
    """
    angles = (positions[:, None, :, None] * frequencies).to(frequencies.dtype)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    turned, rest = x.tensor_split((2 * frequencies.shape[0],), dim=-1)
    first, second = turned.chunk(2, dim=-1) if layout == "half" else (turned[..., ::2], turned[..., 1::2])
    pairs = (first * cos - second * sin, second * cos + first * sin)
    turned = torch.cat(pairs, -1) if layout == "half" else torch.stack(pairs, -1).flatten(-2)
    return torch.cat((turned, rest), -1) if rest.shape[-1] else turned

"""Quantization to 8 bits in PyTorch, in rows or groups: encode, decode and multiply. Results are bitwise identical to
`treadle.ir.encodings.rounded_forms`.

A row or a group is stored as bytes: a float32 scale, a zero point (only in `uint8_rows`), then the numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from treadle.ir.encodings.rounded_forms import SMALLEST_ROW, SMALLEST_STEP

_SCALE = 4
"""Number of bytes of a row's scale."""


def encode_int8_rows(x: Tensor) -> Tensor:
    """Encode f32[..., k] as u8[..., 4 + k]. If a row contains NaN or infinity, its scale is NaN."""
    largest = x.abs().amax(dim=-1, keepdim=True)
    finite = largest.isfinite()
    used = finite & (largest >= float(SMALLEST_ROW))
    scale = torch.where(used, largest / 127, torch.where(finite, 0.0, torch.nan))
    factor = 127 / torch.where(used, largest, 1.0)
    q = torch.round(torch.where(used, x, 0.0) * factor).to(torch.int8)
    return torch.cat((scale.view(torch.uint8), q.view(torch.uint8)), dim=-1)


def encode_groups(x: Tensor, group: int) -> Tensor:
    """Encode f32[..., k] as u8[..., k / group * (group + 4)], as rows of `group` elements."""
    return encode_int8_rows(x.reshape(*x.shape[:-1], x.shape[-1] // group, group)).flatten(-2)


def decode_groups(held: Tensor, group: int) -> Tensor:
    """Decode groups to f32[..., k]."""
    bytes = group + _SCALE
    return decode_int8_rows(held.reshape(*held.shape[:-1], held.shape[-1] // bytes, bytes)).flatten(-2)


def encode_uint8_rows(x: Tensor, static: Tensor | None = None, zero_point: Tensor | None = None) -> Tensor:
    """Encode f32[..., k] as u8[..., 5 + k]. If a row contains NaN or infinity, its scale is NaN.

    static, zero_point  the scale and the zero point of all rows; infinity is then the largest step
    """
    if static is not None and zero_point is not None:
        lost = x.isnan().any(dim=-1, keepdim=True)
        scale = torch.where(lost, torch.nan, static)
        steps = (torch.round(x / static) + zero_point).nan_to_num(0.0).clamp(0, 255)
        zero = zero_point.to(torch.uint8).expand(scale.shape)
        return torch.cat((scale.view(torch.uint8), zero, steps.to(torch.uint8)), dim=-1)
    least, largest = x.amin(dim=-1, keepdim=True).clamp(max=0), x.amax(dim=-1, keepdim=True).clamp(min=0)
    finite = least.isfinite() & largest.isfinite()
    step = largest / 255 - least / 255
    used = finite & (step >= float(SMALLEST_STEP))
    factor = torch.where(used, 1 / torch.where(used, step, 1.0), 0.0)
    zero = torch.round(-torch.where(used, least, 0.0) * factor)
    scale = torch.where(used, step, torch.where(finite, 0.0, torch.nan))
    steps = torch.round(torch.where(used, x, 0.0) * factor) + zero
    return torch.cat((scale.view(torch.uint8), zero.to(torch.uint8), steps.clamp(max=255).to(torch.uint8)), dim=-1)


def decode_int4_groups(x: Tensor, group: int) -> Tensor:
    """Decode groups of 4 bits to f32[..., k]. A group is a float16 scale, then bytes: byte i holds elements i and i +
    group / 2, the first in its low half.
    """
    bytes = group // 2 + 2
    groups = x.reshape(*x.shape[:-1], x.shape[-1] // bytes, bytes)
    scale = groups[..., :2].clone(memory_format=torch.contiguous_format).view(torch.float16).float()
    packed = groups[..., 2:]
    q = torch.cat((packed & 15, packed >> 4), dim=-1).float() - 8
    return (scale * q).flatten(-2)


def decode_int8_rows(held: Tensor) -> Tensor:
    """Decode rows to f32[..., k]."""
    return held[..., _SCALE:].view(torch.int8).float() * _scale(held)


def decode_uint8_rows(held: Tensor) -> Tensor:
    """Decode rows to f32[..., k]."""
    return (held[..., _SCALE + 1 :].float() - held[..., _SCALE : _SCALE + 1].float()) * _scale(held)


def encoded_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply quantized rows by the rows of a quantized weight, with exact integer sums; see the op.

    PyTorch multiplies only signed bytes, so 128 is subtracted from unsigned numbers and from their zero points.
    """
    p, t = weight[..., _SCALE:].view(torch.int8), _scale(weight)[:, 0]
    signed = x.shape[-1] == weight.shape[-1]
    q = x[..., _SCALE if signed else _SCALE + 1 :]
    rows = (q if signed else q ^ 128).reshape(-1, q.shape[-1]).view(torch.int8)
    if rows.numel() and p.numel() and x.device.type == "cpu" and torch.cpu._is_vnni_supported():
        sums = torch._int_mm(rows.contiguous(), p.t())  # without VNNI it may saturate
    else:
        sums = rows.double() @ p.double().t()
    if not signed:
        zeros = x[..., _SCALE].reshape(-1, 1).to(torch.int32) - 128
        sums = sums - zeros * p.sum(dim=-1, dtype=torch.int32)
    y = sums.float().reshape(*q.shape[:-1], len(p)) * (_scale(x) * t)
    return y if bias is None else y + bias


def _scale(held: Tensor) -> Tensor:
    """Return the scales of rows, f32[..., 1].

    The result is always a copy: PyTorch views bytes as floats only if all strides and the offset are multiples of 4,
    and `contiguous` does not copy a single row.
    """
    return held[..., :_SCALE].clone(memory_format=torch.contiguous_format).view(torch.float32)

"""8-bit numbers in PyTorch, in rows or groups: made, read, and multiplied, to the bits of
`treadle.ir.encodings.rounded_forms`.

A row, or a group, is held in bytes: a float32 scale, then the numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from treadle.ir.encodings.rounded_forms import SMALLEST_ROW

_SCALE = 4
"""Bytes of a row's scale."""


def encode_rows(x: Tensor) -> Tensor:
    """u8[..., k + 4] of f32[..., k]. A row that holds a number that is not finite has the scale NaN."""
    largest = x.abs().amax(dim=-1, keepdim=True)
    finite = largest.isfinite()
    used = finite & (largest >= float(SMALLEST_ROW))
    scale = torch.where(used, largest / 127, torch.where(finite, 0.0, torch.nan))
    factor = 127 / torch.where(used, largest, 1.0)
    q = torch.round(torch.where(used, x, 0.0) * factor).to(torch.int8)
    return torch.cat((scale.view(torch.uint8), q.view(torch.uint8)), dim=-1)


def encode_groups(x: Tensor, group: int) -> Tensor:
    """u8[..., k / group * (group + 4)] of f32[..., k], as rows of so many."""
    return encode_rows(x.reshape(*x.shape[:-1], -1, group)).flatten(-2)


def decode_groups(held: Tensor, group: int) -> Tensor:
    """The f32[..., k] that groups mean."""
    return decode_rows(held.reshape(*held.shape[:-1], -1, group + _SCALE)).flatten(-2)


def decode_rows(held: Tensor) -> Tensor:
    """The f32[..., k] that rows mean."""
    q, scale = _parts(held)
    return q.float() * scale


def encoded_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Products of rows with rows, summed exactly; see the op."""
    (q, s), (p, t) = _parts(x), _parts(weight)
    rows = q.reshape(-1, q.shape[-1])
    if rows.numel() and p.numel() and x.device.type == "cpu" and torch.cpu._is_vnni_supported():
        sums = torch._int_mm(rows.contiguous(), p.t())  # without VNNI it may saturate
    else:
        sums = rows.double() @ p.double().t()
    y = sums.float().reshape(*q.shape[:-1], -1) * (s * t[:, 0])
    return y if bias is None else y + bias


def _parts(held: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers of rows, i8[..., k], and their scales, f32[..., 1]."""
    scale = held[..., :_SCALE].contiguous().view(torch.float32)
    return held[..., _SCALE:].view(torch.int8), scale

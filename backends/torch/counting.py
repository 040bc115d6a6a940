"""Tensors that depend on sizes alone, cached for each device."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from treadle.ir.attention.attention_terms import T5Relative


@lru_cache(maxsize=64)
def counted(count: int, device: torch.device) -> Tensor:
    """Return 0, 1, ... count - 1. The caller must not change the result."""
    return torch.arange(count, device=device)


@lru_cache(maxsize=64)
def t5_buckets(buckets: int, max_distance: int, bidirectional: bool, device: torch.device) -> Tensor:
    """Return the bucket of each offset from -max_distance to max_distance; see `T5Relative.bucket_by_offset`."""
    return torch.from_numpy(T5Relative(buckets, max_distance, bidirectional).bucket_by_offset).to(device)

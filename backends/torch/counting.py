"""Values that depend on sizes and attributes alone, computed once: tensors on a device, and terms of attention.

They are plain dictionaries, not `lru_cache`: Dynamo reads a dictionary's value as a constant of the captured graph, but
ignores such a cache and traces the function. So a program is captured after one call has filled them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from treadle.ir.attention.attention_terms import T5Relative, Term
from treadle.ir.attention.term_text import parse_term

_LARGEST = 256  # number of values, after which a dictionary is cleared

_COUNTED: dict[tuple[int, str], Tensor] = {}
_BUCKETS: dict[tuple[int, int, bool, str], Tensor] = {}
_TERMS: dict[tuple[str, ...], tuple[Term, ...]] = {}


def counted(count: int, device: torch.device) -> Tensor:
    """Return 0, 1, ... count - 1. The caller must not change the result."""
    key = (count, str(device))
    found = _COUNTED.get(key)
    if found is None:
        if len(_COUNTED) >= _LARGEST:
            _COUNTED.clear()
        found = _COUNTED[key] = torch.arange(count, device=device)
    return found


def t5_buckets(buckets: int, max_distance: int, bidirectional: bool, device: torch.device) -> Tensor:
    """Return the bucket of each offset from -max_distance to max_distance; see `T5Relative.bucket_by_offset`."""
    key = (buckets, max_distance, bidirectional, str(device))
    found = _BUCKETS.get(key)
    if found is None:
        by_offset = T5Relative(buckets, max_distance, bidirectional).bucket_by_offset
        found = _BUCKETS[key] = torch.from_numpy(by_offset).to(device)
    return found


def parsed_terms(texts: tuple[str, ...]) -> tuple[Term, ...]:
    """Return the terms of attention with these texts."""
    found = _TERMS.get(texts)
    if found is None:
        found = _TERMS[texts] = tuple(map(parse_term, texts))
    return found

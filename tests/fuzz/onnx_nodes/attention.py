"""Random nodes: attention and rotary positions."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.fuzz.onnx_nodes.drawing import Draw, draws

Array = np.ndarray[Any, Any]


@draws("RotaryEmbedding")
def _rotary(d: Draw) -> None:
    batch, heads, length, width = d.int(1, 2), d.int(1, 3), d.int(1, 4), 2 * d.int(1, 4)
    part = 2 * d.int(1, width // 2) if d.maybe(0.3) else 0
    merged, positions = d.maybe(), d.maybe()
    d.x(d.floats([batch, length, heads * width] if merged else [batch, heads, length, width]))
    table = [8, (part or width) // 2] if positions else [batch, length, (part or width) // 2]
    d.x(d.floats(table))
    d.x(d.floats(table))
    if positions:
        d.x(d.ints([batch, length], 0, 7))
    d.set(num_heads=heads if merged else None, rotary_embedding_dim=part or None)
    d.perhaps(interleaved=d.int(0, 1))


@draws("Attention")
def _attention(d: Draw) -> None:
    batch, queries, groups, width, value = d.int(1, 2), d.int(1, 4), d.int(1, 2), d.int(1, 4), d.int(1, 4)
    causal = d.maybe(0.3)
    heads, keys = groups * d.int(1, 2), queries if causal else d.int(1, 4)
    merged = d.maybe()
    for length, count, size in ((queries, heads, width), (keys, groups, width), (keys, groups, value)):
        d.x(d.floats([batch, length, count * size] if merged else [batch, count, length, size]))
    if d.maybe():
        shape = d.of([queries, keys], [1, 1, queries, keys], [batch, 1, queries, keys], [batch, heads, queries, keys])
        d.x(d.floats(shape) if causal or d.maybe() else np.ones(shape, bool))
    d.set(is_causal=int(causal) or None)
    if merged:
        d.set(q_num_heads=heads, kv_num_heads=groups)
    d.perhaps(scale=0.4, softcap=2.0)

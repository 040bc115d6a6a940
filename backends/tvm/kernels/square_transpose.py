"""Transpose of a square of vectors in registers. It is used to pack keys, or any matrix by its columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter, Expr


def transposed(k: Emitter, rows: Sequence[Expr]) -> list[Expr]:
    """Transpose a square with one vector for each lane: swap its halves, then the halves of each half, and so on."""
    lanes = len(rows)
    held = [k.let(row, "row") for row in rows]
    size = lanes // 2
    while size:
        made: list[Any] = [None] * lanes
        for x in range(lanes):
            if x & size:
                continue
            pair = [held[x], held[x + size]]
            low = [e if not e & size else lanes + e - size for e in range(lanes)]
            high = [e + size if not e & size else lanes + e for e in range(lanes)]
            made[x] = k.let(k.shuffle(pair, low), "low")
            made[x + size] = k.let(k.shuffle(pair, high), "high")
        held, size = made, size // 2
    return held

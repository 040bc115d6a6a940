"""Block sizes and workspace of the attention kernels."""

from __future__ import annotations

from dataclasses import dataclass

from treadle.backends.tvm.kernels.isa import Isa

BLOCK = 128  # keys in a block
SPAN = 512  # keys of a part, which begins at a multiple of SPAN; several blocks
PANEL = 2  # vectors in a panel, which is the width of a tile
GROUP = 16  # queries whose scores are in memory at the same time


def tile_rows(isa: Isa) -> int:
    """Return the number of queries in a tile, which fit into registers together with a panel and a query's element."""
    return 8 if isa.registers >= 32 else 4


@dataclass(frozen=True)
class Scratch:
    """The workspace of a kernel, in float32 for each slot. If the kernel multiplies pairs, a word holds a pair.

    keys     a block of keys, as panels [BLOCK / width, d, width]
    values   a block of values, as panels [BLOCK, width]; the last one has a single vector if their number is odd
    queries  a group of queries, scaled; in pairs not scaled, and each followed by its weights
    scores   [GROUP, BLOCK]
    sums     for each query of a task the sum of the weighted values so far, padded to full vectors
    rows     for each query of a task m, l, and the factor of the old sums; then m and l of the previous parts
    """

    keys: int
    values: int
    queries: int
    scores: int
    sums: int
    rows: int

    @staticmethod
    def of(d: int, e: int, isa: Isa, *, packs: bool = True, pairs: bool = False) -> Scratch:
        """Return the workspace for heads of these widths, with `sums` and `rows` for one query.

        packs: True if keys and values are packed.
        """
        padded = -(-e // isa.lanes()) * isa.lanes()
        if pairs:
            queries = GROUP * (d // 2 + BLOCK // 2)
            return Scratch(BLOCK * d // 2, BLOCK * padded // 2, queries, GROUP * BLOCK, padded, 5)
        return Scratch(packs * BLOCK * d, packs * BLOCK * padded, GROUP * d, GROUP * BLOCK, padded, 5)

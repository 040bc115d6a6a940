"""What attention's kernels hold at a time, and the memory that they work in."""

from __future__ import annotations

from dataclasses import dataclass

from treadle.backends.tvm.kernels.isa import Isa

BLOCK = 128  # keys that are taken at a time
SPAN = 512  # keys of a part, from a multiple of it on; some blocks
PANEL = 2  # vectors of a panel: what a tile spans beside its rows
GROUP = 16  # queries whose scores are held at a time


def tile_rows(isa: Isa) -> int:
    """Queries of a tile: as many as leave registers for a panel and a query's element."""
    return 8 if isa.registers >= 32 else 4


@dataclass(frozen=True)
class Scratch:
    """Memory that a kernel works in, in float32 for each slot; where it multiplies pairs, a word holds one.

    keys     a block of keys, as panels [BLOCK / width, d, width]
    values   a block of values, as panels [BLOCK, width], the last one a vector wide if their number is odd
    queries  a group of queries, scaled; in pairs not scaled, and behind each its weights
    scores   [GROUP, BLOCK]
    sums     for each query of a task the sum of the values so far, filled up to full vectors
    rows     for each query of a task m, l, and what the old sums are multiplied by; then m and l of the parts before
    """

    keys: int
    values: int
    queries: int
    scores: int
    sums: int
    rows: int

    @staticmethod
    def of(d: int, e: int, isa: Isa, *, packs: bool = True, pairs: bool = False) -> Scratch:
        """For heads of these widths; `sums` and `rows` for one query. packs: whether keys and values are packed."""
        padded = -(-e // isa.lanes()) * isa.lanes()
        if pairs:
            queries = GROUP * (d // 2 + BLOCK // 2)
            return Scratch(BLOCK * d // 2, BLOCK * padded // 2, queries, GROUP * BLOCK, padded, 5)
        return Scratch(packs * BLOCK * d, packs * BLOCK * padded, GROUP * d, GROUP * BLOCK, padded, 5)

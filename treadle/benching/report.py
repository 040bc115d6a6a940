"""The text of a benchmark's report."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rich.table import Table

from treadle.benching.benchmark import Benchmark, BenchRow
from treadle.benching.sides import PEERS
from treadle.reporting.counts import counted, human, rate_text, sizes_text
from treadle.reporting.tables import plain_table

ALIKE = 1e-3
"""Tolerance for float32 outputs, relative to the largest element. Larger differences are reported."""


def report_lines(found: Benchmark) -> Iterator[str | Table]:
    """Yield the table, the machine's limits, and the peers that are missing."""
    work = found.workload
    sizes = f" at {sizes_text(found.sizes)}" if found.sizes else ""
    yield f"{found.graph.name}{sizes}, {counted(work.threads, 'thread')}, {counted(found.rounds, 'turn')}"
    yield ""
    yield _rows(found)
    yield ""
    yield _limits(found)
    dtype, scheme = work.options.dtype, work.options.quantize
    ours = " and ".join(filter(None, (dtype if dtype != "f32" else None, scheme)))
    rounded = f" (ours is in {ours})" if ours else ""
    for row in found.rows:
        yield f"{row.side} is {row.note}"
        if row.difference == math.inf:
            yield f"{row.side} and ours differ: NaN or infinity on one side only"
        elif row.difference is not None and row.difference > ALIKE:
            yield f"{row.side} and ours differ{rounded}: by {row.difference:.1%} of the largest number"
        if row.difference is None and row.side != "treadle":
            yield f"{row.side} has no output of the shape of ours, so nothing was compared"
    for name, why in found.missing.items():
        hint = f" (pip install {PEERS[name].package})" if name in PEERS and "not installed" in why else ""
        yield f"{name} is missing: {why}{hint}"


def _limits(found: Benchmark) -> str:
    """Return a line of text on the minimum time, and on the rates from which it follows."""
    machine, least = found.machine, found.machine.least(found.cost)
    work = f"{human(found.cost.flops, 'FLOPs')} and {human(found.cost.bytes, 'B')}"
    peaks = ", ".join(rate_text(rate, dtype) for dtype, rate in machine.rates.items())
    rates = f"{peaks} and {human(machine.read, 'B')}/s"
    if machine.kernels is None:
        return f"{work}: {least * 1e3:.3g} ms at NumPy's {rates} here"
    ratio = found.rows[0].seconds / least
    return (
        f"{work}: our kernels need at least {least * 1e3:.3g} ms at this machine's {rates}; "
        f"treadle takes {ratio:.1f} times as long"
    )


def _rows(found: Benchmark) -> Table:
    numbers = ("ms", "x ours", "quartiles", "differs", "opened", "peak")
    made = plain_table("side", *numbers, numbers=set(numbers))
    for row in found.rows:
        made.add_row(
            row.side,
            f"{row.seconds * 1e3:.2f}",
            f"{row.ratio:.2f}",
            "" if row.side == "treadle" else f"{row.between[0]:.2f} to {row.between[1]:.2f}",
            _difference(row),
            f"{row.opened:.1f} s",
            human(row.peak, "B"),
        )
    return made


def _difference(row: BenchRow) -> str:
    return "" if row.difference is None else f"{row.difference:.1e}"

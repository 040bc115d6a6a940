"""The plan that fits a run into a budget, which `FitMemory` applies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Chunk:
    """Nodes of a function that are computed in parts.

    function     the function's name
    first, last  indices of the nodes in the function, both included
    dim          the dimension along which the axis is split, in the first value that the nodes return
    parts        the number of parts
    description  the ops, for the report: `layer_norm to add`
    axis         the size of the axis, as an expression
    source       the user's line of the last node
    """

    function: str
    first: int
    last: int
    dim: int
    parts: int
    description: str = field(default="", compare=False)
    axis: str = field(default="", compare=False)
    source: str = field(default="", compare=False)

    def __str__(self) -> str:
        return f"{self.function}: {self.description} in {self.parts} parts of {self.axis}  {self.source}".rstrip()


@dataclass(frozen=True)
class MemoryFit:
    """A plan with which a run fits into a budget at given sizes, and at all smaller sizes.

    budget   the budget in bytes
    sizes    sizes of the symbols, the largest that the executable serves
    before   the peak in bytes without a budget
    peak     the largest number of bytes that a run takes at any of these sizes
    ratio    the predicted slowdown: time of a run as a multiple of the time without a budget
    apart    True if merged products of one value are computed one by one
    again    True if cheap values are recomputed for each reader
    chunks   the runs that are computed in parts, callees first
    host     the output whose memory holds early temporaries, which are dead before it is written; None if none does
    """

    budget: int
    sizes: Mapping[str, int]
    before: int
    peak: int
    ratio: float
    apart: bool = False
    again: bool = False
    chunks: tuple[Chunk, ...] = ()
    host: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return dict(self.__dict__) | {"sizes": dict(self.sizes), "chunks": [dict(c.__dict__) for c in self.chunks]}

    def __str__(self) -> str:
        where = ", ".join(f"{name}={size}" for name, size in self.sizes.items())
        lines = [
            f"peak {self.peak:,} bytes within {self.budget:,} ({self.before:,} without a budget)"
            + (f" at {where} and below" if where else ""),
            f"predicted time: {self.ratio:.3f} times the time of a run without a budget",
        ]
        if self.host is not None:
            lines.append(
                f"temporaries that are dead before {self.host} is written use the memory of {self.host}, if they fit"
            )
        lines += ["products of one value are computed one by one"] * self.apart
        lines += ["cheap values are recomputed for each reader"] * self.again
        return "\n".join([*lines, *map(str, self.chunks)])

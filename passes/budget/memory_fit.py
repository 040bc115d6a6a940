"""What was chosen so that a run fits into a budget: a plan, which `FitMemory` applies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Chunk:
    """Nodes of a function that are computed in parts.

    function     whose they are, by name
    first, last  their numbers among the function's nodes, both included
    dim          of the first value that they give: the axis that is cut
    parts        how many
    told         the ops, for people: `layer_norm to add`
    axis         its size, as an expression
    source       the user's line of the last of them
    """

    function: str
    first: int
    last: int
    dim: int
    parts: int
    told: str = field(default="", compare=False)
    axis: str = field(default="", compare=False)
    source: str = field(default="", compare=False)

    def __str__(self) -> str:
        return f"{self.function}: {self.told} in {self.parts} parts of {self.axis}  {self.source}".rstrip()


@dataclass(frozen=True)
class MemoryFit:
    """How a run at some sizes, and at all smaller ones, fits into a budget.

    budget   bytes
    sizes    of the symbols, the largest that the executable serves
    before   the peak as it would be without a budget
    peak     the most bytes that a run takes at any of these sizes
    ratio    how many times as long a run takes as without a budget, predicted
    apart    whether products of one value, which are one by then, are done one by one
    again    whether what is cheap is computed for each that reads it
    chunks   what is computed in parts, callees first
    host     the output in whose memory lies what dies before it is written, where it fits; None: nothing does
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
            f"a run takes {self.ratio:.3f} times as long, as predicted",
        ]
        if self.host is not None:
            lines.append(f"what dies before {self.host} is written lies in memory of {self.host}, where it fits")
        lines += ["products of one value are done one by one"] * self.apart
        lines += ["what is cheap is computed again for each that reads it"] * self.again
        return "\n".join([*lines, *map(str, self.chunks)])

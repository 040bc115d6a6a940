"""A quantization plan: for every weight the encoding that it gets, or why it stays as it is.

    weight                       type             encoding        bytes          was  why
    layer.{0..29}.attn.q.weight  f32[576, 576]    int8_rows  10,022,400   39,813,120  multiplied by projections
    embed.weight                 f32[49152, 576]  int8_rows  28,508,160  113,246,208  multiplied by linear, an output

A plan is data: `treadle.passes.quantization.planning` makes it, `plan_checking` checks it, `quantize` applies it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from treadle.ir.encodings.encoding import Encoding
from treadle.ir.types import Type

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class WeightPlan:
    """What is planned for one weight.

    name      the parameter's
    type      as it is without the plan
    encoding  which it gets; None: it stays as it is
    reason    why
    """

    name: str
    type: Type
    encoding: Encoding | None
    reason: str

    @property
    def bytes(self) -> int:
        """Bytes that it takes by the plan."""
        return (self.type if self.encoding is None else self.type.as_encoded(self.encoding)).bytes_at({})

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        encoding = None if self.encoding is None else str(self.encoding)
        given = {"name": self.name, "type": str(self.type), "encoding": encoding, "reason": self.reason}
        return {**given, "bytes": self.bytes, "bytes_before": self.type.bytes_at({})}


@dataclass(frozen=True)
class QuantizationPlan:
    """What becomes of every weight of a graph.

    model    the graph's name
    scheme   "int8-weights" or "int4"
    weights  one for each parameter, in their order
    """

    model: str
    scheme: str
    weights: tuple[WeightPlan, ...]

    @property
    def encodings(self) -> Mapping[str, Encoding]:
        """What is encoded, by the parameter's name."""
        return {w.name: w.encoding for w in self.weights if w.encoding is not None}

    @property
    def bytes(self) -> int:
        """Bytes of all weights by the plan."""
        return sum(w.bytes for w in self.weights)

    @property
    def bytes_before(self) -> int:
        """Bytes of all weights without it."""
        return sum(w.type.bytes_at({}) for w in self.weights)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        told = {"model": self.model, "scheme": self.scheme, "bytes": self.bytes, "bytes_before": self.bytes_before}
        return {**told, "weights": [w.as_dict() for w in self.weights]}

    def __str__(self) -> str:
        before = sum(w.type.encoding is not None for w in self.weights)
        encoded = len(self.encodings) + before
        head = (
            f"{self.model}, {self.scheme}: {encoded} of {len(self.weights)} weights in blocks"
            f"{f', {before} of them before' if before else ''}, {self.bytes:,} bytes of {self.bytes_before:,}"
        )
        rows: list[tuple[str, ...]] = [("weight", "type", "encoding", "bytes", "was", "why")]
        rows += [_row(group) for group in _folded(self.weights)]
        wide = [max(len(row[i]) for row in rows) for i in range(5)]
        return "\n".join([head, "", *(_line(row, wide) for row in rows)])


def _line(row: Sequence[str], wide: Sequence[int]) -> str:
    """A row in columns, bytes to the right, and the reason behind."""
    cells = [c.rjust(w) if i in (3, 4) else c.ljust(w) for i, (c, w) in enumerate(zip(row[:5], wide, strict=True))]
    return "  ".join([*cells, row[5]]).rstrip()


def _folded(weights: Iterable[WeightPlan]) -> list[list[WeightPlan]]:
    """Weights of layers that differ in the layer's number alone, together."""
    groups: dict[tuple[object, ...], list[WeightPlan]] = {}
    for weight in weights:
        key = (_NUMBER.sub("#", weight.name, count=1), weight.type, weight.encoding, weight.reason)
        groups.setdefault(key, []).append(weight)
    return list(groups.values())


def _row(group: Sequence[WeightPlan]) -> tuple[str, ...]:
    first = group[0]
    encoding = "stays" if first.encoding is None else str(first.encoding)
    bytes, before = (sum(of) for of in zip(*((w.bytes, w.type.bytes_at({})) for w in group), strict=True))
    return _name(group), str(first.type), encoding, f"{bytes:,}", f"{before:,}", first.reason


def _name(group: Sequence[WeightPlan]) -> str:
    """`layer.{0..29}.attn.q.weight`, or with commas where numbers are left out."""
    first = group[0].name
    if len(group) == 1:
        return first
    numbers = [int(match[0]) for w in group if (match := _NUMBER.search(w.name)) is not None]
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    told = ",".join("..".join(map(str, run)) for run in runs)
    return _NUMBER.sub(f"{{{told}}}", first, count=1)

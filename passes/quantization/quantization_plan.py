"""A quantization plan: for every weight, and every value that weights multiply, its encoding or the reason to keep it.

    weight                       type             encoding        bytes          was  why
    layer.{0..29}.attn.q.weight  f32[576, 576]    int8_rows  10,022,400   39,813,120  multiplied by projections
    embed.weight                 f32[49152, 576]  int8_rows  28,508,160  113,246,208  multiplied by linear, an output

    multiplied value             type             encoding    why
    mixed, of layer              f32[B, S, 576]   uint8_rows  linear multiplies it with int8_rows

A plan is data: `treadle.passes.quantization.planning` builds it, `plan_checking` checks it, and `quantize` applies it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from treadle.ir.encodings.encoding import Encoding
from treadle.ir.transforms.balances import Balance
from treadle.ir.transforms.rounded_inputs import AS_STORED, InputRounding
from treadle.ir.types import Type

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class WeightPlan:
    """The plan of one weight.

    name      the parameter's name
    type      its type before quantization
    encoding  its new encoding; None if it is unchanged
    reason    the reason for the encoding, or for the absence of one
    misfit    True if the scheme applies to the weight, but has no encoding for its sizes
    """

    name: str
    type: Type
    encoding: Encoding | None
    reason: str
    misfit: bool = False

    @property
    def bytes(self) -> int:
        """The number of bytes of the weight under the plan."""
        return (self.type if self.encoding is None else self.type.as_encoded(self.encoding)).bytes_at({})

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as data for JSON."""
        encoding = None if self.encoding is None else str(self.encoding)
        given = {"name": self.name, "type": str(self.type), "encoding": encoding, "reason": self.reason}
        return {**given, "bytes": self.bytes, "bytes_before": self.type.bytes_at({})}


@dataclass(frozen=True)
class ActivationPlan:
    """The plan of one value that products multiply with weights.

    function  the name of the function that has the value
    name      the value's name
    type      its type before quantization
    encoding  the encoding in which products read it, computed at every call; None if it is unchanged
    products  indices of the nodes that read the encoded value; if it is unchanged, of the nodes that could read it
    reason    the reason for the encoding, or for the absence of one
    """

    function: str
    name: str
    type: Type
    encoding: Encoding | None
    products: tuple[int, ...]
    reason: str

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as data for JSON."""
        encoding = None if self.encoding is None else str(self.encoding)
        given = {"function": self.function, "name": self.name, "type": str(self.type), "encoding": encoding}
        return {**given, "products": list(self.products), "reason": self.reason}


@dataclass(frozen=True)
class QuantizationPlan:
    """The plan of every weight of a graph, and of the values that are multiplied with weights.

    model        the graph's name
    scheme       a name of `treadle.passes.quantization.planning.SCHEMES`
    weights      one plan for each parameter, in the graph's order
    activations  one plan for each value that a product with weights multiplies, in order; empty if the scheme does not
                 quantize activations
    balances     the balances of values that norms produce
    stored       the roundings of inputs that the model's files ask for, by the names of weights; the scheme "as-stored"
                 applies them
    """

    model: str
    scheme: str
    weights: tuple[WeightPlan, ...]
    activations: tuple[ActivationPlan, ...] = ()
    balances: tuple[Balance, ...] = ()
    stored: Mapping[str, InputRounding] = field(default_factory=dict)

    @property
    def encodings(self) -> Mapping[str, Encoding]:
        """The encoding of each encoded weight, by the parameter's name."""
        return {w.name: w.encoding for w in self.weights if w.encoding is not None}

    @property
    def bytes(self) -> int:
        """The number of bytes of all weights under the plan."""
        return sum(w.bytes for w in self.weights)

    @property
    def bytes_before(self) -> int:
        """The number of bytes of all weights before quantization."""
        return sum(w.type.bytes_at({}) for w in self.weights)

    @property
    def misfits(self) -> tuple[str, ...]:
        """A line for each kind of weight that stays unquantized only because of its sizes, with the reason."""
        kinds = _folded(w for w in self.weights if w.misfit)
        return tuple(f"{_name(kind)}: {kind[0].type}, {kind[0].reason}" for kind in kinds)

    @property
    def summary(self) -> list[str]:
        """The number of weights in blocks, their bytes, and the weights that stay only because of their sizes."""
        lines = [f"not quantized: {line}" for line in self.misfits[:_MOST_LINES]]
        more = len(self.misfits) - len(lines)
        return [self._head(), *lines, *([f"not quantized: {more} more kinds of weights"] if more else [])]

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as data for JSON."""
        facts = {"model": self.model, "scheme": self.scheme, "bytes": self.bytes, "bytes_before": self.bytes_before}
        facts["weights"] = [w.as_dict() for w in self.weights]
        if self.activations:
            facts["activations"] = [a.as_dict() for a in self.activations]
            facts["balances"] = [asdict(balance) for balance in self.balances]
        if self.stored:
            facts["stored"] = {name: str(rounding) for name, rounding in self.stored.items()}
        return facts

    def _head(self) -> str:
        before = sum(w.type.encoding is not None for w in self.weights)
        encoded = len(self.encodings) + before
        return (
            f"{self.model}, {self.scheme}: {encoded} of {len(self.weights)} weights in blocks"
            f"{f', {before} of them already' if before else ''}, {self.bytes:,} bytes of {self.bytes_before:,}"
        )

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("weight", "type", "encoding", "bytes", "was", "why")]
        rows += [_row(group) for group in _folded(self.weights)]
        lines = [self._head(), "", *_table(rows)]
        if self.activations:
            lines += [
                "",
                *_table([("multiplied value", "type", "encoding", "why"), *map(_activation_row, self.activations)]),
            ]
        if self.balances:
            lines += ["", *_table([("vector", "of the norm", "smoothed weights"), *_folded_balances(self.balances)])]
        if self.stored:
            lines += ["", *_table([("weight", "inputs, as the file asks", "rounded"), *self._stored_rows()])]
        return "\n".join(lines)

    def _stored_rows(self) -> list[tuple[str, ...]]:
        """Return a row for the weights that differ only in the layer's number, with the rounding of their inputs."""
        groups: dict[tuple[str, InputRounding], list[str]] = {}
        for name, rounding in self.stored.items():
            groups.setdefault((_NUMBER.sub("#", name, count=1), rounding), []).append(name)
        done = "yes" if self.scheme == AS_STORED else f"with quantize {AS_STORED}"
        return [
            (numbered_names(names), str(rounding), f"no: {rounding.why_not}" if rounding.why_not else done)
            for (_, rounding), names in groups.items()
        ]


_TO_THE_RIGHT = ("bytes", "was")
_MOST_LINES = 4  # of a summary


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Return the lines of a table with a header. Bytes are right-aligned, and the reason is the last column."""
    *heads, _ = rows[0]
    wide = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    lines = []
    for row in rows:
        cells = zip(heads, row, wide, strict=False)
        columns = [c.rjust(w) if head in _TO_THE_RIGHT else c.ljust(w) for head, c, w in cells]
        lines.append("  ".join([*columns, row[-1]]).rstrip())
    return lines


def _activation_row(plan: ActivationPlan) -> tuple[str, ...]:
    encoding = "stays" if plan.encoding is None else str(plan.encoding)
    return f"{plan.name}, of {plan.function}", str(plan.type), encoding, plan.reason


def _folded(weights: Iterable[WeightPlan]) -> list[list[WeightPlan]]:
    """Return the weights in groups. Weights in a group differ only in the layer's number."""
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


def _folded_balances(balances: Iterable[Balance]) -> list[tuple[str, ...]]:
    """Return rows of a table, in which balances that differ only in the layer's number share a row."""
    groups: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for balance in balances:
        row = (balance.vector, balance.gain, ", ".join(balance.weights))
        groups.setdefault(tuple([_NUMBER.sub("#", text) for text in row]), []).append(row)
    return [
        tuple(
            [
                ", ".join(map(numbered_names, zip(*[t.split(", ") for t in of], strict=True)))
                for of in zip(*g, strict=True)
            ]
        )
        for g in groups.values()
    ]


def _name(group: Sequence[WeightPlan]) -> str:
    return numbered_names([w.name for w in group])


def numbered_names(names: Sequence[str]) -> str:
    """Return names as one pattern, such as `layer.{0..29}.attn.q.weight`, or with commas if numbers are missing."""
    first = names[0]
    if len(set(names)) == 1:
        return first
    numbers = [int(match[0]) for name in names if (match := _NUMBER.search(name)) is not None]
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    indices = ",".join("..".join(map(str, run)) for run in runs)
    return _NUMBER.sub(f"{{{indices}}}", first, count=1)

"""Selection of a graph's outputs, whole or in part. Passes then remove the nodes that no selected output needs.

choose_outputs(graph, ["pooled"])               # only this output
choose_outputs(graph, ["hidden[:, 0]"])         # f32[B, D] of the first positions, under the output's name
choose_outputs(graph, ["logits[:, -1:]"])       # f32[B, 1, V] of the last positions
choose_outputs(graph, ["logits[:, asked]"])     # f32[B, N, V] at the positions in `asked`, a new input i64[B, N]
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from treadle.files.nearest_names import NearestNames
from treadle.ir.builder import Builder, Expr
from treadle.ir.errors import TreadleError, UsageError
from treadle.ir.graph import Graph, Value
from treadle.ir.naming import free_name
from treadle.ir.ops.axis_names import axis_letters
from treadle.ir.sizing.sizes import Size
from treadle.ir.transforms.clone import clone_graph
from treadle.ir.types import Dim, Type, i64

_ASKED = re.compile(r"(?P<name>[^\[\]]*)(?:\[(?P<part>[^\[\]]*)\])?")
_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_SPAN = re.compile(r"(?P<start>[+-]?\d{1,17})?\s*(?:(?P<colon>:)\s*(?P<stop>[+-]?\d{1,17})?)?", re.ASCII)
"""The pattern of a part. A size in text has at most 18 digits, so 17 digits leave room to add 1 to any position."""


class UnknownOutputError(UsageError):
    """The error for a requested output that the graph lacks."""


@dataclass(frozen=True)
class _Span:
    """The positions from start to stop of one axis. With `single`, only the position at start, and the axis is
    removed.
    """

    start: int | None
    stop: int | None
    single: bool


@dataclass(frozen=True)
class _Given:
    """The positions of each row, which are passed in an input of this name."""

    name: str


def choose_outputs(graph: Graph, outputs: Sequence[str]) -> Graph:
    """Return a copy of a graph with these outputs of its `main`, in this order.

    outputs   names. Brackets after a name select a part, as in NumPy: for each of the first axes a position, or
              `start:stop`; a negative number counts from the end. The second axis, after `:`, may also have a name:
              the name of a new input, which holds positions for each row of the first axis. Outputs that name the same
              input are read at the same positions

    Raises UnknownOutputError for a name that the graph lacks, UsageError for a malformed part, or an output that is
    named twice.
    """
    given: object = outputs
    listed = isinstance(given, Sequence) and not isinstance(given, str)
    if not listed or not outputs or not all(isinstance(asked, str) for asked in outputs):
        hint = f"outputs=[{outputs!r}]" if isinstance(outputs, str) else None
        received = repr(outputs)[:80] if listed or hint is not None else f"a value of type {type(outputs).__name__}"
        raise UsageError("outputs= must be a list with the names of one or more outputs", received=received, hint=hint)
    copy = clone_graph(graph)
    known = copy.main.outputs
    chosen: dict[str, Expr] = {}
    positions: dict[str, Expr] = {}
    b = Builder(copy)
    for asked in outputs:
        name, spans = _parsed(asked, known)
        if name not in known:
            raise UnknownOutputError(
                f"{graph.name} has no output {name[:80]!r}",
                received=asked[:80],
                hint=f"did you mean {near[0]}?"
                if (near := NearestNames(known).of(name))
                else f"one of {', '.join(known)}",
            )
        if name in chosen:
            raise UsageError(f"output {name} is named twice", received=", ".join(outputs))
        value = known[name]
        with b.placed_as(value.node) if value.node is not None else b.scoped(""):
            try:
                chosen[name] = _part(b, b.expr(value), spans, positions)
            except TreadleError as error:
                raise UsageError(
                    f"output {name}: {value.type} has no part {asked.strip()[:80]}: {error.what}"
                ) from None
    b.outputs(**chosen)
    return copy


def _parsed(asked: str, outputs: Mapping[str, Value]) -> tuple[str, list[_Span | _Given]]:
    match = _ASKED.fullmatch(asked.strip())
    part = None if match is None else match["part"]
    spans = [] if part is None else [_span(span.strip()) for span in part.split(",")]
    if match is None or None in spans:
        raise _unreadable(asked, outputs)
    return match["name"].strip(), [span for span in spans if span is not None]


def _span(text: str) -> _Span | _Given | None:
    """Return a part of one axis, or None if the text is none."""
    if _NAME.fullmatch(text) is not None:
        return _Given(text)
    match = _SPAN.fullmatch(text)
    if match is None or not text:
        return None
    start, stop = (None if edge is None else int(edge) for edge in (match["start"], match["stop"]))
    return _Span(start, stop, single=match["colon"] is None)


def _unreadable(asked: str, outputs: Mapping[str, Value]) -> UsageError:
    opened = asked.count("[") > asked.count("]")
    name = (NearestNames(outputs).of(asked.partition("[")[0].strip()) or list(outputs))[0]
    parts = {0: [], 1: ["[0]"]}.get(outputs[name].type.rank, ["[:, 0]", "[:, -1:]"])
    return UsageError(
        f"{asked[:80]!r} names no output",
        received="a bracket that is not closed" if opened else None,
        hint=" or ".join([f'"{name}"', *[f'"{name}{part}"' for part in parts]]),
    )


def _part(b: Builder, x: Expr, spans: Sequence[_Span | _Given], positions: dict[str, Expr]) -> Expr:
    """Return the part of x that spans select. `positions` holds the new inputs by name; the inputs that the spans name
    are added to it.
    """
    if len(spans) > x.rank:
        raise UsageError(f"the output has {x.rank} axes")
    for axis in reversed(range(len(spans))):  # the last first, so that removing an axis does not renumber the others
        span = spans[axis]
        if isinstance(span, _Given):
            if axis != 1 or spans[0] != _Span(None, None, single=False):
                raise UsageError("a name selects positions along the second axis, after `:`")
            if span.name not in positions:
                positions[span.name] = _positions(b, x.shape[0], span.name)
            x = _picked(b, x, positions[span.name])
            continue
        start, stop = span.start or 0, span.stop
        if not span.single:
            x = x if (start, stop) == (0, None) else b.slice(x, axis=axis, start=start, stop=stop)
            continue
        x = b.slice(x, axis=axis, start=start, stop=start + 1 or None)
        names = axis_letters(x.rank)
        kept = [*names[:axis], *names[axis + 1 :]]
        x = b.rearrange(x, pattern=f"{' '.join([*names[:axis], '1', *names[axis + 1 :]])} -> {' '.join(kept)}")
    return x


def _positions(b: Builder, rows: Size, name: str) -> Expr:
    """Return a new input i64[rows, NAME] of positions for each row."""
    if any(v.name == name for v in b.function.inputs):
        raise UsageError(f"{b.graph.name} has an input {name} already, so positions cannot have that name")
    count = free_name(name.upper(), b.graph.symbols)
    made: Expr = b.input(name, Type(i64, (Dim.of(rows), Dim.of(Size.symbol(count)))))
    return made


def _picked(b: Builder, x: Expr, positions: Expr) -> Expr:
    """Return, for each row of x, the elements along its second axis at the positions i64[rows, n]."""
    name, (rows, count) = positions.value.name, positions.shape
    if rows != x.shape[0]:
        raise UsageError(f"{name} holds positions for {rows} rows, but the output has {x.shape[0]}")
    taken = b.rearrange(positions, pattern=f"r p -> r p{' 1' * (x.rank - 2)}")
    taken.value.name = name
    made: Expr = b.take_along_axis(x, b.expand(taken, shape=(rows, count, *x.shape[2:])), axis=1)
    return made

"""Storage plans: the storage of every value of a lowered graph, from which step to which, and the reason.

    plan.functions["layer"].places[v]     v's storage, its view of the storage, the reason, and its life
    plan.functions["layer"].steps         the nodes that are computed together, in order
    plan.functions["layer"].lives         each storage, from its first step to its last

Sizes are expressions of the graph's symbols, so one plan holds for all sizes; offsets in an arena
(`treadle.passes.memory.placement`) are computed when sizes are known. `PlanStorage` builds a plan, `check_storage`
checks it, and backends emit code for it.

Example: a block concat(linear(x, w), x), for kernels that write by strides. linear writes the first half of concat's
result, and concat itself only moves x:

    0  linear   storage joined  [B, S, 64] of 128 apart  0 to 1  written straight to joined
    1  joined   storage joined  [B, S, 128]              0 to 2  own storage

For a library (NumPy, PyTorch), which chooses strides, each value has its own storage; linear's name is deleted after
step 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Any

from treadle.ir.builder import describe_source
from treadle.ir.graph import Function, Node, Value
from treadle.ir.storage.views import Storage, View

BEFORE = -1
"""The step number of arguments, which are available before the first step."""


@dataclass(frozen=True, eq=False)
class Step:
    """Nodes that are computed together, at the position of the last one, the root; usually a single node.

    product  the product whose elements the other nodes process while they are in registers; None if there is none
    """

    nodes: tuple[Node, ...]
    product: Node | None = None

    @property
    def root(self) -> Node:
        return self.nodes[-1]

    @property
    def chain(self) -> tuple[Node, ...]:
        """The step's nodes without the product, and without nodes that decode blocks for one of them."""
        return tuple([node for node in self.nodes if node is not self.product and not node.op.decodes])

    @cached_property
    def inputs(self) -> tuple[Value, ...]:
        """The values that the step reads from other steps, each once, in order."""
        inside = {value for node in self.nodes for value in node.results}
        return tuple(dict.fromkeys(v for node in self.nodes for v in node.inputs if v not in inside))


class How(Enum):
    """The reason for a value's storage; `{of}` is a placeholder for another value's name."""

    GIVEN = "given by the caller"
    CONSTANT = "a constant of the program"
    STATE = "a state, which outlives the call"
    UPDATE = "written over {of}, which it updates"
    OWN = "own storage"
    VIEW = "a view of {of}"
    INTO = "written straight to {of}"
    OVER = "over {of}, which dies here"
    INSIDE = "in registers, while {of} is computed"


@dataclass(frozen=True)
class ValuePlace:
    """The storage of a value.

    storage  the storage; None for a value that is only in registers
    view     the value's view of the storage; None if a library chooses the strides, or there is no storage
    of       the value, or the output by name, that `how` refers to
    first    the step that computes the value; BEFORE for an argument
    last     the last step that reads the value; for an output, the step after all others
    is_written  True if its step writes the value; False if the value is in memory already, or in registers
    """

    storage: Storage | None
    view: View | None
    how: How
    of: Value | str
    first: int
    last: int
    is_written: bool

    def describe(self, names: Mapping[Value, str]) -> str:
        """Return the reason in words, such as `a view of x`, with the names of a function's values."""
        return self.how.value.format(of=f"output {self.of}" if isinstance(self.of, str) else names[self.of])

    @property
    def form(self) -> str:
        """The layout as text: `row-major`, `panels(16)`, or the strides; empty if unknown."""
        if self.storage is not None and self.storage.layout is not None:
            return str(self.storage.layout)
        if self.view is None:
            return ""
        if self.view.is_contiguous:
            return "row-major" if self.view.offset == 0 else f"row-major, offset {self.view.offset}"
        begin = "" if self.view.offset == 0 else f", offset {self.view.offset}"
        return f"strides [{', '.join(map(str, self.view.strides))}]{begin}"


@dataclass(frozen=True)
class Life:
    """The life of a storage: it is written or read from step `first` to step `last`, both included."""

    storage: Storage
    first: int
    last: int


@dataclass(frozen=True)
class BetterOrder:
    """The peaks in bytes, at some sizes, of program order and of another order that needs less memory."""

    before: int
    after: int
    sizes: Mapping[str, int]

    def __str__(self) -> str:
        where = ", ".join(f"{name}={size}" for name, size in self.sizes.items())
        return f"reordered: peak {self.before:,} -> {self.after:,} bytes" + (f" at {where}" if where else "")


@dataclass(frozen=True, eq=False)
class FunctionPlan:
    """The storage of one function.

    steps      the steps, in the order in which they run
    places     the place of every argument, constant and result, in the order in which they are computed
    names      unique names of the same values; a storage has the name of the value for which it was created
    lives      the life of every storage, in the order of their first use
    results    for kernels that write by strides: the caller's storage of each output, by name; otherwise empty
    copied     outputs that no step writes, by name: arguments, constants, outputs under a second name. They are copied
               after the last step
    reordered  the savings of an order other than program order; None for program order
    reuses     for kernels that write by strides: the arguments whose storage the caller may pass for the only output,
               if they are dead after the call; for an entry, only donated arguments
    donated    arguments that the caller donates: steps may overwrite them
    given_back  outputs by name that are stored in a donated argument: the caller gets that argument as the result
    workspaces  by step, the workspaces of a library's call while it runs, by name: separate storages
    """

    function: Function
    steps: tuple[Step, ...]
    places: Mapping[Value, ValuePlace]
    names: Mapping[Value, str]
    lives: tuple[Life, ...]
    results: Mapping[str, Storage]
    copied: tuple[str, ...] = ()
    reordered: BetterOrder | None = None
    reuses: tuple[Value, ...] = ()
    donated: tuple[Value, ...] = ()
    given_back: Mapping[str, Value] = field(default_factory=dict)
    workspaces: Mapping[int, Mapping[str, View]] = field(default_factory=dict)

    @property
    def end(self) -> int:
        """The step after all others, at which outputs are returned."""
        return len(self.steps)

    @property
    def own(self) -> int:
        """The number of the function's own storages."""
        beside = sum(len(each) for each in self.workspaces.values())
        return sum(life.storage.kind.is_own for life in self.lives) - beside

    def beside(self) -> list[str]:
        """Return a line for each step with workspaces: `workspace of attn, at step 8: scores f32[B, 12, S, S]`."""
        lines = []
        for at, arrays in self.workspaces.items():
            texts = [f"{name} {view.dtype}[{', '.join(map(str, view.shape))}]" for name, view in arrays.items()]
            lines.append(f"workspace of {self.names[self.steps[at].root.results[0]]}, at step {at}: {', '.join(texts)}")
        return lines

    def dead_after(self) -> dict[int, list[Value]]:
        """Return, for each step, the stored results that no later step reads."""
        dead: dict[int, list[Value]] = {}
        for value, place in self.places.items():
            is_state = place.how is How.UPDATE  # an update has no name of its own
            if place.first != BEFORE and place.storage is not None and place.last < self.end and not is_state:
                dead.setdefault(place.last, []).append(value)
        return dead

    def rows(self) -> Iterator[tuple[Value, ValuePlace]]:
        """Yield the values that are printed: all but scalar constants, which are numbers in the code."""
        for value, place in self.places.items():
            if value.literal is None or value.literal.shape != ():
                yield value, place

    def as_dict(self) -> list[dict[str, Any]]:
        names = self.names
        return [
            {
                "name": names[value],
                "type": str(value.type),
                "storage": None if place.storage is None else place.storage.name,
                "form": place.form or None,
                "first": place.first,
                "last": place.last,
                "why": place.describe(names),
            }
            for value, place in self.rows()
        ]

    def __str__(self) -> str:
        names = self.names
        shown = {value: place for value, place in self.rows() if value.kind != "parameter"}
        cells = [(names[v], str(v.type), *_where(place), place.describe(names)) for v, place in shown.items()]
        lines = [f"{self.function.name}: {len(self.steps)} steps, {_locals(self)}"]
        if self.reordered is not None:
            lines[0] += f"; {self.reordered}"
        if self.reuses:
            lines[0] += f"; its result may overwrite {' or '.join(names[v] for v in self.reuses)}"
        if self.donated:
            lines[0] += f"; {' and '.join(names[v] for v in self.donated)} donated"
        lines[0] += "".join(f", returned as {name}" for name in self.given_back)
        for (*row, description), value in zip(aligned(cells), shown, strict=True):
            node = value.node
            source = (describe_source(node.source, node.scope) or "") if node is not None else ""
            lines.append("  " + "  ".join([*row, description, source]).rstrip())
        lines += [f"  {line}" for line in self.beside()]
        lines += [
            f"  output {name} is copied from {names[self.function.outputs[name]]} at the end" for name in self.copied
        ]
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class StoragePlan:
    """The storage of every function that users' entries call, directly or not, callees first. Prints as text, without
    weights.

    strided     True if kernels read and write by the strides of views; otherwise a library chooses strides and
                allocates its results
    in_results  True if storages that are dead before a result is written may be placed in its memory
    copies      for a library: True if a view that strides cannot express has its own storage
    """

    functions: Mapping[str, FunctionPlan]
    strided: bool
    in_results: bool
    copies: bool

    @property
    def note(self) -> str:
        """A one-line summary of the plan."""
        places = [place for each in self.functions.values() for _, place in each.rows() if place.first != BEFORE]
        counts = [(how, sum(place.how is how for place in places)) for how in _COUNTED]
        own = sum(each.own for each in self.functions.values())
        beside = sum(len(arrays) for each in self.functions.values() for arrays in each.workspaces.values())
        parts = [f"{count} {_COUNTED[how]}" for how, count in counts if count]
        parts += [f"{beside} arrays of workspaces"] if beside else []
        return f"{len(places)} values in {own} storages: " + ", ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        return {name: each.as_dict() for name, each in self.functions.items()}

    def __str__(self) -> str:
        return "\n\n".join(map(str, self.functions.values())) + "\n"


_COUNTED = {
    How.OWN: "of their own",
    How.VIEW: "views",
    How.INTO: "written straight",
    How.OVER: "written over another",
    How.UPDATE: "updates of states",
    How.INSIDE: "in registers",
}


def _locals(plan: FunctionPlan) -> str:
    return f"{plan.own} storage{'s' * (plan.own != 1)} of its own"


def _where(place: ValuePlace) -> tuple[str, str, str]:
    """Return the name of the storage, the layout, and the life of a value, as text."""
    storage = "-" if place.storage is None else place.storage.name
    return storage, place.form, life_text(place.first, place.last)


def life_text(first: int, last: int) -> str:
    """Return a life as text: `2 to 5`."""
    return f"{'given' if first == BEFORE else first} to {last}"


def aligned(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return cells padded so that columns line up; the last column is unchanged."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [[*(c.ljust(w) for c, w in zip(row[:-1], widths, strict=False)), row[-1]] for row in rows]

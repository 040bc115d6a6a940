"""Storage plans: where every value of a lowered graph lies, from which step to which, and why.

    plan.functions["layer"].places[v]     v's storage, the view through which it lies there, why, and its life
    plan.functions["layer"].steps         which nodes are computed together, in order
    plan.functions["layer"].lives         each storage, from its first step to its last

Sizes are expressions of the graph's symbols, so one plan holds for all sizes; offsets in an arena
(`treadle.passes.memory.placement`) follow when sizes are seen. `PlanStorage` makes a plan, `check_storage` checks it,
backends spell it.

A block concat(linear(x, w), x) for kernels that write by strides: linear writes the first half of what concat gives,
and concat itself only moves x:

    0  linear   storage joined  [B, S, 64] of 128 apart  0 to 1  written straight to joined
    1  joined   storage joined  [B, S, 128]              0 to 2  own storage

For a library (NumPy, PyTorch), which chooses strides, both have storages of their own; linear's name is deleted after
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
"""The step at which what is given lies there: before the first one."""


@dataclass(frozen=True, eq=False)
class Step:
    """Nodes that are computed together, at the place of the last one, the root; mostly one alone.

    product  the one of them that the others finish while its elements are in registers; None: there is none
    """

    nodes: tuple[Node, ...]
    product: Node | None = None

    @property
    def root(self) -> Node:
        return self.nodes[-1]

    @property
    def chain(self) -> tuple[Node, ...]:
        """The nodes without the product, and without what unpacks blocks for one of them."""
        return tuple([node for node in self.nodes if node is not self.product and not node.op.decodes])

    @cached_property
    def inputs(self) -> tuple[Value, ...]:
        """What it reads from outside, each once, in the order in which it does."""
        inside = {value for node in self.nodes for value in node.results}
        return tuple(dict.fromkeys(v for node in self.nodes for v in node.inputs if v not in inside))


class How(Enum):
    """Why a value lies where it does; `ValuePlace.told` names what `of` is."""

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
    """Where a value lies.

    storage  None for what is in registers alone
    view     how it lies there; None where a library chooses the strides, or there is no storage
    of       the value, or the output by name, that `how` is about
    first    the step that makes it; BEFORE for what is given
    last     the last step that reads it; where it is returned, the one after all others
    written  whether its step writes it: else it lies there already, or is in registers
    """

    storage: Storage | None
    view: View | None
    how: How
    of: Value | str
    first: int
    last: int
    written: bool

    def told(self, names: Mapping[Value, str]) -> str:
        """`a view of x`, by the names of a function's values."""
        return self.how.value.format(of=f"output {self.of}" if isinstance(self.of, str) else names[self.of])

    @property
    def form(self) -> str:
        """`row-major`, `panels(16)`, or the strides; empty where nothing tells."""
        if self.storage is not None and self.storage.layout is not None:
            return str(self.storage.layout)
        if self.view is None:
            return ""
        if self.view.is_contiguous:
            return "row-major" if self.view.offset == 0 else f"row-major, from {self.view.offset} on"
        begin = "" if self.view.offset == 0 else f", from {self.view.offset} on"
        return f"strides [{', '.join(map(str, self.view.strides))}]{begin}"


@dataclass(frozen=True)
class Life:
    """A storage is written or read from step `first` to step `last`, both included."""

    storage: Storage
    first: int
    last: int


@dataclass(frozen=True)
class BetterOrder:
    """Steps do not run in program order, since they need less memory so: the peaks in bytes, at some sizes."""

    before: int
    after: int
    sizes: Mapping[str, int]

    def __str__(self) -> str:
        where = ", ".join(f"{name}={size}" for name, size in self.sizes.items())
        return f"reordered: peak {self.before:,} -> {self.after:,} bytes" + (f" at {where}" if where else "")


@dataclass(frozen=True, eq=False)
class FunctionPlan:
    """The storage of one function.

    steps      in the order in which they run
    places     of every argument, constant and result, in the order in which they come to be
    names      of the same, no two alike; a storage has the name of the value that it was made for
    lives      of every storage, in the order in which they are first needed
    results    for kernels that write by strides: the caller's storage of each output, by name; else empty
    copied     outputs that no step writes, by name: arguments, constants, outputs under a second name. They are copied
               after the last step
    reordered  what it saves that steps do not run in program order; None where they do
    reuses     for kernels that write by strides: the arguments of which the caller may give the storage for the one
               output, where they die at the call; of an entry, only those that are donated
    donated    arguments that the caller gives away: steps may write over them
    given_back  outputs by name that lie in a donated argument: the caller has that as the result
    workspaces  by step, what the call of a library needs beside its result while it runs, by name: storages of its own
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
        """The step after all others, in which outputs are handed out."""
        return len(self.steps)

    @property
    def own(self) -> int:
        """How many storages its values have that are its own."""
        beside = sum(len(each) for each in self.workspaces.values())
        return sum(life.storage.kind.is_own for life in self.lives) - beside

    def beside(self) -> list[str]:
        """A line on each step that needs a workspace: `beside attn, at step 8: scores f32[B, 12, S, S]`."""
        lines = []
        for at, arrays in self.workspaces.items():
            told = [f"{name} {view.dtype}[{', '.join(map(str, view.shape))}]" for name, view in arrays.items()]
            lines.append(f"beside {self.names[self.steps[at].root.results[0]]}, at step {at}: {', '.join(told)}")
        return lines

    def dead_after(self) -> dict[int, list[Value]]:
        """By step: what no later one reads, of what steps made and have a storage for."""
        dead: dict[int, list[Value]] = {}
        for value, place in self.places.items():
            is_state = place.how is How.UPDATE  # which has no name of its own
            if place.first != BEFORE and place.storage is not None and place.last < self.end and not is_state:
                dead.setdefault(place.last, []).append(value)
        return dead

    def rows(self) -> Iterator[tuple[Value, ValuePlace]]:
        """What is worth a line: all but constants that stand in the code as numbers."""
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
                "why": place.told(names),
            }
            for value, place in self.rows()
        ]

    def __str__(self) -> str:
        names = self.names
        shown = {value: place for value, place in self.rows() if value.kind != "parameter"}
        cells = [(names[v], str(v.type), *_where(place), place.told(names)) for v, place in shown.items()]
        lines = [f"{self.function.name}: {len(self.steps)} steps, {_locals(self)}"]
        if self.reordered is not None:
            lines[0] += f"; {self.reordered}"
        if self.reuses:
            lines[0] += f"; its result may lie over {' or '.join(names[v] for v in self.reuses)}"
        if self.donated:
            lines[0] += f"; {' and '.join(names[v] for v in self.donated)} donated"
        lines[0] += "".join(f", given back as {name}" for name in self.given_back)
        for (*row, told), value in zip(aligned(cells), shown, strict=True):
            node = value.node
            source = (describe_source(node.source, node.scope) or "") if node is not None else ""
            lines.append("  " + "  ".join([*row, told, source]).rstrip())
        lines += [f"  {line}" for line in self.beside()]
        lines += [
            f"  output {name} is copied from {names[self.function.outputs[name]]} at the end" for name in self.copied
        ]
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class StoragePlan:
    """The storage of every function that users' entries need, callees first. Prints as text, weights left out.

    strided     whether kernels read and write by strides, as views say; else a library chooses them, and gives what it
                allocates
    in_results  whether what dies before a result is written may lie where that will
    copies      of a library, whether a view that strides cannot say has a storage of its own
    """

    functions: Mapping[str, FunctionPlan]
    strided: bool
    in_results: bool
    copies: bool

    @property
    def note(self) -> str:
        """What the plan came to, on a line."""
        places = [place for each in self.functions.values() for _, place in each.rows() if place.first != BEFORE]
        counts = [(how, sum(place.how is how for place in places)) for how in _COUNTED]
        own = sum(each.own for each in self.functions.values())
        beside = sum(len(arrays) for each in self.functions.values() for arrays in each.workspaces.values())
        told = [f"{count} {_COUNTED[how]}" for how, count in counts if count]
        told += [f"{beside} arrays of workspaces"] if beside else []
        return f"{len(places)} values in {own} storages: " + ", ".join(told)

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
    """The storage, the form, the life."""
    storage = "-" if place.storage is None else place.storage.name
    return storage, place.form, life_text(place.first, place.last)


def life_text(first: int, last: int) -> str:
    """`2 to 5`"""
    return f"{'given' if first == BEFORE else first} to {last}"


def aligned(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Cells filled up so that columns line up, the last one as it is."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [[*(c.ljust(w) for c, w in zip(row[:-1], widths, strict=False)), row[-1]] for row in rows]

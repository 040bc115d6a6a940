"""The names of a step's states, and the states that store values which do not depend on the tokens. The prologue writes
these states.

Every entry of a derived graph reads the same states, so their names and types are determined here, once.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from treadle.ir.analysis.axis_tracing import joined_scope
from treadle.ir.errors import PassError
from treadle.ir.graph import Node, Value
from treadle.ir.naming import free_name
from treadle.ir.sizing.sizes import ONE, Size
from treadle.ir.types import Dim, Type
from treadle.passes.stepping.survey import Context


@dataclass(frozen=True)
class KeptState:
    """The state of one value [b, ...]: one slot per row.

    name      the state's name within its function
    type      [R, ...]; [R, 1] for a value [b]
    axis      the dimension along which the prologue appends to the state
    memory    the size of that dimension of the value, if it is known only at the call; else None
    """

    name: str
    type: Type
    axis: int
    memory: Size | None


class StepStates:
    """The names and types of the states of a step.

    slots     the number of slots of each state
    capacity  the symbol of a cache's number of positions, with which the names of other capacities begin
    """

    def __init__(self, slots: Size, capacity: str) -> None:
        self.slots, self.capacity = slots, capacity
        self.kept: dict[int, dict[Value, KeptState]] = {}
        """The values that the prologue stores for each context, by the context's id."""
        self.memories: dict[str, Size] = {}
        """The sizes that the prologue stores for each row, by name."""
        self.capacities: dict[str, Size] = {}
        """The symbols of states' sizes that a session chooses, each with the size that it bounds."""
        self._names: dict[int, dict[Hashable, str]] = {}

    def name(self, context: Context, key: Hashable, base: str) -> str:
        """Return the name of a state within a function: `base`, numbered if another state or a weight has that name."""
        names = self._names.setdefault(id(context), {})
        if key not in names:
            names[key] = free_name(base, {*names.values(), *context.function.parameters})
        return names[key]

    def name_of_call(self, context: Context, call: Node, name: str) -> str:
        """Return the name, within the caller, of a state of the called function.

        Repetitions of a shared block have one scope, but separate states. So the repetition's number is added to the
        scope.
        """
        alike = [node for node in context.function.nodes if node.op.callee is not None and node.scope == call.scope]
        scope = call.scope if len(alike) == 1 else joined_scope(call.scope, str(alike.index(call)))
        return self.name(context, (call, name), joined_scope(scope, name))

    def length_name(self, context: Context, memory: str) -> str:
        """Return the name, in an entry, of the state with each row's length along the size named `memory`."""
        return self.name(context, ("length", memory), f"{memory}_length")

    def keep(self, context: Context, value: Value) -> KeptState:
        """Return the state for a value that a step reads. Raises PassError if the value's rows or sizes do not fit into
        slots.
        """
        known = self.kept.setdefault(id(context), {})
        if value not in known:
            known[value] = self._kept(context, value)
        return known[value]

    def _kept(self, context: Context, value: Value) -> KeptState:
        where = f"{value.name}: {value.type}"
        if context.row_dim(value) != 0:
            raise PassError(
                "no step can be derived: a value that it would store does not have the rows as its first dimension",
                received=where,
                source=_line(value),
            )
        sizes = value.type.shape[1:]
        open_dims = [n for n, size in enumerate(sizes, 1) if size.constant is None]
        if len(open_dims) > 1:
            raise PassError(
                "no step can be derived: a value that it would store has two dimensions of sizes known only at a call",
                received=where,
                source=_line(value),
            )
        scope = value.node.scope if value.node is not None else ""
        name = self.name(context, value, f"{scope}.{value.name}" if scope else value.name)
        axis = open_dims[0] if open_dims else 1
        dims = [Dim.of(self.slots), *(value.type.dims[1:] or [Dim.of(ONE)])]
        memory = None
        if open_dims:
            memory = value.type.shape[axis]
            dims[axis] = Dim.of(self._capacity(memory))
        return KeptState(name, Type(value.type.dtype, tuple(dims)), axis, memory)

    def _capacity(self, size: Size) -> Size:
        """Return the size of a state that stores values of a size known only at a call: of 4*N-3, 4*C_N-3."""
        linear = size.as_linear
        if linear is None:
            symbol = f"{self.capacity}_{self.memory_name(size)}"
            self.capacities[symbol] = size
            return Size.symbol(symbol)
        symbol = f"{self.capacity}_{linear[0]}"
        self.capacities[symbol] = Size.symbol(linear[0])
        return size.substitute({linear[0]: Size.symbol(symbol)})

    def memory_name(self, size: Size) -> str:
        """Return the name of a size that the prologue stores: its symbol, or a new name if it is computed."""
        for name, known in self.memories.items():
            if known == size:
                return name
        name = free_name(size.as_symbol or "memory", self.memories)
        self.memories[name] = size
        return name


def _line(value: Value) -> str | None:
    return str(value.node.source or "") or None if value.node is not None else None

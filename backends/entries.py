"""The common base of our backends' executables: entries that are called by name, and states."""

from __future__ import annotations

from typing import Any

from treadle.backends.protocol import Entry, Outputs, Port
from treadle.backends.states import ARRAYS, Allocate, StateAccess, StateKinds, States
from treadle.ir.errors import BackendError
from treadle.ir.graph import Graph


class EntryExecutable:
    """A compiled graph with its entries. See `treadle.backends.protocol.Executable` and `StatefulExecutable`.

    If the graph has only one entry and no states, the executable itself can be called.
    """

    exact_rows = False
    captures_calls = False

    def __init__(self, graph: Graph, backend: str, allocate: Allocate, access: StateAccess = ARRAYS) -> None:
        """Store the graph as declared. The subclass fills `called` with the entries by name.

        allocate  returns an array of zeros for a state
        access    accesses parts of such arrays
        """
        self.name = graph.name
        self.state_kinds = StateKinds(graph, backend)
        self.called: dict[str, Entry] = {}
        self._allocate, self._access = allocate, access

    @property
    def entries(self) -> tuple[str, ...]:
        """The entries that can be called, in the order in which they run."""
        return tuple(self.called)

    @property
    def inputs(self) -> tuple[Port, ...]:
        """The inputs of the last entry."""
        return self.called[self.entries[-1]].inputs

    @property
    def outputs(self) -> tuple[Port, ...]:
        """The outputs of the last entry."""
        return self.called[self.entries[-1]].outputs

    def entry(self, name: str) -> Entry:
        """Return an entry. Raises BackendError if there is no entry of that name."""
        found = self.called.get(name)
        if found is None:
            raise BackendError(f"{self.name} has no entry {name!r}", hint="one of " + ", ".join(self.entries))
        return found

    def new_states(self, **sizes: int) -> States:
        """Return states filled with zeros. `sizes` are the sizes of the symbols in their types.

        Raises BackendError for a size that is missing or wrong, or if there is not enough memory.
        """
        return self.state_kinds.new(sizes, self._allocate, self._access)

    def state_bytes(self, **sizes: int) -> int:
        """Return the size in bytes of the states at these sizes. Raises BackendError for a size that is missing or
        wrong.
        """
        return self.state_kinds.nbytes(sizes)

    def __call__(self, /, **given: Any) -> Outputs:
        """Run the only entry on arrays by name.

        Raises BackendError if the arrays do not match `inputs`, if a node fails, or if the graph has states or several
        entries.
        """
        if len(self.called) > 1 or self.state_kinds.ports:
            entry = self.entries[-1]
            states = f"{self.name}.new_states(...)" if self.state_kinds.ports else ""
            raise BackendError(
                f"{self.name} is called by its entries",
                received=f"entries {', '.join(self.entries)}; {len(self.state_kinds.ports)} states",
                hint=f"exe.entry({entry!r})({states and 'states, '}...)",
            )
        (entry_called,) = self.called.values()
        return entry_called(**given)

    def __repr__(self) -> str:
        takes, gives = (", ".join(map(str, p)) for p in (self.inputs, self.outputs))
        return f"<executable {self.name}({takes}) -> {gives}>"

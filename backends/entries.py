"""What executables of all our backends have in common: entries that are called by name, and states to work on."""

from __future__ import annotations

from typing import Any

from treadle.backends.protocol import Entry, Outputs, Port
from treadle.backends.states import Allocate, StateKinds, States
from treadle.ir.errors import BackendError
from treadle.ir.graph import Graph


class EntryExecutable:
    """A compiled graph by its entries. See `treadle.backends.protocol.Executable` and `StatefulExecutable`.

    A graph whose only entry has no states is called itself, without an entry's name.
    """

    exact_rows = False

    def __init__(self, graph: Graph, backend: str, allocate: Allocate) -> None:
        """graph as it was declared; `called` is to be filled with its entries by name."""
        self.name = graph.name
        self.state_kinds = StateKinds(graph, backend)
        self.called: dict[str, Entry] = {}
        self._allocate = allocate

    @property
    def entries(self) -> tuple[str, ...]:
        """The entries that can be called, in the order in which they run."""
        return tuple(self.called)

    @property
    def inputs(self) -> tuple[Port, ...]:
        """What a call of the last entry takes."""
        return self.called[self.entries[-1]].inputs

    @property
    def outputs(self) -> tuple[Port, ...]:
        """What a call of the last entry answers."""
        return self.called[self.entries[-1]].outputs

    def entry(self, name: str) -> Entry:
        """An entry to be called. Raises BackendError where there is none of that name."""
        found = self.called.get(name)
        if found is None:
            raise BackendError(f"{self.name} has no entry {name!r}", hint="one of " + ", ".join(self.entries))
        return found

    def new_states(self, **sizes: int) -> States:
        """States of zeros, where the symbols in their types have these sizes.

        Raises BackendError for a size that is missing or wrong, or where there is not so much memory.
        """
        return self.state_kinds.new(sizes, self._allocate)

    def state_bytes(self, **sizes: int) -> int:
        """The bytes that such states take. Raises BackendError for a size that is missing or wrong."""
        return self.state_kinds.nbytes(sizes)

    def __call__(self, /, **given: Any) -> Outputs:
        """Run the only entry on arrays by name.

        Raises BackendError where they are not what `inputs` says, where a node fails, or where the graph has states or
        several entries.
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

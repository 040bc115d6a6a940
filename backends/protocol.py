"""The backend protocol: a backend lowers a graph, and returns an executable that runs it.

backend = find_backend("numpy")
exe = backend.compile(graph, Target("cpu"), weights)
exe(tokens=ids)["logits"]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from treadle.ir.graph import Graph, Node, Value
from treadle.ir.target import Target
from treadle.ir.types import DType, Type

if TYPE_CHECKING:
    from treadle.backends.states import States


@dataclass(frozen=True)
class Port:
    """An input or an output of an executable: its name and its type."""

    name: str
    type: Type

    @property
    def dtype(self) -> DType:
        """The element type."""
        return self.type.dtype

    @property
    def axes(self) -> tuple[str, ...]:
        """The dimensions as strings, outermost first: `("B", "S", "768")`."""
        return tuple(str(dim) for dim in self.type.dims)

    def __str__(self) -> str:
        return f"{self.name}: {self.type}"


class Outputs(dict[str, Any]):
    """The results of a call: arrays by name, read as `out["logits"]` or `out.logits`."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(self._lacks(name))

    def __missing__(self, name: str) -> Any:
        raise KeyError(self._lacks(name))

    def _lacks(self, name: str) -> str:
        return f"no output {name!r}; there are {', '.join(self)}"


class Executable(Protocol):
    """A compiled graph. One executable serves every size of the symbolic axes.

    inputs   the inputs of a call, by name
    outputs  the outputs of a call, by name
    source   the generated code

    An executable may also have `notes`: lines that name slow steps and the reasons. `compile` adds them to the log.
    """

    @property
    def inputs(self) -> tuple[Port, ...]: ...

    @property
    def outputs(self) -> tuple[Port, ...]: ...

    @property
    def source(self) -> str: ...

    def __call__(self, /, **arrays: Any) -> Outputs:
        """Run on arrays by name. Raises BackendError if they do not match `inputs`.

        An array of another dtype of the same kind is converted if no value can change (int32 for i64, float16 for f32).
        A float64 array is rounded to f32.
        Python numbers and lists, which have no dtype, are converted if every number is representable.
        """
        ...


class Entry(Protocol):
    """An entry of a compiled graph.

    inputs   the inputs of a call in addition to states, by name
    outputs  the outputs of a call, by name
    """

    @property
    def inputs(self) -> tuple[Port, ...]: ...

    @property
    def outputs(self) -> tuple[Port, ...]: ...

    def __call__(self, states: States | None = None, /, **arrays: Any) -> Outputs:
        """Run on arrays by name and on states, which are updated in place. States are optional for a graph without
        states.

        Raises BackendError if the arguments do not match. After a call that fails, the states are undefined, except
        that rows that the failing node did not name are unchanged.
        """
        ...


@runtime_checkable
class StatefulExecutable(Protocol):
    """The additional interface of an executable of a graph with states or several entries. Other executables refuse
    such graphs.

    An executable may also have `exact_rows`: True if the bits of a row's results depend on that row alone, not on the
    other rows of a call or on the split of the row's tokens into calls. And it may have `captures_calls`: True if calls
    are captured for their sizes and replayed, so that few numbers of rows should occur.
    """

    @property
    def entries(self) -> tuple[str, ...]:
        """The entries that can be called, in the order in which they run."""
        ...

    def entry(self, name: str) -> Entry:
        """Return an entry. Raises BackendError if there is no entry of that name."""
        ...

    def new_states(self, **sizes: int) -> States:
        """Return states filled with zeros, for these sizes of the symbols. Raises BackendError for a wrong size."""
        ...

    def state_bytes(self, **sizes: int) -> int:
        """Return the size in bytes of the states at these sizes."""
        ...


@runtime_checkable
class Backend(Protocol):
    """A backend. Third parties register a backend under the entry point group `treadle.backends`."""

    @property
    def name(self) -> str: ...

    def available(self) -> str | None:
        """Return None if the backend can be used here, else the reason."""
        ...

    def supports(self, node: Node) -> str | None:
        """Return None if the backend can run this node, else the reason. For a call, the nodes of the called function
        are not checked.
        """
        ...

    def compile(self, graph: Graph, target: Target, weights: Mapping[str, Any]) -> Executable:
        """Lower a graph for a target, with its weights by name.

        Raises BackendError if the backend is not available, the target is not one of its own, a node is refused (all
        refusals listed), or a weight is missing or does not fit.
        """
        ...


def ports(values: Mapping[str, Value]) -> tuple[Port, ...]:
    """Return named values as ports."""
    return tuple(Port(name, value.type) for name, value in values.items())

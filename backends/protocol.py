"""The backend protocol: what lowers a graph and runs it, and what it gives back.

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
        """Each dimension as text, outermost first: `("B", "S", "768")`."""
        return tuple(str(dim) for dim in self.type.dims)

    def __str__(self) -> str:
        return f"{self.name}: {self.type}"


class Outputs(dict[str, Any]):
    """What a call answers: arrays by name, as `out["logits"]` or `out.logits`."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"no output {name!r}; there are {', '.join(self)}")


class Executable(Protocol):
    """A compiled graph. One executable serves every size of the symbolic axes.

    inputs   what a call takes, by name
    outputs  what a call answers, by name
    source   the code that runs, for a person to read

    It may have `notes` as well, lines on what it runs slowly and why: `compile` puts them into the log.
    """

    @property
    def inputs(self) -> tuple[Port, ...]: ...

    @property
    def outputs(self) -> tuple[Port, ...]: ...

    @property
    def source(self) -> str: ...

    def __call__(self, /, **arrays: Any) -> Outputs:
        """Run on arrays by name. Raises BackendError where they are not what `inputs` says.

        An array of another dtype of the same kind is converted where no value could change (int32 for i64, float16 for
        f32), and so are Python numbers and lists, which carry no dtype, where every number fits.
        """
        ...


class Entry(Protocol):
    """An entry of a compiled graph, to be called.

    inputs   what a call takes beside states, by name
    outputs  what a call answers, by name
    """

    @property
    def inputs(self) -> tuple[Port, ...]: ...

    @property
    def outputs(self) -> tuple[Port, ...]: ...

    def __call__(self, states: States | None = None, /, **arrays: Any) -> Outputs:
        """Run on states, which it updates in place, and arrays by name. States may be left out where there are none.

        Raises BackendError where they are not what it takes. What states are after a call that fails is not said: rows
        that the failing node did not name are as they were.
        """
        ...


@runtime_checkable
class StatefulExecutable(Protocol):
    """What an executable of a graph with states or several entries offers beside; the others are refused there.

    It may have `exact_rows` as well: whether a row's bits depend on that row alone, on no other row of a call, and not
    on how its tokens are cut into calls.
    """

    @property
    def entries(self) -> tuple[str, ...]:
        """The entries that can be called, in the order in which they run."""
        ...

    def entry(self, name: str) -> Entry:
        """An entry to be called. Raises BackendError where there is none of that name."""
        ...

    def new_states(self, **sizes: int) -> States:
        """States of zeros, where the symbols in their types have these sizes. Raises BackendError for a wrong size."""
        ...

    def state_bytes(self, **sizes: int) -> int:
        """The bytes that such states take."""
        ...


@runtime_checkable
class Backend(Protocol):
    """A way to run graphs. Third parties register theirs under the entry point group `treadle.backends`."""

    @property
    def name(self) -> str: ...

    def available(self) -> str | None:
        """None if it can be used here, else the reason why not."""
        ...

    def supports(self, node: Node) -> str | None:
        """None if it can run this node, else the reason why not. Says nothing about a called function's nodes."""
        ...

    def compile(self, graph: Graph, target: Target, weights: Mapping[str, Any]) -> Executable:
        """Lower a graph for a target, with its weights by name.

        Raises BackendError where the backend is not available, the target is not one of its own, a node is refused
        (all refusals listed), or a weight is missing or does not fit.
        """
        ...


def ports(values: Mapping[str, Value]) -> tuple[Port, ...]:
    """Named values as ports."""
    return tuple(Port(name, value.type) for name, value in values.items())

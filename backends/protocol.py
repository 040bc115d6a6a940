"""The backend protocol: what lowers a graph and runs it, and what it gives back.

backend = find_backend("numpy")
exe = backend.compile(graph, Target("cpu"), weights)
exe(tokens=ids)["logits"]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from treadle.ir.graph import Graph, Node, Value
from treadle.ir.target import Target
from treadle.ir.types import DType, Type


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

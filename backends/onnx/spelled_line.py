"""One of our nodes for the ONNX code generator; its operands are tensors of the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from treadle.ir.graph import Graph, Node
from treadle.ir.types import DType
from treadle.passes.lowering.legalize import legalized

if TYPE_CHECKING:
    from treadle.backends.onnx.writer import OnnxWriter


@dataclass(eq=False)
class Tensor:
    """A value of the ONNX graph. Its name may be changed until the graph is written out."""

    name: str
    dtype: DType


@dataclass(eq=False)
class OnnxNode:
    """An operator applied to tensors; None stands for an optional input that is left out.

    line   the user's line; empty if unknown
    scope  the scope in the model; empty outside of all scopes
    """

    op_type: str
    name: str
    inputs: tuple[Tensor | None, ...]
    outputs: tuple[Tensor, ...]
    attributes: Mapping[str, Any]
    line: str = ""
    scope: str = ""


@dataclass(frozen=True)
class OnnxLine:
    """One of our nodes to be emitted: `line.x` is the tensor of the operand x.

    w         the writer; `line.add` is the method of the writer
    node, op  our node, and its op
    """

    w: OnnxWriter
    node: Node
    tensors: Sequence[Tensor | None]
    op: Any = field(init=False)
    names: list[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "op", self.node.op)
        object.__setattr__(self, "names", self.node.op.operand_names(len(self.node.operands)))

    def __getattr__(self, name: str) -> Any:
        """Return an operand that is present, or a method of the writer."""
        if name in self.__dict__.get("names", ()):
            found = self.tensors[self.names.index(name)]
            assert found is not None, name
            return found
        raise AttributeError(name)

    @property
    def add(self) -> Any:
        return self.w.add

    def expanded(self, graph: Graph, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Emit the main function of a graph, applied to these tensors, in place of the node. Return the outputs by
        name.
        """
        main = legalized(graph, self.w.keeps).main
        held = dict(zip(main.inputs, tensors, strict=True))
        self.w.write(main, held)
        return {name: self.w.tensor(value, held) for name, value in main.outputs.items()}

    @property
    def present(self) -> list[Tensor]:
        """The operands that are present, in order."""
        return [t for t in self.tensors if t is not None]

    def has(self, name: str) -> bool:
        """Return True if an optional operand is present."""
        return self.tensors[self.names.index(name)] is not None

    def type(self, name: str) -> Any:
        """Return the type of an operand that is present."""
        value = self.node.operands[self.names.index(name)]
        assert value is not None
        return value.type

    @property
    def result(self) -> Any:
        """The type of the first result."""
        return self.node.results[0].type


def plain(text: str) -> str:
    """Return a name as valid text for a file. A name may contain any characters, even half a surrogate pair."""
    return text.encode("utf-8", "replace").decode("utf-8")

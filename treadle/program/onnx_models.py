"""An ONNX file with its configuration: imported at once, or for each value of an input that determines shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from treadle.files.shown_names import printable
from treadle.frontends.onnx_import.errors import StaticArgumentNeeded
from treadle.frontends.onnx_import.file import OnnxFile
from treadle.ir.errors import Hint, UsageError
from treadle.ir.graph import Graph
from treadle.ir.transforms.widening import widen_graph
from treadle.ir.types import DType
from treadle.program.resolved import Resolved

if TYPE_CHECKING:
    from treadle.program.source import ModelSource


@dataclass(frozen=True)
class OpenedOnnx:
    """A parsed ONNX file with its configuration.

    source  the opened model
    static  values of inputs that determine shapes
    dims    sizes, or other names, of axes
    narrow  dtypes that are widened to f32
    outputs outputs to return; None: all
    """

    source: ModelSource
    file: OnnxFile
    static: Mapping[str, Any]
    dims: Mapping[str, Any]
    narrow: frozenset[DType] = frozenset()
    outputs: Sequence[str] | None = None

    @classmethod
    def of(cls, source: ModelSource, file: OnnxFile, config: Mapping[str, Any]) -> OpenedOnnx:
        """Configure a file: a key of config is the name of an input with its value, or of an axis."""
        known = {value.name for value in file.proto.graph.input}
        static = {name: value for name, value in config.items() if name in known}
        return cls(source, file, static, {name: value for name, value in config.items() if name not in static})

    def inputs(self) -> Graph:
        """Return a graph of the inputs alone, including inputs that determine shapes but not inputs with a given
        value.
        """
        from treadle.frontends.onnx_import.importer import declared_inputs

        return widen_graph(declared_inputs(self.file, static=self.static, dims=self.dims), self.narrow)

    def refuse_unknown(self, inputs: Sequence[str]) -> None:
        """Raise UsageError if one of these inputs is not an input of the model, which always has all its inputs."""
        takes = [value.name for value in self.inputs().main.inputs]
        unknown = [name for name in inputs if name not in takes]
        if unknown:
            received = ", ".join(map(printable, unknown))
            hint = "its inputs are " + ", ".join(map(printable, takes))
            raise UsageError(
                "an ONNX file has no optional inputs", received=received, within=self.file.shown, hint=hint
            )

    def resolve(self, static: Mapping[str, Any] | None = None) -> Resolved:
        """Import the model with these values of inputs and the configuration. Raises as `import_onnx` does."""
        from treadle.frontends.onnx_import.importer import import_opened

        made = import_opened(self.file, static={**self.static, **(static or {})}, dims=self.dims)
        found = Resolved(made.graph.name, made.graph, self.source, None, made.weights)
        return found.widened(self.narrow).giving(self.outputs)


class StaticInputNeeded(StaticArgumentNeeded):
    """The configuration lacks the value of an input that determines shapes.

    opened  the file, which can be imported for each value
    """

    opened: OpenedOnnx

    @classmethod
    def of(cls, error: StaticArgumentNeeded, opened: OpenedOnnx) -> StaticInputNeeded:
        """Return the error for a file that was imported without this value."""
        hint = Hint(f"{error.argument}=VALUE as an argument", f"--set {error.argument}=VALUE")
        needed = cls(error.what, received=error.received, within=error.within, hint=hint)
        needed.argument, needed.opened = error.argument, opened
        return needed

"""An ONNX file, and the files of its tokenizer, if they are next to it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from treadle.files.shown_names import printable
from treadle.frontends.model_folder import ModelFolder
from treadle.frontends.onnx_import.errors import StaticArgumentNeeded
from treadle.frontends.onnx_import.file import OnnxFile
from treadle.frontends.text import TextTokenizer
from treadle.frontends.vocabularies.folder_vocabulary import VOCABULARIES
from treadle.ir.errors import Hint, UsageError
from treadle.ir.graph import Graph
from treadle.ir.transforms.encoded_weights import decode_parameters, decode_weights
from treadle.ir.transforms.widening import widen_graph
from treadle.ir.types import DType
from treadle.models.checkpoints import ReadModel, ReadOptions
from treadle.program.forms.folder_form import config_positions
from treadle.program.forms.model_form import OTHER_TOKENIZER, Kind, ModelForm
from treadle.program.trained_folders import CONFIG


class OnnxForm(ModelForm):
    """An ONNX file. A key of the configuration is the name of an input to fix at a value, or of an axis.

    Exporters write tokenizer.json and config.json next to the file.
    """

    kind: Kind = "onnx"

    @cached_property
    def file(self) -> OnnxFile:
        return OnnxFile.open(self.place, self.limits)

    @cached_property
    def folder(self) -> ModelFolder:
        return ModelFolder.find(self.place.parent)

    def check(self) -> None:
        """Do nothing: the file is read completely when it is opened."""

    def without_tokenizer(self) -> UsageError:
        """Return the error for a file without a tokenizer next to it, where a task needs one."""
        return UsageError(f"{printable(self.label)} is an ONNX file, without a tokenizer", hint=OTHER_TOKENIZER)

    @property
    def has_tokenizer(self) -> bool:
        """True if the files of a tokenizer are next to the file."""
        return any(map(self.folder.has, VOCABULARIES))

    def tokenizer(self, max_tokens: int | None, context: int | None, cut: bool) -> TextTokenizer:
        if not self.has_tokenizer:
            raise self.without_tokenizer()
        return super().tokenizer(max_tokens, context, cut)

    @property
    def positions(self) -> int | None:
        return config_positions(self.config) if self.folder.has(CONFIG) else None

    def inputs(self, narrow: frozenset[DType], config: Mapping[str, Any]) -> Graph:
        from treadle.frontends.onnx_import.importer import declared_inputs

        self.file.hold_weights()
        return widen_graph(declared_inputs(self.file, **self._values(config)), narrow)

    def _values(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Split a configuration into the values of inputs that determine shapes, and the sizes or new names of axes."""
        known = {value.name for value in self.file.proto.graph.input}
        static = {name: value for name, value in config.items() if name in known}
        return {"static": static, "dims": {name: value for name, value in config.items() if name not in static}}

    def read(self, options: ReadOptions) -> ReadModel:
        from treadle.frontends.onnx_import.importer import declared_inputs, import_opened

        values = self._values(options.config)
        if options.inputs:  # an ONNX model always has all of its inputs
            takes = [value.name for value in declared_inputs(self.file, **values).main.inputs]
            unknown = [name for name in options.inputs if name not in (*takes, *values["static"])]
            if unknown:
                received, hint = (", ".join(map(printable, names)) for names in (unknown, takes))
                what = "an ONNX file has no optional inputs"
                raise UsageError(what, received=received, within=self.place.name, hint=f"one of its inputs: {hint}")
        try:
            made = import_opened(self.file, **values)
        except StaticArgumentNeeded as error:
            error.hint = Hint(f"{error.argument}=VALUE as an argument", f"--set {error.argument}=VALUE")
            raise
        graph, weights = made.graph, made.weights
        if not options.keep_blocks and any(v.type.encoding is not None for v in graph.parameters.values()):
            graph, weights = decode_parameters(graph), decode_weights(graph, weights)
        return ReadModel(graph.name, graph, None, weights, notes=tuple(made.notes.decoded))

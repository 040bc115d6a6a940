"""`ModelSource`: MODEL, the argument of `compile` and of the commands, found and opened once.

    file.py:function    a declaration in a Python file, which is imported
    path/to/folder      config.json and weights, or model.bin in CTranslate2's layout
    path/to/file.gguf   metadata and weights in one file
    gpt2                a family of the zoo, with the default configuration of its declaration
    minilm              a fetched model, see `treadle.fetch`

An existing path takes precedence over a name of the zoo, which takes precedence over the name of a fetched model. The
weights of a declaration may be in a folder: `ModelSource.open("file.py:function", weights="trained")`.

    source = ModelSource.open("smollm2")
    writer = TextWriter.open(source)        # its graph, weights, tokenizer and chat template: each file is opened once
    exe = compile(source, quantize="int4")  # the same files; raises CheckpointError if one has changed
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from treadle.files.shown_names import printable
from treadle.frontends.binding import Table
from treadle.frontends.ctranslate2_file import CTranslate2File, find_ctranslate2
from treadle.frontends.declaration_files import load_declaration
from treadle.frontends.declarations import Model
from treadle.frontends.gguf_file import GGUFFile
from treadle.frontends.huggingface import Checkpoint, ModelFolder, open_checkpoint, open_weights
from treadle.frontends.onnx_import.errors import StaticArgumentNeeded
from treadle.frontends.onnx_import.file import OnnxFile
from treadle.frontends.quantized.quantized_checkpoint import open_quantized
from treadle.frontends.text import TextTokenizer, folder_chat_template
from treadle.frontends.torch_export.model import TorchModel
from treadle.frontends.vocabularies.gguf_tokenizer import gguf_chat_template, gguf_end_tokens, gguf_text_tokenizer
from treadle.ir.errors import Hint, UsageError
from treadle.ir.graph import Graph
from treadle.ir.transforms.widening import narrow_dtypes, widen_graph
from treadle.ir.types import DType
from treadle.models.checkpoints import (
    ReadModel,
    ReadOptions,
    read_checkpoint,
    read_ctranslate2,
    read_declaration,
    read_gguf_weights,
)
from treadle.models.family import Family, ReadConfig
from treadle.models.registry import family_names, family_of, find_family, read_gguf
from treadle.program.places import GGUF_SUFFIX, ONNX_SUFFIX, find_place, is_fetched, refuse_object
from treadle.program.resolved import Resolved

Limits = Mapping[str, int] | None

Kind = Literal["graph", "declaration", "safetensors", "ctranslate2", "gguf", "onnx"]

BLOCKS = "blocks"
"""The value of `widen` that decodes the blocks of a GGUF file."""


class ModelSource:
    """A model, found and opened once: its graph, its weights (not yet read), its configuration and its text files.

    label   MODEL in messages: the name or path that the user gave, or the declaration's name
    path    the model's folder or file; None for a declaration or a graph without weights in files
    limits  limits on the contents of files
    kind    the form of the model

    Each file is opened once, when it is first needed. If a file has changed when another one is opened, or when its
    weights are read, CheckpointError is raised.
    """

    kind: Kind

    def __init__(self, label: str, path: Path | None, limits: Limits = None) -> None:
        self.label, self.path, self.limits = label, path, limits

    @staticmethod
    def open(model: AnyModel, *, weights: str | Path | None = None, limits: Limits = None) -> ModelSource:
        """Find the model that MODEL names. If it is a source, return it unchanged.

        weights  for a declaration, the folder or the .safetensors file that holds its weights under their own names
        limits   limits on what a file may contain: {"tensors": 1_000_000}

        Raises UsageError if there is no such model. Files are opened, and their errors raised, when they are needed.
        """
        if isinstance(model, ModelSource):
            if weights is not None or limits not in (None, model.limits):
                what = "weights" if weights is not None else "limits"
                raise UsageError(f"{what} of an opened model are chosen when it is opened", received=model.label)
            return model
        given: object = limits
        if given is not None and not isinstance(given, Mapping):
            what, hint = "limits of a model must be a mapping by name", '{"tensors": 1_000_000}'
            raise UsageError(what, received=type(given).__name__, hint=hint)
        text = str(model) if isinstance(model, str | Path) else ""
        path, colon, function = text.rpartition(":")
        in_python = bool(colon) and path.endswith(".py")
        declared = isinstance(model, Model) or in_python or (text in family_names() and not Path(text).exists())
        if limits is not None and weights is None and (declared or not text):
            raise UsageError(
                "limits apply to a model that is read from a file",
                received=text or f"a {type(model).__name__}",
                hint="leave it out",
            )
        if weights is not None and not declared:
            raise UsageError(
                "only a declaration takes its weights from a folder",
                received=text or f"a {type(model).__name__}",
                hint="file.py:function, or a family of the zoo",
            )
        if isinstance(model, Model):
            return _Declared(model.name, model.name, model, weights, limits)
        if isinstance(model, Graph | TorchModel):
            return _Given(model)
        if not isinstance(model, str | Path):
            raise refuse_object(model)
        if in_python:
            loaded = load_declaration(Path(path), function)
            return _Declared(text, loaded.name, loaded, weights, limits)
        if declared:
            return _Declared(text, text, find_family(text).model, weights, limits)
        place = find_place(text)
        kind = {GGUF_SUFFIX: _GGUF, ONNX_SUFFIX: _Onnx}.get("" if place.is_dir() else place.suffix, _Folder)
        return kind(text, place, limits)

    def resolve(
        self,
        *,
        inputs: Sequence[str] | None = None,
        outputs: Sequence[str] | None = None,
        widen: str | Iterable[str] = (),
        deferred: bool = False,
        config: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> Resolved:
        """Trace the model, and bind its weights. May be called several times, with different arguments.

        inputs   optional inputs of the declaration to include
        outputs  outputs to return, or parts of outputs (`treadle.ir.transforms.chosen_outputs`); None: all
        widen    narrow dtypes, "bf16" or "f16", whose values become f32 (`treadle.ir.transforms.widening`); "blocks":
                 weights that a GGUF file stores in blocks are decoded to f32 when they are read
        deferred True if weights of a safetensors or GGUF file are converted only when a part of them is read
        config   configuration that overrides the declaration's or the checkpoint's; `more` is the same, as keywords

        Raises UsageError for an unknown option, FrontendError or CheckpointError if the model cannot be read,
        StaticArgumentNeeded for an ONNX file with an input that determines shapes and has no value in config.
        """
        names = [widen] if isinstance(widen, str) else list(widen)
        config = {**more, **(config or {})}
        found = self._read(ReadOptions(inputs, config, BLOCKS not in names, deferred)).widened(_narrow(names))
        if is_fetched(self.label):
            found.graph.name = self.label  # replaces the name of its family
            found = replace(found, name=self.label)
        return Resolved(**vars(found.giving(outputs)), source=self)

    def check(self) -> None:
        """Raise CheckpointError if a file has changed since it was opened."""
        if self.path is not None and self.kind != "onnx":  # an ONNX file is read completely when it is opened
            self.folder.check()

    def inputs(self, widen: str | Iterable[str], config: Mapping[str, Any]) -> Graph:
        """Return a graph that has only the inputs of an ONNX model. Inputs that determine shapes are included; inputs
        with a value in config are not. The weights are then read only once, for all values of these inputs.
        """
        raise NotImplementedError

    def _read(self, options: ReadOptions) -> ReadModel:
        raise NotImplementedError

    # -- the files next to the weights -----------------------------------------------------------------------------

    @property
    def place(self) -> Path:
        """The model's folder or file. Raises UsageError for a declaration or a graph, which has none."""
        if self.path is None:
            of_zoo = " of the zoo" if self.label in family_names() else ""
            raise UsageError(
                f"{printable(self.label)} is a {self.kind}{of_zoo}, without weights",
                hint="a folder with a checkpoint of it, or a fetched model",
            )
        return self.path

    @cached_property
    def folder(self) -> ModelFolder:
        """The model's folder, which opens each file once. Raises UsageError as `place` does, CheckpointError for a
        file.
        """
        return ModelFolder.find(self.place, None if self.place.is_file() else self.limits)

    @property
    def config(self) -> Mapping[str, Any]:
        """The contents of config.json. Raises CheckpointError if the file is missing or damaged."""
        return self.folder.config

    def tokenizer(
        self, *, max_tokens: int | None = None, context: int | None = None, cut: bool = True
    ) -> TextTokenizer:
        """Return the model's tokenizer: see `TextTokenizer.open`. If the model is not supported, that error is raised
        before any error of the tokenizer.
        """
        self._refuse_unsupported()
        return TextTokenizer.open(self.folder, max_tokens=max_tokens, context=context, cut=cut)

    @property
    def chat_template(self) -> str | None:
        """The model's chat template; None if it has none."""
        return folder_chat_template(self.folder)

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """The ids of the tokens that end a text, used if a model has no generation settings."""
        return ()

    def _refuse_unsupported(self) -> None:
        """Raise CheckpointError for a model that no family reads."""

    def __str__(self) -> str:
        return self.label

    def __repr__(self) -> str:
        return f"ModelSource({self.label!r})"


class _Given(ModelSource):
    """A graph, or an imported module with its weights."""

    kind = "graph"

    def __init__(self, model: Graph | TorchModel) -> None:
        super().__init__(model.name, None)
        self.model = model

    def _read(self, options: ReadOptions) -> ReadModel:
        if options.config or options.inputs:
            received = ", ".join([*options.config, *(options.inputs or ())])
            raise UsageError("a graph takes no configuration", received=received)
        model = self.model
        if isinstance(model, TorchModel):
            return ReadModel(model.name, model.graph, None, model.weights, learned=model.learned)
        return ReadModel(model.name, model)


class _Declared(ModelSource):
    """A declaration, with initial values or with weights in a folder."""

    kind = "declaration"

    def __init__(self, label: str, name: str, model: Model, weights: str | Path | None, limits: Limits) -> None:
        super().__init__(label, None if weights is None else Path(weights), limits)
        self.model, self.name = model, name

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return open_weights(self.place, self.limits)

    @cached_property
    def folder(self) -> ModelFolder:
        return self.checkpoint.folder

    def _read(self, options: ReadOptions) -> ReadModel:
        weights = None if self.path is None else self.checkpoint
        return read_declaration(self.name, self.model, weights, options)


class _Folder(ModelSource):
    """A folder with config.json and safetensors files, or a folder in CTranslate2's layout."""

    @cached_property
    def converted(self) -> CTranslate2File | None:
        return find_ctranslate2(self.folder)

    @property
    def kind(self) -> Kind:  # type: ignore[override]
        return "safetensors" if self.converted is None else "ctranslate2"

    @cached_property
    def meaning(self) -> tuple[Family, ReadConfig]:
        family = family_of(self.config)
        return family, family.read(self.config)

    @property
    def config(self) -> Mapping[str, Any]:
        return open_checkpoint(self.folder).config

    def _refuse_unsupported(self) -> None:
        if self.converted is None:
            self.meaning  # noqa: B018
            open_quantized(open_checkpoint(self.folder))

    def _read(self, options: ReadOptions) -> ReadModel:
        if self.converted is not None:
            return read_ctranslate2(self.converted, options)
        return read_checkpoint(open_checkpoint(self.folder), *self.meaning, options)


class _GGUF(ModelSource):
    """A GGUF file."""

    kind = "gguf"

    @cached_property
    def file(self) -> GGUFFile:
        return GGUFFile.open(self.place, self.limits)

    @cached_property
    def meaning(self) -> tuple[Model, Table]:
        return read_gguf(self.file)

    def check(self) -> None:
        if "file" in vars(self):
            self.file.file.check()

    def tokenizer(
        self, *, max_tokens: int | None = None, context: int | None = None, cut: bool = True
    ) -> TextTokenizer:
        self.meaning  # noqa: B018 - an unsupported model is refused first
        most = min((n for n in (max_tokens, context) if n is not None), default=None) if cut else None
        return gguf_text_tokenizer(self.file, max_tokens=most)

    @property
    def chat_template(self) -> str | None:
        return gguf_chat_template(self.file)

    @property
    def end_tokens(self) -> tuple[int, ...]:
        return gguf_end_tokens(self.file)

    def _read(self, options: ReadOptions) -> ReadModel:
        return read_gguf_weights(self.file, *self.meaning, options)


class _Onnx(ModelSource):
    """An ONNX file. A key of the configuration is the name of an input to fix at a value, or of an axis."""

    kind = "onnx"

    @cached_property
    def file(self) -> OnnxFile:
        return OnnxFile.open(self.place, self.limits)

    def inputs(self, widen: str | Iterable[str], config: Mapping[str, Any]) -> Graph:
        from treadle.frontends.onnx_import.importer import declared_inputs

        self.file.hold_weights()
        return widen_graph(declared_inputs(self.file, **self._values(config)), _narrow(widen))

    def _values(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Split a configuration into the values of inputs that determine shapes, and the sizes or new names of axes."""
        known = {value.name for value in self.file.proto.graph.input}
        static = {name: value for name, value in config.items() if name in known}
        return {"static": static, "dims": {name: value for name, value in config.items() if name not in static}}

    def _read(self, options: ReadOptions) -> ReadModel:
        from treadle.frontends.onnx_import.importer import declared_inputs, import_opened

        values = self._values(options.config)
        if options.inputs:  # an ONNX model always has all of its inputs
            takes = [value.name for value in declared_inputs(self.file, **values).main.inputs]
            unknown = [name for name in options.inputs if name not in (*takes, *values["static"])]
            if unknown:
                received, hint = (", ".join(map(printable, names)) for names in (unknown, takes))
                what = "an ONNX file has no optional inputs"
                raise UsageError(what, received=received, within=self.place.name, hint=f"its inputs are {hint}")
        try:
            made = import_opened(self.file, **values)
        except StaticArgumentNeeded as error:
            error.hint = Hint(f"{error.argument}=VALUE as an argument", f"--set {error.argument}=VALUE")
            raise
        return ReadModel(made.graph.name, made.graph, None, made.weights)


AnyModel = Model | Graph | TorchModel | str | Path | ModelSource
"""The argument MODEL of every function that opens one."""


def _narrow(widen: str | Iterable[str]) -> frozenset[DType]:
    """Return the dtypes that become f32. Raises UsageError for an unknown dtype name."""
    names = [widen] if isinstance(widen, str) else widen
    return narrow_dtypes([name for name in names if name != BLOCKS], also=[BLOCKS])

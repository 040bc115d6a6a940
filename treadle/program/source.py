"""`ModelSource`: MODEL, the argument of `compile` and of the commands, found and opened once.

    file.py:function    a declaration in a Python file, which is imported
    path/to/folder      config.json and weights, or model.bin in CTranslate2's layout
    path/to/file.gguf   metadata and weights in one file; an image encoder next to it, mmproj*.gguf, belongs to it
    gpt2                a family of the zoo, with the default configuration of its declaration
    minilm              a fetched model, see `treadle.fetch`
    organization/name   a model of the Hugging Face hub in the user's cache, see `treadle.hub_models`; also hf:NAME

    out                 weights of a declaration, in a folder that training wrote (`treadle.program.trained_folders`)
    model.treadle       a compiled model, for its step and its tokenizer

An existing path takes precedence over a name of the zoo, which takes precedence over the name of a fetched model. The
weights of a declaration may be in a folder: `ModelSource.open("file.py:function", weights="trained")`.

    source = ModelSource.open("smollm2")
    writer = TextWriter.open(source)        # its graph, weights, tokenizer and chat template: each file is opened once
    exe = compile(source, quantize="int4")  # the same files; raises CheckpointError if one has changed
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from treadle.artifact_reading import Artifact, open_artifact
from treadle.files.shown_names import printable, shown_path
from treadle.frontends.ctranslate2_file import CTranslate2File, find_ctranslate2
from treadle.frontends.declaration_files import load_declaration, python_file
from treadle.frontends.declarations import Model
from treadle.frontends.gguf_file import GGUFFile
from treadle.frontends.huggingface import Checkpoint, MemoryFolder, ModelFolder, open_checkpoint, open_weights
from treadle.frontends.onnx_import.errors import StaticArgumentNeeded
from treadle.frontends.onnx_import.file import OnnxFile
from treadle.frontends.quantized.quantized_checkpoint import open_quantized
from treadle.frontends.text import VOCABULARIES, TextTokenizer, folder_chat_template, read_text_files
from treadle.frontends.torch_export.model import TorchModel
from treadle.frontends.vocabularies.gguf_tokenizer import gguf_chat_template, gguf_end_tokens, gguf_text_tokenizer
from treadle.ir.errors import CheckpointError, Hint, UsageError
from treadle.ir.graph import Graph
from treadle.ir.transforms.encoded_weights import decode_parameters, decode_weights
from treadle.ir.transforms.rounded_inputs import AS_STORED
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
from treadle.models.family import LANGUAGE_ONLY, NO_PROJECTOR, Family, ReadConfig
from treadle.models.registry import family_names, family_of, find_family, read_gguf
from treadle.program.image_inputs import ImageModel
from treadle.program.places import ARTIFACT_SUFFIX, GGUF_SUFFIX, ONNX_SUFFIX, find_place, is_fetched, refuse_object
from treadle.program.resolved import Resolved
from treadle.program.trained_folders import CONFIG, DeclarationReference, family_of_declaration

if TYPE_CHECKING:
    from treadle.artifact_reading import Artifact
    from treadle.models.reading.llama_gguf import GGUFPart

Limits = Mapping[str, int] | None

Kind = Literal["graph", "declaration", "safetensors", "ctranslate2", "gguf", "onnx", "artifact"]

_PROJECTORS = "mmproj*.gguf"
"""The names of image encoders that belong to the GGUF file of a language model next to them."""

BLOCKS = "blocks"
"""The value of `widen` that decodes the blocks of a file."""


def compiling_with_weights(model: str, file: str) -> str:
    """Return the command that writes a declaration and its weights to one file, which then is a model."""
    return f"treadle compile {printable(model)} --weights FOLDER -o {file}"


class ModelSource:
    """A model, found and opened once: its graph, its weights (not yet read), its configuration and its text files.

    label   MODEL in messages: the name or path that the user gave, or the declaration's name
    path    the model's folder or file; None for a declaration or a graph without weights in files
    limits  limits on the contents of files
    kind    the form of the model
    text_source  the model whose tokenizer, chat template and end tokens are used: this one, or another that `open` got

    Each file is opened once, when it is first needed. If a file has changed when another one is opened, or when its
    weights are read, CheckpointError is raised.
    """

    kind: Kind

    def __init__(self, label: str, path: Path | None, limits: Limits = None) -> None:
        self.label, self.path, self.limits = label, path, limits
        self.text_source: ModelSource = self

    @staticmethod
    def open(
        model: AnyModel,
        *,
        weights: str | Path | None = None,
        tokenizer: AnyModel | None = None,
        mmproj: str | Path | None = None,
        limits: Limits = None,
    ) -> ModelSource:
        """Find the model that MODEL names. If it is a source, return it unchanged.

        weights    for a declaration, the folder or the .safetensors file that holds its weights under their own names
        tokenizer  another model, whose tokenizer, chat template and end tokens are used
        mmproj     for a GGUF file, the file of its image encoder, or "none"; None: mmproj*.gguf next to it, if any
        limits     limits on what a file may contain: {"tensors": 1_000_000}

        Raises UsageError if there is no such model. Files are opened, and their errors raised, when they are needed.
        """
        if isinstance(model, ModelSource):
            model._refuse_other_choices(weights, tokenizer, mmproj, limits)
            return model
        found = ModelSource._find(model, weights, limits)
        if mmproj is not None:
            if not isinstance(found, _GGUF):
                what, hint = "only a GGUF file has its image encoder in another file", "leave it out"
                raise UsageError(what, received=f"{printable(found.label)} and {shown_path(mmproj)}", hint=hint)
            found.mmproj = mmproj
        if tokenizer is not None:
            found.text_source = ModelSource.open(tokenizer)
        return found

    def _refuse_other_choices(
        self, weights: str | Path | None, tokenizer: AnyModel | None, mmproj: str | Path | None, limits: Limits
    ) -> None:
        """Raise UsageError for choices that differ from the choices with which the model was opened."""
        encoder = getattr(self, "mmproj", None)
        differs = {
            "weights of an opened model are": weights is not None and (self.path is None or Path(weights) != self.path),
            "the tokenizer of an opened model is": tokenizer is not None and str(tokenizer) != self.text_source.label,
            "the image encoder of an opened model is": mmproj is not None and str(mmproj) != str(encoder),
            "limits of an opened model are": limits not in (None, self.limits),
        }
        for what in [name for name, other in differs.items() if other]:
            raise UsageError(f"{what} chosen when it is opened", received=self.label)

    @staticmethod
    def _find(model: AnyModel, weights: str | Path | None, limits: Limits) -> ModelSource:
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
                hint=Hint(
                    "file.py:function, or a family of the zoo; or leave weights= out: this model has weights",
                    "file.py:function, or a family of the zoo; or leave --weights out: this model has weights. To "
                    f"serve a declaration next to it, `{compiling_with_weights('file.py:function', 'FILE.treadle')}`",
                ),
            )
        if isinstance(model, Model):
            return _Declared(model.name, model, python_file(model), weights, limits)
        if isinstance(model, Graph | TorchModel):
            return _Given(model)
        if not isinstance(model, str | Path):
            raise refuse_object(model)
        if in_python:
            loaded = load_declaration(Path(path), function)
            return _Declared(text, loaded, Path(path), weights, limits)
        if declared:
            return _Declared(text, find_family(text).model, None, weights, limits)
        place = find_place(text)
        kinds = {GGUF_SUFFIX: _GGUF, ONNX_SUFFIX: _Onnx, ARTIFACT_SUFFIX: ArtifactSource}
        kind = kinds.get("" if place.is_dir() else place.suffix, _Folder)
        return kind(text, place, limits)

    def resolve(
        self,
        *,
        inputs: Sequence[str] | None = None,
        outputs: Sequence[str] | None = None,
        widen: str | Iterable[str] = (),
        deferred: bool = False,
        as_stored: bool = False,
        config: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> Resolved:
        """Trace the model, and bind its weights. May be called several times, with different arguments.

        inputs   optional inputs of the declaration to include
        outputs  outputs to return, or parts of outputs (`treadle.ir.transforms.chosen_outputs`); None: all
        widen    narrow dtypes, "bf16" or "f16", whose values become f32 (`treadle.ir.transforms.widening`); "blocks":
                 weights that a GGUF file stores in blocks are decoded to f32 when they are read
        deferred True if weights of a safetensors or GGUF file are converted only when a part of them is read
        as_stored  True if inputs of products are rounded as a quantized folder asks for it
        config   configuration that overrides the declaration's or the checkpoint's; `more` is the same, as keywords

        Raises UsageError for an unknown option, FrontendError or CheckpointError if the model cannot be read,
        StaticArgumentNeeded for an ONNX file with an input that determines shapes and has no value in config.
        """
        names = [widen] if isinstance(widen, str) else list(widen)
        config = {**more, **(config or {})}
        read = self._read(ReadOptions(inputs, config, BLOCKS not in names, deferred, as_stored))
        if as_stored and not read.rounded:
            raise UsageError(
                f"the files of {printable(self.label)} ask for no rounding of inputs",
                received=f"quantize {AS_STORED}",
                hint=Hint('quantize="int8"', "--quantize int8"),
            )
        found = read.widened(_narrow(names))
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
            raise self.without_weights()
        return self.path

    def without_weights(self) -> UsageError:
        """Return the error for a model without weights, where a command needs them."""
        return UsageError(
            f"{printable(self.label)} is a {self.kind}, without weights",
            hint="a folder with a checkpoint of it, or a fetched model",
        )

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
        return self.text_source._own_tokenizer(max_tokens, context, cut)

    def _own_tokenizer(self, max_tokens: int | None, context: int | None, cut: bool) -> TextTokenizer:
        return TextTokenizer.open(self.folder, max_tokens=max_tokens, context=context, cut=cut)

    def text_files(self) -> dict[str, bytes]:
        """Return the files of its tokenizer and chat template by name, as a folder has them; an empty mapping if it has
        none.
        """
        if self.text_source is not self:
            return self.text_source.text_files()
        return {} if self.path is None else self._own_text_files()

    def _own_text_files(self) -> dict[str, bytes]:
        return read_text_files(self.folder)

    @property
    def chat_template(self) -> str | None:
        """The model's chat template; None if it has none."""
        return folder_chat_template(self.folder) if self.text_source is self else self.text_source.chat_template

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """The ids of the tokens that end a text, used if a model has no generation settings."""
        return ()

    @property
    def image_model(self) -> ImageModel | None:
        """The facts that prompts with images depend on; None if no file has them. Raises CheckpointError."""
        return None

    def reference(self, model: Model) -> DeclarationReference:
        """Return the reference for a folder of weights of `model`, the configured declaration."""
        return DeclarationReference.of(model, self.label, None)

    @property
    def positions(self) -> int | None:
        """The maximum number of tokens of a text, according to its files; None if they do not say.

        Rotary positions have no end, but a model was trained on this number of them.
        """
        return None

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

    def __init__(self, label: str, model: Model, file: Path | None, weights: str | Path | None, limits: Limits) -> None:
        super().__init__(label, None if weights is None else Path(weights), limits)
        self.model, self.file = model, file

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return open_weights(self.place, self.limits)

    @cached_property
    def folder(self) -> ModelFolder:
        return self.checkpoint.folder

    @cached_property
    def stored(self) -> DeclarationReference | None:
        """The reference in the folder of its weights. Raises CheckpointError if it is to another declaration."""
        place = self.place
        found = DeclarationReference.read(self.folder) if place.is_dir() else None
        if found is not None:
            found.check(self.model, self.file, self.folder, self.checkpoint.files[0])
        return found

    def reference(self, model: Model) -> DeclarationReference:
        return DeclarationReference.of(model, self.label, self.file)

    def without_weights(self) -> UsageError:
        is_family = family_of_declaration(self.model) is not None
        other = "a folder with a checkpoint of it, or a fetched model; or " if is_family else ""
        trained = "treadle train MODEL FILES --vocab 8000 -o FOLDER"
        return UsageError(
            f"{printable(self.label)} is a declaration{' of the zoo' * is_family}, without weights",
            hint=Hint(
                f'{other}weights="FOLDER", a folder that `treadle train` wrote',
                f"{other}--weights FOLDER, a folder that `{trained}` wrote",
            ),
        )

    def _own_tokenizer(self, max_tokens: int | None, context: int | None, cut: bool) -> TextTokenizer:
        place = self.folder
        if not any(map(place.has, VOCABULARIES)):
            raise CheckpointError(
                f"the weights of {printable(self.label)} are in a folder without a tokenizer",
                received=", ".join(map(printable, place.entries()[:8])),
                within=place.shown,
                hint=Hint(
                    'tokenizer="FOLDER", of a model with the same vocabulary',
                    "--tokenizer FOLDER, of a model with the same vocabulary",
                ),
            )
        return super()._own_tokenizer(max_tokens, context, cut)

    def _refuse_unsupported(self) -> None:
        if self.path is not None:
            self.stored  # noqa: B018

    def _read(self, options: ReadOptions) -> ReadModel:
        if self.path is None:
            return read_declaration(self.model.name, self.model, None, options)
        if self.stored is not None:
            options = replace(options, config={**self.stored.config, **self.model.config, **options.config})
        return read_declaration(self.model.name, self.model, self.checkpoint, options)


class _Folder(ModelSource):
    """A folder with config.json and safetensors files, in CTranslate2's layout, or with weights of a declaration."""

    @cached_property
    def converted(self) -> CTranslate2File | None:
        return find_ctranslate2(self.folder)

    @cached_property
    def stored(self) -> DeclarationReference | None:
        """The reference to a declaration, if the folder has weights of one."""
        return DeclarationReference.read(self.folder)

    @cached_property
    def declared(self) -> _Declared | None:
        """The declaration of the zoo to whose weights the folder belongs; None for another folder.

        Raises UsageError if the declaration is in a Python file, which only the user may name.
        """
        if self.stored is None:
            return None
        if not self.stored.is_family:
            raise self.stored.needs_file(self.label)
        return _Declared(self.label, self.stored.family, None, self.place, self.limits)

    @property
    def kind(self) -> Kind:  # type: ignore[override]
        if self.stored is not None:
            return "declaration"
        return "safetensors" if self.converted is None else "ctranslate2"

    @cached_property
    def meaning(self) -> tuple[Family, ReadConfig]:
        family = family_of(self.config)
        return family, family.read(self.config)

    @property
    def config(self) -> Mapping[str, Any]:
        return open_checkpoint(self.folder).config if self.declared is None else self.folder.config

    @property
    def positions(self) -> int | None:
        return None if self.converted is not None else config_positions(self.config)

    @property
    def image_model(self) -> ImageModel | None:
        if self.kind != "safetensors":
            return None
        family, read = self.meaning
        named = int(self.config.get("image_token_id", self.config.get("image_token_index", -1)))
        token = named if named >= 0 else None
        return ImageModel(family.name, read.model.config, token, None, self.folder.show(CONFIG))

    def _refuse_unsupported(self) -> None:
        if self.declared is None and self.converted is None:
            self.meaning  # noqa: B018
            open_quantized(open_checkpoint(self.folder))

    def _read(self, options: ReadOptions) -> ReadModel:
        if self.declared is not None:
            return self.declared._read(options)
        if self.converted is not None:
            return read_ctranslate2(self.converted, options)
        return read_checkpoint(open_checkpoint(self.folder), *self.meaning, options)


class _GGUF(ModelSource):
    """A GGUF file, and the file of its image encoder, if it has one.

    mmproj  the file of the image encoder, "none", or None: `projector` looks for it next to the model
    """

    kind = "gguf"
    mmproj: str | Path | None = None

    @cached_property
    def file(self) -> GGUFFile:
        return GGUFFile.open(self.place, self.limits)

    @cached_property
    def projector(self) -> GGUFFile | None:
        """The image encoder with its projector; None if the model reads no images.

        Raises UsageError if there are several files next to the model, CheckpointError if the file is damaged, or if it
        is a link that leads out of the model's folder.
        """
        if self.mmproj is not None:
            return None if self.mmproj == NO_PROJECTOR else GGUFFile.open(self.mmproj, self.limits)
        folder = ModelFolder.find(self.place.parent)
        names = sorted(path.name for path in folder.path.glob(_PROJECTORS))
        if not names or self.place.name in names:
            return None
        if len(names) > 1:
            raise UsageError(
                f"there are {len(names)} image encoders next to {printable(self.label)}",
                received=", ".join(map(printable, names)),
                within=folder.shown,
                hint=Hint(
                    f'mmproj="FILE", one of them; or {LANGUAGE_ONLY}',
                    f"--mmproj FILE, one of them; or {LANGUAGE_ONLY.command}",
                ),
            )
        with folder.open(names[0]) as file:
            return GGUFFile.read(file, self.limits)

    @cached_property
    def meaning(self) -> tuple[Model, Sequence[GGUFPart]]:
        file = self.file
        with self._errors_of_projector():
            return read_gguf(file, self.projector)

    @contextmanager
    def _errors_of_projector(self) -> Iterator[None]:
        """Add the option that leaves the image encoder out to the hints of errors about its file."""
        try:
            yield
        except CheckpointError as error:
            is_opened = "projector" in vars(self)
            if not is_opened or (self.projector is not None and (error.within or "").startswith(self.projector.path)):
                hint = error.hint
                error.hint = Hint(
                    f"{hint}; or {LANGUAGE_ONLY}" if hint else LANGUAGE_ONLY,
                    f"{getattr(hint, 'command', hint)}; or {LANGUAGE_ONLY.command}" if hint else LANGUAGE_ONLY.command,
                )
            raise

    def check(self) -> None:
        for name in ("file", "projector"):
            opened = vars(self).get(name)
            if opened is not None:
                opened.file.check()

    def _refuse_unsupported(self) -> None:
        self.meaning  # noqa: B018

    def _own_tokenizer(self, max_tokens: int | None, context: int | None, cut: bool) -> TextTokenizer:
        most = min((n for n in (max_tokens, context) if n is not None), default=None) if cut else None
        return gguf_text_tokenizer(self.file, max_tokens=most)

    def _own_text_files(self) -> dict[str, bytes]:
        return self.tokenizer(cut=False).text_files(gguf_chat_template(self.file))

    @property
    def chat_template(self) -> str | None:
        return gguf_chat_template(self.file) if self.text_source is self else self.text_source.chat_template

    @property
    def end_tokens(self) -> tuple[int, ...]:
        return gguf_end_tokens(self.file)

    @property
    def positions(self) -> int | None:
        key = f"{self.file.architecture}.context_length"
        return self.file.integer(key) if self.file.has(key) else None

    @property
    def image_model(self) -> ImageModel | None:
        from treadle.models.reading.mmproj_gguf import image_options

        if self.projector is None:
            return None
        model, _ = self.meaning
        return ImageModel(model.name, model.config, None, image_options(self.projector), self.projector.path)

    def _read(self, options: ReadOptions) -> ReadModel:
        meaning = self.meaning
        with self._errors_of_projector():
            return read_gguf_weights(*meaning, options)


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


class ArtifactSource(ModelSource):
    """A compiled model in a file. It has a decoding step and a tokenizer if it was compiled from a language model."""

    kind = "artifact"

    @cached_property
    def content(self) -> Artifact:
        return open_artifact(self.place, limits=self.limits)

    @cached_property
    def folder(self) -> ModelFolder:
        return MemoryFolder.of(self.content.files, self.label)

    def check(self) -> None:
        """Do nothing: every section has a hash."""

    def _own_tokenizer(self, max_tokens: int | None, context: int | None, cut: bool) -> TextTokenizer:
        if not self.content.files:
            raise UsageError(
                f"the artifact {printable(self.label)} has no tokenizer",
                received="a model that was compiled without one, or that does not continue text",
                hint=Hint(
                    'tokenizer="FOLDER", of a model with the same vocabulary',
                    "--tokenizer FOLDER, of a model with the same vocabulary",
                ),
            )
        return super()._own_tokenizer(max_tokens, context, cut)

    def _read(self, options: ReadOptions) -> ReadModel:
        hint = Hint(f"treadle.load_artifact({self.label!r})", f"treadle run {self.label}")
        raise UsageError("an artifact is compiled already", received=self.label, hint=hint)


AnyModel = Model | Graph | TorchModel | str | Path | ModelSource
"""The argument MODEL of every function that opens one."""


def config_positions(config: Mapping[str, Any]) -> int | None:
    """Return the number of positions that a config.json declares, extended by the factor of its rotary scaling."""
    most, scaling = config.get("max_position_embeddings"), config.get("rope_scaling") or config.get("rope_parameters")
    if not isinstance(most, int) or isinstance(most, bool) or most < 1:
        return None
    factor = scaling.get("factor") if isinstance(scaling, Mapping) else None
    return int(most * factor) if isinstance(factor, int | float) and 1 < factor < most else most


def _narrow(widen: str | Iterable[str]) -> frozenset[DType]:
    """Return the dtypes that become f32. Raises UsageError for an unknown dtype name."""
    names = [widen] if isinstance(widen, str) else widen
    return narrow_dtypes([name for name in names if name != BLOCKS], also=[BLOCKS])

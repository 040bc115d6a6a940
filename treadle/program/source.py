"""`ModelSource`: MODEL, the argument of `compile` and of the commands, found and opened once.

    file.py:function    a declaration in a Python file, which is imported
    path/to/folder      config.json and weights, or model.bin in CTranslate2's layout
    path/to/file.gguf   metadata and weights in one file; an image encoder next to it, mmproj*.gguf, belongs to it
    gpt2                a family of the zoo, with the default configuration of its declaration
    minilm              a fetched model, see `treadle.fetching`
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

import shlex
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from treadle.files.shown_names import printable, shown_path
from treadle.frontends.binding_errors import OTHER_MODEL
from treadle.frontends.declarations import Model
from treadle.frontends.model_folder import ModelFolder
from treadle.frontends.text import TextTokenizer
from treadle.frontends.vocabularies.folder_vocabulary import FILE
from treadle.ir.errors import CheckpointError, Hint, TreadleError, UsageError
from treadle.ir.graph import Graph
from treadle.ir.transforms.rounded_inputs import AS_STORED
from treadle.ir.transforms.text_signature import for_text
from treadle.ir.transforms.widening import narrow_dtypes
from treadle.ir.types import DType
from treadle.models.checkpoints import ReadModel, ReadOptions, names_of_new_weights
from treadle.passes.sharding.divided_products import DividedWeights, divide_products
from treadle.passes.stages import Recognize, run
from treadle.program.flag_values import config_texts
from treadle.program.forms.finding import Unopened, find_form
from treadle.program.forms.gguf_form import GGUFForm
from treadle.program.forms.model_form import Kind, Limits, ModelForm
from treadle.program.image_inputs import ImageModel
from treadle.program.places import is_fetched
from treadle.program.trained_folders import DeclarationReference

BLOCKS = "blocks"
"""The value of `widen` that decodes the blocks of a file."""


@dataclass(frozen=True)
class Resolved(ReadModel):
    """A traced model with its weights, and its source: the opened model, which also opens the other files.

    divided  the weights that are parts of others; None if there are none
    """

    source: ModelSource = field(kw_only=True)
    divided: DividedWeights | None = field(default=None, kw_only=True)

    def for_ranks(self) -> Resolved:
        """Return the model with one product for each slice of a product, whose weights ranks can split."""
        graph, divided = divide_products(run(self.graph, [Recognize()]).graph)
        if not divided.parts:
            return self
        weights: Any = None if self.weights is None else divided.of(self.weights)
        return replace(self, graph=graph, weights=weights, divided=divided)


class ModelSource:
    """A model, found and opened once: its graph, its weights (not yet read), its configuration and its text files.

    form    the opened model in its form (`treadle.program.forms`)
    text_source  the model whose tokenizer, chat template and end tokens are used: this one, or another that `open` got
    is_for_text  True if the graph of an imported model takes tokens alone: see `for_text`

    Each file is opened once, when it is first needed. If a file has changed when another one is opened, or when its
    weights are read, CheckpointError is raised.
    """

    def __init__(self, form: ModelForm, text_source: ModelSource | None = None, *, is_for_text: bool = False) -> None:
        given: Any = form
        if not isinstance(given, ModelForm):
            what, hint = "a model is opened by its name, path or declaration", f"t.ModelSource.open({form!r:.80})"
            raise UsageError(what, received=f"{form!r:.80}", hint=hint)
        self.form, self.is_for_text = form, is_for_text
        self.text_source: ModelSource = self if text_source is None else text_source

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

        weights    for a declaration, a graph or an imported module, the folder or the .safetensors file that holds its
                   weights under their own names
        tokenizer  another model, whose tokenizer, chat template and end tokens are used
        mmproj     for a GGUF file, the file of its image encoder, or "none"; None: mmproj*.gguf next to it, if any
        limits     limits on what a file may contain: {"tensors": 1_000_000}

        Raises UsageError if there is no such model. Files are opened, and their errors raised, when they are needed.
        """
        if isinstance(model, ModelSource):
            model._refuse_other_choices(weights, tokenizer, mmproj, limits)
            return model
        form = find_form(model, weights, limits)
        if mmproj is not None:
            if not isinstance(form, GGUFForm):
                what, hint = "only a GGUF file has its image encoder in another file", "leave it out"
                raise UsageError(what, received=f"{printable(form.label)} and {shown_path(mmproj)}", hint=hint)
            form.mmproj = mmproj
        return ModelSource(form, None if tokenizer is None else ModelSource.open(tokenizer))

    def for_text(self) -> ModelSource:
        """Return the same model, for tasks with texts: an ONNX file, a graph or an imported module becomes a model of
        tokens alone (`treadle.ir.transforms.text_signature`). Files that are open stay open.
        """
        return ModelSource(self.form, None if self.text_source is self else self.text_source, is_for_text=True)

    def _refuse_other_choices(
        self, weights: str | Path | None, tokenizer: AnyModel | None, mmproj: str | Path | None, limits: Limits
    ) -> None:
        """Raise UsageError for choices that differ from the choices with which the model was opened."""
        encoder = self.form.mmproj if isinstance(self.form, GGUFForm) else None
        differs = {
            "weights of an opened model are": weights is not None and (self.path is None or Path(weights) != self.path),
            "the tokenizer of an opened model is": tokenizer is not None and str(tokenizer) != self.text_source.label,
            "the image encoder of an opened model is": mmproj is not None and str(mmproj) != str(encoder),
            "limits of an opened model are": limits not in (None, self.form.limits),
        }
        for what in [name for name, other in differs.items() if other]:
            raise UsageError(f"{what} chosen when it is opened", received=self.label)

    def resolve(
        self,
        *,
        inputs: Sequence[str] | None = None,
        outputs: Sequence[str] | None = None,
        widen: str | Iterable[str] = (),
        deferred: bool = False,
        as_stored: bool = False,
        new_weights: Sequence[str] = (),
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
        new_weights  patterns of names of weights that are drawn, although the model has others
        config   configuration that overrides the declaration's or the checkpoint's; `more` is the same, as keywords

        Raises UsageError for an unknown option, FrontendError or CheckpointError if the model cannot be read,
        StaticArgumentNeeded for an ONNX file with an input that determines shapes and has no value in config.
        """
        names = [widen] if isinstance(widen, str) else list(widen)
        config = {**more, **(config or {})}
        options = ReadOptions(inputs, config, BLOCKS not in names, deferred, as_stored, tuple(new_weights))
        if new_weights and self.kind not in ("declaration", "graph"):
            what, whole = (
                "new_weights= are weights of a declaration or an imported module",
                "leave it out: the file has all weights",
            )
            raise UsageError(what, received=self.label, hint=self.new_head if self.kind == "safetensors" else whole)
        try:
            read = self.form.read(options)
        except CheckpointError as error:
            self._point_to_config(error, options)
            raise
        if as_stored and not read.rounded:
            raise UsageError(
                f"the files of {printable(self.label)} ask for no rounding of inputs",
                received=f"quantize {AS_STORED}",
                hint=Hint('quantize="int8"', "--quantize int8"),
            )
        found = replace(read, new_weights=names_of_new_weights(read.graph, options.new_weights)).widened(
            dtypes_to_widen(names)
        )
        if self.is_for_text and self.kind in ("graph", "onnx"):
            found = replace(found, graph=for_text(found.graph))
        if is_fetched(self.label):
            found.graph.name = self.label  # replaces the name of its family
            found = replace(found, name=self.label)
        return Resolved(**vars(found.giving(outputs)), source=self)

    def _point_to_config(self, error: CheckpointError, options: ReadOptions) -> None:
        """If the weights fit without a part of the configuration, say so in the hint of an error."""
        config = options.config
        parts: list[Mapping[str, Any]] = [{name: value} for name, value in config.items()]
        for wrong in parts if len(parts) == 1 else [*parts, config]:
            left = {name: value for name, value in config.items() if name not in wrong}
            try:
                self.form.read(replace(options, config=left, deferred=True))
            except TreadleError:
                continue
            texts = config_texts(wrong)
            flags = " ".join(f"--set {printable(text)}" for text in texts)
            fit = ", and the weights fit"
            error.hint = Hint(f"leave out {printable(', '.join(texts))}{fit}", f"leave out {flags}{fit}")
            if self.kind == "safetensors" and wrong.keys() & {"head", "labels"}:
                error.hint = Hint(f"{error.hint}; {self.new_head}", f"{error.hint.command}; {self.new_head.command}")
            return
        folder, alone = self.path, replace(options, inputs=None, config={}, deferred=True)
        if error.hint == OTHER_MODEL and folder is not None and folder.is_dir():
            with suppress(TreadleError):
                find_form(str(folder), None, self.form.limits).read(alone)
                error.hint = f"{shown_path(folder)} in place of {printable(self.label)}: the folder is a model"

    def inputs(self, widen: str | Iterable[str], config: Mapping[str, Any]) -> Graph:
        """Return a graph that has only the inputs of an ONNX model. Inputs that determine shapes are included; inputs
        with a value in config are not. The weights are then read only once, for all values of these inputs.
        """
        return self.form.inputs(dtypes_to_widen(widen), config)

    @property
    def new_head(self) -> Hint:
        """The hint for a head that a checkpoint folder lacks: transformers makes the folder of another class."""
        folder, path = printable(repr(self.label)), printable(repr(str(self.path)))
        made = f"transformers.AutoModelForSequenceClassification.from_pretrained({path}, num_labels=2)"
        made = f"a new head is made by {made}.save_pretrained('NEW')"
        return Hint(
            f"{made}, or by another AutoModelFor... class: then 'NEW', tokenizer={folder}",
            f"{made}, or by another AutoModelFor... class: then NEW --tokenizer {printable(shlex.quote(self.label))}",
        )

    def check(self) -> None:
        """Raise CheckpointError if a file has changed since it was opened."""
        self.form.check()

    @property
    def label(self) -> str:
        """MODEL in messages: the name or path that the user gave, or the declaration's name."""
        return self.form.label

    @property
    def kind(self) -> Kind:
        """The name of the model's form."""
        return self.form.kind

    # -- the files next to the weights -----------------------------------------------------------------------------

    @property
    def path(self) -> Path | None:
        """The model's folder or file; None for a declaration or a graph without weights in files."""
        return self.form.path

    @property
    def has_weights(self) -> bool:
        """True if the model has weights that are not initial values."""
        return self.form.has_weights

    @property
    def place(self) -> Path:
        """The model's folder or file. Raises UsageError for a declaration or a graph, which has none."""
        return self.form.place

    def without_weights(self) -> UsageError:
        """Return the error for a model without weights, or without a folder, where a command needs one."""
        return self.form.without_weights()

    @property
    def folder(self) -> ModelFolder:
        """The model's folder, which opens each file once. Raises UsageError as `place` does, CheckpointError for a
        file.
        """
        return self.form.folder

    @property
    def config(self) -> Mapping[str, Any]:
        """The contents of config.json. Raises CheckpointError if the file is missing or damaged."""
        return self.form.config

    def tokenizer(
        self, *, max_tokens: int | None = None, context: int | None = None, cut: bool = True
    ) -> TextTokenizer:
        """Return the model's tokenizer: see `TextTokenizer.open`. If the model is not supported, that error is raised
        before any error of the tokenizer.
        """
        self.form.refuse_unsupported()
        return self.text_source.form.tokenizer(max_tokens, context, cut)

    def text_files(self) -> dict[str, bytes]:
        """Return the files of its tokenizer and chat template by name, as a folder has them; an empty mapping if it has
        none.
        """
        if self.text_source is not self:
            return self.text_source.text_files()
        return {} if self.path is None else self.form.text_files()

    @property
    def has_tokenizer(self) -> bool:
        """True if the files of its text source have a vocabulary. Raises CheckpointError for a damaged file."""
        return FILE in self.text_files()

    @property
    def chat_template(self) -> str | None:
        """The model's chat template; None if it has none."""
        return self.form.chat_template if self.text_source is self else self.text_source.chat_template

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """The ids of the tokens that end a text, used if a model has no generation settings."""
        return self.form.end_tokens

    @property
    def positions(self) -> int | None:
        """The maximum number of tokens of a text, according to its files; None if they do not say."""
        return self.form.positions

    @property
    def image_model(self) -> ImageModel | None:
        """The facts that prompts with images depend on; None if no file has them. Raises CheckpointError."""
        return self.form.image_model

    def reference(self, model: Model) -> DeclarationReference:
        """Return the reference for a folder of weights of `model`, the configured declaration."""
        return self.form.reference(model)

    def __str__(self) -> str:
        return self.label

    def __repr__(self) -> str:
        return f"ModelSource({self.label!r})"


AnyModel = Unopened | ModelSource
"""The argument MODEL of every function that opens one."""


def dtypes_to_widen(widen: str | Iterable[str]) -> frozenset[DType]:
    """Return the dtypes that become f32. Raises UsageError for an unknown dtype name."""
    names = [widen] if isinstance(widen, str) else widen
    return narrow_dtypes([name for name in names if name != BLOCKS], also=[BLOCKS])

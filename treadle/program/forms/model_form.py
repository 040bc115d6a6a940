"""`ModelForm`: the interface of an opened model, which every form of model implements."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from treadle.files.shown_names import printable
from treadle.frontends.declarations import Model
from treadle.frontends.model_folder import ModelFolder
from treadle.frontends.text import TextTokenizer, read_text_files
from treadle.frontends.vocabularies.folder_vocabulary import folder_chat_template
from treadle.ir.errors import Hint, UsageError
from treadle.ir.graph import Graph
from treadle.ir.types import DType
from treadle.models.checkpoints import ReadModel, ReadOptions
from treadle.program.image_inputs import ImageModel
from treadle.program.pickling import state_without_caches
from treadle.program.trained_folders import DeclarationReference

Limits = Mapping[str, int] | None

Kind = Literal["graph", "declaration", "safetensors", "ctranslate2", "gguf", "onnx", "artifact"]

OTHER_TOKENIZER = Hint(
    'tokenizer="FOLDER", of a model with the same vocabulary', "--tokenizer FOLDER, of a model with the same vocabulary"
)
"""The hint of an error for a model without a tokenizer."""


class ModelForm(ABC):
    """A model in one form: its graph, its weights (not yet read), its configuration and its text files.

    label   MODEL in messages: the name or path that the user gave, or the declaration's name
    path    the model's folder or file; None for a declaration or a graph without weights in files
    limits  limits on the contents of files

    Each file is opened once, when it is first needed. If a file has changed when another one is opened, or when its
    weights are read, CheckpointError is raised.
    """

    def __init__(self, label: str, path: Path | None, limits: Limits = None) -> None:
        self.label, self.path, self.limits = label, path, limits

    def __getstate__(self) -> dict[str, Any]:
        return state_without_caches(self)

    @property
    @abstractmethod
    def kind(self) -> Kind:
        """The name of the form."""

    @abstractmethod
    def read(self, options: ReadOptions) -> ReadModel:
        """Trace the model, and bind its weights. Raises as `ModelSource.resolve` does."""

    def check(self) -> None:
        """Raise CheckpointError if a file has changed since it was opened."""
        if self.path is not None:
            self.folder.check()

    def refuse_unsupported(self) -> None:  # noqa: B027
        """Raise CheckpointError for a model that no family reads."""

    def inputs(self, narrow: frozenset[DType], config: Mapping[str, Any]) -> Graph:
        """Return a graph that has only the inputs of an ONNX model, as `ModelSource.inputs` does.

        narrow  the dtypes whose values become f32
        """
        raise NotImplementedError

    @property
    def has_weights(self) -> bool:
        """True if the model has weights that are not initial values."""
        return self.path is not None

    @property
    def place(self) -> Path:
        """The model's folder or file. Raises UsageError for a model that has none."""
        if self.path is None:
            raise self.without_weights()
        return self.path

    def without_weights(self) -> UsageError:
        """Return the error for a model without weights, or without a folder, where a command needs one."""
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

    def tokenizer(self, max_tokens: int | None, context: int | None, cut: bool) -> TextTokenizer:
        """Return the model's tokenizer: see `TextTokenizer.open`."""
        return TextTokenizer.open(self.folder, max_tokens=max_tokens, context=context, cut=cut)

    def text_files(self) -> dict[str, bytes]:
        """Return the files of its tokenizer and chat template by name, as a folder has them."""
        return read_text_files(self.folder)

    @property
    def chat_template(self) -> str | None:
        """The model's chat template; None if it has none."""
        return folder_chat_template(self.folder)

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

"""A compiled model in a file."""

from __future__ import annotations

from functools import cached_property
from shlex import quote

from treadle.artifacts.reading import Artifact, open_artifact
from treadle.files.shown_names import printable
from treadle.frontends.model_folder import MemoryFolder, ModelFolder
from treadle.frontends.text import TextTokenizer
from treadle.frontends.vocabularies.folder_vocabulary import VOCABULARIES
from treadle.ir.errors import Hint, UsageError
from treadle.models.checkpoints import ReadModel, ReadOptions
from treadle.program.forms.model_form import OTHER_TOKENIZER, Kind, ModelForm


class ArtifactForm(ModelForm):
    """A compiled model in a file. It has a tokenizer if it was compiled from a model with one that has a task for
    texts.
    """

    kind: Kind = "artifact"

    @cached_property
    def content(self) -> Artifact:
        return open_artifact(self.place, limits=self.limits)

    @cached_property
    def folder(self) -> ModelFolder:
        return MemoryFolder.of(self.content.files, self.label)

    def check(self) -> None:
        """Do nothing: every section has a hash."""

    def tokenizer(self, max_tokens: int | None, context: int | None, cut: bool) -> TextTokenizer:
        if not any(map(self.folder.has, VOCABULARIES)):
            raise UsageError(
                f"the artifact {printable(self.label)} has no tokenizer",
                received="a model that was compiled without one, or that has no task for texts",
                hint=OTHER_TOKENIZER,
            )
        return super().tokenizer(max_tokens, context, cut)

    def read(self, options: ReadOptions) -> ReadModel:
        model = "the model that it was compiled from"
        hint = Hint(
            f"{model}; treadle.load_artifact({self.label!r}) runs it on arrays",
            f"{model}; `treadle run {quote(printable(self.label))}` runs it on arrays",
        )
        raise UsageError("an artifact is compiled already", received=self.label, hint=hint)

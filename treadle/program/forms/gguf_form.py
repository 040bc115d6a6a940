"""A GGUF file, and the file of its image encoder, if it has one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from treadle.files.shown_names import printable
from treadle.frontends.declarations import Model
from treadle.frontends.gguf_file import GGUFFile
from treadle.frontends.model_folder import ModelFolder
from treadle.frontends.text import TextTokenizer
from treadle.frontends.vocabularies.gguf_tokenizer import gguf_chat_template, gguf_end_tokens, gguf_text_tokenizer
from treadle.ir.errors import CheckpointError, Hint, UsageError
from treadle.models.checkpoints import ReadModel, ReadOptions, read_gguf_weights
from treadle.models.family import LANGUAGE_ONLY, NO_PROJECTOR
from treadle.models.registry import read_gguf
from treadle.program.forms.model_form import Kind, ModelForm
from treadle.program.image_inputs import ImageModel

if TYPE_CHECKING:
    from treadle.models.reading.llama_gguf import GGUFPart

_PROJECTORS = "mmproj*.gguf"
"""The names of image encoders that belong to the GGUF file of a language model next to them."""


class GGUFForm(ModelForm):
    """A GGUF file, and the file of its image encoder, if it has one.

    mmproj  the file of the image encoder, "none", or None: `projector` looks for it next to the model
    """

    kind: Kind = "gguf"
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

    def refuse_unsupported(self) -> None:
        self.meaning  # noqa: B018

    def tokenizer(self, max_tokens: int | None, context: int | None, cut: bool) -> TextTokenizer:
        most = min((n for n in (max_tokens, context) if n is not None), default=None) if cut else None
        return gguf_text_tokenizer(self.file, max_tokens=most)

    def text_files(self) -> dict[str, bytes]:
        self.refuse_unsupported()
        return self.tokenizer(None, None, cut=False).text_files(self.chat_template)

    @property
    def chat_template(self) -> str | None:
        return gguf_chat_template(self.file)

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

    def read(self, options: ReadOptions) -> ReadModel:
        meaning = self.meaning
        with self._errors_of_projector():
            return read_gguf_weights(*meaning, options)

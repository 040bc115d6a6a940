"""A declaration, with initial values or with weights in a folder."""

from __future__ import annotations

import shlex
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from treadle.files.shown_names import printable
from treadle.frontends.declarations import Model
from treadle.frontends.text import TextTokenizer
from treadle.frontends.vocabularies.folder_vocabulary import VOCABULARIES
from treadle.frontends.vocabularies.trained_vocabularies import USUAL_VOCABULARY
from treadle.ir.errors import CheckpointError, Hint, UsageError
from treadle.models.checkpoints import ReadModel, ReadOptions, read_declaration
from treadle.program.flag_values import config_texts
from treadle.program.forms.model_form import OTHER_TOKENIZER, Kind, Limits
from treadle.program.forms.separate_weights import SeparateWeightsForm
from treadle.program.trained_folders import DeclarationReference, family_of_declaration
from treadle.progress import note


class DeclarationForm(SeparateWeightsForm):
    """A declaration, with initial values or with weights in a folder."""

    kind: Kind = "declaration"

    def __init__(self, label: str, model: Model, file: Path | None, weights: str | Path | None, limits: Limits) -> None:
        super().__init__(label, weights, limits)
        self.model, self.file = model, file

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
        vocab = {**self.model.defaults, **self.model.config}.get("vocab")
        size = min(USUAL_VOCABULARY, vocab) if isinstance(vocab, int) else USUAL_VOCABULARY
        trained = f"treadle train {shlex.quote(printable(self.label))} FILES --vocab {size} -o FOLDER"
        return UsageError(
            f"{printable(self.label)} is a declaration{' of the zoo' * is_family}, without weights",
            hint=Hint(
                f'{other}weights="FOLDER", a folder that `treadle train` wrote',
                f"{other}--weights FOLDER, a folder that `{trained}` wrote",
            ),
        )

    def tokenizer(self, max_tokens: int | None, context: int | None, cut: bool) -> TextTokenizer:
        place = self.folder
        if not any(map(place.has, VOCABULARIES)):
            raise CheckpointError(
                f"the weights of {printable(self.label)} are in a folder without a tokenizer",
                received=", ".join(map(printable, place.entries()[:8])),
                within=place.shown,
                hint=OTHER_TOKENIZER,
            )
        return super().tokenizer(max_tokens, context, cut)

    def refuse_unsupported(self) -> None:
        if self.path is not None:
            self.stored  # noqa: B018

    def read(self, options: ReadOptions) -> ReadModel:
        if self.path is None:
            return read_declaration(self.model.name, self.model, None, options)
        if options.new_weights or self.stored is None:  # new weights make another declaration
            return read_declaration(self.model.name, self.model, self.checkpoint, options)
        trained = {**self.model.defaults, **self.stored.config}
        config = {**self.stored.config, **self.model.config, **options.config}
        found = read_declaration(self.model.name, self.model, self.checkpoint, replace(options, config=config))
        differing = {name: value for name, value in config.items() if value != trained.get(name, value)}
        if not differing:
            return found
        was, now = (", ".join(config_texts({name: of[name] for name in differing})) for of in (trained, differing))
        difference = printable(f"the weights of {self.place} were trained with {was}, not with {now}")
        note(difference)
        return replace(found, notes=(*found.notes, difference))

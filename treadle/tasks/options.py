"""The argument of every task's `open`: MODEL, and its compile options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from treadle.compiled import Compiled
from treadle.entry_functions import compile
from treadle.program.options import CompileOptions
from treadle.stepped import SteppedModel, open_stepped


@dataclass(frozen=True)
class ModelOptions:
    """A model's name and its compile options.

    model   a folder, a GGUF file, or a fetched model's name
    chosen  the options; `cache` applies to text generation
    """

    model: str | Path
    chosen: CompileOptions = field(default_factory=lambda: CompileOptions(entry="load"))

    @classmethod
    def of(cls, model: str | Path, **options: Any) -> ModelOptions:
        """Return a model with options as in `treadle.compile`, and `cache`. Raises UsageError for other options."""
        return cls(model, CompileOptions.of("load", options))

    def but(self, **changes: Any) -> ModelOptions:
        """Return the model with changed options."""
        return replace(self, chosen=self.chosen.but(**changes))

    def compile(self, inputs: Sequence[str] = (), outputs: Sequence[str] | None = None) -> Compiled:
        """Compile the model as declared, with these optional inputs, and all outputs or these. Raises as
        `treadle.compile` does.
        """
        return compile(self.model, **self.but(cache=None).keywords(), inputs=inputs, outputs=outputs)

    def stepped(self) -> SteppedModel:
        """Compile the step for generation. Raises as `treadle.stepped.open_stepped` does."""
        return open_stepped(self.model, **self.keywords())

    def keywords(self) -> dict[str, Any]:
        """Return the options that are set, as keywords of functions that open a model."""
        return self.chosen.keywords()

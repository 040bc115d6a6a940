"""The argument of every task's `open`: MODEL, and its compile options."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from treadle.compiled import Compiled
from treadle.compiling import compile
from treadle.ir.target import Target
from treadle.program.source import ModelSource
from treadle.stepped import SteppedModel, open_stepped


@dataclass(frozen=True)
class ModelOptions:
    """A model's name and its compile options.

    model             a folder, a GGUF file, a fetched model's name, or an opened model
    backend, target   as in `compile`
    dtype, quantize   as in `compile`
    limits            limits on what a file may contain
    cache             the dtype of keys and values for text generation
    config            configuration that overrides the folder's
    widen             as in `compile`
    """

    model: str | Path | ModelSource
    backend: str = "numpy"
    target: str | Target = "cpu"
    dtype: str | None = None
    quantize: str | None = None
    limits: Mapping[str, int] | None = None
    cache: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    widen: str | Iterable[str] = ()

    @cached_property
    def source(self) -> ModelSource:
        """The model, found at the first use. Raises UsageError if there is none."""
        return ModelSource.open(self.model, limits=self.limits)

    def compile(self, inputs: Sequence[str] = (), outputs: Sequence[str] | None = None) -> Compiled:
        """Compile the model as declared, with these optional inputs, and all outputs or these. Raises as
        `treadle.compile` does.
        """
        return compile(self.source, backend=self.backend, inputs=inputs, outputs=outputs, **self.how())

    def stepped(self) -> SteppedModel:
        """Compile the step for generation. Raises as `treadle.stepped.open_stepped` does."""
        return open_stepped(self.source, backend=self.backend, cache=self.cache, **self.how())

    def how(self) -> dict[str, Any]:
        """Return the options as keyword arguments for functions that compile `source`, without the backend."""
        how = {"target": self.target, "dtype": self.dtype, "quantize": self.quantize, "widen": self.widen}
        return {**how, **self.config}

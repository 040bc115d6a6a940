"""What every task's `open` takes: MODEL, and how it is compiled."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from treadle.compiled import Compiled
from treadle.compiling import compile
from treadle.ir.target import Target
from treadle.stepped import SteppedModel, open_stepped


@dataclass(frozen=True)
class ModelOptions:
    """A model's name and how it is compiled.

    model             a folder, a GGUF file, or a fetched model's name
    backend, target   as `compile` takes them
    dtype, quantize   as `compile` takes them
    limits            what a file may ask for before it is refused
    cache             the dtype of keys and values, where text is generated
    config            configuration that overrides the folder's
    widen             as `compile` takes it
    """

    model: str | Path
    backend: str = "numpy"
    target: str | Target = "cpu"
    dtype: str | None = None
    quantize: str | None = None
    limits: Mapping[str, int] | None = None
    cache: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    widen: str | Iterable[str] = ()

    def compile(self, inputs: Sequence[str] = (), outputs: Sequence[str] | None = None) -> Compiled:
        """The model as it is declared, with these optional inputs, and all outputs or these. Raises what
        `treadle.compile` does.
        """
        return compile(self.model, backend=self.backend, inputs=inputs, outputs=outputs, **self.how())

    def stepped(self) -> SteppedModel:
        """The step of generation. Raises what `treadle.stepped.open_stepped` does."""
        return open_stepped(self.model, backend=self.backend, cache=self.cache, **self.how())

    def how(self) -> dict[str, Any]:
        """How it is compiled, as keywords that what opens a model takes, but for the backend."""
        how = {"target": self.target, "dtype": self.dtype, "quantize": self.quantize, "widen": self.widen}
        return {**how, "limits": self.limits, **self.config}

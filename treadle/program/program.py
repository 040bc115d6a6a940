"""A program: a model with the options that it is compiled with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from treadle.program.options import CompileOptions

if TYPE_CHECKING:
    from treadle.compiled import Compiled
    from treadle.program.source import AnyModel, ModelSource
    from treadle.stepped import SteppedModel


@dataclass(frozen=True)
class Program:
    """A model and its options, the argument of every task's `open`.

    program = Program.of("folder", backend="tvm", dtype="bf16")

    model    a folder, a GGUF file, a fetched model's name, or an opened model
    """

    model: AnyModel
    options: CompileOptions

    @classmethod
    def of(cls, model: AnyModel, entry: str = "load", /, **options: Any) -> Program:
        """Return a model with options of an entry function. Raises UsageError as `CompileOptions.of` does."""
        return cls(model, CompileOptions.of(entry, options))

    @cached_property
    def source(self) -> ModelSource:
        """The model, found at the first use. Raises UsageError if there is none."""
        return self.options.open(self.model)

    def but(self, **changes: Any) -> Program:
        """Return the same model with other options."""
        return Program(self.source, self.options.but(**changes))

    def compile(self, inputs: Sequence[str] = (), outputs: Sequence[str] | None = None) -> Compiled:
        """Compile the model as declared, with these optional inputs, and all outputs or these. Raises as
        `treadle.compile` does.
        """
        from treadle.compiling import compile_model

        return compile_model(self.source, self.options.but(inputs=inputs, outputs=outputs, cache=None))

    def stepped(self) -> SteppedModel:
        """Compile the step for generation. Raises as `treadle.stepped.open_stepped` does."""
        from treadle.stepped import open_stepped

        return open_stepped(self.source, **self.options.keywords())

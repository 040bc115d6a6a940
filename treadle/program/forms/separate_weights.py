"""A model whose weights, if there are any, are in a folder or a file that is named apart from it."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from treadle.frontends.huggingface import Checkpoint, open_weights
from treadle.frontends.model_folder import ModelFolder
from treadle.program.forms.model_form import Limits, ModelForm


class SeparateWeightsForm(ModelForm):
    """A declaration or a graph. Its weights have the names of its parameters.

    weights  the folder or the .safetensors file; None: the model has its own, or none
    """

    def __init__(self, label: str, weights: str | Path | None, limits: Limits) -> None:
        super().__init__(label, None if weights is None else Path(weights), limits)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The weights, not yet read. Raises UsageError as `place` does, CheckpointError for a damaged file."""
        return open_weights(self.place, self.limits)

    @cached_property
    def folder(self) -> ModelFolder:
        return self.checkpoint.folder

"""A graph, or an imported module with its weights, passed as MODEL."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from treadle.frontends.huggingface import Checkpoint, open_weights
from treadle.frontends.model_folder import ModelFolder
from treadle.frontends.torch_export.model import TorchModel
from treadle.ir.errors import UsageError
from treadle.ir.graph import Graph
from treadle.models.checkpoints import ReadModel, ReadOptions, read_graph
from treadle.program.forms.model_form import Kind, Limits, ModelForm


class GraphForm(ModelForm):
    """A graph or an imported module, with its own weights or with weights in a folder."""

    kind: Kind = "graph"

    def __init__(self, model: Graph | TorchModel, weights: str | Path | None, limits: Limits) -> None:
        super().__init__(model.name, None if weights is None else Path(weights), limits)
        self.model = model

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return open_weights(self.place, self.limits)

    @cached_property
    def folder(self) -> ModelFolder:
        return self.checkpoint.folder

    def read(self, options: ReadOptions) -> ReadModel:
        if options.config or options.inputs:
            received = ", ".join([*options.config, *(options.inputs or ())])
            raise UsageError("a graph takes no configuration", received=received)
        model = self.model
        if isinstance(model, TorchModel):
            found = ReadModel(model.name, model.graph, None, model.weights, learned=model.learned)
        else:
            found = ReadModel(model.name, model)
        return found if self.path is None else read_graph(found, self.checkpoint, options)

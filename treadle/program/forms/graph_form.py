"""A graph, or an imported module with its weights, passed as MODEL."""

from __future__ import annotations

from treadle.frontends.torch_export.model import TorchModel
from treadle.ir.errors import UsageError
from treadle.ir.graph import Graph
from treadle.models.checkpoints import ReadModel, ReadOptions
from treadle.program.forms.model_form import Kind, ModelForm


class GraphForm(ModelForm):
    """A graph, or an imported module with its weights."""

    kind: Kind = "graph"

    def __init__(self, model: Graph | TorchModel) -> None:
        super().__init__(model.name, None)
        self.model = model

    def read(self, options: ReadOptions) -> ReadModel:
        if options.config or options.inputs:
            received = ", ".join([*options.config, *(options.inputs or ())])
            raise UsageError("a graph takes no configuration", received=received)
        model = self.model
        if isinstance(model, TorchModel):
            return ReadModel(model.name, model.graph, None, model.weights, learned=model.learned)
        return ReadModel(model.name, model)

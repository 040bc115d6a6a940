"""A graph, or an imported module with its weights, passed as MODEL."""

from __future__ import annotations

from pathlib import Path

from treadle.files.shown_names import printable
from treadle.frontends.torch_export.model import TorchModel
from treadle.ir.errors import UsageError
from treadle.ir.graph import Graph
from treadle.models.checkpoints import ReadModel, ReadOptions, read_graph
from treadle.program.forms.model_form import Kind, Limits
from treadle.program.forms.separate_weights import SeparateWeightsForm


class GraphForm(SeparateWeightsForm):
    """A graph or an imported module, with its own weights or with weights in a folder."""

    kind: Kind = "graph"

    def __init__(self, model: Graph | TorchModel, weights: str | Path | None, limits: Limits) -> None:
        super().__init__(model.name, weights, limits)
        self.model = model

    @property
    def has_weights(self) -> bool:
        return isinstance(self.model, TorchModel) or super().has_weights

    def without_weights(self) -> UsageError:
        text = 'tokenizer="FOLDER", of a model with the same vocabulary'
        if isinstance(self.model, TorchModel):
            return UsageError(
                f"{printable(self.label)} is an imported module, without a tokenizer",
                hint=f"{text}, if it continues or embeds text; t.compile(model) takes arrays",
            )
        return UsageError(
            f"{printable(self.label)} is a graph, without weights",
            hint=f'weights="FOLDER", with a .safetensors file of its parameters, and {text}, if that folder has none',
        )

    def read(self, options: ReadOptions) -> ReadModel:
        if options.config or options.inputs:
            received = ", ".join([*options.config, *(options.inputs or ())])
            raise UsageError(
                "a graph takes no configuration", received=received, option=next(iter(options.config), None)
            )
        model = self.model
        if isinstance(model, TorchModel):
            found = ReadModel(model.name, model.graph, None, model.weights, learned=model.learned, unused=model.unused)
        else:
            found = ReadModel(model.name, model)
        return found if self.path is None else read_graph(found, self.checkpoint, options)

"""A traced model with its weights, and the choices that apply to a model of any origin: wider dtypes, fewer outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from treadle.frontends.declarations import Model
from treadle.frontends.deferred_arrays import DeferredArray
from treadle.ir.graph import Graph
from treadle.ir.transforms.chosen_outputs import choose_outputs
from treadle.ir.transforms.widening import widen_graph
from treadle.ir.types import DType

if TYPE_CHECKING:
    from treadle.program.source import ModelSource

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Resolved:
    """A traced model with its weights and their origin.

    source   the opened model, with its other files
    weights  None if there is no checkpoint: weights get initial values
    unused   tensors of the checkpoint that the model does not use
    unread   keys of config.json that the family does not know (`ReadConfig.unread`)
    blocks   the type in which each weight is stored in a GGUF file: "q4_1", "f32", ...
    padding  rows of embedding tables that get no gradient when they are looked up, by the weights' names
    learned  the weights that training changes by default; None: all
    """

    name: str
    graph: Graph
    source: ModelSource
    model: Model | None = None
    weights: Mapping[str, Array] | None = None
    unused: tuple[str, ...] = ()
    blocks: Mapping[str, str] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    padding: Mapping[str, int] = field(default_factory=dict)
    learned: tuple[str, ...] | None = None

    @property
    def folder(self) -> Path | None:
        """The checkpoint's folder, or its file, if there is one."""
        return self.source.path

    def giving(self, outputs: Sequence[str] | None) -> Resolved:
        """Return the model with these outputs only; None: all."""
        return self if outputs is None else replace(self, graph=choose_outputs(self.graph, outputs))

    def widened(self, narrow: frozenset[DType]) -> Resolved:
        """Return the model with values of narrow dtypes, including weights, in f32."""
        if not narrow:
            return self
        held = {name for name, value in self.graph.parameters.items() if value.type.dtype in narrow}
        weights = self.weights
        if weights is not None and held:
            weights = {name: _as_f32(array) if name in held else array for name, array in weights.items()}
        return replace(self, graph=widen_graph(self.graph, narrow), weights=weights)


def _as_f32(array: Any) -> Any:
    """Return a weight in float32; bf16 weights are float32 already."""
    if isinstance(array, DeferredArray):
        return array.then(lambda part: np.asarray(part, np.float32), np.dtype(np.float32))
    return np.asarray(array, np.float32)

"""What `from_torch` gives: a graph with its weights, which `treadle.compile` takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from treadle.ir.graph import Graph
from treadle.ir.sizes import Size

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class TorchModel:
    """An imported module.

    name       the module's class
    graph      what it computes
    weights    its parameters and buffers by the graph's names: views of the module's own memory where NumPy has their
               dtype; bfloat16 comes as float32
    inputs     the graph's inputs, in the order of the module's arguments
    symbols    the size that stands for each dimension named in `dynamic`
    operators  how many nodes of each operator were imported
    opaque     the nodes whose reshapes could not be told apart into axes
    """

    name: str
    graph: Graph
    weights: Mapping[str, Array]
    inputs: tuple[str, ...] = ()
    symbols: Mapping[str, Size] = field(default_factory=dict)
    operators: Counter[str] = field(default_factory=Counter)
    opaque: tuple[str, ...] = ()

    def arguments(self, example: tuple[Any, ...] | Mapping[str, Any]) -> dict[str, Array]:
        """Tensors as the module takes them, as the arrays by name that an executable takes."""
        import torch

        given: dict[str, Any] = {}
        if isinstance(example, Mapping):
            given.update((name, x) for name, x in example.items() if name in self.inputs)
        else:
            tensors = [x for x in example if isinstance(x, torch.Tensor)]
            given.update(zip(self.inputs, tensors, strict=False))
        return {name: array_of(x) for name, x in given.items()}


def array_of(tensor: Any) -> Array:
    """A tensor's elements as an array; bfloat16, which NumPy lacks, as float32."""
    import torch

    held = tensor.detach().cpu()
    if held.dtype is torch.bfloat16:
        held = held.float()
    return np.asarray(held.resolve_conj().resolve_neg().numpy())

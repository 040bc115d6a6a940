"""The result of `from_torch`: a graph with its weights, which `treadle.compile` accepts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from treadle.ir.errors import FrontendError
from treadle.ir.graph import Graph
from treadle.ir.sizing.sizes import Size
from treadle.ir.source_lines import user_line
from treadle.ir.wording.other_interfaces import IMPORTED_ATTRIBUTES
from treadle.ir.wording.unknown_attributes import with_attribute_hints

Array = npt.NDArray[Any]


@with_attribute_hints("an imported module", IMPORTED_ATTRIBUTES)
@dataclass(frozen=True)
class TorchModel:
    """An imported module.

    name       the module's class
    graph      the module's computation
    weights    the module's parameters and buffers by the graph's names, as copies; bfloat16 is converted to float32
    inputs     the graph's inputs, in the order of the module's arguments
    symbols    the size of each dimension named in `dynamic`
    operators  number of imported nodes of each operator
    opaque     the nodes whose reshapes could not be resolved into axes
    learned    the weights that are parameters which require a gradient
    unused     the module's parameters and buffers that the computation does not use
    """

    name: str
    graph: Graph
    weights: Mapping[str, Array]
    inputs: tuple[str, ...] = ()
    symbols: Mapping[str, Size] = field(default_factory=dict)
    operators: Counter[str] = field(default_factory=Counter)
    opaque: tuple[str, ...] = ()
    learned: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    def __repr__(self) -> str:
        takes, gives = (
            ", ".join(f"{name}: {value.type}" for name, value in named)
            for named in ([(v.name, v) for v in self.graph.main.inputs], self.graph.main.outputs.items())
        )
        held = f"{len(self.weights)} weight{'s' * (len(self.weights) != 1)}"
        return f"<imported {self.name}: ({takes}) -> ({gives}), {held}>"

    def __call__(self, *_: object, **__: object) -> NoReturn:
        """Raise FrontendError: an imported module is a graph, which runs when it is compiled."""
        raise FrontendError(
            f"{self.name} is imported, not compiled",
            source=str(user_line() or "") or None,
            hint="t.compile(imported), which returns an executable",
        )

    def arguments(self, example: tuple[Any, ...] | Mapping[str, Any]) -> dict[str, Array]:
        """Return arrays by input name, as the executable takes them, for tensors as the module takes them.

        Raises FrontendError for tensors that cannot be converted to arrays.
        """
        named = named_tensors(example) if isinstance(example, Mapping) else None
        tensors = [x for _, x in named_tensors(example)]
        pairs = named if named is not None else zip(self.inputs, tensors, strict=False)
        return {name: array_of(name, x) for name, x in pairs if name in self.inputs}


def named_tensors(values: Any) -> list[tuple[str, Any]]:
    """Return the tensors in a tree of containers, with names from their key paths as torch.export forms them: ids,
    past_0.
    """
    import torch
    from torch.utils import _pytree as pytree

    found = []
    for path, x in pytree.tree_flatten_with_path(values)[0]:
        if isinstance(x, torch.Tensor):
            name = "_".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)
            found.append((re.sub(r"\W", "_", name), x))
    return found


def expect_dense(
    name: str, tensor: Any, instead: str = "module.to_empty(device='cpu') and then load_state_dict"
) -> None:
    """Raise FrontendError for a tensor whose elements are not stored densely.

    instead  for the hint: a call that allocates the elements of a meta tensor
    """
    import torch

    if tensor.is_meta:
        raise FrontendError(f"{name} has no elements: it is on the meta device", hint=instead)
    kind = "quantized" if tensor.is_quantized else "nested" if tensor.is_nested else None
    if kind is None and tensor.layout is not torch.strided:
        kind = str(tensor.layout).removeprefix("torch.")
    if kind is not None:
        way = {"quantized": "dequantize()", "nested": "to_padded_tensor(0.0)"}.get(kind, "to_dense()")
        raise FrontendError(
            f"{name} is not a dense tensor", received=f"a {kind.lstrip('_')} tensor", hint=f"{name}.{way}"
        )


def array_of(name: str, tensor: Any) -> Array:
    """Return a tensor's elements as an array; bfloat16, which NumPy lacks, is converted to float32.

    Raises FrontendError for tensors that cannot be converted.
    """
    import torch

    expect_dense(name, tensor)
    held = tensor.detach().cpu()
    if held.dtype is torch.bfloat16:
        held = held.float()
    try:
        return np.asarray(held.resolve_conj().resolve_neg().numpy())
    except (TypeError, RuntimeError) as error:
        raise FrontendError(f"{name} cannot be converted to a NumPy array", received=str(error)[:200]) from None

"""Weights in the layout of oneDNN, by which PyTorch multiplies on processors that it knows.

    y = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "gelu", [], "none")

A weight that only products read is packed when it is bound, and its products are spelled by `torch_kernels.linear`,
which applies an activation before it stores. That is the call which torch.compile makes for a frozen model. Elsewhere,
and where a weight is read by something else too, `F.linear` reads it as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from treadle.backends.python.emission import Dialect, Line
from treadle.backends.torch.spelling import SPELLINGS, TORCH, activated
from treadle.ir.graph import Graph, Node, Value
from treadle.ir.ops.activated_products import ActivatedLinear
from treadle.ir.types import bf16, f32

if TYPE_CHECKING:
    import torch

ACTIVATIONS = {
    "gelu": '"gelu", "none"',
    "gelu_tanh": '"gelu", "tanh"',
    "silu": '"swish", ""',
    "tanh": '"tanh", ""',
    "sigmoid": '"sigmoid", ""',
}
"""What oneDNN does to a product as it stores it: its name, and its algorithm. (Its relu makes 0 of NaN.)"""

SMALLEST = 1024
"""Elements of a weight that are worth packing."""

Packing = dict[Value, str]
"""The weights that are packed, in main and in blocks, with their axes: "n k" as linear takes them, or "k n"."""


def can_pack() -> bool:
    """Whether this PyTorch has oneDNN for this processor."""
    import platform

    import torch

    known = platform.machine().lower() in ("x86_64", "amd64")
    has_it = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
    return known and has_it and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def choose_packing(graph: Graph) -> Packing:
    """The parameters of main, and of blocks that are called with such, which only products read, all in one way."""
    chosen: Packing = {}
    for function in graph.functions.values():
        uses = function.uses()
        outputs = set(function.outputs.values())
        for value in function.parameters.values():
            ways = {_way(node, at, graph, chosen) for node, at in uses.get(value, ())}
            if len(ways) == 1 and value not in outputs and _is_large(value):
                (way,) = ways
                if way is not None:
                    chosen[value] = way
    while unmet := list(_unmet(graph, chosen)):
        for value in unmet:
            chosen.pop(value, None)
    return chosen


def packed_names(graph: Graph, packing: Packing) -> dict[str, str]:
    """The weights of main that are packed, by name, with their axes."""
    return {name: packing[value] for name, value in graph.parameters.items() if value in packing}


def packed_dialect(packing: Packing) -> Dialect:
    """PyTorch's dialect, in which products with packed weights are spelled by oneDNN's call."""
    spelled = {name: _packed_or(SPELLINGS[name], packing) for name in ("linear", "matmul", "activated_linear")}
    return Dialect(TORCH.name, TORCH.imports, {**SPELLINGS, **spelled})


def pack(weight: torch.Tensor, way: str) -> torch.Tensor:
    """A weight of these axes in oneDNN's layout."""
    import torch

    rows = weight.t() if way == "k n" else weight
    made: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(rows.contiguous())
    return made


def _way(node: Node, at: int, graph: Graph, chosen: Mapping[Value, str]) -> str | None:
    """The axes in which a node would read its operand packed, or None where it would not."""
    callee = graph.callee(node)
    if callee is not None:
        return chosen.get(callee.arguments[at])
    if at != 1 or node.inputs[0].type.dtype not in (f32, bf16):
        return None
    if isinstance(node.op, ActivatedLinear):
        return str(node.op.attributes["weight_axes"])
    return {"linear": "n k", "matmul": "k n"}.get(node.op.name)


def _unmet(graph: Graph, chosen: Packing) -> Iterator[Value]:
    """Parameters of blocks that a call passes something else than packed, and those that are passed where none is."""
    for _, node in graph.walk():
        callee = graph.callee(node)
        if callee is None:
            continue
        for formal, actual in zip(callee.arguments, node.operands, strict=True):
            if actual is not None and chosen.get(formal) != chosen.get(actual):
                yield formal if formal in chosen else actual


def _is_large(value: Value) -> bool:
    shape = value.type.static_shape
    return shape is not None and len(shape) == 2 and shape[0] * shape[1] >= SMALLEST


def _packed_or(otherwise: str | Callable[[Line], str], packing: Packing) -> Callable[[Line], str]:
    def spelling(line: Line) -> str:
        weight = line.node.operands[1]
        if weight not in packing:
            return otherwise.format_map(line) if isinstance(otherwise, str) else otherwise(line)
        x, w = line.array(line.names[0]), line.array(line.names[1])
        bias = line.array("bias") if "bias" in line.names else "None"
        activation = line.op.attributes.get("activation")
        told = f", {ACTIVATIONS[activation]}" if activation in ACTIVATIONS else ""
        product = f"kernels.linear({x}, {w}, {bias}{told})"
        return product if activation is None or told else activated(activation, product)

    return spelling

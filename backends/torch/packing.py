"""Weights in oneDNN's layout, which PyTorch uses for products on supported CPUs.

    y = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "gelu", [], "none")

A weight that only products read is packed by `bind`. Its products become calls of `torch_kernels.linear`, which applies
an activation before it stores the result. torch.compile makes the same call for a frozen model. On other CPUs, and if
another op reads the weight too, `F.linear` reads the weight unpacked.

For bf16 operands, oneDNN accumulates in float32 and adds a float32 bias, but stores bf16. So a product with a float32
result is rounded once more here than its op specifies.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from treadle.backends.python.spelled_line import Line
from treadle.backends.torch.destinations import DESTINATIONS
from treadle.backends.torch.dtype_names import dtype_text
from treadle.backends.torch.spelling import SPELLINGS, TORCH, activated
from treadle.ir.graph import Node, Value
from treadle.ir.layouts import Layout
from treadle.ir.ops.activated_products import ActivatedLinear
from treadle.ir.ops.products import Linear, MatMul
from treadle.ir.types import bf16, f32
from treadle.passes.capabilities import Reads

if TYPE_CHECKING:
    import torch

ACTIVATIONS = {
    "gelu": '"gelu", "none"',
    "gelu_tanh": '"gelu", "tanh"',
    "silu": '"swish", ""',
    "tanh": '"tanh", ""',
    "sigmoid": '"sigmoid", ""',
}
"""Activations that oneDNN fuses into a product, each with oneDNN's name and algorithm. (oneDNN's relu turns NaN into
0.)
"""

SMALLEST = 1024
"""Minimum number of elements of a weight that is packed."""


def can_pack() -> bool:
    """Return True if this PyTorch has oneDNN for this CPU."""
    import platform

    import torch

    known = platform.machine().lower() in ("x86_64", "amd64")
    has_it = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
    return known and has_it and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def wants(node: Node, position: int) -> Layout | Reads:
    """Return the layout in which a node reads an operand that depends on weights alone."""
    value = node.operands[position]
    assert value is not None
    summed = node.op.attributes.get("to") in (None, f32)
    if position != 1 or node.inputs[0].type.dtype not in (f32, bf16) or not summed or not _is_large(value):
        return Reads.ROW_MAJOR
    if isinstance(node.op, ActivatedLinear):
        return Layout("onednn", transposed=node.op.weight_axes == "k n")
    if isinstance(node.op, Linear):
        return Layout("onednn")
    return Layout("onednn", transposed=True) if isinstance(node.op, MatMul) else Reads.ROW_MAJOR


def pack(weight: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Return a weight in oneDNN's layout."""
    import torch

    rows = weight.t() if layout.transposed else weight
    made: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(rows.contiguous())
    return made


def _is_large(value: Value) -> bool:
    shape = value.type.static_shape
    return shape is not None and len(shape) == 2 and shape[0] * shape[1] >= SMALLEST


def _packed_or(otherwise: str | Callable[[Line], str]) -> Callable[[Line], str]:
    def spelling(line: Line) -> str:
        weight = line.node.operands[1]
        if weight is None or weight.layout is None:
            return otherwise.format_map(line) if isinstance(otherwise, str) else otherwise(line)
        x, w = line.array(line.names[0]), line.array(line.names[1])
        bias = line.array("bias") if "bias" in line.names else "None"
        activation = line.op.attributes.get("activation")
        activation_argument = f", {ACTIVATIONS[activation]}" if activation in ACTIVATIONS else ""
        product = f"kernels.linear({x}, {w}, {bias}{activation_argument})"
        if line.op.to not in (None, line.type("x").dtype):
            product += f".to({dtype_text(line.op.to)})"
        return product if activation is None or activation_argument else activated(activation, product)

    return spelling


def _relayout(line: Line) -> str:
    """Return code that packs a weight during the call. It is used if a call of the block passes a value that depends on
    inputs.
    """
    x = line.array("x")
    return (
        f"torch.ops.mkldnn._reorder_linear_weight({x}.t().contiguous())"
        if line.op.to.transposed
        else (f"torch.ops.mkldnn._reorder_linear_weight({x}.contiguous())")
    )


_SPELLED = {name: _packed_or(SPELLINGS[name]) for name in ("linear", "matmul", "activated_linear")}

PACKED = replace(TORCH, spellings=ChainMap({**_SPELLED, "relayout": _relayout}, SPELLINGS), into=DESTINATIONS)
"""PyTorch's dialect with oneDNN's function for products with packed weights."""

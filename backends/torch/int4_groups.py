"""Weights in groups of 4 bits in the form of PyTorch's kernel for GPUs, `torch._weight_int4pack_mm`.

    y = torch._weight_int4pack_mm(x, packed, group, scales)

The kernel multiplies bf16 rows with integers of 4 bits and their bf16 scales, and needs compute capability 8.0. A
weight that only such products read is packed when it is bound: 4 bits a number, and 4 bytes a group (a scale, and a
zero point that the kernel always reads). In the original form, a group has a scale of 2 bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.ops.blocks import GroupLinear

if TYPE_CHECKING:
    import torch

LEAST = (8, 0)
"""The least compute capability of the kernel."""

_GROUPS = (32, 64, 128, 256)
_TILES = (8, 4, 2)  # the kernel's numbers of tiles of 16 columns that are stored together
_OUTPUTS = 8  # the number of rows of the weight is a multiple of this


class PackedGroups(NamedTuple):
    """A weight [n, k] in groups of 4 bits.

    numbers  i32[n / 8, k / (16 tiles), 32, tiles / 2]: the integers from 0 to 15, in the kernel's order
    scales   bf16[k / group, n, 2]: the scale of each group, and 0; a number is (q - 8) scale
    """

    numbers: torch.Tensor
    scales: torch.Tensor


def refuses_groups(capability: tuple[int, int] | None, weight: Value) -> str | None:
    """Return the reason why the kernel does not read a weight in groups of 4 bits, or None."""
    if capability is None or capability < LEAST:
        found = "unknown" if capability is None else ".".join(map(str, capability))
        return f"torch._weight_int4pack_mm needs compute capability 8.0, it is {found}"
    shape, encoding = weight.type.static_shape, weight.type.encoding
    assert encoding is not None
    if shape is None or len(shape) != 2 or shape[0] % _OUTPUTS or shape[1] % (16 * _TILES[-1]):
        return "torch._weight_int4pack_mm needs multiples of 8 rows and of 32 columns"
    if encoding.group not in _GROUPS:
        return f"torch._weight_int4pack_mm needs groups of {', '.join(map(str, _GROUPS))}"
    return None


def weights_in_groups(graph: Graph) -> dict[str, int]:
    """Return the sizes of the groups of the weights that only `group_linear` reads, by name."""
    found: dict[str, int] = {}
    for name in graph.entry_parameters:
        readers = {
            reader
            for entry in graph.later_entries
            if name in entry.parameters
            for reader in _readers(graph, entry, entry.parameters[name])
        }
        encoding = graph.entry_parameters[name].type.encoding
        if readers and encoding is not None and all(isinstance(each.op, GroupLinear) for each in readers):
            found[name] = encoding.group
    return found


def _readers(graph: Graph, function: Function, value: Value) -> Iterator[Node]:
    """Yield the nodes that read a value, also in the functions to which it is passed."""
    for node in function.nodes:
        for position, operand in enumerate(node.operands):
            if operand is not value:
                continue
            if node.op.callee is None:
                yield node
            else:
                callee = graph.functions[node.op.callee]
                yield from _readers(graph, callee, callee.arguments[position])


def packed_groups(weight: torch.Tensor, group: int) -> PackedGroups:
    """Return a weight u8[n, k / group * (group / 2 + 2)] on a device in the kernel's form.

    A group is a float16 scale, then bytes: byte i holds elements i and i + group / 2, the first in its low half. The
    kernel's function takes neighbours in one byte, the first in its high half.
    """
    import torch

    size = group // 2 + 2
    rows, count = weight.shape[0], weight.shape[1] // size
    groups = weight.reshape(rows, count, size)
    scale = groups[..., :2].clone(memory_format=torch.contiguous_format).view(torch.float16)[..., 0]
    nibbles = groups[..., 2:]
    numbers = torch.cat((nibbles & 15, nibbles >> 4), dim=-1).reshape(rows, count * group)
    pairs = numbers[:, ::2] << 4 | numbers[:, 1::2]
    tiles = next(each for each in _TILES if count * group % (16 * each) == 0)
    scales = torch.stack((scale.t(), torch.zeros_like(scale.t())), dim=-1)
    return PackedGroups(
        torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), tiles), scales.to(torch.bfloat16).contiguous()
    )

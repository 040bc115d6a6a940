"""The way in which a program for a device reads each quantized weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from treadle.ir.builder import describe_source
from treadle.ir.graph import Graph, Node, Value
from treadle.ir.ops.blocks import EncodedLinear, GroupLinear

Uses = Mapping[Value, Sequence[tuple[Node, int]]]


def notes_on_weights(graph: Graph) -> Iterator[str]:
    """Yield a line for each quantized weight of a lowered graph, with the user's line of each op that reads it."""
    for function in graph.functions.values():
        uses, once = function.uses(), function is graph.bind
        for name, value in function.parameters.items():
            for node, how in _reads(value, uses, once) if value.type.encoding is not None else ():
                place = describe_source(node.source, node.scope)
                yield f"{function.name}: {name}, {value.type.encoding}: {how}" + (f"    ({place})" if place else "")


def _reads(value: Value, uses: Uses, once: bool) -> Iterator[tuple[Node, str]]:
    """Yield the nodes that read a quantized value, and the way in which they do."""
    for node, _ in uses.get(value, ()):
        if node.op.callee is not None:
            continue
        if isinstance(node.op, EncodedLinear):
            yield node, "a product of 8-bit integers"
        elif isinstance(node.op, GroupLinear):
            yield node, "a product of bf16 and 4-bit integers, torch._weight_int4pack_mm"
        elif node.op.decodes and once:
            yield node, "decoded once, when weights are bound"
        elif node.op.decodes:
            for reader, _ in uses.get(node.result, ()):
                yield reader, f"decoded in each call, directly before {reader.op.name}"
        elif any(v.type.dtype.is_int and v.type.encoding is None for v in node.inputs):
            yield node, "rows are selected, and only these are decoded"
        else:  # it moves blocks, as a concatenation does
            yield from (read for result in node.results for read in _reads(result, uses, once))

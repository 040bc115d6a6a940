"""Inputs to try a graph on: sizes within the bounds of its symbols, and arrays with indices in range.

Which integers are indices is derived from the graph. If an op's axis rule marks a factor as indexed (`@v`), the integer
operand that indexes the factor must have values in 0 .. v - 1. If a value was reshaped, sliced, concatenated, gathered
or shifted from another value, the range applies to that value too, and so on back to the inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from treadle.ir.analysis.length_inputs import row_lengths
from treadle.ir.axes import Role
from treadle.ir.composites import body_of
from treadle.ir.errors import Hint, SizeError, UsageError
from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.literals import Literal
from treadle.ir.operation import Composite, names_operand
from treadle.ir.ops.arithmetic import Add, Sub
from treadle.ir.ops.elementwise import Cast
from treadle.ir.ops.logic import Where
from treadle.ir.sizing.sizes import Size
from treadle.ir.transforms.inline import inline_calls
from treadle.ir.types import bf16

Array = np.ndarray[Any, Any]

_LEADING, _OTHERS = (1, 2, 3), (1, 6, 17)
_LARGER = (33, 65, 129, 257)
"""Sizes for models that take no smaller ones: windows of convolutions span several elements."""
_MOST = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Range:
    """Integers from `lower` to `upper`, both included."""

    lower: int
    upper: int

    def intersect(self, other: Range | None) -> Range:
        return self if other is None else Range(max(self.lower, other.lower), min(self.upper, other.upper))

    def shift(self, by: int) -> Range:
        return Range(self.lower + by, self.upper + by)


# -- sizes -----------------------------------------------------------------------------------------------------------


def small_sizes(graph: Graph, *, refused: bool = False) -> list[dict[str, int]]:
    """Return a few assignments of sizes to the symbols, within their bounds. No two axes have equal sizes if the bounds
    allow that.

    refused  include sizes that an op refuses, such as those that a window does not fit into

    The first sizes are the smallest possible. Sizes for which a dimension would be negative are left out. Raises
    UsageError if none are left.
    """
    leading = {v.type.shape[0].as_symbol for v in graph.main.inputs if v.type.rank}
    needed = _nonnegative(graph, of_ops=not refused)
    found: list[dict[str, int]] = []
    for step, other in enumerate((*_OTHERS, *_LARGER)):
        if found and step >= len(_OTHERS):
            break
        sizes = {}
        for number, (symbol, bounds) in enumerate(graph.symbols.items()):
            size = _LEADING[step % len(_LEADING)] if symbol in leading else other + number * (step > 0)
            sizes[symbol] = max(bounds.lower, size if bounds.upper is None else min(size, bounds.upper))
        if sizes not in found and all(size.evaluate(sizes) >= 0 for size in needed):
            found.append(sizes)
    if not found:
        each, flags = (
            joint.join(mark.format(s) for s in graph.symbols) for joint, mark in ((", ", "{!r}: N"), (",", "{}=N"))
        )
        raise UsageError(
            "no small sizes fit the model",
            received=", ".join(graph.symbols),
            hint=Hint(f"sizes=[{{{each}}}], with sizes that fit", f"--sizes {flags}, with sizes that fit"),
        )
    return found


def _nonnegative(graph: Graph, *, of_ops: bool) -> set[Size]:
    """Return the sizes that may not be negative: of the dimensions of all values, and, if `of_ops`, those that ops
    require.
    """
    needed: set[Size] = set()
    for _, node in graph.walk():
        needed.update(size for value in node.results for size in value.type.shape)
        if of_ops:
            needed.update(size for size, _ in node.op.demands([None if v is None else v.type for v in node.operands]))
    return {size for size in needed if size.symbols}


def filled_sizes(graph: Graph, least: int) -> dict[str, int]:
    """Return sizes of the symbols within their bounds at which no dimension of a value is empty, if such sizes are
    found. They are unequal, and `least` or larger, if the bounds allow that.
    """
    dims = {size for _, node in graph.walk() for value in node.results for size in value.type.shape}
    sizes: dict[str, int] = {}
    for scale in (1, 8, 64, 512):
        for number, (symbol, bounds) in enumerate(sorted(graph.symbols.items())):
            size = bounds.lower - 1 + scale * least + number
            sizes[symbol] = size if bounds.upper is None else min(size, bounds.upper)
        if all(size.evaluate(sizes) > 0 for size in dims):
            break
    return sizes


# -- indices ---------------------------------------------------------------------------------------------------------


def index_ranges(graph: Graph, sizes: Mapping[str, int]) -> dict[str, Range]:
    """Return the range of valid values for each integer input that is used as an index, by name."""
    main = inline_calls(graph).main
    ranges = _ranges(main, {}, sizes)
    return {v.name: ranges[v] for v in main.inputs if v in ranges}


def _ranges(function: Function, results: dict[Value, Range], sizes: Mapping[str, int]) -> dict[Value, Range]:
    """Return the ranges required of a function's values: carry the ranges of its results back through each node to the
    node's operands.
    """
    found = dict(results)
    for node in reversed(function.nodes):
        for value, asked in _asked_of_operands(node, found, sizes):
            if value.type.dtype.is_int:
                found[value] = asked.intersect(found.get(value))
    return found


def _asked_of_operands(
    node: Node, found: Mapping[Value, Range], sizes: Mapping[str, int]
) -> Iterator[tuple[Value, Range]]:
    if not any(v.type.dtype.is_int for v in node.inputs):
        return
    types = [None if v is None else v.type for v in node.operands]
    application = node.op.apply(types)
    indexed = {name for name, factor in application.factors.items() if factor.role is Role.INDEXED}
    for value, dims in zip(node.operands, application.operands, strict=True):
        if indexed and value is not None and indexed.isdisjoint(name for d in dims or () for name in d.factors):
            yield value, Range(0, min(application.dims[name].size.evaluate(sizes) for name in indexed) - 1)
    asked = found.get(node.results[0])
    if asked is not None:
        yield from _carried_back(node, asked)
    elif not indexed and isinstance(node.op, Composite):
        body = body_of(node.op, types)
        inside = _ranges(body, {}, sizes)
        for value, formal in zip(node.inputs, body.inputs, strict=True):
            if formal in inside:
                yield value, inside[formal]


def _carried_back(node: Node, asked: Range) -> Iterator[tuple[Value, Range]]:
    """Yield the ranges required of a node's operands whose elements the result contains: moved, selected, or shifted
    by a constant.

    If the node selects between x and x shifted, as for negative indices, which count from the end, the range applies to
    x only.
    """
    op, names = node.op, node.op.operand_names(len(node.operands))
    carriers = [
        value
        for name, value in zip(names, node.operands, strict=True)
        if value is not None and (isinstance(op, Cast) or names_operand(op.moved_operands, name))
    ]
    plain = [x for x in carriers if isinstance(op, Where) and any(_shifts(value, x) for value in carriers)]
    for value in plain or carriers:
        yield value, asked
    if isinstance(op, (Add, Sub)):
        x, y = node.inputs
        if (shift := _scalar(y)) is not None:
            yield x, asked.shift(-shift if isinstance(op, Add) else shift)
        elif isinstance(op, Add) and (shift := _scalar(x)) is not None:
            yield y, asked.shift(-shift)


def _shifts(value: Value, x: Value) -> bool:
    """Return True if a value is x plus or minus a number."""
    node = value.node
    return node is not None and isinstance(node.op, (Add, Sub)) and x in node.inputs


def _scalar(value: Value) -> int | None:
    number = value.literal.scalar if value.literal is not None else None
    return int(number) if isinstance(number, int) else None


# -- arrays ----------------------------------------------------------------------------------------------------------


def draw_inputs(graph: Graph, sizes: Mapping[str, int], seed: Sequence[int]) -> dict[str, Array]:
    """Return an array for every input, drawn from the seed.

    Floats are normally distributed. Indices are drawn from their whole range. Lengths of rows are between 1 and the
    number of positions, other integers between 1 and the greatest size. Three in four booleans are true. Raises
    UsageError if no index is valid for all uses of an input, SizeError for a negative size.
    """
    ranges = index_ranges(graph, sizes)
    positions = {name: size.evaluate(sizes) for name, size in row_lengths(graph).items()}
    inputs = {}
    for number, value in enumerate(graph.main.inputs):
        rng = np.random.default_rng([*seed, number])
        dtype, shape = value.type.dtype, value.type.evaluate(sizes)
        if negative := [size for size, count in zip(value.type.shape, shape, strict=True) if count < 0]:
            raise SizeError(
                f"input {value.name} has a negative size, where {', '.join(f'{s} = {n}' for s, n in sizes.items())}",
                received=f"{value.name}: {value.type}",
                hint=f"sizes for which {negative[0]} is 0 or more",
            )
        if dtype.is_float:
            drawn: Array = held(rng.standard_normal(shape), value)
        elif dtype.is_int:
            most_positions = positions.get(value.name, max(sizes.values(), default=1))
            span = Range(0, _MOST).intersect(ranges.get(value.name, Range(1, most_positions)))
            most = min(span.upper, int(np.iinfo(dtype.numpy or np.int64).max))
            if most < span.lower:
                raise UsageError(f"no value of input {value.name} is a valid index for every axis that it indexes")
            drawn = rng.integers(span.lower, most + 1, shape).astype(dtype.numpy)
        else:
            drawn = rng.random(shape) < 0.75
        inputs[value.name] = drawn
    return inputs


def held(array: Array, value: Value) -> Array:
    """Round numbers to a value's dtype. Return an array that backends accept for the value: float32 for bf16. Blocks
    are returned unchanged.
    """
    dtype = value.type.dtype
    if value.type.encoding is not None:
        return array
    with np.errstate(over="ignore"):
        return Literal.of(array, bf16).array if dtype is bf16 else array.astype(dtype.numpy)

"""Regions as graphs that can be run: at their own sizes, or with large constant axes made small.

A rewrite treats an axis of 768 like one of 48, unless it depends on the number. So constants above `KEPT` are replaced
in types, in attributes that are sizes and in patterns of axes, such that products stay products: with 64 -> 4, 768 = 12
* 64 becomes 48, and 3072 = 4 * 768 becomes 192. The types in between are inferred again. If these types do not match,
or if the two small graphs disagree, the region is run at full size. A number may depend on a size, as 1/sqrt(64) does.
So a size stays unchanged if a float constant is a power of it, with an exponent that is a multiple of 1/4.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from treadle.ir.errors import GraphError
from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.operation import Op
from treadle.ir.ops.shapes import Rearrange
from treadle.ir.sizing.sizes import Size
from treadle.ir.types import Dim, Factor, Type, boolean
from treadle.passes.certificates.regions import Region, RegionNode

KEPT = 16
"""Constant sizes up to this number are not replaced."""
_MOST_TRIES = 4
_EVEN, _ODD = (4, 6, 10, 14, 22, 26), (5, 7, 9, 11, 13, 15)

Shrinking = Mapping[int, int]
"""The replacement of each constant size."""


def shrinkings_of(region: Region) -> Iterator[Shrinking]:
    """Yield replacements of a region's large sizes: of all of them, and then of all but one, because the rewrite may
    depend on that one.

    Yield nothing if there are no large sizes, or if the region calls functions.
    """
    steps = (*region.before, *region.after)
    if any(step.op.callee is not None for step in steps):
        return
    pinned: set[int] = set()
    found: set[int] = set()
    values = [*region.free, *(v for step in steps for v in (*step.node.results, *step.operands) if v is not None)]
    for value in values:
        (found if value.literal is None else pinned).update(_constants(value.type))
    for step in steps:
        found.update(c for attribute in step.op.attributes.values() for c in _constants_of(attribute))
    numbers = set(_numbers(region))
    pinned.update(c for c in found if c > KEPT and any(_is_power(n, c) or _is_power(n, c - 1) for n in numbers))
    constants = {c for c in found | pinned if c > 1}
    shrinking, bases = _small(constants, pinned)
    if shrinking:
        yield shrinking
    for base in bases[:_MOST_TRIES] if len(bases) > 1 else ():
        yield _small(constants, pinned | {base})[0]


def has_numbers(region: Region) -> bool:
    """Return True if some number in the region could depend on a size: it is not a small integer, half of one, or an
    eps.
    """
    return any(n > _EPSILON and n not in (0.5, 1.0, 2.0, 3.0) for n in _numbers(region))


_EPSILON = 1e-4


def _numbers(region: Region) -> Iterator[float]:
    """Yield the absolute values of all finite scalar constants and attributes that are floats, or integers above
    `KEPT`.
    """
    for step in (*region.before, *region.after):
        for number in (
            *(v.literal.scalar for v in step.operands if v is not None and v.literal is not None),
            *step.op.attributes.values(),
        ):
            is_number = isinstance(number, float) or (isinstance(number, int) and abs(number) > KEPT)
            if is_number and number and math.isfinite(number):
                yield abs(float(number))


def _is_power(number: float, size: int) -> bool:
    """Return True if a number is size^(k/4), for a k other than 0 from -8 to 8, within the roundings of float32."""
    power = 4 * math.log(number) / math.log(size)
    return 0 < abs(round(power)) <= 8 and abs(size ** (round(power) / 4) / number - 1) < 2.0**-20


def _constants(type: Type) -> Iterator[int]:
    for dim in type.dims:
        for size in (dim.size, *(f.size for f in dim.factors)):
            yield from _constants_of(size)


def _constants_of(attribute: Any) -> Iterator[int]:
    if isinstance(attribute, Size):
        yield from (abs(coefficient) for _, coefficient in attribute.terms)
    elif isinstance(attribute, tuple):
        for each in attribute:
            yield from _constants_of(each)


def _small(constants: set[int], pinned: set[int]) -> tuple[dict[int, int], list[int]]:
    """Return the replacement of each large constant, and the list of the constants that are not products of others."""
    made: list[int] = []
    chosen = {c: c for c in constants if c <= KEPT or c in pinned}
    bases = {0: iter(_EVEN), 1: iter(_ODD)}

    def small(c: int) -> int:
        if c <= KEPT:
            return c
        if c not in chosen:
            chosen[c] = next(bases[c % 2], c)
            made.append(c)
        return chosen[c]

    for c in sorted(constants - chosen.keys()):
        divisor = max((p for p in chosen if 1 < p < c and c % p == 0), default=None)
        if divisor is None:
            small(c)
        else:
            chosen[c] = chosen[divisor] * small(c // divisor)
    return {c: s for c, s in chosen.items() if c != s}, made


# -- building --------------------------------------------------------------------------------------------------------


def as_graphs(
    region: Region,
    results: tuple[Sequence[Value], Sequence[Value]],
    graphs: tuple[Graph, Graph],
    shrinking: Shrinking,
) -> tuple[Graph, Graph]:
    """Return the region's two sides as graphs with the same inputs, x0, x1, ..., and outputs, y0, y1, ...

    A symbol's size need not appear in any input, so each symbol has an additional input: `size S`.
    graphs   the graphs in which each side's calls find their functions. Raises a TreadleError if the reduced sizes
             do not match.
    """
    symbols = graphs[1].symbols
    used = sorted(_symbols(region).intersection(symbols))
    made = []
    for steps, outputs, source in zip((region.before, region.after), results, graphs, strict=True):
        graph = Graph("region")
        graph.symbols = {s: symbols[s] for s in symbols if s in used}
        if any(step.op.callee is not None for step in steps):
            blocks = {n: f for n, f in source.functions.items() if n not in source.entry_names}
            graph.functions = {**blocks, "main": Function("main")}
        _fill(graph.main, region.free, steps, outputs, shrinking)
        graph.main.inputs += [Value("input", boolean[s], f"size {s}") for s in used]
        made.append(graph)
    return made[0], made[1]


def _symbols(region: Region) -> set[str]:
    found: set[str] = set()
    for value in region.free:
        found |= value.type.symbols
    for step in (*region.before, *region.after):
        for value in step.node.results:
            found |= value.type.symbols
        found |= {s for attribute in step.op.attributes.values() for s in _symbols_of(attribute)}
        if step.op.callee is not None:
            found |= {s for t in (*step.op.takes, *step.op.gives) for s in t.symbols}  # type: ignore[attr-defined]
    return found


def _symbols_of(attribute: Any) -> Iterable[str]:
    if isinstance(attribute, Size):
        return attribute.symbols
    return {s for each in attribute for s in _symbols_of(each)} if isinstance(attribute, tuple) else ()


def _fill(
    function: Function,
    free: Sequence[Value],
    steps: Sequence[RegionNode],
    outputs: Sequence[Value],
    shrinking: Shrinking,
) -> None:
    values: dict[Value | None, Value | None] = {None: None}
    for number, value in enumerate(free):
        values[value] = made = Value("input", shrunk_type(value.type, shrinking), f"x{number}")
        function.inputs.append(made)

    def read(value: Value | None) -> Value | None:
        return value if value is not None and value.literal is not None else values[value]

    for step in steps:
        operands = [read(v) for v in step.operands]
        results = step.node.results
        if step.op.callee is not None and len(step.op.gives) != len(results):  # type: ignore[attr-defined]
            raise GraphError("a call's results no longer have the types that its function returned")
        op = _shrunk_op(step.op, shrinking) if shrinking else step.op
        types = op.infer([None if v is None else v.type for v in operands]) if shrinking else [v.type for v in results]
        node = Node(op, operands, types)
        function.nodes.append(node)
        values.update(zip(results, node.results, strict=True))
    for number, value in enumerate(outputs):
        found = read(value)
        assert found is not None
        function.outputs[f"y{number}"] = found


def shrunk_type(type: Type, shrinking: Shrinking) -> Type:
    if not shrinking:
        return type
    return Type(
        type.dtype,
        tuple(Dim([Factor(_shrunk_size(f.size, shrinking), f.label) for f in dim.factors]) for dim in type.dims),
    )


def _shrunk_size(size: Size, shrinking: Shrinking) -> Size:
    def small(coefficient: int) -> int:
        known = shrinking.get(abs(coefficient), abs(coefficient))
        return known if coefficient > 0 else -known

    return Size([(atoms, small(coefficient)) for atoms, coefficient in size.terms])


def _shrunk_op(op: Op, shrinking: Shrinking) -> Op:
    changed = {}
    for name, value in op.attributes.items():
        new = _shrunk_attribute(value, shrinking)
        if isinstance(op, Rearrange) and isinstance(value, str):
            new = re.sub(r"(?<!\w)\d+\b", lambda m: str(shrinking.get(int(m[0]), int(m[0]))), value)
        if new != value:
            changed[name] = new
    return dataclasses.replace(op, **changed) if changed else op  # type: ignore[type-var]


def _shrunk_attribute(value: Any, shrinking: Shrinking) -> Any:
    if isinstance(value, Size):
        return _shrunk_size(value, shrinking)
    return tuple(_shrunk_attribute(v, shrinking) for v in value) if isinstance(value, tuple) else value

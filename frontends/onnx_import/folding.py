"""Constant folding of nodes at import. Operands may be numbers, or sizes with symbols.

Numbers: the operator's handler builds the node in a separate graph, which is interpreted. So the node has the same
meaning as in the model. Sizes: if an operator only rearranges elements, it is evaluated on their positions, and the
sizes are substituted afterwards. The arithmetic of exporters on sizes (Add, Mul, Div, Equal, ...) is in
`treadle.ir.sizing.sizes`; it is evaluated if the result is the same for all values of the symbols.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from treadle.frontends.onnx_import.operators import OnnxSite, Operator
from treadle.frontends.onnx_import.rules.elements import Element, named
from treadle.frontends.onnx_import.values import MOST_KNOWN, MOST_SYMBOLIC, Array, Known, as_sizes, tidied
from treadle.ir.builder import Builder
from treadle.ir.graph import Graph
from treadle.ir.interpreter import interpret
from treadle.ir.sizing.size_bounds import Bounds
from treadle.ir.sizing.sizes import ZERO, Size, product

_MOST_BETWEEN = 1 << 16
"""Maximum number of elements of an intermediate value."""

Fold = Callable[[Sequence[Known | None], Builder], list[Known | None]]
"""Runs the node's handler on other operands, in another graph, and returns the results in order."""


def evaluated(
    site: OnnxSite, operator: Operator, kinds: Sequence[Element | None], run: Fold
) -> list[Known | None] | None:
    """Return the results of a node whose operands are all known. None if the node cannot be evaluated.

    kinds   the element types of its outputs, if the specification gives them
    """
    present = [v for i, v in enumerate(site.inputs) if v is not None and i not in operator.types]
    contents = [c for v in present if (c := v.content) is not None]
    if not present or len(contents) < len(present):
        return None
    if not any(v.is_symbolic for v in present):
        return _of_numbers(site.inputs, run)
    if sum(c.size for c in contents) > MOST_SYMBOLIC:
        return None
    if operator.moves is not None:
        return _moved(site, operator.moves, run)
    if operator.name == "Cast":
        to = site.importer.element(site.int("to", 0))
        return [Known(to, content=contents[0])] if to.name in ("INT32", "INT64") else None
    rule = _ARITHMETIC.get(operator.name)
    found = None if rule is None else rule(contents, site)
    if found is None:
        return None
    return [Known(named("BOOL") if found.dtype == np.bool_ else kinds[0] or present[0].type, content=found)]


def _of_numbers(inputs: Sequence[Known | None], run: Fold) -> list[Known | None] | None:
    scratch = Graph("fold")
    b = Builder(scratch)
    known = [None if v is None else Known(v.type, content=v.content, name=v.name) for v in inputs]
    made = run(known, b)
    between = [r.type.elements.constant for node in scratch.main.nodes for r in node.results]
    if any(n is None or n > _MOST_BETWEEN for n in between):
        return None
    exprs = {str(i): v.on_graph for i, v in enumerate(made) if v is not None and v.on_graph is not None}
    if any(x.type.elements.constant is None or x.type.elements.constant > MOST_KNOWN for x in exprs.values()):
        return None
    scratch.main.outputs = {name: x.value for name, x in exprs.items()}
    found = interpret(scratch, {}) if exprs else {}
    return [v if v is None or str(i) not in found else Known(v.type, content=found[str(i)]) for i, v in enumerate(made)]


def _moved(site: OnnxSite, moves: tuple[int, ...], run: Fold) -> list[Known | None] | None:
    """Evaluate a node that only rearranges elements: run it on the positions of the elements."""
    moving = range(len(site.inputs)) if moves == (-1,) else moves
    places: list[Size] = []
    inputs: list[Known | None] = []
    kind = named("INT64")
    for position, value in enumerate(site.inputs):
        if value is None or position not in moving:
            if value is not None and value.is_symbolic:
                return None
            inputs.append(value)
            continue
        content = value.content
        assert content is not None
        if value.type.is_float:  # float values are not sizes
            return None
        kind = value.type
        index = np.arange(len(places), len(places) + content.size, dtype=np.int64).reshape(content.shape)
        places += as_sizes(content)
        inputs.append(Known(named("INT64"), content=index, name=value.name))
    found = _of_numbers(inputs, run)
    if found is None:
        return None
    contents = [None if v is None else v.content for v in found]
    return [
        None if c is None else Known(kind, content=tidied([places[int(i)] for i in c.flat], c.shape)) for c in contents
    ]


# -- arithmetic of sizes -------------------------------------------------------------------------------------------


def _sizes(content: Array) -> Array:
    made = np.empty(content.shape, object)
    made.reshape(-1)[:] = as_sizes(content)
    return made


def _elementwise(
    rule: Callable[[Size, Size, Mapping[str, Bounds]], Any],
) -> Callable[[list[Array], OnnxSite], Array | None]:
    def evaluate(contents: list[Array], site: OnnxSite) -> Array | None:
        result = _sizes(contents[0])
        symbols = site.importer.graph.symbols
        for other in contents[1:]:
            left, right = np.broadcast_arrays(result, _sizes(other))
            made = [rule(x, y, symbols) for x, y in zip(left.flat, right.flat, strict=True)]
            if any(x is None for x in made):
                return None
            if made and isinstance(made[0], bool):
                return np.array(made, np.bool_).reshape(left.shape)
            result = np.empty(left.shape, object)
            result.reshape(-1)[:] = made
        return tidied(result.flat, result.shape)

    return evaluate


def is_at_least(x: Size, y: Size, symbols: Mapping[str, Bounds]) -> bool | None:
    """Return True if x >= y for all values of the symbols, False if for none; None if it depends on them, or is
    unknown.
    """
    bounds = (x - y).bounds(symbols)
    if bounds.lower >= 0:
        return True
    return False if bounds.upper is not None and bounds.upper < 0 else None


def _quotient(x: Size, y: Size, symbols: Mapping[str, Bounds]) -> Size | None:
    """Return x / y by ONNX's division of integers, toward zero: floor division if neither is negative. None if
    unknown.
    """
    exact = x.divide(y)
    if exact is not None:
        return exact
    return x // y if x.bounds(symbols).lower >= 0 and y.bounds(symbols).lower > 0 else None


def _remainder(x: Size, y: Size, symbols: Mapping[str, Bounds]) -> Size | None:
    whole = _quotient(x, y, symbols)
    return None if whole is None else x - whole * y


def _larger(x: Size, y: Size, symbols: Mapping[str, Bounds]) -> Size | None:
    first = is_at_least(x, y, symbols)
    second = is_at_least(y, x, symbols)
    return x if first else y if first is False or second else None


def _smaller(x: Size, y: Size, symbols: Mapping[str, Bounds]) -> Size | None:
    larger = _larger(x, y, symbols)
    return None if larger is None else y if larger is x else x


def _equal(x: Size, y: Size, symbols: Mapping[str, Bounds]) -> bool | None:
    if x == y:
        return True
    apart = is_at_least(x, y + 1, symbols) or is_at_least(y, x + 1, symbols)
    return False if apart else None


def _greater(x: Size, y: Size, symbols: Mapping[str, Bounds]) -> bool | None:
    return is_at_least(x, y + 1, symbols)


def _reduced(combine: Callable[[Sequence[Size]], Size]) -> Callable[[list[Array], OnnxSite], Array | None]:
    def evaluate(contents: list[Array], site: OnnxSite) -> Array | None:
        content, rank = contents[0], contents[0].ndim
        axes = site.ints("axes") or (tuple(int(n) for n in contents[1].flat) if len(contents) > 1 else ())
        site.int("noop_with_empty_axes")
        if rank != 1 or any(site.axis(axis, rank) for axis in axes):
            return None
        made = combine(as_sizes(content))
        return tidied([made], (1,) if site.int("keepdims", 1) else ())

    return evaluate


def _sum(sizes: Sequence[Size]) -> Size:
    total = ZERO
    for size in sizes:
        total = total + size
    return total


_ARITHMETIC: dict[str, Callable[[list[Array], OnnxSite], Array | None]] = {
    "Add": _elementwise(lambda x, y, _: x + y),
    "Sub": _elementwise(lambda x, y, _: x - y),
    "Mul": _elementwise(lambda x, y, _: x * y),
    "Div": _elementwise(_quotient),
    "Mod": _elementwise(_remainder),
    "Max": _elementwise(_larger),
    "Min": _elementwise(_smaller),
    "Equal": _elementwise(_equal),
    "Greater": _elementwise(_greater),
    "Less": _elementwise(lambda x, y, s: _greater(y, x, s)),
    "GreaterOrEqual": _elementwise(is_at_least),
    "LessOrEqual": _elementwise(lambda x, y, s: is_at_least(y, x, s)),
    "Neg": lambda contents, _: tidied([-x for x in as_sizes(contents[0])], contents[0].shape),
    "ReduceProd": _reduced(product),
    "ReduceSum": _reduced(_sum),
}

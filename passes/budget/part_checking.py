"""Check regions that are computed in parts, independently of the code that rewrote them.

    slices   the slices of an input are contiguous and cover the axis, also if the number of parts does not divide it
    nodes    the nodes of a part are the nodes of the region, in order, with corresponding operands
    numbers  if a node of the region and the part's node get the same numbers, the part's node returns the corresponding
             part of the result

Types define which values are split, and in which dimension: the type of a part differs there from the whole type. So a
part of a value remains a part from one node to the next. Ops are run by their references, on drawn numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from treadle.ir.builder import describe_source
from treadle.ir.errors import PassError
from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.ops.parts import Concat, Slice
from treadle.ir.sizing.sizes import Size
from treadle.ir.types import Type
from treadle.passes.budget.parts import Parted

Array = np.ndarray[Any, Any]
_LARGE = 1 << 22  # an array with more elements stays in float32


def check_parts(graph: Graph, parted: Parted) -> None:
    """Raise PassError for the first difference, with the node and the user's line."""
    _Check(graph, parted).check()


class _Check:
    def __init__(self, graph: Graph, parted: Parted) -> None:
        self.graph, self.parted = graph, parted
        self.edges: list[tuple[Size, Size]] = []
        self.sizes: Mapping[str, int] = {}
        self.known: set[tuple[object, ...]] = set()

    def check(self) -> None:
        region, parts = self.parted.region, self.parted.parts
        self.edges = [self._edges(part.slices) for part in parts]
        self.sizes = self._drawn(len(parts) + 1)
        for more in (1, 2, len(parts), len(parts) + 1, 3 * len(parts) + 2):
            self._covered(self._drawn(more))
        few = sorted({0, len(parts) // 2, len(parts) - 1})
        for number, part in enumerate(parts):
            callee = self.graph.callee(part.call)
            if callee is None:
                raise self._wrong("a part is not a call", part.call)
            operands = dict(zip(callee.arguments, part.call.operands, strict=True))
            stands: dict[Value, Value] = {}
            for value in region.inputs:
                wanted = part.slices[value].result if value in part.slices else value
                formals = [formal for formal, v in operands.items() if v is wanted]
                if len(formals) != 1:
                    raise self._wrong(f"a part does not read {value.name}", part.call)
                stands[value] = formals[0]
            self._nodes(region.nodes, callee, stands, number if number in few else None)
            results = [stands.get(v) for v in region.outputs]
            if results != list(callee.results):
                raise self._wrong("a part returns other values than the region", part.call)
        for at, value in enumerate(region.outputs):
            joined = self.parted.joined[value]
            given = [part.call.results[at] for part in parts]
            dim = self._cut(value.type, given[0].type)
            if not isinstance(joined.op, Concat) or list(joined.operands) != given or dim is None:
                raise self._wrong(f"parts of {value.name} are not joined in order", joined)
            if joined.op.axis % value.type.rank != dim:
                raise self._wrong(f"parts of {value.name} are joined along another axis", joined)

    def _drawn(self, least: int) -> dict[str, int]:
        """Return a size for each symbol, within its bounds. Symbols of the axis get at least `least`, if their upper
        bounds allow it.
        """
        axis = self.parted.region.size.symbols
        found = {}
        for symbol, bounds in self.graph.symbols.items():
            size = max(bounds.lower, least if symbol in axis else 2)
            found[symbol] = size if bounds.upper is None else min(size, bounds.upper)
        return found

    # -- slices ----------------------------------------------------------------------------------------------

    def _edges(self, slices: Mapping[Value, Node]) -> tuple[Size, Size]:
        """Return the start and the end of a part, after checking that all its slices agree."""
        found = []
        for value, node in slices.items():
            op = node.op
            if not isinstance(op, Slice) or op.stride != 1 or node.operands != (value,):
                raise self._wrong(f"{value.name} is not split by a slice", node)
            found.append(op.span(value.type.shape[op.axis]))
        if not found or any(each != found[0] for each in found):
            raise self._wrong("slices of a part differ in their start or end", self.parted.region.nodes[0])
        return found[0]

    def _covered(self, sizes: Mapping[str, int]) -> None:
        at = 0
        for start, stop in self.edges:
            if start.evaluate(sizes) != at or stop.evaluate(sizes) < at:
                raise self._wrong(f"parts are not contiguous at {dict(sizes)}", self.parted.region.nodes[0])
            at = stop.evaluate(sizes)
        if at != self.parted.region.size.evaluate(sizes):
            raise self._wrong(f"parts do not cover the axis at {dict(sizes)}", self.parted.region.nodes[0])

    # -- nodes -----------------------------------------------------------------------------------------------

    def _nodes(self, nodes: Sequence[Node], made: Function, stands: dict[Value, Value], number: int | None) -> None:
        """Check the nodes of a part against the nodes of the region.

        number  the index of the part whose numbers are compared; None to check only the operands
        """
        if len(nodes) != len(made.nodes):
            raise self._wrong("a part has other nodes than the region", nodes[0])
        for old, new in zip(nodes, made.nodes, strict=True):
            wanted = [v if v is None or v.literal is not None else stands.get(v) for v in old.operands]
            if list(new.operands) != wanted or len(old.results) != len(new.results):
                raise self._wrong("a node of a part reads another value than the region's node", old)
            stands.update(zip(old.results, new.results, strict=True))
            callee, part = self.graph.callee(old), self.graph.callee(new)
            if callee is not None and part is not None:
                if callee is part:
                    if any(a.type != b.type for a, b in zip(old.inputs, new.inputs, strict=True)):
                        raise self._wrong("a call reads a part of a value that it needs whole", old)
                    continue
                inner = dict(zip(callee.arguments, part.arguments, strict=True))
                self._nodes(callee.nodes, part, inner, number)
                if [inner.get(v, v) for v in callee.results] != list(part.results):
                    raise self._wrong("a part returns other values than the function", old)
            elif callee is not None or part is not None:
                raise self._wrong("a call replaces an op", old)
            elif number is not None:
                self._numbers(old, new, number)

    def _numbers(self, old: Node, new: Node, number: int) -> None:
        operands = tuple([None if v is None else v.type for v in old.operands])
        taken = tuple([None if v is None else v.type for v in new.operands])
        literals = tuple([None if v is None or v.literal is None else v.literal.data for v in old.operands])
        if old.op == new.op and operands == taken:
            return  # the same op on the same types: nothing is split
        key = old.op, new.op, operands, taken, literals, number
        if key in self.known:
            return
        self.known.add(key)
        rng = np.random.default_rng(0)
        whole = [None if v is None else self._array(v, rng) for v in old.operands]
        cut = [None if x is None else self._part(x, v.type, w.type, number) for x, v, w in self._each(old, new, whole)]
        results = self._run(old, whole), self._run(new, cut)
        for a, b, v, w in zip(*results, old.results, new.results, strict=True):
            wanted = self._part(a, v.type, w.type, number)
            close = wanted.shape == b.shape and np.allclose(wanted, b, rtol=1e-4, atol=1e-5, equal_nan=True)
            if not close:
                raise self._wrong(f"part {number} of {v.name} differs from the result of the part's node", old)

    def _each(self, old: Node, new: Node, arrays: Sequence[Array | None]) -> list[tuple[Any, Any, Any]]:
        return list(zip(arrays, old.operands, new.operands, strict=True))

    def _run(self, node: Node, operands: Sequence[Array | None]) -> tuple[Array, ...]:
        with np.errstate(all="ignore"):
            made = node.op.at(self.sizes).reference(*operands)
        return made if isinstance(made, tuple) else (np.asarray(made),)

    def _array(self, value: Value, rng: np.random.Generator) -> Array:
        if value.literal is not None:
            return np.asarray(value.literal.array)
        shape, dtype = value.type.evaluate(self.sizes), value.type.dtype
        if value.type.encoding is not None:
            return value.type.encoding.sample(rng, shape)
        if dtype.is_float:
            drawn: Array = rng.random(shape, np.float32) - np.float32(0.5)
            return drawn if drawn.size > _LARGE or dtype.numpy is None else drawn.astype(dtype.numpy)
        drawn = rng.integers(0, 2, shape)  # indices that are valid in every axis of two
        return drawn.astype(dtype.numpy)

    def _part(self, array: Array, whole: Type, part: Type, number: int) -> Array:
        dim = self._cut(whole, part)
        if dim is None:
            return array
        start, stop = (edge.evaluate(self.sizes) for edge in self.edges[number])
        return array[(slice(None),) * dim + (slice(start, stop),)]

    def _cut(self, whole: Type, part: Type) -> int | None:
        """Return the dimension in which a type is a part of another one, or None if the types are equal."""
        dims = [i for i, (a, b) in enumerate(zip(whole.shape, part.shape, strict=True)) if a != b]
        if (
            whole.encoding != part.encoding
            or len(dims) > 1
            or (dims and whole.shape[dims[0]] != self.parted.region.size)
        ):
            raise self._wrong(f"{part} is not a part of {whole}", self.parted.region.nodes[0])
        return dims[0] if dims else None

    def _wrong(self, what: str, node: Node) -> PassError:
        return PassError(
            f"a computation in parts is wrong: {what}",
            within=f"{self.parted.region.function.name}: {node.op.name}",
            source=describe_source(node.source, node.scope),
        )

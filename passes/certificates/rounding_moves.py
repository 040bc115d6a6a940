"""The change of a region's results when its inputs change by a rounding.

Inputs change by a spacing of float64, up or down. Scalar constants change by a spacing of the dtype in which they are
written, since sqrt(1/2) in float32 differs that much from the exact value in gelu. Folded values are constants in their
dtype, so in that case all constants change. Changes can cancel, as the same scale on q and on k can, or be the same for
all numbers from which a norm subtracts their mean. So they are tried in steps, as far as needed:

    1   everything at once, twice, up or down at random
    2   each constant alone; its moves are added to the moves of the inputs
    3   everything at once, eight times more
    4   the rounding of a score next to a number that masks: with -1e9 added to it, at most a spacing of 1e9

Masking numbers are meant to be equal: a row in which every key is masked by float32's lowest number is uniform, and a
change of one of these numbers would leave a single key. So equal constants of that size change together, and numbers
that absorb every score do not change.

If the sides run in the graph's own dtypes, inputs and constants other than masks change by a spacing of their dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from treadle.ir.analysis.tolerances import spacing_of
from treadle.ir.graph import Graph, Node, Value
from treadle.ir.interpreter import interpret
from treadle.ir.literals import Literal
from treadle.ir.types import f64

Array = np.ndarray[Any, Any]
Arrays = Mapping[str, Array]

HUGE = 1e30
"""Numbers of this magnitude represent infinity, and do not count for the scale of other numbers. They absorb every
score.
"""
MASKING = 9_000.0
"""Numbers of this magnitude mask: exp(-9000) is 0."""
_LOST = 64.0
"""If the spacing of a number is above this, adding a score to the number leaves it unchanged."""
_AT_ONCE, _MORE = 2, 8
_MOST_ALONE = 32
"""The greatest number of constants that are changed one by one."""


class Moves:
    """The largest move of each output of either side so far, and the positions at which values changed.

    most, others   by the output's name, for floats and for other dtypes; zero and False before the first `further`
    float64        True if the sides ran in float64, False if in the graph's own dtypes
    """

    def __init__(
        self, sides: tuple[Graph, Graph], made: Sequence[Arrays], inputs: Arrays, float64: bool = True
    ) -> None:
        self._sides, self._made, self._inputs, self._float64 = sides, made, inputs, float64
        self.most = dict.fromkeys(made[0], 0.0)
        self.others = {name: np.zeros(array.shape, np.bool_) for name, array in made[0].items()}
        self._steps = iter((lambda: self._at_once(range(_AT_ONCE)), self._alone, self._more, self._beside_masks))

    def further(self) -> bool:
        """Try the next step. Return False if there is no further step."""
        step = next(self._steps, None)
        if step is not None:
            step()
        return step is not None

    def _more(self) -> None:
        self._at_once(range(_AT_ONCE, _AT_ONCE + _MORE))

    def _at_once(self, rounds: range) -> None:
        every = _has_new_constants(*self._sides)
        for number in rounds:
            rng = np.random.default_rng(number)
            changed = self._changed_inputs(rng)
            drawn = rng.bit_generator.state  # both sides draw from here on
            for side, original in zip(self._sides, self._made, strict=True):
                rng.bit_generator.state = drawn
                signs = {value: self._signs_of(value, rng, number) for value in constants_of(side, every)}
                for name, move in self._moved(self._with_changed(side, signs), original, changed).items():
                    self.most[name] = max(self.most[name], move)

    def _alone(self) -> None:
        every = _has_new_constants(*self._sides)
        for side, original in zip(self._sides, self._made, strict=True):
            rng = np.random.default_rng(0)
            total = self._moved(side, original, self._changed_inputs(rng))
            alone = [value for value in constants_of(side, every) if not _only_masks(value)]
            for value in alone[:_MOST_ALONE]:
                signs = {value: self._signs_of(value, rng, 0)}
                for name, move in self._moved(self._with_changed(side, signs), original, self._inputs).items():
                    total[name] += move
            for name, move in total.items():
                self.most[name] = max(self.most[name], move)

    def _beside_masks(self) -> None:
        """Add the spacing of the largest masking number to which a score can be added without being lost."""
        numbers = [*self._inputs.values(), *(x.array for side in self._sides for x in _literals(side))]
        for array in (a for a in numbers if a.dtype.kind == "f"):
            sizes = np.abs(array[np.isfinite(array)]).astype(np.float64)
            spacing = f64.spacing if self._float64 else float(np.finfo(array.dtype).eps)
            masks = sizes[(sizes >= MASKING) & (sizes < _LOST / spacing)]
            left = min(1.0, spacing * float(np.max(masks, initial=0.0)))
            for name, made in self._made[0].items():
                if made.dtype.kind == "f":
                    plain = np.abs(made[np.isfinite(made)])
                    most = float(np.max(plain, initial=0.0, where=plain < HUGE))
                    self.most[name] = max(self.most[name], left * most)

    def _changed_inputs(self, rng: np.random.Generator) -> Arrays:
        def changed(a: Array) -> Array:
            spacing, most = (f64.spacing, HUGE) if self._float64 else (float(np.finfo(a.dtype).eps), MASKING)
            return np.where(np.abs(a) < most, a * (1 + spacing * _signs(rng, a.shape)), a).astype(a.dtype)

        return {name: changed(a) if a.dtype.kind == "f" else a for name, a in self._inputs.items()}

    def _signs_of(self, value: Value, rng: np.random.Generator, number: int) -> Array:
        """Return the direction for each element of a constant: random, but the same for equal masking numbers; 0 for a
        number that does not change.
        """
        assert value.literal is not None
        array = value.literal.array.astype(np.float64)
        sizes = np.abs(array)
        alike = np.where(_bits(array, number), 1.0, -1.0) if self._float64 else 0.0
        signs = np.where(sizes >= MASKING, alike, _signs(rng, array.shape))
        return np.where(sizes >= HUGE, 0.0, signs)

    def _with_changed(self, side: Graph, signs: Mapping[Value, Array]) -> Graph:
        return with_changed_constants(side, signs, self._float64)

    def _moved(self, side: Graph, original: Arrays, inputs: Arrays) -> dict[str, float]:
        found = {}
        for name, array in interpret(side, inputs, float64=self._float64).items():
            was = original[name]
            if array.dtype.kind != "f":
                found[name] = 0.0
                self.others[name] |= array != was
                continue
            with np.errstate(all="ignore"):
                difference = np.abs(array - was)
                usable = np.isfinite(difference) & (np.abs(was) < HUGE)
                found[name] = float(np.max(difference, initial=0.0, where=usable))
        return found


def _signs(rng: np.random.Generator, shape: Sequence[int]) -> Array:
    return np.asarray(rng.integers(0, 2, shape) * 2.0 - 1.0)


def _bits(array: Array, number: int) -> Array:
    """Return a truth value for each number, equal for equal numbers. It varies with `number`."""
    mixed = np.atleast_1d(array).view(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return np.asarray((mixed >> np.uint64(48 + number)) & np.uint64(1) == 1).reshape(array.shape)


def _only_masks(value: Value) -> bool:
    return value.literal is not None and bool(np.all(np.abs(value.literal.array) >= MASKING))


def _literals(graph: Graph) -> Iterator[Literal]:
    values = [v for _, node in graph.walk() for v in node.inputs]
    yield from (v.literal for v in (*values, *graph.main.outputs.values()) if v.literal is not None)


def _has_new_constants(before: Graph, after: Graph) -> bool:
    known = set(_literals(before))
    return any(literal not in known and literal.dtype.is_float for literal in _literals(after))


def constants_of(graph: Graph, every: bool) -> list[Value]:
    """Return the floating-point constants that main reads: only scalars, or all of them if `every`."""
    found: dict[Value, None] = {}
    for value in (*(v for node in graph.main.nodes for v in node.inputs), *graph.main.outputs.values()):
        literal = value.literal
        if literal is not None and spacing_of(literal.dtype) and (every or literal.scalar is not None):
            found[value] = None
    return list(found)


def with_changed_constants(graph: Graph, signs: Mapping[Value, Array], float64: bool = True) -> Graph:
    """Return a copy of the graph in which these constants of main change by a spacing of their dtype, up or down.

    float64   True to store the changed constants in float64, not in their own dtype
    """
    copy = Graph(graph.name)
    copy.symbols, copy.functions = graph.symbols, dict(graph.functions)
    main = type(graph.main)("main")
    main.inputs = list(graph.main.inputs)
    values: dict[Value | None, Value] = {}
    for value, up in signs.items():
        assert value.literal is not None
        array = value.literal.array.astype(np.float64)
        with np.errstate(all="ignore"):
            changed = np.where(np.isfinite(array), array * (1 + spacing_of(value.literal.dtype) * up), array)
        values[value] = Value.constant(Literal.of(changed, f64 if float64 else value.literal.dtype))
    for node in graph.main.nodes:
        made = Node(node.op, [values.get(v, v) for v in node.operands], [v.type for v in node.results])
        values.update(zip(node.results, made.results, strict=True))
        main.nodes.append(made)
    main.outputs = {name: values.get(v, v) for name, v in graph.main.outputs.items()}
    copy.functions["main"] = main
    return copy

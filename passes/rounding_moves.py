"""How far the results of a region move when what goes into it changes by a rounding.

Inputs change by a spacing of float64, up or down; scalar constants by a spacing of the dtype in which they are written:
sqrt(1/2) in float32 is no nearer to what gelu has. What was folded is a constant in its dtype, so there all constants
change. Changes can cancel, as those of one scale on q and the same on k do, or be the same for all numbers from which a
norm subtracts their mean. So they are tried in three steps, as far as is needed:

    1   everything at once, twice, up or down by chance
    2   each constant alone; its moves are added to what the inputs move
    3   everything at once, eight times more
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from treadle.ir.graph import Graph, Literal, Node, Value
from treadle.ir.interpreter import interpret
from treadle.ir.types import DType, bf16, f64

Array = np.ndarray[Any, Any]
Arrays = Mapping[str, Array]

SPACING = 2.0**-52
HUGE = 1e30
"""Numbers of this size stand for infinity, and say nothing of the scale of the others."""
_AT_ONCE, _MORE = 2, 8
_MOST_ALONE = 32
"""So many constants at most are changed alone."""


class Moves:
    """The largest move of each output of either side so far, and where any of its values became another.

    most, others   by the output's name; zero and nowhere before the first `further`
    """

    def __init__(self, sides: tuple[Graph, Graph], made: Sequence[Arrays], inputs: Arrays) -> None:
        self._sides, self._made, self._inputs = sides, made, inputs
        self.most = dict.fromkeys(made[0], 0.0)
        self.others = {name: np.zeros(array.shape, np.bool_) for name, array in made[0].items()}
        self._steps = iter((lambda: self._at_once(range(_AT_ONCE)), self._alone, self._more))

    def further(self) -> bool:
        """Try the next step; False where there is none."""
        step = next(self._steps, None)
        if step is not None:
            step()
        return step is not None

    def _more(self) -> None:
        self._at_once(range(_AT_ONCE, _AT_ONCE + _MORE))

    def _at_once(self, rounds: range) -> None:
        every = _has_new_constants(*self._sides)
        for side, original in zip(self._sides, self._made, strict=True):
            for number in rounds:
                rng = np.random.default_rng(number)
                changed = self._changed_inputs(rng)
                constants = constants_of(side, every)
                signs = {value: _signs(rng, value.type.evaluate({})) for value in constants}
                for name, move in self._moved(with_changed_constants(side, signs), original, changed).items():
                    self.most[name] = max(self.most[name], move)

    def _alone(self) -> None:
        every = _has_new_constants(*self._sides)
        for side, original in zip(self._sides, self._made, strict=True):
            rng = np.random.default_rng(0)
            total = self._moved(side, original, self._changed_inputs(rng))
            for value in constants_of(side, every)[:_MOST_ALONE]:
                signs = {value: _signs(rng, value.type.evaluate({}))}
                for name, move in self._moved(with_changed_constants(side, signs), original, self._inputs).items():
                    total[name] += move
            for name, move in total.items():
                self.most[name] = max(self.most[name], move)

    def _changed_inputs(self, rng: np.random.Generator) -> Arrays:
        return {
            name: a * (1 + SPACING * _signs(rng, a.shape)) if a.dtype.kind == "f" else a
            for name, a in self._inputs.items()
        }

    def _moved(self, side: Graph, original: Arrays, inputs: Arrays) -> dict[str, float]:
        found = {}
        for name, array in interpret(side, inputs, float64=True).items():
            was = original[name]
            with np.errstate(all="ignore"):
                difference = np.abs(array - was) if array.dtype.kind == "f" else np.zeros(array.shape)
                usable = np.isfinite(difference) & (np.abs(was) < HUGE)
                found[name] = float(np.max(difference, initial=0.0, where=usable))
            self.others[name] |= array != was
        return found


def _signs(rng: np.random.Generator, shape: Sequence[int]) -> Array:
    return np.asarray(rng.choice((-1.0, 1.0), shape))


def _literals(graph: Graph) -> Iterator[Value]:
    values = [v for _, node in graph.walk() for v in node.inputs]
    yield from (v for v in (*values, *graph.main.outputs.values()) if v.literal is not None)


def _has_new_constants(before: Graph, after: Graph) -> bool:
    known = {v.literal for v in _literals(before)}
    return any(v.literal not in known and v.type.dtype.is_float for v in _literals(after))


def constants_of(graph: Graph, every: bool) -> list[Value]:
    """The float constants that main reads and that have roundings: scalars, or `every` one."""
    found: dict[Value, None] = {}
    for value in (*(v for node in graph.main.nodes for v in node.inputs), *graph.main.outputs.values()):
        literal = value.literal
        if literal is not None and _spacing(literal.dtype) and (every or literal.scalar is not None):
            found[value] = None
    return list(found)


def with_changed_constants(graph: Graph, signs: Mapping[Value, Array]) -> Graph:
    """A copy of main in which these constants are changed by a spacing of their dtype, up or down."""
    copy = Graph(graph.name)
    copy.symbols, copy.functions = graph.symbols, dict(graph.functions)
    main = type(graph.main)("main")
    main.inputs = list(graph.main.inputs)
    values: dict[Value | None, Value] = {}
    for value, up in signs.items():
        assert value.literal is not None
        array = value.literal.array.astype(np.float64)
        with np.errstate(all="ignore"):
            changed = np.where(np.isfinite(array), array * (1 + _spacing(value.literal.dtype) * up), array)
        values[value] = Value.constant(Literal.of(changed, f64))
    for node in graph.main.nodes:
        made = Node(node.op, [values.get(v, v) for v in node.operands], [v.type for v in node.results])
        values.update(zip(node.results, made.results, strict=True))
        main.nodes.append(made)
    main.outputs = {name: values.get(v, v) for name, v in graph.main.outputs.items()}
    copy.functions["main"] = main
    return copy


def _spacing(dtype: DType) -> float:
    if not dtype.is_float:
        return 0.0
    return 2.0**-7 if dtype is bf16 or dtype.numpy is None else float(np.finfo(dtype.numpy).eps)

"""Certificates: each rewrite, evaluated before and after on drawn sizes and values.

    optimized = PassManager(DEFAULT, certify=True).run(graph)
    print(optimized.log.certified())      # gelu-erf 3f2a91: 7 cases, largest error 2.2e-16 (at most 1.9e-15), ...

The two sides of a claim (`treadle.passes.certificates.regions`) run in float64 by the ops' own meanings. The cases,
each at a few small sizes within the bounds of the symbols:

    plain     numbers drawn from a normal distribution, three of four truth values true
    masked    whole rows of truth values false and whole rows true, of integers zero, of the operand of a softmax or an
              exponential -inf, and of what is added to it -1e4, -1e9, -1e30 or its dtype's least number
    extreme   numbers up to 30 (3 where there are products), rows of equal numbers and of zeros

What masks is tried in the graph's own dtypes as well, where twice float32's least number is -inf.

**How near they must be** says `treadle.ir.tolerances`, of how far either side moves when what goes into it changes by a
spacing of float64 (`treadle.passes.certificates.rounding_moves`). Integers and truth values must be equal, except where
those changes give another one. A result may be NaN only where it was before. In the graph's own dtypes roundings are
larger, and some are within ops: there a `_PART` of the results' range may be off.

A case in which roundings alone may move results by more than a `_PART` of their range tells nothing. It does not count,
and the certificate says how many such there are.

**What counts as wrong.** Only a case that the function may give: of inputs that are its own, or products of such with
something else (`treadle.passes.certificates.regions`), with every axis as large as it is where numbers may have to do
with that. What fails otherwise, at every depth, is kept, and its certificate says "not certified", and why.

Nothing is shown by this about other values: it finds mistakes, and does not prove that there is none. Roundings to a
narrower dtype (a cast to f16) do not happen in float64.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np

from treadle.ir.composites import holds_contraction
from treadle.ir.cost import graph_cost
from treadle.ir.drawn_inputs import index_ranges, small_sizes
from treadle.ir.errors import TreadleError
from treadle.ir.graph import Graph, Node, Value
from treadle.ir.hashing import canonical_form
from treadle.ir.interpreter import interpret
from treadle.ir.ops.arithmetic import Add, Div, Maximum, Mul, Sub
from treadle.ir.ops.elementwise import Cast, Exp
from treadle.ir.ops.logic import Where
from treadle.ir.ops.normalization import MaskedSoftmax, Softmax
from treadle.ir.ops.reductions import ReduceMax
from treadle.ir.tolerances import Distance, room
from treadle.ir.types import DType, f32, f64
from treadle.passes.certificates.region_graphs import as_graphs, has_numbers, shrinkings_of
from treadle.passes.certificates.regions import DEPTHS, Claim, Region
from treadle.passes.certificates.rounding_moves import HUGE, MASKING, Moves

Array = np.ndarray[Any, Any]
Arrays = Mapping[str, Array]
Sizes = Mapping[str, int]

_MOST_FLOPS, _MOST_ELEMENTS = 1 << 29, 1 << 23
_MASKED = {"masked": -1e9, "masked by -1e4": -1e4, "masked by -1e30": -1e30, "masked by the least": -math.inf}
"""Cases, and what is then added: the least of its dtype where that is less."""
_PART = 2.0**-5
_FAILURES = (TreadleError, ArithmeticError, IndexError, TypeError, ValueError)


@dataclass(frozen=True)
class Certificate:
    """What was tried of one distinct rewrite, and how near the two sides were.

    rule       the rewrite's or the pass's name
    instance   12 hexadecimal digits that name the two sides, with all attributes and constants
    seed       drew the cases
    cases      how many
    sizes      at which
    error      the largest difference, relative to the largest number of the result
    tolerance  what that error had to be below
    note       why there are no cases; "large axes made small" where they were
    refused    why not all sizes were tried, where an op refuses some
    undecided  how many cases more told nothing, since roundings alone may move their results as far
    """

    rule: str
    instance: str
    seed: int
    cases: int
    sizes: tuple[tuple[tuple[str, int], ...], ...]
    error: float = 0.0
    tolerance: float = 0.0
    note: str = ""
    refused: str = ""
    undecided: int = 0

    @property
    def is_whole(self) -> bool:
        """Whether no size was refused, and no case told nothing."""
        return not self.refused and not self.undecided

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "sizes": [dict(each) for each in self.sizes]}

    @staticmethod
    def read(said: Mapping[str, Any]) -> Certificate:
        """From what `as_dict` gave. Raises what Python does where it is something else."""
        sizes = tuple(tuple((str(k), int(v)) for k, v in each.items()) for each in said["sizes"])
        return Certificate(
            rule=str(said["rule"]),
            instance=str(said["instance"]),
            seed=int(said["seed"]),
            cases=int(said["cases"]),
            sizes=sizes,
            error=float(said["error"]),
            tolerance=float(said["tolerance"]),
            note=str(said["note"]),
            refused=str(said.get("refused", "")),
            undecided=int(said.get("undecided", 0)),
        )

    def __str__(self) -> str:
        if not self.cases:
            return f"{self.rule} {self.instance}: {self.note}"
        sizes = "; ".join(", ".join(f"{s}={n}" for s, n in each) for each in self.sizes if each)
        near = f"largest error {self.error:.2g} (at most {self.tolerance:.2g})"
        others = f"other sizes refused ({self.refused})" if self.refused else ""
        more = f"{self.undecided} more not certified: {_NOTHING}" if self.undecided else ""
        told = [f"{self.cases} cases", near, f"at {sizes}" if sizes else "", more, others, self.note]
        told.append(f"seed {self.seed}")
        return f"{self.rule} {self.instance}: {', '.join(each for each in told if each)}"


@dataclass(frozen=True)
class Counterexample:
    """The case in which the two sides disagree: its name, the sizes, the seed that drew it, and how they disagree.

    doubt   why they may agree nevertheless
    """

    case: str
    sizes: tuple[tuple[str, int], ...]
    seed: int
    what: str
    doubt: str = ""

    def __str__(self) -> str:
        at = ", ".join(f"{s}={n}" for s, n in self.sizes)
        return f"{self.what} (case {self.case}, {f'at {at}, ' if at else ''}seed {self.seed})"


_known: dict[str, Certificate | Counterexample] = {}
_MOST_KNOWN = 1 << 15


def certify(rule: str, claim: Claim, graphs: tuple[Graph, Graph], seed: int = 0) -> Certificate | Counterexample | None:
    """Try a claim, at each depth until it holds; None where both sides are the same text.

    graphs   the graph before and after, for the bounds of symbols and for calls

    A case that the function may never give is no counterexample: if there is none but such, the certificate says so.
    Sizes at which one depth's ops cannot run, as a table of positions that is too short, do not excuse what fails at
    another.
    What was tried in this process is not tried again.
    """
    tried: set[str] = set()
    against: Counterexample | None = None
    partial: Certificate | None = None
    doubted = ""
    for depth in range(DEPTHS):
        region = claim.cut(depth)
        try:
            sides = as_graphs(region, (claim.before, claim.after), graphs, {})
        except TreadleError as error:
            doubted = doubted or f"not evaluated: {error.what}"
            break
        texts = tuple(map(canonical_form, sides))
        if texts[0] == texts[1]:
            return None
        computed = _computed(region)
        finite = computed if depth >= 2 else frozenset()
        key = sha256("\n".join((rule, str(seed), *sorted(finite), *texts)).encode()).hexdigest()
        if key in tried:
            continue
        tried.add(key)
        now = _known.get(key)
        if now is None:
            now = _tried_shrunk(rule, key, claim, region, sides, graphs, seed, finite)
            if len(_known) < _MOST_KNOWN:
                _known[key] = now
        if isinstance(now, Certificate):
            if now.cases and not now.is_whole:
                partial = partial or now
            elif now.cases or not (against or doubted or partial):
                return now
        elif now.doubt:
            doubted = doubted or f"not certified: {now}, but {now.doubt}"
        elif (tied := claim.tied(region)) is not None:
            doubted = doubted or f"not certified: {now}, but {_name(tied)} may never be what it was drawn as"
        elif now.case.startswith("masked") and computed != finite:
            doubted = doubted or f"not certified: {now}, but what the function computes may hold no masks"
        else:
            against = now
    return against or partial or Certificate(rule, key[:12] if tried else "-" * 12, seed, 0, (), note=doubted)


def _name(value: Value) -> str:
    return f"what {value.node.op.name} gives" if value.node is not None else value.name


def _computed(region: Region) -> frozenset[str]:
    """The names of inputs that stand for what a function computes, in which no number is a mask."""
    return frozenset(f"x{n}" for n, v in enumerate(region.free) if v.node is not None and v.type.dtype.is_float)


def _tried_shrunk(
    rule: str,
    key: str,
    claim: Claim,
    region: Region,
    sides: tuple[Graph, Graph],
    graphs: tuple[Graph, Graph],
    seed: int,
    finite: frozenset[str],
) -> Certificate | Counterexample:
    """Try with large axes made small, and as it is where that cannot be done or fails.

    What fails when it is small, and is too large as it is, counts as wrong if no number may have to do with sizes.
    """
    against: Counterexample | None = None
    partial: Certificate | None = None
    for shrinking in shrinkings_of(region):
        try:
            small = as_graphs(region, (claim.before, claim.after), graphs, shrinking)
        except TreadleError:
            continue
        found = _tried(rule, key, small, seed, "large axes made small", finite)
        if isinstance(found, Counterexample):
            against = found
        elif found.cases and found.is_whole:
            return found
        elif found.cases:
            partial = partial or found
    found = _tried(rule, key, sides, seed, "", finite)
    if against is not None and isinstance(found, Certificate) and not found.cases:
        doubt = "its numbers may have to do with the sizes of those axes" if has_numbers(region) else ""
        what = f"{against.what}, with large axes made small, and else is {found.note}"
        return dataclasses.replace(against, what=what, doubt=doubt)
    return partial if partial is not None and isinstance(found, Certificate) and not found.cases else found


# -- trying ----------------------------------------------------------------------------------------------------------


def _tried(
    rule: str, key: str, sides: tuple[Graph, Graph], seed: int, note: str, finite: frozenset[str]
) -> Certificate | Counterexample:
    before, after = sides
    instance = key[:12]
    for was, now in zip(before.main.outputs.values(), after.main.outputs.values(), strict=True):
        if was.type != now.type:
            return Counterexample("types", (), seed, f"the replacement is {now.type}, and was {was.type}")
    try:
        chosen = [s for s in _sizes(before) if _fits(sides, s)]
    except TreadleError as error:
        return Certificate(rule, instance, seed, 0, (), note=f"not evaluated: {error.what}")
    if not chosen:
        return Certificate(rule, instance, seed, 0, (), note="not evaluated: too large")
    kinds = _kinds(sides, finite)
    if _is_constant(before) and _are_same_constants(sides):
        return Certificate(rule, instance, seed, 1, ((),), note="equal in their own precision")
    worst = (0.0, 0.0)
    cases, undecided, refused = 0, 0, ""
    at: list[tuple[tuple[str, int], ...]] = []
    for number, sizes in enumerate(chosen):
        for case in kinds if number == len(chosen) // 2 else kinds[:2]:
            told = tuple(sizes.items())
            try:
                inputs = _drawn(sides, sizes, case, [seed, number], finite)
                old = interpret(before, inputs, float64=True)
            except _FAILURES as problem:  # sizes that an op refuses, indices that none fits
                refused = _shown(problem)
                continue
            found = _judged(sides, old, inputs, float64=True)
            if isinstance(found, str):
                return Counterexample(case, told, seed, found)
            if case in _MASKED and _has_masks(sides, inputs):
                own = _in_own_dtypes(sides, inputs)
                if isinstance(own, str):
                    return Counterexample(f"{case}, in its own precision", told, seed, own)
                undecided += own is None
            undecided += found is None
            cases += found is not None
            worst = max(worst, found or worst)
            if told not in at:
                at.append(told)
    if not cases:
        why = f"not certified: {_NOTHING}" if undecided else f"not evaluated: {refused}"
        return Certificate(rule, instance, seed, 0, (), note=why, undecided=undecided)
    return Certificate(rule, instance, seed, cases, tuple(at), *worst, note, refused, undecided)


_NOTHING = "roundings alone may move the results as far as they differ"


def _judged(sides: tuple[Graph, Graph], old: Arrays, inputs: Arrays, float64: bool) -> tuple[float, float] | str | None:
    """How near the replacement comes to what was, what is wrong with it, or None where that cannot be told."""
    try:
        new = interpret(sides[1], inputs, float64=float64)
    except _FAILURES as problem:
        return f"the replacement fails: {_shown(problem)}"
    return _compared(sides, (old, new), inputs, float64)


def _in_own_dtypes(sides: tuple[Graph, Graph], inputs: Arrays) -> tuple[float, float] | str | None:
    own = {v.name: inputs[v.name].astype(v.type.dtype.numpy) for v in sides[0].main.inputs}
    try:
        old = interpret(sides[0], own)
    except _FAILURES:
        return None
    return _judged(sides, old, own, float64=False)


def _has_masks(sides: tuple[Graph, Graph], inputs: Arrays) -> bool:
    """Whether numbers mask somewhere, in dtypes that NumPy has, other than float64."""
    values = [v for side in sides for _, node in side.walk() for v in (*node.inputs, *node.results)]
    dtypes = {v.type.dtype for v in values if v.type.dtype.is_float}
    if not dtypes - {f64} or any(dtype.numpy is None for dtype in dtypes):
        return False
    arrays = [v.literal.array for v in values if v.literal is not None and v.type.dtype.is_float]
    arrays += [a for a in inputs.values() if a.dtype.kind == "f"]
    return any(np.any(np.abs(a[np.isfinite(a)]) >= MASKING) for a in arrays)


def _shown(error: Exception) -> str:
    return error.what if isinstance(error, TreadleError) else f"{type(error).__name__}: {error}"


def _is_constant(graph: Graph) -> bool:
    return not graph.main.inputs


def _are_same_constants(sides: tuple[Graph, Graph]) -> bool:
    """Whether both sides give the same bits when computed in the graph's own dtypes, as folding does."""
    try:
        old, new = (interpret(side, {}) for side in sides)
    except _FAILURES:  # NumPy has no bf16, for one
        return False
    return all(np.array_equal(old[name], new[name], equal_nan=old[name].dtype.kind == "f") for name in old)


def _sizes(graph: Graph) -> list[Sizes]:
    if not graph.symbols:
        return [{}, {}]
    alone = Graph(graph.name)  # without the inputs that tell sizes, which say nothing of which axis leads
    alone.symbols, alone.functions = graph.symbols, dict(graph.functions)
    main = type(graph.main)("main")
    main.nodes = graph.main.nodes
    main.inputs = [v for v in graph.main.inputs if not v.name.startswith("size ")]
    alone.functions["main"] = main
    return list(small_sizes(alone))


def _fits(sides: tuple[Graph, Graph], sizes: Sizes) -> bool:
    """Whether a run at these sizes is small enough."""
    for side in sides:
        elements = sum(v.type.elements.evaluate(sizes) for v in side.main.inputs)
        elements += sum(v.type.elements.evaluate(sizes) for _, node in side.walk() for v in node.results)
        if elements > _MOST_ELEMENTS or graph_cost(side, sizes).flops > _MOST_FLOPS:
            return False
    return True


def _nodes(sides: tuple[Graph, Graph]) -> Iterator[Node]:
    return (node for side in sides for _, node in side.walk())


def _is_curved(node: Node) -> bool:
    """Whether it gives floats by arithmetic that is not linear in each operand, and so not alike everywhere."""
    floats = any(v.type.dtype.is_float for v in node.results)
    return floats and node.op.callee is None and node.op.flops > 0 and not node.is_multilinear


def _kinds(sides: tuple[Graph, Graph], finite: frozenset[str]) -> tuple[str, ...]:
    curved = any(map(_is_curved, _nodes(sides)))
    kinds = ("plain", "masked", "extreme") if curved else ("plain", "masked")
    added = any(math.isfinite(number) for value, number in _masks(sides[0]).items() if value.name not in finite)
    return (*kinds, *(case for case in _MASKED if case != "masked")) if added else kinds


# -- drawing ---------------------------------------------------------------------------------------------------------


def _drawn(
    sides: tuple[Graph, Graph], sizes: Sizes, case: str, seed: Sequence[int], finite: frozenset[str]
) -> dict[str, Array]:
    ranges: dict[str, tuple[int, int]] = {}
    if any(v.type.dtype.is_int for v in sides[0].main.inputs):
        for side in sides:
            for name, found in index_ranges(side, sizes).items():
                low, high = ranges.get(name, (found.lower, found.upper))
                ranges[name] = (max(low, found.lower), min(high, found.upper))
    masks = _masks(sides[0]) if case in _MASKED else {}
    masks = {value: number for value, number in masks.items() if value.name not in finite}
    products = any(holds_contraction(n.op, n.operands) for n in _nodes(sides))
    inputs: dict[str, Array] = {}
    for number, value in enumerate(sides[0].main.inputs):
        rng = np.random.default_rng([*seed, number, len(case)])
        shape = value.type.evaluate(sizes)
        if value.name.startswith("size "):
            inputs[value.name] = np.zeros(shape, np.bool_)
        elif value.type.dtype.is_float:
            inputs[value.name] = _floats(rng, shape, case, _mask_of(value, masks, case), 3.0 if products else 30.0)
        elif value.type.dtype.is_int:
            inputs[value.name] = _integers(rng, shape, case, value.type.dtype, ranges.get(value.name), sizes)
        else:
            drawn = rng.random(shape) < 0.75
            if case in _MASKED:
                rows = _rows(rng, shape)
                drawn = np.where(rows == 0, False, np.where(rows == 1, True, drawn))
            inputs[value.name] = drawn
    return inputs


def _rows(rng: np.random.Generator, shape: Sequence[int]) -> Array:
    """0, 1 or 2 for each row along the last axis; of a scalar, 2."""
    return rng.integers(0, 3, (*shape[:-1], 1)) if shape else np.array(2)


def _mask_of(value: Value, masks: Mapping[Value, float], case: str) -> float | None:
    """By which number an input masks in this case, if it does."""
    number = masks.get(value)
    if number is None or not math.isfinite(number):
        return number
    return max(_MASKED[case], -min(value.type.dtype.greatest, f32.greatest))


def _floats(rng: np.random.Generator, shape: Sequence[int], case: str, mask: float | None, most: float) -> Array:
    drawn: Array = np.asarray(rng.standard_normal(shape))
    rows = _rows(rng, shape)
    if mask is not None:
        return np.where((rows == 0) | ((rows == 1) & (rng.random(shape) < 0.5)), mask, drawn)
    if case == "extreme":
        wide = np.clip(drawn * most / 2, -most, most)
        level = drawn[..., :1] if shape else drawn
        return np.where(rows == 0, 0.0 * wide, np.where(rows == 1, level, wide))
    return drawn


def _integers(
    rng: np.random.Generator,
    shape: Sequence[int],
    case: str,
    dtype: DType,
    span: tuple[int, int] | None,
    sizes: Sizes,
) -> Array:
    low, high = span or (0, max(sizes.values(), default=4) + 1)
    if high < low:
        raise TreadleError("no index is left that points inside")
    drawn = rng.integers(low, min(high, int(np.iinfo(dtype.numpy or np.int64).max)) + 1, shape)
    if case in _MASKED and span is None:
        drawn = np.where(_rows(rng, shape) == 0, 0, np.where(rng.random(shape) < 0.5, drawn % 2, drawn))
    return np.asarray(drawn).astype(dtype.numpy)


_PASSING = (Add, Sub, Mul, Div, Where, Cast, Maximum)


def _masks(graph: Graph) -> dict[Value, float]:
    """What masks an input that a softmax, an exponential or a maximum is taken of, moved and scaled at most.

    A finite number, -1, where it is added to something on the way; else -inf.
    """
    found: dict[Value, float] = {}
    seen: set[tuple[Value, bool]] = set()
    taken = [node for node in graph.main.nodes if isinstance(node.op, (Softmax, MaskedSoftmax, Exp, ReduceMax))]
    pending = [(node.inputs[0], False) for node in taken]
    while pending:
        value, added = pending.pop()
        if (value, added) in seen:
            continue
        seen.add((value, added))
        node = value.node
        if node is None:
            found[value] = -1.0 if added or value in found else -math.inf
        elif node.op.is_view or isinstance(node.op, _PASSING):
            pending += [(v, added or isinstance(node.op, Add)) for v in node.inputs if v.type.dtype.is_float]
    return found


# -- comparing -------------------------------------------------------------------------------------------------------


def _compared(
    sides: tuple[Graph, Graph], made: Sequence[Arrays], inputs: Arrays, float64: bool
) -> tuple[float, float] | str | None:
    """The largest relative difference of the outputs and what it had to be below, what is wrong, or None where
    roundings may move an output by more than a part of its range."""
    before, after = made
    worst = (0.0, 0.0)
    moves = Moves(sides, made, inputs, float64)
    growth = math.sqrt(sum(len(side.main.nodes) for side in sides))
    told = True
    for name, wanted in before.items():
        got = after[name]
        if got.shape != wanted.shape:
            return f"the replacement has shape {list(got.shape)}, and had {list(wanted.shape)}"
        if wanted.dtype.kind != "f":
            differs = got != wanted
            while np.any(differs & ~moves.others[name]):
                if not moves.further():
                    return f"{int(np.sum(differs))} of {wanted.size} results are others"
            continue
        spacing = f64.spacing if float64 else float(np.finfo(wanted.dtype).eps)
        got, wanted = got.astype(np.float64), wanted.astype(np.float64)
        if np.any(np.isnan(got) & ~np.isnan(wanted)):
            return "there is a NaN where there was none"
        off = Distance.between(got, wanted, HUGE)
        if off.lost:
            return "a number past 1e30 has become another"
        error = off.most / off.scale
        most = _PART * _range(wanted[off.plain], off.scale)
        tolerance = room(spacing, 1.0, growth * moves.most[name] / off.scale)
        while not error <= (tolerance if float64 else max(tolerance, most)):
            if not moves.further():
                return f"the results differ by {error:.2g} of the largest, where {tolerance:.2g} may be"
            tolerance = room(spacing, 1.0, growth * moves.most[name] / off.scale)
        told = told and (tolerance <= most or (not float64 and error <= most))
        worst = max(worst, (error, tolerance))
    return worst if told else None


def _range(numbers: Array, scale: float) -> float:
    """How far apart numbers lie, relative to the largest; all of it where they are the same but for roundings."""
    spread = float(np.max(numbers, initial=-math.inf) - np.min(numbers, initial=math.inf)) / scale
    return spread if spread > 2.0**-20 else 1.0

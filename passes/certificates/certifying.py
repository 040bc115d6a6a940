"""Certificates: each rewrite, evaluated before and after on drawn sizes and values.

    optimized = PassManager(DEFAULT, certify=True).run(graph)
    print(optimized.log.certified())      # gelu-erf 3f2a91: 7 cases, largest error 2.2e-16 (at most 1.9e-15), ...

The two sides of a claim (`treadle.passes.certificates.regions`) run in float64 by the ops' own references. The cases,
each at a few small sizes within the bounds of the symbols:

    plain     numbers drawn from a normal distribution, three of four truth values true
    masked    whole rows of truth values false and whole rows true, of integers zero, of the operand of a softmax or an
              exponential -inf, and of an addend to it -1e4, -1e9, -1e30 or its dtype's least number
    extreme   numbers up to 30 (3 if there are products), rows of equal numbers and of zeros

Cases with masks also run in the graph's own dtypes, since twice the lowest number of float32 is -inf in float32.

If the graph will be differentiated, gradients are compared as well (`derivatives`), with one more case:

    ties      halves of integers, many of them equal, with rows of equal numbers, of zeros, and masks as above

**Tolerances** come from `treadle.ir.analysis.tolerances`. They are based on the change of either side's results when
its inputs change by a spacing of float64 (`treadle.passes.certificates.rounding_moves`). Integers and truth values must
be equal, unless these changes of inputs also change them. A result may be NaN only if it was NaN before. In the graph's
own dtypes, roundings are larger, and some happen within ops. There the error may be a 32nd of the results' range.

If roundings alone may move results by more than a 32nd of their range, a case is inconclusive. It does not count, and
the certificate reports the number of inconclusive cases.

**Counterexamples.** A failure counts only if the case can occur in the function. For this, the free values must be
inputs of the function, or products of such values with other values (`treadle.passes.certificates.regions`), and every
axis must have its full size if constants may depend on it. If a claim fails at every depth, but no failure counts, the
rewrite is kept, and its certificate states "not certified" and the reason.

A certificate proves nothing about other values: it finds errors, but does not prove their absence. Roundings to a
narrower dtype (a cast to f16) do not happen in float64.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import numpy as np

from treadle.ir.analysis.cost import graph_cost
from treadle.ir.analysis.drawn_inputs import small_sizes
from treadle.ir.errors import TreadleError
from treadle.ir.graph import Graph, Value
from treadle.ir.hashing import canonical_form
from treadle.ir.interpreter import interpret
from treadle.ir.types import f64
from treadle.passes.certificates.certificate import INCONCLUSIVE, Certificate, Counterexample
from treadle.passes.certificates.comparing import compared
from treadle.passes.certificates.derivatives import Gradients, differentiated
from treadle.passes.certificates.drawn_cases import MASKED, TIES, cases_of, draw_inputs
from treadle.passes.certificates.region_graphs import as_graphs, has_numbers, shrinkings_of
from treadle.passes.certificates.regions import DEPTHS, Claim, Region
from treadle.passes.certificates.rounding_moves import MASKING

Array = np.ndarray[Any, Any]
Arrays = Mapping[str, Array]
Sizes = Mapping[str, int]
Point = tuple[tuple[str, int], ...]
"""Sizes as pairs."""

_MOST_FLOPS, _MOST_ELEMENTS = 1 << 29, 1 << 23
_FAILURES = (TreadleError, ArithmeticError, IndexError, TypeError, ValueError)
_known: dict[str, Certificate | Counterexample] = {}
_MOST_KNOWN = 1 << 15


def certify(
    rule: str, claim: Claim, graphs: tuple[Graph, Graph], seed: int = 0, *, derivatives: bool = False
) -> Certificate | Counterexample | None:
    """Try a claim at each depth until it holds. Return its certificate, a counterexample, or None if both sides are the
    same text.

    graphs        the graph before and after, for the bounds of symbols and for calls
    derivatives   True if gradients with respect to the inputs must agree too, also at ties and in rows without keys

    A case that cannot occur in the function is not a counterexample. If there are only such failures, the certificate
    states this. At one depth, ops may refuse sizes, such as sizes beyond the end of a table of positions. Such a
    refusal does not excuse a failure at another depth. Claims that were tried in this process are not tried again.
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
        asked = ("derivatives",) if derivatives else ()
        key = sha256("\n".join((rule, str(seed), *asked, *sorted(finite), *texts)).encode()).hexdigest()
        if key in tried:
            continue
        tried.add(key)
        now = _known.get(key)
        if now is None:
            now = Trial(rule, key, seed, finite, derivatives).run_shrunk(claim, region, sides, graphs)
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
            doubted = doubted or f"not certified: {now}, but {_name(tied)} may never have the drawn values"
        elif now.case.startswith("masked") and computed != finite:
            doubted = doubted or f"not certified: {now}, but values that the function computes may contain no masks"
        else:
            against = now
    return against or partial or Certificate(rule, key[:12] if tried else "-" * 12, seed, 0, (), note=doubted)


def _name(value: Value) -> str:
    return f"the result of {value.node.op.name}" if value.node is not None else value.name


def _computed(region: Region) -> frozenset[str]:
    """Return the names of the region's inputs that stand for computed values of the function. Such values hold no
    masking numbers.
    """
    return frozenset(f"x{n}" for n, v in enumerate(region.free) if v.node is not None and v.type.dtype.is_float)


# -- trying ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """A trial of a claim.

    key          the hash of both sides, by which the certificate is found again
    finite       the inputs that hold no masking numbers
    derivatives  True if gradients are compared, too
    """

    rule: str
    key: str
    seed: int
    finite: frozenset[str]
    derivatives: bool

    def run_shrunk(
        self, claim: Claim, region: Region, sides: tuple[Graph, Graph], graphs: tuple[Graph, Graph]
    ) -> Certificate | Counterexample:
        """Try with large axes made small. Try at full size if that is not possible or fails.

        If the region is too large for full size, and no constant may depend on sizes, a failure at reduced sizes counts
        as a counterexample.
        """
        against: Counterexample | None = None
        partial: Certificate | None = None
        for shrinking in shrinkings_of(region):
            try:
                small = as_graphs(region, (claim.before, claim.after), graphs, shrinking)
            except TreadleError:
                continue
            found = self.run(small, "large axes made small")
            if isinstance(found, Counterexample):
                against = found
            elif found.cases and found.is_whole:
                return found
            elif found.cases:
                partial = partial or found
        found = self.run(sides)
        if against is not None and isinstance(found, Certificate) and not found.cases:
            doubt = "its constants may depend on the sizes of those axes" if has_numbers(region) else ""
            what = f"{against.what}, with large axes made small, and otherwise {found.note}"
            return dataclasses.replace(against, what=what, doubt=doubt)
        return partial if partial is not None and isinstance(found, Certificate) and not found.cases else found

    def run(self, sides: tuple[Graph, Graph], note: str = "") -> Certificate | Counterexample:
        """Compare both sides in all cases. `note` describes the sides, for the certificate."""
        before, after = sides
        for was, now in zip(before.main.outputs.values(), after.main.outputs.values(), strict=True):
            if was.type != now.type:
                return Counterexample("types", (), self.seed, f"the replacement has type {now.type}, not {was.type}")
        try:
            chosen = [s for s in _sizes(before) if _fits(sides, s)]
        except TreadleError as error:
            return self._certificate(0, note=f"not evaluated: {error.what}")
        if not chosen:
            return self._certificate(0, note="not evaluated: too large")
        kinds = cases_of(sides, self.finite)
        if _is_constant(before) and _are_same_constants(sides):
            return self._certificate(1, ((),), note="equal in their own precision")
        gradients = differentiated(sides) if self.derivatives else None
        tally = _Tally()
        for number, sizes in enumerate(chosen):
            most = kinds if number == len(chosen) // 2 else kinds[:2]
            for case in (*most, TIES) if gradients is not None else most:
                failure = self._run_case(sides, sizes, case, number, gradients, tally)
                if failure is not None:
                    return failure
        if not tally.cases:
            why = f"not certified: {INCONCLUSIVE}" if tally.undecided else f"not evaluated: {tally.refused}"
            return self._certificate(0, note=why, undecided=tally.undecided)
        return self._certificate(
            *(tally.cases, tuple(tally.points), *tally.worst), note, tally.refused, tally.undecided
        )

    def _certificate(self, cases: int, points: tuple[Point, ...] = (), *rest: Any, **more: Any) -> Certificate:
        return Certificate(self.rule, self.key[:12], self.seed, cases, points, *rest, **more)

    def _run_case(
        self,
        sides: tuple[Graph, Graph],
        sizes: Sizes,
        case: str,
        number: int,
        gradients: Gradients | None,
        tally: _Tally,
    ) -> Counterexample | None:
        """Compare both sides on one drawing, and count the result. `number` is the number of the sizes."""
        point = tuple(sizes.items())
        try:
            inputs = draw_inputs(sides, sizes, case, [self.seed, number], self.finite)
            old = interpret(sides[0], inputs, float64=True)
        except _FAILURES as problem:  # sizes that an op refuses, or indices out of range
            tally.refused = _shown(problem)
            return None
        found = _judged(sides, old, inputs, float64=True)
        if isinstance(found, str):
            return Counterexample(case, point, self.seed, found)
        if case in MASKED and _has_masks(sides, inputs):
            own = _in_own_dtypes(sides, inputs)
            if isinstance(own, str):
                return Counterexample(f"{case}, in its own precision", point, self.seed, own)
            tally.undecided += own is None
        if gradients is not None:
            against = gradients.compared(inputs, sizes, [self.seed, number])
            if against is not None:
                return Counterexample(f"{case}, of derivatives", point, self.seed, against)
        tally.add(point, found)
        return None


@dataclass
class _Tally:
    """The results of the cases of a trial.

    cases      the number of cases in which both sides agreed
    undecided  the number of inconclusive comparisons
    worst      the largest error, with its tolerance
    refused    the last reason for which a case could not be evaluated
    points     the sizes of the evaluated cases
    """

    cases: int = 0
    undecided: int = 0
    worst: tuple[float, float] = (0.0, 0.0)
    refused: str = ""
    points: list[Point] = field(default_factory=list)

    def add(self, point: Point, error: tuple[float, float] | None) -> None:
        """Count a case with its error and tolerance; None if the case was inconclusive."""
        if error is None:
            self.undecided += 1
        else:
            self.cases += 1
            self.worst = max(self.worst, error)
        if point not in self.points:
            self.points.append(point)


def _judged(sides: tuple[Graph, Graph], old: Arrays, inputs: Arrays, float64: bool) -> tuple[float, float] | str | None:
    """Return the replacement's error and its tolerance, a description of the failure, or None for an inconclusive
    case.
    """
    try:
        new = interpret(sides[1], inputs, float64=float64)
    except _FAILURES as problem:
        return f"the replacement fails: {_shown(problem)}"
    return compared(sides, (old, new), inputs, float64)


def _in_own_dtypes(sides: tuple[Graph, Graph], inputs: Arrays) -> tuple[float, float] | str | None:
    own = {v.name: inputs[v.name].astype(v.type.storage_type.dtype.numpy) for v in sides[0].main.inputs}
    try:
        old = interpret(sides[0], own)
    except _FAILURES:
        return None
    return _judged(sides, old, own, float64=False)


def _has_masks(sides: tuple[Graph, Graph], inputs: Arrays) -> bool:
    """Return True if some inputs contain masking numbers, NumPy supports all dtypes, and not all of them are
    float64.
    """
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
    """Return True if both sides consist of constants, and are bitwise identical in the graph's own dtypes, as after
    folding.
    """
    try:
        old, new = (interpret(side, {}) for side in sides)
    except _FAILURES:  # such as an index out of range
        return False
    return all(np.array_equal(old[name], new[name], equal_nan=old[name].dtype.kind == "f") for name in old)


def _sizes(graph: Graph) -> list[Sizes]:
    if not graph.symbols:
        return [{}, {}]
    alone = Graph(graph.name)  # without the `size` inputs, which do not show which axis comes first
    alone.symbols, alone.functions = graph.symbols, dict(graph.functions)
    main = type(graph.main)("main")
    main.nodes = graph.main.nodes
    main.inputs = [v for v in graph.main.inputs if not v.name.startswith("size ")]
    alone.functions["main"] = main
    return list(small_sizes(alone, refused=True))


def _fits(sides: tuple[Graph, Graph], sizes: Sizes) -> bool:
    """Return True if a run at these sizes is small enough."""
    for side in sides:
        elements = sum(v.type.elements.evaluate(sizes) for v in side.main.inputs)
        elements += sum(v.type.elements.evaluate(sizes) for _, node in side.walk() for v in node.results)
        if elements > _MOST_ELEMENTS or graph_cost(side, sizes).flops > _MOST_FLOPS:
            return False
    return True

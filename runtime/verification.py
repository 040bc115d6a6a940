"""Verification: run every backend on random inputs, and compare the results with the float64 reference of the declared
model.

    report = verify_backends(optimized, weights)
    print(report)                          # one line per backend, and the first op whose error exceeds its tolerance

There are three comparisons. Each has a tolerance that follows from the dtypes and from the model, not from the result:

    rewrites   the optimized graph against the declared one, both in float64: tests the passes
    whole      a backend's outputs against the declared graph in float64
    ops        each op alone, on operands of the reference rounded to its dtypes, against its own reference in float64

In the third comparison, each op gets correct operands, so errors of earlier ops do not affect it.

**Tolerances** are defined in `treadle.ir.analysis.tolerances`. For one op alone, its reference is evaluated once more
with every operand changed by one spacing, with a random sign. In a model every op rounds, and later ops may amplify
the error. So the whole graph is evaluated with the operands and results of every op changed
(`treadle.runtime.roundings`), and, if activations are rounded to blocks, with the rounded numbers changed by half a
step. Integers and booleans must be equal, except elements that differ in the changed evaluation: rounding errors alone
may change them.

**Inconclusive results.** If a change of the last bits changes a model's result by half of its size or more, correct and
incorrect outputs cannot be distinguished, unless they agree all the same, and the report states this. It names the
first op whose integers or booleans change, such as a `top_k` of nearly equal numbers, if there is one. If a result is
NaN in the reference itself, equal results prove nothing: the report names the op or the weight that the NaN comes from
(`treadle.runtime.not_finite`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from treadle.backends.protocol import Backend, Executable
from treadle.backends.registry import backend_names, find_backend
from treadle.backends.staged import StagedBackend
from treadle.ir.analysis.drawn_inputs import draw_inputs, held, small_sizes
from treadle.ir.analysis.tolerances import Distance, coarsest_spacing, room
from treadle.ir.errors import BackendError, TreadleError, UsageError
from treadle.ir.graph import Graph, Node, Value
from treadle.ir.hashing import canonical_form
from treadle.ir.interpreter import interpret
from treadle.ir.target import Target
from treadle.ir.transforms.inline import inline_calls
from treadle.ir.types import Type
from treadle.passes.framework.manager import Optimized
from treadle.runtime.not_finite import FiniteWatch
from treadle.runtime.roundings import Moved, changed, first_choice, moved_by_rounding
from treadle.runtime.verification_report import (
    BackendReport,
    Difference,
    NotFinite,
    OpFault,
    ReportLayout,
    UndecidedOp,
    VerificationReport,
)

Array = np.ndarray[Any, Any]
Arrays = Mapping[str, Array]


# -- the three comparisons -------------------------------------------------------------------------------------------


def verify_backends(
    optimized: Optimized,
    weights: Arrays,
    *,
    backends: Sequence[str] | None = None,
    target: Target | None = None,
    sizes: Sequence[Mapping[str, int]] | None = None,
    seed: int = 0,
    emit: Callable[[str], None] = lambda line: None,
) -> VerificationReport:
    """Run a graph on every backend, by default on all that are registered, and compare the results.

    weights  by name, in their dtypes (bf16 as float32)
    sizes    sizes to run at, by default a few small ones within the symbols' bounds
    seed     seed of the random inputs
    emit     is called with each line of the report as soon as the line is known

    Raises UsageError if no inputs can be drawn, GraphError if the reference itself refuses the sizes.
    """
    declared, graph = optimized.source, optimized.graph
    target = target or Target("cpu")
    chosen = tuple(sizes) if sizes is not None else tuple(small_sizes(declared))
    if not chosen:
        raise UsageError("no sizes to verify at")
    names = tuple(backend_names() if backends is None else backends)
    layout = ReportLayout(names)
    emit(layout.heading(graph.name, str(target), seed, chosen))
    flat = inline_calls(graph)
    runs = [
        _Reference.of(declared, flat, weights, s, draw_inputs(declared, s, [seed, n])) for n, s in enumerate(chosen)
    ]
    not_finite = tuple({each.output: each for run in reversed(runs) for each in run.not_finite}.values())
    rewrites = Difference()
    for run in runs:
        rewrites = rewrites.worse(run.compare(run.optimized))
    for line in (*layout.not_finite(not_finite), *layout.rewrites(rewrites)):
        emit(line)
    reports = []
    for name in names:
        reports.append(_verify_backend(name, graph, flat, weights, target, runs))
        for line in layout.backend(reports[-1]):
            emit(line)
    return VerificationReport(graph.name, str(target), seed, chosen, not_finite, rewrites, tuple(reports))


@dataclass(frozen=True)
class _Reference:
    """One set of inputs, and the declared graph's result in float64.

    optimized  the optimized graph's result, in float64
    moved      the change of the result when ops round
    """

    sizes: Mapping[str, int]
    inputs: Arrays
    outputs: Arrays
    optimized: Arrays
    moved: Mapping[str, Moved]
    types: Mapping[str, Type]
    spacing: float
    not_finite: tuple[NotFinite, ...]
    graph: Graph
    weights: Arrays

    @staticmethod
    def of(declared: Graph, flat: Graph, weights: Arrays, sizes: Mapping[str, int], inputs: Arrays) -> _Reference:
        used = {name: weights[name] for name in declared.parameters}
        unfolded = inline_calls(declared)
        finite = FiniteWatch(unfolded, inputs, used)
        outputs = interpret(unfolded, inputs, used, float64=True, watch=finite)
        given = {name: weights[name] for name in flat.parameters}
        optimized = interpret(flat, inputs, given, float64=True)
        return _Reference(
            sizes,
            inputs,
            outputs,
            optimized,
            moved_by_rounding(flat, inputs, given, optimized),
            {name: v.type for name, v in declared.main.outputs.items()},
            coarsest_spacing(flat),
            tuple(finite.found(outputs, sizes)),
            flat,
            given,
        )

    @cached_property
    def choice(self) -> UndecidedOp | None:
        """The first op that chooses otherwise if ops round; None if there is none."""
        node = first_choice(self.graph, self.inputs, self.weights)
        return None if node is None else UndecidedOp(node.op.name, node.scope, str(node.source or ""))

    def compare(self, outputs: Arrays) -> Difference:
        worst = Difference()
        for name, expected in self.outputs.items():
            worst = worst.worse(compare(outputs[name], expected, self.moved[name], self.spacing, 1.0, self.types[name]))
        return worst


def _verify_backend(
    name: str, graph: Graph, flat: Graph, weights: Arrays, target: Target, runs: Sequence[_Reference]
) -> BackendReport:
    backend = find_backend(name)
    if (missing := backend.available()) is not None:
        return BackendReport(name, refused=missing)
    try:
        if isinstance(backend, StagedBackend) and (lacking := backend.missing_device(target)) is not None:
            raise lacking
        executable = backend.compile(graph, target, weights)
    except BackendError as error:
        first, *others = (error.received or "").splitlines() or [""]
        reason = first + (f", and {len(others)} more" if others else "")
        return BackendReport(name, refused=error.what + (f": {reason}" if reason else ""))
    difference, failure = Difference(), None
    for run in runs:
        try:
            difference = difference.worse(run.compare(executable(**run.inputs)))
        except TreadleError as error:
            failure = failure or error.what + (f": {error.received}" if error.received else "")
    ops = _OpChecker(backend, flat, weights, target)
    faults = (ops.first_fault(run) for run in runs)
    choices = (run.choice for run in runs if difference.shows_nothing)
    return BackendReport(
        name,
        None,
        difference,
        failure,
        next((f for f in faults if f is not None), None),
        next((c for c in choices if c is not None), None),
    )


# -- one op alone ----------------------------------------------------------------------------------------------------


class _OpChecker:
    """A checker that runs each node of a graph without calls as a graph of its own. Equal nodes are compiled once."""

    def __init__(self, backend: Backend, flat: Graph, weights: Arrays, target: Target) -> None:
        self.backend, self.flat, self.weights, self.target = backend, flat, weights, target
        self.compiled: dict[str, Executable] = {}

    def first_fault(self, run: _Reference) -> OpFault | None:
        """Return the first node, in program order, whose error on this run's operands exceeds its tolerance,
        or None.
        """
        main = self.flat.main
        values: dict[Value, Array] = {v: run.inputs[v.name] for v in main.inputs}
        values |= {v: self.weights[name] for name, v in main.parameters.items()}
        faults: list[OpFault] = []

        def watch(node: Node, results: Sequence[Array]) -> None:
            if not faults:
                blocks = any(v.type.encoding is not None for v in (*node.inputs, *node.results))
                found = (
                    None if blocks else self._fault(node, values, run.sizes)
                )  # the reference computes such nodes in `bind`
                faults.extend([found] if found is not None else [])
                values.update((v, held(a, v)) for v, a in zip(node.results, results, strict=True))

        interpret(self.flat, run.inputs, self.weights, float64=True, watch=watch)
        return faults[0] if faults else None

    def _fault(self, node: Node, values: Mapping[Value, Array], sizes: Mapping[str, int]) -> OpFault | None:
        alone, operands = _alone(node, values, sizes)
        source = str(node.source or "")
        try:
            key = canonical_form(alone)
            if key not in self.compiled:
                self.compiled[key] = self.backend.compile(alone, self.target, {})
            made = self.compiled[key](**operands)
        except TreadleError as error:
            return OpFault(node.op.name, node.scope, source, None, f"failed: {error.received or error.what}", sizes)
        spacing, rng = coarsest_spacing(alone), np.random.default_rng(0)
        expected = interpret(alone, operands, float64=True)
        others = interpret(alone, {n: changed(a, spacing, rng) for n, a in operands.items()}, float64=True)
        growth = math.sqrt(terms_of(alone.main.nodes[0]))
        worst = Difference()
        for name, value in alone.main.outputs.items():
            moved = Moved.between(expected[name], [others[name]])
            worst = worst.worse(compare(made[name], expected[name], moved, spacing, growth, value.type))
        return OpFault(node.op.name, node.scope, source, worst, None, sizes) if worst.exceeds else None


def _alone(node: Node, values: Mapping[Value, Array], sizes: Mapping[str, int]) -> tuple[Graph, dict[str, Array]]:
    """Return a graph of one node at fixed sizes, with the node's operands as inputs, and the arrays of the operands."""
    graph = Graph(node.op.name)
    inputs: dict[Value, Value] = {}
    for value in node.inputs:
        if value.literal is None and value not in inputs:
            inputs[value] = Value("input", _fixed(value.type, sizes), f"x{len(inputs)}")
    operands = [None if v is None else inputs.get(v, v) for v in node.operands]
    made = Node(
        node.op.at(sizes),
        operands,
        [_fixed(v.type, sizes) for v in node.results],
        scope=node.scope,
        source=node.source,
    )
    graph.main.inputs = list(inputs.values())
    graph.main.nodes = [made]
    graph.main.outputs = {f"y{n}": v for n, v in enumerate(made.results)}
    return graph, {formal.name: values[value] for value, formal in inputs.items()}


def _fixed(type: Type, sizes: Mapping[str, int]) -> Type:
    return type if not type.symbols else type.dtype[type.evaluate(sizes)]


def terms_of(node: Node) -> int:
    """Return the number of points of the node's iteration space per element of its largest result, at least 1."""
    points = node.op.apply([None if v is None else v.type for v in node.operands]).points.constant or 1
    elements = max(v.type.elements.constant or 1 for v in node.results)
    return max(1, points // elements)


# -- comparing -------------------------------------------------------------------------------------------------------


def compare(made: Any, expected: Array, moved: Moved, spacing: float, growth: float, type: Type) -> Difference:
    """Return the difference between a result and the reference, and the tolerance; see the module's docstring.

    moved   the change of the reference when numbers change by one spacing
    growth  factor by which the error of one rounding may grow: sqrt(n) for a sum of n terms
    """
    got = np.asarray(made)
    if got.shape != expected.shape:
        return Difference(math.inf)
    if not type.dtype.is_float:
        wrong = (got != expected) & ~moved.undecided
        return Difference(float(np.mean(wrong)) if wrong.size else 0.0)
    with np.errstate(all="ignore"):
        wide, wanted = got.astype(np.float64), expected.astype(np.float64)
    narrow = np.finfo(np.float32 if type.dtype.numpy is None else type.dtype.numpy)
    off = Distance.between(
        wide, wanted, huge=float(narrow.max) / 4
    )  # masks are the smallest number of a dtype, or -inf
    if off.lost or np.any(np.isnan(wanted) & ~np.isnan(wide)):
        return Difference(math.inf)
    if not off.plain.any() and np.isnan(wanted).any():
        return Difference(0.0, math.inf)  # all numbers are NaN or infinite
    most_moved = float(np.max(moved.by, initial=0.0, where=off.plain))
    in_blocks = float(np.max(np.where(off.plain, moved.in_blocks, 0.0), initial=0.0))
    tolerance = room(spacing, off.scale, most_moved, growth) + in_blocks + float(narrow.tiny)
    return Difference(off.most / off.scale, tolerance / off.scale)

"""Verification: every backend on drawn inputs, held against the float64 meaning of what was declared.

    report = verify_backends(optimized, weights)
    print(report)                          # a line a backend, and the first op that is further off than it may be

Three comparisons, each with a tolerance that follows from the dtypes and from the model, not from the result:

    rewrites   the optimized graph against the declared one, both in float64: what the passes did
    whole      a backend's outputs against the declared graph in float64
    ops        each op alone, on operands of the reference rounded to its dtypes, against its own meaning in float64

Since an op alone is given right operands, its error is its own: what an earlier op did wrong does not count again.

**Tolerances.** Numbers of a dtype lie a relative eps apart (2^-23 for f32), and no way to compute f can be nearer than
what a change of its operands' last bit makes of it. So the reference is evaluated once more with every operand changed
by a relative eps, its sign drawn; `moved` is the largest change of a result. A sum of n terms adds n roundings of
either sign, which grow as their square root. An op may differ by 8 (eps max|f| + sqrt(n) moved), with n the points of
its iteration space for one result; a model of n ops, whose weights and inputs are changed alike, by the same with that
n. The 8 stands for the several roundings inside a function such as erf. Integers and truth values must be equal, except
where the changed operands give another one: there the reference itself is undecided.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from treadle.backends.protocol import Backend, Executable
from treadle.backends.registry import backend_names, find_backend
from treadle.ir.drawn_inputs import draw_inputs, held, small_sizes
from treadle.ir.errors import BackendError, TreadleError, UsageError
from treadle.ir.graph import Graph, Node, Value
from treadle.ir.hashing import canonical_form
from treadle.ir.inline import inline_calls
from treadle.ir.interpreter import interpret
from treadle.ir.target import Target
from treadle.ir.types import Type
from treadle.passes.manager import Optimized

Array = np.ndarray[Any, Any]
Arrays = Mapping[str, Array]

SPACING = {"f64": 2.0**-52, "f32": 2.0**-23, "f16": 2.0**-10, "bf16": 2.0**-7}
"""The relative distance of each float dtype's numbers."""

_ROUNDINGS = 8.0


@dataclass(frozen=True)
class Difference:
    """How far results are from the reference: max|a - b| / max|b|, and how far they may be."""

    value: float = 0.0
    tolerance: float = 0.0

    @property
    def exceeds(self) -> bool:
        return not self.value <= self.tolerance  # a NaN exceeds

    def worse(self, other: Difference) -> Difference:
        """The one that is further past its tolerance, or nearer to it."""
        return max(other, self, key=lambda d: (d.exceeds, d.value / d.tolerance if d.tolerance else d.value))

    def __str__(self) -> str:
        return f"{self.value:.2g} (at most {self.tolerance:.2g})"


@dataclass(frozen=True)
class OpFault:
    """The first op, in program order, whose own result is further off than it may be.

    op          its name; `scope` and `line`, where the model's author put it
    difference  how far it is off, on right operands; None where it failed
    failure     the error it failed with
    sizes       those at which it was seen
    """

    op: str
    scope: str
    line: str
    difference: Difference | None
    failure: str | None
    sizes: Mapping[str, int]

    def __str__(self) -> str:
        how = self.failure or f"differs by {self.difference}"
        where = ", ".join(part for part in (self.line, f"scope {self.scope}" if self.scope else "") if part)
        return f"{self.op} {how}" + (f"    {where}" if where else "")


@dataclass(frozen=True)
class BackendReport:
    """What one backend did.

    refused     why it was not run at all: it is not installed, or does not take the graph; then nothing is known
    difference  of its outputs, the worst over all sizes
    failure     the error that a run ended with
    fault       the first op that is further off than it may be
    """

    backend: str
    refused: str | None = None
    difference: Difference = Difference()
    failure: str | None = None
    fault: OpFault | None = None

    @property
    def passed(self) -> bool | None:
        """Whether all of it is as near as it must be; None where it was not run."""
        return None if self.refused else not (self.difference.exceeds or self.failure or self.fault)


@dataclass(frozen=True)
class VerificationReport:
    """What `verify_backends` found, for people (`str`) and for JSON (`as_dict`)."""

    model: str
    target: str
    seed: int
    sizes: tuple[Mapping[str, int], ...]
    rewrites: Difference
    backends: tuple[BackendReport, ...]

    @property
    def passed(self) -> bool:
        """Whether the rewrites and every backend that ran are as near as they must be, and at least one ran."""
        ran = [b.passed for b in self.backends if b.passed is not None]
        return bool(ran) and all(ran) and not self.rewrites.exceeds

    def as_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "target": self.target,
            "seed": self.seed,
            "sizes": [dict(s) for s in self.sizes],
            "passed": self.passed,
            "rewrites": _facts(self.rewrites),
            "backends": [
                {
                    "backend": b.backend,
                    "passed": b.passed,
                    "refused": b.refused,
                    "failure": b.failure,
                    **(_facts(b.difference) if not b.refused else {}),
                    "first_fault": b.fault and _fault_facts(b.fault),
                }
                for b in self.backends
            ],
        }

    def __str__(self) -> str:
        sizes = "; ".join(", ".join(f"{k}={v}" for k, v in s.items()) for s in self.sizes if s)
        lines = [f"{self.model} on {self.target}, seed {self.seed}" + (f", at {sizes}" if sizes else "")]
        width = max(len(name) for name in ("rewrites", *(b.backend for b in self.backends)))
        marks = {True: "ok", False: "WRONG", None: "-"}
        lines.append(f"  {'rewrites':<{width}}  {marks[not self.rewrites.exceeds]:<5}  {self.rewrites}")
        for b in self.backends:
            told = f"not run: {b.refused}" if b.refused else f"failed: {b.failure}" if b.failure else str(b.difference)
            lines.append(f"  {b.backend:<{width}}  {marks[b.passed]:<5}  {told}")
            if b.fault is not None:
                lines.append(f"  {'':<{width}}         first op: {b.fault}")
            elif b.passed is False:
                lines.append(
                    f"  {'':<{width}}         every op alone is right: the fault lies in how they are put together"
                )
        return "\n".join(lines)


def _facts(difference: Difference) -> dict[str, Any]:
    finite = math.isfinite(difference.value)
    return {"difference": difference.value if finite else None, "tolerance": difference.tolerance}


def _fault_facts(fault: OpFault) -> dict[str, Any]:
    facts = {"op": fault.op, "scope": fault.scope, "source": fault.line, "failure": fault.failure}
    return {**facts, **(_facts(fault.difference) if fault.difference else {}), "sizes": dict(fault.sizes)}


# -- the three comparisons -------------------------------------------------------------------------------------------


def verify_backends(
    optimized: Optimized,
    weights: Arrays,
    *,
    backends: Sequence[str] | None = None,
    target: Target | None = None,
    sizes: Sequence[Mapping[str, int]] | None = None,
    seed: int = 0,
) -> VerificationReport:
    """Run a graph in every backend, by default all that are registered, and compare.

    weights  by name, in their dtypes (bf16 as float32)
    sizes    at which to run, by default a few small ones within the symbols' bounds
    seed     draws the inputs

    Raises UsageError where no input can be drawn, GraphError where the reference itself refuses the sizes.
    """
    declared, graph = optimized.source, optimized.graph
    target = target or Target("cpu")
    chosen = tuple(sizes) if sizes is not None else tuple(small_sizes(declared))
    if not chosen:
        raise UsageError("there are no sizes to verify at")
    flat = inline_calls(graph)
    runs = [
        _Reference.of(declared, flat, weights, s, draw_inputs(declared, s, [seed, n])) for n, s in enumerate(chosen)
    ]
    rewrites = Difference()
    for run in runs:
        rewrites = rewrites.worse(run.compare(interpret(graph, run.inputs, weights, float64=True)))
    reports = [
        _verify_backend(name, graph, flat, weights, target, runs)
        for name in (backend_names() if backends is None else backends)
    ]
    return VerificationReport(graph.name, str(target), seed, chosen, rewrites, tuple(reports))


@dataclass(frozen=True)
class _Reference:
    """One set of inputs, and what the declared graph makes of it and of its neighbours, in float64."""

    sizes: Mapping[str, int]
    inputs: Arrays
    outputs: Arrays
    changed: Arrays
    types: Mapping[str, Type]
    ops: int
    spacing: float

    @staticmethod
    def of(declared: Graph, flat: Graph, weights: Arrays, sizes: Mapping[str, int], inputs: Arrays) -> _Reference:
        spacing = coarsest_spacing(flat)
        used = {name: weights[name] for name in declared.parameters}
        return _Reference(
            sizes,
            inputs,
            interpret(declared, inputs, used, float64=True),
            interpret(declared, _changed(inputs, spacing), _changed(used, spacing), float64=True),
            {name: v.type for name, v in declared.main.outputs.items()},
            len(flat.main.nodes),
            spacing,
        )

    def compare(self, outputs: Arrays) -> Difference:
        worst = Difference()
        for name, expected in self.outputs.items():
            spacing = self.spacing if self.types[name].dtype.is_float else 0.0
            worst = worst.worse(
                compare(outputs[name], expected, self.changed[name], spacing, self.ops, self.types[name])
            )
        return worst


def _verify_backend(
    name: str, graph: Graph, flat: Graph, weights: Arrays, target: Target, runs: Sequence[_Reference]
) -> BackendReport:
    backend = find_backend(name)
    if (missing := backend.available()) is not None:
        return BackendReport(name, refused=missing)
    try:
        executable = backend.compile(graph, target, weights)
    except BackendError as error:
        return BackendReport(name, refused=error.what + (f": {error.received}" if error.received else ""))
    difference, failure = Difference(), None
    for run in runs:
        try:
            difference = difference.worse(run.compare(executable(**run.inputs)))
        except TreadleError as error:
            failure = failure or error.what + (f": {error.received}" if error.received else "")
    ops = _OpChecker(backend, flat, weights, target)
    faults = (ops.first_fault(run) for run in runs)
    return BackendReport(name, None, difference, failure, next((f for f in faults if f is not None), None))


# -- one op alone ----------------------------------------------------------------------------------------------------


class _OpChecker:
    """Runs each node of a graph without calls as a graph of its own. What is alike is compiled once."""

    def __init__(self, backend: Backend, flat: Graph, weights: Arrays, target: Target) -> None:
        self.backend, self.flat, self.weights, self.target = backend, flat, weights, target
        self.compiled: dict[str, Executable] = {}

    def first_fault(self, run: _Reference) -> OpFault | None:
        """The first node, in program order, that is further off than it may be on this run's operands."""
        main = self.flat.main
        values: dict[Value, Array] = {v: run.inputs[v.name] for v in main.inputs}
        values |= {v: self.weights[name] for name, v in main.parameters.items()}
        faults: list[OpFault] = []

        def watch(node: Node, results: Sequence[Array]) -> None:
            if not faults:
                found = self._fault(node, values, run.sizes)
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
        spacing = coarsest_spacing(alone)
        expected = interpret(alone, operands, float64=True)
        changed = interpret(alone, _changed(operands, spacing), float64=True)
        terms = _terms(alone.main.nodes[0])
        worst = Difference()
        for name, value in alone.main.outputs.items():
            worst = worst.worse(
                compare(
                    made[name],
                    expected[name],
                    changed[name],
                    spacing if value.type.dtype.is_float else 0.0,
                    terms,
                    value.type,
                )
            )
        return OpFault(node.op.name, node.scope, source, worst, None, sizes) if worst.exceeds else None


def _alone(node: Node, values: Mapping[Value, Array], sizes: Mapping[str, int]) -> tuple[Graph, dict[str, Array]]:
    """A graph of one node at fixed sizes, its operands as inputs, and the operands."""
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


def _terms(node: Node) -> int:
    """How many points of the node's iteration space go into one element of its largest result, 1 at least."""
    points = node.op.apply([None if v is None else v.type for v in node.operands]).points.constant or 1
    elements = max(v.type.elements.constant or 1 for v in node.results)
    return max(1, points // elements)


# -- comparing -------------------------------------------------------------------------------------------------------


def coarsest_spacing(graph: Graph) -> float:
    """The spacing of the coarsest float dtype in a graph; 0 where there is no float."""
    values = [v for _, node in graph.walk() for v in (*node.inputs, *node.results)]
    return max((SPACING[v.type.dtype.name] for v in values if v.type.dtype.is_float), default=0.0)


def _changed(arrays: Arrays, spacing: float) -> dict[str, Array]:
    """Every float changed by a relative spacing, up or down, in float64."""
    rng = np.random.default_rng(0)
    return {
        name: a.astype(np.float64) * (1 + spacing * rng.choice((-1.0, 1.0), a.shape)) if a.dtype.kind == "f" else a
        for name, a in ((n, np.asarray(x)) for n, x in arrays.items())
    }


def compare(made: Any, expected: Array, changed: Array, spacing: float, terms: int, type: Type) -> Difference:
    """How far a result is from the reference, and how far it may be: see the module's docstring.

    changed  the reference on operands changed by a spacing
    """
    got = np.asarray(made)
    if got.shape != expected.shape:
        return Difference(math.inf)
    if not type.dtype.is_float:
        wrong = (got != expected) & (expected == changed)
        return Difference(float(np.mean(wrong)) if wrong.size else 0.0)
    with np.errstate(all="ignore"):
        wide, wanted = got.astype(np.float64), expected.astype(np.float64)
        narrow = np.float32 if type.dtype.numpy is None else type.dtype.numpy
        most = float(np.finfo(narrow).max)
        # Masks are often written as the least number of a dtype, or as -inf: such elements say nothing of the scale of
        # the others. They must be as large, and of the same sign.
        plain = np.isfinite(wanted) & (np.abs(wanted) < most / 4)
        as_large = (np.sign(wide) == np.sign(wanted)) & (np.abs(wide) >= most / 8)
        if not (as_large | (np.isnan(wide) & np.isnan(wanted)))[~plain].all():
            return Difference(math.inf)
        scale = float(np.max(np.abs(wanted), initial=0.0, where=plain)) or 1.0
        moved = np.abs(changed.astype(np.float64) - wanted)
        moved_most = float(np.max(moved, initial=0.0, where=plain & np.isfinite(moved)))
        value = float(np.max(np.abs(wide - wanted), initial=0.0, where=plain))
    tolerance = _ROUNDINGS * (spacing * scale + math.sqrt(terms) * moved_most) + float(np.finfo(narrow).tiny)
    return Difference(value / scale, tolerance / scale)

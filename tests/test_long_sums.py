"""Sums over long axes in 16 bits: an op declares the dtype of its sums, and its reference and every backend use that
dtype.

Cases are derived from the ops' own samples by their axis rules: one factor of the axes is stretched. In f16 a running
sum of numbers below 1 stops near 2048, in bf16 near 256.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np
import pytest

from tests.op_checks import RUNNERS, TESTED, Array, Case, held, refusal, runner, seedings
from tests.rounding_bounds import Bounded, assert_within, bounded
from treadle.ir.axes import Application, Role
from treadle.ir.composites import body_of
from treadle.ir.errors import GraphError, RuleError
from treadle.ir.graph import Graph
from treadle.ir.op_registry import OPS
from treadle.ir.operation import Composite, Op
from treadle.ir.samples import SampleOperand
from treadle.ir.sizing.sizes import Size
from treadle.ir.types import DTYPES, Type

LONG = 4099  # a prime: no vector, block or panel divides it
# of any value within an op: otherwise windows of 4099 over an axis of that length would take gigabytes
MOST_ELEMENTS = 1 << 22
MOST = 6  # cases of an op: later samples mostly have other terms of attention, which do not affect sums
MOST_GRADIENTS = 2  # of an op: gradients of other cases add up in the same way
NARROW = ("f16", "bf16")
SMOOTH = {"attention_parts": [0]}
"""Results whose gradients are compared. The other gradients jump: the gradient of a maximum goes to another element if
rounding makes that element the largest, and no bound on rounding limits the difference.
"""
SUMMING = [name for name in TESTED if OPS[name].accumulates is not None]


# -- stretched samples -----------------------------------------------------------------------------------------


def applied(case: Case) -> Application:
    return case.op.apply(case.types)


def stretched(name: str, number: int, factor: str, dtype: str) -> Iterator[Case]:
    """Yield cases of a sample with one factor of size LONG and with positive floats, if the op accepts the operands
    with its attributes, or with larger ones.
    """
    case = Case.of(name, number, dtype)
    application = applied(case)
    sizes = {n: dim.size.constant or 0 for n, dim in application.dims.items()}
    more = LONG - sizes[factor]
    types: list[Type | None] = []
    for type, dims in zip(case.types, application.operands, strict=True):
        if type is None or dims is None:
            types.append(type)
            continue
        shape = [
            old if factor not in dim.factors else old.constant // sizes[factor] * LONG  # type: ignore[operator]
            for old, dim in zip(type.shape, dims, strict=True)
        ]
        types.append(type.dtype[tuple(shape)])
    if types == list(case.types):
        return
    for op in (case.op, *longer(case.op, more)):
        try:
            op.infer(types)
        except (RuleError, GraphError):
            continue
        if isinstance(op, Composite) and largest_within(op, types) > MOST_ELEMENTS:
            continue
        yield Case(op, tuple(types), drawn(OPS[name].samples[number].operands, types))


def largest_within(op: Composite, types: Sequence[Type | None]) -> int:
    """Return the number of elements of the largest value in a composite's body, with nested composites opened."""
    most = 0
    for node in body_of(op, types).nodes:
        most = max([most, *(v.type.elements.evaluate({}) for v in node.results)])
        if isinstance(node.op, Composite):
            most = max(most, largest_within(node.op, [None if v is None else v.type for v in node.operands]))
    return most


def longer(op: Op, more: int) -> Iterator[Op]:
    """Yield the op with larger sizes or lengths in its attributes: longer windows, or windows folded into a longer
    axis.
    """
    sizes = {n: v + more * op.attributes.get("dilation", 1) for n, v in op.attributes.items() if isinstance(v, Size)}
    if sizes:
        yield replace(op, **sizes)  # type: ignore[type-var]
    for name, value in op.attributes.items():
        if isinstance(value, tuple) and value and isinstance(value[0], int):
            yield replace(op, **{name: (value[0] + more, *value[1:])})  # type: ignore[type-var]


def drawn(operands: tuple[SampleOperand | None, ...], types: list[Type | None]) -> tuple[Array | None, ...]:
    rng = np.random.default_rng(0)
    made: list[Array | None] = []
    for operand, type in zip(operands, types, strict=True):
        if operand is None or type is None:
            made.append(None)
        elif type.dtype.is_float:
            made.append(held(rng.uniform(0, 0.25, type.evaluate({})), type.dtype))
        else:
            made.append(replace(operand, type=type).draw(rng))
    return tuple(made)


def long_cases(name: str, dtype: str, *roles: Role) -> Iterator[tuple[str, Case]]:
    """Yield each case with its description."""
    for number in range(len(OPS[name].samples)):
        case = Case.of(name, number, dtype)
        if not case.takes_its_operands:
            continue
        for factor, expected in applied(case).factors.items():
            for made in stretched(name, number, factor, dtype) if expected.role in roles else ():
                yield f"{name}-{number} {dtype}, {factor} of {LONG}, {made.op.attributes}", made


@dataclass(frozen=True)
class Long:
    """A graph, its inputs, and the bounds of its outputs."""

    what: str
    graph: Graph
    inputs: Mapping[str, Array]
    wanted: Mapping[str, Bounded]

    @staticmethod
    def of(what: str, graph: Graph, inputs: Mapping[str, Array]) -> Long:
        return Long(what, graph, inputs, bounded(graph, inputs))

    def hold(self, run: str) -> None:
        """Fail if a runner's outputs are not within their bounds."""
        if refusal(run, self.graph):
            return
        made = runner(run)(self.graph, self.inputs)
        for output, wanted in self.wanted.items():
            assert_within(made[output], wanted, f"{self.what}, {output}")


@lru_cache(maxsize=2)  # all runners of a case come in sequence
def long_forms(name: str, dtype: str) -> list[Long]:
    """Return the cases in the forward direction, along every axis that is summed."""
    cases = long_cases(name, dtype, Role.REDUCED, Role.WHOLE, Role.SCANNED)
    return [Long.of(what, case.forward_graph(), case.inputs) for what, case in islice(cases, MOST)]


@lru_cache(maxsize=2)
def long_gradients(name: str, dtype: str) -> list[Long]:
    """Return the cases of gradients, along any axis. Along an axis that an op maps, the gradient of a weight or of a
    broadcast operand is a sum.
    """
    found = []
    for what, case in islice(long_cases(name, dtype, *Role), MOST_GRADIENTS):
        for seeded in [SMOOTH[name]] if name in SMOOTH else seedings(case)[:1]:
            graph = case.gradient_graph(seeded)
            if any(node.op.accumulates for _, node in graph.walk()):
                inputs = {n: np.abs(x) if n.startswith("seed") else x for n, x in case.seed_inputs(seeded).items()}
                found.append(Long.of(f"gradient of {what}", graph, inputs))
    return found


# -- the declared dtype of sums ----------------------------------------------------------------------------------


def adds_up(op: Op, types: tuple[Type | None, ...]) -> bool:
    """Return True if elements of one operand are summed: by a node of the body, or by the op, which then returns more
    than ones for operands of ones.
    """
    if isinstance(op, Composite):
        return any(
            adds_up(node.op, tuple(None if v is None else v.type for v in node.operands))
            for node in body_of(op, types).nodes
        )
    names = op.operand_names(len(types))
    for group in op.linear:
        for name in names:
            if name in group or name.rstrip("0123456789") in group:
                operands = [
                    None if t is None else start(t, 1.0 if n == name or n not in group else 0.0)
                    for n, t in zip(names, types, strict=True)
                ]
                try:
                    with np.errstate(all="ignore"):
                        made = op.reference(*operands)
                except GraphError:  # the op refuses to write twice to one position, so it sums nothing
                    continue
                if any(np.any(np.asarray(y) > 1) for y in (made if isinstance(made, tuple) else (made,))):
                    return True
    return False


def start(type: Type, value: float) -> Array:
    """Return an array filled with one number; for integers, which may be indices, with zeros."""
    shape: Any = type.evaluate({})
    return np.full(shape, value if type.dtype.is_float else 0, type.dtype.numpy or np.float32)


@pytest.mark.parametrize("name", TESTED)
def test_an_op_that_adds_up_says_in_which_dtype(name: str) -> None:
    cases = [Case.of(name, number) for number in range(len(OPS[name].samples))]
    floats = [c for c in cases if any(t is not None and t.dtype.is_float for t in c.types)]
    adds = any(adds_up(c.op, c.types) for c in floats)
    accumulates = OPS[name].accumulates
    assert (accumulates is not None) == adds, (
        f"{name} {'adds up' if adds else 'adds nothing up'}, accumulates is {accumulates}"
    )
    assert accumulates is None or accumulates.bytes >= 4


# -- the dtype of sums in runs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("run", RUNNERS)
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("name", SUMMING)
def test_long_axes_are_summed_as_the_op_says(name: str, dtype: str, run: str) -> None:
    forms = long_forms(name, dtype)
    assert forms, "no sample of the op has a long form"
    for form in forms:
        form.hold(run)


# The gradient of fake_quantize is 0 or 1 by a rounded number. Ops take turns: one backend in one dtype, the next in the
# other, and NumPy, which has no bf16, in f16. The interpreter, whose results the bounds are for, has both.
GRADIENTS = [
    (name, dtype, run)
    for n, name in enumerate(each for each in TESTED if each != "fake_quantize")
    for d, dtype in enumerate(NARROW)
    for r, run in enumerate(RUNNERS)
    if run == "interpreter" or (dtype == "f16" if run == "numpy" else (n + d + r) % 2)
]


@pytest.mark.parametrize(("name", "dtype", "run"), GRADIENTS)
def test_gradients_are_summed_so_as_well(name: str, dtype: str, run: str) -> None:
    for form in long_gradients(name, dtype):
        form.hold(run)


@pytest.mark.parametrize("dtype", NARROW)
def test_a_sum_that_is_held_in_its_own_dtype_is_caught(dtype: str) -> None:
    """The planted error exceeds the bounds."""
    _, case = next(long_cases("reduce_sum", dtype, Role.REDUCED))
    (x,) = case.operands
    assert x is not None
    total = np.zeros(x.shape[:-1])
    for i in range(LONG):
        total = held(total + x[..., i], DTYPES[dtype]).astype(np.float64)
    graph = case.forward_graph()
    (wanted,) = bounded(graph, case.inputs).values()
    with pytest.raises(AssertionError, match="beyond their bounds"):
        assert_within(total, wanted, "sum")

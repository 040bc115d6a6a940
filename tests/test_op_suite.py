"""Every registered op on every sample and dtype: reference against rules, body, gradient; backends against it.

An op that brings no samples, or no error samples, fails.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from tests.op_checks import EPSILON, RUNNERS, TESTED, Array, Case, assert_close, refusal, runner, seedings
from tests.rounding_bounds import assert_within, bounded
from treadle.ir.composites import body_of
from treadle.ir.errors import BackendError, GraphError, RuleError
from treadle.ir.graph import Graph
from treadle.ir.interpreter import interpret, interpret_function
from treadle.ir.op_registry import OPS
from treadle.ir.operation import Composite
from treadle.ir.types import DTYPES

# A body may order its operations otherwise than the reference does: thousands of float64's roundings.
SAME = 1e-12
# A central difference errs by about the spacing to the power 2/3, times third derivatives, summed over terms.
DIFFERENCE = 1000 * EPSILON["f64"] ** (2 / 3)


def each_sample(names: list[str] = TESTED) -> Callable[[Any], Any]:
    """Run a test on every sample of the ops."""
    cases = [(name, number) for name in names for number in range(len(OPS[name].samples))]
    return pytest.mark.parametrize(("name", "number"), cases, ids=[f"{name}-{n}" for name, n in cases])


def dtypes_of(name: str, number: int) -> list[str | None]:
    """None for the sample's own, and every other dtype that the op takes in place of its floats, or its integers."""
    own = {t.dtype for t in OPS[name].samples[number].types if t is not None}
    other = [d.name for d in DTYPES.values() if d not in own and d.kind in {o.kind for o in own}]
    return [None, *(dtype for dtype in other if Case.of(name, number, dtype).takes_its_operands)]


RETYPED = [(name, n, dtype) for name in TESTED for n in range(len(OPS[name].samples)) for dtype in dtypes_of(name, n)]
each_dtype = pytest.mark.parametrize(
    ("name", "number", "dtype"), RETYPED, ids=[f"{name}-{n}-{dtype or 'own'}" for name, n, dtype in RETYPED]
)
each_runner = pytest.mark.parametrize("run", RUNNERS)


@pytest.mark.parametrize("name", TESTED)
def test_an_op_says_what_it_means_and_brings_samples(name: str) -> None:
    cls = OPS[name]
    # a dataclass without a docstring gets its signature as one
    assert cls.__doc__, f"{name} has no docstring"
    assert not cls.__doc__.startswith(f"{cls.__name__}("), f"{name} has no docstring"
    assert cls.samples, f"{name} has no samples"
    assert cls.errors, f"{name} has no error samples"


@each_sample()
def test_the_reference_gives_what_the_rules_infer(name: str, number: int) -> None:
    case = Case.of(name, number)
    for precision in (case, case.widened):
        inferred = precision.op.infer(precision.types)
        for got, type in zip(precision.results, inferred, strict=True):
            # NumPy has no bf16: references hold it in float32
            assert (got.shape, got.dtype) == (type.static_shape, type.dtype.numpy or np.float32)


@each_sample([name for name in TESTED if issubclass(OPS[name], Composite)])
def test_a_body_equals_its_reference(name: str, number: int) -> None:
    case = Case.of(name, number).widened
    assert isinstance(case.op, Composite)
    with np.errstate(all="ignore"):
        made = interpret_function(body_of(case.op, case.types), list(case.inputs.values()), {})
    for got, expected in zip(made, case.results, strict=True):
        assert_close(got, expected, SAME, name)


@each_sample()
def test_the_gradient_equals_finite_differences(name: str, number: int) -> None:
    case = Case.of(name, number).widened
    for seeded in seedings(case):
        found = interpret(case.gradient_graph(seeded), case.seed_inputs(seeded))
        for operand, expected in case.differences(seeded).items():
            got = found.get(operand, np.zeros_like(expected))
            assert_close(got, expected, DIFFERENCE, f"gradient of {operand}")


@each_runner
@each_dtype
def test_forward(name: str, number: int, dtype: str | None, run: str) -> None:
    case = Case.of(name, number, dtype)
    graph = case.forward_graph()
    if is_refused(run, graph, case.inputs):
        return
    made = answer(run, graph, case.inputs)
    for output, wanted in bounded(graph, case.inputs).items():
        assert_within(made[output], wanted, f"result {output}")


@each_runner
@each_dtype
def test_gradient(name: str, number: int, dtype: str | None, run: str) -> None:
    case = Case.of(name, number, dtype)
    for seeded in seedings(case):
        graph, inputs = case.gradient_graph(seeded), case.seed_inputs(seeded)
        if is_refused(run, graph, inputs):
            continue
        made = answer(run, graph, inputs)
        wanted = bounded(graph, inputs)
        assert made.keys() == wanted.keys()
        for operand, gradient in wanted.items():
            assert_within(made[operand], gradient, f"gradient of {operand}")


def answer(run: str, graph: Graph, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
    """What a runner gives, which must be of the dtypes that were inferred, whatever its library promotes to."""
    made = runner(run)(graph, inputs)
    for output, value in graph.main.outputs.items():
        assert made[output].dtype == (value.type.dtype.numpy or np.float32), output
    return made


def is_refused(run: str, graph: Graph, inputs: Mapping[str, Array]) -> bool:
    """Whether the runner may refuse the graph; it then must, and say why."""
    reason = refusal(run, graph)
    if reason is not None:
        with pytest.raises(BackendError, match=reason):
            runner(run)(graph, inputs)
    return reason is not None


ERRORS = [(name, number) for name in TESTED for number in range(len(OPS[name].errors))]


@pytest.mark.parametrize(("name", "number"), ERRORS, ids=[f"{name}-{n}" for name, n in ERRORS])
def test_what_does_not_fit_is_refused(name: str, number: int) -> None:
    sample, text = OPS[name].errors[number]
    with pytest.raises((RuleError, GraphError)) as caught:
        OPS[name](**sample.attributes).infer(sample.types)
    assert text in str(caught.value)

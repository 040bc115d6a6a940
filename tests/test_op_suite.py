"""Every registered op on every sample: reference against rules, body, gradient; backends against it.

An op that brings no samples, or no error samples, fails.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.op_checks import EPSILON, RUNNERS, TESTED, Case, assert_close, resolution, seedings
from treadle.ir.composites import body_of
from treadle.ir.errors import GraphError, RuleError
from treadle.ir.interpreter import interpret, interpret_function
from treadle.ir.op import OPS, Composite

# An op on a sample chains some dozens of roundings at most, each half a spacing, few in one direction.
ROUNDINGS = 32
# A body may order its operations otherwise than the reference does: thousands of float64's roundings.
SAME = 1e-12
# A central difference errs by about the spacing to the power 2/3, times third derivatives, summed over terms.
DIFFERENCE = 1000 * EPSILON["f64"] ** (2 / 3)


def each_sample(names: list[str] = TESTED) -> Callable[[Any], Any]:
    """Run a test on every sample of the ops."""
    cases = [(name, number) for name in names for number in range(len(OPS[name].samples))]
    return pytest.mark.parametrize(("name", "number"), cases, ids=[f"{name}-{n}" for name, n in cases])


each_backend = pytest.mark.parametrize("backend", RUNNERS)


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


@each_backend
@each_sample()
def test_forward(name: str, number: int, backend: str) -> None:
    case = Case.of(name, number)
    graph = case.forward_graph()
    made = RUNNERS[backend](graph, case.inputs)
    for n, expected in enumerate(case.widened.results):
        assert_close(made[f"y{n}"], expected, ROUNDINGS * resolution(graph), f"result {n}")


@each_backend
@each_sample()
def test_gradient(name: str, number: int, backend: str) -> None:
    case = Case.of(name, number)
    for seeded in seedings(case):
        graph = case.gradient_graph(seeded)
        made = RUNNERS[backend](graph, case.seed_inputs(seeded))
        wide = case.widened
        expected = interpret(wide.gradient_graph(seeded), wide.seed_inputs(seeded))
        assert made.keys() == expected.keys()
        for operand, gradient in expected.items():
            assert_close(made[operand], gradient, ROUNDINGS * resolution(graph), f"gradient of {operand}")


ERRORS = [(name, number) for name in TESTED for number in range(len(OPS[name].errors))]


@pytest.mark.parametrize(("name", "number"), ERRORS, ids=[f"{name}-{n}" for name, n in ERRORS])
def test_what_does_not_fit_is_refused(name: str, number: int) -> None:
    sample, text = OPS[name].errors[number]
    with pytest.raises((RuleError, GraphError)) as caught:
        OPS[name](**sample.attributes).infer(sample.types)
    assert text in str(caught.value)

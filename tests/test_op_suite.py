"""Every registered op on every sample and dtype: the reference is compared with rules, body and gradient, and the
backends with the reference.

An op without samples or without error samples fails. A test covers one op, or one op on one backend. It runs all
samples and reports each failure. Forward, each sample runs in all dtypes. Gradients run in each sample's own dtypes,
and each other dtype on some samples (`shared_dtypes`); `python -m tests.fuzz.op_dtypes` runs them in all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from itertools import chain

import numpy as np
import pytest

from tests.error_texts import raises_freely
from tests.many_cases import every_case
from tests.op_checks import EPSILON, RUNNERS, TESTED, Array, Case, assert_close, refusal, runner, seedings
from tests.rounding_bounds import Bounded, assert_within, bounded
from treadle.ir.composites import body_of
from treadle.ir.errors import BackendError, GraphError, RuleError
from treadle.ir.graph import Graph
from treadle.ir.interpreter import interpret, interpret_function
from treadle.ir.op_registry import OPS
from treadle.ir.operation import Composite, Op
from treadle.ir.types import DTYPES

# A body may order its operations differently from the reference. This is thousands of float64's roundings.
SAME = 1e-12
# A central difference has an error of about the spacing to the power 2/3, times third derivatives, summed over the
# terms.
DIFFERENCE = 1000 * EPSILON["f64"] ** (2 / 3)
OWN = "own"  # a sample's dtypes
Dtypes = Callable[[str, int], list[str | None]]  # the dtypes in which an op's sample of a number runs
# Ops whose gradient is not the derivative of their numbers, and the factor of the incoming gradient: casts to formats
# that NumPy lacks, whose rounding steps a difference would see, and ops that stop the gradient.
FACTOR = {"round_to": 1.0, "stop_gradient": 0.0}


each_op = pytest.mark.parametrize("name", TESTED)
each_runner = pytest.mark.parametrize("run", RUNNERS)


@cache
def dtypes_of(name: str, number: int) -> list[str | None]:
    """Return None, which stands for the sample's own dtypes, and every other dtype for its floats, or for its
    integers.
    """
    own = {t.dtype for t in OPS[name].samples[number].types if t is not None}
    other = [d.name for d in DTYPES.values() if d not in own and d.kind in {o.kind for o in own}]
    return [None, *(dtype for dtype in other if Case.of(name, number, dtype).takes_its_operands)]


def shared_dtypes(name: str, number: int) -> list[str | None]:
    """Return None, which stands for the sample's own dtypes, and the sample's share of the other dtypes: the samples of
    an op take turns, so that each dtype is on one of them at least.
    """
    possible = [dtypes_of(name, each)[1:] for each in range(len(OPS[name].samples))]
    every = list(dict.fromkeys(chain.from_iterable(possible)))
    mine = []
    for turn, dtype in enumerate(every):
        takers = [each for each, dtypes in enumerate(possible) if dtype in dtypes]
        period = min(len(takers), len(every))
        if number in takers and takers.index(number) % period == turn % period:
            mine.append(dtype)
    return [None, *mine]


def samples_of(name: str) -> Iterator[tuple[str, Case]]:
    """Yield an op on each of its samples, with the name of the case."""
    for number in range(len(OPS[name].samples)):
        yield f"{name}-{number}", Case.of(name, number)


def retyped(name: str, dtypes: Dtypes = dtypes_of) -> Iterator[tuple[str, Case]]:
    """Yield an op on each of its samples in the chosen dtypes, by default in every dtype."""
    for number in range(len(OPS[name].samples)):
        for dtype in dtypes(name, number):
            yield f"{name}-{number}-{dtype or OWN}", Case.of(name, number, dtype)


@dataclass(frozen=True)
class Held:
    """A graph on inputs, with the bounds of its outputs, which are the same for all runners."""

    what: str
    graph: Graph
    inputs: Mapping[str, Array]

    @cached_property
    def wanted(self) -> Mapping[str, Bounded]:
        return bounded(self.graph, self.inputs)


@lru_cache(maxsize=2)
def forwards(name: str) -> list[Held]:
    return [Held(what, case.forward_graph(), case.inputs) for what, case in retyped(name)]


@lru_cache(maxsize=2)
def gradients(name: str, dtypes: Dtypes = dtypes_of) -> list[Held]:
    return [
        Held(f"{what}-seeds{seeded}", case.gradient_graph(seeded), case.seed_inputs(seeded))
        for what, case in retyped(name, dtypes)
        for seeded in seedings(case)
    ]


@each_op
def test_an_op_says_what_it_means_and_brings_samples(name: str) -> None:
    cls = OPS[name]
    # a dataclass without a docstring gets its signature as its docstring
    assert cls.__doc__, f"{name} has no docstring"
    assert not cls.__doc__.startswith(f"{cls.__name__}("), f"{name} has no docstring"
    assert cls.samples, f"{name} has no samples"
    assert cls.errors, f"{name} has no error samples"


def test_every_primitive_has_a_gradient_or_says_that_it_stops_it() -> None:
    for name in TESTED:
        cls = OPS[name]
        has_gradient = cls.gradient not in (Op.gradient, *([Composite.gradient] if cls.stops_gradient else []))
        assert has_gradient != cls.stops_gradient, name


@each_op
def test_the_reference_gives_what_the_rules_infer(name: str) -> None:
    with every_case() as each:
        for what, case in samples_of(name):
            for precision in (case, case.widened):
                with each(what):
                    inferred = precision.op.infer(precision.types)
                    for got, type in zip(precision.results, inferred, strict=True):
                        # NumPy has no bf16: references represent it as float32
                        assert (got.shape, got.dtype) == (type.static_shape, type.dtype.numpy or np.float32)


@pytest.mark.parametrize("name", [name for name in TESTED if issubclass(OPS[name], Composite)])
def test_a_body_equals_its_reference(name: str) -> None:
    with every_case() as each:
        for what, sample in samples_of(name):
            with each(what):
                case = sample.widened
                assert isinstance(case.op, Composite)
                with np.errstate(all="ignore"):
                    made = interpret_function(body_of(case.op, case.types), list(case.inputs.values()), {})
                for got, expected in zip(made, case.results, strict=True):
                    assert_close(got, expected, SAME, name)


@each_op
def test_the_gradient_equals_finite_differences(name: str) -> None:
    with every_case() as each:
        for what, sample in samples_of(name):
            case = sample.widened
            for seeded in seedings(case):
                with each(f"{what}-seeds{seeded}"):
                    found = interpret(case.gradient_graph(seeded), case.seed_inputs(seeded))
                    for operand, expected in case.differences(seeded).items():
                        if name in FACTOR:
                            expected = case.seeds[0] * FACTOR[name]
                        got = found.get(operand, np.zeros_like(expected))
                        assert_close(got, expected, DIFFERENCE, f"gradient of {operand}")


@each_runner
@each_op
def test_forward(name: str, run: str) -> None:
    """Results of every sample, in every dtype."""
    with every_case() as each:
        for held in forwards(name):
            with each(held.what):
                hold(run, held)


@each_runner
@each_op
def test_gradient(name: str, run: str) -> None:
    """Gradients of every sample, in its own dtypes and its share of the others; on TVM, which must compile each, only
    in the samples' own dtypes.
    """
    with every_case() as each:
        for held in gradients(name, shared_dtypes):
            if run == "tvm" and f"-{OWN}-" not in held.what:
                continue
            with each(held.what):
                hold(run, held)


def hold(run: str, held: Held) -> None:
    """Fail if a runner's outputs are not within their bounds."""
    if is_refused(run, held.graph, held.inputs):
        return
    bounds = held.wanted
    made = answer(run, held.graph, held.inputs)
    assert made.keys() == bounds.keys()
    for output, wanted in bounds.items():
        assert_within(made[output], wanted, output)


def answer(run: str, graph: Graph, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
    """Return a runner's results. They must have the inferred dtypes, whatever dtype the library promotes to."""
    made = runner(run)(graph, inputs)
    for output, value in graph.main.outputs.items():
        assert made[output].dtype == (value.type.dtype.numpy or np.float32), output
    return made


def is_refused(run: str, graph: Graph, inputs: Mapping[str, Array]) -> bool:
    """Return True if the runner may refuse the graph; check that the runner then refuses it with that reason."""
    reason = refusal(run, graph)
    if reason is not None:
        with raises_freely(BackendError, match=reason):
            runner(run)(graph, inputs)
    return reason is not None


@each_op
def test_misfits_are_refused(name: str) -> None:
    with every_case() as each:
        for number, (sample, text) in enumerate(OPS[name].errors):
            with each(f"{name}-{number}"):
                with pytest.raises((RuleError, GraphError)) as caught:
                    OPS[name](**sample.attributes).infer(sample.types)
                assert text in str(caught.value)

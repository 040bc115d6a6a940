"""Every promise of an op's axis rule is checked in float64: on every sample with the reference, and on some samples on
each backend. (The op suite compares backends with the reference on every sample.)

mapped     taking some positions of the axis, or permuting it, commutes with the op
reduced    the op on two halves, combined by the reduction, is the op on the whole
scanned    a prefix of the result is the result on a prefix
limited    the same holds for attention's [t<=s], if both axes are truncated
indexed    rows that no index names have no effect
linear     f(a x + b y) = a f(x) + b f(y) in each group of operands, the others fixed
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import pytest

from tests import op_checks
from tests.many_cases import every_case
from tests.op_checks import BACKENDS, RUNNERS, TESTED
from treadle.ir.axes import Application, AxisDim, Role, Rule
from treadle.ir.builder import Builder
from treadle.ir.graph import Function, Graph
from treadle.ir.op_registry import OPS
from treadle.ir.operation import Op
from treadle.ir.samples import Sample
from treadle.ir.types import Type, f64

Array = np.ndarray[Any, Any]
Operands = list[Array | None]

COMBINE = {"sum": np.add, "max": np.maximum, "min": np.minimum, "prod": np.multiply, "and": np.logical_and,
           "or": np.logical_or}  # fmt: skip


class Case:
    """An op on one sample's values, in float64, with the results of a runner."""

    def __init__(self, name: str, number: int, run: str = "interpreter") -> None:
        sample: Sample = OPS[name].samples[number]
        self.number = number
        self.op: Op = OPS[name](**sample.attributes).in_float64()
        self.types = [t.with_dtype(f64) if t is not None and t.dtype.is_float else t for t in sample.types]
        self.runner = run
        self.operands: Operands = sample.draw(seed=number)
        self.rule: Rule = self.op.rule([None if t is None else t.rank for t in self.types])
        self.application: Application = self.op.apply(self.types)

    @cached_property
    def results(self) -> tuple[Array, ...]:
        return self.run(self.operands)

    def on(self, operands: Sequence[Array | None]) -> op_checks.Case:
        """Return the op's results on operands of other shapes."""
        types: list[Type | None] = [
            t if t is None or a is None or not a.shape else t.dtype[a.shape]
            for t, a in zip(self.types, operands, strict=True)
        ]
        return op_checks.Case(self.op, tuple(types), tuple(operands))

    def run(self, operands: Sequence[Array | None]) -> tuple[Array, ...]:
        case = self.on(operands)
        return tuple(prepared(self.runner, case.op, case.types)(case.inputs).values())

    def factors(self, *roles: Role) -> Iterator[str]:
        for name, factor in self.application.factors.items():
            if factor.role in roles and self.size(name) > 1:
                yield name

    def size(self, factor: str) -> int:
        size = self.application.dims[factor].size.constant
        assert size is not None
        return size

    def take(self, array: Array, dims: Sequence[AxisDim], factor: str, index: Array) -> Array:
        """Take the positions `index` of a factor in every dimension that holds it; other values stay the same."""
        for at, dim in enumerate(dims):
            if factor in dim.factors:
                inner = [self.size(f) for f in dim.factors]
                split = array.reshape(*array.shape[:at], *inner, *array.shape[at + 1 :])
                split = np.take(split, index, axis=at + dim.factors.index(factor))
                array = split.reshape(*array.shape[:at], -1, *array.shape[at + 1 :])
        return array

    def take_operands(self, factor: str, index: Array) -> Operands:
        return [
            a if a is None or dims is None else self.take(a, dims, factor, index)
            for a, dims in zip(self.operands, self.application.operands, strict=True)
        ]

    def take_results(self, factor: str, index: Array) -> list[Array]:
        return [
            self.take(a, dims, factor, index) for a, dims in zip(self.results, self.application.results, strict=True)
        ]


@lru_cache(maxsize=64)
def prepared(run: str, op: Op, types: tuple[Type | None, ...]) -> Callable[[Mapping[str, Array]], Mapping[str, Array]]:
    """Return the op prepared by a runner; reused between samples and promises with the same shapes."""
    return op_checks.prepared(run, op_checks.Case(op, types, (None,) * len(types)).forward_graph())


def promise(made: Callable[[Case], Any]) -> Callable[[Callable[[Case], None]], Any]:
    """Return a decorator that runs a check on every op that makes the promise: on each of its samples in the
    interpreter; on backends, samples take turns.
    """
    samples = {name: [n for n in range(len(OPS[name].samples)) if made(Case(name, n))] for name in TESTED}

    def tested(check: Callable[[Case], None]) -> Any:
        @pytest.mark.parametrize("run", RUNNERS)
        @pytest.mark.parametrize("name", [name for name in TESTED if samples[name]])
        def test(name: str, run: str) -> None:
            with every_case() as each:
                for number in samples[name] if run == "interpreter" else turns(samples[name], run):
                    with each(f"{name}-{number}"):
                        check(Case(name, number, run))

        return test

    return tested


def turns(samples: Sequence[int], backend: str) -> Sequence[int]:
    """Return a backend's samples: one in as many as there are backends, but at least one."""
    return samples[BACKENDS.index(backend) % len(samples) :: len(BACKENDS)]


def same(found: Sequence[Array], wanted: Sequence[Array], what: str) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape, what
        if a.dtype.kind == "f":
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11, err_msg=what)
        else:
            np.testing.assert_array_equal(a, b, err_msg=what)


@promise(lambda case: [*case.factors(Role.MAPPED)])
def test_mapped_axes_restrict_and_permute(case: Case) -> None:
    rng = np.random.default_rng(case.number)
    for factor in case.factors(Role.MAPPED):
        size = case.size(factor)
        if factor not in case.op.positional:
            index = rng.permutation(size)
            same(case.run(case.take_operands(factor, index)), case.take_results(factor, index), f"permuting {factor}")
        for index in (
            (np.arange(size - 1), np.arange(1))
            if factor in case.op.positional
            else (rng.permutation(size)[: size - 1],)
        ):
            cut = case.take_operands(factor, index)
            if not case.on(cut).takes_its_operands:
                assert (
                    factor in case.rule.known_sizes or OPS[case.op.name].attribute_defaults() != case.op.attributes
                ), factor
                continue
            same(case.run(cut), case.take_results(factor, index), f"restricting {factor}")


@promise(lambda case: [*case.factors(Role.REDUCED)])
def test_reduced_axes_split_and_combine(case: Case) -> None:
    names = case.op.operand_names(len(case.operands))
    for factor in case.factors(Role.REDUCED):
        monoid = case.application.factors[factor].monoid
        assert monoid is not None
        size = case.size(factor)
        parts = []
        for index in (np.arange(size // 2), np.arange(size // 2, size)):
            cut = case.take_operands(factor, index)
            if parts and monoid == "sum":
                cut = [once(case, factor, n, a) for n, a in zip(names, cut, strict=True)]
            parts.append(case.run(cut))
        for first, second, whole in zip(*parts, case.results, strict=True):
            same([COMBINE[monoid](first, second)], [whole], f"splitting {factor}")


def once(case: Case, factor: str, name: str, array: Array | None) -> Array | None:
    """Return zeros for an operand that is added once (a bias): it lacks the factor, and is linear together with an
    operand that has it.
    """
    names = case.op.operand_names(len(case.operands))
    holds = {
        n for n, dims in zip(names, case.application.operands, strict=True) for d in dims or () if factor in d.factors
    }
    is_added = name not in holds and any(name in group and group & holds for group in case.op.linear)
    return np.zeros_like(array) if array is not None and is_added else array


def cuts(case: Case) -> list[tuple[str, ...]]:
    """Return axes whose ends may be truncated together: a scanned axis, or a query and a key axis under [t<=s]."""
    whole = ((f, case.application.factors[f].limit) for f in case.factors(Role.WHOLE))
    return [*((f,) for f in case.factors(Role.SCANNED)), *((f, limit) for f, limit in whole if limit is not None)]


@promise(cuts)
def test_scans_and_causal_attention_ignore_the_suffix(case: Case) -> None:
    for factors in cuts(case):
        for length in range(1, min(case.size(f) for f in factors) + 1):
            cut, wanted = case, list(case.results)
            operands = case.operands
            for factor in factors:
                index = np.arange(length)
                operands = [
                    a if a is None or dims is None else case.take(a, dims, factor, index)
                    for a, dims in zip(operands, case.application.operands, strict=True)
                ]
                wanted = [
                    cut.take(a, dims, factor, index) for a, dims in zip(wanted, case.application.results, strict=True)
                ]
            same(case.run(operands), wanted, f"a prefix of {' and '.join(factors)}")


def read_by_index(case: Case) -> list[str]:
    """Return axes that are read by index; a result that holds such an axis is written by index."""
    written = {f for dims in case.application.results for d in dims for f in d.factors}
    return [factor for factor in case.factors(Role.INDEXED) if factor not in written]


@promise(read_by_index)
def test_rows_that_no_index_names_do_not_matter(case: Case) -> None:
    for factor in read_by_index(case):
        size = case.size(factor)
        longer = []
        for array, dims in zip(case.operands, case.application.operands, strict=True):
            if array is not None and dims is not None and any(factor in d.factors for d in dims):
                array = case.take(array, dims, factor, np.append(np.arange(size), 0))
            longer.append(array)
        same(case.run(longer), case.results, f"a row more along {factor}")


@promise(lambda case: case.op.linear)
def test_linear_in_the_operands_it_names(case: Case) -> None:
    names = case.op.operand_names(len(case.operands))
    cls = OPS[case.op.name]
    other: Operands = cls.samples[case.number].draw(seed=case.number + 1)
    for group in case.op.linear:
        assert group <= {*names, *cls.operands}, f"{cls.name} is linear in {sorted(group)}, which it does not take"
        linear = [n in group or n.rstrip("0123456789") in group for n in names]
        if all(a is None or not yes for a, yes in zip(case.operands, linear, strict=True)):
            continue  # an optional operand that is absent
        if any(a is not None and a.dtype.kind != "f" for a, yes in zip(case.operands, linear, strict=True) if yes):
            continue
        second = [y if yes else x for x, y, yes in zip(case.operands, other, linear, strict=True)]
        mixed = [
            x if not yes or x is None or y is None else 2.0 * x - 3.0 * y
            for x, y, yes in zip(case.operands, other, linear, strict=True)
        ]
        wanted = [2.0 * a - 3.0 * b for a, b in zip(case.results, case.run(second), strict=True)]
        same(case.run(mixed), wanted, f"linear in {sorted(group)}")


# -- consequences of a rule -------------------------------------------------------------------------------------------


def ops_of_samples(says: Callable[[Op, Sequence[int | None]], bool]) -> set[str]:
    """Return the ops for which the property holds on a sample."""
    samples = [(OPS[name](**s.attributes), s) for name in OPS for s in OPS[name].samples]
    return {op.name for op, s in samples if says(op, [None if t is None else t.rank for t in s.types])}


def test_contractions_follow_from_the_rules() -> None:
    """Attention is not a contraction, since it is linear only in its values. Neither are conv, which reads windows, and
    gates.
    """
    assert ops_of_samples(Op.is_contraction) == {"matmul", "linear", "einsum"}
    assert not OPS["einsum"](equation="i, j -> i j").is_contraction([1, 1])
    assert not OPS["einsum"](equation="i j -> i").is_contraction([2])


def test_elementwise_ops_follow_from_the_rules() -> None:
    found = ops_of_samples(Op.is_elementwise)
    assert {"add", "where", "cast", "round", "erf", "gelu", "less"} <= found
    assert found.isdisjoint(("softmax", "matmul", "rearrange", "expand", "slice", "iota", "layer_norm", "attention"))


def test_a_call_is_neither() -> None:
    graph = Graph("g")
    block = Function("block")
    graph.add_function(block)
    inside, main = Builder(graph, block), Builder(graph)
    inside.outputs(y=-inside.input("x", "f32[2]"))
    (y,) = main.call(block, [main.input("x", "f32[2]")])
    assert y.value.node is not None
    assert not y.value.node.is_elementwise
    assert not y.value.node.is_contraction

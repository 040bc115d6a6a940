"""Facts about ops are compared with the results of the ops' references, on every sample of every op.

An op must declare a fact if and only if its samples show it.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.golden import Golden
from tests.op_checks import TESTED, Case
from tests.test_axis_rules import Case as RuleCase
from treadle.ir.analysis.cost import node_cost
from treadle.ir.axes import Role
from treadle.ir.builder import Builder
from treadle.ir.composites import body_of, holds_contraction, lowering_of
from treadle.ir.errors import GraphError
from treadle.ir.graph import Function, Graph, Value
from treadle.ir.op_registry import OPS
from treadle.ir.operation import Composite, Op, names_operand
from treadle.ir.ops.call import Call
from treadle.ir.ops.pooling import MaxPool
from treadle.ir.sizing.sizes import Size
from treadle.ir.storage.views import Storage, StorageKind, View
from treadle.ir.text.attributes import attribute_text
from treadle.ir.types import DTYPES, f32

Array = np.ndarray[Any, Any]
Given = Sequence[Array | None]

ROOT = Path(__file__).resolve().parent.parent


def cases(name: str) -> list[Case]:
    return [Case.of(name, number) for number in range(len(OPS[name].samples))]


def evaluated(case: Case, operands: Given) -> tuple[Array, ...] | None:
    """Return the op's results on other operands, or None if the op is not defined on them."""
    types = [None if x is None else DTYPES[_NAMES[x.dtype.name]][x.shape] for x in operands]
    on_these = Case(case.op, tuple(types), tuple(operands))
    try:
        return on_these.evaluate(operands) if on_these.takes_its_operands else None
    except GraphError:  # an index out of range
        return None


_NAMES = {"bool": "bool", "float32": "f32", "float64": "f64", "int32": "i32", "int64": "i64"}


def are_same(found: Sequence[Array] | None, wanted: Sequence[Array]) -> bool:
    return found is not None and all(
        a.shape == b.shape and np.allclose(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)
        for a, b in zip(found, wanted, strict=True)
    )


def present(operands: Given) -> list[Array]:
    return [x for x in operands if x is not None]


# -- the criteria ----------------------------------------------------------------------------------------------


def hands_elements_on(case: Case) -> bool:
    """Return True if changed elements appear changed in the results, wherever the results contain them.

    An op that compares its elements, as a maximum does, picks others if their order changes. An op that computes
    returns new numbers. Indices and conditions keep their values.
    """
    (result, *_), rng = case.results, np.random.default_rng(0)
    names = case.op.operand_names(len(case.types))
    asked = [
        x is not None
        and x.dtype == result.dtype
        and (names_operand(case.op.moved_operands, n) or not case.op.moved_operands)
        for n, x in zip(names, case.operands, strict=True)
    ]
    count = sum(x.size for x, yes in zip(case.operands, asked, strict=True) if yes and x is not None)
    if count == 0 or result.dtype.kind not in "fi":
        return False
    values = np.arange(count) * 3 - count  # distinct numbers of both signs, none the double of another
    values = (values + 0.25 if result.dtype.kind == "f" else values).astype(result.dtype)
    given, drawn = {}, rng.permutation(values)
    for i, (x, yes) in enumerate(zip(case.operands, asked, strict=True)):
        if yes and x is not None:
            given[i], drawn = drawn[: x.size].reshape(x.shape), drawn[x.size :]
    renaming = dict(zip(values.tolist(), rng.permutation(values).tolist(), strict=True))
    renamed = {i: np.vectorize(renaming.__getitem__, otypes=[x.dtype])(x) for i, x in given.items()}
    before, after = (
        case.evaluate([one.get(i, x) for i, x in enumerate(case.operands)])[0].ravel().tolist()
        for one in (given, renamed)
    )
    return [renaming.get(x) for x in before] == after


def changes_places(case: Case) -> bool:
    return len(case.operands) == 2 and are_same(evaluated(case, case.operands[::-1]), case.results)


def works_on_each_element(case: Case) -> bool:
    """Return True if permuted operands give permuted results."""
    (result, *_), rng = case.results, np.random.default_rng(0)
    operands = present(case.operands)
    if not operands or any(r.shape != result.shape for r in case.results):
        return False
    try:
        if np.broadcast_shapes(*(x.shape for x in operands)) != result.shape:
            return False
    except ValueError:
        return False
    order = rng.permutation(result.size)
    moved = [None if x is None else np.broadcast_to(x, result.shape).ravel()[order] for x in case.operands]
    return are_same(evaluated(case, moved), [r.ravel()[order] for r in case.results])


def reads_one_place(case: Case, position: int) -> bool:
    """Return True if each element of this operand affects only the element of the result at the same position."""
    (result, *others), x = case.results, case.operands[position]
    type, (made, *_) = case.types[position], case.op.infer(case.types)
    if others or x is None or type is None or (type.dtype, type.shape) != (made.dtype, made.shape):
        return False
    for n, at in enumerate(np.ndindex(x.shape)):
        changed = x.copy()
        changed[at] = not x[at] if x.dtype.kind == "b" else x.flat[n - 1]  # of an index, one that is out of range too
        (again,) = case.evaluate([changed if i == position else y for i, y in enumerate(case.operands)])
        differ = np.array(again != result)
        differ[at] = False
        if differ.any():
            return False
    return True


def is_linear_in(case: Case, position: int) -> bool:
    wide, rng = case.widened, np.random.default_rng(100)
    x = wide.operands[position]
    assert x is not None
    y = rng.standard_normal(x.shape)
    first, second, mixed = (
        wide.evaluate([given if i == position else z for i, z in enumerate(wide.operands)])
        for given in (x, y, 2.0 * x - 3.0 * y)
    )
    return all(np.allclose(m, 2.0 * a - 3.0 * b) for a, b, m in zip(first, second, mixed, strict=True))


# -- the facts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TESTED)
def test_ops_that_only_move_elements(name: str) -> None:
    assert all(case.op.only_moves for case in cases(name)) == all(map(hands_elements_on, cases(name)))


@pytest.mark.parametrize("name", TESTED)
def test_ops_that_commute(name: str) -> None:
    """If operands are exchanged, the results are equal; `ties` distinguishes the operands of a maximum by their
    gradients.
    """
    even, other = [], []
    for case in cases(name):
        (even if getattr(case.op, "ties", "even") == "even" else other).append(case)
    assert {case.op.commutes for case in even} == {all(map(changes_places, even))}
    assert not any(case.op.commutes for case in other)


@pytest.mark.parametrize("name", TESTED)
def test_elementwise_ops(name: str) -> None:
    ranks = [[None if t is None else t.rank for t in case.types] for case in cases(name)]
    claimed = [case.op.is_elementwise(r) for case, r in zip(cases(name), ranks, strict=True)]
    found = [works_on_each_element(case) for case in cases(name)]
    assert all(claimed) == all(found)
    assert all(f or not c for f, c in zip(found, claimed, strict=True))  # a sum over no axes is also elementwise


@pytest.mark.parametrize("name", TESTED)
def test_ops_that_are_views(name: str) -> None:
    """NumPy returns views for some results of these ops, and never for results of other ops."""
    shares = [np.shares_memory(r, x) for c in cases(name) for r in c.results for x in present(c.operands)]
    assert all(case.op.is_view for case in cases(name)) == any(shares)


def lying(case: Case, position: int) -> View | None:
    """Return the view of an operand in a separate row-major storage, or None if there is none."""
    type = case.types[position]
    if type is None:
        return None
    storage = Storage("x", type.dtype, type.elements, StorageKind.LOCAL)
    return View.contiguous(storage, type.shape)


def addresses(view: View) -> Array:
    """Return the address of each element of a view in its storage."""
    found = np.full([n.evaluate({}) for n in view.shape], view.offset.evaluate({}))
    for axis, stride in enumerate(view.strides):
        found = found + np.arange(found.shape[axis]).reshape([-1] + [1] * (found.ndim - 1 - axis)) * stride.evaluate({})
    return found


def counted(case: Case, position: int) -> Array:
    """Return a result for which one operand's elements are numbered from one million on, and all other elements are
    smaller.
    """
    shapes = [None if x is None else x.shape for x in case.operands]
    given = [None if s is None else np.zeros(s) for s in shapes]
    x = given[position]
    assert x is not None
    given[position] = np.arange(x.size).reshape(x.shape) + 1e6
    return np.asarray(case.op.reference(*given))


@pytest.mark.parametrize("name", TESTED)
def test_where_the_result_of_a_view_lies(name: str) -> None:
    """Checks the addresses of the result's elements. Except for other layouts, a view exists exactly if NumPy finds
    one.
    """
    for case in cases(name):
        x = lying(case, 0) if case.types else None
        view = None if x is None else case.op.viewed(x, case.types)
        shares = case.op.is_view and any(np.shares_memory(r, present(case.operands)[0]) for r in case.results)
        assert (view is not None) == (shares and case.op.result_layout(0) is None)
        if view is not None:
            assert view.shape == case.op.infer(case.types)[0].shape
            assert np.array_equal(addresses(view), counted(case, 0) - 1e6)


WRITTEN_IN_PLACE = {"rearrange", "reshape", "concat", "pad"}


@pytest.mark.parametrize("name", TESTED)
def test_where_an_operand_lies_as_a_part_of_the_result(name: str) -> None:
    found = False
    for case in cases(name):
        (type, *_) = case.op.infer(case.types)
        y = View.contiguous(Storage("y", type.dtype, type.elements, StorageKind.LOCAL), type.shape)
        for position, operand in enumerate(case.operands):
            part = case.op.part_of(y, case.types, position) if operand is not None else None
            if part is not None and operand is not None:
                found = True
                numbers = (counted(case, position) - 1e6).ravel()
                here = np.flatnonzero(numbers >= 0)
                assert sorted(numbers[here]) == list(range(operand.size))  # each element once
                assert np.array_equal(addresses(part).ravel()[numbers[here].astype(int)], here)
    assert found == (name in WRITTEN_IN_PLACE)


@pytest.mark.parametrize("name", TESTED)
def test_along_which_axes_all_elements_are_alike(name: str) -> None:
    for case in cases(name):
        for axis in case.op.repeats(case.types):
            (result,) = case.results
            assert np.array_equal(result, np.broadcast_to(result.take([0], axis), result.shape))
    assert any(case.op.repeats(case.types) for case in cases(name)) == (name == "positions")


NOT_SEEN = {
    "index_add": "an element of the target is read for its own place, though its rows are indexed",
    "scatter_add": "likewise",
    "append": "likewise; it says so by `updates`",
    "positions": "it reads no element",
    "concat": "of one part it is that part",
    "rms_norm": "a row by itself has the shape of the weight",
}
"""Dimensions along which an element affects only its own position, although the rule does not declare it."""


@pytest.mark.parametrize("name", TESTED)
def test_operands_that_may_be_overwritten(name: str) -> None:
    missed = False
    for case in cases(name):
        claimed = {*case.op.in_place(case.types)}
        found = {i for i in range(len(case.types)) if reads_one_place(case, i)}
        assert claimed <= found
        missed |= claimed != found
    assert missed == (name in NOT_SEEN)


@pytest.mark.parametrize("name", TESTED)
def test_linear_groups_name_every_linear_operand(name: str) -> None:
    """Check that the op is nonlinear in every float operand that its `linear` groups omit. test_axis_rules checks the
    groups.
    """
    seen: dict[str, list[bool]] = {}
    for case in cases(name):
        linear = frozenset().union(*case.op.linear)
        for i, (operand, x) in enumerate(zip(case.op.operand_names(len(case.types)), case.operands, strict=True)):
            is_float = x is not None and x.dtype.kind == "f" and all(r.dtype.kind == "f" for r in case.results)
            if is_float and x is not None and x.size and not names_operand(linear, operand):
                seen.setdefault(operand, []).append(is_linear_in(case, i))
    assert [operand for operand, found in seen.items() if all(found)] == []


@pytest.mark.parametrize("name", TESTED)
def test_ops_that_read_positions(name: str) -> None:
    """If an op declares that it reads positions along an axis, a permutation of elements along the axis does not
    permute the results in the same way.

    test_axis_rules checks the opposite for each mapped axis. Along a generated axis the results of equal elements are
    equal, unless the op counts.
    """
    for number in range(len(OPS[name].samples)):
        case = RuleCase(name, number)
        assert case.op.reads_positions == bool(case.op.positional)
        for factor in case.op.positional:
            order = np.arange(case.size(factor))[::-1]
            moved, wanted = case.run(case.take_operands(factor, order)), case.take_results(factor, order)
            assert case.size(factor) == 1 or not are_same(moved, wanted), factor
        for factor in case.factors(Role.GENERATED):
            alike = [None if x is None else np.full_like(x, x.flat[0]) for x in case.operands]
            (result, *_), dims = case.run(alike), case.application.results[0]
            turned = case.take(result, dims, factor, np.arange(case.size(factor))[::-1])
            assert are_same([turned], [result]) == (factor not in case.op.positional), factor


def test_ops_that_are_contractions() -> None:
    """The ops are contractions themselves, and composites whose body of primitives contains a contraction."""
    holding = {name for name in TESTED if any(holds_contraction(c.op, _values(c)) for c in cases(name))}
    fused = {"activated_linear", "gated_linear", "projections", "conv"}
    fused |= {"attention", "attention_parts", "attention_with_probabilities", "cached_attention"}
    assert holding == {"matmul", "linear", "einsum", *fused}


def _values(case: Case) -> list[Value | None]:
    return [None if t is None else Value("input", t, "x") for t in case.types]


def test_attributes_are_given_by_name_alone() -> None:
    """This also applies to attributes of a base class; operands are positional."""
    found = {(name, field.name) for name, op in OPS.items() for field in dataclasses.fields(op) if not field.kw_only}
    assert not found


def test_a_call_has_no_facts() -> None:
    """The meaning of a call is its function, which the op itself does not know."""
    call = Call.of(Function("f"))
    assert not (call.only_moves or call.is_view or call.commutes or call.reads_positions or call.is_elementwise([1]))
    assert not call.is_contraction([1, 1])


def _fact_lines(name: str) -> list[str]:
    """Return the facts of an op's class, and for each sample its rule, its cost, and the facts derived from them."""
    cls = OPS[name]
    says = {"linear": cls.linear_text, "flops a point": cls.flops, "sums in": cls.accumulates, "step": cls.step}
    says |= {"pairs": cls.pairs, "reads slots": sorted(cls.reads_slots), "updates": dict(cls.updates)}
    flags = ("is_word", "commutes", "moves_blocks", "decodes", "meets_ranks", "stops_gradient")
    says |= {flag: getattr(cls.make(**cls.samples[0].attributes) if cls.samples else cls, flag) for flag in flags}
    lines = [name, *(f"  {key}: {value}" for key, value in says.items() if value not in ("", None, False, [], {}))]
    for sample in cls.samples:
        op, types = cls.make(**sample.attributes), sample.types
        b = Builder(Graph("g"))
        names = op.operand_names(len(types))
        operands = [None if t is None else b.input(n, t).value for n, t in zip(names, types, strict=True)]
        cost = node_cost(b.emit(op, operands), {})
        rule = op.axis_rule([None if t is None else t.rank for t in types])
        found = {"positions": sorted(op.positional), "in place": op.in_place(types), "alike": op.repeats(types)}
        found |= {"keys": op.keys_in_parts, "multiples": op.multiples(types, op.apply(types))}
        lines += [f"  {sample.text}", f"    {rule}   {op.dtypes()}   {cost.flops} flops, {cost.bytes} bytes"]
        if isinstance(op, Composite):
            found["body"], found["lowering"] = (_ops_of(make(op, types)) for make in (body_of, lowering_of))
            if found["lowering"] == found["body"]:
                del found["lowering"]
        for factor in op.apply(types).factors:
            resized = op.resized({factor: Size.symbol("N")}, types)
            if resized != op:
                found[f"with N of {factor}"] = "nothing" if resized is None else _attributes(resized)
            if factor in op.positional and (shifted := op.on_part(factor, Size.symbol("P"))) is not None:
                found[f"from P of {factor}"] = _attributes(shifted)
        lines += [f"    {key}: {value}" for key, value in found.items() if value]
    return lines


def _ops_of(body: Function) -> str:
    return " ".join(node.op.name for node in body.nodes)


def test_windows_of_up_to_16_are_lowered_as_slices() -> None:
    for size, ops in ((16, "slice " * 16 + "maximum " * 15), (17, "windows reduce_max ")):
        body = lowering_of(MaxPool(kernel=(size,)), [f32[40]])
        assert _ops_of(body) + " " == ops


def _attributes(op: Op) -> str:
    return ", ".join(f"{name}={attribute_text(value)}" for name, value in op.attributes.items())


def test_facts_of_ops(golden: Golden) -> None:
    """One table with all facts, in which every changed number, flag or rule shows."""
    golden(
        "text_form/ops.txt",
        "\n".join(line for name in sorted(OPS) if name != "call" for line in [*_fact_lines(name), ""]),
    )


# -- names of ops elsewhere ------------------------------------------------------------------------------------

SPELLERS = (
    *("backends/numpy/spelling.py", "backends/torch/spelling.py", "backends/torch/destinations.py"),
    *("backends/numpy/destinations.py", "backends/numpy/workspaces.py"),
    *("backends/onnx", "backends/tvm/kernels"),
    *(f"backends/tvm/lowering/{subject}_rules.py" for subject in ("attention", "cache", "encoded", "indexing")),
    *(f"backends/tvm/lowering/{subject}_rules.py" for subject in ("normalization", "product", "reduction", "shape")),
    *("ir/builder.py", "ir/expressions.py", "ir/tensors/", "passes/framework/pattern.py"),
    *("ir/wording/other_spellings.py", "ir/wording/typed_calls.py", "ir/wording/python_protocols.py"),
    "ir/sizing/size_numbers.py",
    "passes/memory/instances.py",  # columns of files
    "treadle/tasks/option_hints.py",  # options of other libraries
    *("runtime/training/schedules.py", "treadle/cli/train.py"),  # a learning rate that falls linearly
    *(
        "treadle/serving/answers.py",
        "treadle/serving/requests.py",
        "treadle/tasks/images/reading.py",
    ),  # members of their JSON
    *("treadle/tasks/images/tiles.py", "treadle/tasks/images/patches.py"),
    *(
        f"treadle/report/{name}.py" for name in ("box_contents", "building", "comparison", "tabs")
    ),  # members of the page's data
)
"""Files that list how other systems express ops: tables of backends, Python's operators, words of other libraries."""

NAMED = 69


def test_op_names_outside_their_classes_become_fewer() -> None:
    """A list of op names states a fact in the wrong place: the fact belongs in the ops' classes, or follows from their
    rules.

    Code about a single op uses `isinstance`, so that a type checker knows the op's attributes. NAMED may only decrease.
    """
    found: dict[str, int] = {}
    for folder in ("files", "ir", "passes", "backends", "runtime", "treadle"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            relative = path.relative_to(ROOT).as_posix()
            if not relative.startswith(("ir/ops/", *SPELLERS)) and (count := _op_names(path)):
                found[relative] = count
    total = sum(found.values())
    assert total <= NAMED, "\n".join(f"{count:4} {path}" for path, count in found.items())
    assert total == NAMED, f"now there are {total}: write that down"


def _op_names(path: Path) -> int:
    """Return the number of string literals in one file that are names of ops."""
    tree = ast.parse(path.read_text("utf-8"))
    return sum(isinstance(n, ast.Constant) and isinstance(n.value, str) and n.value in OPS for n in ast.walk(tree))

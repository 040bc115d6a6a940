"""Shapes and indexing on the TVM backend beyond the op suite: views instead of copies, the order of sums, errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.backend_checks import graph_of, message
from tests.op_checks import Array
from treadle.backends.registry import find_backend
from treadle.backends.tvm.executable import KernelExecutable
from treadle.backends.tvm.kernels.gathering import ScatterAdd, Take
from treadle.backends.tvm.kernels.host.cache import assembly
from treadle.backends.tvm.kernels.isa import ISAS
from treadle.backends.tvm.kernels.pointwise import Pointwise
from treadle.backends.tvm.kernels.shaping import FoldWindows, Iota
from treadle.backends.tvm.lowering.program import KernelStep, RoutineStep
from treadle.ir.builder import Builder, Expr
from treadle.ir.graph import Function, Graph
from treadle.ir.interpreter import interpret
from treadle.ir.sizing.sizes import Size, product
from treadle.ir.storage.views import Storage, StorageKind, View, row_major
from treadle.ir.target import Target
from treadle.ir.types import DTYPES, f32

pytest.importorskip("tvm")


def compiled(graph: Graph, target: str = "cpu", **weights: Any) -> KernelExecutable:
    made = find_backend("tvm").compile(graph, Target(target), weights)
    assert isinstance(made, KernelExecutable)
    return made


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def steps(exe: KernelExecutable) -> list[str]:
    """Return the titles of main's steps."""
    return [s.routine.name if isinstance(s, RoutineStep) else s.kernel.title for s in exe.program.main.steps]


# -- views ---------------------------------------------------------------------------------------------------


def _split(b: Builder, x: Expr) -> Expr:
    return b.reshape(b.slice(x, axis=1, start=1), shape=("B", "S-1", 2, 6)) * 2.0


def _every_other(b: Builder, x: Expr) -> Expr:
    return (
        b.slice(b.expand(b.rearrange(x, pattern="b s d -> b s 1 d"), shape=(None, None, 3, None)), axis=3, stride=5)
        * 2.0
    )


def _sliding(b: Builder, x: Expr) -> Expr:
    return b.windows(b.slice(x, axis=1, start=1), axis=2, size=3, stride=2, dilation=2) * 2.0


def _counted(b: Builder, x: Expr) -> Expr:
    return b.positions(x).cast(f32) * x


VIEWS = [(_split, ["mul"]), (_every_other, ["mul"]), (_sliding, ["mul"]), (_counted, ["iota", "cast_mul"])]


@pytest.mark.parametrize(("build", "taken"), VIEWS, ids=[build.__name__[1:] for build, _ in VIEWS])
def test_views_are_read_in_place(build: Callable[[Builder, Expr], Expr], taken: list[str]) -> None:
    graph = graph_of(lambda b: build(b, b.input("x", "f32[B, S, 12]")))
    exe, reference = compiled(graph), find_backend("numpy").compile(graph, Target("cpu"), {})
    assert steps(exe) == taken
    for batch, length in ((2, 5), (1, 2)):
        x = normal(batch, length, 12)
        np.testing.assert_array_equal(exe(x=x)["y"], reference(x=x)["y"])


@pytest.mark.parametrize(
    ("build", "loops"),
    [
        (lambda b, x: b.tanh(x) + x, 1),
        (lambda b, x: x * b.rearrange(b.input("y", "f32[B, 1, S, 4, 8]"), pattern="b 1 s h d -> b s h d"), 1),
        (lambda b, x: x + b.input("y", "f32[8]"), 2),
        (lambda b, x: x + b.input("y", "f32[B, S, 1, 1]"), 2),
        (lambda b, x: x + b.input("y", "f32[B, 1, 4, 1]"), 4),
        (lambda b, x: b.slice(x, axis=1, start=1) * 2.0, 2),
        (lambda b, x: b.rearrange(x, pattern="b s h d -> b s (h d)") * 2.0, 1),
        (lambda b, x: b.rearrange(x, pattern="b s h d -> b h s d") * 2.0, 4),
        (lambda b, x: b.rearrange(x, pattern="b s h d -> (h d) b s") * 2.0, 2),
    ],
)
def test_a_kernel_has_no_more_loops_than_strides_ask_for(build: Callable[[Builder, Expr], Expr], loops: int) -> None:
    exe = compiled(graph_of(lambda b: build(b, b.input("x", "f32[B, S, 4, 8]"))))
    (step,) = exe.program.main.steps
    assert isinstance(step, KernelStep)
    assert isinstance(step.kernel, Pointwise)
    assert step.kernel.rank == loops


@pytest.mark.parametrize("after", ["b h s d -> b h d s", "b h s d -> b s h d", "b h s d -> s (d b h)"])
def test_a_copy_of_repeated_heads_is_written_as_the_next_rearrange_reads_it(after: str) -> None:
    """No strides express b g r s d -> b (g r) s d for repeated heads. So the heads are copied, in a layout that makes
    the next op a view.
    """

    def build(b: Builder) -> Expr:
        x = b.rearrange(b.input("x", "f32[B, S, 12]"), pattern="b s (g=3 d) -> b g 1 s d")
        repeated = b.rearrange(b.expand(x, shape=(None, None, 2, None, None)), pattern="b g r s d -> b (g r) s d")
        return b.rearrange(repeated, pattern=after) * 2.0

    exe = compiled(graph_of(build))
    assert steps(exe) == ["copy", "mul"]
    letters = [n for n in after.partition("->")[2] if n.isalpha()]
    for batch, length in ((2, 5), (1, 1)):
        x = normal(batch, length, 12)
        heads = np.repeat(x.reshape(batch, length, 3, 4).transpose(0, 2, 1, 3), 2, axis=1)
        moved = heads.transpose(["bhsd".index(n) for n in letters]) * 2
        np.testing.assert_array_equal(exe(x=x)["y"], moved.reshape(length, -1) if "(" in after else moved)


def test_parts_are_written_where_they_belong() -> None:
    """concat writes each part once, into memory that a rearrange reads as a view."""

    def build(b: Builder) -> Expr:
        parts = [b.input("x", "f32[B, S, 4]"), b.input("y", "f32[B, 2, 4]"), b.input("z", "f32[B, T, 4]")]
        return b.rearrange(b.concat(*parts, axis=1), pattern="b s d -> d b s")

    exe = compiled(graph_of(build))
    assert len(steps(exe)) == 3
    x, y, z = normal(2, 3, 4), normal(2, 2, 4), normal(2, 5, 4)
    expected = np.concatenate([x, y, z], axis=1).transpose(2, 0, 1)
    np.testing.assert_array_equal(exe(x=x, y=y, z=z)["y"], expected)
    nothing = np.zeros((2, 0, 4), np.float32)
    assert exe.inputs[0].name == "x"
    refused = message(lambda: exe(x=nothing, y=y, z=z))
    assert "x" in refused


@pytest.mark.parametrize("shape", [(15, 4), (60,), (5, 12), (2, 30)])
def test_a_reshape_that_no_strides_say_is_one_copy(shape: tuple[int, ...]) -> None:
    """The copy's layout is chosen so that strides express the next view."""
    graph = graph_of(
        lambda b: b.reshape(b.rearrange(b.input("x", "f32[3, 4, 5]"), pattern="a b c -> c b a"), shape=shape)
    )
    exe, x = compiled(graph), normal(3, 4, 5)
    np.testing.assert_array_equal(exe(x=x)["y"], x.transpose(2, 1, 0).reshape(shape))
    assert len(steps(exe)) == 1


def test_reshapes_that_strides_can_say() -> None:
    """Dimensions are joined if their strides allow it, and split in any way, for symbols as for numbers."""
    b, s = Size.symbol("B"), Size.symbol("S")

    def view(shape: list[Any], strides: list[Any]) -> View:
        sizes = tuple(Size.of(n) for n in shape)
        return View(Storage("x", f32, product(sizes), StorageKind.LOCAL), sizes, tuple(Size.of(n) for n in strides))

    def strides(source: View, *shape: Any) -> list[str] | None:
        found = source.reshaped(tuple(Size.of(n) for n in shape))
        return None if found is None else [str(n) for n in found.strides]

    assert strides(view([b, s, 12], [s * 24, 24, 1]), b * s, 3, 4) == ["24", "4", "1"]
    assert strides(view([b, s, 12], [s * 24, 24, 2]), b, s, 2, 1, 6) == ["24*S", "24", "12", "1", "2"]
    assert strides(view([b, s, 12], [s * 24, 24, 1]), b, s * 12) is None
    assert strides(view([b, 6, s], [6, 1, b * 6]), b, 2, 3, s) == ["6", "3", "1", "6*B"]
    assert strides(view([b, 6, s], [6, 1, b * 6]), 6, b, s) == ["B", "1", "6*B"]
    assert strides(view([b, 6, s], [1, b, b * 6]), 6, b, s) is None
    assert strides(view([4, 6], [1, 4]), 2, 2, 6) == ["2", "1", "4"]
    assert row_major((Size.of(2), s)) == (s, Size.of(1))


REST: dict[str, tuple[Callable[[Builder, Expr], Expr], Callable[[int], tuple[int, ...]]]] = {
    "an axis, turned": (lambda b, x: b.rearrange(x, pattern="b s d -> d b s"), lambda n: (4, 3, n)),
    "turned and joined": (lambda b, x: b.rearrange(x, pattern="b s d -> d (s b)"), lambda n: (4, 3 * n)),
    "turned and split": (lambda b, x: b.rearrange(x, pattern="b s (d two=2) -> two d s b"), lambda n: (2, 2, n, 3)),
    "reshaped to rows": (lambda b, x: b.reshape(x, shape=("S-2", 12)), lambda n: (n, 12)),
    "turned, then reshaped": (
        lambda b, x: b.reshape(b.rearrange(x, pattern="b s d -> d s b"), shape=(2, "2*S-4", 3)),
        lambda n: (2, 2 * n, 3),
    ),
}
"""Ops on x[3, S, 4] without the first two elements of S, and the shape of each result if n elements are left."""


@pytest.mark.parametrize("name", REST)
@pytest.mark.parametrize("further", [False, True])
def test_a_view_of_nothing_has_its_shape(name: str, further: bool) -> None:
    """The view of no elements is an output, or another op reads it."""
    build, shape = REST[name]

    def whole(b: Builder) -> Expr:
        rest = b.slice(b.input("x", "f32[3, S, 4]"), axis=1, start=2)
        made = build(b, rest)
        return made * 2.0 if further else made

    graph = graph_of(whole)
    exe = compiled(graph)
    for left in (0, 1, 5):
        x = normal(3, left + 2, 4)
        found = np.asarray(exe(x=x)["y"])
        assert found.shape == shape(left)
        np.testing.assert_array_equal(found, interpret(graph, {"x": x})["y"], strict=True)


# -- indexing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
def test_rows_are_gathered_from_panels(transposed: bool) -> None:
    """A tied table is stored once, in the panels that its product reads."""
    shape = (24, 70) if transposed else (70, 24)

    def build(b: Builder) -> dict[str, Expr]:
        table = b.parameter("table", f"f32{list(shape)}")
        rows = b.embedding(table, b.input("ids", "i64[B, S]"), name="rows")
        x = b.input("x", "f32[B, 24]")
        return {"rows": rows, "y": b.matmul(x, table) if transposed else b.linear(x, table)}

    table, x = normal(*shape), normal(2, 24)
    exe = compiled(graph_of(build), table=table)
    assert [buffer.layout is not None for buffer in exe.program.entries["main"].weights.values()] == [True]
    ids = np.random.default_rng(0).integers(0, shape[0], (2, 9))
    np.testing.assert_array_equal(exe(ids=ids, x=x)["rows"], table[ids])


def test_a_gather_of_strided_rows_and_into_strided_places() -> None:
    def build(b: Builder) -> Expr:
        x = b.rearrange(b.input("x", "f32[S, B, 6]"), pattern="s b d -> b s d")
        return b.rearrange(b.gather(x, b.input("ids", "i32[T, 2]"), axis=1), pattern="b t k d -> k d t b")

    exe, x = compiled(graph_of(build)), normal(7, 3, 6)
    ids = np.array([[0, 6], [3, 3], [5, 1], [2, 0]], np.int32)
    expected = x.transpose(1, 0, 2)[:, ids].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(exe(x=x, ids=ids)["y"], expected)


@pytest.mark.parametrize("op", ["gather", "index_add"])
@pytest.mark.parametrize(
    ("read", "written", "rows"),
    [
        ("s d -> s d", "s d -> s d", True),
        ("d s -> s d", "s d -> s d", False),
        ("s d -> s d", "s d -> d s", False),
        ("d s -> s d", "s d -> d s", False),
    ],
)
def test_rows_that_lie_side_by_side_are_moved_as_rows(op: str, read: str, written: str, rows: bool) -> None:
    """Rows are copied as a whole if the last axes of both arrays are contiguous; otherwise element by element, even if
    the axis of rows is contiguous.
    """

    def build(b: Builder) -> Expr:
        x, ids = b.rearrange(b.input("x", "f32[5, 5]"), pattern=read), b.input("ids", "i64[5]")
        to = b.constant(np.zeros((5, 5), np.float32))
        made = b.gather(x, ids, axis=0) if op == "gather" else b.index_add(to, ids, x, axis=0)
        return b.rearrange(made, pattern=written)

    exe, x, ids = compiled(graph_of(build)), normal(5, 5), np.array([3, 0, 3, 4, 1])
    kernels = [step.kernel for step in exe.program.main.steps if not isinstance(step, RoutineStep)]
    assert [kernel.rows for kernel in kernels if isinstance(kernel, Take | ScatterAdd)] == [rows]
    given, expected = (x.T if read.startswith("d") else x), np.zeros((5, 5), np.float32)
    if op == "gather":
        expected = given[ids]
    else:
        np.add.at(expected, ids, given)
    np.testing.assert_array_equal(exe(x=x, ids=ids)["y"], expected.T if written.endswith("s") else expected)


def test_colliding_updates_are_added_in_order() -> None:
    """The bits equal those of sequential additions, for any number of threads, and along rows that are wider than a
    task's.
    """
    graph = graph_of(
        lambda b: b.index_add(b.input("x", "f32[5, 150]"), b.input("ids", "i64[T]"), b.input("u", "f32[T, 150]"))
    )
    x, ids, updates = normal(5, 150), np.random.default_rng(1).integers(0, 5, 200), normal(200, 150)
    expected = x.copy()
    for index, row in zip(ids, updates, strict=True):
        expected[index] += row
    for threads in (1, 2):
        exe = find_backend("tvm").compile(graph, Target("cpu", threads), {})
        np.testing.assert_array_equal(exe(x=x, ids=ids, u=updates)["y"], expected)


def test_updates_of_16_bits_are_rounded_once() -> None:
    """256 ones are added to 256 in bf16. If each addition were rounded, none would have an effect."""
    graph = graph_of(lambda b: b.index_add(b.input("x", "bf16[1]"), b.input("ids", "i64[T]"), b.input("u", "bf16[T]")))
    one = np.full(1, 256, np.float32)
    made = compiled(graph)(x=one, ids=np.zeros(256, np.int64), u=np.ones(256, np.float32))["y"]
    assert np.asarray(made).tolist() == [512.0]


BAD = [-1, 5, 2**62, -(2**63)]


@pytest.mark.parametrize("index", BAD)
@pytest.mark.parametrize("op", ["embedding", "gather", "take_along_axis", "index_add", "scatter_add"])
def test_an_index_outside_is_an_error(op: str, index: int) -> None:
    """The error names the op and the line. No memory outside is read or written, and the next call is unaffected."""

    def build(b: Builder) -> Expr:
        x = b.input("x", "f32[5, 3]")
        if op == "embedding":
            return b.embedding(x, b.input("ids", "i64[S]"))
        if op == "gather":
            return b.gather(x, b.input("ids", "i64[S]"), axis=0)
        if op == "take_along_axis":
            return b.take_along_axis(x, b.input("ids", "i64[S, 3]"), axis=0)
        if op == "index_add":
            return b.index_add(x, b.input("ids", "i64[S]"), b.input("u", "f32[S, 3]"), axis=0)
        return b.scatter_add(x, b.input("ids", "i64[S, 3]"), b.input("u", "f32[S, 3]"), axis=0)

    graph = graph_of(build)
    exe = compiled(graph)
    wide = op in ("take_along_axis", "scatter_add")
    ids = np.array([1, 0, 4, 2])
    ids = np.repeat(ids[:, None], 3, axis=1) if wide else ids
    given: dict[str, Array] = {"x": normal(5, 3)} | ({"u": normal(4, 3)} if "add" in op else {})
    wrong = ids.copy()
    wrong.flat[-1] = index
    text = message(lambda: exe(**given, ids=wrong))
    assert text.splitlines()[0] == f"{op}: index {index} is outside an axis of size 5"
    assert "test_tvm_shapes.py:" in text
    reference = find_backend("numpy").compile(graph, Target("cpu"), {})
    np.testing.assert_allclose(exe(**given, ids=ids)["y"], reference(**given, ids=ids)["y"], rtol=1e-6)


def test_an_index_outside_in_a_repeated_block() -> None:
    """The index may be outside in any of the block's calls."""
    graph = Graph("blocks")
    h = Function("h")
    graph.add_function(h)
    b = Builder(graph, h)
    b.outputs(x=b.gather(b.input("x", "f32[N, 4]"), b.input("ids", "i64[N]"), axis=0))
    main = Builder(graph)
    x, ids = main.input("x", "f32[N, 4]"), [main.input(name, "i64[N]") for name in ("first", "second")]
    for each in ids:
        (x,) = main.call(h, [x, each])
    main.outputs(y=x)
    exe, x0, swap = compiled(graph), normal(3, 4), np.array([2, 1, 0])
    for first, second, wrong in (([0, 3, 1], swap, 3), (swap, [-4, 0, 0], -4), ([7, 0, 0], [0, 8, 0], 7)):
        text = message(lambda: exe(x=x0, first=np.array(first), second=np.array(second)))  # noqa: B023
        assert text.startswith(f"gather: index {wrong} is outside an axis of size 3")
    np.testing.assert_array_equal(exe(x=x0, first=swap, second=swap)["y"], x0)


# -- code and constants ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kernel",
    [
        Take(4, "i64", True),
        Take(2, "i32", False),
        Take(4, "i64", True, 48),
        ScatterAdd("f32", "bf16", "i64", True),
        FoldWindows("f16"),
        Iota("f16"),
    ],
    ids=lambda k: k.title,
)
def test_kernels_assemble_for_arm64(kernel: Any) -> None:
    assert "ret" in assembly(kernel, ISAS["arm64"])


def test_padding_holds_what_the_dtype_holds() -> None:
    for dtype, value in (("f32", float("-inf")), ("bf16", 1.5), ("bool", 1.0), ("i32", -7.0), ("u8", 255.0)):
        graph = graph_of(lambda b: b.pad(b.input("x", f"{dtype}[2]"), axis=0, before=1, after=2, value=value))  # noqa: B023
        x = np.zeros(2, DTYPES[dtype].numpy or np.float32)
        made = np.asarray(compiled(graph)(x=x)["y"])
        assert made.tolist() == [value, 0, 0, value, value], dtype


# -- places of results -----------------------------------------------------------------------------------------


def _sums(b: Builder, x: Expr) -> Expr:
    """Return the sums of two softmaxes that have no other reader."""
    one, two = b.softmax(x, axis=-1), b.softmax(x * 2.0, axis=-1)
    return b.softmax(one * two + one, axis=-1)


def test_a_chain_is_written_over_an_operand_that_dies() -> None:
    graph = graph_of(lambda b: _sums(b, b.input("x", "f32[B, S, 12]")))
    exe, reference = compiled(graph), find_backend("numpy").compile(graph, Target("cpu"), {})
    assert sorted(steps(exe)) == ["mul", "mul_add_over", "softmax_f32", "softmax_f32", "softmax_f32"]
    over = exe.program.main.steps[steps(exe).index("mul_add_over")]
    assert len(over.views) == 2 and len({view.storage for view in over.views}) == 2
    x = normal(2, 5, 12)
    np.testing.assert_allclose(exe(x=x)["y"], reference(x=x)["y"], rtol=0, atol=1e-6)


def test_parts_of_a_concat_and_what_is_padded_are_written_in_place() -> None:
    def build(b: Builder) -> Expr:
        x = b.input("x", "f32[B, S, 12]")
        return b.pad(b.concat(b.exp(x), x, b.tanh(x), axis=1), axis=2, before=1)

    graph = graph_of(build)
    exe, reference = compiled(graph), find_backend("numpy").compile(graph, Target("cpu"), {})
    assert steps(exe) == ["exp", "tanh", "copy", "copy"]  # for x, and for the margin
    x = normal(2, 5, 12)
    np.testing.assert_allclose(exe(x=x)["y"], reference(x=x)["y"], rtol=0, atol=1e-6)

"""Kernels along rows on the TVM backend, beyond the op suite: norms, softmax, reductions, selection, rotary."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from tests.backend_checks import assert_near, compiled, graph_of
from tests.op_checks import EPSILON, Case
from treadle.backends.tvm.kernel_abilities import capabilities, planning
from treadle.backends.tvm.kernels.host import tvm_runtime
from treadle.backends.tvm.kernels.host.cache import assembly
from treadle.backends.tvm.kernels.host.calling import bind
from treadle.backends.tvm.kernels.isa import ISAS, Isa, runs_here
from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.backends.tvm.kernels.normalization import Normalize
from treadle.backends.tvm.kernels.reduction import Reduce, RunningSum, SizeValue
from treadle.backends.tvm.kernels.rotary import Rotary
from treadle.backends.tvm.kernels.selection import ArgMax, TopK
from treadle.backends.tvm.kernels.softmax import Softmax
from treadle.backends.tvm.lowering.routine_writer import lower, steps_of
from treadle.backends.tvm.lowering.rules import RULES, keeps
from treadle.ir.builder import Builder, Expr
from treadle.ir.graph import Graph
from treadle.ir.interpreter import interpret
from treadle.ir.op_registry import OPS
from treadle.passes.capabilities import Capabilities
from treadle.passes.framework.manager import PassManager
from treadle.passes.lowering.legalize import Legalize

PLAN = planning(capabilities(ISAS["x86-64-v3"]))

pytestmark = pytest.mark.skipif(tvm_runtime.missing() is not None, reason=str(tvm_runtime.missing()))

Array = np.ndarray[Any, Any]
HERE = [isa for isa in ISAS.values() if runs_here(isa) and isa.name != "x86-64"]
"""The instruction sets with vectors of different lengths that this machine runs."""

LENGTHS = [1, 3, 4, 15, 16, 17, 63, 64, 65, 130, 333]
"""Row lengths around one vector, and around the number of vectors that are combined at a time, on every instruction
set.
"""

each_isa = pytest.mark.parametrize("isa", HERE, ids=str)


def drawn(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def along_rows(kernel: Kernel, isa: Isa, x: Array, *extra: Array, y_row: int | None = None) -> Array:
    """Run a kernel of rows on a matrix; `gaps` between rows are possible in operand and result."""
    rows, d = x.shape
    y = np.full((rows, y_row or d), 7, np.float32)
    bind(kernel, [x, *extra, y], [1, rows, d, 0, x.strides[0] // 4, 0, y.shape[1]], isa)()
    assert np.all(y[:, d:] == 7), "it wrote past its row"
    return y[:, :d]


# -- rows --------------------------------------------------------------------------------------------------------------


def normalized(x: Array, centered: bool, weight: Array, bias: Array) -> Array:
    wide = x.astype(np.float64)
    wide = wide - wide.mean(-1, keepdims=True) if centered else wide
    return np.asarray(wide / np.sqrt((wide * wide).mean(-1, keepdims=True) + 1e-5) * weight + bias)


@each_isa
@pytest.mark.parametrize("centered", [True, False])
def test_normalization_of_rows_of_any_length(centered: bool, isa: Isa) -> None:
    kernel = Normalize(centered, True, True, 1e-5, "f32")
    for d in LENGTHS:
        whole = drawn(3, d + 5, seed=d) + 3
        x, weight, bias = whole[:, :d], drawn(d, seed=1), drawn(d, seed=2)
        expected = normalized(x, centered, weight, bias)
        # Centering numbers near 3 loses two of their bits; the rest is a few roundings.
        bound = 32 * EPSILON["f32"] * np.abs(expected).max()
        got = along_rows(kernel, isa, x, weight, bias, y_row=d + 3)
        np.testing.assert_allclose(got, expected, rtol=0, atol=bound, err_msg=f"rows of {d}")


@each_isa
@pytest.mark.parametrize("log", [False, True])
def test_softmax_of_rows_of_any_length(log: bool, isa: Isa) -> None:
    for d in LENGTHS:
        x = drawn(3, d + 5, seed=d)[:, :d] * 4
        expected = OPS["log_softmax" if log else "softmax"]().reference(x.astype(np.float64))
        bound = 16 * EPSILON["f32"] * np.maximum(np.abs(expected).max(), 0.1)
        got = along_rows(Softmax(log, "f32"), isa, x, y_row=d + 3)
        np.testing.assert_allclose(got, expected, rtol=0, atol=bound, err_msg=f"rows of {d}")


@each_isa
def test_masked_softmax_of_rows_of_any_length(isa: Isa) -> None:
    """An empty row is between two others, one of which is partly masked. It returns zeros, and no bit of the others
    changes.
    """
    for d in LENGTHS:
        x = drawn(3, d + 5, seed=d)[:, :d] * 4
        x[1] = -np.inf
        x[2, 1::2] = -np.inf
        got = along_rows(Softmax(False, "f32", zeros=True), isa, x, y_row=d + 3)
        assert not got[1].any(), f"rows of {d}"
        np.testing.assert_array_equal(got[::2], along_rows(Softmax(False, "f32"), isa, x[::2].copy()))


@each_isa
@pytest.mark.parametrize(
    "kernel",
    [Normalize(True, False, False, 1e-5, "f32"), Softmax(False, "f32"), Softmax(False, "f32", zeros=True)],
    ids=str,
)
def test_the_bits_of_a_row_depend_on_it_alone(kernel: Kernel, isa: Isa) -> None:
    for d in (5, 48, 200):
        x = drawn(7, d)
        together = along_rows(kernel, isa, x)
        for row in range(7):
            np.testing.assert_array_equal(along_rows(kernel, isa, x[row : row + 1].copy()), together[row : row + 1])
        apart = np.zeros((7, 2 * d + 1), np.float32)
        apart[:, :d] = x
        np.testing.assert_array_equal(along_rows(kernel, isa, apart[:, :d]), together)


@each_isa
def test_softmax_of_infinities_and_nan(isa: Isa) -> None:
    d = 37
    x = np.tile(drawn(1, d), (5, 1))
    x[0, 3:] = -np.inf  # masked: exactly 0
    x[1] = -np.inf
    x[2, 36] = np.nan
    x[3, 0] = np.inf
    x[4] = -1e30
    x[4, 20] = 1e30
    y = along_rows(Softmax(False, "f32"), isa, x)
    assert np.all(y[0, 3:] == 0)
    assert abs(y[0].sum() - 1) < 4 * EPSILON["f32"]
    assert np.isnan(y[1:4]).all(), "as the sum is"
    np.testing.assert_array_equal(y[4], np.arange(d) == 20)
    masked = along_rows(Softmax(False, "f32", zeros=True), isa, x)
    np.testing.assert_array_equal(masked[1], np.zeros(d))
    np.testing.assert_array_equal(masked[[0, 2, 3, 4]], y[[0, 2, 3, 4]])


@each_isa
def test_not_a_number_among_masked_elements_is_not_lost(isa: Isa) -> None:
    """The maximum of -inf and NaN may be computed as -inf. Such a row must not count as empty."""
    for at in (0, 20, 36):
        x = np.full((1, 37), -np.inf, np.float32)
        x[0, at] = np.nan
        assert np.isnan(along_rows(Softmax(False, "f32", zeros=True), isa, x)).all(), at


# -- reductions --------------------------------------------------------------------------------------------------------


def on_tvm(build: Callable[[Builder], Mapping[str, Expr] | Expr], **inputs: Array) -> tuple[Any, Graph]:
    graph = graph_of(build)
    return compiled("tvm", graph)(**inputs), graph


REDUCED: list[tuple[int, ...]] = [
    (0,),
    (1,),
    (2,),
    (3,),
    (0, 1),
    (0, 2),
    (1, 3),
    (0, 3),
    (1, 2),
    (0, 2, 3),
    (0, 1, 2, 3),
]


@pytest.mark.parametrize("op", ["sum", "max", "min", "mean"])
def test_reductions_over_any_axes_of_views_of_any_strides(op: str) -> None:
    """Sizes are known only at the call. One operand is row-major, the other has its axes reversed in memory."""

    def build(b: Builder) -> dict[str, Expr]:
        x = b.input("x", "f32[A,B,C,D]")
        turned = b.rearrange(x, pattern="a b c d -> d b a c")
        reduce = getattr(b, f"reduce_{op}")
        made = {f"x{i}": reduce(x, axes=axes, keep=i % 2 == 0) for i, axes in enumerate(REDUCED)}
        return made | {f"t{i}": reduce(turned, axes=axes, keep=False) for i, axes in enumerate(REDUCED)}

    graph = graph_of(build)
    exe = compiled("tvm", graph)
    for shape in ((2, 3, 4, 5), (3, 1, 70, 33), (1, 130, 2, 16)):
        x = drawn(*shape)
        expected, sizes = (interpret(graph, {"x": given}, float64=True) for given in (x, np.abs(x)))
        for name, got in exe(x=x).items():
            # Partial sums are each rounded relative to the size of their terms; an extremum is exact.
            bound = 8 * EPSILON["f32"] * sizes[name].max() if op in ("sum", "mean") else 0
            np.testing.assert_allclose(got, expected[name], rtol=0, atol=bound, err_msg=f"{name} of {shape}")


def test_a_long_column_is_summed_in_parts() -> None:
    """If summed sequentially in float32, 2^20 times 0.1 would be one per cent too large."""
    x = np.full((2**20, 3), 0.1, np.float32)
    y = np.zeros(3, np.float32)
    bind(Reduce("sum", "f32", "columns"), [x, y], [1, 3, 1, len(x), 0, 1, 0, 3, 0, 1])()
    np.testing.assert_allclose(y, np.float64(np.float32(0.1)) * len(x), rtol=2e-4)


def test_sums_of_integers_wrap_around_in_their_own_dtype() -> None:
    x = np.arange(-20, 108, dtype=np.int8).reshape(2, 64)
    u = x.view(np.uint8)
    out, _ = on_tvm(
        lambda b: {
            "rows": b.reduce_sum(b.input("x", "i8[2,N]"), axes=(1,)),
            "columns": b.reduce_sum(b.input("u", "u8[M,64]"), axes=(0,)),
            "least": b.reduce_min(b.input("v", "i64[N]"), axes=(0,)),
        },
        x=x,
        u=u,
        v=np.full(64, np.iinfo(np.int64).max),
    )
    np.testing.assert_array_equal(out["rows"], x.sum(1, dtype=np.int8), strict=True)
    np.testing.assert_array_equal(out["columns"], u.sum(0, dtype=np.uint8), strict=True)
    assert out["least"] == np.iinfo(np.int64).max


@pytest.mark.parametrize("axis", [0, 1])
def test_a_nan_is_the_extremum_and_found_first(axis: int) -> None:
    x = drawn(40, 41)
    x[7, 5] = x[7, 30] = x[20, 30] = np.nan
    x[3, 2] = np.inf
    out, graph = on_tvm(
        lambda b: {
            "max": b.reduce_max(b.input("x", "f32[N,M]"), axes=(axis,)),
            "min": b.reduce_min(b.function.inputs[0], axes=(axis,)),
            "at": b.argmax(b.function.inputs[0], axis=axis),
        },
        x=x,
    )
    for name, array in interpret(graph, {"x": x}).items():
        np.testing.assert_array_equal(out[name], array, err_msg=name)


def test_empty_sums_are_zero() -> None:
    y = np.full((2, 3), 5, np.float32)
    empty = np.zeros((2, 0, 3), np.float32)
    bind(Reduce("sum", "f32", "columns"), [empty, y], [2, 3, 1, 0, 0, 1, 0, 3, 3, 1])()
    assert np.all(y == 0)
    y[:] = 5
    bind(Reduce("sum", "f32", "rows"), [empty, y], [2, 3, 1, 0, 0, 0, 0, 1, 3, 1])()
    assert np.all(y == 0)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize(("exclusive", "reverse"), [(False, False), (True, True)])
def test_running_sums_along_any_axis(axis: int, exclusive: bool, reverse: bool) -> None:
    x = drawn(3, 5, 37)
    out, graph = on_tvm(
        lambda b: b.cumsum(b.input("x", "f32[A,B,C]"), axis=axis, exclusive=exclusive, reverse=reverse), x=x
    )
    assert_near(out.y, interpret(graph, {"x": x}, float64=True)["y"])


# -- selection ---------------------------------------------------------------------------------------------------------


@each_isa
@pytest.mark.parametrize("dtype", ["f32", "i64", "i8"])
def test_argmax_finds_the_first_of_equals_wherever_it_is(dtype: str, isa: Isa) -> None:
    for n in LENGTHS:
        for place in {0, n // 2, n - 1}:
            x = np.zeros((2, n), {"f32": np.float32, "i64": np.int64, "i8": np.int8}[dtype])
            x[0, place:] = 3
            x[1] = np.finfo(np.float32).min if dtype == "f32" else np.iinfo(x.dtype).min
            found = np.full(2, -1)
            bind(ArgMax(dtype, True), [x, found], [1, 2, n, 0, n, 1, 0, 1], isa)()
            assert found.tolist() == [place, 0], f"{n} elements"
    x = np.full((1, 70), -np.inf, np.float32)
    found = np.full(1, -1)
    bind(ArgMax("f32", True), [x, found], [1, 1, 70, 0, 70, 1, 0, 1], isa)()
    assert found.tolist() == [0]


def selections() -> dict[str, Array]:
    rng = np.random.default_rng(5)
    many = rng.integers(0, 9, 500).astype(np.float32)
    special = many.copy()
    special[[3, 70, 400]] = np.nan
    special[[4, 71]] = np.inf
    special[100:200] = -np.inf
    return {
        "ties": many,
        "rising": np.arange(500, dtype=np.float32),
        "falling": np.arange(500, 0, -1, dtype=np.float32),
        "equal": np.zeros(500, np.float32),
        "special": special,
    }


@each_isa
@pytest.mark.parametrize("k", [1, 2, 7, 500])
def test_top_k_is_in_order_and_ties_go_to_the_lower_index(k: int, isa: Isa) -> None:
    for name, x in selections().items():
        values, indices = np.zeros(k, np.float32), np.zeros(k, np.int64)
        bind(TopK(k, "f32", True), [x, values, indices], [1, 1, 500, 0, 0, 1, 0, 0, 1, 0, 0, 1], isa)()
        expected = OPS["top_k"](k=k).reference(x)  # type: ignore[call-arg]
        np.testing.assert_array_equal(values, expected[0], err_msg=name)
        np.testing.assert_array_equal(indices, expected[1], err_msg=name)


def test_top_k_and_argmax_along_an_axis_that_lies_apart() -> None:
    x = drawn(4, 90, 3)

    def build(b: Builder) -> dict[str, Expr]:
        held = b.input("x", "f32[A,90,C]")
        values, indices = b.top_k(held, k=6, axis=1)
        return {"values": values, "indices": indices, "first": b.argmax(held, axis=1, keep=True)}

    out, graph = on_tvm(build, x=x)
    for name, array in interpret(graph, {"x": x}).items():
        np.testing.assert_array_equal(out[name], array, err_msg=name)


# -- rotary ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("pairs", [32, 12, 5])
def test_rotary_of_far_positions_on_views_of_a_projection(pairs: int, layout: str) -> None:
    """Angles are rounded to float32, as the op defines. Sine and cosine of angles up to 10^6 are right to the last
    bits.
    """

    def build(b: Builder) -> Expr:
        x = b.rearrange(b.input("x", "f32[B,S,128]"), pattern="b s (h=2 d) -> b h s d")
        made: Expr = b.rotary(
            x, b.input("positions", "i64[B,S]"), b.input("frequencies", f"f32[{pairs}]"), layout=layout
        )
        return made

    x, positions = drawn(2, 3, 128), np.array([[0, 1, 2047], [131_071, 999_999, 5]])
    frequencies = (10_000.0 ** (-np.arange(pairs) / pairs)).astype(np.float32)
    out, _ = on_tvm(build, x=x, positions=positions, frequencies=frequencies)
    heads = x.reshape(2, 3, 2, 64).transpose(0, 2, 1, 3).astype(np.float64)
    angles = (positions.astype(np.float32)[:, None, :, None] * frequencies).astype(np.float64)
    one, other = OPS["rotary"](layout=layout)._pairs(pairs)  # type: ignore[call-arg, attr-defined]
    expected = heads.copy()
    expected[..., one] = heads[..., one] * np.cos(angles) - heads[..., other] * np.sin(angles)
    expected[..., other] = heads[..., other] * np.cos(angles) + heads[..., one] * np.sin(angles)
    np.testing.assert_allclose(out.y, expected, rtol=0, atol=8 * EPSILON["f32"] * np.abs(x).max())


# -- lowering ----------------------------------------------------------------------------------------------------------


def titles(graph: Graph) -> list[str]:
    """Return the titles of a graph's kernels, step by step."""
    lowered = PassManager((Legalize(Capabilities(keeps=keeps)), PLAN)).run(graph)
    assert lowered.plan is not None
    return [step.kernel.title for step in steps_of(lower(lowered.graph, lowered.plan, HERE[0], RULES))]


def test_ops_with_a_kernel_are_one_step() -> None:
    assert titles(Case.of("layer_norm", 0).forward_graph()) == ["layer_norm_f32"]
    assert titles(Case.of("rms_norm", 0, "bf16").forward_graph()) == ["rms_norm_bf16"]
    assert titles(Case.of("softmax", 0, "f16").forward_graph()) == ["softmax_f16"]
    assert titles(Case.of("log_softmax", 0).forward_graph()) == ["log_softmax_f32"]
    assert titles(Case.of("masked_softmax", 0, "bf16").forward_graph()) == ["masked_softmax_bf16"]
    assert titles(Case.of("reduce_mean", 0, "f16").forward_graph()) == ["mean_rows_f16"]
    assert titles(Case.of("reduce_sum", 2).forward_graph()) == ["sum_columns_f32"]
    assert titles(Case.of("rotary", 0).forward_graph()) == ["rotary_f32"]


def test_other_axes_and_float64_go_through_the_body() -> None:
    for graph in (Case.of("softmax", 1).forward_graph(), Case.of("softmax", 0, "f64").forward_graph()):
        assert any(title.startswith("max_") for title in titles(graph))


def test_a_reduction_of_a_view_is_not_copied_where_loops_can_say_it() -> None:
    def build(b: Builder) -> Expr:
        made: Expr = b.reduce_sum(b.rearrange(b.input("x", "f32[A,B,C,D]"), pattern="a b c d -> a c b d"), axes=(0, 2))
        return made

    assert titles(graph_of(build)) == ["sum_columns_f32"]


KERNELS = [
    Normalize(True, True, True, 1e-5, "f16"),
    Normalize(False, False, False, 1e-6, "bf16"),
    Softmax(True, "f32"),
    Reduce("max", "f16", "rows"),
    Reduce("mean", "f64", "columns"),
    RunningSum("bf16", True, True, True),
    SizeValue("f16"),
    ArgMax("f32", True),
    TopK(5, "i16", True),
    Rotary(True, 4, "f16", "i32"),
]


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.title)
def test_kernels_assemble_for_arm64(kernel: Kernel) -> None:
    calls = re.findall(r"\tbl\t(\w+)", assembly(kernel, ISAS["arm64"]))
    outside = {name for name in calls if not name.startswith(("__tvm", "TVM", "kernel"))}
    assert outside <= {"sinf", "cosf", "memcpy", "memset"}, "a kernel is linked with nothing but C's own library"

"""Products of two computed bf16 matrices on the TVM backend: layouts, bits, fused casts, and the casts that remain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.backend_checks import graph_of
from tests.op_checks import Array
from treadle.backends.bfloat16 import rounded, widened
from treadle.backends.registry import find_backend
from treadle.backends.tvm.executable import KernelExecutable
from treadle.backends.tvm.kernels.isa import ISAS, runs_here
from treadle.backends.tvm.weight_packing import pack
from treadle.ir.builder import Builder, Expr
from treadle.ir.layouts import pairs
from treadle.ir.sizing.sizes import Size
from treadle.ir.target import Target
from treadle.ir.types import DTYPES, bf16, f32

pytest.importorskip("tvm")

from tests.tiles_in_memory import stand_in
from treadle.backends.tvm import backend as backend_module
from treadle.backends.tvm.kernels.host.cache import KernelCache, assembly
from treadle.backends.tvm.kernels.host.calling import bind
from treadle.backends.tvm.kernels.narrow.round_rows import held_elements
from treadle.backends.tvm.kernels.narrow.round_squares import RoundSquares

Made = Expr | dict[str, Expr]

HERE = [
    name for name in ("x86-64-amx", "x86-64-v4-bf16", "x86-64-v4", "x86-64-v3", "x86-64-v2") if runs_here(ISAS[name])
]
each_isa = pytest.mark.parametrize("isa", HERE)
needs_pairs = pytest.mark.skipif(not runs_here(ISAS["x86-64-v4-bf16"]), reason="no instructions for bf16")


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def compiled(build: Callable[[Builder], Made], target: str | Target = "cpu", **weights: Any) -> KernelExecutable:
    where = target if isinstance(target, Target) else Target(target)
    made = find_backend("tvm").compile(graph_of(build), where, weights)
    assert isinstance(made, KernelExecutable)
    return made


def titles(exe: KernelExecutable) -> list[str]:
    return [s.kernel.title for s in exe.program.main.steps]  # type: ignore[union-attr]


def narrow(b: Builder, x: Expr) -> Expr:
    return b.cast(x, to=bf16)


# -- layouts -----------------------------------------------------------------------------------------------------------

SQUARES = [(1, 1), (16, 32), (17, 33), (48, 64), (50, 100), (100, 7), (3, 64), (0, 5), (5, 0)]


@needs_pairs
@pytest.mark.parametrize("along", [True, False])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_sides_lie_as_bound_weights_and_rounded_rows_do(dtype: str, along: bool) -> None:
    """Matrices are read in either order of memory, with gaps. The padding of panels is 0, not the earlier contents of
    the memory.
    """
    cache = KernelCache(ISAS["x86-64-v4-bf16"], folder=None)
    for n, k in SQUARES:
        x = normal(n, k)
        held = x if dtype == "f32" else rounded(x)
        far = np.full((n, k + 3) if along else (k, n + 3), 0x7FC0 if dtype == "bf16" else np.nan, held.dtype)
        far[:, : k if along else n] = held if along else held.T
        for layout in (pairs(48, flat=True), pairs(32)):
            wanted = pack(rounded(x), layout)
            made = np.full(max(1, wanted.size), 0x7FC0, np.uint16)
            bind(
                RoundSquares(dtype, along, layout.width, layout.flat), [far, made], [n, k, far.shape[1]], cache=cache
            )()
            np.testing.assert_array_equal(made[: wanted.size], wanted.ravel(), f"{n} x {k}, {layout}")
        for form in ("pairs", "tiles"):
            made = np.full(max(1, held_elements(form, Size.of(n), Size.of(k)).evaluate({})), 0x7FC0, np.uint16)
            bind(RoundSquares(dtype, along, 0, form == "pairs"), [far, made], [n, k, far.shape[1]], cache=cache)()
            deep = -(-k // 32) * 32
            if n * k == 0:
                continue
            blocks = made.reshape(-1, deep // 32, 2, 16, 32).transpose(0, 2, 3, 1, 4) if form == "tiles" else made
            rows = blocks.reshape(-1, deep)[:n]
            np.testing.assert_array_equal(rows[:, :k], rounded(x), f"{n} x {k}, {form}")
            assert not rows[:, k:].any()


def test_two_rows_are_rounded_by_one_instruction_and_made_pairs_by_one() -> None:
    code = assembly(RoundSquares("f32", False, 48, True), ISAS["x86-64-v4-bf16"])
    assert code.count("vcvtne2ps2bf16") == code.count("vpermw") == 2 * 16, "of a whole square, and of one at an edge"


# -- bits --------------------------------------------------------------------------------------------------------------

SIZES = [(1, 1, 1), (5, 31, 32), (16, 32, 31), (33, 65, 48), (49, 100, 17), (130, 300, 100), (1, 96, 64), (64, 1, 50)]

Ways = dict[str, Callable[[Builder, Expr, Expr], Expr]]
WAYS: Ways = {
    # functions of x [m, k] and w [n, k]; w is bound if it is a weight
    "rows": lambda b, x, w: b.linear(x, w, to=f32),
    "columns": lambda b, x, w: b.matmul(x, b.rearrange(w, pattern="n k -> k n"), to=f32),
    "bias": lambda b, x, w: b.relu(b.linear(x, w, to=f32) + 1.0),
}


def operand(b: Builder, name: str, rows: int, k: int, how: str, bound: bool = False) -> Expr:
    """Return a matrix [rows, k] that is a view of its transpose, or of a wider matrix."""
    shape = {"plain": (rows, k), "transposed": (k, rows), "wide": (rows, k + 5)}[how]
    x = b.parameter(name, f32[shape]) if bound else b.input(name, f32[shape])
    if how == "wide":
        x = b.slice(x, axis=1, start=2, stop=k + 2)
    x = narrow(b, x)
    return b.rearrange(x, pattern="k n -> n k") if how == "transposed" else x


def array(rows: int, k: int, how: str, seed: int) -> Array:
    x = normal(rows, k, seed=seed)
    if how == "wide":
        return np.pad(x, ((0, 0), (2, 3)), constant_values=np.nan)
    return np.ascontiguousarray(x.T) if how == "transposed" else x


@each_isa
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("left", "right"), [("plain", "plain"), ("transposed", "transposed"), ("wide", "wide")])
def test_bits_are_those_of_the_product_with_a_bound_weight(isa: str, way: str, left: str, right: str) -> None:
    for m, k, n in SIZES:
        x, w = array(m, k, left, 0), array(n, k, right, 1)

        def build(b: Builder, bound: bool, m: int = m, k: int = k, n: int = n) -> Expr:
            return WAYS[way](b, operand(b, "x", m, k, left), operand(b, "w", n, k, right, bound))

        wanted = compiled(lambda b: build(b, True), isa, w=w)(x=x)["y"]
        exe = compiled(lambda b: build(b, False), isa)
        np.testing.assert_array_equal(exe(x=x, w=w)["y"], wanted, f"{m} x {k} x {n}")
        pair = any(title.startswith(("pair_product", "tile_product")) for title in titles(exe))
        assert pair == ISAS[isa].multiplies_pairs


@each_isa
def test_sizes_that_a_call_tells(isa: str) -> None:
    """The gradient of a weight sums over rows, whose number is known at the call. Without rows, it is 0."""

    def build(b: Builder) -> Expr:
        given = (b.input(name, f32["B", "S", size]) for name, size in (("g", 40), ("x", 24)))
        g, x = (narrow(b, b.slice(v, axis=0, start=1)) for v in given)
        left, right = (b.rearrange(v, pattern=p) for v, p in ((g, "b s n -> n (b s)"), (x, "b s k -> (b s) k")))
        return b.matmul(left, right, to=f32)

    exe = compiled(build, isa)
    for rows in ((2, 1), (4, 11), (3, 64), (1, 5)):
        g, x = normal(*rows, 40), normal(*rows, 24, seed=1)
        wanted = np.einsum("bsn,bsk->nk", *(widened(rounded(v[1:])).astype(np.float64) for v in (g, x)))
        np.testing.assert_allclose(exe(g=g, x=x)["y"], wanted, rtol=0, atol=1e-4)


@each_isa
def test_numbers_that_are_none_stay_in_their_row_and_column(isa: str) -> None:
    x, w = np.abs(normal(20, 40)) + 1, np.abs(normal(50, 40, seed=1)) + 1
    x[3, 7], x[19, 0], w[48, 39] = np.inf, np.nan, -np.inf
    exe = compiled(lambda b: WAYS["rows"](b, operand(b, "x", 20, 40, "plain"), operand(b, "w", 50, 40, "plain")), isa)
    got = exe(x=x, w=w)["y"]
    assert np.isnan(got[19]).all() and np.isnan(got[3, 48])
    assert (np.delete(got[3], 48) == np.inf).all()
    assert (np.delete(got[:, 48], [3, 19]) == -np.inf).all()
    assert np.isfinite(np.delete(np.delete(got, [3, 19], axis=0), 48, axis=1)).all()


@needs_pairs
def test_threads_do_not_change_bits() -> None:
    x, w = normal(70, 200), normal(1500, 200, seed=1)

    def build(b: Builder) -> Expr:
        return WAYS["rows"](b, operand(b, "x", 70, 200, "plain"), operand(b, "w", 1500, 200, "plain"))

    alone, shared = (compiled(build, Target("cpu", threads=n))(x=x, w=w)["y"] for n in (1, 2))
    np.testing.assert_array_equal(alone, shared)


@needs_pairs
@pytest.mark.parametrize(("left", "right"), [("plain", "plain"), ("transposed", "transposed"), ("transposed", "wide")])
def test_tiles_of_both_sides_in_memory(left: str, right: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The matrix unit's kernels, with tiles in memory, return the same bits as the product with a bound weight."""
    isa = stand_in(monkeypatch)
    monkeypatch.setattr(backend_module, "isa_of", lambda target: isa)
    for m, k, n in ((1, 1, 1), (33, 31, 40), (50, 70, 65)):
        x, w = array(m, k, left, 0), array(n, k, right, 1)
        made = []
        for bound in (True, False):

            def build(b: Builder, bound: bool = bound, m: int = m, k: int = k, n: int = n) -> Expr:
                return b.linear(operand(b, "x", m, k, left), operand(b, "w", n, k, right, bound), to=f32)

            exe = compiled(build, Target("cpu", threads=1), **({"w": w} if bound else {}))
            assert "tile_product" in titles(exe)
            made.append(exe(x=x)["y"] if bound else exe(x=x, w=w)["y"])
        np.testing.assert_array_equal(*made)


# -- results of casts --------------------------------------------------------------------------------------------------


def gradients(b: Builder) -> dict[str, Expr]:
    """Return the gradients of a linear by x and by its weight. The first reads rows of g, the second reads columns."""
    x, g, w = (
        narrow(b, b.input(n, f32[shape])) for n, shape in (("x", (2, 9, 24)), ("g", (2, 9, 40)), ("w", (40, 24)))
    )
    flat = b.rearrange(x, pattern="b s k -> (b s) k")
    by_weight = b.matmul(b.rearrange(g, pattern="b s n -> n (b s)"), flat, to=f32)
    return {"by_x": b.matmul(g, w, to=f32), "by_w": by_weight}


SIDES = ["round_right_by_columns", "round_right_by_columns", "round_left_by_columns"]


@pytest.mark.parametrize(
    ("isa", "wanted"),
    [
        ("x86-64-v4-bf16", [*SIDES, "round_rows_pairs", "pair_product", "pair_product"]),
        ("x86-64-amx", [*SIDES, "round_rows_tiles", "tile_product", "tile_product"]),
    ],
)
def test_a_cast_that_products_alone_read_is_not_written(isa: str, wanted: list[str]) -> None:
    """The value before the cast is laid out once for each side that products read."""
    assert sorted(titles(compiled(gradients, isa))) == sorted(wanted)


def test_without_instructions_for_pairs_both_are_widened() -> None:
    made = titles(compiled(gradients, "x86-64-v4"))
    assert not any("round" in title or "pair" in title for title in made)
    assert sum(title.startswith("matmul") for title in made) == 2


def test_epilogues_of_computed_products_run_when_results_are_stored() -> None:
    def build(b: Builder) -> Expr:
        x, w = narrow(b, b.input("x", f32["M", 64])), narrow(b, b.input("w", f32[96, 64]))
        return b.gelu(b.linear(x, w, b.input("bias", f32[96]), to=f32)) + b.input("r", f32["M", 96])

    assert titles(compiled(build, "x86-64-v4-bf16"))[-1] == "pair_product_add_gelu_add"


@each_isa
def test_a_cast_that_others_read_too_is_made(isa: str) -> None:
    """Other readers are an output, another op, or the product with a bound weight."""

    def build(b: Builder) -> dict[str, Expr]:
        x, w = narrow(b, b.input("x", f32["M", 40])), narrow(b, b.input("w", f32[8, 40]))
        y, bound = b.linear(x, w, to=f32), b.linear(x, narrow(b, b.parameter("v", f32[8, 40])), to=f32)
        return {"y": y, "bound": bound, "wide": b.cast(w, to=f32) * 2.0}

    x, w = normal(5, 40), normal(8, 40, seed=1)
    got = compiled(build, isa, v=w)(x=x, w=w)
    np.testing.assert_array_equal(got["y"], got["bound"])
    np.testing.assert_array_equal(got["wide"], 2 * widened(rounded(w)))


@needs_pairs
def test_operands_of_a_cast_may_be_overwritten() -> None:
    """Sides are laid out at the cast. So -x may take the memory of x before the product reads its side."""

    def build(b: Builder) -> dict[str, Expr]:
        x = b.exp(b.input("x", f32[64, 64]))
        rough = narrow(b, x)
        y = b.matmul(narrow(b, b.sin(-x)), rough, to=f32)
        return {"y": y + b.matmul(b.rearrange(rough, pattern="m n -> n m"), rough, to=f32)}

    x = normal(64, 64)
    one = np.exp(x)
    two, wide = widened(rounded(np.sin(-one))), widened(rounded(one))
    wanted = two.astype(np.float64) @ wide + wide.T.astype(np.float64) @ wide
    got = compiled(build)(x=x)["y"]
    np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-3 * np.abs(wanted).max())


# -- casts that remain -------------------------------------------------------------------------------------------------


OTHERS = {
    "a batch of matrices": ((3, 20, 40), (3, 40, 8), f32),
    "a vector": ((40,), (8, 40), f32),
    "sums in float64": ((9, 40), (8, 40), DTYPES["f64"]),
}


@pytest.mark.parametrize("product", OTHERS)
def test_other_products_are_computed_as_before(product: str) -> None:
    of_x, of_w, to = OTHERS[product]

    def build(b: Builder) -> Expr:
        x, w = narrow(b, b.input("x", f32[of_x])), narrow(b, b.input("w", f32[of_w]))
        return b.matmul(x, w, to=to) if len(of_w) == 3 else b.linear(x, w, to=to)

    exe = compiled(build)
    assert not any("pair_product" in title or "tile_product" in title for title in titles(exe))
    x, w = normal(*of_x), normal(*of_w, seed=1)
    left, right = (widened(rounded(v)).astype(np.float64) for v in (x, w))
    wanted = left @ (right if len(of_w) == 3 else right.T)
    np.testing.assert_allclose(exe(x=x, w=w)["y"], wanted, rtol=0, atol=1e-4)

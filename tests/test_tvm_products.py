"""Products on the TVM backend beyond the op suite: operands in any layout, chains that follow, bits, emitted code."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.backend_checks import graph_of
from tests.op_checks import EPSILON, Array
from treadle.backends.registry import find_backend
from treadle.backends.tvm.executable import KernelExecutable
from treadle.backends.tvm.kernels.host.cache import KernelCache, assembly
from treadle.backends.tvm.kernels.host.calling import bind
from treadle.backends.tvm.kernels.isa import ISAS, host_isa, runs_here
from treadle.backends.tvm.kernels.matmul import Matmul, Pack, panel_width
from treadle.backends.tvm.lowering.program import RoutineStep
from treadle.backends.tvm.weight_packing import pack
from treadle.ir.builder import Builder, Expr
from treadle.ir.graph import Function, Graph
from treadle.ir.layouts import panels
from treadle.ir.target import Target

pytest.importorskip("tvm")


def compiled(graph: Graph, weights: Mapping[str, Any] | None = None, target: str = "cpu") -> KernelExecutable:
    made = find_backend("tvm").compile(graph, Target(target), weights or {})
    assert isinstance(made, KernelExecutable)
    return made


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def assert_sums(got: Any, expected: Array, terms: int) -> None:
    """Assert equality up to the rounding of a sum of `terms` numbers of magnitude 1 and of a short chain after it."""
    bound = (terms + 16) * EPSILON["f32"] * max(1.0, float(np.max(np.abs(expected), initial=0)))
    assert got.shape == expected.shape
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=0, atol=bound)


def titles(exe: KernelExecutable) -> list[str]:
    """Return the titles of main's steps."""
    return [s.routine.name if isinstance(s, RoutineStep) else s.kernel.title for s in exe.program.main.steps]


# -- layouts of operands -------------------------------------------------------------------------------------

EQUATIONS = [
    ("b h s d, b h t d -> b h s t", {"b": 2, "h": 3, "s": 5, "t": 7, "d": 16}),
    ("b h s t, b h t d -> b h s d", {"b": 2, "h": 3, "s": 5, "t": 7, "d": 33}),
    ("b h s t, b h t d -> b s h d", {"b": 2, "h": 3, "s": 5, "t": 7, "d": 16}),
    ("a b c d m k, d c b a k n -> b a d c n m", {"a": 2, "b": 3, "c": 2, "d": 2, "m": 3, "k": 5, "n": 4}),
    ("k m, k n -> n m", {"k": 50, "m": 9, "n": 70}),
    ("m k, n k -> n m", {"k": 50, "m": 9, "n": 70}),
    ("b m, b n -> b m n", {"b": 3, "m": 5, "n": 6}),
    ("i j k l, l j -> k i", {"i": 3, "j": 4, "k": 5, "l": 6}),
    ("i j k l, j l -> k i", {"i": 3, "j": 4, "k": 5, "l": 6}),
    ("m k, k -> m", {"m": 7, "k": 60}),
    ("k, k n -> n", {"n": 50, "k": 60}),
    ("b k, b k -> b", {"b": 7, "k": 60}),
    (", i -> i", {"i": 5}),
    ("a i, a j, a k -> i j k", {"a": 8, "i": 3, "j": 4, "k": 5}),
    ("b x m k, b y k n -> x b m y n", {"b": 2, "x": 3, "y": 2, "m": 4, "k": 6, "n": 5}),
]


@pytest.mark.parametrize("symbolic", [False, True], ids=["known", "symbolic"])
@pytest.mark.parametrize(("equation", "sizes"), EQUATIONS, ids=[e for e, _ in EQUATIONS])
def test_einsum(equation: str, sizes: dict[str, int], symbolic: bool) -> None:
    terms = equation.partition("->")[0].split(",")
    shapes = [[sizes[n] for n in term.split()] for term in terms]
    types = [f"f32[{', '.join(n.upper() if symbolic else str(sizes[n]) for n in term.split())}]" for term in terms]
    graph = graph_of(lambda b: b.einsum(*[b.input(f"x{i}", t) for i, t in enumerate(types)], equation=equation))
    arrays = {f"x{i}": normal(*shape, seed=i) for i, shape in enumerate(shapes)}
    expected = np.einsum(equation.replace(" ", ""), *[a.astype(np.float64) for a in arrays.values()])
    assert_sums(compiled(graph)(**arrays)["y"], expected, 60)


def test_a_batch_of_matrices_broadcasts_without_copies() -> None:
    """matmul broadcasts leading dimensions of either operand; none of these cases needs a copy."""
    for left, right in (
        ((2, 3, 4, 5), (5, 6)),
        ((4, 5), (2, 3, 5, 6)),
        ((2, 1, 4, 5), (3, 5, 6)),
        ((3, 4, 5), (2, 1, 5, 6)),
    ):
        graph = graph_of(lambda b: b.matmul(b.input("x", f"f32{list(left)}"), b.input("y", f"f32{list(right)}")))  # noqa: B023
        exe, x, y = compiled(graph), normal(*left), normal(*right, seed=1)
        assert_sums(exe(x=x, y=y)["y"], np.matmul(x.astype(np.float64), y), 5)
        assert "copy" not in titles(exe), (left, right)


def test_a_product_reads_and_writes_other_layouts_in_place() -> None:
    """Heads are split and joined by views. Neither operands nor results of attention's products are copied."""

    def build(b: Builder) -> Expr:
        q, k, v = (b.rearrange(b.input(n, "f32[B, S, 32]"), pattern="b s (h=4 d) -> b h s d") for n in "qkv")
        p = b.einsum(q, k, equation="b h s d, b h t d -> b h s t") * 0.25
        return b.rearrange(b.einsum(p, v, equation="b h s t, b h t d -> b h s d"), pattern="b h s d -> b s (h d)")

    exe = compiled(graph_of(build))
    assert [t.partition("_")[0] for t in titles(exe)] == ["pack", "matmul", "pack", "matmul"]
    for batch, length in ((2, 7), (1, 1), (3, 50)):
        x = {n: normal(batch, length, 32, seed=i) for i, n in enumerate("qkv")}
        q, k, v = (a.astype(np.float64).reshape(batch, length, 4, 8).transpose(0, 2, 1, 3) for a in x.values())
        expected = (q @ k.swapaxes(-1, -2) * 0.25 @ v).transpose(0, 2, 1, 3).reshape(batch, length, 32)
        assert_sums(exe(**x)["y"], expected, 8 * length)


def test_weights_lie_in_panels() -> None:
    """The right side of linear, and of matmul, is packed once: no step of a call packs it."""

    def build(b: Builder) -> Expr:
        x = b.linear(b.input("x", "f32[B, S, 24]"), b.parameter("w", "f32[70, 24]"), b.parameter("b", "f32[70]"))
        return b.matmul(x, b.parameter("v", "f32[70, 5]"))

    weights = {"w": normal(70, 24), "b": normal(70), "v": normal(70, 5)}
    exe = compiled(graph_of(build), weights)
    assert len(titles(exe)) == 2
    x = normal(2, 3, 24)
    wide = {n: a.astype(np.float64) for n, a in weights.items()}
    assert_sums(exe(x=x)["y"], (x @ wide["w"].T + wide["b"]) @ wide["v"], 24 * 70)


# -- chains that finish a product ----------------------------------------------------------------------------

X, W = "f32[B, S, 20]", "f32[50, 20]"


def _pair(b: Builder) -> tuple[Expr, Expr]:
    return b.input("x", X), b.parameter("w", W)


def _residual(b: Builder, x: Expr, w: Expr) -> Mapping[str, Expr]:
    return {"y": b.linear(x, w, b.parameter("b", "f32[50]")) * 2.0 + b.input("r", "f32[B, S, 50]")}


def _broadcast(b: Builder, x: Expr, w: Expr) -> Mapping[str, Expr]:
    y = b.linear(x, w) * b.parameter("b", "f32[50]") + b.input("rows", "f32[S, 1]")
    return {"y": y + b.input("heads", "f32[B, 1, 50]") * b.input("one", "f32[1, 1, 1]")}


def _twice(b: Builder, x: Expr, w: Expr) -> Mapping[str, Expr]:
    y = b.linear(x, w)
    return {"y": y * y + y}


def _gated(b: Builder, x: Expr, w: Expr) -> Mapping[str, Expr]:
    return {"y": b.linear(x, w) * b.linear(x, b.parameter("v", W)) + 1.0}


def _read_elsewhere(b: Builder, x: Expr, w: Expr) -> Mapping[str, Expr]:
    y = b.linear(x, w)
    return {"y": y + 1.0, "z": y}


def _two_chains(b: Builder, x: Expr, w: Expr) -> Mapping[str, Expr]:
    y = b.linear(x, w)
    return {"y": y + 1.0, "z": y * 2.0}


def _another_dtype(b: Builder, x: Expr, w: Expr) -> Mapping[str, Expr]:
    return {"y": (b.linear(x, w) + 1.0).cast("f64") * b.input("wide", "f64[B, S, 50]")}


def _rearranged(b: Builder, x: Expr, w: Expr) -> Mapping[str, Expr]:
    y = b.linear(x, w) + b.input("r", "f32[B, S, 50]")
    return {"y": b.rearrange(y, pattern="b s (h=5 d) -> h b d s")}


def _joined(b: Builder, x: Expr, w: Expr) -> Mapping[str, Expr]:
    y = b.einsum(x, b.input("keys", "f32[B, S, 20]"), equation="b s k, b t k -> b t s")
    return {"y": y * 0.5 + b.input("mask", "f32[B, 1, S]") + b.input("rows", "f32[S, 1]"), "z": b.linear(x, w)}


def _of_one_operand(b: Builder, x: Expr, w: Expr) -> Mapping[str, Expr]:
    y = b.einsum(x, equation="b s k -> k b s")
    return {"y": y * 0.5 + b.input("rows", "f32[B, S]") * b.input("one", "f32[1, 1, 1]"), "z": b.linear(x, w)}


CHAINS = [_residual, _broadcast, _twice, _gated, _read_elsewhere, _two_chains, _another_dtype, _rearranged, _joined]
CHAINS += [_of_one_operand]


@pytest.mark.parametrize("build", CHAINS, ids=[c.__name__[1:] for c in CHAINS])
def test_chains(build: Callable[[Builder, Expr, Expr], Mapping[str, Expr]]) -> None:
    graph = graph_of(lambda b: build(b, *_pair(b)))
    weights = {n: normal(*(v.type.static_shape or ()), seed=i) for i, (n, v) in enumerate(graph.parameters.items())}
    exe, reference = compiled(graph, weights), find_backend("numpy").compile(graph, Target("cpu"), weights)
    for sizes in ({"B": 2, "S": 13}, {"B": 1, "S": 1}):
        given = {
            v.name: normal(*v.type.evaluate(sizes), seed=i).astype(v.type.dtype.numpy)
            for i, v in enumerate(graph.main.inputs)
        }
        made, expected = exe(**given), reference(**given)
        for name in expected:
            assert_sums(made[name], expected[name], 40)


def test_which_steps_a_chain_takes() -> None:
    def steps(build: Callable[[Builder, Expr, Expr], Mapping[str, Expr]]) -> list[str]:
        graph = graph_of(lambda b: build(b, *_pair(b)))
        weights = {n: normal(*(v.type.static_shape or ())) for n, v in graph.parameters.items()}
        return [re.sub(r"(_\d+)?_", " ", re.sub(r"_\d+$", "", title)) for title in titles(compiled(graph, weights))]

    assert steps(_residual) == ["matmul add mul add"]
    assert steps(_twice) == ["matmul mul add"]
    assert steps(_gated) == ["matmul", "matmul mul add"]
    assert steps(_two_chains) == ["matmul", "add", "mul"]
    assert steps(_joined)[:2] == ["pack", "matmul batch mul add add"]


def test_a_vector_and_nothing_at_all() -> None:
    """Operands that are vectors, and operands without rows."""
    vector = graph_of(lambda b: b.linear(b.input("x", "f32[20]"), b.input("w", W), b.input("b", "f32[50]")) * 3.0)
    x, w, bias = normal(20), normal(50, 20), normal(50)
    assert_sums(compiled(vector)(x=x, w=w, b=bias)["y"], (w.astype(np.float64) @ x + bias) * 3, 20)
    for equation, left, right in (("m k, k n -> m n", (0, 3), (3, 2)), ("m k, k n -> m n", (2, 0), (0, 3))):
        types = [f"f32{list(left)}", f"f32{list(right)}"]
        empty = graph_of(lambda b: b.einsum(b.input("x", types[0]), b.input("y", types[1]), equation=equation) + 1.0)  # noqa: B023
        made = compiled(empty)(x=np.zeros(left, np.float32), y=np.zeros(right, np.float32))["y"]
        np.testing.assert_array_equal(made, np.ones((left[0], right[1]), np.float32))


def test_a_product_in_a_repeated_block() -> None:
    graph = Graph("blocks")
    h = Function("h")
    graph.add_function(h)
    b = Builder(graph, h)
    x = b.input("x", "f32[B, 16]")
    b.outputs(x=b.linear(x, b.parameter("w", "f32[16,16]"), b.parameter("b", "f32[16]")) + x)
    main = Builder(graph)
    x = main.input("x", "f32[B, 16]")
    for i in range(3):
        (x,) = main.call(h, [x, main.parameter(f"w{i}", "f32[16,16]"), main.parameter(f"b{i}", "f32[16]")])
    main.outputs(y=x)
    weights = {f"w{i}": normal(16, 16, seed=i) / 4 for i in range(3)} | {f"b{i}": normal(16, seed=i) for i in range(3)}
    given = normal(5, 16)
    expected = given.astype(np.float64)
    for i in range(3):
        expected = expected @ weights[f"w{i}"].T + weights[f"b{i}"] + expected
    assert_sums(compiled(graph, weights)(x=given)["y"], expected, 3 * 16 * 4)


# -- bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [5, 50, 96])
def test_a_rows_bits_do_not_depend_on_other_rows(columns: int) -> None:
    """The test varies the number of rows, the position of the row, and the assignment of rows to threads."""
    graph = graph_of(
        lambda b: (
            b.linear(b.input("x", "f32[B, 33]"), b.parameter("w", f"f32[{columns}, 33]")) * b.input("s", "f32[B, 1]")
        )
    )
    weights = {"w": normal(columns, 33)}
    exe, serial = compiled(graph, weights), find_backend("tvm").compile(graph, Target("cpu", 1), weights)
    x, s = normal(701, 33), normal(701, 1)
    whole = exe(x=x, s=s)["y"]
    np.testing.assert_array_equal(serial(x=x, s=s)["y"], whole)
    for count in (*range(1, 20), 128, 700):
        first = (17 * count) % (701 - count)
        part = exe(x=x[first : first + count], s=s[first : first + count])["y"]
        np.testing.assert_array_equal(part, whole[first : first + count])


def test_a_batch_element_has_the_bits_that_it_has_alone() -> None:
    graph = graph_of(
        lambda b: b.einsum(
            b.input("x", "f32[B, H, S, 24]"), b.input("y", "f32[B, H, T, 24]"), equation="b h s d, b h t d -> b h s t"
        )
    )
    exe, x, y = compiled(graph), normal(3, 2, 29, 24), normal(3, 2, 53, 24)
    whole = exe(x=x, y=y)["y"]
    for row in range(3):
        np.testing.assert_array_equal(exe(x=x[row : row + 1], y=y[row : row + 1])["y"][0], whole[row])
    np.testing.assert_array_equal(exe(x=x[:, :, 5:11].copy(), y=y[:, :, :9].copy())["y"], whole[:, :, 5:11, :9])


# -- instruction sets ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in ISAS if n != "arm64"])
def test_instruction_sets(name: str) -> None:
    if not runs_here(ISAS[name]):
        pytest.skip(f"this machine does not run {name}")

    def build(b: Builder) -> Mapping[str, Expr]:
        x = b.input("x", "f32[B, 20]")
        y = b.linear(x, b.parameter("w", W), b.parameter("b", "f32[50]")) * b.input("r", "f32[B, 50]")
        return {"y": y, "z": b.matmul(y, b.input("v", "f32[50, B]"))}

    weights = {"w": normal(50, 20), "b": normal(50)}
    exe = compiled(graph_of(build), weights, name)
    for rows in (1, 7, 26):
        x, r, v = normal(rows, 20), normal(rows, 50), normal(50, rows)
        expected = (x.astype(np.float64) @ weights["w"].T + weights["b"]) * r
        made = exe(x=x, r=r, v=v)
        assert_sums(made["y"], expected, 20)
        assert_sums(made["z"], expected @ v, 20 * 50)


def test_prefetching_changes_no_bits() -> None:
    """On CPUs that prefetch too little by themselves, the first tile of a panel is computed separately."""
    plain = ISAS["x86-64-v3"]
    if not runs_here(plain):
        pytest.skip("no AVX2 here")
    caches = [KernelCache(isa, folder=None) for isa in (plain, replace(plain, name="v3-near", ahead=0))]
    k, n = 64, 40
    w = normal(n, k, seed=1)
    laid = pack(w, panels(16))
    for m in (1, 6, 7, 23):
        x, made = normal(m, k), [np.full((m, n), np.nan, np.float32) for _ in caches]
        for cache, c in zip(caches, made, strict=True):
            bind(Matmul(16), [x, laid, c], [m, k, n, k, n], cache=cache)()
        np.testing.assert_array_equal(*made)
        assert_sums(made[0], x.astype(np.float64) @ w.T, k)


def test_arm64_has_its_multiply_add() -> None:
    isa = ISAS["arm64"]
    text = assembly(Matmul(panel_width(96, isa), batch=True), isa)
    assert text.count("fmla") >= 8
    assert assembly(Pack(panel_width(None, isa)), isa)


@pytest.mark.parametrize("columns", [5, 8, 21])
@pytest.mark.parametrize("near", [False, True])
def test_the_last_panel_is_filled_up_with_zeros(near: bool, columns: int) -> None:
    width, depth = 2 * host_isa().lanes(), 3
    x, panels = normal(depth, columns), -(-columns // width)
    packed = np.full((panels, depth, width), np.nan, np.float32)
    given = x if near else np.ascontiguousarray(x.T)
    strides = (1, columns) if near else (depth, 1)
    bind(Pack(width, near), [given, packed], [columns, depth, *strides, 1, 1, 0, 0])()
    wanted = np.pad(x, ((0, 0), (0, panels * width - columns)))
    assert np.array_equal(packed, wanted.reshape(depth, panels, width).swapaxes(0, 1))


def test_tiles_stay_in_registers() -> None:
    """The loop over k has a multiply-add for each vector of a tile, and stores nothing."""
    isa = host_isa()
    if not isa.fused:
        pytest.skip(f"{isa} has no multiply-add")
    text = assembly(Matmul(panel_width(3072, isa), whole=True), isa)
    loops = [block for block in text.split("\n.LBB") if block.count("vfmadd") >= 12]
    assert loops
    for loop in loops:
        body = [line for line in loop.splitlines() if "vfmadd" in line or "vmov" in line]
        stores = [line for line in body if line.rstrip().endswith(")") and "vmov" in line]
        assert not stores, stores[:3]

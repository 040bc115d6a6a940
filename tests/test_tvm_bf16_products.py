"""bf16 products on the TVM backend: sizes, instruction sets, bits, fused neighbours, and the option that allows
them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

import treadle
from tests.backend_checks import graph_of
from tests.op_checks import EPSILON, Array
from treadle.backends.bfloat16 import rounded, widened
from treadle.backends.registry import find_backend
from treadle.backends.tvm.executable import KernelExecutable
from treadle.backends.tvm.kernels import isa as instruction_sets
from treadle.backends.tvm.kernels.isa import ISAS, host_isa, refused_here, runs_here
from treadle.backends.tvm.weight_packing import pack
from treadle.ir.builder import Builder, Expr
from treadle.ir.encodings.encoding import parse_encoding
from treadle.ir.graph import Graph
from treadle.ir.layouts import pairs, panels
from treadle.ir.sizing.sizes import Size
from treadle.ir.target import Target
from treadle.ir.types import bf16, f32
from treadle.passes.framework.manager import PassManager
from treadle.passes.pipelines import DEFAULT
from treadle.passes.products.narrow_products import NarrowProducts

pytest.importorskip("tvm")

from tests.tiles_in_memory import stand_in
from treadle.backends.tvm.kernels.encoded.tile_block_product import TileBlockProduct
from treadle.backends.tvm.kernels.encoded.unpacking import packed_form, reads_in_tiles
from treadle.backends.tvm.kernels.host.cache import KernelCache, assembly
from treadle.backends.tvm.kernels.host.calling import bind
from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.backends.tvm.kernels.narrow.pair_product import PairProduct
from treadle.backends.tvm.kernels.narrow.round_rows import RoundRows, held_elements
from treadle.backends.tvm.kernels.narrow.tile_product import TileProduct
from treadle.backends.tvm.kernels.pointwise import Chain, Instruction

needs_avx512_bf16 = pytest.mark.skipif(not runs_here(ISAS["x86-64-v4-bf16"]), reason="AVX-512 rounds the rows")

HERE = [
    name for name in ("x86-64-amx", "x86-64-v4-bf16", "x86-64-v4", "x86-64-v3", "x86-64-v2") if runs_here(ISAS[name])
]
each_isa = pytest.mark.parametrize("isa", HERE)


def narrowed(graph: Graph) -> Graph:
    return PassManager((*DEFAULT, NarrowProducts())).run(graph).graph


def compiled(graph: Graph, weights: Mapping[str, Any], target: str | Target = "cpu") -> KernelExecutable:
    where = target if isinstance(target, Target) else Target(target)
    made = find_backend("tvm").compile(narrowed(graph), where, weights)
    assert isinstance(made, KernelExecutable)
    return made


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def exact(x: Array, w: Array) -> Array:
    return widened(rounded(x)).astype(np.float64) @ widened(rounded(w)).astype(np.float64).T


def assert_sums(got: Any, expected: Array, terms: int) -> None:
    """Assert equality up to the rounding of a sum of `terms` numbers of magnitude 1, added in any order."""
    bound = (terms + 16) * EPSILON["f32"] * max(1.0, float(np.max(np.abs(expected), initial=0)))
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=0, atol=bound)


def linear_graph(k: int, n: int) -> Graph:
    return graph_of(lambda b: b.linear(b.input("x", f32["M", k]), b.parameter("w", f32[n, k])))


def titles(exe: KernelExecutable) -> list[str]:
    return [s.kernel.title for s in exe.program.main.steps]  # type: ignore[union-attr]


# -- sizes -------------------------------------------------------------------------------------------------------

SIZES = [(1, 1), (31, 32), (32, 31), (33, 65), (64, 96), (100, 17), (320, 40), (1000, 33)]
ROWS = (1, 2, 15, 16, 17, 32, 33, 48, 49, 64, 97, 128, 161, 300)


@each_isa
@pytest.mark.parametrize(("k", "n"), SIZES)
def test_odd_sizes_and_a_row_by_itself(isa: str, k: int, n: int) -> None:
    """The numbers of rows range from a few rows to several groups of blocks. A row computed alone has the same bits."""
    x, w = normal(max(ROWS), k), normal(n, k, seed=1)
    exe = compiled(linear_graph(k, n), {"w": w}, isa)
    every = exe(x=x)["y"]
    assert_sums(every, exact(x, w), k)
    for rows in ROWS:
        np.testing.assert_array_equal(exe(x=x[-rows:])["y"], every[-rows:], f"{rows} rows")


@each_isa
def test_whole_numbers_give_exact_sums(isa: str) -> None:
    """Integers up to 256 are exact in bf16, and float32 holds the sums of their products exactly. So any bit from a
    neighbour would show.
    """
    rng = np.random.default_rng(0)
    x, w = (rng.integers(-255, 256, (rows, 64)).astype(np.float32) for rows in (17, 33))
    made = compiled(linear_graph(64, 33), {"w": w}, isa)(x=x)["y"]
    np.testing.assert_array_equal(made, x.astype(np.float64) @ w.T)


def without_the_first_row(k: int, n: int) -> Graph:
    return graph_of(
        lambda b: b.linear(b.slice(b.input("x", f32["M", k]), axis=0, start=1), b.parameter("w", f32[n, k]))
    )


@each_isa
def test_nothing_at_all(isa: str) -> None:
    """No row, no column, or an empty sum, which must be 0 and not the earlier contents of the memory."""
    for k, n in ((40, 70), (40, 0), (0, 70), (0, 0)):
        graph = without_the_first_row(k, n)
        x, w = normal(41, k), normal(n, k, seed=1)
        exe = compiled(graph, {"w": w}, isa)
        for rows in (1, 6, 41, 1):
            assert_sums(exe(x=x[:rows])["y"], exact(x[1:rows], w), k)


@pytest.mark.skipif(host_isa().name not in HERE[:2], reason="no instructions for bf16")
def test_threads_do_not_change_bits() -> None:
    x, w = normal(70, 200), normal(1500, 200, seed=1)
    alone, shared = (compiled(linear_graph(200, 1500), {"w": w}, Target("cpu", threads=n)) for n in (1, 2))
    np.testing.assert_array_equal(alone(x=x)["y"], shared(x=x)["y"])


@each_isa
def test_infinite_and_missing_numbers_stay_in_their_row(isa: str) -> None:
    x, w = normal(40, 50), np.abs(normal(20, 50, seed=1)) + 1
    x[3, 7], x[20, 0], x[39, 49] = np.inf, np.nan, -np.inf
    got = compiled(linear_graph(50, 20), {"w": w}, isa)(x=x)["y"]
    np.testing.assert_array_equal(got[3], np.inf)
    np.testing.assert_array_equal(got[20], np.nan)
    np.testing.assert_array_equal(got[39], -np.inf)
    plain = [row for row in range(40) if row not in (3, 20, 39)]
    assert_sums(got[plain], exact(x[plain], w), 50)


# -- ops around a product ----------------------------------------------------------------------------------------


def gated_block(width: int) -> tuple[Graph, dict[str, Array]]:
    def block(b: Builder) -> Expr:
        x = b.input("x", f32["B", "S", 24])
        gated = b.silu(b.linear(x, b.parameter("g", f32[width, 24]))) * b.linear(x, b.parameter("u", f32[width, 24]))
        hidden = b.linear(gated, b.parameter("d", f32[width, width]))
        return x + b.linear(hidden, b.parameter("o", f32[24, width]), b.parameter("bias", f32[24]))

    shapes = {"g": (width, 24), "u": (width, 24), "d": (width, width), "o": (24, width), "bias": (24,)}
    return graph_of(block), {name: normal(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}


@pytest.mark.parametrize(
    ("isa", "width", "rows", "product"),
    [
        ("x86-64-amx", 64, "tiles", "tile"),
        ("x86-64-amx", 40, "tiles", "tile"),
        ("arm64", 64, "wide", "pair"),
    ],
)
def test_which_kernels_another_machine_has_for_a_block(isa: str, width: int, rows: str, product: str) -> None:
    """On a matrix unit with whole panels, rows for the next product are rounded without a separate step."""
    graph, weights = gated_block(width)
    made = [f"{product}_product{end}" for end in ("", "_silu_mul_cast", "_cast", "_add_add")]
    rounded_rows = [f"round_rows_{rows}"]
    wanted = [*rounded_rows, *made[:2], *rounded_rows, made[2], *rounded_rows, made[3]]
    if product == "tile" and width % 32 == 0:
        wanted = [*rounded_rows, made[0], "tile_product_silu_mul_tiled", "tile_product_copy_tiled", made[3]]
    assert titles(compiled(graph, weights, isa)) == wanted


@each_isa
@pytest.mark.parametrize("width", [40, 64])
def test_bias_activation_residual_and_gate_are_done_as_sums_are_stored(isa: str, width: int) -> None:
    """If the width is a multiple of a panel, the value between two products is stored in the layout that the second
    product reads.
    """

    graph, weights = gated_block(width)
    x, exe = normal(3, 11, 24), compiled(graph, weights, isa)
    gate, up = (exact(x, weights[name]) for name in "gu")
    hidden = exact((gate / (1 + np.exp(-gate)) * up).astype(np.float32), weights["d"]).astype(np.float32)
    wanted = x + exact(hidden, weights["o"]) + weights["bias"]
    off = np.abs(exe(x=x)["y"] - wanted).max() / np.abs(wanted).max()
    assert off < EPSILON["bf16"], "hidden numbers near the middle of two bf16 ones may go to either"
    assert sum("product" in title for title in titles(exe)) == 4
    assert not any(title.startswith("cast") for title in titles(exe))
    tiled = sum(title.endswith("tiled") for title in titles(exe))
    assert tiled == (2 if width == 64 and ISAS[isa].multiplies_tiles else 0)
    assert sum("round_rows" in title for title in titles(exe)) == 3 - tiled, "gate and up read the same rows"
    np.testing.assert_array_equal(exe(x=x[1:2])["y"][0], exe(x=x)["y"][1])


@each_isa
def test_a_weight_that_lies_as_in_out(isa: str) -> None:
    graph = graph_of(lambda b: b.matmul(b.input("x", f32["M", 40]), b.parameter("w", f32[40, 70])))
    x, w = normal(9, 40), normal(40, 70, seed=1)
    assert_sums(compiled(graph, {"w": w}, isa)(x=x)["y"], exact(x, w.T), 40)


def test_a_cast_that_others_read_too_is_made() -> None:
    def both(b: Builder) -> dict[str, Expr]:
        rough = b.cast(b.input("x", f32["M", 40]), to="bf16")
        y = b.linear(rough, b.cast(b.parameter("w", f32[8, 40]), to="bf16"), to="f32")
        return {"y": y, "rough": b.cast(rough, to="f32") * 2.0}

    x, w = normal(5, 40), normal(8, 40, seed=1)
    made = find_backend("tvm").compile(graph_of(both), Target("cpu"), {"w": w})(x=x)
    np.testing.assert_array_equal(made["rough"], 2 * widened(rounded(x)))
    assert_sums(made["y"], exact(x, w), 40)


def test_a_bf16_model_multiplies_pairs_too() -> None:
    """The results are bf16: sums are rounded at the end."""
    graph = graph_of(
        lambda b: b.linear(b.input("x", bf16["M", 40]), b.parameter("w", bf16[8, 40]), b.parameter("b", bf16[8]))
    )
    x, w, bias = (widened(rounded(v)) for v in (normal(5, 40), normal(8, 40, seed=1), normal(8, seed=2)))
    exe = find_backend("tvm").compile(graph, Target("cpu"), {"w": w, "b": bias})
    assert isinstance(exe, KernelExecutable)
    assert any("product" in title for title in titles(exe))
    wanted = exact(x, w) + bias
    np.testing.assert_allclose(exe(x=x)["y"], wanted, rtol=0, atol=EPSILON["bf16"] * np.abs(wanted).max())


# -- packing and code ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(32, 32), (1, 1), (40, 70), (65, 33)])
def test_pairs_lie_where_the_layout_says(shape: tuple[int, int]) -> None:
    matrix = np.arange(1, shape[0] * shape[1] + 1, dtype=np.uint16).reshape(shape)
    packed = pack(matrix, pairs(32))
    assert packed.shape == tuple(s.evaluate({}) for s in pairs(32).shape([Size.of(n) for n in shape]))
    for n in range(shape[0]):
        for k in range(shape[1]):
            assert packed[n // 32, k // 32, n % 32 // 16, k % 32 // 2, n % 16, k % 2] == matrix[n, k]
    flat = pack(matrix, pairs(48, flat=True))
    assert flat.shape == tuple(s.evaluate({}) for s in pairs(48, flat=True).shape([Size.of(n) for n in shape]))
    for n in range(shape[0]):
        for k in range(shape[1]):
            assert flat[n // 48, k // 2, n % 48, k % 2] == matrix[n, k]
    assert np.count_nonzero(packed) == np.count_nonzero(flat) == matrix.size
    np.testing.assert_array_equal(pack(np.ascontiguousarray(matrix.T), pairs(32, transposed=True)), packed)


def test_the_code_has_the_instructions_that_it_is_for() -> None:
    """The loop has tile products or products of pairs: 24 of them in a step, between which no sum is spilled to the
    stack.
    """
    code = assembly(TileProduct(), ISAS["x86-64-amx"])
    assert "ldtilecfg" in code
    assert "tdpbf16ps" in code
    assert "prefetcht1" in code
    pair_code = assembly(PairProduct(), ISAS["x86-64-v4-bf16"])
    assert "tdpbf16ps" not in pair_code
    lines = pair_code.splitlines()
    at = [i for i, line in enumerate(lines) if "vdpbf16ps" in line][:24]
    assert not [line for line in lines[at[0] : at[-1] + 1] if "(%rsp)" in line]
    assert "vdpbf16ps" not in assembly(PairProduct(), ISAS["x86-64-v4"])


# -- tiles in memory ---------------------------------------------------------------------------------------------------


def by_tiles(x: Array, w: Array, kernel: Kernel, cache: KernelCache, held: Any = None) -> Array:
    """Compute a product with the matrix unit's kernels, from rows that are rounded and laid out first."""
    (m, k), n = x.shape, len(w)
    a, c = in_tiles(m, k), np.full((m, n), np.nan, np.float32)
    bind(RoundRows("f32", "tiles"), [x, a], [m, k, k], cache=cache)()
    bind(kernel, [a, pack(rounded(w), pairs(32)) if held is None else held, c], [m, k, n, n], cache=cache)()
    return c


def in_tiles(m: int, k: int) -> Array:
    return np.full(held_elements("tiles", Size.of(m), Size.of(k)).evaluate({}), 0x7FC0, np.uint16)


@needs_avx512_bf16
def test_sums_of_tiles_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests the kernel's use of tiles: odd sizes, several chunks of k and groups of blocks, empty operands."""
    cache = KernelCache(stand_in(monkeypatch))
    for m, k, n in ((1, 1, 1), (33, 31, 40), (150, 330, 70), (3, 0, 5)):
        x, w = normal(m, k), normal(n, k, seed=1)
        made = by_tiles(x, w, TileProduct(), cache)
        assert_sums(made, exact(x, w), k)
        np.testing.assert_array_equal(by_tiles(x[-1:], w, TileProduct(), cache), made[-1:])


@needs_avx512_bf16
def test_a_product_in_memory_is_stored_as_the_next_one_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums that are rounded to bf16 and stored in tiles equal rows that are rounded and laid out separately."""
    cache, (m, k, n) = KernelCache(stand_in(monkeypatch)), (45, 70, 64)
    x, w = normal(m, k), normal(n, k, seed=1)
    relu = Chain(("f32",), (Instruction("relu", (0,), "f32"),))
    a, made, wanted = in_tiles(m, k), in_tiles(m, n), in_tiles(m, n)
    bind(RoundRows("f32", "tiles"), [x, a], [m, k, k], cache=cache)()
    bind(TileProduct(relu, (), True, tiled=True), [a, pack(rounded(w), pairs(32)), made], [m, k, n, n], cache=cache)()
    sums = np.maximum(by_tiles(x, w, TileProduct(), cache), 0)
    bind(RoundRows("f32", "tiles"), [sums, wanted], [m, n, n], cache=cache)()
    rows = [each.reshape(2, n // 32, 32, 32).transpose(0, 2, 1, 3).reshape(64, n)[:m] for each in (made, wanted)]
    np.testing.assert_array_equal(*rows)


@needs_avx512_bf16
@pytest.mark.parametrize("text", ["int8_rows", "q4_1"])
def test_blocks_are_unpacked_into_tiles_in_memory(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, encoding = KernelCache(stand_in(monkeypatch)), parse_encoding(text)
    form = packed_form(encoding)
    assert form is not None and reads_in_tiles(form)
    for m, k, n in ((5, 32, 3), (40, 320, 70)):
        x, held = normal(m, k), encoding.sample(np.random.default_rng(k), (n, k))
        w = encoding.decode(held)
        made = by_tiles(x, w, TileBlockProduct(form=form), cache, pack(held, panels(32, twos=True)))
        bound = (EPSILON["f32"] * (k + 16) + 2.0**-8 / 8) * (np.abs(x) @ np.abs(w).T)  # a number may round to the next
        assert (np.abs(made - exact(x, w)) <= bound).all()


# -- permission to use the matrix unit ---------------------------------------------------------------------------------


@pytest.mark.skipif(not runs_here(ISAS["x86-64-amx"]), reason="no matrix unit")
def test_a_forked_child_may_use_tiles_too() -> None:
    x, w = normal(20, 64), normal(40, 64, seed=1)
    exe = compiled(linear_graph(64, 40), {"w": w}, Target("cpu", threads=1))
    wanted = exe(x=x)["y"]
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(exe(x=x)["y"], wanted) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_the_next_best_instruction_set_is_used_without_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    if not ISAS["x86-64-amx"].needs <= instruction_sets.cpu_flags():
        pytest.skip("no matrix unit")
    monkeypatch.setattr(instruction_sets, "may_use_tiles", lambda: False)
    host_isa.cache_clear()
    try:
        assert host_isa().name == "x86-64-v4-bf16"
        assert "may not use the machine's matrix unit" in (refused_here(host_isa()) or "")
        exe = compiled(linear_graph(64, 40), {"w": normal(40, 64)})
        assert any("may not use the machine's matrix unit" in note for note in exe.notes)
    finally:
        host_isa.cache_clear()


# -- models ------------------------------------------------------------------------------------------------------------


@each_isa
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_row_of_a_batch_has_the_bits_that_it_has_alone(isa: str, family: str) -> None:
    exe = treadle.compile(
        family, backend="tvm", target=isa, dtype="bf16", layers=2, dim=64, heads=4, hidden=96, vocab=80
    )
    tokens = np.random.default_rng(0).integers(0, 80, (5, 13))
    name = next(p.name for p in exe.outputs)
    whole = exe(tokens=tokens)[name]
    np.testing.assert_array_equal(exe(tokens=tokens[2:3])[name][0], whole[2])


def test_replaced_rows_are_rounded_again() -> None:
    """-x takes over the storage of x, whose rows are already rounded, so -x must be rounded again."""

    def made(b: Builder) -> Expr:
        x = b.abs(b.input("x", bf16["M", 64]))
        one = b.linear(x, b.parameter("w", bf16[64, 64]))
        return b.concat(one, b.linear(-x, b.parameter("v", bf16[64, 64])), axis=0)

    x, w, v = (widened(rounded(normal(n, 64, seed=n))) for n in (5, 64, 64))
    exe = compiled(graph_of(made), {"w": w, "v": v})
    assert "neg_over()" in exe.source
    wanted = np.concatenate([exact(np.abs(x), w), exact(-np.abs(x), v)])
    np.testing.assert_allclose(exe(x=x)["y"], wanted, rtol=EPSILON["bf16"], atol=0.01)

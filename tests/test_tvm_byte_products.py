"""8-bit rows on the TVM backend: rounding equals the reference bitwise, products are exact, alone and fused with other
ops.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from tests.backend_checks import graph_of
from tests.op_checks import Array
from treadle.backends.registry import find_backend
from treadle.backends.tvm.executable import KernelExecutable
from treadle.backends.tvm.kernels.isa import ISAS, runs_here
from treadle.backends.tvm.kernels.narrow.register_tiles import HEIGHTS, quads_for
from treadle.backends.tvm.weight_packing import pack
from treadle.ir.builder import Builder, Expr
from treadle.ir.encodings.encoding import Encoding
from treadle.ir.graph import Graph
from treadle.ir.interpreter import interpret
from treadle.ir.layouts import PAIR_SQUARE, QUAD_HEAD, QUAD_STEP, quads
from treadle.ir.ops.blocks import ROWS, STEPS
from treadle.ir.sizing.sizes import Size
from treadle.ir.target import Target
from treadle.ir.text.parser import parse_graph
from treadle.ir.types import f32, i64
from treadle.passes.framework.manager import PassManager
from treadle.passes.pipelines import DEFAULT
from treadle.passes.quantization.quantize import QuantizeWeights

pytest.importorskip("tvm")

from tests.tiles_in_memory import stand_in
from treadle.backends.tvm.kernels.host.cache import KernelCache, assembly
from treadle.backends.tvm.kernels.host.calling import bind
from treadle.backends.tvm.kernels.narrow.byte_product import ByteTileProduct, QuadProduct
from treadle.backends.tvm.kernels.narrow.encode_rows import EncodeRows, form_of_rows, rows_elements
from treadle.backends.tvm.kernels.pointwise import Chain, Instruction

HERE = [
    name for name in ("x86-64-amx", "x86-64-v4-bf16", "x86-64-v4", "x86-64-v3", "x86-64-v2") if runs_here(ISAS[name])
]
each_isa = pytest.mark.parametrize("isa", HERE)


def rounded(graph: Graph) -> Graph:
    return PassManager((*DEFAULT, QuantizeWeights("int8"))).run(graph).graph


def compiled(graph: Graph, weights: Mapping[str, Any], target: str | Target = "cpu") -> KernelExecutable:
    """Compile a graph of 8-bit rows from its float weights."""
    held = {n: ROWS.encode(w) if graph.parameters[n].type.encoding else w for n, w in weights.items()}
    where = target if isinstance(target, Target) else Target(target)
    made = find_backend("tvm").compile(graph, where, held)
    assert isinstance(made, KernelExecutable)
    return made


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def parts(x: Array, encoding: Encoding = ROWS) -> tuple[Array, Array]:
    """Return the integers of rows, with each row's zero point subtracted, and the scales."""
    record = np.ascontiguousarray(encoding.encode(x, computed=True)).view(encoding.block.record(x.shape[-1]))[..., 0]
    numbers = record["q"].astype(np.int64)
    return numbers if encoding == ROWS else numbers - record["zero"][..., None], record["scale"]


def exact(x: Array, w: Array, encoding: Encoding = STEPS) -> Array:
    """Return sums of integers, rounded once, times the product of both scales: the bits that are expected."""
    (q, s), (p, t) = parts(x, encoding), parts(w)
    sums = q @ p.T
    with np.errstate(over="ignore"):  # large rows become infinite, as the kernel's do
        made: Array = sums.astype(np.float32) * (s[..., None] * t)
    return made


def linear_graph(k: int, n: int) -> Graph:
    return rounded(graph_of(lambda b: b.linear(b.input("x", f32["M", k]), b.parameter("w", f32[n, k]))))


def titles(exe: KernelExecutable) -> list[str]:
    return [s.kernel.title for s in exe.program.main.steps]  # type: ignore[union-attr]


# -- sizes and bits ------------------------------------------------------------------------------------------------

SIZES = [(1, 1), (63, 32), (64, 31), (65, 65), (128, 96), (200, 17), (1100, 40), (2112, 33)]
ROWS_OF = (1, 2, 15, 16, 17, 32, 33, 48, 49, 64, 97, 129, 161, 300)


@each_isa
@pytest.mark.parametrize(("k", "n"), SIZES)
def test_every_sum_is_exact_and_a_row_has_the_bits_that_it_has_alone(isa: str, k: int, n: int) -> None:
    x, w = normal(max(ROWS_OF), k), normal(n, k, seed=1)
    exe = compiled(linear_graph(k, n), {"w": w}, isa)
    for rows in ROWS_OF:
        np.testing.assert_array_equal(exe(x=x[-rows:])["y"], exact(x[-rows:], w), f"{rows} rows")


@each_isa
def test_the_largest_sums_fit(isa: str) -> None:
    """All numbers are at an end of their range, with either sign. No sum saturates."""
    k = 4096
    for sign in (1, -1):
        x, w = np.ones((3, k), np.float32), np.full((5, k), sign, np.float32)
        x[1, ::2] = -1
        exe = compiled(linear_graph(k, 5), {"w": w}, isa)
        np.testing.assert_array_equal(exe(x=x)["y"], exact(x, w))


@each_isa
def test_rows_of_any_scale_are_rounded_as_the_reference_rounds_them(isa: str) -> None:
    """Ties, subnormal and huge numbers, and zeros. Values that are not finite affect only their own row."""
    x = normal(40, 70)
    x[1] = 0
    x[2] *= 1e-39
    x[3] = np.arange(70) + 0.5
    x[3, 0] = 127
    x[4] *= 1e37
    x[5] *= 2.0**-119
    x[6] = [
        -127.5,
        127.5,
        *np.arange(68) - 33.5,
    ]  # 255 steps of 1 and two ties; rounding up would give 256 for one of them
    x[8], x[9], x[10] = np.abs(x[8]), -np.abs(x[9]), 3
    x[11, :2] = -3e38, 3e38  # their difference is beyond float32's range
    x[7, 3], x[20, 69], x[39, 0] = np.inf, np.nan, -np.inf
    w = normal(33, 70, seed=1)
    got = compiled(linear_graph(70, 33), {"w": w}, isa)(x=x)["y"]
    lost = [7, 20, 39]
    assert np.isnan(got[lost]).all()
    kept = [row for row in range(40) if row not in lost]
    np.testing.assert_array_equal(got[kept], exact(x, w)[kept])


@pytest.mark.skipif(not HERE, reason="no instruction set of these here")
def test_threads_do_not_change_bits() -> None:
    x, w = normal(70, 200), normal(1500, 200, seed=1)
    for threads in (1, 2):
        exe = compiled(linear_graph(200, 1500), {"w": w}, Target("cpu", threads=threads))
        np.testing.assert_array_equal(exe(x=x)["y"], exact(x, w))


@each_isa
def test_nothing_at_all(isa: str) -> None:
    """Operands without rows, and without columns."""

    def graph(n: int) -> Graph:
        def block(b: Builder) -> Expr:
            return b.linear(b.slice(b.input("x", f32["M", 40]), axis=0, start=1), b.parameter("w", f32[n, 40]))

        return rounded(graph_of(block))

    for n in (70, 0):
        x, w = normal(41, 40), normal(n, 40, seed=1)
        exe = compiled(graph(n), {"w": w}, isa)
        for rows in (1, 6, 41, 1):
            np.testing.assert_array_equal(exe(x=x[:rows])["y"], exact(x[1:rows], w))


# -- ops around a product ------------------------------------------------------------------------------------------


@each_isa
def test_bias_activation_residual_and_gate_are_done_as_sums_are_stored(isa: str) -> None:
    def block(b: Builder) -> Expr:
        x = b.input("x", f32["B", "S", 24])
        gated = b.silu(b.linear(x, b.parameter("g", f32[40, 24]))) * b.linear(x, b.parameter("u", f32[40, 24]))
        return x + b.linear(gated, b.parameter("o", f32[24, 40]), b.parameter("bias", f32[24]))

    weights = {"g": normal(40, 24), "u": normal(40, 24, seed=2), "o": normal(24, 40, seed=3), "bias": normal(24)}
    graph, x = rounded(graph_of(block)), normal(3, 11, 24)
    exe = compiled(graph, weights, isa)
    held = {n: ROWS.encode(w) if graph.parameters[n].type.encoding else w for n, w in weights.items()}
    wanted = interpret(graph, {"x": x}, held)["y"]
    # silu of our kernels differs in the last bit, so a number may be rounded to the next of 127 steps.
    np.testing.assert_allclose(exe(x=x)["y"], wanted, rtol=0, atol=2e-2 * np.abs(wanted).max())
    made = titles(exe)
    assert len(made) == 5, made  # two roundings, and three products that do everything else
    assert sum("encode_rows" in t for t in made) == 2


@each_isa
def test_rows_at_several_distances_and_weights_the_other_way(isa: str) -> None:
    def block(b: Builder) -> Expr:
        heads = b.input("x", f32["B", 4, "S", 8])
        x = b.rearrange(heads, pattern="b h s d -> b s (h d)")
        return b.matmul(x, b.parameter("w", f32[32, 20]))

    x, w = normal(2, 4, 5, 8), normal(32, 20, seed=1)
    graph = rounded(graph_of(block))
    assert str(graph.parameters["w"].type.encoding) == "int8_rows(axis=0)"
    exe = find_backend("tvm").compile(graph, Target(isa), {"w": ROWS.along(0).encode(w)})
    rows = x.transpose(0, 2, 1, 3).reshape(2, 5, 32)
    np.testing.assert_array_equal(exe(x=x)["y"], exact(rows, np.ascontiguousarray(w.T)))


@each_isa
def test_a_table_that_is_picked_from_and_multiplied_with_is_there_once(isa: str) -> None:
    def block(b: Builder) -> Expr:
        table = b.parameter("t", f32[50, 100])
        return b.linear(b.gather(table, b.input("i", i64["B"]), axis=0), table)

    table, picked = normal(50, 100), np.array([3, 49, 0, 17, 3])
    exe = compiled(rounded(graph_of(block)), {"t": table}, isa)
    rows = ROWS.decode(ROWS.encode(table))[picked]
    np.testing.assert_array_equal(exe(i=picked)["y"], exact(rows, table))
    assert [w.nbytes for w in exe.machine.weights.values()] == [pack(ROWS.encode(table), quads_for(ISAS[isa])).nbytes]


@each_isa
@pytest.mark.parametrize("encoding", [ROWS, STEPS])
def test_rounded_rows_that_others_read_are_made_as_they_are_held(isa: str, encoding: Encoding) -> None:
    def block(b: Builder) -> Expr:
        x = b.encode(b.input("x", f32["M", 70]), to=encoding)
        near = b.decode(x, of=encoding)
        return b.concat(near, b.linear(near, b.parameter("w", f32[9, 70])))

    x, w = normal(21, 70), normal(9, 70, seed=1)
    x[4] = 0
    exe = find_backend("tvm").compile(graph_of(block), Target(isa), {"w": w})
    got = exe(x=x)["y"]
    near = encoding.decode(encoding.encode(x))
    np.testing.assert_array_equal(got[:, :70], near)
    np.testing.assert_allclose(got[:, 70:], near @ w.T, rtol=0, atol=1e-4)


# -- layouts and code ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flat", [False, True])
def test_quads_hold_scales_and_then_four_neighbours_side_by_side(flat: bool) -> None:
    w = normal(40, 100)
    held = ROWS.encode(w)
    made = pack(held, quads(32, flat=flat))
    q, scale = parts(w)
    head = 32 * QUAD_HEAD
    assert made[1, 4 * 32 : head].view("<i4").tolist() == [*q[32:].sum(axis=-1, dtype=int), *[0] * 24]
    for n, k in ((0, 0), (31, 99), (32, 63), (39, 64), (17, 70)):
        panel, column = made[n // 32], n % 32
        assert panel[4 * column : 4 * column + 4].view("<f4")[0] == scale[n]
        square = (k // QUAD_STEP) * 2 + column // PAIR_SQUARE
        at = head + square * PAIR_SQUARE * QUAD_STEP + (k % QUAD_STEP // 4) * 64 + column % PAIR_SQUARE * 4 + k % 4
        if flat:
            at = head + (k // 4) * 32 * 4 + column * 4 + k % 4
        assert panel[at].view("i1") == q[n, k]
    assert made.shape == (2, head + 2 * 2 * 1024)
    assert not made[1, 4 * 8 : 4 * 32].any()


@pytest.mark.parametrize(
    ("isa", "word"),
    [("x86-64-amx", "tdpbusd"), ("x86-64-v4-bf16", "vpdpbusd"), ("x86-64-v4", "vfmadd"), ("x86-64-v3", "vfmadd")],
)
def test_each_instruction_set_has_its_instructions(isa: str, word: str) -> None:
    kernel = ByteTileProduct() if ISAS[isa].multiplies_tiles else QuadProduct()
    assert word in assembly(kernel, ISAS[isa])


@pytest.mark.skipif(not runs_here(ISAS["x86-64-v4-bf16"]), reason="no VNNI here, whose bits are compared")
def test_tiles_have_the_bits_of_instructions_that_multiply_fours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles are in memory here, so this tests the kernel's use of tiles, including the zero points of rows."""
    caches = (KernelCache(stand_in(monkeypatch)), KernelCache(ISAS["x86-64-v4-bf16"]))
    for m in (5, 45):
        _multiplies_alike(m, caches)


def _multiplies_alike(m: int, caches: tuple[KernelCache, ...]) -> None:
    x, held, (k, n), made = normal(m, 200) + 1, ROWS.encode(normal(70, 200, seed=1)), (200, 70), []
    for cache in caches:
        form = form_of_rows(cache.isa)
        size = rows_elements(form, Size.of(m), Size.of(k)).evaluate({})
        a, scales, c = np.zeros(size, np.uint8), np.zeros((m, 2), np.int32), np.zeros((m, n), np.float32)
        bind(EncodeRows(form), [x, a, scales], [m, k, k], cache=cache)()
        kernel = ByteTileProduct() if cache.isa.multiplies_tiles else QuadProduct()
        bind(kernel, [a, pack(held, quads_for(cache.isa)), scales, c], [m, k, n, n], cache=cache)()
        made.append(c)
    np.testing.assert_array_equal(*made)
    near = STEPS.decode(STEPS.encode(x)) @ ROWS.decode(held).T
    np.testing.assert_allclose(made[0], near, rtol=0, atol=1e-5 * np.abs(near).max())


def test_forms_of_rows() -> None:
    forms = {name: form_of_rows(isa) for name, isa in ISAS.items()}
    assert forms["x86-64-amx"] == "tiles"
    assert forms["x86-64-v4-bf16"] == "quads"
    assert {forms[n] for n in ISAS if n not in ("x86-64-amx", "x86-64-v4-bf16")} == {"wide"}


# -- operands other than weights -----------------------------------------------------------------------------------


@each_isa
def test_two_sides_that_are_computed_are_laid_out_at_the_call(isa: str) -> None:
    def block(b: Builder) -> Expr:
        x, y = (b.encode(b.input(name, f32[rows, 70]), to="int8_rows") for name, rows in (("x", "M"), ("y", "N")))
        return b.encoded_linear(x, y)

    exe = find_backend("tvm").compile(graph_of(block), Target(isa), {})
    for m, n in ((3, 40), (33, 5), (1, 64)):
        x, y = normal(m, 70), normal(n, 70, seed=1)
        np.testing.assert_array_equal(exe(x=x, y=y)["y"], exact(x, y, ROWS))


@each_isa
@pytest.mark.parametrize("encoding", [ROWS, STEPS])
def test_rows_that_a_block_is_given_as_they_are_held(isa: str, encoding: Encoding) -> None:
    text = """graph g {
      symbols M
      parameters { w: f32[9, 70] as int8_rows }
      block h(rows: f32[M, 70] as ENCODING) -> (y: f32[M, 9])
        weights w: f32[9, 70] as int8_rows
      {
        y = encoded_linear(rows, $w)
        return y = y
      }
      main(x: f32[M, 70]) -> (y: f32[M, 9]) {
        rows = encode(x, to=ENCODING)
        y = h(rows) with {w: $w}
        return y = y
      }
    }"""
    x, w = normal(97, 70), normal(9, 70, seed=1)
    x[1] = 0
    x[2] = [-10.5, 244.5, *np.arange(68)]  # both ends are ties, rounded down: only 254 of the 255 steps are used
    x[3] *= 1e-39
    x[96, 69] = np.nan
    made = compiled(parse_graph(text.replace("ENCODING", str(encoding))), {"w": w}, isa)(x=x)["y"]
    np.testing.assert_array_equal(made[:96], exact(x, w, encoding)[:96])
    assert np.isnan(made[96]).all()


@pytest.mark.parametrize("encoding", [ROWS, STEPS])
@pytest.mark.parametrize("form", ["tiles", "quads", "wide"])
def test_encoded_rows_are_copied_into_every_form(form: str, encoding: Encoding) -> None:
    """The rows have arbitrary bytes, with scales that do not follow from their numbers."""
    m, k, signed = 45, 200, encoding == ROWS
    rng = np.random.default_rng(0)
    held = rng.integers(0, 256, (m, encoding.bytes(k)), np.uint8)
    held[:, :4] = normal(m, 1).view(np.uint8)
    record = held.view(encoding.block.record(k))[..., 0]
    zero = np.full(m, 128) if signed else record["zero"].astype(int)
    numbers = record["q"].astype(int) + 128 * signed
    size = rows_elements(form, Size.of(m), Size.of(k)).evaluate({})
    y, scales = np.zeros(size, np.float32 if form == "wide" else np.uint8), np.zeros((m, 2), np.int32)
    bind(EncodeRows(form, signed, again=True), [held, y, scales], [m, k, held.shape[1]])()
    np.testing.assert_array_equal(scales[:, 0].view(np.float32), record["scale"])
    np.testing.assert_array_equal(scales[:, 1], zero)
    if form == "tiles":
        y = y.reshape(2, -1, 2, 16, QUAD_STEP).transpose(0, 2, 3, 1, 4)
    lines = y.reshape(-1, 256)[:m]
    np.testing.assert_array_equal(lines[:, :k], numbers - zero[:, None] if form == "wide" else numbers)
    np.testing.assert_array_equal(lines[:, k:], np.zeros((m, 56)) if form == "wide" else zero[:, None].repeat(56, 1))


@each_isa
@pytest.mark.parametrize("rows", ["rows", "held"])
def test_rows_are_multiplied_with_a_vector_before_they_are_rounded(isa: str, rows: str) -> None:
    """This holds if only kernels read the rounded rows, and also if other ops read them as they are stored."""
    graph = parse_graph(
        """graph g {
      symbols M
      parameters {
        w: f32[9, 70] as int8_rows
        by: f32[70]
      }
      main(x: f32[M, 70]) -> (y: f32[M, 9], near: f32[M, 70]) {
        rows = encode(x, $by, to=uint8_rows)
        held = encode(x, $by, to=uint8_rows)
        y = encoded_linear(ROWS, $w)
        near = decode(held, of=uint8_rows)
        return y = y, near = near
      }
    }""".replace("ROWS", rows)
    )
    x, w, by = normal(21, 70), normal(9, 70, seed=1), np.exp(normal(70, seed=2))
    x[3, 69], by[5] = np.inf, 0
    made = compiled(graph, {"w": w, "by": by}, isa)(x=x)
    np.testing.assert_array_equal(made["y"], exact(x * by, w))
    assert np.isnan(made["y"][3]).all()
    np.testing.assert_array_equal(made["near"], STEPS.decode(STEPS.encode(x * by, computed=True)))


def test_operands_of_a_tile_are_prefetched() -> None:
    """For each row of a tile, three cache lines of the residual are prefetched, and three of the result that
    replaces it. Without a residual, only weights are.
    """
    added = Chain(("f32", "f32"), (Instruction("add", (1, 0), "f32"),))
    isa = ISAS["x86-64-v4-bf16"]
    of_rows, of_vectors = (assembly(QuadProduct(added, (how,), whole=True), isa) for how in ("mn", "n"))
    brought = of_rows.count("prefetch") - of_vectors.count("prefetch")
    assert brought == 2 * 3 * (8 + sum(height for height in HEIGHTS if height <= 8))
    assert "prefetch" in of_vectors

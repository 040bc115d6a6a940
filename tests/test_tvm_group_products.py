"""Weights in blocks times groups of 8-bit numbers on the TVM backend: products are exact on integers, and the bits of a
row depend only on that row.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import treadle
from tests.op_checks import EPSILON, Array
from treadle.backends.registry import find_backend
from treadle.backends.tvm.executable import KernelExecutable
from treadle.backends.tvm.kernels.isa import ISAS, runs_here
from treadle.backends.tvm.weight_packing import pack
from treadle.ir.encodings.encoding import Encoding, parse_encoding
from treadle.ir.graph import Graph
from treadle.ir.interpreter import interpret
from treadle.ir.layouts import blocks
from treadle.ir.ops.blocks import GROUPS, EncodedLinear
from treadle.ir.sizing.sizes import Size
from treadle.ir.target import Target
from treadle.ir.text.parser import parse_graph
from treadle.ir.transforms.encoded_weights import encode_parameters
from treadle.models.llama import llama

pytest.importorskip("tvm")

from tests.tiles_in_memory import stand_in
from treadle.backends.tvm.kernels.encoded.block_words import word_form
from treadle.backends.tvm.kernels.encoded.quad_block_product import QuadBlockProduct
from treadle.backends.tvm.kernels.host import tvm_runtime
from treadle.backends.tvm.kernels.host.cache import KernelCache, assembly
from treadle.backends.tvm.kernels.host.calling import bind
from treadle.backends.tvm.kernels.narrow.encode_groups import EncodeGroups, form_of_groups, rows_of_groups
from treadle.backends.tvm.kernels.narrow.register_tiles import HEIGHTS

ROOT = Path(__file__).resolve().parent.parent
HERE = [
    name for name in ("x86-64-amx", "x86-64-v4-bf16", "x86-64-v4", "x86-64-v3", "x86-64-v2") if runs_here(ISAS[name])
]
each_isa = pytest.mark.parametrize("isa", HERE)
SMALL = (
    "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "int4_groups(32)", "int4_groups(64)", "int4_groups(128)",
    "uint4_groups(32)", "uint4_groups(128)",
)  # fmt: skip
LARGE = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")
READ = (*SMALL, *LARGE)
each_form = pytest.mark.parametrize("text", READ)
ROWS = (1, 2, 5, 12, 13, 24, 31)


def linear_graph(k: int, n: int, text: str) -> Graph:
    return parse_graph(f"""graph g {{
      symbols M
      parameters {{ w: f32[{n}, {k}] as {text} }}
      main(x: f32[M, {k}]) -> (y: f32[M, {n}]) {{
        groups = encode(x, to=int8_groups(32))
        near = decode(groups, of=int8_groups(32))
        w = decode($w, of={text})
        y = linear(near, w)
        return y = y
      }}
    }}""")


def drawn(text: str, n: int, k: int, *, whole: bool = False) -> Array:
    """Draw blocks of a matrix; if they must decode to integers, with scales that are powers of two."""
    encoding, rng = parse_encoding(text), np.random.default_rng([n, k])
    held = encoding.sample(rng, (n, k))
    if whole:
        records = held.reshape(-1).view(encoding.block.record(encoding.elements(k)))
        for name in records.dtype.names or ():
            if records[name].dtype.kind == "f":
                records[name] = rng.choice([1, 2, -1], records[name].shape)
            if records[name].dtype.kind == "i" and name == "scales":
                records[name] %= 8  # as small as in the other forms, since sums must not exceed 2^24
    return held


def whole_rows(m: int, k: int) -> Array:
    """Draw rows of integers, times a power of two for each group: the largest magnitude in each group is 127."""
    rng = np.random.default_rng([m, k])
    x = rng.integers(-127, 128, (m, k // 32, 32)).astype(np.float32)
    x[..., 7] = 127
    return (x * rng.choice([1, 2], (m, k // 32, 1))).reshape(m, k).astype(np.float32)


def compiled(graph: Graph, weights: dict[str, Array], target: str | Target = "cpu") -> KernelExecutable:
    made = find_backend("tvm").compile(graph, target if isinstance(target, Target) else Target(target), weights)
    assert isinstance(made, KernelExecutable)
    return made


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def titles(exe: KernelExecutable) -> list[str]:
    return [s.kernel.title for s in exe.program.main.steps]  # type: ignore[union-attr]


# -- numbers ---------------------------------------------------------------------------------------------------------


EACH = (
    [(HERE[0], text) for text in READ]
    + [(isa, text) for isa in HERE[1:] for text in ("q4_1", "int4_groups(64)", "q8_0")]
    + [(isa, text) for isa in HERE[1:] if isa.endswith(("v4", "v3")) for text in ("q5_0", "q6_k")]
)


@pytest.mark.parametrize(("isa", "text"), EACH)
def test_whole_numbers_are_multiplied_exactly(isa: str, text: str) -> None:
    """With scales that are powers of two, no operation rounds, so kernels and integer arithmetic are bitwise
    identical.
    """
    block = parse_encoding(text).elements(256)
    for k, n in ((max(block, 128), 1), (512, 31)) if isa == HERE[0] else ((max(block, 128), 31),):
        held, x = drawn(text, n, k, whole=True), whole_rows(max(ROWS), k)
        exe = compiled(linear_graph(k, n, text), {"w": held}, isa)
        assert [t.startswith(("encode_groups", "quad_block_product")) for t in titles(exe)] == [True, True]
        wanted = x.astype(np.int64) @ parse_encoding(text).decode(held).astype(np.int64).T
        op = EncodedLinear(of=parse_encoding(text), rows=GROUPS)
        np.testing.assert_array_equal(op.reference(GROUPS.encode(x), held, None), wanted)
        for m in ROWS:
            np.testing.assert_array_equal(exe(x=x[-m:])["y"], wanted[-m:], f"{m} rows")


@each_form
def test_any_numbers_are_near_to_the_reference_and_a_row_has_bits_of_its_own(text: str) -> None:
    """Whatever the other rows are, for any number of rows, and for any number of threads that share them."""
    k, n = (512 if text in LARGE else 384), 100
    held, x = drawn(text, n, k), normal(max(ROWS), k)
    one, two = (compiled(linear_graph(k, n, text), {"w": held}, Target("cpu", threads)) for threads in (1, 2))
    whole = np.asarray(one(x=x)["y"])
    op = EncodedLinear(of=parse_encoding(text), rows=GROUPS)
    near, w = GROUPS.decode(GROUPS.encode(x)).astype(np.float64), parse_encoding(text).decode(held).astype(np.float64)
    bound = (k // 32 + 8) * EPSILON["f32"] * (np.abs(near) @ (np.abs(w) + np.abs(w).max(axis=1, keepdims=True)).T)
    assert (np.abs(whole - op.reference(GROUPS.encode(x), held, None)) <= bound).all()
    assert (np.abs(whole - near @ w.T) <= bound).all()
    for m in ROWS:
        for exe in (one, two):
            np.testing.assert_array_equal(exe(x=x[:m])["y"], whole[:m])
            np.testing.assert_array_equal(exe(x=x[-m:])["y"], whole[-m:])


@pytest.mark.parametrize("text", ["q4_0", "q4_1", "q8_0", "q3_k"])
def test_instruction_sets_that_add_a_product_at_once_have_the_same_bits(text: str) -> None:
    held, x = drawn(text, 40, 256), normal(5, 256)
    fused = [isa for isa in HERE if ISAS[isa].fused]
    made = [compiled(linear_graph(256, 40, text), {"w": held}, isa)(x=x)["y"] for isa in fused]
    for other in made[1:]:
        np.testing.assert_array_equal(other, made[0])


@each_isa
def test_groups_of_any_scale_are_rounded_as_the_reference_rounds_them(isa: str) -> None:
    """Ties, subnormal and huge numbers, and zeros. Values that are not finite affect only their own row."""
    x = normal(20, 64)
    x[1] = 0
    x[2] *= 1e-39
    x[3] = np.arange(64) + 0.5
    x[3, [0, 40]] = 127, -127
    x[4, :32] *= 1e30
    x[5] *= 2.0**-119
    x[7, 3], x[9, 63], x[19, 0] = np.inf, np.nan, -np.inf
    exe = compiled(linear_graph(64, 33, "q8_0"), {"w": drawn("q8_0", 33, 64, whole=True)}, isa)
    got = np.asarray(exe(x=x)["y"])
    op = EncodedLinear(of=Encoding("q8_0"), rows=GROUPS)
    meant = op.reference(GROUPS.encode(x, computed=True), drawn("q8_0", 33, 64, whole=True), None)
    lost = [7, 9, 19]
    assert np.isnan(got[lost]).all()
    kept = [row for row in range(20) if row not in lost]
    most = np.maximum(np.abs(meant[kept]).max(axis=-1, keepdims=True), 1e-30)  # smaller scales are subnormal
    np.testing.assert_allclose(got[kept] / most, meant[kept] / most, rtol=0, atol=1e-6)


def test_a_scale_of_a_weight_that_is_not_finite_spoils_its_own_columns_alone() -> None:
    held = drawn("q4_1", 40, 64).copy()
    records = held.reshape(-1).view(Encoding("q4_1").block.record(32))
    records["d"][2 * 7], records["m"][2 * 9 + 1] = np.inf, np.nan
    y = np.asarray(compiled(linear_graph(64, 40, "q4_1"), {"w": held})(x=normal(3, 64))["y"])
    assert not np.isfinite(y[:, [7, 9]]).any()
    assert np.isfinite(np.delete(y, [7, 9], axis=1)).all()


# -- ops around a product --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("isa", "text"), [(isa, "q8_0") for isa in HERE] + [(HERE[0], text) for text in READ])
def test_a_table_is_held_once_and_rows_of_it_are_its_bits(isa: str, text: str) -> None:
    graph = parse_graph(f"""graph g {{
      symbols B
      parameters {{ t: f32[70, 256] as {text} }}
      main(i: i64[B], x: f32[B, 256]) -> (e: f32[B, 256], y: f32[B, 70]) {{
        t = decode($t, of={text})
        e = embedding(t, i)
        groups = encode(x, to=int8_groups(32))
        near = decode(groups, of=int8_groups(32))
        y = linear(near, t)
        return e = e, y = y
      }}
    }}""")
    held, x, i = drawn(text, 70, 256, whole=True), whole_rows(3, 256), np.array([69, 0, 33])
    exe = compiled(graph, {"t": held}, isa)
    meant, out = parse_encoding(text).decode(held), exe(i=i, x=x)
    np.testing.assert_array_equal(out["e"], meant[i])
    np.testing.assert_array_equal(out["y"], x.astype(np.int64) @ meant.astype(np.int64).T)
    (kept,) = exe.machine.weights.values()
    assert kept.shape[0] == 5  # panels of 16


def test_one_value_is_rounded_for_weights_of_several_forms() -> None:
    """A bias and a gate are applied when sums are stored. Each form has its own correction for its zero point."""
    graph = parse_graph("""graph g {
      symbols M
      parameters { a: f32[40, 64] as q4_1
        b: f32[40, 64] as q4_0
        c: f32[40, 64] as q8_0
        d: f32[64, 40] as int4_groups(32, axis=0)
        bias: f32[40] }
      main(x: f32[M, 64]) -> (y: f32[M, 40], z: f32[M, 64]) {
        groups = encode(x, to=int8_groups(32))
        near = decode(groups, of=int8_groups(32))
        a = decode($a, of=q4_1)
        b = decode($b, of=q4_0)
        c = decode($c, of=q8_0)
        d = decode($d, of=int4_groups(32, axis=0))
        p = linear(near, a, $bias)
        q = linear(near, b)
        r = linear(near, c)
        s = matmul(near, d)
        pq = mul(p, q)
        rs = mul(r, s)
        y = add(pq, rs)
        return y = y, z = near
      }
    }""")
    weights = {"a": drawn("q4_1", 40, 64), "b": drawn("q4_0", 40, 64), "c": drawn("q8_0", 40, 64), "bias": normal(40)}
    weights["d"] = np.ascontiguousarray(drawn("int4_groups(32)", 40, 64).T)
    exe, x = compiled(graph, weights), normal(7, 64)
    wanted = interpret(graph, {"x": x}, weights)
    got = exe(x=x)
    np.testing.assert_allclose(got["y"], wanted["y"], rtol=0, atol=1e-5 * np.abs(wanted["y"]).max())
    np.testing.assert_array_equal(got["z"], GROUPS.decode(GROUPS.encode(x)))
    made = titles(exe)
    assert sum("quad_block_product" in t for t in made) == 4, made
    assert sum(t.startswith("encode_groups") for t in made) == 3, made  # q4_0 and int4_groups share one


@each_isa
@pytest.mark.parametrize("text", ["q4_0", "q4_1", "q3_k", "q5_k"])
def test_a_block_multiplies_groups_with_the_bits_of_its_caller(isa: str, text: str) -> None:
    """The groups that a block receives are already encoded: their scales are read, not computed again."""
    graph = parse_graph(f"""graph g {{
      symbols M
      parameters {{ w: f32[40, 512] as {text} }}
      block h(groups: f32[M, 512] as int8_groups(32)) -> (y: f32[M, 40])
        weights w: f32[40, 512] as {text}
      {{
        y = encoded_linear(groups, $w, of={text}, rows=int8_groups(32))
        return y = y
      }}
      main(x: f32[M, 512]) -> (y: f32[M, 40], z: f32[M, 40]) {{
        groups = encode(x, to=int8_groups(32))
        y = h(groups) with {{w: $w}}
        z = encoded_linear(groups, $w, of={text}, rows=int8_groups(32))
        return y = y, z = z
      }}
    }}""")
    x = normal(21, 512)
    x[1, :32], x[2] = 0, x[2] * 1e-39
    got = find_backend("tvm").compile(graph, Target(isa), {"w": drawn(text, 40, 512)})(x=x)
    np.testing.assert_array_equal(got["y"], got["z"])


@pytest.mark.parametrize(("zero", "parts"), [(8, 1), (0, 2)])
@pytest.mark.parametrize("form", ["filled", "quads", "wide"])
def test_encoded_groups_are_copied_into_every_form(form: str, zero: int, parts: int) -> None:
    """The groups have arbitrary numbers, with scales that do not follow from the numbers."""
    m, k = 21, 96
    rows = rows_of_groups(form, Size.of(m)).evaluate({})
    q = np.random.default_rng(0).integers(-127, 128, (m, k // 32, 32), np.int8)
    scales = normal(m, k // 32, 1)
    held = np.concatenate([scales.view(np.uint8), q.view(np.uint8)], axis=-1).reshape(m, -1)
    np.testing.assert_array_equal(GROUPS.decode(held), (q * scales).reshape(m, k))
    y = np.zeros((rows, k), np.float32 if form == "wide" else np.int8)
    report = np.full((rows, k // 32, 1 + parts), 7, np.int32)
    kernel = EncodeGroups(form, zero, parts, again=True)
    bind(kernel, [held, y, report], [m, k, held.shape[1]])()
    np.testing.assert_array_equal(y[:m], q.reshape(m, k))
    np.testing.assert_array_equal(report[:m, :, :1].view(np.float32), scales)
    sums = q.reshape(m, k // 32, parts, -1).sum(axis=-1, dtype=np.int32)
    owed = -zero * sums if zero else (sums.astype(np.float32) * scales).view(np.int32)
    np.testing.assert_array_equal(report[:m, :, 1:], owed)
    assert not report[m:].any()


@pytest.mark.parametrize("text", ["q4_0", "q5_k", "q3_k", "q6_k"])
def test_groups_that_a_block_is_given_and_weights_that_are_picked(text: str) -> None:
    """Stored groups are read without a copy; a matrix that is not a weight is laid out at the call."""
    graph = parse_graph(f"""graph g {{
      symbols M, N
      parameters {{ w: f32[50, 512] as {text} }}
      block h(groups: f32[M, 512] as int8_groups(32), w: f32[N, 512] as {text}) -> (y: f32[M, N])
      {{
        y = encoded_linear(groups, w, of={text}, rows=int8_groups(32))
        return y = y
      }}
      main(x: f32[M, 512], i: i64[N]) -> (y: f32[M, N]) {{
        groups = encode(x, to=int8_groups(32))
        picked = gather($w, i)
        y = h(groups, picked)
        return y = y
      }}
    }}""")
    held, x, i = drawn(text, 50, 512, whole=True), whole_rows(9, 512), np.arange(49, 3, -3)
    exe = compiled(graph, {"w": held})
    wanted = x.astype(np.int64) @ Encoding(text).decode(held)[i].astype(np.int64).T
    np.testing.assert_array_equal(exe(x=x, i=i)["y"], wanted)


def test_blocks_hold_scales_and_then_four_neighbours_side_by_side() -> None:
    held = np.random.default_rng(0).integers(0, 256, (40, 3 * 20), np.uint8)
    made = pack(held, blocks(16, 20, 4))
    assert made.shape == (3, 60 * 16)
    for n, byte in ((0, 0), (17, 21), (39, 3), (39, 59), (8, 24), (15, 47)):
        block, inside = divmod(byte, 20)
        at = block * 20 * 16 + (inside // 2 * 32 + n % 16 * 2 + inside % 2 if inside < 4 else 0)
        at += 4 * 16 + (inside - 4) // 4 * 64 + n % 16 * 4 + (inside - 4) % 4 if inside >= 4 else 0
        assert made[n // 16, at] == held[n, byte]
    assert not made[2].reshape(3, 20 * 16)[:, 2 * 8 : 2 * 16].any()


def test_words_lie_in_the_order_of_a_layout_and_scales_first() -> None:
    held = np.random.default_rng(0).integers(0, 256, (16, 2 * 14), np.uint8)
    made = pack(held, blocks(16, 14, 2, ((2, 3), (0, 2)), tail=True)).reshape(2, 14 * 16)
    for block in range(2):
        rows = held[:, 14 * block : 14 * block + 14]
        np.testing.assert_array_equal(made[block, : 2 * 16].reshape(16, 2), rows[:, 12:])
        for place, word in enumerate((2, 0, 1)):
            at = 2 * 16 + 64 * place
            np.testing.assert_array_equal(made[block, at : at + 64].reshape(16, 4), rows[:, 4 * word : 4 * word + 4])


@pytest.mark.parametrize(
    ("isa", "word"),
    [("x86-64-amx", "vpdpbusd"), ("x86-64-v4-bf16", "vpdpbusd"), ("x86-64-v4", "vfmadd"), ("x86-64-v3", "vfmadd")],
)
def test_each_instruction_set_has_its_instructions_and_keeps_sums_in_registers(isa: str, word: str) -> None:
    form = word_form(Encoding("q4_1"))
    assert form is not None
    text = assembly(QuadBlockProduct(form), ISAS[isa])
    assert word in text
    assert ("tdpbssd" in text) == ISAS[isa].multiplies_tiles
    if isa == "x86-64-v4-bf16":
        last = 11  # a tile of 12 rows for the last 9 to 11; the row after them repeats the 11th
        assert text.count("vpdpbusd") == 8 * (12 + sum(HEIGHTS) + last)


TILED = ("q4_1", "q8_0", "int4_groups(64)", "q5_k")
"""Forms with a minimum, with bytes, with groups of 64, and with blocks of blocks."""


@pytest.mark.skipif("x86-64-v4-bf16" not in HERE, reason="no VNNI here, whose bits are compared")
def test_tiles_have_the_bits_of_instructions_that_multiply_fours() -> None:
    """Tiles are in memory here, so this tests the kernel's use of tiles, in more than one chunk of k.

    The test runs in a separate process, with the single thread that these tiles support. (In a process that had run
    thousands of kernels, one run of ten had NaN in an operand, for an unknown reason.)
    """
    command = [
        sys.executable,
        "-c",
        "from tests.test_tvm_group_products import tiles_beside_fours; tiles_beside_fours()",
    ]
    own = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=own, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == list(TILED)


def tiles_beside_fours() -> None:
    """Run the test above, in a child process."""
    tvm_runtime.set_threads(1)
    cache = KernelCache(stand_in(pytest.MonkeyPatch()))
    for text in TILED:
        k, n, form = 256 * 17 if text in LARGE else 128 * 17, 40, word_form(parse_encoding(text))
        assert form is not None
        kernel, zero = QuadBlockProduct(form), form.zero
        w = pack(drawn(text, n, k), form.layout)
        for m in (16, 45) if text == "q4_1" else (33,):
            x, made = normal(m, k), []
            for where in (cache, KernelCache(ISAS["x86-64-v4-bf16"])):
                rows = -(-m // 16) * 16
                a, report, c = (
                    np.zeros((rows, k), np.uint8),
                    np.full((rows, k // 32, 2), 7, np.int32),
                    np.zeros((m, n), np.float32),
                )
                bind(EncodeGroups(form_of_groups(where.isa), zero), [x, a, report], [m, k, k], cache=where)()
                bind(kernel, [a, w, report, c], [m, k, n, n], cache=where)()
                assert (report[m:] == (0 if where is cache else 7)).all()
                made.append(c)
            np.testing.assert_array_equal(*made)
        print(text)


# -- models ----------------------------------------------------------------------------------------------------------


def test_a_model_in_blocks_multiplies_whole_numbers() -> None:
    model = llama.configure(vocab=96, dim=64, heads=4, kv_heads=2, layers=2, hidden=128, tied=True).graph()
    forms = {n: Encoding("q4_1") for n, v in model.parameters.items() if v.type.rank == 2}
    graph = encode_parameters(model, forms | {"embed.weight": Encoding("q8_0")})
    rng = np.random.default_rng(0)
    weights: dict[str, Any] = {}
    for name, value in graph.parameters.items():
        shape, encoding = value.type.static_shape or (), value.type.encoding
        weights[name] = normal(*shape) if encoding is None else encoding.sample(rng, shape)
    tokens = np.arange(10).reshape(2, 5)
    exe = treadle.compile(graph, backend="tvm", weights=weights, quantize="int8")
    assert " = block_product" not in exe.source
    assert exe.source.count(" = quad_block_product") >= 3
    plain = treadle.compile(graph, backend="numpy", weights=weights, quantize="int8")
    a, b = (np.asarray(each(tokens=tokens)["logits"], np.float64) for each in (exe, plain))
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-2 * np.abs(b).max())  # an activation may round to the next step
    session = exe.session(rows=1, capacity=8)
    row = session.open()
    np.testing.assert_array_equal(session.prefill({row: [0, 1, 2]})[row], exe(tokens=[[0, 1, 2]])["logits"][0, -1])

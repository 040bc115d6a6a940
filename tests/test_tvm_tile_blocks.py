"""Weights in blocks that bf16 products unpack into tiles of the matrix unit: forms, sizes, bits, printed notes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import treadle
from tests.op_checks import EPSILON, Array
from tests.test_tvm_block_products import blocks_of, compiled, linear_graph, matmul_graph, normal, titles
from treadle.backends.bfloat16 import rounded, widened
from treadle.backends.tvm.kernels.isa import ISAS, runs_here
from treadle.ir.encodings.encoding import parse_encoding
from treadle.ir.graph import Graph
from treadle.ir.interpreter import interpret
from treadle.ir.ops.blocks import Decode
from treadle.ir.target import Target
from treadle.ir.text.parser import parse_graph
from treadle.ir.types import bf16
from treadle.models.llama import llama
from treadle.passes.framework.facts import INITIAL, LEGAL
from treadle.passes.framework.manager import PassManager
from treadle.passes.lowering.decode_last import DecodeNarrow
from treadle.passes.products.narrow_products import NarrowProducts

pytest.importorskip("tvm")

AMX = "x86-64-amx"
needs_tiles = pytest.mark.skipif(not runs_here(ISAS[AMX]), reason="no matrix unit here")
READ = ("int8_rows", "int4_groups(32)", "q8_0", "q4_0", "q4_1", "uint4_groups(32)", "int8_groups(32)")
SIZES = [(32, 1), (64, 65), (320, 33), (1536, 17)]
ROWS = (1, 2, 15, 16, 17, 33, 64, 100, 129, 256, 257, 300)


def narrowed(graph: Graph) -> Graph:
    return PassManager((NarrowProducts(),)).run(graph).graph


def near(x: Array) -> Array:
    return widened(rounded(x)).astype(np.float64)


@pytest.mark.parametrize(
    ("text", "of"),
    [
        ("int8_rows", "8_bits"),
        ("int4_groups(32)", "4_bits_by_32"),
        ("q8_0", "8_bits_by_32"),
        ("q4_0", "4_bits_by_32"),
        ("q4_1", "4_bits_by_32_with_least"),
        ("uint4_groups(32)", "4_bits_by_32_with_zero"),
        ("int8_groups(32)", "8_bits_by_32_wide"),
    ],
)
def test_which_kernels_a_matrix_unit_has_for_blocks(text: str, of: str) -> None:
    graph = narrowed(linear_graph(64, 65, text))
    made = titles(compiled(graph, {"w": blocks_of(graph, "w", 64)}, AMX))
    assert made == ["round_rows_tiles", f"tile_product_of_{of}"]


@needs_tiles
@pytest.mark.parametrize("text", READ)
def test_sums_of_every_size(text: str) -> None:
    """Sums are of weights that are decoded and rounded to bf16.

    The kernel rounds d q + c once. If it is near the middle between two bf16 numbers, it may be rounded to the other
    one.
    """
    for k, n in SIZES:
        for graph in (linear_graph(k, n, text), matmul_graph(k, n, text)):
            held, encoding = blocks_of(graph, "w", k), graph.parameters["w"].type.encoding
            assert encoding is not None
            w = encoding.decode(held).T if encoding.axis == 0 else encoding.decode(held)
            exe = compiled(narrowed(graph), {"w": held}, AMX)
            assert titles(exe)[0] == "round_rows_tiles"
            assert f"tile_product{'_relu' * (encoding.axis == 0)}_of_" in titles(exe)[1]
            for m in (1, 20, 70):
                x = normal(m, k, seed=n)
                wide = near(x) @ near(w).T
                wide = np.maximum(wide, 0) if encoding.axis == 0 else wide
                bound = (EPSILON["f32"] * (k + 16) + 2.0**-8 / 8) * (np.abs(near(x)) @ np.abs(near(w)).T)
                assert (np.abs(np.asarray(exe(x=x)["y"], np.float64) - wide) <= bound).all()


@needs_tiles
@pytest.mark.parametrize("text", READ)
def test_bits_of_a_row_are_its_own(text: str) -> None:
    """The numbers of rows range from one row to several groups of eight blocks. Other rows, and the number of threads
    (one or two), do not change a row's bits.
    """
    graph = narrowed(linear_graph(352, 100, text, bias=True))
    weights = {"w": blocks_of(graph, "w"), "bias": normal(100)}
    x = normal(max(ROWS), 352)
    one, two = (compiled(graph, weights, Target("cpu", threads)) for threads in (1, 2))
    whole = np.asarray(one(x=x)["y"])
    for m in ROWS:
        for exe in (one, two):
            np.testing.assert_array_equal(exe(x=x[-m:])["y"], whole[-m:], f"{m} rows")


def notes_of(exe: treadle.Compiled) -> list[str]:
    return [note for record in exe.log for note in record.notes]


def run(quantize: str, target: str, **options: Any) -> Array:
    model = llama.configure(vocab=96, dim=64, heads=4, kv_heads=2, layers=2, hidden=128, tied=True)
    exe = treadle.compile(model, backend="tvm", target=target, quantize=quantize, seed=1, **options)
    return np.asarray(exe(tokens=np.arange(22).reshape(2, 11))["logits"])


def assert_near_and_in_blocks(quantize: str, target: str) -> None:
    """Assert that a model in bf16 is close to the float32 model, and stores its matrices only in blocks."""
    wide, narrow = run(quantize, target), run(quantize, target, dtype="bf16")
    assert 0 < np.abs(wide - narrow).max() < 0.03 * np.abs(wide).max()
    model = llama.configure(vocab=96, dim=64, heads=4, kv_heads=2, layers=2, hidden=128, tied=True)
    exe = treadle.compile(model, backend="tvm", target=target, quantize=quantize, dtype="bf16", seed=1)
    assert not [n for n in notes_of(exe) if "is decoded once" in n or "is not read in blocks" in n]
    matrices = [a for a in exe.executable.machine.weights.values() if a.ndim > 1]
    assert {a.dtype for a in matrices} == {np.dtype(np.uint8)}
    assert len(matrices) == 1 + 2 * 5, "the table, with logits, is there once"


@needs_tiles
@pytest.mark.parametrize("quantize", ["int8-weights", "int4"])
def test_a_model_is_near_to_that_in_float32_and_holds_blocks_alone(quantize: str) -> None:
    assert_near_and_in_blocks(quantize, AMX)


def test_other_instruction_sets_decode_once_and_say_so() -> None:
    model = llama.configure(vocab=96, dim=64, heads=4, kv_heads=2, layers=1, hidden=128)
    exe = treadle.compile(model, backend="tvm", target="x86-64-v3", quantize="int4", dtype="bf16", seed=1)
    assert [n for n in notes_of(exe) if "no kernel reads int4_groups(32) blocks as bf16 numbers" in n]
    assert "block_product" not in exe.source


def test_a_line_that_fills_no_tile_is_decoded_once() -> None:
    exe = compiled(narrowed(linear_graph(40, 9, "int8_rows")), {"w": blocks_of(linear_graph(40, 9, "int8_rows"), "w")})
    x = normal(3, 40)
    w = parse_encoding("int8_rows").decode(blocks_of(linear_graph(40, 9, "int8_rows"), "w"))
    np.testing.assert_allclose(exe(x=x)["y"], near(x) @ near(w).T, rtol=0, atol=1e-5 * np.abs(w).sum(-1).max())


# -- decoding to less ----------------------------------------------------------------------------------------------


def test_a_cast_of_what_is_decoded_is_decoded_so() -> None:
    graph = narrowed(linear_graph(64, 9, "q4_1"))
    after = PassManager((DecodeNarrow(),)).run(graph, facts=INITIAL | {LEGAL}).graph
    (decode,) = [n for n in after.main.nodes if n.op.decodes]
    assert decode.op == Decode(of=parse_encoding("q4_1"), to=bf16)
    assert str(parse_graph(str(after))) == str(after)
    held, x = {"w": blocks_of(graph, "w")}, normal(3, 64)
    for a, b in zip(interpret(graph, {"x": x}, held).values(), interpret(after, {"x": x}, held).values(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_cast_of_numbers_or_of_what_is_computed_stays() -> None:
    graph = parse_graph("""graph g {
      symbols M
      parameters { w: f32[9, 64] }
      main(x: f32[M, 64]) -> (y: bf16[9, 64], z: bf16[M, 64]) {
        a = cast($w, to=bf16)
        rows = encode(x, to=int8_rows)
        near = decode(rows, of=int8_rows)
        b = cast(near, to=bf16)
        return y = a, z = b
      }
    }""")
    assert str(PassManager((DecodeNarrow(),)).run(graph, facts=INITIAL | {LEGAL}).graph) == str(graph)

"""Weights in blocks that bf16 products unpack into pairs, on CPUs without a matrix unit: forms, rows, bits, notes."""

from __future__ import annotations

import numpy as np
import pytest

import treadle
from tests.op_checks import Array
from tests.test_tvm_block_products import blocks_of, compiled, linear_graph, matmul_graph, normal, titles
from tests.test_tvm_tile_blocks import assert_near_and_in_blocks, narrowed, near, notes_of
from treadle.backends.tvm.executable import KernelExecutable
from treadle.backends.tvm.kernels.isa import ISAS, runs_here
from treadle.ir.encodings.encoding import Encoding, parse_encoding
from treadle.ir.graph import Graph
from treadle.ir.target import Target
from treadle.ir.text.parser import parse_graph
from treadle.ir.transforms.encoded_weights import encode_parameters
from treadle.models.llama import llama

pytest.importorskip("tvm")

PAIRS = "x86-64-v4-bf16"
needs_pairs = pytest.mark.skipif(not runs_here(ISAS[PAIRS]), reason="no products of bf16 pairs here")
BYTES = (
    "int8_rows", "int4_groups(16)", "int4_groups(32)", "int4_groups(64)", "q8_0", "q4_0", "q4_1", "uint4_groups(32)",
    "uint4_groups(64)", "e4m3_groups(32)", "nf4_groups(64)",
)  # fmt: skip
WORDS = ("q5_0", "q5_1", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k")
ROWS = (1, 2, 3, 5, 8, 9, 15, 128, 129, 261)


def plain_graph(k: int, n: int) -> Graph:
    """Return the product of `linear_graph`, with an unquantized weight."""
    return parse_graph(f"""graph g {{
      symbols M
      parameters {{ w: f32[{n}, {k}] }}
      main(x: f32[M, {k}]) -> (y: f32[M, {n}]) {{
        y = linear(x, $w)
        return y = y
      }}
    }}""")


def finished_graph(k: int, n: int, text: str | None = None) -> Graph:
    """Return a product with a bias, an activation and an added value; the weight is in blocks or unquantized."""
    held, weight = (f" as {text}", f"decode($w, of={text})") if text else ("", "cast($w, to=f32)")
    return parse_graph(f"""graph g {{
      symbols M
      parameters {{ w: f32[{n}, {k}]{held}
        bias: f32[{n}] }}
      main(x: f32[M, {k}], r: f32[M, {n}]) -> (y: f32[M, {n}]) {{
        w = {weight}
        a = linear(x, w, $bias)
        b = relu(a)
        c = add(b, r)
        return y = c
      }}
    }}""")


def assert_bits(exe: KernelExecutable, like: KernelExecutable, **given: Array) -> None:
    """Compare the bits of the last rows for every number of rows: with weights unpacked in registers and in memory, and
    for partial rows.
    """
    assert "_of_" in titles(exe)[-1] and "_of_" not in titles(like)[-1]
    wanted = np.asarray(like(**given)["y"])
    assert np.isfinite(wanted).all()
    for m in ROWS:
        got = exe(**{name: x[-m:] for name, x in given.items()})["y"]
        np.testing.assert_array_equal(got, wanted[-m:], f"{m} rows")


@pytest.mark.parametrize(
    ("text", "of"),
    [
        ("int8_rows", "8_bits"),
        ("int4_groups(64)", "4_bits_by_64"),
        ("q4_1", "4_bits_by_32_with_least"),
        ("q5_0", "5_bits_by_32"),
        ("q4_k", "q4_k"),
    ],
)
def test_which_kernels_read_blocks_as_pairs(text: str, of: str) -> None:
    """The plan includes the memory into which a panel is unpacked: one panel of 48 columns for each thread."""
    graph = narrowed(linear_graph(256, 65, text))
    exe = compiled(graph, {"w": blocks_of(graph, "w", 64)}, Target(PAIRS, threads=2))
    assert titles(exe) == ["round_rows_pairs", f"pair_product_of_{of}"]
    (unpacked,) = [life.storage for life in exe.program.main.lives if life.storage.name == "unpacked"]
    assert unpacked.elements.constant == 2 * 256 * 48


@needs_pairs
@pytest.mark.parametrize("text", [*BYTES, *WORDS])
def test_bits_are_those_of_a_weight_in_pairs(text: str) -> None:
    for k, n in ((512, 100), (256, 1)) if text.endswith("_k") else ((320, 100), (64, 1)):
        graph = narrowed(linear_graph(k, n, text))
        held = blocks_of(graph, "w")
        pairs = compiled(narrowed(plain_graph(k, n)), {"w": parse_encoding(text).decode(held)}, PAIRS)
        for threads in (1, 2):
            assert_bits(compiled(graph, {"w": held}, Target(PAIRS, threads)), pairs, x=normal(max(ROWS), k))


@needs_pairs
@pytest.mark.parametrize("text", ["q4_1", "q4_k"])
def test_a_bias_an_activation_and_what_is_added_go_with_it(text: str) -> None:
    graph = narrowed(finished_graph(256, 100, text))
    held, bias = blocks_of(graph, "w"), normal(100)
    weight = parse_encoding(text).decode(held)
    pairs = compiled(narrowed(finished_graph(256, 100)), {"w": weight, "bias": bias}, PAIRS)
    exe = compiled(graph, {"w": held, "bias": bias}, PAIRS)
    assert len(titles(exe)) == 2
    assert_bits(exe, pairs, x=normal(max(ROWS), 256), r=normal(max(ROWS), 100, seed=1))


@needs_pairs
@pytest.mark.parametrize("text", ["int8_rows", "q4_1"])
def test_columns_of_a_matmul_lie_in_blocks_too(text: str) -> None:
    graph = narrowed(matmul_graph(96, 50, text))
    held, encoding = blocks_of(graph, "w"), graph.parameters["w"].type.encoding
    assert encoding is not None
    exe = compiled(graph, {"w": held}, PAIRS)
    assert titles(exe)[-1].startswith("pair_product_relu_of_")
    for m in (1, 30):
        x, w = normal(m, 96), encoding.decode(held)
        bound = 1e-6 * (np.abs(near(x)) @ np.abs(near(w)))
        assert (np.abs(exe(x=x)["y"] - np.maximum(near(x) @ near(w), 0)) <= bound).all()


@needs_pairs
@pytest.mark.parametrize("text", ["int8_rows", "q4_1", "q5_0"])
def test_a_table_is_held_once_and_rows_of_it_are_its_bits(text: str) -> None:
    graph = narrowed(
        parse_graph(f"""graph g {{
          symbols S
          parameters {{ t: f32[70, 64] as {text} }}
          main(i: i64[S]) -> (e: f32[S, 64], y: f32[S, 70]) {{
            t = decode($t, of={text})
            e = embedding(t, i)
            y = linear(e, t)
            return e = e, y = y
          }}
        }}""")
    )
    held = blocks_of(graph, "t")
    meant, exe = parse_encoding(text).decode(held), compiled(graph, {"t": held}, PAIRS)
    assert len(exe.machine.weights) == 1
    indices = np.array([69, 0, 33, 5, 5, 48])
    out = exe(i=indices)
    np.testing.assert_array_equal(out["e"], meant[indices])
    bound = 1e-6 * (np.abs(near(meant[indices])) @ np.abs(near(meant)).T)
    assert (np.abs(out["y"] - near(meant[indices]) @ near(meant).T) <= bound).all()


@needs_pairs
def test_a_scale_that_is_not_finite_spoils_its_own_columns_alone() -> None:
    graph = narrowed(linear_graph(64, 70, "q4_0"))
    held = blocks_of(graph, "w").copy()
    blocks = held.reshape(-1).view(Encoding("q4_0").block.record(32))
    blocks["d"][2 * 7], blocks["d"][2 * 50 + 1] = np.inf, np.nan
    exe = compiled(graph, {"w": held}, PAIRS)
    for m in (2, 20):
        y = np.asarray(exe(x=normal(m, 64))["y"])
        assert not np.isfinite(y[:, [7, 50]]).any()
        assert np.isfinite(np.delete(y, [7, 50], axis=1)).all()


@needs_pairs
def test_no_row_at_all() -> None:
    graph = narrowed(
        parse_graph("""graph g {
          symbols M
          parameters { w: f32[70, 64] as q4_0 }
          main(x: f32[M, 64]) -> (y: f32[M - 1, 70]) {
            w = decode($w, of=q4_0)
            z = slice(x, axis=0, start=1)
            y = linear(z, w)
            return y = y
          }
        }""")
    )
    exe, x = compiled(graph, {"w": blocks_of(graph, "w")}, PAIRS), normal(12, 64)
    whole = np.asarray(exe(x=x)["y"])
    for m in (1, 2, 11):
        np.testing.assert_array_equal(exe(x=x[:m])["y"], whole[: m - 1])


# -- models ------------------------------------------------------------------------------------------------------------


@needs_pairs
@pytest.mark.parametrize("quantize", ["int8-weights", "int4"])
def test_a_model_is_near_to_that_in_float32_and_holds_blocks_alone(quantize: str) -> None:
    assert_near_and_in_blocks(quantize, PAIRS)


@needs_pairs
def test_the_mix_of_forms_that_files_hold_stays_in_blocks() -> None:
    """K-quants, and other forms if rows are not a multiple of a K-quant block. The bits of a row depend only on that
    row.
    """
    model = llama.configure(vocab=300, dim=256, heads=4, kv_heads=2, layers=1, hidden=512, tied=True).graph()
    forms = {n: Encoding("q4_k") for n, v in model.parameters.items() if v.type.rank == 2}
    graph = encode_parameters(model, forms | {"layer.0.attn.v.weight": Encoding("q5_0")})
    weights = {
        n: blocks_of(graph, n) if v.type.encoding is not None else normal(*(v.type.static_shape or ()))
        for n, v in graph.parameters.items()
    }
    exe = treadle.compile(graph, backend="tvm", target=PAIRS, weights=weights, dtype="bf16")
    assert not [n for n in notes_of(exe) if "decoded once" in n or "not read in blocks" in n]
    held = sum(array.nbytes for array in exe.executable.machine.weights.values())
    assert held < 1.02 * sum(w.nbytes for w in weights.values()) + 16 * 2 * 144  # the last panel is padded
    plain = treadle.compile(graph, backend="numpy", weights=weights)
    tokens = np.arange(22).reshape(2, 11)
    a, b = (np.asarray(each(tokens=tokens)["logits"], np.float64) for each in (exe, plain))
    np.testing.assert_allclose(a, b, rtol=0, atol=0.03 * np.abs(b).max())
    np.testing.assert_array_equal(
        exe(tokens=tokens[1:, :3])["logits"], np.asarray(exe(tokens=tokens)["logits"])[1:, :3]
    )

"""Products and lookups with weights in blocks on the TVM backend: block forms, sizes, rows, instruction sets, bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import treadle
from tests.op_checks import EPSILON, Array
from treadle.backends.registry import find_backend
from treadle.backends.tvm.executable import KernelExecutable
from treadle.backends.tvm.kernels.isa import ISAS, runs_here
from treadle.ir.encodings.encoding import Encoding, parse_encoding
from treadle.ir.errors import BackendError
from treadle.ir.graph import Graph
from treadle.ir.target import Target
from treadle.ir.text.parser import parse_graph
from treadle.ir.transforms.encoded_weights import encode_parameters
from treadle.models.llama import llama

pytest.importorskip("tvm")

HERE = [
    name for name in ("x86-64-amx", "x86-64-v4-bf16", "x86-64-v4", "x86-64-v3", "x86-64-v2") if runs_here(ISAS[name])
]
READ = (
    "int8_rows", "int4_groups(32)", "int4_groups(64)", "q8_0", "q4_0", "q4_1", "uint4_groups(64)",
    "int8_groups(64)",
)  # fmt: skip
CODED = (
    "e4m3_groups(64)", "nf4_groups(64)", "e2m1_groups(32)", "mxfp4", "uint4_wide_groups(32)", "int8_zero_groups(64)",
)  # fmt: skip
WORDS = ("q5_0", "q5_1", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k")  # only linears read these, word by word
SIZES = [(32, 1), (32, 31), (64, 65), (128, 96), (320, 33), (1536, 17)]
ROWS = (1, 2, 3, 6, 7, 8, 11, 12, 13, 24, 61)


def linear_graph(k: int, n: int, text: str, bias: bool = False) -> Graph:
    vector = f"bias: f32[{n}]" if bias else ""
    given = ", $bias" if bias else ""
    return parse_graph(f"""graph g {{
      symbols M
      parameters {{ w: f32[{n}, {k}] as {text}
        {vector} }}
      main(x: f32[M, {k}]) -> (y: f32[M, {n}]) {{
        w = decode($w, of={text})
        y = linear(x, w{given})
        return y = y
      }}
    }}""")


def matmul_graph(k: int, n: int, text: str) -> Graph:
    encoding = parse_encoding(text).along(0)
    return parse_graph(f"""graph g {{
      symbols M
      parameters {{ w: f32[{k}, {n}] as {encoding} }}
      main(x: f32[M, {k}]) -> (y: f32[M, {n}]) {{
        w = decode($w, of={encoding})
        y = matmul(x, w)
        z = relu(y)
        return y = z
      }}
    }}""")


def blocks_of(graph: Graph, name: str, seed: int = 0) -> Array:
    type = graph.parameters[name].type
    assert type.encoding is not None
    return type.encoding.sample(np.random.default_rng(seed), type.static_shape or ())


def compiled(graph: Graph, weights: dict[str, Array], target: str | Target = "cpu") -> KernelExecutable:
    where = target if isinstance(target, Target) else Target(target)
    made = find_backend("tvm").compile(graph, where, weights)
    assert isinstance(made, KernelExecutable)
    return made


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def assert_sums(got: Any, x: Array, w: Array, *, cut: bool = False) -> None:
    """Assert x w^T, with negative results set to 0 if `cut`, up to the rounding of a sum in any order."""
    wide = x.astype(np.float64) @ w.astype(np.float64).T
    wide = np.maximum(wide, 0) if cut else wide
    bound = (x.shape[-1] + 16) * EPSILON["f32"] * (np.abs(x).astype(np.float64) @ np.abs(w).astype(np.float64).T)
    assert (np.abs(np.asarray(got, np.float64) - wide) <= bound).all()


def titles(exe: KernelExecutable) -> list[str]:
    return [s.kernel.title for s in exe.program.main.steps]  # type: ignore[union-attr]


EACH = [(text, isa) for text in READ for isa in HERE]
EACH += [(text, HERE[0]) for text in (*WORDS, *CODED)]
EACH += [(text, isa) for text in ("q5_0", "q6_k") for isa in HERE[1:] if isa.endswith(("v4", "v3"))]
EACH += [("nf4_groups(64)", isa) for isa in HERE[1:] if isa.endswith(("v3", "v2"))]


@pytest.mark.parametrize(("text", "isa"), EACH)
def test_products_of_every_size(text: str, isa: str) -> None:
    sizes = [(256, 1), (512, 31), (1536, 17)] if text.endswith("_k") else SIZES
    for k, n in sizes if isa == HERE[0] and text not in CODED else sizes[1:2] if text in WORDS else sizes[2:4]:
        if k % parse_encoding(text).elements(k):
            continue
        for graph in (linear_graph(k, n, text), *([] if text in WORDS else [matmul_graph(k, n, text)])):
            held = blocks_of(graph, "w", k)
            encoding = graph.parameters["w"].type.encoding
            assert encoding is not None
            meant = encoding.decode(held)
            exe = compiled(graph, {"w": held}, isa)
            transposed = encoding.axis == 0
            assert [t.removeprefix("wide_").startswith("block_product") for t in titles(exe)] == [True]
            for m in (1, 7, 24):
                x = normal(m, k, seed=n)
                assert_sums(exe(x=x)["y"], x, meant.T if transposed else meant, cut=transposed)


@pytest.mark.parametrize("text", [*READ, *WORDS])
def test_bits_of_a_row_are_its_own(text: str) -> None:
    """Whatever the other rows are, for any number of rows, and for any number of threads that share them."""
    k = 512 if text.endswith("_k") else 192
    graph = linear_graph(k, 100, text, bias=True)
    weights = {"w": blocks_of(graph, "w"), "bias": normal(100)}
    x = normal(max(ROWS), k)
    one, two = (compiled(graph, weights, Target("cpu", threads)) for threads in (1, 2))
    whole = np.asarray(one(x=x)["y"])
    for m in ROWS:
        for exe in (one, two):
            np.testing.assert_array_equal(exe(x=x[:m])["y"], whole[:m])
            np.testing.assert_array_equal(exe(x=x[-m:])["y"], whole[-m:])


def test_the_smallest_powers_of_mxfp4_are_subnormal() -> None:
    graph = linear_graph(32, 40, "mxfp4")
    held = blocks_of(graph, "w").copy()
    held.reshape(-1).view(Encoding("mxfp4").block.record(32))["e"] = np.arange(40) // 10
    meant = Encoding("mxfp4").decode(held)
    y = np.asarray(compiled(graph, {"w": held})(x=np.full((1, 32), 2.0**100, np.float32))["y"])
    np.testing.assert_allclose(y[0], meant.astype(np.float64).sum(axis=1) * 2.0**100, rtol=1e-5)


def test_a_scale_that_is_not_finite_spoils_its_own_columns_alone() -> None:
    graph = linear_graph(64, 40, "q4_1")
    held = blocks_of(graph, "w").copy()
    record = Encoding("q4_1").block.record(32)
    blocks = held.reshape(-1).view(record)
    blocks["d"][2 * 7] = np.inf
    blocks["m"][2 * 9 + 1] = np.nan
    blocks["d"][2 * 11] = blocks["m"][2 * 11] = 0
    y = np.asarray(compiled(graph, {"w": held})(x=normal(3, 64))["y"])
    assert not np.isfinite(y[:, [7, 9]]).any()
    assert np.isfinite(np.delete(y, [7, 9], axis=1)).all()


@pytest.mark.parametrize(("text", "isa"), EACH)
def test_a_table_is_held_once_and_rows_of_it_are_its_bits(text: str, isa: str) -> None:
    k = 512 if text.endswith("_k") else 64
    graph = parse_graph(f"""graph g {{
      symbols B, S
      parameters {{ t: f32[70, {k}] as {text} }}
      main(i: i64[B, S]) -> (e: f32[B, S, {k}], y: f32[B, S, 70]) {{
        t = decode($t, of={text})
        e = embedding(t, i)
        y = linear(e, t)
        return e = e, y = y
      }}
    }}""")
    held = blocks_of(graph, "t")
    meant = parse_encoding(text).decode(held)
    exe = compiled(graph, {"t": held}, isa)
    lowered = treadle.compile(graph, backend="tvm", weights={"t": held}, target=isa).optimized.lowered
    assert lowered is not None
    assert [v.type for v in lowered.graph.derived_weights.values()] == [graph.parameters["t"].type]
    indices = np.array([[69, 0, 33], [5, 5, 48]])
    out = exe(i=indices)
    np.testing.assert_array_equal(out["e"], meant[indices])
    assert_sums(out["y"], meant[indices], meant)
    with pytest.raises(BackendError, match="70"):
        exe(i=np.array([[70]]))


def test_blocks_without_a_kernel_are_decoded_once_with_a_note() -> None:
    graph = encode_parameters(
        llama.configure(vocab=96, dim=64, heads=4, layers=1, hidden=128, tied=True).graph(),
        {"layer.0.attn.out.weight": Encoding("uint8_rows"), "layer.0.mlp.down.weight": Encoding("q8_0")},
    )
    weights = {
        n: blocks_of(graph, n) if v.type.encoding is not None else normal(*(v.type.static_shape or ()))
        for n, v in graph.parameters.items()
    }
    exe = treadle.compile(graph, backend="tvm", weights=weights)
    notes = {record.name: record.notes for record in exe.log}
    (report,) = [n for n in notes["read-blocks"] if "is not read in blocks" in n]
    assert report.startswith("attn.out.weight is not read in blocks: no kernel reads uint8_rows, models/llama.py:")
    (read,) = [n for n in notes["read-blocks"] if " is read in q8_0 blocks, panels(" in n]
    assert read.startswith("mlp.down.weight")
    (once,) = [n for n in notes["hoist-weights"] if "is decoded once" in n]
    assert once.startswith("attn.out.weight is decoded once: linear cannot read uint8_rows blocks")
    assert exe.source.count(" = block_product_8_bits_by_32") == 1


@pytest.mark.parametrize("rounds", [False, True])
def test_the_mix_of_forms_that_files_hold_stays_in_blocks(rounds: bool) -> None:
    """Forms as llama.cpp mixes them: no weight is widened, a table in q6_k is stored once, and activations may be
    rounded.
    """
    model = llama.configure(vocab=300, dim=256, heads=4, kv_heads=2, layers=2, hidden=512, tied=True).graph()
    forms = {n: Encoding("q4_k") for n, v in model.parameters.items() if v.type.rank == 2}
    forms |= {"embed.weight": Encoding("q6_k"), "layer.1.attn.v.weight": Encoding("q5_0")}
    graph = encode_parameters(model, forms)
    weights = {
        n: blocks_of(graph, n) if v.type.encoding is not None else normal(*(v.type.static_shape or ()))
        for n, v in graph.parameters.items()
    }
    exe = treadle.compile(graph, backend="tvm", weights=weights, **({"quantize": "int8"} if rounds else {}))
    assert "matmul" not in exe.source
    notes = [n for record in exe.log for n in record.notes]
    assert not [n for n in notes if "decoded once" in n or "not read in blocks" in n]
    held = sum(array.nbytes for array in exe.executable.machine.weights.values())  # type: ignore[attr-defined]
    assert held < 1.02 * sum(w.nbytes for w in weights.values()) + 16 * 2 * 210  # the last panel is padded
    plain = treadle.compile(graph, backend="numpy", weights=weights, **({"quantize": "int8"} if rounds else {}))
    tokens = np.arange(10).reshape(2, 5)
    a, b = (np.asarray(each(tokens=tokens)["logits"], np.float64) for each in (exe, plain))
    np.testing.assert_allclose(a, b, rtol=0, atol=(2e-2 if rounds else 1e-5) * np.abs(b).max())


@pytest.mark.parametrize("scheme", ["int8-weights", "int4"])
def test_a_quantized_model_runs_on_blocks(scheme: str) -> None:
    model = llama.configure(vocab=96, dim=64, heads=4, kv_heads=2, layers=2, hidden=128, tied=True)
    exe = treadle.compile(model, backend="tvm", quantize=scheme, seed=1)
    assert "matmul" not in exe.source
    plain = treadle.compile(model, backend="numpy", quantize=scheme, seed=1)
    tokens = np.arange(10).reshape(2, 5)
    a, b = (np.asarray(each(tokens=tokens)["logits"]) for each in (exe, plain))
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())
    session = exe.session(rows=1, capacity=8)
    row = session.open()
    np.testing.assert_array_equal(session.prefill({row: [0, 1, 2]})[row], exe(tokens=[[0, 1, 2]])["logits"][0, -1])


def test_rows_at_several_distances() -> None:
    """Dimensions that strides cannot join become a batch, or are copied, with the same bits as contiguous rows."""
    graph = parse_graph("""graph g {
      symbols A, B
      parameters { w: f32[40, 64] as q4_0 }
      main(x: f32[A, B, 64]) -> (y: f32[B, A, 40], z: f32[A, B, 40], v: f32[40]) {
        w = decode($w, of=q4_0)
        turned = rearrange(x, pattern="a b k -> b a k")
        y = linear(turned, w)
        z = linear(x, w)
        one = slice(x, axis=0, start=0, stop=1)
        two = slice(one, axis=1, start=0, stop=1)
        row = rearrange(two, pattern="1 1 k -> k")
        v = linear(row, w)
        return y = y, z = z, v = v
      }
    }""")
    held = blocks_of(graph, "w")
    exe, x = compiled(graph, {"w": held}), normal(3, 5, 64)
    out = exe(x=x)
    np.testing.assert_array_equal(out["y"], np.swapaxes(out["z"], 0, 1))
    np.testing.assert_array_equal(out["v"], out["z"][0, 0])
    assert_sums(np.asarray(out["z"]).reshape(15, 40), x.reshape(15, 64), Encoding("q4_0").decode(held))

"""Encoded weights in passes: the same sites fuse as with other weights, blocks are joined as blocks, and hoisting
reports the weights that it decodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

import treadle
from treadle.backends.onnx.exporter import export_onnx
from treadle.backends.registry import backend_names, find_backend
from treadle.frontends.declarations import Model
from treadle.ir.builder import Builder
from treadle.ir.encodings.encoding import Encoding, parse_encoding
from treadle.ir.errors import BackendError, GraphError
from treadle.ir.graph import Function, Graph, Node, Value
from treadle.ir.interpreter import interpret
from treadle.ir.literals import Literal
from treadle.ir.ops.blocks import Decode
from treadle.ir.text.parser import parse_graph
from treadle.ir.transforms.encoded_weights import decode_parameters, decode_weights, encode_parameters
from treadle.ir.types import f32, parse_type
from treadle.ir.verifier import verify
from treadle.models.bert import bert
from treadle.models.gpt2 import gpt2
from treadle.models.llama import llama
from treadle.passes.capabilities import Capabilities
from treadle.passes.framework.facts import INITIAL, LEGAL
from treadle.passes.framework.manager import PassManager
from treadle.passes.lowering.decode_last import DecodeLast
from treadle.passes.lowering.hoist_weights import HoistWeights
from treadle.passes.pipelines import DEFAULT

Array = np.ndarray[Any, Any]

MODELS: dict[str, Model] = {
    "llama": llama.configure(vocab=96, dim=64, heads=4, kv_heads=2, layers=3, hidden=128, tied=True),
    "bert": bert.configure(vocab=96, dim=64, heads=4, layers=3, hidden=128),
    "gpt2": gpt2.configure(vocab=96, context=16, dim=64, heads=4, layers=3),
}
MIXED = {"layer.1.attn.v.weight": "int8_rows"}


def matrices(graph: Graph, text: str, others: Mapping[str, str] | None = None) -> dict[str, Encoding]:
    """Return that encoding for each matrix that is not in `others`."""
    names = [name for name, value in graph.parameters.items() if value.type.rank == 2]
    return {name: parse_encoding((others or {}).get(name, text)) for name in names}


def drawn_weights(graph: Graph) -> tuple[dict[str, Array], dict[str, Array]]:
    """Draw weights of an encoded graph; return them, and their decoded numbers."""
    held, meant = {}, {}
    for number, (name, value) in enumerate(graph.parameters.items()):
        rng, shape = np.random.default_rng(number), value.type.static_shape or ()
        encoding = value.type.encoding
        if encoding is None:
            held[name] = meant[name] = (1 + 0.1 * rng.standard_normal(shape)).astype(np.float32)
        else:
            held[name] = encoding.sample(rng, shape)
            meant[name] = encoding.decode(held[name])
    return held, meant


def drawn_inputs(graph: Graph) -> dict[str, Array]:
    rng = np.random.default_rng(3)
    return {v.name: rng.integers(0, 2 if "type" in v.name else 16, (2, 5)) for v in graph.main.inputs}


# -- the transform -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_an_encoded_graph_means_the_float_one_of_its_numbers(name: str) -> None:
    graph = MODELS[name].graph()
    before = str(graph)
    encoded = encode_parameters(graph, matrices(graph, "q8_0"))
    verify(encoded)
    assert str(graph) == before
    assert parse_graph(str(encoded)) == encoded
    assert {v.type.decoded for v in encoded.parameters.values()} == {v.type for v in graph.parameters.values()}
    assert all(v.type.encoding is not None for v in encoded.parameters.values() if v.type.rank == 2)
    held, meant = drawn_weights(encoded)
    inputs = drawn_inputs(graph)
    wanted = interpret(graph, inputs, meant)
    for output, array in interpret(encoded, inputs, held).items():
        np.testing.assert_array_equal(array, wanted[output])


def test_layers_with_other_encodings_are_other_functions() -> None:
    graph = MODELS["llama"].graph()
    assert list(graph.functions) == ["layer", "main"]
    encoded = encode_parameters(graph, matrices(graph, "q8_0", MIXED))
    assert list(encoded.functions) == ["layer", "layer_2", "main"]
    assert [n.op.callee for n in encoded.main.nodes if n.op.callee] == ["layer", "layer_2", "layer"]
    # if a weight is encoded in only one layer, the other layers still share one function, without a decode
    alone = encode_parameters(graph, {"layer.2.attn.q.weight": Encoding("q8_0")})
    assert [n.op.callee for n in alone.main.nodes if n.op.callee] == ["layer", "layer", "layer_2"]
    assert [sum(n.op.decodes for n in f.nodes) for f in alone.functions.values()] == [0, 1, 0]


def called_twice() -> Graph:
    """Return y = h(h_2(h(x, a), b), c). The second function has the name that a copy of the first would get."""
    graph = Graph("named")
    for name, activation in (("h", "relu"), ("h_2", "tanh")):
        function = Function(name)
        b = Builder(graph, function)
        y = b.linear(b.input("x", "f32[2, 32]"), b.parameter("w", "f32[32, 32]"))
        function.outputs = {"y": b.apply(activation, y).value}
        graph.add_function(function)
    b = Builder(graph)
    y = b.input("x", "f32[2, 32]")
    for weight, name in zip("abc", ("h", "h_2", "h"), strict=True):
        (y,) = b.call(graph.functions[name], [y, b.parameter(weight, "f32[32, 32]")])
    b.outputs(y=y)
    return graph


def test_a_copy_of_a_function_takes_no_other_functions_name() -> None:
    graph = called_twice()
    encoded = encode_parameters(graph, {"a": Encoding("q8_0")})
    verify(encoded)
    assert list(encoded.functions) == ["h", "h_2", "h_3", "main"]
    held, meant = drawn_weights(encoded)
    x = {"x": np.random.default_rng(1).standard_normal((2, 32)).astype(np.float32)}
    np.testing.assert_array_equal(interpret(encoded, x, held)["y"], interpret(graph, x, meant)["y"])


def test_encodings_are_reported_by_the_graphs_names() -> None:
    """Parameters are reported under the graph's names, not under the parameter names inside blocks."""
    once = encode_parameters(called_twice(), {"a": Encoding("q8_0")})
    with pytest.raises(GraphError, match="parameter a is encoded already"):
        encode_parameters(once, {"a": Encoding("int8_rows")})
    b = Builder(once)
    b.outputs(y=b.linear(b.expr(once.main.outputs["y"]), b.parameter("w", "f32[32, 32]")))
    assert str(encode_parameters(once, {"w": Encoding("q4_0")}).parameters["w"].type) == "f32[32, 32] as q4_0"


def test_a_parameter_that_cannot_be_encoded_is_refused() -> None:
    graph = MODELS["llama"].graph()
    with pytest.raises(GraphError, match="there is no parameter 'nowhere'"):
        encode_parameters(graph, {"nowhere": Encoding("q8_0")})
    with pytest.raises(GraphError, match="not an integer number of q4_k blocks"):
        encode_parameters(graph, {"embed.weight": Encoding("q4_k")})
    once = encode_parameters(graph, {"embed.weight": Encoding("q8_0")})
    with pytest.raises(GraphError, match=r"parameter embed\.weight is encoded already"):
        encode_parameters(once, {"embed.weight": Encoding("q8_0")})
    assert encode_parameters(graph, {}) == graph


# -- the same sites ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_the_same_sites_fuse_as_in_the_float_model(name: str) -> None:
    graph = MODELS[name].graph()
    encoded = encode_parameters(graph, matrices(graph, "q8_0"))
    plain, blocks = PassManager(DEFAULT).run(graph), PassManager(DEFAULT, certify=True).run(encoded)
    fused = 0
    for before, after in zip(plain.log, blocks.log, strict=True):
        assert [e.rule for e in after.matches] == [e.rule for e in before.matches], before.name
        assert [(e.rule, e.reason) for e in after.refusals] == [(e.rule, e.reason) for e in before.refusals]
        fused += len(after.matches) * (
            before.name in ("fuse-gated-linear", "merge-projections", "fuse-activated-linear")
        )
    assert fused
    assert sum(c.cases for record in blocks.log for c in record.certificates) > 0

    def without_decodes(of: Graph) -> list[list[str]]:
        return [[n.op.name for n in f.nodes if not n.op.decodes] for f in of.functions.values()]

    assert without_decodes(blocks.graph) == without_decodes(plain.graph)
    held, meant = drawn_weights(encoded)
    inputs = drawn_inputs(graph)
    wanted = interpret(plain.graph, inputs, meant)
    for output, array in interpret(blocks.graph, inputs, held).items():
        np.testing.assert_array_equal(array, wanted[output])


def test_parts_in_other_encodings_stay_apart() -> None:
    graph = MODELS["llama"].graph()
    encoded = encode_parameters(graph, matrices(graph, "q8_0", MIXED))
    made = PassManager(DEFAULT).run(encoded)
    (record,) = [r for r in made.log if r.name == "merge-projections"]
    assert [e.reason for e in record.refusals] == [
        "its weight is stored as int8_rows, but the others as q8_0: their blocks are not joined"
    ]
    counts = {
        name: [n.op.attributes["count"] for n in f.nodes if n.op.name == "projections"]
        for name, f in made.graph.functions.items()
    }
    assert counts == {"layer": [3], "layer_2": [2], "main": []}


def test_parts_whose_weights_are_decoded_late_are_merged() -> None:
    text = """graph g {
      symbols B
      parameters {
        q: f32[8, 32] as q8_0
        k: f32[8, 32] as q8_0
      }
      main(x: f32[B, 32]) -> (q: f32[B, 8], k: f32[B, 8]) {
        q_w = decode($q, of=q8_0)
        q = linear(x, q_w)
        k_w = decode($k, of=q8_0)
        k = linear(x, k_w)
        return q = q, k = k
      }
    }"""
    made = PassManager(DEFAULT).run(parse_graph(text)).graph
    assert [n.op.name for n in made.main.nodes] == ["decode", "decode", "projections"]


ORDERED = """graph g {
  symbols B
  parameters {
    a: f32[4, 64]
    b: f32[2, 64]
    c: f32[3, 64]
    d: f32[64, 64]
  }

  block part(x: f32[B, 64]) -> (y: f32[B, 4]) weights w: f32[4, 64] {
    y = linear(x, $w)
    return y = y
  }

  main(x: f32[B, 64]) -> (p: f32[B, 4], q: f32[B, 2], r: f32[B, 3], s: f32[B, 64], t: f32[64, 64]) {
    p = part(x) with {w: $a}
    q = linear(x, $b)
    r = linear(x, $c)
    s = matmul(x, $d)
    t = linear($d, $d)
    return p = p, q = q, r = r, s = s, t = t
  }
}
"""


@pytest.mark.parametrize("form", ["q8_0", "q4_0"])
def test_columns_in_another_order_are_multiplied_with_gathered_inputs(form: str) -> None:
    """b and c share one gather. A product that sums over the rows of d, and one that has d on both sides, read its
    columns in their own order.
    """
    graph = parse_graph(ORDERED)
    encodings = matrices(graph, form)
    encoded = encode_parameters(graph, encodings, orders={"one": ["a", "d"], "other": ["b", "c"]})
    verify(encoded)
    ops = [node.op.name for _, node in encoded.walk()]
    assert (ops.count("gather"), ops.count("index_add")) == (2, 1)
    held, meant = drawn_weights(encoded)
    rng = np.random.default_rng(5)
    orders = {name: rng.permutation(64).astype(np.int32) for name in ("one", "other")}
    numbers = {}
    for name in encodings:
        order = orders["one" if name in "ad" else "other"]
        numbers[name] = np.empty_like(meant[name])
        numbers[name][:, order] = meant[name]
    x = rng.standard_normal((3, 64)).astype(np.float32)
    expected = interpret(graph, {"x": x}, numbers)
    got = interpret(encoded, {"x": x}, {**held, **orders})
    for name, array in expected.items():
        np.testing.assert_allclose(got[name], array, atol=1e-5, rtol=1e-5)


# -- lowering ------------------------------------------------------------------------------------------------------

JOINED = """graph g {
  symbols B
  parameters {
    a: f32[4, 64] as q8_0
    b: f32[2, 64] as q8_0
    c: f32[64, 4] as q8_0(axis=0)
    t: f32[64, 64] as q8_0
  }

  main(x: f32[B, 64], i: i64[B]) -> (y: f32[B, 6], z: f32[B, 2], r: f32[B, 4], p: f32[B, 64], s: f32[B, 128]) {
    a = decode($a, of=q8_0)
    b = decode($b, of=q8_0)
    ab = concat(a, b, axis=0)
    y = linear(x, ab)
    half = slice(a, axis=0, start=2)
    z = linear(x, half)
    c = decode($c, of=q8_0(axis=0))
    turned = rearrange(c, pattern="a b -> b a")
    r = linear(x, turned)
    t = decode($t, of=q8_0)
    picked = gather(t, i)
    p = linear(picked, t)
    long = concat(t, t)
    s = matmul(x, long)
    return y = y, z = z, r = r, p = p, s = s
  }
}
"""


def lowered(graph: Graph, *passes: Any) -> tuple[Graph, list[str]]:
    made = PassManager(passes, certify=True).run(graph, facts=INITIAL | {LEGAL})
    return made.graph, [note for record in made.log for note in record.notes]


def reads_blocks(node: Node, position: int) -> bool:
    return node.op.name == "linear" and position == 1


def test_blocks_are_joined_and_cut_as_blocks() -> None:
    graph = parse_graph(JOINED)
    made = PassManager((DecodeLast(),), certify=True).run(graph, facts=INITIAL | {LEGAL})
    verify(made.graph)
    nodes = {n.result.name: n for n in made.graph.main.nodes}
    assert str(nodes["turned"].inputs[0].type) == "f32[4, 64] as q8_0"
    text = str(made.graph)
    assert "concat($a, $b, axis=0)" in text
    assert "slice($a, axis=0, start=2)" in text
    (record,) = made.log
    assert [e.reason for e in record.refusals] == ["parts0 is encoded as q8_0, but concat would split its blocks"]
    assert all(c.cases for c in record.certificates)
    held, meant = drawn_weights(graph)
    inputs = {"x": np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32), "i": np.array([5, 0, 63])}
    before, after = (interpret(g, inputs, held) for g in (graph, made.graph))
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)
    assert meant["c"].shape == (64, 4)


def test_hoisting_stops_at_a_decode_before_what_reads_blocks() -> None:
    graph, notes = lowered(parse_graph(JOINED), DecodeLast(), HoistWeights(Capabilities(reads_blocks=reads_blocks)))
    assert graph.bind is not None
    made = {name: str(value.type) for name, value in graph.derived_weights.items()}
    joined = [t for t in made.values() if "as q8_0" in t]
    assert sorted(joined) == ["f32[2, 64] as q8_0", "f32[4, 64] as q8_0", "f32[6, 64] as q8_0"]
    # the table is gathered from, multiplied with and joined along its blocks, with a single decoded copy
    assert made["t.decoded"] == "f32[64, 64]"
    assert sum(n.op.decodes for n in graph.main.nodes) == 3
    assert [n for n in notes if "decoded once" in n] == [
        "t is decoded once: gather, concat cannot read q8_0 blocks, main"
    ]


@pytest.mark.parametrize("read_at_calls", [True, False])
def test_a_product_of_a_constant_and_blocks_is_hoisted_with_its_decode_or_stays(read_at_calls: bool) -> None:
    """A product of a weight and a constant depends on no input. Its decode stays if a call reads the blocks too."""
    b = Builder(Graph("one"))
    w = b.parameter("w", f32[4, 64].as_encoded(Encoding("q8_0")))
    numbers = b.apply(Decode, w, of=Encoding("q8_0"))
    x = b.input("x", "f32[B, 64]")
    constant = b.linear(b.constant(np.linspace(-1, 1, 128, dtype=np.float32).reshape(2, 64)), numbers)
    b.outputs(y=b.linear(x, numbers) if read_at_calls else x * 2.0, z=b.neg(constant))
    graph, _ = lowered(b.graph, HoistWeights(Capabilities(reads_blocks=reads_blocks)))
    verify(graph)
    assert (graph.bind is None) == read_at_calls
    left = [node.op.name for node in graph.main.nodes]
    assert left == (["decode", "linear", "linear", "neg"] if read_at_calls else ["mul"])
    held, _ = drawn_weights(b.graph)
    inputs = {"x": np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)}
    before, after = (interpret(g, inputs, held) for g in (b.graph, graph))
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)


def test_weights_are_decoded_once_for_readers_without_blocks() -> None:
    graph, notes = lowered(parse_graph(JOINED), DecodeLast(), HoistWeights())
    assert not any(n.op.decodes for n in graph.main.nodes)
    assert len([n for n in notes if "is decoded once: " in n]) == 4


@pytest.mark.parametrize("backend", backend_names())
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("text", ["q4_1", "int8_rows"])
def test_backends_run_encoded_weights(name: str, text: str, backend: str) -> None:
    if (reason := find_backend(backend).available()) is not None:
        pytest.skip(f"backend {backend}: {reason}")
    graph = MODELS[name].graph()
    encoded = encode_parameters(graph, matrices(graph, text, MIXED if name != "gpt2" else None))
    held, meant = drawn_weights(encoded)
    inputs = drawn_inputs(graph)
    made = treadle.compile(encoded, backend=backend, weights=held)
    plain = treadle.compile(graph, backend=backend, weights=meant)
    wanted = plain(**inputs)
    for output, array in made(**inputs).items():
        np.testing.assert_allclose(array, wanted[output], rtol=0, atol=2e-5 * np.abs(wanted[output]).max())


@pytest.mark.parametrize("backend", backend_names())
def test_a_weight_that_is_not_its_blocks_is_refused(backend: str) -> None:
    if (reason := find_backend(backend).available()) is not None:
        pytest.skip(f"backend {backend}: {reason}")
    graph = parse_graph(JOINED)
    held, meant = drawn_weights(graph)
    for wrong in (meant["a"], held["a"].astype(np.int8), held["a"][:, 1:]):
        with pytest.raises(BackendError) as error:
            treadle.compile(graph, backend=backend, weights={**held, "a": wrong})
        assert "weight a must be f32[4, 64] as q8_0, stored as u8[4, 68]" in str(error.value)


@pytest.mark.parametrize("backend", backend_names())
def test_states_in_blocks_are_refused(backend: str) -> None:
    if (reason := find_backend(backend).available()) is not None:
        pytest.skip(f"backend {backend}: {reason}")
    graph = parse_graph("""graph g {
      symbols B
      states { cache: f32[3, 9, 64] as int8_rows }
      prefill(x: f32[B, 1, 64], i: i64[B]) -> (y: f32[B, 1, 64]) {
        held = encode(x, to=int8_rows)
        %cache = append(%cache, held, i, i, axis=1)
        return y = x
      }
    }""")
    with pytest.raises(BackendError, match="does not support quantized states") as error:
        treadle.compile(graph, backend=backend)
    assert "%cache: f32[3, 9, 64] as int8_rows" in str(error.value)


def test_many_bits_out_of_few_are_not_too_many_to_hoist() -> None:
    """Two and a half bits become 32 bits. Decoded weights are more than eight times as large as in the file, and are
    hoisted.
    """
    graph = parse_graph("""graph g {
      symbols B
      parameters { w: f32[4096, 1024] as q2_k }
      main(x: f32[B, 1024]) -> (y: f32[B, 4096]) {
        w = decode($w, of=q2_k)
        y = linear(x, w)
        return y = y
      }
    }""")
    made, _ = lowered(graph, HoistWeights())
    assert list(made.derived_weights) == ["w.decoded"]


def test_an_artifact_keeps_the_blocks(tmp_path: Any) -> None:
    graph = MODELS["llama"].graph()
    encoded = encode_parameters(graph, matrices(graph, "q4_0"))
    held, _ = drawn_weights(encoded)
    made = treadle.compile(encoded, weights=held)
    made.save(tmp_path / "model.treadle")
    again = treadle.load_artifact(tmp_path / "model.treadle")
    inputs = drawn_inputs(graph)
    for name, array in made(**inputs).items():
        np.testing.assert_array_equal(again(**inputs)[name], array)
    for name, array in held.items():
        np.testing.assert_array_equal(again.weights[name], array)
    assert (tmp_path / "model.treadle").stat().st_size < 2 * sum(a.nbytes for a in held.values())


@pytest.mark.parametrize("backend", backend_names())
def test_a_step_reads_encoded_weights(backend: str) -> None:
    if (reason := find_backend(backend).available()) is not None:
        pytest.skip(f"backend {backend}: {reason}")
    graph = MODELS["llama"].graph()
    encoded = encode_parameters(graph, matrices(graph, "q5_1"))
    held, meant = drawn_weights(encoded)
    logits = []
    for of, weights in ((graph, meant), (encoded, held)):
        session = treadle.compile(of, backend=backend, weights=weights).session(rows=1, capacity=16)
        row = session.open()
        session.prefill({row: [5, 3, 9, 1]})
        logits.append(session.step({row: 7})[row])
    np.testing.assert_allclose(logits[0], logits[1], rtol=0, atol=2e-5 * np.abs(logits[0]).max())


# -- the inverse transform -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_decoding_parameters_is_the_way_back(name: str) -> None:
    graph = MODELS[name].graph()
    encoded = encode_parameters(graph, matrices(graph, "q8_0"))
    again = decode_parameters(encoded)
    verify(again)
    assert again == graph
    held, meant = drawn_weights(encoded)
    for weight, array in decode_weights(encoded, held).items():
        np.testing.assert_array_equal(array, meant[weight])


def test_blocks_that_were_moved_are_numbers_that_are_moved() -> None:
    graph = PassManager((DecodeLast(),)).run(parse_graph(JOINED), facts=INITIAL | {LEGAL}).graph
    again = decode_parameters(graph)
    verify(again)
    assert "as q8_0" not in str(again)
    held, meant = drawn_weights(graph)
    inputs = {"x": np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32), "i": np.array([5, 0, 63])}
    wanted = interpret(graph, inputs, held)
    for name, array in interpret(again, inputs, meant).items():
        np.testing.assert_array_equal(array, wanted[name])


def test_onnx_has_numbers_where_its_operators_lack_a_form(tmp_path: Any) -> None:
    pytest.importorskip("onnx")
    graph = MODELS["bert"].graph()
    encoded = encode_parameters(graph, matrices(graph, "q4_0"))
    held, meant = drawn_weights(encoded)
    export_onnx(encoded, held, tmp_path / "blocks.onnx", opset=20)  # 4-bit groups need opset 21
    export_onnx(graph, meant, tmp_path / "numbers.onnx", opset=20)
    assert (tmp_path / "blocks.onnx").read_bytes() == (tmp_path / "numbers.onnx").read_bytes()
    with pytest.raises(BackendError, match="stored as u8"):
        export_onnx(encoded, meant, tmp_path / "wrong.onnx")


def test_numpy_moves_blocks_that_a_call_picks() -> None:
    """Blocks are moved as views if possible, otherwise as copies in the arena. Sizes are in bytes."""
    b = Builder(Graph("moved"))
    picked = b.gather(b.parameter("w", "f32[6, 64] as q8_0"), b.input("i", "i64[B, S]"), axis=0)
    turned, flat = (b.rearrange(picked, pattern=pattern) for pattern in ("b s d -> (s b) d", "b s d -> (b s) d"))
    moved = {
        "joined": b.concat(turned, flat, axis=0),
        "columns": b.rearrange(turned, pattern="n d -> d n"),
        "spread": b.rearrange(picked, pattern="b s d -> b 1 s d"),
        "cut": b.slice(picked, axis=1, start=1),
    }
    b.outputs(**{name: b.apply("decode", blocks, of=blocks.type.encoding) for name, blocks in moved.items()})
    held, given = drawn_weights(b.graph)[0], {"i": np.array([[0, 2, 5], [1, 1, 3]])}
    made = treadle.compile(b.graph, backend="numpy", weights=held)
    assert all(f"out=memory.{op}" in made.source for op in ("gather", "rearrange", "concat"))
    for name, wanted in interpret(b.graph, given, held).items():
        np.testing.assert_array_equal(made(**given)[name], wanted, err_msg=name)


@pytest.mark.parametrize("backend", ["torch", "tvm"])
def test_blocks_of_a_constant_are_refused_where_nothing_decodes_them(backend: str) -> None:
    """Constants are not hoisted, and these backends lack a kernel that decodes."""
    if reason := find_backend(backend).available():
        pytest.skip(reason)
    type = parse_type("f32[2, 64] as q8_0")
    held = np.zeros((2, 68), np.uint8)
    b = Builder(Graph("g"))
    assert type.encoding is not None
    decoded = b.emit(Decode(of=type.encoding), [Value.constant(Literal.of_blocks(held, type))]).result
    b.outputs(y=b.input("x", f32[2, 64]) + b.expr(decoded))
    with pytest.raises(BackendError, match=f"the {backend} backend cannot run g"):
        treadle.compile(b.graph, backend=backend, passes=[])

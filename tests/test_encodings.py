"""Encodings: block forms compared with the gguf library and with our error bounds; encoded types in text, keys and
numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from treadle.ir.builder import Builder
from treadle.ir.encodings import encoding as encodings
from treadle.ir.encodings.encoding import FORMS, MOST_IN_LINE, Encoding, parse_encoding
from treadle.ir.encodings.rounded_forms import SMALLEST_ROW
from treadle.ir.errors import GraphError, ParseError, RuleError, TreadleError, VerifyError
from treadle.ir.graph import Graph, Value
from treadle.ir.hashing import structural_hash, type_key
from treadle.ir.interpreter import interpret, interpret_entry
from treadle.ir.literals import Literal
from treadle.ir.op_registry import OPS
from treadle.ir.ops.blocks import Decode, Encode
from treadle.ir.text.parser import parse_graph
from treadle.ir.transforms.differentiate import backward
from treadle.ir.types import Type, f16, f32, i8, parse_type
from treadle.ir.verifier import verify

Array = np.ndarray[Any, Any]

GGUF = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "mxfp4")
ZEROS = ("uint4_groups(32)", "uint4_wide_groups(64)", "int8_zero_groups(32)")
CODES = tuple(f"{form}_groups({n})" for form in ("e4m3", "e2m1", "nf4", "fp4") for n in (16, 64))
OURS = ("int8_rows", "uint8_rows", "int8_groups(32)", "int4_groups(32)", "int4_groups(64)")
WHOLE = (*GGUF[:-1], *[form for form in OURS if form != "uint8_rows"], "uint4_groups(32)")
BLOCKS = 10_000
SPECIAL = np.array(
    [0x0000, 0x8000, 0x0001, 0x83FF, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7C01, 0x7E00, 0xFE00, 0xFFFF], np.uint16
)
"""Bits of float16's zeros, subnormals, largest numbers, infinities and NaNs."""


def drawn(encoding: Encoding, shape: tuple[int, ...], seed: int = 0) -> Array:
    return encoding.sample(np.random.default_rng(seed), shape)


# -- forms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", GGUF)
def test_a_gguf_form_decodes_to_the_bits_of_the_library(form: str) -> None:
    gguf = pytest.importorskip("gguf")
    encoding, kind = Encoding(form), gguf.GGMLQuantizationType[form.upper()]
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(len(form))
    blocks = np.frombuffer(rng.bytes(BLOCKS * size), encoding.block.record(elements)).copy()
    for name in blocks.dtype.names or ():
        # half of the scales are special; a block's two scales form all pairs of special numbers
        if blocks[name].dtype == np.float16:
            chosen = SPECIAL[rng.integers(0, len(SPECIAL), BLOCKS)].view(np.float16)
            blocks[name] = np.where(rng.random(BLOCKS) < 0.5, chosen, blocks[name])
    raw = blocks.view(np.uint8).reshape(BLOCKS, size)
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(raw, kind)
    got = encoding.decode(raw)
    assert np.isnan(expected).any() or form == "mxfp4"  # its scales are powers of two
    np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("text", OURS)
def test_an_encoded_number_is_near(text: str) -> None:
    """The error is at most half a step of the row's or group's scale; encoding the decoded numbers returns the same
    bits.
    """
    encoding = parse_encoding(text)
    values = np.random.default_rng(0).standard_normal((7, 256)).astype(np.float32)
    values[3] = 0
    held = encoding.encode(values)
    again = encoding.decode(held)
    blocks = np.abs(values).reshape(-1, encoding.elements(256))
    steps = {"int8_rows": 127.0, "int8_groups": 127.0, "uint8_rows": 255 / 2}.get(encoding.form, 8)
    # a scale in 16 bits has a relative error of 2^-11, which counts up to 8 times
    bound = blocks.max(axis=-1, keepdims=True) / steps * (0.5 + (0 if steps > 8 else 8 * 2.0**-11)) * (1 + 1e-6)
    # symmetric: in a group of 4 bits, the largest number of the other sign would need 8 steps, but only 7 can be stored
    clipped = 1.0 if steps == 8 else 0.0
    error = np.abs(again - values).reshape(blocks.shape)
    reach = values.reshape(blocks.shape) * np.sign(
        np.take_along_axis(values.reshape(blocks.shape), blocks.argmax(axis=-1)[:, None], -1)
    )
    beyond = reach < -7 / 8 * blocks.max(axis=-1, keepdims=True)
    assert (error <= np.where(beyond, bound * (1 + clipped), bound)).all()
    assert (again[3] == 0).all()
    if encoding.form.startswith("int8"):
        np.testing.assert_array_equal(encoding.encode(again), held)


@pytest.mark.parametrize("text", [*GGUF, *OURS, *ZEROS, *CODES])
def test_parts_of_a_block_of_whole_numbers_are_what_it_decodes_to(text: str) -> None:
    encoding = parse_encoding(text)
    assert encoding.block.whole == (text in WHOLE)
    blocks = encoding.block.sample(np.random.default_rng(0), 5, 64 if text == "int8_rows" else encoding.elements(256))
    if text not in WHOLE:
        with pytest.raises(GraphError, match=f"{encoding.form} is not a form of integers in groups with scales"):
            encoding.block.parts(blocks)
        return
    q, d, c = encoding.block.parts(blocks)
    assert (q.dtype, d.dtype, c.dtype) == (np.int8, np.float32, np.float32)
    assert d.shape == c.shape
    spans = q.reshape(*d.shape, -1)
    made = spans * d[..., None] + c[..., None]
    np.testing.assert_array_equal(made.reshape(q.shape), encoding.block.decode(blocks))


@pytest.mark.parametrize("text", [*GGUF, *OURS, *ZEROS, *CODES])
def test_blocks_along_another_axis_are_the_transposed_ones(text: str) -> None:
    encoding = parse_encoding(text)
    shape = (3, 256)
    held = drawn(encoding, shape)
    turned = encoding.along(0)
    np.testing.assert_array_equal(turned.decode(held.T), encoding.decode(held).T)
    assert Type(f32, f32[256, 3].dims, turned).storage_type == parse_type(f"u8[{held.shape[1]}, 3]")
    if encoding.block.encodes:
        values = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
        np.testing.assert_array_equal(turned.encode(values.T), encoding.encode(values).T)


@pytest.mark.parametrize("text", OURS)
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_nonfinite_values_are_not_encoded(text: str, wrong: float) -> None:
    values = np.zeros((2, 64), np.float32)
    values[1, 5] = wrong
    with pytest.raises(GraphError, match=r"holds finite values") as error:
        parse_encoding(text).encode(values)
    assert "[1, 5]" in str(error.value)


def test_a_scale_past_16_bits_is_refused() -> None:
    with pytest.raises(GraphError, match=r"too large for a float16 scale"):
        parse_encoding("int4_groups(32)").encode(np.full((1, 32), 1e6, np.float32))


@pytest.mark.parametrize("scale", [1e-40, 1e-44, 3e38])
@pytest.mark.parametrize("text", ["int8_rows", "uint8_rows"])
def test_rows_at_the_ends_of_float32_are_encoded(scale: float, text: str) -> None:
    values = (np.linspace(-1, 1, 64).astype(np.float64) * scale).astype(np.float32)[None]
    again = parse_encoding(text).decode(parse_encoding(text).encode(values))
    assert np.isfinite(again).all()
    assert (np.abs(again - values) <= (scale / 127 if scale >= SMALLEST_ROW else scale)).all()


def test_a_row_with_a_zero_has_the_steps_that_its_numbers_take() -> None:
    """The row's range has 255 steps, from the lowest number or 0 to the largest number or 0; both ends are exact."""
    rows = parse_encoding("uint8_rows")
    values = np.float32([[0, 3, 255], [-255, -3, 0], [-55, 0, 200], [10, 11, 12.75], [-127.5, 127.5, 0]])
    again = rows.decode(rows.encode(values))
    np.testing.assert_array_equal(again[:3], values[:3])
    np.testing.assert_allclose(again[3], values[3], rtol=0, atol=12.75 / 255 / 2 * (1 + 1e-6))
    np.testing.assert_array_equal(again[4], [-128, 127, 0])  # both ends are ties, and a 257th step does not exist


@pytest.mark.parametrize("text", ["int8_rows", "uint8_rows"])
def test_a_row_that_is_computed_and_not_finite_is_marked_as_a_whole(text: str) -> None:
    rows, values = parse_encoding(text), np.linspace(-1, 1, 256, dtype=np.float32).reshape(4, 64)
    for row, number in enumerate((np.inf, -np.inf, np.nan)):
        values[row, row] = number
    again = rows.decode(rows.encode(values, computed=True))
    assert np.isnan(again[:3]).all()
    np.testing.assert_array_equal(again[3], rows.decode(rows.encode(values[3])))
    with pytest.raises(GraphError, match=f"{text} holds finite values"):
        rows.encode(values)
    groups = parse_encoding("int8_groups(32)")
    halves = groups.decode(groups.encode(values, computed=True)).reshape(4, 2, 32)
    assert np.isnan(halves[:3, 0]).all()  # and in no other group
    np.testing.assert_array_equal(halves[:3, 1], groups.decode(groups.encode(values[:3, 32:])))
    with pytest.raises(GraphError, match="int4_groups holds finite values"):
        parse_encoding("int4_groups(32)").encode(values, computed=True)


@pytest.mark.parametrize("name", list(FORMS))
def test_a_form_is_whole(name: str) -> None:
    """A block form is a record without padding. Its samples decode to finite numbers, the same each time."""
    encoding = Encoding(name, 32 if FORMS[name].grouped else 0)  # type: ignore[attr-defined]
    record = encoding.block.record(encoding.elements(256))
    assert record.itemsize == sum(record[n].itemsize for n in record.names or ())
    assert encoding.size(encoding.bytes(256)) == 256
    assert encoding.bits(256) < 12
    held = drawn(encoding, (4, 512))
    assert np.isfinite(encoding.decode(held)).all()
    np.testing.assert_array_equal(drawn(encoding, (4, 512)), held)


@pytest.mark.parametrize("text", [*GGUF, *OURS, *ZEROS, *CODES])
def test_computing_in_parts_covers_all_elements(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding, encoding and the search for a NaN or infinite scale work in parts. The last part may be shorter, or a
    block may be larger than a part.
    """
    form = parse_encoding(text)
    held = drawn(form, (7, 512))
    whole = form.decode(held)
    values = np.random.default_rng(2).standard_normal((7, 512)).astype(np.float32)
    made = form.encode(values) if form.block.encodes else None
    monkeypatch.setattr(encodings, "_AT_ONCE", 100)
    np.testing.assert_array_equal(form.decode(held), whole)
    if made is not None:
        np.testing.assert_array_equal(form.encode(values), made)
    assert form.first_not_finite(held) is None
    monkeypatch.setattr(encodings, "_AT_ONCE", 2)
    blocks = held.reshape(-1).view(form.block.record(form.elements(512)))
    scales = [name for name in blocks.dtype.names or () if blocks.dtype[name].base.kind == "f"]
    for name in scales:
        blocks[name] = np.finfo(blocks.dtype[name].base).max
    assert form.first_not_finite(held) is None
    for names in (scales, scales[::-1]):
        for back, (name, number) in enumerate(zip(names, (np.nan, -np.inf), strict=False), 1):
            blocks[name][-back] = number
            found = form.first_not_finite(held)
            assert found == (len(blocks) - back, f"{name} = {number}")
        for name in names:
            blocks[name] = 0


# -- types -----------------------------------------------------------------------------------------------------------


def test_an_encoded_type_tells_its_bytes_and_how_it_is_held() -> None:
    type = parse_type("f32[(h=2 4), 64] as q4_0")
    assert (str(type), str(type.storage_type), type.bytes_at({})) == (
        "f32[(h=2 4), 64] as q4_0",
        "u8[(h=2 4), 36]",
        288,
    )
    assert type.decoded == f32[8, 64] != type
    assert len({type, parse_type("f32[8, 64] as q4_0(axis=1)"), parse_type("f32[8,64] as q4_0"), f32[8, 64]}) == 2
    assert type_key(type) != type_key(f32[8, 64])
    assert type.substitute({"S": 3}) is type
    assert parse_type("f32[S, 64] as q8_0").substitute({"S": 3}) == parse_type("f32[3, 64] as q8_0")
    assert parse_type("f32[S, 64] as q8_0").bytes_at({"S": 2}) == 2 * 68


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("f32[8, 40] as q4_0", "an axis of 40 is not an integer number of q4_0 blocks"),
        ("f32[8, 64] as q9", "unknown encoding 'q9'"),
        ("f32[8, 64] as q4_0(32)", "q4_0 takes no group size: its blocks have 32 elements"),
        ("f32[8, 64] as int4_groups", "int4_groups: invalid group size"),
        ("f32[8, 64] as int4_groups(33)", "int4_groups: invalid group size"),
        ("f32[8, 64] as int8_rows(axis=2)", "there is no axis 2"),
        ("f32[8, 64] as int8_rows(axis=-3)", "there is no axis -3"),
        ("f32[8, 64] as int8_rows(axes=0)", "unknown or repeated option 'axes=0' of form int8_rows"),
        ("f32[] as int8_rows", "there is no axis -1"),
        ("f32[8, 0] as int8_rows", "a line of int8_rows has from 1"),
        (f"f32[8, {10**15}] as int8_rows", f"a line of int8_rows has from 1 to {MOST_IN_LINE} elements"),
        ("f32[8, S] as int8_rows", "an encoded axis must have a constant size"),
        ("f16[8, 64] as q4_0", "only f32 can be encoded"),
        ("i8[8, 64] as q4_0", "only f32 can be encoded"),
    ],
)
def test_a_type_that_does_not_fit_its_encoding_is_refused(text: str, what: str) -> None:
    with pytest.raises(TreadleError) as error:
        parse_type(text)
    assert what in str(error.value)


def test_how_many_bits_an_element_takes() -> None:
    texts = ("q4_0", "q8_0", "q4_k", "int8_rows", "uint8_rows", "int4_groups(64)")
    assert [parse_encoding(text).bits(256) for text in texts] == [4.5, 8.5, 4.5, 8.125, 8.15625, 4.25]


def test_a_number_in_a_text_has_six_digits_at_most() -> None:
    assert parse_encoding("int8_rows(axis=-999999)").axis == -999999
    with pytest.raises(GraphError, match="unknown or repeated option 'axis=1000000' of form int8_rows"):
        parse_encoding("int8_rows(axis=1000000)")


def test_values_beyond_float32_are_not_encoded() -> None:
    with pytest.raises(GraphError, match="int8_rows holds finite values") as error:
        parse_encoding("int8_rows").encode(np.array([[1.0, 1e300]]))
    assert error.value.received == "inf at [0, 1]"


def test_a_line_that_is_one_block_has_at_most_so_many_elements() -> None:
    rows = Encoding("int8_rows")
    assert rows.bytes(MOST_IN_LINE) == MOST_IN_LINE + 4
    with pytest.raises(GraphError, match="a line of int8_rows has from 1"):
        rows.bytes(MOST_IN_LINE + 1)


def test_a_wider_dtype_is_not_encoded() -> None:
    with pytest.raises(GraphError, match="only f32 can be encoded"):
        parse_type("f32[2, 64] as q8_0").with_dtype(f16)
    with pytest.raises(GraphError, match="only f32 can be encoded"):
        i8[2, 64].as_encoded("q8_0")


# -- graphs ----------------------------------------------------------------------------------------------------------

GRAPH = """graph g {
  symbols B
  parameters {
    h.{0..1}.w: f32[8, 64] as q4_0
    t: f32[5, 64] as int8_rows
  }
  states {
    cache: f32[3, 9, 64] as int8_rows
  }

  block h(x: f32[B, 64]) -> (y: f32[B, 64])
    weights w: f32[8, 64] as q4_0
  {
    w = decode($w, of=q4_0)   # f32[8, 64]  a.py:3  w
    y = linear(x, w)          # f32[B, 8]   a.py:3
    z = matmul(y, w)          # f32[B, 64]  a.py:4
    return y = z
  }

  prefill(x: f32[B, 64], i: i64[B]) -> (y: f32[B, 16], z: f32[B, 64], q: f32[64, 2]) {
    x_2 = h(x) with h.0                                                             # f32[B, 64]  a.py:9  h.0
    c = concat($h.0.w, $h.1.w, axis=0)                                              # f32[16, 64] as q4_0  a.py:7  h
    w = decode(c, of=q4_0)                                                          # f32[16, 64]
    y = linear(x_2, w)                                                              # f32[B, 16]
    e = gather($t, i)                                                               # f32[B, 64] as int8_rows
    z = decode(e, of=int8_rows)                                                     # f32[B, 64]
    cut = slice($t, axis=0, start=1, stop=3)                                        # f32[2, 64] as int8_rows
    turned = rearrange(cut, pattern="a b -> b a")                                   # f32[64, 2] as int8_rows(axis=0)
    q = decode(turned, of=int8_rows(axis=0))                                        # f32[64, 2]
    again = encode(z, to=int8_rows)                                                 # f32[B, 64] as int8_rows
    rows = rearrange(again, pattern="b d -> b 1 d")                                 # f32[B, 1, 64] as int8_rows
    %cache = append(%cache, rows, i, i, axis=1)                                     # f32[3, 9, 64] as int8_rows
    constant = decode(f32[1, 16] as int8_rows{@0}, of=int8_rows)                    # f32[1, 16]
    return y = y, z = z, q = q
  }

  data {
    @0:
      "AACAPwABAgMEBQYHCAkKCwwNDg8="
  }
}
"""


@pytest.fixture
def graph() -> Graph:
    return parse_graph(GRAPH)


def weights_of(graph: Graph) -> dict[str, Array]:
    found = {}
    for number, (name, value) in enumerate(graph.parameters.items()):
        assert value.type.encoding is not None
        found[name] = drawn(value.type.encoding, value.type.static_shape or (), number)
    return found


def test_a_graph_with_encoded_weights_states_and_constants_reads_back(graph: Graph) -> None:
    verify(graph)
    text = str(graph)
    again = parse_graph(text)
    assert again == graph
    assert str(again) == text
    assert structural_hash(again) == structural_hash(graph)
    assert "f32[16, 64] as q4_0" in text
    assert "%cache = append(%cache, rows, i, i, axis=1)" in text


@pytest.mark.parametrize("change", [("as q4_0", "as q8_0"), ("of=q4_0", "of=q8_0"), ("AACAP", "AACAQ")])
def test_graphs_that_differ_in_an_encoding_or_its_bytes_are_not_equal(graph: Graph, change: tuple[str, str]) -> None:
    if change[0] == "AACAP":
        assert parse_graph(GRAPH.replace(*change)) != graph
    else:
        other = GRAPH.replace("as q4_0", "as q8_0").replace("of=q4_0", "of=q8_0")
        assert parse_graph(other) != graph


def test_computed_blocks_equal_decoded_blocks(graph: Graph) -> None:
    weights, rng = weights_of(graph), np.random.default_rng(5)
    inputs = {"x": rng.standard_normal((2, 64)).astype(np.float32), "i": np.array([2, 0])}
    state = drawn(parse_encoding("int8_rows"), (3, 9, 64), 7)
    for float64 in (False, True):
        out, states = interpret_entry(graph, "prefill", inputs, weights, {"cache": state}, float64=float64)
        floats = {n: (Encoding("int8_rows" if n == "t" else "q4_0").decode(w)) for n, w in weights.items()}
        wide = {n: w.astype(np.float64) if float64 else w for n, w in floats.items()}
        x = inputs["x"].astype(wide["t"].dtype)
        hidden = (x @ wide["h.0.w"].T) @ wide["h.0.w"]
        expected = hidden @ np.concatenate([wide["h.0.w"], wide["h.1.w"]]).T
        np.testing.assert_allclose(out["y"], expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(out["z"], floats["t"][[2, 0]])
        np.testing.assert_array_equal(out["q"], floats["t"][1:3].T)
        assert states["cache"].dtype == np.uint8
        rows = Encoding("int8_rows").encode(floats["t"])
        np.testing.assert_array_equal(states["cache"][2, 2], rows[2])
        np.testing.assert_array_equal(states["cache"][0, 0], rows[0])
        np.testing.assert_array_equal(states["cache"][1], state[1])


def test_a_weight_that_is_not_its_blocks_is_refused() -> None:
    graph = parse_graph(
        "graph g { parameters { w: f32[8, 64] as q4_0 } "
        "main() -> (y: f32[8, 64]) { y = decode($w, of=q4_0) return y = y } }"
    )
    for wrong in (np.zeros((8, 64), np.float32), np.zeros((8, 36), np.int8), np.zeros((8, 35), np.uint8)):
        with pytest.raises(GraphError, match="parameter w"):
            interpret(graph, {}, {"w": wrong})


@pytest.mark.parametrize(
    ("before", "after", "what"),
    [
        ("linear(x_2, w)", "linear(x_2, c)", "linear: weight is encoded as q4_0, but linear reads numbers"),
        (
            "of=q4_0)                                                          # f32[16",
            "of=q8_0) # f32[16",
            "x is not encoded as q8_0",
        ),
        ("decode(e, of=int8_rows)", "decode(x, of=int8_rows)", "x is not encoded as int8_rows"),
        ("axis=0, start=1, stop=3", "axis=1, start=0, stop=32", "slice would split its blocks"),
        ('"a b -> b a"', '"a (b c=8) -> a b c"', "rearrange would split its blocks"),
        ('"a b -> b a"', '"a b=64 -> b a"', "rearrange would split its blocks"),
        ("concat($h.0.w, $h.1.w, axis=0)", "concat($h.0.w, $h.1.w)", "concat would split its blocks"),
        (
            "concat($h.0.w, $h.1.w, axis=0)",
            "concat($h.0.w, $t, axis=0)",
            "parts0 is encoded as q4_0, parts1 as int8_rows",
        ),
        ("concat($h.0.w, $h.1.w, axis=0)", "concat($h.0.w, q, axis=0)", "parts0 is encoded as q4_0, parts1 as nothing"),
        ("encode(z, to=int8_rows)", "encode(e, to=int8_rows)", "x is encoded as int8_rows already"),
        ("encode(z, to=int8_rows)", "encode(z, to=q4_0)", "values cannot be encoded to q4_0, which can only be read"),
        ("{@0}, of=int8_rows)", '{base64 "AAAA"}, of=int8_rows)', "takes 20 bytes, received 3"),
        ("{@0}, of=int8_rows)", "{1.0, 2.0}, of=int8_rows)", "expected base64"),
    ],
)
def test_other_ops_refuse_what_is_encoded(before: str, after: str, what: str) -> None:
    text = GRAPH
    if " q, axis=0" in after:  # defined below
        text = text.replace("    c = concat", "    q_0 = decode($t, of=int8_rows)\n    c = concat")
        after = after.replace(" q,", " q_0,")
    assert before in text
    with pytest.raises(ParseError) as error:
        parse_graph(text.replace(before, after, 1))
    assert what in str(error.value)


def test_the_verifier_names_the_op_and_the_line() -> None:
    graph = parse_graph(GRAPH)
    block = graph.functions["h"]
    node = block.nodes[1]
    node.operands = (node.operands[0], block.parameters["w"], None)
    with pytest.raises(VerifyError) as error:
        verify(graph)
    assert "linear: weight is encoded as q4_0, but linear reads numbers" in str(error.value)
    assert "a.py:3" in str(error.value)
    assert error.value.hint == "decode it first"


def test_users_give_and_get_numbers() -> None:
    graph = Graph("g")
    b = Builder(graph)
    x = b.input("x", parse_type("f32[2, 64] as q8_0"))
    b.outputs(y=b.expr(b.emit(Decode(of=Encoding("q8_0")), [x.value]).result))
    with pytest.raises(VerifyError, match="input 'x' is encoded"):
        verify(graph)
    graph = Graph("g")
    b = Builder(graph)
    w = b.parameter("w", parse_type("f32[2, 64] as q8_0"))
    b.outputs(y=w)
    with pytest.raises(VerifyError, match="output 'y' of main is encoded"):
        verify(graph)


def test_a_gradient_is_refused() -> None:
    for encoding, op in ((None, Encode(to=Encoding("int8_rows"))), (Encoding("q8_0"), Decode(of=Encoding("q8_0")))):
        b = Builder(Graph("g"))
        x = b.parameter("w", Type(f32, f32[2, 64].dims, encoding))
        y = b.emit(op, [x.value, None, None, None] if encoding is None else [x.value]).result
        if encoding is None:
            y = b.emit(Decode(of=Encoding("int8_rows")), [y]).result
        seed = b.input("seed", f32[2, 64])
        with pytest.raises(GraphError, match="has no gradient") as error:
            backward(b, list(b.function.nodes), {y: seed})
        assert error.value.hint == "a model whose weights are not quantized"


def test_an_encoded_constant_is_its_blocks() -> None:
    type = parse_type("f32[2, 64] as q8_0")
    held = drawn(Encoding("q8_0"), (2, 64))
    literal = Literal.of_blocks(held, type)
    assert literal.type == type
    np.testing.assert_array_equal(literal.array, held)
    assert literal != Literal.of_blocks(held ^ np.uint8(1), type)
    assert Value.constant(literal).type.bytes_at({}) == 136
    with pytest.raises(GraphError, match="is held in u8"):
        Literal.of_blocks(held.astype(np.int8), type)


def test_ops_say_which_encodings_they_move() -> None:
    """The op's axis rule decides: the blocked axis must be one unchanged axis of the result."""
    moving = {name for name, cls in OPS.items() if cls.moves_blocks}
    assert moving == {"all_gather", "append", "concat", "embedding", "gather", "rearrange", "relayout", "slice"}
    table, indices = parse_type("f32[5, 64] as q8_0"), parse_type("i64[3, 2]")
    (made,) = OPS["embedding"]().infer([table, indices])
    assert made == parse_type("f32[3, 2, 64] as q8_0")
    with pytest.raises(RuleError, match="would split its blocks"):
        OPS["embedding"]().infer([parse_type("f32[32, 3] as q8_0(axis=0)"), indices])


def test_tables_of_codes_are_those_of_their_formats() -> None:
    """e4m3 and e2m1 as ml_dtypes has them; NaN, zeros and subnormal numbers included."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    for form, dtype, count in (("e4m3", "float8_e4m3fn", 256), ("e2m1", "float4_e2m1fn", 16)):
        codes = np.arange(count, dtype=np.uint8)
        expected = codes.view(getattr(ml_dtypes, dtype)).astype(np.float32)
        block = FORMS[f"{form}_groups"](16)
        np.testing.assert_array_equal(block.table, expected)  # type: ignore[attr-defined]
    assert len(np.unique(FORMS["nf4_groups"](16).table)) == 16  # type: ignore[attr-defined]

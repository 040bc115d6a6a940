"""Types: text with factors and labels that parses back, equality by sizes alone, dtypes, constants, malformed text."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.test_sizes import sizes
from treadle.ir.errors import GraphError, ParseError, SizeError, TreadleError
from treadle.ir.initial_values import Init
from treadle.ir.literals import Literal
from treadle.ir.sizing.sizes import Size
from treadle.ir.types import (
    DTYPES,
    Dim,
    DType,
    Factor,
    OptionalType,
    Type,
    bf16,
    boolean,
    dtype_of,
    f16,
    f32,
    f64,
    i8,
    i64,
    parse_type,
    u8,
)

labels = st.none() | st.sampled_from(("heads", "d", "ffn_1"))
factors = st.builds(Factor, sizes(), labels)
dims = st.lists(factors, min_size=1, max_size=3).map(Dim)
types = st.builds(Type, st.sampled_from(list(DTYPES.values())), st.lists(dims, max_size=4).map(tuple))


# -- text ----------------------------------------------------------------------------------------------------------


@given(types)
def test_text_reads_back_in_every_detail(type: Type) -> None:
    again = parse_type(str(type))
    assert again == type
    assert hash(again) == hash(type)
    assert again.text == type.text, "factors and labels are read as well"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("f32[B, S, 768]", "f32[B, S, 768]"),
        ("f32[B S 768]", "f32[B, S, 768]"),
        (" bf16 [ B,S ] ", "bf16[B, S]"),
        ("i64[]", "i64[]"),
        ("bool[ ]", "bool[]"),
        ("f32[B, S, (heads=12 64)]", "f32[B, S, (heads=12 64)]"),
        ("f32[B S (heads=12, 64)]", "f32[B, S, (heads=12 64)]"),
        ("f32[(a=2 b=3\t4)]", "f32[(a=2 b=3 4)]"),
        ("f32[heads=12 S]", "f32[heads=12, S]"),
        ("f32[(S+1)//2]", "f32[(S+1)//2]"),
        ("f32[(S+1)]", "f32[S+1]"),
        ("f32[S + 1, 2]", "f32[S+1, 2]"),
        ("f32[((3*(S//2)+1)//4 4)]", "f32[((3*(S//2)+1)//4 4)]"),
        ("f32[(S+1)*(S-1)]", "f32[S*S-1]"),
    ],
)
def test_notations(text: str, shown: str) -> None:
    assert str(parse_type(text)) == shown


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("f32", ParseError, "not a type: 'f32'"),
        ("f32[2", ParseError, "not a type: 'f32[2'"),
        ("[2]", ParseError, "not a type"),
        ("f31[2]", ParseError, "unknown dtype 'f31'"),
        ("float32[2]", ParseError, "one of f64, f32"),
        ("f32[2,,3]", ParseError, "a dimension is empty"),
        ("f32[,2]", ParseError, "a dimension is empty"),
        ("f32[1x=2]", ParseError, "not a label: '1x'"),
        ("f32[=2]", ParseError, "not a label: ''"),
        ("f32[a=b=2]", ParseError, "not a label: 'a=b'"),
        ("f32[(2 3]", SizeError, "not a size: '(2 3'"),
        ("f32[2 3)]", SizeError, "not a size: '3)'"),
        ("f32[((2 3) 4)]", SizeError, "not a size: '(2 3)'"),
        ("f32[()]", SizeError, "not a size: '()'"),
        ("f32[heads=]", SizeError, "not a size: ''"),
        ("f32[S + 1]", SizeError, "not a size: '+'"),  # if the comma is missing, spaces separate dimensions
        ("f32[1.5]", SizeError, "not a size: '1.5'"),
    ],
)
def test_malformed(text: str, error: type[TreadleError], said: str) -> None:
    with pytest.raises(error) as caught:
        parse_type(text)
    assert said in str(caught.value)
    assert text in str(caught.value), "the whole type is shown"


# -- equality ------------------------------------------------------------------------------------------------------


def test_factors_and_labels_take_no_part_in_equality() -> None:
    plain, split, named = (parse_type(t) for t in ("f32[B, 768]", "f32[B, (heads=12 64)]", "f32[B, dim=768]"))
    assert plain == split == named
    assert len({plain, split, named}) == 1
    assert len({t.text for t in (plain, split, named)}) == 3
    assert parse_type("f32[S+S]") == parse_type("f32[2*S]")


def test_dtype_and_every_size_take_part() -> None:
    here = parse_type("f32[B, S]")
    for other in ("f16[B, S]", "f32[S, B]", "f32[B, T]", "f32[B]", "f32[B, S, 1]"):
        assert here != parse_type(other)


@pytest.mark.parametrize("name", DTYPES)
def test_a_dtype_equals_the_dtype_of_the_same_numbers_in_numpy_and_pytorch(name: str) -> None:
    torch = pytest.importorskip("torch")
    named = {"f64": "float64", "f32": "float32", "f16": "float16", "bf16": "bfloat16", "bool": "bool", "u8": "uint8"}
    theirs = named.get(name) or name.replace("i", "int")
    for other in DTYPES.values():
        same = other.name == name
        assert (other == getattr(torch, theirs)) == same
        assert (other == theirs) == (other == name) == same
        if name != "bf16":
            assert (other == np.dtype(theirs)) == (np.dtype(theirs).type == other) == same
    assert DTYPES[name] != 3 and DTYPES[name] != "no dtype" and DTYPES[name] != torch.complex64


def test_parts() -> None:
    t = parse_type("f32[B, (heads=12 64), S//2]")
    assert (t.rank, t.symbols, t.static_shape) == (3, {"B", "S"}, None)
    assert t.shape == (Size.symbol("B"), 768, Size.symbol("S") // 2)
    assert t.elements == 768 * Size.symbol("B") * (Size.symbol("S") // 2)
    assert t.evaluate({"B": 2, "S": 7}) == (2, 768, 3)
    assert t.bytes_at({"B": 2, "S": 7}) == 2 * 768 * 3 * 4
    assert t.with_dtype(f16).bytes_at({"B": 2, "S": 7}) == 2 * 768 * 3 * 2
    assert [(f.size, f.label) for f in t.dims[1].factors] == [(12, "heads"), (64, None)]
    assert parse_type("i8[2, 3]").static_shape == (2, 3)
    assert parse_type("i8[]").static_shape == ()
    assert t.substitute({"S": 10}).text == "f32[B, (heads=12 64), 5]"


# -- dtypes --------------------------------------------------------------------------------------------------------


def test_indexing_a_dtype_gives_a_type() -> None:
    s = Size.symbol("S")
    cases: list[tuple[Type, str]] = [
        (f32["B S 768"], "f32[B, S, 768]"),
        (i64["B, S"], "i64[B, S]"),
        (f32[2, 3], "f32[2, 3]"),
        (f32[4], "f32[4]"),
        (f32[()], "f32[]"),
        (f32[""], "f32[]"),
        (f32[s], "f32[S]"),
        (f32[s, "2*S", 3], "f32[S, 2*S, 3]"),
        (f32[np.int64(3)], "f32[3]"),
        (f32[Dim.of(3072, "ffn"), 2], "f32[ffn=3072, 2]"),
        (boolean["B"], "bool[B]"),
    ]
    for made, text in cases:
        assert made.text == text
    with pytest.raises(SizeError, match=r"not 2\.5"):
        f32[2.5]  # type: ignore[index]


def test_none_beside_a_type_makes_it_optional() -> None:
    assert (i64["B"] | None) == OptionalType(i64["B"])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_dtypes_agree_with_numpy(dtype: DType) -> None:
    assert DTYPES[dtype.name] is dtype
    assert dtype.is_float + dtype.is_int + (dtype is boolean) == 1
    if dtype is bf16:
        assert dtype.numpy is None
        return
    assert dtype.numpy is not None
    assert dtype.numpy.itemsize == dtype.bytes
    assert dtype_of(np.zeros(1, dtype.numpy)) is dtype
    assert dtype.is_float == (dtype.numpy.kind == "f")


def test_arrays_without_a_dtype() -> None:
    for kind in (np.complex64, np.uint32, object, "U3", ">f4"):
        assert dtype_of(np.zeros(1, kind)) is None


# -- constants -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "dtype", "kind"),
    [
        (1.5, None, f32),
        ([0.5, 2.0], None, f32),
        (3, None, i64),
        (True, None, boolean),
        (np.float64(1.5), None, f64),
        (np.zeros(2), None, f64),
        (np.float16(1), None, f16),
        (1, f32, f32),
        (2.0, i64, i64),
        (1, boolean, boolean),
        (255, u8, u8),
        (0.1, bf16, bf16),
    ],
)
def test_the_dtype_of_a_constant(value: Any, dtype: DType | None, kind: DType) -> None:
    literal = Literal.of(value, dtype)
    assert literal.dtype is kind
    assert literal.shape == np.shape(value)
    assert len(literal.data) == np.size(value) * kind.bytes


@pytest.mark.parametrize(
    ("value", "dtype", "said"),
    [
        (0.5, i64, "0.5 is not of dtype i64"),
        ([1, 2.5], i64, "2.5 is not of dtype i64"),
        (300, u8, "300 is not of dtype u8"),
        (-1, u8, "-1 is not of dtype u8"),
        (2**31, i8, "is not of dtype i8"),
        (2**63, i64, "is not of dtype i64"),
        (float("nan"), i64, "nan is not of dtype i64"),
        (float("inf"), i64, "inf is not of dtype i64"),
        (2, boolean, "2 is not of dtype bool"),
        (1e5, f16, "100000.0 is out of the range of f16"),
        (1e39, f32, "is out of the range of f32"),
        (3.4e38, bf16, "is out of the range of bf16"),
        (2**64, None, "cannot hold an integer of 65 bits"),
        ([1, 2**63, -(10**5000)], f32, "cannot hold an integer of 16610 bits"),
        ("a", None, "cannot hold"),
        (1j, f32, "cannot hold complex128"),
        (None, None, "cannot hold object"),
        ([[1, 2], [3]], None, "cannot build a constant from lists of different lengths"),
    ],
)
def test_a_constant_changes_no_number_unseen(value: Any, dtype: DType | None, said: str) -> None:
    with pytest.raises(GraphError) as caught:
        Literal.of(value, dtype)
    assert said in str(caught.value)


def test_bf16_rounds_to_nearest_even() -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 20_000, dtype=np.uint32)
    ties = (bits & 0xFFFF0000) | 0x8000
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 3.38e38, -3.38e38, 1e-45], np.float32).view(np.uint32)
    values = np.concatenate([bits, ties, special]).view(np.float32)
    # bf16 ends at 3.39e38, so these numbers are left out
    values = values[~(np.isfinite(values) & (abs(values) > 3.38e38))]
    wanted = torch.from_numpy(values).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(Literal.of(values, bf16).array, wanted)
    assert Literal.of(1.0, bf16).scalar == 1.0
    assert Literal.of(1 / 3, bf16).scalar == pytest.approx(1 / 3, rel=2**-8)


def test_constants_are_equal_by_content() -> None:
    assert Literal.of([1.0, 2.0]) == Literal.of(np.array([1, 2]), f32)
    assert Literal.of(0.0) != Literal.of(-0.0)
    assert Literal.of(np.zeros(0, np.float32)) != Literal.of(np.zeros((0, 2), np.float32))
    assert Literal.of(np.array([1, 2], ">i8"), i64).array.tolist() == [1, 2]
    assert Literal.of(np.arange(6).reshape(2, 3).T).array.tolist() == [[0, 3], [1, 4], [2, 5]]
    with pytest.raises(ValueError, match="read-only"):
        Literal.of([1.0]).array[0] = 2.0


# -- initial values ------------------------------------------------------------------------------------------------


def test_initial_values() -> None:
    def drawn(init: Init) -> np.ndarray[Any, Any]:
        return init.draw((4, 5000), f32, np.random.default_rng(3))

    assert (drawn(Init("zeros")) == 0).all()
    assert (drawn(Init("ones")) == 1).all()
    # the standard deviation of 20,000 draws is within 5 sigma = 5 / sqrt(2 * 20,000) = 2.5 % of the true one
    assert drawn(Init("normal", 0.02)).std() == pytest.approx(0.02, rel=0.025)
    assert drawn(Init("normal")).std() == pytest.approx(1, rel=0.025)
    assert (drawn(Init("normal", 0.0)) == 0).all(), "a scale of zero is a scale"
    uniform = drawn(Init("uniform", 0.1))
    assert 0.099 < uniform.max() <= 0.1
    assert -0.1 <= uniform.min() < -0.099
    np.testing.assert_array_equal(drawn(Init("normal", 0.02)), drawn(Init("normal", 0.02)))


def test_initial_values_that_cannot_be_drawn() -> None:
    with pytest.raises(GraphError, match="unknown initial value 'xavier'"):
        Init("xavier")
    with pytest.raises(GraphError, match="the scale of the initial value normal must be a number"):
        Init("normal", "0.02")  # type: ignore[arg-type]
    with pytest.raises(GraphError, match="cannot be drawn in bf16"):
        Init("ones").draw((2,), bf16, np.random.default_rng(0))

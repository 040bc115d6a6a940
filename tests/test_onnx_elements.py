"""Tensors of ONNX files: every element type, raw or in its typed field, is read with the same numbers as by onnx
itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")
ml_dtypes = pytest.importorskip("ml_dtypes")

from onnx import TensorProto, helper, numpy_helper

from treadle.frontends.onnx_import.file import OnnxFile, OnnxLimits
from treadle.frontends.onnx_import.importer import import_onnx
from treadle.frontends.onnx_import.rules.elements import carried, element, named, restored
from treadle.frontends.onnx_import.values import as_sizes, tidied
from treadle.ir.errors import FrontendError
from treadle.ir.ops.rounding import FORMATS, RoundTo
from treadle.ir.sizing.sizes import Size
from treadle.ir.types import DTYPES

TYPES = [
    "FLOAT", "UINT8", "INT8", "UINT16", "INT16", "INT32", "INT64", "BOOL", "FLOAT16", "DOUBLE", "UINT32", "UINT64",
    "BFLOAT16", "FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ", "UINT4", "INT4", "FLOAT4E2M1",
    "UINT2", "INT2",
]  # fmt: skip


@pytest.fixture(scope="module")
def file() -> OnnxFile:
    """Write a model from which tensors are read."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    proto = helper.make_model(helper.make_graph([], "g", [x], [x]))
    return OnnxFile.open(proto, OnnxLimits())


def values(name: str, count: int = 21) -> np.ndarray[Any, Any]:
    """Return numbers of a type, including its limits. (An odd count leaves half a byte of 4-bit elements.)"""
    kind = element(getattr(TensorProto, name))
    if name == "BOOL":
        return np.arange(count) % 3 == 0
    if kind.least is not None and kind.greatest is not None:
        ends = [kind.least, kind.greatest, 0, kind.greatest - 1]
        dtype = np.uint64 if name == "UINT64" else np.int64
        return np.array([ends[i % 4] for i in range(count)], dtype)
    return np.linspace(-3, 3, count)


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("name", TYPES)
def test_elements_are_read_as_onnx_reads_them(name: str, raw: bool, file: OnnxFile) -> None:
    number = getattr(TensorProto, name)
    dtype = helper.tensor_dtype_to_np_dtype(number)
    array = values(name).astype(dtype).reshape(3, 7)
    proto = numpy_helper.from_array(array, "w")
    if not raw:
        proto = helper.make_tensor("w", number, array.shape, array.reshape(-1))
    wanted = numpy_helper.to_array(proto)
    kind = element(number)
    found = file.tensor(proto, "w").array()
    assert found.shape == (3, 7)
    assert found.dtype == (kind.carrier.numpy or np.float32)
    np.testing.assert_array_equal(restored(kind, found).astype(np.float64), wanted.astype(np.float64))
    np.testing.assert_array_equal(carried(kind, wanted), found)


@pytest.mark.parametrize("name", ["FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ", "FLOAT4E2M1"])
def test_every_code_of_a_small_float_is_its_number(name: str, file: OnnxFile) -> None:
    kind = element(getattr(TensorProto, name))
    codes = np.arange(2**kind.bits, dtype=np.uint8)
    data = codes if kind.bits == 8 else codes[::2] | codes[1::2] << 4
    proto = TensorProto(name="w", data_type=kind.number, dims=[len(codes)], raw_data=data.tobytes())
    wanted = codes.view(helper.tensor_dtype_to_np_dtype(kind.number)).astype(np.float32)
    found = file.tensor(proto, "w").array()
    np.testing.assert_array_equal(found, wanted)
    number = ~np.isnan(wanted)
    np.testing.assert_array_equal(np.signbit(found[number]), np.signbit(wanted[number]))


def test_elements_that_are_not_as_many_as_the_shape_asks_for_are_refused(file: OnnxFile) -> None:
    proto = helper.make_tensor("w", TensorProto.FLOAT, (2, 3), np.zeros(6))
    proto.float_data.append(1.0)
    with pytest.raises(FrontendError, match="does not match its shape") as caught:
        file.tensor(proto, "w").array()
    assert "7 in float_data, not 6" in str(caught.value)


def test_our_own_dtypes_have_an_element_type() -> None:
    for dtype in DTYPES.values():
        assert named(dtype.name).carrier is dtype
    with pytest.raises(FrontendError, match="element type f8 is not supported"):
        named("f8")


# -- rounding ------------------------------------------------------------------------------------------------------

THEIRS = {
    "bf16": "bfloat16",
    "f8e4m3fn": "float8_e4m3fn",
    "f8e4m3fnuz": "float8_e4m3fnuz",
    "f8e5m2": "float8_e5m2",
    "f8e5m2fnuz": "float8_e5m2fnuz",
    "f4e2m1": "float4_e2m1fn",
}


@pytest.mark.parametrize("format", FORMATS)
def test_rounding_is_that_of_ml_dtypes(format: str) -> None:
    """Every half-way point between two numbers of the format, its neighbours, and numbers beyond the format's range."""
    dtype = getattr(ml_dtypes, THEIRS[format])
    bits = 16 if format == "bf16" else 8 if format.startswith("f8") else 4
    codes = np.arange(2**bits, dtype=np.uint16 if bits == 16 else np.uint8)
    with np.errstate(all="ignore"):
        numbers = codes.view(dtype).astype(np.float64)
    numbers = np.unique(numbers[np.isfinite(numbers)])
    between = (numbers[1:] + numbers[:-1]) / 2
    top = FORMATS[format].largest
    x = np.concatenate(
        [numbers, between, numbers * 1.001, [-0.0, -1e-30, top * 1.01, top * 1.5, -top * 4, np.inf, -np.inf]]
    )
    with np.errstate(all="ignore"):
        x = x.astype(np.float32)
        wanted = x.astype(dtype).astype(np.float32)
    found = RoundTo(format=format).reference(x)
    np.testing.assert_array_equal(found, wanted)
    ordered = ~np.isnan(wanted)
    np.testing.assert_array_equal(np.signbit(found[ordered]), np.signbit(wanted[ordered]))  # -0 is not 0
    held = RoundTo(format=format, saturate=True).reference(x)
    assert np.all(np.abs(held) <= top)
    inside = np.abs(x) <= top
    np.testing.assert_array_equal(held[inside], wanted[inside])


def test_nan_stays_where_the_format_has_it() -> None:
    x = np.array([np.nan], np.float32)
    for format, known in FORMATS.items():
        (found,) = RoundTo(format=format, saturate=True).reference(x)
        assert np.isnan(found) == (known.beyond is not None)


# -- known content -------------------------------------------------------------------------------------------------


def test_known_sizes_are_numbers_where_all_are() -> None:
    numbers = tidied([Size.of(2), 3], (2,))
    assert numbers.dtype == np.int64
    sizes = tidied([Size.of("S"), 3], (2,))
    assert sizes.dtype == object
    assert as_sizes(sizes) == [Size.of("S"), Size.of(3)]


@pytest.mark.parametrize(
    ("kind", "bits"),
    [
        ("FLOAT", np.array([0x80000000, 1, 0x7FC12345, 0xFF800000, 0x3EAAAAAB], "<u4")),
        ("FLOAT16", np.array([0x8000, 1, 0x7E05, 0xFC00, 0x3555], "<u2")),
        ("BFLOAT16", np.array([0x8000, 1, 0x7FC0, 0xFF80, 0x3EAB], "<u2")),
        ("DOUBLE", np.array([1 << 63, 1, 0x7FF8000012345678, 0xFFF << 52, 0x3FD5555555555555], "<u8")),
    ],
)
def test_a_constant_keeps_every_bit(kind: str, bits: np.ndarray[Any, Any]) -> None:
    """Minus zero, the least number, a NaN (with a payload, except for bf16), minus infinity, a third."""
    number = TensorProto.DataType.Value(kind)
    tensor = TensorProto(data_type=number, dims=[5], raw_data=bits.tobytes())
    node = helper.make_node("Constant", [], ["y"], value=tensor)
    y = helper.make_tensor_value_info("y", number, [5])
    graph = helper.make_graph([node], "g", [], [y])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    literal = import_onnx(proto).graph.main.outputs["y"].literal
    assert literal is not None
    assert literal.data == bits.tobytes()

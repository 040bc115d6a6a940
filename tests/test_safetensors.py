"""The safetensors reader: every dtype is compared with the format's own library, and every kind of damage to a file is
refused.
"""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.fuzz.safetensors_files import header_and_data, judge, mutations
from treadle.frontends.safetensors_file import CheckpointLimits, SafetensorsFile
from treadle.ir.errors import CheckpointError, UsageError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def write(path: Path, header: object, data: bytes = b"", pad: int = 8) -> Path:
    path.write_bytes(header_and_data(header, data, pad))
    return path


def entry(dtype: str, shape: Any, begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def refusal(path: Path, limits: CheckpointLimits | None = None) -> CheckpointError:
    """Return the error of reading all of a file; it names the file."""

    def read_all() -> None:
        file = SafetensorsFile.open(path, limits)
        for name in file:
            file.array(name)

    with pytest.raises(CheckpointError) as caught:
        read_all()
    assert caught.value.within is not None
    assert str(path) in caught.value.within
    return caught.value


def same(error: CheckpointError, path: Path, text: str) -> None:
    """Check the whole text of an error, in which FILE replaces the path."""
    assert str(error).replace(str(path), "FILE") == text.strip("\n")


# -- reading -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype",
    ["f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?", "c8"],
)
@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (5, 3), (2, 3, 4)])
def test_dtypes_as_the_library_writes_them(path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    wanted = np.asarray(rng.integers(0, 100, shape)).astype(dtype)
    save_file({"x": wanted, "y": np.ones(3, np.float32)}, path)
    file = SafetensorsFile.open(path)
    array = file.array("x")
    assert array.dtype == wanted.dtype
    assert array.shape == shape == file["x"].shape
    np.testing.assert_array_equal(array, wanted)
    assert not array.flags.writeable
    assert array.flags.aligned
    assert file.raw("x").tobytes() == wanted.tobytes()
    assert file["x"].nbytes == wanted.nbytes


@pytest.mark.parametrize(
    ("dtype", "ours"),
    [
        ("float64", "f64"), ("float32", "f32"), ("float16", "f16"), ("bfloat16", "bf16"), ("int64", "i64"),
        ("int32", "i32"), ("int16", "i16"), ("int8", "i8"), ("uint8", "u8"), ("bool", "bool"),
    ],
)  # fmt: skip
def test_dtypes_as_torch_writes_them(path: Path, dtype: str, ours: str) -> None:
    torch = pytest.importorskip("torch")
    saver = pytest.importorskip("safetensors.torch")
    wanted = (torch.randn(64, 5, generator=torch.Generator().manual_seed(0)) * 100).to(getattr(torch, dtype))
    saver.save_file({"x": wanted}, path)
    file = SafetensorsFile.open(path)
    assert file["x"].dtype == ours
    held = wanted.float() if dtype == "bfloat16" else wanted
    np.testing.assert_array_equal(file.array("x"), held.numpy())


def test_bf16_widens_every_bit_pattern(path: Path) -> None:
    """Every bf16 number, infinities and NaN payloads included, is the upper half of a float32."""
    bits = np.arange(2**16, dtype="<u2")
    array = SafetensorsFile.open(write(path, {"w": entry("BF16", [2**16], 0, 2**17)}, bits.tobytes())).array("w")
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array.view(np.uint32), bits.astype(np.uint32) << 16)


def test_arrays_are_views_of_one_mapping(path: Path) -> None:
    save_file({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(4, dtype=np.int64)}, path)
    file = SafetensorsFile.open(path)
    for name in file:
        array = file.array(name)
        assert np.shares_memory(array, file.array(name))
        at = array.__array_interface__["data"][0] - file.raw("a").__array_interface__["data"][0]
        assert at == file[name].begin - file["a"].begin


def test_opening_does_not_read_the_tensors(tmp_path: Path) -> None:
    """A sparse file of 64 GiB is opened, and its last element is read. Only touched pages are loaded."""
    path, size = tmp_path / "large.safetensors", 2**36
    header = header_and_data({"w": entry("F32", [size // 4], 0, size)}, b"")
    with open(path, "wb") as file:
        file.write(header)
        try:
            file.truncate(len(header) + size)
        except OSError:
            pytest.skip("the file system has no sparse files")
    tracemalloc.start()
    array = SafetensorsFile.open(path).array("w")
    last = array[-1]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert array.shape == (size // 4,)
    assert last == 0.0
    assert peak < 100_000


def test_misaligned_data_is_copied_to_where_it_is_aligned(path: Path) -> None:
    wanted = np.arange(5, dtype="<f8")
    data = b"\x07" + wanted.tobytes() + b"\x01\x02"
    header = {"odd": entry("U8", [1], 0, 1), "w": entry("F64", [5], 1, 41), "h": entry("BF16", [1], 41, 43)}
    file = SafetensorsFile.open(write(path, header, data, pad=8))
    assert file["w"].begin % 8 == 1
    assert file.array("w").flags.aligned
    assert not file.array("w").flags.writeable
    np.testing.assert_array_equal(file.array("w"), wanted)
    assert file.array("h").view(np.uint32)[0] == 0x02010000


def test_arrays_outlive_the_file_object(path: Path) -> None:
    save_file({"a": np.arange(1000)}, path)
    array = SafetensorsFile.open(path).array("a")
    path.unlink()
    assert array.sum() == 499_500


def test_names_are_in_the_headers_order_whatever_the_datas(path: Path) -> None:
    header = {"z": entry("U8", [1], 1, 2), "a": entry("U8", [1], 0, 1), "m": entry("U8", [0], 2, 2)}
    file = SafetensorsFile.open(write(path, header, b"\x05\x06"))
    assert file.names() == ("z", "a", "m") == tuple(file)
    assert len(file) == 3
    assert [file.array(n).tolist() for n in file] == [[6], [5], []]
    assert "z" in file
    assert "b" not in file
    assert str(file["m"]) == "u8[0]"


def test_metadata(path: Path) -> None:
    texts = {"format": "pt", "note": 'caf\u00e9 "\\" \n\t\U0001f642'}
    save_file({"a": np.zeros(1)}, path, texts)
    file = SafetensorsFile.open(path)
    assert dict(file.metadata) == texts
    with pytest.raises(TypeError):
        file.metadata["format"] = "other"  # type: ignore[index]
    assert dict(SafetensorsFile.open(write(path.with_name("b.safetensors"), {})).metadata) == {}


def test_escaped_names(path: Path) -> None:
    header = b'{"a\\u00e9\\n\\ud83d\\ude42\\"":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    assert SafetensorsFile.open(write(path, header, b"\x01")).names() == ('a\u00e9\n\U0001f642"',)


def test_an_unknown_tensor_names_the_nearest(path: Path) -> None:
    save_file({"h.0.attn.weight": np.zeros(1), "h.0.attn.bias": np.zeros(1), "wte": np.zeros(1)}, path)
    with pytest.raises(CheckpointError) as caught:
        SafetensorsFile.open(path).array("h.0.attn.weights")
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("did you mean h.0.attn.weight or ")


@pytest.mark.parametrize(("dtype", "bits"), [("F8_E5M2", 8), ("F8_E8M0", 8), ("F6_E2M3", 6), ("F6_E3M2", 6), ("F4", 4)])
def test_each_narrow_float_has_its_width_and_is_refused_by_name(path: Path, dtype: str, bits: int) -> None:
    """Four elements of n bits take n / 2 bytes; a file with one byte more or less is damaged."""
    count = bits // 2
    file = SafetensorsFile.open(write(path, {"w": entry(dtype, [4], 0, count)}, bytes(count)))
    assert str(file["w"]) == f"{dtype.lower()}[4]"
    with pytest.raises(CheckpointError, match="NumPy has no dtype that holds the tensor") as refused:
        file.array("w")
    assert refused.value.received == f"{dtype.lower()}[4]"
    for wrong in (count - 1, count + 1):
        with pytest.raises(CheckpointError) as damaged:
            SafetensorsFile.open(write(path, {"w": entry(dtype, [4], 0, wrong)}, bytes(wrong)))
        assert "w" in (damaged.value.within or "")


@pytest.mark.parametrize("dtype", ["F6", "F4_E2M1", "f4", "F8"])
def test_a_dtype_that_the_format_lacks_is_refused_by_name(path: Path, dtype: str) -> None:
    with pytest.raises(CheckpointError, match="unknown dtype") as refused:
        SafetensorsFile.open(write(path, {"w": entry(dtype, [4], 0, 4)}, bytes(4)))
    assert refused.value.received == dtype


def test_narrow_floats_are_known_but_have_no_array(path: Path) -> None:
    file = SafetensorsFile.open(write(path, {"w": entry("F8_E4M3", [2], 0, 2)}, b"\x01\x02"))
    assert str(file["w"]) == "f8_e4m3[2]"
    assert file.raw("w").tolist() == [1, 2]
    assert "NumPy has no dtype" in str(refusal(path))


# -- refusing: the text ------------------------------------------------------------------------------------


def test_text_header_length_too_large(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2**40) + b"{}" + bytes(100))
    same(
        refusal(path),
        path,
        """
the header is longer than the file
  received  a header length of 1099511627776 bytes, in a file of 110
  in        FILE: byte 0, header length
  try       fetch the file again: it is damaged, or of another format than its name indicates
""",
    )


def test_text_truncated(path: Path) -> None:
    save_file({"h.0.ln.weight": np.ones(8, np.float32), "h.1.ln.weight": np.ones(8, np.float32)}, path)
    path.write_bytes(path.read_bytes()[:-12])
    same(
        refusal(path),
        path,
        """
the file ends before its tensors do
  received  196 bytes, and the header declares 208
  in        FILE: tensor h.1.ln.weight, data_offsets [32, 64]
  try       fetch the file again: its end is missing
""",
    )


def test_text_field(path: Path) -> None:
    write(path, {"w": entry("F32", [2, -3], 0, 24)}, bytes(24))
    same(
        refusal(path),
        path,
        """
expected a size, an integer from 0 to 2^63 - 1
  received  -3
  in        FILE: header, byte 44, tensor w, shape
""",
    )
    assert path.read_bytes()[44:46] == b"-3"


@pytest.mark.parametrize(
    ("start", "nature"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "a Git LFS pointer"),
        (b"PK\x03\x04\x14\x00\x08\x08\x00\x00", "zip archive"),
        (b"\x80\x02ctorch._utils\n", "a pickle"),
        (b"GGUF\x03\x00\x00\x00\x05", "a GGUF file"),
        (b"<!DOCTYPE html><html>", "a web page"),
    ],
)
def test_another_format_under_the_name_is_told(path: Path, start: bytes, nature: str) -> None:
    path.write_bytes(start + bytes(100))
    assert nature in (refusal(path).received or "")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.PTH", "a.ckpt", "weights.pkl"])
def test_pickles_are_refused_by_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"")
    error = refusal(path)
    assert "pickle" in error.what
    assert "safetensors" in (error.hint or "")


@pytest.mark.parametrize("others", [[], ["model.safetensors"], ["model.safetensors", "a.safetensors"]])
def test_a_pickle_is_converted_to_a_file_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others: list[str]
) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    for name in others:
        Path(name).write_bytes(b"before")
    torch.save({"w": torch.ones(2)}, "a.pt")
    with pytest.raises(CheckpointError) as refused:
        SafetensorsFile.open("a.pt")
    exec((refused.value.hint or "").partition("\n")[2])
    assert all(Path(name).read_bytes() == b"before" for name in others)
    (made,) = {path.name for path in tmp_path.iterdir()} - {"a.pt", *others}
    assert SafetensorsFile.open(made).array("w").tolist() == [1, 1]


# -- refusing: the rules -----------------------------------------------------------------------------------

PAIR = {"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 2, 4)}
ONE = json.dumps(PAIR["a"]).encode()
RULES: list[tuple[str, object, bytes, str, str]] = [
    # the damage, header, data, words of the error, place of the error
    ("no object", [], b"", "must begin with '{'", "byte 8, header"),
    ("space first", b" {}", b"", "must begin with '{'", "byte 8, header"),
    ("zeros after", b"{}\x00", b"", "expected the end", "byte 10"),
    ("not closed", b'{"a"', b"", "expected ':'", "byte 16"),
    ("not UTF-8", b'{"\xff"', b"", "not UTF-8", "byte 10"),
    ("control character", b'{"a\x1b[2J": 1}', b"", "control character", "byte 11"),
    ("lone surrogate", b'{"\\ud800": 1}', b"", "an invalid escape", "byte 9"),
    ("comma last", b'{"__metadata__": {"a": "b",}}', b"", "expected a key", "byte 35, __metadata__"),
    ("tensor twice", b'{"a": %s, "a": %s}' % (ONE, ONE), bytes(2), "a duplicate key", "byte 69"),
    ("field twice", b'{"a": {"dtype": "U8", "dtype": "I8"}}', b"", "a duplicate key", "byte 30, tensor a, dtype"),
    ("metadata not text", {"__metadata__": {"a": 1}}, b"", "expected a text", "byte 31, __metadata__"),
    ("metadata no object", {"__metadata__": "pt"}, b"", "expected an object of texts", "byte 25, __metadata__"),
    ("entry no object", {"a": 1}, b"", "expected an object of dtype", "byte 14, tensor a"),
    ("entry nested", {"a": {"dtype": {}}}, b"", "expected a string", "byte 24, tensor a, dtype"),
    ("unknown field", {"a": {**PAIR["a"], "strides": [1]}}, bytes(2), "no such field", "byte 78, tensor a, strides"),
    ("no dtype", {"a": {"shape": [1], "data_offsets": [0, 1]}}, bytes(1), "lacks dtype", "byte 52, tensor a"),
    ("nothing", {"a": {}}, bytes(1), "lacks dtype and shape and data_offsets", "byte 16, tensor a"),
    ("unknown dtype", {"a": entry("F128", [1], 0, 16)}, bytes(16), "unknown dtype", "byte 30, tensor a, dtype"),
    ("dtype in our name", {"a": entry("f32", [1], 0, 4)}, bytes(4), "unknown dtype", "byte 29, tensor a, dtype"),
    ("shape of a float", {"a": entry("U8", [1.0], 0, 1)}, bytes(1), "expected", "byte 40, tensor a, shape"),
    ("shape of a bool", {"a": entry("U8", [True], 0, 1)}, bytes(1), "expected a size", "byte 40, tensor a, shape"),
    ("shape not a list", {"a": entry("U8", 1, 0, 1)}, bytes(1), "expected an array", "byte 39, tensor a, shape"),
    ("leading zero", b'{"a": {"shape": [01]}}', b"", "expected", "byte 26, tensor a, shape"),
    ("2^63", {"a": entry("U8", [2**63], 0, 1)}, bytes(1), "expected a size", "byte 40, tensor a, shape"),
    ("product wraps to 0", {"a": entry("U8", [2**32, 2**32], 0, 0)}, b"", "past 2^63", "byte 62, tensor a, shape"),
    ("product wraps again", {"a": entry("U8", [2**62, 2, 2], 0, 4)}, b"", "past 2^63", "byte 59, tensor a, shape"),
    ("huge but empty", {"a": entry("U8", [0, 2**62, 2**62], 0, 0)}, b"", "past 2^63", "byte 62, tensor a, shape"),
    ("rank", {"a": entry("U8", [1] * 17, 0, 1)}, bytes(1), "more dimensions", "byte 87, tensor a, shape"),
    ("size too small", {"a": entry("F32", [2], 0, 7)}, bytes(7), "do not match its dtype", "byte 68, tensor a"),
    ("size too large", {"a": entry("F32", [2], 0, 9)}, bytes(9), "do not match its dtype", "byte 68, tensor a"),
    ("half a byte", {"a": entry("F4", [3], 0, 2)}, bytes(2), "whole byte", "byte 67, tensor a"),
    ("end before begin", {"a": entry("U8", [2], 2, 0)}, bytes(2), "ends before it", "byte 66, tensor a, data_offsets"),
    ("negative begin", {"a": entry("U8", [2], -2, 0)}, bytes(2), "expected begin", "byte 61, tensor a, data_offsets"),
    ("three offsets", {"a": {"data_offsets": [0, 2, 2]}}, bytes(2), "expected ']'", "byte 36, tensor a, data_offsets"),
    ("past the end", {"a": entry("U8", [4], 0, 4)}, bytes(2), "file ends before", "data_offsets [0, 4]"),
    ("past by far", {"a": entry("U8", [1], 2**63 - 2, 2**63 - 1)}, b"", "file ends", f"[{2**63 - 2}, {2**63 - 1}]"),
    ("shared", {**PAIR, "c": entry("U8", [2], 1, 3)}, bytes(4), "share bytes", "data_offsets [1, 3]"),
    ("same range", {**PAIR, "c": entry("U8", [2], 0, 2)}, bytes(4), "share bytes", "data_offsets [0, 2]"),
    ("empty inside another", {**PAIR, "c": entry("U8", [0], 1, 1)}, bytes(4), "share bytes", "data_offsets [1, 1]"),
    ("hole first", {"a": entry("U8", [2], 1, 3)}, bytes(3), "belong to no tensor", "data_offsets [1, 3]"),
    ("hole between", {**PAIR, "b": entry("U8", [2], 3, 5)}, bytes(5), "belong to no tensor", "data_offsets [3, 5]"),
    ("bytes after", PAIR, bytes(5), "after the last tensor", "byte 132"),
    ("bytes and no tensors", {}, bytes(1), "after the last tensor", "byte 16"),
    ("bool of 2", {"a": entry("BOOL", [3], 0, 3)}, b"\x01\x02\x00", "neither 0 nor 1", "byte 73, tensor a"),
]  # fmt: skip


@pytest.mark.parametrize(("header", "data", "words", "place"), [r[1:] for r in RULES], ids=[r[0] for r in RULES])
def test_rule(path: Path, header: object, data: bytes, words: str, place: str) -> None:
    error = refusal(write(path, header, data))
    assert words in error.what
    assert (error.within or "").endswith(f" {place}")


@pytest.mark.parametrize("length", range(8))
def test_shorter_than_a_length(path: Path, length: int) -> None:
    path.write_bytes(b"\x02" + bytes(length - 1) if length else b"")
    assert "too short" in refusal(path).what


def test_every_truncation_is_refused(path: Path) -> None:
    save_file({"a": np.arange(3.0), "b": np.ones((2, 2), np.float16)}, path, {"format": "np"})
    whole = path.read_bytes()
    for length in range(len(whole)):
        cut = path.with_name(f"{length}.safetensors")
        cut.write_bytes(whole[:length])
        refusal(cut)


def test_a_file_shows_as_one_line(path: Path) -> None:
    assert repr(SafetensorsFile.open(write(path, PAIR, bytes(4)))) == f"SafetensorsFile({str(path)!r}, 2 tensors)"


def test_limits(path: Path) -> None:
    assert CheckpointLimits() == CheckpointLimits(32 * 2**20, 250_000, 16, 4 * 2**20, 200_000, 32)
    assert CheckpointLimits(rank=64, nesting=100)
    for beyond in ({"rank": 65}, {"nesting": 101}, {"tensors": 2**63}):
        with pytest.raises(UsageError, match=f"must be an integer from 1 to {max(beyond.values()) - 1}"):
            CheckpointLimits(**beyond)
    header = {f"t{i}": entry("U8", [1, 1, 1], i, i + 1) for i in range(5)}
    write(path, {"__metadata__": {"a": "", "b": "", "c": ""}, **header}, bytes(5))
    length = int.from_bytes(path.read_bytes()[:8], "little")
    needed = CheckpointLimits(tensors=5, rank=3, values=3, header_bytes=length, nesting=3)
    assert len(SafetensorsFile.open(path, needed)) == 5
    for limits, words, hint in [
        (CheckpointLimits(tensors=4), "more tensors", "limits={'tensors': 16}"),
        (CheckpointLimits(rank=2), "more dimensions", "limits={'rank': 8}"),
        (CheckpointLimits(header_bytes=length - 1), "longer than the limit", f"limits={{'header_bytes': {length}}}"),
        (CheckpointLimits(values=2), "more members", "limits={'values': 8}"),
        (CheckpointLimits(nesting=2), "deep", ""),
    ]:
        error = refusal(path, limits)
        assert words in error.what
        assert hint in (error.hint or "")


@pytest.mark.parametrize("field", ["header_bytes", "tensors", "rank", "config_bytes", "values", "nesting"])
@pytest.mark.parametrize("value", [0, -1, 2**70, "many", None])
def test_a_limit_is_a_positive_integer(field: str, value: Any) -> None:
    with pytest.raises(UsageError, match=field):
        CheckpointLimits(**{field: value})


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "folder.safetensors"
    folder.mkdir()
    refusal(folder)
    refusal(tmp_path / "absent.safetensors")
    if hasattr(os, "mkfifo"):
        pipe = tmp_path / "pipe.safetensors"
        os.mkfifo(pipe)  # an ordinary open would wait for a writer forever
        assert "not a regular file" in refusal(pipe).what


@pytest.mark.skipif(os.name == "nt", reason="a mapped file cannot be truncated on Windows")
def test_a_file_that_is_cut_after_opening_is_noticed(path: Path) -> None:
    save_file({"a": np.zeros(5000)}, path)
    file = SafetensorsFile.open(path)
    os.truncate(path, 100)
    with pytest.raises(CheckpointError, match="has changed since it was opened"):
        file.array("a")


def test_names_with_terminal_escapes_are_shown_escaped(path: Path) -> None:
    write(path, {"\x1b[2J\u202e" + "n" * 5000: entry("F128", [1], 0, 1)}, bytes(1))
    text = str(refusal(path))
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "\\x1b[2J\\u202e" in text
    assert len(text) < 1000


# -- refusing: hostile sizes and random damage -------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        b"{" + b"[" * 500_000,
        b'{"a":' * 100_000,
        b'{"__metadata__":' + b"[" * 500_000,
        b"{" + b'"' * 500_000,
        b'{"' + b'\\"' * 250_000,
        b'{"' + b"\\u0001" * 80_000 + b'":1}',
        b"{" + b" " * 500_000,
        b'{"a":{"shape":[' + b"9" * 500_000 + b"]}}",
        b'{"a":{"shape":[' + b"0," * 250_000 + b"0]}}",
        b'{"__metadata__":{' + b",".join(b'"%x":""' % i for i in range(50_000)) + b",}}",
        b"{" + b",".join(b'"%x":{"dtype":"F128"}' % i for i in range(20_000)) + b"}",
    ],
    ids=lambda text: text[:20].decode(),
)
def test_hostile_headers_cost_no_more_than_their_length(path: Path, text: bytes) -> None:
    """Work is counted in calls and memory in bytes; both are bounded by a multiple of the file's length."""
    verdict = judge(header_and_data(text, b""), path)
    assert verdict.failure is None
    assert verdict.outcome == "refused"
    tracemalloc.start()
    refusal(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 * len(text) + 100_000


def test_mutations(tmp_path: Path) -> None:
    """600 damaged files; tests/fuzz/safetensors_files.py tries 10,000 of the same kind."""
    outcomes = set()
    for number, (kind, file) in enumerate(mutations(600, seed=7)):
        verdict = judge(file, tmp_path / f"{number}.safetensors")
        assert verdict.failure is None, f"mutation {number} ({kind}): {verdict.failure}"
        outcomes.add(verdict.outcome)
    assert outcomes == {"equal", "refused", "stricter"}

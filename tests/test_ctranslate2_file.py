"""The reader of CTranslate2's model.bin: its results, and the errors for damaged files, which give the byte offset."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from treadle.frontends.ctranslate2_file import CTranslate2File
from treadle.frontends.safetensors_file import CheckpointLimits
from treadle.ir.errors import CheckpointError
from treadle.models.whisper import from_ctranslate2

Array = np.ndarray[Any, Any]

NUMBERS = {"<f4": 0, "i1": 1, "<i2": 2, "<i4": 3, "<f2": 4}


def text(value: str) -> bytes:
    return struct.pack("<H", len(value.encode()) + 1) + value.encode() + b"\0"


def variable(name: str, array: Array, number: int | None = None) -> bytes:
    code = NUMBERS[next(c for c in NUMBERS if np.dtype(c) == array.dtype)] if number is None else number
    dims = struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
    return text(name) + dims + struct.pack("<BI", code, array.nbytes) + array.tobytes()


def model(
    *variables: bytes, aliases: Mapping[str, str] | None = None, version: int = 6, specification: str = "WhisperSpec"
) -> bytes:
    head = struct.pack("<I", version) + text(specification) + struct.pack("<II", 3, len(variables))
    tail = struct.pack("<I", len(aliases or {})) + b"".join(text(a) + text(b) for a, b in (aliases or {}).items())
    return head + b"".join(variables) + tail


WHOLE = model(
    variable("a/weight", np.arange(6, dtype="<f4").reshape(2, 3)),
    variable("half", np.arange(5, dtype="<f2")),
    variable("bits", np.array([0x3F80, -0x4000], "<i2"), number=5),  # bf16: 1 and -2
    variable("option", np.array(-3, "i1")),
    aliases={"b/weight": "a/weight"},
)


def open_bytes(folder: Path, data: bytes, limits: CheckpointLimits | None = None) -> CTranslate2File:
    path = folder / "model.bin"
    path.write_bytes(data)
    return CTranslate2File.open(path, limits, shown="model.bin")


def test_reads_what_was_written(tmp_path: Path) -> None:
    file = open_bytes(tmp_path, WHOLE)
    assert (file.specification, file.revision) == ("WhisperSpec", 3)
    assert file.names() == ("a/weight", "half", "bits", "option")
    assert str(file.record("a/weight")) == "f32[2, 3]"
    for name in ("a/weight", "b/weight"):
        assert name in file
        np.testing.assert_array_equal(file.array(name), np.arange(6, dtype="<f4").reshape(2, 3))
    np.testing.assert_array_equal(file.array("half"), np.arange(5, dtype="<f2"))
    np.testing.assert_array_equal(file.array("bits"), np.array([1, -2], np.float32))
    assert file.array("option") == -3
    assert repr(file) == f"CTranslate2File('model.bin', {file.specification}, {len(file)} variables)"
    assert not file.array("a/weight").flags.writeable
    assert all(file.array(name).flags.aligned for name in file)
    with pytest.raises(CheckpointError, match="no variable a/wieght") as caught:
        file.array("a/wieght")
    assert "a/weight" in str(caught.value.hint)


ONE = np.zeros((2, 3), "<f4")


@pytest.mark.parametrize(
    ("data", "what", "place"),
    [
        (b"", "the file is empty", "byte 0"),
        (b"\x06\0", "the file ends within a record", "byte 0, version"),
        (model(version=5), "this version of the format is not supported", "byte 0, version"),
        (model(variable("a", ONE), variable("a", ONE)), "a variable appears twice", "byte 86, a, data"),
        (model(variable("a", ONE, number=6)), "the dtype is not known", "byte 39, a, dtype"),
        (model(variable("a", ONE, number=4)), "a variable's bytes do not equal dtype x shape", "byte 40, a, bytes"),
        (model(variable("a", ONE.reshape((1,) * 17 + (6,)))), "more dimensions than the limit", "byte 30, a, rank"),
        (
            model(variable("a", np.zeros((0, 1, 1), "<f4")).replace(struct.pack("<2I", 1, 1), b"\xff" * 8)),
            "a variable has more elements than NumPy supports",
            "byte 39, a, dimension 2",
        ),
        (model(variable("", ONE)) + b"\0", "the file continues after its last record", "byte 67, count of aliases"),
        (model(b"\0\0" + variable("", ONE)[3:]), "a text must have from 1 to", "byte 26, name, length"),
        (model(variable("a\0b", ONE)), "a text must end in its one NUL", "byte 28, name"),
        (model(variable("a", ONE).replace(b"a\0", b"\xff\0", 1)), "a text must be UTF-8", "byte 28, name"),
        (model(variable("a", ONE), aliases={"b": "c"}), "an alias refers to an unknown", "byte 78, aliased name"),
        (model(variable("a", ONE), aliases={"a": "a"}), "an alias refers to an unknown", "byte 78, aliased name"),
        (model()[:-8] + b"\xff" * 4, "the file declares more variables than the limit", "byte 22, count of variables"),
        (text("x").ljust(64, b"\xff"), "this version of the format is not supported", "byte 0, version"),
    ],
)  # fmt: skip
def test_refuses(tmp_path: Path, data: bytes, what: str, place: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_bytes(tmp_path, data)
    assert what in caught.value.what
    assert caught.value.within == f"model.bin: {place}"
    assert caught.value.hint


def test_a_file_that_is_cut_later(tmp_path: Path) -> None:
    file = open_bytes(tmp_path, WHOLE)
    with open(tmp_path / "model.bin", "r+b") as cut:
        cut.truncate(40)
    with pytest.raises(CheckpointError, match="changed since it was opened"):
        file.array("half")


def test_every_prefix_is_refused(tmp_path: Path) -> None:
    for end in range(len(WHOLE)):
        with pytest.raises(CheckpointError) as caught:
            open_bytes(tmp_path, WHOLE[:end])
        assert "byte" in str(caught.value.within)


def test_mutations(tmp_path: Path) -> None:
    """Two thousand files with some bytes changed, removed or inserted. Each is read, or refused with a byte offset."""
    rng = np.random.default_rng(0)
    refusals = []
    for _ in range(2000):
        data = bytearray(WHOLE)
        for _ in range(rng.integers(1, 4)):
            at = int(rng.integers(len(data)))
            match rng.integers(4):
                case 0:
                    data[at] ^= 1 << int(rng.integers(8))
                case 1:
                    data[at : at + 4] = struct.pack("<I", int(rng.choice([0, 1, 2**16, 2**31, 2**32 - 1])))
                case 2:
                    del data[at : at + int(rng.integers(1, 9))]
                case 3:
                    data[at:at] = rng.bytes(int(rng.integers(1, 9)))
        try:
            file = open_bytes(tmp_path, bytes(data))
            for name in file:
                assert file.array(name).shape == file.record(name).shape
        except CheckpointError as error:
            refusals.append(str(error.within))
    assert 1000 < len(refusals) < 2000
    assert all("byte" in place for place in refusals)


def test_another_kind_of_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the file does not contain a Whisper model"):
        from_ctranslate2(open_bytes(tmp_path, model(specification="TransformerSpec")))
    with pytest.raises(CheckpointError, match="no variable decoder/activation"):
        from_ctranslate2(open_bytes(tmp_path, WHOLE))
    relu = model(variable("decoder/activation", np.array(0, "i1")))
    with pytest.raises(CheckpointError, match="decoder/activation must be 3"):
        from_ctranslate2(open_bytes(tmp_path, relu))
    options = {"activation": 3, "pre_norm": 1, "scale_embeddings": 0, "alibi": 0, "start_from_zero_embedding": 0}
    headless = [variable(f"decoder/{name}", np.array(value, "i1")) for name, value in options.items()]
    headless.append(variable("encoder/num_heads", np.array(0, "<i2")))
    with pytest.raises(CheckpointError, match="encoder/num_heads must be positive"):
        from_ctranslate2(open_bytes(tmp_path, model(*headless)))

"""Write a GGUF file: metadata by key, and tensors in the types of ggml.

    magic, version 3, the numbers of tensors and keys
    keys      name, type, value
    tensors   name, sizes (the last axis first), type, offset
    data      each tensor at a multiple of 32 bytes

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. `treadle.frontends.gguf_file` reads it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from treadle.files.whole_files import replacing, reporting_failed_writes

Array = np.ndarray[Any, Any]
Metadata = Mapping[str, "str | bool | int | float | Sequence[str] | Sequence[int]"]

_ALIGNMENT = 32
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9
TYPES: Mapping[str, int] = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "q2_k": 10, "q3_k": 11,
    "q4_k": 12, "q5_k": 13, "q6_k": 14,
}  # fmt: skip
"""The types of tensors that are written, with ggml's numbers. Except for f32 and f16 they are forms of encodings."""


@dataclass(frozen=True)
class GGUFWritten:
    """A tensor to write.

    shape   sizes of its elements
    type    a key of `TYPES`
    nbytes  size in bytes
    data    returns the elements, or the blocks
    """

    name: str
    shape: tuple[int, ...]
    type: str
    nbytes: int
    data: Callable[[], Array]


def write_gguf(path: Path, metadata: Metadata, tensors: Sequence[GGUFWritten]) -> None:
    """Write one file, atomically. The bytes depend only on the arguments. Raises UsageError if it cannot be written."""
    head = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        head += [_text(key), _value(value)]
    at = 0
    for tensor in tensors:
        sizes = tensor.shape[::-1]
        head += [_text(tensor.name), struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)]
        head.append(struct.pack("<IQ", TYPES[tensor.type], at))
        at += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    start = b"".join(head)
    with reporting_failed_writes("the GGUF file", path, hint="another path"), replacing(path) as file:
        file.write(start + bytes(-len(start) % _ALIGNMENT))
        for tensor in tensors:
            data = np.ascontiguousarray(tensor.data()).reshape(-1).view(np.uint8).data
            assert len(data) == tensor.nbytes
            file.write(data)
            file.write(bytes(-len(data) % _ALIGNMENT))


def _text(value: str) -> bytes:
    data = value.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    """Return a value with its type: strings, flags, u32, f32, and arrays of strings and i32."""
    match value:
        case str():
            return struct.pack("<I", _STRING) + _text(value)
        case bool():
            return struct.pack("<I?", _BOOL, value)
        case int():
            return struct.pack("<II", _UINT32, value)
        case float():
            return struct.pack("<If", _FLOAT32, value)
    if value and isinstance(value[0], str):
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_text, value))
    return struct.pack("<IIQ", _ARRAY, _INT32, len(value)) + np.asarray(value, "<i4").tobytes()

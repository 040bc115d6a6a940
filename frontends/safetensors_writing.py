"""Writing a safetensors file, tensor by tensor: whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from treadle.files.contained_files import PathLike
from treadle.files.shown_names import shown_path
from treadle.files.whole_files import replacing
from treadle.ir.errors import UsageError
from treadle.ir.literals import Literal
from treadle.ir.types import DType, bf16

Array = np.ndarray[Any, Any]

_ALIGNMENT = 8  # of the tensors' bytes, as other writers have it


def write_safetensors(
    path: PathLike, tensors: Mapping[str, tuple[DType, Array]], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors by name, in this order, each with the dtype that it has in the file; bf16 is given as float32.

    A file of that name is replaced in one step. Raises UsageError where the file cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, (dtype, array) in tensors.items():
        size = array.size * dtype.bytes
        header[name] = {"dtype": dtype.name.upper(), "shape": list(array.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    try:
        with replacing(Path(path)) as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for dtype, array in tensors.values():
                file.write(stored_bytes(dtype, array))
    except OSError as error:
        raise UsageError("the file cannot be written", received=str(error), within=shown_path(path)) from error


def stored_bytes(dtype: DType, array: Array) -> Any:
    """An array's bytes in a file, little-endian and row-major; bf16, of float32, is rounded to the nearest."""
    if dtype is bf16:
        return Literal.of(array, bf16).data
    ordered = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return ordered.reshape(-1).view(np.uint8).data

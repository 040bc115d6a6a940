"""Write tensors to a safetensors file, atomically and with one tensor in memory at a time.

    8 bytes   n, an unsigned little-endian integer
    n bytes   the header, JSON: `__metadata__` (strings by name), then each tensor's dtype, shape and byte range
    the rest  the tensors, the widest elements first, so that each offset is a multiple of the element size

Source: the format, https://huggingface.co/docs/safetensors. `treadle.frontends.safetensors_file` reads it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from treadle.files.contained_files import PathLike
from treadle.files.whole_files import replacing, reporting_failed_writes
from treadle.ir.types import dtype_of

Array = np.ndarray[Any, Any]

_ALIGNMENT = 8


@dataclass(frozen=True)
class WrittenTensor:
    """A tensor to write.

    dtype   Treadle's name of the dtype: f32, bf16, ...
    values  returns the tensor's elements, little-endian, in a NumPy dtype of the same size: u16 for bf16
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    values: Callable[[], Array]


def write_tensors(path: Path, tensors: Sequence[WrittenTensor], metadata: Mapping[str, str]) -> None:
    """Write tensors to one file. An existing file is replaced. The bytes depend only on the arguments.

    Raises UsageError if the file cannot be written.
    """
    ordered = sorted(tensors, key=lambda tensor: -tensor.nbytes // max(1, math.prod(tensor.shape)))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for tensor in ordered:
        offsets = [at, at + tensor.nbytes]
        header[tensor.name] = {"dtype": tensor.dtype.upper(), "shape": list(tensor.shape), "data_offsets": offsets}
        at += tensor.nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with reporting_failed_writes("the weights", path), replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in ordered:
            data = np.ascontiguousarray(tensor.values()).reshape(-1).view(np.uint8).data
            assert len(data) == tensor.nbytes
            file.write(data)


def write_weights(path: PathLike, weights: Mapping[str, Array], metadata: Mapping[str, str] | None = None) -> None:
    """Write weights by parameter name, for `compile(..., weights=path)`. Raises UsageError as `write_tensors` does."""
    tensors = [
        WrittenTensor(name, str(dtype_of(array)), array.shape, array.nbytes, partial(_little, array))
        for name, array in weights.items()
    ]
    write_tensors(Path(path), tensors, {"format": "pt"} if metadata is None else metadata)


def _little(array: Array) -> Array:
    return array.astype(array.dtype.newbyteorder("<"), copy=False)

"""Arrays in .npy files: read with size limits and without pickle; written completely or not at all.

Source: the .npy format, https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any

import numpy as np

from treadle.files.contained_files import open_regular
from treadle.files.shown_names import printable, shown_path
from treadle.files.whole_files import replacing, reporting_failed_writes
from treadle.ir.errors import CheckpointError

Array = np.ndarray[Any, Any]

_READ_BYTES = 4 << 30


def read_npy(path: str | Path, *, limit_bytes: int = _READ_BYTES) -> Array:
    """Return the array in a .npy file.

    Raises CheckpointError if the file does not exist, is damaged or truncated, holds Python objects (which would need
    pickle), or holds more bytes than the limit.
    """
    shown = shown_path(path)
    with open_regular(path, shown) as file:
        try:
            version = np.lib.format.read_magic(file)
            read_header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, columns_first, dtype = read_header(file)
        except KeyError:
            raise _refusal("the file has an unsupported version", ".".join(map(str, version)), shown) from None
        except (ValueError, EOFError, OverflowError, SyntaxError, TypeError, TokenError) as error:
            raise _refusal("not a .npy file", printable(str(error)), shown) from None
        if dtype.hasobject or dtype.names is not None:
            raise _refusal("the file does not hold an array of numbers", f"dtype {printable(str(dtype))}", shown)
        declared, held = math.prod(shape) * dtype.itemsize, os.fstat(file.fileno()).st_size - file.tell()
        if any(n < 0 for n in shape) or declared > held:
            raise _refusal("the file is truncated", f"{held} bytes of shape {list(shape)}, {dtype}", shown)
        if declared > limit_bytes:
            raise _refusal("the array is larger than the limit", f"{declared} bytes, limit {limit_bytes}", shown)
        array = np.frombuffer(file.read(declared), dtype)
    return array.reshape(shape, order="F" if columns_first else "C")


def write_npy(folder: Path, arrays: Mapping[str, Array]) -> list[Path]:
    """Write each array to `folder/NAME.npy`, and return the paths. The folder is created if necessary, and existing
    files are replaced.

    Raises UsageError if a file cannot be written.
    """
    written = []
    with reporting_failed_writes("the arrays", folder, hint="another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        for name, array in arrays.items():
            target = folder / f"{name}.npy"
            with replacing(target) as file:
                _write_array(file, array)
            written.append(target)
    return written


def _write_array(file: IO[bytes], array: Array) -> None:
    """Write one array in row-major order. `np.lib.format.write_array` reports a full disk without its reason."""
    rows = np.asarray(array, order="C")
    if rows.dtype.hasobject:
        raise ValueError("an array of Python objects cannot be written")
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(rows))
    file.write(rows.reshape(-1).view(np.uint8).data)


def _refusal(what: str, received: str, shown: str) -> CheckpointError:
    return CheckpointError(what, received=received, within=shown)

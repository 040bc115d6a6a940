"""Record NumPy's allocations of array data, with the bytes of each. A handler is installed in NumPy (NEP 49).

    with array_allocations() as made:
        run()
    made                                  [(64, "kernels.py:take"), ...]

`tracemalloc` counts the same bytes together with the bytes of Python objects. This handler sees even the smallest
array.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

_SET, _SIZE = 304, ctypes.c_size_t
"""The index of PyDataMem_SetHandler in NumPy's table of functions."""
_POINTER = ctypes.c_void_p
_LIBC = ctypes.CDLL(None)
for _name in ("malloc", "calloc", "realloc"):
    getattr(_LIBC, _name).restype = _POINTER
_Allocate = ctypes.CFUNCTYPE(_POINTER, _POINTER, _SIZE)
_Zeros = ctypes.CFUNCTYPE(_POINTER, _POINTER, _SIZE, _SIZE)
_Again = ctypes.CFUNCTYPE(_POINTER, _POINTER, _POINTER, _SIZE)
_Free = ctypes.CFUNCTYPE(None, _POINTER, _POINTER, _SIZE)


class _Handler(ctypes.Structure):
    _fields_ = [
        *(("name", ctypes.c_char * 127), ("version", ctypes.c_uint8), ("context", _POINTER)),
        *(("malloc", _Allocate), ("calloc", _Zeros), ("realloc", _Again), ("free", _Free)),
    ]


_seen: list[tuple[int, str]] | None = None


def _note(count: int) -> None:
    if _seen is not None:
        code = sys._getframe(2).f_code
        _seen.append((count, f"{Path(code.co_filename).name}:{code.co_name}"))


def _malloc(context: Any, count: int) -> Any:
    _note(count)
    return _LIBC.malloc(_SIZE(count))


def _calloc(context: Any, count: int, size: int) -> Any:
    _note(count * size)
    return _LIBC.calloc(_SIZE(count), _SIZE(size))


def _realloc(context: Any, pointer: Any, count: int) -> Any:
    _note(count)
    return _LIBC.realloc(_POINTER(pointer), _SIZE(count))


def _free(context: Any, pointer: Any, size: int) -> None:
    _LIBC.free(_POINTER(pointer))


_HANDLER = _Handler(b"noting", 1, None, _Allocate(_malloc), _Zeros(_calloc), _Again(_realloc), _Free(_free))
"""Never deleted, because NumPy frees the arrays that this handler allocated through it."""


def _set_handler(capsule: Any) -> Any:
    api = ctypes.pythonapi
    api.PyCapsule_GetPointer.restype, api.PyCapsule_GetPointer.argtypes = _POINTER, [ctypes.py_object, ctypes.c_char_p]
    table = api.PyCapsule_GetPointer(np._core._multiarray_umath._ARRAY_API, None)  # type: ignore[attr-defined]
    function = ctypes.cast(table, ctypes.POINTER(_POINTER))[_SET]
    return ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.py_object)(function)(capsule)


@contextmanager
def array_allocations() -> Iterator[list[tuple[int, str]]]:
    """Yield a list of the allocations inside the block: the bytes of each, and the Python function that caused it."""
    global _seen
    api = ctypes.pythonapi
    api.PyCapsule_New.restype = ctypes.py_object
    api.PyCapsule_New.argtypes = [_POINTER, ctypes.c_char_p, _POINTER]
    before = _set_handler(api.PyCapsule_New(ctypes.addressof(_HANDLER), b"mem_handler", None))
    _seen = made = []
    try:
        yield made
    finally:
        _seen = None
        _set_handler(before)

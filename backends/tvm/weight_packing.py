"""Weights in the layouts that kernels read: as they are, or in panels.

A parameter that is read as it is stays where it is, a mapped file included. One that is read in panels is packed. Where
the weights come from a file, the panels go to a file of the user's cache, named after a hash of what was packed and
how, and are memory-mapped from then on: the second compilation packs nothing, and processes share the pages. Weights
that lie in memory (drawn, or being trained) are packed in memory.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np

from treadle.backends.bfloat16 import rounded
from treadle.backends.python.executable import refuse_misfit, refuse_missing
from treadle.backends.tvm.arena import ALIGNMENT
from treadle.backends.tvm.lowering.program import KernelProgram, Panels, Slot
from treadle.backends.user_cache import cache_folder, forget_unused, is_private, mark_used
from treadle.backends.weight_preparation import Prepared, as_numpy_weight
from treadle.backends.whole_files import replacing, sweep
from treadle.ir.errors import UsageError
from treadle.ir.types import Type

Array = np.ndarray[Any, Any]

_FORMAT = "treadle panels 2"
_FILES = re.compile(r"[0-9a-f]{32}\.panels")
SMALLEST = 1 << 20  # bytes of panels that are worth a file


def pack_weights(
    prepared: Prepared,
    program: KernelProgram,
    weights: Mapping[str, Any],
    *,
    threads: int = 1,
    folder: Path | None = None,
) -> dict[Slot, Array]:
    """An array for each parameter in each of its layouts.

    folder   where files of panels lie, by default in the user's cache

    Raises BackendError for a missing weight or a misfit.
    """
    held = _Weights(prepared, weights)
    made = {slot: held.array(slot.name) for slot in program.weights if slot.layout is None}
    packed = [slot for slot in program.weights if slot.layout is not None]
    from_file = [slot for slot in packed if held.is_mapped(slot.name)]
    in_memory = [slot for slot in packed if slot not in set(from_file)]
    with ThreadPoolExecutor(max_workers=threads) as pool:
        made |= dict(zip(in_memory, pool.map(held.packed, in_memory), strict=True))
        made |= _through_file(from_file, held, pool, folder)
    return made


class _Weights:
    """The parameters of a prepared graph: those that have recipes are made when they are asked for."""

    def __init__(self, prepared: Prepared, weights: Mapping[str, Any]) -> None:
        refuse_missing(prepared.source, weights)
        self.recipes = prepared.recipes
        self.parameters = prepared.graph.parameters
        read = {n: v.type for n, v in self.parameters.items() if n not in self.recipes}
        read |= {n: v.type for recipe in self.recipes.values() for n, v in recipe.sources.items()}
        self.given = {name: _taken(name, wanted, weights[name]) for name, wanted in read.items()}
        self._weights = weights
        self._content: dict[str, str] = {}

    def array(self, name: str) -> Array:
        recipe = self.recipes.get(name)
        if recipe is None:
            return self.given[name]
        return _taken(name, self.parameters[name].type, recipe.make(self._weights))

    def packed(self, slot: Slot) -> Array:
        return panels(self.array(slot.name), _layout(slot))

    def packed_shape(self, slot: Slot) -> tuple[int, int, int]:
        shape = self.parameters[slot.name].type.static_shape
        assert shape is not None
        return _packed_shape(shape, _layout(slot))

    def dtype(self, slot: Slot) -> np.dtype[Any]:
        return np.dtype(self.parameters[slot.name].type.dtype.numpy or np.uint16)

    def is_mapped(self, name: str) -> bool:
        """Whether it lies in a mapped file, or what it is made of does."""
        return all(is_mapped(self.given[source]) for source in self._sources(name))

    def content(self, name: str, pool: ThreadPoolExecutor) -> str:
        """What tells its elements from others: hashes of what it is made of, and how."""
        sources = self._sources(name)
        new = [n for n in sources if n not in self._content]
        self._content |= zip(new, pool.map(_hashed, [self.given[n] for n in new]), strict=True)
        recipe = self.recipes.get(name)
        return " ".join([*(self._content[n] for n in sources), *([recipe.key] if recipe else [])])

    def _sources(self, name: str) -> Sequence[str]:
        recipe = self.recipes.get(name)
        return [name] if recipe is None else list(recipe.sources)


def _hashed(array: Array) -> str:
    return f"{hashlib.sha256(array.reshape(-1).view(np.uint8).data).hexdigest()} {array.shape} {array.dtype.str}"


def panels(array: Array, layout: Panels) -> Array:
    """A matrix in panels; see `treadle.backends.tvm.lowering.program.Panels`."""
    made = np.empty(_packed_shape(array.shape, layout), array.dtype)
    _fill(made, array, layout)
    return made


def is_mapped(array: Array) -> bool:
    """Whether an array lies in a file: one that is mapped, or whose bytes were read and never change."""
    base: Any = array
    while base is not None:
        if isinstance(base, np.memmap | mmap.mmap | bytes):
            return True
        base = base.obj if isinstance(base, memoryview) else getattr(base, "base", None)
    return False


def _fill(made: Array, array: Array, layout: Panels) -> None:
    matrix = array.T if layout.transposed else array
    whole = len(matrix) // layout.width
    for panel in range(whole):
        made[panel] = matrix[panel * layout.width : (panel + 1) * layout.width].T
    if whole < len(made):
        rest = matrix[whole * layout.width :]
        made[whole, :, : len(rest)] = rest.T
        made[whole, :, len(rest) :] = 0


def _packed_shape(shape: Sequence[int], layout: Panels) -> tuple[int, int, int]:
    n, k = shape[::-1] if layout.transposed else shape
    return -(-n // layout.width), k, layout.width


def _layout(slot: Slot) -> Panels:
    assert slot.layout is not None
    return slot.layout


def _taken(name: str, wanted: Type, value: Any) -> Array:
    refuse_misfit(name, wanted, value)
    array = as_numpy_weight(value)
    array = np.ascontiguousarray(array).reshape(array.shape)
    return rounded(array) if wanted.dtype.numpy is None else array


# -- files of panels -----------------------------------------------------------------------------------------


def _through_file(
    slots: Sequence[Slot], held: _Weights, pool: ThreadPoolExecutor, folder: Path | None
) -> dict[Slot, Array]:
    """Panels mapped from the file that holds them, which is made where it is not there."""
    shapes = [held.packed_shape(slot) for slot in slots]
    sizes = [int(np.prod(shape)) * held.dtype(s).itemsize for s, shape in zip(slots, shapes, strict=True)]
    offsets = [0]
    for size in sizes:
        offsets.append(-(-(offsets[-1] + size) // ALIGNMENT) * ALIGNMENT)
    path = _path(slots, held, pool, folder) if offsets[-1] >= SMALLEST else None
    data = None if path is None else _mapped_file(path, offsets[-1])
    if path is not None and data is None:
        data = _written(path, slots, shapes, offsets, held, pool)
    if data is None:
        return dict(zip(slots, pool.map(held.packed, slots), strict=True))
    return {
        slot: data[at : at + size].view(held.dtype(slot)).reshape(shape)
        for slot, at, size, shape in zip(slots, offsets[:-1], sizes, shapes, strict=True)
    }


def _path(slots: Sequence[Slot], held: _Weights, pool: ThreadPoolExecutor, folder: Path | None) -> Path | None:
    """Named by content: every matrix's bytes, shape and dtype, and its layout."""
    try:
        folder = cache_folder() / "panels" if folder is None else folder
    except UsageError:
        return None
    digest = hashlib.sha256(_FORMAT.encode())
    for slot in slots:
        digest.update(f"{held.content(slot.name, pool)} {slot.layout}\n".encode())
    return folder / f"{digest.hexdigest()[:32]}.panels"


def _mapped_file(path: Path, size: int) -> Array | None:
    """The file's bytes, if it is there and as long as it should be; it was written whole or not at all.

    Nobody else's: one who can write it can cut it, which kills whoever reads it then.
    """
    try:
        if path.stat().st_size != size or not is_private(path.parent):
            return None
        mapped = np.memmap(path, np.uint8, "r")
    except OSError:
        return None
    mark_used(path)
    return mapped


def _written(
    path: Path,
    slots: Sequence[Slot],
    shapes: Sequence[tuple[int, int, int]],
    offsets: Sequence[int],
    held: _Weights,
    pool: ThreadPoolExecutor,
) -> Array | None:
    """Fill a new file and map it; None where the folder cannot be written.

    The panels can be used as soon as they are there. That they are on the disk, and the file gets its name, which takes
    as long again, is left to a thread.
    """
    filled: Future[Array] = Future()

    def write() -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not is_private(path.parent):
                raise PermissionError(f"others can write {path.parent}")
            sweep(path.parent)
            forget_unused(path.parent, _FILES)
            with replacing(path) as file:
                _allocate(file, offsets[-1])
                data = np.memmap(file.name, np.uint8, "r+")
                list(pool.map(lambda i: fill(data, i), range(len(slots))))
                read = data.view()
                read.flags.writeable = False
                filled.set_result(read)
        except Exception as error:
            if not filled.done():  # else the file alone is lost
                filled.set_exception(error)

    def fill(data: Array, i: int) -> None:
        array = held.array(slots[i].name)
        size = int(np.prod(shapes[i])) * array.itemsize
        _fill(data[offsets[i] : offsets[i] + size].view(array.dtype).reshape(shapes[i]), array, _layout(slots[i]))

    writer = threading.Thread(target=write, name=f"write {path.name}")
    writer.start()
    _writers.append(writer)
    try:
        return filled.result()
    except OSError:
        return None


def _allocate(file: IO[bytes], size: int) -> None:
    """Make a new file that long. Raises OSError on a full disk, where a write to its mapping would kill the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
    else:
        file.truncate(size)


_writers: list[threading.Thread] = []


def finish_writing() -> None:
    """Wait until files that are being written have their names; the end of the process waits as well."""
    while _writers:
        _writers.pop().join()

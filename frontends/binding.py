"""Binding: find the checkpoint tensor, or the part of a tensor, for each parameter of a model.

A table maps parameter names to tensor names of the checkpoint. Both are patterns in which `{i}` held for a number:

    "wte.weight":             "embeddings.weight"                             another name
    "h.{i}.attn.q.weight":    Source("h.{i}.attn.c_attn.weight", transpose=True, rows=(0, 768))
    "layer.{i}.attn.k.weight": Source("layers.{i}.qkv.weight", rows=(64, 128), groups=12)      of each head's rows
    "h.{i}.ln_1.weight":      ("h.{i}.ln_1.weight", "h.{i}.ln_1.gamma")       the first that the file has
    "lm_head.weight":         ("lm_head.weight", "wte.weight")                tied if it is not stored
    "embed.weight":           Tied(("embed.weight", "lm_head.weight"))        one tensor, stored under one name or both

A parameter that no pattern matches is looked up under its own name. Slices and transposes are views; rows of several
groups are copied. `Source.write` is the inverse.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from treadle.files.converted_arrays import ConvertedArray
from treadle.files.shown_names import printable
from treadle.frontends.binding_errors import FoldedLine, MissingTensor, NamedTensors, mismatch
from treadle.frontends.deferred_arrays import DeferredArray, widened_bits
from treadle.frontends.mapped_tensors import TensorRecord
from treadle.frontends.name_patterns import compiled_pattern, filled, has_placeholder
from treadle.frontends.quantized.weight_components import components, unread_weight
from treadle.ir.encodings.encoding import Encoding
from treadle.ir.errors import CheckpointError
from treadle.ir.types import DTYPES, DType

Shape = tuple[int, ...]
Array = npt.NDArray[Any]


class TensorStore(NamedTensors, Protocol):
    """A store of tensors by name, such as a `Checkpoint` or a `SafetensorsFile`."""

    def record(self, name: str, /) -> TensorRecord:
        """Return the dtype and shape of a tensor."""

    def array(self, name: str, /) -> Array:
        """Return a tensor, read-only."""

    def bits(self, name: str, /) -> npt.NDArray[np.uint16]:
        """Return the bits of a bf16 tensor, read-only."""


class BlockStore(TensorStore, Protocol):
    """A store that holds some tensors in blocks, such as a `GGUFFile`."""

    def block_bytes(self, name: str, /) -> npt.NDArray[np.uint8] | ConvertedArray:
        """Return a tensor's blocks, read-only."""


@dataclass(frozen=True)
class Source:
    """The tensor, or the part of a tensor, that a parameter reads. The tensor is first transposed, then sliced.

    transpose   the stored matrix [m, n] is read as [n, m] (GPT-2 stores its weights input by output)
    rows        [start, stop) of the first axis, after the transpose; None: all
    cols        [start, stop) of the second axis, after the transpose; None: all
    groups      number of equal parts of the first axis; `rows` are taken from each part (GPT-NeoX stores the query, key
                and value rows of each head consecutively)
    of          required length of the first axis, or of each group; None: any length that contains `rows`
    """

    name: str
    transpose: bool = False
    rows: tuple[int, int] | None = None
    cols: tuple[int, int] | None = None
    groups: int = 1
    of: int | None = None

    def shape(self, stored: Shape) -> Shape | None:
        """Return the shape of this part, for a tensor with the stored shape.

        Returns None if the number of axes is wrong, if a length differs from `of`, or if a slice is out of range.
        """
        if self.transpose:
            if len(stored) != 2:
                return None
            stored = stored[::-1]
        if self.of is not None and stored[:1] != (self.of * self.groups,):
            return None
        shape = list(stored)
        for axis, (cut, parts) in enumerate(((self.rows, self.groups), (self.cols, 1))):
            if cut is not None:
                if axis >= len(shape) or shape[axis] % parts or not 0 <= cut[0] <= cut[1] <= shape[axis] // parts:
                    return None
                shape[axis] = (cut[1] - cut[0]) * parts
        return tuple(shape)

    def view(self, array: Array) -> Array:
        """Return this part of a stored array, without a copy unless there are groups."""
        part = self._place(array)
        return part.reshape(part.shape[0] * part.shape[1], *part.shape[2:]) if self._grouped else part

    def write(self, stored: Array, values: Array) -> None:
        """Write a parameter's values into the part of a stored array that `view` reads."""
        part = self._place(stored)
        part[...] = values.reshape(part.shape)

    @property
    def _grouped(self) -> bool:
        return self.rows is not None and self.groups > 1

    def _place(self, array: Array) -> Array:
        """Return the part as a view of the array; with groups, [groups, rows of each, ...]."""
        array = array.T if self.transpose else array
        if self._grouped:
            array = array.reshape(self.groups, array.shape[0] // self.groups, *array.shape[1:])
        axes = (slice(None),) * self._grouped
        if self.rows is not None:
            array = array[(*axes, slice(*self.rows))]
        return array if self.cols is None else array[(*axes, slice(None), slice(*self.cols))]

    @property
    def whole_rows(self) -> bool:
        """True if the part consists of whole stored rows, so that rows in blocks can be taken."""
        return not self.transpose and self.cols is None

    @property
    def part(self) -> str:
        """The part of the tensor that is read, in NumPy's notation: `.T[0:768]`; empty for all of it.

        With groups: `[0:64 of each of 12]`.
        """
        rows, cols = (f"{cut[0]}:{cut[1]}" if cut else ":" for cut in (self.rows, self.cols))
        rows += f" of {self.of}" if self.of is not None else ""
        rows += f" of each of {self.groups}" if self.groups > 1 else ""
        cut = f"[{rows}, {cols}]" if self.cols else f"[{rows}]" if self.rows else ""
        return (".T" if self.transpose else "") + cut

    def __str__(self) -> str:
        return printable(self.name) + self.part


class Tied(tuple[str, ...]):
    """Names of one tensor. A file may store the tensor under several of these names, with equal values."""

    __slots__ = ()


Entry = str | Source | Sequence[str | Source]
Table = Mapping[str, Entry]


def consecutive(
    stored: str, lengths: Mapping[str, int], *, transpose: bool = False, groups: int = 1
) -> dict[str, Source]:
    """Return table entries for parameters whose rows are consecutive in one stored tensor, or in each of its groups.

    lengths  the number of rows of each parameter, in the order of the rows; the tensor must have no other rows
    """
    ends = list(itertools.accumulate(lengths.values(), initial=0))
    return {
        name: Source(stored, transpose=transpose, rows=(ends[n], ends[n + 1]), groups=groups, of=ends[-1])
        for n, name in enumerate(lengths)
    }


@dataclass(frozen=True)
class Binding:
    """The arrays of a model's parameters, from a checkpoint.

    arrays      each parameter's array, read-only; a view of the file if the dtypes agree. With `deferred`, arrays of
                other dtypes are `DeferredArray`; blocks that are computed from several tensors are `ConvertedArray`
    sources     the source of each array, with the tensor's name in the file
    converted   (dtype in the file, dtype of the parameter), for parameters whose dtype differs from the file's
    unused      the file's tensors that no parameter reads, in the file's order
    encodings   the encoding of each parameter whose array holds blocks, as the file does
    """

    arrays: dict[str, Any]
    sources: dict[str, Source]
    converted: dict[str, tuple[str, str]]
    unused: tuple[str, ...]
    encodings: Mapping[str, Encoding] = field(default_factory=dict)


def bind(
    parameters: Mapping[str, tuple[Sequence[int], str | DType]],
    table: Table,
    checkpoint: TensorStore,
    *,
    prefixes: Sequence[str] = ("",),
    ignore: Iterable[str] = (),
    blocks: BlockStore | None = None,
    deferred: bool = False,
) -> Binding:
    """Find the array of every parameter in a checkpoint.

    parameters   name -> (shape, dtype): the model's parameters
    table        parameter name or pattern -> Source, checkpoint name, several of them in order of preference, or `Tied`
                 names; an exact name takes precedence over a pattern; among patterns, the first match counts
    prefixes     prefixes of the table's names in the file, in order of preference: ("", "bert.")
    ignore       patterns of the file's names (after a prefix) that `unused` leaves out, such as stored masks
    blocks       the checkpoint, if its matrices in blocks of an encoding, and rows of these matrices, stay encoded;
                 else None
    deferred     True if a tensor is converted only when a part of it is read, provided that NumPy has the file's dtype

    A floating-point tensor is converted to the parameter's dtype, an integer tensor if every value of its dtype fits. A
    bf16 parameter is held as float32, since NumPy has no bf16.

    Raises one CheckpointError that lists all missing tensors (with the nearest names in the file) and all tensors whose
    shape or dtype does not fit (with the file's and the parameter's). All are checked before any tensor is read. Raises
    CheckpointError if tied tensors differ, if a conversion would turn a finite value infinite, and if the checkpoint
    has scales or other parts of a quantized weight next to a tensor, which then is not the parameter's numbers.
    """
    lookup = _Lookup(table, prefixes, checkpoint)
    sources, missing, misfits = _sources_of(parameters, lookup, checkpoint)
    used = {source.name for source in sources.values()}
    ignored = [compiled_pattern(prefix + pattern) for pattern in ignore for prefix in prefixes]
    unused = tuple(
        name
        for name in checkpoint.names()
        if name not in used and not any(pattern.fullmatch(name) for pattern in ignored)
    )
    if missing or misfits:
        raise mismatch(missing, misfits, len(parameters), unused, checkpoint)
    for name in parameters:
        _check_tied(lookup.stored_names(lookup.wanted(name)), checkpoint)
    reader = _Reader(checkpoint, blocks, deferred)
    for name, source in sources.items():
        shape, dtype = parameters[name]
        reader.read(name, source, len(shape), str(dtype))
    return Binding(reader.arrays, sources, reader.converted, unused, reader.encodings)


def _sources_of(
    parameters: Mapping[str, tuple[Sequence[int], str | DType]], lookup: _Lookup, checkpoint: TensorStore
) -> tuple[dict[str, Source], list[MissingTensor], list[FoldedLine]]:
    """Return the source of each parameter that has one, the missing tensors, and lines on tensors that do not fit. No
    tensor is read.
    """
    sources: dict[str, Source] = {}
    missing: list[MissingTensor] = []
    misfits: list[FoldedLine] = []
    for name, (shape, dtype) in parameters.items():
        wanted = lookup.wanted(name)
        found = lookup.find(wanted)
        for source in lookup.named(wanted) if found is None else (wanted.filled(found),):
            if parts := list(components(source.name, checkpoint)):
                raise unread_weight(source.name, parts, checkpoint)
        if found is None:
            missing.append(MissingTensor(wanted.pattern, wanted.numbers, tuple(s.name for s in wanted.alternatives)))
            continue
        record = checkpoint.record(wanted.filled(found).name)
        if record.outputs_first:
            found = replace(found, transpose=False)
        sources[name] = wanted.filled(found)
        misfit = _misfit(wanted.pattern, tuple(shape), str(dtype), found, record)
        if misfit:
            misfits.append((misfit, wanted.numbers))
    return sources, missing, misfits


class _Reader:
    """A reader of parameters' arrays, which reads each tensor of a file once: three slices of one bf16 tensor widen it
    once.
    """

    def __init__(self, checkpoint: TensorStore, blocks: BlockStore | None, deferred: bool) -> None:
        self.checkpoint, self.blocks, self.deferred = checkpoint, blocks, deferred
        self.arrays: dict[str, Any] = {}
        self.converted: dict[str, tuple[str, str]] = {}
        self.encodings: dict[str, Encoding] = {}
        self._tensors: dict[str, Array] = {}
        self._blocks: dict[str, Array | ConvertedArray] = {}

    def read(self, name: str, source: Source, rank: int, dtype: str) -> None:
        """Add the array of a parameter, in the dtype that it needs or in blocks."""
        record = self.checkpoint.record(source.name)
        if self.blocks is not None and record.encoding and source.whole_rows and rank > 1 and dtype == "f32":
            self.arrays[name], self.encodings[name] = self._in_blocks(self.blocks, source), record.encoding
            return
        held = record.dtype
        if held != dtype:
            self.converted[name] = held, dtype
        if self.deferred and (held == "bf16" or held != dtype):
            self.arrays[name] = _deferred(name, held, dtype, source, self.checkpoint)
            return
        if source.name not in self._tensors:
            self._tensors[source.name] = self.checkpoint.array(source.name)
        array = source.view(self._tensors[source.name])
        self.arrays[name] = array if held == dtype else _convert(name, array, dtype, source, self.checkpoint)

    def _in_blocks(self, blocks: BlockStore, source: Source) -> Array | ConvertedArray:
        if source.name not in self._blocks:
            self._blocks[source.name] = blocks.block_bytes(source.name)
        whole = self._blocks[source.name]
        if isinstance(whole, ConvertedArray) and source.part:
            whole = self._blocks[source.name] = whole.array
        return whole if isinstance(whole, ConvertedArray) else source.view(whole)


def alternatives(
    parameters: Iterable[str], table: Table, checkpoint: TensorStore, *, prefixes: Sequence[str] = ("",)
) -> dict[str, tuple[Source, ...]]:
    """Return each parameter's possible sources in a file of this table, in order of preference, whether or not the file
    has them.
    """
    lookup = _Lookup(table, prefixes, checkpoint)
    return {name: tuple(lookup.named(lookup.wanted(name))) for name in parameters}


@dataclass(frozen=True)
class _Wanted:
    """The pattern that matched a parameter, the matched numbers, and the possible names in the file."""

    pattern: str
    numbers: Mapping[str, str]
    alternatives: tuple[Source, ...]  # their names are still patterns

    def filled(self, source: Source) -> Source:
        return replace(source, name=filled(source.name, self.numbers))


class _Lookup:
    """The table, prepared for looking up the file's tensor for a parameter."""

    def __init__(self, table: Table, prefixes: Sequence[str], checkpoint: TensorStore) -> None:
        self._table = {pattern: _alternatives(entry) for pattern, entry in table.items()}
        self._tied = {pattern for pattern, entry in table.items() if isinstance(entry, Tied)}
        self._patterns = {pattern: compiled_pattern(pattern) for pattern in table if has_placeholder(pattern)}
        self._prefixes = prefixes
        self._checkpoint = checkpoint

    def wanted(self, parameter: str) -> _Wanted:
        if parameter in self._table:
            return _Wanted(parameter, {}, self._table[parameter])
        for pattern, compiled in self._patterns.items():
            match = compiled.fullmatch(parameter)
            if match:
                return _Wanted(pattern, match.groupdict(), self._table[pattern])
        return _Wanted(parameter, {}, (Source(parameter),))

    def find(self, wanted: _Wanted) -> Source | None:
        """Return the first alternative that the file has, with its prefix; its name is still a pattern."""
        for found in self._prefixed(wanted):
            if wanted.filled(found).name in self._checkpoint:
                return found
        return None

    def stored_names(self, wanted: _Wanted) -> list[str]:
        """Return the names under which the file has a tied tensor; empty for other tensors."""
        if wanted.pattern not in self._tied:
            return []
        return [source.name for source in self.named(wanted) if source.name in self._checkpoint]

    def named(self, wanted: _Wanted) -> Iterator[Source]:
        """Yield every alternative with every prefix. Patterns are filled with the parameter's numbers."""
        return map(wanted.filled, self._prefixed(wanted))

    def _prefixed(self, wanted: _Wanted) -> Iterator[Source]:
        for source in wanted.alternatives:
            for prefix in self._prefixes:
                yield replace(source, name=prefix + source.name)


def _alternatives(entry: Entry) -> tuple[Source, ...]:
    listed = (entry,) if isinstance(entry, str | Source) else tuple(entry)
    return tuple(Source(item) if isinstance(item, str) else item for item in listed)


def _check_tied(names: Sequence[str], checkpoint: TensorStore) -> None:
    """Refuse a tied tensor that the file stores under several names with different values."""
    for other in names[1:]:
        first, second = (checkpoint.record(name) for name in (names[0], other))
        if first.shape == second.shape and np.array_equal(checkpoint.array(names[0]), checkpoint.array(other)):
            continue
        raise CheckpointError(
            f"{printable(names[0])} and {printable(other)} differ, although config.json ties them",
            received=f"{first} and {second}",
            within=checkpoint.label,
            hint="remove the untrained tensor; or, if the output has separate weights and the family "
            'reads such a model, write "tie_word_embeddings": false',
        )


def _misfit(name: str, shape: Shape, dtype: str, source: Source, record: TensorRecord) -> str | None:
    """Return one line about a tensor that does not fit the parameter, with names as patterns, or None if the tensor
    fits.
    """
    given = source.shape(record.shape)
    mismatch = f"{printable(name)} needs {dtype}{_text(shape)}; {printable(source.name)} is {record}"
    if given is None:
        return f"{mismatch} and has no part {source.part}"
    if given != shape:
        return mismatch + (f", and {source} is {record.dtype}{_text(given)}" if source.part else "")
    return None if _convertible(record.dtype, dtype) else f"{mismatch}, which cannot be converted"


def _text(shape: Shape) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _convertible(held: str, needed: str) -> bool:
    if held == needed:
        return True
    of, to = DTYPES.get(held), DTYPES.get(needed)
    if to is None:
        return False
    if of is not None and of.is_float:
        return to.is_float
    if to.is_int and to.numpy is not None and held in _INTEGERS:
        return np.can_cast(_INTEGERS[held], to.numpy)
    return False


_INTEGERS = {f"{kind}{8 * size}": np.dtype(f"{kind}{size}") for kind in "iu" for size in (1, 2, 4, 8)}


def _deferred(name: str, held: str, needed: str, source: Source, checkpoint: TensorStore) -> DeferredArray:
    """Return an array that converts a tensor when a part of it is read. It raises the errors that `_convert`
    documents.
    """
    dtype = DTYPES[needed].numpy or np.dtype(np.float32)
    is_bf16 = held == "bf16"
    stored = source.view(checkpoint.bits(source.name) if is_bf16 else checkpoint.array(source.name))

    def convert(part: Array) -> Array:
        return _convert(name, widened_bits(part) if is_bf16 else part, needed, source, checkpoint)

    return DeferredArray(stored, convert, dtype)


def _convert(name: str, array: Array, needed: str, source: Source, checkpoint: TensorStore) -> Array:
    dtype = DTYPES[needed].numpy or np.dtype(np.float32)
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        result = array.astype(dtype)
    if dtype.kind == "f" and dtype.itemsize < array.dtype.itemsize:
        lost = np.isinf(result) & np.isfinite(array)
        if lost.any():
            worst = float(np.abs(array[lost]).max())
            raise CheckpointError(
                f"{printable(name)}: as {needed}, {int(lost.sum())} finite values would become infinite",
                received=f"{source}, {checkpoint.record(source.name)}, with values up to {worst:g}",
                within=checkpoint.label,
                hint="declare the parameter as f32 or bf16",
            )
    result.flags.writeable = False
    return result

"""Weights in the layouts that kernels read: unchanged, in panels, or in panels of bf16 pairs.

A parameter that is read unchanged is not copied, even if it is in a memory-mapped file. A parameter that is read in
panels is packed. If the weights come from a file, their panels are written to a file in the user's cache, named after a
hash of the weights and their layouts. Later processes read that file and pack nothing. If weights are in memory
(initialized, or being trained), their panels are not cached in a file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from treadle.backends.bfloat16 import rounded
from treadle.backends.made_weights import Recipe, as_numpy_weight
from treadle.backends.refusals import refuse_misfit, refuse_missing
from treadle.backends.tvm.kernels.encoded.block_words import word_form
from treadle.backends.tvm.kernels.encoded.unpacking import packed_form, reads_in_tiles
from treadle.backends.tvm.kernels.isa import Isa
from treadle.backends.tvm.kernels.matmul import panel_width
from treadle.backends.tvm.kernels.narrow.register_tiles import narrow_width, pairs_for, quads_for
from treadle.backends.tvm.panel_memory import Panels, in_memory, through_file
from treadle.files.converted_arrays import ConvertedArray
from treadle.files.mapped_files import give_back, is_mapped
from treadle.ir.graph import Graph, Node
from treadle.ir.layouts import PAIR_SQUARE, PAIR_STEP, QUAD_HEAD, QUAD_STEP, ROW_HEAD, Layout, panels
from treadle.ir.ops.blocks import ROWS, EncodedLinear
from treadle.ir.ops.indexing import Embedding, Gather
from treadle.ir.ops.products import Linear, MatMul
from treadle.ir.sizing.sizes import Size
from treadle.ir.types import Type, bf16, f32, f64
from treadle.passes.capabilities import Reads, Wants, WantsBlocks
from treadle.passes.lowering.read_blocks import in_blocks

Array = np.ndarray[Any, Any]

_PANELS_AT_ONCE = 64
"""Number of panels of blocks that are packed at a time; the temporaries are several times as large."""
_CONVERTED_AT_ONCE = 1 << 17
"""Bytes of panels for which rows are converted at a time, so that temporaries fit into a core's cache."""


def wants(isa: Isa) -> Wants:
    """Return a function that returns the layout in which kernels read an operand that depends on weights alone: panels
    in products, or pairs for bf16.

    If a product also reads a float32 embedding table in panels, the lookup reads it in panels.
    """

    def read(node: Node, position: int) -> Layout | Reads:
        value = node.operands[position]
        assert value is not None
        if in_blocks(node, position):
            return Reads.ROW_MAJOR
        shape = value.type.static_shape
        wide = node.op.attributes.get("to") is f64  # a float64 result is computed element by element
        if shape is None or len(shape) != 2 or wide:
            return Reads.ROW_MAJOR
        if value.type.dtype is bf16 and isinstance(node.op, (Linear, MatMul)) and position == 1:
            return pairs_for(isa, transposed=isinstance(node.op, MatMul))
        if (rows := multiplies_rows(node, position, isa)) is not None:
            return rows
        if value.type.dtype is not f32:
            return Reads.ROW_MAJOR
        if isinstance(node.op, Embedding) and position == 0:
            return Reads.ANY
        if isinstance(node.op, Linear) and position == 1:
            return panels(panel_width(shape[0], isa))
        if isinstance(node.op, MatMul) and position == 1:
            return panels(panel_width(shape[1], isa), transposed=True)
        return Reads.ROW_MAJOR

    return read


def wants_blocks(isa: Isa) -> WantsBlocks:
    """Return a function that returns the panels in which kernels of an instruction set read blocks, in products and in
    row lookups.

    If a product also reads the table's rows, the lookup reads them in the layout of the product.
    """

    def read(node: Node, position: int, beside: Layout | None) -> Layout | str:
        value = node.operands[position]
        assert value is not None
        assert value.node is not None
        encoding, shape = value.node.inputs[0].type.encoding, value.type.static_shape
        if encoding is None or shape is None or len(shape) != 2:
            return "it is not a matrix"
        packed, words = packed_form(encoding), word_form(encoding)
        if packed is None and words is None:
            return f"no kernel reads {encoding.form}"
        axis = encoding.axis % 2
        picks_rows = isinstance(node.op, Embedding) or (isinstance(node.op, Gather) and node.op.axis == 0)
        if picks_rows and position == 0 and axis == 1:
            return beside or (words.layout if packed is None and words else panels(panel_width(shape[0], isa)))
        product = isinstance(node.op, (Linear, MatMul)) and position == 1 and node.results[0].type.dtype is f32
        if not product or axis != (1 if isinstance(node.op, Linear) else 0):
            return f"{node.op.name} reads numbers"
        if value.type.dtype is not f32:
            if value.type.dtype is bf16 and isa.multiplies_pairs and shape[axis] % PAIR_STEP == 0:
                if packed is not None and packed.in_pairs and (reads_in_tiles(packed) or not isa.multiplies_tiles):
                    return panels(narrow_width(isa), transposed=axis == 0, twos=True)
                if words is not None and packed is None and axis == 1 and not isa.multiplies_tiles:
                    return words.layout
            return f"no kernel reads {encoding} blocks as {value.type.dtype} numbers"
        if packed is not None:
            return panels(panel_width(shape[1 - axis], isa), transposed=axis == 0)
        assert words is not None
        return words.layout if axis == 1 else f"{node.op.name} reads {encoding.form} blocks only along its rows"

    return read


def multiplies_rows(node: Node, position: int, isa: Isa) -> Layout | None:
    """Return the layout in which an integer product reads its weight, or None for any other operand."""
    if not isinstance(node.op, EncodedLinear) or position != 1:
        return None
    form = word_form(node.op.of)
    return quads_for(isa) if node.op.of == ROWS or form is None else form.layout


def pack_weights(
    graph: Graph,
    made: Mapping[str, Recipe],
    weights: Mapping[str, Any],
    *,
    threads: int = 1,
    folder: Path | None = None,
) -> dict[str, Array]:
    """Return an array for each parameter that entries read, in its layout.

    made    the recipes of the derived weights that `bind` computes
    folder  where files of panels are stored, by default in the user's cache

    Raises BackendError if a weight is missing or does not match its declaration.
    """
    held = _Weights(graph, made, weights)
    found = {name: held.row_major(name) for name, value in graph.entry_parameters.items() if value.layout is None}
    packed = [name for name, value in graph.entry_parameters.items() if value.layout is not None]
    first: dict[Any, str] = {}  # parameters with equal identities share an array
    same = {name: first.setdefault(held.identity(name), name) for name in packed}
    from_file = [name for name in first.values() if held.is_mapped(name)]
    computed = [name for name in first.values() if name not in set(from_file)]
    with ThreadPoolExecutor(max_workers=threads) as pool:
        made_now = in_memory(held.panels(computed), pool)
        made_now |= through_file(held.panels(from_file), lambda: held.contents(from_file, pool), pool, folder)
    return found | {name: made_now[other] for name, other in same.items()}


class _Weights:
    """The parameters that entries read, row-major. Derived weights of `bind` are computed when they are requested."""

    def __init__(self, graph: Graph, made: Mapping[str, Recipe], weights: Mapping[str, Any]) -> None:
        refuse_missing(graph.name, graph.parameters, weights)
        self.made = made
        self.parameters = graph.entry_parameters
        read = {n: v.type for n, v in self.parameters.items() if n not in made}
        read |= {n: v.type for recipe in made.values() for n, v in recipe.sources.items()}
        self.given = {name: _taken(name, wanted, weights[name]) for name, wanted in read.items()}
        self._weights = weights

    def array(self, name: str) -> Array | ConvertedArray:
        """Return a weight as it was passed, with its strides, or compute a derived weight."""
        recipe = self.made.get(name)
        if recipe is None:
            return self.given[name]
        if not recipe.nodes:
            (source,) = recipe.sources
            return self.given[source]
        return _taken(name, self.parameters[name].type, recipe.make(self._weights))

    def row_major(self, name: str) -> Array:
        array = np.asarray(self.array(name))
        return np.ascontiguousarray(array).reshape(array.shape)

    def layout(self, name: str) -> Layout:
        layout = self.parameters[name].layout
        assert layout is not None
        return layout

    def panels(self, names: Iterable[str]) -> Panels:
        """Return these parameters as panels in their layouts."""
        return Panels(
            {name: (self._packed_shape(name), self._dtype(name)) for name in names},
            self._packed,
        )

    def _packed(self, name: str, made: Array) -> None:
        array, layout = self.array(name), self.layout(name)
        if not isinstance(array, ConvertedArray):
            _fill(made, array, layout)
            give_back(array)
        elif layout.transposed:
            _fill(made, array.read(), layout)
        else:
            read, step = array.open(), max(1, _CONVERTED_AT_ONCE // made[:1].nbytes)
            for first in range(0, len(made), step):
                rows = slice(first * layout.width, min((first + step) * layout.width, len(array)))
                _fill(made[first : first + step], read(rows), layout)
            array.release()

    def is_mapped(self, name: str) -> bool:
        """Return True if the weight, or every source of a derived weight, is in a mapped file."""
        held = (self.given[source] for source in self._sources(name))
        return all(each.is_mapped if isinstance(each, ConvertedArray) else is_mapped(each) for each in held)

    def identity(self, name: str) -> tuple[object, ...]:
        """Return a key that is equal for two parameters exactly if they have the same sources, recipe and layout."""
        return (*self._sources(name), self._key(name), self.layout(name))

    def contents(self, names: Iterable[str], pool: ThreadPoolExecutor) -> list[str]:
        """Return, for each name, a line that identifies the parameter's elements and layout by hashes of its
        sources.
        """
        sources = list(dict.fromkeys(source for name in names for source in self._sources(name)))
        hashes = dict(zip(sources, pool.map(_hashed, [self.given[n] for n in sources]), strict=True))

        def identified(name: str) -> str:
            return " ".join(
                filter(None, [*map(hashes.get, self._sources(name)), self._key(name), str(self.layout(name))])
            )

        return [identified(name) for name in names]

    def _packed_shape(self, name: str) -> tuple[int, ...]:
        return _packed_shape(self.parameters[name].type.storage_type.static_shape or (), self.layout(name))

    def _dtype(self, name: str) -> np.dtype[Any]:
        return np.dtype(self.parameters[name].type.storage_type.dtype.numpy or np.uint16)

    def _key(self, name: str) -> str:
        recipe = self.made.get(name)
        return recipe.key if recipe is not None and recipe.nodes else ""

    def _sources(self, name: str) -> Sequence[str]:
        recipe = self.made.get(name)
        return [name] if recipe is None else list(recipe.sources)


def _hashed(array: Array | ConvertedArray) -> str:
    """Return a hash of an array's elements, shape and dtype. The elements of a transposed array are hashed in memory
    order. An array that is computed from others is hashed as these.
    """
    if isinstance(array, ConvertedArray):
        return " ".join([array.recipe, str(array.shape), *map(_hashed, array.parts)])
    lies = array if array.flags.c_contiguous or not array.flags.f_contiguous else array.T
    turned = "" if lies is array else " transposed"
    data = np.ascontiguousarray(lies).reshape(-1).view(np.uint8).data
    digest = hashlib.sha256(data).hexdigest()
    give_back(array)
    return f"{digest} {array.shape} {array.dtype.str}{turned}"


def pack(array: Array, layout: Layout) -> Array:
    """Pack a matrix into panels; see `treadle.ir.layouts`."""
    made = np.empty(_packed_shape(array.shape, layout), array.dtype)
    _fill(made, array, layout)
    return made


def _fill(made: Array, array: Array, layout: Layout) -> None:
    matrix = array.T if layout.transposed else array
    if layout.kind == "pairs" or layout.twos:
        for panel in range(len(made)):
            _fill_pairs(made[panel], matrix[panel * layout.width : (panel + 1) * layout.width])
        return
    if layout.kind == "quads":
        for panel in range(len(made)):
            _fill_quads(made[panel], matrix[panel * layout.width : (panel + 1) * layout.width], layout)
        return
    if layout.kind == "blocks":
        _fill_blocks(made, matrix, layout)
        return
    whole = len(matrix) // layout.width
    for panel in range(whole):
        made[panel] = matrix[panel * layout.width : (panel + 1) * layout.width].T
    if whole < len(made):
        rest = matrix[whole * layout.width :]
        made[whole, :, : len(rest)] = rest.T
        made[whole, :, len(rest) :] = 0


def _fill_pairs(made: Array, rows: Array) -> None:
    """Fill a panel, [steps, groups, 16, 16, 2] or flat [pairs, width, 2], from rows [at most width, k]."""
    flat, pair = made.ndim == 3, np.dtype(f"u{2 * made.itemsize}")
    padded = (made.shape[1], 2 * made.shape[0]) if flat else (made.shape[1] * PAIR_SQUARE, made.shape[0] * PAIR_STEP)
    if rows.shape != padded:
        whole = np.zeros(padded, made.dtype)
        whole[: rows.shape[0], : rows.shape[1]] = rows
        rows = whole
    if flat:
        made.view(pair)[..., 0] = np.ascontiguousarray(rows).view(pair).T
        return
    steps, groups = made.shape[:2]
    pairs_of = np.ascontiguousarray(rows).view(pair).reshape(groups, PAIR_SQUARE, steps, PAIR_SQUARE)
    made.view(pair)[..., 0] = pairs_of.transpose(2, 0, 3, 1)


def _fill_quads(made: Array, held: Array, layout: Layout) -> None:
    """Fill a panel [bytes] from encoded rows [at most width, 4 + k]."""
    width, head = layout.width, QUAD_HEAD * layout.width
    groups, side = (1, width) if layout.flat else (width // PAIR_SQUARE, PAIR_SQUARE)
    squares = made[head:].reshape(-1, groups, PAIR_SQUARE, side, 4)
    rows = np.zeros((width, ROW_HEAD + len(squares) * QUAD_STEP), np.uint8)
    rows[: len(held), : held.shape[1]] = held
    sums = rows[:, ROW_HEAD:].view(np.int8).sum(axis=-1, dtype=np.int32)
    made[:head] = np.concatenate((rows[:, :ROW_HEAD].reshape(-1), sums.view(np.uint8)))
    fours = np.ascontiguousarray(rows[:, ROW_HEAD:]).view(np.uint32)
    of_rows = fours.reshape(groups, side, len(squares), PAIR_SQUARE)
    squares.view(np.uint32)[..., 0] = of_rows.transpose(2, 0, 3, 1)


def _fill_blocks(made: Array, held: Array, layout: Layout) -> None:
    """Fill panels [panels, bytes] from encoded rows [n, bytes of a row]."""
    width, block, head = layout.width, layout.block, layout.head
    count = held.shape[1] // block
    whole = len(held) // width

    def fill(panels: Array, rows: Array) -> None:
        to = panels.reshape(-1, count, block * width)
        lines = rows.reshape(-1, width, count, block)
        scales, fours = lines[..., :head], lines[..., head:]
        if layout.tail:
            fours, scales = lines[..., : block - head], lines[..., block - head :]
        if layout.runs:
            fours = np.concatenate([fours[..., 4 * first : 4 * end] for first, end in layout.runs], axis=-1)
        to[:, :, : head * width] = _interleaved(scales, 2)
        to[:, :, head * width :] = _interleaved(fours, 4)

    for first in range(0, whole, _PANELS_AT_ONCE):
        last = min(whole, first + _PANELS_AT_ONCE)
        fill(made[first:last], held[first * width : last * width])
    if whole < len(made):
        rest = np.zeros((width, held.shape[1]), np.uint8)
        rest[: len(held) - whole * width] = held[whole * width :]
        fill(made[whole:], rest)


def _interleaved(lines: Array, side: int) -> Array:
    """Return u8[panels, blocks, bytes * width] from lines [panels, width, blocks, bytes]: the lines of a panel are
    interleaved, `side` bytes at a time.
    """
    panels, width, count, bytes = lines.shape
    words = np.ascontiguousarray(lines).view(f"<u{side}")
    turned = np.ascontiguousarray(words.transpose(0, 2, 3, 1))
    return turned.view(np.uint8).reshape(panels, count, bytes * width)


def _packed_shape(shape: Sequence[int], layout: Layout) -> tuple[int, ...]:
    return tuple([size.evaluate({}) for size in layout.shape([Size.of(n) for n in shape])])


def _taken(name: str, wanted: Type, value: Any) -> Array | ConvertedArray:
    refuse_misfit(name, wanted, value)
    if isinstance(value, ConvertedArray):
        return value
    array = as_numpy_weight(value)
    return rounded(array).reshape(array.shape) if wanted.dtype.numpy is None else array

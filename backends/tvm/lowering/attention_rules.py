"""Lowering rules of attention: one kernel with all its masks and biases, on views of queries, keys and values.

Masks of positions become the range of distances between query and key that are visible. The range is passed as sizes of
the kernel, so causal masks, windows and no mask share one kernel. Padding becomes a limit on the keys; every other mask
or bias becomes a term of the kernel. Attention over a cache has its own kernel with the same arguments; its keys and
values are the cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from treadle.backends.tvm.kernels.attention.attention_masks import (
    AlibiWriter,
    BiasWriter,
    MaskWriter,
    NearOffsetsWriter,
    OffsetsWriter,
    QueryBiasWriter,
    QueryMaskWriter,
    RelativeBias,
    SegmentsWriter,
    TermWriter,
    near_offsets,
    row_of_offsets,
)
from treadle.backends.tvm.kernels.attention.cached_attention import CachedFlashAttention, steps_at_once
from treadle.backends.tvm.kernels.attention.flash_attention import FlashAttention
from treadle.backends.tvm.kernels.attention.pair_attention_writer import multiplies_pairs
from treadle.backends.tvm.kernels.attention.scratch import GROUP, SPAN, Scratch
from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.backends.tvm.lowering.program import STATUS_WORDS
from treadle.backends.tvm.lowering.routine_writer import SLOTS, Keeps, RoutineWriter, Rule
from treadle.ir.attention.attention_terms import (
    AXES,
    Alibi,
    BooleanMask,
    Causal,
    Padding,
    Segments,
    T5Relative,
    TensorBias,
    Window,
)
from treadle.ir.attention.seen_keys import reach_of
from treadle.ir.attention.term_visitor import TermVisitor
from treadle.ir.graph import Node
from treadle.ir.literals import Literal
from treadle.ir.operation import Op
from treadle.ir.ops.attention import Attention
from treadle.ir.ops.cached_attention import CachedAttention
from treadle.ir.sizing.sizes import ONE, ZERO, Size
from treadle.ir.storage.views import Storage, StorageKind, View
from treadle.ir.types import DType, Type, bf16, f16, f32, i64

WIDEST = 512  # largest head size for which a block of keys and a block of values stay in the L2 cache
ROWS = 256  # approximate number of rows of a task (queries times the heads that share keys)
_FAR = 2**30  # larger than any distance between a query and a key; with a position added, it fits in 32 bits


def _covers(op: Op, types: Sequence[Type | None]) -> bool:
    """Return True if the kernel can compute the op: operands are float32, widths are known and not too large, and the
    kernel has every term.

    The keys and values of a cache may have 16 bits. In a ring, consecutive keys are not contiguous where the ring wraps
    around, so terms with an element for each key are not read as vectors.
    """
    if not isinstance(op, Attention | CachedAttention) or not op.has_standard_terms:
        return False
    if isinstance(op, CachedAttention):
        held: Sequence[Sequence[DType]] = [(f32,), (f32, bf16, f16), (f32, bf16, f16)]
    else:
        held = [(f32,) if op.to is None else (bf16,)] * 3
        if op.to not in (None, f32):
            return False
    for n, t in enumerate(types):
        if t is None or (t.dtype.is_float and t.dtype not in (held[n] if n < 3 else (f32,))):
            return False
    if isinstance(op, CachedAttention) and op.ring and any("t" in o.axes.split() for t in op.terms for o in t.operands):
        return False
    widths = [t.shape[-1].constant for t in (types[0], types[2]) if t is not None]
    return all(width is not None and 1 <= width <= WIDEST for width in widths)


def _attention(w: RoutineWriter, node: Node) -> None:
    """Lower attention over a sequence or over a cache."""
    op = node.op
    assert isinstance(op, Attention | CachedAttention)
    operands = [w.view(v) for v in node.inputs]
    q, k, v = (_side_by_side(w, view) for view in operands[:3])
    own = [w.contiguous(view) for view in operands[3 : len(op.first)]]
    d, e = q.shape[3].constant, v.shape[3].constant
    assert d is not None
    assert e is not None
    b, g, s, t = q.shape[0], k.shape[1], q.shape[2], k.shape[2]
    shared = q.shape[1] // g
    cached = isinstance(op, CachedAttention)
    first = op.start if isinstance(op, Attention) else ZERO
    terms = _KernelTerms(w, q.shape[1], s, t, first, cached=cached)
    for term, given in op.with_operands(operands[len(op.first) :]):
        term.accept(terms, *given)
    low, high = (None if each is None else each + first for each in reach_of(op.terms))
    to = w.view(node.result)
    out = to if _is_side_by_side(to) else w.scratch(f32, to.shape)
    most, at_once, ring = _queries_a_task(shared.constant), 0, False
    spec = (d, e, op.scale_for(d), op.softcap, len(terms.lengths), tuple(terms.codes), q.dtype.name)
    if isinstance(op, CachedAttention):
        at_once, ring = _heads_a_step(w, s, shared, d, e), op.ring
        kernel: Kernel = CachedFlashAttention(*spec, k.dtype.name, ring, at_once)
        most = 1 if at_once else most
    else:
        kernel = FlashAttention(*spec)
    part = Scratch.of(d, e, w.isa, packs=not at_once, pairs=multiplies_pairs(d, q.dtype.name, w.isa))
    rows = shared * most
    # With one query per row, each span of a row's keys has its own memory for its partial result.
    parts = t // SPAN + (2 if ring else 1)
    slots = SLOTS if cached else w.slots
    held = b * g * parts if at_once else Size.of(slots)
    work = [
        w.scratch(f32, shape, f"attention_{name}")
        for name, shape in (
            ("keys", (Size.of(slots), Size.of(part.keys))),
            ("values", (Size.of(slots), Size.of(part.values))),
            ("queries", (Size.of(slots), Size.of(part.queries))),
            ("scores", (Size.of(slots), Size.of(part.scores))),
            ("sums", (held, rows, Size.of(part.sums))),
            ("rows", (held, rows, Size.of(part.rows))),
        )
    ]
    sizes: list[Size | int] = [b, g, shared, s, t, *([k.shape[0]] if cached else [])]
    sizes += [-_FAR if low is None else low, _FAR if high is None else high, most, slots, *([parts] if at_once else [])]
    sizes += [stride for view in (q, k, v, out) for stride in view.strides[:3]]
    written = [out, *work, *([STATUS_WORDS] if cached else [])]
    pointers = [q, k, v, *own, *terms.lengths, *terms.read, *written]
    w.step(kernel, pointers, [*sizes, *terms.strides], node, writes=len(written))
    if out is not to:
        w.copy(out, to, node)


def _heads_a_step(w: RoutineWriter, s: Size, shared: Size, d: int, e: int) -> int:
    """Return the number of heads that share keys if the kernel for one query per row can be used, else 0. The kernel
    merges parts after its loop over tasks, which thread blocks of a device cannot.
    """
    if not w.isa.joins_tasks:
        return 0
    lanes = w.isa.lanes()
    heads = shared.constant or 0
    return heads if s == ONE and d % lanes == e % lanes == 0 and heads <= steps_at_once(w.isa) else 0


def _queries_a_task(shared: int | None) -> int:
    """Return the number of queries of each head in a task. It is large enough that packing the keys takes little time
    compared with the products.

    shared: the number of heads that share keys, if it is known.
    """
    return max(1, ROWS // ((shared or ROWS) * GROUP)) * GROUP


class _KernelTerms(TermVisitor[View, None]):
    """Visitor that collects the kernel's arguments for terms. Masks of positions add none; `reach_of` handles them.

    first    the position of the first query, 0 for a cache, whose kernel reads positions
    lengths  number of valid keys of each row, a view for each padding
    codes    codes of the writers of the other terms
    read     operands of these terms
    strides  strides of these operands, as passed to the kernel
    """

    def __init__(self, w: RoutineWriter, heads: Size, queries: Size, keys: Size, first: Size, *, cached: bool) -> None:
        self.w, self.heads, self.queries, self.keys, self.first, self.cached = w, heads, queries, keys, first, cached
        self.lengths: list[View] = []
        self.codes: list[str] = []
        self.read: list[View] = []
        self.strides: list[Size] = []

    def _add(self, writer: type[TermWriter], *read: View) -> None:
        self.codes.append(writer.code)
        self.read += read

    def causal(self, term: Causal) -> None:
        pass

    def window(self, term: Window) -> None:
        pass

    def padding(self, term: Padding, lengths: View) -> None:
        self.lengths.append(self.w.contiguous(lengths))

    def segments(self, term: Segments, of_queries: View, of_keys: View) -> None:
        self._add(SegmentsWriter, self.w.contiguous(of_queries), self.w.contiguous(of_keys))

    def boolean_mask(self, term: BooleanMask, mask: View) -> None:
        self._add_tensor(MaskWriter, QueryMaskWriter, mask, term.axes)

    def tensor_bias(self, term: TensorBias, bias: View) -> None:
        self._add_tensor(BiasWriter, QueryBiasWriter, bias, term.axes)

    def _add_tensor(self, by_key: type[TermWriter], of_query: type[TermWriter], tensor: View, axes: str) -> None:
        held = axes.split()
        view = _side_by_side(self.w, tensor) if "t" in held else tensor
        self._add(by_key if "t" in held else of_query, view)
        self.strides += [view.strides[held.index(axis)] if axis in held else ZERO for axis in AXES[:3]]

    def t5_relative(self, term: T5Relative, table: View) -> None:
        if not self.cached:
            count = row_of_offsets(self.queries, self.keys, self.w.isa)
            self._add(OffsetsWriter, self._by_offset(term, table, self.first + self.queries, count))
            return
        reach = Size.of(term.max_distance + self.w.isa.widest)
        self._add(NearOffsetsWriter, self._by_offset(term, table, reach + 1, near_offsets(reach, self.w.isa)))
        self.strides.append(reach)

    def alibi(self, term: Alibi, slopes: View) -> None:
        self._add(AlibiWriter, self.w.contiguous(slopes))
        self.strides.append(self.first)

    def _by_offset(self, term: T5Relative, table: View, first: Size, count: Size) -> View:
        """Add a step that computes the bias of each head for `count` distances, starting at 1 - first."""
        w, buckets = self.w, Size.of(len(term.bucket_by_offset))
        literal = Literal.of(term.bucket_by_offset, i64)
        bucket = View.contiguous(Storage("t5_buckets", i64, buckets, StorageKind.CONSTANT, literal=literal), (buckets,))
        made = w.scratch(f32, (self.heads, count), "t5_bias")
        numbers: list[Size | int] = [self.heads, count, first, term.max_distance, *table.strides]
        w.step(RelativeBias(), [table, bucket, made], numbers, None)
        return made


def _is_side_by_side(view: View) -> bool:
    return view.panels is None and (view.strides[-1] == ONE or view.shape[-1] == ONE)


def _side_by_side(w: RoutineWriter, view: View) -> View:
    """Return the view if its last dimension is contiguous, or a copy."""
    return view if _is_side_by_side(view) else w.copied(view)


RULES: Mapping[str, Rule] = {"attention": _attention, "cached_attention": _attention}
KEEPS: Mapping[str, Keeps] = {"attention": _covers, "cached_attention": _covers}

"""Lowering rules of attention: one kernel for all its masks and biases, on views of queries, keys and values.

Masks by position become the distances that a query sees (sizes of the kernel, so that causal, window and none are one
kernel), padding becomes a limit of its keys, the rest terms of the kernel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from treadle.backends.python.attention_spelling import knows
from treadle.backends.tvm.kernels.attention import GROUP, FlashAttention, Scratch
from treadle.backends.tvm.kernels.attention_masks import RelativeBias
from treadle.backends.tvm.kernels.attention_masks import Term as KernelTerm
from treadle.backends.tvm.lowering.program import Buffer, View
from treadle.backends.tvm.lowering.routine_writer import Keeps, RoutineWriter, Rule
from treadle.ir.attention_terms import (
    AXES,
    Alibi,
    BooleanMask,
    Padding,
    Segments,
    T5Relative,
    TensorBias,
    Term,
    reach_of,
)
from treadle.ir.graph import Literal, Node
from treadle.ir.operation import Op
from treadle.ir.ops.attention import Attention
from treadle.ir.sizes import ONE, ZERO, Size
from treadle.ir.types import Type, f32, i64

WIDEST = 512  # heads: a block of keys and one of values stay in the second-level cache
ROWS = 256  # about as many rows, queries of the heads that share keys, are a task
SLOTS = 32  # tasks that may run at once, each in memory of its own
_FAR = 2**40  # a distance that no query and key have


def _covers(op: Op, types: Sequence[Type | None]) -> bool:
    """Float32, widths that are known and not too large, and terms that the kernel knows."""
    if not isinstance(op, Attention) or not knows(op):
        return False
    if any(t is None or (t.dtype.is_float and t.dtype is not f32) for t in types):
        return False
    widths = [t.shape[-1].constant for t in (types[0], types[2]) if t is not None]
    return all(width is not None and 1 <= width <= WIDEST for width in widths)


def _attention(w: RoutineWriter, node: Node) -> None:
    op = node.op
    assert isinstance(op, Attention)
    operands = [w.view(v) for v in node.inputs]
    q, k, v = (_side_by_side(w, view) for view in operands[:3])
    d, e = q.shape[3].constant, v.shape[3].constant
    assert d is not None
    assert e is not None
    b, g, s, t = q.shape[0], k.shape[1], q.shape[2], k.shape[2]
    shared = q.shape[1] // g
    lengths: list[View] = []
    codes: list[str] = []
    read: list[View] = []
    strides: list[Size] = []
    rest = iter(operands[3:])
    for term in op.terms:
        own = [next(rest) for _ in term.operands]
        if isinstance(term, Padding):
            lengths.append(w.contiguous(own[0]))
        else:
            _term(w, term, own, (q.shape[1], s, t), codes, read, strides)
    low, high = reach_of(op.terms)
    to = w.destination(node.result)
    out = to if _is_side_by_side(to) else w.scratch(f32, to.shape)
    most = _queries_a_task(shared.constant)
    part = Scratch.of(d, e, w.isa)
    rows = shared * most
    work = [
        w.scratch(f32, shape, f"attention_{name}")
        for name, shape in (
            ("keys", (Size.of(SLOTS), Size.of(part.keys))),
            ("values", (Size.of(SLOTS), Size.of(part.values))),
            ("queries", (Size.of(SLOTS), Size.of(part.queries))),
            ("scores", (Size.of(SLOTS), Size.of(part.scores))),
            ("sums", (Size.of(SLOTS), rows, Size.of(part.sums))),
            ("rows", (Size.of(SLOTS), rows, Size.of(part.rows))),
        )
    ]
    kernel = FlashAttention(d, e, op.scale_for(d), op.softcap, len(lengths), tuple(codes))
    sizes: list[Size | int] = [b, g, shared, s, t]
    sizes += [-_FAR if low is None else low, _FAR if high is None else high, most, SLOTS]
    sizes += [stride for view in (q, k, v, out) for stride in view.strides[:3]]
    w.step(kernel, [q, k, v, *lengths, *read, out, *work], [*sizes, *strides], node, writes=1 + len(work))
    if out is not to:
        w.copy(out, to, node)


def _queries_a_task(shared: int | None) -> int:
    """Queries of each head that a task takes, so that packing the keys is little beside its products.

    shared: how many heads share keys, where it is known.
    """
    return max(1, ROWS // ((shared or ROWS) * GROUP)) * GROUP


def _term(
    w: RoutineWriter,
    term: Term,
    own: Sequence[View],
    sizes: tuple[Size, Size, Size],
    codes: list[str],
    read: list[View],
    strides: list[Size],
) -> None:
    """Add a term's code, its operands, and the strides that the kernel is passed; nothing for a mask by position."""
    match term:
        case Segments():
            codes.append(KernelTerm("segments").code)
            read += [w.contiguous(view) for view in own]
        case BooleanMask(axes=axes) | TensorBias(axes=axes):
            held = axes.split()
            view = own[0] if "t" not in held else _side_by_side(w, own[0])
            codes.append(KernelTerm("mask" if isinstance(term, BooleanMask) else "bias", "t" in held).code)
            read.append(view)
            strides += [view.strides[held.index(axis)] if axis in held else ZERO for axis in AXES[:3]]
        case T5Relative():
            codes.append(KernelTerm("offsets").code)
            read.append(_by_offset(w, term, own[0], sizes))
        case Alibi():
            codes.append(KernelTerm("alibi").code)
            read.append(w.contiguous(own[0]))


def _by_offset(w: RoutineWriter, term: T5Relative, table: View, sizes: tuple[Size, Size, Size]) -> View:
    """The bias of each head for every distance, made by a step of its own."""
    heads, s, t = sizes
    literal = Literal.of(term.bucket_by_offset, i64)
    bucket = View.contiguous(
        Buffer("t5_buckets", i64, Size.of(len(term.bucket_by_offset)), "constant", literal=literal),
        (Size.of(len(term.bucket_by_offset)),),
    )
    made = w.scratch(f32, (heads, s + t + 2 * w.isa.lanes()), "t5_bias")
    numbers: list[Size | int] = [heads, made.shape[1], s, term.max_distance, *table.strides]
    w.step(RelativeBias(), [table, bucket, made], numbers, None)
    return made


def _is_side_by_side(view: View) -> bool:
    return view.panels is None and (view.strides[-1] == ONE or view.shape[-1] == ONE)


def _side_by_side(w: RoutineWriter, view: View) -> View:
    """A view whose last dimension has no gaps, or a copy."""
    return view if _is_side_by_side(view) else w.copied(view)


RULES: Mapping[str, Rule] = {"attention": _attention}
KEEPS: Mapping[str, Keeps] = {"attention": _covers}

"""The form in which PyTorch computes each attention on a device, and the reason if flash attention does not.

PyTorch's flash attention takes no mask, and of the terms only `causal`. A mask of all pairs would take S x S bytes for
each row, so masks of positions are applied in blocks of queries (`kernels.attention_in_blocks`).
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum

from treadle.ir.attention.attention_terms import Causal
from treadle.ir.attention.seen_keys import reach_of
from treadle.ir.builder import describe_source
from treadle.ir.graph import Graph
from treadle.ir.ops.attending import Attending
from treadle.ir.ops.attention import Attention
from treadle.ir.ops.cached_attention import CachedAttention


class AttentionForm(Enum):
    """A form of attention in PyTorch, as text for the log."""

    FUSED = "PyTorch's own function without a mask, which may use flash attention"
    MASKED = "PyTorch's own function with a mask"
    BLOCKS = "PyTorch's own function in blocks of queries, each with its own mask"
    CACHED = "PyTorch's own function over a range of the cache, with a mask"
    PRODUCTS = "a product, softmax and a product"


def form_of(op: Attending, on_device: bool) -> AttentionForm:
    """Return the form of an attention."""
    if isinstance(op, CachedAttention):
        return AttentionForm.CACHED if op.softcap is None else AttentionForm.PRODUCTS
    if not isinstance(op, Attention):
        return AttentionForm.PRODUCTS
    if not _prevents_flash(op):
        return AttentionForm.FUSED
    if on_device and reach_of(op.terms) != (None, None):
        return AttentionForm.BLOCKS
    return AttentionForm.MASKED if op.softcap is None else AttentionForm.PRODUCTS


def _prevents_flash(op: Attending) -> str | None:
    """Return the part of an attention for which flash attention has no form, or None.

    With `is_causal`, PyTorch also multiplies the -inf of its mask by the scale, which stays -inf only for a positive
    scale.
    """
    if isinstance(op, CachedAttention):
        return "rows of different lengths in a cache"
    if not isinstance(op, Attention):
        return "the probabilities, which are a result"
    if op.softcap is not None:
        return f"softcap={op.softcap}"
    others = [str(term) for term in op.terms if term != Causal()]
    if op.terms.count(Causal()) > 1 or others:
        return ", ".join(dict.fromkeys(others)) or "causal, twice"
    if op.terms and op.scale is not None and op.scale <= 0:
        return f"causal with scale={op.scale}"
    return None


def notes_on_attention(graph: Graph) -> Iterator[str]:
    """Yield a line for each attention of a graph for a device: its form, and the reason if flash attention has none."""
    for function, node in graph.walk():
        if isinstance(node.op, Attending):
            reason, place = _prevents_flash(node.op), describe_source(node.source, node.scope)
            why = f"; flash attention does not support {reason}" if reason else ""
            where = f"    ({place})" if place else ""
            yield f"{function.name}: {node.op.name}: {form_of(node.op, on_device=True).value}{why}{where}"

"""The Attention and RotaryEmbedding operators of ONNX's own opsets, as IR attention with mask and bias terms."""

from __future__ import annotations

from treadle.frontends.onnx_import.operators import Made, OnnxSite, operator
from treadle.frontends.recipes.reshaping import reshaped
from treadle.ir.attention.masking import (
    Biases,
    Masks,
    attend,
    attend_with_probabilities,
    boolean_mask,
    causal,
    padding,
    tensor_bias,
    window,
)
from treadle.ir.builder import Builder, Expr
from treadle.ir.sizing.sizes import ONE, ZERO, Size
from treadle.ir.types import i64

_NO_MASKS, _NO_BIASES = Masks(), Biases()
_AFTER_SOFTMAX = 3  # the mode in which the fourth output is the probabilities


def heads_apart(site: OnnxSite, x: Expr, heads: int) -> Expr:
    """Return [b, s, h d] as [b, h, s, d]."""
    if x.rank != 3 or heads < 1 or site.number(x.shape[-1], "the total width of the heads") % heads:
        site.malformed(f"a width of {x.shape[-1]} does not split into {heads} heads")
    return site.b.rearrange(x, pattern=f"b s (h={heads} d) -> b h s d")


def heads_together(b: Builder, x: Expr) -> Expr:
    """Return [b, h, s, d] as [b, s, h d]."""
    return b.rearrange(x, pattern="b h s d -> b s (h d)")


def masked_by(site: OnnxSite, mask: Expr, full: tuple[Size, ...]) -> tuple[Masks, Biases]:
    """Return a mask [..., s, t] as a mask term if it is boolean (true where a query may see a key), else as a bias
    term, which is added to the scores.

    An axis of size 1 that broadcasts against a longer axis of attention is left out.
    """
    b = site.b
    if mask.rank > 4:
        site.malformed(f"the mask must have at most 4 axes, but has {mask.rank}")
    own = full[4 - mask.rank :]
    kept = [size for size, whole in zip(mask.shape, own, strict=True) if size != ONE or whole == ONE]
    names = [
        n
        for n, size, whole in zip("bhst"[4 - mask.rank :], mask.shape, own, strict=True)
        if size != ONE or whole == ONE
    ]
    held, _ = reshaped(b, mask, kept)
    axes = " ".join(names)
    if not axes:
        held, axes = b.expand(held, shape=(full[3],)), "t"
    if mask.dtype.kind == "bool":
        return boolean_mask(held, axes), _NO_BIASES
    return _NO_MASKS, tensor_bias(held, axes)


def bottom_right(b: Builder, queries: Size, keys: Size, past: Expr) -> Masks:
    """Return a causal mask: keys up to each query's own position. `past` is the offset of the queries' positions (per
    row, or for all).
    """
    i = b.rearrange(b.iota(size=queries), pattern="s -> s 1")
    if past.rank == 1:
        past = b.rearrange(past, pattern="b -> b 1 1")
    seen = b.iota(size=keys) <= i + past
    return boolean_mask(seen, "b s t" if seen.rank == 3 else "s t")


@operator("Attention", latest=25, first=23)
def _attention(site: OnnxSite) -> Made:
    """Attention, also with the probabilities as an output (mode 3). If the scores are an output, or the softmax has
    another precision, use the operator's function body.
    """
    b = site.b
    mode = site.int("qk_matmul_output_mode", 0)
    precision, scale = site.int("softmax_precision"), site.float("scale")
    softcap, is_causal = site.float("softcap", 0.0), site.int("is_causal", 0)
    q_heads, kv_heads = site.int("q_num_heads"), site.int("kv_num_heads")
    before, after = site.int("left_window_size", -1), site.int("right_window_size", -1)
    q, k, v = (site.x(i) for i in range(3))
    wants_more = len(site.wanted) > 3 and site.wanted[3]
    wants_scores = wants_more and mode != _AFTER_SOFTMAX
    widths = {"f32": 1, "f16": 10, "f64": 11, "bf16": 16}
    if wants_scores or softcap < 0 or precision not in (None, widths.get(q.dtype.name)):
        site.decompose()
    if k.dtype is not q.dtype or v.dtype is not q.dtype or site.element(0).format is not None:
        site.decompose()
    merged = q.rank == 3
    if merged:
        if q_heads is None or kv_heads is None:
            site.malformed("operands of rank 3 need q_num_heads and kv_num_heads")
        q, k, v = (heads_apart(site, x, n) for x, n in ((q, q_heads), (k, kv_heads), (v, kv_heads)))
    past = ZERO
    if site.has(4):
        past_k, past_v = site.x(4), site.x(5)
        past = past_k.shape[2]
        k, v = b.concat(past_k, k, axis=2), b.concat(past_v, v, axis=2)
    queries, keys = q.shape[2], k.shape[2]
    masks, biases = _NO_MASKS, _NO_BIASES
    if site.has(3):
        mask = _to_length(site, site.x(3), keys)
        masks, biases = masked_by(site, mask, (q.shape[0], q.shape[1], queries, keys))
    if site.has(6):
        masks = masks & padding(site.x(6))
    ahead: Expr | None
    if site.has(6) and not site.has(4):
        ahead = site.x(6) - _count(b, queries)
    else:
        ahead = None if past == ZERO else _count(b, past)
    if is_causal:
        masks = masks & (causal if ahead is None else bottom_right(b, queries, keys, ahead))
    if is_causal and ahead is None and before >= 0:
        masks, before, after = masks & window(before + 1), -1, -1
    if before >= 0 or after >= 0:
        masks = masks & between(b, queries, keys, ahead, before, -1 if is_causal else after)
    probabilities: Expr | None = None
    if wants_more:
        y, probabilities = attend_with_probabilities(
            b, q, k, v, masks=masks, biases=biases, scale=scale, softcap=softcap or None
        )
    else:
        y = attend(b, q, k, v, masks=masks, biases=biases, scale=scale, softcap=softcap or None)
    made: list[Expr | None] = [heads_together(b, y) if merged else y]
    made += [k if len(site.wanted) > 1 and site.wanted[1] else None]
    made += [v if len(site.wanted) > 2 and site.wanted[2] else None]
    made += [probabilities]
    return made


def _count(b: Builder, size: Size) -> Expr:
    return b.constant(size.constant, i64) if size.constant is not None else b.size(value=size)


def _to_length(site: OnnxSite, mask: Expr, keys: Size) -> Expr:
    """Extend a mask's last axis to the number of keys. The added keys are masked."""
    held = mask.shape[-1]
    if held in (keys, ONE):
        return mask
    if site.version < 24:
        site.malformed(f"a mask of {held} keys does not fit {keys} keys")
    value = 0.0 if mask.dtype.kind == "bool" else float("-inf")
    return site.b.pad(mask, axis=mask.rank - 1, after=keys - held, value=value)


def between(b: Builder, queries: Size, keys: Size, ahead: Expr | None, before: int, after: int) -> Masks:
    """Return a mask that shows each query the keys at most `before` positions before it and `after` positions after it.
    -1: no limit.
    """
    i = b.rearrange(b.iota(size=queries), pattern="s -> s 1")
    if ahead is not None:
        i = i + (b.rearrange(ahead, pattern="b -> b 1 1") if ahead.rank == 1 else ahead)
    j, masks = b.iota(size=keys), _NO_MASKS
    for limit, sign in ((before, 1), (after, -1)):
        if limit >= 0:
            seen = (i - j) * sign <= limit
            masks = masks & boolean_mask(seen, "b s t" if seen.rank == 3 else "s t")
    return masks


# -- rotary positions ----------------------------------------------------------------------------------------------


def turned(b: Builder, x: Expr, cos: Expr, sin: Expr, *, interleaved: bool) -> Expr:
    """Return x [b, h, s, d] with its first 2f dimensions rotated by angles whose cosines and sines are [b, s, f]."""
    f, d = cos.shape[-1], x.shape[-1]
    cos, sin = (b.rearrange(table, pattern="b s f -> b 1 s f") for table in (cos, sin))
    if interleaved:
        first, second = (b.slice(x, axis=3, start=k, stop=f * 2, stride=2) for k in (0, 1))
    else:
        first, second = b.slice(x, axis=3, start=0, stop=f), b.slice(x, axis=3, start=f, stop=f * 2)
    pairs = [first * cos - second * sin, first * sin + second * cos]
    if interleaved:
        apart = b.concat(*[b.rearrange(p, pattern="b h s f -> b h s f 1") for p in pairs], axis=4)
        parts = [b.rearrange(apart, pattern="b h s f p -> b h s (f p)")]
    else:
        parts = pairs
    if f * 2 != d:
        parts.append(b.slice(x, axis=3, start=f * 2))
    made: Expr = parts[0] if len(parts) == 1 else b.concat(*parts, axis=3)
    return made


@operator("RotaryEmbedding", latest=23, first=23)
def _rotary(site: OnnxSite) -> Made:
    b, x, cos, sin = site.b, site.x(0), site.x(1), site.x(2)
    heads, width = site.int("num_heads", 0), site.int("rotary_embedding_dim", 0)
    interleaved = bool(site.int("interleaved", 0))
    merged = x.rank == 3
    if merged:
        x = heads_apart(site, x, heads)
    if site.has(3):
        cos, sin = (b.gather(table, site.x(3), axis=0) for table in (cos, sin))
    size = site.number(x.shape[3], "the width of a head")
    wanted = width or size
    if not wanted or wanted > size or cos.shape[-1] != wanted // 2 or cos.shape != sin.shape:
        columns = cos.shape[-1], sin.shape[-1]
        site.mismatched(f"caches of {columns[0]} and {columns[1]} columns do not fit {wanted} dimensions", *columns)
    y = turned(b, x, cos, sin, interleaved=interleaved)
    return heads_together(b, y) if merged else y

"""Attention operators of the domain com.microsoft: Attention, MultiHeadAttention, GroupQueryAttention.

They mask by adding a large negative number (`mask_filter_value`). So a fully masked row still has its plain softmax,
and these masks are biases here. Keys after a causal query are masked completely.

Source: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from collections.abc import Sequence

from treadle.frontends.onnx_import.folding import is_at_least
from treadle.frontends.onnx_import.operators import MICROSOFT, Made, OnnxSite, operator
from treadle.frontends.onnx_import.rules.attention import bottom_right, heads_apart, heads_together, masked_by, turned
from treadle.frontends.recipes.positions import extent
from treadle.ir.attention.masking import Biases, Masks, attend, boolean_mask, causal, tensor_bias
from treadle.ir.builder import Builder, Expr
from treadle.ir.sizing.sizes import ZERO, Size
from treadle.ir.tensors.shapes import reshaped
from treadle.ir.types import i64


def _padding(site: OnnxSite, position: int, dtype_like: Expr, keys: Size) -> Biases:
    """Return the mask of keys as a bias: 0 where a query may see the key.

    The mask input is the number of valid keys [b], or [b, t] or [b, s, t] with 0 where a key is masked.
    """
    b, mask = site.b, site.x(position)
    hidden = site.float("mask_filter_value", -10000.0)
    zero, low = (b.constant(n, dtype_like.dtype) for n in (0.0, hidden))
    if mask.rank == 1:
        if mask.shape != dtype_like.shape[:1]:
            site.refuse("the starts and ends of packed sequences are not supported")
        lengths = b.rearrange(mask.cast(i64), pattern="b -> b 1")
        return tensor_bias(b.where(b.iota(size=keys) < lengths, zero, low), "b t")
    if mask.rank not in (2, 3) or mask.shape[-1] != keys:
        site.refuse(f"a mask of shape [{', '.join(map(str, mask.shape))}] is not supported")
    return tensor_bias(b.where(mask > 0, zero, low), "b t" if mask.rank == 2 else "b s t")


def _causal(b: Builder, past: Size, queries: Size, keys: Size) -> Masks:
    return causal if past == ZERO else bottom_right(b, queries, keys, extent(b, past))


def _added(site: OnnxSite, position: int, full: tuple[Size, ...]) -> Biases:
    """Return the bias that an optional input adds to the scores."""
    return masked_by(site, site.x(position), full)[1] if site.has(position) else Biases()


def _attended(site: OnnxSite, q: Expr, k: Expr, v: Expr, past: Size, mask: int, bias: int) -> Expr:
    """Return attention by the operands and attributes that both operators have. q, k, v are [b, h, s, d]; the result is
    [b, s, h d].
    """
    b = site.b
    site.ignore("mask_filter_value")  # used together with a mask
    scale = site.float("scale", 0.0)
    queries, keys = q.shape[2], k.shape[2]
    masks = _causal(b, past, queries, keys) if site.int("unidirectional", 0) else Masks()
    biases = _padding(site, mask, q, keys) if site.has(mask) else Biases()
    biases = biases + _added(site, bias, (q.shape[0], q.shape[1], queries, keys))
    return heads_together(b, attend(b, q, k, v, masks=masks, biases=biases, scale=scale or None))


@operator("Attention", domain=MICROSOFT)
def _attention(site: OnnxSite) -> Made:
    """Attention in which one weight [w, q k v] projects x [b, s, w] to queries, keys and values."""
    b, heads = site.b, site.int("num_heads", 0)
    if site.int("do_rotary", 0) or site.int("past_present_share_buffer", 0):
        site.refuse("rotary positions, and past and present in one buffer, are not supported")
    site.ignore("rotary_embedding_dim")
    weight = site.x(1)
    whole = site.number(weight.shape[1], "the number of the weight's columns")
    widths = site.ints("qkv_hidden_sizes") or (whole // 3,) * 3
    if len(widths) != 3 or sum(widths) != whole:
        site.malformed(f"widths {list(widths)} do not fit a weight of {whole} columns")
    made = b.matmul(site.x(0), weight)
    if site.has(2):
        made = made + site.x(2)
    ends = [0, widths[0], widths[0] + widths[1], whole]
    q, k, v = (heads_apart(site, b.slice(made, axis=2, start=ends[i], stop=ends[i + 1]), heads) for i in range(3))
    past = ZERO
    if site.has(4):
        held = site.x(4)
        past = held.shape[3]
        k, v = (b.concat(_part(b, held, i), x, axis=2) for i, x in enumerate((k, v)))
    y = _attended(site, q, k, v, past, 3, 5)
    if len(site.wanted) < 2 or not site.wanted[1]:
        return [y, None]
    pair = [b.rearrange(x, pattern="b h t d -> 1 b h t d") for x in (k, v)]
    return [y, b.concat(*pair, axis=0)]


def _part(b: Builder, x: Expr, place: int) -> Expr:
    """Return one element of the first axis."""
    return reshaped(b, b.slice(x, axis=0, start=place, stop=place + 1), x.shape[1:])[0]


@operator("MultiHeadAttention", domain=MICROSOFT)
def _multi_head(site: OnnxSite) -> Made:
    """Attention on q [b, s, w], k and v [b, t, w] or, already split, [b, h, t, d]; or on packed q, k and v [b, s, h, 3,
    d].
    """
    b, heads = site.b, site.int("num_heads", 0)
    if site.has(8) or site.has(9) or any(site.wanted[3:]):
        site.refuse("the index of a cache, and scores as an output, are not supported")
    parts = _packed(site) if site.x(0).rank == 5 else [site.x(0), *(_packed_pair(site) or [site.x(1), site.x(2)])]
    if site.has(3):
        parts = _with_bias(site, parts, site.x(3))
    q, k, v = (x if x.rank == 4 else heads_apart(site, x, heads) for x in parts)
    past = ZERO
    if site.has(6):
        past = site.shape(6)[2]
        k, v = b.concat(site.x(6), k, axis=2), b.concat(site.x(7), v, axis=2)
    y = _attended(site, q, k, v, past, 4, 5)
    present = [x if len(site.wanted) > i and site.wanted[i] else None for i, x in ((1, k), (2, v))]
    return [y, *present]


def _packed(site: OnnxSite) -> list[Expr]:
    b, x = site.b, site.x(0)
    turned_round = b.rearrange(x, pattern="b s h three d -> three b h s d")
    return [_part(b, turned_round, i) for i in range(3)]


def _packed_pair(site: OnnxSite) -> list[Expr] | None:
    if site.has(2):
        return None
    b, x = site.b, site.x(1)
    if x.rank != 5:
        site.malformed("there is neither a value nor packed keys and values")
    turned_round = b.rearrange(x, pattern="b t h two d -> two b h t d")
    return [_part(b, turned_round, i) for i in range(2)]


def _with_bias(site: OnnxSite, parts: Sequence[Expr], bias: Expr) -> list[Expr]:
    """Split a bias [q k v], and add each part to its operand."""
    b, made, start = site.b, [], ZERO
    for x in parts:
        size = x.shape[-1] if x.rank == 3 else x.shape[1] * x.shape[3]
        own = b.slice(bias, axis=0, start=start, stop=start + size)
        if x.rank == 4:
            own = b.rearrange(own, pattern=f"(h={x.shape[1]} d) -> h 1 d")
        made.append(x + own)
        start = start + size
    return made


# -- grouped queries, with a cache ---------------------------------------------------------------------------------


_GROUPED_REFUSED = ("k_scale", "v_scale", "q_norm_weight", "k_norm_weight", "query_seqlens")
"""Inputs from the thirteenth on. They would change the result, so they are refused."""


@operator("GroupQueryAttention", domain=MICROSOFT)
def _grouped(site: OnnxSite) -> Made:
    """Grouped-query attention, causal by default, with rotary positions and a cache. Rows have separate past lengths.

    q [b, s, h d], k and v [b, s, g d] (or all packed in q), past [b, g, p, d], seqlens_k [b]: number of valid keys
    minus 1, total_sequence_length: the length of the longest row, with its past
    """
    b, heads, groups = site.b, site.int("num_heads", 0), site.int("kv_num_heads", 0)
    scale, softcap, window = site.float("scale", 0.0), site.float("softcap", 0.0), site.int("local_window_size", -1)
    rotary, interleaved = site.int("do_rotary", 0), bool(site.int("rotary_interleaved", 0))
    _refuse_extensions(site)
    is_causal = site.int("causal", 1)
    if is_causal not in (0, 1) or (window != -1 and not is_causal):
        site.malformed(f"causal must be 1, or 0 without a window, but is {is_causal} with a window of {window}")
    q, k, v = _packed_or_separate(site, heads, groups)
    queries, real = q.shape[2], site.x(5).cast(i64) + 1
    real, _ = reshaped(b, real, q.shape[:1])
    total = site.size(6)
    prompt = total == queries
    if not prompt and not is_at_least(total, queries + 1, site.importer.graph.symbols):
        site.refuse_symbolic(
            f"{queries} queries of {total} positions: it is unknown if this is a prompt", queries, total
        )
    past = b.expand(b.constant(0, i64), shape=q.shape[:1]) if prompt else real - extent(b, queries)
    if rotary:
        positions = b.rearrange(b.iota(size=queries), pattern="s -> 1 s") + b.rearrange(past, pattern="b -> b 1")
        if site.has(9):
            positions = site.x(9)
        cos, sin = (b.gather(site.x(i), b.maximum(positions, 0), axis=0) for i in (7, 8))
        q, k = (turned(b, x, cos, sin, interleaved=interleaved) for x in (q, k))
    if site.has(3) and site.shape(3)[2] != ZERO:
        k, v = (_appended(site, site.x(i), x, past, total) for i, x in ((3, k), (4, v)))
    elif not prompt:
        site.malformed("a past length needs a past")
    keys = k.shape[2]
    j = b.iota(size=keys)
    masks = boolean_mask(j < b.rearrange(real, pattern="b -> b 1"), "b t")
    if is_causal:
        masks = masks & (causal if prompt else bottom_right(b, queries, keys, past))
    if window > 0:
        i = b.rearrange(b.iota(size=queries), pattern="s -> s 1") + b.rearrange(past, pattern="b -> b 1 1")
        masks = masks & boolean_mask(j > i - window, "b s t")
    biases = _added(site, 10, (q.shape[0], q.shape[1], queries, keys))
    y = attend(b, q, k, v, masks=masks, biases=biases, scale=scale or None, softcap=softcap or None)
    return [heads_together(b, y), k, v]


def _refuse_extensions(site: OnnxSite) -> None:
    """Refuse sinks, quantized caches, scores as an output, and inputs that would change the result."""
    if site.int("smooth_softmax", 0) > 0 or site.has(11):
        site.refuse("a sink is not supported")
    for name in ("k_quant_type", "v_quant_type"):
        if site.text(name, "NONE") != "NONE":
            site.refuse("a quantized cache is not supported")
    if any(site.wanted[3:]) or site.int("qk_output", 0):
        site.refuse("scores are not supported as an output")
    for position, name in enumerate(_GROUPED_REFUSED, 12):
        if site.has(position):
            site.refuse(f"{name} is not supported")
    if site.int("sliding_window_cache", 0):
        site.refuse("a cache as long as its window (sliding_window_cache) is not supported")
    # attributes of unsupported cases
    site.ignore("qk_norm_epsilon", "q_norm_epsilon", "k_norm_epsilon", "kv_cache_bit_width")


def _packed_or_separate(site: OnnxSite, heads: int, groups: int) -> list[Expr]:
    """Return queries, keys and values by heads, from three inputs or from one."""
    if site.has(1):
        return [heads_apart(site, site.x(i), n) for i, n in ((0, heads), (1, groups), (2, groups))]
    width = site.number(site.shape(0)[2], "the packed width") // max(heads + 2 * groups, 1)
    every = heads_apart(site, site.x(0), heads + 2 * groups)
    ends = [0, heads, heads + groups, heads + 2 * groups]
    if width < 1:
        site.malformed("the packed width does not split into heads")
    return [site.b.slice(every, axis=1, start=ends[i], stop=ends[i + 1]) for i in range(3)]


def _appended(site: OnnxSite, past: Expr, x: Expr, lengths: Expr, total: Size) -> Expr:
    """Write x [b, g, s, d] into past [b, g, p, d], each row at its own length. If past is too short, it is extended to
    the length of the longest row.
    """
    b, held = site.b, past.shape[2]
    symbols = site.importer.graph.symbols
    if not is_at_least(held, total, symbols):
        if not is_at_least(total, held, symbols):
            site.refuse(f"a past of {held} for {total} positions: it is unknown which is longer")
        past = b.pad(past, axis=2, after=total - held)
    size = past.shape[2]
    source = b.iota(size=size) - b.rearrange(lengths, pattern="b -> b 1")
    hit = (source >= 0) & (source < extent(b, x.shape[2]))
    source, hit = (b.rearrange(v, pattern="b t -> b 1 t 1") for v in (b.where(hit, source, b.constant(0, i64)), hit))
    full = (*past.shape[:2], size, past.shape[3])
    picked = b.take_along_axis(x, b.expand(source, shape=full), axis=2)
    return b.where(hit, picked, past)

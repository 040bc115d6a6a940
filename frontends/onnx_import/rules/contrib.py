"""Operators of the domain com.microsoft except attention. ONNX Runtime's optimizer and quantizer write them.

Source: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from treadle.frontends.onnx_import.operators import MICROSOFT, Made, OnnxSite, operator
from treadle.frontends.onnx_import.rules.attention import heads_apart, heads_together, turned
from treadle.frontends.onnx_import.rules.quantization import centered, dynamically_quantized
from treadle.frontends.recipes.matrix_products import matmul
from treadle.ir.builder import Builder, Expr
from treadle.ir.ops.axis_names import axis_letters
from treadle.ir.sizing.sizes import ONE
from treadle.ir.tensors.shapes import reshaped
from treadle.ir.types import f64, i32, i64, u8

# -- activations ---------------------------------------------------------------------------------------------------


@operator("BiasGelu", domain=MICROSOFT)
def _bias_gelu(site: OnnxSite) -> Made:
    return site.b.gelu(site.x(0) + site.x(1))


@operator("FastGelu", domain=MICROSOFT)
def _fast_gelu(site: OnnxSite) -> Made:
    x, bias = site.x(0), site.maybe(1)
    return site.b.gelu_tanh(x if bias is None else x + bias)


@operator("Gelu", domain=MICROSOFT)
def _gelu(site: OnnxSite) -> Made:
    return site.b.gelu(site.x(0))


@operator("QuickGelu", domain=MICROSOFT)
def _quick_gelu(site: OnnxSite) -> Made:
    b, x, alpha = site.b, site.x(0), site.float("alpha", 1.702)
    return b.quick_gelu(x) if abs(alpha - 1.702) < 1e-6 else x * b.sigmoid(x * alpha)


# -- normalizations ------------------------------------------------------------------------------------------------


def _with_skip(site: OnnxSite, bias: int) -> Expr:
    """Return the sum of the input, the skip connection, and the bias if there is one."""
    total, extra = site.x(0) + site.x(1), site.maybe(bias)
    return total if extra is None else total + extra


def _normalized_and_sum(site: OnnxSite, y: Expr, total: Expr) -> Made:
    if any(site.wanted[1:3]):
        site.refuse("its statistics are not supported as outputs")
    return [y, None, None, total]


@operator("SkipLayerNormalization", domain=MICROSOFT)
def _skip_layer_norm(site: OnnxSite) -> Made:
    eps, total = site.float("epsilon", 1e-12), _with_skip(site, 4)
    return _normalized_and_sum(site, site.b.layer_norm(total, site.x(2), site.maybe(3), eps=eps), total)


@operator("SkipSimplifiedLayerNormalization", domain=MICROSOFT)
def _skip_rms_norm(site: OnnxSite) -> Made:
    eps, total = site.float("epsilon", 1e-12), _with_skip(site, 3)
    return _normalized_and_sum(site, site.b.rms_norm(total, site.x(2), eps=eps), total)


@operator("SimplifiedLayerNormalization")
@operator("SimplifiedLayerNormalization", domain=MICROSOFT)
def _rms_norm(site: OnnxSite) -> Made:
    """RMS norm. ONNX Runtime writes this operator in ONNX's own domain as well."""
    x, eps, stash = site.x(0), site.float("epsilon", 1e-5), site.int("stash_type", 1)
    if site.axis(site.int("axis", -1), x.rank) != x.rank - 1 or stash != 1 or any(site.wanted[1:]):
        site.refuse("several axes, another precision, and its statistics as outputs are not supported")
    return site.b.rms_norm(x, site.x(1), eps=eps)


@operator("EmbedLayerNormalization", domain=MICROSOFT)
def _embed_layer_norm(site: OnnxSite) -> Made:
    """The normalized sum of the embeddings of words, positions and, if present, segments."""
    b, tokens = site.b, site.x(0)
    eps = site.float("epsilon", 1e-12)
    site.ignore("mask_index_type")  # dtype of the second output, which is i32
    positions = site.maybe(8)
    if positions is None:
        positions = b.rearrange(b.iota(size=tokens.shape[1]), pattern="s -> 1 s")
    total = b.embedding(site.x(2), tokens) + b.embedding(site.x(3), positions)
    if site.has(1) and site.has(4):
        total = total + b.embedding(site.x(4), site.x(1))
    made: list[Expr | None] = [b.layer_norm(total, site.x(5), site.x(6), eps=eps)]
    if len(site.wanted) > 1:
        mask = site.maybe(7)
        if mask is None:
            counts = b.expand(b.constant(0, i32), shape=tokens.shape[:1])
        else:
            counts = b.reduce_sum(b.equal(mask, 1).cast(i32), axes=(1,))
        made.append(counts)
    return [*made, total]


# -- products ------------------------------------------------------------------------------------------------------


def _swapped(b: Builder, x: Expr) -> Expr:
    names = axis_letters(x.rank)
    right = [*names[:-2], names[-1], names[-2]]
    return b.rearrange(x, pattern=f"{' '.join(names)} -> {' '.join(right)}")


@operator("FusedMatMul", domain=MICROSOFT)
def _fused_matmul(site: OnnxSite) -> Made:
    b, alpha = site.b, site.float("alpha", 1.0)
    if site.int("transBatchA", 0) or site.int("transBatchB", 0):
        site.refuse("transposed batch axes are not supported")
    x, y = (_swapped(b, v) if on and v.rank > 1 else v for v, on in (
        (site.x(0), site.int("transA", 0)),
        (site.x(1), site.int("transB", 0)),
    ))  # fmt: skip
    z = matmul(b, x, y)
    return z if alpha == 1 else z * alpha


@operator("MatMulIntegerToFloat", domain=MICROSOFT)
def _matmul_integer_to_float(site: OnnxSite) -> Made:
    """Product of dequantized operands. Inputs: a, b, their scales, their zero points, a bias."""
    z = matmul(site.b, centered(site, 0, 4, -2), centered(site, 1, 5, -1))
    y = (z * (_scalar_or_row(site, site.x(2)) * _scalar_or_row(site, site.x(3))).cast(f64)).cast(site.x(2).dtype)
    bias = site.maybe(6)
    return y if bias is None else y + bias


@operator("DynamicQuantizeMatMul", domain=MICROSOFT)
def _dynamic_matmul(site: OnnxSite) -> Made:
    """Product in which a is quantized with its own range. Inputs: a, b, the scales and zero points of b, a bias."""
    b, x = site.b, site.x(0)
    steps, scale, zero = dynamically_quantized(b, x)
    z = matmul(b, steps.cast(f64) - zero.cast(f64), centered(site, 1, 3, -1))
    y = (z * (scale * _scalar_or_row(site, site.x(2))).cast(f64)).cast(x.dtype)
    bias = site.maybe(4)
    return y if bias is None else y + bias


def _scalar_or_row(site: OnnxSite, scale: Expr) -> Expr:
    return reshaped(site.b, scale, [])[0] if scale.rank == 1 and scale.shape[0] == ONE else scale


@operator("MatMulNBits", domain=MICROSOFT)
def _matmul_bits(site: OnnxSite) -> Made:
    """Product with a weight [n, k] of 4 or 8 bits in blocks along k. A block has a scale and, if present, a zero point.

    A byte holds two 4-bit numbers, the first in the lower half. The default zero point is 2^(bits - 1).
    """
    b, x = site.b, site.x(0)
    bits, block, k, n = site.int("bits", 4), site.int("block_size", 0), site.int("K", 0), site.int("N", 0)
    site.ignore("accuracy_level")  # ONNX Runtime may round activations by it; here they are not rounded
    if bits not in (4, 8) or block < 16 or k < 1 or n < 1:
        site.refuse(f"{bits}-bit weights in blocks of {block} are not supported")
    if site.has(4):
        site.refuse("g_idx (a group index) is not supported")
    blocks = -(-k // block)
    stored, _ = reshaped(b, site.x(1), [n, blocks, block * bits // 8])
    steps = _nibbles(b, stored) if bits == 4 else stored
    scales, _ = reshaped(b, site.x(2), [n, blocks, 1])
    if not site.has(3):
        zero = b.constant(2 ** (bits - 1), x.dtype)
    elif site.x(3).dtype.is_float:
        zero, _ = reshaped(b, site.x(3), [n, blocks, 1])
    else:
        held, _ = reshaped(b, site.x(3), [n, -(-blocks * bits // 8)])
        points = b.slice(_nibbles(b, held), axis=1, stop=blocks) if bits == 4 else held
        zero = b.rearrange(points, pattern="n k -> n k 1").cast(x.dtype)
    weight = b.rearrange((steps.cast(x.dtype) - zero) * scales, pattern="n k block -> n (k block)")
    if blocks * block != k:
        weight = b.slice(weight, axis=1, stop=k)
    return b.linear(x, weight, site.maybe(5))


def _nibbles(b: Builder, x: Expr) -> Expr:
    """Return the 4-bit halves of bytes along the last axis, the lower half first."""
    sixteen = b.constant(16, u8)
    names = axis_letters(x.rank)
    spread = f"{' '.join(names)} -> {' '.join(names)} 1"
    halves = [b.rearrange(part, pattern=spread) for part in (b.mod(x, sixteen), x // sixteen)]
    apart = b.concat(*halves, axis=x.rank)
    joined = f"{' '.join(names)} z -> {' '.join(names[:-1])} ({names[-1]} z)"
    return b.rearrange(apart, pattern=joined)


# -- rotary positions ----------------------------------------------------------------------------------------------


@operator("RotaryEmbedding", domain=MICROSOFT)
def _rotary(site: OnnxSite) -> Made:
    """Rotary embedding. Inputs: x [b, s, h d] or [b, h, s, d], positions [b, s] or one offset, tables [positions, d /
    2].
    """
    b, x, positions, cos, sin = site.b, *(site.x(i) for i in range(4))
    heads, width, interleaved = (
        site.int("num_heads", 0),
        site.int("rotary_embedding_dim", 0),
        site.int("interleaved", 0),
    )
    if site.int("is_packed_batching", 0) or site.float("scale", 1.0) != 1.0:
        site.refuse("packed batches and a scale are not supported")
    merged = x.rank == 3
    if merged:
        if not heads and not width:
            size = site.number(cos.shape[-1] * 2, "twice the number of the tables' columns")
            wide = site.number(x.shape[-1], "the width of x")
            if not size or not wide:
                site.malformed("the number of heads is unknown without num_heads or rotary_embedding_dim")
            heads = wide // size
        x = heads_apart(site, x, heads)
    if positions.rank == 1:
        count = b.rearrange(b.iota(size=x.shape[2]), pattern="s -> 1 s")
        positions = count + reshaped(b, positions, [1, 1])[0].cast(i64)
    cos, sin = (b.gather(table, positions, axis=0) for table in (cos, sin))
    y = turned(b, x, cos, sin, interleaved=bool(interleaved))
    return heads_together(b, y) if merged else y

"""ATen operators that are sums of products: linear, matmul, einsum, convolution, attention."""

from __future__ import annotations

import re
from collections.abc import Sequence

from treadle.frontends.recipes.matrix_products import matmul
from treadle.frontends.recipes.transposed_convolutions import spread_kernels, with_bias
from treadle.frontends.torch_export.operators import Made, TorchSite, operator
from treadle.frontends.torch_export.shapes import expanded
from treadle.ir.attention.masking import Biases, Masks, attend, boolean_mask, causal, tensor_bias
from treadle.ir.builder import Builder, Expr
from treadle.ir.sizing.sizes import ONE, Size
from treadle.ir.tensors.shapes import reshaped


@operator("linear.default")
def _linear(site: TorchSite) -> Made:
    x, weight, bias = site.x("input"), site.x("weight"), site.maybe("bias")
    if weight.rank != 2:
        site.refuse(f"a weight of rank {weight.rank} is not supported")
    return site.b.linear(x, weight, bias)


@operator("matmul.default", "mm.default", "bmm.default", "mv.default", "dot.default")
def _matmul(site: TorchSite) -> Made:
    first, second = [a.name for a in site.node.target._schema.arguments][:2]
    return matmul(site.b, site.x(first), site.x(second))


@operator("addmm.default", "addmv.default", "baddbmm.default")
def _addmm(site: TorchSite) -> Made:
    """beta c + alpha a b"""
    first, second = [a.name for a in site.node.target._schema.arguments][1:3]
    c, alpha, beta = site.x("self"), site.real("alpha"), site.real("beta")
    z = matmul(site.b, site.x(first), site.x(second))
    if not z.dtype.is_float and (alpha != 1 or beta != 1):
        site.refuse("integers with alpha or beta are not supported")
    z = z if alpha == 1 else z * alpha
    return z if beta == 0 else z + (c if beta == 1 else c * beta)


@operator("einsum.default")
def _einsum(site: TorchSite) -> Made:
    text = site.text("equation").replace(" ", "")
    left, arrow, right = text.partition("->")
    if not arrow:
        letters = re.sub(r"[^A-Za-z]", "", left)
        right = ("..." if "..." in left else "") + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))

    def spaced(term: str) -> str:
        return " ".join(re.findall(r"\.\.\.|[A-Za-z]", term))

    equation = f"{', '.join(map(spaced, left.split(',')))} -> {spaced(right)}"
    return site.b.einsum(*site.tensors("tensors"), equation=equation)


# -- convolution ---------------------------------------------------------------------------------------------------


@operator("conv1d.default", "conv2d.default", "conv3d.default", "convolution.default")
@operator("conv1d.padding", "conv2d.padding", "conv3d.padding")
def _conv(site: TorchSite) -> Made:
    """x [b, c, ...] or [c, ...]; padding "same" puts an odd zero at the end of an axis."""
    b, x, weight = site.b, site.x("input"), site.x("weight")
    spatial = weight.rank - 2
    if site.flag("transposed"):
        return _conv_transpose(site)
    alone = x.rank == spatial + 1
    if alone:
        x, _ = reshaped(b, x, [ONE, *x.shape])
    strides, dilations = (_each(site, name, spatial) for name in ("stride", "dilation"))
    padding = site.given("padding")
    if padding == "same":
        kernel = [n.constant for n in weight.shape[2:]]
        if None in kernel:
            site.refuse("padding 'same' of a kernel with a symbolic size is not supported", "padding as numbers")
        reach = [(n - 1) * d for n, d in zip(kernel, dilations, strict=True) if n is not None]
        pads = (*(r // 2 for r in reach), *(r - r // 2 for r in reach))
    elif padding == "valid":
        pads = (0,) * (2 * spatial)
    else:
        pads = _each(site, "padding", spatial, 0) * 2
    y = b.conv(
        x,
        weight,
        site.maybe("bias"),
        strides=strides,
        dilations=dilations,
        padding=pads,
        groups=site.integer("groups"),
    )
    return reshaped(b, y, y.shape[1:])[0] if alone else y


@operator("conv_transpose1d.default", "conv_transpose2d.input", "conv_transpose3d.input")
def _conv_transpose(site: TorchSite) -> Made:
    """x [b, c, ...] or [c, ...], weight [c, o / groups, ...]; output_padding appends elements at the end of an axis."""
    b, x, weight = site.b, site.x("input"), site.x("weight")
    spatial = weight.rank - 2
    alone = x.rank == spatial + 1
    if alone:
        x, _ = reshaped(b, x, [ONE, *x.shape])
    strides, dilations = (_each(site, name, spatial) for name in ("stride", "dilation"))
    padding, beyond = (_each(site, name, spatial, 0) for name in ("padding", "output_padding"))
    groups, kernel = site.integer("groups"), weight.shape[2:]
    y = spread_kernels(b, x, weight, kernel, groups=groups, strides=strides, dilations=dilations)
    for axis, (before, more) in enumerate(zip(padding, beyond, strict=True), start=2):
        if more > before:
            y = b.pad(y, axis=axis, after=more - before)
        y = b.slice(y, axis=axis, start=before, stop=y.shape[axis] - max(before - more, 0))
    y = with_bias(b, y, site.maybe("bias"))
    return reshaped(b, y, y.shape[1:])[0] if alone else y


def _each(site: TorchSite, name: str, count: int, default: int = 1) -> tuple[int, ...]:
    numbers = site.integers(name) or (default,)
    return numbers * count if len(numbers) == 1 else numbers


# -- attention -----------------------------------------------------------------------------------------------------


@operator("scaled_dot_product_attention.default")
def _attention(site: TorchSite) -> Made:
    """q [b, h, s, d], k [b, g, t, d], v [b, g, t, e], or without the heads, or without both leading axes.

    A batch or head axis of size 1 broadcasts against a larger one, as in matrix products. One head of keys and values
    for several query heads is not copied; heads that the module's code repeats are not copied either.
    """
    b, q, k, v = site.b, site.x("query"), site.x("key"), site.x("value")
    if site.real("dropout_p") != 0:
        site.refuse_training("dropout is not supported", "dropout_p=p if self.training else 0.0")
    rank = max(q.rank, k.rank, v.rank)
    if rank > 4 or min(q.rank, k.rank, v.rank) < 2:
        site.refuse(
            f"ranks {q.rank}, {k.rank} and {v.rank} are not supported", "reshape the leading axes to one for the batch"
        )
    q, k, v = (_of_rank_four(b, x, rank) for x in (q, k, v))
    batch, heads = (_shared(site, name, [x.shape[i] for x in (q, k, v)]) for i, name in enumerate(("batches", "heads")))
    k, v = _before_repeats(b, k, v)
    groups = k.shape[1] if k.shape[1] != ONE else v.shape[1]
    q = expanded(b, q, (batch, heads, *q.shape[2:]))
    k, v = (expanded(b, x, (batch, groups, *x.shape[2:])) for x in (k, v))
    masks, biases = Masks(), Biases()
    mask = site.maybe("attn_mask")
    if mask is not None:
        if rank == 3 and mask.rank == 3:
            mask, _ = reshaped(b, mask, [mask.shape[0], ONE, *mask.shape[1:]])
        masks, biases = _masked_by(site, mask, (q.shape[0], q.shape[1], q.shape[2], k.shape[2]))
    if site.flag("is_causal"):
        masks = masks & causal
    scale = None if site.given("scale") is None else site.real("scale")
    y = attend(b, q, k, v, masks=masks, biases=biases, scale=scale)
    if rank == 4:
        return y
    return reshaped(b, y, [y.shape[0], *y.shape[2:]] if rank == 3 else y.shape[2:])[0]


def _of_rank_four(b: Builder, x: Expr, rank: int) -> Expr:
    """Return x as [b, h, s, d]: [b, s, d] has one head, and missing axes get size 1."""
    lead = [ONE] * (rank - x.rank) + list(x.shape[:-2])
    lead = lead if rank == 4 else [*lead, ONE] if rank == 3 else [ONE, ONE]
    return reshaped(b, x, [*lead, *x.shape[-2:]])[0]


def _shared(site: TorchSite, what: str, sizes: Sequence[Size]) -> Size:
    """Return the operands' common size along a leading axis; a size of 1 broadcasts."""
    (q, k, v), several = sizes, [n for n in dict.fromkeys(sizes) if n != ONE]
    if len(several) <= 1:
        return several[0] if several else ONE
    if what == "heads" and site.flag("enable_gqa") and k == v:
        return q
    site.refuse(f"{q}, {k} and {v} {what} do not broadcast")


def _before_repeats(b: Builder, k: Expr, v: Expr) -> tuple[Expr, Expr]:
    """Return keys and values with their heads as they were before the module repeated them for several query heads."""
    fewer = [_before_repeat(b, x) for x in (k, v)]
    if fewer[0] is None or fewer[1] is None or fewer[0].shape[1] != fewer[1].shape[1]:
        return k, v
    return fewer[0], fewer[1]


def _before_repeat(b: Builder, x: Expr) -> Expr | None:
    """expand(k [b, 1, t, d])  -->  k;   rearrange(expand(k [b, g, 1, t, d]), "b g r t d -> b (g r) t d")  -->  k"""
    node = x.value.node
    if node is not None and node.op.name == "expand" and node.operands[0] is not None:
        below = b.expr(node.operands[0])
        if below.rank == 4 and below.shape == (x.shape[0], ONE, *x.shape[2:]):
            return below
    above = node.operands[0].node if node is not None and node.op.name == "rearrange" and node.operands[0] else None
    if node is None or above is None or above.op.name != "expand" or above.operands[0] is None:
        return None
    rule, below = node.op.rule(()), b.expr(above.operands[0])
    (left, right) = ([getattr(d, "factors", ()) for d in side] for side in (*rule.operands, *rule.results))
    if below.rank != 5 or below.shape[2] != ONE or right != [left[0], (*left[1], *left[2]), *left[3:]]:
        return None
    groups = below.shape[1]
    made, _ = reshaped(b, below, [below.shape[0], groups, *below.shape[3:]])
    return made if made.shape == (x.shape[0], groups, *x.shape[2:]) else None


def _masked_by(site: TorchSite, mask: Expr, full: tuple[Size, ...]) -> tuple[Masks, Biases]:
    """Return a mask [..., s, t] as a term of attention. A boolean mask is true if a query may see a key; a float mask
    is a bias.

    An axis of size 1 that broadcasts is left out. An axis that `expand` added is left out, too.
    """
    b = site.b
    if mask.rank > 4:
        site.refuse(f"a mask of rank {mask.rank} is not supported")
    mask = _unexpanded(b, mask)
    own = full[4 - mask.rank :]
    held = [i for i, (size, whole) in enumerate(zip(mask.shape, own, strict=True)) if size != ONE or whole == ONE]
    names = [("bhst"[4 - mask.rank :])[i] for i in held]
    kept, _ = reshaped(b, mask, [mask.shape[i] for i in held])
    if not names:
        kept, names = b.expand(kept, shape=(full[3],)), ["t"]
    axes = " ".join(names)
    if mask.dtype.kind == "bool":
        return boolean_mask(kept, axes), Biases()
    return Masks(), tensor_bias(kept, axes)


def _unexpanded(b: Builder, mask: Expr) -> Expr:
    """Return a mask before it was expanded to more axes or larger axes."""
    node = mask.value.node
    if node is None or node.op.name != "expand" or node.operands[0] is None:
        return mask
    return b.expr(node.operands[0])

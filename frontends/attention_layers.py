"""Attention layers of the DSL: heads, self-attention and cross-attention.

They follow the conventions of `treadle.frontends.layers`.
"""

from __future__ import annotations

from collections.abc import Callable

from treadle.frontends.dsl import Tensor, trace
from treadle.frontends.layer_arguments import layer
from treadle.frontends.layers import Activation, linear, positive
from treadle.ir.attention.masking import Biases, Masks, attend
from treadle.ir.attention.masking import causal as causal_mask
from treadle.ir.builder import describe_source
from treadle.ir.errors import FrontendError, RuleError
from treadle.ir.sizing.sizes import Size, SizeLike
from treadle.ir.source_lines import user_line

Normalize = Callable[[Tensor, str], Tensor]
"""A function that normalizes queries or keys [B, heads, S, d]; its second argument is the name of its weight."""


@layer
def split_heads(x: Tensor, heads: int, *, label: str = "heads", name: str = "heads") -> Tensor:
    """Split x [B, S, heads * d] -> [B, heads, S, d]. The new axis has the label "heads", the result the name `name`."""
    positive(heads=heads)
    return trace().rearrange(x, pattern=f"b s ({label}={heads} d) -> b {label} s d", name=name)


@layer
def merge_heads(x: Tensor) -> Tensor:
    """Merge the heads of x [B, heads, S, d] -> [B, S, heads * d]."""
    return trace().rearrange(x, pattern="b heads s d -> b s (heads d)", name="merged")


@layer
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Masks | None = None,
    bias: Biases | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """softmax(q k^T * scale + bias, masked) v, with q [B, H, S, d], k [B, G, T, d], v [B, G, T, e] -> [B, H, S, e].

    H is a multiple of G (grouped-query heads). `mask` combines terms with &: `t.causal & t.padding(lengths)`; the
    default `scale` is 1/sqrt(d). With a `softcap` c, scores become c tanh(scores / c). A fully masked row returns
    zeros. Raises GraphError for masks and biases whose axes do not fit.
    """
    try:
        return attend(trace(), q, k, v, masks=mask, biases=bias, scale=scale, softcap=softcap)
    except RuleError as error:
        if q.rank == k.rank == v.rank == 3:
            options = {"mask": mask, "bias": bias, "scale": scale, "softcap": softcap}
            given = "".join(f", {name}=..." for name, value in options.items() if value is not None)
            split = f"*[t.split_heads(x, 1) for x in (q, k, v)]{given}"
            error.hint = f"t.merge_heads(t.attention({split}))  # of one head, or of more"
        raise


@layer
def multi_head_attention(
    x: Tensor,
    context: Tensor,
    heads: int,
    *,
    kv_heads: int | None = None,
    head_dim: SizeLike | None = None,
    mask: Masks | None = None,
    bias: Biases | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    projection_bias: bool = True,
    key_bias: bool | None = None,
    output_bias: bool | None = None,
    normalize: Normalize | None = None,
    rotate: Activation | None = None,
    name: str = "attn",
) -> Tensor:
    """Project, split into heads, attend, merge, project                                (Vaswani et al. 2017, 3.2.2)

    x [B, S, D] is projected to queries, context [B, T, C] to keys and values; the result is [B, S, D]. Declares q, k, v
    and out under `name`. All four have biases if `projection_bias`; `key_bias` and `output_bias` override it for k and
    out. `rotate` is applied to the queries and keys [B, heads, S, d]. `normalize` is applied to both before `rotate`,
    with the weight names "q_norm" and "k_norm".

    heads     number of query heads
    kv_heads  number of key/value heads, a divisor of `heads`; None: one for each query head
    head_dim  size of a head; None: D / heads
    mask, bias, scale, softcap  as in `attention`

    Raises FrontendError for heads that do not divide.
    """
    b = trace()
    width = x.shape[-1]
    groups = heads if kv_heads is None else kv_heads
    positive(heads=heads, kv_heads=groups)
    if heads % groups:
        raise FrontendError(
            f"{heads} heads do not split among kv_heads={groups}",
            source=describe_source(user_line(), b.scope),
            hint="kv_heads= that divides heads",
        )
    per_head = _head_dim(width, heads) if head_dim is None else Size.of(head_dim)
    label, inner = "heads" if groups == heads else "kv_heads", per_head * groups
    key_bias = projection_bias if key_bias is None else key_bias
    # Look up the source line once for all nodes, which is faster. If a function of the user adds nodes in between, they
    # need their own lines.
    with b.scoped(name, None if rotate or normalize else user_line()):
        q = split_heads(linear(x, per_head * heads, bias=projection_bias, name="q"), heads, name="q_heads")
        k = split_heads(linear(context, inner, bias=key_bias, name="k"), groups, label=label, name="k_heads")
        v = split_heads(linear(context, inner, bias=projection_bias, name="v"), groups, label=label, name="v_heads")
        if normalize is not None:
            q, k = normalize(q, "q_norm"), normalize(k, "k_norm")
        if rotate is not None:
            q, k = rotate(q), rotate(k)
        y = attend(b, q, k, v, masks=mask, biases=bias, scale=scale, softcap=softcap, name=name)
        with_bias = projection_bias if output_bias is None else output_bias
        return linear(merge_heads(y), width, bias=with_bias, name="out")


@layer
def self_attention(
    x: Tensor,
    heads: int,
    *,
    causal: bool = False,
    kv_heads: int | None = None,
    head_dim: SizeLike | None = None,
    mask: Masks | None = None,
    bias: Biases | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    projection_bias: bool = True,
    key_bias: bool | None = None,
    output_bias: bool | None = None,
    normalize: Normalize | None = None,
    rotate: Activation | None = None,
    name: str = "attn",
) -> Tensor:
    """Multi-head self-attention of a sequence x [B, S, D]; if `causal`, position i sees positions up to i.

    `multi_head_attention` documents the other options.
    """
    if causal:
        mask = causal_mask if mask is None else causal_mask & mask
    return multi_head_attention(
        x,
        x,
        heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mask=mask,
        bias=bias,
        scale=scale,
        softcap=softcap,
        projection_bias=projection_bias,
        key_bias=key_bias,
        output_bias=output_bias,
        normalize=normalize,
        rotate=rotate,
        name=name,
    )


@layer
def cross_attention(
    x: Tensor,
    context: Tensor,
    heads: int,
    *,
    kv_heads: int | None = None,
    head_dim: SizeLike | None = None,
    mask: Masks | None = None,
    bias: Biases | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    projection_bias: bool = True,
    key_bias: bool | None = None,
    output_bias: bool | None = None,
    normalize: Normalize | None = None,
    rotate: Activation | None = None,
    name: str = "attn",
) -> Tensor:
    """Multi-head attention of x [B, S, D] to another sequence, context [B, T, C].

    An alias of `multi_head_attention`, which documents the options.
    """
    return multi_head_attention(
        x,
        context,
        heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mask=mask,
        bias=bias,
        scale=scale,
        softcap=softcap,
        projection_bias=projection_bias,
        key_bias=key_bias,
        output_bias=output_bias,
        normalize=normalize,
        rotate=rotate,
        name=name,
    )


def _head_dim(width: Size, heads: int) -> Size:
    per_head = width.divide(heads)
    if per_head is None:
        raise FrontendError(
            f"a width of {width} does not split into {heads} heads",
            source=describe_source(user_line(), trace().scope),
            hint="choose heads that divide it, or give head_dim=",
        )
    return per_head

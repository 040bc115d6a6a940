"""Layers of the DSL: ops with the parameters that they declare. Shapes use the paper's letters.

Every layer takes `name`, the scope under which its parameters are declared: `t.linear(x, 64, name="q")` declares
`q.weight` [64, d] and `q.bias` [64]. They have the dtype of x; `layer` checks the arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

from treadle.frontends.dsl import Tensor, Trace, declare, parameter, shared_table, trace
from treadle.frontends.layer_arguments import layer
from treadle.ir.builder import describe_source
from treadle.ir.errors import FrontendError
from treadle.ir.graph import Value
from treadle.ir.sizing.size_bounds import Bounds
from treadle.ir.sizing.sizes import SizeLike
from treadle.ir.source_lines import user_line
from treadle.ir.types import Dim, DType, f32, f64

Activation = Callable[[Tensor], Tensor]


@layer
def linear(x: Tensor, out: SizeLike | Dim, *, bias: bool = True, name: str) -> Tensor:
    """y = x W^T + b, with x [..., d] -> [..., out]

    out   size of the new axis; `Dim.of(3072, "ffn")` names it
    bias  True to declare b [out], `NAME.bias`, besides W [out, d], `NAME.weight`
    name  the scope of the weights

    Raises FrontendError for an argument of another kind.
    """
    b = trace()
    with b.scoped(name, b.source or user_line(beyond=1)):
        weight = _weight(b, x, "weight", out, x.shape[-1])
        offset = _weight(b, x, "bias", out, init="zeros") if bias else None
        return b.linear(x, weight, offset, name=name)


@layer
def embed(
    ids: Tensor,
    count: int | None = None,
    dim: SizeLike | None = None,
    *,
    tied: str | None = None,
    dtype: DType = f32,
    name: str | None = None,
) -> Tensor:
    """Rows of a table [count, dim] at ids [...] -> [..., dim]. `tied` names another embedding whose table is used.

    The table, `NAME.weight` in the scope `name`, and the output have dtype `dtype`. Raises FrontendError if count, dim
    and name are missing without `tied`, and for more positions than rows.

    If ids are `positions` of a symbolic axis, or positions plus a constant, the table bounds that axis: S + constant <=
    count.
    """
    b = trace()
    if tied is not None:
        name, table = name or tied, shared_table("embed", tied)
    elif count is None or dim is None or name is None:
        raise FrontendError("embed needs count, dim and name=, or tied= the scope of an embedding")
    else:
        with b.scoped(name):
            table = parameter("weight", count, dim, dtype=dtype)
    count, first = table.shape[0].constant, _first_position(ids.value)
    if first is not None and count is not None:
        size = ids.shape[-1]
        if size.as_symbol is not None:
            b.graph.bound(size.as_symbol, Bounds(upper=count - first))
        elif size.constant is not None and size.constant + first > count:
            beginning = f" from {first} on" if first else ""
            raise FrontendError(
                f"there are {size} positions{beginning}, and {count} rows in the table {name}",
                source=describe_source(user_line(), b.scope),
            )
    with b.scoped(name):
        return b.embedding(table, ids, name=name)


@layer
def sinusoidal_positions(
    positions: Tensor, dim: int, *, interleaved: bool = True, base: float = 10000.0, dtype: DType = f32
) -> Tensor:
    """sin(p / base^(2i/dim)) and cos(p / base^(2i/dim)) of positions p [...] -> [..., dim]

    If `interleaved`, the sine and cosine of a frequency i are adjacent (Vaswani et al. 2017, 3.5); otherwise all sines
    come before all cosines (Marian). The result has dtype `dtype`.
    """
    b = trace()
    j, half = b.iota(size=dim), (dim + 1) // 2
    i, is_cosine = (b.floor_divide(j, 2), b.mod(j, 2)) if interleaved else (b.mod(j, half), b.floor_divide(j, half))
    # Computed in float64, because a float32 angle near 1000 is off by 3e-5. So a cosine can be computed as a sine a
    # quarter turn later.
    p, i, is_cosine = (b.cast(x, to=f64) for x in (b.rearrange(positions, pattern="... -> ... 1"), i, is_cosine))
    angles = p * b.exp(i * (-2.0 * math.log(base) / dim)) + is_cosine * (math.pi / 2)
    return b.cast(b.sin(angles), to=dtype, name="sinusoids")


@layer
def unembed(
    x: Tensor, vocab: int | None = None, *, tied: str | None = None, bias: bool = False, name: str = "logits"
) -> Tensor:
    """Logits over a vocabulary: x W^T (+ b), with x [..., d] -> [..., vocab]

    vocab  size of the vocabulary, if W [vocab, d] is a weight of its own
    tied   the name of the embedding whose table is W
    bias   True to declare b [vocab]
    name   the scope of the weights, and the name of the output

    Raises FrontendError without `vocab` and `tied`.
    """
    b = trace()
    if tied is None:
        if vocab is None:
            raise FrontendError("unembed needs vocab=, or tied= the scope of an embedding")
        return linear(x, vocab, bias=bias, name=name)
    weight = shared_table("unembed", tied)
    with b.scoped(name, b.source or user_line(beyond=1)):
        offset = _weight(b, x, "bias", weight.shape[0], init="zeros") if bias else None
        return b.linear(x, weight, offset, name=name)


@layer
def layer_norm(x: Tensor, *, eps: float = 1e-5, bias: bool = True, name: str) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis                  (Ba et al. 2016)

    x [..., d] -> [..., d]. Declares weight [d] and, if `bias`, bias [d] in the scope `name`.
    """
    b = trace()
    with b.scoped(name, b.source or user_line(beyond=1)):
        weight = _weight(b, x, "weight", x.shape[-1], init="ones")
        offset = _weight(b, x, "bias", x.shape[-1], init="zeros") if bias else None
        return b.layer_norm(x, weight, offset, eps=eps, name=name)


@layer
def rms_norm(x: Tensor, *, eps: float = 1e-6, name: str) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis               (Zhang & Sennrich 2019)

    x [..., d] -> [..., d]. Declares weight [d] in the scope `name`.
    """
    b = trace()
    with b.scoped(name, b.source or user_line(beyond=1)):
        return b.rms_norm(x, _weight(b, x, "weight", x.shape[-1], init="ones"), eps=eps, name=name)


@layer
def group_norm(x: Tensor, groups: int, *, eps: float = 1e-5, bias: bool = True, name: str) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over a group of channels and all later axes   (Wu & He 2018)

    x [B, C, ...] -> [B, C, ...], in `groups` groups of C / groups channels. Declares weight [C] and, if `bias`, bias
    [C] in the scope `name`.

    Raises FrontendError if C is not known while tracing, or is not a multiple of `groups`.
    """
    b = trace()
    positive(groups=groups)
    channels = _channels("group_norm", x)
    if channels % groups != 0:
        raise FrontendError(
            f"group_norm: {channels} channels do not make {groups} equal groups",
            received=f"x: {x.type}, groups={groups}",
            source=b.place(),
            hint="the channels are axis 1 of x, and their number is a multiple of groups",
        )
    with b.scoped(name, b.source or user_line(beyond=1)):
        y = b.layer_norm(x.reshape(x.shape[0], groups, -1), None, None, eps=eps, name=name).reshape(x.shape)
        along = f"c -> c{' 1' * (x.rank - 2)}"
        y = y * b.rearrange(_weight(b, x, "weight", channels, init="ones"), pattern=along)
        return y + b.rearrange(_weight(b, x, "bias", channels, init="zeros"), pattern=along) if bias else y


@layer
def mlp(x: Tensor, hidden: int, *, act: Activation | None = None, bias: bool = True, name: str = "mlp") -> Tensor:
    """down(act(up(x))): the position-wise feed-forward network; the default `act` is gelu.

    x [..., d] -> [..., d]. Declares up [hidden, d] and down [d, hidden] in the scope `name`; with `bias`, each has one.
    """
    with trace().scoped(name):
        inner = (act or _gelu)(linear(x, Dim.of(hidden, "ffn"), bias=bias, name="up"))
        return linear(inner, x.shape[-1], bias=bias, name="down")


@layer
def gated_mlp(
    x: Tensor, hidden: int, *, act: Activation | None = None, bias: bool = False, name: str = "mlp"
) -> Tensor:
    """down(act(gate(x)) * up(x)); the default `act` is silu                      (Shazeer 2020)

    x [..., d] -> [..., d]. Declares gate and up [hidden, d] and down [d, hidden] in the scope `name`; with `bias`, each
    has one.
    """
    with trace().scoped(name):
        wide = Dim.of(hidden, "ffn")
        gate = (act or _silu)(linear(x, wide, bias=bias, name="gate"))
        return linear(gate * linear(x, wide, bias=bias, name="up"), x.shape[-1], bias=bias, name="down")


@layer
def convolution(
    x: Tensor,
    channels: int,
    kernel: Sequence[int],
    *,
    strides: Sequence[int] = (),
    padding: Sequence[int] | Literal["same", "valid"] = (),
    dilations: Sequence[int] = (),
    groups: int = 1,
    bias: bool = True,
    name: str,
) -> Tensor:
    """Convolution over the trailing axes of x [B, C, *spatial] -> [B, channels, *spatial]

    channels  number of output channels
    kernel    size of the kernel along each spatial axis
    strides, padding, dilations, groups  as in the op `conv`; padding="same" keeps the sizes of the spatial axes, and
              "valid" is no padding, as in PyTorch
    bias      True to declare a bias [channels], besides the weight [channels, C / groups, *kernel]
    name      the scope of the weights

    Raises FrontendError if the kernel does not fit x, if C is not known while tracing, and for strides with "same".
    """
    b = trace()
    positive(groups=groups)
    if isinstance(padding, str):
        padding = _same_padding(kernel, strides, dilations) if padding == "same" else ()
    _refuse_kernel(x, len(kernel))
    channels_in = _channels("convolution", x) // groups
    with b.scoped(name, b.source or user_line(beyond=1)):
        weight = _weight(b, x, "weight", channels, channels_in, *kernel)
        offset = _weight(b, x, "bias", channels, init="zeros") if bias else None
        return b.conv(
            x, weight, offset, strides=strides, padding=padding, dilations=dilations, groups=groups, name=name
        )


def _same_padding(kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> list[int]:
    """Return the zeros before each axis, then after each, with which a convolution keeps the sizes of its axes."""
    if any(stride != 1 for stride in strides):
        raise FrontendError(
            'padding="same" keeps the sizes of axes, and strides divide them',
            received=f"strides={tuple(strides)}",
            source=trace().place(),
            hint=f"padding=({', '.join(str(size // 2) for size in kernel)},)",
        )
    spans = [(size - 1) * step for size, step in zip(kernel, dilations or [1] * len(kernel), strict=True)]
    return [*(span // 2 for span in spans), *(span - span // 2 for span in spans)]


def _weight(b: Trace, x: Tensor, name: str, *shape: SizeLike | Dim, init: str = "normal") -> Tensor:
    """Declare a weight with the dtype of x, or with f32 if x is not floating-point."""
    dtype = x.value.type.dtype
    return declare(b, name, shape, init, dtype if dtype.kind == "float" else f32, b.source)


def _first_position(ids: Value) -> int | None:
    """Return the first position if ids are `positions`, possibly plus constants; None for other ids."""
    node = ids.node
    if node is not None and node.op.name == "positions":
        return 0
    if node is not None and node.op.name == "add":
        x, y = node.inputs
        for literal, positions in ((x.literal, y), (y.literal, x)):
            added = None if literal is None else literal.scalar
            if isinstance(added, int) and (first := _first_position(positions)) is not None:
                return first + added
    return None


def positive(**counts: int) -> None:
    """Raise FrontendError, with the argument's name, for a count below 1."""
    for name, count in counts.items():
        if count < 1:
            raise FrontendError(f"{name} must be 1 or more", received=f"{name}={count}", source=trace().place())


def _refuse_kernel(x: Tensor, axes: int) -> None:
    """Raise FrontendError if x is not [B, C, *spatial] with `axes` spatial axes, as many as the kernel has."""
    spatial = x.rank - 2
    if spatial < 1 or axes != spatial:
        fitting = f"kernel=({', '.join(['3'] * spatial)}{',' * (spatial == 1)})" if spatial > 0 else ""
        raise FrontendError(
            f"convolution: the kernel has {axes} axes, and x has {max(spatial, 0)} after its batch and channels",
            received=f"x: {x.type}",
            source=trace().place(),
            hint=f"one number for each of them, such as {fitting}" if fitting else "x of shape [B, C, ...]",
        )


def _channels(layer: str, x: Tensor) -> int:
    """Return the number of channels of x [B, C, ...]. Raises FrontendError if it is unknown while tracing."""
    channels = x.shape[1].constant if x.rank > 1 else None
    if channels is None:
        problem, hint = "x has no axis 1", "x of shape [B, C, ...]"
        if x.rank > 1:
            problem = f"its size must be a number, not {x.shape[1]}"
            hint = 't.rearrange(x, pattern="b s c -> b c s"), which moves the channels to axis 1'
        raise FrontendError(
            f"{layer}: axis 1 of x holds the channels, and {problem}",
            received=f"x: {x.type}",
            source=trace().place(),
            hint=hint,
        )
    return channels


def _gelu(x: Tensor) -> Tensor:
    return trace().gelu(x)


def _silu(x: Tensor) -> Tensor:
    return trace().silu(x)

"""ATen operators along axes: reductions, softmax, normalizations, running sums, argmax, topk."""

from __future__ import annotations

import math
from collections.abc import Callable

from treadle.frontends.recipes.activations import root
from treadle.frontends.recipes.batch_norms import along_channels, normalized
from treadle.frontends.torch_export.operators import Made, TorchSite, operator
from treadle.ir.builder import Expr
from treadle.ir.sizing.sizes import ONE, Size, product
from treadle.ir.tensors.methods import reversed_order
from treadle.ir.tensors.shapes import reshaped
from treadle.ir.types import i64, u8

# -- reductions ----------------------------------------------------------------------------------------------------


def _axes(site: TorchSite) -> tuple[int, ...]:
    """Return the axes in `dim`; all axes if it is empty."""
    rank = site.x("self").rank
    if rank == 0:
        return ()
    axes = site.integers("dim") if site.given("dim") is not None else ()
    return tuple(site.position(a, rank) for a in axes) or tuple(range(rank))


def _reduction(rule: Callable[[TorchSite, Expr, tuple[int, ...], bool], Expr], *names: str) -> None:
    @operator(*names)
    def _reduced(site: TorchSite) -> Made:
        return rule(site, site.x("self"), _axes(site), site.flag("keepdim"))


def _sum(site: TorchSite, x: Expr, axes: tuple[int, ...], keep: bool) -> Expr:
    return site.b.reduce_sum(x.cast(site.dtype()), axes=axes, keep=keep)


def _mean(site: TorchSite, x: Expr, axes: tuple[int, ...], keep: bool) -> Expr:
    return site.b.reduce_mean(x.cast(site.dtype()), axes=axes, keep=keep)


def _extremum(ours: str) -> Callable[[TorchSite, Expr, tuple[int, ...], bool], Expr]:
    def rule(site: TorchSite, x: Expr, axes: tuple[int, ...], keep: bool) -> Expr:
        held = x.cast(u8) if x.dtype.kind == "bool" else x
        return site.b.apply(ours, held, axes=axes, keep=keep).cast(x.dtype)  # type: ignore[no-any-return]

    return rule


def _truth(ours: str) -> Callable[[TorchSite, Expr, tuple[int, ...], bool], Expr]:
    def rule(site: TorchSite, x: Expr, axes: tuple[int, ...], keep: bool) -> Expr:
        b = site.b
        flags = x if x.dtype.kind == "bool" else b.not_equal(x, 0)
        return b.apply(ours, flags.cast(u8), axes=axes, keep=keep).cast(site.dtype())  # type: ignore[no-any-return]

    return rule


def _variance(site: TorchSite, x: Expr, axes: tuple[int, ...], keep: bool) -> Expr:
    """Return the mean squared distance from the mean, with the divisor n - correction instead of n."""
    b = site.b
    correction = site.real("correction", 1.0) if site.given("unbiased", True) else 0.0
    centered = x - b.reduce_mean(x, axes=axes, keep=True)
    total = b.reduce_sum(centered * centered, axes=axes, keep=keep)
    if correction != int(correction):
        site.refuse(f"a correction of {correction} is not supported")
    size = product(x.shape[a] for a in axes)
    count = site.as_operand(size - int(correction), x.dtype)
    if site.bounds(size).lower < correction:
        count = b.relu(count)
    return total / count


_reduction(_sum, "sum.default", "sum.dim_IntList")
_reduction(_mean, "mean.default", "mean.dim")
_reduction(_extremum("reduce_max"), "amax.default", "max.default")
_reduction(_extremum("reduce_min"), "amin.default", "min.default")
_reduction(_truth("reduce_max"), "any.default", "any.dim", "any.dims")
_reduction(_truth("reduce_min"), "all.default", "all.dim", "all.dims")
_reduction(_variance, "var.correction", "var.dim", "var.default")
_reduction(lambda *x: root(x[0].b, _variance(*x)), "std.correction", "std.dim", "std.default")


@operator("var_mean.correction")
def _var_mean(site: TorchSite) -> Made:
    x, axes, keep = site.x("self"), _axes(site), site.flag("keepdim")
    return [_variance(site, x, axes, keep), site.b.reduce_mean(x, axes=axes, keep=keep)]


@operator("std_mean.correction")
def _std_mean(site: TorchSite) -> Made:
    x, axes, keep = site.x("self"), _axes(site), site.flag("keepdim")
    return [root(site.b, _variance(site, x, axes, keep)), site.b.reduce_mean(x, axes=axes, keep=keep)]


@operator("logsumexp.default")
def _log_sum_exp(site: TorchSite) -> Made:
    """Build log-sum-exp. The maximum is subtracted first, so that the exponentials do not overflow."""
    b, x, axes, keep = site.b, site.operand("self", site.dtype()), _axes(site), site.flag("keepdim")
    largest = b.reduce_max(x, axes=axes, keep=True)
    finite = b.where(b.abs(largest) < math.inf, largest, b.constant(0.0, x.dtype))
    sums = b.log(b.reduce_sum(b.exp(x - finite), axes=axes, keep=True)) + finite
    return reshaped(b, sums, [n for i, n in enumerate(sums.shape) if keep or i not in axes])[0]


@operator("linalg_vector_norm.default")
def _norm(site: TorchSite) -> Made:
    b, x, axes, keep = site.b, site.operand("self", site.dtype()), _axes(site), site.flag("keepdim")
    order = site.real("ord")
    if order not in (1, 2):
        site.refuse(f"order {order:g} is not supported")
    total = b.reduce_sum(b.abs(x) if order == 1 else x * x, axes=axes, keep=keep)
    return total if order == 1 else root(b, total)


# -- softmax -------------------------------------------------------------------------------------------------------


def _softmax(ours: str, *names: str) -> None:
    @operator(*names)
    def _applied(site: TorchSite) -> Made:
        x = site.x("self").cast(site.dtype())
        if x.rank == 0:
            site.refuse("a scalar is not supported")
        return site.b.apply(ours, x, axis=site.axis("dim"))


_softmax("softmax", "softmax.int", "_softmax.default")
_softmax("log_softmax", "log_softmax.int", "_log_softmax.default")


@operator("_safe_softmax.default")
def _safe_softmax(site: TorchSite) -> Made:
    """Softmax that returns zeros for a row of only -inf."""
    b, x, axis = site.b, site.x("self").cast(site.dtype()), site.axis("dim")
    if axis == x.rank - 1:
        return b.masked_softmax(x)
    nothing, zero = b.equal(b.reduce_max(x, axes=(axis,), keep=True), -math.inf), b.constant(0.0, x.dtype)
    return b.where(nothing, zero, b.softmax(b.where(nothing, zero, x), axis=axis))


# -- normalizations ------------------------------------------------------------------------------------------------


def _last_axes(site: TorchSite) -> tuple[Expr, tuple[Size, ...], list[Expr | None]]:
    """Return the operand with its normalized axes merged into one, its original shape, and the weights as vectors."""
    b, x = site.b, site.x("input")
    count = len(site.given("normalized_shape"))
    weights = [site.maybe(n) if n in site.arguments else None for n in ("weight", "bias")]
    if count == 1:
        return x, x.shape, weights
    flat = [*x.shape[: x.rank - count], product(x.shape[x.rank - count :])]
    vectors = [None if w is None else reshaped(b, w, [product(w.shape)])[0] for w in weights]
    return reshaped(b, x, flat)[0], x.shape, vectors


@operator("layer_norm.default", "native_layer_norm.default")
def _layer_norm(site: TorchSite) -> Made:
    x, shape, (weight, bias) = _last_axes(site)
    y = reshaped(site.b, site.b.layer_norm(x, weight, bias, eps=site.real("eps")), shape)[0]
    return [y, None, None] if len(site.vals) > 1 else y


@operator("rms_norm.default", "_fused_rms_norm.default")
def _rms_norm(site: TorchSite) -> Made:
    x, shape, (weight, _) = _last_axes(site)
    # The default is the dtype's epsilon; 16-bit floats are computed in float32.
    eps = site.real("eps", 2.0**-52 if x.dtype.name == "f64" else 2.0**-23)
    y = reshaped(site.b, site.b.rms_norm(x, weight, eps=eps), shape)[0]
    return [y, None] if len(site.vals) > 1 else y


@operator("batch_norm.default", "_native_batch_norm_legit_no_training.default")
@operator("_native_batch_norm_legit_functional.default")
def _batch_norm(site: TorchSite) -> Made:
    """Batch norm at inference, which uses the running statistics. Without them, it uses those of the batch."""
    if site.maybe("running_mean") is None and site.maybe("running_var") is None:
        y = _normalized_over_batch(site)
    elif site.flag("training"):
        site.refuse_training("training mode is not supported", "training=self.training")
    else:
        y = _normalized(site)
    return [y, None, None] if len(site.vals) > 1 else y


def _scaled(site: TorchSite, y: Expr) -> Expr:
    weight, bias = site.maybe("weight"), site.maybe("bias")
    y = y if weight is None else y * along_channels(site.b, weight, y.rank)
    return y if bias is None else y + along_channels(site.b, bias, y.rank)


def _normalized(site: TorchSite) -> Expr:
    """Normalize the input with its running statistics."""
    x, mean, variance = (site.x(name) for name in ("input", "running_mean", "running_var"))
    return _scaled(site, normalized(site.b, x, mean, variance, site.real("eps")))


def _normalized_over_batch(site: TorchSite) -> Expr:
    """Normalize each channel of the input [b, c, ...] over the batch and the axes after c."""
    b, x = site.b, site.x("input")
    rest = [f"r{i}" for i in range(x.rank - 2)]
    first, second = " ".join(["b", "c", *rest]), " ".join(["c", "b", *rest])
    channels = b.rearrange(x, pattern=f"{first} -> {second}")
    rows, _ = reshaped(b, channels, [x.shape[1], product([x.shape[0], *x.shape[2:]])])
    y, _ = reshaped(b, b.layer_norm(rows, None, None, eps=site.real("eps")), channels.shape)
    return _scaled(site, b.rearrange(y, pattern=f"{second} -> {first}"))


@operator("instance_norm.default")
def _instance_norm(site: TorchSite) -> Made:
    """[b, c, ...]: each channel of each row is normalized over the axes after it, or with the running statistics."""
    b, x = site.b, site.x("input")
    if not site.flag("use_input_stats"):
        return _normalized(site)
    if site.maybe("running_mean") is not None:
        site.refuse_training("training mode is not supported", "use_input_stats=self.training")
    rows, _ = reshaped(b, x, [*x.shape[:2], product(x.shape[2:])])
    return _scaled(site, reshaped(b, b.layer_norm(rows, None, None, eps=site.real("eps")), x.shape)[0])


@operator("group_norm.default")
def _group_norm(site: TorchSite) -> Made:
    """[b, (g c), ...], normalized over c and the axes after c."""
    b, x, groups = site.b, site.x("input"), site.integer("num_groups")
    rest = product(x.shape[1:]) // groups
    rows, _ = reshaped(b, x, [x.shape[0], Size.of(groups), rest])
    return _scaled(site, reshaped(b, b.layer_norm(rows, None, None, eps=site.real("eps")), x.shape)[0])


# -- along one axis ------------------------------------------------------------------------------------------------


@operator("cumsum.default")
def _cumsum(site: TorchSite) -> Made:
    x = site.x("self").cast(site.dtype())
    return x if x.rank == 0 else site.b.cumsum(x, axis=site.axis("dim"))


def _flat(site: TorchSite) -> tuple[Expr, int, bool]:
    """Return the operand, the axis, and True if the axis is kept. Without a `dim`, all axes are flattened."""
    x, keep = site.x("self"), site.flag("keepdim")
    x = x.cast(u8) if x.dtype.kind == "bool" else x
    if site.given("dim") is None:
        if keep:
            site.refuse("keepdim without dim is not supported")
        return reshaped(site.b, x, [product(x.shape)])[0], 0, False
    if x.rank == 0:
        return reshaped(site.b, x, [ONE])[0], 0, False
    return x, site.axis("dim"), keep


@operator("argmax.default")
def _argmax(site: TorchSite) -> Made:
    x, axis, keep = _flat(site)
    return site.b.argmax(x, axis=axis, keep=keep)


@operator("argmin.default")
def _argmin(site: TorchSite) -> Made:
    x, axis, keep = _flat(site)
    return site.b.argmax(reversed_order(x), axis=axis, keep=keep)


@operator("max.dim", "min.dim")
def _extremum_and_place(site: TorchSite) -> Made:
    b, least = site.b, site.node.target._schema.name.endswith("min")
    x, axis, keep = _flat(site)
    found = b.apply("reduce_min" if least else "reduce_max", x, axes=(axis,), keep=keep, ties="first")
    return [found.cast(site.dtype()), b.argmax(reversed_order(x) if least else x, axis=axis, keep=keep)]


@operator("topk.default")
def _topk(site: TorchSite) -> Made:
    b, x, k, axis = site.b, site.x("self"), site.integer("k"), site.axis("dim")
    if k < 1:
        site.refuse(f"{k} elements are not supported")
    if site.flag("largest"):
        return list(b.top_k(x, k=k, axis=axis))
    values, indices = b.top_k(reversed_order(x), k=k, axis=axis)
    return [reversed_order(values), indices]


@operator("sort.default", "sort.stable")
def _sort(site: TorchSite) -> Made:
    """Sort stably: the first of equal elements comes first, as in top_k."""
    b, x = site.b, site.x("self")
    if x.rank == 0:
        return [x, b.constant(0, i64)]
    axis = site.axis("dim")
    size = x.shape[axis].constant
    if size is None:
        site.refuse("a symbolic axis is not supported", "leave that axis out of dynamic=")
    if size == 0:
        site.refuse("an empty axis is not supported")
    if x.dtype.kind == "bool":
        site.refuse("bools are not supported", "x.int()")
    if site.flag("descending"):
        return list(b.top_k(x, k=size, axis=axis))
    values, indices = b.top_k(reversed_order(x), k=size, axis=axis)
    return [reversed_order(values), indices]


@operator("bincount.default", "nonzero.default", "item.default", "_local_scalar_dense.default", "masked_select.default")
def _data_dependent(site: TorchSite) -> Made:
    hint = None
    if str(site.node.target).startswith(("aten.nonzero", "aten.masked_select")):
        hint = "a value for every element: torch.where(condition, x, 0); each expert for all tokens, times its weights"
    site.refuse("its output shape depends on data, or its output leaves the graph", hint)

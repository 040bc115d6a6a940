"""ONNX operators along axes: reductions, softmax, normalizations, running sums, ArgMax, TopK."""

from __future__ import annotations

import math
from collections.abc import Callable

from treadle.frontends.onnx_import.operators import Made, OnnxSite, operator
from treadle.frontends.onnx_import.rules.arithmetic import in_order
from treadle.frontends.recipes.activations import root
from treadle.frontends.recipes.batch_norms import along_channels, normalized
from treadle.frontends.recipes.positions import flipped
from treadle.ir.builder import Builder, Expr
from treadle.ir.sizing.sizes import product
from treadle.ir.tensors.methods import reversed_order
from treadle.ir.tensors.shapes import reshaped
from treadle.ir.types import f32, i64, u8

# -- reductions ----------------------------------------------------------------------------------------------------


def _axes(site: OnnxSite, by_input: int) -> tuple[int, ...]:
    """Return the axes to reduce. If there are none, the operator's other work, such as a logarithm, remains."""
    rank, none_is_none = len(site.shape(0)), site.int("noop_with_empty_axes", 0)
    axes = site.ints("axes") if site.version < by_input else site.numbers(1) if site.has(1) else None
    if not axes:
        axes = () if none_is_none else tuple(range(rank))
    return tuple(site.axis(axis, rank) for axis in axes)


def _reduction(
    name: str, latest: int, rule: Callable[[OnnxSite, Expr, tuple[int, ...], bool], Expr], by_input: int = 18
) -> None:
    @operator(name, latest=latest)
    def _reduced(site: OnnxSite) -> Made:
        keep = bool(site.int("keepdims", 1))
        return rule(site, site.x(0), _axes(site, by_input), keep)


def _sum(site: OnnxSite, x: Expr, axes: tuple[int, ...], keep: bool) -> Expr:
    return site.b.reduce_sum(x, axes=axes, keep=keep) if axes else x


def _mean(site: OnnxSite, x: Expr, axes: tuple[int, ...], keep: bool) -> Expr:
    if x.dtype.is_int:
        site.refuse("integers are not supported")
    return site.b.reduce_mean(x, axes=axes, keep=keep) if axes else x


def _extremum(ours: str, empty: float) -> Callable[[OnnxSite, Expr, tuple[int, ...], bool], Expr]:
    def rule(site: OnnxSite, x: Expr, axes: tuple[int, ...], keep: bool) -> Expr:
        b, element = site.b, site.element(0)
        if not axes:
            return x
        if any(x.shape[a].constant == 0 for a in axes):
            left = [1 if i in axes else n for i, n in enumerate(x.shape) if keep or i not in axes]
            if element.is_int:
                least = element.least if empty < 0 else element.greatest
                value = b.constant(least, x.dtype)
            else:
                value = b.constant(empty > 0, x.dtype) if x.dtype.kind == "bool" else site.constant(empty, x.dtype)
            return b.expand(value, shape=tuple(left))
        if x.dtype.kind == "bool":
            return b.apply(ours, x.cast(u8), axes=axes, keep=keep).cast(x.dtype)  # type: ignore[no-any-return]
        unsigned = element.name == "UINT64"
        return in_order(b, b.apply(ours, in_order(b, x, unsigned), axes=axes, keep=keep), unsigned)

    return rule


def _log_sum_exp(site: OnnxSite, x: Expr, axes: tuple[int, ...], keep: bool) -> Expr:
    """log(sum(exp(x))). The maximum is subtracted first, so that exp does not overflow."""
    b = site.b
    if not axes:
        return x
    if any(x.shape[a].constant == 0 for a in axes):
        return b.log(b.reduce_sum(b.exp(x), axes=axes, keep=keep))
    largest = b.reduce_max(x, axes=axes, keep=True)
    finite = b.where(b.abs(largest) < math.inf, largest, b.constant(0.0, x.dtype))
    sums = b.log(b.reduce_sum(b.exp(x - finite), axes=axes, keep=True)) + finite
    left = [n for i, n in enumerate(sums.shape) if keep or i not in axes]
    return reshaped(b, sums, left)[0]


_reduction("ReduceSum", 13, _sum, by_input=13)
_reduction("ReduceMean", 18, _mean)
_reduction("ReduceMax", 20, _extremum("reduce_max", -math.inf))
_reduction("ReduceMin", 20, _extremum("reduce_min", math.inf))
_reduction("ReduceL1", 18, lambda site, x, axes, keep: _sum(site, site.b.abs(x), axes, keep))
_reduction("ReduceSumSquare", 18, lambda site, x, axes, keep: _sum(site, x * x, axes, keep))
_reduction("ReduceL2", 18, lambda site, x, axes, keep: root(site.b, _sum(site, x * x, axes, keep)))
_reduction("ReduceLogSum", 28, lambda site, x, axes, keep: site.b.log(_sum(site, x, axes, keep)))
_reduction("ReduceLogSumExp", 28, _log_sum_exp)


@operator("ReduceProd", latest=18)
def _reduce_prod(site: OnnxSite) -> Made:
    """Product over axes of known sizes, one multiplication after the other."""
    b, x, keep = site.b, site.x(0), bool(site.int("keepdims", 1))
    axes = _axes(site, 18)
    for axis in sorted(axes, reverse=True):
        size = site.number(x.shape[axis], "the size of an axis")
        if size > 64:
            site.refuse("an axis of more than 64 elements is not supported")
        parts = [b.slice(x, axis=axis, start=i, stop=i + 1) for i in range(size)]
        shape = [1 if i == axis else n for i, n in enumerate(x.shape)]
        x = parts[0] if parts else b.expand(b.constant(1, x.dtype), shape=tuple(shape))
        for part in parts[1:]:
            x = x * part
    left = [n for i, n in enumerate(x.shape) if keep or i not in axes]
    return reshaped(b, x, left)[0]


# -- softmax -------------------------------------------------------------------------------------------------------


def _softmax(name: str, ours: str) -> None:
    @operator(name, latest=13)
    def _applied(site: OnnxSite) -> Made:
        b, x = site.b, site.x(0)
        axis = site.axis(site.int("axis", -1 if site.version >= 13 else 1), max(x.rank, 1))
        if x.rank == 0:
            site.refuse("a scalar is not supported")
        if any(size.constant == 0 for size in x.shape):
            return x
        if site.version >= 13 or axis == x.rank - 1:
            return b.apply(ours, x, axis=axis)
        # Before version 13: over all axes from this axis on, flattened.
        rows = [*x.shape[:axis], product(x.shape[axis:])]
        together, _ = reshaped(b, x, rows)
        return reshaped(b, b.apply(ours, together, axis=-1), x.shape)[0]


_softmax("Softmax", "softmax")
_softmax("LogSoftmax", "log_softmax")


# -- normalizations ------------------------------------------------------------------------------------------------


def _fits_last_axis(site: OnnxSite, axis: int) -> bool:
    """Return True if the normalized axis is the last one, and the weights have only this axis."""
    x = site.x(0)
    if site.axis(axis, x.rank) != x.rank - 1:
        return False
    return all(site.shape(i) == x.shape[-1:] for i in (1, 2) if site.has(i))


@operator("LayerNormalization", latest=17)
def _layer_norm(site: OnnxSite) -> Made:
    """Layer norm over the last axis, with statistics in f32 (or f64). Other cases use the operator's function body."""
    x = site.x(0)
    axis, eps, stash = site.int("axis", -1), site.float("epsilon", 1e-5), site.int("stash_type", 1)
    extra = any(site.wanted[1:])
    if extra or stash != 1 or not _fits_last_axis(site, axis) or x.dtype.name == "bf16":
        site.decompose()
    return [site.b.layer_norm(x, site.x(1), site.maybe(2), eps=eps), None, None]


@operator("RMSNormalization", latest=23)
def _rms_norm(site: OnnxSite) -> Made:
    x = site.x(0)
    axis, eps, stash = site.int("axis", -1), site.float("epsilon", 1e-5), site.int("stash_type", 1)
    same = site.element(0) == site.element(1)
    if stash != 1 or not same or not _fits_last_axis(site, axis) or x.dtype.name == "bf16":
        site.decompose()
    return site.b.rms_norm(x, site.x(1), eps=eps)


@operator("BatchNormalization", latest=15, first=7)
def _batch_norm(site: OnnxSite) -> Made:
    """Batch norm at inference, with the given statistics."""
    b, x, eps = site.b, site.x(0), site.float("epsilon", 1e-5)
    site.ignore("momentum")
    if site.int("training_mode", 0) or site.int("spatial", 1) != 1 or any(site.wanted[1:]):
        site.refuse("training mode is not supported")
    values = [site.x(i) for i in range(5)]
    if not x.dtype.is_float or any(v.dtype is not x.dtype for v in values):
        values = [v.cast(f32) for v in values]
    wide, scale, bias, mean, variance = values
    y = normalized(b, wide, mean, variance, eps) * along_channels(b, scale, x.rank) + along_channels(b, bias, x.rank)
    return y.cast(x.dtype)


@operator("InstanceNormalization", latest=22, first=6)
def _instance_norm(site: OnnxSite) -> Made:
    b, x, eps = site.b, site.x(0), site.float("epsilon", 1e-5)
    axes = tuple(range(2, x.rank))
    scale, bias = (b.rearrange(site.x(i), pattern=f"c -> c {' '.join('1' * len(axes))}") for i in (1, 2))
    centered = x - b.reduce_mean(x, axes=axes, keep=True)
    factor = b.rsqrt(b.reduce_mean(centered * centered, axes=axes, keep=True) + eps)
    return centered * factor * scale + bias


@operator("LpNormalization", latest=22)
def _lp_norm(site: OnnxSite) -> Made:
    b, x = site.b, site.x(0)
    axis, p = site.axis(site.int("axis", -1), x.rank), site.int("p", 2)
    if p not in (1, 2):
        site.refuse(f"order {p} is not supported")
    powers = b.abs(x) if p == 1 else x * x
    total = b.reduce_sum(powers, axes=(axis,), keep=True)
    nothing, one = b.equal(total, 0), b.constant(1, x.dtype)
    norm = b.where(nothing, one, total) if p == 1 else b.sqrt(b.where(nothing, one, total))
    return b.where(nothing, b.constant(0, x.dtype), x / norm)


# -- along one axis ------------------------------------------------------------------------------------------------


@operator("CumSum", latest=14)
def _cumsum(site: OnnxSite) -> Made:
    axis = site.axis(int(site.scalar(1)), len(site.shape(0)))
    return site.b.cumsum(
        site.x(0), axis=axis, exclusive=bool(site.int("exclusive", 0)), reverse=bool(site.int("reverse", 0))
    )


def _argument(name: str, latest: int, least: bool) -> None:
    @operator(name, latest=latest)
    def _found(site: OnnxSite) -> Made:
        b = site.b
        x = in_order(b, site.x(0), site.element(0).name == "UINT64")
        axis, keep = site.axis(site.int("axis", 0), x.rank), bool(site.int("keepdims", 1))
        if least:
            x = reversed_order(x)
        if not site.int("select_last_index", 0):
            return b.argmax(x, axis=axis, keep=keep)
        size = x.shape[axis]
        last = b.size(value=size - 1) if size.constant is None else b.constant(size.constant - 1, i64)
        return last - b.argmax(flipped(b, x, axis), axis=axis, keep=keep)


_argument("ArgMax", 13, least=False)
_argument("ArgMin", 13, least=True)


@operator("TopK", latest=24)
def _top_k(site: OnnxSite) -> Made:
    b = site.b
    site.ignore("sorted")  # sorted order is one of the orders that `sorted=0` allows
    unsigned = site.element(0).name == "UINT64"
    x = in_order(b, site.x(0), unsigned)
    k = site.int("k") if site.version < 10 else int(site.scalar(1))
    axis, largest = site.axis(site.int("axis", -1), x.rank), site.int("largest", 1)
    if k < 0:
        site.malformed(f"k must be 0 or more, not {k}")
    if k == 0:
        none = b.slice(site.x(0), axis=axis, start=0, stop=0)
        return [none, b.expand(b.constant(0, i64), shape=none.shape)]
    if largest:
        values, indices = b.top_k(x, k=k, axis=axis)
        return [in_order(b, values, unsigned), indices]
    values, indices = b.top_k(reversed_order(x), k=k, axis=axis)
    return [in_order(b, reversed_order(values), unsigned), indices]


@operator("Hardmax", latest=13)
def _hardmax(site: OnnxSite) -> Made:
    b, x = site.b, site.x(0)
    axis = site.axis(site.int("axis", -1 if site.version >= 13 else 1), x.rank)
    if site.version >= 13 or axis == x.rank - 1:
        return _hard(b, x, axis)
    rows, _ = reshaped(b, x, [*x.shape[:axis], product(x.shape[axis:])])
    return reshaped(b, _hard(b, rows, axis), x.shape)[0]


def _hard(b: Builder, x: Expr, axis: int) -> Expr:
    """Return 1 at the first maximum along an axis, and 0 elsewhere."""
    first = b.argmax(x, axis=axis, keep=True)
    names = ["1"] * x.rank
    names[axis] = "n"
    place = b.rearrange(b.iota(size=x.shape[axis]), pattern=f"n -> {' '.join(names)}")
    made: Expr = b.equal(first, place).cast(x.dtype)
    return made

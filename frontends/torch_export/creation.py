"""ATen operators that create tensors from sizes: arange, full, zeros, ones, and triangles."""

from __future__ import annotations

import math

from treadle.frontends.torch_export.operators import Made, TorchSite, operator
from treadle.frontends.torch_export.shapes import expanded
from treadle.ir.builder import Expr
from treadle.ir.sizing.sizes import ZERO, Size
from treadle.ir.types import f64


@operator("arange.default", "arange.start", "arange.start_step")
def _arange(site: TorchSite) -> Made:
    b, dtype, (count,) = site.b, site.dtype(), site.shape()
    start, step = site.given("start", 0), site.given("step", 1)
    if isinstance(start, float) or isinstance(step, float):
        # PyTorch counts in float64.
        places = b.iota(size=count, dtype=f64)
        return (places * site.real("step", 1.0) + site.real("start", 0.0)).cast(dtype)
    places = b.iota(size=count, dtype=dtype)
    if Size.of(step).constant != 1:
        places = places * site.as_operand(step, dtype)
    return places if Size.of(start) == ZERO else places + site.as_operand(start, dtype)


def _filled(site: TorchSite, value: float) -> Expr:
    dtype = site.dtype()
    held = bool(value) if dtype.kind == "bool" else value if dtype.is_float else int(value)
    return expanded(site.b, site.b.constant(held, dtype), site.shape())


@operator("zeros.default", "zeros_like.default", "new_zeros.default")
def _zeros(site: TorchSite) -> Made:
    return _filled(site, 0)


@operator("ones.default", "ones_like.default", "new_ones.default")
def _ones(site: TorchSite) -> Made:
    return _filled(site, 1)


@operator("full.default", "full_like.default", "new_full.default")
def _full(site: TorchSite) -> Made:
    return expanded(site.b, site.operand("fill_value", site.dtype()), site.shape())


@operator("fill.Scalar", "fill.Tensor")
def _fill(site: TorchSite) -> Made:
    return expanded(site.b, site.operand("value", site.dtype()), site.shape())


@operator("scalar_tensor.default")
def _scalar(site: TorchSite) -> Made:
    return site.operand("s", site.dtype())


@operator("linspace.default")
def _linspace(site: TorchSite) -> Made:
    b, count, start, end = site.b, site.integer("steps"), site.real("start"), site.real("end")
    if not site.dtype().is_float or not (math.isfinite(start) and math.isfinite(end)):
        site.refuse("integers and infinite bounds are not supported")
    step = (end - start) / max(count - 1, 1)
    return (b.iota(size=count, dtype=f64) * step + start).cast(site.dtype())


@operator("eye.default", "eye.m")
def _eye(site: TorchSite) -> Made:
    b, (rows, columns) = site.b, site.shape()
    place = b.rearrange(b.iota(size=rows), pattern="n -> n 1")
    return b.equal(b.iota(size=columns), place).cast(site.dtype())


# -- triangles -----------------------------------------------------------------------------------------------------


def _triangle(site: TorchSite, upper: bool) -> Expr:
    """Return the elements on one side of a diagonal; the others are zero."""
    b, x, diagonal = site.b, site.x("self"), site.integer("diagonal")
    rows = b.rearrange(b.iota(size=x.shape[-2]), pattern="n -> n 1")
    edge = rows + diagonal if diagonal else rows
    columns = b.iota(size=x.shape[-1])
    keep = columns >= edge if upper else columns <= edge
    return b.where(keep, x, b.constant(False if x.dtype.kind == "bool" else 0, x.dtype))


@operator("tril.default")
def _tril(site: TorchSite) -> Made:
    return _triangle(site, upper=False)


@operator("triu.default")
def _triu(site: TorchSite) -> Made:
    return _triangle(site, upper=True)

"""ONNX operators that create tensors from constants and sizes: Constant, Shape, Range, ..."""

from __future__ import annotations

import math

import numpy as np

from treadle.frontends.onnx_import.operators import Made, OnnxSite, operator
from treadle.frontends.onnx_import.rules.elements import named
from treadle.frontends.onnx_import.rules.shapes import expanded
from treadle.frontends.onnx_import.values import Known, constant, tidied
from treadle.ir.sizing.sizes import Size, product


@operator("Constant", latest=25)
def _constant(site: OnnxSite) -> Made:
    names = list(site.attributes)
    if len(names) != 1:
        site.malformed(f"must have one attribute, but has {len(names)}")
    site.ignore(*names)
    attribute = site.attributes[names[0]]
    match names[0]:
        case "value":
            return site.importer.tensor(attribute.t, site.node.output[0], site.scope)
        case "value_int":
            return Known(named("INT64"), content=np.asarray(attribute.i, np.int64))
        case "value_ints":
            return Known(named("INT64"), content=np.asarray(list(attribute.ints), np.int64))
        case "value_float":
            return Known(named("FLOAT"), content=np.asarray(attribute.f, np.float32))
        case "value_floats":
            return Known(named("FLOAT"), content=np.asarray(list(attribute.floats), np.float32))
    site.refuse(f"{names[0]} is not supported")


@operator("Identity", latest=25, moves=(0,))
def _identity(site: OnnxSite) -> Made:
    return site.value(0)


@operator("Shape", latest=25)
def _shape(site: OnnxSite) -> Made:
    shape = site.shape(0)
    return tidied(
        shape[slice(site.int("start", 0), site.int("end"))], (len(shape[slice(site.int("start", 0), site.int("end"))]),)
    )


@operator("Size", latest=25)
def _size(site: OnnxSite) -> Made:
    return tidied([product(site.shape(0))], ())


@operator("ConstantOfShape", latest=25)
def _constant_of_shape(site: OnnxSite) -> Made:
    site.ignore("value")
    given = site.attributes.get("value")
    value = Known(named("FLOAT"), content=np.zeros(1, np.float32))
    if given is not None:
        value = site.importer.tensor(given.t, f"{site.node.output[0]}.value", site.scope)
    content = value.content
    if content is None or content.size != 1:
        site.malformed("the value must be one element")
    scalar = constant(site.b, content.reshape(()), value.type)
    return Known(value.type, expr=expanded(site.b, scalar, site.sizes(0)))


@operator("Range", latest=27)
def _range(site: OnnxSite) -> Made:
    """start, start + delta, ..., up to limit, which is excluded"""
    b, dtype = site.b, site.element(0).carrier
    if dtype.is_float:
        start, limit, delta = (float(site.scalar(i)) for i in range(3))
        if not (math.isfinite(start) and math.isfinite(limit) and math.isfinite(delta)) or delta == 0:
            site.malformed("start, limit and delta must be finite, and delta not zero")
        count = Size.of(max(math.ceil((limit - start) / delta), 0))
        steps = b.iota(size=count, dtype="f32" if dtype.numpy is None or dtype.bytes == 2 else dtype)
        return (steps * delta + start).cast(dtype)
    start_size, limit_size, step = (site.size(i) for i in range(3))
    step_number = step.constant
    if not step_number:
        site.refuse(f"a step of {step} is not supported")
    extent = limit_size - start_size
    count = (
        (extent + step_number - 1) // step_number if step_number > 0 else (-extent - step_number - 1) // -step_number
    )
    if count.constant is not None:
        count = Size.of(max(count.constant, 0))
    steps = b.iota(size=count, dtype=dtype)
    if step_number != 1:
        steps = steps * step_number
    if start_size.constant == 0:
        return steps
    first = Known(named("INT64"), content=tidied([start_size], ())).expr(b)
    return steps + first.cast(dtype)


@operator("EyeLike", latest=22)
def _eye_like(site: OnnxSite) -> Made:
    b, shape = site.b, site.shape(0)
    to = site.importer.element(site.int("dtype", site.element(0).number))
    if len(shape) != 2:
        site.malformed("the operand must have rank 2")
    rows = b.rearrange(b.iota(size=shape[0]), pattern="n -> n 1")
    on = b.equal(b.iota(size=shape[1]), rows + site.int("k", 0))
    return Known(to, expr=on.cast(to.carrier))

"""Random nodes: operators that move, select, place and create elements."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import TensorProto, numpy_helper

from tests.fuzz.onnx_nodes.drawing import Draw, draws

Array = np.ndarray[Any, Any]


@draws("Concat")
def _concat(d: Draw) -> None:
    shape = d.shape()
    axis = d.axis(len(shape)) if d.version >= 11 else d.int(0, len(shape) - 1)
    dtype = d.of("float32", "int64")
    for _ in range(d.int(1, 3)):
        shape[axis] = d.int(1, 3)
        d.x(d.ints(shape).astype(dtype))
    d.set(axis=axis)


@draws("Constant")
def _constant(d: Draw) -> None:
    shape = d.shape(0, 2)
    tensor = numpy_helper.from_array(d.of(d.floats(shape), d.ints(shape), d.bools(shape)))
    named = [{"value_float": 1.5}, {"value_floats": [1.0, 2.5]}, {"value_int": 3}, {"value_ints": [4, 5]}]
    d.set(**d.of({"value": tensor}, *(named if d.version >= 12 else ())))


@draws("ConstantOfShape")
def _constant_of_shape(d: Draw) -> None:
    d.shaping(d.shape(0))
    value = d.of(d.floats([1]), d.ints([1]), d.bools([1]))
    d.perhaps(value=numpy_helper.from_array(value))


@draws("DepthToSpace")
def _depth_to_space(d: Draw) -> None:
    block = d.int(1, 2)
    d.x(d.floats([2, block * block * d.int(1, 2), *d.shape(2, 2)]))
    d.set(blocksize=block)
    if d.version >= 11:
        d.perhaps(mode=d.of("DCR", "CRD"))


@draws("SpaceToDepth")
def _space_to_depth(d: Draw) -> None:
    block = d.int(1, 2)
    d.x(d.floats([2, 3, block * d.int(1, 2), block * d.int(1, 2)]))
    d.set(blocksize=block)


@draws("Expand")
def _expand(d: Draw) -> None:
    shape = d.shape()
    d.x(d.numbers(d.like(shape)))
    d.shaping([1 if d.maybe(0.2) else n for n in shape])


@draws("EyeLike")
def _eye_like(d: Draw) -> None:
    d.x(d.numbers(d.shape(2, 2), "float32", "int32"))
    d.perhaps(k=d.int(-2, 2), dtype=d.of(TensorProto.FLOAT, TensorProto.INT64))


@draws("Flatten")
def _flatten(d: Draw) -> None:
    shape = d.shape()
    d.x(d.floats(shape))
    d.perhaps(axis=d.int(-len(shape) if d.version >= 11 else 0, len(shape)))


@draws("Gather")
def _gather(d: Draw) -> None:
    shape = d.shape()
    axis = d.axis(len(shape)) if d.version >= 11 else d.int(0, len(shape) - 1)
    table = len(shape) == 2 and axis % 2 == 0
    d.x(d.numbers(shape), False if table else None)  # an embedding of ours, if constant: no negative index
    low = -shape[axis] if d.version >= 11 else 0
    d.x(d.ints(d.shape(0, 2), low, shape[axis] - 1, d.of(np.int32, np.int64)), d.maybe(0.4))
    d.set(axis=axis)


@draws("GatherElements")
def _gather_elements(d: Draw) -> None:
    shape = d.shape()
    axis = d.axis(len(shape))
    d.x(d.numbers(shape))
    picked = [d.int(1, n if a != axis % len(shape) else 4) for a, n in enumerate(shape)]
    d.x(d.ints(picked, -shape[axis], shape[axis] - 1, d.of(np.int32, np.int64)))
    d.set(axis=axis)


def _points(d: Draw, shape: Sequence[int], batch: int, depth: int, distinct: bool = False) -> Array:
    """Indices [batch..., points..., depth] into a tensor."""
    lead = [*shape[:batch], *d.shape(0 if not distinct else 1, 2, 2)]
    cells = list(itertools.product(*(range(n) for n in shape[batch : batch + depth])))
    count = int(np.prod(lead))
    if distinct and count > len(cells):
        lead, count = [len(cells)], len(cells)
    chosen = d.r.sample(cells, count) if distinct else [d.r.choice(cells) for _ in range(count)]
    found = np.array(chosen, np.int64).reshape(*lead, depth)
    return np.where(d.rng.random(found.shape) < 0.2, found - np.array(shape[batch : batch + depth]), found)


@draws("GatherND")
def _gather_nd(d: Draw) -> None:
    shape = d.shape()
    batch = d.int(0, len(shape) - 1) if d.version >= 12 and d.maybe() else 0
    d.x(d.numbers(shape))
    d.x(_points(d, shape, batch, d.int(1, len(shape) - batch)))
    if batch:
        d.set(batch_dims=batch)


@draws("ScatterND")
def _scatter_nd(d: Draw) -> None:
    shape = d.shape()
    x = d.floats(shape)
    reduction = d.of(None, "none", "add") if d.version >= 16 else None
    depth = d.int(1, len(shape))
    points = _points(d, shape, 0, depth, distinct=reduction != "add")
    d.x(x)
    d.x(points)
    d.x(d.floats([*points.shape[:-1], *shape[depth:]]))
    d.set(reduction=reduction)


@draws("ScatterElements")
def _scatter_elements(d: Draw) -> None:
    shape = d.shape()
    axis = d.axis(len(shape))
    reduction = d.of(None, "none", "add") if d.version >= 16 else None
    d.x(d.floats(shape))
    places = np.stack([d.rng.permutation(shape[axis]) for _ in range(max(int(np.prod(shape)) // shape[axis], 1))])
    moved = [shape[axis], *(n for a, n in enumerate(shape) if a != axis % len(shape))]
    indices = np.moveaxis(places.T.reshape(moved), 0, axis)
    cut = tuple(slice(0, d.int(1, n)) for n in shape)
    d.x(np.ascontiguousarray(indices[cut]).astype(np.int64))
    d.x(d.floats(indices[cut].shape))
    d.perhaps(axis=axis) if axis % len(shape) == 0 else d.set(axis=axis)
    d.set(reduction=reduction)


@draws("TensorScatter")
def _tensor_scatter(d: Draw) -> None:
    shape = d.shape(3, 4)
    axis = d.int(1, len(shape) - 1)
    length = d.int(1, shape[axis])
    update = [length if a == axis else n for a, n in enumerate(shape)]
    circular = d.maybe()
    d.x(d.floats(shape))
    d.x(d.floats(update))
    d.x(d.ints([shape[0]], 0, shape[axis] - (1 if circular else length)))
    d.set(axis=axis - len(shape) if d.maybe() else axis, mode="circular" if circular else d.of(None, "linear"))


@draws("OneHot")
def _one_hot(d: Draw) -> None:
    shape, depth = d.shape(1, 3), d.int(1, 4)
    d.x(d.ints(shape, -depth, depth - 1))
    d.shaping(depth if d.maybe() else [depth])
    d.x(d.numbers([2], "float32", "int64"))
    d.perhaps(axis=d.int(-len(shape) - 1, len(shape)))


@draws("Pad")
def _pad(d: Draw) -> None:
    shape = d.shape()
    modes = ["constant", "reflect", "edge", *(["wrap"] if d.version >= 19 else [])]
    mode = d.of(None, *modes)
    axes = sorted({a % len(shape) for a in d.some(len(shape))}) if d.version >= 18 and d.maybe() else None
    along = [shape[a] for a in axes] if axes is not None else shape
    most = [2 if mode in (None, "constant", "edge") else n - 1 if mode == "reflect" else n for n in along]
    least = [-(n - 1) // 2 if mode in (None, "constant") and d.maybe(0.3) else 0 for n in along]
    pads = [d.int(lo, min(hi, 2)) for _ in range(2) for lo, hi in zip(least, most, strict=True)]
    x = d.floats(shape) if d.version < 13 else d.numbers(shape, "float32", "int32", "int64")
    d.x(x)
    d.set(mode=mode)
    if d.version < 11:
        d.set(pads=pads)
        d.perhaps(value=1.5)
        return
    d.shaping(pads)
    if axes is not None or d.maybe():
        d.x(np.array(2, x.dtype) if d.maybe() or axes is None else None)
    if axes is not None:
        d.shaping([a - len(shape) if d.maybe(0.3) else a for a in axes])


@draws("Range")
def _range(d: Draw) -> None:
    start, count, step = d.int(-4, 4), d.int(0, 5), d.of(1, 2, 3, -1, -2)
    dtype = d.of(np.int64, np.int32, np.float32)
    for number in (start, start + count * step, step):
        d.x(np.array(number, dtype), True)


@draws("Reshape")
def _reshape(d: Draw) -> None:
    shape = d.shape()
    count = int(np.prod(shape))
    target: list[int] = []
    left = count
    while left > 1 and len(target) < 4:
        n = d.of(*[k for k in range(1, left + 1) if left % k == 0])
        target.append(n)
        left //= n
    target += [left] if left > 1 or d.maybe(0.2) else []
    zeros = d.version >= 14 and d.maybe(0.3)
    for i, n in enumerate(target):
        if not zeros and i < len(shape) and shape[i] == n and d.maybe(0.3):
            target[i] = 0
    if target and d.maybe():
        target[d.int(0, len(target) - 1)] = -1
    d.x(d.numbers(shape))
    d.shaping(target)
    d.set(allowzero=int(zeros) if (d.version >= 14 and d.maybe()) or zeros else None)


@draws("ReverseSequence")
def _reverse_sequence(d: Draw) -> None:
    shape = d.shape(2)
    time = d.int(0, 1)
    d.x(d.floats(shape))
    d.x(d.ints([shape[1 - time]], 1, shape[time]))
    d.set(time_axis=time, batch_axis=1 - time)


@draws("Slice")
def _slice(d: Draw) -> None:
    shape = d.shape()
    axes = d.some(len(shape))
    steps = [d.of(1, 1, 2, 3, -1, -2) for _ in axes] if d.version >= 10 and d.maybe() else None
    edges = [(d.int(-n - 2, n + 2), d.int(-n - 2, n + 2)) for n in (shape[a] for a in axes)]
    starts, ends = [list(side) for side in zip(*edges, strict=True)]
    for i, step in enumerate(steps or [1] * len(axes)):
        if d.maybe(0.3):  # to the end, in the form that the specification recommends
            ends[i] = 2**31 - 1 if step > 0 else -(2**31)
    d.x(d.numbers(shape))
    if d.version < 10:  # as attributes
        every = len(axes) == len(shape) and d.maybe()
        d.set(starts=starts, ends=ends, axes=None if every else [a % len(shape) for a in axes])
        return
    dtype = d.of(np.int32, np.int64)
    d.shaping(starts, dtype)
    d.shaping(ends, dtype)
    if axes != list(range(len(axes))) or steps or d.maybe():
        d.shaping(axes, dtype)
    if steps:
        d.shaping(steps, dtype)


@draws("Split")
def _split(d: Draw) -> None:
    shape = d.shape()
    axis = d.axis(len(shape)) if d.version >= 11 else d.int(0, len(shape) - 1)
    d.outputs = d.int(1, 3)
    equal = d.maybe()
    parts = [d.int(1, 3)] * d.outputs if equal else [d.int(1, 3) for _ in range(d.outputs)]
    shape[axis] = sum(parts)
    d.set(axis=axis)
    if equal and d.maybe():
        if d.version >= 18:
            d.set(num_outputs=d.outputs)
        d.x(d.numbers(shape))
    elif d.version < 13:
        d.x(d.numbers(shape))
        d.set(split=parts)
    else:
        d.x(d.numbers(shape))
        d.shaping(parts)


@draws("Squeeze", "Unsqueeze")
def _squeeze(d: Draw) -> None:
    shape = d.shape()
    axes = d.some(len(shape))
    if d.version < 11:
        axes = sorted(a % len(shape) for a in axes)
    ones = {a % len(shape) for a in axes}
    shape = [1 if a in ones else n + 1 for a, n in enumerate(shape)]
    squeeze = d.name == "Squeeze"
    d.x(d.numbers(shape if squeeze else [n for a, n in enumerate(shape) if a not in ones]))
    if squeeze and d.maybe(0.2):
        return
    d.set(axes=axes) if d.version < 13 else d.shaping(axes)


@draws("Tile")
def _tile(d: Draw) -> None:
    shape = d.shape()
    d.x(d.numbers(shape))
    d.shaping([d.int(0, 3) if d.maybe(0.1) else d.int(1, 3) for _ in shape])


@draws("Transpose")
def _transpose(d: Draw) -> None:
    shape = d.shape(0)
    d.x(d.numbers(shape))
    if shape:
        d.perhaps(perm=d.r.sample(range(len(shape)), len(shape)))


@draws("Trilu")
def _trilu(d: Draw) -> None:
    d.x(d.numbers(d.shape(2)))
    if d.maybe():
        d.shaping(d.int(-4, 4))
    d.perhaps(upper=d.int(0, 1))

"""Random nodes: operators along an axis (reductions, softmax, norms, orders)."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.fuzz.onnx_nodes.drawing import Draw, draws

Array = np.ndarray[Any, Any]


REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")


@draws(*(f"Reduce{kind}" for kind in REDUCTIONS))
def _reduction(d: Draw) -> None:
    shape = d.shape(0)
    kinds = ("float32", "int32") if d.name not in ("ReduceMean", "ReduceLogSum", "ReduceLogSumExp", "ReduceL2") else ()
    x = d.numbers(shape, *(kinds or ("float32",)))
    if d.name == "ReduceProd" and x.dtype.kind == "i":
        x = d.ints(shape, -1, 1, x.dtype)  # ONNX Runtime does not define a product past int32
    d.x(np.abs(x) + x.dtype.type(1) if d.name == "ReduceLogSum" else x)
    axes = d.some(len(shape)) if shape and d.maybe(0.6) else None
    d.perhaps(keepdims=d.int(0, 1))
    if d.version < (13 if d.name == "ReduceSum" else 18):
        d.set(axes=axes)
        return
    if d.maybe(0.7 if axes is None else 0.2):
        d.set(noop_with_empty_axes=1)
    if axes is not None or d.maybe(0.3):
        d.shaping(axes or [])


@draws("ArgMax", "ArgMin")
def _argument(d: Draw) -> None:
    shape = d.shape()
    x = d.numbers(shape, "float32", "int32")
    d.x(np.round(x) if d.maybe() else x)
    d.perhaps(axis=d.axis(len(shape)) if d.version >= 11 else d.int(0, len(shape) - 1), keepdims=d.int(0, 1))
    if d.version >= 12:
        d.perhaps(select_last_index=d.int(0, 1))


@draws("Softmax", "LogSoftmax", "Hardmax")
def _softmax(d: Draw) -> None:
    shape = d.shape(2 if d.version < 13 else 1)
    d.x(d.floats(shape))
    d.perhaps(axis=d.axis(len(shape)) if d.version >= 11 else d.int(0, len(shape) - 1))


@draws("CumSum")
def _cumsum(d: Draw) -> None:
    shape = d.shape()
    d.x(d.numbers(shape, "float32", "int32", "int64"))
    d.shaping(d.axis(len(shape)), d.of(np.int32, np.int64))
    d.perhaps(exclusive=d.int(0, 1), reverse=d.int(0, 1))


@draws("TopK")
def _top_k(d: Draw) -> None:
    shape, d.outputs = d.shape(), 2
    axis = d.axis(len(shape)) if d.version >= 11 else d.int(0, len(shape) - 1)
    if d.version < 11:
        d.x(d.floats(shape))
    else:
        x = d.numbers(shape, "float32", "int32", "int64")
        d.x(np.round(x) if d.maybe() else x)
        d.perhaps(largest=d.int(0, 1))
        d.set(sorted=1)
    d.set(axis=axis)
    k = d.int(1, shape[axis])
    d.set(k=k) if d.version < 10 else d.shaping([k])


@draws("LpNormalization")
def _lp_norm(d: Draw) -> None:
    shape = d.shape()
    d.x(d.floats(shape))
    d.perhaps(axis=d.axis(len(shape)), p=d.int(1, 2))


@draws("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
def _norm(d: Draw) -> None:
    shape = d.shape()
    axis = d.axis(len(shape))
    d.x(d.floats(shape))
    d.set(axis=axis)
    d.x(d.floats(shape[axis % len(shape) :]))
    if d.name == "LayerNormalization" and d.maybe():
        d.x(d.floats(shape[axis % len(shape) :]))
    d.perhaps(epsilon=1e-3, stash_type=1)
    d.rounding = 1000  # the reciprocal of a small deviation multiplies the mean's rounding error


@draws("BatchNormalization")
def _batch_norm(d: Draw) -> None:
    shape = d.shape(2)
    d.x(d.floats(shape))
    for n in range(4):
        d.x(np.abs(d.floats(shape[1:2])) + 0.1 if n == 3 else d.floats(shape[1:2]))
    d.perhaps(epsilon=1e-3, momentum=0.8, **({"training_mode": 0} if d.version >= 14 else {}))


@draws("InstanceNormalization")
def _instance_norm(d: Draw) -> None:
    shape = [*d.shape(2, 2), *d.shape(1, 2), 4]
    d.x(d.floats(shape))
    d.x(d.floats(shape[1:2]))
    d.x(d.floats(shape[1:2]))
    d.perhaps(epsilon=1e-3)
    d.rounding = 1000

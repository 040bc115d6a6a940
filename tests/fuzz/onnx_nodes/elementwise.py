"""Random nodes: elementwise operators."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto

from tests.fuzz.onnx_nodes.drawing import Draw, draws

Array = np.ndarray[Any, Any]


SPECIAL = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 0.5, -0.5, 1.5, 2.5, 1.0], np.float32)


@draws("Abs", "Neg", "Sign", "Relu")
def _numbers(d: Draw) -> None:
    wide = d.name != "Relu" or d.version >= 14
    d.x(d.numbers(d.shape(0), *(("float32", "int32", "int64", "int8") if wide else ("float32",))))


@draws("Ceil", "Cos", "Cosh", "Erf", "Exp", "Floor", "Log", "Reciprocal", "Sigmoid", "Sin", "Sinh", "Softplus")
@draws(
    "Softsign",
    "Sqrt",
    "Tan",
    "Tanh",
    "Round",
    "IsNaN",
    "Elu",
    "Celu",
    "HardSigmoid",
    "LeakyRelu",
    "Selu",
    "Gelu",
    "Swish",
)
@draws("IsInf")
def _float(d: Draw) -> None:
    x = d.floats(d.shape(0))
    special = d.name in ("Ceil", "Floor", "Round", "IsNaN", "IsInf", "Reciprocal", "Sqrt", "Exp")
    if special and x.size and d.maybe():
        x.flat[:] = d.rng.choice(SPECIAL, x.size)
    d.x(x)
    options = {
        "Elu": {"alpha": 0.7},
        "Celu": {"alpha": 0.7},
        "HardSigmoid": {"alpha": 0.3, "beta": 0.4},
        "LeakyRelu": {"alpha": 0.2},
        "Selu": {"alpha": 1.5, "gamma": 1.2},
        "Gelu": {"approximate": d.of("none", "tanh")},
        "Swish": {"alpha": 1.7},
        "IsInf": {"detect_negative": d.int(0, 1), "detect_positive": d.int(0, 1)},
    }
    d.perhaps(**options.get(d.name, {}))


@draws("Not")
def _not(d: Draw) -> None:
    d.x(d.bools(d.shape(0)))


@draws("Identity", "Size")
def _any(d: Draw) -> None:
    shape = d.shape(0)
    d.x(d.of(d.numbers(shape), d.bools(shape)))


@draws("Shape")
def _shape(d: Draw) -> None:
    d.x(d.numbers(d.shape(0)))
    if d.version >= 15:
        d.perhaps(start=d.int(-5, 5), end=d.int(-5, 5))


@draws("Add", "Sub", "Mul", "Div", "Pow", "Mod", "PRelu")
def _binary(d: Draw) -> None:
    shape = d.shape(0)
    x = d.numbers(shape, "float32", *(() if d.name in ("PRelu",) else ("int32", "int64")))
    y = d.floats(d.like(shape)) if x.dtype.kind == "f" else d.ints(d.like(shape), 1, 5, x.dtype)
    if d.name in ("Pow", "Div", "Mod"):
        y = np.where(np.abs(y) < 0.3, 1, y).astype(x.dtype)
    if d.name == "Pow":
        x, y = np.abs(x), d.ints(y.shape, 0, 3, y.dtype) if d.maybe() else y
    if d.name == "Mod" and (x.dtype.kind == "f" or d.maybe()):
        d.set(fmod=1)
    swapped = d.name in ("Add", "Sub", "Mul") and d.maybe()
    for operand in (y, x) if swapped else (x, y):
        d.x(operand)


@draws("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")
def _comparison(d: Draw) -> None:
    shape = d.shape(0)
    wide = d.version >= 9 and (d.name != "Equal" or d.version >= 11)
    if not wide:
        x, y = (d.ints(s) if d.name == "Equal" else d.floats(s) for s in (shape, d.like(shape)))
    else:
        x = np.round(d.numbers(shape, "float32", "int32", "int64"))
        y = np.round(d.floats(d.like(shape))).astype(x.dtype)
    d.x(x)
    d.x(y)


@draws("And", "Or", "Xor")
def _logic(d: Draw) -> None:
    shape = d.shape(0)
    d.x(d.bools(shape))
    d.x(d.bools(d.like(shape)))


@draws("Max", "Min", "Mean", "Sum")
def _variadic(d: Draw) -> None:
    shape = d.shape(0)
    kinds = ("float32", "int32", "int64") if d.name in ("Max", "Min") and d.version >= 12 else ("float32",)
    dtype = d.of(*kinds)
    for n in range(d.int(1, 3)):
        one = shape if n == 0 or d.version < 8 else d.like(shape)
        d.x((d.floats(one) * 5).astype(dtype))


@draws("Where")
def _where(d: Draw) -> None:
    shape = d.shape(0)
    d.x(d.bools(d.like(shape)))
    x = d.numbers(shape)
    d.x(x)
    d.x(d.ints(d.like(shape), 0, 5, x.dtype))


@draws("Clip")
def _clip(d: Draw) -> None:
    if d.version < 11:
        d.x(d.floats(d.shape(0)))
        d.perhaps(min=-0.5, max=0.7)
        return
    x = d.numbers(d.shape(0), *(("float32", "int32", "int64", "uint8", "int8") if d.version >= 12 else ("float32",)))
    d.x(x)
    d.x(np.array(d.of(-0.5, 2) if x.dtype.kind == "f" else 1, x.dtype) if d.maybe(0.7) else None)
    if d.maybe(0.7):
        d.x(np.array(0.7 if x.dtype.kind == "f" else 4, x.dtype))


@draws("Cast")
def _cast(d: Draw) -> None:
    shape = d.shape(0)
    x = d.of(
        d.floats(shape) * 4, d.floats(shape, np.float16), d.ints(shape), d.ints(shape, 0, 9, np.uint8), d.bools(shape)
    )
    d.x(x)
    d.set(to=d.of(*[getattr(TensorProto, t) for t in ("FLOAT", "FLOAT16", "DOUBLE", "INT64", "INT32", "INT8", "BOOL")]))
    if d.version >= 19:
        d.perhaps(saturate=d.int(0, 1))
    if d.version >= 24 and d.maybe(0.4):  # ONNX Runtime does not know it
        d.set(round_mode="up")


@draws("CastLike")
def _cast_like(d: Draw) -> None:
    shape = d.shape(0)
    d.x(d.of(d.floats(shape) * 4, d.ints(shape)))
    d.x(d.of(d.floats([1]), d.ints([2]), d.floats([], np.float16), d.bools([1])))
    if d.version >= 19:
        d.perhaps(saturate=d.int(0, 1))
    if d.version >= 24 and d.maybe(0.4):  # ONNX Runtime does not know it
        d.set(round_mode="up")


@draws("Dropout")
def _dropout(d: Draw) -> None:
    d.x(d.floats(d.shape(1)))
    d.outputs = d.int(1, 2) if d.version >= 12 else 1
    if d.version < 12:
        d.perhaps(ratio=0.3)
    else:
        d.perhaps(seed=3)
        if d.maybe():
            d.x(np.array(0.4, np.float32))
            if d.maybe():
                d.x(np.array(False), True)

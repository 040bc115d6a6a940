"""ONNX models of one node each, over every operator that the importer knows, its attributes and its versions, held
against ONNX Runtime.

    python -m tests.fuzz.onnx_nodes [--count 5000] [--seed 0] [--only Conv] [--backend torch]

`cases(seed)` goes on for ever: each operator in turn, with random operands and attributes, some operands constant, some
axes without a size. `outcome(case)` imports a case with its sizes and without, runs both, and says how it went.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, defs, helper, numpy_helper

from treadle.backends.registry import find_backend
from treadle.frontends.onnx_import.elements import carried, restored
from treadle.frontends.onnx_import.errors import StaticArgumentNeeded
from treadle.frontends.onnx_import.importer import Imported, import_onnx
from treadle.ir.errors import FrontendError, PassError, TreadleError
from treadle.ir.target import Target
from treadle.passes.framework.manager import PassManager
from treadle.passes.pipelines import DEFAULT

Array = np.ndarray[Any, Any]

NEWEST = 24
"""The newest opset drawn: the last one that ONNX Runtime knows in full."""
OLDEST = 7
TYPES = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16", TensorProto.INT64: "int64"}


@dataclass
class Case:
    """A model, what it takes, and how near the results must come: in spacings of the result's dtype."""

    operator: str
    proto: onnx.ModelProto
    inputs: dict[str, Array]
    sizes: dict[str, int] = field(default_factory=dict)
    rounding: int = 64

    def __str__(self) -> str:
        node = self.proto.graph.node[0]
        held = {t.name: numpy_helper.to_array(t) for t in self.proto.graph.initializer}
        operands = []
        for name in node.input:
            x = held.get(name, self.inputs.get(name))
            known = "" if x is None or name not in held else f" = {x.tolist()}" if x.size <= 16 else " constant"
            operands.append("-" if x is None else f"{x.dtype}{list(x.shape)}{known}")
        told = ", ".join(f"{a.name}={helper.get_attribute_value(a)!r}"[:80] for a in node.attribute)
        return f"{self.operator}({', '.join(operands)}; {told}) opset {self.proto.opset_import[0].version}"


class Draw:
    """One node while it is drawn: `x` adds an operand, `set` an attribute.

    version   of the operator
    r, rng    the chance behind everything
    """

    def __init__(self, seed: int, name: str, version: int) -> None:
        self.r, self.rng = random.Random(seed), np.random.default_rng(seed)
        self.name, self.version = name, version
        self.operands: list[tuple[Array | None, bool]] = []
        self.attributes: dict[str, Any] = {}
        self.outputs, self.rounding, self.fixed = 1, 64, False

    def maybe(self, chance: float = 0.5) -> bool:
        return self.r.random() < chance

    def int(self, low: int, high: int) -> int:
        return self.r.randint(low, high)

    def of(self, *choices: Any) -> Any:
        return self.r.choice(choices)

    def shape(self, low: int = 1, high: int = 4, most: int = 4) -> list[int]:
        """Sizes for a tensor of a rank from low to high."""
        return [self.int(1, most) for _ in range(self.int(low, high))]

    def axis(self, rank: int) -> int:
        return self.int(-rank, rank - 1)

    def some(self, rank: int) -> list[int]:
        """Some axes, some of them counted from the end."""
        chosen = self.r.sample(range(rank), self.int(1, rank))
        return [a - rank if self.maybe(0.3) else a for a in chosen]

    def floats(self, shape: Sequence[int], dtype: Any = np.float32) -> Array:
        return self.rng.standard_normal(tuple(shape)).astype(dtype)

    def ints(self, shape: Sequence[int], low: int = -9, high: int = 9, dtype: Any = np.int64) -> Array:
        return self.rng.integers(low, high + 1, tuple(shape)).astype(dtype)

    def bools(self, shape: Sequence[int]) -> Array:
        return self.rng.random(tuple(shape)) < 0.5

    def numbers(self, shape: Sequence[int], *dtypes: str) -> Array:
        """Floats or integers: of one of these dtypes, float32 more often than another."""
        dtype = np.dtype(self.of("float32", *(dtypes or ("float32", "float16", "int32", "int64"))))
        if dtype.kind == "f":
            return self.floats(shape, dtype)
        return self.ints(shape, 0 if dtype.kind == "u" else -9, 9, dtype)

    def like(self, shape: Sequence[int]) -> list[int]:
        """A shape that broadcasts with another: fewer axes, or ones."""
        kept = list(shape)[self.int(0, len(shape)) :]
        return [1 if self.maybe(0.3) else n for n in kept]

    def x(self, array: Array | None, constant: bool | None = None) -> Array | None:
        """An operand; whether it is a constant of the model is drawn if it is not said."""
        array = None if array is None else np.asarray(array)
        self.operands.append((array, self.maybe(0.15) if constant is None else constant))
        return array

    def told(self, numbers: Sequence[int] | int, dtype: Any = np.int64) -> None:
        """An operand that determines a shape: mostly a constant."""
        self.x(np.array(numbers, dtype), self.maybe(0.85))

    def set(self, **attributes: Any) -> None:
        self.attributes.update({name: value for name, value in attributes.items() if value is not None})

    def perhaps(self, **attributes: Any) -> None:
        """Attributes, each of which is there or left to its default."""
        self.set(**{name: value for name, value in attributes.items() if self.maybe()})


DRAWN: dict[str, Callable[[Draw], None]] = {}
"""How the operands and attributes of each operator are drawn."""


def draws(*names: str) -> Callable[[Callable[[Draw], None]], Callable[[Draw], None]]:
    def register(rule: Callable[[Draw], None]) -> Callable[[Draw], None]:
        DRAWN.update(dict.fromkeys(names, rule))
        return rule

    return register


# -- elementwise ---------------------------------------------------------------------------------------------------

SPECIAL = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 0.5, -0.5, 1.5, 2.5, 1.0], np.float32)


@draws("Abs", "Neg", "Sign", "Relu")
def _numbers(d: Draw) -> None:
    wide = d.name != "Relu" or d.version >= 14
    d.x(d.numbers(d.shape(0), *(("float32", "int32", "int64", "int8") if wide else ("float32",))))


@draws("Ceil", "Cos", "Cosh", "Erf", "Exp", "Floor", "Log", "Reciprocal", "Sigmoid", "Sin", "Sinh", "Softplus")
@draws("Softsign", "Sqrt", "Tan", "Tanh", "Round", "IsNaN", "Elu", "HardSigmoid", "LeakyRelu", "Selu", "Gelu", "Swish")
@draws("IsInf")
def _float(d: Draw) -> None:
    x = d.floats(d.shape(0))
    special = d.name in ("Ceil", "Floor", "Round", "IsNaN", "IsInf", "Reciprocal", "Sqrt", "Exp")
    if special and x.size and d.maybe():
        x.flat[:] = d.rng.choice(SPECIAL, x.size)
    d.x(x)
    options = {
        "Elu": {"alpha": 0.7},
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


# -- along axes ----------------------------------------------------------------------------------------------------

REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")


@draws(*(f"Reduce{kind}" for kind in REDUCTIONS))
def _reduction(d: Draw) -> None:
    shape = d.shape(0)
    kinds = ("float32", "int32") if d.name not in ("ReduceMean", "ReduceLogSum", "ReduceLogSumExp", "ReduceL2") else ()
    x = d.numbers(shape, *(kinds or ("float32",)))
    if d.name == "ReduceProd" and x.dtype.kind == "i":
        x = d.ints(shape, -1, 1, x.dtype)  # ONNX Runtime does not say what a product past int32 is
    d.x(np.abs(x) + x.dtype.type(1) if d.name == "ReduceLogSum" else x)
    axes = d.some(len(shape)) if shape and d.maybe(0.6) else None
    d.perhaps(keepdims=d.int(0, 1))
    if d.version < (13 if d.name == "ReduceSum" else 18):
        d.set(axes=axes)
        return
    if d.maybe(0.7 if axes is None else 0.2):
        d.set(noop_with_empty_axes=1)
    if axes is not None or d.maybe(0.3):
        d.told(axes or [])


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
    d.told(d.axis(len(shape)), d.of(np.int32, np.int64))
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
    d.set(k=k) if d.version < 10 else d.told([k])


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
    d.rounding = 1000  # the reciprocal of a small deviation multiplies what a mean rounded


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


# -- shapes --------------------------------------------------------------------------------------------------------


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
    d.told(d.shape(0))
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
    d.told([1 if d.maybe(0.2) else n for n in shape])


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
    d.x(d.numbers(shape), False if table else None)  # an embedding of ours, if constant: it takes no negative index
    low = -shape[axis] if d.version >= 11 else 0
    d.x(d.ints(d.shape(0, 2), low, shape[axis] - 1, d.of(np.int32, np.int64)), d.maybe(0.4))
    d.set(axis=axis)


@draws("GatherElements")
def _gather_elements(d: Draw) -> None:
    shape = d.shape()
    axis = d.axis(len(shape))
    d.x(d.numbers(shape))
    picked = [n if a != axis % len(shape) else d.int(1, 4) for a, n in enumerate(shape)]
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
    d.told(depth if d.maybe() else [depth])
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
    d.told(pads)
    if axes is not None or d.maybe():
        d.x(np.array(2, x.dtype) if d.maybe() or axes is None else None)
    if axes is not None:
        d.told([a - len(shape) if d.maybe(0.3) else a for a in axes])


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
    d.told(target)
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
        if d.maybe(0.3):  # to the end, as the specification recommends to say it
            ends[i] = 2**31 - 1 if step > 0 else -(2**31)
    d.x(d.numbers(shape))
    if d.version < 10:  # as attributes
        every = len(axes) == len(shape) and d.maybe()
        d.set(starts=starts, ends=ends, axes=None if every else [a % len(shape) for a in axes])
        return
    dtype = d.of(np.int32, np.int64)
    d.told(starts, dtype)
    d.told(ends, dtype)
    if axes != list(range(len(axes))) or steps or d.maybe():
        d.told(axes, dtype)
    if steps:
        d.told(steps, dtype)


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
        d.told(parts)


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
    d.set(axes=axes) if d.version < 13 else d.told(axes)


@draws("Tile")
def _tile(d: Draw) -> None:
    shape = d.shape()
    d.x(d.numbers(shape))
    d.told([d.int(0, 3) if d.maybe(0.1) else d.int(1, 3) for _ in shape])


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
        d.told(d.int(-4, 4))
    d.perhaps(upper=d.int(0, 1))


# -- products ------------------------------------------------------------------------------------------------------


def _stacks(d: Draw) -> tuple[list[int], list[int]]:
    """Shapes of two operands of a matrix product, of any ranks."""
    m, k, n, lead = d.int(1, 4), d.int(1, 5), d.int(1, 4), d.shape(0, 2)
    left = [k] if d.maybe(0.2) else [*d.like(lead), m, k]
    return left, [k] if d.maybe(0.2) else [*d.like(lead), k, n]


@draws("MatMul")
def _matmul(d: Draw) -> None:
    whole = d.version >= 9 and d.maybe(0.2)
    for shape in _stacks(d):
        d.x(d.ints(shape, dtype=np.int32) if whole else d.floats(shape), d.maybe(0.3))


@draws("MatMulInteger")
def _matmul_integer(d: Draw) -> None:
    left, right = _stacks(d)
    signed = d.of(np.int8, np.uint8)
    d.x(d.ints(left, 0, 255, np.uint8))
    d.x(d.ints(right, *((-128, 127) if signed is np.int8 else (0, 255)), signed))
    if d.maybe():
        d.x(d.ints([], 0, 255, np.uint8))
        if d.maybe():
            d.x(d.ints(right[-1:] if len(right) == 2 and d.maybe() else [], 0, 100, signed))


@draws("Gemm")
def _gemm(d: Draw) -> None:
    m, k, n, turned = d.int(1, 4), d.int(1, 4), d.int(1, 4), [d.int(0, 1), d.int(0, 1)]
    d.x(d.floats([k, m] if turned[0] else [m, k]))
    d.x(d.floats([n, k] if turned[1] else [k, n]), d.maybe())
    if d.version < 11 or d.maybe():
        d.x(d.floats(d.of([m, n], [n], [1, n], [m, 1], [1], [])))
    d.set(transA=turned[0] or None, transB=turned[1] or None)
    d.perhaps(alpha=0.5, beta=d.of(0.0, 2.0))


@draws("Einsum")
def _einsum(d: Draw) -> None:
    sizes = {letter: d.int(1, 4) for letter in "abcij"}
    text = d.of("ij,jk->ik", "bij,bjc->bic", "ij->ji", "ij->i", "ij->", "i,i->", "ii->i", "...ij,...jc->...ic", "ij,j")
    terms = text.replace("k", "c").split("->")[0].split(",")
    for term in terms:
        lead = [2] if "..." in term else []
        d.x(d.floats([*lead, *(sizes[letter] for letter in term.replace(".", ""))]))
    d.set(equation=text.replace("k", "c"))


def _windows(d: Draw, kernel: Sequence[int], transposed: bool = False, dilated: bool = True) -> None:
    """Strides, dilations and padding. Where the padding is automatic ONNX Runtime knows no dilations, and a stride past
    the kernel only as an error: those are left out."""
    automatic = d.of("SAME_UPPER", "SAME_LOWER") if d.maybe(0.3) else d.of(None, None, "NOTSET", "VALID")
    same = automatic is not None and automatic.startswith("SAME")
    d.perhaps(strides=[d.int(1, k if same else 3) for k in kernel])
    if dilated and not same:
        d.perhaps(dilations=[d.int(1, 2) for _ in kernel])
    d.set(auto_pad=automatic)
    if automatic in (None, "NOTSET") and d.maybe(0.7):
        d.set(pads=[d.int(0, k - 1) for _ in range(2) for k in kernel])


def _image(d: Draw, channels: int, kernel: Sequence[int]) -> Array:
    """An x in which one window fits at least."""
    return d.floats([d.int(1, 2), channels, *(2 * k + d.int(0, 4) for k in kernel)])


@draws("Conv", "ConvInteger")
def _conv(d: Draw) -> None:
    kernel, groups = [d.int(1, 3) for _ in range(d.int(1, 2))], d.int(1, 2)
    c, o = d.int(1, 2), d.int(1, 3)
    x, weight = _image(d, groups * c, kernel), d.floats([groups * o, c, *kernel])
    if d.name == "Conv":
        d.x(x)
        d.x(weight, d.maybe())
        if d.maybe():
            d.x(d.floats([groups * o]))
    else:
        d.x(d.ints(x.shape, 0, 255, np.uint8))
        d.x(d.ints(weight.shape, 0, 255, np.uint8), d.maybe())
        if d.maybe():
            d.x(d.ints([], 0, 255, np.uint8))
            if d.maybe():
                d.x(d.ints([], 0, 255, np.uint8))
    _windows(d, kernel)
    d.set(group=groups if groups > 1 else None)
    d.perhaps(kernel_shape=kernel)


@draws("ConvTranspose")
def _conv_transpose(d: Draw) -> None:
    kernel, groups = [d.int(1, 3) for _ in range(d.int(1, 2))], d.int(1, 2)
    c, o = d.int(1, 2), d.int(1, 3)
    x = d.x(_image(d, groups * c, kernel))
    d.x(d.floats([groups * c, o, *kernel]), d.maybe())
    if d.maybe():
        d.x(d.floats([groups * o]))
    _windows(d, kernel)
    d.set(group=groups if groups > 1 else None)
    d.perhaps(kernel_shape=kernel)
    strides = d.attributes.get("strides", [1] * len(kernel))
    assert x is not None
    if d.attributes.get("auto_pad") is None and "pads" not in d.attributes and d.maybe(0.3):
        reach = zip(x.shape[2:], strides, d.attributes.get("dilations", [1] * len(kernel)), kernel, strict=True)
        whole = [(n - 1) * stride + (k - 1) * dilation + 1 for n, stride, dilation, k in reach]
        d.set(output_shape=[size - d.int(0, k - 1) for size, k in zip(whole, kernel, strict=True)])
    elif not (d.attributes.get("auto_pad") or "").startswith("SAME"):
        d.perhaps(output_padding=[d.int(0, stride - 1) for stride in strides])


# -- quantization --------------------------------------------------------------------------------------------------


@draws("QuantizeLinear", "DequantizeLinear")
def _quantize(d: Draw) -> None:
    shape, kind = d.shape(), d.of(np.int8, np.uint8)
    axis = d.axis(len(shape))
    along = d.version >= 13 and d.maybe()
    scale = np.abs(d.floats(shape[axis % len(shape) :][:1] if along else [])) + np.float32(0.1)
    low, high = (-20, 20) if kind is np.int8 else (100, 140)
    zero = d.ints(scale.shape, low, high, kind)
    if d.name == "QuantizeLinear":
        d.x(d.floats(shape) * 3)
    else:
        d.x(d.ints(shape, low, high, kind))
    d.x(scale)
    with_zero = d.maybe(0.7) or (d.name == "DequantizeLinear" and kind is np.uint8)
    if with_zero:
        d.x(zero)
    if along:
        d.set(axis=axis)
    if d.name == "QuantizeLinear":
        if d.version >= 19:
            d.perhaps(saturate=1)
        if d.version >= 21 and not with_zero:
            d.perhaps(output_dtype=d.of(TensorProto.INT8, TensorProto.UINT8))
        if d.version >= 23:
            d.perhaps(precision=TensorProto.FLOAT)
    elif d.version >= 23:
        d.perhaps(output_dtype=TensorProto.FLOAT)
    if d.version >= 21 and not along and d.maybe(0.3):
        _blocked(d, kind)


def _blocked(d: Draw, kind: Any) -> None:
    """Scales of blocks of two along the last axis."""
    shape = [d.int(1, 3), 4]
    low, high = (-20, 20) if kind is np.int8 else (100, 140)
    x = d.floats(shape) * 3 if d.name == "QuantizeLinear" else d.ints(shape, low, high, kind)
    operands = [x, np.abs(d.floats([shape[0], 2])) + np.float32(0.1), d.ints([shape[0], 2], low, high, kind)]
    d.operands = [(operand, False) for operand in operands]
    d.attributes.pop("output_dtype", None)
    d.set(axis=1, block_size=2)


@draws("DynamicQuantizeLinear")
def _dynamic_quantize(d: Draw) -> None:
    d.x(d.floats(d.shape()) * 3)
    d.outputs = 3


@draws("QLinearMatMul")
def _quantized_matmul(d: Draw) -> None:
    m, k, n = d.int(1, 4), d.int(1, 5), d.int(1, 4)
    for shape in ([m, k], [k, n], None):
        if shape is not None:
            d.x(d.ints(shape, 0, 255, np.uint8))
        d.x(np.array(abs(d.r.gauss(0, 1)) + (20 if shape is None else 0.1), np.float32))
        d.x(d.ints([], 90, 150, np.uint8))


# -- images --------------------------------------------------------------------------------------------------------


@draws("AveragePool", "MaxPool", "LpPool")
def _pool(d: Draw) -> None:
    kernel = [d.int(1, 3) for _ in range(d.int(1, 3))]
    x = _image(d, 2, kernel)
    if d.name == "MaxPool" and d.version >= 12 and d.maybe(0.2):
        x = d.ints(x.shape, 0, 255, np.uint8)
    d.x(x)
    d.set(kernel_shape=kernel)
    dilated = d.version >= {"AveragePool": 19, "MaxPool": 10, "LpPool": 18}[d.name]
    _windows(d, kernel, dilated=dilated)
    if d.version >= (18 if d.name == "LpPool" else 10):
        d.perhaps(ceil_mode=d.int(0, 1))
    if d.name == "AveragePool":
        d.perhaps(count_include_pad=d.int(0, 1))
    if d.name == "MaxPool" and d.version >= 8:
        d.perhaps(storage_order=0)
    if d.name == "LpPool":
        d.perhaps(p=d.int(1, 3))


@draws("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
def _global_pool(d: Draw) -> None:
    d.x(d.floats(d.shape(3, 5)))
    if d.name == "GlobalLpPool":
        d.perhaps(p=d.int(1, 3))


@draws("Resize")
def _resize(d: Draw) -> None:
    shape = [1, d.int(1, 2), d.int(2, 6), d.int(2, 6)]
    mode = d.of("nearest", "linear", "cubic")
    d.x(d.floats(shape))
    if d.version < 11:
        d.x(np.array([1.0, 1.0, 2.0, 1.5], np.float32), True)
        d.set(mode=d.of("nearest", "linear"))
        return
    d.x(None if d.version >= 13 else np.zeros(0, np.float32), True)
    axes = d.of([2, 3], [-1, -2]) if d.version >= 18 and d.maybe() else None
    over = [shape[a] for a in axes] if axes is not None else shape
    moved = [axes is not None or i > 1 for i in range(len(over))]
    places = ["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"]
    places += ["half_pixel_symmetric"] if d.version >= 19 else []
    place, by_scale = d.of(None, *places), d.maybe()
    if by_scale:
        # Of corners that are aligned, the specification scales the size as it is, and ONNX Runtime rounds it first.
        scales = (1.0, 2.0, 3.0) if place == "align_corners" else (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
        d.x(np.array([d.of(*scales) if move else 1.0 for move in moved], np.float32), True)
    else:
        d.x(None if d.version >= 13 else np.zeros(0, np.float32), True)
        d.told([d.int(1, 9) if move else n for move, n in zip(moved, over, strict=True)])
    d.set(mode=mode, coordinate_transformation_mode=place, axes=axes)
    if mode == "nearest":
        # A place that is on an element exactly, such as 1.5 * 5/3 - 0.5, may be just below it in ONNX Runtime's floats.
        kinds = ("floor", "ceil") if by_scale else ()
        d.perhaps(nearest_mode=d.of("round_prefer_floor", "round_prefer_ceil", *kinds))
    if mode == "cubic":
        d.perhaps(cubic_coeff_a=-0.5, exclude_outside=d.int(0, 1))
    centered = d.attributes.get("coordinate_transformation_mode") in (None, "half_pixel")
    if d.version >= 18 and mode != "nearest" and centered:
        d.perhaps(antialias=d.int(0, 1))
    # With negative axes ONNX Runtime loses the policy, and of aligned corners it rounds the scaled size here, too.
    if d.version >= 18 and not by_scale and axes != [-1, -2] and place != "align_corners":
        d.perhaps(keep_aspect_ratio_policy=d.of("stretch", "not_larger", "not_smaller"))
    d.perhaps(extrapolation_value=0.5)


# -- attention -----------------------------------------------------------------------------------------------------


@draws("RotaryEmbedding")
def _rotary(d: Draw) -> None:
    batch, heads, length, width = d.int(1, 2), d.int(1, 3), d.int(1, 4), 2 * d.int(1, 4)
    part = 2 * d.int(1, width // 2) if d.maybe(0.3) else 0
    merged, positions = d.maybe(), d.maybe()
    d.x(d.floats([batch, length, heads * width] if merged else [batch, heads, length, width]))
    table = [8, (part or width) // 2] if positions else [batch, length, (part or width) // 2]
    d.x(d.floats(table))
    d.x(d.floats(table))
    if positions:
        d.x(d.ints([batch, length], 0, 7))
    d.set(num_heads=heads if merged else None, rotary_embedding_dim=part or None)
    d.perhaps(interleaved=d.int(0, 1))


@draws("Attention")
def _attention(d: Draw) -> None:
    batch, queries, groups, width, value = d.int(1, 2), d.int(1, 4), d.int(1, 2), d.int(1, 4), d.int(1, 4)
    causal = d.maybe(0.3)
    heads, keys = groups * d.int(1, 2), queries if causal else d.int(1, 4)
    merged = d.maybe()
    for length, count, size in ((queries, heads, width), (keys, groups, width), (keys, groups, value)):
        d.x(d.floats([batch, length, count * size] if merged else [batch, count, length, size]))
    if d.maybe():
        shape = d.of([queries, keys], [1, 1, queries, keys], [batch, 1, queries, keys], [batch, heads, queries, keys])
        d.x(d.floats(shape) if causal or d.maybe() else np.ones(shape, bool))
    d.set(is_causal=int(causal) or None)
    if merged:
        d.set(q_num_heads=heads, kv_num_heads=groups)
    d.perhaps(scale=0.4, softcap=2.0)


# -- models --------------------------------------------------------------------------------------------------------


@lru_cache
def _history() -> list[Any]:
    return [schema for schema in defs.get_all_schemas_with_history() if schema.domain == ""]


@lru_cache
def opsets(name: str) -> list[int]:
    """An opset for each version of an operator that is drawn."""
    versions = sorted(s.since_version for s in _history() if s.name == name and not s.deprecated)
    return sorted({max(version, OLDEST) for version in versions if version <= NEWEST}) or [17]


def drawn(name: str, seed: int) -> Case:
    """A case of an operator. A seed gives one case."""
    r = random.Random(f"{name} {seed}")
    known = opsets(name)
    opset = r.choice(known)
    opset = r.randint(opset, min([v - 1 for v in known if v > opset], default=NEWEST))
    version = defs.get_schema(name, opset, "").since_version if defs.has(name) else 1
    d = Draw(r.randrange(2**32), name, version)
    DRAWN[name](d)
    return assembled(d, opset)


def assembled(d: Draw, opset: int) -> Case:
    """The model of what was drawn. Axes without a size are called by it: all of 3 elements are one symbol, n3."""
    inputs: list[Any] = []
    held: list[Any] = []
    names: list[str] = []
    given: dict[str, Array] = {}
    symbols = {n for n in range(2, 100) if d.maybe(0.7)} if d.maybe() else set()
    sizes: dict[str, int] = {}
    for position, (array, constant) in enumerate(d.operands):
        if array is None:
            names.append("")
            continue
        name = f"x{position}"
        names.append(name)
        if constant:
            held.append(numpy_helper.from_array(np.array(array, order="C"), name))
            continue
        given[name] = array
        dims: list[Any] = [f"n{n}" if n in symbols else n for n in array.shape]
        sizes.update({text: n for text, n in zip(dims, array.shape, strict=True) if isinstance(text, str)})
        inputs.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), dims))
    made = [f"y{i}" for i in range(d.outputs)]
    node = helper.make_node(d.name, names, made, **d.attributes)
    outputs = [onnx.ValueInfoProto(name=name) for name in made]
    graph = helper.make_graph([node], "node", inputs, outputs, held)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    return Case(d.name, proto, given, sizes, d.rounding)


def attributes(name: str) -> set[str]:
    """The attributes of an operator, in the versions that are drawn."""
    return {a for opset in opsets(name) if defs.has(name) for a in defs.get_schema(name, opset, "").attributes}


def cases(seed: int) -> Iterator[Case]:
    """Cases without an end: each operator in turn, as often as it has attributes."""
    turns = [(name, k) for name in DRAWN for k in range(max(len(attributes(name)), 1))]
    for n in itertools.count():
        for name, k in turns:
            yield drawn(name, (seed * 1_000_003 + n) * 100 + k)


# -- what becomes of a case ----------------------------------------------------------------------------------------


def in_runtime(case: Case) -> list[Array] | str:
    """What ONNX Runtime answers, or why it does not."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    try:
        session = onnxruntime.InferenceSession(_with_types(case).SerializeToString(), options)
        return list(session.run(None, case.inputs))
    except Exception as error:  # its own errors have no family
        return str(error).splitlines()[0]


def _with_types(case: Case) -> onnx.ModelProto:
    """The model with its axes' sizes, so that nothing is left to guess of the outputs."""
    proto = onnx.ModelProto.FromString(case.proto.SerializeToString())
    for value in proto.graph.input:
        shape = case.inputs[value.name].shape
        for dim, size in zip(value.type.tensor_type.shape.dim, shape, strict=True):
            dim.dim_value = size
    return proto


def imported(case: Case, dims: dict[str, int] | None = None) -> Imported:
    """A case as a graph, what determines shapes given as it asks for it. Raises FrontendError."""
    static: dict[str, Any] = {}
    while True:
        try:
            return import_onnx(case.proto, static=static, dims=dims)
        except StaticArgumentNeeded as error:
            if error.argument in static:
                raise
            static[error.argument] = case.inputs[error.argument]


def answer(case: Case, made: Imported, backend: str) -> list[Array]:
    """What a graph answers after the default pipeline. Raises TreadleError."""
    graph, weights, notes = made
    given = {name: carried(kind, case.inputs[name]) for name, kind in notes.inputs.items()}
    optimized = PassManager(DEFAULT).run(graph).graph
    results = find_backend(backend).compile(optimized, Target("cpu"), weights)(**given)
    return [restored(notes.outputs[v.name], results[v.name]) for v in case.proto.graph.output]


def difference(got: Sequence[Array], wanted: Sequence[Array], rounding: int) -> str | None:
    """How results differ: in shape, dtype, or by more than so many spacings of the largest number."""
    for n, (x, y) in enumerate(zip(got, wanted, strict=True)):
        if x.shape != y.shape or x.dtype != y.dtype:
            return f"result {n} is {x.dtype}{list(x.shape)}, should be {y.dtype}{list(y.shape)}"
        if y.dtype.kind != "f":
            if not np.array_equal(x, y):
                return f"result {n} is {x.flat[:8].tolist()}, should be {y.flat[:8].tolist()}"
            continue
        finite = np.abs(y[np.isfinite(y)])
        scale = max(1.0, float(finite.max(initial=0)))
        limit = rounding * scale * float(np.finfo(y.dtype).eps)
        if not np.allclose(x.astype(np.float64), y.astype(np.float64), rtol=0, atol=limit, equal_nan=True):
            return f"result {n} is {x.flat[:8].tolist()}, should be {y.flat[:8].tolist()}"
    return None


@dataclass(frozen=True)
class Outcome:
    """What became of a case.

    verdict   same; wrong; refused (by the import, with its sizes); left (by ONNX Runtime, and not compared)
    symbolic  of the import without sizes: same, refused, or none where every size is known
    """

    verdict: str
    why: str = ""
    symbolic: str = "none"


def outcome(case: Case, backend: str = "numpy") -> Outcome:
    """Import and run a case, with its sizes and without, and compare.

    A refusal at import is an answer, unless it says that the node cannot be read. Where sizes are unknown, one at the
    call is an answer as well: a cut that is past the end for some of them. Anything else that is raised is wrong.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = in_runtime(case)
        found = [_one_way(case, backend, dims, wanted) for dims in ([case.sizes, None] if case.sizes else [{}])]
    symbolic = found[1].verdict if len(found) > 1 else "none"
    for one in found:
        if one.verdict == "wrong":
            return one
    if isinstance(wanted, str):
        return Outcome("left", wanted, symbolic)
    return Outcome(found[0].verdict, next((one.why for one in found if one.why), ""), symbolic)


def _one_way(case: Case, backend: str, dims: dict[str, int] | None, wanted: list[Array] | str) -> Outcome:
    """What becomes of a case with sizes for its axes, or (None) without."""
    without = " (without sizes)" if dims is None else ""
    try:
        made = imported(case, dims)
    except FrontendError as error:
        damaged = "cannot be read" in error.what
        return Outcome("wrong" if damaged else "refused", f"{error.what}{f': {error.received}' if damaged else ''}")
    try:
        got = answer(case, made, backend)
    except TreadleError as error:
        at_call = dims is None and not isinstance(error, PassError)
        return Outcome("refused" if at_call else "wrong", f"{error.what}{without}")
    except Exception as error:
        return Outcome("wrong", f"{type(error).__name__}: {error}{without}")
    if isinstance(wanted, str):
        return Outcome("left")
    apart = difference(got, wanted, case.rounding)
    return Outcome("same") if apart is None else Outcome("wrong", apart + without)


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--count", type=int, default=5000, help="nodes (default 5000)")
    parser.add_argument("--seed", type=int, default=0, help="what they are drawn from (default 0)")
    parser.add_argument("--only", choices=sorted(DRAWN), metavar="OPERATOR", help="this operator alone")
    parser.add_argument("--backend", default="numpy", help="what runs them (default numpy)")
    parser.add_argument("--reasons", type=int, default=40, help="how many reasons for refusals are printed")
    asked = parser.parse_args()
    several = cases(asked.seed) if not asked.only else (drawn(asked.only, asked.seed + n) for n in itertools.count())
    verdicts: Counter[str] = Counter()
    symbolic: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for case in itertools.islice(several, asked.count):
        found = outcome(case, asked.backend)
        verdicts[found.verdict] += 1
        symbolic[found.symbolic] += 1
        if found.verdict == "wrong":
            print(f"{case}\n    {found.why}", flush=True)
        elif "refused" in (found.verdict, found.symbolic) or found.verdict == "left":
            by = found.verdict if found.verdict != "same" else "refused without sizes"
            reasons[f"{by}: {case.operator}: {found.why}"] += 1
    for reason, times in reasons.most_common(asked.reasons):
        print(f"{times:5}  {reason}")
    print(f"seed {asked.seed}, {asked.backend}: {dict(verdicts)}; without sizes: {dict(symbolic)}")
    return 1 if verdicts["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())

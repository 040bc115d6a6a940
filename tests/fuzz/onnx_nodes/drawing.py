"""A node while it is drawn: its operands, its attributes, and the resulting model."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray[Any, Any]

NEWEST = 24
"""The newest opset drawn: the last one that ONNX Runtime supports in full."""
OLDEST = 7
TYPES = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16", TensorProto.INT64: "int64"}


@dataclass
class Case:
    """A model, its inputs, and the tolerance of the results in spacings of the result's dtype."""

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
        text = ", ".join(f"{a.name}={helper.get_attribute_value(a)!r}"[:80] for a in node.attribute)
        return f"{self.operator}({', '.join(operands)}; {text}) opset {self.proto.opset_import[0].version}"


class Draw:
    """One node while it is drawn: `x` adds an operand, `set` an attribute.

    version   of the operator
    r, rng    the random generators
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
        """Draw the sizes of a tensor whose rank is from low to high."""
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
        """Floats or integers of one of these dtypes; float32 more often than others."""
        dtype = np.dtype(self.of("float32", *(dtypes or ("float32", "float16", "int32", "int64"))))
        if dtype.kind == "f":
            return self.floats(shape, dtype)
        return self.ints(shape, 0 if dtype.kind == "u" else -9, 9, dtype)

    def like(self, shape: Sequence[int]) -> list[int]:
        """A shape that broadcasts with another: fewer axes, or ones."""
        kept = list(shape)[self.int(0, len(shape)) :]
        return [1 if self.maybe(0.3) else n for n in kept]

    def x(self, array: Array | None, constant: bool | None = None) -> Array | None:
        """Add an operand; `None` draws whether it is a constant of the model."""
        array = None if array is None else np.asarray(array)
        self.operands.append((array, self.maybe(0.15) if constant is None else constant))
        return array

    def shaping(self, numbers: Sequence[int] | int, dtype: Any = np.int64) -> None:
        """Add an operand that determines a shape: mostly a constant."""
        self.x(np.array(numbers, dtype), self.maybe(0.85))

    def set(self, **attributes: Any) -> None:
        self.attributes.update({name: value for name, value in attributes.items() if value is not None})

    def perhaps(self, **attributes: Any) -> None:
        """Set attributes, each of them or its default."""
        self.set(**{name: value for name, value in attributes.items() if self.maybe()})


DRAWN: dict[str, Callable[[Draw], None]] = {}
"""Functions that draw the operands and attributes of each operator."""


def draws(*names: str) -> Callable[[Callable[[Draw], None]], Callable[[Draw], None]]:
    def register(rule: Callable[[Draw], None]) -> Callable[[Draw], None]:
        DRAWN.update(dict.fromkeys(names, rule))
        return rule

    return register

"""Samples: operand types and attributes on which an op is tested, and how values are drawn for them.

S("f32[2,3,8]", "f32[8]", eps=1e-5)
S("f32[5,3]", "i64[2,4] < 5")        integers from 0 to 4
S("f32[3] > 0")                      positive floats, away from zero; positive integers
S("f32[3] distinct")                 all elements distinct: an op with ties (max, top-k) has a gradient there
S("f32[2,8]", None, "f32[8]")        an absent optional operand
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from treadle.ir.errors import GraphError
from treadle.ir.types import DType, Type, f64, parse_type


@dataclass(frozen=True)
class SampleOperand:
    """One operand of a sample: its type and a constraint, `< n`, `> 0` or `distinct`."""

    type: Type
    below: int | None = None
    positive: bool = False
    distinct: bool = False

    def draw(self, rng: np.random.Generator, dtype: DType | None = None) -> np.ndarray[Any, Any]:
        """Draw an array of the type; `dtype` replaces a float dtype."""
        shape = self.type.static_shape
        kind = dtype if dtype is not None and self.type.dtype.is_float else self.type.dtype
        if shape is None or kind.numpy is None:
            raise GraphError(f"a sample needs a static shape and a NumPy dtype, not {self.type}")
        if kind.kind == "bool":
            return rng.random(shape) < 0.5
        if kind.is_int and self.distinct:
            return rng.permutation(int(np.prod(shape))).reshape(shape).astype(kind.numpy)
        if kind.is_int:
            return rng.integers(int(self.positive), self.below or 7, shape).astype(kind.numpy)
        if self.distinct:
            count = int(np.prod(shape))
            return (rng.permutation(count).reshape(shape) / max(count, 1) * 4 - 2).astype(kind.numpy)
        drawn = rng.standard_normal(shape)
        return (np.abs(drawn) + 0.5 if self.positive else drawn).astype(kind.numpy)


class Sample:
    """Operands and attributes for one application of an op."""

    def __init__(self, *operands: str | None, **attributes: Any) -> None:
        self.operands = tuple(None if text is None else _parse(text) for text in operands)
        self.attributes = attributes
        self.text = ", ".join([str(o) for o in operands] + [f"{k}={v}" for k, v in attributes.items()])

    @property
    def types(self) -> tuple[Type | None, ...]:
        return tuple(None if o is None else o.type for o in self.operands)

    def draw(self, seed: int, dtype: DType | None = f64) -> list[np.ndarray[Any, Any] | None]:
        """Draw values for the operands, floats as `dtype` (None: in the operands' own dtypes)."""
        rng = np.random.default_rng(seed)
        return [None if o is None else o.draw(rng, dtype) for o in self.operands]

    def __repr__(self) -> str:
        return f"S({self.text})"


S = Sample


def _parse(text: str) -> SampleOperand:
    match = re.fullmatch(r"\s*(\w+\s*\[[^\]]*\])\s*(?:<\s*(\d+)|(>\s*0)|(distinct))?\s*", text)
    if match is None:
        raise GraphError(f"not a sample operand: {text!r}")
    return SampleOperand(parse_type(match[1]), int(match[2]) if match[2] else None, bool(match[3]), bool(match[4]))

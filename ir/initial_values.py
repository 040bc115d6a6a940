"""Initial values of parameters that no checkpoint contains."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from treadle.ir.errors import GraphError
from treadle.ir.types import DType

_KINDS = ("zeros", "ones", "constant", "normal", "uniform")


@dataclass(frozen=True, slots=True)
class Init:
    """An initializer: `zeros`, `ones`, `constant(2.5)`, `normal(0.02)`, `uniform(0.1)`.

    kind   the word before the parenthesis
    scale  the constant, the standard deviation, or the bound of a uniform distribution around 0; None: 1, for a
           constant 0

    Raises GraphError for an unknown kind, and for a scale that is not a number.
    """

    kind: str
    scale: float | None = None

    def __post_init__(self) -> None:
        scale: object = self.scale
        if self.kind not in _KINDS:
            raise GraphError(f"unknown initial value {self.kind!r:.80}", hint="one of " + ", ".join(_KINDS))
        if scale is not None and (isinstance(scale, bool) or not isinstance(scale, Real)):
            raise GraphError(
                f"the scale of the initial value {self.kind} must be a number",
                received=f"{scale!r:.80}",
                hint=f't.Init("{self.kind}", 0.02)',
            )

    def __str__(self) -> str:
        return self.kind if self.scale is None else f"{self.kind}({self.scale!r})"

    def draw(self, shape: tuple[int, ...], dtype: DType, rng: np.random.Generator) -> np.ndarray[Any, Any]:
        """Return an array of initial values. Raises GraphError for a dtype that NumPy lacks."""
        if dtype.numpy is None:
            raise GraphError(f"initial values cannot be drawn in {dtype}")
        scale = np.float32(1.0 if self.scale is None else self.scale)
        match self.kind:
            case "zeros":
                return np.zeros(shape, dtype.numpy)
            case "ones":
                return np.ones(shape, dtype.numpy)
            case "constant":
                return np.full(shape, self.scale or 0.0, dtype.numpy)
            case "normal":
                drawn = rng.standard_normal(shape, np.float32) * scale
            case _:  # uniform
                drawn = (rng.random(shape, np.float32) * 2 - 1) * scale
        return drawn.astype(dtype.numpy, copy=False)

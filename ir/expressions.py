"""Expressions: a value, its builder, and Python operators that add nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from treadle.ir.errors import FrontendError
from treadle.ir.graph import Value
from treadle.ir.op_registry import find_op
from treadle.ir.sizing.sizes import Size
from treadle.ir.tensors.methods import TensorMethods
from treadle.ir.types import DType, Type

if TYPE_CHECKING:
    from treadle.ir.builder import Builder

ExprLike: TypeAlias = "Expr | Value | Size | float | np.generic | np.ndarray[Any, Any] | list[Any] | tuple[Any, ...]"
"""An operand as an op accepts it: numbers and arrays become constants, and a size becomes its value at each call."""


class Expr(TensorMethods):
    """A value and its builder. Operators build nodes; a number gets the dtype of the other operand."""

    __slots__ = ("builder", "value")

    def __init__(self, builder: Builder, value: Value | None = None) -> None:
        if not isinstance(value, Value):  # called as a user's word, as `torch.Tensor` is
            what = "treadle.Tensor is the type of values in a model, and makes none"
            raise FrontendError(what, hint=f"treadle.constant({builder!r:.60}), inside a model")
        self.builder = builder
        self.value = value

    @property
    def type(self) -> Type:
        return self.value.type

    @property
    def dtype(self) -> DType:
        return self.value.type.dtype

    @property
    def shape(self) -> tuple[Size, ...]:
        return self.value.type.shape

    @property
    def rank(self) -> int:
        return self.value.type.rank

    def cast(self, to: DType | str) -> Expr:
        """Return the value cast to another dtype, or the value itself if it has that dtype."""
        return self if str(self.dtype) == str(to) else self._apply("cast", self, to=to)

    def _apply(self, op: str, *operands: Any, **attributes: Any) -> Expr:
        """Apply the op of an operator. In errors the operand is named x, as in a formula."""
        result = self.builder._add(find_op(op), operands, "x", attributes)
        assert isinstance(result, Expr)
        return result

    def __add__(self, other: ExprLike) -> Expr:
        return self._apply("add", self, other)

    def __radd__(self, other: ExprLike) -> Expr:
        return self._apply("add", other, self)

    def __sub__(self, other: ExprLike) -> Expr:
        return self._apply("sub", self, other)

    def __rsub__(self, other: ExprLike) -> Expr:
        return self._apply("sub", other, self)

    def __mul__(self, other: ExprLike) -> Expr:
        return self._apply("mul", self, other)

    def __rmul__(self, other: ExprLike) -> Expr:
        return self._apply("mul", other, self)

    def __truediv__(self, other: ExprLike) -> Expr:
        return self._apply("div", self, other)

    def __rtruediv__(self, other: ExprLike) -> Expr:
        return self._apply("div", other, self)

    def __floordiv__(self, other: ExprLike) -> Expr:
        return self._apply("floor_divide", self, other)

    def __rfloordiv__(self, other: ExprLike) -> Expr:
        return self._apply("floor_divide", other, self)

    def __mod__(self, other: ExprLike) -> Expr:
        return self._apply("mod", self, other)

    def __rmod__(self, other: ExprLike) -> Expr:
        return self._apply("mod", other, self)

    def __pow__(self, other: ExprLike) -> Expr:
        return self._apply("pow", self, other)

    def __rpow__(self, other: ExprLike) -> Expr:
        return self._apply("pow", other, self)

    def __neg__(self) -> Expr:
        return self._apply("neg", self)

    def __abs__(self) -> Expr:
        return self._apply("abs", self)

    def __matmul__(self, other: ExprLike) -> Expr:
        return self._apply("matmul", self, other)

    def __rmatmul__(self, other: ExprLike) -> Expr:
        return self._apply("matmul", other, self)

    def __lt__(self, other: ExprLike) -> Expr:
        return self._apply("less", self, other)

    def __le__(self, other: ExprLike) -> Expr:
        return self._apply("less_equal", self, other)

    def __gt__(self, other: ExprLike) -> Expr:
        return self._apply("greater", self, other)

    def __ge__(self, other: ExprLike) -> Expr:
        return self._apply("greater_equal", self, other)

    def __eq__(self, other: ExprLike | None) -> Expr:  # type: ignore[override]  # element by element, as < is
        return NotImplemented if other is None else self._apply("equal", self, other)

    def __ne__(self, other: ExprLike | None) -> Expr:  # type: ignore[override]
        return NotImplemented if other is None else self._apply("not_equal", self, other)

    __hash__ = object.__hash__

    def __and__(self, other: ExprLike) -> Expr:
        return self._apply("logical_and", self, other)

    def __or__(self, other: ExprLike) -> Expr:
        return self._apply("logical_or", self, other)

    def __invert__(self) -> Expr:
        return self._apply("logical_not", self)

    def __repr__(self) -> str:
        return f"{self.value.name}: {self.type}"

"""PyTorch's casts of a tensor, for a model's tensors: `x.float()`, `x.to(t.f16)`.

They have a class of their own, because their names hide types in annotations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from treadle.ir.tensors.elementwise import ElementwiseMethods
from treadle.ir.types import DTYPES, DType, bf16, boolean, f16, f32, f64, i32, i64
from treadle.ir.wording.other_spellings import DEVICES, OTHER_METHODS, dtype_word

if TYPE_CHECKING:
    from treadle.ir.expressions import Expr


class CastMethods(ElementwiseMethods):
    """Base of `Expr` with the casts."""

    __slots__ = ()

    if TYPE_CHECKING:

        def cast(self, to: DType | str) -> Expr: ...

    def to(self, dtype: DType | str | Expr) -> Expr:
        """Return the tensor cast to a dtype such as `t.f16`, or to the dtype of another tensor."""
        asked: object = dtype.dtype if isinstance(dtype, CastMethods) else dtype
        if isinstance(asked, str) and asked in DTYPES:
            asked = DTYPES[asked]
        if not isinstance(asked, DType):
            is_device = isinstance(asked, int) or str(asked).partition(":")[0] in DEVICES
            raise self._refusal(
                f".to takes a dtype of Treadle, not {str(asked)[:80]!r}",
                OTHER_METHODS["cuda"] if is_device else f"x.to({dtype_word(asked) or 't.f32'})",
            )
        return self.cast(asked)

    def type_as(self, other: Expr) -> Expr:
        """Return the tensor cast to the dtype of another tensor."""
        return self.to(other.dtype)

    def double(self) -> Expr:
        """Return the tensor cast to f64."""
        return self.to(f64)

    def half(self) -> Expr:
        """Return the tensor cast to f16."""
        return self.to(f16)

    def bfloat16(self) -> Expr:
        """Return the tensor cast to bf16."""
        return self.to(bf16)

    def long(self) -> Expr:
        """Return the tensor cast to i64."""
        return self.to(i64)

    def float(self) -> Expr:
        """Return the tensor cast to f32."""
        return self.to(f32)

    def int(self) -> Expr:
        """Return the tensor cast to i32."""
        return self.to(i32)

    def bool(self) -> Expr:
        """Return True where an element is not 0."""
        return self.to(boolean)

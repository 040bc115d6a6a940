"""The choice between one rounding and two where a product is added: made here, in the code that is emitted.

    x * y + z       one expression: rounded once, by the instruction for it where the instruction set has one
    p = k.let(x * y);  p + z            two values: the product is rounded, and then the sum

Left to itself, LLVM fuses a product with a sum if both end up in one block of the code and nothing else reads the
product. That differs between two tilings of one kernel, or between full vectors and what is left of a row, and with
it the last bit of an element. So it is given `llvm.fmuladd` for the first form, and for every other product
`llvm.arithmetic.fence`, across which it does not look. The fence itself is no instruction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from tvm import tirx
from tvm.ir import Call, Op
from tvm.target.codegen import llvm_lookup_intrinsic_id

Expr = Any

FUSED = "llvm.fmuladd"
"""LLVM's function of x, y and z that is x * y + z."""
ROUNDED = "llvm.arithmetic.fence"
"""LLVM's function of x that is x, a product that stays one."""

_PAIRS: tuple[type, ...] = (tirx.Add, tirx.Sub, tirx.Mul, tirx.Div, tirx.FloorDiv, tirx.FloorMod, tirx.Min, tirx.Max)
_PAIRS += (tirx.EQ, tirx.NE, tirx.LT, tirx.LE, tirx.GT, tirx.GE, tirx.And, tirx.Or)
_PAIRS += (tirx.LShift, tirx.RShift, tirx.BitwiseAnd, tirx.BitwiseOr, tirx.BitwiseXor)
_OPERANDS: Mapping[type, Callable[[Any], Sequence[Expr]]] = {
    **{kind: lambda x: (x.a, x.b) for kind in _PAIRS},
    tirx.Not: lambda x: (x.a,),
    tirx.Select: lambda x: (x.condition, x.true_value, x.false_value),
    tirx.Cast: lambda x: (x.value,),
    tirx.Broadcast: lambda x: (x.value,),
    tirx.Shuffle: lambda x: x.vectors,
    Call: lambda x: x.args,
}
"""The operands of an expression, by its kind; of all others nothing is a product that is computed."""
_AGAIN: Mapping[type, Callable[[Any, Sequence[Expr]], Expr]] = {
    tirx.Cast: lambda x, operands: tirx.Cast(x.ty, *operands),
    tirx.Broadcast: lambda x, operands: tirx.Broadcast(*operands, x.lanes),
    tirx.Shuffle: lambda x, operands: tirx.Shuffle(operands, x.indices),
    Call: lambda x, operands: Call(x.op, operands, x.attrs, x.ty_args, ret_ty=x.ty),
}
"""An expression with other operands, where that says more than its kind and these."""


def with_fused_products(value: Expr) -> Expr:
    """The expression, in which every product of floats is fused with what it is added to, or rounded by itself.

    Of a sum of two products the first one is fused.
    """
    made = _decided(value)
    return value if made is None else made


def _decided(x: Expr) -> Expr | None:
    """None: there is no product of floats in it."""
    kind = type(x)
    if kind not in _OPERANDS:
        return None
    if kind in (tirx.Add, tirx.Sub) and (tirx.Mul in (type(x.a), type(x.b))) and _is_float(x):
        return _fused(x, subtracted=kind is tirx.Sub)
    before = _OPERANDS[kind](x)
    after = [_decided(operand) for operand in before]
    made = None
    if any(operand is not None for operand in after):
        operands = [old if new is None else new for old, new in zip(before, after, strict=True)]
        made = _AGAIN[kind](x, operands) if kind in _AGAIN else kind(*operands)
    if kind is tirx.Mul and _is_float(x):
        return _intrinsic(ROUNDED, x if made is None else made)
    return made


def _fused(x: Expr, *, subtracted: bool) -> Expr:
    first = type(x.a) is tirx.Mul
    product, rest = (x.a, x.b) if first else (x.b, x.a)
    left, right, rest = map(with_fused_products, (product.a, product.b, rest))
    if subtracted:
        left, rest = (left, _minus(rest)) if first else (_minus(left), rest)
    return _intrinsic(FUSED, left, right, rest)


def _minus(x: Expr) -> Expr:
    """-x, as LLVM knows it; TVM would multiply by -1."""
    dtype = x.ty.dtype
    zero, lanes = tirx.FloatImm(f"float{dtype.bits}", -0.0), dtype.lanes
    return tirx.Sub(tirx.Broadcast(zero, lanes) if lanes > 1 else zero, x)


def _is_float(x: Expr) -> bool:
    return str(x.ty).startswith("float")


def _intrinsic(name: str, *operands: Expr) -> Expr:
    op, number = _named(name)
    return Call(op, [number, *operands], ret_ty=operands[0].ty)


@cache
def _named(name: str) -> tuple[Any, Any]:
    return Op.get("tirx.call_llvm_pure_intrin"), tirx.const(llvm_lookup_intrinsic_id(name), "uint32")

"""Rounding of products that are added: the emitted code states if there is one rounding or two.

    x * y + z       one expression: rounded once, by one instruction if the instruction set has it
    p = k.let(x * y);  p + z            two values: the product is rounded, and then the sum

By default, LLVM fuses a product with a sum if both are in one basic block and nothing else reads the product. This
differs between two tilings of one kernel, or between full vectors and the tail of a row, and changes the last bit of an
element. Therefore the first form is emitted as `llvm.fmuladd`, and every other product is wrapped in
`llvm.arithmetic.fence`, which blocks fusion. The fence generates no instruction.
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
"""Name of LLVM's intrinsic that computes x * y + z."""
ROUNDED = "llvm.arithmetic.fence"
"""Name of LLVM's intrinsic that returns x and prevents that its product is fused."""

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
"""Functions that return the operands of an expression, by the kind of expression. Other kinds contain no products."""
_AGAIN: Mapping[type, Callable[[Any, Sequence[Expr]], Expr]] = {
    tirx.Cast: lambda x, operands: tirx.Cast(x.ty, *operands),
    tirx.Broadcast: lambda x, operands: tirx.Broadcast(*operands, x.lanes),
    tirx.Shuffle: lambda x, operands: tirx.Shuffle(operands, x.indices),
    Call: lambda x, operands: Call(x.op, operands, x.attrs, x.ty_args, ret_ty=x.ty),
}
"""Functions that rebuild an expression with other operands, for kinds with further attributes."""


def with_fused_products(value: Expr) -> Expr:
    """Return the expression with every product of floats either fused with its sum or rounded separately.

    In a sum of two products, the first product is fused.
    """
    made = _decided(value)
    return value if made is None else made


def _decided(x: Expr) -> Expr | None:
    """Return the expression rewritten in this way, or None if it contains no product of floats."""
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
    """Return -x in LLVM's canonical form; TVM would multiply by -1."""
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

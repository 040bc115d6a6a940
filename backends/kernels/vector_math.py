"""Elementwise functions as vector code: what a chain's instructions are.

Every function works for any number of lanes and gives the same bits for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from treadle.ir.types import DTYPES, DType, f32

if TYPE_CHECKING:
    from treadle.backends.kernels.emitter import Emitter, Expr

Typed = tuple[Any, DType]


def emit(k: Emitter, op: str, operands: Sequence[Typed], dtype: DType, lanes: int, **attributes: Any) -> Expr:
    """The value of an op on vectors of so many lanes; `op` is a key of FUNCTIONS."""
    if op == "constant":
        return k.number(attributes["value"], dtype, lanes)
    if op == "cast":
        ((x, held),) = operands
        return x if held is dtype else k.cast(x, dtype, lanes)
    function = FUNCTIONS[op]
    narrow = dtype.name in ("f16", "bf16")
    values = [k.cast(x, f32, lanes) if held.name in ("f16", "bf16") else x for x, held in operands]
    inner = f32 if operands[-1][1].name in ("f16", "bf16") else operands[-1][1]
    made = function(k, inner, lanes, *values, **attributes)
    return k.cast(made, dtype, lanes) if narrow else made


def _add(k: Emitter, dtype: DType, lanes: int, x: Expr, y: Expr) -> Expr:
    return x + y


def _sub(k: Emitter, dtype: DType, lanes: int, x: Expr, y: Expr) -> Expr:
    return x - y


def _mul(k: Emitter, dtype: DType, lanes: int, x: Expr, y: Expr) -> Expr:
    return x * y


def _exp(k: Emitter, dtype: DType, lanes: int, x: Expr) -> Expr:
    if dtype is not f32:
        raise NotImplementedError
    return exp(k, x, lanes)


def exp(k: Emitter, x: Expr, lanes: int) -> Expr:
    """e^x in float32, clamped to where the result is a normal number (Cephes' polynomial)."""
    n = lambda value: k.number(value, f32, lanes)  # noqa: E731
    x = k.let(k.greatest(k.least(x, n(88.0)), n(-87.3)))
    e = k.let(k.nearest(x * n(1.4426950408889634)))
    r = k.let(x - e * n(0.693359375) - e * n(-2.12194440e-4))
    p = n(1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = p * r + n(c)
    power = k.shift_left(
        k.cast(e, DTYPES["i32"], lanes) + k.number(127, DTYPES["i32"], lanes), k.number(23, DTYPES["i32"], lanes)
    )
    return (p * (r * r) + r + n(1.0)) * k.bits(power, f32, lanes)


def _gelu(k: Emitter, dtype: DType, lanes: int, x: Expr) -> Expr:
    n = lambda value: k.number(value, f32, lanes)  # noqa: E731
    z = k.let(k.greatest(k.least(x * n(0.7071067811865476), n(3.7439211627767994)), n(-3.7439211627767994)))
    z2 = k.let(z * z)
    p = n(2.2905065861350646e-4)
    for c in (3.4082910107109506e-3, 5.0955695062380861e-2, 1.8520832239976145e-1, 1.128379143519084):
        p = p * z2 + n(c)
    q = n(-1.1791602954361697e-7)
    for c in (
        2.3547966471313185e-5,
        1.0179625278914885e-3,
        1.4070470171167667e-2,
        1.1098505178285362e-1,
        4.9746925110067538e-1,
        1.0,
    ):
        q = q * z2 + n(c)
    half = k.let(x * n(0.5))
    return half * (z * p / q) + half


FUNCTIONS: Mapping[str, Callable[..., Expr]] = {
    "add": _add,
    "sub": _sub,
    "mul": _mul,
    "exp": _exp,
    "gelu": _gelu,
}
"""Op name -> the function; `cast` and `constant` beside them."""

POINTWISE = frozenset({*FUNCTIONS, "cast"})
"""The ops that a chain may hold."""

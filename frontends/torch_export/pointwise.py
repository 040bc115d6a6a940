"""ATen operators element by element: arithmetic, comparisons, logic, selection, functions, conversions."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce

from treadle.frontends.recipes.activations import exponential_unit
from treadle.frontends.recipes.quotients import remainder_like_dividend, truncated_quotient
from treadle.frontends.torch_export.operators import Made, TorchSite, operator
from treadle.frontends.torch_export.shapes import expanded
from treadle.ir.builder import Builder, Expr
from treadle.ir.types import DType, f32

# -- identities --------------------------------------------------------------------------------------------------


@operator("alias.default", "clone.default", "contiguous.default")
@operator("lift_fresh_copy.default", "lift_fresh.default", "lift.default", "positive.default")
def _same(site: TorchSite) -> Made:
    return site.x("self")


@operator("detach.default", "detach_.default")
def _detached(site: TorchSite) -> Made:
    x = site.x("self")
    stops = x.dtype.is_float and x.value.literal is None
    return site.b.stop_gradient(x) if stops else x


@operator("dropout.default", "feature_dropout.default", "alpha_dropout.default")
def _dropout(site: TorchSite) -> Made:
    return _not_dropped(site, "training=self.training")


@operator("native_dropout.default")
def _native_dropout(site: TorchSite) -> Made:
    return [_not_dropped(site, "train=self.training"), None]


def _not_dropped(site: TorchSite, argument: str) -> Expr:
    if site.flag("train") and site.real("p") != 0:
        site.refuse_training("dropout in training mode is not supported", argument)
    return site.x("input")


@operator("to.dtype", "to.dtype_layout", "to.device", "to.other", "_to_copy.default", "type_as.default")
def _converted(site: TorchSite) -> Made:
    return site.x("self").cast(site.dtype())


# -- arithmetic ----------------------------------------------------------------------------------------------------


def _both(site: TorchSite, dtype: DType) -> tuple[Expr, Expr]:
    return site.operand("self", dtype), site.operand("other", dtype)


def _scaled(site: TorchSite, y: Expr) -> Expr:
    alpha = site.real("alpha")
    return y if alpha == 1 else y * (alpha if y.dtype.is_float else int(alpha))


@operator("add.Tensor", "add.Scalar")
def _add(site: TorchSite) -> Made:
    if site.dtype().kind == "bool":
        x, y = _both(site, site.dtype())
        return x | y if site.real("alpha") else expanded(site.b, x, site.shape())
    x, y = _both(site, site.dtype())
    return x + _scaled(site, y)


@operator("sub.Tensor", "sub.Scalar")
def _sub(site: TorchSite) -> Made:
    x, y = _both(site, site.dtype())
    return x - _scaled(site, y)


@operator("rsub.Tensor", "rsub.Scalar")
def _rsub(site: TorchSite) -> Made:
    x, y = _both(site, site.dtype())
    return y - _scaled(site, x)


@operator("mul.Tensor", "mul.Scalar")
def _mul(site: TorchSite) -> Made:
    x, y = _both(site, site.dtype())
    return x & y if site.dtype().kind == "bool" else x * y


@operator("div.Tensor", "div.Scalar", "true_divide.Tensor")
def _div(site: TorchSite) -> Made:
    x, y = _both(site, site.dtype())
    return x / y


@operator("div.Tensor_mode", "div.Scalar_mode")
def _rounded_div(site: TorchSite) -> Made:
    mode, dtype = site.given("rounding_mode"), site.dtype()
    x, y = _both(site, dtype)
    if mode is None:
        return x / y
    if mode == "floor":
        return x // y
    return _truncated(site, x / y) if dtype.is_float else truncated_quotient(site.b, x, y)


def _truncated(site: TorchSite, x: Expr) -> Expr:
    b = site.b
    return b.where(x < 0.0, -b.floor(-x), b.floor(x))


@operator("floor_divide.default", "floor_divide.Scalar")
def _floor_divide(site: TorchSite) -> Made:
    x, y = _both(site, site.dtype())
    return x // y


@operator("remainder.Tensor", "remainder.Scalar")
def _remainder(site: TorchSite) -> Made:
    x, y = _both(site, site.dtype())
    return site.b.mod(x, y)


@operator("fmod.Tensor", "fmod.Scalar")
def _fmod(site: TorchSite) -> Made:
    x, y = _both(site, site.dtype())
    if not site.dtype().is_float:
        return x - truncated_quotient(site.b, x, y) * y
    return remainder_like_dividend(site.b, x, y)


@operator("pow.Tensor_Scalar")
def _power(site: TorchSite) -> Made:
    b, dtype, exponent = site.b, site.dtype(), site.real("exponent")
    x = site.operand("self", dtype)
    if exponent in (2, 3, 4) and (dtype.is_float or dtype.is_int):
        return reduce(lambda y, _: y * x, range(int(exponent) - 1), x)
    if exponent == 1:
        return x
    if not dtype.is_float:
        site.refuse(f"an integer to the power of {exponent:g} is not supported")
    if exponent == 0.5:
        return b.sqrt(x)
    return b.rsqrt(x) if exponent == -0.5 else b.reciprocal(x) if exponent == -1 else b.pow(x, exponent)


@operator("pow.Tensor_Tensor", "pow.Scalar")
def _powers(site: TorchSite) -> Made:
    dtype = site.dtype()
    if not dtype.is_float:
        site.refuse("powers of integers are not supported")
    return site.b.pow(site.operand("self", dtype), site.operand("exponent", dtype))


def _extremum(ours: str) -> Callable[[TorchSite], Made]:
    def handler(site: TorchSite) -> Made:
        x, y = _both(site, site.dtype())
        if x.dtype.kind == "bool":
            return x | y if ours == "maximum" else x & y
        return site.b.apply(ours, x, y)

    return handler


operator("maximum.default", "max.other")(_extremum("maximum"))
operator("minimum.default", "min.other")(_extremum("minimum"))


@operator("clamp.default", "clamp.Tensor", "clip.default")
def _clamp(site: TorchSite) -> Made:
    low, high = (name if site.given(name) is not None else None for name in ("min", "max"))
    return _within(site, low, high)


@operator("hardtanh.default")
def _hardtanh(site: TorchSite) -> Made:
    """Build hardtanh. The gradient is 0 at the bounds."""
    return _within(site, "min_val", "max_val", ties="y")


@operator("clamp_min.default", "clamp_min.Tensor")
def _clamp_min(site: TorchSite) -> Made:
    return _within(site, "min", None)


@operator("clamp_max.default", "clamp_max.Tensor")
def _clamp_max(site: TorchSite) -> Made:
    return _within(site, None, "max")


def _within(site: TorchSite, low: str | None, high: str | None, ties: str = "x") -> Expr:
    """Return x clamped to bounds; if the bounds cross, the upper bound wins. `ties` is the operand that gets the
    gradient at a bound: x for clamp, whose gradient there differs between versions of PyTorch.
    """
    b, dtype = site.b, site.dtype()
    x = site.operand("self", dtype)
    if low is not None:
        x = b.maximum(x, site.operand(low, dtype), ties=ties)
    return x if high is None else b.minimum(x, site.operand(high, dtype), ties=ties)


# -- comparisons, logic, selection ---------------------------------------------------------------------------------


def _comparison(name: str, ours: str) -> None:
    @operator(f"{name}.Tensor", f"{name}.Scalar")
    def _compared(site: TorchSite) -> Made:
        dtype = site.promoted("self", "other")
        if dtype.kind == "bool" and ours not in ("equal", "not_equal"):
            site.refuse("bools are not supported")
        return site.b.apply(ours, *_both(site, dtype))


_comparison("eq", "equal")
_comparison("ne", "not_equal")
_comparison("gt", "greater")
_comparison("ge", "greater_equal")
_comparison("lt", "less")
_comparison("le", "less_equal")


def _logical(site: TorchSite, bitwise: bool) -> tuple[Expr, Expr]:
    if bitwise and site.dtype().kind != "bool":
        site.refuse("integers are not supported")
    bools = site.dtype()
    return site.operand("self", bools), site.operand("other", bools)


def _logic(combine: Callable[[TorchSite, Expr, Expr], Expr], *names: str) -> None:
    for name in names:
        bitwise = not name.startswith("logical")

        @operator(name)
        def _combined(site: TorchSite, bitwise: bool = bitwise) -> Made:
            return combine(site, *_logical(site, bitwise))


def _differing(site: TorchSite, x: Expr, y: Expr) -> Expr:
    return site.b.not_equal(x, y)


_logic(lambda s, x, y: x & y, "__and__.Tensor", "__and__.Scalar", "bitwise_and.Tensor", "logical_and.default")
_logic(lambda s, x, y: x | y, "__or__.Tensor", "__or__.Scalar", "bitwise_or.Tensor", "logical_or.default")
_logic(_differing, "__xor__.Tensor", "bitwise_xor.Tensor", "logical_xor.default")


@operator("logical_not.default", "bitwise_not.default")
def _not(site: TorchSite) -> Made:
    if site.node.target._schema.name.endswith("bitwise_not") and site.dtype().kind != "bool":
        site.refuse("integers are not supported")
    return ~site.x("self").cast(site.dtype())


@operator("where.self", "where.ScalarOther", "where.ScalarSelf", "where.Scalar")
def _where(site: TorchSite) -> Made:
    return site.b.where(site.x("condition"), *_both(site, site.dtype()))


@operator("masked_fill.Scalar", "masked_fill.Tensor")
def _masked_fill(site: TorchSite) -> Made:
    x = site.x("self")
    return site.b.where(site.x("mask"), site.operand("value", x.dtype), x)


@operator("isnan.default")
def _is_nan(site: TorchSite) -> Made:
    x = site.x("self")
    return site.b.not_equal(x, x)


@operator("isinf.default")
def _is_infinite(site: TorchSite) -> Made:
    b, x = site.b, site.x("self")
    return b.equal(b.abs(x), math.inf) if x.dtype.is_float else expanded(b, b.constant(False), x.shape)


# -- functions -----------------------------------------------------------------------------------------------------


def _function(name: str, ours: str) -> None:
    @operator(f"{name}.default")
    def _applied(site: TorchSite) -> Made:
        return site.b.apply(ours, site.operand("self", site.dtype()))


for _name in ("neg", "abs", "exp", "log", "sqrt", "rsqrt", "reciprocal", "tanh", "erf", "sigmoid", "sin", "cos"):
    _function(_name, _name)
for _name in ("relu", "silu", "sign", "log1p", "expm1"):
    _function(_name, _name)


@operator("floor.default")
def _floor(site: TorchSite) -> Made:
    x = site.x("self")
    return site.b.floor(x) if x.dtype.is_float else x


@operator("ceil.default")
def _ceil(site: TorchSite) -> Made:
    x = site.x("self")
    return -site.b.floor(-x) if x.dtype.is_float else x


@operator("round.default")
def _round(site: TorchSite) -> Made:
    x = site.x("self")
    return site.b.round(x) if x.dtype.is_float else x


@operator("trunc.default")
def _trunc(site: TorchSite) -> Made:
    x = site.x("self")
    return _truncated(site, x) if x.dtype.is_float else x


def _wide(x: Expr) -> Expr:
    """Convert 16-bit floats to float32, in which PyTorch computes functions of them."""
    return x.cast(f32) if x.dtype.bytes == 2 else x


def _wide_function(name: str, of: Callable[[Builder, Expr], Expr]) -> None:
    """Spell a function of PyTorch in ops, in float32 or wider."""

    @operator(f"{name}.default")
    def _applied(site: TorchSite) -> Made:
        return of(site.b, _wide(site.operand("self", site.dtype()))).cast(site.dtype())


_wide_function("log2", lambda b, x: b.log(x) * (1 / math.log(2)))
_wide_function("log10", lambda b, x: b.log(x) * (1 / math.log(10)))
_wide_function("exp2", lambda b, x: b.exp(x * math.log(2)))
_wide_function("tan", lambda b, x: b.sin(x) / b.cos(x))
_wide_function("sinh", lambda b, x: (b.expm1(x) - b.expm1(-x)) * 0.5)
_wide_function("cosh", lambda b, x: (b.exp(x) + b.exp(-x)) * 0.5)


@operator("elu.default")
def _elu(site: TorchSite) -> Made:
    x = _wide(site.x("self"))
    alpha, scale, inner = site.real("alpha"), site.real("scale"), site.real("input_scale")
    return exponential_unit(site.b, x, alpha, scale=scale, inner=inner).cast(site.dtype())


@operator("square.default")
def _square(site: TorchSite) -> Made:
    x = site.x("self")
    return x * x


@operator("gelu.default")
def _gelu(site: TorchSite) -> Made:
    x = site.x("self")
    return site.b.gelu_tanh(x) if site.text("approximate") == "tanh" else site.b.gelu(x)


@operator("relu6.default")
def _relu6(site: TorchSite) -> Made:
    x = site.x("self")
    return site.b.minimum(site.b.relu(x), site.b.constant(6, x.dtype), ties="y")


@operator("leaky_relu.default")
def _leaky_relu(site: TorchSite) -> Made:
    x = site.x("self")
    return site.b.where(x > 0.0, x, x * site.real("negative_slope"))


@operator("celu.default")
def _celu(site: TorchSite) -> Made:
    alpha = site.real("alpha")
    return exponential_unit(site.b, _wide(site.x("self")), alpha, inner=1 / alpha).cast(site.dtype())


@operator("sinc.default")
def _sinc(site: TorchSite) -> Made:
    """sin(pi x) / (pi x), and 1 at 0, where its gradient is 0"""
    b, x = site.b, _wide(site.operand("self", site.dtype()))
    middle, one = b.equal(x, 0.0), b.constant(1.0, x.dtype)
    angle = b.where(middle, one, x * math.pi)
    return b.where(middle, one, b.sin(angle) / angle).cast(site.dtype())


@operator("softplus.default")
def _softplus(site: TorchSite) -> Made:
    """log(1 + exp(beta x)) / beta, and x itself past the threshold."""
    b, x, beta = site.b, site.x("self"), site.real("beta")
    z = _wide(x) if beta == 1 else _wide(x) * beta
    soft = b.softplus(z) if beta == 1 else b.softplus(z) / beta
    return b.where(z > site.real("threshold"), x, soft.cast(x.dtype))


@operator("log_sigmoid.default")
def _log_sigmoid(site: TorchSite) -> Made:
    return -site.b.softplus(-site.x("self"))


@operator("hardsigmoid.default")
def _hardsigmoid(site: TorchSite) -> Made:
    b, x = site.b, site.x("self")
    return b.minimum(b.relu(x + 3.0), b.constant(6.0, x.dtype), ties="y") / 6.0


@operator("hardswish.default")
def _hardswish(site: TorchSite) -> Made:
    return site.x("self") * _hardsigmoid(site)

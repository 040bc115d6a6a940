"""ONNX operators on one operand, element by element: functions and activations."""

from __future__ import annotations

import math
from collections.abc import Callable

from treadle.frontends.onnx_import.operators import Made, OnnxSite, operator
from treadle.frontends.recipes.activations import exponential_unit, is_sum_of_squares, root
from treadle.ir.builder import Builder, Expr
from treadle.ir.ops.elementwise import Sigmoid
from treadle.ir.types import i64

_Rule = Callable[[Builder, Expr], Expr]


def _function(name: str, latest: int, rule: _Rule, first: int = 6) -> None:
    @operator(name, latest=latest, first=first)
    def _applied(site: OnnxSite) -> Made:
        return rule(site.b, site.x(0))


_function("Sqrt", 13, lambda b, x: root(b, x) if is_sum_of_squares(x.value) else b.sqrt(x))
_function("Exp", 13, lambda b, x: b.exp(x))
_function("Erf", 13, lambda b, x: b.erf(x))
_function("Tanh", 13, lambda b, x: b.tanh(x))
_function("Sigmoid", 13, lambda b, x: b.sigmoid(x))
_function("Reciprocal", 13, lambda b, x: b.reciprocal(x))
_function("Softplus", 22, lambda b, x: b.softplus(x), first=1)
_function("Sin", 22, lambda b, x: b.sin(x))
_function("Cos", 22, lambda b, x: b.cos(x))
_function("Tan", 22, lambda b, x: b.sin(x) / b.cos(x))
_function("Floor", 13, lambda b, x: b.floor(x))
_function("Ceil", 13, lambda b, x: -b.floor(-x))
_function("Round", 22, lambda b, x: b.round(x))
_function("IsNaN", 20, lambda b, x: b.not_equal(x, x))
_function("Neg", 13, lambda b, x: -x)


@operator("Log", latest=13, first=6)
def _log(site: OnnxSite) -> Made:
    """Logarithm. log(sigmoid(x)) becomes -softplus(-x), as in logsigmoid: the derivative of the logarithm, 1 /
    sigmoid(x), overflows.
    """
    b, x = site.b, site.x(0)
    node = x.value.node
    return -b.softplus(-Expr(b, node.inputs[0])) if node is not None and isinstance(node.op, Sigmoid) else b.log(x)


@operator("Relu", latest=14, first=6)
def _relu(site: OnnxSite) -> Made:
    x = site.x(0)
    return site.b.relu(x) if x.dtype.is_float else site.b.maximum(x, 0)


@operator("Abs", latest=13, first=6)
def _abs(site: OnnxSite) -> Made:
    return site.x(0) if site.element(0).least == 0 else site.b.abs(site.x(0))


@operator("Sign", latest=13)
def _sign(site: OnnxSite) -> Made:
    b, x = site.b, site.x(0)
    if site.element(0).name == "UINT64":
        return b.where(b.equal(x, 0), b.constant(0, i64), b.constant(1, i64))
    return b.sign(x)


@operator("IsInf", latest=20)
def _is_inf(site: OnnxSite) -> Made:
    b, x = site.b, site.x(0)
    positive, negative = site.int("detect_positive", 1), site.int("detect_negative", 1)
    if not (positive or negative):
        return ~b.equal(x, x) & b.equal(x, x)
    found = [b.equal(x, site.constant(s * math.inf, x.dtype)) for s, on in ((1, positive), (-1, negative)) if on]
    return found[0] if len(found) == 1 else found[0] | found[1]


@operator("Gelu", latest=20)
def _gelu(site: OnnxSite) -> Made:
    kind = site.text("approximate", "none")
    if kind not in ("none", "tanh"):
        site.malformed(f"unknown approximate {kind!r}")
    return site.b.gelu_tanh(site.x(0)) if kind == "tanh" else site.b.gelu(site.x(0))


@operator("Swish", latest=24)
def _swish(site: OnnxSite) -> Made:
    b, x, alpha = site.b, site.x(0), site.float("alpha", 1.0)
    return b.silu(x) if alpha == 1.0 else x * b.sigmoid(x * alpha)


# -- activations with default constants ----------------------------------------------------------------------------


@operator("LeakyRelu", latest=16, first=6)
def _leaky_relu(site: OnnxSite) -> Made:
    x = site.x(0)
    return site.b.where(x > 0.0, x, x * site.float("alpha", 0.01))


@operator("PRelu", latest=16, first=7)
def _prelu(site: OnnxSite) -> Made:
    x = site.x(0)
    return site.b.where(x > 0, x, x * site.x(1))


@operator("Elu", latest=22, first=6)
def _elu(site: OnnxSite) -> Made:
    return exponential_unit(site.b, site.x(0), site.float("alpha", 1.0))


@operator("Celu", latest=28, first=12)
def _celu(site: OnnxSite) -> Made:
    alpha = site.float("alpha", 1.0)
    return exponential_unit(site.b, site.x(0), alpha, inner=1 / alpha)


@operator("Selu", latest=22, first=6)
def _selu(site: OnnxSite) -> Made:
    alpha, gamma = site.float("alpha", 1.6732632), site.float("gamma", 1.050701)
    return exponential_unit(site.b, site.x(0), alpha, scale=gamma)


@operator("HardSigmoid", latest=22, first=6)
def _hard_sigmoid(site: OnnxSite) -> Made:
    b, x = site.b, site.x(0)
    line = x * site.float("alpha", 0.2) + site.float("beta", 0.5)
    return b.maximum(b.minimum(line, 1.0, ties="y"), 0.0, ties="y")


@operator("Softsign", latest=22)
def _softsign(site: OnnxSite) -> Made:
    x = site.x(0)
    return x / (site.b.abs(x) + 1.0)


@operator("Sinh", latest=22)
def _sinh(site: OnnxSite) -> Made:
    b, x = site.b, site.x(0)
    return (b.exp(x) - b.exp(-x)) * 0.5


@operator("Cosh", latest=22)
def _cosh(site: OnnxSite) -> Made:
    b, x = site.b, site.x(0)
    return (b.exp(x) + b.exp(-x)) * 0.5


@operator("Dropout", latest=22, first=7)
def _dropout(site: OnnxSite) -> Made:
    """Build dropout at inference: the identity."""
    site.ignore("seed", "ratio")
    if site.has(2) and bool(site.scalar(2)) and (not site.has(1) or float(site.scalar(1)) != 0):
        site.refuse("training mode is not supported: it draws random numbers")
    x = site.x(0)
    return [x, site.b.expand(site.b.constant(True), shape=x.shape)] if len(site.wanted) > 1 and site.wanted[1] else x

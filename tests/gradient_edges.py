"""Gradients of imported PyTorch functions at points where derivatives are easily wrong: zeros, ties, large numbers,
fully masked rows.

    judged(CASES["elu"], float64=True)   -> the list of errors; empty if all gradients equal autograd's

A gradient must equal autograd's to 1e-9 in float64 (1e-4 in float32), relative to its own size or to 1. If autograd
returns NaN, any finite number and NaN are right; `unknown` lists these places.

Some ONNX files have another gradient than their function: they hold float32 numbers, they are also the files of another
function, or they compute something else. Then autograd differentiates the file's function.

The gradient of `torch.clamp` at a bound depends on the version of PyTorch: x gets all of it, half of it, or nothing.
Ours goes to x in full. So autograd differentiates `bounded` in place of `clamp`, and every version gives the same.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import treadle
from tests.numeric_gradients import gradients
from tests.remembered_exports import remember_functions
from tests.torch_modules import Rule, leaves
from treadle.frontends.onnx_import.importer import import_onnx
from treadle.ir.graph import Graph
from treadle.passes.framework.manager import PassManager
from treadle.passes.pipelines import RECOGNITION

Array = np.ndarray[Any, Any]
INF = np.inf
POINTS = np.array(
    [0, -0.0, 1e-9, -1e-9, 0.3, -0.3, 0.5, -0.5, 1, -1, 2, -2, 3, -3, 6, -6, 17, -17, 20, -20, 21, -21, 90, -90.0]
)
"""One number each: zeros, the bends of activations, and numbers beyond which formulas overflow or lose all digits."""
POSITIVE = np.array([1e-9, 0.3, 0.5, 1, 2, 3, 6, 17, 20, 90])
ROWS = np.array(
    [
        [0, 0, 0, 0, 0, 0],
        [2, 2, 2, 2, 2, 2],
        [1, 3, -1, 3, 0, 3],
        [20, -20, 90, -90, 0, 1],
        [-0.5, 0.5, -0.5, 0.5, 1, 0],
        [0.7, -1.3, 0.2, 2.1, -0.4, 1.9],
    ]
)
"""Rows of zeros, of equal numbers, of ties for the largest, of large numbers, of pairs, and of different numbers."""
EMPTY = np.where(np.arange(6)[:, None] == 3, -INF, np.clip(ROWS, -20, 20))
"""Rows, one of them -inf throughout."""
GRID = np.array([-90, -20, -3, -1, -0.5, 0, 0.5, 1, 3, 20, 90])
X, Y = np.repeat(GRID, len(GRID)), np.tile(GRID, len(GRID))
KEPT = np.array([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]], bool)
"""The keys that each of 4 queries sees; the second sees none."""


@dataclass(frozen=True)
class EdgeCase:
    """A function of tensors, and the points at which it is differentiated.

    rule     the function, of one tensor for each array; it returns a tensor or several
    at       arrays: floats are differentiated, others only read
    within   tolerance in float64, relative to each number or to 1
    stable   the same function with our gradient at ties, if PyTorch's gradient there depends on its version
    file     the function of its ONNX file, if that has another gradient
    why      the difference: the content of the file
    """

    rule: Callable[..., Any]
    at: tuple[Array, ...]
    within: float = 1e-9
    stable: Callable[..., Any] | None = None
    file: Callable[..., Any] | None = None
    why: str = ""


def _drawn(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


CASES: dict[str, EdgeCase] = {}


def _each(rules: Mapping[str, Callable[..., Any]], *at: Array) -> None:
    for name, rule in rules.items():
        assert name not in CASES, name
        CASES[name] = EdgeCase(rule, at)


_each(
    {
        **{
            name: getattr(torch, name)
            for name in ("neg", "exp", "abs", "sigmoid", "sin", "cos", "tanh", "erf", "square")
        },
        **{name: getattr(torch, name) for name in ("expm1", "sign", "floor", "ceil", "round", "trunc", "relu", "frac")},
        **{
            name: getattr(F, name) for name in ("elu", "selu", "celu", "gelu", "silu", "mish", "logsigmoid", "softsign")
        },
        **{name: getattr(F, name) for name in ("leaky_relu", "tanhshrink", "softplus")},
        "leaky_relu, steep": lambda x: F.leaky_relu(x, 1.5),
        "softplus, bent": lambda x: F.softplus(x, beta=0.5, threshold=2.0),
        "elu, scaled": lambda x: F.elu(x, 0.5),
        "celu, scaled": lambda x: F.celu(x, 2.0),
        "gelu, tanh": lambda x: F.gelu(x, approximate="tanh"),
        "threshold": lambda x: F.threshold(x, 0.5, -4.0),
        "prelu": lambda x: F.prelu(x, torch.tensor([0.25], dtype=x.dtype)),
        "reciprocal, moved": lambda x: 1 / (x * x + 1),
        "powers": lambda x: (x**1, x**2, x**3, x**4, x**5, x**0),
        "masked_fill": lambda x: x.masked_fill(x > 0.5, -1e9),
        "where": lambda x: torch.where(x > 0, x * 2, -x),
        "nan_to_num": lambda x: torch.nan_to_num(x),
        "log of a sum": lambda x: torch.log(1 + torch.exp(-x.abs())),
        "sinc": torch.sinc,
        "logit": lambda x: torch.logit(torch.sigmoid(x / 40)),
        "fmod": lambda x: torch.fmod(x, 4.5),
        "remainder": lambda x: torch.remainder(x, 4.5),
        "detached": lambda x: x * x.detach() + torch.sigmoid(x).detach(),
        "softmin of one": lambda x: F.softmin(x[:, None], -1) + x[:, None],
        "clamp, inside": lambda x: x.clamp(-3, 3),
        "clamp, min": lambda x: x.clamp(min=0),
        "clamp, max": lambda x: x.clamp(max=6),
        "clamp_min": lambda x: x.clamp_min(1),
        "clamp, between": lambda x: x.clamp(-0.5, 3.0),
        "clamp, tensors": lambda x: (
            x.clamp(-x.abs() / 2, x.abs() / 2),
            torch.clamp(x, x, x),
            x.clamp(x.abs(), -x.abs()),
        ),
    },
    POINTS,
)
_each(
    {
        **{name: getattr(F, name) for name in ("relu6", "hardtanh", "hardswish", "softshrink", "hardshrink")},
        "hardtanh, wide": lambda x: F.hardtanh(x, -3, 6),
    },
    POINTS,
)
CASES["hardsigmoid"] = EdgeCase(F.hardsigmoid, (POINTS,), within=1e-7)  # PyTorch has 1/6 in float32
_each(
    {
        **{name: getattr(torch, name) for name in ("log", "sqrt", "rsqrt", "reciprocal", "log1p", "log2", "log10")},
        "roots": lambda x: (x**0.5, x**-0.5, x**1.7, x**-2.0, x**-1),
        "xlogy": lambda x: torch.xlogy(x, x),
    },
    POSITIVE,
)
_each({"log1p, near 0": torch.log1p}, np.array([-0.5, -1e-9, 0, 1e-12, 1e-5, 0.5, 2, 16.6, 20, 90]))
_each({"sqrt, at 0": torch.sqrt, "power, at 0": lambda x: (x**2, x**1.5, x**3.0)}, np.array([0.0, 1, 4]))
_each(
    {
        **{name: getattr(torch, name) for name in ("add", "sub", "mul", "maximum", "minimum", "logaddexp")},
        "div": lambda x, y: x / (y * y + 1),
        "quotients": lambda x, y: torch.div(x, y.abs() + 1, rounding_mode="floor"),
        "where, chosen": lambda x, y: torch.where(x > y, x * y, x - y),
        "clamp, both": lambda x, y: (torch.clamp(x, min=y), torch.clamp(x, max=y), torch.clamp(x, y, y + 1)),
        "mod": lambda x, y: torch.remainder(x, y.abs() + 1.25),
        "lerp": lambda x, y: torch.lerp(x, y, 0.3),
        "addcmul": lambda x, y: torch.addcmul(x, x, y, value=0.5),
        "bce with logits": lambda x, y: F.binary_cross_entropy_with_logits(x, torch.sigmoid(y), reduction="none"),
        "huber": lambda x, y: F.huber_loss(x, y, reduction="none"),
        "smooth l1": lambda x, y: F.smooth_l1_loss(x, y, reduction="none"),
        "l1": lambda x, y: F.l1_loss(x, y, reduction="none"),
        "mse": lambda x, y: F.mse_loss(x, y),
        "margin ranking": lambda x, y: F.margin_ranking_loss(x, y, torch.ones_like(x), margin=0.5, reduction="none"),
    },
    X,
    Y,
)
_each({"pow": torch.pow}, np.repeat(POSITIVE[1:7], 6), np.tile(np.array([-2, -0.5, 0, 0.5, 1, 3.0]), 6))
_each({"pow, at 0": lambda x: (x**2.5, torch.pow(2.0, x), torch.pow(x, 3))}, np.array([0.0, 1, -0.0, 2]))
_each(
    {
        **{name: getattr(torch, name) for name in ("sum", "mean", "amax", "amin")},
        "sums": lambda x: (x.sum(1), x.mean(0), x.sum((0, 1))),
        "extremes of all": lambda x: (x.max(), x.min()),
        "extremes along": lambda x: (x.amax(1), x.amin(0), x.amax((0, 1)), x.amax(1, keepdim=True)),
        "extremes with places": lambda x: (x.max(1)[0], x.min(0)[0], x.max(0, keepdim=True)[0]),
        "softmax by max": lambda x: (
            torch.exp(x - x.max(1, keepdim=True)[0]) / torch.exp(x - x.max(1, keepdim=True)[0]).sum(1, True)
        ),
        "aminmax": lambda x: torch.aminmax(x, dim=1),
        "topk": lambda x: x[4:].topk(3, 1)[0] + x[5:].topk(2, 1, largest=False)[0][:, :1],
        "sort": lambda x: (torch.sort(x, stable=True, dim=1)[0], torch.sort(x, stable=True, dim=0, descending=True)[0]),
        "cumsum": lambda x: x.cumsum(1),
        "softmax": lambda x: (x.softmax(1), x.log_softmax(1), x.softmax(0), F.softmin(x, 1)),
        "logsumexp": lambda x: (x.logsumexp(1), x.logsumexp((0, 1))),
        "norms": lambda x: (x.norm(dim=1), x.norm(), x.norm(1, 1), torch.linalg.vector_norm(x, dim=0)),
        "normalize": lambda x: (F.normalize(x), F.normalize(x, dim=0), F.normalize(x, p=1.0)),
        "cosine": lambda x: F.cosine_similarity(x[:3], x[3:]),
        "cosine with zeros": lambda x: F.cosine_similarity(x, x[:1]),
        "distance": lambda x: F.pairwise_distance(x[:3], x[3:]),
        "deviations": lambda x: (x.std(1), x.std(0), x.var(1), x.std(1, correction=0)),
        "statistics": lambda x: (*torch.var_mean(x, 1), *torch.std_mean(x, 1)),
        "layer_norm": lambda x: F.layer_norm(x, (6,)),
        "rms_norm": lambda x: F.rms_norm(x, (6,), eps=1e-6),
        "group_norm": lambda x: F.group_norm(x, 2),
        "instance_norm": lambda x: F.instance_norm(x[None]),
        "glu": lambda x: F.glu(x, 1),
        "cross entropy": lambda x: F.cross_entropy(x, torch.tensor([0, 1, 2, 3, -100, 5]), reduction="none"),
        "nll": lambda x: F.nll_loss(x.log_softmax(1), torch.tensor([0, 1, 2, 3, 4, 5])),
        "kl": lambda x: F.kl_div(x.log_softmax(1), x.flip(0).softmax(1), reduction="none"),
        "gather": lambda x: x.gather(1, torch.tensor([[0, 0, 1]] * 6)),
        "index_add": lambda x: x.index_add(0, torch.tensor([1, 1]), x[:2]),
        "scatter": lambda x: x.scatter(1, torch.tensor([[1], [0], [2], [5], [3], [3]]), x[:, :1] * 2),
        "scatter_add": lambda x: x.scatter_add(1, torch.tensor([[1, 1]] * 6), x[:, :2]),
        "index_put": lambda x: x.index_put((torch.tensor([0, 2]),), x[1]),
        "moves": lambda x: (x.flip(0), x.roll(1, 1), F.pad(x, (1, 2), value=3), x.tril(), x[:, ::2], x.repeat(2, 1)),
        "windows": lambda x: x.unfold(1, 3, 2),
        "matmul": lambda x: (x @ x.T, x @ x[0]),
        "einsum": lambda x: torch.einsum("ij,kj->ik", x, x),
        "max_pool1d": lambda x: F.max_pool1d(x[None], 3, 2, 1),
        "max_pool2d": lambda x: (F.max_pool2d(x[None, None], 2), F.max_pool2d(x[None, None], 3, 1, 1)),
        "avg_pool2d": lambda x: F.avg_pool2d(x[None, None], 2),
        "adaptive pools": lambda x: (F.adaptive_avg_pool2d(x[None, None], 2), F.adaptive_avg_pool1d(x[None], 3)),
        "conv": lambda x: F.conv1d(x[None], x[None, :, :3]),
        "lp pool": lambda x: F.lp_pool1d(x[None], 2, 3),
        "masked_mean": lambda x: (x * (x > 0)).sum(1) / (x > 0).sum(1).clamp(min=1),
    },
    ROWS,
)
_each(
    {
        "softmax, empty rows": lambda x: torch.softmax(x, 1),
        "log_softmax, empty rows": lambda x: torch.log_softmax(x, 1),
        "logsumexp, empty rows": lambda x: torch.logsumexp(x, 1),
        "exp, empty rows": torch.exp,
        "amax, empty rows": lambda x: x.amax(1),
        "safe softmax, empty rows": lambda x: torch._safe_softmax(x, -1),
    },
    EMPTY,
)


def _attended(scores: Any, v: Any) -> Any:
    return torch.softmax(scores, -1) @ v


_LOWEST = {"lowest": None, "lowest of f32": float(np.finfo(np.float32).min), "-1e9": -1e9, "-1e4": -1e4, "-inf": -INF}


def _masked(how: str, lowest: float | None) -> Callable[..., Any]:
    def rule(q: Any, k: Any, v: Any, kept: Any) -> Any:
        scores = q @ k.transpose(-1, -2) * 0.5
        least = torch.finfo(scores.dtype).min if lowest is None else lowest
        match how:
            case "filled":
                scores = scores.masked_fill(~kept, least)
            case "where":
                scores = torch.where(kept, scores, torch.full((), least, dtype=scores.dtype))
            case "added":
                scores = scores + torch.where(kept, torch.zeros_like(scores), least)
            case "added by a product":
                scores = scores + (1.0 - kept.to(scores.dtype)) * least
        return _attended(scores, v)

    return rule


_QKV = (_drawn(2, 4, 3), _drawn(2, 5, 3, seed=1), _drawn(2, 5, 3, seed=2))
for _lowest, _least in _LOWEST.items():
    for _how in ("filled", "where", "added", "added by a product"):
        if (_how, _lowest) != ("added by a product", "-inf"):  # 0 * -inf is NaN
            _each({f"attention, {_how} {_lowest}": _masked(_how, _least)}, *_QKV, KEPT)
_HEADS = tuple(a.reshape(1, 2, -1, 3) for a in _QKV)
_each(
    {
        "sdpa": lambda q, k, v, kept: F.scaled_dot_product_attention(q, k, v),
        "sdpa, masked": lambda q, k, v, kept: F.scaled_dot_product_attention(q, k, v, attn_mask=kept),
        "sdpa, added": lambda q, k, v, kept: F.scaled_dot_product_attention(
            q, k, v, attn_mask=torch.zeros_like(q[:, :, :, :1]).masked_fill(~kept, torch.finfo(q.dtype).min)
        ),
        "sdpa, added -inf": lambda q, k, v, kept: F.scaled_dot_product_attention(
            q, k, v, attn_mask=torch.where(kept, 0.0, -INF).to(q.dtype)
        ),
        "sdpa, causal": lambda q, k, v, kept: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        "softmax times mask": lambda q, k, v, kept: (torch.softmax(q @ k.mT, -1) * kept) @ v,
        "softmax, then where": lambda q, k, v, kept: (
            torch.where(kept.any(-1, keepdim=True), torch.softmax((q @ k.mT).masked_fill(~kept, -1e9), -1), 0.0) @ v
        ),
        "softmax, zeroed": lambda q, k, v, kept: (
            torch.softmax((q @ k.mT).masked_fill(~kept, -1e9), -1).masked_fill(~kept, 0.0) @ v
        ),
    },
    *_HEADS,
    KEPT,
)


def bounded(x: Any, low: Any = None, high: Any = None) -> Any:
    """Return `torch.clamp(x, low, high)`, but with the whole gradient for x where x equals a bound."""
    if low is not None:
        x = torch.where(x >= low, x, low)
    return x if high is None else torch.where(x <= high, x, high)


STABLE: dict[str, Callable[..., Any]] = {
    "clamp, inside": lambda x: bounded(x, -3, 3),
    "clamp, min": lambda x: bounded(x, 0),
    "clamp, max": lambda x: bounded(x, None, 6),
    "clamp_min": lambda x: bounded(x, 1),
    "clamp, between": lambda x: bounded(x, -0.5, 3.0),
    "clamp, tensors": lambda x: (
        bounded(x, -x.abs() / 2, x.abs() / 2),
        bounded(x, x, x),
        bounded(x, x.abs(), -x.abs()),
    ),
    "clamp, both": lambda x, y: (bounded(x, y), bounded(x, None, y), bounded(x, y, y + 1)),
    "margin ranking": lambda x, y: bounded(y - x + 0.5, 0),
}
for _name, _rule in STABLE.items():
    CASES[_name] = replace(CASES[_name], stable=_rule)


def _float32(number: float) -> float:
    return float(np.float32(number))


def _selu(x: Any) -> Any:
    alpha, gamma = _float32(1.6732632), _float32(1.050701)
    return gamma * torch.where(x > 0, x, alpha * torch.expm1(bounded(x, None, 0)))


def _cosine(x: Any, y: Any) -> Any:
    return F.cosine_similarity(x, y, eps=_float32(1e-8))


def _between(x: Any, low: Any, high: Any) -> Any:
    return torch.minimum(torch.maximum(x, low), high)


def _added(q: Any, k: Any, v: Any, kept: Any, lowest: float) -> Any:
    return _attended(q @ k.mT / 3**0.5 + torch.where(kept, 0.0, torch.tensor(lowest, dtype=q.dtype)), v)


def _lowest(x: Any) -> float:
    with np.errstate(over="ignore"):
        return _float32(torch.finfo(x.dtype).min)


_TINY = {"eps": _float32(1e-12)}
_FILES: dict[str, dict[str, Callable[..., Any]]] = {
    "float32 numbers": {
        "selu": _selu,
        "hardswish": lambda x: x * torch.where((x > -3) & (x < 3), x * _float32(1 / 6) + 0.5, (x >= 3).to(x.dtype)),
        "sinc": lambda x: torch.sinc(x * (_float32(np.pi) / np.pi)),
        "lerp": lambda x, y: torch.lerp(x, y, _float32(0.3)),
        "normalize": lambda x: (F.normalize(x, **_TINY), F.normalize(x, dim=0, **_TINY), F.normalize(x, 1.0, **_TINY)),
        "cosine": lambda x: _cosine(x[:3], x[3:]),
        "cosine with zeros": lambda x: _cosine(x, x[:1]),
        "layer_norm": lambda x: F.layer_norm(x, (6,), eps=_float32(1e-5)),
        "rms_norm": lambda x: F.rms_norm(x, (6,), eps=_float32(1e-6)),
        "group_norm": lambda x: F.group_norm(x, 2, eps=_float32(1e-5)),
        "instance_norm": lambda x: F.instance_norm(x[None], eps=_float32(1e-5)),
    },
    "Clip, as for clamp, which passes the gradient at its bounds": {
        "relu6": lambda x: bounded(x, 0, 6),
        "hardtanh": lambda x: bounded(x, -1, 1),
        "hardtanh, wide": lambda x: bounded(x, -3, 6),
    },
    "Max and Min, as for torch.maximum, which shares the gradient of equal numbers": {
        "clamp, tensors": lambda x: (
            _between(x, -x.abs() / 2, x.abs() / 2),
            _between(x, x, x),
            _between(x, x.abs(), -x.abs()),
        ),
        "clamp, both": lambda x, y: (torch.maximum(x, y), torch.minimum(x, y), _between(x, y, y + 1)),
    },
    "ReduceMax, as for amax, which shares the gradient of equal numbers": {
        "extremes with places": lambda x: (x.amax(1), x.amin(0), x.amax(0, keepdim=True)),
    },
    "exponentials, which overflow in float32": {
        "logaddexp": lambda x, y: torch.log(torch.exp(x) + torch.exp(y)),
    },
    "no detach": {"detached": lambda x: x * x + torch.sigmoid(x)},
    "the lowest number added for a boolean mask, so an empty row is the mean of the values, not 0": {
        "sdpa, masked": lambda q, k, v, kept: _added(q, k, v, kept, torch.finfo(q.dtype).min)
    },
    "a plain softmax, in which an empty row is NaN, not 0": {
        "sdpa, added -inf": lambda q, k, v, kept: _added(q, k, v, kept, -INF)
    },
    "-inf in place of float64's lowest number, so an empty row is NaN": {
        "sdpa, added": lambda q, k, v, kept: _added(q, k, v, kept, _lowest(q)),
        **{
            f"attention, {how} lowest": lambda q, k, v, kept, how=how: _masked(how, _lowest(q))(q, k, v, kept)
            for how in ("filled", "where", "added", "added by a product")
        },
    },
}
for _why, _rules in _FILES.items():
    for _name, _rule in _rules.items():
        CASES[_name] = replace(CASES[_name], file=_rule, why=_why)


def judged(
    case: EdgeCase,
    *,
    float64: bool,
    recognized: bool = False,
    onnx: bool = False,
    certify: bool = False,
    unknown: list[str] | None = None,
) -> list[str]:
    """Return the errors of a case's gradients: one line for each array with a wrong gradient.

    recognized  after the passes that a trainer runs before it differentiates; else the graph as imported
    onnx        through a file of torch's exporter
    certify     with certificates of these passes
    unknown     gets a line for each array in whose gradient autograd has NaN
    """
    held = [torch.tensor(a if a.dtype == bool or float64 else a.astype(np.float32)) for a in case.at]
    graph, weights, names = _imported(case.rule, held, onnx)
    if recognized:
        graph = PassManager(RECOGNITION, certify=certify, differentiated=True).run(graph).graph
    floats = [i for i, a in enumerate(case.at) if a.dtype != bool]
    given = {n: x.detach().numpy() for n, x in zip(names, held, strict=True) if n is not None}
    rule = (case.file if onnx else None) or case.stable or case.rule
    for i in floats:
        held[i].requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):  # the others lose the logarithm of a sum next to a mask of -1e30
        outputs = [y for y in leaves(rule(*held)) if y.dtype.is_floating_point]
    seeds = [_drawn(*y.shape, seed=n).astype(y.detach().numpy().dtype) for n, y in enumerate(outputs)]
    kept = [(y, s) for y, s in zip(outputs, seeds, strict=True) if y.requires_grad]
    if kept:
        torch.autograd.backward([y for y, _ in kept], [torch.tensor(s) for _, s in kept])
    with np.errstate(all="ignore"):
        found = gradients(graph, given, weights, seeds, float64=onnx and float64)
    wrong = []
    for i in floats:
        x = held[i]
        wanted = np.zeros_like(case.at[i]) if x.grad is None else x.grad.numpy()
        got = found.get(names[i] or "", np.zeros_like(wanted))
        bad = ~near(got, wanted, 1e-4 if not float64 else case.within)
        if unknown is not None and np.isnan(wanted).any():
            rest = got[np.isnan(wanted)]
            unknown.append(f"operand {i}: {int(np.isnan(wanted).sum())} NaN, of ours {int(np.isnan(rest).sum())}")
        if bad.any():
            at = [tuple(map(int, place)) for place in np.argwhere(bad)[:3]]
            places = [f"at {float(case.at[i][p]):g}: {float(got[p]):.9g}, autograd {float(wanted[p]):.9g}" for p in at]
            wrong.append(f"operand {i}: {int(bad.sum())} of {bad.size} differ; " + "; ".join(places))
    return wrong


def near(got: Array, wanted: Array, within: float) -> Array:
    """Compare by element: True if equal up to roundings, or if the expected number is NaN."""
    with np.errstate(invalid="ignore"):
        close = np.abs(got - wanted) <= within * np.maximum(1.0, np.abs(wanted))
    made: Array = close | (got == wanted) | np.isnan(wanted)
    return made


Imported = tuple[Graph, Mapping[str, Array], list[str | None]]
"""A graph, its weights, and the inputs for a function's tensors; None for a tensor that it does not read."""


def _imported(rule: Callable[..., Any], held: list[Any], onnx: bool) -> Imported:
    module, detached = Rule(rule), tuple(x.detach() for x in held)
    if not onnx:
        model = treadle.from_torch(module, detached)
        inputs = {v.name for v in model.graph.main.inputs}
        return model.graph, model.weights, [n if n in inputs else None for n in model.inputs]
    remember_functions()
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(module, detached, dynamo=True, verbose=False)
    assert program is not None
    names = [x.name for x in program.model.graph.inputs]
    found = import_onnx(program.model_proto)
    return found.graph, found.weights, names

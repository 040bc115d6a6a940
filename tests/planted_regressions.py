"""Regressions planted between two builds of small models: the finding that each must produce, and the others allowed.

A case is a declaration with an option `bad`, which is the only difference between build a and build b, or two sets of
options of one declaration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import treadle as t
from treadle.comparing.builds import open_build
from treadle.comparing.differences import BuildComparison, compare
from treadle.frontends.declarations import Model
from treadle.passes.fusion.attention.fuse_attention import FuseAttention
from treadle.passes.pipelines import DEFAULT
from treadle.passes.products.fuse_linear import FuseLinear

# -- models with an option `bad` -----------------------------------------------------------------------------------


@t.model
def spelled_attention(x: t.f32["B S 16"], *, bad: bool = False):
    """Attention in primitives; bad: the softmax is over queries."""
    for _ in t.stack("h", 3):
        with t.scope("attn"):
            q, k, v = (t.linear(x, 16, bias=False, name=name) for name in "qkv")
            scores = q @ t.rearrange(k, pattern="b s d -> b d s") * 0.25
            x = x + t.softmax(scores, axis=1 if bad else 2) @ v
    return x


@t.model
def kept_gelu(x: t.f32["B S 16"], *, bad: bool = False):
    """gelu in primitives; bad: the factor of its argument is not 1 / sqrt(2)."""
    for _ in t.stack("h", 2):
        y = t.linear(x, 32, name="up")
        y = y * 0.5 * (1 + t.erf(y * (0.8 if bad else 0.7071067811865476)))
        x = x + t.linear(y, 16, name="down")
    return x


@t.model
def spelled_norm(x: t.f32["B S 16"], *, bad: bool = False):
    """rms_norm in primitives; bad: the mean is over positions."""
    mean = t.reduce_mean(x * x, axes=(1,) if bad else (2,), keep=True)
    return x * t.rsqrt(mean + 1e-6) * t.parameter("w", 16)


@t.model
def read_before_activation(x: t.f32["B S 16"], *, bad: bool = False):
    """A product with an activation; bad: the product is returned too."""
    y = t.linear(x, 32, name="up")
    out = t.linear(t.gelu(y), 16, name="down")
    return {"y": out, "up": t.reduce_sum(y, axes=(2,)) if bad else t.reduce_sum(out, axes=(2,))}


@t.model
def gate_read_twice(x: t.f32["B S 16"], *, bad: bool = False):
    """A gated product; bad: another product reads the gate's product."""
    gate = t.linear(x, 32, bias=False, name="gate")
    y = t.silu(gate) * t.linear(x, 32, bias=False, name="up")
    down = t.linear(y, 16, bias=False, name="down")
    return {"y": down, "z": t.linear(gate if bad else down, 16, bias=False, name="other")}


@t.model
def residual_norm(x: t.f32["B S 16"], *, bad: bool = False):
    """The norm of a residual sum; bad: something else is normalized."""
    for _ in t.stack("h", 2):
        y = x + t.linear(x, 16, name="a")
        z = t.layer_norm(t.exp(y) if bad else y, name="ln")
        x = y + t.linear(z, 16, name="b")
    return x


@t.model
def merged_projections(x: t.f32["B S 16"], *, bad: bool = False):
    """Projections of one value; bad: each reads a value of its own."""
    for _ in t.stack("h", 2):
        q, k, v = (t.linear(x * (1.0 + i) if bad else x, 16, name=name) for i, name in enumerate("qkv"))
        x = x + t.softmax(q, axis=1) * t.softmax(k, axis=1) * t.softmax(v, axis=1)
    return x


@t.model
def summed_embeddings(tokens: t.i64["B S"], *, bad: bool = False):
    """Two embeddings in one sum; bad: an activation between them."""
    x, p = t.embed(tokens, 10, 16, name="wte"), t.embed(t.positions(tokens), 12, 16, name="wpe")
    return t.tanh(x) + p if bad else x + p


@t.model
def early_value(x: t.f32["B S 16"], *, bad: bool = False):
    """A chain of products; bad: a wide early value is read at the end."""
    early = t.exp(t.linear(x, 256, name="wide"))
    y = t.linear(early, 16, name="narrow")
    for _ in t.stack("h", 3):
        y = t.softmax(t.linear(y, 256, name="up"), axis=2)
        y = t.linear(y, 16, name="down")
    return t.linear(t.exp(t.linear(y, 256, name="last")) * (early if bad else 0.5), 16, name="out")


@t.model
def expanded(x: t.f32["B S 16"], y: t.f32["B S 16"], *, bad: bool = False):
    """A sum over pairs; bad: the pairs are computed before they are summed."""
    if bad:
        pairs = t.exp(t.rearrange(x, pattern="b s d -> b s 1 d") - t.rearrange(y, pattern="b s d -> b 1 s d"))
        return t.cumsum(pairs, axis=3)
    return t.cumsum(t.exp(x - y), axis=2)


@t.model
def tied_table(tokens: t.i64["B S"], *, bad: bool = False):
    """An embedding that is also the output projection; bad: they have two tables."""
    x = t.embed(tokens, 10, 32, name="wte")
    x = x + t.mlp(x, 64, name="mlp")
    return t.unembed(x, 10, name="logits") if bad else t.unembed(x, tied="wte")


@t.model
def odd_width(x: t.f32["B S 64"], *, bad: bool = False):
    """Linear layers, quantized in groups of 32. If `bad`, one weight has rows of 80 elements, not a multiple of 32."""
    y = t.linear(t.gelu(t.linear(x, 80 if bad else 96, name="up")), 64, name="down")
    return x + y


@t.model
def read_elsewhere(x: t.f32["B S 64"], *, bad: bool = False):
    """Products; bad: a weight is read by something that is not a product."""
    w = t.parameter("w", 64, 64)
    return t.linear(x + t.linear(x, 64, name="a"), 64, name="b") @ w + (t.reduce_sum(t.exp(w), axes=(0,)) if bad else 1)


@t.model
def largest(x: t.f32["B S 16"], *, bad: bool = False):
    """The position of the largest element; bad: over an axis that is not contiguous."""
    return t.argmax(t.exp(x), axis=1 if bad else 2)


@t.model
def running_sums(x: t.f32["B S 16"], *, bad: bool = False):
    """Running sums over positions; bad: over the last axis."""
    for _ in t.stack("h", 2):
        x = t.cumsum(t.tanh(x), axis=2 if bad else 1)
    return x


@t.model
def decoder(
    tokens: t.i64["B S"],
    *,
    layers: int = 3,
    window: int | None = 4,
    eps: float = 1e-5,
    act: t.Activation = t.gelu,
    hidden: int = 64,
    relu_at: int | None = None,
    extra_at: int | None = None,
    skips: bool = False,
):
    """A small decoder with options that change parts of it."""
    x = t.embed(tokens, 10, 16, name="wte")
    first = x
    for layer in t.stack("h", layers):
        y = t.layer_norm(x, eps=eps, name="ln_1")
        mask = t.causal if window is None else t.causal & t.window(window)
        x = (first if skips else x) + t.self_attention(y, 2, mask=mask, name="attn")
        if layer == extra_at:
            x = x + t.linear(x, 16, name="adapter")
        x = x + t.mlp(
            t.layer_norm(x, eps=eps, name="ln_2"), hidden, act=t.relu if layer == relu_at else act, name="mlp"
        )
    return t.unembed(t.layer_norm(x, eps=eps, name="ln_f"), tied="wte")


# -- cases ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planted:
    """A regression: the model, the options of both builds, and a function that returns True if it was found."""

    name: str
    model: Model
    found: Callable[[BuildComparison], bool]
    a: Mapping[str, Any] = field(default_factory=dict)
    b: Mapping[str, Any] = field(default_factory=lambda: {"bad": True})
    needs: str = ""

    def compared(self) -> BuildComparison:
        return compare(open_build(self.model, **self.a), open_build(self.model, **self.b))


def lost(kind: str, count: int, reason: str = "") -> Callable[[BuildComparison], bool]:
    """Expect this number of lost fusions of a kind, with this text in the reason or the edge."""

    def found(c: BuildComparison) -> bool:
        held = [each for each in c.lost if each.kind == kind]
        told = all(reason in f"{each.verdict.edge}: {each.reason}" and each.reason for each in held)
        return sum(len(each.scopes) for each in held) == count and told

    return found


def changed(what: str, count: int = 1) -> Callable[[BuildComparison], bool]:
    """Expect this change at this number of nodes."""
    return lambda c: sum(len(each.scopes) for each in c.changes if what in each.what) == count


def grew(name: str, least: float = 1.0) -> Callable[[BuildComparison], bool]:
    """Expect a quantity that is more than `least` times as large."""

    def found(c: BuildComparison) -> bool:
        q = c.quantity(name)
        return q.a is not None and q.b is not None and q.b > q.a * least

    return found


def wider(weight: str, reason: str = "") -> Callable[[BuildComparison], bool]:
    """Expect a weight that takes more bits, with this text in the reason."""
    return lambda c: any(weight in each.names and each.is_wider and reason in each.reason for each in c.weights)


def slow(op: str, count: int) -> Callable[[BuildComparison], bool]:
    """Expect this number of ops of this name that run element by element."""
    return lambda c: sum(len(each.scopes) for each in c.slow if each.op == op and each.before) == count


def both(*checks: Callable[[BuildComparison], bool]) -> Callable[[BuildComparison], bool]:
    return lambda c: all(check(c) for check in checks)


WITHOUT_ATTENTION = [each for each in DEFAULT if not isinstance(each, FuseAttention)]
WITHOUT_LINEAR = [each for each in DEFAULT if not isinstance(each, FuseLinear)]
INT4, INT8 = {"quantize": "int4"}, {"quantize": "int8-weights"}
BAD, TVM = {"bad": True}, {"backend": "tvm"}

PLANTED = (
    # fusions
    Planted("attention over queries", spelled_attention, lost("attention", 3)),
    Planted("gelu with another factor", kept_gelu, lost("activation", 2)),
    Planted("norm over positions", spelled_norm, lost("normalization", 1)),
    Planted("product read before its activation", read_before_activation, lost("epilogue", 1)),
    Planted("gate read twice", gate_read_twice, lost("gate", 1)),
    Planted("norm of another value", residual_norm, lost("residual", 2, "exp is next to them")),
    Planted("projections of several values", merged_projections, lost("projection", 2)),
    Planted("embeddings apart", summed_embeddings, lost("embedding", 1, "tanh is next to them")),
    Planted(
        "no fuse-attention",
        spelled_attention,
        lost("attention", 3, "the pipeline has no fuse-attention"),
        b={"passes": WITHOUT_ATTENTION},
    ),
    # memory
    Planted("an early value alive", early_value, both(grew("peak", 1.2), lambda c: bool(c.grown))),
    Planted("pairs computed first", expanded, grew("peak", 10)),
    Planted("a wider layer", decoder, both(grew("peak"), grew("weights")), b={"hidden": 512}),
    # weights
    Planted("no quantization", decoder, both(wider("h.0.mlp.up.weight"), grew("bits", 2)), a=INT8, b={}),
    Planted("rows of 80 elements", odd_width, wider("down.weight"), a=INT4, b=INT4 | BAD),
    Planted("a weight read elsewhere", read_elsewhere, wider("w", "exp"), a=INT8, b=INT8 | BAD),
    Planted("a table of its own", tied_table, both(grew("weights", 1.05), lambda c: len(c.weights) > 0)),
    # kernels
    Planted("argmax over a strided axis", largest, slow("argmax", 1), a=TVM, b=TVM | BAD, needs="tvm"),
    Planted("running sums over the last axis", running_sums, slow("cumsum", 2), a=TVM, b=TVM | BAD, needs="tvm"),
    # ops
    Planted("another epsilon", decoder, changed("layer_norm eps: 1e-05 -> 1e-06", 7), b={"eps": 1e-6}),
    Planted("no window", decoder, both(changed("attention", 3), grew("flops")), b={"window": None}),
    Planted("an activation in one layer", decoder, changed('activation: "gelu" -> "relu"'), b={"relu_at": 1}),
    Planted("an adapter", decoder, lambda c: [g.scopes for g in c.added] == [("h.1.adapter",)], b={"extra_at": 1}),
    Planted("residual from the start", decoder, changed("reads another x", 2), b={"skips": True}),
    Planted("one added layer", decoder, lambda c: [g.scope for g in c.added if g.is_layer] == ["h.3"], b={"layers": 4}),
)

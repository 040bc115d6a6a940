"""Candidate sites: their root and their nodes, and programs that only look like a site."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from treadle.ir.builder import Builder, Expr
from treadle.ir.graph import Graph
from treadle.passes.sites.fusion_sites import find_sites

Build = Callable[[Builder], Expr]


def x_of(b: Builder, name: str = "x", type: str = "f32[B, S, 8]") -> Expr:
    return b.input(name, type)


def w_of(b: Builder, name: str = "w", type: str = "f32[8, 8]") -> Expr:
    return b.parameter(name, type)


def scores(b: Builder) -> Expr:
    """Return x y^T."""
    return b.einsum(x_of(b), x_of(b, "y"), equation="b s d, b t d -> b s t")


def weighted(b: Builder, p: Expr) -> Expr:
    return p @ x_of(b, "v")


def exponentials(b: Builder, guard: bool = False, shift: bool = True) -> Expr:
    z = scores(b)
    e = b.exp(z - b.reduce_max(z, axes=(-1,), keep=True)) if shift else b.exp(z)
    total = b.reduce_sum(e, axes=(-1,), keep=True)
    return e / (b.where(total > 0.0, total, 1.0) if guard else total)


def normalized(
    b: Builder, root: Callable[[Expr], Expr], square: Callable[[Expr], Expr] = lambda x: x * x, centered: bool = False
) -> Expr:
    """Return x times, or divided by, a root of the mean of its square."""
    x = x_of(b)
    x = x - b.reduce_mean(x, axes=(-1,), keep=True) if centered else x
    return root(b.reduce_mean(square(x), axes=(-1,), keep=True) + 1e-5) * x


def waves(b: Builder) -> tuple[Expr, Expr]:
    angles = b.input("angles", "f32[S, 8]")
    return b.cos(angles), b.sin(angles)


def turned(b: Builder, x: Expr, negate: bool = True) -> Expr:
    """Return concat(-x2, x1)."""
    one, two = b.slice(x, axis=2, stop=4), b.slice(x, axis=2, start=4)
    return b.concat(-two if negate else two, one, axis=2)


def rotated(b: Builder, tables: bool = False, negate: bool = True, same: bool = False) -> Expr:
    x = x_of(b)
    cos, sin = (b.input(n, "f32[S, 8]") for n in ("c", "s")) if tables else waves(b)
    return x * cos + turned(b, x, negate) * (cos if same else sin)


def swapped(b: Builder, w: Expr) -> Expr:
    return b.rearrange(w, pattern="n k -> k n")


def gated(b: Builder, act: Callable[[Expr], Expr], other: str = "x") -> Expr:
    """Return act(x w) * (y u)."""
    x = x_of(b)
    return act(b.linear(x, w_of(b))) * b.linear(x if other == "x" else x_of(b, other), w_of(b, "u"))


def halves(b: Builder, second: int) -> Expr:
    """Return silu of one half of a product, times the half that begins at `second`."""
    y = b.linear(x_of(b), w_of(b))
    one, other = (b.slice(y, axis=2, start=at, stop=at + 4) for at in (0, second))
    return b.silu(one) * other


def looked_up(b: Builder, name: str) -> Expr:
    return b.embedding(w_of(b, name), b.input(f"{name}_at", "i64[B, S]"))


def projected(b: Builder, *, lies: tuple[str, str] = ("n k", "n k"), other: str = "x", finished: bool = False) -> Expr:
    """Return two products, joined by an op other than addition, so that no other site exists; `moved`: transpose one
    weight.
    """
    made = []
    x = x_of(b)
    for name, laid, of in (("w", lies[0], x), ("u", lies[1], x if other == "x" else x_of(b, other))):
        w = w_of(b, name)
        w = b.rearrange(w, pattern="a b -> b a") if "moved" in laid else w
        y = b.linear(of, w) if laid.startswith("n k") else b.matmul(of, w)
        made.append(b.relu(y) if finished and name == "w" else y)
    return b.maximum(*made)


SITES: dict[str, tuple[Build, list[str]]] = {
    # -- attention
    "softmax": (lambda b: weighted(b, b.softmax(scores(b))), ["attention: softmax einsum matmul"]),
    "softmax, rounded": (
        lambda b: weighted(b, b.softmax(scores(b).cast("f64")).cast("f32")),
        ["attention: softmax cast einsum cast matmul"],
    ),
    "a sink": (
        lambda b: weighted(
            b,
            b.slice(b.softmax(b.concat(scores(b), x_of(b, "sink", "f32[B, S, 1]"), axis=2)), axis=2, start=0, stop="S"),
        ),
        ["attention: softmax concat einsum slice matmul"],
    ),
    "softmax spelled": (lambda b: weighted(b, exponentials(b)), ["attention: div sub exp reduce_sum einsum matmul"]),
    "softmax spelled, guarded": (
        lambda b: weighted(b, exponentials(b, guard=True)),
        ["attention: div sub exp reduce_sum einsum matmul"],
    ),
    "softmax without its maximum": (
        lambda b: weighted(b, exponentials(b, shift=False)),
        ["attention: div exp reduce_sum einsum matmul"],
    ),
    "softmax of an input": (lambda b: weighted(b, b.softmax(b.input("z", "f32[B, S, S]"))), []),
    "softmax before no product": (lambda b: b.softmax(scores(b)) * 2.0, []),
    "softmax over a sum": (
        lambda b: weighted(b, b.softmax(b.cumsum(scores(b), axis=2))),
        [],
    ),
    "exp over another sum": (
        lambda b: weighted(
            b, b.exp(scores(b)) / b.reduce_sum(b.exp(x_of(b, "z", "f32[B, S, S]")), axes=(-1,), keep=True)
        ),
        [],
    ),
    # -- normalization
    "rms": (lambda b: normalized(b, b.rsqrt), ["normalization: reduce_mean mul add rsqrt mul"]),
    "rms by pow": (
        lambda b: normalized(b, lambda m: b.pow(m, -0.5), lambda x: b.pow(x, 2.0)),
        ["normalization: reduce_mean pow add pow mul"],
    ),
    "rms by a root, reciprocal": (
        lambda b: normalized(b, lambda m: b.reciprocal(b.sqrt(m))),
        ["normalization: reduce_mean mul add sqrt reciprocal mul"],
    ),
    "layer norm": (
        lambda b: normalized(b, b.rsqrt, centered=True),
        ["normalization: reduce_mean mul sub add rsqrt mul"],
    ),
    "no root": (lambda b: normalized(b, b.reciprocal), []),
    "another root": (lambda b: normalized(b, lambda m: b.pow(m, 0.25)), []),
    "no square": (lambda b: normalized(b, b.rsqrt, lambda x: b.pow(x, 3.0)), []),
    "a product, not a square": (lambda b: normalized(b, b.rsqrt, lambda x: x * x_of(b, "y")), []),
    # -- activation
    "gelu": (
        lambda b: (x := x_of(b)) * 0.5 * (b.erf(x * 0.7) + 1.0),
        ["activation: erf mul add mul"],
    ),
    "tanh of a cube": (
        lambda b: (x := x_of(b)) * (b.tanh(x * x * x * 0.8) + 1.0) * 0.5,
        ["activation: tanh mul add mul mul"],
    ),
    "silu": (lambda b: (x := x_of(b)) * b.sigmoid(x), ["activation: sigmoid mul"]),
    "tanh without 1": (lambda b: (x := x_of(b)) * b.tanh(x), []),
    "sigmoid of another": (lambda b: x_of(b) * b.sigmoid(x_of(b, "y")), []),
    "sigmoid that is added": (lambda b: (x := x_of(b)) + b.sigmoid(x), []),
    # -- rotary
    "turned": (rotated, ["rotary: add mul mul cos concat sin"]),
    "turned by tables": (lambda b: rotated(b, tables=True), ["rotary: concat neg slice mul"]),
    "halves without a sign": (lambda b: rotated(b, tables=True, negate=False), []),
    "cosines alone": (lambda b: rotated(b, same=True), []),
    # -- linear
    "a weight that is turned": (lambda b: x_of(b) @ swapped(b, w_of(b)), ["linear: matmul rearrange"]),
    "with a bias": (
        lambda b: x_of(b) @ swapped(b, w_of(b)) + w_of(b, "bias", "f32[8]"),
        ["linear: matmul rearrange add"],
    ),
    "a weight as it lies": (lambda b: x_of(b) @ w_of(b), []),
    "an input that is turned": (lambda b: x_of(b) @ swapped(b, x_of(b, "y", "f32[8, 8]")), []),
    # -- products that are finished
    "an epilogue": (lambda b: b.relu(b.linear(x_of(b), w_of(b))), ["epilogue: relu linear"]),
    "an epilogue with a bias": (
        lambda b: b.relu(b.matmul(x_of(b), w_of(b)) + w_of(b, "bias", "f32[8]")),
        ["epilogue: relu add matmul"],
    ),
    "an activation of a part": (lambda b: b.relu(b.slice(b.linear(x_of(b), w_of(b)), axis=2, stop=4)), []),
    "an activation of two": (lambda b: b.relu(b.linear(x_of(b), w_of(b)) + b.linear(x_of(b, "y"), w_of(b, "u"))), []),
    "a gate": (lambda b: gated(b, b.silu), ["gate: mul silu linear linear"]),
    "a gate, the activation last": (
        lambda b: b.linear(x := x_of(b), w_of(b, "u")) * b.silu(b.linear(x, w_of(b))),
        ["gate: mul silu linear linear"],
    ),
    "a scaled gate": (
        lambda b: b.linear(x := x_of(b), w_of(b, "u")) * b.sigmoid(b.linear(x, w_of(b)) * 1.7),
        ["scale: mul linear", "gate: mul sigmoid mul linear linear"],
    ),
    "a gate of two values": (lambda b: gated(b, b.relu, "y"), ["gate: mul relu linear linear"]),
    "a bilinear gate": (lambda b: gated(b, lambda y: y), ["gate: mul linear linear"]),
    "a bilinear gate with biases": (
        lambda b: (
            (b.linear(x := x_of(b), w_of(b)) + w_of(b, "c", "f32[8]"))
            * (b.linear(x, w_of(b, "u")) + w_of(b, "d", "f32[8]"))
        ),
        ["gate: mul add add linear linear"],
    ),
    "a scaled product times another": (
        lambda b: gated(b, lambda y: y * 0.5),
        ["projection: linear linear", "scale: mul linear"],
    ),
    "a product of products of two": (lambda b: gated(b, lambda y: y, "y"), []),
    "a gate of halves": (lambda b: halves(b, 4), ["gate: mul silu slice slice linear"]),
    "a gate of one half": (lambda b: halves(b, 0), []),
    # -- the residual stream
    "a norm of a sum": (
        lambda b: b.rms_norm(b.relu(x_of(b)) + b.exp(x_of(b, "y")), w_of(b, "g", "f32[8]")),
        ["residual: add rms_norm"],
    ),
    "a norm of a sum with a weight": (
        lambda b: b.rms_norm(b.relu(x_of(b)) + w_of(b, "p", "f32[8]"), w_of(b, "g", "f32[8]")),
        [],
    ),
    "a norm of a sum that broadcasts": (
        lambda b: b.rms_norm(b.relu(x_of(b)) + b.exp(x_of(b, "y", "f32[B, 1, 8]")), w_of(b, "g", "f32[8]")),
        [],
    ),
    "two embeddings": (lambda b: looked_up(b, "w") + looked_up(b, "u"), ["embedding: add embedding embedding"]),
    "three embeddings": (
        lambda b: looked_up(b, "w") + looked_up(b, "u") + looked_up(b, "t"),
        ["embedding: add add embedding embedding embedding"],
    ),
    "one embedding": (lambda b: looked_up(b, "w") + x_of(b), []),
    "a router's gates": (
        lambda b: b.softmax(b.linear(x_of(b), w_of(b)), axis=-1) @ x_of(b, "v", "f32[8, 8]"),
        [],
    ),
    "scores of a linear op": (
        lambda b: b.softmax(b.linear(x_of(b), x_of(b, "k", "f32[8, 8]")), axis=-1) @ x_of(b, "v", "f32[8, 8]"),
        ["attention: softmax linear matmul"],
    ),
    # -- products of one value
    "two products": (projected, ["projection: linear linear"]),
    "two products of weights that lie alike": (
        lambda b: projected(b, lies=("k n", "k n")),
        ["projection: matmul matmul"],
    ),
    "a weight that is transposed first": (
        lambda b: projected(b, lies=("n k", "k n moved")),
        ["projection: linear matmul", "linear: matmul rearrange"],
    ),
    "a weight that is transposed to lie the other way": (
        lambda b: projected(b, lies=("k n", "n k moved")),
        ["projection: matmul linear"],
    ),
    "transposed, and not": (
        lambda b: projected(b, lies=("k n", "k n moved")),
        ["linear: matmul rearrange"],
    ),
    "weights that lie otherwise": (lambda b: projected(b, lies=("n k", "k n")), []),
    "products of two values": (lambda b: projected(b, other="y"), []),
    "one that is finished": (lambda b: projected(b, finished=True), ["epilogue: relu linear"]),
    # -- scales
    "a scaled product": (lambda b: b.linear(x_of(b), w_of(b)) * 0.5, ["scale: mul linear"]),
    "a scale before": (lambda b: 0.5 * b.matmul(x_of(b), w_of(b)), ["scale: mul matmul"]),
    "a divided norm": (lambda b: b.rms_norm(x_of(b), w_of(b, "g", "f32[8]")) / 3.0, ["scale: div rms_norm"]),
    "a scale that is a weight": (
        lambda b: b.linear(x_of(b), w_of(b)) * w_of(b, "c", "f32[]"),
        ["scale: mul linear"],
    ),
    "a scale for each column": (lambda b: b.linear(x_of(b), w_of(b)) * w_of(b, "c", "f32[8]"), []),
    "a scale that is computed": (lambda b: b.linear(x_of(b), w_of(b)) * b.exp(x_of(b, "c", "f32[]")), []),
    "a scaled product of inputs": (lambda b: b.matmul(x_of(b), x_of(b, "y", "f32[8, 8]")) * 0.5, []),
}


@pytest.mark.parametrize("name", SITES)
def test_fusion_sites(name: str) -> None:
    """The sites that are found, except fused ops."""
    build, expected = SITES[name]
    b = Builder(Graph("g"))
    b.outputs(y=build(b))
    found = [site for site in find_sites(b.graph) if site.op is None]
    assert [f"{site.kind}: {' '.join(node.op.name for node in site.nodes)}" for site in found] == expected

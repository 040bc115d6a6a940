"""Random graphs, meshes and axes to split, and their results in the lab, for tests that apply to any sharding.

The same seed yields the same case. Some sizes are divisible by the mesh and others are not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from random import Random
from typing import Any

import numpy as np

from treadle.ir.attention.attention_terms import Alibi, Causal
from treadle.ir.builder import Builder, Expr
from treadle.ir.errors import PassError, UsageError
from treadle.ir.graph import Function, Graph
from treadle.ir.interpreter import interpret
from treadle.passes.sharding.checking import check_sharding
from treadle.passes.sharding.plan import ShardingPlan
from treadle.passes.sharding.recipes import shard
from treadle.runtime.sharding_lab import run_lab
from treadle.sharding import rank_graph

MESHES = ("tp=2", "tp=4", "tp=8", "tp=2,dp=2", "tp=3", "dp=2,tp=4", "tp=6", "a=2,b=2,c=2")
PIPELINES = ("pp=2,tp=2,micro=3", "pp=2,tp=4,micro=2", "pp=3,tp=2,micro=2", "pp=2,tp=2,dp=2,micro=2", "pp=2,micro=4")
SIZES = {"B": 9, "S": 11}
WIDTHS = (8, 9, 12, 16)

Array = np.ndarray[Any, Any]
Write = Callable[[Builder, Random, Expr], Expr | None]


@dataclass(frozen=True)
class Case:
    """A graph, the axes to split, and numbers for its inputs and weights."""

    graph: Graph
    mesh: str
    axes: dict[str, str]
    recipe: str | None
    inputs: dict[str, Array]
    weights: dict[str, Array]

    def plan(self) -> ShardingPlan:
        """Return the plan after its checker has accepted it.

        An axis that is shorter than the mesh axis is not split.
        """
        axes = dict(self.axes)
        while True:
            try:
                made = shard(self.graph, self.mesh, recipe=self.recipe, axes=axes, sizes=SIZES)
            except UsageError as error:
                name, _, detail = error.what.partition(": ")
                if "cannot be split over" not in detail:
                    raise
                axes[name] = "-"
            else:
                check_sharding(made)
                return made


def weight(b: Builder, *sizes: Any) -> Expr:
    name = f"w{len(b.function.parameters)}"
    return b.parameter(name, f"f64[{', '.join(map(str, sizes))}]")


def constant(b: Builder, r: Random, *shape: int) -> Expr:
    """Return a constant, often one that other nodes read already."""
    known = [v for n in b.function.nodes for v in n.inputs if v.literal is not None and v.literal.shape == shape]
    if known and r.random() < 0.8:
        return b.expr(known[0])
    return b.constant(np.array([r.uniform(0.1, 1.0) for _ in range(prod(shape))]).reshape(shape))


def linear(b: Builder, r: Random, x: Expr) -> Expr:
    n = r.choice(WIDTHS)
    return b.linear(x, weight(b, n, x.shape[-1]), weight(b, n) if r.random() < 0.6 else None)


def matmul(b: Builder, r: Random, x: Expr) -> Expr:
    return b.matmul(x, weight(b, x.shape[-1], r.choice(WIDTHS)))


def elementwise(b: Builder, r: Random, x: Expr) -> Expr:
    return r.choice([b.gelu, b.tanh, b.neg, b.abs])(x)


def scaled(b: Builder, r: Random, x: Expr) -> Expr:
    width, scalars = x.shape[-1], [b.expr(v) for v in b.function.inputs[1:]]
    factors: list[Any] = [weight(b, width), weight(b), 0.5, *scalars]
    return x * r.choice(factors if width.constant is None else [*factors, constant(b, r, width.constant)])


def shifted(b: Builder, r: Random, x: Expr) -> Expr:
    return x + weight(b, x.shape[-1]) if r.random() < 0.7 else x - 0.25


def norm(b: Builder, r: Random, x: Expr) -> Expr:
    if r.random() < 0.5:
        return b.rms_norm(x, weight(b, x.shape[-1]))
    return b.layer_norm(x, weight(b, x.shape[-1]), weight(b, x.shape[-1]))


def softmax(b: Builder, r: Random, x: Expr) -> Expr:
    kind = r.choice([b.softmax, b.log_softmax])
    return kind(x, axis=r.randrange(x.rank))


def reduced(b: Builder, r: Random, x: Expr) -> Expr:
    kind = r.choice([b.reduce_sum, b.reduce_max, b.reduce_mean, b.reduce_min])
    return kind(x, axes=(r.randrange(x.rank),), keep=True) + x * 0.1


def transposed(b: Builder, r: Random, x: Expr) -> Expr:
    names = [f"a{i}" for i in range(x.rank)]
    mixed = r.sample(names, len(names))
    return b.rearrange(x, pattern=f"{' '.join(names)} -> {' '.join(mixed)}")


def split_and_merged(b: Builder, r: Random, x: Expr) -> Expr | None:
    """Add two ops: [..., (h d)] -> [..., (d h)], or back to [..., (h d)]."""
    width = x.shape[-1].constant
    if width is None or width % 4:
        return None
    rest = [f"a{i}" for i in range(x.rank - 1)]
    y = b.rearrange(x, pattern=f"{' '.join(rest)} (h=4 d) -> {' '.join(rest)} h d")
    y = b.gelu(y) if r.random() < 0.5 else y
    order = r.choice(["(h d)", "(d h)"])
    return b.rearrange(y, pattern=f"{' '.join(rest)} h d -> {' '.join(rest)} {order}")


def sloped(b: Builder, r: Random, x: Expr) -> Expr | None:
    """Add x times a number for each of four heads; the numbers may be shared with other nodes."""
    width = x.shape[-1].constant
    if width is None or width % 4:
        return None
    rest = " ".join(f"a{i}" for i in range(x.rank - 1))
    y = b.rearrange(b.linear(x, weight(b, 8, width)), pattern=f"{rest} (h=4 d) -> {rest} h d")
    y = y * b.rearrange(constant(b, r, 4), pattern="h -> h 1")
    return b.linear(b.rearrange(y, pattern=f"{rest} h d -> {rest} (h d)"), weight(b, width, 8))


def attention(b: Builder, r: Random, x: Expr) -> Expr | None:
    if x.rank != 3 or x.shape[1].constant is not None:
        return None
    (groups, repeats), d = r.choice([(2, 1), (4, 2), (3, 2), (4, 1), (8, 1)]), 4
    made = []
    for heads in (groups * repeats, groups, groups):
        y = b.linear(x, weight(b, heads * d, x.shape[-1]))
        made.append(b.rearrange(y, pattern=f"b s (heads={heads} d) -> b heads s d"))
    masks = (Causal(),) if r.random() < 0.5 else ()
    if r.random() < 0.4:
        y = b.attention(*made, constant(b, r, groups * repeats), terms=(*masks, Alibi()))
    else:
        y = b.attention(*made, terms=masks)
    return b.linear(b.rearrange(y, pattern="b heads s d -> b s (heads d)"), weight(b, 12, groups * repeats * d))


def sliced(b: Builder, r: Random, x: Expr) -> Expr:
    return b.slice(x, axis=r.randrange(x.rank), start=1)


def joined(b: Builder, r: Random, x: Expr) -> Expr:
    return b.concat(x, x * 2.0, axis=r.randrange(x.rank))


def scanned(b: Builder, r: Random, x: Expr) -> Expr:
    return b.cumsum(x, axis=r.randrange(x.rank)) * 0.1


def looked_up(b: Builder, r: Random, x: Expr) -> Expr:
    indices, rows = b.argmax(x, axis=-1), x.shape[-1]
    if r.random() < 0.5:
        return b.embedding(weight(b, rows, 12), indices)
    return b.rearrange(b.gather(weight(b, 5, rows), indices, axis=1), pattern="e ... -> ... e")


def expanded(b: Builder, r: Random, x: Expr) -> Expr:
    top = b.reduce_max(x, axes=(x.rank - 1,), keep=True)
    return b.expand(top, shape=(*x.shape[:-1], 9)) if r.random() < 0.5 else b.expand(top, shape=x.shape) + x


def twice(b: Builder, r: Random, x: Expr) -> Expr:
    """Add two products whose partial sums may be added before they are reduced."""
    n = r.choice(WIDTHS)
    return b.linear(x, weight(b, n, x.shape[-1])) + b.linear(b.gelu(x), weight(b, n, x.shape[-1]), weight(b, n))


WITH_WEIGHTS: tuple[Write, ...] = (
    linear,
    linear,
    matmul,
    scaled,
    shifted,
    norm,
    looked_up,
    twice,
    sloped,
    attention,
    attention,
)
OTHERS: tuple[Write, ...] = (
    elementwise,
    softmax,
    reduced,
    transposed,
    split_and_merged,
    sliced,
    joined,
    scanned,
    expanded,
)


def random_case(seed: int, most: int = 7) -> Case:
    """Return a case for a seed."""
    r = Random(seed)
    graph = random_graph(r, most)
    mesh = r.choice(MESHES)
    axes = random_axes(r, graph, mesh)
    recipe = "fsdp" if "dp=" in mesh and r.random() < 0.5 else None  # weights are sharded, and gathered for use
    return Case(graph, mesh, axes, recipe, *numbers_for(graph, seed))


def random_pipeline(seed: int, most: int = 9) -> Case:
    """Return a case with pipeline stages for a seed: the first drawn case whose micro-batches do not communicate."""
    r = Random(seed)
    while True:
        graph = random_graph(r, most)
        mesh = r.choice(PIPELINES)
        case = Case(graph, mesh, random_axes(r, graph, mesh), "gpipe", *numbers_for(graph, seed))
        try:
            case.plan()
        except PassError as error:
            if "cannot be computed separately" not in error.what and "cannot be cut into" not in error.what:
                raise
        except UsageError as error:
            if "no batch to split" not in error.what:
                raise
        else:
            return case


def random_graph(r: Random, most: int) -> Graph:
    """Return a graph of at most `most` layers, some of whose inputs, weights, constants and outputs are scalars."""
    graph = Graph("random")
    b = Builder(graph)
    width = r.choice(WIDTHS)
    x = b.input("x", r.choice([f"f64[B, S, {width}]", f"f64[B, S, {width}]", f"f64[B, {width}]", f"f64[12, {width}]"]))
    for n in range(r.choice([0, 0, 0, 1, 2])):
        b.input(f"s{n}", "f64[]")
    if r.random() < 0.3:
        x = in_a_block(b, r, x, width)
    kept = [x]
    for _ in range(r.randint(1, most)):
        y = r.choice(OTHERS if x.shape[-1].constant is None else (*WITH_WEIGHTS, *OTHERS))(b, r, x)
        if y is not None:
            kept.append(y)
            same = [z for z in kept[:-1] if z.type == y.type]
            x = y + r.choice(same) if same and r.random() < 0.4 else y
    outputs = {"y": x} | ({"z": r.choice(kept[1:])} if len(kept) > 1 and r.random() < 0.4 else {})
    if r.random() < 0.3:
        outputs |= {"total": scalar(b, r, r.choice(kept))}
    b.outputs(**outputs)
    return graph


def scalar(b: Builder, r: Random, x: Expr) -> Expr:
    """Add a value of rank 0: a reduction of x or of a weight, or a separate input, weight or constant."""
    made = [weight(b), constant(b, r), *[b.expr(v) for v in b.function.inputs[1:]]]
    if r.random() < 0.3:
        return r.choice(made)
    y = x if r.random() < 0.6 else weight(b, 8, 9)
    kind = r.choice([b.reduce_sum, b.reduce_max, b.reduce_mean])
    return kind(y, axes=tuple(range(y.rank))) * r.choice(made)


def numbers_for(graph: Graph, seed: int) -> tuple[dict[str, Array], dict[str, Array]]:
    """Draw inputs and weights from a seed."""
    rng = np.random.default_rng(seed)
    inputs = {v.name: np.asarray(rng.normal(size=v.type.evaluate(SIZES))) for v in graph.main.inputs}
    weights = {n: np.asarray(rng.normal(size=v.type.evaluate({})) * 0.3) for n, v in graph.parameters.items()}
    return inputs, weights


def in_a_block(b: Builder, r: Random, x: Expr, width: int) -> Expr:
    """Add a function that is called twice."""
    block = Function("block")
    inner = Builder(b.graph, block)
    y = inner.input("y", x.type)
    hidden = r.choice(WIDTHS)
    z = inner.gelu(inner.linear(y, inner.parameter("up", f"f64[{hidden}, {width}]")))
    z = inner.linear(z, inner.parameter("down", f"f64[{width}, {hidden}]"), inner.parameter("bias", f"f64[{width}]"))
    inner.outputs(z=y + z)
    b.graph.add_function(block)
    for i in range(2):
        shapes = (("up", f"{hidden}, {width}"), ("down", f"{width}, {hidden}"), ("bias", f"{width}"))
        held = [b.parameter(f"h{i}.{name}", f"f64[{shape}]") for name, shape in shapes]
        (x,) = b.call(block, [x, *held])
    return x


def random_axes(r: Random, graph: Graph, mesh: str) -> dict[str, str]:
    """Choose one to four dimensions of inputs and weights to split, each over one or two axes of the mesh, never over
    the axis of stages.
    """
    dims = [f"{v.name}[{d}]" for v in graph.main.arguments for d in range(v.type.rank)]
    sizes = [axis.split("=") for axis in mesh.split(",") if axis.partition("=")[0] not in ("pp", "micro")]
    names = [name for name, _ in sizes] + [f"{name}:(1)2" for name, size in sizes if size in ("4", "8")]
    if not names:
        return {}
    found: dict[str, str] = {}
    for dim in r.sample(dims, min(len(dims), r.randint(1, 4))):
        chosen = [r.choice(names)]
        other = r.choice(names)
        if r.random() < 0.2 and other.partition(":")[0] != chosen[0].partition(":")[0]:
            chosen.append(other)
        found[dim] = " ".join(chosen)
    return found


def difference(case: Case, plan: ShardingPlan, *, merged: bool = False) -> float:
    """Return the largest difference between the lab's outputs and the unsplit graph's, relative to the largest element.

    merged  if true, run the remaining passes on the ranks' programs first
    """
    wanted = interpret(case.graph, case.inputs, case.weights, float64=True)
    programs = [rank_graph(plan, rank) for rank in range(plan.devices.ranks)] if merged else None
    found = run_lab(plan, case.inputs, case.weights, programs=programs).outputs
    return max(float(np.max(np.abs(found[n] - w)) / max(1.0, np.max(np.abs(w)))) for n, w in wanted.items())

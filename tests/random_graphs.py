"""Random well-typed graphs, for tests that apply to any graph. The same seed yields the same graph.

Every registered op is drawn from its own samples. Ops in `RECIPES` are also drawn on symbolic sizes. Names, scopes,
source lines and constants are sometimes as strange as the IR allows.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
from hypothesis import strategies as st

import treadle.ir.ops  # noqa: F401  (registers the ops)
from treadle.ir.builder import Builder, Expr
from treadle.ir.errors import TreadleError
from treadle.ir.graph import Function, Graph, Value
from treadle.ir.initial_values import Init
from treadle.ir.literals import Literal
from treadle.ir.op_registry import OPS
from treadle.ir.sizing.size_bounds import Bounds
from treadle.ir.source_lines import SourceLine
from treadle.ir.types import DTYPES, Type, boolean, f32, i64, parse_type

ODD_NAMES = (
    *("return", "none", "true", "inf", "nan", "with", "op", "main", "block", "f32", "data", "add", "weights"),
    *(
        "",
        " ",
        "x y",
        'a"b',
        "a\\b",
        "a\nb",
        "a\tb",
        "#",
        "0",
        "12.5",
        "-1",
        "a.b",
        ".a",
        "a..b",
        "h.{0..3}",
        "$w",
        "é",
    ),
    *("日本", "\u2028", "\x00", "\ud800", "x" * 200, "h.3", "x_2", "(", "a:b", "a=b", "//", "|"),
)
NUMBERS = (0.0, -0.0, 1.0, -1.5, 0.1, 1e-30, 1e30, 5e-324, float("inf"), float("-inf"), float("nan"), 65504.0, 1 / 3)
SYMBOLIC = ("f32[B, S, 8]", "f32[B, S, (heads=2 4)]", "f32[S, 8]", "f32[2*S+1, 8]", "f32[B, S//2, 8]", "i64[B, S]")

Recipe = Callable[[Builder, Random, Expr], Any]
RECIPES: dict[str, Recipe] = {
    "add": lambda b, r, x: x + r.choice(NUMBERS),
    "mul": lambda b, r, x: x * x,
    "sub": lambda b, r, x: r.choice(NUMBERS) - x,
    "neg": lambda b, r, x: -x,
    "exp": lambda b, r, x: b.exp(x),
    "gelu": lambda b, r, x: b.gelu(x),
    "cast": lambda b, r, x: b.cast(x, to=r.choice(list(DTYPES))),
    "softmax": lambda b, r, x: b.softmax(x, axis=r.randrange(-1, x.rank)),
    "reduce_sum": lambda b, r, x: b.reduce_sum(x, axes=tuple(range(r.randint(1, x.rank))), keep=r.random() < 0.5),
    "rms_norm": lambda b, r, x: b.rms_norm(x, weight(b, r, x.shape[-1]), eps=r.choice((1e-6, 1e-5, 0.1))),
    "layer_norm": lambda b, r, x: b.layer_norm(x, weight(b, r, x.shape[-1]), weight(b, r, x.shape[-1])),
    "linear": lambda b, r, x: b.linear(x, weight(b, r, 8, x.shape[-1])),
    "activated_linear": lambda b, r, x: b.activated_linear(
        x, weight(b, r, 8, x.shape[-1]), weight(b, r, 8), activation=r.choice(("gelu", "relu", "tanh"))
    ),
    "gated_linear": lambda b, r, x: b.gated_linear(
        x, weight(b, r, x.shape[-1], 8), weight(b, r, x.shape[-1], 8), weight_axes="k n"
    ),
    "concat": lambda b, r, x: b.concat(x, x, x, axis=r.randrange(x.rank)),
    "slice": lambda b, r, x: b.slice(
        x, axis=r.randrange(x.rank), start=r.choice((0, 1)), stop=r.choice((None, "S", 2))
    ),
    "pad": lambda b, r, x: b.pad(x, axis=0, before=r.choice((0, 1, "S")), after=1, value=r.choice(NUMBERS)),
    "iota": lambda b, r, x: b.iota(size=r.choice(("S", "S//2", "B*S", 3)), dtype=i64),
    "where": lambda b, r, x: b.where(x < r.choice(NUMBERS), x, 0.0),
    "gather": lambda b, r, x: b.gather(
        weight(b, r, 100, 8), b.input(f"ids{len(b.function.inputs)}", "i64[B, S]"), axis=0
    ),
    "top_k": lambda b, r, x: b.top_k(x, k=2, axis=-1),
    "rearrange": lambda b, r, x: b.rearrange(x, pattern="a b (heads=2 d) -> a heads b d"),
    "einsum": lambda b, r, x: b.einsum(x, weight(b, r, 8, 3), equation="b s d, d e -> b s e"),
}


def weight(b: Builder, r: Random, *sizes: Any) -> Expr:
    """Return a parameter with these sizes: a new one, or an existing one with the same type and name."""
    name = odd(r, f"h.{r.randrange(4)}.{r.choice(('ln.weight', 'attn.w', 'w'))}", 0.1)
    init = r.choice((None, Init("ones"), Init("normal", 0.02), Init("uniform", 1e-9)))
    type = f32[tuple(sizes)]
    known = b.function.parameters.get(name)
    return b.parameter(name if known is None or known.type == type else f"w{len(b.function.parameters)}", type, init)


def odd(r: Random, plain: str, chance: float = 0.2) -> str:
    """Return the plain name, or with some probability an odd one."""
    return r.choice(ODD_NAMES) if r.random() < chance else plain


def random_graph(seed: int, nodes: int = 10) -> Graph:
    """Return a random graph of `main` and up to two blocks, with about `nodes` nodes each."""
    r = Random(seed)
    graph = Graph(odd(r, "random"))
    for symbol, bounds in (("B", Bounds(1, 8)), ("S", Bounds(r.choice((0, 1, 2)), r.choice((None, 1024))))):
        graph.bound(symbol, Bounds()) if r.random() < 0.5 else graph.symbols.__setitem__(symbol, bounds)
    for number in range(r.choice((0, 0, 1, 2))):
        name = odd(r, f"block{number}")
        if name not in graph.functions:
            block = Function(name)
            fill(graph, block, r, r.randrange(nodes))
            graph.add_function(block)
    fill(graph, graph.main, r, r.randrange(2 * nodes))
    return graph


def random_graphs() -> st.SearchStrategy[Graph]:
    """Random graphs as a hypothesis strategy."""
    return st.integers(0, 2**32 - 1).map(random_graph)


def fill(graph: Graph, function: Function, r: Random, count: int) -> None:
    """Add inputs, `count` nodes and outputs to a function."""
    b = Builder(graph, function)
    pool: list[Expr] = []
    for number in range(r.randint(1, 3)):
        name = odd(r, f"x{number}")
        if all(v.name != name for v in function.inputs):
            pool.append(b.input(name, r.choice(SYMBOLIC)))
    blocks = [f for f in graph.functions.values() if f is not function and f is not graph.main]
    while len(function.nodes) < count:
        b.source = r.choice((None, SourceLine(odd(r, "models/gpt2.py"), r.randrange(900))))
        b.source = b.source or SourceLine("toy.py", 1)
        b.scope = odd(r, r.choice(("", "h.0", "h.1.attn")), 0.1)
        chance = r.random()
        if chance < 0.15 and blocks:
            pool += call(b, r, pool, r.choice(blocks))
        elif chance < 0.55:
            pool += from_sample(b, r, pool)
        else:
            pool += from_recipe(b, r, pool)
    for node in function.nodes:
        if r.random() < 0.2:
            node.source = None
        for value in node.results:
            value.name = odd(r, value.name, 0.1)
    for number in range(r.randint(1, 3)):
        chosen = r.choice(pool) if r.random() < 0.9 else b.expr(Value.constant(constant(r, r.choice(CONSTANT_TYPES))))
        function.outputs[odd(r, f"out{number}")] = chosen.value


def call(b: Builder, r: Random, pool: list[Expr], block: Function) -> list[Expr]:
    """Add a call. Its weights are under one common prefix, or any other weights of the same types."""
    prefix = r.choice(("", f"h.{r.randrange(3)}.", "shared weights."))
    arguments = [operand(b, r, pool, v.type) for v in block.inputs]
    for name, formal in block.parameters.items():
        full = f"{prefix}{name}"
        known = b.function.parameters.get(full)
        if prefix and (known is None or known.type == formal.type) and r.random() < 0.9:
            arguments.append(b.parameter(full, formal.type))
        else:
            arguments.append(operand(b, r, pool, formal.type))
    return list(b.call(block, arguments))


def from_sample(b: Builder, r: Random, pool: list[Expr]) -> list[Expr]:
    """Add an op on operands from one of its own samples."""
    cls = OPS[r.choice([name for name, cls in sorted(OPS.items()) if cls.samples])]
    sample = r.choice(list(cls.samples))
    operands = [None if t is None else operand(b, r, pool, t) for t in sample.types]
    made = b.apply(cls, *operands, **sample.attributes)
    return list(made) if isinstance(made, tuple) else [made]


def from_recipe(b: Builder, r: Random, pool: list[Expr]) -> list[Expr]:
    """Add an op of RECIPES on some value; do nothing if the op does not fit."""
    name = r.choice([name for name in RECIPES if name in OPS])
    try:
        with np.errstate(invalid="ignore"):  # nan as an integer
            made = RECIPES[name](b, r, r.choice([x for x in pool if x.rank >= 2]))
    except TreadleError:
        return []
    return list(made) if isinstance(made, tuple) else [made]


def operand(b: Builder, r: Random, pool: list[Expr], type: Type) -> Expr:
    """Return a value of a type: an existing one, a constant, a parameter or a new input."""
    fitting = [x for x in pool if x.type == type]
    if fitting and r.random() < 0.7:
        return r.choice(fitting)
    if r.random() < 0.3 and type.static_shape is not None and type.elements.constant < 200:
        return b.expr(Value.constant(constant(r, type)))
    if r.random() < 0.5:
        return b.parameter(f"p{len(b.function.parameters)}", type)
    return b.input(f"in{len(b.function.inputs)}", type)


CONSTANT_TYPES = [
    *(Type(dtype) for dtype in DTYPES.values()),
    *(
        parse_type(t)
        for t in ("f32[3]", "f64[2, 2]", "f16[0]", "i8[17]", "bool[2, 9]", "f32[2, 20]", "bf16[2]", "u8[5]")
    ),
]


def constant(r: Random, type: Type) -> Literal:
    """Return a constant of any value: each bit pattern of its dtype may occur."""
    shape = type.static_shape or ()
    count = int(np.prod(shape))
    kind = type.dtype.numpy
    if type.dtype is boolean:
        data = bytes(r.choice((0, 1)) for _ in range(count))
    elif kind is None or r.random() < 0.3:
        data = r.randbytes(count * type.dtype.bytes)
    elif type.dtype.is_float:
        with np.errstate(over="ignore"):
            data = np.array([r.choice(NUMBERS) for _ in range(count)]).astype(kind).tobytes()
    else:
        data = np.array([r.randrange(100) for _ in range(count)]).astype(kind).tobytes()
    return Literal(type.dtype, shape, data)

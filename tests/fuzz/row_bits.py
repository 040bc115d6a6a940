"""Draw programs with independent rows, and check that the bits of a row do not depend on the other rows.

    python -m tests.fuzz.row_bits [--count 400] [--seed 0]

A program is compiled by the TVM backend for any number of rows M, called with 33 rows, and then with drawn subsets of
these rows in drawn orders. Each row must have the same bits as in the call with 33. The draw covers the kind of kernel
(products with fused ops, in every format of weights; chains; norms, softmax and other reductions; attention; rotary
positions; rows of tables; gradients), widths from 1 to 100, or as a format's blocks need them, and the instruction set.
Exit status 1 if a row differs, or if anything is raised.
"""

from __future__ import annotations

import argparse
import collections
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np

import treadle
from treadle.backends.tvm.kernels.isa import ISAS, runs_here
from treadle.ir.analysis.drawn_inputs import draw_inputs, held
from treadle.ir.attention.attention_terms import Causal
from treadle.ir.builder import Builder, Expr
from treadle.ir.encodings.encoding import parse_encoding
from treadle.ir.graph import Graph, Node, Value
from treadle.ir.transforms.differentiate import backward
from treadle.ir.transforms.encoded_weights import encode_parameters
from treadle.ir.types import DTYPES, DType, f32, i64

Array = np.ndarray[Any, Any]

ROWS = 33
WIDEST = 100
TABLE = 40
"""Number of rows of a table that is indexed."""
QUANTIZED = ("int8", "int8-weights", "int4", "int4-int8")
SMALL_BLOCKS = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "int8_rows", "int4_groups(32)", "int4_groups(64)")
LARGE_BLOCKS = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")
FORMATS = ("f32", "bf16", *QUANTIZED, *SMALL_BLOCKS, *LARGE_BLOCKS, *(f"{form} bf16" for form in SMALL_BLOCKS[:4]))
FORMATS += ("q4_k bf16", "q6_k bf16", "q4_0 int8", "q5_k int8", "q6_k int8")
"""Formats of weights: float32, rounded to bf16, quantized, in blocks, and in blocks with rounded activations."""


@dataclass
class Case:
    """A program of M rows.

    title    the drawn parts
    graph    its inputs and outputs have rows along their first axes
    weights  arrays of its parameters
    inputs   arrays with ROWS rows
    options  of `treadle.compile`
    """

    title: str
    graph: Graph
    weights: dict[str, Array]
    inputs: dict[str, Array]
    options: dict[str, Any]


# -- parts of programs -----------------------------------------------------------------------------------------------


class Drawn:
    """A program that is being drawn: its graph, the weights that are stored in blocks, and the options of
    `treadle.compile`.
    """

    def __init__(self, r: Random) -> None:
        self.r, self.graph = r, Graph("rows")
        self.b = Builder(self.graph)
        self.encodings: dict[str, str] = {}
        self.options: dict[str, Any] = {}

    def input(self, *shape: int, dtype: DType = f32) -> Expr:
        """Add an input with rows, and return it."""
        return self.b.input(f"x{len(self.graph.main.inputs)}", dtype["M", *shape])

    def weight(self, *shape: int, dtype: DType = f32) -> Expr:
        """Add a weight, which has no rows, and return it."""
        return self.b.parameter(f"w{len(self.graph.main.parameters)}", dtype[shape])

    def width(self) -> int:
        return self.r.choice((self.r.randint(1, WIDEST), self.r.choice((16, 17, 24, 31, 32, 33, 48, 64, 96))))


UNARY = ("gelu", "gelu_tanh", "silu", "quick_gelu", "relu", "tanh", "sigmoid", "erf", "exp", "neg", "abs", "sin", "cos")
"""Functions of one operand for chains."""


def followed(d: Drawn, y: Expr, most: int = 5) -> Expr:
    """Add some elementwise ops to a value with rows, among them sums of products, and return the result."""
    for _ in range(d.r.randint(0, most)):
        y = _next(d, y)
    return y


def _next(d: Drawn, y: Expr) -> Expr:
    b, r, columns, dtype = d.b, d.r, int(y.shape[-1]), y.dtype

    def other() -> Expr:
        kind = r.choice(("rows", "weight", "number", "itself"))
        if kind == "rows":
            return d.input(columns, dtype=dtype)
        if kind == "weight":
            return d.weight(columns, dtype=dtype)
        return y if kind == "itself" else b.constant(r.choice((0.1, -1.7, 3.0)), dtype)

    scale = r.choice((0.1, 0.7, -1.3))
    made: tuple[Callable[[], Expr], ...] = (
        lambda: getattr(b, r.choice(UNARY))(y),
        lambda: y + other(),
        lambda: y * other(),
        lambda: other() - y,
        lambda: other() + y * scale,
        lambda: y * scale - other(),
        lambda: y * other() + other() * scale,
    )
    return r.choice(made)()


def product(d: Drawn) -> tuple[str, Expr]:
    """Add a linear map, activated or gated, and following ops; sometimes a second linear map after it."""
    r = d.r
    form = r.choice(FORMATS)
    blocks, _, computed = form.partition(" ")
    encoded = blocks in SMALL_BLOCKS + LARGE_BLOCKS
    k, n = d.width(), d.width()
    if encoded or form in QUANTIZED:
        k = (parse_encoding(blocks).block.elements or 1) if encoded else 32
        k = max(32, k) * r.choice((1, 2, 3)) if k > 1 and r.random() < 0.9 else d.width()
    if "bf16" in (form, computed):
        d.options["dtype"] = "bf16"
    if form in QUANTIZED or computed == "int8":
        d.options["quantize"] = "int4-int8" if encoded else form
    y = linear(d, d.input(k), n, blocks if encoded else None)
    if r.random() < 0.3:
        y = linear(d, y, d.width(), blocks if encoded else None)
    return f"product of {form}", y


def linear(d: Drawn, x: Expr, n: int, blocks: str | None) -> Expr:
    """Add a product with a matrix, which is stored in blocks if its row length is a multiple of the block."""
    b, r, k = d.b, d.r, int(x.shape[-1])
    made = [d.weight(n, k)]
    kind = r.choice(("linear", "linear", "activated", "gated"))
    if kind == "activated":
        y = b.activated_linear(x, made[0], d.weight(n), activation=r.choice(("gelu", "relu", "tanh", "silu")))
    elif kind == "gated":
        made.append(d.weight(n, k))
        y = b.gated_linear(x, *made)
    else:
        y = b.linear(x, made[0], *([d.weight(n)] if r.random() < 0.6 else []))
    if blocks is not None and k % (parse_encoding(blocks).block.elements or 1) == 0:
        d.encodings |= dict.fromkeys([w.value.name for w in made], blocks)
    return followed(d, y)


def chain(d: Drawn) -> tuple[str, Expr]:
    """Add elementwise ops only."""
    dtype = DTYPES[d.r.choice(("f32", "f32", "f64", "f16", "bf16"))]
    return f"chain in {dtype}", followed(d, d.input(d.width(), dtype=dtype), 8)


def turned(d: Drawn) -> tuple[str, Expr]:
    """Add a transposition of rows to columns, so that a vector of the kernel holds elements of several rows."""
    b, r = d.b, d.r
    k = d.width()
    x = b.rearrange(followed(d, d.input(k)), pattern="m k -> k m")
    kind = r.choice(("chain", "softmax", "sum", "product", "cumsum"))
    if kind == "chain":
        y = x * d.weight(k, 1) + d.weight(k, 1)
    elif kind == "softmax":
        y = b.softmax(x, axis=0) * 0.7 + d.weight(k, 1)
    elif kind == "sum":
        y = b.reduce_sum(x * x, axes=(0,), keep=True) * 0.1 + 1.0
    elif kind == "product":
        y = b.matmul(d.weight(k, k), x) * 0.1 + x
    else:
        y = b.cumsum(x, axis=0) * 0.1 + x
    return f"{kind} of columns", b.rearrange(y, pattern="k m -> m k")


def reduction(d: Drawn) -> tuple[str, Expr]:
    """Add norms, softmax and sums over the last axis, with elementwise ops around them."""
    b, r, n = d.b, d.r, d.width()
    dtype = DTYPES[r.choice(("f32", "f32", "f16", "bf16"))]
    kind = r.choice(("layer_norm", "rms_norm", "add_rms_norm", "softmax", "log_softmax", "sum", "mean", "cumsum"))
    x = followed(d, d.input(n, dtype=dtype), 3)
    if kind == "layer_norm":
        y = b.layer_norm(x, d.weight(n, dtype=dtype), d.weight(n, dtype=dtype))
    elif kind == "rms_norm":
        y = b.rms_norm(x, d.weight(n, dtype=dtype))
    elif kind == "add_rms_norm":
        y, total = b.add_rms_norm(x, d.input(n, dtype=dtype), d.weight(n, dtype=dtype))
        y = y + total * 0.1
    elif kind in ("softmax", "log_softmax"):
        y = getattr(b, kind)(x, axis=-1)
    elif kind == "cumsum":
        y = b.cumsum(x, axis=-1)
    else:
        y = x + getattr(b, f"reduce_{kind}")(x * x, axes=(-1,), keep=True) * 0.1
    return f"{kind} in {dtype}", followed(d, y, 3)


def attention(d: Drawn) -> tuple[str, Expr]:
    """Add attention. A row is a query or a whole sequence; if it is a query, the keys are weights."""
    b, r = d.b, d.r
    heads, shared, e, t = r.choice((1, 2)), r.choice((1, 3)), r.choice((8, 16, 20, 32, 64)), r.randint(1, WIDEST)
    if r.random() < 0.3:
        d.options["dtype"] = "bf16"
    softcap = r.choice((None, None, 3.0))
    if r.random() < 0.5:
        x = d.input(heads * shared * e)
        q = b.rearrange(x, pattern=f"s (h={heads * shared} d) -> 1 h s d")
        keys, values = d.weight(1, heads, t, e), d.weight(1, heads, t, e)
        y = b.attention(q, keys, values, terms=(), softcap=softcap)
        return "attention of queries", followed(d, b.rearrange(y, pattern="1 h s d -> s (h d)"), 2)
    q, keys, values = d.input(heads * shared, t, e), d.input(heads, t, e), d.input(heads, t, e)
    y = b.attention(q, keys, values, terms=r.choice(((), (Causal(),))), softcap=softcap)
    return "attention of sequences", b.rearrange(y, pattern="b h s d -> b s (h d)")


def rotary(d: Drawn) -> tuple[str, Expr]:
    """Add heads that are rotated by their positions."""
    b, r = d.b, d.r
    s, width = r.randint(1, 5), r.choice((8, 16, 24, 32, 64))
    f = r.randint(1, width // 2)
    x, places = d.input(r.choice((1, 3)), s, width), d.input(s, dtype=i64)
    return "rotary", b.rotary(x, places, d.weight(f), layout=r.choice(("half", "interleaved")))


def lookup(d: Drawn) -> tuple[str, Expr]:
    """Add a lookup of rows in a table, which may be stored in blocks."""
    b, r = d.b, d.r
    form = r.choice((None, *SMALL_BLOCKS, *LARGE_BLOCKS))
    n = d.width() if form is None else max(32, parse_encoding(form).block.elements or 1) * r.choice((1, 2))
    table = d.weight(TABLE, n)
    if form is not None:
        d.encodings[table.value.name] = form
    y = b.embedding(table, d.input(dtype=i64))
    y = b.linear(followed(d, y, 2), table) if r.random() < 0.3 else y
    return f"lookup in {form or f32}", followed(d, y)


KINDS: tuple[Callable[[Drawn], tuple[str, Expr]], ...] = (
    *(product,) * 5,
    *(chain, turned, reduction, attention) * 2,
    rotary,
    lookup,
)


def draw(seed: int, here: Sequence[str]) -> Case:
    """Return the program of a seed for one of these instruction sets. Half of the differentiable programs are replaced
    by their gradients.
    """
    r = Random(seed)
    d = Drawn(r)
    title, y = r.choice(KINDS)(d)
    outputs = {"y": y}
    plain = not d.encodings and "quantize" not in d.options
    if plain and y.dtype is f32 and r.random() < 0.3:
        inputs = [v for v in d.graph.main.inputs if v.type.dtype is f32]
        nodes = list(d.graph.main.nodes)
        found = backward(d.b, nodes, {y.value: d.input(*map(int, y.shape[1:]))}, counting=_reached(inputs, nodes))
        outputs = {f"d{v.name}": found[v] for v in inputs if v in found}
        title = f"gradient of {title}"
    d.b.outputs(**outputs)
    rng = np.random.default_rng(seed)
    shapes = {name: v.type.evaluate({}) for name, v in d.graph.parameters.items()}
    weights = {name: held(rng.normal(size=shape), d.graph.parameters[name]) for name, shape in shapes.items()}
    encodings = {name: parse_encoding(text) for name, text in d.encodings.items()}
    weights |= {name: e.sample(rng, shapes[name]) for name, e in encodings.items()}
    isa = here[0] if r.random() < 0.6 else r.choice(here)
    graph = encode_parameters(d.graph, encodings) if encodings else d.graph
    inputs = draw_inputs(graph, {"M": ROWS}, [seed])
    return Case(f"{title}, {isa}", graph, weights, inputs, d.options | {"target": isa})


def _reached(values: Sequence[Value], nodes: Sequence[Node]) -> set[Value]:
    """Return these values and all values that are computed from them."""
    found = set(values)
    for node in nodes:
        if not found.isdisjoint(node.inputs):
            found.update(node.results)
    return found


# -- results of programs ---------------------------------------------------------------------------------------------


def differing(case: Case, r: Random, calls: int = 8) -> tuple[int, list[str]]:
    """Return the number of compared rows, and a description of the first row of each call whose bits depend on the
    other rows.
    """
    exe = treadle.compile(case.graph, backend="tvm", weights=case.weights, **case.options)
    wanted = {name: np.array(array) for name, array in exe(**case.inputs).items()}
    counts = [1, *(r.randint(1, ROWS) for _ in range(calls - 1))]
    wrong = []
    for count in counts:
        picked = r.sample(range(ROWS), count)
        found = exe(**{name: np.ascontiguousarray(array[picked]) for name, array in case.inputs.items()})
        for name, array in found.items():
            off = [(i, row) for i, row in enumerate(picked) if not _same(array[i], wanted[name][row])]
            if off:
                i, row = off[0]
                wrong.append(f"{name}: {len(off)} of {count} rows, as row {i} what is row {row} of {ROWS}")
    return sum(counts), wrong


def _same(x: Any, y: Array) -> bool:
    return bool(np.ascontiguousarray(x).tobytes() == np.ascontiguousarray(y).tobytes())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=400, help="programs (default 400)")
    parser.add_argument("--seed", type=int, default=0, help="of the first")
    options = parser.parse_args()
    here = instruction_sets()
    rows = wrong = 0
    kinds: collections.Counter[str] = collections.Counter()
    for seed in range(options.seed, options.seed + options.count):
        title = "not drawn"
        try:
            case = draw(seed, here)
            title = case.title
            compared, off = differing(case, Random(seed))
        except Exception:
            compared, off = 0, [traceback.format_exc(limit=-3)]
        rows += compared
        kinds[title] += 1
        if off:
            wrong += 1
            print(f"seed {seed}: {title}", *off, sep="\n    ", flush=True)
    print(*(f"{count:6d}  {title}" for title, count in sorted(kinds.items())), sep="\n")
    print(f"{options.count} programs, {rows} rows: {wrong} programs with a row that differs")
    return 1 if wrong else 0


def instruction_sets() -> list[str]:
    """Return the instruction sets that this machine has, the best first."""
    return [name for name, isa in ISAS.items() if runs_here(isa)]


if __name__ == "__main__":
    sys.exit(main())


def _reached(values: Sequence[Value], nodes: Sequence[Node]) -> set[Value]:
    """Return these values and all values that are computed from them."""
    found = set(values)
    for node in nodes:
        if not found.isdisjoint(node.inputs):
            found.update(node.results)
    return found

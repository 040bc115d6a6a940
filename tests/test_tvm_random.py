"""Random programs on the TVM backend with values that share memory: views, results in place, blocks, outputs under
several names.

Rearranges, slices and the like become views, elementwise ops are fused into the product before them, and results are
written where they are read next. For every combination, the numbers must equal the interpreter's, at any size and in
each of several calls.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from random import Random

import numpy as np
import pytest

pytest.importorskip("tvm")

from tests.op_checks import EPSILON, held
from treadle.backends.registry import find_backend
from treadle.backends.tvm.lowering.chains import CHAINS
from treadle.ir.builder import Builder, Expr
from treadle.ir.errors import BackendError, TreadleError
from treadle.ir.graph import Function, Graph
from treadle.ir.interpreter import interpret
from treadle.ir.sizing.size_bounds import Bounds
from treadle.ir.target import Target
from treadle.ir.types import DType, Type, bf16, f16, f32, i64

PROGRAMS = 40
SIZES = (3, 0, 1, 18)
# Values stay below about 1, sums have at most some hundred terms, and chains some ten ops. (16-bit values are rounded
# only at the end of each op, because sums are accumulated in float32.)
TOLERANCE = 1000 * 2.0**-23


def random_program(seed: int, dtype: DType = f32) -> Graph:
    """Return a graph of views and products in one dtype. Every second graph calls blocks, with weights or values as
    arguments.
    """
    r = Random(seed)
    graph = Graph("random")
    graph.symbols["S"] = Bounds(0)
    blocks = []
    for number in range(seed % 2 * 2):
        block = Function(f"block{number}")
        graph.add_function(block)
        fill(Builder(graph, block), r, 5, blocks[:number], dtype)
        blocks.append(block)
    fill(Builder(graph), r, 12, blocks, dtype)
    return graph


def fill(b: Builder, r: Random, count: int, blocks: list[Function], dtype: DType) -> None:
    """Add inputs, steps and outputs. An output may also be an input, a weight, a constant or another output."""
    pool = [b.input("x", dtype["S", 6]), b.input("y", dtype[2, "S", 3]), b.constant([[0.5, -0.25, 1.0]], dtype)]
    b.input("i", "i64[S]")
    while len(b.function.nodes) < count:
        try:
            made = call(b, r, pool, r.choice(blocks)) if blocks and r.random() < 0.2 else [step(b, r, pool)]
        except TreadleError:  # operands that do not fit together
            continue
        pool += [x for x in made if x.dtype is dtype and 1 <= x.rank <= 4]
    chosen = [r.choice(pool[-5:]) for _ in range(r.randint(1, 3))] + [r.choice(pool), pool[-1]]
    weights = [b.expr(v) for v in b.function.parameters.values()]
    chosen += [r.choice(weights)] if weights and r.random() < 0.3 else []
    b.outputs(**{f"out{n}": x for n, x in enumerate(chosen)})


def call(b: Builder, r: Random, pool: list[Expr], block: Function) -> list[Expr]:
    """Add a call with any values of the right types; its weights are parameters, which calls may share, or values."""
    inputs = [fitting(b, r, pool, v.type) for v in block.inputs]
    weights = []
    for name, v in block.parameters.items():
        full = f"{r.choice('ab')}.{name}"
        known = b.function.parameters.get(full)
        if r.random() < 0.8 and (known is None or known.type == v.type):
            weights.append(b.parameter(full, v.type))
        else:
            weights.append(fitting(b, r, pool, v.type))
    return list(b.call(block, [*inputs, *weights]))


def fitting(b: Builder, r: Random, pool: list[Expr], type: Type) -> Expr:
    """Return a value of a type: an existing one or a new one."""
    if type.dtype is i64:
        return b.expr(b.function.inputs[2])
    found = [x for x in pool if x.type == type]
    if found and r.random() < 0.7:
        return r.choice(found)
    fill = b.expand(b.constant(0.125, type.dtype), shape=type.shape)
    return b.tanh(fill) if r.random() < 0.5 else fill


def weight(b: Builder, r: Random, dtype: DType, *sizes: int) -> Expr:
    """Return a parameter, sometimes an existing one."""
    return b.parameter(f"w{r.randrange(2)}_" + "_".join(map(str, sizes)), dtype[sizes])


def step(b: Builder, r: Random, pool: list[Expr]) -> Expr:
    x, y = r.choice(pool[-4:]), r.choice(pool)
    axis = r.randrange(x.rank)
    last = x.shape[-1].constant or 1
    kind = r.randrange(18)
    made = partial(weight, b, r, x.dtype)
    if kind < 2:
        return b.tanh(x + y)
    if kind == 2:
        return x * r.choice((0.5, -0.0, 0.0)) - y
    if kind == 3:
        return b.sigmoid(x)
    if kind < 7:
        return turned(b, r, x)
    if kind == 7:
        return b.slice(x, axis=axis, start=r.choice((0, 1)), stop=r.choice((None, 2)), stride=r.choice((1, 1, 2)))
    if kind == 8:
        return b.concat(x, y, x, axis=axis)
    if kind == 9:
        return b.linear(x, made(r.choice((1, 3, 6)), last), *[made(6)] * r.randrange(2)) * 0.25
    if kind == 10:
        return b.matmul(x, made(last, r.choice((1, 3, 6)))) * 0.25
    if kind == 11:
        return b.matmul(x, b.rearrange(y, pattern=swapped(y.rank))) * 0.125
    if kind == 12:
        reduce = r.choice((b.reduce_mean, b.reduce_max)) if x.shape[axis].constant else b.reduce_sum
        return reduce(x, axes=(axis,), keep=r.random() < 0.7) * 0.25
    if kind == 13:
        return b.softmax(x, axis=r.choice((axis, -1)))
    if kind == 14:
        return b.cumsum(x, axis=axis) * 0.125
    if kind == 15:
        return b.rms_norm(x, made(last), eps=0.1)
    if kind == 16:
        return b.gather(made(4, 6), b.expr(b.function.inputs[2]), axis=0)
    return b.tanh(x * y) + x


def turned(b: Builder, r: Random, x: Expr) -> Expr:
    """Reorder the dimensions; one may be split, and two neighbours joined."""
    names = ["a", "b", "c", "d"][: x.rank]
    before, parts = list(names), list(names)
    at = r.randrange(x.rank)
    factor = {6: 2, 4: 2, 3: 3, 2: 2}.get(x.shape[at].constant or 0)
    if factor and r.random() < 0.6:
        before[at], parts[at : at + 1] = f"(p={factor} q)", ["p", "q"]
    r.shuffle(parts)
    if len(parts) > 1 and r.random() < 0.4:
        at = r.randrange(len(parts) - 1)
        parts[at : at + 2] = [f"({parts[at]} {parts[at + 1]})"]
    return b.rearrange(x, pattern=f"{' '.join(before)} -> {' '.join(parts)}")


def swapped(rank: int) -> str:
    names = ["a", "b", "c", "d"][:rank]
    return f"{' '.join(names)} -> {' '.join((*names[:-2], *reversed(names[-2:])))}"


def drawn(type: Type, size: int, rng: np.random.Generator) -> np.ndarray:
    shape = type.evaluate({"S": size})
    return rng.integers(0, 4, shape) if type.dtype is i64 else held(rng.uniform(-1, 1, shape), type.dtype)


@pytest.mark.parametrize("start", range(0, PROGRAMS, 10))
def test_any_program_gives_the_interpreters_numbers(start: int) -> None:
    for seed in range(start, start + 10):
        check(seed)


@pytest.mark.parametrize("dtype", [f16, bf16], ids=str)
def test_any_program_of_16_bits_gives_the_interpreters_numbers(dtype: DType) -> None:
    for seed in range(6):
        check(seed, dtype, 8 * EPSILON[dtype.name])


def check(seed: int, dtype: DType = f32, tolerance: float = TOLERANCE) -> None:
    graph, rng = random_program(seed, dtype), np.random.default_rng(seed)
    weights = {name: drawn(v.type, 0, rng) for name, v in graph.main.parameters.items()}
    program = find_backend("tvm").compile(graph, Target("cpu"), weights)
    before = {name: array.copy() for name, array in weights.items()}
    for size in (*SIZES, SIZES[0]):
        inputs = {v.name: drawn(v.type, size, rng) for v in graph.main.inputs}
        given = {name: array.copy() for name, array in inputs.items()}
        try:
            wanted = interpret(graph, inputs, weights, float64=True)
        except TreadleError:  # sizes that do not fit together
            with pytest.raises(TreadleError):
                program(**inputs)
            continue
        except ValueError:  # NumPy refuses the maximum of no numbers; a program may continue
            assert size == 0
            with suppress(TreadleError):
                program(**inputs)
            continue
        got = program(**inputs)
        for name, expected in wanted.items():
            what = f"seed {seed}, S = {size}, {name} of\n{graph}"
            assert got[name].shape == expected.shape, what
            np.testing.assert_allclose(got[name], expected, rtol=0, atol=tolerance, err_msg=what)
        for name, array in inputs.items():
            np.testing.assert_array_equal(array, given[name], err_msg=f"seed {seed} writes to input {name}")
    for name, array in weights.items():
        np.testing.assert_array_equal(array, before[name], err_msg=f"seed {seed} writes to weight {name}")


# -- cases found by random programs ------------------------------------------------------------------------------


def test_a_weight_that_is_an_output_is_given_as_it_is() -> None:
    """Products read the weight in panels, but the output is in its original layout."""
    b = Builder(Graph("weights"))
    w, v = b.parameter("w", f32[7, 5]), b.parameter("v", f32[5, 7])
    x = b.input("x", "f32[S, 5]")
    b.outputs(y=b.linear(x, w), z=b.matmul(x, v), w=w, again=w, v=v)
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in (("w", (7, 5)), ("v", (5, 7)))}
    made = find_backend("tvm").compile(b.graph, Target("cpu"), weights)(x=np.ones((2, 5), np.float32))
    for name in ("w", "again", "v"):
        np.testing.assert_array_equal(made[name], weights["w" if name == "again" else name])


def test_a_long_run_of_elementwise_ops_is_several_kernels() -> None:
    b = Builder(Graph("long"))
    x = y = b.input("x", "f32[S]")
    for n in range(5 * CHAINS.most_nodes):
        y = y * 0.5 + x if n % 2 else b.sigmoid(y)
    b.outputs(y=y)
    program = find_backend("tvm").compile(b.graph, Target("cpu"), {})
    assert len(program.kernels) > 1
    given = np.linspace(-2, 2, 21, dtype=np.float32)
    wanted = interpret(b.graph, {"x": given}, float64=True)["y"]
    np.testing.assert_allclose(program(x=given)["y"], wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("size", [2**30, 2**40])  # sizes beyond the address space
def test_sizes_that_no_memory_holds_are_refused(size: int) -> None:
    b = Builder(Graph("outer"))
    b.outputs(y=b.matmul(b.input("x", "f32[A, 0]"), b.input("y", "f32[0, B]")))
    program = find_backend("tvm").compile(b.graph, Target("cpu"), {})
    with pytest.raises(BackendError, match=r"not enough memory\n.*received  .* GiB for \["):
        program(x=np.zeros((size, 0), np.float32), y=np.zeros((0, size), np.float32))
    got = program(x=np.zeros((2, 0), np.float32), y=np.zeros((0, 3), np.float32))["y"]
    assert got.tolist() == [[0.0] * 3] * 2

"""Attention in bf16: the pass, the operands that are rounded, and the kernel that multiplies pairs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import treadle
from tests.backend_checks import graph_of, needs_torch, needs_tvm
from tests.op_checks import EPSILON
from treadle.backends.bfloat16 import rounded, widened
from treadle.backends.registry import find_backend
from treadle.ir.attention.attention_terms import Causal, Padding, TensorBias, Term, Window
from treadle.ir.builder import Builder, Expr
from treadle.ir.graph import Graph
from treadle.ir.interpreter import interpret
from treadle.ir.target import Target
from treadle.ir.text.printer import print_graph
from treadle.ir.types import bf16, f32
from treadle.models.bert import bert
from treadle.models.llama import llama
from treadle.passes.framework.facts import INITIAL, LEGAL
from treadle.passes.framework.manager import PassManager
from treadle.passes.lowering.round_sooner import RoundSooner
from treadle.passes.products.narrow_attention import NarrowAttention

Array = np.ndarray[Any, Any]


def numbers(*shape: int, seed: int = 0) -> Array:
    """Draw numbers that bf16 represents."""
    return widened(rounded(np.random.default_rng(seed).standard_normal(shape, np.float32)))


def over(*terms: Term, heads: int, groups: int, d: int, e: int, narrow: bool = True) -> Graph:
    def build(b: Builder) -> Expr:
        types = {"q": f"f32[B,{heads},S,{d}]", "k": f"f32[B,{groups},T,{d}]", "v": f"f32[B,{groups},T,{e}]"}
        given = [b.input(*each) for each in types.items()]
        own = {Padding: "i64[B]", TensorBias: "f32[S,T]"}
        more = [b.input("x", own[type(term)]) for term in terms if type(term) in own]
        if not narrow:
            made: Expr = b.attention(*given, *more, terms=terms)
            return made
        made = b.attention(*[b.cast(x, to=bf16) for x in given], *more, terms=terms, to=f32)
        return made

    return graph_of(build)


def lines(graph: Graph) -> list[str]:
    text = print_graph(graph)
    return [line.split("#")[0].strip() for line in text.splitlines() if " = " in line and "(" in line]


# -- the passes --------------------------------------------------------------------------------------------------


def test_queries_keys_and_values_are_rounded_and_biases_are_not() -> None:
    wide = over(Causal(), TensorBias("s t"), heads=2, groups=2, d=8, e=8, narrow=False)
    made = PassManager([NarrowAttention()], certify=True).run(wide).graph
    (last,) = [line for line in lines(made) if "attention(" in line]
    assert last.endswith("x, terms=[causal, bias(s t)], to=f32)")
    assert sum(line.endswith("to=bf16)") for line in lines(made)) == 3
    assert lines(PassManager([NarrowAttention()]).run(made).graph) == lines(made)


def test_results_of_a_product_are_rounded_when_they_are_stored() -> None:
    def block(b: Builder) -> Expr:
        y = b.linear(b.input("x", f32["B", 8]), b.parameter("w", f32[6, 8]))
        left, right = b.slice(y, axis=1, stop=3), b.slice(y, axis=1, start=3)
        first = b.cast(b.rearrange(left, pattern="b n -> n b"), to=bf16)
        second = b.cast(b.rearrange(right, pattern="b n -> n b"), to=bf16)
        made: Expr = b.cast(first, to=f32) * b.cast(second, to=f32)
        return made

    made = PassManager([RoundSooner()], certify=True).run(graph_of(block), facts=INITIAL | {LEGAL}).graph
    assert lines(made)[1].startswith("linear_bf16 = cast(linear, to=bf16)")
    assert sum("to=bf16" in line for line in lines(made)) == 1


def test_a_product_that_others_read_in_float32_stays() -> None:
    def block(b: Builder) -> Expr:
        y = b.linear(b.input("x", f32["B", 8]), b.parameter("w", f32[6, 8]))
        part = b.cast(b.slice(y, axis=1, stop=6), to=bf16)
        made: Expr = b.cast(part, to=f32) + y
        return made

    before = graph_of(block)
    assert lines(PassManager([RoundSooner()]).run(before, facts=INITIAL | {LEGAL}).graph) == lines(before)


# -- kernels -----------------------------------------------------------------------------------------------------

SHAPES = [
    pytest.param(4, 2, 130, 130, 64, 64, id="blocks"),
    pytest.param(2, 2, 17, 600, 32, 24, id="spans"),
    pytest.param(4, 1, 1, 37, 8, 6, id="one query"),
]
TERMS = [(), (Causal(),), (Window(9), Causal()), (Padding(),), (TensorBias("s t"),)]


@needs_tvm
@pytest.mark.parametrize("terms", TERMS, ids=str)
@pytest.mark.parametrize(("heads", "groups", "s", "t", "d", "e"), SHAPES)
def test_attention_of_pairs_is_near_the_meaning(
    heads: int, groups: int, s: int, t: int, d: int, e: int, terms: tuple[Term, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TREADLE_POISON", "1")  # a read of unwritten memory would show
    inputs = {
        "q": numbers(2, heads, s, d),
        "k": numbers(2, groups, t, d, seed=1),
        "v": numbers(2, groups, t, e, seed=2),
    }
    own = {Padding: np.array([3, t]), TensorBias: numbers(s, t, seed=3)}
    if read := [own[type(term)] for term in terms if type(term) in own]:
        inputs["x"] = read[0]
    graph = over(*terms, heads=heads, groups=groups, d=d, e=e)
    wanted = interpret(graph, inputs)["y"]
    for target in ("cpu", "x86-64-v3"):
        got = find_backend("tvm").compile(graph, Target(target), {})(**inputs)["y"]
        assert np.abs(got - wanted).max() <= EPSILON["bf16"] * np.abs(wanted).max(), target


@needs_tvm
def test_a_row_has_its_bits_alone_and_on_any_number_of_threads() -> None:
    graph = over(Causal(), heads=4, groups=2, d=64, e=64)
    inputs = {"q": numbers(3, 4, 70, 64), "k": numbers(3, 2, 70, 64, seed=1), "v": numbers(3, 2, 70, 64, seed=2)}
    whole = find_backend("tvm").compile(graph, Target("cpu", threads=2), {})(**inputs)["y"]
    alone = find_backend("tvm").compile(graph, Target("cpu", threads=1), {})
    for row in range(3):
        np.testing.assert_array_equal(
            alone(**{n: x[row : row + 1] for n, x in inputs.items()})["y"], whole[row : row + 1]
        )


@needs_torch
def test_pytorch_gives_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = {"q": numbers(2, 4, 9, 8), "k": numbers(2, 2, 9, 8, seed=1), "v": numbers(2, 2, 9, 6, seed=2)}
    for terms in ((), (Causal(),), (Window(3), Causal())):
        graph = over(*terms, heads=4, groups=2, d=8, e=6)
        got, wanted = (
            find_backend("torch").compile(graph, Target("cpu"), {})(**inputs)["y"],
            interpret(graph, inputs)["y"],
        )
        assert got.dtype == np.float32
        assert np.abs(got - wanted).max() <= EPSILON["bf16"] * np.abs(wanted).max()


@pytest.mark.parametrize("backend", [pytest.param("torch", marks=needs_torch), pytest.param("tvm", marks=needs_tvm)])
def test_a_model_in_bf16_goes_on_token_by_token(backend: str) -> None:
    """The cache is float32, and holds the numbers before rounding."""
    model = llama.configure(layers=2, dim=64, heads=4, kv_heads=2, hidden=96, vocab=80)
    exe = treadle.compile(model, backend=backend, seed=0, dtype="bf16")
    tokens = np.random.default_rng(1).integers(0, 80, 24)
    session = exe.session(rows=1, capacity=32)
    row = session.open()
    made = [session.prefill({row: tokens[:20]})[row], *(session.step({row: token})[row] for token in tokens[20:])]
    wanted = exe(tokens=tokens[None])["logits"][0, 19:]
    assert np.abs(np.stack(made) - wanted).max() <= 4 * EPSILON["bf16"] * np.abs(wanted).max()


@needs_tvm
def test_a_model_multiplies_pairs_in_attention() -> None:
    model = bert.configure(layers=2, dim=64, heads=4, hidden=96, vocab=80)
    exact = treadle.compile(model, backend="tvm", seed=0)
    narrow = treadle.compile(model, backend="tvm", seed=0, dtype="bf16")
    (kernel,) = [k for k in narrow.executable.kernels if "attention" in k.title]
    assert kernel.title == "attention_16_bf16"
    tokens = np.arange(1, 27).reshape(2, 13)
    a, b = (np.ravel(next(iter(exe(tokens=tokens).values()))) for exe in (exact, narrow))
    assert a @ b / np.sqrt(a @ a * (b @ b)) > 0.9999

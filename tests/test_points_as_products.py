"""Convolutions with kernel size 1 between transpositions become products of rows; near misses stay."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import pytest

import treadle as t
from tests.pass_programs import assert_same_numbers, optimize, program
from treadle.ir.hashing import function_key
from treadle.ir.text.parser import parse_graph
from treadle.passes.products.points_as_products import PointsAsProducts

WEIGHTS = ["w: f32[6, 4, 1]", "v: f32[4, 6, 1]", "c: f32[6]", "wide: f32[6, 4, 3]", "half: f32[6, 2, 1]"]
FIRST = 'a = rearrange(x, pattern="b s d -> b d s")'
SECOND = 'y = rearrange(p, pattern="b d s -> b s d")'


def text(*lines: str, takes: str = "x: f32[B, S, 4]", gives: str = "y: f32[B, S, 6]") -> str:
    return program(takes, gives, *lines, weights=WEIGHTS)


FORMS = {
    "between two": (
        text(FIRST, "p = conv(a, $w, $c)", SECOND, "return y = y"),
        text('k = rearrange($w, pattern="o c 1 -> o c")', "y = linear(x, k, $c)", "return y = y"),
    ),
    "after one": (
        text(FIRST, "p = conv(a, $w, strides=[1], padding=[0, 0])", "return y = p", gives="y: f32[B, 6, S]"),
        text(
            'k = rearrange($w, pattern="o c 1 -> o c")',
            "p = linear(x, k)",
            'y = rearrange(p, pattern="b n o -> b o n")',
            "return y = y",
            gives="y: f32[B, 6, S]",
        ),
    ),
    "a feed-forward layer": (
        text(
            FIRST, "h = conv(a, $w, $c)", "r = relu(h)", "p = conv(r, $v)", SECOND, "return y = y",
            gives="y: f32[B, S, 4]",
        ),
        text(
            'k = rearrange($w, pattern="o c 1 -> o c")', "h = linear(x, k, $c)", "r = relu(h)",
            'm = rearrange($v, pattern="o c 1 -> o c")', "y = linear(r, m)", "return y = y", gives="y: f32[B, S, 4]",
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_convolution_of_points_is_a_product(form: str) -> None:
    before, expected = FORMS[form]
    made = optimize(before, PointsAsProducts()).graph
    assert function_key(made.main) == function_key(parse_graph(expected).main), str(made)
    assert_same_numbers(parse_graph(before), made)


NEAR = {
    "without a rearrange": (["p = conv(x, $w)", "return y = p"], "y: f32[B, 6, S]"),
    "windows of three": ([FIRST, "p = conv(a, $wide, padding=[1, 1])", "return y = p"], "y: f32[B, 6, S]"),
    "padding": ([FIRST, "p = conv(a, $w, padding=[1, 1])", "return y = p"], "y: f32[B, 6, S+2]"),
    "groups": ([FIRST, "p = conv(a, $half, groups=2)", "return y = p"], "y: f32[B, 6, S]"),
    "a result that is read twice": (
        [FIRST, "r = relu(a)", "p = conv(r, $w)", "return y = p, z = r"],
        "y: f32[B, 6, S], z: f32[B, 4, S]",
    ),
}


@pytest.mark.parametrize("form", NEAR)
def test_other_convolutions_stay(form: str) -> None:
    lines, gives = NEAR[form]
    takes = "x: f32[B, 4, S]" if "conv(x" in lines[0] else "x: f32[B, S, 4]"
    made = optimize(text(*lines, takes=takes, gives=gives), PointsAsProducts())
    assert [node.op.name for node in made.graph.main.nodes].count("conv") == 1
    if "read twice" in form or "without" in form:
        assert "neither its operand nor its result is rearranged" in made.log.explain()


def test_a_model_with_such_layers_can_be_stepped() -> None:
    @t.model
    def recommender(items: Annotated[t.Tensor, t.i64["B S"]], *, count: int = 20, dim: int = 8) -> t.Tensor:
        x = t.embed(items, count, dim, name="items")
        x += t.self_attention(t.layer_norm(x, name="norm"), 2, causal=True, name="attn")
        h = t.relu(t.convolution(x.transpose(1, 2), dim, (1,), name="up"))
        x += t.convolution(h, dim, (1,), name="down").transpose(1, 2)
        return t.unembed(x, tied="items")

    exe = t.compile(recommender, backend="numpy")
    session = exe.session(rows=1, capacity=8)
    row, ids = session.open(), [3, 1, 4, 1, 5]
    stepped = [session.prefill({row: ids[:2]})[row], *(session.step({row: token})[row] for token in ids[2:])]
    whole = next(iter(exe(items=np.array([ids])).values()))[0]
    np.testing.assert_allclose([made.reshape(-1) for made in stepped], whole[1:], rtol=0, atol=1e-6)

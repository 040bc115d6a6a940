"""Products of vectors, matrices and stacks of matrices, written in every way, and with the ops that passes fuse into
them. The default pipeline keeps their numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest

from tests.pass_programs import assert_same_numbers
from treadle.frontends.recipes.matrix_products import matmul
from treadle.ir.builder import Builder, Expr
from treadle.ir.graph import Graph
from treadle.ir.types import f32
from treadle.passes.framework.manager import PassManager
from treadle.passes.pipelines import DEFAULT

LEAD = (2, 1, 3)
"""The sizes of the axes before the last one; a matrix has only the last of these."""


def weight(b: Builder, *shape: int) -> Expr:
    return b.parameter(f"w{len(b.function.parameters)}", f32[shape])


# -- forms of x w, from [..., 4] to [..., 4] -----------------------------------------------------------------------


def by_matmul(b: Builder, x: Expr) -> Expr:
    return matmul(b, x, weight(b, 4, 4))


def by_transposed(b: Builder, x: Expr) -> Expr:
    return matmul(b, x, b.rearrange(weight(b, 4, 4), pattern="n k -> k n"))


def by_linear(b: Builder, x: Expr) -> Expr:
    return b.linear(x, weight(b, 4, 4))


def by_einsum(b: Builder, x: Expr) -> Expr:
    return b.einsum(x, weight(b, 4, 4), equation="... k, k n -> ... n")


def joined(b: Builder, x: Expr, of_rows: Callable[[Expr], Expr]) -> Expr:
    """Join the leading axes before a product, and split them again after it."""
    names = "abc"[: x.rank - 1]
    rows = b.rearrange(x, pattern=f"{' '.join(names)} k -> ({' '.join(names)}) k" if names else "k -> 1 k")
    sized = " ".join(f"{name}={size}" for name, size in zip(names, x.shape, strict=False))
    split = f"({sized}) n -> {' '.join(names)} n" if names else "1 n -> n"
    return b.rearrange(of_rows(rows), pattern=split)


def by_rows(b: Builder, x: Expr) -> Expr:
    return joined(b, x, lambda rows: b.matmul(rows, weight(b, 4, 4)))


def by_rows_and_bias(b: Builder, x: Expr) -> Expr:
    return joined(b, x, lambda rows: b.matmul(rows, weight(b, 4, 4)) + weight(b, 4))


def by_linear_of_rows(b: Builder, x: Expr) -> Expr:
    return joined(b, x, lambda rows: b.linear(rows, weight(b, 4, 4), weight(b, 4)))


def on_the_left(b: Builder, x: Expr) -> Expr:
    """Multiply the weight by x, whose rows become columns."""
    if x.rank == 1:
        return matmul(b, weight(b, 4, 4), x)
    return b.rearrange(
        b.matmul(weight(b, 4, 4), b.rearrange(x, pattern="... m k -> ... k m")), pattern="... n m -> ... m n"
    )


def by_stack(b: Builder, x: Expr) -> Expr:
    """Multiply with one matrix for each entry of the outermost axis."""
    return b.matmul(x, weight(b, 2, *[1] * (x.rank - 3), 4, 4)) if x.rank > 2 else matmul(b, x, weight(b, 4, 4) * 2.0)


SPELLINGS = (
    by_matmul,
    by_transposed,
    by_linear,
    by_einsum,
    by_rows,
    by_rows_and_bias,
    by_linear_of_rows,
    on_the_left,
    by_stack,
)

# -- ops around a product ------------------------------------------------------------------------------------------

Spelling = Callable[[Builder, Expr], Expr]


def biased(b: Builder, x: Expr, spell: Spelling) -> Expr:
    return spell(b, x) + weight(b, 4)


def with_a_residual(b: Builder, x: Expr, spell: Spelling) -> Expr:
    return b.layer_norm(spell(b, x) + weight(b, 4) + x, weight(b, 4), weight(b, 4))


def scaled(b: Builder, x: Expr, spell: Spelling) -> Expr:
    return spell(b, x) * 0.5 + spell(b, x * 0.25)


def activated(b: Builder, x: Expr, spell: Spelling) -> Expr:
    return spell(b, b.gelu(spell(b, x) + weight(b, 4)))


def gated(b: Builder, x: Expr, spell: Spelling) -> Expr:
    return b.silu(spell(b, x)) * spell(b, x)


def split_into_gates(b: Builder, x: Expr, spell: Spelling) -> Expr:
    both = matmul(b, x, weight(b, 4, 8))
    gate, up = (b.slice(both, axis=-1, start=start, stop=start + 4) for start in (0, 4))
    return spell(b, b.silu(gate) * up)


def three_of_one(b: Builder, x: Expr, spell: Spelling) -> Expr:
    q, k, v = (spell(b, x) + weight(b, 4) for _ in range(3))
    return q * k + b.softmax(v, axis=-1)


def attention(b: Builder, x: Expr, spell: Spelling) -> Expr:
    """Apply attention with one head over the second-last axis, which a vector lacks."""
    if x.rank == 1:
        return spell(b, x) * b.reduce_sum(spell(b, x) * spell(b, x), axes=(0,), keep=True)
    q, k, v = spell(b, x), spell(b, x), spell(b, x)
    scores = b.matmul(q, b.rearrange(k, pattern="... t d -> ... d t")) * 0.5
    return b.matmul(b.softmax(scores, axis=-1), v)


AROUND = (biased, with_a_residual, scaled, activated, gated, split_into_gates, three_of_one, attention)


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
@pytest.mark.parametrize("spell", SPELLINGS, ids=lambda f: f.__name__)
def test_products_keep_their_numbers(rank: int, spell: Spelling) -> None:
    for around in AROUND:
        b = Builder(Graph("products"))
        x = b.input("x", f32[(*LEAD[len(LEAD) - rank + 1 :], 4)])
        b.outputs(y=around(b, x, spell))
        assert_same_numbers(b.graph, PassManager(DEFAULT).run(b.graph).graph)


@pytest.mark.parametrize(("left", "right"), list(product([1, 2, 3, 4], repeat=2)))
def test_products_of_two_inputs_keep_their_numbers(left: int, right: int) -> None:
    b = Builder(Graph("products"))
    x = b.input("x", f32[(*LEAD[len(LEAD) - left + 1 :], 4)])
    y = b.input("y", f32[(*LEAD[: max(right - 2, 0)], 4, 5) if right > 1 else (4,)])
    z = matmul(b, x, y)
    b.outputs(z=b.relu(z + b.parameter("w", f32[z.shape[-1:]])) * 2.0)
    assert_same_numbers(b.graph, PassManager(DEFAULT).run(b.graph).graph)

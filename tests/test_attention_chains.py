"""Masks and biases in any order, with numbers of every size: the fused attention must compute the same numbers.

The comparison is in float64, and on NumPy in the graph's own dtype, in which twice float32's lowest number is -inf.
Drawn numbers add up without rounding (tests/fuzz/attention_chains.py), so differences come only from the softmax and
the product with values.
"""

from __future__ import annotations

import numpy as np
import pytest

import treadle
from tests.fuzz.attention_chains import DrawnAttention, draw_attention
from treadle.ir.builder import Builder
from treadle.ir.graph import Graph
from treadle.ir.interpreter import interpret
from treadle.ir.types import f32
from treadle.passes.framework.manager import PassManager
from treadle.passes.pipelines import DEFAULT

ROOM = {"f16": 2.0**-7, "f32": 2.0**-18, "f64": 2.0**-40}
"""Tolerance for values up to 1, by the narrowest dtype: a few spacings."""


def fused(drawn: DrawnAttention) -> bool:
    """Return True if the attention was fused; in that case, check that its numbers are unchanged."""
    optimized = PassManager(DEFAULT, certify=False).run(drawn.graph)
    if not any(node.op.name.startswith("attention") for _, node in optimized.graph.walk()):
        return False
    room = ROOM[drawn.text.split(",")[0]]
    inputs = {v.name: drawn.arrays[v.name].astype(v.type.dtype.numpy) for v in drawn.graph.main.inputs}
    with np.errstate(all="ignore"):
        own = interpret(drawn.graph, inputs)
        run = treadle.compile(optimized.graph, passes=(), certify=False)(**inputs)
        wide, again = (interpret(graph, inputs, float64=True) for graph in (drawn.graph, optimized.graph))
    for name in own:
        report = f"{drawn.text}\n{optimized.graph}"
        np.testing.assert_allclose(
            again[name], wide[name], rtol=0, atol=min(room, 2.0**-18), equal_nan=True, err_msg=report
        )
        np.testing.assert_allclose(
            np.asarray(run[name], np.float64), np.asarray(own[name], np.float64), rtol=0, atol=room, err_msg=report
        )
    return True


@pytest.mark.parametrize("part", range(4))
def test_drawn_chains_keep_their_numbers(part: int) -> None:
    """A sample of tests/fuzz/attention_chains.py. Most chains are fused. The remaining chains fill in a number such as
    -1e9 next to masks that are added.
    """
    assert sum(fused(draw_attention(seed)) for seed in range(40 * part, 40 * part + 40)) >= 25


def test_scales_do_not_move_across_casts() -> None:
    """A mask with f16's lowest number, added twice in f32, is not -inf. So a masked row is an average."""
    drawn = draw_attention(1006973)
    assert drawn.text.endswith("in f32, times 2, plain") and not fused(drawn)


@pytest.mark.parametrize("added", [True, False])
def test_one_mask_that_overflows_by_itself_loses_a_row(added: bool) -> None:
    """Next to another mask whose sum overflows too, a row without keys is NaN, since twice the lowest number is
    -inf.
    """
    b = Builder(Graph("twice"))
    q, k, v = (b.input(name, "f32[B, 2, S, 4]") for name in "qkv")
    lengths = b.rearrange(b.input("lengths", "i64[B]"), pattern="b -> b 1 1 1")
    i, j = b.rearrange(b.iota(size="S"), pattern="s -> s 1"), b.iota(size="S")
    least = b.constant(-f32.greatest, f32)
    x = b.where(j < lengths, q @ b.rearrange(k, pattern="b h t d -> b h d t"), least)
    x = x + (1.0 - (j <= i).cast(f32)) * least if added else b.where(j <= i, x, least)
    b.outputs(y=b.softmax(x * 2.0) @ v)
    rng = np.random.default_rng(0)
    arrays = {name: rng.integers(-8, 9, (2, 2, 4, 4)) / 8 for name in "qkv"} | {"lengths": np.array([0, 3])}
    drawn = DrawnAttention(b.graph, arrays, ["f32"])
    assert fused(drawn)

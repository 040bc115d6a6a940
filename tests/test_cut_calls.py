"""Slices that move into calls: blocks that slice or index values themselves, nested blocks, and positions that a block
computes.
"""

from __future__ import annotations

import pytest

from tests.pass_programs import assert_same_numbers
from treadle.ir.graph import Graph
from treadle.ir.text.parser import parse_graph
from treadle.passes.cleanup.cut_sooner import CutSooner
from treadle.passes.framework.manager import Optimized, PassManager

PICKS = ["q = expand(i, shape=[B, 2, 8])", "y = take_along_axis(h, q, axis=1)"]
ONE = "o = slice(z, axis=1, start=2, stop=3)"
"""The slice of a block's second result that main reads."""


def block(name: str, takes: str, gives: str, *lines: str) -> str:
    return "\n".join([f"  {name}({takes}) -> ({gives}) {{", *[f"    {line}" for line in lines], "  }"])


def graph(*blocks: str) -> Graph:
    return parse_graph("\n".join(["graph g {", "  symbols B, S", *blocks, "}"]))


def cut(*blocks: str) -> Optimized:
    """Run the pass. Check that the numbers are the same for all drawn sizes, and that a second run changes nothing."""
    done = PassManager([CutSooner()], certify=True).run(graph(*blocks))
    assert_same_numbers(done.source, done.graph)
    again = PassManager([CutSooner()]).run(done.graph)
    assert not again.log[0].changes
    return done


def types(done: Optimized, function: str) -> dict[str, str]:
    return {v.name: str(v.type) for node in done.graph.functions[function].nodes for v in node.results}


OWN = {
    "slice": (["q = slice(x, axis=1, start=2, stop=4)", "y = tanh(q)"], "y: f32[B, 2, 8]"),
    "lookup": (["q = gather(x, 3, axis=1)", "y = tanh(q)"], "y: f32[B, 8]"),
    "positions": (["h = tanh(x)", *PICKS], "y: f32[B, 2, 8]"),
}
"""A block's own slice of its first input, and its result."""


@pytest.mark.parametrize("name", OWN)
def test_a_block_that_cuts_another_input_itself(name: str) -> None:
    """The caller passes only the needed positions, or all of them if the block computes the positions itself."""
    lines, gives = OWN[name]
    takes = "x: f32[B, 9, 8], i: i64[B, 2, 1], w: f32[B, 9, 8]"
    inner = block("block f", takes, f"{gives}, z: f32[B, 9, 8]", *lines, "z = exp(w)", "return y = y, z = z")
    main = ["k = exp(x)", "y, z = f(k, i, w)", ONE, "return y = y, o = o"]
    done = cut(inner, block("main", takes, f"{gives}, o: f32[B, 1, 8]", *main))
    assert types(done, "f_cut")["z"] == "f32[B, 1, 8]"
    said = [event.reason.partition(":")[0] for event in done.log[0].matches]
    assert said[-1] == "1 of 9 positions"
    assert said[0] == {"slice": "2 of 9 positions", "lookup": "1 of 9 positions", "positions": "2 of 9 positions"}[name]


def test_a_block_that_gives_the_positions_at_which_it_is_read() -> None:
    """The positions are known only after the block has run."""
    takes = "x: f32[B, 9, 8], j: i64[B, 2, 1]"
    inner = block(
        "block f", takes, "h: f32[B, 9, 8], i: i64[B, 2, 1]", "h = tanh(x)", "i = mul(j, 1)", "return h = h, i = i"
    )
    done = cut(inner, block("main", takes, "y: f32[B, 2, 8]", "h, i = f(x, j)", *PICKS, "return y = y"))
    assert done.graph == done.source
    assert [event.reason for event in done.log[0].refusals] == [
        "f computes the positions at which its results are read"
    ]


def test_a_block_that_calls_one() -> None:
    takes = "x: f32[B, 9, 8]"
    inner = block("block f", takes, "y: f32[B, 9, 8]", "y = tanh(x)", "return y = y")
    outer = block("block g", takes, "y: f32[B, 9, 8]", "h = f(x)", "y = exp(h)", "return y = y")
    main = block("main", takes, "o: f32[B, 1, 8]", "z = g(x)", ONE, "return o = o")
    done = cut(inner, outer, main)
    assert list(done.graph.functions) == ["f_cut", "g_cut", "main"]
    assert types(done, "f_cut") == {"y": "f32[B, 1, 8]"}


def test_one_axis_after_the_other() -> None:
    """A result that is sliced along two axes at its end."""
    takes = "x: f32[B, 9, 8]"
    inner = block("block f", takes, "y: f32[B, 9, 8]", "y = tanh(x)", "return y = y")
    lines = ["z = f(x)", ONE, "y = slice(o, axis=0, stop=1)", "return y = y"]
    done = cut(inner, block("main", takes, "y: f32[1, 1, 8]", *lines))
    (tanh,) = [node for function, node in done.graph.walk() if node.op.name == "tanh"]
    assert str(tanh.result.type) == "f32[1, 1, 8]"


@pytest.mark.parametrize("at", [-1, 9])
def test_a_position_that_is_not_there_stays_an_error_of_the_lookup(at: int) -> None:
    lines = ["h = tanh(x)", f"y = gather(h, {at}, axis=1)", "return y = y"]
    done = PassManager([CutSooner()]).run(graph(block("main", "x: f32[B, 9, 8]", "y: f32[B, 8]", *lines)))
    assert done.graph == done.source

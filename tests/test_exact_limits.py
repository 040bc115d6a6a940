"""Numeric limits: the last value that is accepted, and the first that is refused, with its error.

Numbers are written here as documented, not by the names of the code's constants. Errors are compared as whole texts,
because the golden files of errors hold no numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import ANY

import numpy as np
import pytest

from treadle.ir.attention.attention_terms import T5Relative, Window
from treadle.ir.attention.masking import causal
from treadle.ir.attention.term_text import parse_term
from treadle.ir.builder import Builder
from treadle.ir.encodings.encoding import Encoding, parse_encoding
from treadle.ir.errors import TreadleError
from treadle.ir.graph import Function, Graph
from treadle.ir.interpreter import interpret
from treadle.ir.layouts import parse_layout
from treadle.ir.literals import Literal
from treadle.ir.op_registry import OPS
from treadle.ir.ops.caches import check_slots
from treadle.ir.placement.mesh import Mesh
from treadle.ir.placement.placements import parse_placement
from treadle.ir.rules.axis_rule_text import parse_rule
from treadle.ir.samples import Sample
from treadle.ir.sizing.size_bounds import Bounds
from treadle.ir.sizing.size_text import parse_size
from treadle.ir.target import Target
from treadle.ir.transforms.inline import inline_calls
from treadle.passes.memory.frame_placement import plan_arena
from treadle.passes.memory.instances import Lifetime, parse_instance
from treadle.passes.memory.placement import place


def applied(name: str, *operands: str | None, **attributes: Any) -> Callable[[], object]:
    """Apply an op to operands of these types."""
    sample = Sample(*operands, **attributes)
    return lambda: OPS[name].make(**sample.attributes).infer(sample.types)


def tables(count: int) -> Callable[[], object]:
    return applied("embedding_sum", *["f32[9, 4]"] * count, *["i64[2]"] * count, tables=count)


def projections(count: int) -> Callable[[], object]:
    return applied("projections", "f32[2, 4]", *["f32[3, 4]"] * count, *[None] * count, count=count)


def runs(count: int) -> Callable[[], object]:
    return lambda: parse_layout(f"blocks(16, {4 * count + 2}, 2, {', '.join(f'{n}:{n + 1}' for n in range(count))})")


def calls(count: int, nodes: int) -> Graph:
    """Return a graph with a block of `nodes` nodes, called `count` times."""
    graph = Graph("g")
    block = Function("block")
    graph.add_function(block)
    b = Builder(graph, block)
    y = b.input("x", "f32[2]")
    for _ in range(nodes):
        y = b.exp(y)
    b.outputs(y=y)
    main = Builder(graph)
    y = main.input("x", "f32[2]")
    for _ in range(count):
        (y,) = main.call(block, [y])
    main.outputs(y=y)
    return graph


def unfolded(most: int) -> Callable[[], object]:
    """Return a function that unfolds two nodes and fourteen calls of two nodes each."""
    return lambda: inline_calls(calls(14, 2), most_nodes=most)


def inputs(count: int) -> Graph:
    b = Builder(Graph("g"))
    for n in range(count):
        b.input(f"x{n}", "f32[]")
    return b.graph


def buffers(*sizes: int, first: int = 0, end: int = 2) -> list[Lifetime]:
    return [Lifetime(f"x{n}", first, end, size) for n, size in enumerate(sizes)]


SIZES = "id,lower,upper,size\na,0,1,{}\n"

LIMITS: dict[str, tuple[Callable[[], object], Callable[[], object], tuple[str, str | None, str | None]]] = {
    "runs of a layout": (
        runs(64),
        runs(65),
        ("unknown or repeated option '64:65' of layout blocks", "blocks(16, 262, 2, 0:1, 1:2, 2:3, 3:4, 4", None),
    ),
    "digits of a layout": (
        lambda: parse_layout("panels(000000016)"),
        lambda: parse_layout("panels(0000000016)"),
        ("unknown or repeated option '0000000016' of layout panels", "panels(0000000016)", None),
    ),
    "width of panels": (
        lambda: parse_layout("panels(65536)"),
        lambda: parse_layout("panels(65537)"),
        ("invalid panel width", "65537", "panels(16); 1 to 65536"),
    ),
    "a row of blocks": (
        lambda: Encoding("int8_rows").bytes(1 << 24),
        lambda: Encoding("int8_rows").bytes((1 << 24) + 1),
        ("a line of int8_rows has from 1 to 16777216 elements", "16777217", None),
    ),
    "digits of an encoding": (
        lambda: parse_encoding("int4_groups(000032)"),
        lambda: parse_encoding("int4_groups(0000032)"),
        ("unknown or repeated option '0000032' of form int4_groups", "int4_groups(0000032)", None),
    ),
    "the smallest group": (
        lambda: [Encoding("int4_groups", group) for group in (16, 32, 64, 128, 256)],
        lambda: Encoding("int4_groups", 8),
        ("int4_groups: invalid group size", "8", "one of 16, 32, 64, 128, 256"),
    ),
    "a window": (
        lambda: Window(2**31 - 1),
        lambda: Window(2**31),
        ("window: size must be 1 or more, and below 2^31", "window(2147483648)", None),
    ),
    "no window": (
        lambda: Window(1),
        lambda: Window(0),
        ("window: size must be 1 or more, and below 2^31", "window(0)", None),
    ),
    "most buckets": (
        lambda: T5Relative(1024, 2**20),
        lambda: T5Relative(1025),
        ("t5_relative: buckets must be 2 to 1024", "t5_relative(1025, 128)", None),
    ),
    "fewest buckets": (
        lambda: T5Relative(2),
        lambda: T5Relative(1),
        ("t5_relative: buckets must be 2 to 1024", "t5_relative(1, 128)", None),
    ),
    "fewest buckets of two sides": (
        lambda: T5Relative(4, bidirectional=True),
        lambda: T5Relative(3, bidirectional=True),
        ("t5_relative: buckets must be 4 to 1024", "t5_relative(3, 128, bidirectional)", None),
    ),
    "the furthest bucket": (
        lambda: T5Relative(8, 2**20),
        lambda: T5Relative(8, 2**20 + 1),
        ("t5_relative: max_distance must be 5 to 1048576", "t5_relative(8, 1048577)", None),
    ),
    "the nearest bucket": (
        lambda: T5Relative(8, 5),
        lambda: T5Relative(8, 4),
        ("t5_relative: max_distance must be 5 to 1048576", "t5_relative(8, 4)", None),
    ),
    "digits of a term": (
        lambda: parse_term(f"window({'0' * 17}5)"),
        lambda: parse_term(f"window({'0' * 18}5)"),
        (f"window: size must be an integer, is '{'0' * 18}5'", f"window({'0' * 18}5)", None),
    ),
    "ranks": (
        lambda: Mesh.of("tp=65536,dp=2"),
        lambda: Mesh.of("tp=65537,dp=2"),
        ("a mesh must have 1 to 131,072 ranks, and axes of 1 or more", "tp=65537,dp=2", "tp=2,dp=2"),
    ),
    "tables": (tables(8), tables(9), ("embedding_sum: adds 2 to 8 tables, not 9", ANY, None)),
    "a single table": (tables(2), tables(1), ("embedding_sum: adds 2 to 8 tables, not 1", ANY, None)),
    "projections": (projections(16), projections(17), ("projections: computes 2 to 16 products, not 17", ANY, None)),
    "one projection": (projections(2), projections(1), ("projections: computes 2 to 16 products, not 1", ANY, None)),
    "threads": (
        lambda: Target("cpu", 1024),
        lambda: Target("cpu", 1025),
        (
            "the number of threads of a target must be an integer from 1 to 1024",
            "threads=1025",
            "leave it out for one thread per core",
        ),
    ),
    "no threads": (
        lambda: Target("cpu", 1),
        lambda: Target("cpu", 0),
        (
            "the number of threads of a target must be an integer from 1 to 1024",
            "threads=0",
            "leave it out for one thread per core",
        ),
    ),
    "an empty symbol": (
        lambda: Graph("g").bound("S", Bounds(1, 1)),
        lambda: Graph("g").bound("S", Bounds(0)),
        ("S cannot have a lower bound below 1", "0 <= S", "an axis that may be empty has a size such as S-1"),
    ),
    "nodes": (unfolded(30), unfolded(29), ("the graph without calls is too large, in main", None, "at most 29 nodes")),
    "inputs that are told": (
        lambda: interpret(inputs(0), {}, {}),
        lambda: interpret(inputs(5), {}, {}),
        ("no value for x0, x1, x2, x3, x4", None, None),
    ),
    "more inputs": (
        lambda: interpret(inputs(0), {}, {}),
        lambda: interpret(inputs(6), {}, {}),
        ("no value for x0, x1, x2, x3, x4 and more", None, None),
    ),
    "inputs that are not there": (
        lambda: interpret(inputs(0), {}, {}),
        lambda: interpret(inputs(0), dict.fromkeys(map(str, range(5)), 0), {}),
        ("there is no input or weight 0, 1, 2, 3, 4", None, None),
    ),
    "more that are not there": (
        lambda: interpret(inputs(0), {}, {}),
        lambda: interpret(inputs(0), dict.fromkeys(map(str, range(6)), 0), {}),
        ("there is no input or weight 0, 1, 2, 3, 4 and more", None, None),
    ),
    "digits of a buffer": (
        lambda: parse_instance(SIZES.format("9" * 18), "x"),
        lambda: parse_instance(SIZES.format("0" * 19), "x"),
        (
            "size must be a non-negative integer of at most 18 digits",
            repr("0" * 19),
            "only digits in the column size",
        ),
    ),
    "bytes of buffers": (
        lambda: place(buffers(2**60 - 10, 7)),
        lambda: place(buffers(2**60 - 10, 8)),
        ("the buffers are too large to be placed", f"{2**60} bytes in all", f"less than {2**60}"),
    ),
    "steps": (
        lambda: place(buffers(8, first=1 - 2**60, end=2**60 - 1)),
        lambda: place(buffers(8, first=0, end=2**60)),
        (
            "a buffer must end after it begins, and its size must not be negative",
            f"Lifetime(name='x0', first=0, end={2**60}, size=8)",
            "Lifetime(name, first, end, size) with first < end and size >= 0",
        ),
    ),
    "a capacity": (
        lambda: place(buffers(8, 8), capacity=16),
        lambda: place(buffers(8, 8), capacity=15),
        (
            "the capacity cannot hold the buffers",
            "capacity 15; no placement takes less than 16",
            "capacity=16 or more",
        ),
    ),
}


@pytest.mark.parametrize("name", LIMITS)
def test_the_last_that_is_taken_and_the_first_that_is_not(name: str) -> None:
    last, first, expected = LIMITS[name]
    last()
    with pytest.raises(TreadleError) as caught:
        first()
    assert (caught.value.what, caught.value.received, caught.value.hint) == expected


LONG = "z" * 300
RULE = " ".join(f"x{n}" for n in range(80))
MESH = Mesh.of("tp=2")

SHORTENED: dict[str, tuple[Callable[[], object], str]] = {
    "a constant": (lambda: Literal.of(LONG), f"'{LONG[:79]}"),
    "no layout": (lambda: parse_layout(f"({LONG}"), f"({LONG[:39]}"),
    "a word of a layout": (lambda: parse_layout(f"panels({LONG})"), f"panels({LONG[:33]}"),
    "no encoding": (lambda: parse_encoding(f"({LONG}"), f"({LONG[:39]}"),
    "a word of an encoding": (lambda: parse_encoding(f"q4_0({LONG})"), f"q4_0({LONG[:35]}"),
    "no mask": (lambda: causal & LONG, f"'{LONG[:79]}"),
    "digits of a size": (lambda: parse_size("9" * 50), "9" * 40),
    "threads": (lambda: Target("cpu", LONG), f"threads='{LONG[:71]}"),  # type: ignore[arg-type]
    "no mesh": (lambda: Mesh.of(LONG), LONG[:80]),
    "a mesh's axis": (lambda: Mesh.of(f"z=2,z=2,{LONG}=2"), f"z=2,z=2,{LONG[:72]}"),
    "a mesh's ranks": (lambda: Mesh.of(f"z=0,{LONG}=2"), f"z=0,{LONG[:76]}"),
    "terms": (lambda: parse_placement(f"[-, {LONG}] mean(tp)", MESH), f"[-, {LONG[:76]}"),
    "columns": (lambda: parse_instance(LONG), LONG[:200]),
    "a number of a buffer": (lambda: parse_instance(SIZES.format(LONG)), repr(LONG[:40])),
    "slots": (lambda: check_slots("append", np.array([7] * 99), 9), ("rows [" + "7, " * 99)[:200]),
}


@pytest.mark.parametrize("name", SHORTENED)
def test_so_much_is_shown_of_what_was_given(name: str) -> None:
    provoke, shown = SHORTENED[name]
    with pytest.raises(TreadleError) as caught:
        provoke()
    assert caught.value.received == shown


@pytest.mark.parametrize(
    ("provoke", "what", "within"),
    [
        (lambda: parse_placement(LONG, MESH), f"not a placement: {LONG[:80]!r}", None),
        (
            lambda: parse_placement(f"[*2{LONG}]", MESH),
            f"a dimension is split over no axis: {'[*2' + LONG[:77]!r}",
            None,
        ),
        (lambda: parse_placement(f"[-] {LONG}(tp)", MESH), f"unknown reduction {LONG[:40]!r}", None),
        (lambda: parse_rule(f"[t<=q] {RULE} -> {RULE}"), "t is limited by q, which is not an axis of the rule", RULE),
        (lambda: parse_rule(f"[t] {RULE} -> {RULE}").apply([]), "takes 1 operands, received 0", RULE),
    ],
)
def test_so_much_is_shown_of_a_rule_or_a_placement(
    provoke: Callable[[], object], what: str, within: str | None
) -> None:
    with pytest.raises(TreadleError) as caught:
        provoke()
    assert caught.value.what == what
    assert within is None or caught.value.within in (f"[t<=q] {RULE}"[:200], f"[t] {RULE}"[:200])


def test_bytes_that_64_bits_do_not_hold() -> None:
    assert plan_arena(buffers(2**63 - 65)) == [0]
    with pytest.raises(OverflowError):
        plan_arena(buffers(2**63 - 64))


def test_how_many_nodes_are_unfolded_by_default() -> None:
    with pytest.raises(TreadleError) as caught:
        inline_calls(calls(1000, 1000))
    assert (caught.value.what, caught.value.hint) == (
        "the graph without calls is too large, in main",
        "at most 1000000 nodes",
    )

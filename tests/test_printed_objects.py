"""The printed forms of a graph's parts, of a followed axis, and of plans: whole texts, in tests/golden/text_form/."""

from __future__ import annotations

import re

from tests.golden import Golden
from tests.random_programs import random_program
from treadle.ir.analysis.cost import Cost, graph_cost, node_cost, parameter_bytes, parameter_count
from treadle.ir.analysis.following import follow
from treadle.ir.axes import AxisFactor, Role
from treadle.ir.graph import Graph
from treadle.ir.initial_values import Init
from treadle.ir.rules.axis_rule_text import parse_rule
from treadle.ir.samples import Sample
from treadle.ir.sizing.sizes import Size
from treadle.ir.storage.views import Storage, StorageKind, View
from treadle.ir.target import Target
from treadle.ir.text.parser import parse_graph
from treadle.ir.types import f32
from treadle.passes.budget.memory_fit import Chunk, MemoryFit
from treadle.passes.memory.placement import Placement
from treadle.passes.memory.storage_plan import BetterOrder, How, ValuePlace, aligned, life_text

TEXT = """graph g {
  symbols B, S
  parameters { w: f32[4, 4] }
  block h(x: f32[B, S, 4]) -> (y: f32[B, S, 4])
    weights w: f32[4, 4]
  {
    a = linear(x, $w)   # f32[B, S, 4]  m.py:3  l
    m = softmax(a, axis=1)   # f32[B, S, 4]  m.py:4  l.s
    y = add(m, x)   # f32[B, S, 4]  m.py:5
    return y = y
  }
  block one(x: f32[B, S, 4]) -> (y: f32[B, S, 4]) {
    y = exp(x)
    return y = y
  }
  main(x: f32[B, S, 4]) -> (y: f32[B, S, 4], z: f32[B, 4], p: f32[B, S, S], c: f32[B, S, 4], r: f32[B, 2, 4]) {
    b = h(x) with {w: $w}   # f32[B, S, 4]  m.py:8  h.0
    y = h(b) with {w: $w}   # f32[B, S, 4]  m.py:8  h.1
    z = reduce_max(y, axes=[1])   # f32[B, 4]  m.py:9
    p = einsum(x, y, equation="b s d, b t d -> b s t")   # f32[B, S, S]  m.py:10
    c = cumsum(x, axis=1)
    r = slice(x, axis=1, stop=2)
    return y = y, z = z, p = p, c = c, r = r
  }
}
"""


def test_a_graphs_parts() -> None:
    graph = parse_graph(TEXT)
    main, one = graph.main, graph.functions["one"]
    assert [repr(each) for each in (graph, main, one)] == [
        "<graph g: 10 nodes>",
        "<function main: 6 nodes>",
        "<function one: 1 node>",
    ]
    single = Graph("single")
    single.main.nodes = one.nodes
    assert repr(single) == "<graph single: 1 node>"
    assert [repr(node) for node in main.nodes[:1] + main.nodes[4:5]] == ["<call h.0 m.py:8>", "<cumsum - >"]
    values = [main.nodes[0].result, main.inputs[0], main.parameters["w"]]
    assert list(map(repr, values)) == [
        "<result b: f32[B, S, 4]>",
        "<input x: f32[B, S, 4]>",
        "<parameter w: f32[4, 4]>",
    ]
    assert repr(f32["B (h=2 4)"].dims) == "(Dim(B), Dim((h=2 4)))"
    assert repr([f32["B"], Size.of("2*S")]) == "[f32[B], Size(2*S)]"
    assert list(map(str, (Init("ones"), Init("normal", 0.02)))) == ["ones", "normal(0.02)"]
    assert repr(Sample("f32[2]", None, axis=1)) == "S(f32[2], None, axis=1)"
    assert str(parse_rule("b [n] -> b")) == "b [n] -> b"
    factors = AxisFactor("n", Role.REDUCED, "max"), AxisFactor("t", Role.WHOLE, limit="s"), AxisFactor("b", Role.MAPPED)
    assert list(map(str, factors)) == ["n is reduced by max", "t is whole up to s", "b is mapped"]
    assert (Cost(12, 4).intensity, Cost(12, 0).intensity) == (3.0, 0.0)
    assert (str(Target("cpu", 3)), Target("x86-64-v4").kind, Target("cuda").kind) == ("cpu", "isa", "cuda")


def test_an_axis_that_is_followed(golden: Golden) -> None:
    graph, shown = parse_graph(TEXT), []
    for axis in ("S", "w[0]"):
        found = follow(graph, axis)
        for each in (found, found.encounters[0], found.step(), found.pack(), found.split()):
            shown += [repr(each), str(each), ""]
        shown += [*map(str, found.split().combine), ""]
    golden("text_form/followed_axes.txt", "\n".join(shown))


def test_axes_that_are_followed_through_programs(golden: Golden) -> None:
    """Axes are followed through programs with blocks, and with many ops in any order."""
    shown = []
    for seed in range(10):
        for axis in ("B", "S"):
            found = follow(random_program(seed), axis)
            shown += [f"# {seed}", str(found), *map(str, (found.step(), found.pack(), found.split())), ""]
    golden("text_form/axes_of_programs.txt", re.sub(r"tests/(\w+\.py):\d+", r"\1", "\n".join(shown)))


def test_costs_of_programs(golden: Golden) -> None:
    """Operations and bytes of each node and of each function."""
    shown, sizes = [], {"B": 2, "S": 7}
    for seed in range(10):
        graph = random_program(seed)
        for function in graph.functions.values():
            for node in function.nodes:
                cost = node_cost(node, sizes)
                shown.append(f"{seed} {function.name} {node.op.name}: {cost.flops} flops, {cost.bytes} bytes")
        shown.append(f"{seed}: {graph_cost(graph, sizes)}, {parameter_count(graph)} of {parameter_bytes(graph)} bytes")
    golden("text_form/costs_of_programs.txt", "\n".join(shown))


def test_plans() -> None:
    found = Placement((0, 8, 64), 130, 128, "greedy", 0.125)
    assert str(found) == "3 buffers in 130 bytes, at most 1.56% over the minimum (bound 128); greedy, 0.12 s"
    assert not found.proven
    assert str(BetterOrder(12_000, 9_500, {"B": 2, "S": 7})) == "reordered: peak 12,000 -> 9,500 bytes at B=2, S=7"
    assert str(BetterOrder(12, 9, {})) == "reordered: peak 12 -> 9 bytes"
    chunk = Chunk("main", 1, 3, 0, 4, "layer_norm to add", "S", "gpt2.py:41")
    assert str(chunk) == "main: layer_norm to add in 4 parts of S  gpt2.py:41"
    assert str(Chunk("h", 1, 1, 0, 2, "exp", "B")) == "h: exp in 2 parts of B"
    fit = MemoryFit(9_000, {"B": 2, "S": 64}, 12_000, 8_500, 1.0625, True, True, (chunk,), "logits")
    assert str(fit).splitlines() == [
        "peak 8,500 bytes within 9,000 (12,000 without a budget) at B=2, S=64 and below",
        "predicted time: 1.062 times the time of a run without a budget",
        "temporaries that are dead before logits is written use the memory of logits, if they fit",
        "products of one value are computed one by one",
        "cheap values are recomputed for each reader",
        str(chunk),
    ]
    plain = MemoryFit(9_000, {}, 12_000, 8_500, 1.0)
    assert len(str(plain).splitlines()) == 2 and " at " not in str(plain)
    assert (plain.apart, plain.again, plain.chunks, plain.host) == (False, False, (), None)
    assert (fit.as_dict()["sizes"], fit.as_dict()["chunks"][0]["dim"]) == ({"B": 2, "S": 64}, 0)


def test_where_a_value_lies() -> None:
    storage = Storage("x", f32, Size.of("4*S"), StorageKind.LOCAL)
    whole = View.contiguous(storage, (Size.of("S"), Size.of(4)))
    turned = View(storage, whole.shape[::-1], whole.strides[::-1], Size.of(0))
    views = whole, whole.sliced(0, Size.of(1), Size.of(2)), turned, turned.sliced(0, Size.of(1), Size.of(2))
    forms = [ValuePlace(storage, view, How.OWN, "", 0, 1, True).form for view in views]
    assert forms == ["row-major", "row-major, offset 4", "strides [1, 4]", "strides [1, 4], offset 1"]
    assert (repr(storage), str(whole)) == ("<local x: f32[4*S]>", "x[S, 4]")
    assert (life_text(-1, 3), life_text(0, 3)) == ("given to 3", "0 to 3")
    assert aligned([("a", "bb", "c"), ("aaa", "b", "cc")]) == [["a  ", "bb", "c"], ["aaa", "b ", "cc"]]
    assert ValuePlace(storage, whole, How.INTO, "y", 0, 1, True).describe({}) == "written straight to output y"

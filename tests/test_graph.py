"""The graph's own methods, its conversion to networkx, and the interpreter's checks."""

from __future__ import annotations

import numpy as np
import pytest

import treadle.frontends.language as t
from treadle.ir.builder import Builder
from treadle.ir.errors import GraphError
from treadle.ir.graph import Function, Graph
from treadle.ir.interpreter import interpret
from treadle.ir.sizing.size_bounds import Bounds
from treadle.ir.source_lines import SourceLine
from treadle.ir.transforms.clone import clone_graph
from treadle.ir.transforms.inline import inline_calls
from treadle.models.bert import bert
from treadle.models.gpt2 import gpt2

nx = pytest.importorskip("networkx")

SMALL = {"vocab": 7, "context": 6, "dim": 12, "heads": 3, "layers": 3, "hidden": 10}
GRAPHS = {
    "gpt2": inline_calls(gpt2.configure(**SMALL).graph()),
    "bert": inline_calls(bert.configure(**SMALL, head="pooler", inputs=("lengths",)).graph()),
}


def diamond() -> Graph:
    """y = exp(x) + tanh(x), one of them scaled by a weight."""
    b = Builder(Graph("diamond"))
    x = b.input("x", "f32[B, 4]")
    with b.scoped("left"):
        left = b.exp(x) * b.parameter("w", "f32[4]")
    b.outputs(y=left + b.tanh(x), twice=left)
    return b.graph


# -- networkx ------------------------------------------------------------------------------------------------------


def test_vertices_and_edges() -> None:
    graph = diamond()
    g = graph.to_networkx()
    labels = [g.nodes[v]["label"] for v in g]
    assert labels == ["x", "w", "exp", "mul", "tanh", "add", "y", "twice"]
    assert list(g) == list(range(8)), "integers in program order"
    assert [(u, v, d["operand"]) for u, v, d in g.edges(data=True)] == [
        (0, 2, 0),
        (0, 4, 0),
        (1, 3, 1),
        (2, 3, 0),
        (3, 5, 0),
        (3, 7, 0),
        (4, 5, 1),
        (5, 6, 0),
    ]
    assert g.nodes[0] == {"label": "x", "kind": "input", "type": "f32[B, 4]"}
    assert g.nodes[1]["kind"] == "parameter"
    assert g.nodes[3]["op"] == "mul"
    assert (g.nodes[3]["scope"], g.nodes[3]["type"]) == ("left", "f32[B, 4]")
    assert g.nodes[3]["source"] == str(graph.main.nodes[1].source)
    assert g.name == "diamond.main"


@pytest.mark.parametrize("name", GRAPHS)
def test_counts_and_order_of_models(name: str) -> None:
    graph = GRAPHS[name]
    main, g = graph.main, graph.to_networkx()
    kinds = [d.get("kind", "node") for _, d in g.nodes(data=True)]
    constants = {v for n in main.nodes for v in n.inputs if v.literal is not None}
    assert kinds.count("node") == len(main.nodes)
    assert kinds.count("input") == len(main.inputs)
    assert kinds.count("parameter") == len(main.parameters)
    assert kinds.count("output") == len(main.outputs)
    assert kinds.count("constant") == len(constants)
    assert g.number_of_edges() == sum(len(n.inputs) for n in main.nodes) + len(main.outputs)
    assert nx.is_directed_acyclic_graph(g)
    assert all(u < v for u, v in g.edges()), "a value is defined before it is used"
    uses = main.uses()
    ids = {d["label"]: v for v, d in g.nodes(data=True) if d.get("kind") == "parameter"}
    for parameter, value in main.parameters.items():
        assert g.out_degree(ids[parameter]) == len(uses[value])


def test_dominators_are_the_residual_stream() -> None:
    """Every path from the tokens to the logits goes through the sums of each layer, and through no attention."""
    graph = GRAPHS["gpt2"]
    g = graph.to_networkx()
    (logits,) = (v for v, d in g.nodes(data=True) if d.get("kind") == "output")
    (tokens,) = (v for v, d in g.nodes(data=True) if d.get("kind") == "input")
    # positions are computed from the tokens' shape, so they are another path from the tokens
    dominators = nx.immediate_dominators(g, tokens)
    chain, at = [], dominators[logits]
    while at != tokens:
        chain.append(g.nodes[at]["op"])
        at = dominators[at]
    assert chain[::-1] == ["add"] + ["add", "add"] * 3 + ["layer_norm", "linear"]


def test_several_results_and_edges_between_two_vertices() -> None:
    b = Builder(Graph("g"))
    x = b.input("x", "f32[4]")
    values, indices = b.top_k(x, k=2)
    b.outputs(sum=values + values, indices=indices)
    g = b.graph.to_networkx()
    between = [(g.nodes[u].get("op"), g.nodes[v]["label"], d["result"], d["operand"]) for u, v, d in g.edges(data=True)]
    assert between == [
        (None, "top_k", 0, 0),
        ("top_k", "add", 0, 0),
        ("top_k", "add", 0, 1),
        ("top_k", "indices", 1, 0),
        ("add", "sum", 0, 0),
    ]


def test_constants_and_arguments_that_are_outputs() -> None:
    b = Builder(Graph("g"))
    x = b.input("x", "f32[4]")
    one = b.constant(1.0)
    b.outputs(x=x, one=one, two=b.constant(2.0), y=x + one)
    g = b.graph.to_networkx()
    ends = {g.nodes[v]["label"]: g.nodes[u]["label"] for u, v in g.edges() if g.nodes[v].get("kind") == "output"}
    assert ends == {"x": "x", "one": "constant", "two": "constant", "y": "add"}


def test_one_function_of_several() -> None:
    graph = gpt2.configure(**SMALL).graph()
    assert "attention" in nx.get_node_attributes(graph.to_networkx("h"), "op").values()
    assert list(nx.get_node_attributes(graph.to_networkx(), "op").values()).count("call") == 3
    with pytest.raises(GraphError, match="the graph has no function 'block'") as caught:
        graph.to_networkx("block")
    assert caught.value.hint == "one of h, main"


# -- parts ---------------------------------------------------------------------------------------------------------


def test_bounds_narrow() -> None:
    graph = Graph("g")
    graph.bound("S", Bounds(1, 100))
    graph.bound("S", Bounds(2))
    assert graph.symbols == {"S": Bounds(2, 100)}
    for symbol, bounds, said in (("S", Bounds(101), "2 <= S <= 100, 101 <= S"), ("T", Bounds(5, 3), "T, 5 <= T <= 3")):
        with pytest.raises(GraphError, match=f"the bounds of {symbol} allow no size") as caught:
            graph.bound(symbol, bounds)
        assert caught.value.received == said
    assert graph.symbols == {"S": Bounds(2, 100)}


def test_functions_stand_before_main() -> None:
    graph = Graph("g")
    for name in ("a", "b"):
        graph.add_function(Function(name))
    assert list(graph.functions) == ["a", "b", "main"]
    for name in ("a", "main"):
        with pytest.raises(GraphError, match=f"the graph has a function '{name}' already"):
            graph.add_function(Function(name))


def test_calls_find_their_function() -> None:
    graph = gpt2.configure(**SMALL).graph()
    call = next(n for n in graph.main.nodes if n.op.callee is not None)
    assert graph.callee(call) is graph.functions["h"]
    assert graph.callee(graph.main.nodes[0]) is None
    del graph.functions["h"]
    with pytest.raises(GraphError, match="call of an unknown function 'h'"):
        graph.callee(call)


def test_a_value_that_is_used_and_not_defined_is_not_copied() -> None:
    """The undefined value is read by a node, returned as an output, or the last value of a state. The error shows the
    value.
    """
    for use in ("node", "output", "state"):
        graph = diamond()
        first, *others = graph.main.nodes
        if use == "node":
            graph.main.nodes[:] = others
        elif use == "output":
            graph.main.outputs["lost"] = diamond().main.nodes[0].result
        else:
            graph.main.updated["lost"] = diamond().main.nodes[0].result
        with pytest.raises(GraphError, match=f"main uses {first.result.name} before its definition") as report:
            clone_graph(graph)
        assert report.value.received == repr(first.result)


def test_uses_are_in_program_order() -> None:
    graph = diamond()
    x, left = graph.main.inputs[0], graph.main.nodes[1].result
    uses = graph.main.uses()
    assert [(n.op.name, p) for n, p in uses[x]] == [("exp", 0), ("tanh", 0)]
    assert [(n.op.name, p) for n, p in uses[left]] == [("add", 0)]


def test_graphs_are_equal_by_structure() -> None:
    one, other = diamond(), diamond()
    assert one == other
    other.name = other.main.nodes[0].result.name = other.main.nodes[0].scope = "another"
    other.main.nodes[0].source = SourceLine("elsewhere.py", 1)
    assert one == other, "names of values, scopes and lines are notes"
    other.main.outputs["z"] = other.main.outputs.pop("y")
    assert one != other
    assert one != "diamond"


# -- the interpreter -----------------------------------------------------------------------------------------------


def test_arguments_are_checked() -> None:
    graph = diamond()
    x, w = np.ones((2, 4), np.float32), np.ones(4, np.float32)
    assert interpret(graph, {"x": x}, {"w": w})["y"].shape == (2, 4)
    for inputs, weights, said in (
        ({}, {"w": w}, "no value for x"),
        ({"x": x}, {}, "no value for w"),
        ({"x": x, "z": x}, {"w": w}, "there is no input or weight z"),
        ({"x": x}, {"w": w, "v": w}, "there is no input or weight v"),
        ({"x": x[0]}, {"w": w}, "input x must have rank 2, has rank 1"),
        ({"x": x[:, :3]}, {"w": w}, "input x dimension 1 must be 4, is 3"),
        ({"x": x}, {"w": w[:3]}, "parameter w dimension 0 must be 4, is 3"),
    ):
        with pytest.raises(GraphError) as caught:
            interpret(graph, inputs, weights)
        assert said in str(caught.value)


def test_a_size_may_stand_before_the_symbols_that_tell_it() -> None:
    @t.model
    def model(x: t.f32["S*T"], y: t.f32["2*S"], z: t.f32["T"]):
        return {"x": x + 1.0, "y": y + 1.0, "z": z + 1.0}

    graph = model.graph()
    assert interpret(graph, {"x": np.ones(6), "y": np.ones(6), "z": np.ones(2)})["x"].shape == (6,)
    for x, y, said in (
        (7, 6, r"input x dimension 0 must be S\*T \(.*3.*\), is 7"),
        (6, 7, r"y dimension 0 must be 2\*S, is 7"),
    ):
        with pytest.raises(GraphError, match=said):
            interpret(graph, {"x": np.ones(x), "y": np.ones(y), "z": np.ones(2)})


def test_precision_on_request() -> None:
    """In float64, a cast to f16 does not round. By default, every result has its own dtype."""

    @t.model
    def model(x: t.f32["4"]):
        return {"half": x.cast("f16").cast("f32"), "third": x / 3.0}

    x = np.array([0.1, 1.0, 1e-9, 6000.3], np.float32)
    plain = interpret(model.graph(), {"x": x})
    wide = interpret(model.graph(), {"x": x}, float64=True)
    assert {a.dtype for a in plain.values()} == {np.dtype(np.float32)}
    assert {a.dtype for a in wide.values()} == {np.dtype(np.float64)}
    np.testing.assert_array_equal(plain["half"], x.astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(wide["half"], x.astype(np.float64))
    np.testing.assert_array_equal(plain["third"], x / np.float32(3))
    np.testing.assert_array_equal(wide["third"], x.astype(np.float64) / 3)


def test_watching() -> None:
    """The watcher is called for every node of every call, with the results of the node."""
    graph = gpt2.configure(**SMALL).graph()
    seen: list[str] = []
    weights = {n: np.zeros(v.type.static_shape or (), np.float32) for n, v in graph.parameters.items()}
    tokens = np.zeros((1, 3), np.int64)
    interpret(graph, {"tokens": tokens}, weights, watch=lambda node, results: seen.append(node.op.name))
    assert seen == [n.op.name for n in GRAPHS["gpt2"].main.nodes]

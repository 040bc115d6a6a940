"""Runs of nodes computed in parts: the runs for which this is possible, unchanged results, and detection of wrong
parts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated

import numpy as np
import pytest

import treadle as t
from tests.golden import Golden
from tests.op_checks import Case, refusal, runner
from tests.random_programs import random_program
from treadle.backends.registry import find_backend
from treadle.ir.builder import Builder
from treadle.ir.encodings.encoding import parse_encoding
from treadle.ir.errors import BackendError, PassError
from treadle.ir.graph import Function, Graph
from treadle.ir.interpreter import interpret
from treadle.ir.op_registry import OPS
from treadle.ir.ops.arithmetic import Add
from treadle.ir.ops.attention import Attention
from treadle.ir.ops.call import Call
from treadle.ir.ops.parts import Concat
from treadle.ir.sizing.sizes import Size
from treadle.ir.text.parser import parse_graph
from treadle.ir.text.printer import print_graph
from treadle.ir.transforms.clone import clone_graph
from treadle.ir.types import Type, f32
from treadle.ir.verifier import verify
from treadle.passes.budget.computing_again import compute_again
from treadle.passes.budget.fit_memory import FitMemory
from treadle.passes.budget.memory_fit import Chunk, MemoryFit
from treadle.passes.budget.part_checking import check_parts
from treadle.passes.budget.parts import NoPart, Parted, compute_in_parts, part_type
from treadle.passes.budget.regions import CutRegion, find_region
from treadle.passes.framework.pass_log import PassRecord


def inputs_of(graph: Graph, sizes: dict[str, int]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:  # type: ignore[type-arg]
    rng = np.random.default_rng(0)
    given = {v.name: rng.standard_normal(v.type.evaluate(sizes)) for v in graph.main.inputs}
    weights = {name: rng.standard_normal(v.type.evaluate({})) for name, v in graph.parameters.items()}
    return given, weights


@pytest.mark.parametrize("seed", range(60))
def test_parts_give_what_the_whole_gives(seed: int) -> None:
    graph = random_program(seed)
    count = len(graph.main.nodes)
    runs = [(i, j, d) for i in range(count) for j in range(i, min(i + 6, count)) for d in (0, 1)]
    given, weights = inputs_of(graph, {"B": 3, "S": 5})
    wanted = interpret(graph, given, weights)["y"]
    found = 0
    for first, last, dim in runs[seed % 5 :: 5]:
        made = clone_graph(graph)
        region = find_region(made, made.main, made.main.nodes[first : last + 1], dim)
        if region is None:
            continue
        try:
            parted = compute_in_parts(made, region, 2 + seed % 3)
        except NoPart:
            continue
        found += 1
        check_parts(made, parted)
        verify(made)
        got = interpret(made, given, weights)["y"]
        assert np.allclose(got, wanted, rtol=1e-9, atol=1e-9, equal_nan=True), (first, last, dim)
    assert found


BLOCKS = [("int8_rows", "uint8_rows"), ("int8_rows", "int8_rows"), ("int4_groups(32)", "int8_groups(32)")]


@pytest.mark.parametrize(("first", "last"), [(1, 1), (1, 2), (2, 2), (0, 3)])
@pytest.mark.parametrize(("weight", "rows"), BLOCKS)
def test_rows_in_blocks_are_cut_and_joined_as_others(weight: str, rows: str, first: int, last: int) -> None:
    """The regions produce rows in blocks, read them, or do both."""
    graph = Graph("blocks")
    b = Builder(graph)
    x = b.tanh(b.input("x", "f32[S, 64]"))
    held = b.encode(x, to=rows)
    y = b.encoded_linear(held, b.parameter("w", f32[8, 64].as_encoded(weight)), of=weight, rows=rows)
    b.outputs(y=b.exp(y))
    few = [{"x": np.random.default_rng(0).standard_normal((count, 64)).astype(np.float32)} for count in (5, 1)]
    weights = {"w": parse_encoding(weight).sample(np.random.default_rng(1), (8, 64))}
    wanted = [interpret(graph, given, weights)["y"] for given in few]
    region = find_region(graph, graph.main, graph.main.nodes[first : last + 1], 0)
    assert region is not None
    check_parts(graph, compute_in_parts(graph, region, 3))
    verify(graph)
    for given, y in zip(few, wanted, strict=True):  # for one row, two of the parts are empty
        np.testing.assert_array_equal(interpret(graph, given, weights)["y"], y)


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_a_part_may_be_empty(backend: str) -> None:
    """A part of a symbolic axis may be empty at small sizes. Ops run on their samples in one part more than there are
    elements.
    """
    if (reason := find_backend(backend).available()) is not None:
        pytest.skip(f"backend {backend}: {reason}")
    tried, failed = 0, []
    for name, number in [(op, number) for op in sorted(OPS) for number in range(len(OPS[op].samples))]:
        case = Case.of(name, number)
        graph = case.forward_graph()
        regions = [find_region(graph, graph.main, graph.main.nodes, dim) for dim in range(4)]
        found = [r for r in regions if r is not None and "weight" not in {v.name for v in r.dims}]
        if not found:  # PyTorch has no convolution without channels
            continue
        region = found[number % len(found)]
        try:
            compute_in_parts(graph, region, region.size.evaluate({}) + 1)
        except NoPart:
            continue
        if refusal(backend, graph) is not None:
            continue
        tried += 1
        try:
            made = runner(backend)(graph, case.inputs)
        except BackendError as error:
            failed.append(f"{name} {number}: {error}")
            continue
        for got, wanted in zip(made.values(), case.results, strict=True):
            near = np.allclose(got.astype(np.float64), wanted.astype(np.float64), rtol=2e-2, atol=2e-2, equal_nan=True)
            failed += [] if near else [f"{name} {number}: other numbers"]
    assert not failed
    assert tried > 200


def test_the_axis_along_which_blocks_lie_is_not_cut() -> None:
    assert part_type(f32["S", 64].as_encoded("int8_rows"), 0, Size.symbol("P")).encoding == parse_encoding("int8_rows")
    with pytest.raises(NoPart):
        part_type(f32["S", 64].as_encoded("int8_rows"), 1, Size.symbol("P"))


def test_which_runs_of_programs_may_be_in_parts(golden: Golden) -> None:
    """A case is a run of up to three nodes: the axis, its dimension in each value, and True if all ops are defined on a
    part.
    """
    shown = []
    for seed in range(3):
        program = random_program(seed)
        count = len(program.main.nodes)
        for first, last, dim in [(i, j, d) for i in range(count) for j in range(i, min(i + 3, count)) for d in (0, 1)]:
            graph = clone_graph(program)
            nodes = graph.main.nodes[first : last + 1]
            region = find_region(graph, graph.main, nodes, dim)
            if region is None:
                continue
            try:
                form = f"{len(compute_in_parts(graph, region, 2).parts)} parts"
            except NoPart:
                form = "no form on a part"
            held = ", ".join(sorted(f"{value.name}[{at}]" for value, at in region.dims.items()))
            shown.append(f"{seed} {' '.join(n.op.name for n in nodes)} along {dim} of {region.size}: {form}; {held}")
    golden("text_form/parts_of_programs.txt", "\n".join(shown))


def test_collectives_are_neither_split_nor_recomputed() -> None:
    """Collectives are neither computed in parts nor recomputed: other ranks communicate exactly as often as their own
    programs say.
    """
    b = Builder(Graph("met"))
    x = b.apply("all_reduce", b.input("x", "f32[B, 8]"), over="tp", ways=2)
    b.outputs(y=b.relu(x) + b.tanh(x))
    graph = b.graph
    for count in range(1, len(graph.main.nodes) + 1):
        assert find_region(graph, graph.main, graph.main.nodes[:count], 0) is None
    assert find_region(graph, graph.main, graph.main.nodes[1:], 0) is not None
    compute_again(graph, {"B": 4})
    assert [node.op.name for node in graph.main.nodes].count("all_reduce") == 1


@pytest.mark.parametrize("seed", range(40))
def test_recomputation_changes_no_number(seed: int) -> None:
    graph = random_program(seed)
    given, weights = inputs_of(graph, {"B": 2, "S": 4})
    wanted = interpret(graph, given, weights)["y"]
    compute_again(graph, {"B": 2, "S": 4})
    verify(graph)
    assert np.array_equal(interpret(graph, given, weights)["y"], wanted, equal_nan=True)


@t.model
def attends(x: Annotated[t.Tensor, t.f32["S 16"]]) -> t.Tensor:
    q, k, v = (t.rearrange(t.linear(x, 16, name=n), pattern="s (h=2 d) -> 1 h s d") for n in "qkv")
    return t.rearrange(t.attention(q, k, v, mask=t.causal), pattern="1 h s d -> s (h d)")


@t.model
def sums(x: Annotated[t.Tensor, t.f32["S 8"]]) -> t.Tensor:
    return t.softmax(x * 2.0, axis=0) + t.cumsum(x, axis=0)


def traced(model: object) -> Graph:
    return t.compile(model, passes=[]).graph  # type: ignore[arg-type]


def region_of(graph: Graph, ops: tuple[str, str], dim: int) -> CutRegion | None:
    nodes = graph.main.nodes
    first = next(i for i, n in enumerate(nodes) if n.op.name == ops[0])
    last = next(i for i, n in enumerate(nodes) if n.op.name == ops[1] and i >= first)
    return find_region(graph, graph.main, nodes[first : last + 1], dim)


def test_queries_are_cut_and_keys_are_not() -> None:
    graph = traced(attends)
    region = region_of(graph, ("attention", "attention"), 2)
    assert region is not None
    q, k, v = region.inputs
    assert (region.dims.get(q), region.dims.get(k), region.dims.get(v)) == (2, None, None)
    parted = compute_in_parts(graph, region, 3)
    starts = [str(graph.callee(p.call).nodes[0].op.start) for p in parted.parts]  # type: ignore[union-attr]
    assert starts == ["0", "S//3", "(2*S)//3"]
    assert find_region(graph, graph.main, graph.main.nodes, 0) is None  # keys and values need all tokens


PARTED = """graph g {
  symbols S
  parameters { w: f32[8, 8] }
  block h(x: f32[S, 8]) -> (y: f32[S, 8])
    weights w: f32[8, 8]
  {
    y = linear(x, $w)                  # f32[S, 8]  m.py:3  up
    return y = y
  }
  main(x: f32[S, 8], k: f32[S, 8]) -> (y: f32[S, 8], z: f32[S, 8]) {
    n = layer_norm(x)                  # f32[S, 8]  m.py:5  norm
    a = h(n) with {w: $w}              # f32[S, 8]  m.py:6  h.0
    u = tanh(a)                        # f32[S, 8]  m.py:7  act
    p = positions(n)                   # i64[S, 8]  m.py:8  pos
    v = cast(p, to=f32)                # f32[S, 8]  m.py:8  pos
    z = mul(u, v)                      # f32[S, 8]  m.py:9  out
    y = add(n, z)                      # f32[S, 8]  m.py:9  out
    return y = y, z = z
  }
}"""


AGAIN = """graph g {
  symbols S
  parameters { w: f32[8, 8] }
  main(x: f32[S, 8]) -> (a: f32[S, S], e: f32[S, 8]) {
    n = layer_norm(x)                         # f32[S, 8]  m.py:5  norm
    q = linear(n, $w)                         # f32[S, 8]  m.py:6  q
    k = linear(n, $w)                         # f32[S, 8]  m.py:7  k
    t = rearrange(k, pattern="s d -> d s")    # f32[8, S]  m.py:8  k
    a = matmul(q, t)                          # f32[S, S]  m.py:9  out
    e = exp(x)                                # f32[S, 8]  m.py:9  out
    return a = a, e = e
  }
}"""


@pytest.mark.parametrize(
    ("line", "again"),
    [
        ("n = exp(x)", True),
        ("n = linear(x, $w)", True),  # 96 rows: 16 operations per byte
        ("n = linear(x, $v)", False),  # 97 columns: more operations per byte
        ("n = h(x)", False),
        ('n = rearrange(x, pattern="s d -> s d")', False),
        ("n, m = top_k(x, k=96)", False),
    ],
)
def test_cheap_values_are_recomputed_for_each_reader(line: str, again: bool) -> None:
    """A cheap value is recomputed for each reader if its operands live anyway, here until the end."""
    graph = parse_graph(
        "graph g { parameters { w: f32[96, 96] v: f32[97, 96] }"
        " block h(x: f32[96, 96]) -> (y: f32[96, 96]) { y = exp(x) return y = y }"
        f" main(x: f32[96, 96]) -> (a: f32[], b: f32[], c: f32[96, 96]) {{ {line}"
        " a = reduce_max(n, axes=[0, 1]) b = reduce_min(n, axes=[0, 1]) c = tanh(x) return a = a, b = b, c = c } }"
    )
    count = len(graph.main.nodes)
    compute_again(graph, {})
    verify(graph)
    assert len(graph.main.nodes) == count + again


def test_values_without_later_readers_are_not_kept() -> None:
    for line, again in (("c = tanh(x)", True), ("c = tanh(a)", False)):
        graph = parse_graph(
            f"graph g {{ main(x: f32[8, 8]) -> (b: f32[], c: f32[8, 8]) {{ n = exp(x) a = softmax(n)"
            f" b = reduce_min(n, axes=[0, 1]) {line} return b = b, c = c }} }}"
        )
        compute_again(graph, {})
        assert len(graph.main.nodes) == 4 + again, line


def test_parts_say_where_they_are_from(golden: Golden) -> None:
    """The text, with scopes and lines, of the slices, of the nodes that compute a part, and of the nodes that join the
    parts.
    """
    graph = parse_graph(PARTED)
    region = find_region(graph, graph.main, graph.main.nodes[1:3], 0)
    assert region is not None
    compute_in_parts(graph, region, 3)
    again = parse_graph(AGAIN)
    compute_again(again, {"S": 64})
    golden("text_form/parts.txt", f"{print_graph(graph)}\n{print_graph(again)}")


@pytest.mark.parametrize("op", ["softmax", "cumsum"])
def test_an_axis_that_an_op_needs_whole_or_scans_is_not_cut(op: str) -> None:
    graph = traced(sums)
    assert region_of(graph, (op, op), 0) is None
    assert region_of(graph, (op, op), 1) is not None


def test_a_plan_of_another_graph_has_no_form_on_parts() -> None:
    graph = traced(sums)
    at = next(i for i, n in enumerate(graph.main.nodes) if n.op.name == "cumsum")
    chunk = Chunk("main", at, at, 0, 2, "cumsum", "S")
    fit = FitMemory(MemoryFit(1000, {"S": 8}, before=2000, peak=900, ratio=1.5, chunks=(chunk,)))
    with pytest.raises(PassError, match="an op of a planned run cannot be computed in parts") as error:
        fit.run_graph(graph, PassRecord("fit-memory", "", 0))
    assert "main: cumsum in 2 parts of S" in str(error.value)


# -- the checker -----------------------------------------------------------------------------------------------------


def parted_attention() -> tuple[Graph, Parted]:
    graph = traced(attends)
    region = region_of(graph, ("attention", "rearrange"), 0)
    assert region is not None
    parted = compute_in_parts(graph, region, 3)
    check_parts(graph, parted)
    return graph, parted


def test_a_part_at_the_wrong_position_is_found() -> None:
    graph, parted = parted_attention()
    callee = graph.callee(parted.parts[1].call)
    assert callee is not None
    node = next(n for n in callee.nodes if isinstance(n.op, Attention))
    node.op = replace(node.op, start=0)  # type: ignore[type-var]
    with pytest.raises(PassError, match="part 1 of attention differs from the result of the part's node"):
        check_parts(graph, parted)


def first_part(graph: Graph, parted: Parted) -> Function:
    callee = graph.callee(parted.parts[0].call)
    assert callee is not None
    return callee


def change_slices(parted: Parted, part: int, **changes: int) -> None:
    """Increase the given attributes of each slice of a part."""
    for node in parted.parts[part].slices.values():
        node.op = replace(node.op, **{name: getattr(node.op, name) + more for name, more in changes.items()})  # type: ignore[type-var]


def a_part_that_is_no_call(graph: Graph, parted: Parted) -> None:
    parted.parts[1].call.op = Add()


def one_operand_for_another(graph: Graph, parted: Parted) -> None:
    call = parted.parts[0].call
    _, k, v = call.operands
    call.operands = (k, k, v)


def operands_in_another_order(graph: Graph, parted: Parted) -> None:
    call = parted.parts[0].call
    q, k, v = call.operands
    call.operands = (q, v, k)


def a_node_less(graph: Graph, parted: Parted) -> None:
    first_part(graph, parted).nodes.pop()


def another_result(graph: Graph, parted: Parted) -> None:
    callee = first_part(graph, parted)
    callee.replace_results(lambda value: callee.nodes[0].result)


def a_gap(graph: Graph, parted: Parted) -> None:
    change_slices(parted, 1, start=1)


def a_shorter_last_part(graph: Graph, parted: Parted) -> None:
    change_slices(parted, 2, stop=-1)


def each_second_element(graph: Graph, parted: Parted) -> None:
    change_slices(parted, 1, stride=1)


def another_order(graph: Graph, parted: Parted) -> None:
    (joined,) = parted.joined.values()
    joined.operands = joined.operands[::-1]


def another_axis(graph: Graph, parted: Parted) -> None:
    (joined,) = parted.joined.values()
    joined.op = Concat(axis=1)


def a_part_of_another_size(graph: Graph, parted: Parted) -> None:
    result = parted.parts[0].call.results[0]
    result.type = Type(result.type.dtype, (result.type.dims[0], result.type.dims[0]))


WRONG = [
    (a_part_that_is_no_call, "a part is not a call"),
    (one_operand_for_another, "a part does not read"),
    (operands_in_another_order, "a node of a part reads another value than the region's node"),
    (a_node_less, "a part has other nodes than the region"),
    (another_result, "a part returns other values than the region"),
    (a_gap, "parts are not contiguous"),
    (a_shorter_last_part, "parts do not cover the axis"),
    (each_second_element, "is not split by a slice"),
    (another_order, "are not joined in order"),
    (another_axis, "are joined along another axis"),
    (a_part_of_another_size, "is not a part of"),
]


@pytest.mark.parametrize(("change", "report"), WRONG, ids=[change.__name__ for change, _ in WRONG])
def test_wrong_parts_are_found(change: Callable[[Graph, Parted], None], report: str) -> None:
    graph, parted = parted_attention()
    change(graph, parted)
    with pytest.raises(PassError, match=report):
        check_parts(graph, parted)


def test_two_inputs_that_are_cut_apart_are_found() -> None:
    graph = traced(sums)
    region = region_of(graph, ("add", "add"), 1)
    assert region is not None
    parted = compute_in_parts(graph, region, 2)
    check_parts(graph, parted)
    node = next(iter(parted.parts[1].slices.values()))
    node.op = replace(node.op, start=node.op.start + 1)  # type: ignore[type-var, attr-defined]
    with pytest.raises(PassError, match="slices of a part differ in their start or end"):
        check_parts(graph, parted)


@t.model
def layers(x: Annotated[t.Tensor, t.f32["S 8"]]) -> t.Tensor:
    for _ in t.stack("h", 2):
        x += t.tanh(t.linear(x, 8, name="up"))
    return x


def parted_layers() -> tuple[Graph, Parted]:
    graph = traced(layers)
    region = region_of(graph, ("call", "call"), 0)
    assert region is not None
    parted = compute_in_parts(graph, region, 2)
    check_parts(graph, parted)
    return graph, parted


def the_whole_function(graph: Graph, parted: Parted) -> None:
    (call,) = first_part(graph, parted).nodes
    call.op = Call.of(graph.functions["h"])


def another_result_of_the_function(graph: Graph, parted: Parted) -> None:
    (call,) = first_part(graph, parted).nodes
    inner = graph.callee(call)
    assert inner is not None
    inner.replace_results(lambda value: inner.nodes[0].result)


def an_op_for_the_call(graph: Graph, parted: Parted) -> None:
    (call,) = first_part(graph, parted).nodes
    call.op = Add()


CALLS = [
    (the_whole_function, "a call reads a part of a value that it needs whole"),
    (another_result_of_the_function, "a part returns other values than the function"),
    (an_op_for_the_call, "a call replaces an op"),
]


@pytest.mark.parametrize(("change", "report"), CALLS, ids=[change.__name__ for change, _ in CALLS])
def test_wrong_calls_in_parts_are_found(change: Callable[[Graph, Parted], None], report: str) -> None:
    graph, parted = parted_layers()
    change(graph, parted)
    with pytest.raises(PassError, match=report):
        check_parts(graph, parted)


def test_another_op_in_a_part_is_found() -> None:
    graph = traced(sums)
    region = region_of(graph, ("mul", "mul"), 0)
    assert region is not None
    parted = compute_in_parts(graph, region, 2)
    callee = graph.callee(parted.parts[0].call)
    assert callee is not None
    callee.nodes[0].op = Add()
    with pytest.raises(PassError, match="differs from the result of the part's node"):
        check_parts(graph, parted)

"""The report: stages with numbered nodes, boxes and their positions, tabs, and the page as one closed file."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import re
import shlex
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import treadle as t
from tests.command_line import SMALL, Treadle, commands_in
from treadle.explaining.fusion import explain_fusion
from treadle.explaining.memory import explain_memory
from treadle.ir.builder import Builder
from treadle.ir.encodings.encoding import parse_encoding
from treadle.ir.errors import UsageError
from treadle.ir.graph import Graph, Node
from treadle.ir.sizing.sizes import Size
from treadle.ir.text.printer import print_graph
from treadle.ir.transforms.balances import balances_of
from treadle.ir.transforms.encoded_weights import decode_weights, encode_parameters, encode_weights, encoding_errors
from treadle.passes.framework.manager import PassManager
from treadle.passes.pipelines import DEFAULT
from treadle.report import layout
from treadle.report.box_scopes import MOST_ITEMS
from treadle.report.boxes import boxes_of
from treadle.report.building import Report, report_of
from treadle.report.layout import SPACING, place
from treadle.report.memory_tab import size_terms
from treadle.report.nodes import NodeDetails
from treadle.report.programs import ReportProgram, stage_texts
from treadle.report.stages import stages_of
from treadle.report.subjects import lowered_subject
from treadle.report.writing import LONGEST, SCRIPTS, page_text, plain

HOSTILE = [
    "</script><script>alert(1)</script>",
    "\"'><img src=x onerror=alert(1)>",
    "nul\0",
    "\u202egnp.exe",
    "x" * 200_000,
]


@t.model
def small(tokens: t.i64["B S"], *, dim: int = 16, layers: int = 3):
    x = t.embed(tokens, 50, dim, name="wte")
    for _ in t.stack("h", layers):
        x += t.self_attention(t.layer_norm(x, name="ln_1"), 2, causal=True, name="attn")
        x += t.mlp(t.layer_norm(x, name="ln_2"), 4 * dim, name="mlp")
    return t.unembed(t.layer_norm(x, name="ln_f"), tied="wte")


@pytest.fixture(scope="module")
def exe() -> t.Compiled:
    return t.compile(small)


@pytest.fixture(scope="module")
def report(exe: t.Compiled) -> Report:
    return exe.report()


def program_of(exe: t.Compiled) -> ReportProgram:
    return ReportProgram("model", exe.optimized, exe.backend, exe.executable)


@t.model
def talking(tokens: t.i64["B S"], *, dim: int = 32, heads: int = 4):
    """A layer whose heads are mixed after the softmax (Shazeer et al. 2020), and an ordinary layer."""
    x = t.embed(tokens, 50, dim, name="wte")
    with t.scope("mixed"):
        y = t.layer_norm(x, name="ln")
        q, k, v = (t.split_heads(t.linear(y, dim, name=name), heads) for name in "qkv")
        scores = t.einsum(q, k, equation="b h s d, b h t d -> b h s t") * (dim // heads) ** -0.5
        mixed = t.einsum(t.softmax(scores), t.parameter("mix", heads, heads), equation="b h s t, g h -> b g s t")
        y = t.merge_heads(t.einsum(mixed, v, equation="b h s t, b h t d -> b h s d"))
        x += t.linear(y, dim, name="out")
    x += t.mlp(t.layer_norm(x, name="ln_2"), 4 * dim, name="mlp_1")
    x += t.self_attention(t.layer_norm(x, name="ln_3"), heads, name="attn")
    x += t.mlp(t.layer_norm(x, name="ln_4"), 4 * dim, name="mlp_2")
    return t.layer_norm(x, name="ln_f")


@pytest.fixture(scope="module")
def mixing() -> Report:
    return report_of(lowered_subject(talking, quantize="int8-weights"))


# -- stages --------------------------------------------------------------------------------------------------------


def test_a_history_refers_to_no_node(exe: t.Compiled) -> None:
    for record in exe.log:
        assert all(isinstance(n, int) for held in record.history.numbers.values() for n in held)
        assert all(isinstance(n, int) for made, old in record.history.replaced.items() for n in (made, *old))


def test_functions_that_a_pass_leaves_alone_share_their_numbers(exe: t.Compiled) -> None:
    for before, after in pairwise(list(exe.optimized.log)):
        for name, held in after.history.numbers.items():
            same = before.history.numbers.get(name)
            assert same is held or after.changed


def test_every_node_of_every_stage_has_one_number(exe: t.Compiled) -> None:
    for stage in stages_of(exe.optimized):
        numbers = [number for _, _, number in stage.walk()]
        assert len(numbers) == len(set(numbers)) == sum(len(f.nodes) for f in stage.graph.functions.values())


def test_an_unchanged_op_keeps_its_number_through_all_stages(exe: t.Compiled) -> None:
    stages = stages_of(exe.optimized)
    found = [{number for _, node, number in s.walk() if node.op.name == "attention"} for s in stages]
    assert len(found[0]) == 1
    assert all(each == found[0] for each in found)


def test_a_fusion_names_the_ops_that_it_replaced(exe: t.Compiled) -> None:
    stages = stages_of(exe.optimized)
    at = next(i for i, stage in enumerate(stages) if stage.name == "fuse-activated-linear")
    before = {number: node.op.name for _, node, number in stages[at - 1].walk()}
    after = {number: node.op.name for _, node, number in stages[at].walk()}
    ((made, old),) = stages[at].replaced.items()
    assert after[made] == "activated_linear"
    assert sorted(before[n] for n in old) == ["gelu_tanh" if "gelu_tanh" in before.values() else "gelu", "linear"]
    assert not any(n in after for n in old)


def test_replacements_within_one_pass_lead_to_nodes_before_it() -> None:
    graph = Graph("chain")
    b = Builder(graph, graph.main)
    x = b.input("x", "f32[B, 4]")
    b.outputs(y=b.neg(b.neg(b.neg(b.neg(x)))))
    stages = stages_of(PassManager(DEFAULT).run(graph))
    for before, stage in pairwise(stages):
        known = {number for _, _, number in before.walk()}
        assert all(n in known for old in stage.replaced.values() for n in old)


def test_the_backends_passes_continue_the_numbers(exe: t.Compiled) -> None:
    stages = stages_of(exe.optimized)
    at = len(exe.optimized.log)
    assert stages[at + 1].numbers == stages[at].numbers
    assert [s.name for s in stages[1:]] == [record.name for record in exe.log]


def test_an_op_whose_operand_comes_from_elsewhere_keeps_its_number(mixing: Report) -> None:
    """Quantization gives every product a decoded weight. It adds decodings, and removes nothing."""
    data = mixing.sections["graph:0"]
    at, quantized = next(each for each in enumerate(data["passes"]) if each[1]["name"] == "quantize-weights")
    assert len(quantized["added"]) == len(quantized["altered"]) == 12
    assert not {"removed", "replaced"} & quantized.keys()
    (change,) = [each for each in mixing.sections["log"]["data"]["passes"] if each["pass"] == "quantize-weights"]
    assert change["ops"]["changes"] == {"decode": 12}
    assert data["passes"][at - 1]["ops"] + 12 == quantized["ops"]


def test_an_artifact_has_the_declared_and_the_optimized_graph(exe: t.Compiled, tmp_path: Path) -> None:
    path = tmp_path / "small.treadle"
    exe.save(path)
    stages = stages_of(t.load_artifact(path).optimized)
    assert [s.name for s in stages[:2]] == ["declared", "optimized"]
    declared = {node.op.name: number for _, node, number in stages[0].walk()}
    optimized = {node.op.name: number for _, node, number in stages[1].walk()}
    assert declared["attention"] == optimized["attention"]  # the same op, by its line and types


# -- positions -----------------------------------------------------------------------------------------------------

drawings = st.integers(1, 24).flatmap(
    lambda n: st.tuples(
        st.just(n), st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), max_size=40, unique=True)
    )
)
engines = ["generations"] + ["sugiyama"] * (layout.sugiyama() is not None)


@pytest.mark.parametrize("engine", engines)
@given(drawing=drawings)
def test_edges_lead_down_and_items_do_not_overlap(engine: str, drawing: tuple[int, list[tuple[int, int]]]) -> None:
    count, edges = drawing
    with pytest.MonkeyPatch.context() as patch:
        if engine == "generations":
            patch.setattr(layout, "sugiyama", lambda: None)
        placed = place(count, edges)
        assert place(count, edges) == placed  # deterministic
    rows: dict[int, list[float]] = {}
    for row, center in zip(placed.rows, placed.centers, strict=True):
        rows.setdefault(row, []).append(center)
    for centers in rows.values():
        assert all(right - left > layout.WIDTH for left, right in pairwise(sorted(centers)))
    for a, b in edges:
        if a < b:
            assert placed.rows[a] < placed.rows[b]
            assert len(placed.bends.get((a, b), ())) == placed.rows[b] - placed.rows[a] - 1
    assert min(placed.centers) >= layout.WIDTH / 2 - 0.1


def test_a_chain_is_a_straight_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "sugiyama", lambda: None)
    placed = place(4, [(0, 1), (1, 2), (2, 3)])
    assert placed.rows == (0, 1, 2, 3)
    assert len(set(placed.centers)) == 1
    assert placed.height == 4 * layout.HEIGHT + 3 * layout.GAP_DOWN


def test_parts_that_are_not_connected_stand_side_by_side() -> None:
    placed = place(3, [(0, 1)])
    assert placed.rows == (0, 1, 0)
    assert placed.centers[2] - placed.centers[0] >= SPACING - 0.1


# -- boxes ---------------------------------------------------------------------------------------------------------


def boxes(exe: t.Compiled) -> tuple[ReportProgram, dict[str, Any]]:
    program, facts = program_of(exe), NodeDetails({"B": 1, "S": 8})
    return program, boxes_of(program.stages, [facts.of(stage) for stage in program.stages])


def stage_boxes(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the bodies of every stage by path."""
    now: dict[str, Any] = {}
    for change in found["stages"]:
        now = {path: body for path, body in now.items() if change.get(path, 0) is not None}
        now |= {path: found["bodies"][at] for path, at in change.items() if at is not None}
        yield now


def test_every_op_is_in_one_box_of_its_function(exe: t.Compiled) -> None:
    program, found = boxes(exe)
    for stage, held in zip(program.stages, stage_boxes(found), strict=True):
        numbers = {number: name for name, _, number in stage.walk()}
        seen: dict[int, str] = {}
        for path, body in held.items():
            for kind, *facts in body["items"]:
                for number in facts[3] if kind == "call" else [facts[0]] if kind == "op" else []:
                    assert number not in seen
                    seen[number] = path.split("\x1f")[0]
        assert seen == numbers


def test_calls_of_a_repeated_block_are_one_item_with_their_count(exe: t.Compiled) -> None:
    _, found = boxes(exe)
    *_, last = stage_boxes(found)
    (call,) = [item for item in last["main"]["items"] if item[0] == "call"]
    assert call[3] == "h"
    assert len(call[4]) == 3


def test_a_call_that_reads_an_op_between_calls_is_an_item_of_its_own() -> None:
    @t.model
    def mixed(x: t.f32["B 8"]):
        for _ in t.stack("h", 3):
            x = t.gelu(t.linear(x, 8, name="up"))
        y = t.tanh(x)
        for _ in t.stack("g", 2):
            y = y + t.linear(x, 8, name="side")
        return y

    _, found = boxes(t.compile(mixed, passes=[]))
    for held in stage_boxes(found):
        for body in held.values():
            order = dict(enumerate(body["at"][::2]))
            triples = body.get("edges", [])
            assert all(order[a] < order[b] for a, b in zip(triples[::3], triples[1::3], strict=True))


def test_edges_of_every_stage_lead_down(mixing: Report) -> None:
    """A box stands at its first op. Decodings of weights come early, but boxes stand below what they read."""
    for held in stage_boxes(mixing.sections["graph:0"]):
        for path, body in held.items():
            triples = body.get("edges", [])
            for a, b in zip(triples[::3], triples[1::3], strict=True):
                assert body["at"][2 * a] < body["at"][2 * b], path
                assert body["held"][2 * a] < body["held"][2 * b], path


def test_an_item_is_held_at_one_place_in_all_stages(exe: t.Compiled) -> None:
    _, found = boxes(exe)
    places: dict[tuple[str, str], tuple[float, float]] = {}
    shown = 0
    for held in stage_boxes(found):
        for path, body in held.items():
            for at, item in enumerate(body["items"]):
                key = path, str(item[1]) if item[0] in ("box", "op", "call") else f"{item[0]} {item[2]} {item[1]}"
                place = body["held"][2 * at], body["held"][2 * at + 1]
                shown += key in places
                assert places.setdefault(key, place) == place
    assert shown > 100


def test_held_items_of_one_row_do_not_overlap(exe: t.Compiled) -> None:
    _, found = boxes(exe)
    for body in found["bodies"]:
        rows: dict[int, list[float]] = {}
        for at in range(len(body.get("items", []))):
            rows.setdefault(body["held"][2 * at], []).append(body["held"][2 * at + 1])
        for centers in rows.values():
            assert all(right - left > layout.WIDTH for left, right in pairwise(sorted(centers)))


def test_ports_with_the_same_ends_are_one() -> None:
    graph = Graph("ports")
    b = Builder(graph, graph.main)
    xs = [b.input(f"x{n}", "f32[4]") for n in range(6)]
    b.outputs(y=b.concat(*xs, axis=0), z=xs[0] * 2.0)
    program = ReportProgram("model", PassManager([]).run(graph), "")
    found = boxes_of(program.stages, [NodeDetails({}).of(s) for s in program.stages])
    (held,) = stage_boxes(found)
    ports = [item for item in held["main"]["items"] if item[0] == "in"]
    assert [port[2] for port in ports] == ["x0", "5 inputs"]
    assert [name for _, name, _ in ports[1][4]] == [f"x{n}" for n in range(1, 6)]


def test_a_long_list_of_ops_is_divided() -> None:
    graph = Graph("long")
    b = Builder(graph, graph.main)
    x = b.input("x", "f32[4]")
    for _ in range(1200):
        x = b.tanh(x)
    b.outputs(y=x)
    optimized = PassManager([]).run(graph)
    program = ReportProgram("model", optimized, "")
    facts = NodeDetails({})
    found = boxes_of(program.stages, [facts.of(s) for s in program.stages])
    (held,) = stage_boxes(found)
    assert max(len(body["items"]) for body in held.values()) < MOST_ITEMS
    assert "main\x1fops 251 to 500" in held


def test_a_long_list_of_scopes_is_divided() -> None:
    graph = Graph("deep")
    b = Builder(graph, graph.main)
    x = b.input("x", "f32[4]")
    for number in range(600):
        with b.scoped(f"layer.{number}"):
            x = b.tanh(x) + float(number)
    b.outputs(y=x)
    program = ReportProgram("model", PassManager([]).run(graph), "")
    found = boxes_of(program.stages, [NodeDetails({}).of(s) for s in program.stages])
    (held,) = stage_boxes(found)
    assert max(len(body["items"]) for body in held.values()) < MOST_ITEMS
    assert "main\x1flayer.250 to layer.499\x1flayer.300" in held


# -- facts ---------------------------------------------------------------------------------------------------------


def test_the_fusion_tab_has_the_sites_of_explain(report: Report) -> None:
    expected = explain_fusion(small)
    data = report.sections["fusion"]["data"]
    assert data["totals"] == expected.sites
    assert all(site["nodes"] for site in data["sites"])


def test_a_fused_site_names_the_pass_and_the_op_that_it_became(mixing: Report) -> None:
    graph = mixing.sections["graph:0"]
    found = set()
    for site in mixing.sections["fusion"]["data"]["sites"]:
        assert ("stage" in site) == (site["status"] == "fused")
        if "stage" not in site:
            continue
        stage = graph["passes"][site["stage"]]
        (number,) = site["made"]
        assert number in stage["added"]
        assert op_of(graph, site["stage"], number) == site["op"]
        work = dict(stage["replaced"])[number]
        assert set(site["nodes"]) & set(work)
        found.add((stage["name"], site["op"]))
    assert found == {
        ("merge-projections", "projections"),
        ("fuse-residual-norm", "add_layer_norm"),
        ("fuse-activated-linear", "activated_linear"),
    }


def op_of(graph: dict[str, Any], stage: int, number: int) -> str:
    """Return the op of a node at a stage."""
    held = list(stage_boxes(graph))[stage]
    (record,) = [item[2] for body in held.values() for item in body["items"] if item[:2] == ["op", number]]
    return str(graph["nodes"][record][0])


def test_a_site_that_is_not_fused_names_the_op_at_which_the_match_stopped(mixing: Report) -> None:
    (site,) = [each for each in mixing.sections["fusion"]["data"]["sites"] if each["status"] == "refused"]
    assert site["edge"] == ("einsum b h s t, g h -> b g s t, which sums over h, not over t, the axis of the softmax")
    assert site["hint"].startswith("softmax(q k^T")
    assert site["stop"] in site["nodes"]
    graph = mixing.sections["graph:0"]
    assert op_of(graph, 0, site["stop"]) == "einsum"


def test_costs_are_those_of_a_run(exe: t.Compiled, report: Report) -> None:
    """An op of a repeated block counts in every call. The shares of all ops are the whole."""
    costs, overview = report.sections["costs"]["data"], report.sections["overview"]["data"]
    assert costs["flops"] == overview["flops"] == sum(row[1] for row in costs["ops"]) > 0
    numbers = program_of(exe).numbers()
    calls = {row[0]: row[3] for row in costs["ops"]}
    (attention,) = [number for node, number in numbers.items() if node.op.name == "attention"]
    assert calls[attention] == 3
    flops = [row[1] for row in costs["ops"]]
    assert flops == sorted(flops, reverse=True)


def test_the_overview_counts_ops_at_named_stages(mixing: Report) -> None:
    data, passes = mixing.sections["overview"]["data"], mixing.sections["graph:0"]["passes"]
    assert data["passes"] == len(passes) - 1
    for column, (at, name, count) in enumerate(data["stages"]):
        assert passes[at]["name"] == name
        assert passes[at]["ops"] == count == sum(each[column] for each in data["ops"].values())
    assert [at for at, _, _ in data["stages"]][::2] == [0, len(passes) - 1]


def test_a_weight_names_its_reader_and_the_reason_for_its_encoding(mixing: Report) -> None:
    data, graph = mixing.sections["weights"]["data"], mixing.sections["graph:0"]
    for each in data["weights"]:
        assert each["reason"], each["name"]
        operands = {
            tuple(operand[1:3])
            for record in [
                item[2]
                for body in list(stage_boxes(graph))[data["stage"]].values()
                for item in body["items"]
                if item[:2] == ["op", each["reader"]]
            ]
            for operand in mixing.sections["details:0"]["nodes"][record]["operands"]
        }
        assert ("parameter", each["name"]) in operands


def test_the_memory_tab_has_the_report_of_explain(report: Report) -> None:
    expected = explain_memory(small).as_dict()
    data = report.sections["memory"]["data"]
    assert {name: data[name] for name in expected if name != "alive"} == {
        n: v for n, v in expected.items() if n != "alive"
    }
    assert [each["bytes"] for each in data["alive"]] == [each["bytes"] for each in expected["alive"]]
    assert max(data["timeline"]["live"]) <= data["peak"]


def test_formulas_give_the_peak_at_other_sizes(report: Report) -> None:
    def at(terms: list[Any], sizes: dict[str, int]) -> int:
        total = 0
        for coefficient, *atoms in terms:
            for atom in atoms:
                value = sizes[atom] if isinstance(atom, str) else at(atom["of"], sizes) // at(atom["by"], sizes)
                coefficient *= value
            total += coefficient
        return total

    data = report.sections["memory"]["data"]
    other = {"B": 3, "S": 77}
    assert max(at(terms, other) for terms in data["formulas"]) == explain_memory(small, sizes=other).peak
    size = Size.of("(S + 2)//4*B + 7")
    assert at(size_terms(size), other) == size.evaluate(other)


def test_every_storage_at_the_peak_leads_to_an_op() -> None:
    """The workspace of a kernel leads to the op of the kernel."""
    pytest.importorskip("tvm")
    report = report_of(lowered_subject(talking, backend="tvm", heads=8, dim=128), sizes={"B": 2, "S": 64})
    data, graph = report.sections["memory"]["data"], report.sections["graph:0"]
    last = len(graph["passes"]) - 1
    workspaces = [each for each in data["alive"] if each.get("workspace")]
    assert workspaces
    for each in workspaces:
        assert op_of(graph, last, each["node"]) in each["why"]
    assert all(each["node"] is not None for each in data["alive"])


def test_the_text_of_every_stage_is_what_the_printer_prints(exe: t.Compiled) -> None:
    stages = stages_of(exe.optimized)
    found = stage_texts(stages)
    for at, stage in enumerate(stages):
        held = found["stages"][at]
        held = found["stages"][held] if isinstance(held, int) else held
        lines = [
            found["lines"][n]
            for first, count in zip(held[::2], held[1::2], strict=True)
            for n in range(first, first + count)
        ]
        assert lines == print_graph(stage.graph).splitlines()


def test_an_op_has_its_code_its_storage_and_its_rule(exe: t.Compiled, report: Report) -> None:
    program = program_of(exe)
    number = next(n for node, n in program.numbers().items() if node.op.name == "attention")
    light, details, source = (report.sections[f"{part}:0"] for part in ("graph", "details", "source"))
    record = next(i for i, node in enumerate(light["nodes"]) if node[0] == "attention")
    assert details["nodes"][record]["rule"] == exe_attention(exe).op.axis_rule([4, 4, 4])
    first, last = source["code"][number][:2]
    assert "attention" in "\n".join(source["lines"][first : last + 1])
    assert details["final"]["storage"][number][0]["why"]


def exe_attention(exe: t.Compiled) -> Node:
    return next(node for _, node in exe.graph.walk() if node.op.name == "attention")


def test_added_and_removed_ops_are_those_of_the_stages(exe: t.Compiled, report: Report) -> None:
    before: set[int] = set()
    for stage, expected in zip(stages_of(exe.optimized), report.sections["graph:0"]["passes"], strict=True):
        now = {number for _, _, number in stage.walk()}
        if stage.record is not None:
            assert set(expected.get("added", [])) == now - before
            assert set(expected.get("removed", [])) == before - now
        before = now


def test_a_subject_without_weights_gives_the_facts_of_the_compiled_model(report: Report) -> None:
    bare = report_of(lowered_subject(small))
    times = ("log",)
    for name, data in report.sections.items():
        if name not in times:
            assert plain(bare.sections[name]) == plain(data), name


def test_a_decoding_step_and_a_sharded_model_have_reports(exe: t.Compiled) -> None:
    step = exe.stepped.report()
    assert step.sections["head"]["programs"] == ["step"]
    assert step.sections["step"]["data"]["bytes_per_token"] == 3 * 2 * 16 * 4
    assert step.sections["fusion"].keys() == {"missing", "command"}
    from treadle.sharding.plans import shard_model

    plan = report_of(shard_model(small, "tp=2", recipe="megatron"))
    assert plan.sections["head"]["programs"] == ["rank 1"]
    assert plan.sections["sharding"]["data"]["ranks"] == 2
    assert any(node[0] == "all_reduce" for node in plan.sections["graph:0"]["nodes"])


def test_a_report_that_fails_is_the_error_of_its_tab() -> None:
    @t.model
    def encoder(x: t.f32["B 4"]):
        return t.linear(x, 4, name="up")

    sections = t.compile(encoder).report().sections
    assert "step" in sections["step"]["error"]
    assert sections["memory"]["data"]["peak"] >= 0


def test_a_profile_needs_a_compiled_model_on_tvm(exe: t.Compiled) -> None:
    with pytest.raises(UsageError, match="profiled") as caught:
        exe.report(profile=2)
    assert caught.value.hint == 't.compile(model, backend="tvm").report(profile=2)'


def test_a_profile_has_the_times_of_kernels() -> None:
    pytest.importorskip("tvm")
    report = t.compile(small, backend="tvm", layers=1).report(profile=1, sizes={"B": 1, "S": 4})
    assert report.sections["profile"]["data"]["calls"]
    assert report.sections["roofline"]["data"]["kernels"]
    assert report.sections["details:0"]["final"]["seconds"]
    code = report.sections["source:0"]["code"]
    lines = report.sections["source:0"]["lines"]
    assert all(0 <= at < len(lines) for held in code.values() for at in held)


# -- the page ------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """The tags of a page with their attributes, and the texts of its scripts and its style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_data(self, data: str) -> None:
        if self.inside in ("script", "style"):
            self.texts.append((self.inside, data))

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""


def unpacked(page: Page) -> dict[str, Any]:
    held = iter([text for kind, text in page.texts if kind == "script"])
    found = {}
    for tag, attributes in page.tags:
        if tag == "script":
            text = next(held)
            if "data-section" in attributes:
                found[str(attributes["data-section"])] = json.loads(gzip.decompress(base64.b64decode(text)))
    return found


def test_the_page_is_one_file_that_may_load_nothing(report: Report) -> None:
    page = Page(report.html())
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert not re.search(r"https?:|data:|blob:|\*|unsafe", policy)
    assert all(not ({"src", "action", "style"} & attributes.keys()) for _, attributes in page.tags)
    assert all((a.get("href") or "#").startswith("#") for _, a in page.tags)
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert not [tag for tag, _ in page.tags if tag in ("link", "iframe", "object", "embed", "img", "base")]
    hashes = set(re.findall(r"'sha256-([^']+)'", policy))
    code = [
        text
        for (tag, a), (_, text) in zip([x for x in page.tags if x[0] in ("script", "style")], page.texts, strict=True)
        if "data-section" not in a
    ]
    assert {base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in code} == hashes


def test_the_pages_code_makes_no_markup_of_data() -> None:
    for path in Path("treadle/report/page").glob("*.js"):
        text = path.read_text(encoding="utf-8")
        for banned in (
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "Function(",
            "fetch(",
            "XMLHttpRequest",
        ):
            assert banned not in text, f"{path.name}: {banned}"
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)


def test_sections_unpack_to_the_facts(report: Report) -> None:
    found = unpacked(Page(report.html()))
    assert found == json.loads(json.dumps(plain(report.sections)))


def test_equal_facts_give_equal_bytes(report: Report) -> None:
    assert page_text("x", report.sections) == page_text("x", report.sections)


def test_hostile_names_stay_data() -> None:
    @t.model
    def hostile(x: t.f32["B 4"]):
        for name in HOSTILE:
            with t.scope(name[:4000]):
                x = t.gelu(t.linear(x, 4, name=name))
        return {HOSTILE[0]: x}

    report = t.compile(hostile).report()
    text = report.html()
    page = Page(text)
    assert "alert(1)" not in text
    assert len([tag for tag, a in page.tags if tag == "script" and "data-section" not in a]) == len(SCRIPTS)
    found = unpacked(page)
    assert HOSTILE[0] in json.dumps(found["graph:0"]["nodes"], ensure_ascii=False)
    assert len(text) < 1_000_000  # long names are cut


def test_numbers_that_are_not_finite_and_long_texts_can_be_written() -> None:
    assert plain({"a": float("inf"), 3: ("x" * (LONGEST + 1),)}) == {
        "a": "inf",
        "3": [f"{'x' * LONGEST}... (4,001 characters)"],
    }


def test_a_notebook_shows_the_page_in_a_frame(report: Report) -> None:
    shown = report._repr_html_()
    assert shown.startswith("<iframe")
    assert 'sandbox="allow-scripts"' in shown
    (document,) = re.findall(r'srcdoc="([^"]*)"', shown)
    assert html.unescape(document) == report.html()


@pytest.mark.parametrize("scheme", ["int4", "int8-weights", "int8"])
def test_errors_of_encodings_are_measured_against_the_original_weights(scheme: str) -> None:
    """int8 smooths some products: the error is measured on the smoothed numbers."""
    sizes: dict[str, Any] = {"vocab": 64, "context": 16, "dim": 64, "heads": 2, "layers": 2}
    plain = t.compile("gpt2", backend="numpy", **sizes)
    originals = dict(plain.weights)
    exe = t.compile("gpt2", backend="numpy", weights=originals, quantize=scheme, **sizes)
    found = {each["name"]: each for each in exe.report(originals=originals).sections["weights"]["data"]["weights"]}
    decoded = decode_weights(exe.graph, exe.weights)
    encoded = [name for name, value in exe.graph.parameters.items() if value.type.encoding is not None]
    assert encoded
    smoothed = {name for balance in balances_of(exe.graph) for name in balance.weights}
    for name, each in found.items():
        if name not in encoded:
            assert each["error"] is None
            continue
        assert 1e-4 < each["error"] < (0.2 if scheme == "int4" else 0.02)
        if name not in smoothed:
            difference = decoded[name].astype(np.float64) - originals[name]
            wanted = np.sqrt((difference**2).mean() / (originals[name].astype(np.float64) ** 2).mean())
            assert each["error"] == pytest.approx(wanted, rel=1e-6)
    data = exe.report().sections["weights"]["data"]
    assert not data["measured"]
    assert all(each["error"] is None for each in data["weights"])


def test_a_weight_in_blocks_or_of_zeros_has_no_error() -> None:
    b = Builder(Graph("g"))
    b.outputs(y=b.matmul(b.input("x", "f32[B, 64]"), b.parameter("w", "f32[64, 64]")))
    graph = encode_parameters(b.graph, {"w": parse_encoding("int4_groups(32)")})
    assert encoding_errors(graph, {"w": np.zeros((64, 64), np.float32)}) == {}
    blocks = encode_weights(graph, {"w": np.ones((64, 64), np.float32)})
    assert encoding_errors(graph, blocks) == encoding_errors(graph, {}) == {}
    assert 0 <= encoding_errors(graph, {"w": np.ones((64, 64), np.float32)})["w"] < 0.1


def test_a_report_that_cannot_be_written_says_so(report: Report, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be written"):
        report.save(tmp_path / "missing" / "report.html")


# -- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def treadle_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Treadle:
    return commands_in(tmp_path, capsys, monkeypatch)


def test_the_command_writes_a_report(treadle_command: Treadle, tmp_path: Path) -> None:
    said = treadle_command("report", SMALL, "-o", "small.html", "--sizes", "B=2,S=6")
    assert said.code == 0
    assert said.out.startswith("wrote small.html, ")
    found = unpacked(Page((tmp_path / "small.html").read_text(encoding="utf-8")))
    assert found["head"]["sizes"] == {"B": 2, "S": 6}
    own = f"treadle report {SMALL} -o small.html --sizes B=2,S=6"
    assert found["roofline"]["command"] == f"{own} --backend tvm --profile 9"
    assert found["sharding"]["command"] == f"{own} --mesh tp=2 --recipe megatron"


def test_a_command_that_adds_data_keeps_the_options(treadle_command: Treadle, tmp_path: Path) -> None:
    """Without the encoding and the sizes, a profile would time another program."""
    given = ["report", SMALL, "--backend=numpy", "--quantize", "int8-weights", "--set", "dim=32", "-o", "a b.html"]
    assert treadle_command(*given, "--json").code == 0
    found = unpacked(Page((tmp_path / "a b.html").read_text(encoding="utf-8")))
    kept = ["treadle", *(word for word in given if word != "--backend=numpy")]
    assert shlex.split(found["profile"]["command"]) == [*kept, "--backend", "tvm", "--profile", "9"]
    assert "--sizes S=6 --backend tvm" in t.compile(small).report(sizes={"S": 6}).sections["profile"]["command"]


def test_the_command_reports_a_mesh_a_quantized_model_and_an_artifact(treadle_command: Treadle, tmp_path: Path) -> None:
    expected = treadle_command(
        "report", SMALL, "--mesh", "tp=2", "--recipe", "megatron", "--quantize", "int8-weights", "--json"
    )
    assert expected.json["path"] == "report.html"
    found = unpacked(Page((tmp_path / "report.html").read_text(encoding="utf-8")))
    assert found["head"]["programs"][-1] == "rank 1"
    assert {each["encoding"] for each in found["weights"]["data"]["weights"]} >= {"int8_rows"}
    assert treadle_command("compile", SMALL, "-o", "small.treadle").code == 0
    assert treadle_command("report", "small.treadle").code == 0
    found = unpacked(Page((tmp_path / "report.html").read_text(encoding="utf-8")))
    assert "missing" in found["fusion"]


def test_the_command_measures_the_errors_of_a_checkpoint(treadle_command: Treadle, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tests.hf_models import save

    save("gpt2", tmp_path / "folder")
    assert treadle_command("report", "folder", "--quantize", "int8-weights").code == 0
    data = unpacked(Page((tmp_path / "report.html").read_text(encoding="utf-8")))["weights"]["data"]
    errors = {each["name"]: each["error"] for each in data["weights"] if each["encoding"] is not None}
    assert data["measured"] and errors
    assert all(1e-4 < error < 0.02 for error in errors.values())
    assert treadle_command("report", "folder").code == 0
    assert not unpacked(Page((tmp_path / "report.html").read_text(encoding="utf-8")))["weights"]["data"]["measured"]


def test_the_command_refuses_what_does_not_apply(treadle_command: Treadle) -> None:
    assert treadle_command("report", SMALL, "--recipe", "megatron").code == 2
    assert treadle_command("report", SMALL, "-o", "missing/report.html").code == 2
    assert treadle_command("report", SMALL, "--profile", "2").code == 2

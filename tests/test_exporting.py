"""Exports for other tools: our JSON against its schema, Graphviz text against parsers, Model Explorer's JSON."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import SMALL, Treadle, commands_in, refused
from tests.planted_regressions import decoder
from tests.test_models import ZOO
from treadle.comparing.builds import Build, open_build
from treadle.comparing.run_nodes import run_of
from treadle.exporting.dot_language import dot_string, graphviz_text
from treadle.exporting.graph_records import graph_record
from treadle.exporting.model_explorer_graphs import model_explorer_record, node_data
from treadle.exporting.node_facts import NodeFacts, stages_of
from treadle.ir.builder import Builder
from treadle.ir.graph import Graph
from treadle.passes.stepping.derivation import derive_step
from treadle.program.budgets import choose_sizes

SCHEMA = Path(__file__).resolve().parent.parent / "docs/graph.schema.json"
FAMILIES = [name for name in ZOO if " " not in name]
HOSTILE = (
    "</script>",
    'a" ]; evil [label="',
    "back\\slash\\",
    "a\0b",
    "\u202egnp",
    "x" * 1_000_000,
    "a." * 300_000,
    "\ud800",
    "&lt;b\n",
)


@pytest.fixture
def treadle_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Treadle:
    return commands_in(tmp_path, capsys, monkeypatch)


def facts_of(build: Build) -> NodeFacts:
    return NodeFacts(build.graph, choose_sizes(build.graph, {}), build)


def record_of(build: Build) -> Any:
    """Return the record after it has been written and read."""
    return json.loads(json.dumps(graph_record(build.graph, facts_of(build), build.stage or "optimized")))


def hostile_graph(name: str) -> Graph:
    b = Builder(Graph(name))
    x = b.input(name, "f32[B, 8]")
    with b.scoped(name):
        y = b.linear(x, b.parameter(name, "f32[8, 8]")) + float("inf")
    b.function.outputs[name] = y.value
    return b.graph


# -- our JSON ------------------------------------------------------------------------------------------------------


def checked(record: Any) -> Any:
    """Return the record after the schema has validated it."""
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(record)
    return record


@pytest.mark.parametrize("name", FAMILIES)
def test_the_schema_validates_every_model_of_the_zoo(name: str) -> None:
    checked(record_of(open_build(ZOO[name][0].graph())))


def test_the_schema_validates_states_encodings_and_layouts() -> None:
    step = derive_step(open_build(decoder).graph).graph
    record = checked(record_of(open_build(step, passes=())))
    assert record["entries"] == ["prefill", "step", "verify"] and record["states"]
    quantized = checked(record_of(open_build(decoder, quantize="int8-weights")))
    assert {p["encoding"] for p in quantized["parameters"]} > {None}
    pytest.importorskip("tvm")
    lowered = checked(record_of(open_build("gpt2@plan-storage", layers=1, backend="tvm")))
    nodes = [node for function in lowered["functions"] for node in function["nodes"]]
    assert any(node["kernel"] for node in nodes) and any(r["storage"] for node in nodes for r in node["results"])
    assert any(p["layout"] for p in lowered["functions"][-1]["parameters"])


def test_the_schema_refuses_other_data() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))
    record = record_of(open_build(decoder))
    for change in ({"version": 2}, {"functions": []}, {"more": 1}, {"entries": None}):
        assert not validator.is_valid(record | change)
    del record["functions"][0]["nodes"][0]["op"]
    assert not validator.is_valid(record)


def test_the_record_has_every_node_and_its_operands() -> None:
    build = open_build(decoder)
    record = record_of(build)
    assert [f["name"] for f in record["functions"]] == list(build.graph.functions)
    for function, made in zip(build.graph.functions.values(), record["functions"], strict=True):
        assert [n["op"] for n in made["nodes"]] == [n.op.name for n in function.nodes]
        ids = [n["id"] for n in made["nodes"]]
        assert len(set(ids)) == len(ids)
        for at, node in enumerate(made["nodes"]):
            for operand in node["operands"]:
                assert operand is None or operand["kind"] != "result" or operand["node"] in ids[:at]
    (attention,) = [n for f in record["functions"] for n in f["nodes"] if n["op"] == "attention"]
    assert attention["scope"] == "attn" and "planted_regressions.py" in attention["line"]
    assert attention["attributes"] == {"terms": "[causal, window(4)]"} and attention["flops"] > 0


@pytest.mark.parametrize("hostile", HOSTILE, ids=range(len(HOSTILE)))
def test_names_in_the_record_are_as_they_were(hostile: str) -> None:
    record = checked(record_of(open_build(hostile_graph(hostile))))
    assert record["model"] == hostile
    assert record["functions"][0]["inputs"][0]["name"] == hostile
    assert {n["scope"] for n in record["functions"][0]["nodes"]} == {hostile}


# -- Graphviz ------------------------------------------------------------------------------------------------------

_TOKEN = re.compile(r'"(?:[^"\\\n]|\\["\\])*"|[A-Za-z0-9_]+|->|[{}\[\];,=]|\s+')


def tokens_of(text: str) -> list[str]:
    """Return the tokens of Graphviz text. Fails for a character that begins no token."""
    found, at = [], 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        assert match is not None, text[at : at + 40]
        found.append(match[0])
        at = match.end()
    return [token for token in found if not token.isspace()]


def parsed(text: str) -> tuple[set[str], list[tuple[str, str]]]:
    """Parse Graphviz text by a strict grammar: statements with attributes, nested clusters. Return nodes and edges."""
    tokens, at = tokens_of(text), 0
    nodes: set[str] = set()
    edges: list[tuple[str, str]] = []

    def take(*expected: str) -> str:
        nonlocal at
        token = tokens[at]
        assert not expected or token in expected, tokens[at - 5 : at + 5]
        at += 1
        return token

    def attributes() -> None:
        take("[")
        while True:
            assert re.fullmatch(r"[a-z]+", take())
            take("=")
            assert take() not in "[]{};,="
            if take(",", "]") == "]":
                return

    def block() -> None:
        take("{")
        while tokens[at] != "}":
            name = take()
            if name == "subgraph":
                assert take().startswith("cluster_")
                block()
                continue
            if tokens[at] == "=":
                take("=")
                take()
            else:
                if tokens[at] == "->":
                    take("->")
                    edges.append((name, take()))
                elif name not in ("node", "edge"):
                    nodes.add(name)
                attributes()
            take(";")
        take("}")

    take("digraph")
    block()
    assert at == len(tokens)
    return nodes, edges


def drawn(graph: Graph, folder: Path) -> str:
    """Return the Graphviz text of a graph after every parser that is installed has accepted it."""
    build = open_build(graph)
    text = graphviz_text(build.graph, facts_of(build))
    nodes, edges = parsed(text)
    assert {end for edge in edges for end in edge} <= nodes
    dot = shutil.which("dot")
    if dot is not None:
        (folder / "graph.dot").write_text(text, encoding="utf-8")
        done = subprocess.run(
            [dot, "-Tsvg", "graph.dot"], cwd=folder, capture_output=True, encoding="utf-8", check=False, timeout=300
        )
        assert done.returncode == 0 and "<svg" in done.stdout, done.stderr
    return text


@pytest.mark.parametrize("name", FAMILIES)
def test_graphviz_text_of_the_zoo_parses(name: str, tmp_path: Path) -> None:
    drawn(ZOO[name][0].graph(), tmp_path)


def test_pydot_reads_the_same_nodes() -> None:
    pydot = pytest.importorskip("pydot")
    build = open_build(decoder)
    text = graphviz_text(build.graph, facts_of(build))
    (graph,) = pydot.graph_from_dot_data(text)

    def names(of: Any) -> set[str]:
        inner = [names(each) for each in of.get_subgraphs()]
        return {n.get_name() for n in of.get_nodes() if n.get_name() not in ("node", "edge")}.union(*inner)

    nodes, edges = parsed(text)
    assert names(graph) == nodes
    assert len(graph.get_edges()) + sum(len(s.get_edges()) for s in graph.get_subgraphs()) == len(edges)


def test_scopes_and_functions_are_clusters(tmp_path: Path) -> None:
    build = open_build(decoder)
    text = graphviz_text(build.graph, facts_of(build))
    assert 'label="h, called 3 times"' in text and 'label="attn"' in text
    assert text.count("subgraph cluster_f") == len(build.graph.functions)
    assert text.count("style=dashed") == 3  # calls


@pytest.mark.parametrize("hostile", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_names_stay_inside_strings(hostile: str, tmp_path: Path) -> None:
    plain, text = (drawn(hostile_graph(name), tmp_path) for name in ("plain", hostile))
    assert parsed(plain) == parsed(text)
    assert len(text) < 20_000
    assert all(c.isprintable() for line in text.split("\n") for c in line)


def test_entities_and_backslashes_are_text() -> None:
    assert dot_string('a&lt;b\\n"c"') == '"a&amp;lt;b\\\\n\\"c\\""'


# -- Model Explorer ------------------------------------------------------------------------------------------------

FIELDS = {
    "id": str,
    "label": str,
    "namespace": str,
    "attrs": list,
    "incomingEdges": list,
    "inputsMetadata": list,
    "outputsMetadata": list,
}
"""The fields of a node that Model Explorer reads (`graph_builder.py` of ai-edge-model-explorer 0.1)."""


def check_graphs(record: Any) -> list[Any]:
    """Check the form of a file of Model Explorer, and that edges join nodes of the same graph. Return its graphs."""
    assert set(record) == {"label", "graphs", "graphSorting"}  # the application reads a file with the first two
    for graph in record["graphs"]:
        assert set(graph) == {"id", "nodes"}
        ids = [node["id"] for node in graph["nodes"]]
        assert len(set(ids)) == len(ids)
        outputs = {node["id"]: {o["id"] for o in node["outputsMetadata"]} for node in graph["nodes"]}
        for node in graph["nodes"]:
            assert set(node) <= set(FIELDS)
            assert all(isinstance(value, FIELDS[name]) for name, value in node.items())
            pairs = [*node["attrs"], *(p for o in node["outputsMetadata"] for p in o["attrs"])]
            assert all(set(p) == {"key", "value"} and isinstance(p["value"], str) for p in pairs)
            for edge in node["incomingEdges"]:
                assert set(edge) == {"sourceNodeId", "sourceNodeOutputId", "targetNodeInputId"}
                assert edge["sourceNodeOutputId"] in outputs[edge["sourceNodeId"]]
    assert len({graph["id"] for graph in record["graphs"]}) == len(record["graphs"])
    return list(record["graphs"])


def explored(build: Build) -> list[Any]:
    return check_graphs(json.loads(json.dumps(model_explorer_record(build, choose_sizes(build.graph, {})))))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_stage_of_the_zoo_is_a_graph(name: str) -> None:
    build = open_build(ZOO[name][0].graph())
    graphs = explored(build)
    stages = list(stages_of(build))
    assert [g["id"].partition(" ")[2] for g in graphs] == [stage for stage, _ in stages]
    assert graphs[0]["id"] == "0 declared" and graphs[-1]["id"].endswith("plan-storage")
    for made, (_, graph) in zip(graphs, stages, strict=True):
        ours = run_of(graph).nodes
        assert [n["label"] for n in made["nodes"] if not n["id"].startswith("v")] == [each.op for each in ours]


def test_layers_are_namespaces_and_facts_are_attributes() -> None:
    graph = explored(open_build(decoder))[0]
    attention = [n for n in graph["nodes"] if n["label"] == "attention"]
    assert [n["namespace"] for n in attention] == ["h/0/attn", "h/1/attn", "h/2/attn"]
    facts = {p["key"]: p["value"] for p in attention[0]["attrs"]}
    assert (
        facts["terms"] == "[causal, window(4)]"
        and facts["scope"] == "h.0.attn"
        and int(facts["FLOPs"].replace(",", ""))
    )
    weights = [n for n in graph["nodes"] if n["namespace"] == "h/1/mlp/up"]
    assert {n["label"] for n in weights} >= {"weight", "bias"}


@pytest.mark.parametrize("hostile", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_names_are_short_printable_text(hostile: str) -> None:
    for graph in explored(open_build(hostile_graph(hostile), name=hostile)):
        texts = [t for n in graph["nodes"] for t in (n["label"], n["namespace"], *(p["value"] for p in n["attrs"]))]
        assert all(text.isprintable() and len(text) < 10_000 for text in texts)


def test_the_adapter_loads_our_json() -> None:
    """The dataclasses and checks with which Model Explorer turns an adapter's answer into its own graphs."""
    pytest.importorskip("ai_edge_model_explorer_adapter")
    builder = pytest.importorskip("model_explorer.graph_builder")
    dacite = pytest.importorskip("dacite")
    build = open_build(decoder)
    record = model_explorer_record(build, choose_sizes(build.graph, {}))
    loaded = dacite.from_dict(builder.GraphCollection, record, dacite.Config(strict=True))
    assert [len(g.nodes) for g in loaded.graphs] == [len(g["nodes"]) for g in record["graphs"]]
    data = pytest.importorskip("model_explorer.node_data_builder")
    (times,) = node_data("3 last", {7: 0.5}).values()
    assert dacite.from_dict(data.GraphNodeData, times, dacite.Config(strict=True)).results["7"].value == 0.5


def test_times_are_node_data() -> None:
    data = node_data("3 last", {7: 0.5, 2: 1.5})["3 last"]
    assert data["results"] == {"2": {"value": 1.5}, "7": {"value": 0.5}}


# -- the command ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("to", "file"), [("dot", "a.dot"), ("dot", "a.gv"), ("model-explorer", "a.json"), ("json", "a.json")]
)
def test_a_file_of_each_format(treadle_command: Treadle, to: str, file: str, tmp_path: Path) -> None:
    said = treadle_command("export", SMALL, "--to", to, "-o", file, "--json")
    assert said.code == 0, said.err
    assert said.json["files"] == [file] and said.json["format"] == to
    text = (tmp_path / file).read_text(encoding="utf-8")
    if to == "dot":
        parsed(text)
    elif to == "json":
        checked(json.loads(text))
    else:
        check_graphs(json.loads(text))


def test_a_graph_after_a_pass(treadle_command: Treadle, tmp_path: Path) -> None:
    assert treadle_command("export", f"{SMALL}@dead-code", "--to", "json", "-o", "a.json").code == 0
    assert json.loads((tmp_path / "a.json").read_text())["stage"] == "dead-code"
    assert treadle_command("compile", SMALL, "-o", "small.treadle").code == 0
    assert treadle_command("export", "small.treadle", "--to", "model-explorer", "-o", "a.json").code == 0
    stages = [g["id"] for g in check_graphs(json.loads((tmp_path / "a.json").read_text()))]
    assert stages[:2] == ["0 declared", "1 optimized"]


@pytest.mark.parametrize("model", [SMALL, "small.treadle"])
def test_measured_times_belong_to_nodes_of_the_last_graph(treadle_command: Treadle, tmp_path: Path, model: str) -> None:
    pytest.importorskip("tvm")
    assert treadle_command("compile", SMALL, "-o", "small.treadle").code == 0
    words = ("export", model, "--to", "model-explorer", "-o", "a.json", "--times", "t.json", "--backend", "tvm")
    said = treadle_command(*words)
    assert said.code == 0, said.err
    last = check_graphs(json.loads((tmp_path / "a.json").read_text()))[-1]
    ((name, data),) = json.loads((tmp_path / "t.json").read_text()).items()
    assert name == last["id"]
    timed = [n for n in last["nodes"] if n["id"] in data["results"]]
    assert len(timed) == len(data["results"])
    assert {n["namespace"].split("/")[1] for n in timed if n["namespace"].startswith("h/")} == {"0", "1"}


@pytest.mark.parametrize("hostile", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_onnx_file(treadle_command: Treadle, tmp_path: Path, hostile: str) -> None:
    """Its names are text in every format, and in a diff; a name that is too long for the importer is refused."""
    onnx = pytest.importorskip("onnx")
    name = hostile.replace("\ud800", "?")  # protobuf has no such text
    x = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2, 3])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2, 3])
    nodes = [
        onnx.helper.make_node("Relu", [name], [f"r{name}"], name=name, doc_string=name),
        onnx.helper.make_node("Exp", [f"r{name}"], ["y"], name=f"{name}/{name}"),
    ]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, name, [x], [y]))
    (tmp_path / "hostile.onnx").write_bytes(model.SerializeToString())
    for words in (("diff", "hostile.onnx", SMALL), ("diff", "hostile.onnx")):
        said = treadle_command(*words)
        assert said.code in (0, 2)
        assert all(c.isprintable() for line in (said.out + said.err).split("\n") for c in line)
        assert len(said.out + said.err) < 20_000
    for to, file in (("dot", "a.dot"), ("json", "a.json"), ("model-explorer", "b.json")):
        said = treadle_command("export", "hostile.onnx", "--to", to, "-o", file)
        assert said.code in (0, 2) and len(said.out + said.err) < 20_000
        if said.code == 0 and to == "dot":
            assert len(parsed((tmp_path / file).read_text(encoding="utf-8"))[0]) == 4
        elif said.code == 0:
            assert json.loads((tmp_path / file).read_text(encoding="utf-8"))


def test_a_page_is_written(treadle_command: Treadle, tmp_path: Path) -> None:
    pytest.importorskip("tvm")
    said = treadle_command("export", SMALL, "--to", "web", "-o", "page", "--sizes", "B=1,S=4", "--json")
    assert said.code == 0, said.err
    result = json.loads(said.out)
    assert result["sizes"] == {"B": 1, "S": 4}
    assert {Path(file).name for file in result["files"]} == {path.name for path in (tmp_path / "page").iterdir()}


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--to", "svg", "-o", "a.svg"), "unknown format 'svg'"),
        (("--to", "dot", "-o", "a.json"), "must end in .dot or .gv"),
        (("--to", "json", "-o", "a.dot"), "must end in .json"),
        (("-o", "a.onnx", "--sizes", "B=1"), "apply to other formats than onnx, gguf, compressed-tensors"),
        (("--to", "json", "-o", "a.json", "--opset", "17"), "apply to onnx only"),
        (("--to", "json", "-o", "a.json", "--times", "t.json"), "--times needs"),
        (("--to", "json", "-o", "none/a.json"), "the file cannot be written"),
        (("--to", "web", "-o", "page", "--times", "t.json"), "--times needs"),
        (("--to", "web", "-o", "page", "--backend", "numpy"), "a page needs --backend tvm"),
        (("--to", "web", "-o", "page", "--sizes", "Z=1"), "Z"),
    ],
)
def test_wrong_options_are_refused(treadle_command: Treadle, words: tuple[str, ...], part: str) -> None:
    refused(treadle_command("export", SMALL, *words), part)


@pytest.mark.parametrize(
    ("needs", "form"),
    [("onnx", ("-o", "made.onnx")), ("tvm", ("-o", "made", "--to", "web", "--sizes", "B=1,S=4"))],
)
def test_random_weights_are_reported(treadle_command: Treadle, needs: str, form: tuple[str, ...]) -> None:
    pytest.importorskip(needs)
    words = ("export", SMALL, "--seed", "3", *form)
    assert "weights drawn from seed 3: --weights FOLDER names trained ones" in treadle_command(*words).out
    assert json.loads(treadle_command(*words, "--json").out)["weights"] == "drawn from seed 3"

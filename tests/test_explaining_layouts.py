"""`treadle explain MODEL layouts`, the stages of a backend after ours, and the parts that an artifact stores."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import treadle
from tests.golden import FOLDER, Golden
from treadle.artifacts.loading import load_artifact
from treadle.backends.registry import find_backend
from treadle.cli.application import app
from treadle.explaining.layouts import explain_layouts
from treadle.explaining.memory import explain_memory
from treadle.explaining.step import explain_step
from treadle.explaining.storage import explain_storage
from treadle.ir.errors import CheckpointError
from treadle.ir.graph import Graph
from treadle.ir.hashing import canonical_form
from treadle.ir.text.parser import parse_graph
from treadle.ir.text.printer import print_graph
from treadle.passes.pipelines import DEFAULT

TARGETS = {"tvm": "x86-64-v4", "torch": "cpu"}
"""A target whose panels are the same on every machine that runs the test."""
SMALL: dict[str, Any] = {"layers": 2, "dim": 48, "heads": 4, "vocab": 50, "context": 16}
LOWERING = [
    "encode-roundings",
    "legalize",
    "decode-narrow",
    "decode-last",
    "multiply-blocks",
    "round-sooner",
    "read-blocks",
    "assign-layouts",
    "hoist-weights",
    "decode-where-read",
    "plan-storage",
]


def report(*arguments: str) -> str:
    result = CliRunner().invoke(app, [*arguments])
    assert result.exit_code == 0, result.output
    return result.output


def usable(backend: str) -> None:
    """Skip if a backend is not available, or does not assign layouts to weights on this CPU."""
    if reason := find_backend(backend).available():
        pytest.skip(reason)
    if backend == "torch":
        from treadle.backends.torch.packing import can_pack

        if not can_pack():
            pytest.skip("this PyTorch has no oneDNN for this processor")


def without_lines(text: str) -> str:
    """Remove the lines of the models' own declarations, which change for other reasons."""
    return re.sub(r"(models/\w+\.py):\d+", r"\1", text)


# -- explain layouts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", TARGETS)
def test_the_way_a_backend_reads_each_weight(backend: str, golden: Golden) -> None:
    usable(backend)
    found = explain_layouts("bert", backend=backend, target=TARGETS[backend], layers=2)
    golden(f"explain/layouts_{backend}.txt", without_lines(str(found)))
    golden(f"explain/layouts_{backend}.json", without_lines(json.dumps(found.as_dict(), indent=2)))


@pytest.mark.parametrize("backend", ["numpy", *TARGETS])
def test_the_command_says_what_the_function_says(backend: str) -> None:
    """The function is called for this machine's CPU."""
    usable(backend)
    found = explain_layouts("bert", backend=backend, layers=2)
    words = ("explain", "bert", "layouts", "--backend", backend, "--set", "layers=2")
    assert report(*words).split() == str(found).split()
    assert json.loads(report(*words, "--json")) == found.as_dict()


def test_bytes_are_those_of_the_weights_and_of_what_is_made() -> None:
    usable("tvm")
    found = explain_layouts("gpt2", backend="tvm", target="x86-64-v4", **SMALL)
    exe = treadle.compile("gpt2", backend="tvm", target="x86-64-v4", **SMALL)
    lowered = exe.optimized.after("hoist-weights")
    came = [v for name, v in lowered.main.parameters.items() if name not in lowered.derived_weights]
    assert found.as_they_came == sum(v.type.bytes_at({}) for v in came)
    weights = {w.name: w for _, each in found.blocks.values() for w in each}
    assert weights["wte.weight.panels"].layout == "panels(64)"
    assert weights["wte.weight.panels"].bytes == 64 * 48 * 4  # 50 rows, filled up to 64
    assert [r.split()[0] for r in weights["wte.weight.panels"].readers] == ["embedding", "linear"]
    assert "attn.projections.weight.panels" in weights and "attn.q.weight" not in weights


def test_fusion_options_are_refused() -> None:
    result = CliRunner().invoke(app, ["explain", "bert", "layouts", "--expect", "attention=2"])
    assert result.exit_code == 2
    said = result.output + (result.stderr if result.stderr_bytes else "")
    assert "--expect applies to fusion only" in said


# -- stages ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled() -> treadle.Compiled:
    usable("tvm")
    return treadle.compile("gpt2", backend="tvm", target="x86-64-v4", seed=3, **SMALL)


def test_inspect_shows_the_graph_as_hoisting_left_it(compiled: treadle.Compiled, golden: Golden) -> None:
    golden("explain/gpt2_hoisted.txt", without_lines(print_graph(compiled.optimized.after("hoist-weights"))))
    settings = [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]
    words = ("inspect", "gpt2", "--backend", "tvm", *settings, "--after")
    for name in LOWERING:  # for the processor at hand, whose panels may have another width
        printed = report(*words, name).partition("\ngraph ")[2].partition("\n# storage of each value")[0]
        shown = parse_graph(f"graph {printed}")
        wanted = treadle.compile("gpt2", backend="tvm", **SMALL).optimized.after(name)
        assert shown == wanted
    assert [node.op.name for _, node in wanted.walk() if node.op.name == "relayout"]


def test_each_stage_of_a_backend_is_kept(compiled: treadle.Compiled) -> None:
    assert [record.name for record in compiled.log] == [*(each.name for each in DEFAULT), *LOWERING]
    _, legal, *_, laid, bound, _, _ = (compiled.optimized.after(name) for name in LOWERING)
    assert compiled.optimized.after("dead-code") == compiled.graph
    assert ops(legal).isdisjoint({"relayout", "projections", "add_layer_norm"}) and legal.bind is None
    assert "relayout" in ops(laid) and laid.bind is None
    assert bound.bind is not None and "relayout" in ops(bound)
    assert not any(node.op.name == "relayout" for f in bound.needed_by(bound.main) for node in f.nodes)


def test_the_last_rows_of_the_table_are_the_backends(compiled: treadle.Compiled) -> None:
    rows = compiled.log.table().splitlines()[-len(LOWERING) :]
    assert [row.split()[0] for row in rows] == LOWERING
    assert "+5 relayout" in rows[7]  # the table, and four products of the block
    assert "+2 call" in rows[8]  # for the work that the block left to its callers
    assert [record.changes for record in compiled.log[-4:]] == [5, 1 + 2 * 5, 0, 0]


def ops(graph: Graph) -> set[str]:
    return {node.op.name for _, node in graph.walk()}


# -- artifacts -------------------------------------------------------------------------------------------------


def test_an_artifact_holds_no_stage_of_a_backend(tmp_path: Path) -> None:
    usable("tvm")
    made = treadle.compile("gpt2", backend="tvm", seed=3, **SMALL)
    made.save(tmp_path / "model.treadle")
    data = (tmp_path / "model.treadle").read_bytes()
    assert b"relayout" not in data and b"hoist-weights" not in data and b"bind" not in data
    assert print_graph(made.graph).encode() in data
    again = load_artifact(tmp_path / "model.treadle", backend="numpy")
    portable = [each.name for each in DEFAULT]
    assert [record.name for record in again.log] == [
        *portable,
        "open-block-products",
        "legalize",
        "decode-last",
        "multiply-blocks",
        "hoist-weights",
        "plan-storage",
    ]
    assert again.graph == made.graph
    assert again.optimized.after("hoist-weights").bind is not None
    tokens = np.array([[3, 1, 4, 1, 5]])
    # Two layers in float32: 64 roundings of logits, which are near 1.
    np.testing.assert_allclose(again(tokens=tokens)["logits"], made(tokens=tokens)["logits"], rtol=0, atol=64 * 2**-23)


@pytest.mark.parametrize("explain", [explain_layouts, explain_storage, explain_memory, explain_step])
def test_an_artifact_is_explained_as_the_model_that_it_was_made_of(explain: Any, tmp_path: Path) -> None:
    """Except for line numbers, and the numbers of values with one name, which the text of a graph counts again."""
    file = tmp_path / "model.treadle"
    treadle.compile("gpt2", **SMALL).save(file)
    report = explain("gpt2", **SMALL), explain(file)
    wanted, found = (re.sub(r"\S+\.py:\d+|_\d+\b| +", "", str(each)) for each in report)
    assert found == wanted
    with pytest.raises(CheckpointError, match="more tensors than the limit"):
        explain(file, limits={"tensors": 3})


# -- unchanged texts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["constants", "odd_names", "sizes", "transformer", "transformer_types_only"])
def test_a_graph_with_one_entry_has_the_text_that_it_had(name: str) -> None:
    """The files are older than entries and layouts."""
    text = (FOLDER / "text_form" / f"{name}.txt").read_text(encoding="utf-8")
    graph = parse_graph(text)
    assert graph.entry_names == ("main",)
    assert print_graph(graph) == text
    assert not re.search("^(entries|weights) ", canonical_form(graph), re.MULTILINE)

"""A sharding plan in an artifact: it comes back as it was, ranks run from it, and a wrong one is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import treadle
from tests.sharded_models import FAMILIES, recognized
from treadle.artifact_writing import write_artifact
from treadle.artifacts import open_artifact
from treadle.cli.application import app
from treadle.compiling import initial_weights
from treadle.files.errors import CheckpointError
from treadle.ir.errors import PassError, UsageError
from treadle.passes.sharding.plan import ShardingPlan
from treadle.passes.sharding.plan_printing import plan_hash, plan_record
from treadle.passes.sharding.plan_reading import read_plan
from treadle.passes.sharding.recipes import RECIPES, shard
from treadle.runtime.sharding_lab import run_lab
from treadle.sharding import try_in_lab
from treadle.sharding.sharded_models import ShardedModel, load_sharded, sharded

SMALL: dict[str, Any] = {"layers": 2, "dim": 32, "heads": 4, "vocab": 37, "context": 16}


def again(record: Any) -> Any:
    return json.loads(json.dumps(record))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_plan_reads_back(family: str) -> None:
    graph = recognized(family)
    for recipe in [name for name, known in RECIPES.items() if not known.staged]:  # of these tests/test_pipelines.py
        plan = shard(graph, "tp=2,cp=2,dp=2", recipe=recipe)
        read = read_plan(again(plan_record(plan)), graph)
        assert read.functions == plan.functions
        assert (str(read), plan_hash(read)) == (str(plan), plan_hash(plan))


@pytest.fixture
def made() -> ShardedModel:
    return sharded("gpt2", "tp=2,dp=2", recipe="megatron", **SMALL)


def test_a_file_holds_the_plan_and_ranks_run_from_it(made: ShardedModel, tmp_path: Path) -> None:
    path = tmp_path / "gpt2.treadle"
    seal = made.save(path)
    read = load_sharded(path)
    assert plan_hash(read.plan) == plan_hash(made.plan)
    assert read.program(3) == made.program(3)
    parts = read.parts(3)
    assert parts["h.0.attn.q.weight"].shape == (16, 32)
    assert np.array_equal(parts["h.0.attn.q.weight"], made.weights["h.0.attn.q.weight"][16:])
    assert not parts["h.0.attn.q.weight"].flags.owndata, "a view of the mapped file"
    tokens = {"tokens": np.arange(12).reshape(4, 3)}
    programs = [read.program(rank) for rank in range(4)]
    found = run_lab(read.plan, tokens, read.weights, programs=programs).outputs["logits"]
    assert np.allclose(found, treadle.load(path)(**tokens)["logits"], atol=1e-5), "the file is the whole model, too"
    assert made.save(tmp_path / "twin.treadle") == seal
    assert try_in_lab(read.plan, weights=read.weights).passed


def test_blocks_come_back(tmp_path: Path) -> None:
    made = sharded("gpt2", "tp=2", recipe="megatron", quantize="int4", **{**SMALL, "dim": 64, "vocab": 96})
    made.save(tmp_path / "x.treadle")
    read = load_sharded(tmp_path / "x.treadle")
    assert plan_hash(read.plan) == plan_hash(made.plan)
    assert try_in_lab(read.plan, weights=read.weights).passed


def test_what_is_not_split_is_told(tmp_path: Path) -> None:
    treadle.compile("gpt2", **SMALL).save(tmp_path / "x.treadle")
    assert open_artifact(tmp_path / "x.treadle").sharding is None
    with pytest.raises(UsageError, match="a model that is not split"):
        load_sharded(tmp_path / "x.treadle")
    given = initial_weights(recognized("gpt2")) | {"ln_f.bias": np.zeros(31, np.float32)}
    with pytest.raises(UsageError, match=r"weight ln_f\.bias must be f32\[32\]"):
        sharded(recognized("gpt2"), "tp=2", recipe="megatron", weights=given)


def test_the_command_writes_and_reads_a_file(tmp_path: Path) -> None:
    path = str(tmp_path / "x.treadle")
    settings = [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]
    run = CliRunner().invoke
    written = run(app, ["shard", "gpt2", "--mesh", "tp=2", "--recipe", "sequence", *settings, "-o", path])
    assert written.exit_code == 0, written.output
    assert "wrote " in written.output
    read = run(app, ["shard", path, "--lab"])
    assert read.exit_code == 0, read.output
    plan = written.output.partition("a device holds")[0]
    assert plan == read.output.partition("a device holds")[0] and "reduce_scatter" in plan
    assert "equal" in read.output
    for words, what in (
        ([path, "--mesh", "tp=2"], "takes no --mesh"),
        (["gpt2"], "a model is split over a mesh"),
        (["gpt2", "--mesh", "tp=2", "--recipe", "megatron", "-o", "x.bin"], "must end in .treadle"),
    ):
        refused = run(app, ["shard", *words])
        assert refused.exit_code == 2 and what in " ".join(refused.output.split())


# -- what strangers wrote ----------------------------------------------------------------------------------------------

Change = Callable[[dict[str, Any]], object]


def block(record: dict[str, Any], op: str, nth: int = 0) -> dict[str, Any]:
    """The nth node of an op in the block."""
    found: dict[str, Any] = [n for n in record["functions"][0]["nodes"] if n["op"] == op][nth]
    return found


def set_in(*path: Any) -> Change:
    """Puts the last of `path` at the place that the others lead to."""
    *way, key, value = path

    def change(record: dict[str, Any]) -> None:
        at: Any = record
        for step in way:
            at = at[step]
        at[key] = value

    return change


WRONG: dict[str, tuple[Change, str]] = {
    "no mesh": (lambda r: r.pop("mesh"), "not as it is written"),
    "another mesh": (set_in("mesh", "tp=4"), "cannot be read"),
    "a huge mesh": (set_in("mesh", "tp=2,dp=500000"), "cannot be read"),
    "a mesh that is no text": (set_in("mesh", 4), "not as it is written"),
    "no functions": (set_in("functions", []), "not as it is written"),
    "functions that are no list": (set_in("functions", {"h": 1}), "not as it is written"),
    "a function that there is not": (set_in("functions", 0, "of", "g"), "not as it is written"),
    "a name that is none": (set_in("functions", 0, "name", "h\n}"), "not as it is written"),
    "two of one name": (lambda r: r["functions"].insert(0, r["functions"][0]), "not as it is written"),
    "a node less": (lambda r: r["functions"][0]["nodes"].pop(), "not as it is written"),
    "another op": (set_in("functions", 0, "nodes", 0, "op", "tanh"), "not as it is written"),
    "a placement of another rank": (set_in("functions", 0, "nodes", 0, "gives", ["[-]"]), "cannot lie so"),
    "a placement that is none": (set_in("functions", 0, "nodes", 0, "gives", ["(tp)"]), "cannot be read"),
    "an axis that the mesh has not": (set_in("functions", 0, "nodes", 0, "gives", ["[ep, -, -]"]), "cannot be read"),
    "an axis twice": (set_in("functions", 0, "nodes", 0, "gives", ["[dp, -, dp]"]), "cannot lie so"),
    "split over nothing": (set_in("functions", 0, "nodes", 0, "gives", ["[, -, -]"]), "cannot be read"),
    "a callee that there is not": (lambda r: r["functions"][1]["nodes"][-3].update(callee="g"), "not as it is written"),
    "a factor that there is not": (
        lambda r: block(r, "linear")["shares"].update(zz="tp"),
        "a factor that nothing of it",
    ),
    "another factor": (lambda r: block(r, "linear")["shares"].update(n="dp"), "works on .* of n, and has"),
    "an operand that there is not": (lambda r: block(r, "add")["moves"][0].update(operand=9), "not as it is written"),
    "a negative operand": (lambda r: block(r, "add")["moves"][0].update(operand=-1), "not as it is written"),
    "no all-reduce": (lambda r: block(r, "add")["moves"].clear(), "is not had as it is read|terms"),
    "steps left out": (lambda r: block(r, "add")["moves"][0].update(steps=[]), "not as it is written"),
    "no reason": (lambda r: block(r, "add")["moves"][0].update(because=[]), "has a reason"),
    "a node of no number": (lambda r: block(r, "add")["moves"][0].update(at="x"), "not as it is written"),
    "another place of a weight": (set_in("weights", "wte.weight", "[-, tp]"), "is not stored as it is taken"),
    "a weight less": (lambda r: r["weights"].pop("wte.weight"), "not as it is written"),
    "a size that is none": (set_in("sizes", "B", 0), "not as it is written"),
    "a size out of bounds": (set_in("sizes", "S", 10**9), "not as it is written"),
    "a symbol more": (set_in("sizes", "Q", 3), "not as it is written"),
    "a rate of nothing": (set_in("machine", "flops", 0), "not as it is written"),
    "a rate without bounds": (set_in("machine", "fast", float("inf")), "not as it is written"),
    "a text without end": (set_in("notes", ["x" * 5000]), "not as it is written"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_plan_that_is_wrong_is_refused(name: str, made: ShardedModel) -> None:
    change, told = WRONG[name]
    record = again(plan_record(made.plan))
    change(record)
    with pytest.raises(PassError, match="sharding plan") as error:
        read_plan(record, made.plan.graph, most_ranks=4096)
    assert re.search(told, str(error.value)), str(error.value)
    assert len(str(error.value)) < 2000


def test_a_file_with_a_wrong_plan_is_refused_with_its_section(
    made: ShardedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.treadle"

    def write(change: Change) -> None:
        def changed(plan: ShardingPlan) -> Any:
            record = again(plan_record(plan))
            return change(record) or record

        with monkeypatch.context() as patch:
            patch.setattr("treadle.artifact_writing.plan_record", changed)
            made.save(path)

    write(set_in("weights", "wte.weight", "[-, tp]"))
    for reads in (load_sharded, treadle.load, open_artifact):
        with pytest.raises(PassError, match="not stored as it is taken") as error:
            reads(path)
        assert f"{path}: section sharding" in str(error.value)
    write(set_in("mesh", "tp=2,dp=50000"))
    with pytest.raises(PassError, match="cannot be read") as refused:
        load_sharded(path)
    assert "100,000 ranks is past the limit" in str(refused.value)
    write(lambda record: [[]])
    with pytest.raises(CheckpointError, match="JSON object") as none:
        load_sharded(path)
    assert "section sharding" in str(none.value)


def test_a_plan_of_another_graph_is_refused(made: ShardedModel, tmp_path: Path) -> None:
    other = sharded("gpt2", "tp=2,dp=2", recipe="megatron", **{**SMALL, "layers": 3})
    write_artifact(tmp_path / "x.treadle", "x", "numpy", "cpu", other.optimized, other.weights, 0, plan=made.plan)
    with pytest.raises(PassError, match="not as it is written"):
        load_sharded(tmp_path / "x.treadle")

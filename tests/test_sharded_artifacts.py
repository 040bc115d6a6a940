"""A sharding plan in an artifact: it is read back unchanged, ranks run from it, and a wrong plan is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import treadle
from tests.sharded_models import FAMILIES, recognized
from treadle.artifacts.reading import open_artifact
from treadle.artifacts.writing import write_artifact
from treadle.cli.application import app
from treadle.files.errors import CheckpointError
from treadle.ir import composites
from treadle.ir.errors import PassError, UsageError
from treadle.passes.sharding.plan import ShardingPlan
from treadle.passes.sharding.plan_printing import plan_hash, plan_record
from treadle.passes.sharding.plan_reading import read_plan
from treadle.passes.sharding.recipes import RECIPES, shard
from treadle.program.weights import initial_weights
from treadle.runtime.sharding_lab import run_lab
from treadle.sharding import try_in_lab
from treadle.sharding.sharded_models import ShardedModel, load_sharded, sharded

SMALL: dict[str, Any] = {"layers": 2, "dim": 32, "heads": 4, "vocab": 37, "context": 16}


def again(record: Any) -> Any:
    return json.loads(json.dumps(record))


@pytest.mark.parametrize("family", FAMILIES[::2])
def test_every_plan_reads_back(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(composites, "_MOST_BODIES", 1 << 30)  # if plans are equal, their bodies are the same functions
    graph = recognized(family)
    for recipe in [name for name, known in RECIPES.items() if not known.staged]:  # of those in tests/test_pipelines.py
        plan = shard(graph, "tp=2,cp=2,dp=2", recipe=recipe)
        read = read_plan(again(plan_record(plan)), graph)
        assert read.functions == plan.functions
        assert (str(read), plan_hash(read)) == (str(plan), plan_hash(plan))


@pytest.fixture(scope="module")
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
    assert np.allclose(found, treadle.load_artifact(path)(**tokens)["logits"], atol=1e-5), (
        "the file is the whole model, too"
    )
    assert made.save(tmp_path / "twin.treadle") == seal
    assert try_in_lab(read.plan, weights=read.weights).passed


def test_blocks_come_back(tmp_path: Path) -> None:
    made = sharded("gpt2", "tp=2", recipe="megatron", quantize="int4", **{**SMALL, "dim": 64, "vocab": 96})
    made.save(tmp_path / "x.treadle")
    read = load_sharded(tmp_path / "x.treadle")
    assert plan_hash(read.plan) == plan_hash(made.plan)
    assert try_in_lab(read.plan, weights=read.weights).passed


def test_unsplit_axes_are_reported(tmp_path: Path) -> None:
    treadle.compile("gpt2", **SMALL).save(tmp_path / "x.treadle")
    assert open_artifact(tmp_path / "x.treadle").sharding is None
    with pytest.raises(UsageError, match="a model that is not sharded"):
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
        ([path, "--mesh", "tp=2"], "does not accept --mesh"),
        (["gpt2"], "sharding needs a mesh"),
        (["gpt2", "--mesh", "tp=2", "--recipe", "megatron", "-o", "x.bin"], "must end in .treadle"),
    ):
        refused = run(app, ["shard", *words])
        assert refused.exit_code == 2 and what in " ".join(refused.output.split())


# -- untrusted files ---------------------------------------------------------------------------------------------------

Change = Callable[[dict[str, Any]], object]


def block(record: dict[str, Any], op: str, nth: int = 0) -> dict[str, Any]:
    """Return the nth node of an op in the block."""
    found: dict[str, Any] = [n for n in record["functions"][0]["nodes"] if n["op"] == op][nth]
    return found


def set_in(*path: Any) -> Change:
    """Set the last key of `path`, in the object that the keys before it lead to."""
    *way, key, value = path

    def change(record: dict[str, Any]) -> None:
        at: Any = record
        for step in way:
            at = at[step]
        at[key] = value

    return change


WRONG: dict[str, tuple[Change, str]] = {
    "no mesh": (lambda r: r.pop("mesh"), "KeyError: 'mesh'"),
    "another mesh": (set_in("mesh", "tp=4"), "the mesh tp=4 has no axis 'dp'"),
    "a huge mesh": (set_in("mesh", "tp=2,dp=500000"), "a mesh must have 1 to 131,072 ranks, and axes of 1 or more"),
    "a mesh that is not a string": (set_in("mesh", 4), "expected a string of at most 1000 characters, not '4'"),
    "no functions": (set_in("functions", []), "the last function is not main"),
    "functions that are not a list": (set_in("functions", {"h": 1}), "a list, not"),
    "a function that there is not": (set_in("functions", 0, "of", "g"), "KeyError: 'g'"),
    "a name that is none": (set_in("functions", 0, "name", "h\n}"), "invalid or duplicate function name"),
    "two of one name": (
        lambda r: r["functions"].insert(0, r["functions"][0]),
        "invalid or duplicate function name 'h'",
    ),
    "a node less": (lambda r: r["functions"][0]["nodes"].pop(), "h has 16 nodes, but the record has 15"),
    "another op": (set_in("functions", 0, "nodes", 0, "op", "tanh"), "layer_norm is recorded as tanh"),
    "a placement of another rank": (set_in("functions", 0, "nodes", 0, "gives", ["[-]"]), "cannot have this placement"),
    "a placement that is none": (set_in("functions", 0, "nodes", 0, "gives", ["(tp)"]), "not a placement: '(tp)'"),
    "an axis that the mesh has not": (
        set_in("functions", 0, "nodes", 0, "gives", ["[ep, -, -]"]),
        "the mesh tp=2,dp=2 has no axis 'ep'",
    ),
    "an axis twice": (set_in("functions", 0, "nodes", 0, "gives", ["[dp, -, dp]"]), "cannot have this placement"),
    "split over nothing": (
        set_in("functions", 0, "nodes", 0, "gives", ["[, -, -]"]),
        "a dimension is split over no axis",
    ),
    "a callee that there is not": (lambda r: r["functions"][1]["nodes"][-3].update(callee="g"), "KeyError: 'g'"),
    "a factor that there is not": (
        lambda r: block(r, "linear")["shares"].update(zz="tp"),
        "a factor that none of its operands and results",
    ),
    "another factor": (
        lambda r: block(r, "linear")["shares"].update(n="dp"),
        "works on (16, 32) of n, but has (0, 16)",
    ),
    "an operand that there is not": (
        lambda r: block(r, "add")["moves"][0].update(operand=9),
        "tuple index out of range",
    ),
    "a negative operand": (lambda r: block(r, "add")["moves"][0].update(operand=-1), "a number of 0 or more, not '-1'"),
    "no all-reduce": (lambda r: block(r, "add")["moves"].clear(), "has no copy with the placement in which it is read"),
    "steps left out": (
        lambda r: block(r, "add")["moves"][0].update(steps=[]),
        "the recorded steps do not lead out from [dp, -, -] sum(tp) to [dp, -, -]",
    ),
    "no reason": (lambda r: block(r, "add")["moves"][0].update(because=[]), "has a reason"),
    "a node of no number": (lambda r: block(r, "add")["moves"][0].update(at="x"), "a number of 0 or more, not 'x'"),
    "another place of a weight": (
        set_in("weights", "wte.weight", "[-, tp]"),
        "is not stored in the placement in which main reads it",
    ),
    "a weight less": (lambda r: r["weights"].pop("wte.weight"), "its weights do not match the graph's"),
    "a size that is none": (set_in("sizes", "B", 0), "a number of 1 or more, not '0'"),
    "a size out of bounds": (set_in("sizes", "S", 10**9), "its sizes do not match the graph's symbols"),
    "a symbol more": (set_in("sizes", "Q", 3), "its sizes do not match the graph's symbols"),
    "a rate of nothing": (set_in("machine", "rates", "f32", 0), "a rate is 0"),
    "a rate without bounds": (set_in("machine", "fast", float("inf")), "fast is not a finite rate of 0 or more"),
    "a text without end": (
        set_in("notes", ["x" * 5000]),
        "expected a string of at most 1000 characters, not 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx'",
    ),
    "main left out": (lambda r: r["functions"].pop(), "the last function is not main"),
    "an argument less": (lambda r: r["functions"][0]["takes"].pop(), "h takes 16 and returns 1 values"),
    "an operand less": (
        lambda r: block(r, "linear")["reads"].pop(),
        "the plan has 2 operands and 1 results for",
    ),
    "a result more": (
        lambda r: block(r, "linear")["gives"].append("[-]"),
        "the plan has 3 operands and 2 results",
    ),
    "a long op": (
        set_in("functions", 0, "nodes", 0, "op", "x" * 90),
        f"ValueError: layer_norm is recorded as {'x' * 80}",
    ),
    "a long name": (set_in("functions", 0, "name", "h" * 101), f"invalid or duplicate function name '{'h' * 80}'"),
    "a body of what has none": (lambda r: block(r, "linear").update(body={}), "linear has no body"),
    "a factor over nothing": (
        lambda r: block(r, "linear")["shares"].update(n="-"),
        "factor n is split over no mesh axis",
    ),
    "another step": (
        lambda r: block(r, "add")["moves"][0]["steps"][0].update(kind="all_gather"),
        "the recorded steps do not lead out from",
    ),
    "a reason that is not a string": (lambda r: block(r, "add")["moves"][0].update(because=[1]), "characters, not '1'"),
    "a node by a truth value": (lambda r: block(r, "add")["moves"][0].update(at=True), "of 0 or more, not 'True'"),
    "a rank too many": (set_in("mesh", "tp=2,dp=2049"), "a mesh of 4,098 ranks is over the limit"),
    "a size less": (lambda r: r["sizes"].pop("B"), "its sizes do not match the graph's symbols"),
    "no device in a node": (set_in("machine", "node", 0), "a number of 1 or more, not '0'"),
    "no memory's bandwidth": (set_in("machine", "bandwidth", 0), "a rate is 0"),
    "no fast links": (set_in("machine", "fast", 0), "a rate is 0"),
    "no slow links": (set_in("machine", "slow", 0), "a rate is 0"),
    "a negative latency": (set_in("machine", "latency", -1), "latency is not a finite rate of 0 or more"),
    "a rate that is a truth value": (
        set_in("machine", "rates", "f32", True),
        "the rate of f32 is not a finite rate of 0 or more",
    ),
    "a rate that is a text": (
        set_in("machine", "rates", "f32", "1"),
        "the rate of f32 is not a finite rate of 0 or more",
    ),
    "a text too long": (set_in("notes", ["x" * 1001]), "expected a string of at most 1000 characters"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_plan_that_is_wrong_is_refused(name: str, made: ShardedModel) -> None:
    change, expected = WRONG[name]
    record = again(plan_record(made.plan))
    change(record)
    with pytest.raises(PassError, match="sharding plan") as error:
        read_plan(record, made.plan.graph, most_ranks=4096)
    assert expected in str(error.value)
    assert len(str(error.value)) < 2000


@pytest.mark.parametrize(
    "change",
    [set_in("notes", ["x" * 1000]), set_in("mesh", "tp=2,dp=2048"), set_in("machine", "latency", 0)],
    ids=["a long text", "as many ranks as may be", "links without latency"],
)
def test_values_at_the_limits_are_read(change: Change, made: ShardedModel) -> None:
    record = again(plan_record(made.plan))
    change(record)
    assert again(plan_record(read_plan(record, made.plan.graph, most_ranks=4096))) == record


def test_a_name_may_be_of_a_hundred_characters(made: ShardedModel) -> None:
    text = json.dumps(plan_record(made.plan))
    record = json.loads(
        text.replace('"name": "h"', f'"name": "{"h" * 100}"').replace('"callee": "h"', f'"callee": "{"h" * 100}"')
    )
    assert read_plan(record, made.plan.graph).functions[0].name == "h" * 100


def test_a_file_with_a_wrong_plan_is_refused_with_its_section(
    made: ShardedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.treadle"

    def write(change: Change) -> None:
        def changed(plan: ShardingPlan) -> Any:
            record = again(plan_record(plan))
            return change(record) or record

        with monkeypatch.context() as patch:
            patch.setattr("treadle.artifacts.writing.plan_record", changed)
            made.save(path)

    write(set_in("weights", "wte.weight", "[-, tp]"))
    for reads in (load_sharded, treadle.load_artifact, open_artifact):
        with pytest.raises(PassError, match="not stored in the placement in which main reads it") as error:
            reads(path)
        assert f"{path}: section sharding" in str(error.value)
    write(set_in("mesh", "tp=2,dp=50000"))
    with pytest.raises(PassError, match="cannot be read") as refused:
        load_sharded(path)
    assert "100,000 ranks is over the limit" in str(refused.value)
    write(lambda record: [[]])
    with pytest.raises(CheckpointError, match="JSON object") as none:
        load_sharded(path)
    assert "section sharding" in str(none.value)


def test_a_plan_of_another_graph_is_refused(made: ShardedModel, tmp_path: Path) -> None:
    other = sharded("gpt2", "tp=2,dp=2", recipe="megatron", **{**SMALL, "layers": 3})
    write_artifact(tmp_path / "x.treadle", "x", "numpy", "cpu", other.optimized, other.weights, 0, plan=made.plan)
    with pytest.raises(PassError, match="is malformed"):
        load_sharded(tmp_path / "x.treadle")


def test_a_sharded_model_is_not_written_under_the_suffix_of_another_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = sharded("gpt2", "tp=2", recipe="megatron", **SMALL)
    with pytest.raises(UsageError, match=r"cannot end in \.onnx") as refused:
        made.save("x.onnx")
    assert refused.value.hint == "x.treadle"
    made.save(refused.value.hint)

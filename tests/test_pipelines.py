"""Pipelines: the division of layers into stages, the programs of each stage's ranks, and its schedule. Also weights
that are gathered early.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from random import Random
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.sharded_models import FAMILIES, numbers, recognized
from treadle.cli.application import app
from treadle.explaining.sharding import explain_sharding
from treadle.explaining.sharding_drawing import draw_sharding
from treadle.ir.builder import Builder
from treadle.ir.errors import PassError, UsageError
from treadle.ir.graph import Graph
from treadle.ir.interpreter import interpret
from treadle.passes.sharding.checking import check_sharding
from treadle.passes.sharding.plan import PlannedPipeline, ShardingPlan
from treadle.passes.sharding.plan_printing import plan_hash, plan_record
from treadle.passes.sharding.plan_reading import read_plan
from treadle.passes.sharding.rank_programs import rank_program, rank_weights
from treadle.passes.sharding.recipes import shard
from treadle.passes.sharding.stages import balanced_cut
from treadle.runtime.sharding_lab import run_lab
from treadle.sharding import device_needs, rank_graph, shard_model, try_in_lab

NEAR = 1e-11
"""Tolerance for sums of some hundred float64 numbers near 1, in another order."""

MEETING = ("clip", "siglip")
"""Families whose rows depend on each other: each image is compared with each text."""

SMALL: dict[str, Any] = {"layers": 8, "dim": 64, "heads": 4, "vocab": 96, "context": 32}


def pipeline_of(plan: ShardingPlan) -> PlannedPipeline:
    assert plan.pipeline is not None
    return plan.pipeline


def apart(family: str, plan: ShardingPlan) -> float:
    weights, inputs, wanted = numbers(family)
    programs = [rank_graph(plan, rank) for rank in range(plan.devices.ranks)]
    found = run_lab(plan, inputs, weights, programs=programs).outputs
    return max(float(np.max(np.abs(found[n] - w) / max(1.0, np.max(np.abs(w))))) for n, w in wanted.items())


# -- every model -------------------------------------------------------------------------------------------------------


MESHES = ("pp=2,micro=3", "pp=4,micro=5", "pp=2,tp=2,dp=2,micro=2")
STAGED = [name for name in FAMILIES if name not in MEETING]


# Each family runs on two meshes.
@pytest.mark.parametrize(
    ("family", "mesh"),
    [(name, mesh) for n, name in enumerate(STAGED) for m, mesh in enumerate(MESHES) if (n + m) % 3],
)
def test_stages_together_compute_what_the_model_does(family: str, mesh: str) -> None:
    graph = recognized(family)
    plan = shard(graph, mesh, recipe="gpipe")
    check_sharding(plan)
    assert apart(family, plan) < NEAR
    read = read_plan(json.loads(json.dumps(plan_record(plan))), graph)
    assert read.pipeline == plan.pipeline
    assert (str(read), plan_hash(read)) == (str(plan), plan_hash(plan))


@pytest.mark.parametrize("family", MEETING)
def test_rows_that_meet_are_no_micro_batches(family: str) -> None:
    with pytest.raises(PassError, match=r"micro-batches cannot be computed separately: .* needs all of") as error:
        shard(recognized(family), "pp=2,micro=2", recipe="gpipe")
    assert error.value.hint


def test_ranks_hold_the_weights_of_their_stage_alone() -> None:
    plan = shard_model("gpt2", "pp=4,tp=2", recipe="gpipe", **SMALL)
    stages = pipeline_of(plan).stages
    layers = [{name.split(".")[1] for name in stage.weights if name.startswith("h.")} for stage in stages]
    assert [len(own) for own in layers] == [2, 2, 2, 2]
    assert set().union(*layers) == {str(n) for n in range(8)}
    assert ["wte.weight" in stage.weights for stage in stages] == [True, False, False, True], "the tied table twice"
    drawn = {name: np.zeros(v.type.evaluate({})) for name, v in plan.graph.parameters.items()}
    for rank in range(8):
        program = rank_program(plan, rank)
        assert set(program.parameters) <= set(rank_weights(plan, rank, drawn)) == set(plan.weights_at(rank))
        assert plan.stage_at(rank) == rank % 4
    whole = shard_model("gpt2", "tp=2", recipe="megatron", **SMALL)
    assert plan.weight_bytes() < whole.weight_bytes() / 2.5


def sloped_blocks(count: int) -> Graph:
    """Return a graph of inlined blocks that share one constant for their heads, such as ALiBi's slopes."""
    b = Builder(Graph("sloped"))
    x, slopes = b.input("x", "f64[B, S, 8]"), b.constant(np.arange(1.0, 9.0))
    for n in range(count):
        heads = b.rearrange(
            b.linear(x, b.parameter(f"up{n}", "f64[8, 8]")), pattern="b s (heads=8 d) -> b s heads d"
        ) * b.rearrange(slopes, pattern="h -> h 1")
        merged = b.rearrange(heads, pattern="b s heads d -> b s (heads d)")
        x = x + b.linear(merged, b.parameter(f"down{n}", "f64[8, 8]"))
    b.outputs(y=x)
    return b.graph


def in_lab(graph: Graph, plan: ShardingPlan) -> float:
    """Return the greatest difference between the lab and the whole graph, relative to the greatest element."""
    rng = np.random.default_rng(0)
    inputs = {v.name: np.asarray(rng.normal(size=v.type.evaluate({"B": 9, "S": 3}))) for v in graph.main.inputs}
    weights = {n: np.asarray(rng.normal(size=v.type.evaluate({}))) for n, v in graph.parameters.items()}
    found = run_lab(plan, inputs, weights).outputs
    wanted = interpret(graph, inputs, weights, float64=True)
    return max(float(np.max(np.abs(found[n] - w)) / max(1.0, np.max(np.abs(w)))) for n, w in wanted.items())


def test_each_stage_takes_its_part_of_a_constant() -> None:
    graph = sloped_blocks(4)
    plan = shard(graph, "pp=2,tp=2,micro=2", recipe="gpipe")
    check_sharding(plan)
    assert in_lab(graph, plan) < NEAR
    pipeline, steps = pipeline_of(plan), plan.main.steps
    taken = [at for at, step in enumerate(steps) if any(value.literal is not None for value, _ in step.makes)]
    assert taken
    assert [set(taken) <= set(stage.steps) for stage in pipeline.stages] == [True, True], "no stage hands it on"
    assert all(value.literal is None for stage in pipeline.stages for value, _ in stage.receives)
    for number, stage in enumerate(pipeline.stages):
        without = replace(stage, steps=tuple(at for at in stage.steps if at not in taken))
        stages = (*pipeline.stages[:number], without, *pipeline.stages[number + 1 :])
        with pytest.raises(PassError, match=rf"stage {number} has no copy of \w+ with placement \[tp\]"):
            check_sharding(replace(plan, pipeline=replace(pipeline, stages=stages)))


@pytest.mark.parametrize(
    ("mesh", "recipe"),
    [("dp=2", "dp"), ("tp=2,dp=2", "megatron-fsdp"), ("pp=2,tp=2,micro=2", "gpipe"), ("cp=2", "context")],
)
def test_values_of_rank_0_are_inputs_weights_constants_and_outputs(mesh: str, recipe: str) -> None:
    b = Builder(Graph("scalars"))
    x, s, w = b.input("x", "f64[B, S, 8]"), b.input("s", "f64[]"), b.parameter("w", "f64[8, 8]")
    p, c = b.parameter("p", "f64[]"), b.constant(np.float64(2.5))
    y = b.linear(b.linear(x * p, w), b.parameter("v", "f64[8, 8]")) * s + c
    outputs = {
        "y": y,
        "s": s,
        "p": p,
        "c": c,
        "product": s * p,
        "constant": s * c,
        "most": b.reduce_max(w, axes=(0, 1)),
    }
    b.outputs(**outputs, **({} if recipe == "gpipe" else {"total": b.reduce_sum(y, axes=(0, 1, 2))}))
    axes = {"w[0]": "tp"} if "tp" in mesh else {}
    plan = shard(b.graph, mesh, recipe=recipe, axes=axes)
    check_sharding(plan)
    assert in_lab(b.graph, plan) < NEAR


def test_an_output_has_its_micro_batches_in_order() -> None:
    """The positions of a micro-batch are gathered before the micro-batches are concatenated."""
    b = Builder(Graph("split"))
    x = b.input("x", "f64[B, 8]")
    y = b.softmax(b.rms_norm(b.abs(x) + b.parameter("v", "f64[8]"), b.parameter("w", "f64[8]")), axis=1)
    b.outputs(y=y + x)
    plan = shard(
        b.graph,
        "pp=2,tp=2,dp=2,micro=2",
        recipe="gpipe",
        axes={"w[0]": "dp", "x[0]": "tp", "x[1]": "tp", "v[0]": "tp"},
        sizes={"B": 9},
    )
    check_sharding(plan)
    assert in_lab(b.graph, plan) < NEAR
    assert plan.main.gives[0].text(plan.mesh) == "[tp micro, -]"
    assert "output y has its micro-batches in order" in str(plan)


# -- splits into stages ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_a_cut_is_the_best_of_all_cuts(seed: int) -> None:
    """The best division has the fastest slowest stage; among equals, the fewest transferred bytes."""
    r = Random(seed)
    count = r.randint(1, 5)
    seconds = [r.choice([0.0, 1.0, 2.0, 5.0, r.random()]) for _ in range(r.randint(count, 9))]
    handing = [r.choice([0.5, 1.0, 3.0]) for _ in seconds[1:]]

    def judged(ends: tuple[int, ...]) -> tuple[float, float]:
        parts = [sum(seconds[a:b]) for a, b in zip((0, *ends[:-1]), ends, strict=True)]
        sent = [handing[end - 1] for end in ends[:-1]]
        return max(*parts, *sent, 0.0), sum(sent)

    cuts = [(*inner, len(seconds)) for inner in combinations(range(1, len(seconds)), count - 1)]
    best = min(map(judged, cuts))
    found = judged(balanced_cut(seconds, handing, count))
    assert found == pytest.approx(best, rel=1e-8)


def test_there_are_as_many_stages_as_steps_at_most() -> None:
    with pytest.raises(PassError, match="2 steps cannot be cut into 3 stages"):
        balanced_cut([1.0, 1.0], [1.0], 3)
    b = Builder(Graph("short"))
    b.outputs(y=b.linear(b.input("x", "f32[B, 8]"), b.parameter("w", "f32[8, 8]")))
    with pytest.raises(PassError, match="1 steps cannot be cut into 2 stages") as error:
        shard(b.graph, "pp=2", recipe="gpipe")
    assert error.value.hint == "pp=1"


def test_a_heavy_end_has_a_stage_of_its_own() -> None:
    """Logits over a large vocabulary take longer than all layers."""
    plan = shard_model("gpt2", "pp=2,micro=4", recipe="gpipe", **{**SMALL, "vocab": 50000}, sizes={"B": 64, "S": 32})
    first, last = pipeline_of(plan).stages
    assert sum(name.startswith("h.") for name in first.weights) > sum(name.startswith("h.") for name in last.weights)


def test_values_computed_from_inputs_are_not_saved() -> None:
    """BERT's mask, which all layers read, depends only on inputs, so each stage computes it.

    T5's biases depend on weights and positions, and are the same for all micro-batches. So they are sent once.
    """
    plan = shard(recognized("bert"), "pp=2,micro=3", recipe="gpipe")
    assert [value.name for value, _ in pipeline_of(plan).stages[1].receives] == ["mlp_norm"]
    plan = shard(recognized("t5"), "pp=2,micro=3", recipe="gpipe")
    times = {plan.times_of([item]) for item in pipeline_of(plan).stages[1].receives}
    handed = [c for c in plan.collectives() if c.op == "hand_on"]
    assert len(handed) == sum(plan.times_of([item]) for item in pipeline_of(plan).stages[1].receives)
    assert 3 in times


def test_outputs_of_inputs_and_weights_alone_are_given_by_the_first_stage() -> None:
    b = Builder(Graph("beside"))
    x, w = b.input("x", "f32[B, 8]"), b.parameter("w", "f32[8, 8]")
    y = b.linear(b.linear(x, w), b.parameter("v", "f32[8, 8]"))
    b.outputs(y=y, made=b.exp(x), squared=w * w, x=x, w=w)
    plan = shard(b.graph, "pp=2,micro=2", recipe="gpipe")
    check_sharding(plan)
    assert [stage.outputs for stage in pipeline_of(plan).stages] == [("made", "squared", "x", "w"), ("y",)]
    rng = np.random.default_rng(0)
    inputs, weights = {"x": rng.standard_normal((6, 8))}, {n: rng.standard_normal((8, 8)) for n in "wv"}
    wanted = interpret(b.graph, inputs, weights, float64=True)
    for name, found in run_lab(plan, inputs, weights).outputs.items():
        np.testing.assert_allclose(found, wanted.pop(name), atol=1e-12)
    assert not wanted


# -- wrong pipelines ---------------------------------------------------------------------------------------------------


def without_a_step(made: PlannedPipeline) -> PlannedPipeline:
    first, *others = made.stages
    return replace(made, stages=(replace(first, steps=first.steps[:-1]), *others))


def without_what_is_handed_on(made: PlannedPipeline) -> PlannedPipeline:
    first, second, *others = made.stages
    return replace(made, stages=(first, replace(second, receives=()), *others))


def handed_on_too_early(made: PlannedPipeline) -> PlannedPipeline:
    first, second, *others = made.stages
    later = made.stages[-1].receives
    return replace(made, stages=(first, replace(second, receives=(*second.receives, *later)), *others))


def without_a_weight(made: PlannedPipeline) -> PlannedPipeline:
    *others, last = made.stages
    return replace(made, stages=(*others, replace(last, weights=last.weights[1:])))


def with_all_weights(made: PlannedPipeline) -> PlannedPipeline:
    first, *others = made.stages
    every = tuple(dict.fromkeys(name for stage in made.stages for name in stage.weights))
    return replace(made, stages=(replace(first, weights=every), *others))


def without_an_output(made: PlannedPipeline) -> PlannedPipeline:
    *others, last = made.stages
    return replace(made, stages=(*others, replace(last, outputs=())))


def with_an_output_twice(made: PlannedPipeline) -> PlannedPipeline:
    first, *others = made.stages
    return replace(made, stages=(replace(first, outputs=made.stages[-1].outputs), *others))


def of_one_stage_less(made: PlannedPipeline) -> PlannedPipeline:
    return replace(made, stages=made.stages[:-1])


def over_the_batch(made: PlannedPipeline) -> PlannedPipeline:
    return replace(made, over=made.turns)


def along_stages(made: PlannedPipeline) -> PlannedPipeline:
    return replace(made, turns=made.over)


def steps_in_another_order(made: PlannedPipeline) -> PlannedPipeline:
    first, *others = made.stages
    return replace(made, stages=(replace(first, steps=first.steps[::-1]), *others))


def a_step_twice(made: PlannedPipeline) -> PlannedPipeline:
    first, *others = made.stages
    return replace(made, stages=(replace(first, steps=(*first.steps, first.steps[-1])), *others))


def handed_on_twice(made: PlannedPipeline) -> PlannedPipeline:
    first, second, *others = made.stages
    return replace(made, stages=(first, replace(second, receives=second.receives * 2), *others))


def a_step_past_the_last(made: PlannedPipeline) -> PlannedPipeline:
    *others, last = made.stages
    return replace(made, stages=(*others, replace(last, steps=(*last.steps, last.steps[-1] + 1))))


def a_step_before_the_first(made: PlannedPipeline) -> PlannedPipeline:
    first, *others = made.stages
    return replace(made, stages=(replace(first, steps=(-1, *first.steps)), *others))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (steps_in_another_order, "stage 0 runs a step or receives an item twice, or in another order"),
        (a_step_twice, "stage 0 runs a step or receives an item twice, or in another order"),
        (handed_on_twice, "stage 1 runs a step or receives an item twice, or in another order"),
        (a_step_past_the_last, "stage 3 has steps that do not exist"),
        (a_step_before_the_first, "stage 0 has steps that do not exist"),
        (without_a_step, "stage 1 is handed x|holds other weights"),
        (without_what_is_handed_on, "stage 1 has no copy of x"),
        (handed_on_too_early, "stage 1 receives .*, which the stage before does not have in this placement"),
        (without_a_weight, "stage 3 holds other weights than it reads"),
        (with_all_weights, "stage 0 holds other weights than it reads"),
        (without_an_output, "outputs do not each belong to one stage"),
        (with_an_output_twice, "outputs do not each belong to one stage"),
        (of_one_stage_less, "3 stages, over pp of"),
        (over_the_batch, "which is not the last axis"),
        (along_stages, "which is not the last axis"),
    ],
)
def test_a_wrong_pipeline_is_refused(change: Callable[[PlannedPipeline], PlannedPipeline], expected: str) -> None:
    plan = shard_model("gpt2", "pp=4", recipe="gpipe", **SMALL)
    with pytest.raises(PassError, match=expected):
        check_sharding(replace(plan, pipeline=change(pipeline_of(plan))))


def test_ranks_do_not_meet_over_stages_or_micro_batches() -> None:
    """Plans of other recipes, declared as pipelines, must be refused."""
    made = pipeline_of(shard(recognized("gpt2"), "pp=2,micro=2", recipe="gpipe"))
    for axes, expected in (
        ({"heads": "pp"}, "are split over pp"),
        ({"heads": "micro"}, "are partial over micro"),
        ({"wte.weight[1]": "micro"}, "a collective of layer_norm runs over stages or micro-batches"),
    ):
        plan = shard(recognized("gpt2"), "pp=2,micro=2", axes=axes)
        with pytest.raises(PassError, match=expected):
            check_sharding(replace(plan, pipeline=made))


# -- times -------------------------------------------------------------------------------------------------------------


def test_predicted_seconds_hold_the_bubble() -> None:
    """If stages take equally long, ranks wait for (stages - 1) / (micro-batches + stages - 1) of the time.

    If stages take different times, ranks wait longer.
    """
    shape: dict[str, Any] = {"layers": 6, "dim": 1024, "heads": 16, "vocab": 1000, "context": 1024}
    sizes = {"B": 16, "S": 1024}
    found = {
        micro: device_needs(shard_model("gpt2", f"pp=3,micro={micro}", recipe="gpipe", sizes=sizes, **shape))
        for micro in (2, 8)
    }
    for micro, needs in found.items():
        assert needs.stages is not None
        assert 2 / (micro + 2) < needs.stages.waits < 2 / (micro + 2) + 0.05
        assert needs.times.seconds == needs.stages.seconds
        assert f"3 stages, {micro} micro-batches" in str(needs)
        assert len(needs.stages.turns) == 3 * micro
        for stage in range(1, 3):
            before, own = ([t for t in needs.stages.turns if t.stage == n] for n in (stage - 1, stage))
            assert all(late.start >= early.end for early, late in zip(before, own, strict=True))
    assert found[8].times.seconds < 0.75 * found[2].times.seconds
    alone = device_needs(shard_model("gpt2", "dp=1", recipe="dp", sizes=sizes, **shape))
    assert alone.times.seconds / 3 < found[8].times.seconds < alone.times.seconds / 2


def test_micro_batches_are_four_for_each_stage_or_as_many_as_rows() -> None:
    for mesh, sizes, wanted in (
        ("pp=2", None, "pp=2,micro=8"),
        ("pp=4,tp=2", {"B": 6}, "pp=4,tp=2,micro=6"),
        ("pp=2,dp=2", {"B": 8}, "pp=2,dp=2,micro=4"),
        ("pp=2,micro=3,tp=2", None, "pp=2,tp=2,micro=3"),
    ):
        plan = shard_model("gpt2", mesh, recipe="gpipe", sizes=sizes, **SMALL)
        assert str(plan.mesh) == wanted
        assert plan.axes["batch"] == ("dp micro" if "dp" in mesh else "micro")
    with pytest.raises(UsageError, match="recipe gpipe splits over a mesh axis pp, which the mesh does not have"):
        shard_model("gpt2", "tp=2", recipe="gpipe", **SMALL)


@pytest.mark.parametrize(
    ("mesh", "rows", "other"),
    [("pp=2", 7, "pp=2,micro=7"), ("pp=2", 1, "pp=2,micro=1"), ("pp=2,dp=2", 5, "pp=2,dp=2,micro=2")],
)
def test_few_rows_are_fewer_micro_batches(mesh: str, rows: int, other: str) -> None:
    """The mesh of the hint runs."""
    inputs, weights = {"tokens": np.ones((rows, 3), int)}, numbers("gpt2")[0]
    with pytest.raises(PassError, match=r"do not give each of \d+ micro-batches or ranks a part") as caught:
        run_lab(shard(recognized("gpt2"), mesh, recipe="gpipe"), inputs, weights)
    assert (str(caught.value.hint), getattr(caught.value.hint, "command", "")) == (f"mesh={other!r}", f"--mesh {other}")
    assert run_lab(shard(recognized("gpt2"), other, recipe="gpipe"), inputs, weights)


def test_one_row_for_several_ranks_needs_more_rows() -> None:
    with pytest.raises(PassError, match="micro-batches or ranks a part") as caught:
        run_lab(
            shard(recognized("gpt2"), "pp=2,dp=2", recipe="gpipe"), {"tokens": np.ones((1, 3), int)}, numbers("gpt2")[0]
        )
    assert str(caught.value.hint).endswith("or more, or a smaller mesh")


def test_the_plan_and_its_explanation_show_the_timetable() -> None:
    plan = shard_model("gpt2", "pp=2,micro=3", recipe="gpipe", **SMALL)
    text = str(plan)
    assert "stages over pp; 3 micro-batches pass through them in order" in text
    assert "    stage 0    0 1 2 .\n    stage 1    . 0 1 2\n" in text
    assert "3 x hand_on over pp: stage 1 reads results of stage 0" in text
    report = explain_sharding(
        "gpt2", mesh="pp=2,tp=2,micro=3", recipe="gpipe", sizes={"B": 6, "S": 16}, **{**SMALL, "layers": 2}
    )
    assert max(map(len, str(report).splitlines())) <= 80
    assert "ranks wait" in str(report)
    assert "stage 1 reads results of stage 0" in str(report)
    assert "2 stages, 3 micro-batches" in str(report)
    drawn = draw_sharding(report)
    assert drawn.count("<title>micro-batch ") == 6
    assert "stage 1</text>" in drawn
    facts = report.as_dict()
    assert len(facts["device"]["turns"]) == 6
    assert any(change.description.startswith("recipe megatron") for change in report.changes)


def test_the_command_plans_and_tries_a_pipeline() -> None:
    settings = [word for name, value in {**SMALL, "layers": 2}.items() for word in ("--set", f"{name}={value}")]
    words = ["shard", "gpt2", "--mesh", "pp=2,tp=2,micro=2", "--recipe", "gpipe", *settings, "--lab"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "4 ranks, gpipe" in result.output
    assert "equal" in result.output
    assert "lab: 4 ranks" in result.output


# -- gathering ahead ---------------------------------------------------------------------------------------------------


def test_gathers_of_a_call_begin_before_the_call_before_it() -> None:
    plan = shard_model("gpt2", "dp=2", recipe="fsdp", **{**SMALL, "layers": 3})
    program = rank_graph(plan, 0)
    order = [node.op.callee or node.op.name for node in program.main.nodes]
    order = [name for name in order if name in ("h", "start_gather")]
    each = order.count("start_gather") // 3
    assert order == [*["start_gather"] * 2 * each, "h", *["start_gather"] * each, "h", "h"]
    gathers = [node.op for node in program.functions["h"].nodes if node.op.name == "all_gather"]
    assert len(gathers) == each
    assert all(op.attributes["ahead"] for op in gathers)
    assert try_in_lab(plan).passed


@pytest.mark.parametrize("options", [{"dtype": "bf16"}, {"quantize": "int4"}])
def test_casts_are_gathered_ahead_and_blocks_are_not(options: dict[str, str]) -> None:
    plan = shard_model("gpt2", "dp=2", recipe="fsdp", **{**SMALL, "layers": 2}, **options)
    program = rank_graph(plan, 1)
    text = str(program)
    assert "start_gather(" in text
    begun = [node for node in program.main.nodes if node.op.name == "start_gather"]
    assert all(node.inputs[0].type.encoding is None for node in begun)
    if "dtype" in options:
        assert any(node.inputs[0].type.dtype.name == "bf16" for node in begun)
    assert try_in_lab(plan).passed


def test_the_predicted_time_is_less_where_gathers_run_ahead() -> None:
    sizes = {"B": 64, "S": 512}
    shape: dict[str, Any] = {"layers": 6, "dim": 1024, "heads": 16, "vocab": 1000, "context": 512}
    needs = device_needs(shard_model("gpt2", "dp=4", recipe="fsdp", sizes=sizes, **shape))
    gathers = [each for each in needs.times.busy if each.over and each.call >= 0]
    work = [each for each in needs.times.busy if not each.over]
    for call in range(1, 6):
        own = [each.start for each in gathers if each.call == call]
        before = [each.start for each in work if each.call == call - 1]
        assert min(own) < min(each.start for each in work if each.call == call)
        assert min(own) < max(before)
    assert needs.times.seconds < needs.times.work + needs.times.collectives

"""The table of stages: orders that are refused, stages that are repeated, and swaps of adjacent stages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
import pytest

import treadle as t
from tests.op_checks import Array
from tests.pipelines import PIPELINES
from treadle.backends.registry import find_backend
from treadle.backends.staged import StagedBackend
from treadle.ir.analysis.drawn_inputs import draw_inputs
from treadle.ir.errors import GraphError, TreadleError, UsageError
from treadle.ir.graph import Graph
from treadle.ir.interpreter import interpret
from treadle.ir.target import Target
from treadle.ir.transforms.training_losses import LOSS, with_cross_entropy
from treadle.passes.budget.fitted_pipeline import MemoryLimit
from treadle.passes.framework.facts import FACTS, INITIAL, RECOGNIZED, facts_after, initial_facts
from treadle.passes.framework.manager import Optimized
from treadle.passes.framework.pass_text import pass_classes
from treadle.passes.stages import (
    STAGES,
    Budget,
    CompileStage,
    DeriveStep,
    Gradient,
    Lower,
    MergeOps,
    Overlap,
    Precision,
    Quantize,
    Recognize,
    Shard,
    arranged,
    left_out,
    passes_of,
    rows_before,
    run,
)
from treadle.program.options import CompileOptions
from treadle.program.weights import initial_weights
from treadle.resolving import resolve
from treadle.sharding.plans import plan_graph

SMALL = {"layers": 2, "dim": 32, "heads": 2, "vocab": 11, "context": 16}
SIZES = {"B": 2, "S": 6}


@cache
def declared() -> Graph:
    return resolve("gpt2", **SMALL).graph


@cache
def with_loss() -> Graph:
    return with_cross_entropy(declared(), "logits")


def names(stages: tuple[CompileStage, ...]) -> list[str]:
    return [each.name for each in stages]


def backend() -> StagedBackend:
    found = find_backend("numpy")
    assert isinstance(found, StagedBackend)
    return found


# -- the order ---------------------------------------------------------------------------------------------------------


def test_the_table_orders_stages() -> None:
    made = arranged([Precision("bf16"), MergeOps(), Quantize("int8"), Recognize()], INITIAL)
    assert names(made) == ["recognize", "quantize", "merge", "precision"]
    assert [each.name for each in rows_before(MergeOps, made)] == ["recognize", "quantize"]


def test_a_stage_is_repeated_if_its_result_was_lost() -> None:
    made = arranged([MergeOps(), Gradient(LOSS, ("wte.weight",)), Recognize()], INITIAL)
    assert names(made) == ["recognize", "gradient", "recognize", "merge"]


def test_every_stage_and_every_fact_is_in_the_documented_table() -> None:
    from treadle.passes import stages

    listed = [line.split()[0] for line in (stages.__doc__ or "").splitlines() if line.endswith(".md")]
    assert listed == [kind.row or kind.__name__.lower() for kind in STAGES]
    used = {
        fact for kind in (*STAGES, *pass_classes().values()) for fact in (*kind.requires, *kind.ensures, *kind.ends)
    }
    assert used == {*FACTS}, "a fact that nothing requires, ensures or ends has no use"


@pytest.mark.parametrize(
    ("stages", "message", "hint"),
    [
        ([MergeOps()], "merge needs a graph in which ops have been recognized", "recognize before merge"),
        (
            [Gradient("loss", ()), Recognize()],
            "gradient needs a graph in which ops have been recognized",
            "recognize before gradient",
        ),
        (
            [Recognize(), Precision("bf16"), Quantize("int8")],
            "quantize needs products in the dtypes",
            "quantize before precision",
        ),
        (
            [Recognize(), DeriveStep(), DeriveStep()],
            "step needs a graph with one entry",
            "step before step",
        ),
        ([Lower(()), Lower(())], "lower needs a graph before the passes of a backend", "a pipeline without lower"),
    ],
)
def test_an_order_that_is_not_possible_is_refused(stages: list[CompileStage], message: str, hint: str) -> None:
    with pytest.raises(UsageError, match=message) as refused:
        run(declared(), stages)
    assert hint in str(refused.value.hint)


def test_a_pass_that_stands_wrong_is_refused_before_the_model_is_read() -> None:
    with pytest.raises(UsageError, match="fuse-gelu needs a graph before the passes of a backend") as refused:
        CompileOptions(passes="legalize{backend=numpy}, fuse-gelu").stages()
    assert refused.value.hint == "fuse-gelu before legalize, or a pipeline without legalize"
    with pytest.raises(UsageError, match="lower needs a graph before the passes of a backend") as refused:
        t.compile("no such model", passes="legalize{backend=numpy}", backend="numpy")
    assert refused.value.hint == "a pipeline without legalize: the backend's passes follow by themselves"
    with pytest.raises(UsageError, match="decode-last needs a graph of ops that the backend emits") as refused:
        CompileOptions(passes="decode-last, legalize").stages()
    assert refused.value.hint == "legalize before decode-last"


@pytest.mark.parametrize("passes", ["fuse-gelu", "fuse-gelu, fuse-linear"])
def test_a_pass_is_left_out_of_the_passes_of_a_user(passes: str) -> None:
    assert "fuse-gelu" not in [
        each.name for each in passes_of(CompileOptions(passes=passes, without=["fuse-gelu"]).stages())
    ]


def test_passes_are_left_out_of_their_stages() -> None:
    made = left_out([Recognize(), MergeOps()], ["fuse-gelu", "dead-code"])
    kept = [each.name for each in passes_of(made)]
    assert "fuse-gelu" not in kept
    assert "dead-code" not in kept
    assert "merge-projections" in kept
    assert names(arranged([*made, Quantize("int8")], INITIAL)) == ["custom", "quantize", "custom"]
    with pytest.raises(UsageError, match="the pipeline has no pass 'fuse-geru'") as refused:
        left_out([Recognize()], ["fuse-geru"])
    assert refused.value.hint == "fuse-gelu?"
    with pytest.raises(UsageError, match="legalize is not a pass of these stages, and backends need their own"):
        left_out([Recognize()], ["legalize"])


def test_a_wrong_claim_of_a_transform_is_found() -> None:
    @dataclass(frozen=True)
    class Wrong(DeriveStep):
        ends = frozenset()  # the graph has states, so it is no longer stateless

    with pytest.raises(TreadleError, match="after step, the graph is not stateless"):
        run(declared(), [Recognize(), Wrong()])


@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_of_backends_stand_in_a_possible_order(name: str) -> None:
    facts_after(PIPELINES[name], INITIAL)


# -- swaps of adjacent stages ------------------------------------------------------------------------------------------

Numbers = Callable[[Optimized], dict[str, Array]]


def outputs(made: Optimized) -> dict[str, Array]:
    """Interpret the entry that remains, with the weights of the declared graph."""
    graph = made.graph
    weights = initial_weights(declared())
    if graph.states:
        return {"text": np.array(str(graph).split("\n"))}  # the same entries give the same numbers
    return interpret(graph, draw_inputs(graph, SIZES, [0]), {name: weights[name] for name in graph.parameters})


def stage(kind: type[CompileStage]) -> CompileStage:
    """Return a stage of the row, for the graph of a small GPT-2."""
    made: dict[type[CompileStage], Callable[[], CompileStage]] = {
        Recognize: Recognize,
        Gradient: lambda: Gradient(LOSS, ("wte.weight",)),
        Quantize: lambda: Quantize("int8-weights"),
        Shard: lambda: Shard(plan_graph(run(declared(), [Recognize()]).graph, "tp=2", recipe="megatron"), 0),
        MergeOps: MergeOps,
        Precision: lambda: Precision("bf16"),
        Overlap: Overlap,
        DeriveStep: DeriveStep,
        Budget: lambda: Budget(MemoryLimit(10**6, SIZES), backend(), Target("cpu")),
        Lower: lambda: Lower(tuple(backend().pipeline(Target("cpu")))),
    }
    return made[kind]()


@pytest.mark.parametrize(("first", "second"), list(pairwise(STAGES)))
def test_adjacent_stages_are_refused_or_equal_if_they_are_swapped(
    first: type[CompileStage], second: type[CompileStage]
) -> None:
    one, two = stage(first), stage(second)
    graph = with_loss() if Gradient in (first, second) else declared()
    before = [] if first is Recognize else [Recognize()]
    if isinstance(one, Shard) or isinstance(two, Shard):
        plan = (one if isinstance(one, Shard) else two).plan  # type: ignore[union-attr]
        start: Graph = plan.graph
        facts = initial_facts(start) | {RECOGNIZED}
        with pytest.raises(UsageError, match=r"(quantize|shard|merge) needs "):
            run(start, [two, one], facts=facts)
        return
    try:
        swapped = run(graph, [*before, two, one])
    except UsageError:  # before anything ran
        return
    except GraphError:
        assert (first, second) == (Gradient, Quantize), "gradients of encoded weights are refused by name"
        return
    kept = run(graph, [*before, one, two])
    for name, expected in outputs(kept).items():
        np.testing.assert_array_equal(outputs(swapped)[name], expected, name)

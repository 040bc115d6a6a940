"""Impossible plans are refused when they are built. Wrong plans are found by the checker and by the lab."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests import wrong_shardings as wrong
from tests.lab_checks import apart
from tests.sharded_models import recognized
from tests.wrong_shardings import changed_node
from treadle.ir.builder import Builder
from treadle.ir.errors import GraphError, Hint, PassError, TreadleError, UsageError
from treadle.ir.graph import Graph
from treadle.ir.placement.mesh import Mesh
from treadle.ir.placement.placements import parse_placement
from treadle.passes.sharding.checking import check_sharding
from treadle.passes.sharding.rank_programs import rank_program
from treadle.passes.sharding.recipes import RECIPES, shard
from treadle.runtime.sharding_lab import run_lab
from treadle.sharding import shard_model, try_in_lab

EXACT = 1e-7
"""Smallest error that a wrong plan must make; weights have magnitudes near 0.05."""


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "report"),
    [
        ({}, "the split of the model is not specified"),
        ({"recipe": "zero"}, "unknown recipe 'zero'"),
        ({"recipe": "dp"}, "recipe dp splits over a mesh axis dp, which the mesh does not have"),
        ({"axes": {"experts": "tp"}}, "gpt2 has no axis 'experts' to split"),
        ({"axes": {"heads": "ep"}}, "the mesh tp=2 has no axis 'ep'"),
        ({"axes": {"wte.bias[0]": "tp"}}, "no axis 'wte.bias"),
        ({"recipe": "megatron", "device": "tpu"}, "unknown device 'tpu'"),
    ],
)
def test_unplannable_graphs_are_refused(options: dict[str, Any], report: str) -> None:
    with pytest.raises(UsageError, match=report):
        shard(recognized("gpt2"), "tp=2", **options)


LACKING = [
    (recipe, mesh)
    for recipe in RECIPES
    for mesh in ("x=1", "x=2", "tp=4", "dp=4")
    if not {*RECIPES[recipe].needs} <= {name for name, _ in Mesh.of(mesh).axes}
]


@pytest.mark.parametrize(("recipe", "mesh"), LACKING)
def test_a_mesh_without_the_axes_of_a_recipe_is_replaced_by_one_with_them(recipe: str, mesh: str) -> None:
    with pytest.raises(UsageError, match="which the mesh does not have") as refused:
        shard(recognized("gpt2"), mesh, recipe=recipe)
    assert isinstance(refused.value.hint, Hint)
    fitting = refused.value.hint.command.removeprefix("--mesh ")
    assert refused.value.hint == f'mesh="{fitting}"'
    shard(recognized("gpt2"), fitting, recipe=recipe)


def test_a_rank_that_there_is_not_is_refused() -> None:
    plan = shard(recognized("gpt2"), "tp=2", recipe="megatron")
    with pytest.raises(PassError, match="the mesh tp=2 has no rank 2"):
        rank_program(plan, 2)


# -- wrong plans -------------------------------------------------------------------------------------------------------

CHANGES = {
    "without terms combined": wrong.without_terms,
    "along another axis": wrong.along_another_axis(Mesh.of("tp=2,dp=2").parts_of("dp")),
    "by another reduction": wrong.by_another_monoid,
    "a bias added everywhere": wrong.added_everywhere,
    "not gathered": wrong.not_gathered,
    "gathered along another dimension": wrong.gathered_along_another_dimension,
    "scattered without a sum": wrong.scattered_without_a_sum,
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_checker_and_the_lab_each_find_a_wrong_collective(name: str) -> None:
    found = 0
    for recipe in ("megatron", "sequence"):
        plan = shard(recognized("gpt2"), "tp=2,dp=2", recipe=recipe)
        for bad in wrong.wrong_plans(plan, CHANGES[name]):
            found += 1
            with pytest.raises(PassError, match="sharding plan"):
                check_sharding(bad)
            try:
                far = apart("gpt2", bad)
            except TreadleError:
                continue  # ranks communicate differently, or parts do not fit
            assert far > EXACT
    assert found


@pytest.mark.parametrize(
    ("at", "changed", "report"),
    [
        (1, "reads", r"the plan has no copy of linear with placement \[tp, -\]"),
        (0, "gives", "linear: linear does not have its planned type"),
    ],
)
def test_a_program_is_not_made_by_a_plan_that_does_not_fit(at: int, changed: str, report: str) -> None:
    b = Builder(Graph("alone"))
    b.outputs(y=b.tanh(b.linear(b.input("x", "f32[8, 12]"), b.parameter("w", "f32[16, 12]"))))
    plan = shard(b.graph, "tp=2", axes={"w[0]": "tp"})
    elsewhere = (parse_placement("[tp, -]", plan.mesh),)
    with pytest.raises(PassError, match=report):
        rank_program(changed_node(plan, 0, at, **{changed: elsewhere}), 1)


def test_factors_that_are_not_split_as_values_lie_are_refused() -> None:
    """Ranks' programs are built from these factors: if a part of a table were read as the whole, a lookup would return
    other rows.
    """
    plan = shard(recognized("gpt2"), "tp=2,dp=2", recipe="megatron")
    main = len(plan.functions) - 1
    split = [i for i, node in enumerate(plan.main.nodes) if node.shares]
    assert any(plan.main.nodes[i].node.op.name == "embedding" for i in split)
    for at in split:
        shares = plan.main.nodes[at].shares
        beside = {name: replace(share, over=plan.mesh.parts_of("dp tp")) for name, share in shares.items()}
        for other in ({}, beside, {**shares, "nothing": next(iter(shares.values()))}):
            with pytest.raises(
                PassError, match=r"rank \d+ works on|a factor that none of its operands and results has"
            ):
                check_sharding(changed_node(plan, main, at, shares=other))
    whole = [i for i, node in enumerate(plan.main.nodes) if node.callee is not None]
    shares = plan.main.nodes[split[0]].shares
    with pytest.raises(PassError, match="must not split factors itself"):
        check_sharding(changed_node(plan, main, whole[0], shares=shares))


def test_weights_that_are_stored_in_another_way_than_they_are_taken_are_refused() -> None:
    plan = shard(recognized("gpt2"), "tp=2", recipe="megatron")
    name = "h.0.attn.q.weight"
    turned = {**plan.weights, name: parse_placement("[-, tp]", plan.mesh)}
    missing = {n: placed for n, placed in plan.weights.items() if n != name}
    for weights in (turned, missing, {**plan.weights, "other": plan.weights[name]}):
        with pytest.raises(
            PassError,
            match=r"weight (h\.0\.attn\.q\.weight|other) is not stored in the placement in which main reads it",
        ):
            check_sharding(replace(plan, weights=weights))


def test_the_lab_refuses_more_ranks_than_it_has_threads_for(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = shard(recognized("gpt2"), "dp=257", recipe="dp")
    with pytest.raises(GraphError, match="the lab runs up to 256 ranks") as error:
        try_in_lab(plan)
    assert error.value.received == "dp=257: 257 ranks"
    started, start = [], threading.Thread.start

    def only_one(thread: threading.Thread) -> None:
        if started:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", only_one)
    with pytest.raises(GraphError, match="the system cannot start more threads"):
        apart("gpt2", shard(recognized("gpt2"), "tp=2", recipe="megatron"))
    assert not started[0].is_alive()


def meeting(rank: int, **attributes: Any) -> Graph:
    b = Builder(Graph("alone"))
    x = b.input("tokens", "f32[B, 4]")
    name = attributes.pop("name", "all_reduce")
    b.outputs(y=b.apply(name, x, over="tp", ways=2, **attributes) if name else x)
    return b.graph


@pytest.mark.parametrize(
    ("other", "report"),
    [
        ({"name": "all_gather", "axis": 1, "size": 8}, "ranks 0 and 1 are in different collectives"),
        ({"monoid": "max"}, "ranks 0 and 1 are in different collectives"),
        ({"name": ""}, "ranks wait for others that do not arrive"),
    ],
)
def test_ranks_whose_plans_differ_raise_without_waiting(other: dict[str, Any], report: str) -> None:
    b = Builder(Graph("alone"))
    b.outputs(y=b.tanh(b.input("tokens", "f32[B, 4]")))
    plan = shard(b.graph, "tp=2", axes={"tokens[0]": "tp"})
    with pytest.raises(GraphError, match=report):
        run_lab(plan, {"tokens": np.ones((2, 4))}, {}, programs=[meeting(0), meeting(1, **other)])


@pytest.mark.parametrize(
    ("mesh", "axes", "sizes", "what"),
    [
        (2, None, None, "mesh must be a string or a Mesh"),
        ({"tp": 2}, None, None, "mesh must be a string or a Mesh"),
        ("tp=2", "heads=tp", None, "axes must be a mapping"),
        ("tp=0", None, None, "a mesh must have 1 to 131,072 ranks"),
        ("tp=2,tp=2", None, None, "the mesh has two axes tp"),
        ("tp=13", {"heads": "tp"}, None, "heads: 12 cannot be split over tp"),
        ("tp=2", {"rows": "tp"}, None, "gpt2 has no axis 'rows' to split"),
        ("tp=2", None, {"S": 5000}, "the size of S cannot be 5000"),
        ("tp=2", None, {"Q": 5}, "gpt2 has no symbolic axis Q"),
    ],
)
def test_a_wrong_argument_has_a_way_out(mesh: Any, axes: Any, sizes: Any, what: str) -> None:
    with pytest.raises(UsageError, match=what) as error:
        shard_model("gpt2", mesh, recipe="megatron", axes=axes, sizes=sizes, layers=1)
    assert error.value.hint


def test_plans_over_many_ranks_are_checked_without_a_look_at_each_rank() -> None:
    """A mapped axis that is split in the same way everywhere is right for any number of ranks."""
    small: dict[str, Any] = {"layers": 1, "dim": 32, "heads": 8, "vocab": 37}
    plan = shard_model("gpt2", "tp=8,dp=16384", recipe="megatron-fsdp", **small)
    assert plan.mesh.ranks == 131_072
    rebuilt = plan.main.nodes[-1]
    wrong_way = replace(rebuilt, gives=(parse_placement("[tp, -, dp]", plan.mesh),))
    functions = (*plan.functions[:-1], replace(plan.main, nodes=(*plan.main.nodes[:-1], wrong_way)))
    with pytest.raises(PassError, match="sharding plan"):
        check_sharding(replace(plan, functions=functions))
    with pytest.raises(UsageError, match="1 to 131,072 ranks"):
        shard_model("gpt2", "tp=8,dp=16385", recipe="megatron-fsdp", **small)

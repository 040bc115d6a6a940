"""Sharding: every model, split by every recipe, computes the same results. Plans as texts and numbers, and random
graphs with random splits.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

import numpy as np
import pytest
from typer.testing import CliRunner

import treadle
from tests.lab_checks import NEAR, apart, block_text, words
from tests.random_shardings import difference, random_case, random_pipeline
from tests.sharded_models import FAMILIES, numbers, recognized
from treadle.cli.application import app
from treadle.ir.builder import Builder
from treadle.ir.encodings.encoding import parse_encoding
from treadle.ir.errors import PassError, UsageError
from treadle.ir.graph import Graph
from treadle.ir.hardware import find_hardware
from treadle.ir.placement.mesh import Mesh
from treadle.ir.placement.placements import parse_placement
from treadle.ir.transforms.encoded_weights import encode_parameters
from treadle.passes.sharding.checking import check_sharding
from treadle.passes.sharding.costs import Costs
from treadle.passes.sharding.placed_values import PlacedValues
from treadle.passes.sharding.plan_printing import plan_hash, plan_json
from treadle.passes.sharding.rank_programs import refuse_small_sizes
from treadle.passes.sharding.recipes import RECIPES, shard
from treadle.passes.sharding.wanted import Wanted
from treadle.runtime.sharding_lab import run_lab
from treadle.sharding import device_needs, rank_graph, shard_model, try_in_lab
from treadle.sharding.lab_trials import _difference

LARGE = ("megatron", "megatron-fsdp")

MESHES = ("tp=2", "tp=4", "tp=8", "dp=2", "dp=4", "dp=8", "tp=2,dp=2", "dp=2,tp=4", "cp=2", "cp=4", "cp=8", "tp=2,cp=2")


def meshes_of(family: str, recipe: str) -> list[str]:
    """Return the meshes of a recipe: for one family also meshes with an axis that the recipe does not use, for every
    third one meshes of 8 devices.
    """
    known = RECIPES[recipe]
    return [
        mesh
        for mesh in MESHES
        if all(f"{axis}=" in mesh for axis in known.needs)
        and (family == FAMILIES[0] or {name for name, _ in Mesh.of(mesh).axes} <= {*known.axes.values()})
        and (family in FAMILIES[::3] or Mesh.of(mesh).ranks < 8)
    ]


CASES = [
    (family, mesh, recipe)
    for f, family in enumerate(FAMILIES)
    for r, recipe in enumerate(RECIPES)
    for m, mesh in enumerate(meshes_of(family, recipe))
    if f == 0 or m == 0 or (f + r + m) % 2
]
"""All meshes for one family; the other families take turns, with the first mesh of each recipe for all."""


# -- every model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "mesh", "recipe"), CASES, ids=["-".join(case) for case in CASES])
def test_ranks_together_compute_what_the_model_does(family: str, mesh: str, recipe: str) -> None:
    plan = shard(recognized(family), mesh, recipe=recipe)
    check_sharding(plan)
    assert apart(family, plan) < NEAR


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "vit"])
@pytest.mark.parametrize(("mesh", "recipe"), [("tp=2,dp=2", "megatron"), ("tp=4", "sequence"), ("dp=2", "fsdp")])
def test_programs_go_through_the_rest_of_the_pipeline(family: str, mesh: str, recipe: str) -> None:
    plan = shard(recognized(family), mesh, recipe=recipe)
    programs = [rank_graph(plan, rank) for rank in range(plan.mesh.ranks)]
    # a weight that is gathered for use is not counted
    assert ("projections(" in str(programs[-1])) == (recipe != "fsdp")
    assert apart(family, plan, programs) < NEAR


def test_a_linear_graph_is_computed_exactly() -> None:
    """Sums of integers have no rounding, whatever the order of additions."""
    b = Builder(Graph("linear"))
    x = b.input("x", "f32[B, 12]")
    y = b.linear(x, b.parameter("up", "f32[18, 12]"), b.parameter("bias", "f32[18]"))
    y = b.linear(y, b.parameter("down", "f32[7, 18]"), b.parameter("last", "f32[7]"))
    b.outputs(y=b.reduce_sum(y, axes=(0,)))
    rng = np.random.default_rng(0)
    weights = {n: rng.integers(-9, 9, v.type.evaluate({})).astype(float) for n, v in b.graph.parameters.items()}
    inputs = {"x": rng.integers(-9, 9, (7, 12)).astype(float)}
    whole = inputs["x"] @ weights["up"].T + weights["bias"]
    wanted = (whole @ weights["down"].T + weights["last"]).sum(0)
    for axes in ({"up[0]": "tp"}, {"up[1]": "tp"}, {"batch": "tp"}, {"up[0]": "dp", "batch": "tp"}):
        plan = shard(b.graph, "tp=4,dp=2", axes=axes)
        check_sharding(plan)
        assert np.array_equal(run_lab(plan, inputs, weights).outputs["y"], wanted), axes


# -- plans -------------------------------------------------------------------------------------------------------------


def test_a_plan_prints_with_reasons_bytes_and_lines() -> None:
    plan = shard(recognized("gpt2"), "tp=2,dp=2", recipe="megatron", sizes={"B": 4, "S": 8})
    text = str(plan)
    assert "sharding of gpt2 over tp=2,dp=2, 4 ranks, megatron: heads over tp, ffn over tp" in text
    assert re.search(r"h\.\*\.attn\.q\.weight: f32\[32, 32\] +\[tp, -\]  x 2", text)
    assert re.search(r"out = linear: k over tp, \.\.\.2 over dp +\[dp, -, -\] sum\(tp\)", text)
    assert re.search(
        r"all_reduce of out over tp: the split of heads is summed, .* MB  \(models/gpt2\.py:\d+, attn\.out\)", text
    )
    assert re.search(r"2 x all_reduce over tp: the split of ffn is summed, .*h\.\*\.mlp\.down\)", text)


def test_predicted_bytes_are_those_of_what_ranks_bring() -> None:
    """The plan's payload of each collective equals the traffic that the ranks count, in elements of float32. Parts are
    equal.
    """
    weights, inputs, _ = numbers("gpt2")
    graph = recognized("gpt2")
    rows, tokens = inputs["tokens"][:8].shape
    for recipe in ("megatron", "sequence"):
        plan = shard(graph, "tp=4", recipe=recipe, sizes={"B": rows, "S": 8})
        found = run_lab(plan, {"tokens": inputs["tokens"][:8, :8]}, weights)
        assert sorted(4 * n for _, n in found.collectives) == sorted(c.payload for c in plan.collectives())
    assert tokens > 8


def test_json_holds_placements_that_read_back_and_a_hash_tells_plans_apart() -> None:
    graph = recognized("llama")
    plan = shard(graph, "tp=8", recipe="sequence")
    report = plan_json(plan)
    placements = [text for f in report["functions"] for n in f["nodes"] for text in n["gives"]]
    assert len(placements) > 20
    assert all(parse_placement(text, plan.mesh).text(plan.mesh) == text for text in placements)
    assert plan_hash(plan) == plan_hash(shard(graph, "tp=8", recipe="sequence"))
    assert plan_hash(plan) != plan_hash(shard(graph, "tp=8", recipe="megatron"))


def test_a_large_shape_is_planned_without_weights() -> None:
    shape: dict[str, Any] = {"dim": 16384, "heads": 128, "kv_heads": 8, "layers": 126, "hidden": 53248, "vocab": 128256}
    plan = shard_model("llama", "tp=8,dp=16", recipe="megatron", **shape)
    assert len(plan.collectives()) == 2 * 126 + 1
    assert plan.weight_bytes() == pytest.approx(4 * 405.8e9 / 8, rel=0.01)


def test_a_device_holds_what_its_program_needs() -> None:
    shape: dict[str, Any] = {"dim": 16384, "heads": 128, "kv_heads": 8, "layers": 126, "hidden": 53248, "vocab": 128256}
    sizes = {"B": 16, "S": 4096}
    needs = [device_needs(shard_model("llama", "tp=8,dp=16", recipe=r, sizes=sizes, **shape)) for r in LARGE]
    assert [each.fits for each in needs] == [False, True]
    assert needs[0].weights == pytest.approx(16 * needs[1].weights, rel=0.01)
    assert "it does NOT fit" in str(needs[0])
    assert "memory limits" in str(needs[0])
    longest = needs[1].times.causes()[0]
    assert "is stored in parts and gathered for use" in longest.because
    # in units of the residual stream of one row of tokens in float32
    stream = 4 * 4096 * 16384
    assert stream < needs[0].values < 8 * stream


def test_a_value_in_two_placements_moves_from_the_nearer_one() -> None:
    """Weights in blocks move from the only placement that permits it."""
    mesh, b = Mesh.of("tp=4"), Builder(Graph("g"))
    rows, columns, whole = (parse_placement(text, mesh) for text in ("[tp, -]", "[-, tp]", "[-, -]"))
    values = PlacedValues(Costs(mesh, find_hardware("h100"), {"B": 8}), Wanted())
    x, w = b.input("x", "f32[B, 16]").value, b.parameter("w", "f32[64, 64] as q8_0").value
    values.had |= {x: [rows, whole], w: [columns, rows]}
    assert values.conversion_to(x, columns)[1] == whole
    assert values.conversion_to(w, whole)[1] == rows


def test_a_value_with_two_readers_moves_once() -> None:
    b = Builder(Graph("alike"))
    x, v = b.input("x", "f32[2, 4, 8, 6]"), b.input("v", "f32[2, 4, 8, 6]")
    b.outputs(y=b.attention(x, x, v))
    plan = shard(b.graph, "tp=2", axes={"x[1]": "tp"})
    check_sharding(plan)
    assert [move.value.name for move in plan.main.nodes[0].moves] == ["x", "v"]


def test_a_rank_has_at_least_one_unit_of_what_is_split() -> None:
    b = Builder(Graph("joined"))
    b.outputs(y=b.tanh(b.rearrange(b.input("x", "f32[S, 4]"), pattern="s d -> (s d)")))
    plan = shard(b.graph, "tp=3", axes={"S": "tp"})
    assert plan.main.gives[0].text(plan.mesh) == "[tp*4]"
    refuse_small_sizes(plan, {"S": 3})
    refuse_small_sizes(plan, {})
    with pytest.raises(PassError, match=r"rearrange: 2 along 4\*S do not give each of 3 ranks a part"):
        refuse_small_sizes(plan, {"S": 2})


def test_an_axis_of_one_position_is_not_proposed_when_it_is_refused() -> None:
    with pytest.raises(UsageError, match="gpt2 has no axis 'heads' to split") as error:
        shard_model("gpt2", "tp=2", axes={"heads": "tp"}, layers=1, dim=16, heads=1, vocab=40, context=12)
    assert error.value.hint == "one of batch, sequence, vocab, B, S, ffn"
    b = Builder(Graph("numbers"))
    b.outputs(y=b.input("x", "f32[]") * 2.0)
    with pytest.raises(UsageError, match="numbers has no axis 'heads' to split") as error:
        shard(b.graph, "tp=2", axes={"heads": "tp"})
    assert error.value.hint is None


# -- any graph ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(60))
def test_any_graph_split_in_any_way_computes_the_same(seed: int) -> None:
    """A small sample; tests/fuzz/shardings.py runs any number of cases."""
    case = random_pipeline(seed) if seed % 4 == 0 else random_case(seed)
    assert difference(case, case.plan(), merged=seed % 8 < 4) < 1e-10


# -- the command and the public API ------------------------------------------------------------------------------------


def test_the_command_takes_dtypes_and_quantization() -> None:
    words = [
        "--set=layers=1",
        "--set=dim=64",
        "--set=heads=4",
        "--set=vocab=96",
        "--dtype",
        "bf16",
        "--quantize",
        "int4",
    ]
    result = CliRunner().invoke(app, ["shard", "gpt2", "--mesh", "tp=2", "--recipe", "megatron", "--lab", *words])
    assert result.exit_code == 0, result.output
    assert "f32[64, 64] as int4_groups(32)" in result.output
    assert "cast: ...1 over tp" in result.output
    assert "equal" in result.output


def test_the_front_door_tries_a_plan_in_the_lab() -> None:
    plan = shard_model("bert", "tp=2", recipe="megatron", layers=1, dim=16, heads=2, vocab=40)
    tried = try_in_lab(plan, seed=1)
    assert tried.passed
    assert tried.collectives == 3
    assert "equal" in str(tried)


def test_a_plan_is_checked_and_tried_at_sizes_without_empty_axes() -> None:
    @treadle.model
    def patches(image: Annotated[treadle.Tensor, treadle.f32["B 3 H W"]], *, dim: int = 8) -> treadle.Tensor:
        x = treadle.convolution(image, dim, (8, 8), strides=(8, 8), name="patch")
        return treadle.self_attention(treadle.rearrange(x, "b c h w -> b (h w) c"), 2, name="attn")

    tried = try_in_lab(shard_model(patches, "tp=2", recipe="megatron"))
    assert tried.passed
    assert min(tried.sizes["H"], tried.sizes["W"]) >= 8


def test_a_lab_draws_positive_variances_of_batch_norms() -> None:
    torch = pytest.importorskip("torch")
    layers = [torch.nn.Linear(8, 32), torch.nn.BatchNorm1d(32), torch.nn.ReLU(), torch.nn.Linear(32, 8)]
    model = treadle.from_torch(torch.nn.Sequential(*layers).eval(), (torch.zeros(2, 8),), dynamic={"input": "B _"})
    assert try_in_lab(shard_model(model, "tp=2", recipe="megatron")).passed


def test_a_lab_takes_blocks_that_are_written_and_refuses_others() -> None:
    declared = treadle.compile("gpt2", quantize="int4", layers=2, dim=64, heads=4, vocab=96).graph
    plan = shard_model(declared, "tp=2", recipe="megatron")
    assert try_in_lab(plan).passed
    assert not [note for note in plan.notes if "in blocks" in note]
    split = shard_model("gpt2", "tp=2", recipe="megatron", quantize="int4", layers=2, dim=64, heads=4, vocab=96)
    assert words(block_text(split, "h")) == ["all_reduce", "all_reduce"]
    declared = treadle.compile("gpt2", quantize="int8-weights", layers=2, dim=64, heads=4, vocab=96).graph
    plan = shard_model(declared, "tp=2", recipe="megatron")  # a row is a single block
    assert try_in_lab(plan).passed
    assert [note for note in plan.notes if "in blocks" in note] == [
        "heads: h.*.attn.out.weight is stored in blocks along dimension 1, which is replicated",
        "ffn: h.*.mlp.down.weight is stored in blocks along dimension 1, which is replicated",
    ]
    graph = recognized("llama")
    read = encode_parameters(graph, {"embed.weight": parse_encoding("q8_0")})
    with pytest.raises(UsageError, match="the lab cannot draw random weights in q8_0") as error:
        try_in_lab(shard(read, "dp=2", recipe="dp"))
    assert "widen=" in str(error.value)


def test_an_output_of_nan_alone_is_not_equal() -> None:
    """Else a trial of a model whose results are all NaN would pass, whatever the plan is."""
    some, none = np.array([np.nan, 1.0]), np.full(2, np.nan)
    assert _difference(some, some) == 0 and _difference(np.array([1.0, 1.0]), some) != 0
    assert _difference(none, none) == float("inf")

"""Sharding: plans by recipe and by hand, the programs of ranks, and the lab that holds them against the whole model."""

from __future__ import annotations

import re
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import treadle
from tests import wrong_shardings as wrong
from tests.random_shardings import difference, random_case
from tests.sharded_models import FAMILIES, numbers, recognized
from tests.stateful_graphs import blocks
from tests.test_encoded_weights import MODELS, drawn_inputs, drawn_weights, matrices
from treadle.cli.application import app
from treadle.ir.builder import Builder
from treadle.ir.encodings.encoding import parse_encoding
from treadle.ir.errors import GraphError, PassError, SizeError, TreadleError, UsageError
from treadle.ir.graph import Graph
from treadle.ir.interpreter import interpret
from treadle.ir.placement.machines import MACHINES, find_machine
from treadle.ir.placement.mesh import Mesh
from treadle.ir.placement.placements import parse_placement
from treadle.ir.transforms.encoded_weights import encode_parameters, encode_weights
from treadle.passes.framework.manager import PassManager
from treadle.passes.pipelines import RECOGNITION
from treadle.passes.sharding.checking import check_sharding
from treadle.passes.sharding.costs import Costs
from treadle.passes.sharding.placed_values import PlacedValues
from treadle.passes.sharding.plan import ShardingPlan, Share
from treadle.passes.sharding.plan_printing import plan_hash, plan_json
from treadle.passes.sharding.planning import plan_sharding
from treadle.passes.sharding.rank_programs import rank_program, rank_weights, refuse_small_sizes
from treadle.passes.sharding.recipes import RECIPES, shard
from treadle.passes.sharding.wanted import Wanted, vocabulary
from treadle.passes.sharding.whole_outputs import with_whole_outputs
from treadle.runtime.sharding_lab import run_lab
from treadle.sharding import device_needs, rank_graph, shard_model, try_in_lab

LARGE = ("megatron", "megatron-fsdp")
NEAR = 1e-11
"""Sums of some hundred float64 numbers near 1, in another order."""
EXACT = 1e-7
"""What a wrong plan is off by at least; numbers of weights are near 0.05."""

MESHES = ("tp=2", "tp=4", "tp=8", "dp=2", "dp=4", "dp=8", "tp=2,dp=2", "dp=2,tp=4", "cp=2", "cp=4", "cp=8", "tp=2,cp=2")
CASES = [
    (family, mesh, recipe)
    for family in FAMILIES
    for recipe, known in RECIPES.items()
    for mesh in MESHES
    if all(f"{axis}=" in mesh for axis in known.needs)
    and (family == FAMILIES[0] or {name for name, _ in Mesh.of(mesh).axes} <= {*known.axes.values()})
]
"""Of one family also meshes with an axis that the recipe leaves idle."""


def apart(family: str, plan: ShardingPlan, programs: list[Graph] | None = None) -> float:
    """How far the lab is from the whole model."""
    weights, inputs, wanted = numbers(family)
    found = run_lab(plan, inputs, weights, programs=programs).outputs
    return max(float(np.max(np.abs(found[n] - w) / max(1.0, np.max(np.abs(w))))) for n, w in wanted.items())


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
    assert ("projections(" in str(programs[-1])) == (recipe != "fsdp")  # what is gathered for use is no weight
    assert apart(family, plan, programs) < NEAR


def test_a_linear_graph_is_computed_exactly() -> None:
    """Whole numbers have no rounding, in whatever order they are added."""
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


# -- what recipes promise ----------------------------------------------------------------------------------------------


def block_text(plan: ShardingPlan, name: str) -> str:
    return block_text_of(plan, 0, name)


def block_text_of(plan: ShardingPlan, rank: int, name: str) -> str:
    text = str(rank_program(plan, rank))
    return text[text.index(f"block {name}(") : text.index("  main(")]


def words(text: str) -> list[str]:
    return re.findall(r"= (all_reduce|all_gather|reduce_scatter|all_to_all)\(", text)


@pytest.mark.parametrize(("family", "block"), [("gpt2", "h"), ("llama", "layer")])
def test_megatron_has_two_all_reduces_a_layer(family: str, block: str) -> None:
    plan = shard(recognized(family), "tp=4", recipe="megatron")
    text = block_text(plan, block)
    assert words(text) == ["all_reduce", "all_reduce"]
    assert 'over="tp", ways=4, because="the split of heads is summed"' in text
    assert 'over="tp", ways=4, because="the split of ffn is summed"' in text


def test_megatron_gathers_no_logits() -> None:
    plan = shard(recognized("gpt2"), "tp=2", recipe="megatron")
    text = str(rank_program(plan, 1))
    main = text[text.index("  main(") :]
    assert words(main) == ["all_reduce"]
    assert 'because="the split of vocab is summed"' in main
    assert "logits: f32[B, S, 19]" in main  # 37 over 2
    assert plan.main.gives[0].text(plan.mesh) == "[-, -, tp]"


@pytest.mark.parametrize(("family", "block"), [("gpt2", "h"), ("llama", "layer")])
def test_sequence_gathers_and_scatters_the_bytes_that_megatron_reduces(family: str, block: str) -> None:
    graph = recognized(family)
    sizes = {"B": 4, "S": 16}
    reduced = shard(graph, "tp=4", recipe="megatron", sizes=sizes)
    gathered = shard(graph, "tp=4", recipe="sequence", sizes=sizes)
    assert words(block_text(gathered, block)) == ["all_gather", "reduce_scatter"] * 2
    sent = [sum(c.sent for c in plan.collectives()) for plan in (reduced, gathered)]
    assert sent[0] == sent[1]
    norm = next(n for n in gathered.functions[0].nodes if n.node.op.name.endswith("norm"))
    assert norm.gives[0].text(gathered.mesh) == "[-, tp, -]"


def test_context_passes_keys_around_and_gathers_nothing() -> None:
    """Ring attention: rank 0 of 4 sees its own tokens alone, rank 3 those of all."""
    plan = shard(recognized("gpt2"), "cp=4", recipe="context", sizes={"B": 2, "S": 16})
    check_sharding(plan)
    made = plan.collectives()
    assert [c.op for c in made] == ["pass_on"] * (2 * 3 * 2), "keys and values, thrice, in two layers"
    assert {c.sent for c in made} == {2 * 4 * 32 * 4}
    first, last = (block_text_of(plan, rank, "h") for rank in (0, 3))
    assert [text.count("= attention_parts(") for text in (first, last)] == [1, 4]
    for text, own in ((first, [1, 0, 0, 0]), (last, [1, 1, 1, 1])):
        # what a rank has is on the way to the next one while the rank computes on it
        around = [[*["start_pass"] * 2 * (step < 3), *["attention_parts"] * own[step]] for step in range(4)]
        wanted = [*around[0], *(name for each in around[1:] for name in ("pass_on", "pass_on", *each))]
        assert re.findall(r"= (start_pass|pass_on|attention_parts)\(", text) == wanted
    assert "attention, keys pass around: " in str(plan)
    assert plan.main.gives[0].text(plan.mesh) == "[-, cp, -]"
    programs = [rank_graph(plan, rank) for rank in range(4)]
    assert apart("gpt2", plan, programs) < NEAR
    needs = device_needs(plan)
    assert sum(c.sent for c in needs.times.causes()) == sum(c.sent for c in made)


def test_a_ring_that_is_wrong_is_refused() -> None:
    plan = shard(recognized("gpt2"), "cp=2,dp=2", recipe="context")
    at = next(i for i, n in enumerate(plan.functions[0].nodes) if n.ring)

    def with_ring(axes: str) -> ShardingPlan:
        changed = changed_node(plan, 0, at, ring=plan.mesh.parts_of(axes))
        main = plan.main
        nodes = [replace(n, callee=changed.functions[0]) if n.callee is not None else n for n in main.nodes]
        return replace(changed, functions=(changed.functions[0], replace(main, nodes=tuple(nodes))))

    check_sharding(with_ring("cp"))
    for axes, told in (("", "needs all of"), ("dp", "not all of t"), ("cp dp", "not all of t")):
        with pytest.raises(PassError, match=told):
            check_sharding(with_ring(axes))
    norm = next(i for i, n in enumerate(plan.functions[0].nodes) if n.node.op.name == "layer_norm")
    with pytest.raises(PassError, match="no keys of layer_norm pass around"):
        check_sharding(changed_node(plan, 0, norm, ring=plan.mesh.parts_of("cp")))


def test_a_ring_needs_all_of_what_is_no_queries_and_no_keys() -> None:
    b = Builder(Graph("ring"))
    b.outputs(y=b.attention(*[b.input(name, "f32[2, 4, 8, 6]") for name in "qkv"], scale=1.0))
    plan = shard(b.graph, "cp=2,tp=2", axes={"q[2]": "cp"})
    cp, tp = (Share(plan.mesh.parts_of(axis)) for axis in ("cp", "tp"))

    def with_queries_and_keys(text: str, **others: Share) -> ShardingPlan:
        reads = tuple(parse_placement(each, plan.mesh) for each in (text, text, "[-, -, cp, -]"))
        (node,) = plan.main.nodes
        node = replace(node, moves=(), reads=reads, shares={"s": cp, "t": cp, **others}, ring=cp.over)
        return replace(plan, functions=(replace(plan.main, takes=reads, nodes=(node,)),))

    check_sharding(with_queries_and_keys("[-, -, cp, -]"))
    with pytest.raises(PassError, match="it needs all of d, and ranks have parts"):
        check_sharding(with_queries_and_keys("[-, -, cp, tp]", d=tp))


def test_fewer_key_heads_than_ranks_take_a_part_of_the_axis() -> None:
    plan = shard(recognized("llama"), "tp=8", recipe="megatron")
    assert plan.weights["layer.0.attn.q.weight"].text(plan.mesh) == "[tp, -]"
    assert plan.weights["layer.0.attn.k.weight"].text(plan.mesh) == "[tp:(1)4, -]"
    text = block_text(plan, "layer")
    assert "f32[B, heads=1, S, 4]" in text
    assert "f32[B, kv_heads=1, S, 4]" in text
    assert words(text) == ["all_reduce", "all_reduce"]
    assert any("4 are split over tp:(1)4 of tp" in note for note in plan.notes)


def test_heads_that_do_not_divide_are_split_by_whole_heads() -> None:
    plan = shard(recognized("gpt2"), "tp=3", axes={"heads": "tp"})
    assert plan.weights["h.0.attn.q.weight"].text(plan.mesh) == "[tp*4, -]"
    sizes = [rank_weights(plan, r, numbers("gpt2")[0])["h.0.attn.q.weight"].shape[0] for r in range(3)]
    assert sizes == [8, 12, 12]
    assert apart("gpt2", plan) < NEAR


def test_dp_needs_no_collective_and_fsdp_gathers_each_weight_where_it_is_used() -> None:
    graph = recognized("gpt2")
    assert shard(graph, "dp=4", recipe="dp").collectives() == []
    plan = shard(graph, "dp=4", recipe="fsdp")
    text = block_text(plan, "h")
    assert set(words(text)) == {"all_gather"}
    assert 'because="mlp.up.weight is stored in parts and gathered for use"' in text
    assert plan.weight_bytes() == pytest.approx(shard(graph, "dp=4", recipe="dp").weight_bytes() / 4, rel=0.05)


def test_a_machine_of_ones_own_is_planned_for(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = replace(find_machine("h100"), fast=1e6)
    graph = recognized("gpt2")
    monkeypatch.setitem(MACHINES, "mine", slow)
    plans = [shard(graph, "tp=2", recipe="megatron", device=device) for device in ("h100", slow, "mine")]
    seconds = [sum(c.seconds for c in plan.collectives()) for plan in plans]
    assert seconds[0] * 10 < seconds[1] == seconds[2]


def test_outputs_are_whole_on_every_rank_where_all_go_on_from_them() -> None:
    plan = shard(recognized("gpt2"), "tp=2,dp=2", recipe="megatron")
    whole = with_whole_outputs(plan)
    check_sharding(whole)
    assert [placed.text(plan.mesh) for placed in (*plan.main.gives, *whole.main.gives)] == ["[dp, -, tp]", "[-, -, -]"]
    more = whole.collectives()[len(plan.collectives()) :]
    assert [(c.op, c.because) for c in more] == [("all_gather", "output logits is whole")] * 2
    assert with_whole_outputs(whole) == whole
    logits = whole.main.function.outputs["logits"].type
    assert [rank_program(whole, rank).main.outputs["logits"].type for rank in range(4)] == [logits] * 4
    assert apart("gpt2", whole) < NEAR


@pytest.mark.parametrize(
    ("asked", "gathered"),
    [({"up[0]": "tp"}, ["output y is whole", "output w is whole"]), ({"batch": "tp"}, ["output y is whole"])],
)
def test_a_weight_that_is_an_output_is_whole_too(asked: dict[str, str], gathered: list[str]) -> None:
    b = Builder(Graph("returned"))
    x, w = b.input("x", "f32[B, 12]"), b.parameter("up", "f32[18, 12]")
    y = b.linear(x, w)
    b.outputs(y=y, w=w, again=w, x=x)
    whole = with_whole_outputs(shard(b.graph, "tp=2", axes=asked))
    check_sharding(whole)
    assert [c.because for c in whole.collectives()] == gathered
    weights, inputs = {"up": np.arange(216.0).reshape(18, 12)}, {"x": np.arange(36.0).reshape(3, 12)}
    wanted = {"y": inputs["x"] @ weights["up"].T, "w": weights["up"], "again": weights["up"], **inputs}
    np.testing.assert_equal(run_lab(whole, inputs, weights).outputs, wanted)


def test_what_is_gathered_for_use_already_is_gathered_once() -> None:
    b = Builder(Graph("returned"))
    w = b.parameter("up", "f32[18, 12]")
    b.outputs(y=b.linear(b.input("x", "f32[B, 12]"), w), w=w)
    whole = with_whole_outputs(shard(b.graph, "dp=2", recipe="fsdp"))
    check_sharding(whole)
    assert [c.because for c in whole.collectives()] == [
        "up is stored in parts and gathered for use",
        "output y is whole",
    ]


def test_without_a_node_no_weight_is_gathered() -> None:
    b = Builder(Graph("returned"))
    b.outputs(w=b.parameter("up", "f32[18, 12]"))
    with pytest.raises(PassError, match="output w is a weight in parts, and no node is there to gather it at"):
        with_whole_outputs(shard(b.graph, "tp=2", axes={"up[0]": "tp"}))


def test_what_is_planned_has_one_entry_and_a_size_for_each_symbol() -> None:
    mesh = Mesh.of("tp=2")
    stepped = blocks()
    with pytest.raises(PassError, match="what is sharded is a graph with one entry and no states"):
        plan_sharding(stepped, mesh, Wanted(), find_machine("h100"), {"B": 1, "S": 1})
    with pytest.raises(SizeError, match="costs need a size for B, S") as error:
        plan_sharding(recognized("gpt2"), mesh, Wanted(), find_machine("h100"), {})
    assert error.value.hint == "B=128"


def test_two_readers_of_a_weight_gather_it_once() -> None:
    """The table of tokens, which the logits read too; the first of them is a composite that gathers it in its body."""
    plan = shard(recognized("gpt2"), "dp=2", recipe="fsdp")
    gathered = [c for c in plan.collectives() if "wte.weight is stored in parts" in c.because]
    assert [(c.op, c.scope) for c in gathered] == [("all_gather", "wte")]
    assert apart("gpt2", plan) < NEAR


@pytest.mark.parametrize(("family", "block"), [("t5", "decoder_block"), ("bart", "decoder_layer")])
def test_what_all_layers_read_is_gathered_once_before_them(family: str, block: str) -> None:
    """An encoder's states, which lie in parts of their tokens and every decoder layer needs whole."""
    plan = shard(recognized(family), "tp=2", recipe="sequence")
    check_sharding(plan)
    before = [c for c in plan.collectives() if c.because == f"{block} needs all of sequence"]
    assert len(before) == 1
    assert words(block_text(plan, block)) == ["all_gather", "reduce_scatter"] * 3
    assert [f.name for f in plan.functions] == [*dict.fromkeys(f.function.name for f in plan.functions)]
    assert apart(family, plan) < NEAR


def test_a_bias_is_added_once() -> None:
    plan = shard(recognized("gpt2"), "tp=2", recipe="megatron")
    first, second = (str(rank_program(plan, rank)) for rank in range(2))
    assert "linear(merged, $attn.out.weight, $attn.out.bias)" in first
    assert "linear(merged, $attn.out.weight, $attn.out.bias)" not in second


def test_terms_are_added_before_they_are_combined() -> None:
    """Two products over a split axis meet in an addition: one all-reduce."""
    b = Builder(Graph("parallel"))
    x = b.input("x", "f32[B, 16]")
    y = b.linear(x, b.parameter("w", "f32[8, 16]")) + b.linear(b.gelu(x), b.parameter("v", "f32[8, 16]"))
    b.outputs(y=b.tanh(y))
    plan = shard(b.graph, "tp=4", axes={"x[1]": "tp", "w[1]": "tp", "v[1]": "tp"}, sizes={"B": 64})
    check_sharding(plan)
    assert [c.op for c in plan.collectives()] == ["all_reduce"]


def test_a_softmax_over_a_split_axis_reduces_a_maximum_and_a_sum() -> None:
    b = Builder(Graph("loss"))
    x = b.input("x", "f32[B, 64]")
    b.outputs(y=b.log_softmax(b.linear(x, b.parameter("w", "f32[1000, 64]"))))
    plan = shard(b.graph, "tp=4", axes={"w[0]": "tp"}, sizes={"B": 65536})
    check_sharding(plan)
    text = str(rank_program(plan, 0))
    assert words(text) == ["all_reduce", "all_reduce"]
    assert 'monoid="max"' in text
    assert plan.main.gives[0].text(plan.mesh) == "[-, tp]"


@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm"])
def test_a_norm_over_a_split_axis_has_the_eps_that_was_written(norm: str) -> None:
    """Its body holds eps in float32: 1e-3 is 1.000000047e-3 there, which float64 would tell apart."""
    b = Builder(Graph("norm"))
    y = b.linear(b.input("x", "f32[B, 64]"), b.parameter("w", "f32[256, 64]")) * 1e-2
    with b.scoped("norm"):
        b.outputs(y=getattr(b, norm)(y, b.parameter("g", "f32[256]"), eps=1e-3))
    plan = shard_model(b.graph, "tp=4", axes={"w[0]": "tp", "g[0]": "tp"}, sizes={"B": 65536})
    assert plan.main.gives[0].text(plan.mesh) == "[-, tp]"
    line = str(plan.main.nodes[-1].node.source)
    assert {(c.op, c.scope, c.line) for c in plan.collectives()} == {("all_reduce", "norm", line)}
    assert try_in_lab(plan).passed


def test_costs_decide_between_two_axes_that_want_one_mesh_axis() -> None:
    """Many rows: a small weight is not split but the rows are; few rows: the other way."""
    b = Builder(Graph("two"))
    x = b.input("x", "f32[B, 64]")
    w = b.parameter("w", "f32[64, 64]")
    b.outputs(y=b.linear(b.gelu(b.linear(x, w)), b.parameter("v", "f32[64, 64]")))
    for axes in ({"batch": "tp", "x[1]": "tp"}, {"x[1]": "tp", "batch": "tp"}):
        plan = shard(b.graph, "tp=4", axes=axes, sizes={"B": 4096})
        assert plan.main.gives[0].dims[0] is not None, axes


@pytest.mark.parametrize("recipe", ["megatron", "fsdp"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_weights_in_blocks_are_split_between_their_blocks(name: str, recipe: str) -> None:
    declared = MODELS[name].graph()
    graph = PassManager(RECOGNITION).run(encode_parameters(declared, matrices(declared, "q8_0"))).graph
    held, _ = drawn_weights(graph)
    inputs = drawn_inputs(graph)
    wanted = interpret(graph, inputs, held, float64=True)["logits"]
    plan = shard(graph, "tp=2,dp=2", recipe=recipe)
    check_sharding(plan)
    programs = [rank_graph(plan, rank) for rank in range(4)]
    found = run_lab(plan, inputs, held, programs=programs).outputs["logits"]
    assert float(np.max(np.abs(found - wanted))) < NEAR * float(np.max(np.abs(wanted)))
    layer = "h" if name == "gpt2" else "layer"
    parts = programs[0].parameters
    assert str(parts[f"{layer}.0.attn.q.weight"].type) == "f32[32, 64] as q8_0"
    down = plan.weights[f"{layer}.0.mlp.down.weight"].text(plan.mesh)
    assert down == ("[-, tp]" if recipe == "megatron" else "[dp, -]")  # its columns lie in blocks, which are not cut
    assert not [note for note in plan.notes if "in blocks" in note]


def test_parts_lie_between_blocks() -> None:
    """96 columns in blocks of 32 over 2 ranks are 32 and 64, and so are the rows that make what they multiply."""
    b = Builder(Graph("blocks"))
    up, down = b.parameter("up", "f32[96, 64]"), b.parameter("down", "f32[64, 96]")
    b.outputs(y=b.linear(b.gelu(b.linear(b.input("x", "f32[B, 64]"), up)), down))
    graph = encode_parameters(b.graph, {"down": parse_encoding("int4_groups(32)")})
    plan = shard_model(graph, "tp=2", axes={"down[1]": "tp"})
    placed = [plan.weights[name].text(plan.mesh) for name in ("up", "down")]
    assert placed == ["[tp*32, -]", "[-, tp*32]"]
    assert [c.op for c in plan.collectives()] == ["all_reduce"]
    weights = encode_weights(graph, {n: np.random.default_rng(0).normal(size=s) for n, s in SHAPES.items()})
    parts = [rank_weights(plan, rank, weights)["down"].shape for rank in range(2)]
    assert parts == [(64, 18), (64, 36)]  # bytes
    assert try_in_lab(plan, weights=weights).passed
    cut = replace(plan, weights={**plan.weights, "down": parse_placement("[-, tp]", plan.mesh)})
    main = replace(plan.main, takes=(plan.main.takes[0], plan.main.takes[1], cut.weights["down"]))
    with pytest.raises(PassError, match=r"cuts through a block"):
        check_sharding(replace(cut, functions=(*plan.functions[:-1], main)))


@pytest.mark.parametrize(
    "options", [{"dtype": "bf16"}, {"quantize": "int8-weights"}, {"dtype": "bf16", "quantize": "int4"}]
)
@pytest.mark.parametrize(
    ("mesh", "recipe"), [("tp=2", "megatron"), ("tp=2", "sequence"), ("tp=2,dp=2", "megatron-fsdp")]
)
def test_models_in_fewer_bits_are_split_as_others_are(options: dict[str, str], mesh: str, recipe: str) -> None:
    plan = shard_model("gpt2", mesh, recipe=recipe, layers=2, dim=64, heads=4, vocab=96, context=32, **options)
    assert try_in_lab(plan).passed
    assert device_needs(plan).weights < device_needs(shard_model("gpt2", mesh, recipe=recipe, layers=2)).weights / 2


def test_what_is_made_of_a_weight_stays_split_as_the_weight_and_is_gathered_in_fewer_bits() -> None:
    """Weights in bf16 are cast in parts: megatron gathers none of them, and fsdp sends half as much."""
    small: dict[str, Any] = {"layers": 2, "dim": 64, "heads": 4, "vocab": 96, "context": 32}
    reduced = shard_model("gpt2", "tp=2", recipe="megatron", dtype="bf16", **small)
    assert words(block_text(reduced, "h")) == ["all_reduce", "all_reduce"]
    sent = {}
    for dtype in ("f32", "bf16"):
        plan = shard_model("gpt2", "dp=2", recipe="fsdp", dtype=dtype, **small)
        because = "mlp.up.weight is stored in parts and gathered for use"
        sent[dtype] = [c.sent for c in plan.collectives() if c.because == because]
    assert [2 * count for count in sent["bf16"]] == sent["f32"] != []


def test_sizes_keep_to_their_bounds() -> None:
    plan = shard_model("gpt2", "tp=2", recipe="megatron", layers=1, dim=16, heads=2, vocab=40, context=12)
    assert plan.sizes == {"B": 1, "S": 12}
    assert device_needs(plan).fits


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
    """Equal parts: what the plan says each collective is about is what ranks meet with, in elements of float32."""
    weights, inputs, _ = numbers("gpt2")
    graph = recognized("gpt2")
    rows, tokens = inputs["tokens"][:8].shape
    for recipe in ("megatron", "sequence"):
        plan = shard(graph, "tp=4", recipe=recipe, sizes={"B": rows, "S": 8})
        found = run_lab(plan, {"tokens": inputs["tokens"][:8, :8]}, weights)
        assert sorted(4 * n for _, n in found.meetings) == sorted(c.payload for c in plan.collectives())
    assert tokens > 8


def test_json_holds_placements_that_read_back_and_a_hash_tells_plans_apart() -> None:
    graph = recognized("llama")
    plan = shard(graph, "tp=8", recipe="sequence")
    told = plan_json(plan)
    placements = [text for f in told["functions"] for n in f["nodes"] for text in n["gives"]]
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


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "nothing says how to split"),
        ({"recipe": "zero"}, "unknown recipe 'zero'"),
        ({"recipe": "dp"}, "recipe dp splits over a mesh axis dp, which the mesh has not"),
        ({"axes": {"experts": "tp"}}, "gpt2 has no axis 'experts' to split"),
        ({"axes": {"heads": "ep"}}, "the mesh tp=2 has no axis 'ep'"),
        ({"axes": {"wte.bias[0]": "tp"}}, "no axis 'wte.bias"),
        ({"recipe": "megatron", "device": "tpu"}, "unknown device 'tpu'"),
    ],
)
def test_what_cannot_be_planned_is_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        shard(recognized("gpt2"), "tp=2", **options)


def test_a_rank_that_there_is_not_is_refused() -> None:
    plan = shard(recognized("gpt2"), "tp=2", recipe="megatron")
    with pytest.raises(PassError, match="the mesh tp=2 has no rank 2"):
        rank_program(plan, 2)


# -- wrong plans -------------------------------------------------------------------------------------------------------

CHANGES = {
    "without terms combined": wrong.without_terms,
    "along another axis": wrong.along_another_axis(Mesh.of("tp=2,dp=2").parts_of("dp")),
    "by another monoid": wrong.by_another_monoid,
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
                continue  # ranks that do not meet, or parts that do not fit
            assert far > EXACT
    assert found


def test_what_is_had_in_two_placements_moves_from_the_nearer_one() -> None:
    """Of blocks from the one that it can move from at all."""
    mesh, b = Mesh.of("tp=4"), Builder(Graph("g"))
    rows, columns, whole = (parse_placement(text, mesh) for text in ("[tp, -]", "[-, tp]", "[-, -]"))
    values = PlacedValues(Costs(mesh, find_machine("h100"), {"B": 8}), Wanted())
    x, w = b.input("x", "f32[B, 16]").value, b.parameter("w", "f32[64, 64] as q8_0").value
    values.had |= {x: [rows, whole], w: [columns, rows]}
    assert values.conversion_to(x, columns)[1] == whole
    assert values.conversion_to(w, whole)[1] == rows


def test_what_is_read_twice_moves_once_and_what_comes_after_it_too() -> None:
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


def changed_node(plan: ShardingPlan, function: int, at: int, **changes: Any) -> ShardingPlan:
    """A plan in which one node of a function that nothing calls is another."""
    functions = list(plan.functions)
    nodes = list(functions[function].nodes)
    nodes[at] = replace(nodes[at], **changes)
    functions[function] = replace(functions[function], nodes=tuple(nodes))
    return replace(plan, functions=tuple(functions))


@pytest.mark.parametrize(
    ("at", "changed", "told"),
    [
        (1, "reads", r"the plan has no linear in \[tp, -\]"),
        (0, "gives", "linear: linear does not lie as planned"),
    ],
)
def test_a_program_is_not_made_by_a_plan_that_does_not_fit(at: int, changed: str, told: str) -> None:
    b = Builder(Graph("alone"))
    b.outputs(y=b.tanh(b.linear(b.input("x", "f32[8, 12]"), b.parameter("w", "f32[16, 12]"))))
    plan = shard(b.graph, "tp=2", axes={"w[0]": "tp"})
    elsewhere = (parse_placement("[tp, -]", plan.mesh),)
    with pytest.raises(PassError, match=told):
        rank_program(changed_node(plan, 0, at, **{changed: elsewhere}), 1)


def test_factors_that_are_not_split_as_values_lie_are_refused() -> None:
    """Programs of ranks are made by them: a look-up in a part of a table as if it were whole gives other rows."""
    plan = shard(recognized("gpt2"), "tp=2,dp=2", recipe="megatron")
    main = len(plan.functions) - 1
    split = [i for i, node in enumerate(plan.main.nodes) if node.shares]
    assert any(plan.main.nodes[i].node.op.name == "embedding" for i in split)
    for at in split:
        shares = plan.main.nodes[at].shares
        beside = {name: replace(share, over=plan.mesh.parts_of("dp tp")) for name, share in shares.items()}
        for other in ({}, beside, {**shares, "nothing": next(iter(shares.values()))}):
            with pytest.raises(PassError, match=r"rank \d+ works on|a factor that nothing of it has"):
                check_sharding(changed_node(plan, main, at, shares=other))
    whole = [i for i, node in enumerate(plan.main.nodes) if node.callee is not None]
    shares = plan.main.nodes[split[0]].shares
    with pytest.raises(PassError, match="has no factors of its own"):
        check_sharding(changed_node(plan, main, whole[0], shares=shares))


def test_weights_that_are_stored_in_another_way_than_they_are_taken_are_refused() -> None:
    plan = shard(recognized("gpt2"), "tp=2", recipe="megatron")
    name = "h.0.attn.q.weight"
    turned = {**plan.weights, name: parse_placement("[-, tp]", plan.mesh)}
    missing = {n: placed for n, placed in plan.weights.items() if n != name}
    for weights in (turned, missing, {**plan.weights, "other": plan.weights[name]}):
        with pytest.raises(PassError, match=r"weight (h\.0\.attn\.q\.weight|other) is not stored as it is taken"):
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
    with pytest.raises(GraphError, match="the system starts no more threads"):
        apart("gpt2", shard(recognized("gpt2"), "tp=2", recipe="megatron"))
    assert not started[0].is_alive()


SHAPES = {"up": (96, 64), "down": (64, 96)}


def meeting(rank: int, **attributes: Any) -> Graph:
    b = Builder(Graph("alone"))
    x = b.input("tokens", "f32[B, 4]")
    name = attributes.pop("name", "all_reduce")
    b.outputs(y=b.apply(name, x, over="tp", ways=2, **attributes) if name else x)
    return b.graph


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"name": "all_gather", "axis": 1, "size": 8}, "ranks 0 and 1 meet in different collectives"),
        ({"monoid": "max"}, "ranks 0 and 1 meet in different collectives"),
        ({"name": ""}, "ranks wait for others that do not come"),
    ],
)
def test_ranks_that_do_not_meet_are_told_and_nobody_waits(other: dict[str, Any], told: str) -> None:
    b = Builder(Graph("alone"))
    b.outputs(y=b.tanh(b.input("tokens", "f32[B, 4]")))
    plan = shard(b.graph, "tp=2", axes={"tokens[0]": "tp"})
    with pytest.raises(GraphError, match=told):
        run_lab(plan, {"tokens": np.ones((2, 4))}, {}, programs=[meeting(0), meeting(1, **other)])


# -- any graph ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(60))
def test_any_graph_split_in_any_way_computes_the_same(seed: int) -> None:
    """tests/fuzz/shardings.py runs as many as one likes."""
    case = random_case(seed)
    assert difference(case, case.plan(), merged=seed % 2 == 0) < 1e-10


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
    assert tried.meetings == 3
    assert "equal" in str(tried)


def test_a_lab_takes_blocks_that_are_written_and_refuses_others() -> None:
    declared = treadle.compile("gpt2", quantize="int4", layers=2, dim=64, heads=4, vocab=96).graph
    plan = shard_model(declared, "tp=2", recipe="megatron")
    assert try_in_lab(plan).passed
    assert not [note for note in plan.notes if "in blocks" in note]
    split = shard_model("gpt2", "tp=2", recipe="megatron", quantize="int4", layers=2, dim=64, heads=4, vocab=96)
    assert words(block_text(split, "h")) == ["all_reduce", "all_reduce"]
    declared = treadle.compile("gpt2", quantize="int8-weights", layers=2, dim=64, heads=4, vocab=96).graph
    plan = shard_model(declared, "tp=2", recipe="megatron")  # a block is a whole row
    assert try_in_lab(plan).passed
    assert [note for note in plan.notes if "in blocks" in note] == [
        "heads: h.*.attn.out.weight is held in blocks along dimension 1, and whole there",
        "ffn: h.*.mlp.down.weight is held in blocks along dimension 1, and whole there",
    ]
    graph = recognized("llama")
    read = encode_parameters(graph, {"embed.weight": parse_encoding("q8_0")})
    with pytest.raises(UsageError, match="the lab draws no blocks of q8_0") as error:
        try_in_lab(shard(read, "dp=2", recipe="dp"))
    assert "widen=" in str(error.value)


@pytest.mark.parametrize(
    ("mesh", "axes", "sizes", "what"),
    [
        (2, None, None, "a mesh is a text or a Mesh"),
        ({"tp": 2}, None, None, "a mesh is a text or a Mesh"),
        ("tp=2", "heads=tp", None, "axes are a mapping"),
        ("tp=0", None, None, "a mesh has 1 to 131,072 ranks"),
        ("tp=2,tp=2", None, None, "the mesh has two axes tp"),
        ("tp=13", {"heads": "tp"}, None, "heads: 12 cannot be split over tp"),
        ("tp=2", {"rows": "tp"}, None, "gpt2 has no axis 'rows' to split"),
        ("tp=2", None, {"S": 5000}, "S cannot be 5000"),
        ("tp=2", None, {"Q": 5}, "gpt2 has no symbolic axis Q"),
    ],
)
def test_a_wrong_argument_has_a_way_out(mesh: Any, axes: Any, sizes: Any, what: str) -> None:
    with pytest.raises(UsageError, match=what) as error:
        shard_model("gpt2", mesh, recipe="megatron", axes=axes, sizes=sizes, layers=1)
    assert error.value.hint


def test_the_vocabulary_is_one_dimension_of_a_weight() -> None:
    """Also of one that is square."""
    b = Builder(Graph("square"))
    x = b.embedding(b.parameter("w", "f32[8, 8]"), b.input("tokens", "i64[B, S]"))
    b.outputs(y=b.linear(b.exp(x), b.parameter("u", "f32[8, 8]")))
    assert vocabulary(b.graph) == ["w[0]", "u[0]"]


def test_as_many_ranks_as_heads_have_one_each() -> None:
    plan = shard_model("gpt2", "tp=12", axes={"heads": "tp"}, layers=1)
    assert plan.weights["h.0.attn.q.weight"].text(plan.mesh) == "[tp, -]"
    assert plan.notes == ()


def test_plans_over_many_ranks_are_checked_without_a_look_at_each_rank() -> None:
    """A mapped axis that is split alike everywhere is so for any number of ranks."""
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

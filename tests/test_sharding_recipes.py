"""Guarantees of sharding recipes: the collectives of a layer, and the weights that are split, gathered or whole."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.lab_checks import NEAR, apart, block_text, block_text_of, words
from tests.sharded_models import numbers, recognized
from tests.stateful_graphs import blocks
from tests.test_encoded_weights import MODELS, drawn_inputs, drawn_weights, matrices
from tests.wrong_shardings import changed_node
from treadle.ir.builder import Builder
from treadle.ir.encodings.encoding import parse_encoding
from treadle.ir.errors import PassError, SizeError
from treadle.ir.graph import Graph
from treadle.ir.hardware import HARDWARE, add_hardware, find_hardware
from treadle.ir.interpreter import interpret
from treadle.ir.placement.mesh import Mesh
from treadle.ir.placement.placements import parse_placement
from treadle.ir.transforms.encoded_weights import encode_parameters, encode_weights
from treadle.passes.framework.manager import PassManager
from treadle.passes.pipelines import RECOGNITION
from treadle.passes.sharding.checking import check_sharding
from treadle.passes.sharding.plan import ShardingPlan, Share
from treadle.passes.sharding.planning import plan_sharding
from treadle.passes.sharding.rank_programs import rank_program, rank_weights
from treadle.passes.sharding.recipes import shard
from treadle.passes.sharding.wanted import Wanted, vocabulary
from treadle.passes.sharding.whole_outputs import with_whole_outputs
from treadle.runtime.sharding_lab import run_lab
from treadle.sharding import device_needs, rank_graph, shard_model, try_in_lab


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
    assert "logits: f32[B, S, 19]" in main  # 37 over 2 ranks
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
    """Ring attention: rank 0 of 4 sees only its own tokens, rank 3 sees all ranks' tokens."""
    plan = shard(recognized("gpt2"), "cp=4", recipe="context", sizes={"B": 2, "S": 16})
    check_sharding(plan)
    made = plan.collectives()
    assert [c.op for c in made] == ["pass_on"] * (2 * 3 * 2), "keys and values, thrice, in two layers"
    assert {c.sent for c in made} == {2 * 4 * 32 * 4}
    first, last = (block_text_of(plan, rank, "h") for rank in (0, 3))
    assert [text.count("= attention_parts(") for text in (first, last)] == [1, 4]
    for text, own in ((first, [1, 0, 0, 0]), (last, [1, 1, 1, 1])):
        # a rank's keys are sent to the next rank while it computes on them
        around = [[*["start_pass"] * 2 * (step < 3), *["attention_parts"] * own[step]] for step in range(4)]
        wanted = [*around[0], *(name for each in around[1:] for name in ("pass_on", "pass_on", *each))]
        assert re.findall(r"= (start_pass|pass_on|attention_parts)\(", text) == wanted
    assert "attention, as ring attention: " in str(plan)
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
    for axes, report in (
        ("", "needs all of"),
        ("dp", "do not cover t exactly once"),
        ("cp dp", "do not cover t exactly once"),
    ):
        with pytest.raises(PassError, match=report):
            check_sharding(with_ring(axes))
    norm = next(i for i, n in enumerate(plan.functions[0].nodes) if n.node.op.name == "layer_norm")
    with pytest.raises(PassError, match="layer_norm does not support ring attention"):
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
    with pytest.raises(PassError, match="it needs all of d, but ranks have only parts"):
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


def test_a_recipe_that_splits_nothing_says_so() -> None:
    b = Builder(Graph("plain"))
    b.outputs(y=b.relu(b.input("x", "f32[B, 3]")))
    plan = shard(b.graph, "tp=4", recipe="megatron")
    assert plan.axes == {}
    idle = "nothing is split over tp: its 4 ranks compute the same; plain has no axis heads or ffn or vocab"
    assert plan.notes == (idle,)
    text = str(plan).splitlines()
    assert text[:2] == ["sharding of plain over tp=4, 4 ranks, megatron: nothing", f"note: {idle}"]
    assert shard(b.graph, "dp=4", recipe="dp").notes == shard(b.graph, "tp=1", recipe="megatron").notes == ()


def test_a_mesh_axis_that_splits_nothing_is_named() -> None:
    graph = recognized("gpt2")
    for mesh, recipe, idle in (
        ("dp=2,tp=2", "dp", ["tp"]),
        ("pp=2,zz=2", "gpipe", ["zz"]),
        ("tp=2,dp=2", "megatron", []),
        ("dp=2", "fsdp", []),
        ("pp=2,tp=2", "gpipe", []),
        ("cp=2,tp=2", "context", []),
    ):
        plan = shard(graph, mesh, recipe=recipe)
        assert plan.idle_axes == idle
        assert [note for note in plan.notes if note.startswith("nothing is split over")] == [
            f"nothing is split over {name}: its 2 ranks compute the same" for name in idle
        ]
    assert shard(graph, "tp=3,dp=2", axes={"heads": "tp"}).idle_axes == ["dp"]


def test_a_machine_of_ones_own_is_planned_for(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = replace(find_hardware("h100"), fast=1e6)
    graph = recognized("gpt2")
    monkeypatch.setattr("treadle.ir.hardware.HARDWARE", dict(HARDWARE))
    add_hardware(replace(HARDWARE["h100"], name="mine", fast=1e6))
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


def test_weights_with_several_readers_are_gathered_once() -> None:
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
    with pytest.raises(PassError, match="output w is a weight in parts, but there is no node at which to gather it"):
        with_whole_outputs(shard(b.graph, "tp=2", axes={"up[0]": "tp"}))


def test_plans_need_one_entry_and_a_size_for_each_symbol() -> None:
    mesh = Mesh.of("tp=2")
    stepped = blocks()
    with pytest.raises(PassError, match="only a graph with one entry and no states can be sharded"):
        plan_sharding(stepped, mesh, Wanted(), find_hardware("h100"), {"B": 1, "S": 1})
    with pytest.raises(SizeError, match="cost estimates need sizes for B, S") as error:
        plan_sharding(recognized("gpt2"), mesh, Wanted(), find_hardware("h100"), {})
    assert error.value.hint == "B=128"


def test_two_readers_of_a_weight_gather_it_once() -> None:
    """The weight is the token table, which the logits read too. The first reader is a composite, whose body gathers the
    table.
    """
    plan = shard(recognized("gpt2"), "dp=2", recipe="fsdp")
    gathered = [c for c in plan.collectives() if "wte.weight is stored in parts" in c.because]
    assert [(c.op, c.scope) for c in gathered] == [("all_gather", "wte")]
    assert apart("gpt2", plan) < NEAR


@pytest.mark.parametrize(("family", "block"), [("t5", "decoder_block"), ("bart", "decoder_layer")])
def test_weights_of_all_layers_are_gathered_once_before_them(family: str, block: str) -> None:
    """The value is an encoder's states, which are split by tokens; every decoder layer needs them whole."""
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
    """Two products over a split axis are added, so one all-reduce is enough."""
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
    """The norm's body holds eps in float32, where 1e-3 is 1.000000047e-3, which differs in float64."""
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
    """With many rows, the rows are split and a small weight is not; with few rows, the weight is split."""
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
    assert down == ("[-, tp]" if recipe == "megatron" else "[dp, -]")  # the columns are in blocks, which are not split
    assert not [note for note in plan.notes if "in blocks" in note]


def test_parts_lie_between_blocks() -> None:
    """96 columns in blocks of 32 are split over 2 ranks as 32 and 64, and so are the rows that produce the operand."""
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
    assert parts == [(64, 18), (64, 36)]  # sizes in bytes
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


def test_values_derived_from_a_weight_stay_split_and_are_gathered_in_fewer_bits() -> None:
    """Weights are split, and cast to bf16 in parts: megatron gathers none of them, and fsdp sends half the bytes."""
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


SHAPES = {"up": (96, 64), "down": (64, 96)}


def test_the_vocabulary_is_one_dimension_of_a_weight() -> None:
    """This also holds for a square weight."""
    b = Builder(Graph("square"))
    x = b.embedding(b.parameter("w", "f32[8, 8]"), b.input("tokens", "i64[B, S]"))
    b.outputs(y=b.linear(b.exp(x), b.parameter("u", "f32[8, 8]")))
    assert vocabulary(b.graph) == ["w[0]", "u[0]"]


def test_each_rank_has_one_head_if_there_are_as_many_ranks() -> None:
    plan = shard_model("gpt2", "tp=12", axes={"heads": "tp"}, layers=1)
    assert plan.weights["h.0.attn.q.weight"].text(plan.mesh) == "[tp, -]"
    assert plan.notes == ()

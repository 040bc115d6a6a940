"""The zoo's model declarations: the structure of their graphs, and the errors for unknown options."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any, TypeVar

import pytest

import treadle.frontends.language as t
from treadle.frontends.rotary import Dynamic, Yarn
from treadle.ir.analysis.following import follow
from treadle.ir.errors import CheckpointError, FrontendError, UsageError
from treadle.ir.text.parser import parse_graph
from treadle.ir.text.printer import print_graph
from treadle.models.albert import albert
from treadle.models.bart import bart
from treadle.models.bert import HEADS, bert
from treadle.models.clip import clip, clip_text, clip_vision
from treadle.models.dinov2 import dinov2
from treadle.models.distilbert import HEADS as DISTILBERT_HEADS
from treadle.models.distilbert import distilbert
from treadle.models.electra import electra
from treadle.models.family import (
    choose,
    choose_architecture,
    count_labels,
    read_flag,
    read_float,
    read_int,
    read_layers,
)
from treadle.models.gpt2 import gpt2
from treadle.models.gpt_neox import gpt_neox
from treadle.models.idefics3 import idefics3
from treadle.models.llama import llama
from treadle.models.llava import llava
from treadle.models.marian import marian
from treadle.models.modernbert import modernbert
from treadle.models.mpnet import mpnet
from treadle.models.opt import opt
from treadle.models.qwen2_vl import qwen2_vl, qwen2_vl_vision
from treadle.models.reading.llama_config import read_multiplier
from treadle.models.reading.rotary_config import read_factor, read_factors
from treadle.models.registry import family_names, family_of, find_family
from treadle.models.roberta import roberta
from treadle.models.siglip import siglip, siglip_text, siglip_vision
from treadle.models.t5 import t5, t5_encoder
from treadle.models.transformer import transformer
from treadle.models.vit import HEADS as VIT_HEADS
from treadle.models.vit import vit
from treadle.models.whisper import whisper, whisper_encoder
from treadle.resolving import resolve

SMALL = {"vocab": 11, "dim": 12, "heads": 3, "head_dim": 5, "hidden": 20, "layers": 4, "decoder_layers": 3}

IMAGE = {"channels": 2, "height": 8, "width": 12, "patch": 4}
IMAGE_SIDES = {name: IMAGE[name] for name in ("channels", "height", "width")}
SMALL_TEXT = {"vocab": 11, "dim": 12, "heads": 3, "head_dim": 6, "hidden": 20}


def small(model: t.Model, **config: Any) -> t.Model:
    """Return the model with small sizes and all of its optional inputs."""
    sizes = {name: size for name, size in SMALL.items() if name in model.defaults}
    optional = tuple(i.name for i in model.declared_inputs if i.optional)
    return model.configure(**{"inputs": optional, **sizes, **config})


Other = TypeVar("Other")

ZOO: dict[str, tuple[t.Model, dict[str, int]]] = {
    "gpt2": (small(gpt2, inputs=()), {"h": 4}),
    "gpt2 classifier": (small(gpt2, head="classifier"), {"h": 4}),
    **{f"bert {head}": (small(bert, head=head), {"layer": 4}) for head in (None, *HEADS)},
    **{f"roberta {head}": (small(roberta, head=head), {"layer": 4}) for head in (None, *HEADS)},
    **{f"distilbert {head}": (small(distilbert, head=head), {"layer": 4}) for head in (None, *DISTILBERT_HEADS)},
    **{f"albert {head}": (small(albert, embedding=6, head=head), {"layer": 4}) for head in (None, *HEADS)},
    **{f"vit {head}": (small(vit, **IMAGE, head=head), {"layer": 4}) for head in (None, *VIT_HEADS[:2])},
    "vit distilled": (small(vit, **IMAGE, distilled=True, head="distilled_classifier"), {"layer": 4}),
    "electra": (small(electra, embedding=6, head="discriminator"), {"layer": 4}),
    "mpnet": (small(mpnet), {"layer": 4}),
    "modernbert": (
        small(modernbert, heads=2, window=4, head="classifier", pooling="mean"),
        {"layer": 1, "layer_2": 2, "layer_3": 1},
    ),
    "dinov2": (small(dinov2, channels=2, height=8, width=12, patch=4, grid=3), {"layer": 4}),
    "siglip_text": (small(siglip_text, projection=6), {"layer": 4}),
    "siglip_vision": (small(siglip_vision, **IMAGE), {"layer": 4}),
    "siglip": (
        small(
            siglip,
            text={"dim": 12, "heads": 3, "layers": 2, "projection": 12},
            vision={"dim": 12, "heads": 3, "hidden": 20, "layers": 3},
        ),
        {"text_layer": 2, "vision_layer": 3},
    ),
    "clip_text": (small(clip_text, end=3), {"layer": 4}),
    "clip_vision": (small(clip_vision, **IMAGE, projection=6), {"layer": 4}),
    "clip": (
        small(clip, projection=6, text={"dim": 12, "heads": 3, "layers": 2}, vision={"dim": 12, "heads": 3}),
        {"text_layer": 2, "vision_layer": 12},
    ),
    "llama": (small(llama, head_dim=6), {"layer": 4}),
    "llama, all options": (
        small(llama, head_dim=6, tied=True, window=3, scaling=Dynamic(2.0, 8), rotary_dims=4, norm_offset=1.0),
        {"layer": 4},
    ),
    "llama, windows beside full layers": (
        small(
            llama,
            head_dim=6,
            window=3,
            full_layers=(1, 3),
            window_base=500.0,
            norm_place="both",
            qk_norm="heads",
            softcap=3.0,
            logit_softcap=2.0,
            scale=0.3,
            embedding_scale=2.0,
        ),
        {"layer": 2, "layer_2": 2},
    ),
    "llama, norms after": (
        small(llama, head_dim=4, norm_place="after", qk_norm="whole", scaling=Yarn(2.0, 8, temperature=1.5)),
        {"layer": 4},
    ),
    "llama, layer norms": (small(llama, head_dim=6, layer_norms=True, qkv_bias=True, rotary_dims=4), {"layer": 4}),
    "gpt_neox": (small(gpt_neox, dim=24, rotary_dims=4), {"layer": 4}),
    "gpt_neox, one norm": (
        small(
            gpt_neox,
            dim=24,
            rotary_dims=4,
            kv_heads=1,
            mlp_norm=False,
            qk_norm=True,
            layout="interleaved",
            head_bias=True,
        ),
        {"layer": 4},
    ),
    "gpt_neox, serial": (small(gpt_neox, rotary_dims=None, parallel=False, tied=True), {"layer": 4}),
    "opt": (small(opt), {"layer": 4}),
    "opt, norms after": (small(opt, embedding=7, norm_before=False, last_norm=False), {"layer": 4}),
    "t5": (small(t5), {"encoder_block": 4, "decoder_block": 3}),
    "t5 gated": (small(t5, gated=True, tied=False), {"encoder_block": 4, "decoder_block": 3}),
    "t5_encoder": (small(t5_encoder), {"encoder_block": 4}),
    "transformer": (small(transformer), {"encoder_layer": 4, "decoder_layer": 4}),
    "bart": (small(bart, encoder_layers=4, encoder_heads=4), {"encoder_layer": 4, "decoder_layer": 3}),
    "bart hidden": (small(bart, logits=False), {"encoder_layer": 6, "decoder_layer": 3}),
    "marian": (small(marian, encoder_heads=4, decoder_heads=2), {"encoder_layer": 6, "decoder_layer": 3}),
    "marian, two vocabularies": (
        small(marian, decoder_vocab=13, encoder_heads=4, decoder_heads=2),
        {"encoder_layer": 6, "decoder_layer": 3},
    ),
    "whisper": (small(whisper), {"encoder_layer": 4, "decoder_layer": 3}),
    "whisper_encoder": (small(whisper_encoder), {"encoder_layer": 4}),
    "llava": (
        small(
            llava,
            text={**SMALL_TEXT, "layers": 3},
            vision={"dim": 12, "heads": 3, "hidden": 20, "layers": 2, **IMAGE},
            **IMAGE_SIDES,
        ),
        {"vision_layer": 2, "text_layer": 3},
    ),
    "idefics3": (
        small(
            idefics3,
            text={**SMALL_TEXT, "layers": 3},
            vision={"dim": 12, "heads": 3, "hidden": 20, "layers": 2, "patch": 4},
            shuffle=1,
            **IMAGE_SIDES,
        ),
        {"vision_layer": 2, "text_layer": 3},
    ),
    "qwen2_vl": (
        small(
            qwen2_vl,
            width=24,
            sections=(1, 1, 1),
            text={**SMALL_TEXT, "layers": 3},
            vision={"dim": 12, "heads": 3, "layers": 2, "hidden": 20, "patch": 2},
        ),
        {"vision_layer": 2, "text_layer": 3},
    ),
    "qwen2_vl_vision": (
        small(qwen2_vl_vision, width=24, patch=2, window=2, full_layers=(1, 3), gated=True, out=6),
        {"layer": 4},
    ),
}
"""Every declaration, with the number of calls of each function of its graph except main."""


def in_turns(others: Sequence[Other]) -> list[tuple[str, Other]]:
    """Return pairs of a declaration and one of `others`, such as backends: all pairs for the first declaration of a
    model; those with other heads and options take turns.
    """
    pairs: list[tuple[str, Other]] = []
    paired = set()
    for number, (name, (model, _)) in enumerate(ZOO.items()):
        some = [others[number % len(others)]] if model.name in paired else others
        paired.add(model.name)
        pairs += [(name, other) for other in some]
    return pairs


def test_every_family_is_here() -> None:
    declared = {model.name for model, _ in ZOO.values()}
    assert {find_family(name).model.name for name in family_names()} <= declared
    for name in family_names():
        family = find_family(name)
        assert family.name == name
        assert all(family_of({"model_type": kind}) is family for kind in family.model_types)


@pytest.mark.parametrize("name", ZOO)
def test_blocks_are_functions(name: str) -> None:
    """A stack becomes one function, called once for each block, at any depth: all blocks are equal."""
    model, expected = ZOO[name]
    graph = model.graph()
    calls = [node.op.callee for node in graph.main.nodes if node.op.callee is not None]
    assert {function: calls.count(function) for function in graph.functions if function != "main"} == expected


@pytest.mark.parametrize("name", ZOO)
def test_prints_and_parses(name: str) -> None:
    graph = ZOO[name][0].graph()
    text = print_graph(graph)
    again = parse_graph(text)
    assert again == graph
    assert print_graph(again) == text
    assert again != ZOO["gpt2" if name != "gpt2" else "t5"][0].graph()


@pytest.mark.parametrize("name", [name for name, (model, _) in ZOO.items() if "eps" in model.defaults])
def test_every_norm_has_the_eps_of_the_model(name: str) -> None:
    graph = ZOO[name][0].configure(eps=0.125).graph()
    found = [node.op.attributes["eps"] for _, node in graph.walk() if "eps" in node.op.attributes]
    assert found and set(found) == {0.125}


@pytest.mark.parametrize("head", HEADS)
def test_rows_of_a_head_may_be_packed(head: str) -> None:
    """The pooler's first token is selected by an index into a row, not by a slice of the batch."""
    verdict = follow(ZOO[f"bert {head}"][0].graph(), "S").pack()
    assert verdict, str(verdict)


@pytest.mark.parametrize(
    ("name", "option", "parameter"),
    [
        ("opt", "last_norm", "norm.weight"),
        ("opt", "bias", "layer.0.attn.q.bias"),
        ("opt", "bias", "layer.0.mlp.up.bias"),
        ("gpt_neox", "mlp_norm", "layer.0.mlp_norm.weight"),
        ("gpt_neox", "head_bias", "lm_head.bias"),
        ("gpt_neox", "qk_norm", "layer.0.attn.k_norm.weight"),
        ("gpt_neox", "attn_bias", "layer.0.attn.out.bias"),
        ("gpt_neox", "mlp_bias", "layer.0.mlp.down.bias"),
        ("gpt_neox", "tied", "not lm_head.weight"),
        ("llama", "qkv_bias", "layer.0.attn.v.bias"),
        ("llama", "out_bias", "layer.0.attn.out.bias"),
        ("llama", "mlp_bias", "layer.0.mlp.gate.bias"),
        ("llama", "layer_norms", "norm.bias"),
        ("llama", "tied", "not lm_head.weight"),
        ("modernbert", "attn_bias", "layer.0.attn.q.bias"),
        ("modernbert", "mlp_bias", "layer.0.mlp.up.bias"),
        ("modernbert", "norm_bias", "norm.bias"),
        ("dinov2", "qkv_bias", "layer.0.attn.q.bias"),
        ("dinov2", "gated", "layer.0.mlp.gate.weight"),
        ("vit None", "distilled", "embeddings.distillation"),
        ("siglip_vision", "pooled", "pooler.query"),
        ("t5", "tied", "not lm_head.weight"),
        ("t5", "gated", "encoder.block.0.mlp.gate.weight"),
        ("bart", "logits", "logits_bias"),
    ],
)
def test_a_part_is_there_where_its_option_is_set(name: str, option: str, parameter: str) -> None:
    for on in (True, False):
        parameters = ZOO[name][0].configure(**{option: on}).graph().parameters
        assert (parameter.removeprefix("not ") in parameters) is (on != parameter.startswith("not "))


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama", "opt", "clip_text"])
def test_a_token_of_a_decoder_sees_none_after_it(name: str) -> None:
    found = [node.op.attributes["terms"] for _, node in ZOO[name][0].graph().walk() if node.op.name == "attention"]
    assert found
    assert all("causal" in str(terms) for terms in found)


def test_positions_bound_the_sequence() -> None:
    assert gpt2.configure(context=40).graph().symbols["S"].upper == 40
    assert bert.graph().symbols["S"].upper == 512
    assert t5.graph().symbols["S"].upper is None


def test_a_model_inside_another() -> None:
    """The parameters of the inner model are under its scope, and its tied weights are separate from the outer
    model's.
    """
    inner = small(gpt2)

    @t.model
    def twins(tokens: t.i64["B S"]):
        with t.scope("left"):
            left = inner(tokens)
        with t.scope("right"):
            right = inner(tokens)
        return left + right

    graph = twins.graph()
    alone = inner.graph().parameters
    assert set(graph.parameters) == {f"{side}.{name}" for side in ("left", "right") for name in alone}
    tied = [node.operands[1] for node in graph.main.nodes if node.op.name == "linear"]
    assert [weight.name for weight in tied if weight is not None] == ["left.wte.weight", "right.wte.weight"]


# -- refusals --------------------------------------------------------------------------------------------------


def test_unknown_head_option_and_input() -> None:
    with pytest.raises(FrontendError, match="bert has no head 'masked'") as caught:
        resolve("bert", head="masked")
    assert all(head in str(caught.value) for head in HEADS)
    with pytest.raises(FrontendError, match="model bert has no option width"):
        resolve("bert", width=12)
    with pytest.raises(FrontendError, match="model t5 has no input token_types"):
        resolve("t5", inputs=("token_types",))
    with pytest.raises(UsageError, match="there is no model 'bret'"):
        resolve("bret")
    with pytest.raises(UsageError, match=r"there is no file bert\.onnx"):
        resolve("bert.onnx")


def test_defaults_of_a_config() -> None:
    assert read_int({"n": None}, "n", 3) == 3
    assert read_float({}, "eps", 1e-5) == 1e-5
    assert read_flag({}, "tied", True) is True
    assert choose({}, "act", {"relu": 1, "gelu": 2}, "gelu") == 2
    assert choose_architecture({}, {"First": 1, "Second": 2}) == 1
    assert count_labels({}) == 2
    for bad in ({}, {"n": 1.0}, {"n": 0}):
        with pytest.raises(CheckpointError, match="n must be a positive integer"):
            read_int(bad, "n")


@pytest.mark.parametrize(
    ("read", "taken", "refused"),
    [
        (read_int, [1, 2**31 - 1], [0, 2**31, True, "1", 1.0]),
        (partial(read_int, least=0), [0], [-1]),
        (partial(read_int, least=2, most=5), [2, 5], [1, 6]),
        (read_layers, [1, 10_000], [0, 10_001]),
        (partial(read_float, default=0.0), [0, 0.0, 1, 1e308], [-1e-9, math.inf, math.nan, True, "1", None]),
        (partial(read_flag, default=False), [True, False], [1, 0, None, "true"]),
        (read_multiplier, [1e-9, 1, 1e9], [0, 9e-10, 1.1e9]),
        (read_factor, [1e-3, 1, 1e6], [0, 9e-4, 1.1e6]),
        (read_factors, [[1], [0.5] * (1 << 15)], [[], [1.0] * ((1 << 15) + 1), 1.0, [0]]),
    ],
)
def test_allowed_values_of_config_keys(read: Callable[..., Any], taken: list[Any], refused: list[Any]) -> None:
    for value in taken:
        found = read({"n": value}, "n")
        assert found == (tuple(value) if isinstance(value, list) else value)
    for value in refused:
        with pytest.raises(CheckpointError, match=r"config\.json: n must be "):
            read({"n": value}, "n")


def test_the_limits_of_an_option_are_said() -> None:
    for read, said in (
        (read_int, "n must be a positive integer"),
        (read_layers, "n must be a positive integer up to 10000"),
        (partial(read_int, least=0, most=7), "n must be an integer from 0 up to 7"),
        (partial(read_int, least=2), "n must be an integer from 2"),
    ):
        with pytest.raises(CheckpointError) as caught:
            read({"n": -1}, "n")
        assert caught.value.what == f"config.json: {said}"


def test_labels_are_as_many_as_the_class_has() -> None:
    three = {"id2label": {"0": "a", "1": "b", "2": "c"}}
    for named, count in ((None, 3), ("BertForMultipleChoice", 1), ("BertForNextSentencePrediction", 2), ("Bert", 3)):
        assert count_labels({**three, "architectures": named and [named]}) == count
    for wrong in ({}, [], 3):
        with pytest.raises(CheckpointError, match="id2label must be an object with a name per label"):
            count_labels({"id2label": wrong})
    for wrong in (["A", "A"], [["A"]], "A", ["B"], []):
        with pytest.raises(CheckpointError, match="architectures is"):
            choose_architecture({"architectures": wrong}, {"A": 1})


@pytest.mark.parametrize("family", ["albert", "dinov2", "distilbert", "electra", "gpt2", "modernbert", "mpnet", "vit"])
def test_a_head_that_there_is_not_is_refused_with_those_that_there_are(family: str) -> None:
    with pytest.raises(FrontendError, match=f"{family} has no head 'tail'") as caught:
        resolve(family, head="tail", layers=1)
    heads = import_module(f"treadle.models.{family}").HEADS
    assert caught.value.hint == "one of None, " + ", ".join(heads)
    for head in heads:
        resolve(family, head=head, layers=1, **({"distilled": True} if head == "distilled_classifier" else {}))


def test_a_model_without_a_file_has_the_labels_of_its_kind() -> None:
    """Image models have ImageNet's labels; text classifiers have two."""
    found = {model.name: model.defaults["labels"] for model, _ in ZOO.values() if "labels" in model.defaults}
    assert {name: count for name, count in found.items() if count != 2} == {
        "vit": 1000, "dinov2": 1000, "siglip_vision": None,
    }  # fmt: skip


def test_an_encoder_by_itself_has_the_sizes_that_it_has_in_the_whole() -> None:
    for part, whole in ((whisper_encoder, whisper), (t5_encoder, t5)):
        assert part.defaults.items() <= whole.defaults.items()


def test_the_transformer_has_the_papers_size() -> None:
    """About 65 million parameters (table 3, base). Each of six pairs of an encoder and a decoder layer has 12
    matrices of attention, two feed-forward networks and five norms.
    """
    sizes = [math.prod(value.type.static_shape or ()) for value in transformer.graph().parameters.values()]
    assert sum(sizes) == 37000 * 512 + 6 * (12 * 512**2 + 2 * (2 * 512 * 2048 + 2048 + 512) + 5 * 2 * 512)


def test_a_misspelt_family_comes_with_its_neighbours() -> None:
    for name, hint in (
        ("clop", "did you mean clip?"),
        ("bret", "did you mean bert or bart or albert?"),
        ("q", "one of " + ", ".join(family_names())),
    ):
        with pytest.raises(UsageError) as caught:
            find_family(name)
        assert caught.value.hint == hint

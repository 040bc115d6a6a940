"""SigLIP: CLIP, trained to classify each pair of text and image independently (Zhai et al. 2023).

Its text encoder is bidirectional. An image is pooled by attention with one learned query.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

import treadle.frontends.language as t
from treadle.frontends.binding import Entry, Table, consecutive
from treadle.ir.errors import CheckpointError
from treadle.models.clip import read_part, unit
from treadle.models.family import (
    Config,
    Family,
    choose,
    choose_architecture,
    count_labels,
    read_flag,
    read_float,
    read_int,
    read_layers,
    require,
    weights_and_biases,
)
from treadle.models.vit import ACTIVATIONS, block, embed_patches, read_image


@t.model
def siglip_text(
    tokens: Annotated[t.Tensor, t.i64["B S"]],
    lengths: Annotated[t.Tensor, t.i64["B"]] | None = None,
    *,
    vocab: int = 32000,
    context: int = 64,
    dim: int = 768,
    heads: int = 12,
    layers: int = 12,
    hidden: int = 3072,
    act: t.Activation = t.gelu_tanh,
    eps: float = 1e-6,
    projection: int = 768,
) -> dict[str, t.Tensor]:
    """SigLIP's text encoder: hidden states [B, S, dim] of tokens [B, S], and the projected last state of each row.

    Texts are padded to the whole context, and the last token is read even if it is padding.

    lengths  [B], number of tokens of a row that attention sees; absent: all, padding included
    """
    with t.scope("embeddings"):
        x = t.embed(tokens, vocab, dim, name="word") + t.embed(t.positions(tokens), context, dim, name="position")
    mask = None if lengths is None else t.padding(lengths)
    for _ in t.stack("layer", layers):
        x = block(x, heads, hidden, mask=mask, act=act, eps=eps)
    x = t.layer_norm(x, eps=eps, name="norm")
    last = t.rearrange(t.slice(x, axis=1, start=-1), pattern="b 1 d -> b d")
    return {"hidden": x, "pooled": t.linear(last, projection, name="projection")}


@t.model
def siglip_vision(
    pixels: Annotated[t.Tensor, t.f32["N channels height width"]],
    *,
    channels: int = 3,
    height: int = 224,
    width: int = 224,
    patch: int = 16,
    dim: int = 768,
    heads: int = 12,
    layers: int = 12,
    hidden: int = 3072,
    act: t.Activation = t.gelu_tanh,
    eps: float = 1e-6,
    pooled: bool = True,
    labels: int | None = None,
) -> dict[str, t.Tensor]:
    """SigLIP's image encoder: hidden states [N, patches, dim] of images, and their pooled state [N, dim].

    pooled  True if there is a pooling head
    labels  number of classes of a classifier of the mean hidden state, whose logits are then the only output; None: no
            classifier
    """
    with t.scope("embeddings"):
        x = embed_patches(pixels, dim, patch)
        x += t.parameter("position", x.shape[1], dim)
    for _ in t.stack("layer", layers):
        x = block(x, heads, hidden, act=act, eps=eps)
    x = t.layer_norm(x, eps=eps, name="norm")
    if labels is not None:
        return {"logits": t.linear(t.reduce_mean(x, axes=(1,)), labels, name="logits")}
    if not pooled:
        return {"hidden": x}
    with t.scope("pooler"):
        query = t.expand(t.parameter("query", 1, 1, dim), shape=(x.shape[0], 1, dim))
        y = t.cross_attention(query, x, heads, name="attn")
        y += t.mlp(t.layer_norm(y, eps=eps, name="mlp_norm"), hidden, act=act, name="mlp")
    return {"hidden": x, "pooled": t.rearrange(y, pattern="n 1 d -> n d")}


@t.model
def siglip(
    tokens: Annotated[t.Tensor, t.i64["B S"]],
    pixels: Annotated[t.Tensor, t.f32["N channels height width"]],
    lengths: Annotated[t.Tensor, t.i64["B"]] | None = None,
    *,
    channels: int = 3,
    height: int = 224,
    width: int = 224,
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
) -> dict[str, t.Tensor]:
    """SigLIP: logits of B texts and N images, [B, N] and [N, B], and the vectors that they are computed from.

    A logit's sigmoid is the probability that the two match, independently of the others.

    lengths are the same as in `siglip_text`.

    text    the configuration of `siglip_text`: the values that differ from its defaults
    vision  the configuration of `siglip_vision`, likewise
    """
    with t.scope("text"):
        text_embeds = unit(siglip_text(tokens, lengths, **text or {})["pooled"])
    with t.scope("vision"):
        image_embeds = unit(siglip_vision(pixels, **vision or {})["pooled"])
    scale = t.exp(t.parameter("logit_scale", 1, init=t.Init("constant", math.log(10))))
    bias = t.parameter("logit_bias", 1, init=t.Init("constant", -10.0))
    logits = t.einsum(text_embeds, image_embeds, equation="b d, n d -> b n") * scale + bias
    return {
        "logits_per_text": logits,
        "logits_per_image": t.rearrange(logits, pattern="b n -> n b"),
        "text_embeds": text_embeds,
        "image_embeds": image_embeds,
    }


ARCHITECTURES: Mapping[str, Mapping[str, str | None]] = {
    "siglip": {"SiglipModel": None, "SiglipForImageClassification": "classifier"},
    "siglip_text_model": {"SiglipTextModel": None},
    "siglip_vision_model": {"SiglipVisionModel": None},
}
"""Hugging Face's classes by the configuration's model_type, and their heads."""


def from_config(config: Config) -> t.Model:
    """Read a Hugging Face SiglipConfig, SiglipTextConfig or SiglipVisionConfig."""
    kind = config["model_type"]
    head = choose_architecture(config, ARCHITECTURES[kind])
    if kind == "siglip_text_model":
        return siglip_text.configure(**read_text(config))
    if kind == "siglip_vision_model":
        return siglip_vision.configure(**read_vision(config))
    vision = read_vision(read_part(config, "vision"))
    if head == "classifier":
        return siglip_vision.configure(**vision, labels=count_labels(config))
    text = read_text(read_part(config, "text"))
    if not vision["pooled"] or text["projection"] != vision["dim"]:
        raise CheckpointError(
            "config.json: needs vision_use_head, and text and image embeddings of the same dimension",
            received=f"projection_size {text['projection']}, hidden_size {vision['dim']}, "
            f"vision_use_head {vision['pooled']}",
        )
    image = {name: vision.pop(name) for name in ("channels", "height", "width")}
    return siglip.configure(text=text, vision=vision, **image)


def read_text(config: Config) -> dict[str, Any]:
    """Return the configuration of `siglip_text` from a SiglipTextConfig."""
    encoder = _read_encoder(config)
    return {
        "vocab": read_int(config, "vocab_size", 32000),
        "context": read_int(config, "max_position_embeddings", 64),
        "projection": read_int(config, "projection_size", encoder["dim"]),
        **encoder,
    }


def read_vision(config: Config) -> dict[str, Any]:
    """Return the configuration of `siglip_vision` from a SiglipVisionConfig."""
    height, width, patch = read_image(config)
    if height != width:
        raise CheckpointError(
            "config.json: image_size must be one side of a square", received=f"{height} x {width}"
        )  # fmt: skip
    return {
        "channels": read_int(config, "num_channels", 3),
        "height": height,
        "width": width,
        "patch": patch,
        "pooled": read_flag(config, "vision_use_head", True),
        **_read_encoder(config),
    }


def _read_encoder(config: Config) -> dict[str, Any]:
    require(config, is_causal=False)
    return {
        "dim": read_int(config, "hidden_size", 768),
        "heads": read_int(config, "num_attention_heads", 12),
        "layers": read_layers(config, "num_hidden_layers", 12),
        "hidden": read_int(config, "intermediate_size", 3072),
        "act": choose(config, "hidden_act", ACTIVATIONS, "gelu_pytorch_tanh"),
        "eps": read_float(config, "layer_norm_eps", 1e-6),
    }


def checkpoint(config: Config) -> Table:
    """Return the table of Hugging Face's names. The names of a separate encoder may have the prefix that it has in the
    whole model.
    """
    kind = config.get("model_type")
    if kind == "siglip" and choose_architecture(config, ARCHITECTURES["siglip"]) is None:
        whole: dict[str, Entry] = {}
        for ours in ("text", "vision"):
            part = read_part(config, ours)
            whole |= {f"{ours}.{name}": entry for name, entry in encoder_table(part, f"{ours}_model.").items()}
        return whole
    return encoder_table(read_part(config, "vision") if kind == "siglip" else config, "")


def encoder_table(config: Config, prefix: str) -> dict[str, Entry]:
    """Return the table for one encoder. The pooling head stores q, k and v in one matrix, as in PyTorch."""
    layer, pooler = f"{prefix}encoder.layers.{{i}}", f"{prefix}head"
    dim, positions = read_int(config, "hidden_size", 768), f"{prefix}embeddings.position_embedding.weight"
    table: dict[str, Entry] = {
        "embeddings.word.weight": f"{prefix}embeddings.token_embedding.weight",
        "embeddings.position.weight": positions,
        "embeddings.position": positions,
        "pooler.query": f"{pooler}.probe",
    }
    for part in ("weight", "bias"):
        names = [f"pooler.attn.{name}.{part}" for name in "qkv"]
        table |= consecutive(f"{pooler}.attention.in_proj_{part}", dict.fromkeys(names, dim))
    modules = {
        "embeddings.patch": f"{prefix}embeddings.patch_embedding",
        "layer.{i}.attn.q": f"{layer}.self_attn.q_proj",
        "layer.{i}.attn.k": f"{layer}.self_attn.k_proj",
        "layer.{i}.attn.v": f"{layer}.self_attn.v_proj",
        "layer.{i}.attn.out": f"{layer}.self_attn.out_proj",
        "layer.{i}.attn_norm": f"{layer}.layer_norm1",
        "layer.{i}.mlp.up": f"{layer}.mlp.fc1",
        "layer.{i}.mlp.down": f"{layer}.mlp.fc2",
        "layer.{i}.mlp_norm": f"{layer}.layer_norm2",
        "projection": pooler,
        "pooler.attn.out": f"{pooler}.attention.out_proj",
        "pooler.mlp_norm": f"{pooler}.layernorm",
        "pooler.mlp.up": f"{pooler}.mlp.fc1",
        "pooler.mlp.down": f"{pooler}.mlp.fc2",
        "logits": "classifier",
        "norm": (f"{prefix}final_layer_norm", f"{prefix}post_layernorm"),
    }
    return table | weights_and_biases(modules)


FAMILY = Family(
    "siglip", siglip, ("siglip", "siglip_text_model", "siglip_vision_model"), from_config, checkpoint,
    prefixes=("", "text_model.", "vision_model."),
    irrelevant={"text_config": "SiglipForImageClassification reads only images"},
)  # fmt: skip

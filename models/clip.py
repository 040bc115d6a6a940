"""CLIP: an encoder of texts and an encoder of images, whose vectors are close if text and image match (Radford et al.
2021, figures 1 and 3).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

import treadle.frontends.language as t
from treadle.frontends.binding import Entry, Table
from treadle.ir.errors import CheckpointError
from treadle.models.family import (
    Config,
    Family,
    choose,
    choose_architecture,
    read_float,
    read_int,
    read_layers,
    require,
    weights_and_biases,
)
from treadle.models.vit import ACTIVATIONS, block, embed_patches, prepend, read_image


@t.model
def clip_text(
    tokens: Annotated[t.Tensor, t.i64["B S"]],
    lengths: Annotated[t.Tensor, t.i64["B"]] | None = None,
    *,
    vocab: int = 49408,
    context: int = 77,
    dim: int = 512,
    heads: int = 8,
    layers: int = 12,
    hidden: int = 2048,
    act: t.Activation = t.quick_gelu,
    eps: float = 1e-5,
    end: int | None = None,
    projection: int | None = None,
) -> dict[str, t.Tensor]:
    """CLIP's text encoder: hidden states [B, S, dim] of tokens [B, S], and the state of each text's end token.

    lengths     [B], number of tokens of each row without padding; absent: all
    end         the token that ends a text, at its first position in a row; None: the token with the largest number
    projection  the width to which the end's state is projected; None: no projection
    """
    with t.scope("embeddings"):
        x = t.embed(tokens, vocab, dim, name="word") + t.embed(t.positions(tokens), context, dim, name="position")

    mask = t.causal if lengths is None else t.causal & t.padding(lengths)
    for _ in t.stack("layer", layers):
        x = block(x, heads, hidden, mask=mask, act=act, eps=eps)
    x = t.layer_norm(x, eps=eps, name="norm")

    place = t.argmax(tokens if end is None else t.equal(tokens, end).cast(t.i64), axis=1)
    index = t.expand(t.rearrange(place, pattern="b -> b 1 1"), shape=(None, None, dim))
    pooled = t.rearrange(t.take_along_axis(x, index, axis=1), pattern="b 1 d -> b d")
    return _project({"hidden": x, "pooled": pooled}, "text_embeds", projection)


@t.model
def clip_vision(
    pixels: Annotated[t.Tensor, t.f32["N channels height width"]],
    *,
    channels: int = 3,
    height: int = 224,
    width: int = 224,
    patch: int = 32,
    dim: int = 768,
    heads: int = 12,
    layers: int = 12,
    hidden: int = 3072,
    act: t.Activation = t.quick_gelu,
    eps: float = 1e-5,
    projection: int | None = None,
    pooled: bool = True,
) -> dict[str, t.Tensor]:
    """CLIP's image encoder, a ViT: hidden states [N, 1 + patches, dim] of images, and their class token's, normalized.

    projection  the width to which the class token's state is projected; None: no projection
    pooled      False if only the hidden states are returned
    """
    with t.scope("embeddings"):
        x = prepend(embed_patches(pixels, dim, patch, bias=False), t.parameter("class", dim))
        x = t.layer_norm(x + t.parameter("position", x.shape[1], dim), eps=eps, name="norm")

    for _ in t.stack("layer", layers):
        x = block(x, heads, hidden, act=act, eps=eps)

    if not pooled:
        return {"hidden": x}
    state = t.layer_norm(t.gather(x, t.constant(0), axis=1), eps=eps, name="norm")
    return _project({"hidden": x, "pooled": state}, "image_embeds", projection)


def _project(outputs: dict[str, t.Tensor], name: str, width: int | None) -> dict[str, t.Tensor]:
    """Return the outputs; if there is a width, the pooled states are projected to it."""
    if width is None:
        return outputs
    return {"hidden": outputs["hidden"], name: t.linear(outputs["pooled"], width, bias=False, name="projection")}


@t.model
def clip(
    tokens: Annotated[t.Tensor, t.i64["B S"]],
    pixels: Annotated[t.Tensor, t.f32["N channels height width"]],
    lengths: Annotated[t.Tensor, t.i64["B"]] | None = None,
    *,
    channels: int = 3,
    height: int = 224,
    width: int = 224,
    projection: int = 512,
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
) -> dict[str, t.Tensor]:
    """CLIP: logits of B texts and N images, [B, N] and [N, B], and the vectors that they are computed from.

    projection  the width of the vectors
    text        the configuration of `clip_text`: the values that differ from its defaults
    vision      the configuration of `clip_vision`, likewise
    """
    with t.scope("text"):
        text_embeds = unit(clip_text(tokens, lengths, projection=projection, **text or {})["text_embeds"])
    with t.scope("vision"):
        image_embeds = unit(clip_vision(pixels, projection=projection, **vision or {})["image_embeds"])
    scale = t.exp(t.parameter("logit_scale", init=t.Init("constant", math.log(1 / 0.07))))
    logits = t.einsum(text_embeds, image_embeds, equation="b d, n d -> b n") * scale
    return {
        "logits_per_text": logits,
        "logits_per_image": t.rearrange(logits, pattern="b n -> n b"),
        "text_embeds": text_embeds,
        "image_embeds": image_embeds,
    }


def unit(x: t.Tensor) -> t.Tensor:
    """Return vectors of length 1 in the direction of x [..., D]."""
    return x / t.sqrt(t.reduce_sum(x * x, axes=(-1,), keep=True))


ARCHITECTURES = {
    "clip": {"CLIPModel": False},
    "clip_text_model": {"CLIPTextModel": False, "CLIPTextModelWithProjection": True},
    "clip_vision_model": {"CLIPVisionModel": False, "CLIPVisionModelWithProjection": True},
}
"""Hugging Face's classes by the configuration's model_type, and True if a separate encoder is projected."""


def from_config(config: Config) -> t.Model:
    """Read a Hugging Face CLIPConfig, CLIPTextConfig or CLIPVisionConfig."""
    kind = config["model_type"]
    projected = choose_architecture(config, ARCHITECTURES[kind])
    width = read_int(config, "projection_dim", 512)
    if kind == "clip":
        text, vision = read_text(read_part(config, "text")), read_vision(read_part(config, "vision"))
        image = {name: vision.pop(name) for name in ("channels", "height", "width")}
        return clip.configure(projection=width, text=text, vision=vision, **image)
    projection = width if projected else None
    if kind == "clip_text_model":
        return clip_text.configure(projection=projection, **read_text(config))
    return clip_vision.configure(projection=projection, **read_vision(config))


def read_text(config: Config) -> dict[str, Any]:
    """Return the configuration of `clip_text` from a CLIPTextConfig.

    Configurations from before 2023 name token 2 as the end of texts, but mean the token with the largest number.
    """
    require(config, is_causal=True)
    end = read_int(config, "eos_token_id", 49407, least=0)
    return {
        "vocab": read_int(config, "vocab_size", 49408),
        "context": read_int(config, "max_position_embeddings", 77),
        "dim": read_int(config, "hidden_size", 512),
        "heads": read_int(config, "num_attention_heads", 8),
        "hidden": read_int(config, "intermediate_size", 2048),
        "end": None if end == 2 else end,
        **_read_encoder(config),
    }


def read_vision(config: Config) -> dict[str, Any]:
    """Return the configuration of `clip_vision` from a CLIPVisionConfig."""
    require(config, is_causal=False)
    height, width, patch = read_image(config, 32)
    return {
        "channels": read_int(config, "num_channels", 3),
        "height": height,
        "width": width,
        "patch": patch,
        "dim": read_int(config, "hidden_size", 768),
        "heads": read_int(config, "num_attention_heads", 12),
        "hidden": read_int(config, "intermediate_size", 3072),
        **_read_encoder(config),
    }


def _read_encoder(config: Config) -> dict[str, Any]:
    return {
        "layers": read_layers(config, "num_hidden_layers", 12),
        "act": choose(config, "hidden_act", ACTIVATIONS, "quick_gelu"),
        "eps": read_float(config, "layer_norm_eps", 1e-5),
    }


def read_part(config: Config, name: str) -> Config:
    """Return the configuration of one encoder; values under the older of its two names take precedence."""
    for key in (f"{name}_config_dict", f"{name}_config"):
        found = config.get(key)
        if isinstance(found, Mapping):
            return found
        if found is not None:
            raise CheckpointError(f"config.json: {key} must be an object", received=type(found).__name__)
    return {}


def checkpoint(config: Config) -> Table:
    """Return the table of Hugging Face's names. The names of a separate encoder may have the prefix that it has in the
    whole model.
    """
    if config.get("model_type") == "clip":
        whole: dict[str, Entry] = {"logit_scale": "logit_scale"}
        for ours, theirs, projection in (("text", "text_model", "text"), ("vision", "vision_model", "visual")):
            table = _encoder_table(f"{theirs}.", projection)
            whole |= {f"{ours}.{name}": entry for name, entry in table.items()}
        return whole
    return _encoder_table("", "text" if config.get("model_type") == "clip_text_model" else "visual")


def _encoder_table(prefix: str, projection: str) -> dict[str, Entry]:
    """Return the table for one encoder; `projection` is `text` or `visual`."""
    layer = f"{prefix}encoder.layers.{{i}}"
    positions = f"{prefix}embeddings.position_embedding.weight"
    table: dict[str, Entry] = {
        "embeddings.word.weight": f"{prefix}embeddings.token_embedding.weight",
        "embeddings.patch.weight": f"{prefix}embeddings.patch_embedding.weight",
        "embeddings.class": f"{prefix}embeddings.class_embedding",
        "embeddings.position.weight": positions,
        "embeddings.position": positions,
        "projection.weight": f"{projection}_projection.weight",
    }
    modules = {
        "embeddings.norm": f"{prefix}pre_layrnorm",
        "layer.{i}.attn.q": f"{layer}.self_attn.q_proj",
        "layer.{i}.attn.k": f"{layer}.self_attn.k_proj",
        "layer.{i}.attn.v": f"{layer}.self_attn.v_proj",
        "layer.{i}.attn.out": f"{layer}.self_attn.out_proj",
        "layer.{i}.attn_norm": f"{layer}.layer_norm1",
        "layer.{i}.mlp.up": f"{layer}.mlp.fc1",
        "layer.{i}.mlp.down": f"{layer}.mlp.fc2",
        "layer.{i}.mlp_norm": f"{layer}.layer_norm2",
        "norm": prefix + ("final_layer_norm" if projection == "text" else "post_layernorm"),
    }
    return table | weights_and_biases(modules)


FAMILY = Family(
    "clip", clip, ("clip", "clip_text_model", "clip_vision_model"), from_config, checkpoint,
    prefixes=("", "text_model.", "vision_model."),
    irrelevant={"projection_dim": "belongs to an encoder; the whole model's value counts"},
)  # fmt: skip

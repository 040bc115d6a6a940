"""ViT: an encoder of the sequence of an image's patches (Dosovitskiy et al. 2021); and DeiT, which adds a token that
learns from a teacher (Touvron et al. 2021).
"""

from __future__ import annotations

from typing import Annotated

import treadle.frontends.language as t
from treadle.frontends.binding import Entry, Table
from treadle.frontends.layers import Activation
from treadle.ir.attention.masking import Masks
from treadle.ir.errors import CheckpointError, FrontendError, Hint
from treadle.models.bert import pool
from treadle.models.family import (
    Config,
    Family,
    choose,
    choose_architecture,
    count_labels,
    read_float,
    read_int,
    read_layers,
    require,
    require_head_dim,
    weights_and_biases,
)

ACTIVATIONS = {
    "gelu": t.gelu,
    "gelu_new": t.gelu_tanh,
    "gelu_pytorch_tanh": t.gelu_tanh,
    "quick_gelu": t.quick_gelu,
    "relu": t.relu,
}

HEADS = ("pooler", "classifier", "distilled_classifier")

ARCHITECTURES = {
    "vit": {"ViTModel": None, "ViTForImageClassification": "classifier"},
    "deit": {
        "DeiTModel": None,
        "DeiTForImageClassification": "classifier",
        "DeiTForImageClassificationWithTeacher": "distilled_classifier",
    },
}


@t.model
def vit(
    pixels: Annotated[t.Tensor, t.f32["B channels height width"]],
    *,
    channels: int = 3,
    height: int = 224,
    width: int = 224,
    patch: int = 16,
    dim: int = 768,
    heads: int = 12,
    layers: int = 12,
    hidden: int = 3072,
    act: t.Activation = t.gelu,
    eps: float = 1e-12,
    distilled: bool = False,
    head: str | None = None,
    labels: int = 1000,
) -> dict[str, t.Tensor] | t.Tensor:
    """ViT: hidden states [B, 1 + patches, dim] of images [B, channels, height, width], or the output of a head.

    distilled  True if a distillation token follows the class token, as in DeiT
    head       None, or one of HEADS: "classifier" reads the class token; "distilled_classifier" reads the distillation
               token too, and returns the mean of both
    """
    with t.scope("embeddings"):
        learned = [t.parameter(name, 1, 1, dim) for name in ("class", "distillation")[: 1 + distilled]]
        x = prepend(embed_patches(pixels, dim, patch), *learned)
        x += t.parameter("position", 1, x.shape[1], dim)

    for _ in t.stack("layer", layers):
        x = block(x, heads, hidden, act=act, eps=eps)
    x = t.layer_norm(x, eps=eps, name="norm")

    match head:
        case None:
            return {"hidden": x}
        case "pooler":
            return {"hidden": x, "pooled": pool(x)}
        case "classifier":
            return t.linear(t.gather(x, t.constant(0), axis=1), labels, name="logits")
        case "distilled_classifier" if distilled:
            by_class = t.linear(t.gather(x, t.constant(0), axis=1), labels, name="logits")
            by_teacher = t.linear(t.gather(x, t.constant(1), axis=1), labels, name="teacher_logits")
            return {"logits": (by_class + by_teacher) / 2.0}
        case "distilled_classifier":
            raise FrontendError(
                "a distilled_classifier needs a distillation token", hint=Hint("distilled=True", "--set distilled=True")
            )
        case _:
            raise FrontendError(f"vit has no head {head!r}", hint="one of None, " + ", ".join(HEADS))


def embed_patches(pixels: t.Tensor, dim: int, patch: int, *, bias: bool = True) -> t.Tensor:
    """Return images [B, C, H, W] as sequences [B, H/patch * W/patch, dim] of patches, row by row.

    Each patch is flattened and projected by one matrix: a convolution whose windows do not overlap.
    """
    x = t.convolution(pixels, dim, (patch, patch), strides=(patch, patch), bias=bias, name="patch")
    return t.rearrange(x, pattern="b d h w -> b (h w) d")


def prepend(x: t.Tensor, *learned: t.Tensor) -> t.Tensor:
    """Prepend learned tokens, [D] or [1, 1, D] each, to every sequence [B, N, D]."""
    batch, _, dim = x.shape
    return t.concat(*(t.expand(token, shape=(batch, 1, dim)) for token in learned), x, axis=1)


def block(x: t.Tensor, heads: int, hidden: int, *, mask: Masks | None = None, act: Activation, eps: float) -> t.Tensor:
    """One layer: attention, then a feed-forward network, each with a normalized input and a residual sum."""
    x += t.self_attention(t.layer_norm(x, eps=eps, name="attn_norm"), heads, mask=mask, name="attn")
    return x + t.mlp(t.layer_norm(x, eps=eps, name="mlp_norm"), hidden, act=act, name="mlp")


def from_config(config: Config) -> t.Model:
    """Read a Hugging Face ViTConfig or DeiTConfig; its `architectures` choose the head."""
    kind = config["model_type"]
    dim = read_int(config, "hidden_size")
    require(config, is_causal=False)
    require_head_dim(config, dim // read_int(config, "num_attention_heads"))
    require(config, qkv_bias=True, pooler_act="tanh", pooler_output_size=dim)
    height, width, patch = read_image(config)
    return vit.configure(
        channels=read_int(config, "num_channels", 3),
        height=height,
        width=width,
        patch=patch,
        dim=dim,
        heads=read_int(config, "num_attention_heads"),
        layers=read_layers(config, "num_hidden_layers"),
        hidden=read_int(config, "intermediate_size"),
        act=choose(config, "hidden_act", ACTIVATIONS, "gelu"),
        eps=read_float(config, "layer_norm_eps", 1e-12),
        distilled=kind == "deit",
        head=choose_architecture(config, ARCHITECTURES[kind]),
        labels=count_labels(config),
    )


def read_image(config: Config, patch: int = 16) -> tuple[int, int, int]:
    """Return an image's height and width, and the side of a patch. In the config, each size is one number or [height,
    width].

    Raises CheckpointError for patches that are not square, or are higher or wider than the image.
    """
    sides = {}
    for name, default in (("image_size", 224), ("patch_size", patch)):
        value = config.get(name, default)
        pair = value if isinstance(value, list) and len(value) == 2 else (value, value)
        sides[name] = [read_int({name: side}, name) for side in pair]
    height, width = sides["image_size"]
    side, other = sides["patch_size"]
    if side != other or side > min(height, width):
        raise CheckpointError(
            "config.json: patch_size must be one side of a square that fits into image_size",
            received=f"patch_size {side} x {other}, image_size {height} x {width}",
        )
    return height, width, side


def checkpoint(config: Config) -> Table:
    """Return the table of Hugging Face's names. If DeiT has two classifiers, they are `cls_classifier` and
    `distillation_classifier`.
    """
    block = "encoder.layer.{i}"
    table: dict[str, Entry] = {
        "embeddings.class": "embeddings.cls_token",
        "embeddings.distillation": "embeddings.distillation_token",
        "embeddings.position": "embeddings.position_embeddings",
    }
    modules = {
        "embeddings.patch": "embeddings.patch_embeddings.projection",
        "layer.{i}.attn_norm": f"{block}.layernorm_before",
        "layer.{i}.attn.q": f"{block}.attention.attention.query",
        "layer.{i}.attn.k": f"{block}.attention.attention.key",
        "layer.{i}.attn.v": f"{block}.attention.attention.value",
        "layer.{i}.attn.out": f"{block}.attention.output.dense",
        "layer.{i}.mlp_norm": f"{block}.layernorm_after",
        "layer.{i}.mlp.up": f"{block}.intermediate.dense",
        "layer.{i}.mlp.down": f"{block}.output.dense",
        "norm": "layernorm",
        "pooler": "pooler.dense",
        "teacher_logits": "distillation_classifier",
        "logits": ("classifier", "cls_classifier"),
    }
    return table | weights_and_biases(modules)


FAMILY = Family(
    "vit", vit, ("vit", "deit"), from_config, checkpoint,
    prefixes=("", "vit.", "deit."), irrelevant={"encoder_stride": "belongs to the class for masked image modeling"},
)  # fmt: skip

"""DINOv2: a ViT whose layers scale their residual terms, trained without labels (Oquab et al. 2023).

Its position table fits one image size; for another size it is resized by bicubic interpolation, like an image.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import numpy.typing as npt

import treadle.frontends.language as t
from treadle.frontends.binding import Entry, Table, consecutive
from treadle.ir.errors import CheckpointError, FrontendError
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
    require_head_dim,
    weights_and_biases,
)
from treadle.models.vit import ACTIVATIONS, embed_patches, prepend, read_image

HEADS = ("classifier",)

ARCHITECTURES = {"Dinov2Model": None, "Dinov2ForImageClassification": "classifier"}


@t.model
def dinov2(
    pixels: Annotated[t.Tensor, t.f32["B channels height width"]],
    *,
    channels: int = 3,
    height: int = 518,
    width: int = 518,
    patch: int = 14,
    grid: int = 37,
    dim: int = 768,
    heads: int = 12,
    layers: int = 12,
    hidden: int = 3072,
    act: t.Activation = t.gelu,
    gated: bool = False,
    eps: float = 1e-6,
    qkv_bias: bool = True,
    head: str | None = None,
    labels: int = 1000,
) -> dict[str, t.Tensor]:
    """DINOv2: hidden states [B, 1 + patches, dim] of images [B, channels, height, width], and the class token's, [B,
    dim]; or the output of a head.

    grid      number of patches per side of the image size that the position table fits
    gated     True if feed-forward networks are gated by a silu, as in the largest model
    qkv_bias  True if queries, keys and values have biases
    head      None, or "classifier", which reads the class token and the mean of the patches
    """
    with t.scope("embeddings"):
        x = embed_patches(pixels, dim, patch)
        positions = t.parameter("position", 1, 1 + grid * grid, dim)
        first, rest = (t.slice(positions, axis=1, start=a, stop=b) for a, b in ((0, 1), (1, None)))
        x = prepend(x + resized(rest, grid, height // patch, width // patch), t.parameter("class", 1, 1, dim) + first)

    feed_forward: dict[str, Any] = {"hidden": hidden, "name": "mlp"}
    for _ in t.stack("layer", layers):
        y = t.layer_norm(x, eps=eps, name="attn_norm")
        y = t.self_attention(y, heads, projection_bias=qkv_bias, output_bias=True, name="attn")
        x += y * t.parameter("attn_scale", dim, init="ones")
        y = t.layer_norm(x, eps=eps, name="mlp_norm")
        y = t.gated_mlp(y, bias=True, **feed_forward) if gated else t.mlp(y, act=act, **feed_forward)
        x += y * t.parameter("mlp_scale", dim, init="ones")
    x = t.layer_norm(x, eps=eps, name="norm")

    pooled = t.gather(x, t.constant(0), axis=1)
    match head:
        case None:
            return {"hidden": x, "pooled": pooled}
        case "classifier":
            patches = t.reduce_mean(t.slice(x, axis=1, start=1), axes=(1,))
            return {"logits": t.linear(t.concat(pooled, patches, axis=1), labels, name="logits")}
        case _:
            raise FrontendError(f"dinov2 has no head {head!r}", hint="one of None, " + ", ".join(HEADS))


def resized(table: t.Tensor, grid: int, rows: int, columns: int) -> t.Tensor:
    """Return a position table [1, grid * grid, D] resized to rows * columns patches."""
    if (rows, columns) == (grid, grid):
        return table
    x = t.rearrange(table, pattern=f"1 (h={grid} w) d -> h w d")
    x = t.einsum(t.constant(bicubic(grid, rows)), x, equation="i h, h w d -> i w d")
    x = t.einsum(t.constant(bicubic(grid, columns)), x, equation="j w, i w d -> i j d")
    return t.rearrange(x, pattern="i j d -> 1 (i j) d")


def bicubic(size: int, to: int) -> npt.NDArray[np.float32]:
    """Return the matrix [to, size] that resizes a row by cubic convolution with a = -0.75, its ends repeated (Keys
    1981).

    The same as torch.nn.functional.interpolate(mode="bicubic", align_corners=False): positions are pixel centers, and a
    row is not smoothed before it is made smaller.
    """
    a = -0.75
    at = (np.arange(to) + 0.5) * (size / to) - 0.5
    whole = np.floor(at).astype(np.int64)
    matrix = np.zeros((to, size))
    for offset in range(-1, 3):
        x = np.abs(at - whole - offset)
        near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
        weight = np.where(x <= 1, near, np.where(x < 2, far, 0.0))
        np.add.at(matrix, (np.arange(to), np.clip(whole + offset, 0, size - 1)), weight)
    return matrix.astype(np.float32)


def from_config(config: Config) -> t.Model:
    """Read a Hugging Face Dinov2Config; its `architectures` choose the head."""
    require(config, is_causal=False)
    height, width, patch = read_image(config, 14)
    if height != width:
        raise CheckpointError(
            "config.json: image_size must be one side of a square, which the position table fits",
            received=f"{height} x {width}",
        )
    dim, gated = read_int(config, "hidden_size", 768), read_flag(config, "use_swiglu_ffn", False)
    require_head_dim(config, dim // read_int(config, "num_attention_heads", 12))
    hidden = dim * read_int(config, "mlp_ratio", 4)
    return dinov2.configure(
        channels=read_int(config, "num_channels", 3),
        height=height,
        width=width,
        patch=patch,
        grid=height // patch,
        dim=dim,
        heads=read_int(config, "num_attention_heads", 12),
        layers=read_layers(config, "num_hidden_layers", 12),
        hidden=gated_width(hidden) if gated else hidden,
        act=choose(config, "hidden_act", ACTIVATIONS, "gelu"),
        gated=gated,
        eps=read_float(config, "layer_norm_eps", 1e-6),
        qkv_bias=read_flag(config, "qkv_bias", True),
        head=choose_architecture(config, ARCHITECTURES),
        labels=count_labels(config),
    )


def gated_width(hidden: int) -> int:
    """Return the width of a gated network in place of a network of width `hidden`: two thirds of it, rounded up to a
    multiple of 8.
    """
    return (int(hidden * 2 / 3) + 7) // 8 * 8


def checkpoint(config: Config) -> Table:
    """Return the table of Hugging Face's names. The first two matrices of a gated network are stored as one."""
    block = "encoder.layer.{i}"
    table: dict[str, Entry] = {
        "embeddings.class": "embeddings.cls_token",
        "embeddings.position": "embeddings.position_embeddings",
        "layer.{i}.attn_scale": f"{block}.layer_scale1.lambda1",
        "layer.{i}.mlp_scale": f"{block}.layer_scale2.lambda1",
    }
    gated = read_flag(config, "use_swiglu_ffn", False)
    hidden = gated_width(read_int(config, "hidden_size", 768) * read_int(config, "mlp_ratio", 4))
    for part in ("weight", "bias"):
        joined = consecutive(f"{block}.mlp.weights_in.{part}", {"gate": hidden, "up": hidden})
        table[f"layer.{{i}}.mlp.gate.{part}"] = joined["gate"]
        table[f"layer.{{i}}.mlp.up.{part}"] = joined["up"] if gated else f"{block}.mlp.fc1.{part}"
        table[f"layer.{{i}}.mlp.down.{part}"] = f"{block}.mlp.{'weights_out' if gated else 'fc2'}.{part}"
    modules = {
        "embeddings.patch": "embeddings.patch_embeddings.projection",
        "layer.{i}.attn_norm": f"{block}.norm1",
        "layer.{i}.attn.q": f"{block}.attention.attention.query",
        "layer.{i}.attn.k": f"{block}.attention.attention.key",
        "layer.{i}.attn.v": f"{block}.attention.attention.value",
        "layer.{i}.attn.out": f"{block}.attention.output.dense",
        "layer.{i}.mlp_norm": f"{block}.norm2",
        "norm": "layernorm",
        "logits": "classifier",
    }
    return table | weights_and_biases(modules)


FAMILY = Family(
    "dinov2", dinov2, ("dinov2",), from_config, checkpoint,
    prefixes=("", "dinov2."),
    irrelevant={
        "use_mask_token": "masks patches only in training",
        **dict.fromkeys(
            ("out_features", "_out_features", "out_indices", "_out_indices", "stage_names", "apply_layernorm",
             "reshape_hidden_states"),
            "belongs to the backbone class",
        ),
    },
)  # fmt: skip

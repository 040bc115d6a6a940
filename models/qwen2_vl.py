"""Qwen2-VL and Qwen2.5-VL: a language model that reads images of any size (Wang et al. 2024, Bai et al. 2025).

The image encoder attends within each image, with rotary positions of rows and columns. A network of two layers merges
the features of each square of patches into one feature of the language model's width. Tokens of the language model have
three positions each, of time, row and column: a text token has the same number three times, and the features of an
image count rows and columns (multimodal rotary positions, M-RoPE). In Qwen2.5-VL most blocks of the encoder attend
within windows of an image. Videos are not read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any

import numpy as np

import treadle.frontends.language as t
from treadle.frontends.binding import Entry, Table, consecutive
from treadle.ir.errors import CheckpointError, FrontendError
from treadle.models import llama
from treadle.models.family import (
    Config,
    Family,
    choose,
    choose_architecture,
    read_flag,
    read_float,
    read_int,
    read_layers,
    require,
    weights_and_biases,
)
from treadle.models.image_features import angles, insert_features, rotation, table_under
from treadle.models.reading.llama_config import ACTIVATIONS, IRRELEVANT, read_options
from treadle.models.reading.recorded_config import layered
from treadle.models.reading.rotary_config import read_object

_ACTIVATIONS = {**ACTIVATIONS, "quick_gelu": t.quick_gelu}
_BASE = 10000.0  # of the encoder's rotary positions
_EPS = 1e-6  # of the encoder's norms
_SPREAD = 1 << 20  # more than the rows or columns of an image's patches


@t.model
def qwen2_vl_vision(
    patches: Annotated[t.Tensor, t.f32["B M-1 merged width"]],
    places: Annotated[t.Tensor, t.i64["B M-1 merged 3"]],
    *,
    merged: int = 4,
    channels: int = 3,
    frames: int = 2,
    patch: int = 14,
    width: int = 1176,
    dim: int = 1280,
    heads: int = 16,
    layers: int = 32,
    hidden: int = 5120,
    act: t.Activation = t.quick_gelu,
    gated: bool = False,
    window: int | None = None,
    full_layers: tuple[int, ...] = (),
    out: int = 3584,
) -> dict[str, t.Tensor]:
    """Qwen2-VL's image encoder: features [B, M-1, out] of groups of `merged` patches.

    places       of each patch: the number of its image, its row and its column
    gated        True if the blocks have RMS norms and gated feed-forward networks, as in Qwen2.5-VL
    window       the side of a window of patches; None: each patch sees its whole image
    full_layers  the layers (from 0) without windows
    """

    def norm(x: t.Tensor, name: str) -> t.Tensor:
        return t.rms_norm(x, eps=_EPS, name=name) if gated else t.layer_norm(x, eps=_EPS, name=name)

    x = t.rearrange(patches, pattern="b m k w -> b (m k) w")
    with t.scope("embed"):
        weight = t.parameter("weight", dim, channels, frames, patch, patch)
        x = t.ops.linear(x, t.rearrange(weight, pattern="d c f h w -> d (c f h w)", name="flat"))
    places = t.rearrange(places, pattern="b m k p -> b (m k) p")
    image, row, column = (t.gather(places, t.constant(n), axis=2) for n in range(3))
    masks = {False: t.segments(image)}
    if window is not None:
        inside = [t.floor_divide(each, window) for each in (row, column)]
        masks[True] = t.segments((image * _SPREAD + inside[0]) * _SPREAD + inside[1])
    quarter = dim // heads // 4
    frequencies = _BASE ** (-np.arange(quarter) / quarter)
    table = np.zeros((3, 2 * quarter))
    table[1, :quarter], table[2, quarter:] = frequencies, frequencies
    rotate = rotation(angles(places, table))
    for i in t.stack("layer", layers):
        mask = masks[window is not None and i not in full_layers]
        x += t.self_attention(norm(x, "attn_norm"), heads, mask=mask, rotate=rotate, name="attn")
        y = norm(x, "mlp_norm")
        x += t.gated_mlp(y, hidden, act=act, bias=True) if gated else t.mlp(y, hidden, act=act, name="mlp")
    x = t.rearrange(norm(x, "norm"), pattern=f"b (m k={merged}) d -> b m (k d)")
    with t.scope("merger"):
        x = t.linear(t.gelu(t.linear(x, t.Dim.of(merged * dim, "ffn"), name="up")), out, name="down")
    return {"features": x}


@t.model
def qwen2_vl(
    tokens: Annotated[t.Tensor, t.i64["B S"]],
    image_index: Annotated[t.Tensor, t.i64["B S"], t.generated(0)],
    position_ids: Annotated[t.Tensor, t.i64["B S 3"], t.generated("next")],
    patches: Annotated[t.Tensor, t.f32["B M-1 merged width"]],
    places: Annotated[t.Tensor, t.i64["B M-1 merged 3"]],
    *,
    merged: int = 4,
    width: int = 1176,
    sections: tuple[int, ...] = (16, 24, 24),
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
) -> dict[str, t.Tensor]:
    """Qwen2-VL: next-token logits [B, S, vocab] of tokens [B, S], some of which stand for features of images.

    image_index  0 for a text token; 1 + i for a token that stands for feature i of its row
    position_ids time, row and column of each token
    patches      the groups of `merged` patches of all images of a row, flattened patches of `width` numbers; a row with
                 fewer groups has any others after them
    places       of each patch: the number of its image (-1 for no image), its row and its column
    sections     the number of rotated pairs of dimensions that turn by time, by row and by column
    text         the configuration of `llama`: the values that differ from its defaults
    vision       the configuration of `qwen2_vl_vision`, likewise

    Raises FrontendError if the sections do not cover a head.
    """
    options = {**llama.llama.defaults, **(text or {})}
    size = options["head_dim"] or options["dim"] // options["heads"]
    if len(sections) != 3 or 2 * sum(sections) != size:
        raise FrontendError(
            f"three sections of rotated pairs must cover the {size // 2} pairs of a head", received=str(sections)
        )
    with t.scope("vision"):
        given = {"merged": merged, "width": width, "out": options["dim"], **(vision or {})}
        features = qwen2_vl_vision(patches, places, **given)["features"]
    table = np.zeros((3, size // 2))
    ends = np.cumsum((0, *sections))
    for n in range(3):
        pairs = np.arange(ends[n], ends[n + 1])
        table[n, pairs] = options["base"] ** (-2 * pairs / size)
    with t.scope("text"):
        insert = partial(insert_features, features=features, index=image_index)
        return llama.llama(tokens, insert=insert, rotate=rotation(angles(position_ids, table)), **text or {})


ARCHITECTURES = {
    "qwen2_vl": {"Qwen2VLForConditionalGeneration": qwen2_vl},
    "qwen2_5_vl": {"Qwen2_5_VLForConditionalGeneration": qwen2_vl},
}
"""Hugging Face's classes by the configuration's model_type."""

_TEXT: Config = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
}
"""The defaults of Qwen2VLTextConfig."""


def from_config(config: Config) -> t.Model:
    """Read a Hugging Face Qwen2VLConfig or Qwen2_5_VLConfig."""
    choose_architecture(config, ARCHITECTURES[config["model_type"]])
    text, vision = read_options(text_config(config)), read_vision(config)
    given = rotary_config(config)
    sections = given.get("mrope_section", [16, 24, 24])
    pairs = (text["head_dim"] or text["dim"] // text["heads"]) // 2
    if not isinstance(sections, list) or [type(n) for n in sections] != [int] * 3 or sum(sections) != pairs:
        raise CheckpointError(
            f"config.json: mrope_section must be three integers whose sum is the {pairs} pairs of a head",
            received=repr(sections)[:80],
        )
    if min(sections) < 0:
        raise CheckpointError("config.json: mrope_section must have no negative numbers", received=str(sections))
    if vision.pop("out") != text["dim"]:
        raise CheckpointError("config.json: the image encoder's features must have the width of the language model")
    token = read_int(config, "image_token_id", 151655, least=0)
    if token >= text["vocab"]:
        raise CheckpointError(
            f"config.json: image_token_id must be less than vocab_size, {text['vocab']}", received=str(token)
        )
    sizes = {name: vision[name] for name in ("merged", "width")}
    return qwen2_vl.configure(**sizes, sections=tuple(sections), text=text, vision=vision)


def read_vision(config: Config) -> dict[str, Any]:
    """Return the configuration of `qwen2_vl_vision`, with the width of its features as `out`."""
    vision, newer = read_object(config, "vision_config"), config["model_type"] == "qwen2_5_vl"
    require(read_object(vision, "rope_parameters"), rope_type="axial", rope_theta=_BASE)
    dim = read_int(vision, "hidden_size", 3584) if newer else read_int(vision, "embed_dim", 1280)
    patch, frames = read_int(vision, "patch_size", 14), read_int(vision, "temporal_patch_size", 2)
    channels, merge = read_int(vision, "in_channels", 3), read_int(vision, "spatial_merge_size", 2)
    require(vision, in_channels=3)
    made = {
        "merged": merge**2,
        "channels": channels,
        "frames": frames,
        "patch": patch,
        "width": channels * frames * patch**2,
        "dim": dim,
        "heads": read_int(vision, "num_heads", 16),
        "layers": read_layers(vision, "depth", 32),
        "act": choose(vision, "hidden_act", _ACTIVATIONS, "silu" if newer else "quick_gelu"),
        "gated": newer,
    }
    if dim % (4 * made["heads"]):
        raise CheckpointError("config.json: the image encoder's heads must have a multiple of 4 dimensions")
    if not newer:
        ratio = read_float(vision, "mlp_ratio", 4.0)
        return {**made, "hidden": int(dim * ratio), "out": read_int(vision, "hidden_size", 3584)}
    window = read_int(vision, "window_size", 112) // merge // patch * merge
    full = vision.get("fullatt_block_indexes", [7, 15, 23, 31])
    if window < 1 or not isinstance(full, list) or not all(type(n) is int for n in full):
        raise CheckpointError(
            "config.json: window_size must hold a group of patches, and fullatt_block_indexes must be a list",
            received=f"{vision.get('window_size')}, {full!r}"[:80],
        )
    hidden, out = read_int(vision, "intermediate_size", 3420), read_int(vision, "out_hidden_size", 3584)
    return {**made, "hidden": hidden, "window": window, "full_layers": tuple(full), "out": out}


def own_text(config: Config) -> Config:
    """Return the language model's part of a configuration, which older files do not keep apart."""
    return config if config.get("text_config") is None else read_object(config, "text_config")


def rotary_config(config: Config) -> Config:
    """Return the options of the rotary positions."""
    text = own_text(config)
    return read_object(text, "rope_scaling") or read_object(text, "rope_parameters")


def text_config(config: Config) -> Config:
    """Return the configuration of the language model in the form of Qwen2's, with defaults."""
    text, given = own_text(config), rotary_config(config)
    for name in ("rope_type", "type"):
        choose(given, name, dict.fromkeys(("default", "mrope")), "default")
    base = read_float(given, "rope_theta", read_float(text, "rope_theta", 1e6))
    tied = read_flag(config, "tie_word_embeddings", False) or read_flag(text, "tie_word_embeddings", False)
    fixed = {
        "model_type": "qwen2",
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": base},
        "tie_word_embeddings": tied,
    }
    return layered(fixed, text, _TEXT)


def checkpoint(config: Config) -> Table:
    """Return the table of Hugging Face's names. Versions name the parts differently."""
    dim, layer = read_vision(config)["dim"], "blocks.{i}"
    vision: dict[str, Entry] = {"embed.weight": "patch_embed.proj.weight"}
    for part in ("weight", "bias"):
        names = [f"layer.{{i}}.attn.{name}.{part}" for name in "qkv"]
        vision |= consecutive(f"{layer}.attn.qkv.{part}", dict.fromkeys(names, dim))
    vision |= weights_and_biases(
        {
            "layer.{i}.attn.out": f"{layer}.attn.proj",
            "layer.{i}.attn_norm": f"{layer}.norm1",
            "layer.{i}.mlp_norm": f"{layer}.norm2",
            "layer.{i}.mlp.gate": f"{layer}.mlp.gate_proj",
            "layer.{i}.mlp.up": (f"{layer}.mlp.fc1", f"{layer}.mlp.up_proj"),
            "layer.{i}.mlp.down": (f"{layer}.mlp.fc2", f"{layer}.mlp.down_proj"),
            "norm": "merger.ln_q",
            "merger.up": "merger.mlp.0",
            "merger.down": "merger.mlp.2",
        }
    )
    return {
        **table_under("vision", vision, lambda name: (f"visual.{name}", f"model.visual.{name}")),
        **table_under("text", llama.checkpoint(text_config(config)), text_names),
    }


def text_names(name: str) -> Sequence[str]:
    """Return the names of a tensor of the language model in the whole model."""
    return name, name.replace("model.", "model.language_model.", 1)


FAMILY = Family(
    "qwen2_vl", qwen2_vl, ("qwen2_vl", "qwen2_5_vl"), from_config, checkpoint,
    irrelevant={
        **IRRELEVANT,
        **dict.fromkeys(("video_token_id", "tokens_per_second"), "belongs to videos, which are not read"),
        **dict.fromkeys(
            ("vision_start_token_id", "vision_end_token_id", "vision_token_id"), "the chat template writes these tokens"
        ),
        **dict.fromkeys(("in_chans", "spatial_patch_size"), "Hugging Face's class does not read it"),
    },
)  # fmt: skip

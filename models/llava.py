"""LLaVA: a language model that reads images, as features of CLIP's image encoder (Liu et al. 2023).

Each image is encoded; a network of two layers projects the features of its patches to the width of the language model,
where they take the place of the embeddings of image tokens. The image encoder is CLIP's; the language model is Llama,
Mistral or Qwen2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any

import treadle.frontends.language as t
from treadle.frontends.binding import Entry, Table
from treadle.ir.errors import CheckpointError
from treadle.models import clip, llama
from treadle.models.family import (
    Config,
    Family,
    choose,
    choose_architecture,
    read_flag,
    read_int,
    require,
    weights_and_biases,
)
from treadle.models.image_features import by_row, each_image, insert_features, table_under
from treadle.models.reading.llama_config import ACTIVATIONS, IRRELEVANT, read_options
from treadle.models.reading.recorded_config import layered
from treadle.models.reading.rotary_config import read_object


@t.model
def llava(
    tokens: Annotated[t.Tensor, t.i64["B S"]],
    image_index: Annotated[t.Tensor, t.i64["B S"], t.generated(0)],
    pixels: Annotated[t.Tensor, t.f32["B N-1 channels height width"]],
    *,
    channels: int = 3,
    height: int = 336,
    width: int = 336,
    class_token: bool = False,
    act: t.Activation = t.gelu,
    bias: bool = True,
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
) -> dict[str, t.Tensor]:
    """LLaVA: next-token logits [B, S, vocab] of tokens [B, S], some of which stand for features of images.

    image_index  0 for a text token; 1 + i for a token that stands for feature i of its row. Each image has a feature
                 per patch, image after image
    pixels       the N-1 images of each row; a row with fewer images has any others after them
    class_token  True if the class token's state is a feature, too, the first of an image
    act, bias    of the projection
    text         the configuration of `llama`: the values that differ from its defaults
    vision       the configuration of `clip_vision`, likewise; its last hidden states are the features
    """
    with t.scope("vision"):
        x = clip.clip_vision(each_image(pixels), pooled=False, **vision or {})["hidden"]
    if not class_token:
        x = t.slice(x, axis=1, start=1)
    dim = (text or {}).get("dim", llama.llama.defaults["dim"])
    with t.scope("projector"):
        x = t.linear(act(t.linear(x, t.Dim.of(dim, "ffn"), bias=bias, name="up")), dim, bias=bias, name="down")
    with t.scope("text"):
        insert = partial(insert_features, features=by_row(x, pixels), index=image_index)
        return llama.llama(tokens, insert=insert, **text or {})


ARCHITECTURES = {"LlavaForConditionalGeneration": llava}
TEXTS: Mapping[str, Config] = {
    "llama": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008},
    "mistral": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336},
    "qwen2": {"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016},
}
"""The supported language models, with the defaults of Hugging Face's classes that `llama_config` does not have."""

_TEXT = {"num_hidden_layers": 32, "num_attention_heads": 32}
_VISION = {
    "intermediate_size": 4096,
    "hidden_size": 1024,
    "patch_size": 14,
    "image_size": 336,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}
"""The defaults of LlavaConfig, which older files leave out."""


def from_config(config: Config) -> t.Model:
    """Read a Hugging Face LlavaConfig."""
    choose_architecture(config, ARCHITECTURES)
    vision, text = vision_config(config), text_config(config, TEXTS)
    strategy = choose(config, "vision_feature_select_strategy", {"default": False, "full": True}, "default")
    layers = read_int(config, "vision_feature_layer", -2, least=-(2**31))
    encoder = clip.read_vision(vision)
    counted = layers if layers >= 0 else encoder["layers"] + 1 + layers
    if not 1 <= counted <= encoder["layers"]:
        raise CheckpointError(
            f"config.json: vision_feature_layer must be one of {encoder['layers']} layers", received=str(layers)
        )
    image = {name: encoder.pop(name) for name in ("channels", "height", "width")}
    decoder = read_options(text)
    decoder["tied"] = decoder["tied"] or read_flag(config, "tie_word_embeddings", False)
    image_token(config, decoder["vocab"])
    return llava.configure(
        **image,
        class_token=strategy,
        act=choose(config, "projector_hidden_act", ACTIVATIONS, "gelu"),
        bias=read_flag(config, "multimodal_projector_bias", True),
        text=decoder,
        vision={**image, **encoder, "layers": counted},
    )


def vision_config(config: Config) -> Config:
    """Return the configuration of the image encoder, with defaults."""
    found = read_object(config, "vision_config")
    require(found, model_type="clip_vision_model")
    return layered(found, _VISION)


def text_config(config: Config, kinds: Mapping[str, Config]) -> Config:
    """Return the configuration of the language model, with defaults. Raises CheckpointError for another kind."""
    found = read_object(config, "text_config")
    kind = choose(found, "model_type", {name: name for name in kinds}, "llama")
    return layered(found, {"model_type": kind}, kinds[kind], _TEXT)


def image_token(config: Config, vocabulary: int) -> int:
    """Return the id of the token that stands for an image feature. Raises CheckpointError if the vocabulary lacks
    it.
    """
    token = read_int(config, "image_token_index", 32000, least=0)
    if token >= vocabulary:
        raise CheckpointError(
            f"config.json: image_token_index must be less than vocab_size, {vocabulary}", received=str(token)
        )
    return token


def checkpoint(config: Config) -> Table:
    """Return the table of Hugging Face's names. Older and newer versions name the parts differently."""
    text = text_config(config, TEXTS)
    if read_flag(config, "tie_word_embeddings", False):
        text = layered({"tie_word_embeddings": True}, text)
    table: dict[str, Entry] = {
        **table_under("text", llama.checkpoint(text), text_names),
        **table_under("vision", clip.checkpoint(vision_config(config)), vision_names),
    }
    for ours, theirs in (("up", "linear_1"), ("down", "linear_2")):
        names = [f"{prefix}multi_modal_projector.{theirs}" for prefix in ("", "model.")]
        table |= weights_and_biases({f"projector.{ours}": names})
    return table


def text_names(name: str) -> Sequence[str]:
    """Return the names of a tensor of the language model in the whole model."""
    if name.startswith("model."):
        return f"language_model.{name}", f"model.language_model.{name.removeprefix('model.')}"
    return f"language_model.{name}", name


def vision_names(name: str) -> Sequence[str]:
    """Return the names of a tensor of the image encoder in the whole model."""
    towers = ("vision_tower.vision_model.", "vision_tower.", "model.vision_tower.", "model.vision_tower.vision_model.")
    return [f"{tower}{name}" for tower in towers]


FAMILY = Family(
    "llava", llava, ("llava",), from_config, checkpoint,
    aliases={"llava": {"image_token_id": "image_token_index"}},
    irrelevant={
        **IRRELEVANT,
        "image_seq_length": "follows from the size of the images",
        "projection_dim": "belongs to CLIP's projection, which the features do not use",
        "vocab_size": "of vision_config: belongs to CLIP's text encoder",
        "ignore_index": "only affects training",
    },
)  # fmt: skip

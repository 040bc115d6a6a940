"""Idefics3 and SmolVLM: a language model that reads images as tiles, with SigLIP's image encoder (Laurençon et al.
2024, Marafioti et al. 2025).

An image is split into tiles of one size, which are encoded separately, and a small copy of the whole image. Pixel
shuffle joins the features of each square of patches into one longer vector, which a matrix projects to the width of the
language model. There the vectors take the place of the embeddings of image tokens.

If the number of patches along a side is one of a few others than those of the published models (such as 19 or 25),
Hugging Face's class rounds so that some patches read the position of their neighbour; here each patch reads its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any

import treadle.frontends.language as t
from treadle.frontends.binding import Entry, Table
from treadle.ir.errors import CheckpointError, FrontendError
from treadle.models import llama, siglip
from treadle.models.family import Config, Family, choose_architecture, read_flag, read_int
from treadle.models.image_features import by_row, each_image, insert_features, table_under
from treadle.models.llava import TEXTS, text_config
from treadle.models.reading.llama_config import IRRELEVANT, read_options
from treadle.models.reading.recorded_config import layered
from treadle.models.reading.rotary_config import read_object


@t.model
def idefics3(
    tokens: Annotated[t.Tensor, t.i64["B S"]],
    image_index: Annotated[t.Tensor, t.i64["B S"], t.generated(0)],
    pixels: Annotated[t.Tensor, t.f32["B N-1 channels height width"]],
    *,
    channels: int = 3,
    height: int = 364,
    width: int = 364,
    shuffle: int = 2,
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
) -> dict[str, t.Tensor]:
    """Idefics3: next-token logits [B, S, vocab] of tokens [B, S], some of which stand for features of image tiles.

    image_index  0 for a text token; 1 + i for a token that stands for feature i of its row. Each tile has a feature per
                 square of `shuffle` x `shuffle` patches, tile after tile
    pixels       the N-1 tiles of each row; a row with fewer tiles has any others after them
    text         the configuration of `llama`: the values that differ from its defaults
    vision       the configuration of `siglip_vision`, likewise

    Raises FrontendError if the patches of a side do not split into squares.
    """
    options = {**(vision or {}), "height": height, "width": width, "channels": channels, "pooled": False}
    patch = options.get("patch", siglip.siglip_vision.defaults["patch"])
    if height // patch % shuffle or width // patch % shuffle:
        raise FrontendError(
            f"{height // patch} x {width // patch} patches do not split into squares of {shuffle} x {shuffle}",
            hint="shuffle= that divides both",
        )
    with t.scope("vision"):
        x = siglip.siglip_vision(each_image(pixels), **options)["hidden"]
    pattern = f"n (h sh={shuffle} w={width // patch // shuffle} sw={shuffle}) d -> n (h w) (sh sw d)"
    dim = (text or {}).get("dim", llama.llama.defaults["dim"])
    x = t.linear(t.rearrange(x, pattern=pattern), dim, bias=False, name="connector")
    with t.scope("text"):
        insert = partial(insert_features, features=by_row(x, pixels), index=image_index)
        return llama.llama(tokens, insert=insert, **text or {})


ARCHITECTURES = {
    "idefics3": {"Idefics3ForConditionalGeneration": idefics3},
    "smolvlm": {"SmolVLMForConditionalGeneration": idefics3},
}
"""Hugging Face's classes by the configuration's model_type."""

_VISION = {"hidden_size": 1152, "num_attention_heads": 16, "patch_size": 32}
"""The defaults of Idefics3VisionConfig that differ from SigLIP's."""


def from_config(config: Config) -> t.Model:
    """Read a Hugging Face Idefics3Config or SmolVLMConfig."""
    choose_architecture(config, ARCHITECTURES[config["model_type"]])
    vision = siglip.read_vision(vision_config(config))
    image = {name: vision.pop(name) for name in ("channels", "height", "width")}
    shuffle, patch = read_int(config, "scale_factor", 2), vision["patch"]
    if image["height"] // patch % shuffle:
        raise CheckpointError(
            f"config.json: scale_factor must divide the {image['height'] // patch} patches of an image's side",
            received=str(shuffle),
        )
    text = read_options(decoder_config(config))
    token = read_int(config, "image_token_id", 128257, least=0)
    if token >= text["vocab"]:
        raise CheckpointError(
            f"config.json: image_token_id must be less than vocab_size, {text['vocab']}", received=str(token)
        )
    return idefics3.configure(**image, shuffle=shuffle, text=text, vision={**vision, "pooled": False})


def vision_config(config: Config) -> Config:
    """Return the configuration of the image encoder, with defaults."""
    return layered({"vision_use_head": False}, read_object(config, "vision_config"), _VISION)


def decoder_config(config: Config) -> Config:
    """Return the configuration of the language model, with defaults."""
    text = layered(text_config(config, TEXTS), {"rms_norm_eps": 1e-5})
    return layered({"tie_word_embeddings": read_flag(config, "tie_word_embeddings", False)}, text)


def checkpoint(config: Config) -> Table:
    """Return the table of Hugging Face's names."""
    table: dict[str, Entry] = {
        **table_under("text", llama.checkpoint(decoder_config(config)), text_names),
        **table_under("vision", siglip.encoder_table(vision_config(config), ""), vision_names),
    }
    table["connector.weight"] = "model.connector.modality_projection.proj.weight"
    return table


def text_names(name: str) -> Sequence[str]:
    """Return the names of a tensor of the language model in the whole model."""
    return (f"model.text_model.{name.removeprefix('model.')}" if name.startswith("model.") else name,)


def vision_names(name: str) -> Sequence[str]:
    """Return the names of a tensor of the image encoder in the whole model."""
    return (f"model.vision_model.{name}",)


FAMILY = Family(
    "idefics3", idefics3, ("idefics3", "smolvlm"), from_config, checkpoint,
    irrelevant={
        **IRRELEVANT,
        "use_base_siglip": "belongs to the trainer",
        "_pad_token_id": "belongs to generation, which reads it itself",
        "max_num_images": "belongs to the image processor",
        "size": "belongs to the image processor",
    },
)  # fmt: skip

"""Vision-language models as pairs of GGUF files, in llama.cpp's form, with the names of the gguf library's own maps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tests.vision_models import VisionModel

Array = np.ndarray[Any, Any]

LANGUAGE, PROJECTOR = "model.gguf", "mmproj-model.gguf"
_CONTROL, _NORMAL = 3, 1
_MERGE = "\u0100\u0100"  # two zero bytes, so that there is a merge, which no text contains


@dataclass(frozen=True)
class PairForm:
    """The form in which a pair is written.

    blocks    the type of matrices: F32, F16 or Q8_0. Patches, positions, and rows that are not whole blocks become F16
    is_older  True for the names of LLaVA's converter, which swaps ffn_up and ffn_down and drops layers that do not run
    has_mark  False if the vocabulary has no image token
    """

    blocks: str = "F32"
    is_older: bool = False
    has_mark: bool = True


def write_pair(
    made: VisionModel,
    place: Path,
    form: PairForm = PairForm(),
    *,
    keys: Mapping[str, Any] | None = None,
    without: str | None = None,
    also: str | None = None,
) -> Path:
    """Write the pair that llama.cpp would write of a model. The model's weights become those that the files hold.

    keys     metadata of the image encoder that differ; None: left out
    without  a tensor of the image encoder to leave out
    also     the name of another tensor to add to it

    Returns the language model's file.
    """
    place.mkdir(exist_ok=True)
    _write_language(made, place / LANGUAGE, form)
    _write_projector(made, place / PROJECTOR, form, keys or {}, without, also)
    return place / LANGUAGE


def _write_language(made: VisionModel, path: Path, form: PairForm) -> None:
    config = made.model.config.text_config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    special = {token.content for token in made.tokenizer.added_tokens_decoder.values()}
    numbered = sorted((number, token) for token, number in made.tokenizer.get_vocab().items())
    tokens = [token if form.has_mark or token != made.mark else "unused" for _, token in numbered]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*tokens, _MERGE])
    writer.add_token_types([_CONTROL if token in special else _NORMAL for token in (*tokens, _MERGE)])
    writer.add_token_merges(["\u0100 \u0100"])
    writer.add_add_bos_token(False)
    writer.add_chat_template(made.tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for theirs, weight in made.model.state_dict().items():
        for scope in ("model.language_model.", "model.text_model.", "lm_head."):
            if theirs.startswith(scope):
                name = theirs if scope == "lm_head." else theirs.replace(scope, "model.")
                stored = weight.numpy()
                heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
                part = next((heads[each] for each in heads if each in name), None)
                order = np.arange(len(stored)) if part is None else _rotary_order(len(stored), part)
                held = _add(writer, names.get_name(name, (".weight",)), stored[order], form)
                weight[order] = weight.new_tensor(held)
    _finish(writer)


def _write_projector(
    made: VisionModel, path: Path, form: PairForm, keys: Mapping[str, Any], without: str | None, also: str | None
) -> None:
    config = made.model.config
    vision, is_llava = config.vision_config, made.kind == "llava"
    layer = vision.num_hidden_layers + 1 + config.vision_feature_layer if is_llava else vision.num_hidden_layers
    blocks = layer if form.is_older else vision.num_hidden_layers
    writer = gguf.GGUFWriter(path, "clip")
    found: dict[str, Any] = {
        "clip.has_vision_encoder": True,
        "clip.projector_type": "mlp" if is_llava else "idefics3",
        "clip.use_gelu": vision.hidden_act.startswith("gelu"),
        "clip.vision.image_size": vision.image_size,
        "clip.vision.patch_size": vision.patch_size,
        "clip.vision.embedding_length": vision.hidden_size,
        "clip.vision.feed_forward_length": vision.intermediate_size,
        "clip.vision.block_count": blocks,
        "clip.vision.attention.head_count": vision.num_attention_heads,
        "clip.vision.attention.layer_norm_epsilon": vision.layer_norm_eps,
        "clip.vision.image_mean": list(made.images.image_mean),
        "clip.vision.image_std": list(made.images.image_std),
    }
    if is_llava:
        found |= {} if form.is_older else {"clip.vision.feature_layer": [layer]}
    else:
        found["clip.vision.projector.scale_factor"] = config.scale_factor
        found["clip.vision.preproc_image_size"] = made.images.size["longest_edge"]
    for key, value in {**found, **keys}.items():
        if value is not None:
            _add_key(writer, key, value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, vision.num_hidden_layers)
    for theirs, weight in made.model.state_dict().items():
        name = theirs.replace("model.vision_tower.", "vision_tower.vision_model.")
        name = name.replace("model.multi_modal_projector.", "multi_modal_projector.")
        ours = names.get_name(name, (".weight", ".bias"))
        number = int(name.split(".layers.")[1].split(".")[0]) if ".layers." in name else -1
        if ours is None or not ours.startswith(("v.", "mm.")) or number >= blocks or ours == without:
            continue
        if is_llava and ours.startswith("v.post_ln"):
            continue
        if form.is_older:
            swapped = {"ffn_up": "ffn_down", "ffn_down": "ffn_up", "mm.1": "mm.0"}
            part = next((each for each in swapped if each in ours), "")
            ours = ours.replace(part, swapped.get(part, ""))
        weight[...] = weight.new_tensor(_add(writer, ours, weight.numpy(), form))
    if also is not None:
        _add(writer, also, np.zeros(vision.hidden_size, np.float32), form)
    _finish(writer)


def _add(writer: Any, name: str, weight: Array, form: PairForm) -> Array:
    """Write a tensor, and return the numbers that the file holds."""
    kind = gguf.GGMLQuantizationType[form.blocks if weight.ndim > 1 else "F32"]
    if form.blocks != "F32" and (weight.ndim > 2 or name.startswith("v.position") or weight.shape[-1] % 32):
        kind = gguf.GGMLQuantizationType.F16
    stored = gguf.quantize(np.ascontiguousarray(weight), kind)
    writer.add_tensor(name, stored, raw_dtype=kind)
    found: Array = gguf.dequantize(stored, kind)
    return found


def _add_key(writer: Any, key: str, value: Any) -> None:
    """Write a value with its type in Python. Integers are u32, numbers f32."""
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    add.get(type(value), writer.add_array)(key, value)


def _rotary_order(rows: int, heads: int) -> Array:
    """Return the order of rows in which pairs of dimensions that are rotated together are adjacent."""
    return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

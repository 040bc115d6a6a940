"""Vision-language models in two GGUF files: a language model, and an image encoder with its projector (mmproj).

The pair becomes the same declaration as the model's folder: `llava` for the projector type mlp, `idefics3` for the type
of that name. Sources: llama.cpp's tools/mtmd/clip.cpp for the keys and the tensor names, and for what older files leave
out; its converters convert_hf_to_gguf.py (SmolVLM) and convert_image_encoder_to_gguf.py (LLaVA).

    clip.projector_type                     "mlp" or "idefics3"
    clip.use_gelu, clip.use_silu            the encoder's activation; neither: quick GELU
    clip.vision.image_size, patch_size      sides in pixels
    clip.vision.image_mean, image_std       one number per channel
    clip.vision.feature_layer               LLaVA: the number of layers that run; left out: block_count
    clip.vision.image_aspect_ratio          LLaVA: "pad" if images are padded to squares
    clip.vision.projector.scale_factor      SmolVLM: the side of the squares of patches that are joined
    clip.vision.preproc_image_size          SmolVLM: the longest side of an image before it is split into tiles

    v.*     the encoder. Older files swap the names ffn_up and ffn_down
    mm.*    the projector: mm.0 (or mm.1) and mm.2 of LLaVA, mm.model.fc of SmolVLM
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import treadle.frontends.language as t
from treadle.files.shown_names import printable
from treadle.frontends.binding import Entry
from treadle.frontends.gguf_file import GGUFFile
from treadle.ir.errors import CheckpointError, Hint
from treadle.models.family import LANGUAGE_ONLY, weights_and_biases
from treadle.models.idefics3 import idefics3
from treadle.models.image_features import table_under
from treadle.models.llava import TEXTS, llava
from treadle.models.reading import llama_gguf
from treadle.models.reading.llama_gguf import IMAGE_ENCODER, GGUFPart

_TYPE = "clip.projector_type"
_TYPES: Mapping[str, t.Model] = {"mlp": llava, "idefics3": idefics3}
"""The supported projector types, with the declarations of the pairs."""

_LAYERS = 1_000
_MOST_SIDE = 1 << 14  # pixels
_BLOCK_TENSORS = 16
_VISION = "clip.vision"
_SHUFFLE, _LAYER = f"{_VISION}.projector.scale_factor", f"{_VISION}.feature_layer"
_MERGE = f"{_VISION}.mm_patch_merge_type"
_OTHER_KEYS = {f"{_VISION}.image_grid_pinpoints": "images in several resolutions, as LLaVA-NeXT reads them"}
_OTHER_TENSORS = {
    "v.post_ln.weight": "a norm after the image encoder of LLaVA",
    "mm.3.weight": "a projector with norms, as Yi-VL has it",
    "model.image_newline": "a feature after each row of patches, as LLaVA-NeXT has it",
}
"""Keys and tensors of models that resemble LLaVA, with their meanings."""


def pair_from_gguf(language: GGUFFile, projector: GGUFFile) -> t.Model:
    """Return the model in two files. Raises CheckpointError, with the key or the tensor, for unsupported or missing
    values, and for files of two different models.
    """
    declared = _declaration(projector)
    text = dict(llama_gguf.from_gguf(language).config)
    if language.architecture not in TEXTS:
        supported = ", ".join(name for name in llama_gguf.LAYOUTS if name in TEXTS)
        language.fail(
            "general.architecture",
            "is not supported for a model that reads images",
            f"{language.architecture}, with the image encoder {projector.path}; supported: {supported}",
            LANGUAGE_ONLY,
        )
    _check_width(projector, declared, language, text["dim"])
    side, vision = _integer(projector, "image_size", _MOST_SIDE), _read_encoder(projector, declared)
    patch = vision["patch"]
    if patch > side:
        projector.fail(f"{_VISION}.patch_size", f"must be at most the image's side, {side}", f"{patch}")
    image: dict[str, Any] = {"channels": 3, "height": side, "width": side}
    if declared is llava:
        bias = "mm.2.bias" in projector
        return llava.configure(**image, class_token=False, bias=bias, text=text, vision={**image, **vision})
    shuffle = projector.integer(_SHUFFLE, 2)
    if side // patch % shuffle:
        projector.fail(_SHUFFLE, f"must divide the {side // patch} patches of an image's side", f"{shuffle}")
    return idefics3.configure(**image, shuffle=shuffle, text=text, vision={**vision, "pooled": False})


def pair_parts(language: GGUFFile, projector: GGUFFile, model: t.Model) -> Sequence[GGUFPart]:
    """Return the files of a pair with the parameters that each holds, and their names."""
    text = table_under("text", llama_gguf.table(language, model.config["text"]), lambda name: (name,))
    up, down = ("ffn_down", "ffn_up") if _is_swapped(projector) else ("ffn_up", "ffn_down")
    block, ours = "v.blk.{i}", "vision.layer.{i}"
    modules: dict[str, str | Sequence[str]] = {
        "vision.embeddings.patch": "v.patch_embd",
        "vision.embeddings.norm": "v.pre_ln",
        **{f"{ours}.attn.{part}": f"{block}.attn_{part}" for part in ("q", "k", "v", "out")},
        f"{ours}.attn_norm": f"{block}.ln1",
        f"{ours}.mlp_norm": f"{block}.ln2",
        f"{ours}.mlp.up": f"{block}.{up}",
        f"{ours}.mlp.down": f"{block}.{down}",
        "vision.norm": "v.post_ln",
        "projector.up": ("mm.0", "mm.1"),
        "projector.down": "mm.2",
        "connector": "mm.model.fc",
    }
    names: dict[str, Entry] = {
        "vision.embeddings.class": "v.class_embd",
        "vision.embeddings.position": "v.position_embd.weight",
    }
    scopes = ("vision.", "projector.", "connector.")
    return GGUFPart(language, text, ("text.",)), GGUFPart(projector, names | weights_and_biases(modules), scopes)


def image_options(projector: GGUFFile) -> Mapping[str, Any]:
    """Return the options of the image processor, by the names in preprocessor_config.json. Those that the file does not
    determine are left out.

    Raises CheckpointError, with the key, for a missing or invalid value.
    """
    side = _integer(projector, "image_size", _MOST_SIDE)
    options: dict[str, Any] = {name: _channels(projector, name) for name in ("image_mean", "image_std")}
    if _declaration(projector) is idefics3:
        longest = _integer(projector, "preproc_image_size", _MOST_SIDE, 4 * side)
        return {**options, "size": {"longest_edge": longest}, "max_image_size": {"longest_edge": side}}
    key = f"{_VISION}.image_aspect_ratio"
    ratio = projector.text(key, "")
    if ratio not in ("", "pad", "square"):
        projector.fail(key, "is not supported", f"{printable(ratio, 40)}; supported: pad, square")
    return {**options, "size": {"shortest_edge": side}, "crop_size": side, "do_pad": ratio == "pad"}


def _declaration(projector: GGUFFile) -> t.Model:
    """Return the declaration for the projector's type, if the file is an image encoder that is supported."""
    kind = projector.architecture
    if kind != IMAGE_ENCODER:
        projector.fail(
            "general.architecture",
            f"must be {IMAGE_ENCODER}: the file is no image encoder with a projector (mmproj)",
            printable(kind, 40),
            Hint('the image encoder\'s file as mmproj="FILE"', "the image encoder's file as --mmproj FILE"),
        )
    if not projector.flag("clip.has_vision_encoder", True):
        projector.fail("clip.has_vision_encoder", "must be true", "false: the file has no image encoder")
    key = next((key for key in (_TYPE, f"{_VISION}.projector_type") if projector.has(key)), _TYPE)
    found = projector.text(key, "mlp" if projector.flag("clip.has_llava_projector", False) else None)
    if found not in _TYPES:
        projector.fail(key, "is not supported", f"{printable(found, 40)}; supported: {', '.join(_TYPES)}")
    if _TYPES[found] is llava:
        if (merge := projector.text(_MERGE, "flat")) != "flat":
            projector.fail(_MERGE, "is not supported", f"{printable(merge, 40)}; supported: flat")
        for key, meaning in _OTHER_KEYS.items():
            if projector.has(key):
                projector.fail(key, f"is not supported: {meaning}")
        for name, meaning in _OTHER_TENSORS.items():
            if name in projector:
                raise CheckpointError(f"{name} is not supported: {meaning}", within=_place(projector, name))
    return _TYPES[found]


def _read_encoder(file: GGUFFile, declared: t.Model) -> dict[str, Any]:
    """Return the configuration of the image encoder, without the image's sizes."""
    layers = _integer(file, "block_count", _LAYERS)
    if layers * _BLOCK_TENSORS > len(file):  # before that many are traced
        what = "is larger than the file's number of tensors allows"
        file.fail(f"{_VISION}.block_count", what, f"{layers}, of {len(file)} tensors")
    dim, heads = _integer(file, "embedding_length"), _integer(file, "attention.head_count")
    if dim % heads:
        what = f"must divide the embedding's length, {dim}"
        file.fail(f"{_VISION}.attention.head_count", what, f"{heads}")
    flags = [name for name in ("gelu", "silu") if file.flag(f"clip.use_{name}", False)]
    if len(flags) > 1:
        file.fail("clip.use_silu", "must not be true if clip.use_gelu is")
    gelu = t.gelu if declared is llava else t.gelu_tanh
    return {
        "patch": _integer(file, "patch_size"),
        "dim": dim,
        "heads": heads,
        "layers": _feature_layer(file, layers) if declared is llava and file.has(_LAYER) else layers,
        "hidden": _integer(file, "feed_forward_length"),
        "act": {"gelu": gelu, "silu": t.silu}[flags[0]] if flags else t.quick_gelu,
        "eps": file.number(f"{_VISION}.attention.layer_norm_epsilon"),
    }


def _feature_layer(file: GGUFFile, layers: int) -> int:
    """Return the number of layers after which the features are taken."""
    found = file.numbers(_LAYER)
    if found.size > 1:
        file.fail(_LAYER, "is not supported: features of several layers", f"{found.size} layers")
    if found.dtype.kind not in "iu" or not all(1 <= n <= layers for n in found.tolist()) or not found.size:
        file.fail(_LAYER, f"must be a number from 1 to {layers}", f"{found.tolist()}")
    return int(found[0])


def _is_swapped(file: GGUFFile) -> bool:
    """Return True if the file names the first matrix of feed-forward networks ffn_down, as older converters do."""
    dim, hidden = _integer(file, "embedding_length"), _integer(file, "feed_forward_length")
    if dim == hidden:
        file.fail(
            f"{_VISION}.feed_forward_length",
            "must differ from the embedding's length: otherwise swapped names of ffn_up and ffn_down go unnoticed",
            f"{hidden}",
        )
    name = "v.blk.0.ffn_down.weight"
    return name in file and file.record(name).shape[1:] == (dim,)


def _check_width(projector: GGUFFile, declared: t.Model, language: GGUFFile, dim: int) -> None:
    """Raise CheckpointError if the projector's outputs do not have the width of the language model's embeddings."""
    name = "mm.2.weight" if declared is llava else "mm.model.fc.weight"
    if name in projector and projector.record(name).shape[:1] not in ((), (dim,)):
        raise CheckpointError(
            "the image encoder belongs to another language model",
            received=f"{name} is {projector.record(name)}, and {language.path} has embeddings of length {dim}",
            within=_place(projector, name),
            hint=Hint('mmproj="FILE", of this model', "--mmproj FILE, of this model"),
        )


def _place(file: GGUFFile, name: str) -> str:
    return f"{file.path}: byte {file.record(name).begin}, tensor {name}"


def _integer(file: GGUFFile, name: str, most: int = 2**31 - 1, default: int | None = None) -> int:
    return file.integer(f"{_VISION}.{name}", default, most=most)


def _channels(file: GGUFFile, name: str) -> tuple[float, ...]:
    """Return a number for each of the three channels. Those of a standard deviation are positive."""
    found = file.numbers(key := f"{_VISION}.{name}")
    if found.size != 3 or not np.isfinite(found).all() or (name == "image_std" and not (found > 0).all()):
        what = "must be three numbers" + (" above 0" if name == "image_std" else "")
        file.fail(key, what, printable(str(found.tolist()), 80))
    return tuple(float(each) for each in found)

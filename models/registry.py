"""The zoo: families by name and by a config's `model_type`, each imported on first use."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING

from treadle.frontends.declarations import Model
from treadle.frontends.gguf_file import GGUFFile
from treadle.ir.errors import CheckpointError, UsageError
from treadle.models.family import OTHER_WAYS, Config, Family

if TYPE_CHECKING:
    from treadle.models.reading.llama_gguf import GGUFPart

_MODULES: dict[str, tuple[str, ...]] = {
    "albert": ("albert",),
    "bart": ("bart",),
    "bert": ("bert",),
    "clip": ("clip", "clip_text_model", "clip_vision_model"),
    "dinov2": ("dinov2",),
    "distilbert": ("distilbert",),
    "electra": ("electra",),
    "gpt2": ("gpt2",),
    "gpt_neox": ("gpt_neox", "gptj", "phi", "falcon"),
    "idefics3": ("idefics3", "smolvlm"),
    "llava": ("llava",),
    "llama": (
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma",
        "gemma2",
        "gemma3_text",
        "phi3",
        "olmo2",
        "stablelm",
        "granite",
    ),
    "marian": ("marian",),
    "modernbert": ("modernbert",),
    "mpnet": ("mpnet",),
    "opt": ("opt",),
    "qwen2_vl": ("qwen2_vl", "qwen2_5_vl"),
    "roberta": ("roberta", "xlm-roberta", "camembert"),
    "siglip": ("siglip", "siglip_text_model", "siglip_vision_model"),
    "t5": ("t5", "mt5"),
    "transformer": ("transformer",),
    "vit": ("vit", "deit"),
    "whisper": ("whisper",),
}
"""Each family's module and its `model_type` values. They are stored here so that a look-up imports no other family."""


def family_names() -> list[str]:
    """Return the names of all families."""
    return list(_MODULES)


def find_family(name: str) -> Family:
    """Return the family of that name. Raises UsageError with the nearest names."""
    if name not in _MODULES:
        near = difflib.get_close_matches(name, _MODULES, n=3)
        raise UsageError(
            f"there is no model {name!r} in the zoo",
            hint=f"did you mean {' or '.join(near)}?" if near else "one of " + ", ".join(_MODULES),
        )
    found = import_module(f"treadle.models.{name}").FAMILY
    assert isinstance(found, Family)
    return found


def family_reading(kind: object) -> str | None:
    """Return the name of the family that reads configurations of this `model_type`, or None."""
    return next((name for name, kinds in _MODULES.items() if kind in kinds), None)


def family_of(config: Config) -> Family:
    """Return the family that reads this config.json. Raises CheckpointError if there is none."""
    kind = config.get("model_type")
    if (name := family_reading(kind)) is not None:
        return find_family(name)
    supported = sorted(k for kinds in _MODULES.values() for k in kinds)
    raise CheckpointError(
        f"config.json: model_type is {kind!r}, which no family of the zoo reads",
        hint=f"a model_type of {', '.join(supported)}\n{OTHER_WAYS}",
    )


def read_gguf(file: GGUFFile, projector: GGUFFile | None = None) -> tuple[Model, Sequence[GGUFPart]]:
    """Return the configured model of a GGUF file, or of a language model with its image encoder and projector, and the
    files with the tables of their tensor names.

    Raises CheckpointError, with the key, if no family reads it.
    """
    from treadle.models.reading import llama_gguf, mmproj_gguf  # the only GGUF readers so far

    if projector is not None:
        model = mmproj_gguf.pair_from_gguf(file, projector)
        return model, mmproj_gguf.pair_parts(file, projector, model)
    model = llama_gguf.from_gguf(file)
    return model, [llama_gguf.GGUFPart(file, llama_gguf.table(file, model.config))]

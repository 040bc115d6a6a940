"""Change one key of a config.json at a time, and compare the outputs with `from_pretrained` of the same folder.

    python -m tests.fuzz.config_keys [--families gpt2,llama] [--all] [--count N] [--seed 0]

Small random models of every `model_type` of the zoo. The keys are the keys of the file, the fields and other names that
transformers' config class knows, the names that its modeling code reads, and names that older versions wrote;
`rope_parameters`, `text_config` and `vision_config` are changed inside, too. In each case the outputs must be equal, or
the model refused with a TreadleError, or the key reported as unread. Exit status 1 if an output is silently wrong.
"""

from __future__ import annotations

import argparse
import collections
import copy
import dataclasses
import functools
import inspect
import json
import logging
import random
import re
import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from tests.decoder_models import DECODERS
from tests.hf_models import TINY, VOCAB, Tiny, answer
from treadle.ir.errors import TreadleError
from treadle.ir.graph import Graph
from treadle.ir.interpreter import interpret
from treadle.resolving import Resolved, resolve

Array = np.ndarray[Any, Any]
Json = dict[str, Any]
Place = tuple[str, ...]

TOLERANCE = 2e-5
"""Tolerance for max|a - b| / max|b|: ours is float64, transformers' is float32; see tests/test_huggingface_models.py.
"""

ABSENT = "(absent)"

_WHISPER = {
    "vocab_size": VOCAB,
    "d_model": 24,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_layers": 2,
    "decoder_attention_heads": 3,
    "decoder_ffn_dim": 36,
    "max_source_positions": 8,
    "max_target_positions": 24,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
}

MODELS: dict[str, Tiny] = {
    **{name: tiny for name, tiny in TINY.items() if name != "biogpt"},
    **DECODERS,
    "whisper": Tiny("WhisperForConditionalGeneration", _WHISPER),
}

SIZES = {"B": 2, "S": 12, "T": 9, "N": 2, "F": 16}

LEGACY: dict[str, list[Any]] = {
    "rope_scaling": [{"type": "linear", "factor": 2.0}, {"rope_type": "linear", "factor": 3.0}, {}, None],
    "rope_theta": [500.0],
    "rotary_emb_base": [500.0],
    "rotary_pct": [0.5, 1.0],
    "partial_rotary_factor": [0.5, 1.0],
    "global_rope_theta": [500.0],
    "local_rope_theta": [30.0],
    "rope_local_base_freq": [30.0],
    "rotary_dim": [2],
    "sliding_window_pattern": [2],
    "_sliding_window_pattern": [2],
    "global_attn_every_n_layers": [2],
    "n_embed": [48],
    "n_layer": [2],
    "n_head": [2],
    "n_embd": [48],
    "n_positions": [30],
    "n_ctx": [30],
    "d_model": [48],
    "head_dim": [4, 8],
    "num_heads": [2],
    "dense_act_fn": ["silu"],
    "is_gated_act": [True],
    "scale_decoder_outputs": [True, False],
    "is_causal": [True, False, None],
    "position_embedding_type": ["absolute", "relative_key", "relative_key_query"],
    "is_decoder": [True],
    "torch_dtype": ["float16"],
    "num_labels": [7],
    "use_bidirectional_attention": [True, "all", "vision"],
    "per_layer_config": [{"1": {"num_attention_heads": 2}}],
    "quantization_config": [{"quant_method": "bitsandbytes", "load_in_8bit": True}],
    "pruned_heads": [{"0": [1]}, {}],
    "text_config_dict": [{"hidden_act": "gelu"}],
    "vision_config_dict": [{"hidden_act": "gelu"}],
    "treadle_unknown": [True, 0.5],
}

EXCEPT = {("FalconForCausalLM", "output_attentions"): "theirs is not causal then, which is a defect of theirs"}

ROPE: dict[str, list[Any]] = {
    "type": ["linear", "default"],
    "rope_type": ["linear", "dynamic", "default", "yarn", "proportional"],
    "rope_theta": [500.0, None],
    "factor": [2.0],
    "partial_rotary_factor": [0.5, 1.0],
    "original_max_position_embeddings": [16],
    "attention_factor": [1.3],
    "beta_fast": [8],
    "mscale": [0.7],
    "truncate": [False],
    "mrope_section": [[1, 1, 1]],
    "full_attention": [{"rope_type": "default", "rope_theta": 500.0}],
    "sliding_attention": [{"rope_type": "default", "rope_theta": 500.0}],
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A base and the one change of its config.json."""

    base: str
    place: Place
    value: Any

    def config(self, config: Json) -> Json:
        changed = copy.deepcopy(config)
        inside = changed
        for key in self.place[:-1]:
            inside = inside[key]
        if self.value == ABSENT:
            del inside[self.place[-1]]
        else:
            inside[self.place[-1]] = self.value
        return changed

    def __str__(self) -> str:
        return f"{self.base}: {'.'.join(self.place)} = {json.dumps(self.value)}"


@dataclasses.dataclass(frozen=True)
class Base:
    """The folder of a small model, in the form that transformers writes now, or wrote before version 5."""

    name: str
    folder: Path
    config: Json

    graph: Graph

    @property
    def tiny(self) -> Tiny:
        return MODELS[self.name.removesuffix(BEFORE)]


BEFORE = " before"


def save(name: str, folder: Path) -> Base:
    """Write a base's folder."""
    model = MODELS[name.removesuffix(BEFORE)].build()
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if name.endswith(BEFORE):
        config = as_before(config)
        path.write_text(json.dumps(config))
    return Base(name, folder, config, resolve(folder, **MODELS[name.removesuffix(BEFORE)].given).graph)


def as_before(config: Json) -> Json:
    """Return a config in the form of transformers 4: rotary positions in separate keys."""
    config = copy.deepcopy(config)
    rope = config.pop("rope_parameters")
    kind = config["model_type"]
    if "full_attention" in rope:
        names = {"modernbert": ("global_rope_theta", "local_rope_theta")}.get(
            kind, ("rope_theta", "rope_local_base_freq")
        )
        for layers, name in zip(("full_attention", "sliding_attention"), names, strict=True):
            config[name] = rope[layers]["rope_theta"]
        rope = {n: v for n, v in rope["full_attention"].items() if n != "rope_theta"}
    else:
        base, part = (
            ("rotary_emb_base", "rotary_pct") if kind == "gpt_neox" else ("rope_theta", "partial_rotary_factor")
        )
        config[base] = rope.pop("rope_theta")
        if "partial_rotary_factor" in rope:
            config[part] = rope.pop("partial_rotary_factor")
    if rope.get("rope_type", "default") != "default":
        config["rope_scaling"] = rope
    return config


def bases(every: bool = False) -> list[str]:
    """Return the bases: one for each `model_type`, and for models with rotary positions a second one in the form before
    version 5.
    """
    firsts: dict[type, str] = {}
    for name, tiny in MODELS.items():
        firsts.setdefault(getattr(transformers, tiny.architecture).config_class, name)
    names = list(MODELS) if every else list(firsts.values())
    return [*names, *(name + BEFORE for name in names if has_rope(MODELS[name]))]


@functools.cache
def fields_of(architecture: str) -> Mapping[str, Any]:
    """Return the fields of a class's config, with their defaults, and other names for them."""
    cls = getattr(transformers, architecture).config_class
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = cls()
    found = {field.name: getattr(made, field.name, None) for field in dataclasses.fields(cls)}
    for other, name in cls.attribute_map.items():
        found[other] = found.get(name)
    return found


def has_rope(tiny: Tiny) -> bool:
    return "rope_parameters" in fields_of(tiny.architecture)


@functools.cache
def read_by(architecture: str) -> frozenset[str]:
    """Return the names that the modeling code of a class reads from its config."""
    source = inspect.getsource(sys.modules[getattr(transformers, architecture).__module__])
    source += inspect.getsource(transformers.masking_utils) + inspect.getsource(transformers.modeling_rope_utils)
    found = set(re.findall(r"config\.(\w+)\b(?!\()", source))
    found |= set(re.findall(r"getattr\([\w.]*config, \"(\w+)\"", source))
    return frozenset(name for name in found if not hasattr(dict, name))


ACTS = ["gelu", "gelu_new", "relu", "silu", "quick_gelu"]
PARTS = ("text_config", "vision_config")
ROPES = ("rope_parameters", "rope_scaling", "full_attention", "sliding_attention")


def other_values(key: str, value: Any) -> list[Any]:
    """Return other values for a key with this value."""
    if key in LEGACY and value is None:
        return LEGACY[key]
    match value:
        case bool():
            return [not value, None]
        case int():
            return [value + 1, 2 * value, 1, None]
        case float():
            return [1.5 * value + 0.25, 0.0, None]
        case str() if value in ACTS or key.endswith(("_act", "activation", "activation_function")):
            return [act for act in ACTS if act != value] + ["nonsense"]
        case str() if key == "feed_forward_proj":
            return ["relu", "gated-gelu", "gated-silu", "gelu", "gelu_new", "gated-relu"]
        case str():
            return ["relative_key", "mean", "last", "float16", None]
        case list() | tuple():
            return [list(value)[::-1], list(value)[:-1], [], None]
        case dict():
            return [{}, None]
        case _:
            return [True, False, 2, 0.5, "gelu", None]


def cases(base: Base) -> Iterator[Case]:
    """Yield all cases of a base."""
    architecture = base.tiny.architecture
    fields = fields_of(architecture)

    def changed(config: Json, place: Place, names: Mapping[str, Any]) -> Iterator[Case]:
        for key in sorted({*config, *names}):
            if key in ("architectures", "model_type", "transformers_version") or (architecture, key) in EXCEPT:
                continue
            here = (*place, key)
            if key in config:
                yield Case(base.name, here, ABSENT)
                values = other_values(key, config[key])
            else:
                values = other_values(key, names[key])
            values = [*values, *LEGACY.get(key, ()), *(ROPE.get(key, ()) if place and place[-1] in ROPES else ())]
            seen = [config.get(key, ABSENT)]
            for value in values:
                if not any(value == each and type(value) is type(each) for each in seen):
                    seen.append(value)
                    yield Case(base.name, here, value)
            if isinstance(config.get(key), dict) and key in (*PARTS, *ROPES):
                inner = ROPE if key in ROPES else part_fields(architecture, key)
                yield from changed(config[key], here, dict.fromkeys(inner) if key in ROPES else inner)

    names = {name: fields.get(name) for name in {*fields, *read_by(architecture), *LEGACY}}
    for other, name in getattr(transformers, architecture).config_class.attribute_map.items():
        names[other] = base.config.get(name, fields.get(name))
    yield from changed(base.config, (), names)


def part_fields(architecture: str, part: str) -> Mapping[str, Any]:
    cls = getattr(transformers, architecture).config_class.sub_configs[part]
    made = cls()
    return {
        **{field.name: getattr(made, field.name, None) for field in dataclasses.fields(cls)},
        **dict.fromkeys(("is_causal", "head_dim", "is_decoder", "treadle_unknown", "n_embd")),
    }


# -- both sides ------------------------------------------------------------------------------------------------------


def draw(graph: Graph, tiny: Tiny, padding: object) -> dict[str, Array]:
    """Draw inputs for a graph, without the padding token: transformers finds padding by that token, while our models
    take lengths.
    """
    rng = np.random.default_rng(0)
    inputs: dict[str, Array] = {}
    for v in graph.main.inputs:
        shape = v.type.evaluate(SIZES)
        if v.name in ("pixels", "mel"):
            inputs[v.name] = rng.standard_normal(shape, np.float32)
        else:
            tokens = rng.integers(tiny.first, VOCAB, shape)
            inputs[v.name] = np.where(tokens == padding, VOCAB - 1 if padding == VOCAB - 2 else VOCAB - 2, tokens)
    return inputs


def ours_of(folder: Path, tiny: Tiny, padding: object) -> tuple[Resolved, dict[str, Array], dict[str, Array]]:
    """Return our model of a folder, inputs, and outputs for them."""
    resolved = resolve(folder, **tiny.given)
    assert resolved.weights is not None
    inputs = draw(resolved.graph, tiny, padding)
    return resolved, inputs, dict(interpret(resolved.graph, inputs, resolved.weights, float64=True))


def theirs_of(folder: Path, tiny: Tiny, inputs: Mapping[str, Array]) -> dict[str, Array]:
    model = getattr(transformers, tiny.architecture).from_pretrained(folder, dtype=torch.float32)
    model.config.return_dict = True
    return answer(model.eval(), inputs)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The outcome of a case.

    equal     both sides return the same outputs
    refused   we refuse the folder, and transformers does not
    both      both sides refuse it
    lenient   transformers refuses it, and we do not
    unfit     transformers refuses weights of another shape, and we do not
    reported  the outputs differ, and we report the key as unread
    wrong     the outputs differ
    error     we raise an error that is not a TreadleError
    """

    outcome: str
    detail: str = ""


def verdict(base: Base, case: Case, folder: Path) -> Verdict:
    """Run a case with Treadle and with transformers, and return the verdict; the model is written to `folder`."""
    folder.mkdir(exist_ok=True)
    shutil.copyfile(base.folder / "model.safetensors", folder / "model.safetensors")
    config = case.config(base.config)
    (folder / "config.json").write_text(json.dumps(config))
    tiny = base.tiny
    padding = config.get("pad_token_id", fields_of(tiny.architecture).get("pad_token_id"))
    try:
        resolved, inputs, ours = ours_of(folder, tiny, padding)
    except TreadleError as error:
        refusal = f"{type(error).__name__}: {error.what} [{error.received}]"
        inputs = draw(base.graph, tiny, padding)
        try:
            theirs_of(folder, tiny, inputs)
        except Exception:
            return Verdict("both", refusal)
        return Verdict("refused", refusal)
    except Exception:
        return Verdict("error", traceback.format_exc(limit=-3))
    try:
        theirs = theirs_of(folder, tiny, inputs)
    except Exception as error:
        outcome = "unfit" if "ignore_mismatched_sizes" in str(error) else "lenient"
        return Verdict(outcome, f"{type(error).__name__}: {error}"[-300:].replace("\n", " "))
    for name in ours:
        if name not in theirs or ours[name].shape != theirs[name].shape:
            return Verdict("wrong", f"{name}: shape")
        worst = np.abs(ours[name] - theirs[name]).max() / np.abs(theirs[name]).max()
        if not worst < TOLERANCE:
            named = ".".join(case.place) in resolved.unread
            return Verdict("reported" if named else "wrong", f"{name} is {worst:.1g} off")
    return Verdict("equal")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=0, help="draw this number of cases for each model; 0: all")
    parser.add_argument("--families", default="", help="bases whose names contain one of these")
    parser.add_argument("--all", action="store_true", help="every small model, not one for each model_type")
    parser.add_argument("--show", default="wrong,unfit,error", help="outcomes to list")
    options = parser.parse_args()
    quiet()
    shown = options.show.split(",")
    tally: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as place:
        for number, name in enumerate(bases(options.all)):
            if options.families and not any(part in name for part in options.families.split(",")):
                continue
            base = save(name, Path(place) / f"base{number}")
            chosen = list(cases(base))
            if options.count:
                chosen = random.Random(options.seed + number).sample(chosen, min(options.count, len(chosen)))
            print(f"{name}: {len(chosen)} cases", file=sys.stderr, flush=True)
            for case in chosen:
                found = verdict(base, case, Path(place) / f"case{number}")
                tally[found.outcome] += 1
                if found.outcome in shown:
                    print(f"{found.outcome}\t{case}\t{found.detail}", flush=True)
    print(", ".join(f"{count} {outcome}" for outcome, count in sorted(tally.items())))
    return 1 if tally["wrong"] + tally["unfit"] + tally["error"] else 0


def quiet() -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)


if __name__ == "__main__":
    sys.exit(main())

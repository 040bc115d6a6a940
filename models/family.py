"""The interface of a model family: its declaration, and functions that map a checkpoint's config and names to it.

The functions below read a config.json from an untrusted source: each raises CheckpointError, with the option's name,
for an unsupported value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from treadle.files.shown_names import printable
from treadle.frontends.binding import Entry, Table
from treadle.frontends.declarations import Model
from treadle.frontends.dsl import MOST_REPETITIONS
from treadle.frontends.quantized.settings import KEYS
from treadle.ir.errors import CheckpointError, Hint
from treadle.models.reading.irrelevant_keys import IRRELEVANT
from treadle.models.reading.recorded_config import RecordedConfig

Config = Mapping[str, Any]

OTHER_WAYS = """\
or in Python its PyTorch module: treadle.compile(treadle.from_torch(module, example)) compiles it to run on arrays, with
.save, .log and .report as for every model; for a module of transformers, such as bloom or mixtral, first
module.config.use_cache = False, and if it has experts, module.set_experts_implementation("batched_mm")
or an ONNX file of that module: torch.onnx.export(module, example, "model.onnx", dynamo=True) writes one, and
treadle.compile("model.onnx"), or `treadle compile model.onnx`, takes it"""
"""The end of a hint: other ways to import a model that no family of the zoo supports."""

NO_PROJECTOR = "none"
"""The value of the option `mmproj` that reads a GGUF file without an image encoder."""

LANGUAGE_ONLY = Hint(
    f'mmproj="{NO_PROJECTOR}" reads the language model alone', f"--mmproj {NO_PROJECTOR} reads the language model alone"
)
"""The hint of an error for an image encoder in a GGUF file."""

_LARGEST = 2**31 - 1


@dataclass(frozen=True)
class ReadConfig:
    """The configuration that a config.json describes.

    model   the family's declaration, configured
    table   the table of checkpoint names
    unread  keys that were not read and are not known to be irrelevant; nested keys have dots: "rope_parameters.factor"
    """

    model: Model
    table: Table
    unread: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """One family of the zoo.

    name         the name on the command line ("gpt2")
    model        the declaration with its defaults
    model_types  the supported `model_type` values of a Hugging Face config.json
    from_config  converts a config.json's content to a configured model. Raises CheckpointError for an unknown option
    checkpoint   converts a config.json's content to the table of checkpoint names: our parameter names to the file's
    prefixes     possible prefixes of every name in a checkpoint
    aliases      by `model_type`, other names of keys in Hugging Face's class: {"num_hidden_layers": "n_layer"}
    irrelevant   keys in addition to `IRRELEVANT` that change no output of this family, each with the reason
    padding      converts a config.json's content to the rows of embedding tables, by our names, that get no gradient
                 when they are read: `padding_idx` of the module's nn.Embedding
    buffers      our names of weights that are not parameters of the module, and are not trained
    """

    name: str
    model: Model
    model_types: tuple[str, ...]
    from_config: Callable[[Config], Model]
    checkpoint: Callable[[Config], Table]
    prefixes: tuple[str, ...] = ("",)
    aliases: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    irrelevant: Mapping[str, str] = field(default_factory=dict)
    padding: Callable[[Config], Mapping[str, int]] = lambda config: {}
    buffers: tuple[str, ...] = ()

    def read(self, config: Config) -> ReadConfig:
        """Read a config.json.

        Raises CheckpointError, with the key, for an option that the family does not support, and if a key is present
        under two names with different values.
        """
        recorded = RecordedConfig(config, self.aliases.get(str(config.get("model_type"))))
        require(recorded, per_layer_config=None)
        for key in KEYS:
            recorded.get(key)  # `open_quantized` reads it
        model, table = self.from_config(recorded), self.checkpoint(recorded)
        known = {**IRRELEVANT, **self.irrelevant}
        unread = tuple(".".join(keys) for keys in recorded.unread() if keys[-1] not in known)
        return ReadConfig(model, table, unread)


def padding_rows(*tables: str, default: int | None = None) -> Callable[[Config], Mapping[str, int]]:
    """Return the `padding` function of a family whose nn.Embedding takes `pad_token_id`. `default` is the default in
    its config class.
    """

    def rows(config: Config) -> Mapping[str, int]:
        row = config.get("pad_token_id", default)
        return dict.fromkeys(tables, row) if isinstance(row, int) and row >= 0 else {}

    return rows


def weights_and_biases(modules: Mapping[str, str | Sequence[str]]) -> dict[str, Entry]:
    """Return a table's entries for the weight and the bias of modules, from our names to the possible names in the
    file.
    """
    table: dict[str, Entry] = {}
    for ours, theirs in modules.items():
        names = (theirs,) if isinstance(theirs, str) else theirs
        for part in ("weight", "bias"):
            table[f"{ours}.{part}"] = tuple(f"{name}.{part}" for name in names)
    return table


def require(config: Config, **expected: Any) -> None:
    """Check that options have the values that a declaration assumes. A missing option is accepted. The error names the
    first wrong option.
    """
    for name, value in expected.items():
        if config.get(name, value) != value:
            raise _unsupported(name, config[name], [value])


def require_head_dim(config: Config, head_dim: int) -> None:
    """Check `head_dim`, if a config has it, for a class whose head size is always dim / heads."""
    if config.get("head_dim") is not None:
        require(config, head_dim=head_dim)


def choose(config: Config, name: str, options: Mapping[str, Any], default: str | None = None) -> Any:
    """Return the value for a named option, such as an activation."""
    key = config.get(name, default)
    if not isinstance(key, str) or key not in options:
        raise _unsupported(name, key, options)
    return options[key]


def choose_architecture(config: Config, options: Mapping[str, Any]) -> Any:
    """Return the value for the class that saved the weights; if the config names no class, the value of the first
    option.
    """
    named = config.get("architectures")
    if named is None:
        return next(iter(options.values()))
    if not isinstance(named, list) or len(named) != 1 or not isinstance(named[0], str) or named[0] not in options:
        raise _unsupported("architectures", named, options)
    return options[named[0]]


def read_int(config: Config, name: str, default: int | None = None, *, least: int = 1, most: int = _LARGEST) -> int:
    """Return an integer from `least` to `most`; the default if it is missing or null."""
    value = default if config.get(name) is None else config[name]
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise CheckpointError(
            f"config.json: {name} must be {'a positive integer' if least == 1 else f'an integer from {least}'}"
            + (f" up to {most}" if most < _LARGEST else ""),
            received=_shown(value),
        )
    return value


def read_layers(config: Config, name: str, default: int | None = None) -> int:
    """Return a number of layers: a positive integer, which is limited because each layer is traced."""
    return read_int(config, name, default, most=MOST_REPETITIONS)


def read_float(config: Config, name: str, default: float) -> float:
    """Return a finite number, 0 or more; the default if it is missing."""
    value = config.get(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
        raise CheckpointError(f"config.json: {name} must be a number, 0 or more", received=_shown(value))
    return float(value)


def read_flag(config: Config, name: str, default: bool) -> bool:
    """Return a bool; the default if it is missing."""
    value = config.get(name, default)
    if not isinstance(value, bool):
        raise CheckpointError(f"config.json: {name} must be true or false", received=_shown(value))
    return value


SUMMARIES = dict.fromkeys(
    ("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels"),
    "configures the head of a class for multiple choice that the family does not read",
)
"""Irrelevant keys of GPT-2, GPT-J and ELECTRA. (ELECTRA reads some of them for multiple choice.)"""

_OWN_LABELS = {"ForMultipleChoice": 1, "ForNextSentencePrediction": 2}
"""Number of labels by the ending of the class name, for classes in which it is fixed: a row is a choice; a sentence
follows or not.
"""


def count_labels(config: Config) -> int:
    """Return the number of classes of a classifier: `num_labels`, else the length of `id2label`, else 2."""
    labels = config.get("id2label")
    if labels is None or config.get("num_labels") is not None:
        labels = dict.fromkeys(range(read_int(config, "num_labels", 2)))
    if not isinstance(labels, Mapping) or not labels:
        raise CheckpointError("config.json: id2label must be an object with a name per label", received=_shown(labels))
    (named,) = config.get("architectures") or [""]  # choose_architecture has checked that there is at most one
    return next((count for end, count in _OWN_LABELS.items() if named.endswith(end)), len(labels))


def _unsupported(name: str, value: object, supported: Any) -> CheckpointError:
    *others, last = map(_shown, supported)
    known = f"{', '.join(others)} or {last}" if others else last
    return CheckpointError(
        f"config.json: {name} is {_shown(value)}, which this family does not support",
        hint=f"a checkpoint whose {name} is {known}; changing it in config.json makes another model\n{OTHER_WAYS}",
    )


def _shown(value: object) -> str:
    return printable(repr(value))

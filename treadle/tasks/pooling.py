"""Pooling: the conversion of the hidden states of a sentence's tokens to one vector, as a model's files specify it.

    pooling = read_pooling(folder)
    pooling(hidden, lengths)            # f32[B, D]

Source: modules.json, 1_Pooling/config.json and sentence_bert_config.json of sentence-transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from treadle.files.shown_names import printable
from treadle.files.strict_json import JsonReader
from treadle.frontends.model_folder import ModelFolder
from treadle.ir.errors import CheckpointError

Vectors = npt.NDArray[np.float32]

_MODULES, _LENGTH = "modules.json", "sentence_bert_config.json"
_CONFIG_BYTES = 1 << 20
_NESTING, _VALUES = 16, 10_000

_MODES = {"mean": "mean", "mean_tokens": "mean", "cls": "first", "cls_token": "first"}
"""Pooling modes in all versions of sentence-transformers, and the corresponding mode of `Pooling`."""


@dataclass(frozen=True)
class Pooling:
    """The conversion of a sentence's hidden states to one vector.

    mode       "mean" over all tokens except padding, or the "first" token
    normalize  True if vectors are scaled to length one
    max_tokens maximum number of tokens of a sentence; None: the tokenizer's limit
    """

    mode: str = "mean"
    normalize: bool = True
    max_tokens: int | None = None

    def __call__(self, hidden: Vectors, lengths: npt.NDArray[np.int64]) -> Vectors:
        """Return the vectors [B, D] of a batch.

        hidden   the hidden states of all tokens, [B, S, D], or of the first tokens only, [B, D]
        lengths  number of tokens of each row without padding, [B]
        """
        if self.mode == "first":
            pooled = hidden
        else:
            real = np.arange(hidden.shape[1]) < lengths[:, None]
            pooled = np.where(real[:, :, None], hidden, 0).sum(1) / lengths[:, None]
        if self.normalize:
            pooled = pooled / np.maximum(np.linalg.norm(pooled, axis=1, keepdims=True), 1e-12)
        return pooled.astype(np.float32, copy=False)


def read_pooling(place: ModelFolder) -> Pooling:
    """Return the pooling that a folder specifies. Raises CheckpointError for an unsupported pooling."""
    if not place.has(_MODULES):
        return Pooling(max_tokens=_max_length(place))
    modules = _read_modules(place)
    kinds = [kind.rpartition(".")[2] for kind, _ in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]) or modules[0][1]:
        raise CheckpointError(
            "the folder's modules.json describes an unsupported pipeline",
            received=", ".join(map(printable, kinds)) or "no module",
            within=place.show(_MODULES),
            hint="the modules Transformer (in the folder itself), Pooling and, optionally, Normalize",
        )
    path = f"{modules[1][1]}/config.json"
    pooling = place.read_settings(path)
    chosen = _chosen_modes(pooling)
    if len(chosen) != 1 or chosen[0] not in _MODES:
        raise CheckpointError(
            "the folder uses an unsupported pooling of tokens",
            received=", ".join(map(printable, chosen)) or "none",
            within=place.show(path),
            hint="one of " + ", ".join(_MODES),
        )
    return Pooling(_MODES[chosen[0]], "Normalize" in kinds, _max_length(place))


def read_pooling_files(place: ModelFolder) -> dict[str, bytes]:
    """Return the files that `read_pooling` reads, by name, without missing ones. A damaged file is returned as it is:
    `read_pooling` of the files raises its error. Raises CheckpointError if a file is too long or cannot be read.
    """
    files = {name: place.read(name, _CONFIG_BYTES) for name in (_LENGTH, _MODULES) if place.has(name)}
    if _MODULES in files:
        with suppress(CheckpointError):
            for name in [f"{path}/config.json" for _, path in _read_modules(place) if path]:
                files[name] = place.read(name, _CONFIG_BYTES)
    return files


def _chosen_modes(pooling: Mapping[str, Any]) -> list[str]:
    """Return the pooling modes that 1_Pooling/config.json selects: by `"pooling_mode": "mean"` or, in older files, by
    `"pooling_mode_mean_tokens": true`.
    """
    named = pooling.get("pooling_mode")
    if named is not None:
        return [str(mode) for mode in (named if isinstance(named, list) else [named])]
    prefix = "pooling_mode_"
    return [key.removeprefix(prefix) for key, on in pooling.items() if key.startswith(prefix) and on is True]


def _read_modules(place: ModelFolder) -> list[tuple[str, str]]:
    """Return the type and the folder of each module in modules.json."""
    shown = place.show(_MODULES)
    data = place.read(_MODULES, _CONFIG_BYTES)
    reader = JsonReader(data, shown, nesting=_NESTING, values=_VALUES)
    modules = reader.value()
    reader.end()
    if isinstance(modules, list) and all(isinstance(m, Mapping) for m in modules):
        found = [(m.get("type"), m.get("path")) for m in modules]
        if all(isinstance(kind, str) and isinstance(path, str) for kind, path in found):
            return found
    raise CheckpointError("modules.json must list objects with a type and a path", within=shown)


def _max_length(place: ModelFolder) -> int | None:
    if not place.has(_LENGTH):
        return None
    length = place.read_settings(_LENGTH).get("max_seq_length")
    if length is None or (isinstance(length, int) and not isinstance(length, bool) and length > 0):
        return length
    raise CheckpointError(
        "max_seq_length must be a positive integer", received=printable(repr(length)), within=place.show(_LENGTH)
    )

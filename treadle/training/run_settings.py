"""The settings of a training run. A state stores them, so that a resumed run can be compared with the original run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from treadle.files.contained_files import PathLike
from treadle.files.shown_names import printable, shown_path
from treadle.ir.errors import Hint, UsageError
from treadle.training.states import read_notes
from treadle.training.text_data import TextData

Settings = dict[str, str]

_TEXTS, _TOKENS = "texts", "tokens"
_OF_BATCHES = ("seed", "objective", "batch", "gradient-accumulation-steps", "length", "holdout", _TEXTS, _TOKENS)
"""Settings that determine the batch of each step. They must not change in a resumed run."""


def collect_settings(data: TextData, **options: Any) -> Settings:
    """Return the settings by name, as strings: the settings of the data, with SHA-256 hashes of texts and tokens, and
    the command's options.
    """
    found = {
        "seed": data.batches.seed,
        "batch": data.batches.rows,
        "length": data.length,
        _TEXTS: data.digest,
        _TOKENS: data.tokens_digest,
        **options,
    }
    return {name: "none" if value is None else str(value) for name, value in found.items()}


def changed_settings(state: PathLike, now: Mapping[str, str]) -> dict[str, tuple[str, str]] | None:
    """Return the settings that differ from the settings of the run that wrote `state`: by name, the old and new value.

    Return None if the state stores no settings, since a `Trainer` wrote it without a run.

    Raises UsageError if the batches would differ, and CheckpointError as `read_notes` does.
    """
    before = read_notes(state)
    if not before:
        return None
    changed = {name: (before[name], value) for name, value in now.items() if before.get(name, value) != value}
    if changed.keys() & {_TEXTS, "length"}:
        changed.pop(_TOKENS, None)
    others = [name for name in _OF_BATCHES if name in changed]
    if others:
        flags = " ".join(f"--{name} {printable(changed[name][0])}" for name in others if name not in (_TEXTS, _TOKENS))
        texts = "the same texts and tokenizer" if changed.keys() & {_TEXTS, _TOKENS} else ""
        raise UsageError(
            "a resumed run needs the same batches as the original run",
            received="; ".join(_difference(name, *changed[name]) for name in others),
            within=shown_path(state),
            hint=Hint(
                "the same data, or train the saved model in a new run",
                f"{', '.join(filter(None, (flags, texts)))}; or train the saved model without --resume",
            ),
        )
    return changed


def _difference(name: str, before: str, now: str) -> str:
    if name == _TEXTS:
        return "other texts"
    if name == _TOKENS:
        return "other tokens of the same texts"
    return f"--{name} {printable(now)}, and the state has {printable(before)}"


def change_lines(changed: Mapping[str, tuple[str, str]] | None) -> list[str]:
    """Return a line for each changed setting, or a single line if the state stores no settings."""
    if changed is None:
        return ["the state does not store the seed, batches and texts that it was trained with: they are not compared"]
    return [f"resumed with {name} {now}; until now it was {before}" for name, (before, now) in changed.items()]

"""Training states: a safetensors file of trained weights, optimizer moments and the number of updates, to resume
training.

weight/h.0.mlp.up.weight, moment/mean.h.0.mlp.up.weight, ...     __metadata__: format, optimizer, steps, note.NAME, ...
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from treadle.files.contained_files import PathLike
from treadle.files.nearest_names import NearestNames
from treadle.files.shown_names import printable, shown_path
from treadle.files.whole_files import check_writable, reporting_failed_writes
from treadle.frontends.safetensors_file import PICKLE_SUFFIXES, SafetensorsFile
from treadle.ir.errors import CheckpointError, Hint, UsageError
from treadle.training.weight_files import write_weights

Array = np.ndarray[Any, Any]
Arrays = dict[str, Array]

FORMAT = "treadle training state"
NOTE = "note."
_WEIGHT, _MOMENT = "weight/", "moment/"
_MOST_DIGITS = 15
_NOT_NEGATIVE = _MOMENT + "square."


class DivergedError(UsageError):
    """The error of a step whose loss or gradient is NaN or infinite. Training with these weights cannot continue."""


@dataclass(frozen=True)
class TrainingState:
    """The state of a training between two calls of `step`. A step replaces the whole state.

    weights    trained weights by name, float32
    moments    the optimizer's moments, by names such as mean.NAME
    steps      the number of updates so far
    gradients  gradients summed over the calls since the last update, by the names of the gradient graph's outputs
    counted    number of counted positions in these calls
    calls      number of these calls
    """

    weights: Arrays
    moments: Arrays
    steps: int = 0
    gradients: Arrays = field(default_factory=dict)
    counted: float = 0.0
    calls: int = 0


def check_state_file(path: PathLike) -> None:
    """Raise UsageError if `write_state` could not write a state to this path. Nothing is written."""
    _refuse_pickle(path)
    with reporting_failed_writes("the state", path):
        check_writable(Path(path))


def write_state(path: PathLike, state: TrainingState, by: str, notes: Mapping[str, str]) -> None:
    """Write the weights, moments and number of updates of a state.

    by     the optimizer's repr
    notes  strings by name, which `read_notes` returns

    Raises UsageError if the file cannot be written, or if its name has the extension of a pickle.
    """
    _refuse_pickle(path)
    arrays = {_WEIGHT + name: array for name, array in state.weights.items()}
    arrays |= {_MOMENT + name: array for name, array in state.moments.items()}
    about = {"format": FORMAT, "optimizer": by, "steps": str(state.steps)}
    write_weights(Path(path), arrays, about | {NOTE + name: text for name, text in notes.items()})


def read_notes(path: PathLike) -> dict[str, str]:
    """Return only the notes of a state. Raises CheckpointError for a file that is damaged or not a state."""
    metadata = _opened(path).metadata
    return {name.removeprefix(NOTE): text for name, text in metadata.items() if name.startswith(NOTE)}


def read_state(path: PathLike, like: TrainingState, by: str) -> TrainingState:
    """Return the state in a file, which must have the same weights and moments as `like`.

    by  the optimizer's repr, which must be the stored one

    Raises CheckpointError if the file is damaged or was not written by `write_state`, or has other weights or another
    optimizer.
    """
    file = _opened(path)
    metadata = file.metadata
    steps = metadata.get("steps", "")

    def refuse(what: str, received: str) -> CheckpointError:
        return CheckpointError(what, received=printable(received)[:300], within=shown_path(path))

    if not (steps.isascii() and steps.isdigit() and len(steps) <= _MOST_DIGITS):
        raise refuse("the state lacks the number of updates", f"steps {steps[:40]!r}")
    if metadata.get("optimizer") != by:
        raise refuse(f"the state was written by another optimizer than {by}", metadata.get("optimizer", "none"))
    wanted = {_WEIGHT + name: array for name, array in like.weights.items()}
    wanted |= {_MOMENT + name: array for name, array in like.moments.items()}
    names = set(file.names())
    odd = sorted(names.symmetric_difference(wanted))
    if odd:
        near = NearestNames(sorted(names)).of(odd[0], 1) if odd[0] in wanted else []
        meant = f"; nearest {near[0]}" if near else ""
        raise refuse(f"the state and the model differ in the names of {len(odd)} arrays", f"{odd[0]}{meant}")
    read: Arrays = {}
    for name, array in wanted.items():
        record = file.record(name)
        if (record.dtype, tuple(record.shape)) != ("f32", array.shape):
            raise refuse(f"{printable(name)} must be f32{list(array.shape)}", f"{record.dtype}{list(record.shape)}")
        read[name] = np.array(file.array(name), np.float32)
        if not np.isfinite(read[name]).all() or (name.startswith(_NOT_NEGATIVE) and read[name].min(initial=0) < 0):
            raise refuse(
                f"{printable(name)} has values that training cannot produce",
                "NaN, infinity, or negative squares",
            )
    return TrainingState(
        {name: read[_WEIGHT + name] for name in like.weights},
        {name: read[_MOMENT + name] for name in like.moments},
        int(steps),
    )


def _refuse_pickle(path: PathLike) -> None:
    """Raise UsageError if the name has the extension of a pickle, which `read_state` would refuse."""
    name = Path(path)
    if name.suffix.lower() in PICKLE_SUFFIXES:
        raise UsageError(
            "a training state is not stored as a pickle, but the file name has a pickle extension",
            received=shown_path(path),
            hint=shown_path(name.with_suffix(".state")),
        )


def _opened(path: PathLike) -> SafetensorsFile:
    try:
        file = SafetensorsFile.open(path)
    except CheckpointError as error:
        if Path(path).is_file():
            error.hint = Hint("a file that `save_state` wrote, undamaged", "a file that --state wrote, undamaged")
        raise
    form = file.metadata.get("format", "another safetensors file")
    if form != FORMAT:
        raise CheckpointError("not a training state", received=printable(form)[:300], within=shown_path(path))
    return file

"""Errors for a checkpoint that does not fit the model. Lines that differ only in numbers are merged.

layer.{i}.mlp.up.weight <- h.{i}.mlp.up.weight; nearest: h.{i}.mlp.fc.weight; i = 0..11
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from treadle.files.nearest_names import NearestNames
from treadle.files.shown_names import printable
from treadle.frontends.name_patterns import filled, unfilled
from treadle.ir.errors import CheckpointError

_NUMBER = re.compile(r"(?<![0-9A-Za-z_])(?:0|[1-9][0-9]{0,8})(?![0-9A-Za-z_])")  # a separate part of a name
_SEARCHES = 100  # maximum number of searches for nearest names
_UNUSED_LINES = 40  # maximum number of lines of an error

FoldedLine = tuple[str, Mapping[str, str]]
"""A line of an error as a pattern, and the numbers in it: lines that differ only in the numbers are merged."""

OTHER_MODEL = "check that the configuration and the table of names belong to these weights"
"""The hint for weights of another model."""


class NamedTensors(Protocol):
    """A checkpoint that lists its tensors."""

    @property
    def label(self) -> str:
        """The file's name in errors."""

    def names(self) -> tuple[str, ...]:
        """Return all tensors' names."""

    def __contains__(self, name: object) -> bool: ...


@dataclass(frozen=True)
class MissingTensor:
    """A parameter that has no tensor in the checkpoint.

    pattern   the table pattern that the parameter matched, and the matched numbers
    names     possible names in the file, also patterns
    """

    pattern: str
    numbers: Mapping[str, str]
    names: tuple[str, ...]


def mismatch(
    missing: Sequence[MissingTensor],
    misfits: Sequence[FoldedLine],
    needed: int,
    unused: Sequence[str],
    checkpoint: NamedTensors,
) -> CheckpointError:
    """Return the error for a checkpoint that lacks tensors, or holds tensors that do not fit.

    needed   number of tensors that the model needs
    unused   the file's tensors that no parameter reads
    """
    counts = []
    lines = [checkpoint.label]
    if missing:
        counts.append(f"lacks {len(missing)} of the {needed} tensors that the model needs")
        lines += ["missing:", *_fold_lines(_missing_lines(missing, unused, checkpoint))]
    if misfits:
        counts.append(f"holds {len(misfits)} that do not fit")
        lines += ["do not fit:", *_fold_lines(misfits)]
    if unused:
        folded = _fold_names(unused)
        rest = len(folded) - _UNUSED_LINES
        lines += [f"unused by the model ({len(unused)}):", *folded[:_UNUSED_LINES]]
        lines += [f"  and {rest} more lines"] if rest > 0 else []
    error = CheckpointError(
        "the checkpoint " + " and ".join(counts),
        received=f"{len(checkpoint.names())} tensors",
        within="\n".join(lines),
        hint=OTHER_MODEL,
    )
    error.missing = tuple([filled(each.pattern, each.numbers) for each in missing])
    return error


def _missing_lines(
    missing: Sequence[MissingTensor], unused: Sequence[str], checkpoint: NamedTensors
) -> list[FoldedLine]:
    """Return, for each missing parameter, its possible names in the file and the nearest name that the file has."""
    # An unused tensor is more likely the intended tensor than a tensor that is bound.
    free, held = NearestNames(unused), NearestNames(checkpoint.names())
    found_for: dict[str, list[str]] = {}  # pattern -> nearest names found so far, as patterns
    searches = 0
    lines: list[FoldedLine] = []
    for item in missing:
        known = found_for.setdefault(item.pattern, [])
        near = next((n for n in known if filled(n, item.numbers) in checkpoint), None)
        if near is None and searches < _SEARCHES:
            searches += 1
            names = [filled(name, item.numbers) for name in item.names]
            found = [n for name in names for n in free.of(name)] or [n for name in names for n in held.of(name)]
            if found:
                near = unfilled(found[0], item.numbers)
                known.append(near)
        wanted = " or ".join(map(printable, item.names))
        line = printable(item.pattern) + (f" <- {wanted}" if wanted != item.pattern else "")
        lines.append((line + (f"; nearest: {printable(near)}" if near else ""), item.numbers))
    return lines


def _fold_lines(lines: Sequence[FoldedLine]) -> list[str]:
    """Return lines in which equal patterns are merged: each line ends in the numbers for which it applies."""
    groups: dict[str, list[Mapping[str, str]]] = {}
    for line, numbers in lines:
        groups.setdefault(line, []).append(numbers)
    return [
        f"  {filled(line, many[0])}" if len(many) == 1 else f"  {line}; {_ranges(many)}"
        for line, many in groups.items()
    ]


def _ranges(many: list[Mapping[str, str]]) -> str:
    """Return `i = 0..3, 7` for one placeholder; for several placeholders, return each combination of numbers."""
    if len(many[0]) != 1:
        return "; ".join(", ".join(f"{k} = {v}" for k, v in numbers.items()) for numbers in many)
    (placeholder,) = many[0]
    return f"{placeholder} = {_runs(int(numbers[placeholder]) for numbers in many)}"


def _runs(values: Iterable[int]) -> str:
    """Return the numbers in order, with runs shortened: 0..3, 7."""
    runs: list[list[int]] = []
    for value in sorted(values):
        if runs and value == runs[-1][-1] + 1:
            runs[-1][1:] = [value]
        else:
            runs.append([value])
    return ", ".join("..".join(map(str, run)) for run in runs)


def _fold_names(names: Sequence[str]) -> list[str]:
    """Return names; names that differ only in their first number are merged into one line: `h.{0..11}.attn.bias`."""
    groups: dict[tuple[str, str], list[int]] = {}
    for name in names:
        match = _NUMBER.search(name)
        around = (name[: match.start()], name[match.end() :]) if match else (name, "")
        groups.setdefault(around, []).extend([int(match.group())] if match else [])
    lines = []
    for (before, after), numbers in groups.items():
        number = f"{{{_runs(numbers)}}}" if len(numbers) > 1 else _runs(numbers)
        lines.append(f"  {printable(before + number + after, 400)}")
    return lines

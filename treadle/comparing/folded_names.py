"""Lists of scopes or weights as patterns: `h.{0..11}.attn`, `h.{0,2}.mlp`."""

from __future__ import annotations

from collections.abc import Iterable

from treadle.comparing.run_nodes import parts_of
from treadle.files.shown_names import printable

_SHOWN = 4


def fold_names(names: Iterable[str]) -> list[str]:
    """Return names in printable form, in order, without the empty scope. Names that differ only in their first number
    are joined in a pattern.
    """
    groups: dict[tuple[str, str] | str, list[int]] = {}
    for name in dict.fromkeys(filter(None, names)):
        parts = parts_of(name)
        at = next((i for i, part in enumerate(parts) if part.isascii() and part.isdigit() and len(part) < 10), None)
        if at is None:
            groups.setdefault(name, [])
            continue
        groups.setdefault((".".join(parts[:at]), ".".join(parts[at + 1 :])), []).append(int(parts[at]))
    found = []
    for key, numbers in groups.items():
        if isinstance(key, str):
            found.append(printable(key))
            continue
        middle = str(numbers[0]) if len(numbers) == 1 else f"{{{','.join(_ranges(sorted(numbers)))}}}"
        found.append(".".join(filter(None, (key[0] and printable(key[0]), middle, key[1] and printable(key[1])))))
    return found


def _ranges(numbers: list[int]) -> list[str]:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number <= runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return [str(run[0]) if run[0] == run[-1] else f"{run[0]}..{run[-1]}" for run in runs]


def few_names(names: Iterable[str]) -> str:
    """Return text with the first four patterns of names, and the number of further patterns."""
    found = fold_names(names)
    return ", ".join(found[:_SHOWN]) + (f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")

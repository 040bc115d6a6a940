"""Tensor names as patterns, in which `{i}` stands for a number: `h.{i}.attn.q.weight`."""

from __future__ import annotations

import re
from collections.abc import Mapping

_PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)\}")


def has_placeholder(name: str) -> bool:
    """Return True if a name contains a placeholder."""
    return _PLACEHOLDER.search(name) is not None


def compiled_pattern(pattern: str) -> re.Pattern[str]:
    """Return the regular expression of a pattern: in `h.{i}.x.{i}`, `{i}` is a number, the same at each occurrence."""
    parts: list[str] = []
    seen: set[str] = set()
    at = 0
    for match in _PLACEHOLDER.finditer(pattern):
        name = match.group(1)
        parts.append(re.escape(pattern[at : match.start()]))
        parts.append(f"(?P={name})" if name in seen else f"(?P<{name}>[0-9]+)")
        seen.add(name)
        at = match.end()
    return re.compile("".join(parts) + re.escape(pattern[at:]))


def filled(pattern: str, numbers: Mapping[str, str]) -> str:
    """Return a pattern with its placeholders replaced by numbers; placeholders without a number remain."""
    return _PLACEHOLDER.sub(lambda m: numbers.get(m.group(1), m.group(0)), pattern) if numbers else pattern


def unfilled(name: str, numbers: Mapping[str, str]) -> str:
    """Return a file's name as a pattern: the first parts that equal the numbers are replaced by placeholders."""
    for placeholder, number in numbers.items():
        name = re.sub(rf"(?<![0-9]){number}(?![0-9])", f"{{{placeholder}}}", name, count=1)
    return name

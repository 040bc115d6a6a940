"""Unused names for functions, for values, and for an entry's inputs and outputs."""

from __future__ import annotations

from collections.abc import Container


def free_name(base: str, taken: Container[str]) -> str:
    """Return `base` if it is not taken, else `base_2`, `base_3`, ...: the first that is not taken."""
    name, count = base, 1
    while name in taken:
        count += 1
        name = f"{base}_{count}"
    return name

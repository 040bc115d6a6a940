"""Unused names: of functions, of values, of an entry's inputs and outputs."""

from __future__ import annotations

from collections.abc import Container


def free_name(base: str, taken: Container[str]) -> str:
    """Return `base`, or `base_2` with the least number from 2 on that makes an unused name."""
    name, count = base, 1
    while name in taken:
        count += 1
        name = f"{base}_{count}"
    return name

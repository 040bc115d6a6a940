"""Names that are not taken yet: of functions, of values, of what an entry takes and gives."""

from __future__ import annotations

from collections.abc import Container


def free_name(base: str, taken: Container[str]) -> str:
    """`base`, or with the least number from 2 on that makes a name which is not taken: `base_2`."""
    name, count = base, 1
    while name in taken:
        count += 1
        name = f"{base}_{count}"
    return name

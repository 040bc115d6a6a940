"""The entries that a graph may have, and the order in which they run."""

from __future__ import annotations

from collections.abc import Sequence

ENTRIES = ("bind", "prologue", "main", "prefill", "step", "verify")
"""The names of entries, in the order in which they run. `main` is not there beside the three after it."""

ONCE = ("bind", "prologue")
"""Those of them that run once, before those that are called again and again."""


def are_entries(names: Sequence[str]) -> bool:
    """Whether a graph may have these entries: in order, and beside `bind` and `prologue` one that is called."""
    called = [name for name in names if name not in ONCE]
    ordered = list(names) == [name for name in ENTRIES if name in names]
    return ordered and bool(called) and (called == ["main"] or "main" not in called)

"""The possible entries of a graph, and their order."""

from __future__ import annotations

from collections.abc import Sequence

ENTRIES = ("bind", "prologue", "main", "prefill", "step", "verify")
"""The names of entries, in the order in which they run. `main` excludes the three after it."""

ONCE = ("bind", "prologue")
"""The entries that run once, before the entries that are called repeatedly."""


def are_entries(names: Sequence[str]) -> bool:
    """Return True if a graph may have these entries: in order, and at least one other than `bind` and `prologue`."""
    called = [name for name in names if name not in ONCE]
    ordered = list(names) == [name for name in ENTRIES if name in names]
    return ordered and bool(called) and (called == ["main"] or "main" not in called)

"""Workspace arrays of a kernel, by name."""

from __future__ import annotations

from types import SimpleNamespace


class Workspace(SimpleNamespace):
    """Workspace arrays by name, such as `work.scores`. Every other attribute is None: the kernel then allocates the
    array.
    """

    def __getattr__(self, name: str) -> None:
        return None


NOTHING = Workspace()

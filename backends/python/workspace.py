"""Workspace arrays of a kernel, by name."""

from __future__ import annotations

from types import SimpleNamespace


class Workspace(SimpleNamespace):
    """Arrays by name, such as `work.scores`; every other name is None: the kernel allocates such an array itself."""

    def __getattr__(self, name: str) -> None:
        return None


NOTHING = Workspace()

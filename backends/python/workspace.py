"""The arrays that a kernel is given beside its operands, by name."""

from __future__ import annotations

from types import SimpleNamespace


class Workspace(SimpleNamespace):
    """Arrays by name, such as `work.scores`; None under every other name: the kernel makes such an array itself."""

    def __getattr__(self, name: str) -> None:
        return None


NOTHING = Workspace()

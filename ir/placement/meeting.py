"""Where the ranks of a mesh meet: what a collective op asks for the result of what all ranks of a group bring.

An op has no way to the other ranks by itself. Who runs the programs of several ranks says in each rank's own context
how they meet (`meeting_at`); outside of such a context only a collective among one rank means anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from treadle.ir.errors import GraphError, Hint

if TYPE_CHECKING:
    from treadle.ir.ops.collectives import Collective, Starting


class Meeting(Protocol):
    """How one rank meets the others."""

    def exchange(self, op: Collective, part: Any) -> Any:
        """Give this rank's part; returns what `op.combined` makes of the parts of its group for this rank.

        part  an array or a tensor, which stays as it is; the result is a new one of the same kind
        """

    def begin(self, op: Starting, part: Any) -> None:
        """Begin what the next exchange of `op.awaited` waits for."""


_CURRENT: ContextVar[Meeting | None] = ContextVar("meeting", default=None)


@contextmanager
def meeting_at(meeting: Meeting) -> Iterator[None]:
    """Collectives of this context meet here."""
    token = _CURRENT.set(meeting)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def exchanged(op: Collective, part: Any) -> Any:
    """A collective's result for this rank. Raises GraphError where no other ranks are there to meet."""
    if op.ways == 1:
        return part
    meeting = _CURRENT.get()
    if meeting is None:
        raise GraphError(
            f"{op.name} is among {op.ways} ranks, and this program runs alone",
            hint=Hint("run_lab(plan, inputs, weights)", "treadle shard MODEL --mesh tp=2 --recipe megatron --lab"),
        )
    return meeting.exchange(op, part)


def begun(op: Starting, part: Any) -> Any:
    """Begin what is waited for later, where there are ranks to meet; a zero, of as many dimensions as the part."""
    meeting = _CURRENT.get()
    if op.ways > 1 and meeting is not None:
        meeting.begin(op, part)
    shape = (1,) * len(part.shape)
    return np.zeros(shape, part.dtype) if isinstance(part, np.ndarray) else part.new_zeros(shape)

"""Communication between the ranks of a mesh: the interface through which a collective op gets its result.

An op cannot reach the other ranks by itself. The code that runs the programs of several ranks sets the transport in
each rank's own context (`meeting_at`). Outside of such a context, only collectives with one rank can run.
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
    """The transport between one rank and the other ranks."""

    def exchange(self, op: Collective, part: Any) -> Any:
        """Exchange this rank's part. Return this rank's entry of `op.combined` on the parts of its group.

        part  an array or a tensor, which is unchanged; the result is a new one of the same kind
        """

    def begin(self, op: Starting, part: Any) -> None:
        """Start the transfer that the next exchange of `op.awaited` waits for."""


_CURRENT: ContextVar[Meeting | None] = ContextVar("transport", default=None)


@contextmanager
def meeting_at(meeting: Meeting) -> Iterator[None]:
    """Use this transport for all collectives in the context."""
    token = _CURRENT.set(meeting)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def exchanged(op: Collective, part: Any) -> Any:
    """Return a collective's result for this rank. Raises GraphError if the program runs without other ranks."""
    if op.ways == 1:
        return part
    meeting = _CURRENT.get()
    if meeting is None:
        raise GraphError(
            f"{op.name} needs {op.ways} ranks, but this program runs alone",
            hint=Hint("run_lab(plan, inputs, weights)", "treadle shard MODEL --mesh tp=2 --recipe megatron --lab"),
        )
    return meeting.exchange(op, part)


def begun(op: Starting, part: Any) -> Any:
    """Start a transfer that is awaited later, if there are other ranks. Return a zero with the part's number of
    dimensions.
    """
    meeting = _CURRENT.get()
    if op.ways > 1 and meeting is not None:
        meeting.begin(op, part)
    shape = (1,) * len(part.shape)
    return np.zeros(shape, part.dtype) if isinstance(part, np.ndarray) else part.new_zeros(shape)

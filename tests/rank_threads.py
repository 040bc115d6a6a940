"""The programs of ranks in threads of this process. Each runs on a backend; collectives communicate through a room."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from treadle.ir.ops.collectives import Collective
from treadle.ir.placement.meeting import meeting_at
from treadle.ir.placement.mesh import Mesh
from treadle.runtime.sharding_lab import Door, Room


class ThreadRoom(Room):
    """A room in which threads, one for each rank, exchange arrays or tensors.

    kinds  the types of the exchanged values
    """

    def __init__(self, mesh: Mesh) -> None:
        super().__init__(mesh)
        self.kinds: set[str] = set()

    def exchange(self, rank: int, op: Collective, part: Any) -> Any:
        tensor = type(part).__module__ == "torch"
        self.kinds.add(type(part).__name__)
        held = part.float() if str(part.dtype) == "torch.bfloat16" else part  # NumPy lacks bf16
        brought = np.array(held.numpy() if tensor else held)  # a rank may go on and overwrite its array
        found = np.array(super().exchange(rank, op, brought))
        if tensor:
            import torch

            return torch.from_numpy(found).to(part.dtype)
        return found


def run_ranks(mesh: Mesh, calls: Sequence[Callable[[], Any]]) -> tuple[list[Any], ThreadRoom]:
    """Return the result of each rank's call, and the room they used. Raises the error of a rank."""
    room = ThreadRoom(mesh)
    found: list[Any] = [None] * mesh.ranks
    failed: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            with meeting_at(Door(room, rank)):
                found[rank] = calls[rank]()
            room.leave(rank)
        except BaseException as error:
            failed.append(error)
            room.fail(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(mesh.ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return found, room

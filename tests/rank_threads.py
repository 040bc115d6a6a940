"""The programs of ranks in threads of this process: each on a backend, with collectives that meet in a room."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from treadle.ir.ops.collectives import Collective
from treadle.ir.placement.meeting import meeting_at
from treadle.ir.placement.mesh import Mesh


class ThreadRoom:
    """Meetings of threads, each of a rank. Every rank takes what `combined` makes of what its group brings.

    kinds  the types of what ranks brought
    """

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.barrier = threading.Barrier(mesh.ranks, timeout=60)
        self.brought: dict[int, tuple[Collective, Any]] = {}
        self.kinds: set[str] = set()

    def exchange(self, rank: int, op: Collective, part: Any) -> Any:
        """All ranks of the mesh come at once, which programs of one plan do."""
        tensor = type(part).__module__ == "torch"
        self.kinds.add(type(part).__name__)
        self.brought[rank] = op, part.numpy() if tensor else np.array(part)
        self.barrier.wait()
        group = self.mesh.group(rank, self.mesh.parts_of(op.over))
        made = op.combined([self.brought[r][0] for r in group], [self.brought[r][1] for r in group])
        found = np.array(made[group.index(rank)])
        self.barrier.wait()
        if tensor:
            import torch

            return torch.from_numpy(found)
        return found


class _ThreadDoor:
    def __init__(self, room: ThreadRoom, rank: int) -> None:
        self.room, self.rank = room, rank

    def exchange(self, op: Collective, part: Any) -> Any:
        return self.room.exchange(self.rank, op, part)


def run_ranks(mesh: Mesh, calls: Sequence[Callable[[], Any]]) -> tuple[list[Any], ThreadRoom]:
    """What each rank's call gives, and the room in which they met. Raises what a rank raised."""
    room = ThreadRoom(mesh)
    found: list[Any] = [None] * mesh.ranks
    failed: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            with meeting_at(_ThreadDoor(room, rank)):
                found[rank] = calls[rank]()
        except BaseException as error:
            failed.append(error)
            room.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(mesh.ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return found, room

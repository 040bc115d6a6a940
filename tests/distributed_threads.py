"""A replacement of torch.distributed whose ranks are threads of this process. It has the functions that
`treadle.runtime.distributed` calls.

    world = World(3); world.install(monkeypatch)
    found = world.run(lambda rank: ...)         # the results of each rank's call

The result of an asynchronous call is available only after the wait.
"""

from __future__ import annotations

import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

SECONDS = 20
"""Seconds after which a waiting rank gives up, on a machine that is not busy."""

REDUCED: dict[Any, Callable[[torch.Tensor], torch.Tensor]] = {
    dist.ReduceOp.SUM: lambda x: x.sum(0).to(x.dtype),
    dist.ReduceOp.PRODUCT: lambda x: x.prod(0).to(x.dtype),
    dist.ReduceOp.MAX: lambda x: x.amax(0),
    dist.ReduceOp.MIN: lambda x: x.amin(0),
}


class World:
    """A group of `size` ranks.

    called  the names of all calls, by rank
    groups  the groups that were created, and their timeouts
    sent    for each tensor that was sent, True if the sender waited for the end of the transfer
    """

    def __init__(self, size: int) -> None:
        self.size, self.own = size, threading.local()
        self.called: dict[int, list[str]] = defaultdict(list)
        self.groups: list[tuple[tuple[int, ...], float]] = []
        self.sent: list[list[int]] = []
        self._condition = threading.Condition()
        self._brought: dict[Any, dict[int, Any]] = defaultdict(dict)
        self._numbers: dict[Any, int] = defaultdict(int)
        self._sent: dict[tuple[int, int], queue.Queue[torch.Tensor]] = defaultdict(queue.Queue)

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Replace the functions of torch.distributed."""
        for name in (
            "all_reduce", "all_gather_single", "reduce_scatter_single", "all_to_all_single", "new_group",
            "isend", "irecv", "send", "recv", "batch_isend_irecv",
        ):  # fmt: skip
            patch.setattr(dist, name, getattr(self, name), raising=False)
        patch.setattr(dist, "P2POp", lambda call, tensor, peer: (call, tensor, peer))

    def run(self, call: Callable[[int], Any]) -> list[Any]:
        """Run the function once for each rank; return the results. Raises the error of a rank."""
        found: list[Any] = [None] * self.size

        def run(rank: int) -> None:
            self.own.rank = rank
            try:
                found[rank] = call(rank)
            except BaseException as error:
                found[rank] = error

        threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for each in found:
            if isinstance(each, BaseException):
                raise each
        return found

    def new_group(self, ranks: Sequence[int], timeout: Any) -> tuple[int, ...]:
        self.groups.append((tuple(ranks), timeout.total_seconds()))
        return tuple(ranks)

    def _together(self, name: str, group: tuple[int, ...] | None, brought: Any) -> tuple[int, list[Any]]:
        """Return this rank's index in a group, and the values that all ranks contribute."""
        rank, ranks = self.own.rank, group or tuple(range(self.size))
        self.called[rank].append(name)
        assert rank in ranks
        with self._condition:
            self._numbers[rank, ranks] += 1
            here = self._brought[ranks, self._numbers[rank, ranks]]
            here[rank] = (name, brought)
            self._condition.notify_all()
            if not self._condition.wait_for(lambda: len(here) == len(ranks), SECONDS):
                raise RuntimeError(f"rank {rank} waits in {name} in vain")
        assert {here[each][0] for each in ranks} == {name}
        return ranks.index(rank), [here[each][1] for each in ranks]

    def all_reduce(self, made: torch.Tensor, *, op: Any, group: Any) -> None:
        assert made.is_contiguous() and made.numel() and made.dtype != torch.int16
        _, parts = self._together("all_reduce", group, made.clone())
        made.copy_(REDUCED[op](torch.stack(parts).to(torch.uint8 if made.dtype == torch.bool else made.dtype)))

    def all_gather_single(self, to: torch.Tensor, mine: torch.Tensor, *, group: Any, async_op: bool) -> Any:
        assert to.is_contiguous() and mine.is_contiguous()

        def wait() -> None:
            _, parts = self._together("all_gather", group, mine.clone())
            to.copy_(torch.cat(parts))

        return SimpleNamespace(wait=wait) if async_op else wait()

    def reduce_scatter_single(self, to: torch.Tensor, mine: torch.Tensor, *, group: Any) -> None:
        at, parts = self._together("reduce_scatter", group, mine.clone())
        to.copy_(torch.stack(parts).sum(0).chunk(len(parts))[at])

    def all_to_all_single(self, to: torch.Tensor, mine: torch.Tensor, got: Any, given: Any, *, group: Any) -> None:
        at, parts = self._together("all_to_all", group, torch.split(mine.clone(), given))
        assert [len(each[at]) for each in parts] == got
        to.copy_(torch.cat([each[at] for each in parts]))

    def isend(self, mine: torch.Tensor, to: int) -> Any:
        assert mine.is_contiguous() and mine.numel()
        self.called[self.own.rank].append("isend")
        self._sent[self.own.rank, to].put(mine.clone())
        done: list[int] = []
        self.sent.append(done)
        return SimpleNamespace(wait=lambda: done.append(1), is_completed=lambda: bool(done))

    send = isend

    def irecv(self, made: torch.Tensor, source: int) -> Any:
        assert made.is_contiguous() and made.numel()
        waiting = self._sent[source, self.own.rank]
        return SimpleNamespace(wait=lambda: made.copy_(waiting.get(timeout=SECONDS)))

    def recv(self, made: torch.Tensor, source: int) -> None:
        self.irecv(made, source).wait()

    def batch_isend_irecv(self, calls: Sequence[Any]) -> list[Any]:
        assert calls
        return [call(tensor, peer) for call, tensor, peer in calls]

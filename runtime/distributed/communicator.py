"""The communicator: a rank's collectives through torch.distributed, with gloo on CPUs and NCCL on CUDA.

    communicator = Communicator(plan, rank, waiting=watch.waiting)
    with communicator.running("B=2, S=16"):      # the collectives of the rank's program run here
        outputs = executable(**inputs)

The shards of the ranks may have different sizes, and a rank's program knows only the size of its own shard. When a run
with new sizes first reaches a collective, the ranks of the group exchange the kind of the collective and the sizes of
their shards; later runs with these sizes reuse this information. If ranks are in different collectives, or have
different dtypes, this exchange raises an error.

A rank that sends a value (`hand_on`) continues immediately. A rank that starts an asynchronous gather or pass
(`start_gather`, `start_pass`) continues until it needs the result. Tensors stay on their device.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np

from treadle.ir.errors import GraphError, RankError
from treadle.ir.ops.axis_names import place
from treadle.ir.ops.collectives import AllGather, AllToAll, Awaited, Collective, HandOn, ReduceScatter, Starting
from treadle.ir.placement.meeting import meeting_at
from treadle.ir.placement.mesh import Mesh
from treadle.passes.sharding.plan import PlannedFunction, ShardingPlan
from treadle.runtime.distributed.transfers import (
    Begun,
    RankGroup,
    as_bytes,
    as_tensor,
    begin,
    held_bytes,
    joined,
    meet,
    tell,
)

if TYPE_CHECKING:
    import torch

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Traffic:
    """The traffic of a rank's calls of one collective.

    times  number of calls
    bytes  total payload: the bytes sent or received, whichever is larger
    """

    times: int = 0
    bytes: int = 0

    def beside(self, bytes: int) -> Traffic:
        """Return the traffic with one more call."""
        return Traffic(self.times + 1, self.bytes + bytes)


class Communicator:
    """A rank's collectives; see `treadle.ir.placement.meeting.Meeting`. torch.distributed must be initialized.

    device   device of this rank's tensors
    timeout  timeout of torch.distributed in seconds
    waiting  a context in which a rank waits for others, given a description of the wait
    failed   a function that returns the exception to raise in place of an error of torch.distributed
    traffic  by collective and the mesh axes that it spans
    """

    def __init__(
        self,
        plan: ShardingPlan,
        rank: int,
        device: torch.device,
        timeout: float,
        waiting: Callable[[str], AbstractContextManager[None]],
        failed: Callable[[Exception, str], Exception],
    ) -> None:
        self.plan, self.rank, self.device, self.timeout = plan, rank, device, timeout
        self.waiting, self.failed = waiting, failed
        self.traffic: dict[tuple[str, str], Traffic] = {}
        self.groups = {text: self._group(text) for text in met_over(plan)}
        self._known: dict[tuple[Hashable, int], list[list[int]]] = {}
        self._begun: dict[tuple[str, str], deque[Begun]] = {}
        self._sent: list[tuple[Any, torch.Tensor]] = []
        self._run: Hashable = ()
        self._number = 0

    @property
    def mesh(self) -> Mesh:
        """The mesh of the plan."""
        return self.plan.devices

    def _group(self, over: str) -> RankGroup:
        """Return the rank's group along parts of axes. Every rank creates all groups in one order, as torch.distributed
        requires.
        """
        import torch.distributed as dist

        parts = self.mesh.parts_of(over)
        found: RankGroup | None = None
        for rank in range(self.mesh.ranks):
            ranks = self.mesh.group(rank, parts)
            if ranks[0] != rank:
                continue
            handle = (
                None
                if len(ranks) == self.mesh.ranks
                else dist.new_group(ranks, timeout=timedelta(seconds=self.timeout))
            )
            if self.rank in ranks:
                found = RankGroup(ranks, ranks.index(self.rank), handle)
        assert found is not None
        return found

    @contextmanager
    def running(self, what: Hashable) -> Iterator[None]:
        """A context for one run of the rank's program. `what` identifies the entry, the sizes, and everything else that
        determines part sizes.
        """
        self._run, self._number = what, 0
        self._begun.clear()
        with meeting_at(self):
            yield
        with self._waiting("the last sends"):
            while self._sent:
                work, _ = self._sent[0]
                work.wait()
                del self._sent[0]
            self._settle()

    @contextmanager
    def _waiting(self, activity: str) -> Iterator[None]:
        """A context in which this rank waits for others, with a description. An error of torch.distributed is replaced
        by the error of the rank that caused it.
        """
        with self.waiting(activity):
            try:
                yield
            except RuntimeError as error:  # all errors that torch.distributed raises
                raise self.failed(error, activity) from error

    def _settle(self) -> None:
        """Wait until a GPU has finished its collectives, which are only enqueued, so that the watch knows which rank
        this one waits for.
        """
        if self.device.type != "cpu":
            import torch

            torch.cuda.current_stream(self.device).synchronize()

    # -- collectives -------------------------------------------------------------------------------------------

    def exchange(self, op: Collective, part: Any) -> Any:
        """See `Meeting.exchange`. Raises RankError if other ranks do not arrive, or arrive with another collective."""
        group, given = self._group_of(op), as_tensor(part)
        with self._waiting(f"{op.name} over {op.over}" + (f", {op.because}" if op.because else "")):
            if isinstance(op, Awaited) and op.ahead:
                made = self._finished(op)
            elif isinstance(op, HandOn):
                self._descriptions(op, given, group)
                made = self._hand_on(given, group)
            else:
                made = meet(op, given, group, self._descriptions(op, given, group))
            if not (isinstance(op, HandOn) and group.at == 0):
                self._settle()
        self._count(op, group, given, made)
        return made if isinstance(part, type(given)) else made.numpy()

    def begin(self, op: Starting, part: Any) -> None:
        """See `Meeting.begin`."""
        group, given, awaited = self._group_of(op), as_tensor(part), op.awaited
        with self._waiting(f"{op.name} over {op.over}"):
            # A copy: a value other than a weight may be overwritten before all of it is sent.
            begun = begin(awaited, given.clone(), group, self._descriptions(op, given, group))
        self._begun.setdefault((awaited.name, op.over), deque()).append(begun)

    def send(self, part: Any, to: int, activity: str) -> None:
        """Send a part, such as an output, to a rank. `activity` describes the call in errors."""
        import torch.distributed as dist

        raw = as_bytes(as_tensor(part).contiguous())
        with self._waiting(activity):
            if raw.numel():
                dist.send(raw, to)
            self._settle()

    def received(self, like: Array, source: int, activity: str) -> Array:
        """Return the array that a rank sends. It has the shape and dtype of `like`."""
        import torch
        import torch.distributed as dist

        raw = torch.empty(like.nbytes, dtype=torch.uint8, device=self.device)
        with self._waiting(activity):
            if like.nbytes:
                dist.recv(raw, source)
            found: Array = raw.cpu().numpy().view(like.dtype).reshape(like.shape)
        return found

    def _group_of(self, op: Collective) -> RankGroup:
        """Return the group of a collective. Raises GraphError if the plan has no such collective."""
        if isinstance(op, HandOn):
            line = self.mesh.group(self.rank, self.mesh.parts_of(op.over))
            pair = op.among(line) if len(line) == op.ways else ()
            if self.rank in pair:
                return RankGroup(pair, pair.index(self.rank), None)
        else:
            group = self.groups.get(op.over)
            if group is not None and len(group.ranks) == op.ways:
                return group
        raise GraphError(f"{op.name} over {op.over} among {op.ways} ranks is not a collective of the plan")

    def _hand_on(self, given: torch.Tensor, group: RankGroup) -> torch.Tensor:
        """Send a value and continue, or receive one. Calls are in program order; a receiver waits for the sender."""
        import torch
        import torch.distributed as dist

        if group.at == 0:
            sent = as_bytes(given.contiguous().clone())
            self._sent = [each for each in self._sent if not each[0].is_completed()]
            if sent.numel():
                self._sent.append((dist.isend(sent, group.ranks[1]), sent))
            return torch.zeros_like(given)
        made = torch.empty_like(given, memory_format=torch.contiguous_format)
        if made.numel():
            dist.recv(as_bytes(made), group.ranks[0])
        return made

    def _finished(self, op: Awaited) -> torch.Tensor:
        """Return the result of a collective that was started earlier."""
        waiting = self._begun.get((op.name, op.over))
        if not waiting or waiting[0].op.meeting != op.meeting:
            raise GraphError(f"{op.name} over {op.over} was not started", received=op.because or None)
        begun = waiting.popleft()
        begun.wait()
        return begun.finish()

    def _count(self, op: Collective, group: RankGroup, given: torch.Tensor, made: torch.Tensor) -> None:
        before = self.traffic.get((op.name, op.over), Traffic())
        is_got = isinstance(op, HandOn) and group.at == 1
        moved = 0 if is_got else op.payload(held_bytes(given), held_bytes(made))
        self.traffic[op.name, op.over] = before.beside(moved)

    def _descriptions(self, op: Collective, given: torch.Tensor, group: RankGroup) -> list[list[int]]:
        """Return the description that each rank of the group sent of this collective, in order."""
        key = self._run, self._number
        self._number += 1
        if key not in self._known:
            self._known[key] = self._tell(op, given, group)
        return self._known[key]

    def _tell(self, op: Collective, given: torch.Tensor, group: RankGroup) -> list[list[int]]:
        what = int.from_bytes(hashlib.sha256(repr(op.meeting).encode()).digest()[:7])
        kind = int.from_bytes(hashlib.sha256(str(given.dtype).encode()).digest()[:7])
        own = op.size.evaluate({}) if isinstance(op, (AllGather, ReduceScatter, AllToAll)) else given.numel()
        brought = given.shape[place(joined(op), given.dim())] if given.dim() else 1
        rows = tell([what, kind, own, brought], group, given.device, pair=isinstance(op, HandOn))
        for rank, row in zip(group.ranks, rows, strict=True):
            if row[0] != what:
                raise RankError(
                    f"ranks {self.rank} and {rank} are in different collectives",
                    received=f"rank {self.rank}: {op.name} over {op.over}, collective {self._number} of its run",
                )
            if row[1] != kind:
                raise RankError(f"ranks {self.rank} and {rank} have different dtypes in {op.name} over {op.over}")
            if isinstance(op, HandOn) and row[2] != own:
                raise RankError(
                    f"ranks {self.rank} and {rank} have {own} and {row[2]} elements in {op.name} over {op.over}"
                )
        return rows


def met_over(plan: ShardingPlan) -> tuple[str, ...]:
    """Return the parts of mesh axes that the plan's collectives span, in order."""
    found: dict[str, None] = {}

    def look(planned: PlannedFunction) -> None:
        moves = [move for node in planned.nodes for move in node.moves] + list(planned.moves)
        found.update({plan.mesh.text_of(step.over): None for move in moves for step in move.steps if step.sends})
        found.update({plan.mesh.text_of(node.ring): None for node in planned.nodes if node.ring})
        for node in planned.nodes:
            if node.body is not None:
                look(node.body)

    for planned in plan.functions:
        look(planned)
    return tuple(sorted(found))

"""The communicator: how a rank meets the others through torch.distributed, by gloo on processors and NCCL on CUDA.

    communicator = Communicator(plan, rank, waiting=watch.waiting)
    with communicator.running("B=2, S=16"):      # in which collectives of the rank's program meet here
        outputs = executable(**inputs)

Parts need not be equal, and a rank's program knows its own part alone. So when a run of new sizes first comes to a
collective, the ranks of the group tell each other what they meet in and how large their parts are; later runs of these
sizes know. Who meets in another collective, or with another dtype, is told so then.

A rank that hands a value on goes on at once; so does one that begins to gather (`start_gather`), until it needs what is
gathered.

What torch.distributed sends are whole contiguous tensors; parts are laid out for it here, the shorter ones padded.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np

from treadle.ir.errors import GraphError, RankError
from treadle.ir.ops.axis_names import place
from treadle.ir.ops.collectives import (
    AllGather,
    AllReduce,
    AllToAll,
    Collective,
    HandOn,
    PassOn,
    ReduceScatter,
    StartGather,
)
from treadle.ir.placement.meeting import meeting_at
from treadle.ir.placement.mesh import Mesh
from treadle.passes.sharding.plan import PlannedFunction, ShardingPlan

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

_WORDS = (
    4  # of i64 that ranks tell each other of a meeting: what, dtype, how long the part that they take is, and bring
)


@dataclass(frozen=True)
class Traffic:
    """What a rank's calls of one collective were about.

    times  how often
    bytes  payloads together: what it brought, or got, if that is more
    """

    times: int = 0
    bytes: int = 0

    def beside(self, bytes: int) -> Traffic:
        """With one call more."""
        return Traffic(self.times + 1, self.bytes + bytes)


@dataclass(frozen=True)
class _Group:
    """The ranks that meet along parts of mesh axes.

    ranks  in the order of their parts
    at     this rank's place among them
    """

    ranks: tuple[int, ...]
    at: int
    handle: ProcessGroup | None


@dataclass(frozen=True)
class _Begun:
    """A gather that runs.

    op      what waits for it
    wait    until it is done
    finish  what it gives, once it is
    """

    op: AllGather
    wait: Callable[[], Any]
    finish: Callable[[], torch.Tensor]


class Communicator:
    """A rank's meetings; see `treadle.ir.placement.meeting.Meeting`. torch.distributed must have been started.

    timeout  seconds after which torch.distributed gives up
    waiting  a context in which a rank waits for others, given what for
    failed   what is raised in place of an error of torch.distributed
    traffic  by collective and the axes that it is over
    """

    def __init__(
        self,
        plan: ShardingPlan,
        rank: int,
        timeout: float,
        waiting: Callable[[str], AbstractContextManager[None]],
        failed: Callable[[Exception, str], Exception],
    ) -> None:
        self.plan, self.rank, self.timeout, self.waiting, self.failed = plan, rank, timeout, waiting, failed
        self.traffic: dict[tuple[str, str], Traffic] = {}
        self.groups = {text: self._group(text) for text in met_over(plan)}
        self._known: dict[tuple[Hashable, int], list[list[int]]] = {}
        self._begun: dict[str, deque[_Begun]] = {}
        self._sent: list[tuple[Any, torch.Tensor]] = []
        self._run: Hashable = ()
        self._number = 0

    @property
    def mesh(self) -> Mesh:
        """The plan's, of its ranks."""
        return self.plan.devices

    def _group(self, over: str) -> _Group:
        """Its group along parts of axes; every rank makes all groups, in one order, as torch.distributed asks."""
        import torch.distributed as dist

        parts = self.mesh.parts_of(over)
        found: _Group | None = None
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
                found = _Group(ranks, ranks.index(self.rank), handle)
        assert found is not None
        return found

    @contextmanager
    def running(self, what: Hashable) -> Iterator[None]:
        """One run of the rank's program: of this entry, with these sizes, what else decides how large parts are."""
        self._run, self._number = what, 0
        self._begun.clear()
        with meeting_at(self):
            yield
        with self.waiting("handing on"):
            while self._sent:
                work, _ = self._sent[0]
                try:
                    work.wait()
                except RuntimeError as error:
                    raise self.failed(error, "handing on") from error
                del self._sent[0]

    # -- meeting -----------------------------------------------------------------------------------------------

    def exchange(self, op: Collective, part: Any) -> Any:
        """See `Meeting.exchange`. Raises RankError where others do not come, or come with something else."""
        group, given = self._group_of(op), _tensor(part)
        told = f"{op.name} over {op.over}" + (f", {op.because}" if op.because else "")
        with self.waiting(told):
            try:
                if isinstance(op, AllGather) and op.ahead:
                    made = self._finished(op, given)
                else:
                    sizes = self._told(op, given, group)
                    made = self._hand_on(given, group) if isinstance(op, HandOn) else self._met(op, given, group, sizes)
            except RuntimeError as error:  # all that torch.distributed raises
                raise self.failed(error, told) from error
        self._count(op, group, given, made)
        return made if isinstance(part, type(given)) else made.numpy()

    def begin(self, op: StartGather, part: Any) -> None:
        """See `Meeting.begin`."""
        group, given = self._group_of(op), _tensor(part)
        told = f"{op.name} over {op.over}"
        with self.waiting(told):
            try:
                # A copy: what is no weight may be written over before all of it is sent.
                begun = _begin_gather(op.gather, given.clone(), group, self._told(op, given, group))
            except RuntimeError as error:
                raise self.failed(error, told) from error
        self._begun.setdefault(op.over, deque()).append(begun)

    def _group_of(self, op: Collective) -> _Group:
        """Who meets in an op. Raises GraphError where the plan says no such meeting."""
        if isinstance(op, HandOn):
            line = self.mesh.group(self.rank, self.mesh.parts_of(op.over))
            pair = op.among(line) if len(line) == op.ways else ()
            if self.rank in pair:
                return _Group(pair, pair.index(self.rank), None)
        else:
            group = self.groups.get(op.over)
            if group is not None and len(group.ranks) == op.ways:
                return group
        raise GraphError(f"{op.name} over {op.over} among {op.ways} ranks is no meeting of the plan's")

    def _met(self, op: Collective, given: torch.Tensor, group: _Group, sizes: list[list[int]]) -> torch.Tensor:
        made: torch.Tensor = _MEETINGS[type(op)](op, given, group, sizes)
        return made

    def _hand_on(self, given: torch.Tensor, group: _Group) -> torch.Tensor:
        """Send and go on, or receive; in the order of the program, in which a line of ranks waits for those before."""
        import torch
        import torch.distributed as dist

        if group.at == 0:
            sent = _as_bytes(given.contiguous().clone())
            self._sent = [each for each in self._sent if not each[0].is_completed()]
            if sent.numel():
                self._sent.append((dist.isend(sent, group.ranks[1]), sent))
            return torch.zeros_like(given)
        made = torch.empty_like(given, memory_format=torch.contiguous_format)
        if made.numel():
            dist.recv(_as_bytes(made), group.ranks[0])
        return made

    def _finished(self, op: AllGather, given: torch.Tensor) -> torch.Tensor:
        """What a gather gives that has begun before."""
        waiting = self._begun.get(op.over)
        if not waiting or waiting[0].op.meeting != op.meeting:
            raise GraphError(f"{op.name} over {op.over} has not begun", received=op.because or None)
        begun = waiting.popleft()
        begun.wait()
        return begun.finish()

    def _count(self, op: Collective, group: _Group, given: torch.Tensor, made: torch.Tensor) -> None:
        before = self.traffic.get((op.name, op.over), Traffic())
        is_got = isinstance(op, HandOn) and group.at == 1
        moved = 0 if is_got else op.payload(_bytes(given), _bytes(made))
        self.traffic[op.name, op.over] = before.beside(moved)

    def _told(self, op: Collective, given: torch.Tensor, group: _Group) -> list[list[int]]:
        """What each rank of the group has told of this meeting, in order."""
        key = self._run, self._number
        self._number += 1
        if key not in self._known:
            self._known[key] = self._tell(op, given, group)
        return self._known[key]

    def _tell(self, op: Collective, given: torch.Tensor, group: _Group) -> list[list[int]]:
        import torch

        what = int.from_bytes(hashlib.sha256(repr(op.meeting).encode()).digest()[:7])
        kind = int.from_bytes(hashlib.sha256(str(given.dtype).encode()).digest()[:7])
        own = op.size.evaluate({}) if isinstance(op, (AllGather, ReduceScatter, AllToAll)) else given.numel()
        brought = given.shape[place(_joined(op), given.dim())] if given.dim() else 1
        mine = torch.tensor([what, kind, own, brought], dtype=torch.int64, device=given.device)
        all_told = torch.empty(len(group.ranks) * _WORDS, dtype=torch.int64, device=given.device)
        if isinstance(op, HandOn):
            _swap(all_told, mine, group)
        else:
            _gather(all_told, mine, group)
        rows: list[list[int]] = all_told.reshape(-1, _WORDS).tolist()
        for rank, row in zip(group.ranks, rows, strict=True):
            if row[0] != what:
                raise RankError(
                    f"ranks {self.rank} and {rank} meet in different collectives",
                    received=f"rank {self.rank}: {op.name} over {op.over}, its {self._number}th",
                )
            if row[1] != kind:
                raise RankError(f"ranks {self.rank} and {rank} meet with different dtypes, in {op.name} over {op.over}")
            if isinstance(op, HandOn) and row[2] != own:
                raise RankError(f"ranks {self.rank} and {rank} hand on {own} and {row[2]} elements over {op.over}")
        return rows


def met_over(plan: ShardingPlan) -> tuple[str, ...]:
    """The parts of mesh axes along which ranks meet, as their collectives say them, in order."""
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


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


# -- each collective -----------------------------------------------------------------------------------------------


def _joined(op: Collective) -> int:
    """The dimension along which parts of ranks are joined."""
    if isinstance(op, AllToAll):
        return op.onto
    return op.axis if isinstance(op, (AllGather, ReduceScatter, PassOn, StartGather)) else 0


def _all_reduce(op: AllReduce, given: torch.Tensor, group: _Group, told: Sequence[Sequence[int]]) -> torch.Tensor:
    import torch
    import torch.distributed as dist

    by = {"sum": "SUM", "prod": "PRODUCT", "max": "MAX", "min": "MIN", "and": "MIN", "or": "MAX"}[op.monoid]
    # A copy, which is reduced in place; gloo has no 16-bit integers.
    made = given.to(torch.int32) if given.dtype == torch.int16 else given.clone(memory_format=torch.contiguous_format)
    if made.numel():
        dist.all_reduce(made, op=getattr(dist.ReduceOp, by), group=group.handle)
    return made.to(given.dtype)


def _all_gather(op: AllGather, given: torch.Tensor, group: _Group, told: Sequence[Sequence[int]]) -> torch.Tensor:
    begun = _begin_gather(op, given, group, told)
    begun.wait()
    return begun.finish()


def _begin_gather(op: AllGather, given: torch.Tensor, group: _Group, told: Sequence[Sequence[int]]) -> _Begun:
    """Give the part to the others, and do not wait for theirs."""
    import torch

    axis = place(op.axis, given.dim())
    lengths = [row[3] for row in told]
    longest = max(lengths)
    mine = _padded(given.movedim(axis, 0), longest)
    made = mine.new_empty((len(lengths), *mine.shape))
    work = _gather(_as_bytes(made), _as_bytes(mine), group, begin=True)

    def whole() -> torch.Tensor:
        uneven = min(lengths) < longest
        joined = torch.cat([made[i, :n] for i, n in enumerate(lengths)]) if uneven else made.flatten(0, 1)
        return joined.movedim(0, axis).contiguous()

    return _Begun(op, work.wait, whole)


def _pass_on(op: PassOn, given: torch.Tensor, group: _Group, told: Sequence[Sequence[int]]) -> torch.Tensor:
    """Send to one rank and receive from another at once: nobody waits until another one has sent."""
    axis, count = place(op.axis, given.dim()), len(group.ranks)
    to, source = (group.at + op.steps) % count, (group.at - op.steps) % count
    shape = [told[source][3] if d == axis else n for d, n in enumerate(given.shape)]
    made = given.new_empty(shape)
    _exchange(made, given.contiguous(), source, to, group)
    return made


def _reduce_scatter(
    op: ReduceScatter, given: torch.Tensor, group: _Group, told: Sequence[Sequence[int]]
) -> torch.Tensor:
    import torch
    import torch.distributed as dist

    axis = place(op.axis, given.dim())
    lengths = [row[2] for row in told]
    longest = max(lengths)
    cut = torch.split(given.movedim(axis, 0), lengths)
    brought = torch.stack([_padded(piece, longest) for piece in cut])
    made = brought.new_empty(brought.shape[1:])
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # its name before
    scatter(made.reshape(-1), brought.reshape(-1), group=group.handle)
    return made[: lengths[group.at]].movedim(0, axis).contiguous()


def _all_to_all(op: AllToAll, given: torch.Tensor, group: _Group, told: Sequence[Sequence[int]]) -> torch.Tensor:
    import torch
    import torch.distributed as dist

    axis, onto = place(op.axis, given.dim()), place(op.onto, given.dim())
    sent = [piece.contiguous() for piece in torch.split(given, [row[2] for row in told], dim=axis)]
    shapes = [
        [told[group.at][2] if d == axis else row[3] if d == onto else n for d, n in enumerate(given.shape)]
        for row in told
    ]
    counts = [int(np.prod(shape, dtype=np.int64)) * given.element_size() for shape in shapes]
    made = torch.empty(sum(counts), dtype=torch.uint8, device=given.device)
    brought = torch.cat([_as_bytes(piece) for piece in sent])
    dist.all_to_all_single(made, brought, counts, [_bytes(piece) for piece in sent], group=group.handle)
    parts = [
        piece.clone().view(given.dtype).reshape(shape)
        for piece, shape in zip(torch.split(made, counts), shapes, strict=True)
    ]
    return torch.cat(parts, dim=onto)


def _gather(to: torch.Tensor, mine: torch.Tensor, group: _Group, *, begin: bool = False) -> Any:
    import torch.distributed as dist

    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before
    return gather(to, mine, group=group.handle, async_op=begin)


def _swap(to: torch.Tensor, mine: torch.Tensor, pair: _Group) -> None:
    """What both of a pair have, in order."""
    other = 1 - pair.at
    rows = to.reshape(2, -1)
    rows[pair.at] = mine
    _exchange(rows[other], mine, other, other, pair)


def _exchange(made: torch.Tensor, given: torch.Tensor, source: int, to: int, group: _Group) -> None:
    """Receive from a rank of the group what it sends, while another receives ours."""
    import torch.distributed as dist

    if to == group.at:
        made.copy_(given)
        return
    pairs = ((dist.isend, given, to), (dist.irecv, made, source))
    calls = [dist.P2POp(call, _as_bytes(each), group.ranks[at]) for call, each, at in pairs if each.numel()]
    for work in dist.batch_isend_irecv(calls) if calls else ():
        work.wait()


def _tensor(part: Any) -> torch.Tensor:
    """A part as a tensor over the same memory."""
    import torch

    given = part if isinstance(part, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(part))
    return given.reshape(np.shape(part))


def _padded(part: torch.Tensor, length: int) -> torch.Tensor:
    """A contiguous part with so many rows, of which those past its own are zeros."""
    if part.shape[0] == length:
        return part.contiguous()
    made = part.new_zeros((length, *part.shape[1:]))
    made[: part.shape[0]] = part
    return made


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory of a contiguous tensor, whatever its dtype: what is not computed with."""
    import torch

    return tensor.reshape(-1).view(torch.uint8)


_MEETINGS: Mapping[type[Collective], Callable[..., Any]] = {
    AllReduce: _all_reduce,
    AllGather: _all_gather,
    ReduceScatter: _reduce_scatter,
    AllToAll: _all_to_all,
    PassOn: _pass_on,
}

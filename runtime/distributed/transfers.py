"""Transfers: each collective as calls of torch.distributed, without copies between devices.

torch.distributed sends whole contiguous tensors. Parts are copied into that form here, and shorter parts are padded.
The `descriptions` that ranks exchange are rows of WORDS numbers: the kind of the collective, a dtype, the length of the
part that the rank receives, and the length of the part that it sends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from treadle.ir.ops.axis_names import place
from treadle.ir.ops.collectives import (
    AllGather,
    AllReduce,
    AllToAll,
    Awaited,
    Collective,
    PassOn,
    ReduceScatter,
    Starting,
)

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

WORDS = 4
"""Number of i64 words in a rank's description of a collective."""


@dataclass(frozen=True)
class RankGroup:
    """The ranks that communicate along parts of mesh axes.

    ranks   in the order of their parts
    at      index of this rank in `ranks`
    handle  group of torch.distributed; None for all ranks, and for the two ranks of a line
    """

    ranks: tuple[int, ...]
    at: int
    handle: ProcessGroup | None


@dataclass(frozen=True)
class Begun:
    """A collective in progress.

    op      the op that waits for the collective
    wait    blocks until the collective is done
    finish  returns the result once the collective is done
    sent    buffers that must stay alive until then
    """

    op: Awaited
    wait: Callable[[], Any]
    finish: Callable[[], torch.Tensor]
    sent: torch.Tensor


def meet(op: Collective, given: torch.Tensor, group: RankGroup, descriptions: Sequence[Sequence[int]]) -> torch.Tensor:
    """Run a collective. Return this rank's result for its part `given`."""
    if isinstance(op, Awaited):
        begun = begin(op, given, group, descriptions)
        begun.wait()
        return begun.finish()
    made: torch.Tensor = _MEETINGS[type(op)](op, given, group, descriptions)
    return made


def begin(op: Awaited, given: torch.Tensor, group: RankGroup, descriptions: Sequence[Sequence[int]]) -> Begun:
    """Start a collective without waiting for the parts of other ranks. The part must not change until the collective is
    done.
    """
    begun: Begun = _BEGINNINGS[type(op)](op, given, group, descriptions)
    return begun


def tell(own: Sequence[int], group: RankGroup, device: torch.device, *, pair: bool = False) -> list[list[int]]:
    """Exchange WORDS numbers with all ranks of a group, or with the other rank of a pair. Return the rows of all these
    ranks, in order.
    """
    import torch

    mine = torch.tensor(own, dtype=torch.int64, device=device)
    everyone = torch.empty((len(group.ranks), WORDS), dtype=torch.int64, device=device)
    if pair:
        other = 1 - group.at
        everyone[group.at] = mine
        _wait(_exchange(everyone[other], mine, other, other, group))
    else:
        _gather(everyone.reshape(-1), mine, group)
    rows: list[list[int]] = everyone.tolist()
    return rows


def joined(op: Collective) -> int:
    """Return the dimension along which parts of ranks are concatenated."""
    if isinstance(op, AllToAll):
        return op.onto
    return op.axis if isinstance(op, (Awaited, ReduceScatter, Starting)) else 0


# -- each collective -----------------------------------------------------------------------------------------------


def _all_reduce(
    op: AllReduce, given: torch.Tensor, group: RankGroup, descriptions: Sequence[Sequence[int]]
) -> torch.Tensor:
    import torch
    import torch.distributed as dist

    by = {"sum": "SUM", "prod": "PRODUCT", "max": "MAX", "min": "MIN", "and": "MIN", "or": "MAX"}[op.monoid]
    # A copy, which is reduced in place; neither gloo nor NCCL supports 16-bit integers.
    dtype = torch.int32 if given.dtype == torch.int16 else given.dtype
    made = given.to(dtype, copy=True, memory_format=torch.contiguous_format)
    if made.numel():
        dist.all_reduce(made, op=getattr(dist.ReduceOp, by), group=group.handle)
    return made.to(given.dtype)


def _begin_gather(op: AllGather, given: torch.Tensor, group: RankGroup, descriptions: Sequence[Sequence[int]]) -> Begun:
    import torch

    axis = place(op.axis, given.dim())
    lengths = [row[3] for row in descriptions]
    longest = max(lengths)
    mine = _padded(given.movedim(axis, 0), longest)
    made = mine.new_empty((len(lengths), *mine.shape))
    work = _gather(as_bytes(made), as_bytes(mine), group, begin=True)

    def whole() -> torch.Tensor:
        uneven = min(lengths) < longest
        joined = torch.cat([made[i, :n] for i, n in enumerate(lengths)]) if uneven else made.flatten(0, 1)
        return joined.movedim(0, axis).contiguous()

    return Begun(op, work.wait, whole, mine)


def _begin_pass(op: PassOn, given: torch.Tensor, group: RankGroup, descriptions: Sequence[Sequence[int]]) -> Begun:
    """Send to one rank and receive from another at the same time, so that no rank waits for another rank's send."""
    axis, count = place(op.axis, given.dim()), len(group.ranks)
    to, source = (group.at + op.steps) % count, (group.at - op.steps) % count
    shape = [descriptions[source][3] if d == axis else n for d, n in enumerate(given.shape)]
    sent, made = given.contiguous(), given.new_empty(shape)
    return Begun(op, partial(_wait, _exchange(made, sent, source, to, group)), lambda: made, sent)


def _reduce_scatter(
    op: ReduceScatter, given: torch.Tensor, group: RankGroup, descriptions: Sequence[Sequence[int]]
) -> torch.Tensor:
    import torch
    import torch.distributed as dist

    axis = place(op.axis, given.dim())
    lengths = [row[2] for row in descriptions]
    longest = max(lengths)
    cut = torch.split(given.movedim(axis, 0), lengths)
    brought = torch.stack([_padded(piece, longest) for piece in cut])
    made = brought.new_empty(brought.shape[1:])
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # its former name
    scatter(made.reshape(-1), brought.reshape(-1), group=group.handle)
    return made[: lengths[group.at]].movedim(0, axis).contiguous()


def _all_to_all(
    op: AllToAll, given: torch.Tensor, group: RankGroup, descriptions: Sequence[Sequence[int]]
) -> torch.Tensor:
    import torch
    import torch.distributed as dist

    axis, onto = place(op.axis, given.dim()), place(op.onto, given.dim())
    sent = [piece.contiguous() for piece in torch.split(given, [row[2] for row in descriptions], dim=axis)]
    shapes = [
        [descriptions[group.at][2] if d == axis else row[3] if d == onto else n for d, n in enumerate(given.shape)]
        for row in descriptions
    ]
    counts = [math.prod(shape) * given.element_size() for shape in shapes]
    made = torch.empty(sum(counts), dtype=torch.uint8, device=given.device)
    brought = torch.cat([as_bytes(piece) for piece in sent])
    dist.all_to_all_single(made, brought, counts, [held_bytes(piece) for piece in sent], group=group.handle)
    parts = [
        piece.clone().view(given.dtype).reshape(shape)
        for piece, shape in zip(torch.split(made, counts), shapes, strict=True)
    ]
    return torch.cat(parts, dim=onto)


_MEETINGS: Mapping[type[Collective], Callable[..., Any]] = {
    AllReduce: _all_reduce,
    ReduceScatter: _reduce_scatter,
    AllToAll: _all_to_all,
}
_BEGINNINGS: Mapping[type[Collective], Callable[..., Any]] = {AllGather: _begin_gather, PassOn: _begin_pass}


def _gather(to: torch.Tensor, mine: torch.Tensor, group: RankGroup, *, begin: bool = False) -> Any:
    import torch.distributed as dist

    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its former name
    return gather(to, mine, group=group.handle, async_op=begin)


def _exchange(made: torch.Tensor, given: torch.Tensor, source: int, to: int, group: RankGroup) -> list[Any]:
    """Start to receive from rank `source` of the group into `made`, and to send `given` to rank `to`. Return the
    handles to wait for.
    """
    import torch.distributed as dist

    if to == group.at:
        made.copy_(given)
        return []
    pairs = ((dist.isend, given, to), (dist.irecv, made, source))
    calls = [dist.P2POp(call, as_bytes(each), group.ranks[at]) for call, each, at in pairs if each.numel()]
    return list(dist.batch_isend_irecv(calls)) if calls else []


def _wait(works: Sequence[Any]) -> None:
    for work in works:
        work.wait()


# -- tensors -------------------------------------------------------------------------------------------------------


def as_tensor(part: Any) -> torch.Tensor:
    """Return a part as a tensor over the same memory, on the part's device."""
    import torch

    given = part if isinstance(part, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(part))
    return given.reshape(np.shape(part))


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return the memory of a contiguous tensor of any dtype as bytes. Collectives that only move data use this."""
    import torch

    return tensor.reshape(-1).view(torch.uint8)


def held_bytes(tensor: torch.Tensor) -> int:
    """Return the size of a tensor's elements in bytes."""
    return tensor.numel() * tensor.element_size()


def _padded(part: torch.Tensor, length: int) -> torch.Tensor:
    """Return a contiguous part padded with rows of zeros to `length` rows."""
    if part.shape[0] == length:
        return part.contiguous()
    made = part.new_zeros((length, *part.shape[1:]))
    made[: part.shape[0]] = part
    return made

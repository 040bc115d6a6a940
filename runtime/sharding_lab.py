"""The lab: the programs of all ranks of a sharded model, run in lockstep in one process with NumPy.

No devices are needed. Every rank runs its own program with the reference implementations of its ops. In a collective,
each rank receives the result that the collective's definition computes from the values of all ranks. If ranks are in
different collectives, or wait for ranks that never arrive, an error names the ranks and their collectives.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from treadle.ir.errors import GraphError, TreadleError
from treadle.ir.graph import Graph
from treadle.ir.interpreter import interpret, solve_sizes
from treadle.ir.ops.collectives import Collective, Starting
from treadle.ir.placement.meeting import meeting_at
from treadle.ir.placement.mesh import Mesh
from treadle.ir.placement.placements import taken_part
from treadle.passes.sharding.plan import ShardingPlan
from treadle.passes.sharding.rank_programs import rank_program, rank_weights, refuse_small_sizes

Array = np.ndarray[Any, Any]

MOST_RANKS = 256
"""Maximum number of ranks: each rank is a thread with its own program."""


def refuse_many_ranks(mesh: Mesh) -> None:
    """Raise GraphError for a mesh with more ranks than can run in one process."""
    if mesh.ranks > MOST_RANKS:
        raise GraphError(
            f"the lab runs up to {MOST_RANKS} ranks, each in a thread",
            received=f"{mesh}: {mesh.ranks} ranks",
            hint="a smaller mesh with the same axes: the planner works in the same way",
        )


@dataclass(frozen=True)
class LabResult:
    """The results of all ranks together.

    outputs      whole outputs, assembled from the parts of all ranks
    collectives  for each collective, the op and the number of elements in its group, as seen by the group's first rank
    """

    outputs: dict[str, Array]
    collectives: tuple[tuple[Collective, int], ...]


def run_lab(
    plan: ShardingPlan,
    inputs: Mapping[str, Any],
    weights: Mapping[str, Array],
    *,
    programs: Sequence[Graph] | None = None,
    float64: bool = True,
) -> LabResult:
    """Run a plan on whole inputs and weights. Return the whole outputs and the collectives.

    programs  programs of the ranks; by default the programs that `rank_program` returns

    Raises GraphError if the ranks' collectives do not match, if ranks hold different copies of one part of an output,
    and for too many ranks. Raises the error of a rank that fails.
    """
    mesh = plan.devices
    refuse_many_ranks(mesh)
    sizes: dict[str, int] = {}
    for value in plan.graph.main.inputs:
        solve_sizes(value.type, np.shape(inputs[value.name]), sizes)
    refuse_small_sizes(plan, sizes)
    programs = programs or [rank_program(plan, rank) for rank in range(mesh.ranks)]
    room = Room(mesh)
    found: list[dict[str, Array]] = [{}] * mesh.ranks

    def run(rank: int) -> None:
        try:
            with meeting_at(Door(room, rank)):
                parts = rank_weights(plan, rank, weights)
                mine = {name: parts[name] for name in programs[rank].parameters}
                found[rank] = interpret(programs[rank], inputs, mine, float64=float64)
            room.leave(rank)
        except BaseException as error:
            room.fail(error)

    threads: list[threading.Thread] = []
    try:
        for rank in range(mesh.ranks):
            thread = threading.Thread(target=run, args=(rank,), name=f"rank {rank}")
            thread.start()
            threads.append(thread)
    except RuntimeError as error:  # no threads are left: ranks that have started would wait forever
        room.fail(GraphError("the system cannot start more threads", received=f"{mesh.ranks} ranks: {error}"))
    for thread in threads:
        thread.join()
    if room.failure is not None:
        raise room.failure
    return LabResult(_assembled(plan, found, sizes), tuple(room.collectives))


def _assembled(plan: ShardingPlan, found: Sequence[Mapping[str, Array]], sizes: Mapping[str, int]) -> dict[str, Array]:
    """Return the whole outputs. Raises GraphError if two ranks hold different values for one part."""
    outputs: dict[str, Array] = {}
    for (name, value), placed in zip(plan.graph.main.outputs.items(), plan.gives, strict=True):
        first = next(own[name] for own in found if name in own)
        whole = np.zeros(value.type.evaluate(sizes), first.dtype)
        known = np.zeros(whole.shape, bool)
        for rank, own in enumerate(found):
            if name not in own:
                continue  # the output belongs to another stage
            part, seen = (taken_part(a, value.type.shape, placed, plan.devices, rank, sizes) for a in (whole, known))
            if part.shape != own[name].shape:
                raise GraphError(f"rank {rank} returns {name} of {list(own[name].shape)}, not {list(part.shape)}")
            if not np.array_equal(part[seen], own[name][seen], equal_nan=part.dtype.kind == "f"):
                raise GraphError(f"rank {rank} has another {name} than the ranks before it")
            part[...], seen[...] = own[name], True
        outputs[name] = whole
    return outputs


class Room:
    """The shared state through which threads of ranks exchange data. The last rank of a group that arrives computes the
    results of all ranks.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.condition = threading.Condition()
        self.counts: dict[tuple[int, tuple[int, ...]], int] = {}
        self.brought: dict[tuple[tuple[int, ...], int], dict[int, tuple[Collective, Any]]] = {}
        self.results: dict[tuple[tuple[int, ...], int], dict[int, Any]] = {}
        self.waiting: dict[int, Collective] = {}
        self.left: set[int] = set()
        self.failure: BaseException | None = None
        self.collectives: list[tuple[Collective, int]] = []

    def exchange(self, rank: int, op: Collective, part: Any) -> Any:
        """Wait until all ranks of the group have passed their parts. Return this rank's result."""
        group = op.among(self.mesh.group(rank, self.mesh.parts_of(op.over)))
        with self.condition:
            number = self.counts[rank, group] = self.counts.get((rank, group), 0) + 1
            key = group, number
            brought = self.brought.setdefault(key, {})
            brought[rank] = op, part
            if len(brought) == len(group):
                try:
                    self.results[key] = self._combined(group, brought)
                except TreadleError as error:
                    self.failure = error
                for other in group:
                    self.waiting.pop(other, None)
                self.condition.notify_all()
            else:
                self.waiting[rank] = op
                self._look_for_deadlock()
            while self.failure is None and key not in self.results:
                self.condition.wait()
            if self.failure is not None:
                raise GraphError("another rank failed")
            found = self.results[key].pop(rank)
            if not self.results[key]:  # all ranks have their results
                del self.results[key], self.brought[key]
            return found

    def _combined(self, group: Sequence[int], brought: Mapping[int, tuple[Collective, Any]]) -> dict[int, Any]:
        ops = [brought[rank][0] for rank in group]
        parts = [brought[rank][1] for rank in group]
        first = ops[0]
        for rank, op in zip(group, ops, strict=True):
            if op.meeting != first.meeting:
                raise GraphError(
                    f"ranks {group[0]} and {rank} are in different collectives",
                    received=f"{first.meeting} and {op.meeting}",
                )
        ways = len(self.mesh.group(group[0], self.mesh.parts_of(first.over)))
        if first.ways != ways:
            raise GraphError(f"{first.name} is among {first.ways} ranks, and {ways} communicate over {first.over}")
        found = first.combined(ops, parts)
        self.collectives.append((first, first.payload(parts[0].size, found[0].size)))
        return dict(zip(group, found, strict=True))

    def _look_for_deadlock(self) -> None:
        if len(self.waiting) + len(self.left) == self.mesh.ranks:
            received = ", ".join(f"rank {r} in {op.name} over {op.over}" for r, op in sorted(self.waiting.items()))
            self.failure = GraphError("ranks wait for others that do not arrive", received=received)
            self.condition.notify_all()

    def leave(self, rank: int) -> None:
        """Record that a rank takes part in no further collective."""
        with self.condition:
            self.left.add(rank)
            if self.waiting:
                self._look_for_deadlock()

    def fail(self, error: BaseException) -> None:
        """Record that a rank has failed, so that no other rank waits for it."""
        with self.condition:
            self.failure = self.failure or error
            self.condition.notify_all()


@dataclass(frozen=True)
class Door:
    """One rank's connection to the `Room`; see `treadle.ir.placement.meeting.Meeting`."""

    room: Room
    rank: int

    def exchange(self, op: Collective, part: Any) -> Any:
        """See `Meeting.exchange`."""
        return self.room.exchange(self.rank, op, part)

    def begin(self, op: Starting, part: Any) -> None:
        """Do nothing: in lockstep, no communication starts before the exchange."""

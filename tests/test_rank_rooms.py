"""Rooms for ranks in threads of one process: wrong or missing participants, and the assembly of outputs."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from tests.rank_threads import run_ranks
from tests.sharded_models import recognized
from treadle.ir.errors import GraphError
from treadle.ir.op_registry import find_op
from treadle.ir.ops.collectives import Collective
from treadle.ir.placement.meeting import exchanged
from treadle.ir.placement.mesh import Mesh
from treadle.passes.sharding.recipes import shard
from treadle.runtime.sharding_lab import LabResult, Room, _assembled, refuse_many_ranks, run_lab


def op(ways: int = 2, over: str = "tp", **attributes: Any) -> Any:
    return find_op("all_reduce").make(over=over, ways=ways, **attributes)


def meets(*ops: Collective, rank: int = 0) -> Any:
    return lambda: [exchanged(each, np.array([10.0**rank])) for each in ops]


def test_a_lab_has_256_ranks_at_most() -> None:
    refuse_many_ranks(Mesh.of("dp=2,tp=128"))
    with pytest.raises(GraphError, match="the lab runs up to 256 ranks, each in a thread") as error:
        refuse_many_ranks(Mesh.of("tp=257"))
    assert error.value.received == "tp=257: 257 ranks"


def test_each_group_meets_by_itself_and_is_remembered() -> None:
    calls = [meets(op(2, "tp"), op(2, "dp"), op(2, "tp"), rank=rank) for rank in range(4)]
    found, room = run_ranks(Mesh.of("dp=2,tp=2"), calls)
    assert [[int(x[0]) for x in own] for own in found] == [
        [101, 11, 101],
        [1010, 11, 1010],
        [101, 1100, 101],
        [1010, 1100, 1010],
    ]
    assert [(each.over, elements) for each, elements in room.collectives].count(("tp", 1)) == 4
    assert len(room.collectives) == 6
    assert not room.results and not room.brought and not room.waiting
    assert room.left == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("first", "second", "what", "received"),
    [
        (op(), op(monoid="max"), "ranks 0 and 1 are in different collectives", "('all_reduce"),
        (op(3), op(3), "all_reduce is among 3 ranks, and 2 communicate over tp", ""),
        (op(), None, "ranks wait for others that do not arrive", "rank 0 in all_reduce over tp"),
    ],
)  # fmt: skip
def test_ranks_that_do_not_meet_are_told(first: Any, second: Any, what: str, received: str) -> None:
    room = Room(Mesh.of("tp=2"))
    raised: list[BaseException] = []

    def run(rank: int, own: Any) -> None:
        try:
            if own is None:
                room.leave(rank)
            else:
                room.exchange(rank, own, np.ones(1))
        except GraphError as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(rank, own), daemon=True) for rank, own in enumerate((first, second))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert [str(error) for error in raised] == ["another rank failed"] * len(raised)
    failure: Any = room.failure
    assert isinstance(failure, GraphError)
    assert failure.what == what
    assert (failure.received or "").startswith(received)
    room.fail(ValueError("later"))
    assert room.failure is failure, "the first"


def test_parts_of_outputs_are_put_together() -> None:
    plan = shard(recognized("gpt2"), "tp=2", axes={"heads": "tp"})  # all ranks hold all logits
    (name,) = plan.graph.main.outputs
    sizes = {"B": 1, "S": 2}
    shape = plan.graph.main.outputs[name].type.evaluate(sizes)
    whole = np.arange(float(np.prod(shape))).reshape(shape)
    whole[0, 0, 0] = np.nan
    assert np.array_equal(_assembled(plan, [{name: whole}] * 2, sizes)[name], whole, equal_nan=True)
    assert np.array_equal(_assembled(plan, [{}, {name: whole}], sizes)[name], whole, equal_nan=True)
    for other, what in (
        (whole + 1, f"rank 1 has another {name} than the ranks before it"),
        (whole[:, :1], f"rank 1 returns {name} of {[1, 1, *shape[2:]]}, not {list(shape)}"),
    ):
        with pytest.raises(GraphError) as error:
            _assembled(plan, [{name: whole}, {name: other}], sizes)
        assert error.value.what == what


def test_a_lab_computes_in_float64_if_nothing_else_is_said() -> None:
    from tests.sharded_models import numbers

    plan = shard(recognized("gpt2"), "tp=2", recipe="megatron")
    weights, inputs, _ = numbers("gpt2")
    found: LabResult = run_lab(plan, inputs, weights)
    assert {array.dtype for array in found.outputs.values()} == {np.dtype(np.float64)}

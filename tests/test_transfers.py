"""Collectives between ranks that are threads: each rank gets the op's result, for uneven, strided and empty parts of a
value.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tests.distributed_threads import World
from treadle.ir.errors import GraphError, RankError
from treadle.ir.op_registry import find_op
from treadle.ir.ops.collectives import Starting
from treadle.ir.placement.mesh import Mesh
from treadle.runtime.distributed import communicator
from treadle.runtime.distributed.communicator import Communicator, Traffic
from treadle.runtime.distributed.transfers import RankGroup

Array = np.ndarray[Any, Any]


def joined(world: World, over: tuple[str, ...], mesh: str) -> list[Communicator]:
    """Return a communicator for each rank of a mesh whose ranks communicate over these axes."""
    plan: Any = SimpleNamespace(devices=Mesh.of(mesh))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(communicator, "met_over", lambda plan: over)
        cpu = torch.device("cpu")
        return [
            Communicator(plan, rank, cpu, 60.0, lambda report: nullcontext(), lambda error, report: error)
            for rank in range(world.size)
        ]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(3)
    made.install(monkeypatch)
    return made


def drawn(shapes: list[tuple[int, ...]], dtype: Any) -> list[Array]:
    """Draw strided parts."""
    rng = np.random.default_rng(3)
    return [rng.integers(0, 2 if dtype is bool else 9, shape[::-1]).astype(dtype).T for shape in shapes]


UNEVEN, EMPTY, ALIKE = [(2, 1), (2, 3), (2, 2)], [(2, 0), (2, 3), (2, 1)], [(2, 6)] * 3
ONTO = {"axis": -2, "onto": -1, "whole": 4}
CASES: list[tuple[str, list[dict[str, Any]], list[tuple[int, ...]]]] = [
    *(("all_reduce", [{"monoid": monoid}] * 3, ALIKE) for monoid in ("sum", "prod", "max", "min")),
    ("all_reduce", [{}] * 3, [(2, 0)] * 3),
    ("all_gather", [{"axis": 1, "size": 6}] * 3, UNEVEN),
    ("all_gather", [{"axis": -1, "size": 6}] * 3, ALIKE[:3]),
    ("all_gather", [{"axis": 1, "size": 4}] * 3, EMPTY),
    ("reduce_scatter", [{"axis": 1, "size": size} for size in (1, 3, 2)], ALIKE),
    ("reduce_scatter", [{"axis": -1, "size": 2}] * 3, ALIKE),
    ("reduce_scatter", [{"axis": 1, "size": size} for size in (0, 4, 2)], ALIKE),
    ("all_to_all", [{"axis": 0, "size": size, "onto": 1, "whole": 6} for size in (2, 1, 1)], [(4, 1), (4, 3), (4, 2)]),
    ("all_to_all", [{**ONTO, "size": size} for size in (0, 3, 1)], [(4, 0), (4, 3), (4, 1)]),
    ("pass_on", [{"axis": 1, "size": size} for size in (2, 1, 3)], UNEVEN),
    ("pass_on", [{"axis": -1, "size": size, "steps": -1} for size in (3, 1, 0)], [(2, 0), (2, 3), (2, 1)]),
    ("pass_on", [{"axis": 1, "size": size, "steps": 3} for size in (1, 3, 2)], UNEVEN),
    ("hand_on", [{"source": 0, "target": 2}] * 3, ALIKE),
    ("hand_on", [{"source": 2, "target": 1}] * 3, [(2, 0)] * 3),
    ("start_gather", [{"axis": 1, "size": 6}] * 3, UNEVEN),
    ("start_pass", [{"axis": 1, "size": size} for size in (2, 1, 3)], UNEVEN),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [np.float32, np.int16, np.int64])
@pytest.mark.parametrize(("name", "each", "shapes"), CASES)
def test_each_rank_gets_what_the_op_means(
    name: str, each: list[dict[str, Any]], shapes: list[tuple[int, ...]], dtype: Any, world: World
) -> None:
    """This holds at every call. The shapes of parts are exchanged once for all runs of the same sizes."""
    ops: list[Any] = [find_op(name).make(over="tp", ways=3, **attributes) for attributes in each]
    awaited = [op.awaited if isinstance(op, Starting) else op for op in ops]
    parts, met = drawn(shapes, dtype), joined(world, ("tp",), "tp=3")
    among = awaited[0].among((0, 1, 2))
    wanted = dict(zip(among, awaited[0].combined([awaited[i] for i in among], [parts[i] for i in among]), strict=True))

    def runs(rank: int) -> Any:
        found = []
        for run in ("once", "once", "again"):
            with met[rank].running(run):
                given = parts[rank].copy(order="K")
                if isinstance(ops[rank], Starting):
                    met[rank].begin(ops[rank], given)
                    given[...] = 7  # a started collective has a copy
                found.append(met[rank].exchange(awaited[rank], given) if rank in wanted else None)
        return found

    found = world.run(runs)
    tells = 2 * (name != "hand_on")
    for rank, own in enumerate(found):
        for array in own if rank in wanted else ():
            assert type(array) is np.ndarray and array.dtype == dtype
            assert np.array_equal(array, wanted[rank])
        if name == "all_reduce":
            assert world.called[rank].count("all_gather") == tells
    for rank in wanted:
        (traffic,) = met[rank].traffic.values()
        got, brought = wanted[rank].nbytes, parts[rank].nbytes
        assert list(met[rank].traffic) == [(awaited[rank].name, "tp")]
        is_got = name == "hand_on" and rank == among[1]
        assert traffic == Traffic(3, 0 if is_got else 3 * awaited[rank].payload(brought, got))


@pytest.mark.parametrize(("monoid", "wanted"), [("and", [False, False, True]), ("or", [False, True, True])])
def test_truth_values_are_reduced(monoid: str, wanted: list[bool], world: World) -> None:
    op = find_op("all_reduce").make(over="tp", ways=3, monoid=monoid)
    met, parts = joined(world, ("tp",), "tp=3"), np.array([[0, 1, 1], [0, 0, 1], [0, 1, 1]], bool)

    def runs(rank: int) -> Any:
        with met[rank].running(""):
            return met[rank].exchange(op, parts[rank])  # type: ignore[arg-type]

    assert [own.tolist() for own in world.run(runs)] == [wanted] * 3


def test_tensors_of_any_dtype_and_scalars_meet(world: World) -> None:
    gather = find_op("all_gather").make(over="tp", ways=3, axis=0, size=6)
    reduce = find_op("all_reduce").make(over="tp", ways=3)
    met = joined(world, ("tp",), "tp=3")

    def runs(rank: int) -> Any:
        with met[rank].running(""):
            part = torch.full((rank + 1,), rank + 0.5, dtype=torch.bfloat16)
            whole = met[rank].exchange(gather, part)  # type: ignore[arg-type]
            return whole, met[rank].exchange(reduce, np.float32(rank))  # type: ignore[arg-type]

    for whole, total in world.run(runs):
        assert whole.dtype == torch.bfloat16
        assert whole.tolist() == [0.5, 1.5, 1.5, 2.5, 2.5, 2.5]
        assert total.shape == () and total == 3


def test_ranks_communicate_in_their_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Process groups along one mesh axis and along both. The group of all ranks is torch.distributed's default
    group.
    """
    world = World(4)
    world.install(monkeypatch)
    met = joined(world, ("dp", "dp tp", "tp"), "dp=2,tp=2")
    made = [((0, 1), 60.0), ((2, 3), 60.0), ((0, 2), 60.0), ((1, 3), 60.0)]
    assert world.groups == made * 4, "by every rank in one order"
    assert [[each.groups[over].at for over in each.groups] for each in met] == [
        [0, 0, 0], [1, 2, 0], [0, 1, 1], [1, 3, 1]
    ]  # fmt: skip
    assert all(each.groups["dp tp"].handle is None for each in met)

    def runs(rank: int) -> Any:
        with met[rank].running(""):
            return [
                met[rank].exchange(find_op("all_reduce").make(over=over, ways=ways), np.array([10.0**rank]))  # type: ignore[arg-type]
                for over, ways in (("dp", 2), ("tp", 2), ("dp tp", 4))
            ]

    assert [[int(array[0]) for array in own] for own in world.run(runs)] == [
        [11, 101, 1111], [11, 1010, 1111], [1100, 101, 1111], [1100, 1010, 1111]
    ]  # fmt: skip


def test_a_run_ends_when_all_that_was_handed_on_has_come(world: World) -> None:
    op, met = find_op("hand_on").make(over="tp", ways=3, source=0, target=1), joined(world, ("tp",), "tp=3")

    def runs(rank: int) -> Any:
        with met[rank].running(""):
            return [met[rank].exchange(op, np.array([n + rank])).tolist() for n in (5, 6) if rank < 2]  # type: ignore[arg-type]

    assert world.run(runs) == [[[0], [0]], [[5], [6]], []]
    assert len(world.sent) == 2 + 4, "the parts, and the exchange of their shapes"
    assert all(world.sent)


def test_waits_are_in_the_order_of_starts(world: World) -> None:
    """Collectives of one kind, over the same axes, must be awaited in the order in which they started."""
    starts = [
        find_op("start_gather").make(over="tp", ways=3, axis=axis, size=6, because=f"axis {axis}") for axis in (0, 1)
    ]
    first, second = (start.awaited for start in starts)  # type: ignore[attr-defined]
    met = joined(world, ("tp",), "tp=3")

    def runs(rank: int) -> Any:
        own, part = met[rank], np.full((2, 2), rank)
        with own.running(""):
            for start in starts:
                own.begin(start, part)  # type: ignore[arg-type]
            with pytest.raises(GraphError, match="all_gather over tp was not started") as error:
                own.exchange(second, part)
            found = [own.exchange(op, part).shape for op in (first, second)]
        with own.running(""), pytest.raises(GraphError, match="all_gather over tp was not started"):
            own.exchange(first, part)  # collectives that an earlier run started are forgotten
        return found, error.value.received

    assert world.run(runs) == [([(6, 2), (2, 6)], "axis 1")] * 3


def test_outputs_are_sent_and_received(world: World) -> None:
    met = joined(world, (), "tp=3")
    part = np.arange(6, dtype=np.int16).reshape(2, 3)

    def runs(rank: int) -> Any:
        if rank:
            met[rank].send(part.T * rank, 0, "sending")
            met[rank].send(np.zeros((0, 2)), 0, "sending")
            return None
        found = [met[0].received(np.empty((3, 2), np.int16), source, "receiving") for source in (2, 1)]
        assert met[0].received(np.empty((0, 2)), 1, "receiving").shape == (0, 2)
        return found

    first, *_ = world.run(runs)
    assert [own.tolist() for own in first] == [(part.T * 2).tolist(), part.T.tolist()]


def test_waiting_ranks_report_what_they_wait_for() -> None:
    """The report also has the message of an error of torch.distributed, which another error represents here."""
    report: list[str] = []

    @contextmanager
    def waiting(what: str) -> Any:
        report.append(what)
        yield

    plan: Any = SimpleNamespace(devices=Mesh.of("tp=2"), functions=())
    failed = lambda error, what: RankError(what, received=str(error))  # noqa: E731
    met = Communicator(plan, 0, torch.device("cpu"), 60.0, waiting, failed)
    met.groups["tp"] = RankGroup((0, 1), 0, None)

    def breaks(*given: Any, **how: Any) -> None:
        raise RuntimeError("closed")

    op = find_op("all_reduce").make(over="tp", ways=2, because="the split of ffn")
    start = find_op("start_pass").make(over="tp", ways=2, axis=0, size=1)
    met._descriptions = breaks  # type: ignore[method-assign]
    for calls, what in (
        (lambda: met.exchange(op, np.ones(2)), "all_reduce over tp, the split of ffn"),  # type: ignore[arg-type]
        (lambda: met.begin(start, np.ones(2)), "start_pass over tp"),  # type: ignore[arg-type]
    ):
        with pytest.raises(RankError) as error:
            calls()
        assert (error.value.what, error.value.received) == (what, "closed")
    with met.running("once"):
        pass
    assert report == ["all_reduce over tp, the split of ffn", "start_pass over tp", "the last sends"]

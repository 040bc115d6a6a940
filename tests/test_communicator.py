"""The communicator, tested without a GPU: torch.distributed gets tensors on the rank's device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.sharded_models import recognized
from treadle.ir.errors import BackendError, GraphError, RankError, UsageError
from treadle.ir.op_registry import find_op
from treadle.ir.ops.collectives import Collective, Starting
from treadle.passes.sharding.plan import ShardingPlan
from treadle.passes.sharding.recipes import shard
from treadle.runtime.distributed import communicator
from treadle.runtime.distributed.communicator import Communicator
from treadle.runtime.distributed.ranks import Ranks
from treadle.runtime.distributed.watching import Watch

FAR = torch.device("meta")
"""A device that stands in for a GPU: its tensors have no data, and a copy to the CPU fails."""


class _Stays(TorchDispatchMode):
    """A mode that refuses operations that create a tensor on another device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        assert all(each.device == FAR for each in tree_leaves(made) if isinstance(each, torch.Tensor)), func
        return made


def plan_over(mesh: str) -> ShardingPlan:
    return shard(recognized("gpt2"), mesh, recipe="megatron")


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace functions of torch.distributed by functions that require tensors on the GPU. Return a list that records
    each wait.
    """
    order: list[str] = []

    def called(name: str, **kinds: Any) -> Any:
        def call(*given: Any, **options: Any) -> Any:
            tensors = [each for each in tree_leaves((given, options)) if isinstance(each, torch.Tensor)]
            assert tensors
            assert all(each.device == FAR and each.is_contiguous() for each in tensors)
            order.append(name)
            return SimpleNamespace(wait=lambda: order.append("wait"), is_completed=lambda: False)

        return call

    for name in ("all_reduce", "all_to_all_single", "isend", "send", "recv"):
        monkeypatch.setattr(dist, name, called(name))
    for new, old in (
        ("all_gather_single", "all_gather_into_tensor"),
        ("reduce_scatter_single", "reduce_scatter_tensor"),
    ):
        for name in (new, old):
            monkeypatch.setattr(dist, name, called(old), raising=False)
    monkeypatch.setattr(dist, "P2POp", lambda call, tensor, peer: (tensor, peer))
    exchange = called("batch_isend_irecv")
    monkeypatch.setattr(dist, "batch_isend_irecv", lambda calls: [exchange(*calls)])
    stream = SimpleNamespace(synchronize=lambda: order.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    return order


@contextmanager
def meeting(rank: int, lengths: tuple[int, int], taken: tuple[int, int]) -> Iterator[Communicator]:
    """Yield the communicator of one of two ranks, whose parts have these lengths."""
    made = Communicator(plan_over("tp=2"), rank, FAR, 60.0, lambda report: nullcontext(), lambda error, report: error)
    made._tell = lambda *given: [[0, 0, t, n] for n, t in zip(lengths, taken, strict=True)]  # type: ignore[method-assign]
    with _Stays(), made.running("once"):
        yield made


CASES = [
    ("all_reduce", {}, (5, 6), (5, 6)),
    ("all_gather", {"axis": 1, "size": 11}, (5, 6), (5, 11)),
    ("reduce_scatter", {"axis": 0, "size": 2}, (5, 6), (2, 6)),
    ("all_to_all", {"axis": 0, "size": 2, "onto": 1, "whole": 11}, (5, 6), (2, 11)),
    ("pass_on", {"axis": 1, "size": 5}, (5, 6), (5, 5)),
    ("hand_on", {"source": 0, "target": 1}, (5, 6), (5, 6)),
    ("hand_on", {"source": 1, "target": 0}, (5, 6), (5, 6)),
    ("start_gather", {"axis": 1, "size": 11}, (5, 6), (5, 11)),
    ("start_pass", {"axis": 1, "size": 5}, (5, 6), (5, 5)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int16])
@pytest.mark.parametrize(("name", "attributes", "shape", "wanted"), CASES)
def test_parts_stay_on_the_device_of_their_rank(
    waits: list[str], name: str, attributes: dict[str, Any], shape: tuple[int, ...], wanted: tuple[int, ...], dtype: Any
) -> None:
    """The first of two ranks has a part of length 6 and takes 2 of 5; the part is strided."""
    op = find_op(name).make(over="tp", ways=2, **attributes)
    assert isinstance(op, Collective)
    with meeting(0, (6, 5), (2, 3)) as met:
        part = torch.empty(shape[::-1], dtype=dtype, device=FAR).T
        if isinstance(op, Starting):
            met.begin(op, part)
            assert "synchronize" not in waits, "the collective runs in the background"
            op = op.awaited
        made = met.exchange(op, part)
        assert made.device == FAR
        assert made.dtype == dtype
        assert tuple(made.shape) == wanted
        assert made is not part
        goes_on = name == "hand_on" and attributes["source"] == 0
        assert ("synchronize" in waits) != goes_on, "the watch knows that the rank waits"
    assert waits[-1] == "synchronize", "a run ends only after its device has finished"
    assert [each for each in waits if each not in ("wait", "synchronize")]


def test_outputs_are_sent_from_the_device_and_received_on_it(waits: list[str]) -> None:
    with meeting(1, (6, 5), (2, 3)) as met:
        met.send(torch.empty((6, 4), device=FAR).T, 0, "sending")
        with pytest.raises(NotImplementedError, match="meta"):  # no copy to the CPU is possible
            met.received(np.empty((2, 3), np.float32), 0, "receiving")
    assert waits == ["send", "synchronize", "recv", "synchronize"]


def test_a_rank_takes_the_gpu_of_its_place_on_its_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    report: dict[str, Any] = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: report.update(current=index))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **given: report.update(given, backend=backend))
    monkeypatch.setenv("LOCAL_RANK", "1")
    joined = Ranks(3, 4, 5.0, Watch(3, 4, 5.0), None)
    met = joined.start(plan_over("tp=4"), "cuda")
    gpu = torch.device("cuda", 1)
    assert met.device == gpu
    with pytest.raises(UsageError, match="all runs of ranks must be on one kind of device"):
        joined.start(plan_over("tp=4"), "cpu")
    assert (report["backend"], report["device_id"], report["current"]) == ("nccl", gpu, 1)
    assert (report["rank"], report["world_size"]) == (3, 4)
    met = Ranks(3, 4, 5.0, Watch(3, 4, 5.0), None).start(plan_over("tp=4"), "cpu")
    assert met.device == torch.device("cpu")
    assert (report["backend"], report["device_id"]) == ("gloo", None)


@pytest.mark.parametrize(("local", "count"), [("0", 0), ("2", 2), ("", 3)])
def test_a_rank_without_a_gpu_of_its_own_is_told_so(monkeypatch: pytest.MonkeyPatch, local: str, count: int) -> None:
    """Two ranks on one GPU would deadlock in NCCL. Without LOCAL_RANK, a single machine is assumed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setenv("LOCAL_RANK", local)
    with pytest.raises(BackendError, match="rank 3 has no CUDA device of its own") as error:
        Ranks(3, 4, 5.0, Watch(3, 4, 5.0), None).start(plan_over("tp=4"), "cuda")
    assert f"finds {count}" in (error.value.received or "")
    assert error.value.hint == 'target="cpu"'


def test_a_received_output_is_an_array(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = np.arange(6, dtype=np.float32).reshape(2, 3)
    monkeypatch.setattr(
        dist, "recv", lambda raw, source: raw.copy_(torch.from_numpy(wanted.view(np.uint8).reshape(-1)))
    )
    cpu = torch.device("cpu")
    met = Communicator(plan_over("tp=2"), 0, cpu, 60.0, lambda report: nullcontext(), lambda error, report: error)
    assert np.array_equal(met.received(np.empty((2, 3), np.float32), 1, "receiving"), wanted)
    assert met.received(np.empty((0, 3), np.float32), 1, "receiving").shape == (0, 3)


def described_by_another(monkeypatch: pytest.MonkeyPatch, at: int) -> Communicator:
    """Return the communicator of the first of two ranks on the CPU. The other rank sends a different number in one of
    four places.
    """

    def tell(own: list[int], *_: Any, **__: Any) -> list[list[int]]:
        return [own, [*own[:at], own[at] + 1, *own[at + 1 :]]]

    monkeypatch.setattr(communicator, "tell", tell)
    cpu = torch.device("cpu")
    return Communicator(plan_over("tp=2"), 0, cpu, 60.0, lambda report: nullcontext(), lambda error, report: error)


@pytest.mark.parametrize(
    ("name", "attributes", "at", "report"),
    [
        ("all_reduce", {}, 0, "ranks 0 and 1 are in different collectives"),
        ("all_reduce", {}, 1, "ranks 0 and 1 have different dtypes in all_reduce over tp"),
        ("hand_on", {"source": 0, "target": 1}, 2, "ranks 0 and 1 have 6 and 7 elements in hand_on over tp"),
    ],
)
def test_ranks_that_do_not_meet_alike_are_told(
    monkeypatch: pytest.MonkeyPatch, name: str, attributes: dict[str, Any], at: int, report: str
) -> None:
    op = find_op(name).make(over="tp", ways=2, **attributes)
    met = described_by_another(monkeypatch, at)
    with met.running("once"), pytest.raises(RankError) as error:
        met.exchange(op, np.ones((2, 3), np.float32))  # type: ignore[arg-type]
    assert error.value.what == report
    if not at:
        assert error.value.received == "rank 0: all_reduce over tp, collective 1 of its run"


@pytest.mark.parametrize(
    ("name", "attributes", "report"),
    [
        ("all_reduce", {"over": "dp", "ways": 2}, "all_reduce over dp among 2 ranks is not a collective of the plan"),
        ("all_reduce", {"over": "tp", "ways": 4}, "all_reduce over tp among 4 ranks is not a collective of the plan"),
        (
            "hand_on", {"over": "tp", "ways": 4, "source": 0, "target": 1},
            "hand_on over tp among 4 ranks is not a collective of the plan",
        ),
        ("pass_on", {"over": "tp", "ways": 2, "axis": 1, "size": 6, "ahead": True}, "pass_on over tp was not started"),
    ],
)  # fmt: skip
def test_a_meeting_that_is_not_planned_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, attributes: dict[str, Any], report: str
) -> None:
    met = described_by_another(monkeypatch, 3)
    with met.running("once"), pytest.raises(GraphError) as error:
        met.exchange(find_op(name).make(**attributes), np.ones((2, 3), np.float32))  # type: ignore[arg-type]
    assert error.value.what == report

"""Ranks: this process as one of the processes that run a sharded model together.

    with join(timeout=60) as ranks:                 # from RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT
        plan = ...                                  # every rank computes it
        ranks.agree({"plan": plan_hash(plan), ...}) # or all ranks end with the same error
        ranks.start(plan)
        ...

torchrun, `treadle launch` and many schedulers set these variables. If a rank ends with an error, it reports the error
to the other ranks on exit (`treadle.runtime.distributed.watching`).
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from treadle.files.installation import pip_install
from treadle.ir.errors import BackendError, Hint, RankError, TreadleError, UsageError
from treadle.passes.sharding.plan import ShardingPlan
from treadle.runtime.distributed.communicator import Communicator
from treadle.runtime.distributed.watching import Watch

if TYPE_CHECKING:
    import torch

LAUNCHER = "TREADLE_LAUNCHER"
"""Environment variable with the id of the launcher's process. If the launcher ends, this process ends, too."""

_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_TORCHRUN = "torchrun --nproc-per-node 2"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_PAUSE = 0.01  # between two polls for messages of other ranks
_STARTING = 60.0  # seconds within which the processes must connect at the start
_SLACK = (
    30.0  # extra seconds of torch.distributed's timeout: the watch, which knows the missing rank, must report first
)


class Ranks:
    """This process among `size` ranks. Created by `join`; used as a context manager.

    timeout  seconds that a rank waits for others
    watch    the watch over all ranks
    store    the key-value store through which ranks exchange short texts
    """

    def __init__(self, rank: int, size: int, timeout: float, watch: Watch, store: Any) -> None:
        self.rank, self.size, self.timeout, self.watch, self.store = rank, size, timeout, watch, store
        self._started = False
        self._kind = ""
        self._agreed = 0

    def doing(self, activity: str) -> None:
        """Record the current activity, which errors of other ranks report. Raises RankError if another rank has
        failed.
        """
        self.watch.doing(activity)

    def agree(self, facts: Mapping[str, str]) -> None:
        """Compare facts with all ranks. If a fact differs, every rank raises the same UsageError, for the first such
        fact.
        """
        self._agreed += 1
        keys = [f"treadle/facts/{self._agreed}/{rank}" for rank in range(self.size)]
        with self.watch.waiting(f"comparing {', '.join(facts)}"):
            self.store.set(keys[self.rank], json.dumps(dict(facts)))
            answers = [json.loads(self._read(key)) for key in keys]
            self.store.set(f"{keys[self.rank]}/read", "")
            for key in keys if self.rank == 0 else ():  # the store may end together with rank 0
                self._read(f"{key}/read")
        for name in answers[0]:
            for rank in range(1, self.size):
                if answers[rank].get(name) != answers[0][name]:
                    raise UsageError(
                        f"ranks differ in their {name}",
                        received=f"rank 0: {answers[0][name]}; rank {rank}: {answers[rank].get(name)}",
                        hint="the same command, version and files on every rank",
                    )

    def _read(self, key: str) -> str:
        """Wait until a rank has stored a key, and return the value. Raises RankError if a rank fails before that."""
        try:
            while not self.store.check([key]):
                self.watch.check()
                time.sleep(_PAUSE)
            found: bytes = self.store.get(key)
        except RuntimeError as error:  # from torch.distributed
            raise self.watch.explained(error, "comparing facts between ranks") from error
        return found.decode()

    def start(self, plan: ShardingPlan, device: str = "cpu") -> Communicator:
        """Initialize torch.distributed if necessary, and create the groups of a plan's collectives.

        device  "cpu": gloo; "cuda": NCCL, each rank on the GPU of its LOCAL_RANK

        Raises UsageError for a mesh with another number of ranks, or another kind of device than before; BackendError
        if this rank has no such device; RankError if other ranks do not connect.
        """
        import torch.distributed as dist

        refuse_other_mesh(plan, self.size)
        own = self._own_device(device)
        if self._started and own.type != self._kind:
            raise UsageError(
                "all runs of ranks must be on one kind of device",
                received=f"{own.type} after {self._kind}",
                hint="a separate run for each device",
            )
        backend = "nccl" if own.type == "cuda" else "gloo"
        longest = self.timeout + _SLACK
        with self.watch.waiting(f"starting {backend}"):
            try:
                if not self._started:
                    dist.init_process_group(
                        backend,
                        store=self.store,
                        rank=self.rank,
                        world_size=self.size,
                        timeout=timedelta(seconds=longest),
                        device_id=own if own.type == "cuda" else None,
                    )
                    self._started, self._kind = True, own.type
                return Communicator(plan, self.rank, own, longest, self.watch.waiting, self.watch.explained)
            except RuntimeError as error:
                raise self.watch.explained(error, f"starting {backend}") from error

    def _own_device(self, kind: str) -> torch.device:
        """Return the device of this rank's tensors. Make a GPU the current device, which backends use."""
        import torch

        if kind != "cuda":
            return torch.device("cpu")
        local_rank = os.environ.get("LOCAL_RANK", "")
        local = int(local_rank) if local_rank.isdecimal() else self.rank
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if local >= count:
            raise BackendError(
                f"rank {self.rank} has no CUDA device of its own",
                received=f"it has local rank {local}, and torch {torch.__version__} finds {count} CUDA devices",
                hint=Hint('target="cpu"', "--target cpu"),
            )
        torch.cuda.set_device(local)
        return torch.device("cuda", local)

    def leave(self) -> None:
        """End this rank normally. Rank 0 waits until all other ranks have ended. Raises RankError if a rank fails
        before that.
        """
        self.watch.leave()
        self._stop()

    def close(self) -> None:
        """End this rank after an error."""
        self.watch.close()
        self._started = False  # torch.distributed would wait for the others

    def _stop(self) -> None:
        if self._started:
            import torch.distributed as dist

            dist.destroy_process_group()
            self._started = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.leave()
            return
        if isinstance(error, TreadleError):
            received = error.received or ""
            error.is_reported = not self.watch.settle(f"rank {self.rank} has failed: {error.what}", received)
        else:
            self.watch.settle(f"rank {self.rank} has failed: {type(error).__name__}: {error}")
        self.close()


def refuse_other_mesh(plan: ShardingPlan, size: int) -> None:
    """Raise UsageError if the mesh of a plan does not have `size` ranks."""
    mesh = plan.devices
    if mesh.ranks != size:
        raise UsageError(
            f"the mesh {mesh} has {mesh.ranks} ranks, and {size} processes were started",
            hint=f"-n {mesh.ranks}, or a mesh of {size}",
        )


def need_torch() -> None:
    """Raise UsageError without PyTorch, by which ranks communicate."""
    if importlib.util.find_spec("torch") is None:
        raise UsageError("ranks communicate through PyTorch, which is not installed", hint=pip_install("torch"))


def join(timeout: float = 60.0, *, command: str = "run MODEL", count: int = 2) -> Ranks:
    """Join the other ranks, as specified by environment variables.

    timeout  seconds that a rank waits for others in later calls; `join` itself waits at least a minute while processes
             start
    command  the command that runs as a rank, with its arguments, and count, its number of ranks, for the hint of an
             error

    Raises UsageError if this process was not started as a rank, or without PyTorch; RankError if other ranks do not
    connect in time.
    """
    rank, size, host = _environment(command, count)
    need_torch()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # ended connections are reported by the watch
    from torch.distributed.rendezvous import rendezvous

    watch, start = Watch(rank, size, timeout, _orphaned()), max(timeout, _STARTING)
    try:
        store, _, _ = next(rendezvous("env://", rank, size, timeout=timedelta(seconds=start)))
        ranks = Ranks(rank, size, timeout, watch, store)
        if rank == 0:
            store.set("treadle/watch", watch.listen("127.0.0.1" if host in ("127.0.0.1", "localhost") else ""))
            until = time.monotonic() + start
            while watch.absent():
                if time.monotonic() > until:
                    raise RankError(
                        f"ranks {watch.absent()} did not connect within {start:g} s".replace("[", "").replace("]", "")
                    )
                time.sleep(_PAUSE)
        else:
            watch.connect(host, store.get("treadle/watch").decode())
    except RuntimeError as error:  # from torch.distributed
        what = str(error).splitlines()[0][:300]
        raise RankError(
            f"rank {rank} of {size} found no other ranks at {host} within {start:g} s", received=what
        ) from error
    return ranks


def _environment(command: str, count: int) -> tuple[int, int, str]:
    """Return this rank, the number of ranks, and the address of rank 0. Raises UsageError if a variable is missing or
    invalid.
    """
    words = f"{command} --mesh tp={count} --recipe megatron"
    hint = Hint(
        f"a script under torchrun, or under treadle launch -n {count} -- SCRIPT.py",
        f"treadle launch -n {count} -- {words}, or {_TORCHRUN} -m treadle {words}",
        replaces=command.partition(" ")[0],
        words=("launch", "-n", str(count), "--", command.partition(" ")[0]),
    )
    missing = [name for name in _NEEDED if not os.environ.get(name)]
    if missing:
        raise UsageError("this process was not started as a rank", received=f"no {', '.join(missing)}", hint=hint)
    texts = [os.environ[name] for name in ("RANK", "WORLD_SIZE", "MASTER_PORT")]
    if not all(text.isdecimal() for text in texts) or int(texts[0]) >= int(texts[1]):
        received = ", ".join(f"{name}={os.environ[name]!r}" for name in _NEEDED)
        raise UsageError(
            "RANK must be a number below WORLD_SIZE, and MASTER_PORT a number", received=received, hint=hint
        )
    return int(texts[0]), int(texts[1]), os.environ["MASTER_ADDR"]


def _orphaned() -> Any:
    """Return a function that returns True if the launcher was on this machine and has ended."""
    launcher = os.environ.get(LAUNCHER, "")
    if launcher.isdecimal():
        _end_with_parent()
        return lambda: os.getppid() != int(launcher)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        parent = os.getppid()
        return lambda: os.getppid() != parent
    return lambda: False


def _end_with_parent() -> None:
    """Request that the system kills this process when its parent ends, if supported (prctl of Linux).

    This also works while the process ends, when no Python thread runs and the process waits for a library's threads.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))

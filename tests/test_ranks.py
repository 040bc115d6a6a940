"""Ranks as processes: that they compute what the model does, meet as planned, and end together.

Processes start slowly, so each job does much. tests/fuzz/killed_ranks.py kills ranks as often as one likes.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from tests.fuzz.killed_ranks import JOB, ROOT, is_left, started
from treadle.ir.errors import UsageError
from treadle.runtime.distributed import ranks
from treadle.runtime.distributed.launching import launch_ranks
from treadle.runtime.distributed.ranks import Ranks, join
from treadle.runtime.distributed.watching import Watch

pytestmark = pytest.mark.skipif(os.name != "posix", reason="ranks are ended by signals")

NEAR = {"f32": 1e-5, "int8": 1e-5, "bf16": 2e-2}
"""How far outputs may be from the whole model's, beside their greatest: sums in another order. Products of bf16 round
their sums' operands anew, by 2^-8 each."""

SOON = 60
"""Seconds after which a job hangs; those that end as they should take one or two, on a machine that is not busy."""


def environment(**beside: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **beside}


def launched(ranks: int, *words: str, **beside: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "treadle", "launch", "-n", str(ranks), "--", *words]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=240, env=environment(**beside), check=False, cwd=ROOT
    )


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Path]]:
    """For a mesh what each rank wrote, of one job for all tests."""

    @cache
    def folder_of(mesh: str) -> Path:
        folder = tmp_path_factory.mktemp("ranks")
        ranks, backends = {"tp=2": (2, "numpy,tvm"), "tp=2,dp=2": (4, "torch,numpy")}[mesh]
        done = launched(ranks, str(JOB), "models", mesh, backends, str(folder))
        assert done.returncode == 0, done.stderr
        return folder

    return lambda mesh: [folder_of(mesh) / f"{rank}.json" for rank in range(4 if "dp" in mesh else 2)]


@pytest.mark.parametrize("mesh", ["tp=2", "tp=2,dp=2"])
def test_ranks_compute_what_the_model_does_and_move_what_is_planned(
    ran: Callable[[str], list[Path]], mesh: str
) -> None:
    told = [json.loads(path.read_text()) for path in ran(mesh)]
    assert len(told[0]) >= 14
    assert {"context", "gpipe"} < {first["case"].split()[3] for first in told[0]}
    for facts in zip(*told, strict=True):
        first = facts[0]
        assert first["apart"] <= NEAR[first["form"]] * max(1.0, first["largest"]), first
        assert sum(each["met"] for each in facts) == first["meetings"], first["case"]
        # Parts of ranks are uneven, and a plan says what a rank moves on average.
        assert sum(each["counted"] for each in facts) == pytest.approx(first["planned"], rel=1e-12), first["case"]
        assert first["planned"] > 0


def test_weights_of_a_layer_are_gathered_while_the_layer_before_computes(ran: Callable[[str], list[Path]]) -> None:
    """Of three layers: those of the first two begin before the first waits for its own, those of the third before the
    second waits. What is gathered is the same to the bit."""
    for path in ran("tp=2"):
        told = json.loads(path.with_stem(f"ahead-{path.stem}").read_text())
        assert told["same"]
        each = told["order"].count("start") // 3
        assert each > 5
        assert told["order"] == [*["start"] * 2 * each, *["wait"] * each, *["start"] * each, *["wait"] * 2 * each]


@pytest.mark.parametrize("mesh", ["tp=2", "tp=2,dp=2"])
def test_sessions_hold_the_caches_of_their_rank_and_continue_as_the_model_does(
    ran: Callable[[str], list[Path]], mesh: str
) -> None:
    """The job of four ranks continues texts over tp=4, with weights in bf16 and in int8."""
    told = [json.loads(path.with_stem(f"generated-{path.stem}").read_text()) for path in ran(mesh)]
    for facts in zip(*told, strict=True):
        first = facts[0]
        assert all(each["tokens"] == first["wanted"] for each in facts), first["case"]
        assert {each["bytes"] for each in facts} == {first["whole bytes"] / len(told)}
        assert first["apart"] < NEAR[first["form"]]
    assert len({token for first in told[0] for row in first["tokens"] for token in row}) > 4


def test_the_command_line_runs_a_model_over_ranks(tmp_path: Path) -> None:
    small = ["--set", "layers=1", "--set", "dim=16", "--set", "heads=4", "--set", "vocab=37"]
    words = ["run", "gpt2", "--mesh", "tp=2", "--recipe", "megatron", *small, "--input", "tokens=1,2,3", "--json"]
    done = launched(2, *words, "--output", str(tmp_path))
    told = json.loads(done.stdout)
    assert told["ranks"] == 2
    assert told["outputs"]["logits"]["shape"] == [1, 3, 37]
    # Of float32 [1, 3, 16], after the lookup, attention and the network.
    assert told["collectives"] == [{"op": "all_reduce", "over": "tp", "times": 3, "bytes": 3 * 4 * 3 * 16}]
    assert (tmp_path / "logits.npy").exists()


def test_torchrun_starts_ranks() -> None:
    small = ["--set", "layers=1", "--set", "dim=16", "--set", "heads=4", "--set", "vocab=37"]
    words = ["treadle", "run", "gpt2", "--mesh", "pp=2,micro=2", "--recipe", "gpipe", *small, "--json"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", *words]
    tokens = ["--input", "tokens=[[1,2,3],[4,5,6]]"]
    done = subprocess.run(
        [*command, *tokens], capture_output=True, text=True, timeout=240, env=environment(), check=False, cwd=ROOT
    )
    if "rendezvous" in done.stderr and not done.stdout:
        pytest.skip(f"torchrun cannot run here: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["ranks"] == 2
    assert told["outputs"]["logits"]["shape"] == [2, 3, 37]
    # Rank 0 hands on each row's float32 [1, 3, 16].
    assert told["collectives"] == [{"op": "hand_on", "over": "pp", "times": 2, "bytes": 2 * 4 * 3 * 16}]


# -- errors ------------------------------------------------------------------------------------------------------------


def test_ranks_that_differ_end_with_one_error() -> None:
    done = launched(2, str(JOB), "differ")
    assert done.returncode == 2
    assert done.stderr.startswith("ranks differ in their plan\n  received  rank 0: ")
    assert len(done.stderr.splitlines()) == 3


def test_every_rank_is_told_the_same_of_what_differs() -> None:
    from torch.distributed import HashStore

    store = HashStore()
    ranks = [Ranks(rank, 3, 5.0, Watch(rank, 3, 5.0), store) for rank in range(3)]
    with ThreadPoolExecutor(3) as pool:
        for facts in ([{"version": "1", "plan": "a"}] * 3, [{"version": "1"}, {"version": "1"}, {"version": "2"}]):
            told = list(pool.map(lambda pair: _agreed(*pair), zip(ranks, facts, strict=True)))
            differ = facts[0] != facts[2]
            assert told == ["ranks differ in their version: rank 0: 1; rank 2: 2" if differ else ""] * 3


def _agreed(ranks: Ranks, facts: dict[str, str]) -> str:
    try:
        ranks.agree(facts)
    except UsageError as error:
        return f"{error.what}: {error.received}"
    return ""


def test_a_rank_that_is_killed_ends_the_others() -> None:
    job, processes = started(3)
    os.kill(processes[1], signal.SIGKILL)
    _, told = job.communicate(timeout=SOON)
    assert job.returncode == 2
    assert told.count("rank 1 has died") == 1
    assert re.search("received  (in all_reduce over tp|running|compiling)", told)  # what it did last
    assert not any(map(is_left, processes.values()))


def test_a_rank_that_hangs_ends_the_others_at_the_timeout() -> None:
    job, processes = started(2, "sleeps", TIMEOUT="5")
    _, told = job.communicate(timeout=SOON)
    assert job.returncode == 2
    assert told.count("rank 1 does not come") == 1
    assert "rank 1: sleeping" in told
    assert not any(map(is_left, processes.values()))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_ranks_that_do_nothing_more_end_with_what_launched_them() -> None:
    """Those that have left the others, and wait for threads of a library at their end: no thread of ours sees it."""
    job, processes = started(2, "lingers")
    job.kill()
    job.wait()
    until = time.monotonic() + SOON
    while any(map(is_left, processes.values())) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(is_left, processes.values()))


def test_a_rank_knows_that_what_started_it_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_end_with_parent", lambda: None)
    monkeypatch.setenv(ranks.LAUNCHER, str(os.getppid()))
    is_orphan = ranks._orphaned()
    assert not is_orphan()
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert is_orphan()


def test_a_rank_that_fails_tells_why_and_others_do_not() -> None:
    done = launched(2, str(JOB), "turns", "raises")
    assert done.returncode == 2
    assert done.stderr.strip() == "the disk is full"


def test_a_process_that_nobody_started_as_a_rank_is_told_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UsageError, match="this process was not started as a rank") as error:
        join()
    assert "RANK" in (error.value.received or "")
    for name, value in (("RANK", "2"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="RANK is a number below WORLD_SIZE"):
        join()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["run", "gpt2", "--recipe", "megatron"], "a model is split over a mesh"),
        (["run", "gpt2", "--mesh", "tp=2"], "this process was not started as a rank"),
        (["launch", "-n", "2", "--", "dance"], "there is no command 'dance' to launch"),
    ],
)
def test_a_wrong_command_is_refused(words: list[str], told: str) -> None:
    command = [sys.executable, "-m", "treadle", *words]
    done: Any = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False, cwd=ROOT)
    assert done.returncode == 2
    assert told in done.stderr


def test_launched_processes_know_their_places_and_the_greatest_exit_code_counts(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, pathlib, sys\n"
        "rank, folder = os.environ['RANK'], pathlib.Path(sys.argv[0]).parent\n"
        "cores = sorted(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else []\n"
        "(folder / rank).write_text(f\"{os.environ['WORLD_SIZE']} {cores}\")\n"
        "sys.exit(int(rank))\n"
    )
    assert launch_ranks([sys.executable, str(script)], 3) == 2
    told = [(tmp_path / str(rank)).read_text() for rank in range(3)]
    assert all(text.startswith("3 ") for text in told)
    if hasattr(os, "sched_getaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        assert told[0] == f"3 {cores[: max(1, len(cores) // 3)]}"
        assert told[2].endswith(f"{cores[-1]}]")
    with pytest.raises(UsageError, match="there is 1 rank or more"):
        launch_ranks(["true"], 0)

"""Ranks as processes: they compute the same as the whole model, communicate as planned, and end together.

Most ranks are forked from a process that has loaded all libraries (tests/forked_ranks.py). tests/fuzz/killed_ranks.py
repeats the killing of ranks any number of times.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from datetime import timedelta
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from safetensors.numpy import save_file
from typer.testing import CliRunner

import treadle
from tests.forked_ranks import ROOT, ForkedRanks, Job
from tests.fuzz.killed_ranks import JOB, is_left
from tests.test_part_loading import CONFIG, shapes, written
from treadle.cli.application import app
from treadle.cli.launch import rank_commands
from treadle.cli.rank_runs import opened_on_ranks
from treadle.ir.errors import RankError, UsageError
from treadle.passes.stepping.derivation import NoStep
from treadle.runtime.distributed import ranks
from treadle.runtime.distributed.communicator import Traffic
from treadle.runtime.distributed.launching import launch_ranks
from treadle.runtime.distributed.ranks import Ranks, join
from treadle.runtime.distributed.watching import Watch
from treadle.sharding import rank_models
from treadle.sharding.rank_models import RankModel

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="ranks are forked, and ended by signals")

NEAR = {"f32": 1e-5, "bf16": 2e-2, "int8": 1e-5}
"""Largest accepted difference from the whole model's outputs, relative to the largest element. Sums are in another
order. Products of bf16 also round their operands, by 2^-8 each.
"""

SOON = 60
"""Seconds after which a job counts as hanging; jobs that end normally take one or two, on an idle machine."""

SMALL = ("--set=layers=1", "--set=dim=16", "--set=heads=4", "--set=vocab=37")


def environment(**beside: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TREADLE_CERTIFY": "0", **beside}


@pytest.fixture(scope="module")
def forked() -> Iterator[ForkedRanks]:
    with ForkedRanks() as made:
        yield made


@pytest.fixture(scope="module")
def ran(forked: ForkedRanks, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], list[Any]]:
    """Return a function that returns what each rank of a mesh wrote to the file of a name; one job for all tests."""

    @cache
    def folder_of(mesh: str) -> Path:
        folder = tmp_path_factory.mktemp("ranks")
        ranks, backends = {"tp=2": (2, "numpy,tvm"), "tp=2,dp=2": (4, "torch,numpy")}[mesh]
        job = forked.launch(ranks, str(JOB), "models", mesh, backends, str(folder))
        assert job.ended() == 0, (job.errors, job.codes)
        return folder

    def found(mesh: str, name: str) -> list[Any]:
        files = [folder_of(mesh) / f"{name}{rank}.json" for rank in range(4 if "dp" in mesh else 2)]
        return [json.loads(file.read_text()) for file in files]

    return found


KINDS = ("gpt2", "t5", "vit", "llama")


def paired(mesh: str, kinds: Sequence[str]) -> set[tuple[str, str]]:
    """Return the kinds of models and forms of weights that a mesh must run: each kind in one form on four ranks, and in
    the other forms on two.
    """
    four = {(kind, list(NEAR)[at % len(NEAR)]) for at, kind in enumerate(kinds)}
    return four if mesh == "tp=2,dp=2" else {(kind, form) for kind in kinds for form in NEAR} - four


@pytest.mark.parametrize("mesh", ["tp=2", "tp=2,dp=2"])
def test_ranks_compute_what_the_model_does_and_move_what_is_planned(
    ran: Callable[[str, str], list[Any]], mesh: str
) -> None:
    outputs = ran(mesh, "")
    cases = [first["case"].split() for first in outputs[0]]
    assert {(kind, form) for _, kind, _, recipe, form in cases if recipe == "megatron"} == paired(mesh, KINDS)
    assert {"context", "gpipe"} < {recipe for _, _, _, recipe, _ in cases}
    for facts in zip(*outputs, strict=True):
        first = facts[0]
        assert first["apart"] <= NEAR[first["form"]] * max(1.0, first["largest"]), first
        assert sum(each["met"] for each in facts) == first["collectives"], first["case"]
        # Parts of ranks are uneven, and a plan states a rank's average traffic.
        assert sum(each["counted"] for each in facts) == pytest.approx(first["planned"], rel=1e-12), first["case"]
        assert first["planned"] > 0


def test_weights_of_a_layer_are_gathered_while_the_layer_before_computes(
    ran: Callable[[str, str], list[Any]],
) -> None:
    """The gathers of the next layer start before a layer waits for its own.

    With three layers, the gathers of the first two layers start before the first layer waits, and the third layer's
    before the second layer waits. The gathered weights are bitwise identical.
    """
    for facts in ran("tp=2", "ahead-"):
        gather = facts["gather"]
        assert gather["same"]
        assert gather["counted alike"]
        each = gather["order"].count("start") // 3
        assert each > 5
        assert gather["order"] == [*["start"] * 2 * each, *["wait"] * each, *["start"] * each, *["wait"] * 2 * each]


def test_keys_pass_around_while_a_rank_computes_on_those_it_has(ran: Callable[[str, str], list[Any]]) -> None:
    """Outputs are bitwise identical to a run in which a rank passes keys on after it has computed on them."""
    for facts in ran("tp=2", "ahead-"):
        assert facts["pass"] == {"order": ["start", "start", "wait", "wait"], "same": True, "counted alike": True}


@pytest.mark.parametrize("mesh", ["tp=2", "tp=2,dp=2"])
def test_sessions_hold_the_caches_of_their_rank_and_continue_as_the_model_does(
    ran: Callable[[str, str], list[Any]], mesh: str
) -> None:
    """Over tp=2 and over tp=4. The traffic of a step equals the plan's traffic for one token."""
    outputs = ran(mesh, "generated-")
    cases = {tuple(first["case"].split()[1:]) for first in outputs[0]}
    on_tvm = {("gpt2", "f32")} if mesh == "tp=2" else set()
    assert cases == paired(mesh, [kind for kind in KINDS if kind != "vit"]) | on_tvm
    for facts in zip(*outputs, strict=True):
        first = facts[0]
        assert all(each["tokens"] == first["wanted"] for each in facts), first["case"]
        assert {each["bytes"] for each in facts} == {first["whole bytes"] / len(outputs)}
        assert all(each["counted bytes"] == each["all bytes"] for each in facts)
        assert first["apart"] < NEAR[first["form"]]
        assert sum(each["counted"] for each in facts) == pytest.approx(first["planned"], rel=1e-12), first["case"]
    assert len({token for first in outputs[0] for row in first["tokens"] for token in row}) > 4


def test_the_command_line_runs_a_model_over_ranks(tmp_path: Path) -> None:
    words = ["run", "gpt2", "--mesh", "tp=2", "--recipe", "megatron", *SMALL, "--input", "tokens=1,2,3", "--json"]
    command = [sys.executable, "-m", "treadle", "launch", "-n", "2", "--", *words, "--output", str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env=environment(), check=False, cwd=ROOT
    )
    output = json.loads(done.stdout)
    assert output["ranks"] == 2
    assert output["outputs"]["logits"]["shape"] == [1, 3, 37]
    # Float32 [1, 3, 16] after the lookup, after attention, and after the feed-forward network.
    assert output["collectives"] == [{"op": "all_reduce", "over": "tp", "times": 3, "bytes": 3 * 4 * 3 * 16}]
    assert (tmp_path / "logits.npy").exists()


def test_the_command_line_continues_a_text_over_ranks_as_alone(forked: ForkedRanks, tmp_path: Path) -> None:
    made = pytest.importorskip("tokenizers").ByteLevelBPETokenizer()
    made.train_from_iterator(["the cat sat on the mat and the dog sat on the log"], vocab_size=300)
    made.save(str(tmp_path / "tokenizer.json"))
    written(tmp_path, "f32", made.get_vocab_size())
    words = ["generate", str(tmp_path), "the cat", "a", "--tokens", "4", "--json"]
    alone = json.loads(CliRunner().invoke(app, words).stdout)
    job = forked.launch(2, *words, "--mesh", "tp=2", "--recipe", "megatron")
    assert job.ended() == 0, job.errors
    output = json.loads(job.out)
    assert [each["tokens"] for each in output["texts"]] == [each["tokens"] for each in alone["texts"]]
    assert all(len(each["tokens"]) == 4 for each in output["texts"])


def test_torchrun_starts_ranks() -> None:
    words = ["treadle", "run", "gpt2", "--mesh", "pp=2,micro=2", "--recipe", "gpipe", *SMALL, "--json"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", *words]
    tokens = ["--input", "tokens=[[1,2,3],[4,5,6]]"]
    done = subprocess.run(
        [*command, *tokens], capture_output=True, text=True, timeout=240, env=environment(), check=False, cwd=ROOT
    )
    if "rendezvous" in done.stderr and not done.stdout:
        pytest.skip(f"torchrun cannot run here: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    output = json.loads(done.stdout)
    assert output["ranks"] == 2
    assert output["outputs"]["logits"]["shape"] == [2, 3, 37]
    # Rank 0 sends each row's float32 [1, 3, 16].
    assert output["collectives"] == [{"op": "hand_on", "over": "pp", "times": 2, "bytes": 2 * 4 * 3 * 16}]


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Configure this process as the only rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in place.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("alone")
def test_a_rank_tells_what_it_ran_and_what_met(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    called = RankModel.__call__

    def meets(self: RankModel, **arrays: Any) -> Any:
        self.communicator.traffic = {("all_reduce", "tp"): Traffic(3, 4096), ("all_gather", "dp"): Traffic(1, 8)}
        return called(self, **arrays)

    monkeypatch.setattr(RankModel, "__call__", meets)
    words = [
        "run",
        "gpt2",
        "--mesh",
        "tp=1",
        "--recipe",
        "megatron",
        *SMALL[:3],
        "--input",
        "tokens=1",
        "--set=vocab=2",
    ]
    output = json.loads(CliRunner().invoke(app, [*words, "--json", "--output", str(tmp_path)]).stdout)
    assert output.pop("seconds") > 0
    (facts,) = output.pop("outputs").values()
    assert output == {
        "model": "gpt2",
        "mesh": "tp=1",
        "ranks": 1,
        "backend": "numpy",
        "target": "cpu",
        "weights": "drawn from seed 0",
        "loaded": 0,
        "collectives": [
            {"op": "all_gather", "over": "dp", "times": 1, "bytes": 8},
            {"op": "all_reduce", "over": "tp", "times": 3, "bytes": 4096},
        ],
        "files": [str(tmp_path / "logits.npy")],
        "notes": [],
    }
    whole = treadle.compile("gpt2", layers=1, dim=16, heads=4, vocab=2)(tokens=[[1]])["logits"]
    assert np.array_equal(np.load(tmp_path / "logits.npy"), whole)
    shown = CliRunner().invoke(app, [*words, "--output", str(tmp_path)]).stdout.splitlines()
    ran = next(i for i, line in enumerate(shown) if "ran in" in line)
    assert shown[ran - 2] == f"logits = {json.dumps(facts['values'])}"
    assert re.fullmatch(r"gpt2 ran in \d+\.\d ms in numpy on 1 rank, tp=1", shown[ran])
    assert shown[ran + 1 :] == [
        "weights of rank 0: drawn from seed 0",
        "  1 x all_gather over dp, 8 B together",
        "  3 x all_reduce over tp, 4.1 kB together",
        f"wrote {tmp_path / 'logits.npy'}",
    ]


@pytest.mark.parametrize("rank", [0, 1])
def test_all_ranks_but_the_first_print_nothing(
    rank: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each rank opens its own step, with the options that all of them received."""
    opened: list[Any] = []
    joined: Any = lambda timeout, **_: nullcontext(SimpleNamespace(rank=rank, timeout=timeout))  # noqa: E731
    monkeypatch.setattr(ranks, "join", joined)
    monkeypatch.setattr(rank_models, "open_rank_stepped", lambda *given, **options: opened.append((given, options)))
    with opened_on_ranks("tp=2", "megatron", ["heads=tp"], 7.0, "a text") as step:
        step("m", cache="bf16")
        print("a piece of text")
        print("progress", file=sys.stderr)
    output = capsys.readouterr()
    assert (output.out, output.err) == (("", "") if rank else ("a piece of text\n", "progress\n"))
    asked = {"recipe": "megatron", "axes": {"heads": "tp"}, "agree": {"texts and options": "a text"}}
    assert opened == [(("m", "tp=2", SimpleNamespace(rank=rank, timeout=7.0)), {**asked, "cache": "bf16"})]


# -- errors ------------------------------------------------------------------------------------------------------------


def refused(job: Job, what: str) -> None:
    """Assert that all ranks of a job have ended with the same error, printed by one rank."""
    assert job.ended(SOON) == 2
    assert job.codes == dict.fromkeys(range(len(job.codes)), 2)
    assert len(job.codes) > 1
    assert job.errors.count(what) == 1, job.errors
    assert job.out == ""
    _, *rest = job.errors.splitlines()
    assert all(line.startswith("  ") for line in rest), "an error, and nothing beside it"


GPT2 = ("run", "gpt2", *SMALL, "--mesh")


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ((*GPT2, "tp=4", "--recipe", "megatron"), "the mesh tp=4 has 4 ranks, and 3 processes were started"),
        ((*GPT2, "tp=3", "--axis", "experts=tp"), "gpt2 has no axis 'experts' to split"),
        ((*GPT2, "tp=3", "--axis", "heads=ep"), "the mesh tp=3 has no axis 'ep'"),
        (
            ("run", "gpt2", *SMALL[:2], "--set=heads=2", "--mesh", "tp=3", "--axis", "heads=tp"),
            "heads: 2 cannot be split over tp",
        ),
        ((*GPT2, "dp=3", "--recipe", "dp", "--input", "tokens=1,2,3"), "do not give each of 3 ranks a part"),
        (
            (*GPT2, "tp=3", "--recipe", "megatron", "--target", "cuda", "--backend", "torch"),
            "has no CUDA device of its",
        ),
        (("run", "nothing.treadle", "--mesh", "tp=3"), "ranks run a model, not an artifact"),
        (("run", "gpt3", "--mesh", "tp=3", "--recipe", "megatron"), "there is no model 'gpt3'"),
        (("generate", "gpt2", "a", "--mesh", "tp=3", "--recipe", "megatron"), "without weights"),
    ],
)
def test_refusals_of_all_ranks_are_printed_once(forked: ForkedRanks, words: tuple[str, ...], what: str) -> None:
    if "cuda" in words and pytest.importorskip("torch").cuda.is_available():
        pytest.skip("there is a CUDA device")
    refused(forked.launch(3, *words), what)


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("--nonsense", "1"), "No such option: --nonsense"),
        (("--seed", "much"), "Invalid value for '--seed'"),
        (("gpt2",), "Got unexpected extra argument"),
    ],
)
def test_options_of_a_command_are_checked_before_ranks_start(words: tuple[str, ...], what: str) -> None:
    started = [sys.executable, "-m", "treadle", "launch", "-n", "3", "--", "run", "gpt2", "--mesh", "tp=3", *words]
    done = subprocess.run(started, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count(what) == 1, done.stderr
    assert done.stderr.count("Usage: treadle run") == 1


@pytest.mark.parametrize("what", ["plan", "version", "weights", "inputs"])
def test_ranks_that_differ_end_with_one_error(forked: ForkedRanks, what: str) -> None:
    job = forked.launch(3, str(JOB), "differ", what)
    refused(job, f"ranks differ in their {what}")
    assert job.errors.splitlines()[1].startswith("  received  rank 0: ")


@pytest.mark.parametrize("lacking", [(1,), (0, 1)])
def test_a_checkpoint_that_lacks_a_part_ends_all_ranks(
    forked: ForkedRanks, tmp_path: Path, lacking: tuple[int, ...]
) -> None:
    """The part is missing on one of two machines, or on both."""
    missing = "model.layers.0.mlp.up_proj.weight"
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        held = {n: np.zeros(shape, np.float16) for n, shape in shapes(8).items() if rank not in lacking or n != missing}
        save_file(held, tmp_path / str(rank) / "model.safetensors")
        (tmp_path / str(rank) / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": 8}))
    refused(forked.launch(2, str(JOB), "differ", "part", str(tmp_path)), missing)


def test_every_rank_is_told_the_same_of_what_differs() -> None:
    from torch.distributed import HashStore

    store = HashStore()
    ranks = [Ranks(rank, 3, 5.0, Watch(rank, 3, 5.0), store) for rank in range(3)]
    with ThreadPoolExecutor(3) as pool:
        for facts in ([{"version": "1", "plan": "a"}] * 3, [{"version": "1"}, {"version": "1"}, {"version": "2"}]):
            messages = list(pool.map(lambda pair: _agreed(*pair), zip(ranks, facts, strict=True)))
            differ = facts[0] != facts[2]
            assert messages == ["ranks differ in their version: rank 0: 1; rank 2: 2" if differ else ""] * 3


def _agreed(ranks: Ranks, facts: dict[str, str]) -> str:
    try:
        ranks.agree(facts)
    except UsageError as error:
        return f"{error.what}: {error.received}"
    return ""


def processes_of(job: Job, ranks: int) -> dict[int, int]:
    """Return the process ids of ranks, once all have written them."""
    until = time.monotonic() + SOON
    found: dict[int, int] = {}
    while len(found) < ranks:
        assert time.monotonic() < until, job.errors
        time.sleep(0.01)
        found = {int(rank): int(process) for rank, process in re.findall(r"rank (\d+) is process (\d+)", job.out)}
    return found


def test_a_rank_that_is_killed_ends_the_others(forked: ForkedRanks) -> None:
    job = forked.launch(3, str(JOB), "turns", "killed")
    processes = processes_of(job, 3)
    os.kill(processes[1], signal.SIGKILL)
    assert job.ended(SOON) == 2
    assert job.errors.count("rank 1 has died") == 1
    assert re.search("received  (in all_reduce over tp|running|compiling)", job.errors)  # the rank's last activity
    assert job.codes == {0: 2, 1: -signal.SIGKILL, 2: 2}
    assert job.errors.splitlines()[-1] == "rank 1 was ended by SIGKILL"
    assert not any(map(is_left, processes.values()))


def test_a_rank_that_hangs_ends_the_others_at_the_timeout(forked: ForkedRanks) -> None:
    """The rank is busy in its own code, or stopped entirely so that it receives no messages. Both jobs wait at once."""
    hangs = {"sleeps": "rank 1: sleeping", "stops": "rank 1: "}
    jobs = {mode: forked.launch(2, str(JOB), "turns", mode, TIMEOUT="3") for mode in hangs}
    for mode, job in jobs.items():
        processes = processes_of(job, 2)
        assert job.ended(SOON) == 2, mode
        assert job.errors.count("rank 1 does not arrive") == 1, mode
        assert hangs[mode] in job.errors
        assert not any(map(is_left, processes.values())), mode


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_ranks_that_do_nothing_more_end_with_what_launched_them(forked: ForkedRanks) -> None:
    """The ranks have left the others, and wait at their end for threads of a library."""
    job = forked.launch(2, str(JOB), "turns", "lingers")
    processes = processes_of(job, 2)
    os.kill(job.process, signal.SIGKILL)
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


def test_a_rank_that_fails_tells_why_and_others_do_not(forked: ForkedRanks) -> None:
    job = forked.launch(2, str(JOB), "turns", "raises")
    assert job.ended(SOON) == 2
    assert job.errors.strip() == "the disk is full"
    assert job.codes == {0: 2, 1: 2}


def test_a_process_that_nobody_started_as_a_rank_is_told_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UsageError, match="this process was not started as a rank") as error:
        join()
    assert "RANK" in (error.value.received or "")
    for name, value in (("RANK", "2"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="RANK must be a number below WORLD_SIZE"):
        join()


@pytest.mark.parametrize(
    ("rank", "met", "expected"),
    [
        (0, None, "ranks 1, 2 did not connect within 0.05 s: None"),
        (
            1,
            RuntimeError(f"no {'route ' * 99}\nat all"),
            "rank 1 of 3 found no other ranks at localhost within 0.05 s: no route",
        ),
    ],
)
def test_ranks_that_do_not_start_are_reported(
    rank: int, met: Exception | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.distributed import HashStore

    def meets(url: str, given: int, size: int, timeout: timedelta) -> Iterator[Any]:
        assert (url, given, size, timeout.total_seconds()) == ("env://", rank, 3, 0.05)
        if met is not None:
            raise met
        yield HashStore(), rank, size

    monkeypatch.setattr(importlib.import_module("torch.distributed.rendezvous"), "rendezvous", meets)
    monkeypatch.setattr(ranks, "_STARTING", 0.05)
    place = {"RANK": f"{rank}", "WORLD_SIZE": "3", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RankError) as error:
        join(0.01)
    found = error.value
    assert f"{found.what}: {found.received}".startswith(expected)
    assert len(found.received or "") == (0 if met is None else 300)


def test_ranks_need_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="ranks communicate through PyTorch, which is not installed"):
        join()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["run", "gpt2", "--recipe", "megatron"], "sharding options need a mesh"),
        (["run", "gpt2", "--mesh", "tp=2"], "this process was not started as a rank"),
        (["launch", "-n", "2", "--", "dance"], "unknown command 'dance'"),
        (["launch", "-n", "2", "--", "run", "gpt2", "--recipe", "megatron"], "ranks run a model that is split"),
        (["launch", "-n", "2", "--", "train", "gpt2", "a.txt"], "train cannot run as ranks"),
        (["launch", "-n", "2", "--", "train", "gpt2", "a.txt", "--mesh", "tp=2"], "train cannot run as ranks"),
        (["launch", "-n", "2", "--", "serve", "gpt2"], "serve cannot run as ranks"),
        (["launch", "-n", "2", "--", "shard", "gpt2", "--mesh", "tp=2"], "shard cannot run as ranks"),
    ],
)
def test_a_wrong_command_is_refused(words: list[str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2
    assert expected in done.output


def test_the_commands_of_ranks_are_those_with_a_mesh_and_a_time_limit() -> None:
    assert rank_commands() == ["run", "generate"]


def test_the_hint_of_launch_runs(forked: ForkedRanks) -> None:
    """The hint about a missing mesh, followed word by word, is a command that runs."""
    done = CliRunner().invoke(app, ["launch", "-n", "2", "--", "run", "gpt2"])
    (hint,) = [line.split("try", 1)[1] for line in done.output.splitlines() if line.startswith("  try")]
    small = [word for each in ("layers=1", "dim=8", "heads=2", "vocab=11") for word in ("--set", each)]
    job = forked.launch(2, "run", "gpt2", *hint.split(), *small, "--input", "tokens=1,2")
    assert job.ended(SOON) == 0, job.errors
    assert "gpt2 ran in" in job.out


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
    texts = [(tmp_path / str(rank)).read_text() for rank in range(3)]
    assert all(text.startswith("3 ") for text in texts)
    if hasattr(os, "sched_getaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        assert texts[0] == f"3 {cores[: max(1, len(cores) // 3)]}"
        assert texts[2].endswith(f"{cores[-1]}]")
    with pytest.raises(UsageError, match="the number of ranks must be 1 or more"):
        launch_ranks(["true"], 0)


@pytest.mark.parametrize(("number", "name"), [(9, "SIGKILL"), (35, "signal 35")])
def test_a_signal_that_ended_a_rank_is_named(number: int, name: str) -> None:
    """A real-time signal has no name, and is reported by its number."""
    ends = ["sh", "-c", f"[ $RANK = 0 ] || kill -{number} $$"]
    with pytest.raises(RankError, match=f"^rank 1 was ended by {name}\n") as error:
        launch_ranks(ends, 2)
    assert error.value.received == "2 ranks"


@pytest.mark.usefixtures("alone")
def test_a_recipe_that_leaves_no_step_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> Any:
        raise NoStep("gpt2 has no axis that may be stepped")

    monkeypatch.setattr(rank_models, "step_of", none)
    small = {"layers": 1, "dim": 16, "heads": 4, "vocab": 37}
    with join(60.0) as ranks:
        with pytest.raises(UsageError, match="no decoding step if it is split by the recipe sequence") as caught:
            rank_models.open_rank_stepped("gpt2", "tp=1", ranks, recipe="sequence", **small)
        assert "megatron" in str(caught.value.hint)

"""Ranks for tests, forked from one process that has loaded PyTorch and Treadle. Starting each rank separately would
take seconds.

    with ForkedRanks() as ranks:
        job = ranks.launch(2, "run", "gpt2", "--mesh", "tp=2")  # as `treadle launch -n 2 -- run gpt2 --mesh tp=2`
        code = job.ended()

Everything else is as without the fork: `treadle launch` is a process, and each rank is one of its children.
"""

from __future__ import annotations

import atexit
import faulthandler
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parent.parent
CONTEXT = "TREADLE_LINE_MAP_CONTEXT"


@dataclass(frozen=True)
class Job:
    """A running `treadle launch`, and the folder with its output and the exit codes of its ranks."""

    process: int
    folder: Path
    server: ForkedRanks

    @property
    def out(self) -> str:
        """Return everything that the ranks have printed so far."""
        return (self.folder / "out").read_text()

    @property
    def errors(self) -> str:
        """Return everything that the ranks have written to standard error so far."""
        return (self.folder / "errors").read_text()

    @property
    def codes(self) -> dict[int, int]:
        """Return the exit codes of the ranks that have ended, by rank: the exit code, or below 0 the signal."""
        lines = (self.folder / "codes").read_text().splitlines()
        return {int(rank): int(code) for rank, code in map(str.split, lines)}

    def ended(self, timeout: float = 240) -> int:
        """Wait for the end; return the exit code. Raises TimeoutError."""
        until = time.monotonic() + timeout
        while (code := self.server.ask(poll=self.process)) is None:
            if time.monotonic() > until:
                raise TimeoutError(f"it has not ended after {timeout} s: {self.errors}")
            time.sleep(0.01)
        return int(code)


class ForkedRanks:
    """The forking process; a context manager that ends it on exit."""

    def __enter__(self) -> Self:
        own = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TREADLE_CERTIFY": "0"}
        own["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as `join` does before it loads PyTorch
        self.folder = tempfile.TemporaryDirectory()
        command = [sys.executable, str(Path(__file__))]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=own, cwd=ROOT
        )
        self.count = 0
        return self

    def __exit__(self, *error: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)
        self.folder.cleanup()

    def ask(self, **request: Any) -> Any:
        """Send a request to the forking process; return its answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def launch(self, ranks: int, *words: str, **environment: str) -> Job:
        """Start a command, or a Python file, on `ranks` ranks."""
        self.count += 1
        environment |= {name: os.environ[name] for name in (CONTEXT,) if name in os.environ}
        folder = Path(self.folder.name, str(self.count))
        folder.mkdir()
        for name in ("out", "errors", "codes"):
            (folder / name).touch()
        process = self.ask(launch=["launch", "-n", str(ranks), "--", *words], to=str(folder), beside=environment)
        return Job(process, folder, self)


# -- the forking process -----------------------------------------------------------------------------------------------

_POPEN = subprocess.Popen
_LOADED = ("torch.distributed", "tvm", "tests.rank_jobs", "treadle.cli.launch", "treadle.cli.rank_runs")


class _Forked:
    """The part of `subprocess.Popen` that `launch_ranks` uses, for a child that has loaded everything."""

    folder = Path()

    def __init__(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        self.returncode: int | None = None
        self.rank = int(env["RANK"])
        self.pid = os.fork()
        if not self.pid:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            subprocess.Popen = _POPEN  # type: ignore[misc]
            os.environ.clear()
            os.environ.update(env)
            _set_coverage_context()
            _run(command[1:])

    def poll(self) -> int | None:
        return self._waited(os.WNOHANG)

    def wait(self) -> int | None:
        return self._waited(0)

    def _waited(self, how: int) -> int | None:
        if self.returncode is None:
            process, status = os.waitpid(self.pid, how)
            if process:
                self.returncode = os.waitstatus_to_exitcode(status)
                with (self.folder / "codes").open("a") as file:
                    print(self.rank, self.returncode, file=file)
        return self.returncode

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


def _run(words: Sequence[str]) -> None:
    """Run the command or file named by these Python arguments, and end the process with its exit code."""
    code: Any = 1
    try:
        if words[0] == "-m":
            from treadle.cli import main

            sys.argv = ["treadle", *words[2:]]
            main()
        else:
            sys.argv = list(words)
            runpy.run_path(words[0], run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


def _set_coverage_context() -> None:
    """If coverage runs, set its context to the test that started this process (`tests.line_map`)."""
    if "coverage" in sys.modules and CONTEXT in os.environ:
        from coverage import Coverage

        own = Coverage.current()
        assert own is not None
        own.switch_context(os.environ[CONTEXT])


def _launched(request: Mapping[str, Any]) -> int:
    """Fork a `treadle launch`; return its process id."""
    process = os.fork()
    if process:
        return process
    folder = Path(request["to"])
    for name, stream in (("out", 1), ("errors", 2)):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_APPEND), stream)
    os.environ.update(request["beside"])
    _set_coverage_context()
    _Forked.folder = folder
    subprocess.Popen = _Forked  # type: ignore[misc, assignment]
    _run(["-m", "treadle", *request["launch"]])
    return 0


def main() -> None:
    """Load, then serve requests, one a line. A rank that is ended by a signal prints its stack."""
    faulthandler.enable()
    sys.path.insert(0, str(ROOT))
    for name in _LOADED:
        with suppress(ImportError):
            importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        if "launch" in request:
            print(json.dumps(_launched(request)), flush=True)
        else:
            process, status = os.waitpid(request["poll"], os.WNOHANG)
            print(json.dumps(os.waitstatus_to_exitcode(status) if process else None), flush=True)


if __name__ == "__main__":
    main()

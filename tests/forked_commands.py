"""Python processes for tests, forked from one that has loaded Treadle. Starting each takes half a second or more.

    code = ForkedPython(environment).run(["-m", "treadle", "models"], environment, folder, stdin, stdout, stderr)

Apart from its start, a forked process is as any other: it has its own arguments, environment, folder and streams, and
ends as the interpreter ends.
"""

from __future__ import annotations

import gc
import io
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class ForkedPython:
    """The forking process. It ends with this process. Several threads may call `run`."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, __file__, str(theirs.fileno())]
        self.process = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()], cwd=ROOT)
        theirs.close()

    def run(self, words: Sequence[str], environment: Mapping[str, str], folder: Path, *streams: int) -> int:
        """Run Python with these arguments, and with file descriptors as its three streams; return the exit code."""
        answers, theirs = os.pipe()
        try:
            request = json.dumps([list(words), dict(environment), str(folder)]).encode()
            socket.send_fds(self.requests, [request], [*streams, theirs])
        finally:
            os.close(theirs)
        with open(answers, encoding="ascii") as answer:
            return int(answer.read())


# -- the forking process -----------------------------------------------------------------------------------------------

LONGEST = 1 << 17
"""Maximum number of bytes of a request."""


def load() -> None:
    """Load what commands load."""
    import treadle
    import treadle.cli

    treadle.compile("gpt2", layers=1, dim=8, heads=2, vocab=11, backend="numpy")


def serve(requests: socket.socket) -> Callable[[], Any]:
    """Fork a process for each request. Return only in the forked processes, the function that each should call."""
    signal.signal(signal.SIGCHLD, _reap)
    while True:
        request, streams, _, _ = socket.recv_fds(requests, LONGEST, 4)
        if not request:
            return lambda: None
        if not os.fork():
            break
        for stream in streams:
            os.close(stream)
    requests.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    *own, answer = streams
    process = os.fork()
    if process:
        for stream in own:
            os.close(stream)
        _, status = os.waitpid(process, 0)
        os.write(answer, str(os.waitstatus_to_exitcode(status)).encode())
        os._exit(0)
    os.close(answer)
    words, environment, folder = json.loads(request)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    _replace_streams(own)
    sys.path[0] = folder
    return lambda: _run(words)


def _reap(*_: object) -> None:
    """Wait for the processes that have answered and ended."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _replace_streams(streams: Sequence[int]) -> None:
    """Make these the process's streams, buffered as the interpreter buffers its own."""
    for number, (stream, name) in enumerate(zip(streams, ("stdin", "stdout", "stderr"), strict=True)):
        os.dup2(stream, number)
        os.close(stream)
        file = open(number, "wb" if number else "rb")  # noqa: SIM115
        errors = "backslashreplace" if name == "stderr" else "strict"
        lines = name == "stderr" or file.isatty()
        made = io.TextIOWrapper(file, encoding="utf-8", errors=errors, line_buffering=lines)
        made.mode = "w" if number else "r"  # type: ignore[attr-defined]
        setattr(sys, name, made)
        setattr(sys, f"__{name}__", made)


def _run(words: list[str]) -> None:
    """Run a module or a text, as `python -m` or `python -c` do."""
    how, what, *rest = words
    sys.argv = [how, *rest]
    if how == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        assert how == "-c"
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    load()
    gc.freeze()  # a collection would copy every page that the forked processes share
    serve(socket.socket(fileno=int(sys.argv[1])))()

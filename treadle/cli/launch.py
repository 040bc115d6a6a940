"""`treadle launch`: start the ranks of a run as processes on this machine."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from treadle.cli.application import command
from treadle.ir.errors import UsageError


@command("launch")
def launch_command(
    count: Annotated[int, typer.Option("-n", "--ranks", metavar="N", min=1, help="Number of ranks.")],
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="-- COMMAND...",
            help="A treadle command with --mesh, such as run gpt2 --mesh tp=2; or a Python file with its arguments.",
            show_default=False,
        ),
    ],
) -> None:
    """Run a command as N ranks on this machine. If one rank fails, all end."""
    from treadle.cli import COMMANDS
    from treadle.runtime.distributed.launching import launch_ranks

    has_mesh = any(word == "--mesh" or word.startswith("--mesh=") for word in words)
    if words[0].endswith(".py"):
        started = [sys.executable, *words]
    elif words[0] in COMMANDS and not has_mesh:
        raise UsageError(
            "ranks run a model that is split over a mesh", received=" ".join(words)[:80], hint=f"--mesh tp={count}"
        )
    elif words[0] in COMMANDS:
        started = [sys.executable, "-m", "treadle", *words]
    else:
        raise UsageError(
            f"unknown command {words[0]!r}",
            received=" ".join(words)[:80],
            hint="run, generate, or a Python file: a command with its options, including --mesh",
        )
    code = launch_ranks(started, count)
    if code:
        raise typer.Exit(code)

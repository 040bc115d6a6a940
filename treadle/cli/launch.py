"""`treadle launch`: so many processes of this machine as the ranks of one run."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from treadle.cli.application import command
from treadle.ir.errors import UsageError


@command("launch")
def launch_command(
    count: Annotated[int, typer.Option("-n", "--ranks", metavar="N", min=1, help="How many ranks.")],
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="-- COMMAND...",
            help="A command of treadle with --mesh, such as run gpt2 --mesh tp=2; or a file.py with its arguments.",
            show_default=False,
        ),
    ],
) -> None:
    """Start a command on so many ranks of this machine, which end together."""
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
            f"there is no command {words[0]!r} to launch",
            received=" ".join(words)[:80],
            hint="run, generate, or a Python file: a command, what it takes, --mesh among it",
        )
    code = launch_ranks(started, count)
    if code:
        raise typer.Exit(code)

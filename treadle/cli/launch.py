"""`treadle launch`: start the ranks of a run as processes on this machine."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Annotated

import typer

from treadle.cli.application import app, command
from treadle.cli.options import Mesh
from treadle.files.nearest_names import nearest_path_hint
from treadle.files.shown_names import printable
from treadle.ir.errors import UsageError


@command("launch")
def launch_command(
    count: Annotated[int, typer.Option("-n", "--ranks", metavar="N", min=1, help="Number of ranks.")],
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="-- COMMAND...",
            help="A treadle command with --mesh, such as run gpt2 --mesh tp=2 --recipe megatron; or a Python file with "
            "its arguments.",
            show_default=False,
        ),
    ],
) -> None:
    """Run a command as N ranks on this machine. If one rank fails, all end."""
    from treadle.cli import COMMANDS
    from treadle.runtime.distributed.launching import launch_ranks

    has_mesh = any(word == "--mesh" or word.startswith("--mesh=") for word in words)
    received, able = printable(" ".join(words), 80), rank_commands()
    if words[0].endswith(".py"):
        if not Path(words[0]).is_file():
            hint = nearest_path_hint(words[0]) or "the path of a Python file"
            raise UsageError(f"there is no file {printable(words[0])}", hint=hint)
        started = [sys.executable, *words]
    elif words[0] not in able:
        is_command = words[0] in COMMANDS
        what = f"{words[0]} cannot run as ranks" if is_command else f"unknown command {words[0]!r}"
        alone = f", or treadle {words[0]} without launch" if is_command else ""
        names = ", ".join(f"{name} MODEL --mesh tp={count} --recipe megatron" for name in able)
        raise UsageError(what, received=received, hint=f"{names}, a Python file{alone}")
    elif not has_mesh:
        raise UsageError(
            "ranks run a model that is split over a mesh",
            received=received,
            hint=f"--mesh tp={count} --recipe megatron",
        )
    else:
        started = [sys.executable, "-m", "treadle", *words]
    code = launch_ranks(started, count)
    if code:
        raise typer.Exit(code)


def rank_commands() -> list[str]:
    """Return the commands that run as one of several ranks."""
    found = {each.name: inspect.signature(each.callback) for each in app.registered_commands if each.callback}
    return [
        name
        for name, signature in found.items()
        if name and Mesh in {p.annotation for p in signature.parameters.values()}
    ]

"""`treadle launch`: start the ranks of a run as processes on this machine."""

from __future__ import annotations

import inspect
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from treadle.cli.application import app, command
from treadle.cli.options import Mesh, mesh_flags
from treadle.files.nearest_names import nearest_path_hint
from treadle.files.shown_names import printable
from treadle.ir.errors import TreadleError, UsageError

_OWN = ("-n", "--ranks")


@command("launch", passes_on=True)
def launch_command(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="COMMAND",
            help="A treadle command with --mesh, such as run gpt2 --mesh tp=2 --recipe megatron; or a Python file with "
            "its arguments. It may come after --.",
            show_default=False,
        ),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(*_OWN, metavar="N", min=1, help="Number of ranks. Required; before COMMAND.", show_default=False),
    ] = None,
) -> None:
    """Run a command as N ranks on this machine. If one rank fails, all end."""
    from treadle.cli import COMMANDS
    from treadle.cli.rank_runs import refuse_artifact
    from treadle.runtime.distributed.launching import launch_ranks
    from treadle.runtime.distributed.ranks import need_torch

    if not words:
        raise UsageError("launch needs a command", hint=_example(count))
    if words[0].startswith("-"):
        raise UsageError(
            f"launch has no option {printable(words[0].partition('=')[0])}; options of the command follow it",
            received=printable(" ".join(words), 80),
            hint=_example(count),
        )
    if count is None:
        after = any(word.partition("=")[0] in _OWN for word in words)
        raise UsageError(
            f"launch needs the number of ranks{' before the command' * after}",
            received=printable(" ".join(words), 80),
            hint=_corrected(words),
        )
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
        names = ", ".join(f"{_spelled(name)} {mesh_flags(None, None, count)}" for name in able)
        raise UsageError(what, received=received, hint=f"{names}, a Python file{alone}")
    else:
        given = _options(words)
        if given["mesh"] is None:
            for word in words:
                refuse_artifact(word)
            raise UsageError(
                "ranks run a model that is split over a mesh",
                received=received,
                hint=mesh_flags(given["recipe"], given["axis"], count),
            )
        need_torch()  # else every rank would report it
        started = [sys.executable, "-m", "treadle", *words]
    code = launch_ranks(started, count)
    if code:
        raise typer.Exit(code)


def _options(words: Sequence[str]) -> dict[str, Any]:
    """Return the options of a command. An error in them is printed once, and not by every rank."""
    settings = app.info.context_settings or {}
    return dict(_parser(words[0]).make_context(f"treadle {words[0]}", list(words[1:]), **settings).params)


def _spelled(name: str) -> str:
    """Return the name of a command with its required arguments."""
    needed = [each for each in _parser(name).params if each.param_type_name == "argument" and each.required]
    return " ".join([name, *[str(each.metavar) for each in needed]])


def _parser(name: str) -> Any:
    commands: Any = typer.main.get_command(app)
    return commands.commands[name]


def _example(count: int | None) -> str:
    """Return a command line that starts this number of ranks."""
    return _corrected(["run", "MODEL", *mesh_flags(None, None, count).split()], count)


def _corrected(words: Sequence[str], count: int | None = None) -> str:
    """Return a command line that starts ranks, from the words of a command.

    count  the number of ranks; None: the number after -n among the words, or else that of their mesh, or else 2
    """
    from treadle.ir.placement.mesh import Mesh

    kept, left = [], list(words)
    if left[0].isdecimal():  # the number of ranks without -n
        count, left = int(left[0]), left[1:]
        left = left[left[:1] == ["--"] :]
    while left:
        name, has_value, value = (word := left.pop(0)).partition("=")
        if name in _OWN and (has_value or left):
            count = int(number) if (number := value or left.pop(0)).isdecimal() else count
            continue
        kept.append(word)
        if name == "--mesh" and count is None:
            with suppress(TreadleError):
                count = Mesh.of(value or "".join(left[:1])).ranks
    return shlex.join(["treadle", "launch", "-n", str(count or 2), "--", *kept])


def rank_commands() -> list[str]:
    """Return the commands that run as one of several ranks."""
    found = {each.name: inspect.signature(each.callback) for each in app.registered_commands if each.callback}
    return [
        name
        for name, signature in found.items()
        if name and Mesh in {p.annotation for p in signature.parameters.values()}
    ]

"""The typer application, the decorator of commands, the printing of errors, and JSON output."""

from __future__ import annotations

import inspect
import json
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from types import MappingProxyType
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

import treadle
from treadle.cli.command_options import (
    options_by_name,
    point_to_meant,
    point_to_place,
    refuse_several_values,
    takes_every_size,
    without_other_options,
)
from treadle.cli.options import flags_of, keywords_of, settings_flags, settings_of
from treadle.files.whole_files import FULL
from treadle.ir.errors import Hint, TreadleError
from treadle.program.other_names import OTHER_COMMANDS, meant_option
from treadle.runtime.distributed.rank_reports import is_first_report

_UsageError: type[Exception] = typer.BadParameter.__bases__[0]
"""The class of errors in options: of typer or of click, depending on typer's version."""

LEFT = 128 + 13
"""The exit code of a command such as `verify`, whose exit code is its answer, if the reader of its output closed the
pipe too early. Shells report this code for a program that SIGPIPE ended.
"""


def _without_types(params: list[Any]) -> list[Any]:
    """Return parameters as `--help` shows them: without the value of a flag and the type of an argument."""
    for param in params:
        if getattr(param, "is_flag", False):
            param.metavar = ""
        elif param.param_type_name == "argument":
            param.display_type_rich = lambda ctx: ""
    return params


class _Command(TyperCommand):
    def get_params(self, ctx: Any) -> list[Any]:
        return _without_types(super().get_params(ctx))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = list(args)
        try:
            rest = super().parse_args(ctx, args)
        except Exception as error:
            if hasattr(error, "possibilities"):  # of typer or of click, depending on typer's version
                group: Any = typer.main.get_command(app)
                point_to_meant(error, str(self.name), self.get_params(ctx), given, group.commands)
            elif "unexpected extra argument" in str(getattr(error, "message", "")):
                point_to_place(error, str(self.name), self.get_params(ctx), given)
            elif getattr(getattr(error, "param", None), "param_type_name", "") == "option":
                error.message = getattr(error, "message", None) or error.param.help  # type: ignore[attr-defined]
            raise
        if not ctx.resilient_parsing:
            refuse_several_values(self.make_parser(ctx).parse_args(given)[2], ctx)
        return rest


class _Group(TyperGroup):
    def get_params(self, ctx: Any) -> list[Any]:
        return _without_types(super().get_params(ctx))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except Exception as error:
            other = OTHER_COMMANDS.get(args[0])
            if args[0] in ("help", "version") and hasattr(error, "format_message"):
                command = " ".join(["treadle", *(word for word in args[1:2] if word in self.commands)])
                error.message = f"No such command '{args[0]}'; {command} --{args[0]}"  # type: ignore[attr-defined]
            if (":" in args[0] or os.path.exists(args[0])) and hasattr(error, "format_message"):
                error.message = f"No such command '{args[0]}'; a command comes first: treadle inspect {args[0]}"  # type: ignore[attr-defined]
            if other is not None and hasattr(error, "format_message"):
                message = (
                    f"No such command '{args[0]}'; treadle {other}: {self.commands[other].get_short_help_str(200)}"
                )
                error.message = message  # type: ignore[attr-defined]
            raise


app = typer.Typer(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Declare transformers, compile them, inspect the optimized graph, run them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def command(
    name: str,
    *,
    takes: Sequence[str] = (),
    defaults: Mapping[str, Any] = MappingProxyType({}),
    settings: Sequence[type] = (),
    judges: Callable[[dict[str, Any]], bool] = lambda options: False,
    passes_on: bool = False,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function the command of this name, which prints its errors.

    takes     entry functions: the command has the flags of their options (`treadle.program.option_table`). The function
              gets the options that were set as a mapping, in its parameter with the annotation `OptionKeywords`
    defaults  defaults of these options in this command, if they differ from the options' own
    settings  dataclasses (`treadle.program.option_declarations`): the command has the flags of their fields. The
              function gets an instance in its parameter with this class as its annotation
    judges    returns True if the exit code is the command's answer, given the options
    passes_on True if the first argument ends the command's options: all words from there on are its arguments, and so
              are unknown options
    """
    parsing = {"allow_interspersed_args": not passes_on, "ignore_unknown_options": passes_on}
    kinds = {kind.__name__: kind for kind in settings}

    def made(function: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(function).parameters
        groups: dict[str, tuple[type | None, list[str]]] = {}
        parameters: list[inspect.Parameter] = []
        for each in own.values():
            if each.annotation == "OptionKeywords" or each.annotation in kinds:
                kind = kinds.get(each.annotation)
                flags = flags_of(takes, defaults, own) if kind is None else settings_flags(kind)
                groups[each.name] = kind, [flag.name for flag in flags]
                parameters += flags
            else:
                text = each.annotation
                annotation = eval(text, function.__globals__) if isinstance(text, str) else text
                parameters.append(each.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=annotation))

        @wraps(function)
        def guarded(**given: Any) -> None:
            with (
                _reader_may_leave(LEFT if judges(given) else 0),
                _printing_errors(name, given.get("as_json", False)),
            ):
                for group, (kind, names) in groups.items():
                    part = {each: given.pop(each) for each in names}
                    given[group] = keywords_of(part, defaults) if kind is None else settings_of(kind, part)
                function(**given)

        guarded.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        guarded.__annotations__ = {each.name: each.annotation for each in parameters}
        return app.command(name, cls=_Command, context_settings=parsing)(guarded)

    return made


def print_json(facts: Any) -> None:
    """Print the one JSON object of `--json`."""
    print(json.dumps(facts, indent=2, allow_nan=False))


@contextmanager
def _reader_may_leave(code: int) -> Iterator[None]:
    """Exit quietly if the reader of the output, such as `head`, has closed the pipe."""
    try:
        yield
    except BrokenPipeError:
        forget_output()
        raise typer.Exit(code) from None


@contextmanager
def _printing_errors(name: str, as_json: bool) -> Iterator[None]:
    """If the block raises an error, print it as an error of the command of this name, and exit."""
    try:
        yield
        sys.stdout.flush()
    except typer.Exit:
        sys.stdout.flush()  # a closed pipe must be noticed here, where its exit code is known
        raise
    except (typer.Abort, _UsageError, BrokenPipeError):
        raise
    except TreadleError as error:
        if error.is_reported:
            raise typer.Exit(2) from None
        error.hint = _with_exchanged_arguments(error, name) or error.hint
        if isinstance(error.hint, Hint):
            error.hint = _of_ranks(error.hint.on_command_line(["treadle", *_words_for(error.hint, name)]))
        if error.option is not None:
            error.hint = _own_option(error.option, name, error.hint)
        if is_first_report(str(error)):
            with saying():
                print_error(error, as_json=as_json)
        raise typer.Exit(2) from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno in FULL:
            raise  # `treadle.cli.main` reports it
        what = f"Treadle has failed, which is a fault of Treadle: {type(error).__name__}: {error}"
        how = "TREADLE_DEBUG=1 with the same command shows where; please report it with that text"
        if is_first_report(what):
            with saying():
                _trace_if_asked()
                if as_json:
                    print_json({"error": {"kind": "InternalError", "what": what, "try": how}})
                else:
                    print(f"{what}\n  try       {how}", file=sys.stderr)
        raise typer.Exit(1) from None


def print_error(error: TreadleError, *, as_json: bool) -> None:
    """Print an error in the house's form to standard error, or as the one object of `--json`."""
    from treadle.reporting.errors import error_facts, error_text
    from treadle.reporting.tables import console

    _trace_if_asked()
    if as_json:
        print_json({"error": error_facts(error)})
    else:
        console(stderr=True).print(error_text(error), soft_wrap=True)


def _words_for(hint: Hint, name: str) -> list[str]:
    """Return the words of the command line. If a hint replaces the command by another one, leave out the options that
    the other one lacks. A command that runs this one, as `launch` does, has no other options.
    """
    group: Any = typer.main.get_command(app)
    words, other = sys.argv[1:], group.commands.get(next(iter(hint.words), ""))
    if hint.replaces != name or other is None or name in hint.words:
        return words
    return without_other_options(words, group.commands[name].params, other.params, hint.without)


def _of_ranks(hint: str) -> str:
    """Return a hint for the command of a rank, which `treadle launch` started, as a command that starts ranks again."""
    from treadle.runtime.distributed.ranks import LAUNCHER

    own = f"treadle {sys.argv[1]} " if len(sys.argv) > 1 else ""
    if LAUNCHER not in os.environ or not own or not hint.startswith(own):
        return hint
    return f"treadle launch -n {os.environ['WORLD_SIZE']} -- {hint.removeprefix('treadle ')}"


def _with_exchanged_arguments(error: TreadleError, name: str) -> str | None:
    """Return the command line with the argument MODEL, which names no model, and a later argument that does exchanged;
    None for any other error, if no argument names a model, and for a command that takes several models.
    """
    from treadle.program.places import NoModelError, names_model

    words = sys.argv[1:]
    if not isinstance(error, NoModelError) or error.name not in words or name in ("diff", "serve"):
        return None
    at = words.index(error.name)
    model = next((n for n in range(at + 1, len(words)) if names_model(words[n]) and words[n - 1][:1] != "-"), None)
    if model is None:
        return None
    words[at], words[model] = words[model], words[at]
    return f"{shlex.join(['treadle', *words])}: the model comes first"


def _own_option(option: str, name: str, hint: str | None) -> str:
    """Return a hint for a name after --set that belongs to an option: the command's flag for it, if there is one, else
    the given hint, or the command's --help.
    """
    group: Any = typer.main.get_command(app)
    known = options_by_name(group.commands[name].params)
    flags = {each: flag for each, flag in known.items() if flag.startswith("--")}
    meant = option if option in flags else meant_option(option, flags, 1.0 if hint else 0.75)
    if meant is not None and (option == meant or meant != "sizes" or not takes_every_size(name)):
        return f"{flags[meant]}, an option of treadle {name}"
    return hint or f"treadle {name} --help, for its own options"


@contextmanager
def saying() -> Iterator[None]:
    """Allow a block to print an error: if the output is closed, the exit code is unchanged."""
    try:
        yield
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:
        forget_output()


def forget_output() -> None:
    """Discard further output to streams that fail: a reader has closed one, as `head` does, or the disk is full."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _trace_if_asked() -> None:
    if os.environ.get("TREADLE_DEBUG", "") in ("1", "2", "3", "4"):
        traceback.print_exc()


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        print(f"treadle {treadle.__version__}")
        raise typer.Exit

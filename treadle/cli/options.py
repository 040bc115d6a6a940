"""Arguments and options that several commands share. Flags of compile options follow from
`treadle.program.option_table`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from treadle.cli.completing import complete_backend, complete_model, complete_target
from treadle.ir.hardware import HARDWARE
from treadle.ir.target import Target
from treadle.program.flag_values import parse_axes, parse_config
from treadle.program.option_declarations import Option, declared
from treadle.program.option_table import declared_options, taken_by
from treadle.program.options import CompileOptions

if TYPE_CHECKING:
    from treadle.compiled import Compiled

NOTHING_CERTIFIED = "no pass changed anything that needs a certificate"

OptionKeywords = dict[str, Any]
"""The annotation of a command's parameter that gets the compile options that were set, as keyword arguments of an entry
function. `treadle.cli.application.command` replaces the parameter by the flags of these options.
"""

ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="file.py:function, a checkpoint folder, a GGUF, ONNX or .treadle file, a model of the zoo, a fetched "
        "model (see `models`), or a name of the Hugging Face hub in the local cache.",
        show_default=False,
        autocompletion=complete_model,
    ),
]
Recipe = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="NAME",
        help="megatron, sequence, context, dp, fsdp, megatron-fsdp or gpipe (see docs/sharding.md).",
        show_default=False,
    ),
]
Axis = Annotated[
    list[str] | None,
    typer.Option(
        "--axis",
        metavar="NAME=AXES",
        help="Split an axis of the model over the mesh, such as heads=tp; vocab=- does not split it. Repeatable.",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="NAME",
        help=f"Device of each rank, by default h100. One of {', '.join(HARDWARE)}.",
        show_default=False,
    ),
]
Mesh = Annotated[
    str | None,
    typer.Option(
        "--mesh",
        metavar="AXES",
        help="Run as one of the ranks started by treadle launch or torchrun, over this mesh, such as tp=2.",
        show_default=False,
    ),
]
Patience = Annotated[
    float,
    typer.Option("--timeout", metavar="SECONDS", min=1, help="With --mesh: seconds that a rank waits for the others."),
]
Sizes = Annotated[
    str | None,
    typer.Option("--sizes", metavar="B=1,S=128", help="Sizes of symbolic axes. By default small ones."),
]
Column = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Column with the texts, if --file is a .csv, .tsv, .parquet or .jsonl file. By default text.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

_CONFIG: Any = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Change the model's configuration, such as layers=2. Repeatable."),
]
_THREADS: Any = Annotated[
    int | None,
    typer.Option(
        "--threads",
        metavar="N",
        min=1,
        help="Maximum number of threads, with torch and tvm. By default one per core.",
        show_default=False,
    ),
]
_COMPLETIONS = {"backend": complete_backend, "target": complete_target, "model": complete_model, None: None}
_KINDS: dict[str, Any] = {"int": int, "float": float, "Path": Path}


def flags_of(entries: Iterable[str], defaults: Mapping[str, Any], own: Iterable[str]) -> list[inspect.Parameter]:
    """Return the flags of the options that any of these entry functions takes, as parameters of a command.

    defaults  defaults that differ from the options' own
    own       names of the parameters that the command declares itself
    """
    found = [_parameter("config", _CONFIG, None)]
    for each in taken_by(*entries):
        if each.flag is not None and each.name not in own:
            found.append(_parameter(each.name, _annotation(each), defaults.get(each.name, _shown_default(each))))
            if each.name == "target" and "threads" not in own:
                found.append(_parameter("threads", _THREADS, None))
    return found


def settings_flags(kind: type) -> list[inspect.Parameter]:
    """Return the flags of a dataclass of settings, as parameters of a command."""
    found = [each for each in declared(kind).values() if each.flag is not None]
    return [_parameter(each.name, _annotation(each), _shown_default(each)) for each in found]


def settings_of(kind: type, given: Mapping[str, Any]) -> Any:
    """Return an instance of a dataclass of settings with the values of a command's flags. Raises UsageError for a
    malformed value.
    """
    known = declared(kind)
    return kind(**{n: known[n].flag.parse(v) for n, v in given.items() if v is not None})  # type: ignore[union-attr]


def keywords_of(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the compile options that a command's flags set, as keyword arguments of an entry function.

    defaults  defaults that differ from the options' own

    Raises UsageError for a malformed value, and for `--set` with the name of an option.
    """
    config = parse_config(given.get("config") or (), declared_options())
    keywords: dict[str, Any] = {"config": config} if config else {}
    for name, each in declared_options().items():
        if name in given and each.flag is not None and given[name] not in (None, False):
            value = each.flag.parse(given[name])
            if each.is_set(value) or name in defaults:
                keywords[name] = value
    if given.get("threads") is not None:
        keywords["target"] = Target(keywords.get("target", "cpu"), given["threads"])
    return keywords


def mesh_flags(recipe: str | None, axis: Sequence[str] | None, ranks: int | None = None) -> str:
    """Return the flags that a command with these sharding options lacks: `--mesh dp=2` for `--recipe dp`.

    ranks  the number of ranks; None: any
    """
    from treadle.passes.sharding.recipes import mesh_for

    mesh = f"--mesh {mesh_for(recipe, parse_axes(axis or ()).values(), ranks)}"
    return mesh if recipe is not None or axis else f"{mesh} --recipe megatron"


def load_with_options(artifact: str, keywords: Mapping[str, Any], *, also: Iterable[str] = ()) -> Compiled:
    """Load an artifact with the options of a command. Raises UsageError for options that cannot change an artifact.

    also  names of the options that the command reads itself
    """
    from treadle.artifacts.loading import load_artifact

    CompileOptions.of("compile", keywords).refuse_for_artifact(artifact, also=["widen", *also])
    return load_artifact(artifact, **{name: value for name, value in keywords.items() if name not in also})


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _annotation(option: Option) -> Any:
    flag = option.flag
    assert flag is not None
    shown: dict[str, Any] = {"help": option.help, "show_default": isinstance(option.default, int | float | str)}
    if flag.negated:
        return Annotated[bool | None, typer.Option(f"--{flag.name}/--no-{flag.name}", **shown)]
    if not flag.metavar:
        return Annotated[bool, typer.Option(f"--{flag.name}", **shown)]
    shown |= {"metavar": flag.metavar, "autocompletion": _COMPLETIONS.get(flag.complete)}
    shown |= {"min": flag.least, "max": flag.most}
    kind: Any = list[str] if flag.many else _KINDS.get(option.type.removesuffix(" | None"), str)
    return Annotated[kind | None, typer.Option(f"--{flag.name}", **shown)]


def _shown_default(option: Option) -> Any:
    """Return the default that `--help` shows: a number or a name. None if it shows no default."""
    if option.flag is not None and not option.flag.metavar and not option.flag.negated:
        return False
    return option.default if isinstance(option.default, int | float | str) else None

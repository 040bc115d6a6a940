"""What the commands of tasks share: their options as a model that is asked, and how scores are told."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any

import typer

import treadle
from treadle.cli.application import command
from treadle.cli.options import AsJson, BackendName, Config, Dtype, Limit, ModelName, Quantize, TargetName, Threads
from treadle.ir.errors import UsageError

if TYPE_CHECKING:
    from treadle.runtime.beams import Beams
    from treadle.tasks.options import ModelOptions
    from treadle.tasks.scoring import Scored

File = Annotated[str | None, typer.Option(metavar="PATH", help="A file with a text a line; - is standard input.")]
Top = Annotated[int, typer.Option(metavar="N", help="How many to tell of each, best first.", min=1)]
Most = Annotated[
    int | None,
    typer.Option(
        "--tokens",
        metavar="N",
        help="The most tokens of each. By default as the folder says.",
        min=1,
        show_default=False,
    ),
]
BeamCount = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        max=512,
        help="Search with so many beams. By default as the folder says.",
        show_default=False,
    ),
]
LengthPenalty = Annotated[float, typer.Option(metavar="X", help="With --beams: above 0 favours long texts.")]


def task_command(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function the command of this name, which asks a model.

    The command takes MODEL and the options that say how it is compiled; the function gets them as one, `options`. What
    else the function takes stands between MODEL and them, but for `as_json`, which ends all.
    """

    def made(function: Callable[..., None]) -> Callable[..., None]:
        @wraps(function)
        def asked(**given: Any) -> None:
            options = model_options(**{each: given.pop(each) for each in _SHARED})
            function(options=options, **given)

        own = [p for p in inspect.signature(function).parameters.values() if p.name not in ("options", "as_json")]
        own = [p.replace(annotation=eval(p.annotation, function.__globals__)) for p in own]  # typer reads no texts here
        model, *compiled = inspect.signature(_taken, eval_str=True).parameters.values()
        keywords = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (model, *own, *compiled)]
        asked.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]
        asked.__annotations__ = {p.name: p.annotation for p in keywords}
        return command(name)(asked)

    return made


def _taken(
    model: ModelName,
    config: Config = None,
    limit: Limit = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    backend: BackendName = "numpy",
    target: TargetName = "cpu",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """What every such command takes, in the order of `--help`."""


_SHARED = tuple(name for name in inspect.signature(_taken).parameters if name != "as_json")


def model_options(
    model: str,
    *,
    backend: str,
    target: str,
    threads: int | None,
    dtype: str | None,
    quantize: str | None,
    config: Sequence[str] | None,
    limit: Sequence[str] | None,
) -> ModelOptions:
    """A command's options, as a task opens its model. Raises UsageError for one that is not well formed."""
    from treadle.continuation import TextWriter
    from treadle.ir.target import Target
    from treadle.option_values import parse_config
    from treadle.stepped import open_stepped
    from treadle.tasks.options import ModelOptions

    given = parse_config(config or (), limit or (), treadle.compile, TextWriter.open, open_stepped)
    limits = given.pop("limits", None)
    return ModelOptions(model, backend, Target(target, threads), dtype, quantize, limits, config=given)


def beams_of(count: int | None, length_penalty: float) -> Beams | None:
    """The search that --beams and --length-penalty ask for; None: as the folder says.

    Raises UsageError for a penalty alone.
    """
    from treadle.runtime.beams import Beams

    if count is None and length_penalty != 1:
        raise UsageError("without --beams there is no --length-penalty", hint="--beams 4 as well")
    return None if count is None else Beams(count, length_penalty)


def scored_facts(scores: Sequence[Scored]) -> list[dict[str, Any]]:
    """Labels and scores for JSON."""
    return [{"label": each.label, "score": each.score} for each in scores]


def scored_text(scores: Sequence[Scored]) -> str:
    """Labels and scores in a line."""
    return ", ".join(f"{each.label} {each.score:.4f}" for each in scores)

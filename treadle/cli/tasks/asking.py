"""Shared parts of the task commands: their options, and the printing of scores and of rewritten texts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from treadle.cli.application import command, print_json
from treadle.cli.options import AsJson, ModelName, OptionKeywords
from treadle.ir.errors import UsageError

if TYPE_CHECKING:
    from treadle.runtime.beams import Beams
    from treadle.tasks.rewriting import Rewritten, TextRewriter
    from treadle.tasks.scoring import Scored

File = Annotated[
    str | None, typer.Option(metavar="PATH", help="Text file with one text per line; - is standard input.")
]
Top = Annotated[int, typer.Option(metavar="N", help="Number of results for each input, best first.", min=1)]
Most = Annotated[
    int | None,
    typer.Option(
        "--tokens",
        metavar="N",
        help="Maximum number of new tokens of each text. By default the folder's setting.",
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
        help="Beam search with N beams. By default the folder's setting.",
        show_default=False,
    ),
]
LengthPenalty = Annotated[float, typer.Option(metavar="X", help="With --beams: values above 0 favour long texts.")]


def task_command(name: str, takes: str = "task") -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function the task command of this name.

    The command has MODEL and the compile options, which the function gets together as the argument `program`. The
    function's other parameters come between MODEL and the compile options, except `as_json`, which comes last.

    takes  the entry function whose options the command has
    """

    def made(function: Callable[..., None]) -> Callable[..., None]:
        def asked(model: ModelName, *, keywords: OptionKeywords, as_json: AsJson = False, **given: Any) -> None:
            from treadle.program.program import Program

            function(program=Program.of(model, takes, **keywords), as_json=as_json, **given)

        model, keywords, as_json, _ = inspect.signature(asked).parameters.values()
        own = [
            p.replace(annotation=eval(p.annotation, function.__globals__))
            for p in inspect.signature(function).parameters.values()
            if p.name not in ("program", "as_json")
        ]
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (model, *own, keywords, as_json)]
        asked.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        asked.__doc__, asked.__name__ = function.__doc__, function.__name__
        # an artifact, which only commands that generate take, has a target of its own
        return command(name, takes=[takes], defaults={"target": None} if takes == "generate" else {})(asked)

    return made


def beams_of(count: int | None, length_penalty: float) -> Beams | None:
    """Return the beam search of --beams and --length-penalty. None: use the folder's setting.

    Raises UsageError for a length penalty without beams.
    """
    from treadle.runtime.beams import Beams

    if count is None and length_penalty != 1:
        raise UsageError("only --beams accepts --length-penalty", hint="--beams 4 as well")
    return None if count is None else Beams(count, length_penalty)


def scored_facts(scores: Sequence[Scored]) -> list[dict[str, Any]]:
    """Return labels and scores as JSON."""
    return [{"label": each.label, "score": each.score} for each in scores]


def scored_text(scores: Sequence[Scored]) -> str:
    """Return labels and scores as one line."""
    return ", ".join(f"{each.label} {each.score:.4f}" for each in scores)


def print_rewritten(rewriter: TextRewriter, sources: Sequence[str], texts: Sequence[Rewritten], as_json: bool) -> None:
    """Print the rewritten texts, as JSON with their sources."""
    if as_json:
        records = [{"source": text, **asdict(each)} for text, each in zip(sources, texts, strict=True)]
        print_json({"model": rewriter.model.name, "backend": rewriter.model.backend, "texts": records})
        return
    for each in texts:
        print(each.text)

"""What the commands of tasks share: their options as a model that is asked, and how scores are told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from treadle.tasks.options import ModelOptions
    from treadle.tasks.scoring import Scored

File = Annotated[str | None, typer.Option(metavar="PATH", help="A file with a text a line; - is standard input.")]
Top = Annotated[int, typer.Option(metavar="N", help="How many to tell of each, best first.", min=1)]


def model_options(
    model: str,
    *,
    backend: str,
    target: str,
    threads: int | None,
    dtype: str | None = None,
    quantize: str | None = None,
    config: Sequence[str] | None = None,
    limit: Sequence[str] | None = None,
    cache: str | None = None,
) -> ModelOptions:
    """A command's options, as a task opens its model. Raises UsageError for one that is not well formed."""
    from treadle.ir.target import Target
    from treadle.option_values import parse_config
    from treadle.tasks.options import ModelOptions

    given = parse_config(config or (), limit or ())
    limits = given.pop("limits", None)
    return ModelOptions(model, backend, Target(target, threads), dtype, quantize, limits, cache, given)


def scored_facts(scores: Sequence[Scored]) -> list[dict[str, Any]]:
    """Labels and scores for JSON."""
    return [{"label": each.label, "score": each.score} for each in scores]


def scored_text(scores: Sequence[Scored]) -> str:
    """Labels and scores in a line."""
    return ", ".join(f"{each.label} {each.score:.4f}" for each in scores)

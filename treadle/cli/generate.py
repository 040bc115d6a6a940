"""`treadle generate`: continue text with a language model."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from treadle.cli.application import command, print_json
from treadle.cli.options import AsJson, Axis, Mesh, ModelName, OptionKeywords, Patience, Recipe
from treadle.tasks.decoding_settings import DecodingSettings

if TYPE_CHECKING:
    from treadle.continuation import FoundText
    from treadle.tasks.text_generation import TextGeneration


@command("generate", takes=["generate"], defaults={"target": None}, settings=[DecodingSettings])
def continue_texts(
    model: ModelName,
    prompts: Annotated[list[str], typer.Argument(metavar="TEXTS", help="Texts to continue.", show_default=False)],
    *,
    settings: DecodingSettings,
    keywords: OptionKeywords,
    mesh: Mesh = None,
    recipe: Recipe = None,
    axis: Axis = None,
    timeout: Patience = 60.0,
    as_json: AsJson = False,
) -> None:
    """Continue text with a causal language model, such as the fetched smollm2, alone or as one of several ranks."""
    from treadle.cli.rank_runs import opened_on_ranks
    from treadle.program.given_texts import refuse_file_name
    from treadle.progress import working
    from treadle.reporting.counts import counted
    from treadle.tasks.text_generation import TextGeneration

    for text in prompts:
        refuse_file_name(text, f'"$(cat {shlex.quote(text)})" in its place')
    with opened_on_ranks(mesh, recipe, axis or [], timeout, f"{prompts} {settings} {keywords}") as stepped:
        with working(f"compiling {model}", shown=not as_json):
            run = TextGeneration.open(model, prompts, settings, stepped=stepped, **keywords)
        doing = f"continuing {counted(len(prompts), 'text')}"
        if settings.beams is not None:
            with working(doing, shown=not as_json):
                searched = run.searched()
            if as_json:
                print_json(run.searched_facts(searched))
            else:
                _print_searched(run, searched)
            return
        pieces = run.pieces()  # a refused prompt is not printed
        stream = len(prompts) == 1 and not as_json
        if stream and not settings.chat:
            print(prompts[0], end="", flush=True)
        try:
            with working(doing, shown=not as_json and not stream):
                for piece in pieces:
                    if stream:
                        print(piece.text, end="", flush=True)
        finally:
            if stream:
                print(flush=True)  # also before an error
        if as_json:
            print_json(run.facts())
        else:
            _print_written(run, is_streamed=stream)


def _print_searched(run: TextGeneration, searched: Sequence[Sequence[FoundText]]) -> None:
    """Print the results of a beam search for each prompt; scores go to standard error."""
    from treadle.reporting.counts import counted

    for prompt, found in zip(run.texts, searched, strict=True):
        for text in found:
            print(f"{'' if run.settings.chat else prompt}{text.text}\n", flush=True)
            print(f"score {text.score:.4f}, {counted(len(text.tokens), 'token')}", file=sys.stderr)
    if run.rules.options:
        print(run.rules, file=sys.stderr)


def _print_written(run: TextGeneration, *, is_streamed: bool) -> None:
    """Print texts that were not streamed, the log probabilities of their tokens, and the reasons why they ended."""
    for each in run.continuations if not is_streamed else []:
        print(f"{'' if run.settings.chat else each.prompt}{each.text}\n")
    for each in run.continuations if run.settings.logprobs is not None else []:
        print("\n".join(each.probabilities(run.writer)) + "\n")
    sys.stdout.flush()
    for line in run.reasons():
        print(line, file=sys.stderr)

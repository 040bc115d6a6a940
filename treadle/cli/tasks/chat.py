"""`treadle chat`: a conversation with a model that was trained for it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from treadle.cli.application import print_json
from treadle.cli.options import CacheName, Widen, names_of
from treadle.cli.tasks.asking import task_command

if TYPE_CHECKING:
    from treadle.tasks.options import ModelOptions

_NEW, _BYE = "/new", "/bye"


@task_command("chat")
def talk_with_model(
    options: ModelOptions,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What the model is told before.", show_default=False)
    ] = None,
    most: Annotated[int, typer.Option("--tokens", metavar="N", help="The most tokens of a reply.", min=1)] = 512,
    context: Annotated[
        int | None,
        typer.Option(metavar="N", help="The most tokens of the whole conversation.", min=2, show_default=False),
    ] = None,
    temperature: Annotated[
        float, typer.Option(metavar="T", help="0 takes the likeliest token; higher values vary more.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(metavar="P", help="Draw from the likeliest tokens that make up this probability.")
    ] = 1.0,
    min_p: Annotated[
        float, typer.Option(metavar="P", help="Draw from tokens at least this share as likely as the likeliest.")
    ] = 0.0,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Above 1, tokens that the conversation has already are less likely. By default as its folder says.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the draws: the same seed gives the same replies.")] = 0,
    cache: CacheName = None,
    widen: Widen = None,
    *,
    as_json: bool,
) -> None:
    """Talk with a model: a line is a message, /new begins again, /bye or the end of input ends it."""
    from treadle.chatting.conversation import Conversation
    from treadle.continuation import need_for_text
    from treadle.progress import working
    from treadle.runtime.sampling import Sampling
    from treadle.tasks.generation_settings import FolderRules
    from treadle.tasks.loaded import LoadedModel

    sampling = Sampling(temperature, 0, top_p, seed, min_p)
    FolderRules().but(repetition_penalty=repetition_penalty)  # a wrong value is refused before compiling
    need_for_text(options.model, chat=True)
    with working(f"compiling {options.model}", shown=not as_json):
        writer = LoadedModel(replace(options, cache=cache, widen=names_of(widen) or ())).writer
        talk = Conversation.open(writer, system=system, capacity=context)
    asked = writer.asked.but(repetition_penalty=repetition_penalty)
    if asked.options and not as_json:
        print(asked, file=sys.stderr)
    for line in _lines(shown=not as_json):
        if line == _NEW:
            talk.forget()
            continue
        for piece in talk.say(line, most=most, sampling=sampling, rules=asked.rules):
            if not as_json:
                print(piece.text, end="", flush=True)
        if not as_json:
            print(flush=True)
    if as_json:
        facts = {"model": writer.model.name, "backend": options.backend, "from_folder": asked.as_dict()}
        print_json({**facts, "messages": list(map(dict, talk.messages))})


def _lines(*, shown: bool) -> Iterator[str]:
    """What is typed, or piped, a message a line, up to /bye."""
    asks = shown and sys.stdin.isatty()
    while True:
        if asks:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line or line.strip() == _BYE:
            return
        if line.strip():
            yield line.strip()

"""`treadle chat`: a conversation with a chat model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from treadle.cli.application import print_json
from treadle.cli.tasks.asking import task_command

if TYPE_CHECKING:
    from treadle.program.program import Program

_NEW, _BYE = "/new", "/bye"


@task_command("chat", takes="generate")
def talk_with_model(
    program: Program,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="The system message.", show_default=False)] = None,
    most: Annotated[
        int, typer.Option("--tokens", metavar="N", help="Maximum number of tokens of a reply.", min=1)
    ] = 512,
    context: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Maximum number of tokens of the whole conversation.", min=2, show_default=False
        ),
    ] = None,
    temperature: Annotated[
        float, typer.Option(metavar="T", help="Sampling temperature; 0 always takes the most likely token.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(metavar="P", help="Sample from the most likely tokens whose probabilities sum to P.")
    ] = 1.0,
    min_p: Annotated[
        float,
        typer.Option(metavar="P", help="Sample from tokens whose probability is at least P times the largest one."),
    ] = 0.0,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Values above 1 make tokens already in the conversation less likely. By default the folder's.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Random seed; the same seed gives the same replies.")] = 0,
    *,
    as_json: bool,
) -> None:
    """Chat with a model: each line is a message, /new starts a new conversation, /bye or the end of input ends it."""
    from treadle.chatting.conversation import Conversation
    from treadle.continuation import need_for_text
    from treadle.progress import working
    from treadle.runtime.sampling import Sampling
    from treadle.tasks.generation_settings import FolderRules
    from treadle.tasks.loaded import LoadedModel

    sampling = Sampling(temperature, 0, top_p, seed, min_p)
    FolderRules().but(repetition_penalty=repetition_penalty)  # refuse a wrong value before compiling
    need_for_text(program.model, chat=True)
    with working(f"compiling {program.model}", shown=not as_json):
        writer = LoadedModel(program).writer
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
        facts = {"model": writer.model.name, "backend": program.backend, "from_folder": asked.as_dict()}
        print_json({**facts, "messages": list(map(dict, talk.messages))})


def _lines(*, shown: bool) -> Iterator[str]:
    """Yield the user's messages, typed or piped, one per line, up to /bye."""
    asks = shown and sys.stdin.isatty()
    while True:
        if asks:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line or line.strip() == _BYE:
            return
        if line.strip():
            yield line.strip()

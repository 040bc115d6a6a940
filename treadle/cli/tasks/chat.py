"""`treadle chat`: a conversation with a chat model."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from treadle.cli.application import print_json
from treadle.cli.tasks.asking import task_command
from treadle.files.shown_names import printable

if TYPE_CHECKING:
    from treadle.program.program import Program

_NEW, _HELP, _QUIT = "/new", "/help", "/quit"
_MOST = 512  # tokens of a reply
_COMMANDS = {_NEW: "start a new conversation", _HELP: "list the commands", _QUIT: "end the program"}
_OTHER_NAMES = {"/bye": _QUIT, "/exit": _QUIT}


@task_command("chat", takes="generate")
def talk_with_model(
    program: Program,
    image: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH", help="Image file that the first message shows. Repeatable.", show_default=False),
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="The system message.", show_default=False)] = None,
    most: Annotated[
        int, typer.Option("--tokens", metavar="N", help="Maximum number of tokens of a reply.", min=1)
    ] = _MOST,
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
    """Chat with a model: each line is a message, /help lists commands, /quit or the end of input ends the program."""
    from treadle.chatting.conversation import Conversation
    from treadle.continuation import need_for_text
    from treadle.progress import working
    from treadle.runtime.sampling import Sampling
    from treadle.tasks.generation_settings import FolderRules
    from treadle.tasks.images.prompts import ImagePrompts
    from treadle.tasks.loaded import LoadedModel

    sampling = Sampling(temperature, 0, top_p, seed, min_p)
    FolderRules().but(repetition_penalty=repetition_penalty)  # refuse a wrong value before compiling
    if image:
        ImagePrompts.check(program.source)
    need_for_text(program.source, chat=True)
    with working(f"compiling {program.model}", shown=not as_json):
        writer = LoadedModel(program).writer
        if most != _MOST:  # the default applies to models with fewer positions, too
            writer.check_count(most, "most", "--tokens")
        writer.check_count(context or 0, "capacity", "--context")
        talk = Conversation.open(writer, system=system, capacity=context)
    asked = writer.asked.but(repetition_penalty=repetition_penalty)
    if asked.options and not as_json:
        print(asked, file=sys.stderr)
    if sys.stdin.isatty() and not as_json:
        print(f"Each line is a message. {_HELP} lists the commands, {_QUIT} ends the program.", file=sys.stderr)
    for line in _lines(shown=not as_json):
        if line == _NEW:
            talk.forget()
            continue
        shown = [] if talk.messages and talk.images else image or []
        for piece in talk.say(line, images=shown, most=most, sampling=sampling, rules=asked.rules):
            if not as_json:
                print(piece.text, end="", flush=True)
        if not as_json:
            print(flush=True)
    if as_json:
        facts = {"model": writer.model.name, "backend": writer.model.backend, "from_folder": asked.as_dict()}
        print_json({**facts, "messages": list(map(dict, talk.messages))})


def _lines(*, shown: bool) -> Iterator[str]:
    """Yield typed or piped messages and /new, one per line, up to /quit.

    A line that is one word after a slash is never a message: an unknown one is reported.
    """
    asks = shown and sys.stdin.isatty()
    while True:
        if asks:
            print("> ", end="", file=sys.stderr, flush=True)
        typed = sys.stdin.readline()
        line = _OTHER_NAMES.get(typed.strip(), typed.strip())
        if not typed or line == _QUIT:
            return
        if line != _NEW and re.fullmatch(r"/\w*", line):
            if line != _HELP:
                print(f"there is no command {printable(line)}", file=sys.stderr)
            print("\n".join(f"{name:<8}{about}" for name, about in _COMMANDS.items()), file=sys.stderr, flush=True)
        elif line:
            yield line

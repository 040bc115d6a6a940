"""`treadle describe`: answer a question about an image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from treadle.cli.application import print_json
from treadle.cli.tasks.asking import task_command

if TYPE_CHECKING:
    from treadle.program.program import Program


@task_command("describe", takes="generate")
def describe_image(
    program: Program,
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="Image file.", show_default=False)],
    question: Annotated[
        str, typer.Argument(metavar="QUESTION", help="A question about the image.")
    ] = "Describe this image.",
    most: Annotated[
        int, typer.Option("--tokens", metavar="N", help="Maximum number of tokens of the answer.", min=1)
    ] = 256,
    *,
    as_json: bool,
) -> None:
    """Answer a question about an image; needs a chat model that reads images."""
    from treadle.chatting.conversation import Conversation
    from treadle.continuation import need_for_text
    from treadle.progress import working
    from treadle.tasks.images.prompts import ImagePrompts
    from treadle.tasks.loaded import LoadedModel

    ImagePrompts.check(program.source)
    need_for_text(program.source, chat=True)
    with working(f"compiling {program.model}", shown=not as_json):
        writer = LoadedModel(program).writer
        talk = Conversation.open(writer)
    said = ""
    for piece in talk.say(question, images=[image], most=most):
        said += piece.text
        if not as_json:
            print(piece.text, end="", flush=True)
    if not as_json:
        print(flush=True)
        return
    facts = {"model": writer.model.name, "backend": writer.model.backend}
    print_json({**facts, "image": image, "question": question, "answer": said})

"""`treadle answer`: answer questions with spans of a text."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from treadle.cli.application import print_json
from treadle.cli.options import Column
from treadle.cli.tasks.asking import Top, task_command

if TYPE_CHECKING:
    from treadle.program.program import Program


@task_command("answer")
def answer_questions(
    program: Program,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="The question.", show_default=False)],
    texts: Annotated[
        list[str] | None,
        typer.Argument(metavar="TEXTS", help="Texts that may contain the answer. By default --file or standard input."),
    ] = None,
    file: Annotated[str | None, typer.Option(metavar="PATH", help="Text file; - is standard input.")] = None,
    column: Column = None,
    top: Top = 1,
    longest: Annotated[int, typer.Option(metavar="N", help="Maximum number of tokens of an answer.", min=1)] = 15,
    *,
    as_json: bool,
) -> None:
    """Answer a question with a span of a text; needs a checkpoint folder of a ...ForQuestionAnswering class."""
    from treadle.program.given_texts import read_sentences
    from treadle.progress import counting, working
    from treadle.tasks.answering import QuestionAnswerer

    given = (
        list(texts)
        if texts and file is None
        else ["\n".join(read_sentences(texts or [], file, column, command=["answer", str(program.model), question]))]
    )
    with working(f"compiling {program.model}", shown=not as_json):
        answerer = QuestionAnswerer.open(program)
    with counting("reading", len(given), shown=not as_json) as progress:
        found = answerer.answer([(question, text) for text in given], top=top, longest=longest, progress=progress)
    if as_json:
        records = [{"text": text, "answers": list(map(asdict, each))} for text, each in zip(given, found, strict=True)]
        print_json(
            {
                "model": answerer.opened.name,
                "backend": answerer.opened.model.backend,
                "question": question,
                "texts": records,
            }
        )
        return
    for each in found:
        for answer in each:
            print(f"{answer.text}  ({answer.score:.4f}, characters {answer.start} to {answer.end})")
        if not each:
            print("no answer")

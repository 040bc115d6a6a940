"""`treadle answer`: questions answered by spans of a text."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from treadle.cli.application import command, print_json
from treadle.cli.options import AsJson, BackendName, Config, Dtype, Limit, ModelName, Quantize, TargetName, Threads
from treadle.cli.tasks.asking import Top, model_options


@command("answer")
def answer_questions(
    model: ModelName,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What is asked.", show_default=False)],
    texts: Annotated[
        list[str] | None,
        typer.Argument(metavar="TEXTS", help="Texts that may hold the answer; without any, --file or standard input."),
    ] = None,
    file: Annotated[str | None, typer.Option(metavar="PATH", help="A text file; - is standard input.")] = None,
    top: Top = 1,
    longest: Annotated[int, typer.Option(metavar="N", help="Tokens of an answer, at most.", min=1)] = 15,
    config: Config = None,
    limit: Limit = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    backend: BackendName = "numpy",
    target: TargetName = "cpu",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Answer a question by a span of a text, by a folder whose class ends in ForQuestionAnswering."""
    from treadle.option_values import read_sentences
    from treadle.progress import counting, working
    from treadle.tasks.answering import QuestionAnswerer

    options = model_options(
        model,
        backend=backend,
        target=target,
        threads=threads,
        dtype=dtype,
        quantize=quantize,
        config=config,
        limit=limit,
    )
    given = list(texts) if texts and file is None else ["\n".join(read_sentences(texts or [], file, f"answer {model}"))]
    with working(f"compiling {model}", shown=not as_json):
        answerer = QuestionAnswerer.open(options)
    with counting("reading", len(given), shown=not as_json) as progress:
        found = answerer.answer([(question, text) for text in given], top=top, longest=longest, progress=progress)
    if as_json:
        told = [{"text": text, "answers": list(map(asdict, each))} for text, each in zip(given, found, strict=True)]
        print_json({"model": answerer.opened.name, "backend": backend, "question": question, "texts": told})
        return
    for each in found:
        for answer in each:
            print(f"{answer.text}  ({answer.score:.4f}, characters {answer.start} to {answer.end})")
        if not each:
            print("no answer")

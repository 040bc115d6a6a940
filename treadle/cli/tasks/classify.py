"""`treadle classify`: classify texts, or pairs of texts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from treadle.cli.application import print_json
from treadle.cli.options import Column
from treadle.cli.tasks.asking import File, Top, scored_facts, scored_text, task_command

if TYPE_CHECKING:
    from treadle.program.program import Program


@task_command("classify")
def classify_texts(
    program: Program,
    texts: Annotated[
        list[str] | None,
        typer.Argument(metavar="TEXTS", help="Texts to classify. By default the lines of --file or of standard input."),
    ] = None,
    file: File = None,
    column: Column = None,
    pair: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Second text of a pair, for each text in order. Repeatable."),
    ] = None,
    top: Top = 1,
    *,
    as_json: bool,
) -> None:
    """Classify texts; needs a checkpoint folder of a ...ForSequenceClassification class, or a declaration with output
    logits [B, labels].
    """
    from treadle.ir.errors import UsageError
    from treadle.program.given_texts import read_sentences
    from treadle.progress import counting, working
    from treadle.tasks.classifying import Text, TextClassifier

    given = read_sentences(texts or [], file, column, command=["classify", str(program.model)])
    if pair and len(pair) != len(given):
        raise UsageError(f"{len(given)} texts, but {len(pair)} values of --pair", hint="one --pair for each text")
    asked: list[Text] = [*zip(given, pair, strict=True)] if pair else [*given]
    with working(f"compiling {program.model}", shown=not as_json):
        classifier = TextClassifier.open(program)
    with counting("classifying", len(asked), shown=not as_json) as progress:
        found = classifier.classify(asked, progress=progress)
    if as_json:
        records = [
            {
                "text": each,
                **({"pair": pair[number]} if pair else {}),
                "labels": scored_facts(found[number].scores[:top]),
                "tokens": found[number].tokens,
                "cut": found[number].cut,
            }
            for number, each in enumerate(given)
        ]
        print_json({"model": classifier.opened.name, "backend": classifier.opened.model.backend, "texts": records})
        return
    for text, each in zip(given, found, strict=True):
        print(f"{scored_text(each.scores[:top])}  {text}{' (cut)' if each.cut else ''}")

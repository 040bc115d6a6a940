"""`treadle tag`: label spans of texts, such as names."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from treadle.cli.application import print_json
from treadle.cli.options import Column
from treadle.cli.tasks.asking import File, task_command

if TYPE_CHECKING:
    from treadle.program.program import Program


@task_command("tag")
def tag_texts(
    program: Program,
    texts: Annotated[
        list[str] | None,
        typer.Argument(metavar="TEXTS", help="Texts to tag. By default the lines of --file or of standard input."),
    ] = None,
    file: File = None,
    column: Column = None,
    grouping: Annotated[
        str,
        typer.Option(metavar="HOW", help="Aggregation of tokens to spans: none, simple, first, average or max."),
    ] = "simple",
    *,
    as_json: bool,
) -> None:
    """Label spans of texts; needs a checkpoint folder of a ...ForTokenClassification class."""
    from treadle.program.given_texts import read_sentences
    from treadle.progress import counting, working
    from treadle.tasks.tagging import TokenTagger

    given = read_sentences(texts or [], file, column, command=["tag", str(program.model)])
    with working(f"compiling {program.model}", shown=not as_json):
        tagger = TokenTagger.open(program)
    with counting("tagging", len(given), shown=not as_json) as progress:
        found = tagger.tag(given, grouping=grouping, progress=progress)
    if as_json:
        records = [{"text": text, "spans": list(map(asdict, each))} for text, each in zip(given, found, strict=True)]
        print_json({"model": tagger.opened.name, "backend": tagger.opened.model.backend, "texts": records})
        return
    for text, each in zip(given, found, strict=True):
        print(text)
        for span in each:
            print(f"  {span.label:10} {span.score:.4f}  {span.text}  (characters {span.start} to {span.end})")

"""`treadle summarize`: summarize texts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from treadle.cli.options import Column
from treadle.cli.tasks.asking import BeamCount, File, LengthPenalty, Most, beams_of, print_rewritten, task_command

if TYPE_CHECKING:
    from treadle.program.program import Program


@task_command("summarize")
def summarize_texts(
    program: Program,
    texts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TEXTS", help="Texts to summarize. By default the lines of --file or of standard input."
        ),
    ] = None,
    file: File = None,
    column: Column = None,
    most: Most = None,
    beams: BeamCount = None,
    length_penalty: LengthPenalty = 1.0,
    *,
    as_json: bool,
) -> None:
    """Summarize texts with an encoder-decoder model, such as BART's or T5's."""
    from treadle.program.given_texts import read_sentences
    from treadle.progress import counting, working
    from treadle.tasks.rewriting import TextRewriter

    given = read_sentences(texts or [], file, column, command=["summarize", str(program.model)])
    search = beams_of(beams, length_penalty)
    with working(f"compiling {program.model}", shown=not as_json):
        rewriter = TextRewriter.open(program)
    with counting("summarizing", len(given), shown=not as_json) as progress:
        found = rewriter.summarize(given, most=most, beams=search, progress=progress)
    print_rewritten(rewriter, given, found, as_json)

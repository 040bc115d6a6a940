"""`treadle fill`: predict masked words."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from treadle.cli.application import print_json
from treadle.cli.options import Column
from treadle.cli.tasks.asking import File, Top, task_command

if TYPE_CHECKING:
    from treadle.program.program import Program


@task_command("fill")
def fill_masks(
    program: Program,
    texts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TEXTS",
            help="Texts with a mask, such as [MASK]. By default the lines of --file or of standard input.",
        ),
    ] = None,
    file: File = None,
    column: Column = None,
    top: Top = 5,
    among: Annotated[
        list[str] | None,
        typer.Option(metavar="TOKEN", help="Consider only this token of the vocabulary. Repeatable."),
    ] = None,
    *,
    as_json: bool,
) -> None:
    """Print the most likely tokens for the masks in texts; needs a checkpoint folder of a ...ForMaskedLM class, or a
    declaration that was trained with --objective masked-token.
    """
    from treadle.program.given_texts import read_sentences
    from treadle.progress import counting, working
    from treadle.tasks.filling import MaskFiller

    given = read_sentences(
        texts or [], file, column, command=["fill", str(program.model)], example="A [MASK] sentence."
    )
    with working(f"compiling {program.model}", shown=not as_json):
        filler = MaskFiller.open(program)
    with counting("filling", len(given), shown=not as_json) as progress:
        found = filler.fill(given, top=top, among=among or None, progress=progress)
    if as_json:
        records = [
            {"text": text, "masks": [list(map(asdict, fillings)) for fillings in each.masks]}
            for text, each in zip(given, found, strict=True)
        ]
        print_json(
            {"model": filler.opened.name, "backend": filler.opened.model.backend, "mask": filler.mask, "texts": records}
        )
        return
    for text, each in zip(given, found, strict=True):
        print(text)
        for fillings in each.masks:
            names = [each.token.strip() or repr(each.token) for each in fillings]
            scored = [f"{name} {each.score:.4f}" for name, each in zip(names, fillings, strict=True)]
            print("  " + ", ".join(scored))

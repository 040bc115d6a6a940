"""`treadle match`: match images with texts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from treadle.cli.application import print_json
from treadle.cli.tasks.asking import scored_facts, scored_text, task_command

if TYPE_CHECKING:
    from treadle.program.program import Program


@task_command("match")
def match_images(
    program: Program,
    images: Annotated[list[str], typer.Argument(metavar="IMAGES", help="Image files.", show_default=False)],
    texts: Annotated[
        list[str], typer.Option("--text", metavar="TEXT", help="Candidate text. Repeatable.", show_default=False)
    ],
    *,
    as_json: bool,
) -> None:
    """Score how well each text describes each image; needs a checkpoint folder of CLIPModel."""
    from treadle.progress import counting, working
    from treadle.tasks.matching import ImageMatcher

    with working(f"compiling {program.model}", shown=not as_json):
        matcher = ImageMatcher.open(program)
    with counting("matching", len(images), shown=not as_json) as progress:
        found = matcher.match(images, texts, progress=progress)
    if as_json:
        records = [
            {"image": path, "texts": scored_facts(each.scores), "similarities": list(each.similarities)}
            for path, each in zip(images, found, strict=True)
        ]
        print_json({"model": matcher.model.name, "backend": matcher.model.backend, "texts": texts, "images": records})
        return
    for path, each in zip(images, found, strict=True):
        print(f"{path}: {scored_text(each.scores)}")

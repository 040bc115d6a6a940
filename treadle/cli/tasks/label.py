"""`treadle label`: classify image files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from treadle.cli.application import print_json
from treadle.cli.tasks.asking import Top, scored_facts, scored_text, task_command

if TYPE_CHECKING:
    from treadle.program.program import Program


@task_command("label")
def label_images(
    program: Program,
    images: Annotated[list[str], typer.Argument(metavar="IMAGES", help="Image files.", show_default=False)],
    top: Top = 5,
    *,
    as_json: bool,
) -> None:
    """Classify image files; needs a checkpoint folder of a ...ForImageClassification class."""
    from treadle.progress import counting, working
    from treadle.tasks.labelling import ImageLabeller

    with working(f"compiling {program.model}", shown=not as_json):
        labeller = ImageLabeller.open(program)
    with counting("labelling", len(images), shown=not as_json) as progress:
        found = labeller.label(images, progress=progress)
    if as_json:
        records = [
            {"image": path, "labels": scored_facts(each[:top])} for path, each in zip(images, found, strict=True)
        ]
        print_json({"model": labeller.model.name, "backend": labeller.model.backend, "images": records})
        return
    for path, each in zip(images, found, strict=True):
        print(f"{path}: {scored_text(each[:top])}")

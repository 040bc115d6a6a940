"""`treadle label`: labels of image files."""

from __future__ import annotations

from typing import Annotated

import typer

from treadle.cli.application import command, print_json
from treadle.cli.options import AsJson, BackendName, Config, Dtype, Limit, ModelName, Quantize, TargetName, Threads
from treadle.cli.tasks.asking import Top, model_options, scored_facts, scored_text


@command("label")
def label_images(
    model: ModelName,
    images: Annotated[list[str], typer.Argument(metavar="IMAGES", help="Image files.", show_default=False)],
    top: Top = 5,
    config: Config = None,
    limit: Limit = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    backend: BackendName = "numpy",
    target: TargetName = "cpu",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Tell what image files show, by a folder whose class ends in ForImageClassification."""
    from treadle.progress import counting, working
    from treadle.tasks.labelling import ImageLabeller

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
    with working(f"compiling {model}", shown=not as_json):
        labeller = ImageLabeller.open(options)
    with counting("labelling", len(images), shown=not as_json) as progress:
        found = labeller.label(images, progress=progress)
    if as_json:
        told = [{"image": path, "labels": scored_facts(each[:top])} for path, each in zip(images, found, strict=True)]
        print_json({"model": labeller.model.name, "backend": backend, "images": told})
        return
    for path, each in zip(images, found, strict=True):
        print(f"{path}: {scored_text(each[:top])}")

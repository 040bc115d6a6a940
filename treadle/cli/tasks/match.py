"""`treadle match`: which of some texts says what an image shows."""

from __future__ import annotations

from typing import Annotated

import typer

from treadle.cli.application import command, print_json
from treadle.cli.options import AsJson, BackendName, Config, Dtype, Limit, ModelName, Quantize, TargetName, Threads
from treadle.cli.tasks.asking import model_options, scored_facts, scored_text


@command("match")
def match_images(
    model: ModelName,
    images: Annotated[list[str], typer.Argument(metavar="IMAGES", help="Image files.", show_default=False)],
    texts: Annotated[
        list[str], typer.Option("--text", metavar="TEXT", help="A text that may fit. Repeatable.", show_default=False)
    ],
    config: Config = None,
    limit: Limit = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    backend: BackendName = "numpy",
    target: TargetName = "cpu",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Tell which of some texts says best what image files show, by a folder of CLIPModel."""
    from treadle.progress import counting, working
    from treadle.tasks.matching import ImageMatcher

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
        matcher = ImageMatcher.open(options)
    with counting("matching", len(images), shown=not as_json) as progress:
        found = matcher.match(images, texts, progress=progress)
    if as_json:
        told = [
            {"image": path, "texts": scored_facts(each.scores), "similarities": list(each.similarities)}
            for path, each in zip(images, found, strict=True)
        ]
        print_json({"model": matcher.model.name, "backend": backend, "texts": texts, "images": told})
        return
    for path, each in zip(images, found, strict=True):
        print(f"{path}: {scored_text(each.scores)}")

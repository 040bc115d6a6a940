"""`treadle summarize`: texts in short."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from treadle.cli.application import command, print_json
from treadle.cli.options import AsJson, BackendName, Config, Dtype, Limit, ModelName, Quantize, TargetName, Threads
from treadle.cli.tasks.asking import File, model_options


@command("summarize")
def summarize_texts(
    model: ModelName,
    texts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TEXTS", help="Texts to summarize; without any, the lines of --file or of standard input."
        ),
    ] = None,
    file: File = None,
    most: Annotated[
        int | None,
        typer.Option(
            "--tokens",
            metavar="N",
            help="The most tokens of each. By default as the folder says.",
            min=1,
            show_default=False,
        ),
    ] = None,
    beams: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            max=512,
            help="Search with so many beams. By default as the folder says.",
            show_default=False,
        ),
    ] = None,
    length_penalty: Annotated[float, typer.Option(metavar="X", help="With --beams: above 0 favours long texts.")] = 1.0,
    config: Config = None,
    limit: Limit = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    backend: BackendName = "numpy",
    target: TargetName = "cpu",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Summarize texts with an encoder-decoder model, such as BART's or T5's."""
    from treadle.ir.errors import UsageError
    from treadle.option_values import read_sentences
    from treadle.progress import counting, working
    from treadle.runtime.beams import Beams
    from treadle.tasks.rewriting import TextRewriter

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
    given = read_sentences(texts or [], file, f"summarize {model}")
    if beams is None and length_penalty != 1:
        raise UsageError("without --beams there is no --length-penalty", hint="--beams 4 as well")
    search = None if beams is None else Beams(beams, length_penalty)
    with working(f"compiling {model}", shown=not as_json):
        rewriter = TextRewriter.open(options)
    with counting("summarizing", len(given), shown=not as_json) as progress:
        found = rewriter.summarize(given, most=most, beams=search, progress=progress)
    if as_json:
        told = [{"source": text, **asdict(each)} for text, each in zip(given, found, strict=True)]
        print_json({"model": rewriter.model.name, "backend": backend, "texts": told})
        return
    for each in found:
        print(each.text)

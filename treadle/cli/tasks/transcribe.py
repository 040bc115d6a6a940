"""`treadle transcribe`: what is said in recordings."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from treadle.cli.application import command, print_json
from treadle.cli.options import AsJson, BackendName, Config, Dtype, Limit, ModelName, Quantize, TargetName, Threads
from treadle.cli.tasks.asking import model_options


@command("transcribe")
def transcribe_recordings(
    model: ModelName,
    recordings: Annotated[list[str], typer.Argument(metavar="FILES", help="WAV files.", show_default=False)],
    language: Annotated[
        str | None,
        typer.Option(metavar="LANGUAGE", help="Such as en. By default as the model hears it.", show_default=False),
    ] = None,
    config: Config = None,
    limit: Limit = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    backend: BackendName = "numpy",
    target: TargetName = "cpu",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Write down what is said in recordings, by Whisper, such as the fetched whisper-tiny."""
    from treadle.progress import counting, working
    from treadle.tasks.transcribing import Transcriber

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
        transcriber = Transcriber.open(options)
    found = []
    with counting("transcribing", len(recordings), shown=not as_json) as progress:
        for path in recordings:
            found.append(transcriber.transcribe(path, language=language))
            progress(len(found))
    if as_json:
        told = [
            {"recording": path, "text": each.text, "passages": list(map(asdict, each.passages))}
            for path, each in zip(recordings, found, strict=True)
        ]
        print_json({"model": transcriber.model.name, "backend": backend, "recordings": told})
        return
    for each in found:
        print(each.text)

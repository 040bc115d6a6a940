"""`treadle transcribe`: transcribe recordings."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from treadle.cli.application import print_json
from treadle.cli.tasks.asking import task_command

if TYPE_CHECKING:
    from treadle.program.program import Program


@task_command("transcribe")
def transcribe_recordings(
    program: Program,
    recordings: Annotated[list[str], typer.Argument(metavar="FILES", help="WAV files.", show_default=False)],
    language: Annotated[
        str | None,
        typer.Option(
            metavar="LANGUAGE", help="Language code, such as en. By default detected by the model.", show_default=False
        ),
    ] = None,
    *,
    as_json: bool,
) -> None:
    """Transcribe recordings with Whisper, such as the fetched whisper-tiny."""
    from treadle.progress import counting, working
    from treadle.tasks.transcribing import Transcriber

    with working(f"compiling {program.model}", shown=not as_json):
        transcriber = Transcriber.open(program)
    found = []
    with counting("transcribing", len(recordings), shown=not as_json) as progress:
        for path in recordings:
            found.append(transcriber.transcribe(path, language=language))
            progress(len(found))
    if as_json:
        records = [
            {"recording": path, "text": each.text, "passages": list(map(asdict, each.passages))}
            for path, each in zip(recordings, found, strict=True)
        ]
        print_json({"model": transcriber.model.name, "backend": transcriber.model.backend, "recordings": records})
        return
    for each in found:
        print(each.text)

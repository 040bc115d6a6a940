"""`treadle train`: train a language model on texts, and save it in its original format."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from treadle.cli.application import command, print_json, saying
from treadle.cli.options import AsJson, ModelName, OptionKeywords
from treadle.interrupted_loading import INTERRUPTED
from treadle.training.training_settings import TrainingSettings


@command("train", takes=["train"], settings=[TrainingSettings])
def train_model(
    model: ModelName,
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILES",
            help='Texts in UTF-8; .jsonl has one per line, as {"text": "..."}, .csv and .parquet one per row; - is '
            "standard input.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FOLDER",
            help="Save the trained model in its original format.",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--replace",
            help="Save in a nonempty folder, and overwrite files of the same names. Let --state overwrite any file.",
        ),
    ] = False,
    every: Annotated[int, typer.Option(metavar="N", min=1, help="Updates per line of the report.")] = 10,
    state: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a state for --resume at the end.", show_default=False),
    ] = None,
    save_every: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="With --state: also after every N updates.", show_default=False),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Resume from a state, up to --steps, with the same options and texts.",
            show_default=False,
        ),
    ] = None,
    *,
    settings: TrainingSettings,
    keywords: OptionKeywords,
    as_json: AsJson = False,
) -> None:
    """Train a language model on texts, and save it in its original format.

    Ctrl-C ends training after the current step. The trained weights are saved, also if a step fails,
    unless the loss or a gradient is NaN or infinite.
    """
    from treadle.program.options import CompileOptions
    from treadle.progress import counting, working
    from treadle.training.interrupts import noting_interrupts
    from treadle.training.run_report import HOW_TO_SAVE, data_text
    from treadle.training.run_settings import change_lines
    from treadle.training.text_training import TextTraining

    options = CompileOptions.of("train", keywords)
    with working(f"reading {model}", shown=not as_json):
        run = TextTraining.open(
            model,
            files,
            settings,
            options,
            output=output,
            replace=overwrite,
            state=state,
            save_every=save_every,
            resume=resume,
        )
    with working(f"compiling {model}", shown=not as_json):
        run.compile()
    for line in [] if resume is None else change_lines(run.changed):
        _say(line)
    if run.data.note is not None:
        _say(run.data.note)
    if not as_json:
        unsaved = [f"nothing is saved: {HOW_TO_SAVE}"] if output is None and state is None else []
        print(*unsaved, data_text(run.data), sep="\n", flush=True)

    def held_out() -> float | None:
        with counting("reading held-out blocks", run.held_out_batches, shown=not as_json) as progress:
            return run.held_out(progress=progress, interrupted=interrupted)

    with noting_interrupts("ending after this step; Ctrl-C again ends at once") as interrupted:
        run.report.before = held_out()
        with working(f"training {model}", shown=not as_json) as work:
            emit = (lambda text: None) if as_json else work
            run.train(interrupted=interrupted, every=every, emit=emit, warn=_say, describe=work.describe)
        run.report.after = held_out()
    if as_json:
        print_json(run.report.facts())
    else:
        for line in run.report.summary():
            print(line)
    if run.report.interrupted:
        raise typer.Exit(INTERRUPTED)


def _say(text: str) -> None:
    """Write a line to standard error. If its reader has closed the pipe, the line is lost."""
    with saying():
        sys.stderr.write(f"{text}\n")

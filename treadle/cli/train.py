"""`treadle train`: train a language model on texts, and save it in its original format."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from treadle.cli.application import command, print_json, saying
from treadle.cli.completing import complete_backend, complete_model
from treadle.cli.options import AsJson, Config, Dtype, Limit, ModelName, Seed, TargetName, Threads
from treadle.ir.errors import TreadleError, UsageError

if TYPE_CHECKING:
    from treadle.ir.target import Target
    from treadle.training.run_report import RunReport
    from treadle.training.saving import Saver
    from treadle.training.text_runs import Update

INTERRUPTED = 130
"""The exit code after Ctrl-C, as for every command."""


@command("train")
def train_model(
    model: ModelName,
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILES",
            help='Texts in UTF-8; .jsonl has one per line, as {"text": "..."}; - is standard input.',
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
    objective: Annotated[
        str, typer.Option(metavar="NAME", help="The training objective: next-token, or masked-token.")
    ] = "next-token",
    steps: Annotated[int, typer.Option(metavar="N", min=1, help="Total number of updates of the weights.")] = 1000,
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Blocks of tokens per batch.")] = 8,
    length: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=2,
            help="Tokens per block. By default 128, or the model's maximum.",
            show_default=False,
        ),
    ] = None,
    gradient_accumulation_steps: Annotated[
        int, typer.Option(metavar="N", min=1, help="Gradient accumulation: batches per update.")
    ] = 1,
    learning_rate: Annotated[float, typer.Option(metavar="X", help="The peak learning rate.")] = 1e-4,
    warmup: Annotated[
        int, typer.Option(metavar="N", min=0, help="Updates until the peak learning rate is reached.")
    ] = 0,
    schedule: Annotated[
        str, typer.Option(metavar="SHAPE", help="The schedule after warmup: constant, cosine or linear decay to 0.")
    ] = "constant",
    optimizer: Annotated[str, typer.Option(metavar="NAME", help="adamw; or sgd, with a momentum of 0.9.")] = "adamw",
    weight_decay: Annotated[
        float | None,
        typer.Option(
            metavar="X", min=0, help="Weight decay. By default 0.01 with adamw, 0 with sgd.", show_default=False
        ),
    ] = None,
    max_grad_norm: Annotated[
        float, typer.Option(metavar="X", min=0, help="Clip the gradient norm to this value; 0 disables clipping.")
    ] = 1.0,
    trained: Annotated[
        list[str] | None,
        typer.Option(
            "--train",
            metavar="PATTERN",
            help="Train only weights with these names, such as 'h.*.mlp.*'. Repeatable.",
            show_default=False,
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Distill from this teacher model.",
            show_default=False,
            autocompletion=complete_model,
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            metavar="X", help="With --teacher: divide logits by this temperature. By default 2.", show_default=False
        ),
    ] = None,
    distillation_weight: Annotated[
        float | None,
        typer.Option(
            "--distillation-weight",
            metavar="X",
            min=0,
            max=1,
            help="With --teacher: weight of the teacher's part of the loss. By default 0.5.",
            show_default=False,
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Use another model's tokenizer.",
            show_default=False,
            autocompletion=complete_model,
        ),
    ] = None,
    holdout: Annotated[
        float,
        typer.Option(
            metavar="X",
            min=0,
            max=1,
            help="Fraction of held-out blocks, whose perplexity is reported before and after.",
        ),
    ] = 0.0,
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
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing", help="Recompute activations for the gradient: less memory, more time."
        ),
    ] = False,
    config: Config = None,
    limit: Limit = None,
    dtype: Dtype = None,
    backend: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="torch, numpy, tvm, or another that is installed.", autocompletion=complete_backend
        ),
    ] = "torch",
    target: TargetName = "cpu",
    threads: Threads = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Train a language model on texts, and save it in its original format.

    Ctrl-C ends training after the current step. The trained weights are saved, also if a step fails.
    """
    from treadle.ir.target import Target
    from treadle.option_values import parse_config
    from treadle.program.source import BLOCKS
    from treadle.progress import counting, working
    from treadle.resolving import resolve
    from treadle.training.interrupts import noting_interrupts
    from treadle.training.run_report import RunReport, data_text, line_text
    from treadle.training.run_settings import change_lines, changed_settings, collect_settings
    from treadle.training.saving import saver_for
    from treadle.training.text_data import TextData
    from treadle.training.text_runs import Update, held_out_loss, updates
    from treadle.training.trainer import Trainer

    _check_options(teacher, temperature, distillation_weight, save_every is not None and state is None, resume)
    if state is not None:
        _check_state(state, replace=overwrite)
    chosen = parse_config(config or (), limit or (), Trainer)
    where = Target(target, threads)
    _check_computing(backend, where, dtype)
    with working(f"reading {model}", shown=not as_json):
        resolved = resolve(model, widen=("bf16", "f16", BLOCKS), deferred=True, **chosen)
        saver = None if output is None else saver_for(resolved, output, replace=overwrite)
        made = {
            "learning_rate": _schedule(learning_rate, warmup, schedule, steps),
            "optimizer": _optimizer(optimizer, weight_decay),
        }
        data = TextData.open(
            model,
            files,
            resolved,
            objective=objective,
            length=length,
            batch=batch,
            holdout=holdout,
            seed=seed,
            tokenizer=tokenizer,
            teacher=teacher,
        )
        settings = collect_settings(
            data,
            objective=objective,
            holdout=holdout,
            model=model,
            warmup=warmup,
            schedule=schedule,
            teacher=teacher,
            temperature=temperature,
            dtype=dtype,
            backend=backend,
            **{
                "gradient-accumulation-steps": gradient_accumulation_steps,
                "learning-rate": learning_rate,
                "max-grad-norm": max_grad_norm,
                "distillation-weight": distillation_weight,
            },
            **({} if schedule == "constant" else {"steps": steps}),
        )
        changed = {} if resume is None else changed_settings(resume, settings)
    with working(f"compiling {model}", shown=not as_json):
        trainer = Trainer(
            resolved.source,
            loss="cross-entropy",
            **made,
            max_grad_norm=max_grad_norm or None,
            trained=tuple(trained or ("*",)),
            **_taught(teacher, temperature, distillation_weight, backend, where),
            backend=backend,
            target=where,
            dtype=dtype,
            gradient_checkpointing=gradient_checkpointing,
            gradient_accumulation_steps=gradient_accumulation_steps,
            seed=seed,
            **chosen,
        )
        if resume is not None:
            trainer.restore(resume)
    if trainer.steps >= steps:
        raise UsageError(
            f"the state already has {trainer.steps:,} steps",
            received=f"--steps {steps}",
            hint=f"--steps {2 * trainer.steps}, which includes these",
        )
    for line in [] if resume is None else change_lines(changed):
        _say(f"{line}\n")
    if not as_json:
        print(data_text(data), flush=True)
    given = {name: value for name, value in chosen.items() if name != "limits"}
    run = RunReport(
        model,
        backend,
        objective,
        data,
        gradient_accumulation_steps,
        trainer.steps,
        settings,
        changed,
        teacher is not None,
        given,
        resolved.source.path,
    )

    def held_out() -> float | None:
        count = math.ceil(len(data.heldout) / batch)
        with counting("reading held-out blocks", count, shown=not as_json) as progress:
            return held_out_loss(trainer, data, progress=progress, ends=interrupted)

    with noting_interrupts("ending after this step; Ctrl-C again ends at once") as interrupted:
        run.before = held_out()
        since: list[Update] = []
        failed: TreadleError | BrokenPipeError | None = None
        try:
            with _telling(f"training {model}", as_json) as tell:
                for update in (
                    [] if interrupted() else updates(trainer, data, steps=steps, accumulate=gradient_accumulation_steps)
                ):
                    since.append(update)
                    ends = interrupted() or update.step == steps
                    if ends or update.step % every == 0:
                        run.lines.append(Update.joined(since))
                        since = []
                        tell(line_text(run.lines[-1], steps))
                    if ends:
                        break
                    if state is not None and save_every is not None and update.step % save_every == 0:
                        trainer.save_state(state, settings)
        except (
            TreadleError,
            BrokenPipeError,
        ) as error:  # trained weights are saved in any case, also if the output's reader has left
            failed = error
        if since:
            run.lines.append(Update.joined(since))
        run.interrupted = run.steps < steps
        for save in (_save_state, _save_model) if run.lines else ():
            try:
                save(run, trainer, state, saver)
            except TreadleError as error:
                if isinstance(failed, TreadleError):
                    _say(f"{error}\n")
                else:
                    failed = error
        if isinstance(failed, TreadleError):
            for line in run.written():
                _say(f"{line}\n")
        if failed is not None:
            raise failed
        run.after = held_out()
    if as_json:
        print_json(run.facts())
    else:
        for line in run.told():
            print(line)
    if run.interrupted:
        raise typer.Exit(INTERRUPTED)


def is_state(path: Path) -> bool:
    """Return True if --state wrote the file."""
    from treadle.frontends.safetensors_file import SafetensorsFile
    from treadle.training.states import FORMAT

    try:
        return SafetensorsFile.open(path).metadata.get("format") == FORMAT
    except TreadleError:
        return False


def _check_options(
    teacher: str | None,
    temperature: float | None,
    distillation_weight: float | None,
    has_no_state: bool,
    resume: Path | None,
) -> None:
    """Raise UsageError for options that need another one, and for a file that does not exist."""
    if teacher is None and (temperature, distillation_weight) != (None, None):
        option = "--temperature" if temperature is not None else "--distillation-weight"
        raise UsageError(f"{option} only applies together with --teacher", hint="--teacher MODEL as well")
    if has_no_state:
        raise UsageError("--save-every only applies together with --state", hint="--state FILE as well")
    if resume is not None and not os.path.isfile(resume):
        raise UsageError(f"there is no file {resume}", hint="a file that --state wrote")


def _check_state(state: Path, *, replace: bool) -> None:
    """Raise UsageError for a file that cannot be written, and for an existing file that is not a state."""
    from treadle.training.states import check_state_file

    if os.path.isdir(state) or not os.path.isdir(state.absolute().parent):
        what = "this is a folder" if os.path.isdir(state) else "its folder does not exist"
        raise UsageError(f"the state cannot be written: {what}", received=str(state), hint="a file in a folder")
    check_state_file(state)
    if os.path.lexists(state) and not (os.path.isfile(state) and (replace or is_state(state))):
        other = "another file, or --replace" if os.path.isfile(state) else "another file"
        raise UsageError("the state would overwrite a file that is not a state", received=str(state), hint=other)


def _check_computing(backend: str, where: Target, dtype: str | None) -> None:
    """Raise UsageError if the backend does not support training in this dtype, or the target does not support
    training.
    """
    if where.kind != "cpu":
        raise UsageError(
            "training runs on the CPU", received=f"--target {where.name}", hint="--target cpu, or no --target"
        )
    if (backend, dtype) == ("numpy", "bf16"):
        raise UsageError(
            "NumPy has no bf16", received="--backend numpy, --dtype bf16", hint="--backend tvm, or torch; or no --dtype"
        )


def _optimizer(name: str, weight_decay: float | None) -> Any:
    from treadle.runtime.training.optimizers import SGD, AdamW

    if name == "adamw":
        return AdamW() if weight_decay is None else AdamW(weight_decay=weight_decay)
    if name == "sgd":
        return SGD(momentum=0.9, weight_decay=weight_decay or 0.0)
    raise UsageError(f"there is no optimizer {name!r}", hint="adamw or sgd")


def _schedule(rate: float, warmup: int, shape: Any, steps: int) -> Any:
    from treadle.runtime.training.schedules import Schedule

    if not (0 < rate < math.inf):
        raise UsageError(
            "a learning rate must be a number above 0",
            received=f"--learning-rate {rate:g}",
            hint="--learning-rate 1e-4",
        )
    return Schedule(rate, warmup=warmup, steps=None if shape == "constant" else steps, shape=shape)


def _taught(
    teacher: str | None, temperature: float | None, distillation_weight: float | None, backend: str, where: Target
) -> dict[str, Any]:
    """Return the trainer's arguments for a teacher, compiled."""
    if teacher is None:
        return {}
    import treadle

    made = treadle.compile(teacher, backend=backend, target=where, widen=("bf16", "f16"))
    return {"teacher": made, "temperature": temperature, "distillation_weight": distillation_weight}


def _save_state(run: RunReport, trainer: Any, state: Path | None, saver: Saver | None) -> None:
    if state is not None:
        trainer.zero_grad()  # drops gradients of an update whose later batches failed
        trainer.save_state(state, run.settings)
        run.state = state


def _save_model(run: RunReport, trainer: Any, state: Path | None, saver: Saver | None) -> None:
    if saver is not None:
        run.saved = saver.save(trainer.weights)


def _say(text: str) -> None:
    """Write to standard error, even if its reader has left."""
    with saying():
        sys.stderr.write(text)


def _telling(what: str, as_json: bool) -> AbstractContextManager[Callable[[str], None]]:
    """Yield a function that prints lines while the block runs; it prints nothing with --json."""
    from contextlib import nullcontext

    from treadle.progress import working

    return nullcontext(lambda line: None) if as_json else working(what)

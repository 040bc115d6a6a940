"""A training run on texts, from reading the model to saving it: what `treadle train` does.

run = TextTraining.open("gpt2-folder", ["corpus.txt"], TrainingSettings(steps=100), options, output=Path("out"))
run.compile()
report = run.train(interrupted=lambda: False)
print("\\n".join(report.summary()))
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treadle.files.nearest_names import nearest_path_hint
from treadle.files.whole_files import missing_folder_hint
from treadle.frontends.safetensors_file import SafetensorsFile
from treadle.ir.errors import TreadleError, UsageError
from treadle.program.options import CompileOptions
from treadle.program.source import BLOCKS, Resolved
from treadle.training.run_report import RECENT, RunReport, line_text, live_text
from treadle.training.run_settings import changed_settings, collect_settings
from treadle.training.saving import Saver, saver_for
from treadle.training.states import FORMAT, DivergedError, check_state_file
from treadle.training.text_data import TextData
from treadle.training.text_runs import Update, held_out_loss, updates
from treadle.training.training_settings import TrainingSettings

if TYPE_CHECKING:
    from treadle.training.trainer import Trainer


@dataclass
class TextTraining:
    """A training run on texts. Create it by `open`, then call `compile` and `train`, once each.

    options   the compile options: backend, target, dtype, seed, the model's configuration
    saver     saves the trained model; None: the model is not saved
    recorded  the settings as strings, which a state stores
    changed   settings that differ from the resumed state's; None if the state stores no settings
    report    the results, after `compile`
    state     the file for --resume, written at the end and after every `save_every` updates
    resume    the state that the run continues
    """

    model: str
    settings: TrainingSettings
    options: CompileOptions
    resolved: Resolved
    data: TextData
    saver: Saver | None
    recorded: dict[str, str]
    changed: dict[str, tuple[str, str]] | None
    state: Path | None = None
    save_every: int | None = None
    resume: Path | None = None
    trainer: Trainer = field(init=False)
    report: RunReport = field(init=False)

    @classmethod
    def open(
        cls,
        model: str,
        files: Sequence[str],
        settings: TrainingSettings,
        options: CompileOptions,
        *,
        output: Path | None = None,
        replace: bool = False,
        state: Path | None = None,
        save_every: int | None = None,
        resume: Path | None = None,
    ) -> TextTraining:
        """Read the model and the texts, and compare the settings with a resumed state's. No weight is read.

        output   the folder to save the trained model in
        replace  True if that folder may contain files

        Raises UsageError for invalid settings, before anything is trained, and the errors of reading.
        """
        if save_every is not None and state is None:
            raise UsageError("--save-every only applies together with --state", hint="--state FILE as well")
        if resume is not None and not os.path.isfile(resume):
            raise UsageError(
                f"there is no file {resume}", hint=nearest_path_hint(resume) or "a file that --state wrote"
            )
        if state is not None:
            _check_state(state, replace=replace)
        _check_computing(options)
        settings.schedule_of_rates(), settings.optimizer_of_weights()
        source = options.open(model).for_text()
        resolved = options.but(widen=("bf16", "f16", BLOCKS), dtype=None).resolve(source, deferred=True)
        saver = None if output is None else saver_for(resolved, output, replace=replace)
        names = ("objective", "length", "batch", "holdout", "vocab", "teacher", "column")
        chosen: dict[str, Any] = {name: getattr(settings, name) for name in names}
        data = TextData.open(files, resolved, seed=options.seed, **chosen)
        if saver is not None and data.texts is not None:
            saver = saver.with_texts(data.texts)
        recorded = _recorded(model, data, settings, options)
        changed = {} if resume is None else changed_settings(resume, recorded)  # refuses other batches at once
        return cls(model, settings, options, resolved, data, saver, recorded, changed, state, save_every, resume)

    def compile(self) -> None:
        """Compile the training step, and restore a resumed state. Raises the errors of `Trainer`, and UsageError if the
        resumed state already has all the steps.
        """
        from treadle.training.trainer import Trainer

        settings = self.settings
        self.trainer = Trainer(
            self.resolved.source,
            loss="cross-entropy",
            learning_rate=settings.schedule_of_rates(),
            optimizer=settings.optimizer_of_weights(),
            max_grad_norm=settings.max_grad_norm or None,
            trained=settings.trained or ("*",),
            gradient_checkpointing=settings.gradient_checkpointing,
            gradient_accumulation_steps=settings.gradient_accumulation_steps,
            **self._teacher(),
            **self.options.keywords(),
        )
        self.recorded["backend"] = self.trainer.backend
        if self.resume is not None:
            self.changed = changed_settings(self.resume, self.recorded)
            self.trainer.restore(self.resume)
        self.report = RunReport(
            self.model,
            self.trainer.backend,
            settings.objective,
            self.data,
            settings.gradient_accumulation_steps,
            self.trainer.steps,
            self.recorded,
            self.changed,
            settings.teacher is not None,
            self.options.config,
            self.resolved.source.path if self.resolved.source.kind == "safetensors" else None,
        )
        if self.trainer.steps >= settings.steps:
            raise UsageError(
                f"the training state is already at step {self.trainer.steps:,}",
                received=f"--steps {settings.steps}",
                hint=f"--steps {2 * self.trainer.steps}, including the {self.trainer.steps:,} completed steps",
            )

    def _teacher(self) -> dict[str, Any]:
        """Compile the teacher, and return the arguments of `Trainer` for it: a dict that is empty without a teacher."""
        from treadle.artifacts.loading import load_artifact
        from treadle.artifacts.reading import is_artifact
        from treadle.compiling import compile_model

        settings = self.settings
        if settings.teacher is None:
            return {}
        how = CompileOptions(backend=self.options.backend, target=self.options.target, widen=("bf16", "f16"))
        distilled = {"temperature": settings.temperature, "distillation_weight": settings.distillation_weight}
        if is_artifact(settings.teacher):
            chosen = load_artifact(settings.teacher, backend=how.backend, target=how.target, widen=how.widen)
            return {"teacher": chosen, **distilled}
        return {"teacher": compile_model(settings.teacher, how), **distilled}

    def held_out(self, *, progress: Callable[[int], None], interrupted: Callable[[], bool]) -> float | None:
        """Return the mean loss over the held-out blocks, as `held_out_loss` does."""
        return held_out_loss(self.trainer, self.data, progress=progress, ends=interrupted)

    @property
    def held_out_batches(self) -> int:
        """Number of batches of held-out blocks."""
        return math.ceil(len(self.data.heldout) / self.settings.batch)

    def train(
        self,
        *,
        interrupted: Callable[[], bool],
        every: int,
        emit: Callable[[str], None],
        warn: Callable[[str], None],
        describe: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Train until the settings' number of steps, then save. Weights and state are also saved if a step fails, or if
        `emit` cannot write its line; but if the loss or a gradient is NaN or infinite, only the state is saved.

        interrupted  returns True if the run must end after the current step
        every        number of updates per line
        emit         called with each line
        warn         called with lines about saved files and further errors, before an error is raised
        describe     called after each update with the state of the run

        Raises the error of a step, after the trained weights are saved.
        """
        failed: TreadleError | OSError | None = None
        since: list[Update] = []
        try:
            if not interrupted():
                self._update(since, interrupted, every, emit, describe)
        except (TreadleError, OSError) as error:
            failed = error
        if since:
            self.report.lines.append(Update.joined(since))
        self.report.interrupted = self.report.steps < self.settings.steps
        saves = [self._save_state, self._save_model] if self.report.lines else []
        if saves and self.saver is not None and isinstance(failed, DivergedError):
            saves.remove(self._save_model)
            warn("the trained model is not saved, since its loss or a gradient is NaN or infinite")
        for save in saves:
            try:
                save()
            except TreadleError as error:
                if isinstance(failed, TreadleError):
                    warn(f"{error}")
                else:
                    failed = error
        if isinstance(failed, TreadleError):
            for line in self.report.written():
                warn(line)
        if failed is not None:
            raise failed

    def _update(
        self,
        since: list[Update],
        interrupted: Callable[[], bool],
        every: int,
        emit: Callable[[str], None],
        describe: Callable[[str], None],
    ) -> None:
        """Run the updates. `since` collects the updates that no line covers yet."""
        steps = self.settings.steps
        recent: deque[Update] = deque(maxlen=RECENT)
        for update in updates(
            self.trainer, self.data, steps=steps, accumulate=self.settings.gradient_accumulation_steps
        ):
            since.append(update)
            recent.append(update)
            describe(live_text(recent, steps))
            ends = interrupted() or update.step == steps
            if ends or update.step % every == 0:
                self.report.lines.append(Update.joined(since))
                since.clear()
                emit(line_text(self.report.lines[-1], steps))
            if ends:
                break
            if self.state is not None and self.save_every is not None and update.step % self.save_every == 0:
                self.trainer.save_state(self.state, self.recorded)

    def _save_state(self) -> None:
        if self.state is not None:
            self.trainer.zero_grad()  # drops gradients of an update whose later batches failed
            self.trainer.save_state(self.state, self.recorded)
            self.report.state = self.state

    def _save_model(self) -> None:
        if self.saver is not None:
            self.report.saved = self.saver.save(self.trainer.weights)


def is_state(path: Path) -> bool:
    """Return True if `Trainer.save_state` wrote the file."""
    try:
        return SafetensorsFile.open(path).metadata.get("format") == FORMAT
    except TreadleError:
        return False


def _check_state(state: Path, *, replace: bool) -> None:
    """Raise UsageError if the file cannot be written, or if it exists and is not a state."""
    if os.path.isdir(state) or not os.path.isdir(state.absolute().parent):  # isdir never raises
        what = "this is a folder" if os.path.isdir(state) else "its folder does not exist"
        hint = missing_folder_hint(state) or "a file in a folder"
        raise UsageError(f"the state cannot be written: {what}", received=str(state), hint=hint)
    check_state_file(state)
    if os.path.lexists(state) and not (os.path.isfile(state) and (replace or is_state(state))):
        other = "another file, or --replace" if os.path.isfile(state) else "another file"
        raise UsageError("the state would overwrite a file that is not a state", received=str(state), hint=other)


def _check_computing(options: CompileOptions) -> None:
    """Raise UsageError if the backend does not support training in this dtype, or if the target is not the CPU."""
    if options.where.kind != "cpu":
        raise UsageError(
            "training runs on the CPU", received=f"--target {options.where.name}", hint="--target cpu, or no --target"
        )
    if (options.backend, options.dtype) == ("numpy", "bf16"):
        raise UsageError(
            "NumPy has no bf16", received="--backend numpy, --dtype bf16", hint="--backend tvm, or torch; or no --dtype"
        )


def _recorded(model: str, data: TextData, settings: TrainingSettings, options: CompileOptions) -> dict[str, str]:
    names = ("objective", "holdout", "warmup", "schedule", "teacher", "temperature")
    dashed = ("gradient_accumulation_steps", "learning_rate", "max_grad_norm", "distillation_weight")
    found = {name: getattr(settings, name) for name in names}
    found |= {name.replace("_", "-"): getattr(settings, name) for name in dashed}
    if settings.schedule != "constant":
        found["steps"] = settings.steps
    return collect_settings(data, model=model, dtype=options.dtype, backend=options.backend, **found)

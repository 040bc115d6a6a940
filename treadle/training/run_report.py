"""The results of a training run, as text and as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from treadle.program.flag_values import config_texts
from treadle.reporting.counts import counted, human, lasting
from treadle.training.saving import SavedModel
from treadle.training.text_data import TextData
from treadle.training.text_runs import Update, perplexity_of

HOW_TO_SAVE = "-o FOLDER saves the model, --state FILE a state for --resume"
_RISEN = 1.0
"""The rise of the loss in nats that a report mentions: the targets have become less probable by a factor of e."""


@dataclass
class RunReport:
    """The results of a training run.

    model        the model's name as the user passed it
    accumulate   micro-batches per update
    first        number of updates before this run
    has_teacher  True if the losses include a teacher's part, so that no perplexity can be computed from them
    config       configuration options that the user set for a model of `folder`
    folder       the folder whose config.json is copied
    lines        the printed lines, in order; each covers several updates
    before, after  mean loss over the held-out blocks, before and after the run
    settings     the settings of the run, as the training state stores them
    changed      by name, (old value, new value) of the settings that differ from the resumed state's; None if the state
                 stores no settings
    """

    model: str
    backend: str
    objective: str
    data: TextData
    accumulate: int
    first: int
    settings: Mapping[str, str] = field(default_factory=dict)
    changed: Mapping[str, tuple[str, str]] | None = field(default_factory=dict)
    has_teacher: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    lines: list[Update] = field(default_factory=list)
    before: float | None = None
    after: float | None = None
    interrupted: bool = False
    state: Path | None = None
    saved: SavedModel | None = None

    @property
    def steps(self) -> int:
        """Number of updates so far, including those of earlier runs."""
        return self.lines[-1].step if self.lines else self.first

    def facts(self) -> dict[str, Any]:
        """Return all results as a dict for JSON."""

        def measured(loss: float | None) -> dict[str, float | None]:
            return {"loss": loss, "perplexity": None if loss is None or self.has_teacher else perplexity_of(loss)}

        held = len(self.data.heldout)
        return {
            "model": self.model,
            "backend": self.backend,
            "objective": self.objective,
            "blocks": len(self.data.batches.blocks),
            "length": self.data.length,
            "batch": self.data.batches.rows,
            "accumulate": self.accumulate,
            "resumed_at": self.first,
            "changed": self.changed,
            "steps": self.steps,
            "tokens": sum(line.tokens for line in self.lines),
            "seconds": sum(line.seconds for line in self.lines),
            "lines": [line_facts(line) for line in self.lines],
            "held_out": {"blocks": held, "before": measured(self.before), "after": measured(self.after)}
            if held
            else None,
            "interrupted": self.interrupted,
            "output": None if self.saved is None else str(self.saved.folder),
            "files": [] if self.saved is None else list(map(str, self.saved.files)),
            "state": None if self.state is None else str(self.state),
        }

    def summary(self) -> list[str]:
        """Return the report as lines of text."""
        done = sum(line.tokens for line in self.lines)
        seconds = sum(line.seconds for line in self.lines)
        count = self.steps - self.first
        pace = f", {done / seconds:,.0f} tokens per second" if seconds else ""
        found = [f"{counted(count, 'step')}, {counted(done, 'token')}, in {seconds:.1f} s{pace}"]
        if self.interrupted:
            found[0] = f"interrupted after {found[0]}"
        if self.before is not None:
            what, of = ("loss", float) if self.has_teacher else ("perplexity", perplexity_of)
            after = "" if self.after is None else f" before, {of(self.after):.4f} after"
            found.append(f"{what} of {counted(len(self.data.heldout), 'held-out block')} {of(self.before):.4f}{after}")
        if self.lines and self.lines[-1].loss > self.lines[0].loss + _RISEN:
            losses = f"{self.lines[0].loss:.4g} to {self.lines[-1].loss:.4g}"
            found.append(f"the loss rose from {losses}: try a smaller --learning-rate, or a longer --warmup")
        found += self.written()
        if self.saved is not None:
            found.append(f"load it by {getattr(self.saved.loading, 'command', self.saved.loading)}")
            given = " ".join(f"--set {text}" for text in config_texts(self.config))
            if given and self.folder is not None:
                found.append(f"its config.json is copied from {self.folder}, without {given}")
        if not count:
            found.append("nothing was trained, so nothing was saved")
        elif self.state is None and self.saved is None:
            found.append(f"nothing was saved: {HOW_TO_SAVE}")
        return found

    def written(self) -> list[str]:
        """Return a line for each saved file."""
        found = []
        if self.state is not None:
            found.append(f"wrote {self.state}, {human(self.state.stat().st_size, 'B')}: --resume continues from it")
        if self.saved is not None:
            first, *others = self.saved.files
            beside = f", and {counted(len(others), 'file')} next to it" if others else ""
            found.append(f"wrote {first}, {human(first.stat().st_size, 'B')}{beside}")
        return found


def data_text(data: TextData) -> str:
    """Describe the training data: the number of blocks, their length, and the number of batches of an epoch."""
    blocks, held = len(data.batches.blocks), len(data.heldout)
    apart = f", and {counted(held, 'block')} held out" if held else ""
    epoch = counted(data.batches.epoch, "batch")
    return f"{counted(blocks, 'block')} of {counted(data.length, 'token')}{apart}; {epoch} an epoch"


def line_text(update: Update, steps: int) -> str:
    """Return a line of text about one or several updates out of `steps`."""
    facts = line_facts(update)
    pace = facts["tokens_per_second"]
    line = (
        f"step {update.step:{len(str(steps))}}  loss {update.loss:.4f}  norm {update.norm:.3g}  rate {update.rate:.3g}"
    )
    return line + ("" if pace is None else f"  {pace:,.0f} tokens/s")


RECENT = 20
"""Number of updates over which the pace of a run is measured."""


def live_text(recent: Sequence[Update], steps: int) -> str:
    """Describe the state of a run: the last update out of `steps`, the pace of recent ones, and the time left."""
    last, joined = recent[-1], Update.joined(recent)
    parts = [f"step {last.step:,} of {steps:,}", f"loss {last.loss:.4f}"]
    if joined.seconds > 0:
        left = (steps - last.step) * joined.seconds / len(recent)
        parts += [f"{joined.tokens / joined.seconds:,.0f} tokens/s", f"{lasting(left)} left"]
    return ", ".join(parts)


def line_facts(update: Update) -> dict[str, Any]:
    """Return the facts of `line_text` for JSON. A norm that is NaN or infinite is None, and so is the rate if no time
    has passed.
    """
    pace = update.tokens / update.seconds if update.seconds else None
    norm = update.norm if math.isfinite(update.norm) else None
    return {
        "step": update.step, "loss": update.loss, "norm": norm, "rate": update.rate, "tokens_per_second": pace
    }  # fmt: skip

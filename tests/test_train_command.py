"""`treadle train`: its calls of a trainer, its output, the files it saves, and its errors before anything runs.

The trainer is a stand-in that returns the same losses each time. The real trainer has its own tests.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from tests.command_line import Result, Treadle, commands_in, refused, with_last_values
from tests.golden import Golden
from tests.task_models import save, texts, without_specials, wordpiece
from tests.test_terminal import on_terminal, piped, seen
from treadle.frontends.safetensors_file import SafetensorsFile
from treadle.frontends.text import TextTokenizer
from treadle.ir.errors import UsageError
from treadle.program.options import CompileOptions
from treadle.reporting.counts import lasting
from treadle.resolving import resolve
from treadle.runtime.training.optimizers import SGD, AdamW
from treadle.runtime.training.schedules import Schedule
from treadle.training.interrupts import noting_interrupts
from treadle.training.objectives import MaskedToken
from treadle.training.run_report import live_text
from treadle.training.states import FORMAT, NOTE, DivergedError
from treadle.training.text_data import TextData
from treadle.training.text_runs import Update, held_out_loss, updates
from treadle.training.text_training import is_state
from treadle.training.texts import NOT_COUNTED, BlockBatches, Tokens
from treadle.training.weight_files import write_weights


@dataclass(frozen=True)
class FakeResult:
    step: int
    loss: float
    norm: float
    learning_rate: float
    seconds: float


class FakeTrainer:
    """A trainer that records its calls. Each call's loss is a tenth lower than the last; each call takes half a
    second.
    """

    fail_at = 0
    """Number of the call of `step` that fails; 0: none."""
    failure: type[UsageError] = UsageError
    """The class of that error. The loss is NaN if it is DivergedError."""

    made: list[FakeTrainer] = []
    interrupt_at = 0
    """Number of the call of `step` during which Ctrl-C is pressed; 0: none."""

    def __init__(self, model: str, **options: Any) -> None:
        self.model, self.options = model, options
        self.backend = options.get("backend", "numpy")
        self.calls: list[dict[str, Tokens]] = []
        self.evaluated: list[dict[str, Tokens]] = []
        self.saved: list[int] = []
        self.steps = 0
        self.done = 0
        FakeTrainer.made.append(self)

    def step(self, **arrays: Tokens) -> FakeResult:
        self.calls.append(arrays)
        self.done += 1
        if len(self.calls) == self.fail_at:
            raise self.failure(f"the loss is nan after {self.steps} updates")
        if len(self.calls) == self.interrupt_at:
            signal.raise_signal(signal.SIGINT)
        updates = self.done % self.options["gradient_accumulation_steps"] == 0
        self.steps += updates
        return FakeResult(self.steps, 5 - self.done / 10, 1.25 if updates else math.nan, 0.001, 0.5)

    def evaluate(self, **arrays: Tokens) -> float:
        self.evaluated.append(arrays)
        return 4.0 - self.steps / 4

    @property
    def weights(self) -> dict[str, Any]:
        given = {**self.options, **self.options.get("config", {})}
        config = {name: value for name, value in given.items() if name in ("vocab", "layers", "dim", "heads")}
        held = resolve(self.model, **config)
        if held.weights is None:
            return {n: np.ones(v.type.static_shape or (), np.float32) for n, v in held.graph.parameters.items()}
        return {name: np.asarray(array) + np.float32(1) for name, array in held.weights.items()}

    def zero_grad(self) -> None:
        self.done = self.steps * self.options["gradient_accumulation_steps"]

    def save_state(self, path: Path, notes: Mapping[str, str]) -> None:
        assert self.done == self.steps * self.options["gradient_accumulation_steps"], (
            "a state can only be saved after an update"
        )
        self.saved.append(self.steps)
        noted = {NOTE + name: text for name, text in notes.items()}
        write_weights(Path(path), {}, {"format": FORMAT, "steps": str(self.steps), **noted})

    def restore(self, path: Path) -> None:
        self.steps = int(SafetensorsFile.open(path).metadata["steps"])
        self.done = self.steps * self.options["gradient_accumulation_steps"]


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    def module(name: str, **members: Any) -> None:
        made = ModuleType(name)
        vars(made).update(members)
        monkeypatch.setitem(sys.modules, name, made)

    module("treadle.training.trainer", Trainer=FakeTrainer)
    monkeypatch.setattr(FakeTrainer, "made", [])
    monkeypatch.setattr(FakeTrainer, "interrupt_at", 0)
    monkeypatch.setattr(FakeTrainer, "fail_at", 0)
    monkeypatch.setattr(FakeTrainer, "failure", UsageError)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return folders of two tiny models with 48 positions: a causal and a masked language model."""
    made = {}
    for name, architecture, tokenizer in (
        ("gpt2", "GPT2LMHeadModel", without_specials()),
        ("bert", "BertForMaskedLM", wordpiece()),
    ):
        made[name] = tmp_path_factory.mktemp("models") / name
        save(made[name], architecture, tokenizer)
    return made


@pytest.fixture
def train(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Treadle:
    """A function that runs `treadle train` in a folder with `gpt2`, `bert` and `texts.txt`, at least 20 blocks of 16
    tokens.
    """
    for name, place in folders.items():
        (tmp_path / name).symlink_to(place)
    (tmp_path / "texts.txt").write_text("\n".join(texts(60, 5)), encoding="utf-8")
    run = commands_in(tmp_path, capsys, monkeypatch)
    return lambda *words: run("train", *with_last_values("train", " ".join(words)))


SMALL = "--length 16 --batch 2 --steps 4"


def only() -> FakeTrainer:
    (made,) = FakeTrainer.made
    return made


# -- calls of the trainer ------------------------------------------------------------------------------------------


def test_missing_settings_have_their_default(train: Treadle) -> None:
    said = train("gpt2 texts.txt --steps 1 --batch 3")
    assert said.code == 0, said.err
    assert str(only().model) == "gpt2"
    assert only().options == {
        "loss": "cross-entropy",
        "optimizer": AdamW(),
        "learning_rate": Schedule(1e-4),
        "max_grad_norm": 1.0,
        "trained": ("*",),
        "gradient_checkpointing": False,
        "gradient_accumulation_steps": 1,
    }
    assert [call["tokens"].shape for call in only().calls] == [(3, 48)]


def test_each_option_reaches_what_it_is_for(train: Treadle, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("treadle.compiling.compile_model", lambda *given: asked.append(given) or "compiled")
    said = train(
        f"gpt2 texts.txt {SMALL} --learning-rate 0.01 --warmup 2 --schedule cosine --weight-decay 0.5",
        "--max-grad-norm 0 --optimizer sgd",
        "--train wte.* --train h.* --teacher gpt2 --temperature 3 --distillation-weight 0.25",
        "--backend tvm --dtype bf16",
        "--threads 3 --gradient-checkpointing --gradient-accumulation-steps 2 --seed 7",
        "--set layers=1 --limit tensors=900",
    )
    assert said.code == 0, said.err
    options = only().options
    where = options.pop("target")
    assert (str(where), where.threads) == ("cpu", 3)
    assert options == {
        "loss": "cross-entropy",
        "optimizer": SGD(momentum=0.9, weight_decay=0.5),
        "learning_rate": Schedule(0.01, warmup=2, steps=4, shape="cosine"),
        "max_grad_norm": None,
        "trained": ("wte.*", "h.*"),
        "teacher": "compiled",
        "temperature": 3.0,
        "distillation_weight": 0.25,
        "backend": "tvm",
        "dtype": "bf16",
        "gradient_checkpointing": True,
        "gradient_accumulation_steps": 2,
        "seed": 7,
        "config": {"layers": 1},
        "limits": {"tensors": 900},
    }
    assert asked == [("gpt2", CompileOptions(backend="tvm", target=where, widen=("bf16", "f16")))]
    assert [len(only().calls), only().calls[0]["tokens"].shape] == [8, (2, 16)]


def test_batches_are_those_of_the_texts_in_the_order_of_the_seed(train: Treadle, folders: dict[str, Path]) -> None:
    train(f"gpt2 texts.txt {SMALL} --seed 3")
    data = TextData.open(["texts.txt"], resolve(folders["gpt2"]), length=16, batch=2, seed=3)
    for call, tokens in zip(only().calls, data.batches.after(), strict=False):
        np.testing.assert_array_equal(call["tokens"], tokens)
        np.testing.assert_array_equal(call["targets"][:, :-1], tokens[:, 1:])
        assert (call["targets"][:, -1] == NOT_COUNTED).all()


def test_a_masked_model_is_asked_for_what_is_hidden(train: Treadle) -> None:
    said = train(f"bert texts.txt {SMALL} --objective masked-token --holdout 0.2")
    assert said.code == 0, said.err
    for call in (*only().calls, *only().evaluated):
        assert ((call["targets"] != NOT_COUNTED).sum(axis=1) >= 1).all()
    half = len(only().evaluated) // 2
    for before, after in zip(only().evaluated[:half], only().evaluated[half:], strict=True):
        np.testing.assert_array_equal(before["targets"], after["targets"], "the same is hidden before and after")


def test_a_causal_model_that_predicts_masked_tokens_is_noted(train: Treadle) -> None:
    Path("own.py").write_text(
        "import treadle as t\n\n\n@t.model\ndef causal(tokens: t.i64['B S'], *, vocab=260):\n"
        "    return {'logits': t.unembed(t.embed(tokens, vocab, 8, name='wte'), tied='wte')}\n",
        encoding="utf-8",
    )
    said = train(f"own.py:causal texts.txt {SMALL} --vocab 260 --objective masked-token")
    assert said.code == 0, said.err
    assert "the model is causal: it predicts a masked token from the tokens before it alone" in said.err
    assert "is causal" not in train(f"bert texts.txt {SMALL} --objective masked-token").err


@pytest.mark.parametrize(("rise", "noted"), [(0.25, False), (2.0, True)])
def test_a_loss_that_rises_is_noted(train: Treadle, monkeypatch: pytest.MonkeyPatch, rise: float, noted: bool) -> None:
    step = FakeTrainer.step
    monkeypatch.setattr(
        FakeTrainer, "step", lambda self, **arrays: replace(step(self, **arrays), loss=3 + rise * self.steps)
    )
    said = train(f"gpt2 texts.txt {SMALL} --every 1")
    assert said.code == 0, said.err
    assert ("the loss rose from 5 to 11: try a smaller --learning-rate" in said.out) is noted


# -- resumed runs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["gpt2 texts.txt", "bert texts.txt --objective masked-token"])
def test_a_run_that_goes_on_sees_what_it_would_have_seen(train: Treadle, objective: str) -> None:
    how = f"{objective} --length 16 --batch 2 --gradient-accumulation-steps 2 --schedule linear --json"
    assert train(how, "--steps 7").code == 0
    assert train(how, "--steps 3 --state half").code == 0
    said = train(how, "--steps 7 --resume half")
    assert said.code == 0, said.err
    whole, first, rest = FakeTrainer.made
    assert (len(first.calls), len(rest.calls)) == (6, 8)
    for wanted, found in zip(whole.calls, [*first.calls, *rest.calls], strict=True):
        for name in wanted:
            np.testing.assert_array_equal(wanted[name], found[name])
    assert (said.json["resumed_at"], said.json["steps"], said.json["lines"][-1]["step"]) == (3, 7, 7)
    assert rest.options["learning_rate"] == whole.options["learning_rate"], "--steps counts all of them"


def test_a_state_is_written_at_the_end_and_as_often_as_it_is_said(train: Treadle) -> None:
    assert train(f"gpt2 texts.txt {SMALL} --state s").code == 0
    assert train("gpt2 texts.txt --length 16 --batch 2 --steps 7 --state s --save-every 2").code == 0
    assert [made.saved for made in FakeTrainer.made] == [[4], [2, 4, 6, 7]]


def test_a_state_with_all_steps_behind_it_is_refused(train: Treadle) -> None:
    write_weights(Path("done"), {}, {"format": FORMAT, "steps": "4"})
    refused(train(f"gpt2 texts.txt {SMALL} --resume done"), "the training state is already at step 4", "--steps 8")


OTHER_BATCHES = {
    "--seed 1": ("--seed 1, and the state has 0", "--seed 0"),
    "--batch 3": ("--batch 3, and the state has 2", "--batch 2"),
    "--gradient-accumulation-steps 2": (
        "--gradient-accumulation-steps 2, and the state has 1",
        "--gradient-accumulation-steps 1",
    ),
    "--length 8": ("--length 8, and the state has 16", "--length 16"),
    "--holdout 0.3": ("--holdout 0.3, and the state has 0.2", "--holdout 0.2"),
    "--seed 1 --length 8": ("--seed 1, and the state has 0; --length 8, and the state has 16", "--seed 0 --length 16"),
    "others.txt": ("other texts", "the same texts and tokenizer"),
}


@pytest.mark.parametrize("words", OTHER_BATCHES)
def test_a_run_with_other_batches_is_not_resumed(train: Treadle, words: str) -> None:
    """With other batches, the resumed run would repeat some blocks and skip others, and might train on held-out
    blocks.
    """
    Path("others.txt").write_text("one more text", encoding="utf-8")
    assert train(f"gpt2 texts.txt {SMALL} --holdout 0.2 --state half").code == 0
    said = train(f"gpt2 texts.txt {SMALL} --holdout 0.2 --resume half --steps 6 {words}")
    refused(said, "a resumed run needs the same batches as the original run", *OTHER_BATCHES[words])
    assert len(FakeTrainer.made) == 1, "it is refused before anything is compiled"


@pytest.mark.parametrize(
    ("other", "hint"),
    [("", "the same texts and tokenizer"), ("--seed 1", "--seed 0, the same texts and tokenizer; or")],
    ids=["alone", "next to another setting"],
)
def test_other_tokens_of_the_same_texts_are_refused(
    other: str, hint: str, train: Treadle, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(f"gpt2 texts.txt {SMALL} --state half").code == 0
    ids = TextTokenizer.ids
    monkeypatch.setattr(TextTokenizer, "ids", lambda self, texts: [each[::-1] for each in ids(self, texts)])
    said = train(f"gpt2 texts.txt {SMALL} --resume half --steps 6 {other}")
    refused(said, "other tokens of the same texts", hint)


def test_settings_that_leave_the_batches_as_they_were_are_reported(train: Treadle) -> None:
    assert train(f"gpt2 texts.txt {SMALL} --state half --learning-rate 0.01").code == 0
    said = train(
        "gpt2 texts.txt --length 16 --batch 2 --steps 6 --resume half --learning-rate 0.02",
        "--backend torch --max-grad-norm 2",
    )
    assert said.code == 0
    for line in (
        "resumed with learning-rate 0.02; until now it was 0.01",
        "resumed with max-grad-norm 2.0; until now it was 1.0",
        "resumed with backend torch; until now it was numpy",
    ):
        assert line in said.err.splitlines()
    assert len(said.err.splitlines()) == 3
    said = train("gpt2 texts.txt --length 16 --batch 2 --steps 6 --resume half --learning-rate 0.02 --json")
    assert said.json["changed"] == {"learning-rate": ["0.01", "0.02"]}
    said = train(
        "gpt2 texts.txt --length 16 --batch 2 --steps 6 --resume half --learning-rate 0.01 --schedule linear --json"
    )
    assert said.json["changed"] == {"schedule": ["constant", "linear"]}


def test_a_state_without_settings_is_resumed_and_that_is_reported(train: Treadle) -> None:
    write_weights(Path("plain"), {}, {"format": FORMAT, "steps": "2"})
    said = train(f"gpt2 texts.txt {SMALL} --resume plain --json")
    assert said.code == 0 and said.json["changed"] is None
    assert "the state does not store the seed, batches and texts that it was trained with" in said.err


# -- the line of a run in progress ---------------------------------------------------------------------------------


def test_the_state_of_a_run_is_described_after_each_update(train: Treadle, monkeypatch: pytest.MonkeyPatch) -> None:
    described: list[str] = []
    monkeypatch.setattr("treadle.progress.WorkLine.describe", lambda line, what: described.append(what))
    assert train(f"gpt2 texts.txt {SMALL} --every 4").code == 0
    assert described == [
        "step 1 of 4, loss 4.9000, 64 tokens/s, 2 s left",
        "step 2 of 4, loss 4.8000, 64 tokens/s, 1 s left",
        "step 3 of 4, loss 4.7000, 64 tokens/s, 0 s left",
        "step 4 of 4, loss 4.6000, 64 tokens/s, 0 s left",
    ]


def test_a_terminal_shows_the_line_and_a_pipe_does_not(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(texts(60, 5)), encoding="utf-8")
    words = ["-m", "treadle", "train", str(folders["gpt2"]), "texts.txt", "--backend", "numpy", "--every", "300"]
    words += ["--length", "16", "--batch", "2", "--steps", "300"]
    code, said = on_terminal(*words, cwd=tmp_path)
    assert code == 0
    line = r"step [0-9]+ of 300, loss [0-9.]+, [0-9,]+ tokens/s, [0-9]+ s left"
    assert re.search(line, said)
    rows = seen(said)
    assert not any(re.search(line, row) for row in rows), "the line is removed"
    assert max(map(len, rows)) <= 80
    done = piped(*words, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "left" not in done.stdout


def test_the_time_left_follows_the_recent_updates() -> None:
    updates = [Update(n, 2.5, 1.0, 0.1, 1000, seconds, 900) for n, seconds in ((7, 2.0), (8, 4.0))]
    assert live_text(updates, 1208) == "step 8 of 1,208, loss 2.5000, 333 tokens/s, 1 h 0 min left"
    assert live_text([replace(updates[0], seconds=0.0)], 9) == "step 7 of 9, loss 2.5000"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min"), (274_000, "3 d 4 h")],
)
def test_times_are_written_in_two_units(seconds: float, text: str) -> None:
    assert lasting(seconds) == text


# -- Ctrl-C --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", ["", "--json"])
def test_training_is_saved_after_ctrl_c(train: Treadle, monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    """After Ctrl-C, the current step is completed, and so is the update that the step belongs to."""
    monkeypatch.setattr(FakeTrainer, "interrupt_at", 3)
    before = signal.getsignal(signal.SIGINT)
    said = train(f"gpt2 texts.txt {SMALL} --gradient-accumulation-steps 2 --holdout 0.2 -o out --state s {words}")
    assert signal.getsignal(signal.SIGINT) is before
    assert said.code == 130
    assert (len(only().calls), only().saved) == (4, [2])
    assert "model.safetensors" in os.listdir("out")
    if words:
        assert said.json["interrupted"] and said.json["steps"] == 2
        assert said.json["held_out"]["after"] == {"loss": None, "perplexity": None}
    else:
        assert "interrupted after 2 steps, 128 tokens" in said.out


def test_a_second_ctrl_c_interrupts_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    with noting_interrupts("ending soon") as interrupted:
        assert not interrupted()
        signal.raise_signal(signal.SIGINT)
        assert interrupted()
        assert capfd.readouterr().err == "ending soon\n"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert capfd.readouterr().err == "", "it is said once"


def test_the_first_ctrl_c_says_what_a_second_one_does(train: Treadle, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("treadle.training.interrupts._say", said.append)
    monkeypatch.setattr(FakeTrainer, "interrupt_at", 3)
    assert train(f"gpt2 texts.txt {SMALL}").code == 130
    assert said == ["ending after this step; Ctrl-C again ends at once"]


# -- a step that fails ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", ["", "--every 1", "--save-every 1", "--json"])
def test_training_is_saved_after_a_failed_step(train: Treadle, monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    monkeypatch.setattr(FakeTrainer, "fail_at", 4)
    said = train(f"gpt2 texts.txt {SMALL} -o out --state s {words}")
    assert said.code == 2
    assert only().saved[-1] == 3 and "config.json" in os.listdir("out")
    assert "wrote s, " in said.err and f"wrote {Path('out', 'model.safetensors')}, " in said.err
    if words == "--json":
        assert said.json["error"]["what"] == "the loss is nan after 3 updates"
    else:
        assert said.err.endswith("the loss is nan after 3 updates\n")


def test_a_model_that_diverged_is_not_saved(train: Treadle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeTrainer, "fail_at", 4)
    monkeypatch.setattr(FakeTrainer, "failure", DivergedError)
    said = train(f"gpt2 texts.txt {SMALL} -o out --state s")
    assert said.code == 2 and "the loss is nan after 3 updates" in said.err
    assert only().saved == [3] and not Path("out").exists()
    assert "the trained model is not saved, since its loss or a gradient is NaN or infinite" in said.err


def test_a_failure_within_an_update_saves_the_state_of_the_last_update(
    train: Treadle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeTrainer, "fail_at", 6)
    said = train(f"gpt2 texts.txt {SMALL} --gradient-accumulation-steps 2 --state s")
    assert said.code == 2 and "the loss is nan after 2 updates" in said.err
    assert only().saved == [2]


def test_a_failure_of_the_first_step_saves_nothing(train: Treadle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeTrainer, "fail_at", 1)
    said = train(f"gpt2 texts.txt {SMALL} -o out --state s")
    assert (said.code, said.err) == (2, "the loss is nan after 0 updates\n")
    assert not Path("out").exists() and not Path("s").exists()


@pytest.mark.parametrize("fail_at", [0, 4])
def test_a_state_that_cannot_be_written_does_not_cost_the_model(
    train: Treadle, monkeypatch: pytest.MonkeyPatch, fail_at: int
) -> None:
    def full(self: FakeTrainer, path: Path, notes: Mapping[str, str]) -> None:
        raise UsageError("the disk is full")

    monkeypatch.setattr(FakeTrainer, "fail_at", fail_at)
    monkeypatch.setattr(FakeTrainer, "save_state", full)
    said = train(f"gpt2 texts.txt {SMALL} -o out --state s")
    assert said.code == 2 and "model.safetensors" in os.listdir("out")
    assert "the disk is full" in said.err and "wrote s" not in said.err
    assert ("the loss is nan after 3 updates" in said.err) == bool(fail_at)


@pytest.mark.parametrize("saving", ["", "-o out", "--state s"])
def test_a_run_that_saves_nothing_says_so_before_it_begins(
    train: Treadle, monkeypatch: pytest.MonkeyPatch, saving: str
) -> None:
    monkeypatch.setattr(FakeTrainer, "fail_at", 1)
    said = train(f"gpt2 texts.txt {SMALL} {saving}")
    assert said.out.startswith("nothing is saved: -o FOLDER saves the model") == (not saving)


def test_ctrl_c_before_the_first_step_saves_nothing(train: Treadle, monkeypatch: pytest.MonkeyPatch) -> None:
    def pressed(self: FakeTrainer, **arrays: Tokens) -> float:
        signal.raise_signal(signal.SIGINT)
        return 1.0

    monkeypatch.setattr(FakeTrainer, "evaluate", pressed)
    said = train(f"gpt2 texts.txt {SMALL} --batch 1 --holdout 0.2 -o out --state s")
    assert said.code == 130 and only().calls == [] and not Path("out").exists() and not Path("s").exists()
    assert "nothing was trained, so nothing was saved" in said.out


def test_training_is_saved_if_the_reader_of_the_output_is_gone(train: Treadle, monkeypatch: pytest.MonkeyPatch) -> None:
    def leaves(*_: object) -> str:
        raise BrokenPipeError

    monkeypatch.setattr("treadle.training.text_training.line_text", leaves)
    monkeypatch.setattr("treadle.cli.application.forget_output", lambda: None)
    assert train(f"gpt2 texts.txt {SMALL} --every 2 -o out").code == 0
    assert len(only().calls) == 2 and "model.safetensors" in os.listdir("out")


# -- output --------------------------------------------------------------------------------------------------------


PAGES = {
    "plain": f"gpt2 texts.txt {SMALL}",
    "saved": f"gpt2 texts.txt {SMALL} --every 3 --holdout 0.1 -o out --state s",
    "set": f"gpt2 texts.txt {SMALL} --set layers=1 -o out",
    "teacher": f"gpt2 texts.txt {SMALL} --every 4 --holdout 0.1 --teacher gpt2",
    "zoo": "gpt2 texts.txt --length 16 --batch 2 --steps 1 -o out --tokenizer ./bert --set vocab=150 --set dim=8 "
    "--set heads=2 --set layers=1",
    "json": f"bert texts.txt {SMALL} --objective masked-token --every 3 --holdout 0.1 -o out --state s --json",
    "teacher.json": f"gpt2 texts.txt {SMALL} --gradient-accumulation-steps 2 --holdout 0.1 --teacher gpt2 --json",
}


@pytest.mark.parametrize("name", PAGES)
def test_its_text(name: str, train: Treadle, golden: Golden, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("treadle.compile", lambda *_, **__: None)
    if name == "zoo":
        (tmp_path / "gpt2").unlink()
    said = train(PAGES[name])
    assert said.code == 0, said.err
    golden(f"pages/train-{name}.txt", f"$ treadle train {PAGES[name]}\n{said.out}{said.err}")


def test_numbers_are_means_over_what_counted(train: Treadle) -> None:
    said = train(f"gpt2 texts.txt {SMALL} --gradient-accumulation-steps 2 --every 3 --holdout 0.1 --json").json
    first, last = said["lines"]
    assert first["step"] == 3 and first["loss"] == pytest.approx(5 - np.mean([1, 2, 3, 4, 5, 6]) / 10)
    assert last["step"] == 4 and last["loss"] == pytest.approx(5 - np.mean([7, 8]) / 10)
    assert (first["norm"], first["rate"], first["tokens_per_second"]) == (1.25, 0.001, 64.0)
    assert said["held_out"]["before"] == {"loss": 4.0, "perplexity": pytest.approx(math.exp(4))}
    assert said["held_out"]["after"] == {"loss": 3.0, "perplexity": pytest.approx(math.exp(3))}
    assert (said["tokens"], said["seconds"]) == (4 * 2 * 2 * 16, 4.0)


class Losses:
    """A trainer that returns given losses, for batches of one row each."""

    steps = 0

    def __init__(self, *losses: float) -> None:
        self.losses: Iterator[float] = iter(losses)

    def step(self, **_: Tokens) -> FakeResult:
        return FakeResult(1, next(self.losses), 1.0, 0.1, 1.0)

    def evaluate(self, **_: Tokens) -> float:
        return next(self.losses)


class Counted:
    """A trainer that takes the first token of each row as the row's number of targets, and records random seeds."""

    def __init__(self) -> None:
        self.numbers: list[tuple[int, ...]] = []

    def asked(self, tokens: Tokens, *number: int) -> dict[str, Tokens]:
        self.numbers.append(number)
        places = np.arange(tokens.shape[1]) < tokens[:, :1]
        return {"tokens": tokens, "targets": np.where(places, tokens, NOT_COUNTED)}


def test_a_mean_weighs_each_batch_by_its_targets() -> None:
    blocks = np.array([[1, 0, 0], [3, 0, 0], [0, 0, 0]])
    objective = Counted()
    data = TextData(objective, BlockBatches(blocks[:1], 1), blocks)
    assert held_out_loss(Losses(4.0, 2.0), data, ends=lambda: False) == (4.0 + 3 * 2.0) / 4, "the last is not asked"
    two = Update(1, 4.0, 1.0, 0.1, 3, 0.5, 1), Update(2, 2.0, 3.0, 0.2, 3, 0.25, 3)
    assert Update.joined(two) == Update(2, 2.5, 3.0, 0.2, 6, 0.75, 4)
    (found,) = updates(Losses(4.0, 2.0), data, steps=1, accumulate=2)
    assert (found.step, found.loss, found.tokens, found.counted) == (1, 3.0, 6, 2)
    assert len({*objective.numbers}) == len(objective.numbers) == 5, "each draws in its own way"
    assert held_out_loss(Losses(), TextData(Counted(), data.batches, blocks[2:]), ends=lambda: False) is None


# -- refusals ------------------------------------------------------------------------------------------------------

REFUSED = {
    "--temperature 2": ("--temperature only applies together with --teacher", "--teacher MODEL as well"),
    "--distillation-weight 0.5": (
        "--distillation-weight only applies together with --teacher",
        "--teacher MODEL as well",
    ),
    "--save-every 3": ("--save-every only applies together with --state", "--state FILE as well"),
    "--resume none": ("there is no file none", "a file that --state wrote"),
    "--resume texts.txt": ("the header is longer than the file", "a file that --state wrote, undamaged"),
    "--state .": ("the state cannot be written: this is a folder", "a file in a folder"),
    "--state none/s": ("the state cannot be written: its folder does not exist", "mkdir -p none"),
    "--optimizer adam": ("there is no optimizer 'adam'", "adamw or sgd"),
    "--schedule step": ("unknown schedule shape 'step'", "one of constant, cosine, linear"),
    "--learning-rate 0": ("a learning rate must be a number above 0", "--learning-rate 1e-4"),
    "--learning-rate nan": ("a learning rate must be a number above 0", "--learning-rate 1e-4"),
    "--schedule cosine --warmup 4": ("a cosine schedule needs steps after step 4 to decay", "more --steps"),
    "--schedule linear --steps 1": ("a linear schedule needs steps after step 1 to decay", "more --steps"),
    "--length 49": ("a block must have 2 tokens or more and at most 48", "48"),
    "--batch 4000": ("a batch of 4,000 rows cannot be formed from",),
    "--objective other": ("there is no objective 'other'", "one of next-token, masked-token"),
    "--state texts.txt": ("the state would overwrite a file that is not a state", "another file, or --replace"),
    "--state run.pt": (
        "a training state is not stored as a pickle, but the file name",
        "run.state",
    ),
    f"--state {'n' * 300}": ("the state cannot be written", "too long"),
    f"-o {'n' * 300}": ("the folder cannot be written", "too long"),
    f"--resume {'n' * 300}": ("there is no file nnn", "a file that --state wrote"),
    "--state /dev/null --replace": ("the state would overwrite a file that is not a state",),
    "--state gpt2/model.safetensors": ("the state would overwrite a file that is not a state",),
    "--dtype bf16 --backend numpy": ("NumPy has no bf16", "--backend tvm, or torch"),
    "--target cuda": ("training runs on the CPU", "--target cpu, or no --target"),
    "--target x86-64": ("training runs on the CPU", "--target cpu, or no --target"),
    "-o full": ("the folder to save in is not empty", "another folder, or --replace"),
    "-o gpt2 --replace": ("the model's own folder cannot be overwritten",),
}


@pytest.mark.parametrize("words", REFUSED)
def test_misfits_are_refused_before_compilation(train: Treadle, words: str) -> None:
    Path("full").mkdir()
    Path("full", "notes").write_text("mine")
    refused(train(f"gpt2 texts.txt {SMALL} {words}"), *REFUSED[words])
    assert FakeTrainer.made == [] and os.listdir("full") == ["notes"]


def test_a_model_that_no_text_trains_is_told_what_to_do(train: Treadle) -> None:
    refused(train("bert texts.txt"), "it is not a causal language model", "--objective masked-token")
    refused(train("model.py:small texts.txt --objective masked-token"), "no logits for each token", "t.Trainer")
    encoder = "electra texts.txt --set head=masked_lm --objective masked-token"
    refused(train(encoder), "has no folder", "--tokenizer FOLDER")


def test_one_reason_is_one_object(train: Treadle) -> None:
    said: Result = train("gpt2 texts.txt --length 49 --json")
    assert (said.code, said.json["error"]["kind"]) == (2, "UsageError")


def test_a_state_is_written_over_a_state_or_with_replace(train: Treadle) -> None:
    Path("s").write_text("mine")
    assert not is_state(Path("s")) and not is_state(Path("none"))
    assert train(f"gpt2 texts.txt {SMALL} --state s --replace").code == 0
    assert is_state(Path("s"))
    assert train("gpt2 texts.txt --length 16 --batch 2 --steps 6 --state s --resume s").code == 0


def test_replace_saves_over_files(train: Treadle) -> None:
    Path("full").mkdir()
    Path("full", "notes").write_text("mine")
    assert train(f"gpt2 texts.txt {SMALL} -o full --replace").code == 0
    assert {"notes", "config.json", "model.safetensors", "tokenizer.json"} <= {*os.listdir("full")}
    again, before = resolve("full").weights, resolve("gpt2").weights
    assert again is not None and before is not None
    assert all(np.array_equal(again[name], np.asarray(before[name]) + np.float32(1)) for name in before)


def test_masks_of_batches_are_drawn_anew_for_each() -> None:
    objective = MaskedToken(3, 20, (3,), 1)
    tokens = np.full((2, 40), 7)
    first, second = (objective.asked(tokens, 0, number)["targets"] for number in (0, 1))
    assert not np.array_equal(first, second)
    assert json.dumps(first.tolist()) == json.dumps(objective.asked(tokens, 0, 0)["targets"].tolist())

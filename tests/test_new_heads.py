"""A new head on trained weights: weights of these names are drawn, the others are read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import treadle as t
from tests import first_hour
from tests.command_line import Treadle, commands_in, refused
from treadle.ir.errors import CheckpointError, UsageError

MODEL = "encoder.py:my_classifier"


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Treadle:
    """Run commands in a folder with an encoder and its trained weights."""
    run = commands_in(tmp_path, capsys, monkeypatch)
    Path("encoder.py").write_text(dict(first_hour.steps())["encoder.py"])
    trainer = t.Trainer("encoder.py:my_encoder", backend="numpy", seed=3)
    trainer.step(tokens=[[1, 2, 3]], targets=[[1, 2, 3]])
    trainer.save("encoder")
    return run


def test_the_head_is_drawn_and_the_others_are_read(command: Treadle) -> None:
    trained = t.compile("encoder.py:my_encoder", weights="encoder", backend="numpy").weights
    drawn = t.compile(MODEL, backend="numpy", seed=5).weights
    trainer = t.Trainer(MODEL, weights="encoder", new_weights=["logits.*"], backend="numpy", seed=5)
    np.testing.assert_array_equal(trainer.weights["wte.weight"], trained["wte.weight"])
    for name in ("logits.weight", "logits.bias"):
        np.testing.assert_array_equal(trainer.weights[name], drawn[name])
    assert np.isfinite(trainer.step(tokens=[[1, 2, 3]], targets=[1]).loss)
    trainer.save("cls")
    made = t.compile(MODEL, weights="cls", backend="numpy")
    np.testing.assert_array_equal(made.weights["logits.weight"], trainer.weights["logits.weight"])


def test_one_pattern_is_a_list(command: Treadle) -> None:
    with pytest.raises(UsageError, match="new_weights= is a list of patterns") as caught:
        t.Trainer(MODEL, weights="encoder", new_weights="logits.*", backend="numpy")
    assert str(caught.value.hint) == "new_weights=['logits.*']"


def test_arrays_may_lack_the_new_weights(command: Treadle) -> None:
    table = t.compile("encoder.py:my_encoder", weights="encoder", backend="numpy").weights["wte.weight"]
    trainer = t.Trainer(MODEL, weights={"wte.weight": table}, new_weights=["logits.*"], backend="numpy")
    np.testing.assert_array_equal(trainer.weights["wte.weight"], table)


def test_the_hints_lead_to_a_trainer(command: Treadle) -> None:
    """Each error's hint, followed, leads on: to the file without the comparison, then to the new weights."""
    with pytest.raises(CheckpointError, match="is not the declaration") as caught:
        t.Trainer(MODEL, weights="encoder", backend="numpy")
    found = re.search(r"weights='([^']+)'", str(caught.value.hint))
    assert found is not None
    with pytest.raises(CheckpointError, match="lacks 2 of the 3 tensors") as caught:
        t.Trainer(MODEL, weights=found[1], backend="numpy")
    patterns = re.search(r"new_weights=(\[[^]]+\])", str(caught.value.hint))
    assert patterns is not None and eval(patterns[1]) == ["logits.*"]
    t.Trainer(MODEL, weights=found[1], new_weights=eval(patterns[1]), backend="numpy")
    assert "new_weights" not in str(_hint(lambda: t.compile(MODEL, weights=found[1], backend="numpy")))


def _hint(made: Any) -> Any:
    with pytest.raises(CheckpointError) as caught:
        made()
    return caught.value.hint


def test_patterns_without_a_weight_and_other_models(command: Treadle, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no weight matches 'head\.\*' of new_weights") as caught:
        t.Trainer(MODEL, weights="encoder", new_weights=["head.*"], backend="numpy")
    assert "logits.weight" in str(caught.value.hint)
    refused(command("compile", MODEL, "--new-weights", "logits.*"), "No such option: --new-weights")


def test_the_way_to_a_new_head_of_a_folder_works(command: Treadle) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("tokenizers")
    from tests.task_models import save, wordpiece

    save(Path("bert"), "BertModel", wordpiece())
    for options in ({"head": "classifier", "labels": 2}, {"new_weights": ["logits.*"]}):
        with pytest.raises((CheckpointError, UsageError)) as caught:
            t.Trainer("bert", backend="numpy", **options)  # type: ignore[arg-type]
        code = re.search(
            r"transformers\.(\w+\.from_pretrained\(.*?\)\.save_pretrained\('NEW'\))", str(caught.value.hint)
        )
        assert code is not None
    eval(f"transformers.{code[1]}", {"transformers": transformers})
    trainer = t.Trainer("NEW", tokenizer="bert", backend="numpy")
    trainer.step(tokens=[[1, 2, 3]], targets=[1])
    trainer.save("tuned")
    assert t.load("tuned", backend="numpy").classify("the cat").label in ("LABEL_0", "LABEL_1")


def test_a_file_has_no_new_weights(command: Treadle) -> None:
    """transformers reads no such file, so no hint leads there."""
    pytest.importorskip("onnx")
    assert command("export", "encoder.py:my_encoder", "--to", "onnx", "-o", "encoder.onnx").code == 0
    with pytest.raises(UsageError, match="new_weights= are weights of a declaration") as caught:
        t.Trainer("encoder.onnx", new_weights=["head.*"], backend="numpy")
    assert str(caught.value.hint) == "leave it out: the file has all weights"
    assert t.Trainer("encoder.onnx", backend="numpy").weights

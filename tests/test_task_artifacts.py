"""Artifacts of models with a head for texts: a task on the file gives the results of its model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import treadle as t
from tests.task_models import byte_level, save, texts, without_types, wordpiece
from treadle.cli import app
from treadle.ir.errors import CheckpointError, UsageError
from treadle.program.program import Program
from treadle.tasks.loaded import LoadedModel

NAMES = {0: "O", 1: "B-PER", 2: "I-PER"}
TEXTS = texts(6)
PAIRS = list(zip(TEXTS, texts(6, seed=1), strict=True))
LENGTHS, BOTH = {"inputs": ("lengths",)}, {"inputs": ("lengths", "token_types")}


def classified(model: LoadedModel) -> Any:
    return [[(each.label, each.score) for each in found.scores] for found in model.classify(TEXTS)]


def classified_pairs(model: LoadedModel) -> Any:
    return [[(each.label, each.score) for each in found.scores] for found in model.classify(PAIRS)]


def tagged(model: LoadedModel) -> Any:
    return [[(span.label, span.score, span.start, span.end) for span in found] for found in model.tag(TEXTS)]


def answered(model: LoadedModel) -> Any:
    return [found and (found.text, found.score, found.start, found.end) for found in model.answer(PAIRS)]


def filled(model: LoadedModel) -> Any:
    mask = model.filler.mask
    found = model.fill([f"{mask} {text} {mask}" for text in TEXTS])
    return [[[(each.id, each.score) for each in row] for row in each.masks] for each in found]


CASES: list[tuple[str, str, Any, dict[str, Any], dict[str, Any], Callable[[LoadedModel], Any]]] = [
    ("classify", "BertForSequenceClassification", wordpiece, {"id2label": NAMES}, {}, classified),
    ("classify", "BertForSequenceClassification", wordpiece, {"num_labels": 1}, BOTH, classified_pairs),
    ("classify", "RobertaForSequenceClassification", byte_level, {"num_labels": 3}, {}, classified_pairs),
    ("classify", "DistilBertForSequenceClassification", without_types, {}, LENGTHS, classified_pairs),
    ("tag", "BertForTokenClassification", wordpiece, {"id2label": NAMES}, {}, tagged),
    ("tag", "RobertaForTokenClassification", byte_level, {"id2label": NAMES}, LENGTHS, tagged),
    ("answer", "BertForQuestionAnswering", wordpiece, {}, BOTH, answered),
    ("answer", "RobertaForQuestionAnswering", byte_level, {}, {}, answered),
    ("fill", "BertForMaskedLM", wordpiece, {}, {}, filled),
    ("fill", "AlbertForMaskedLM", wordpiece, {}, BOTH, filled),
]


def flat(found: Any) -> list[Any]:
    """Return nested results as one list, for a comparison with a tolerance."""
    return [leaf for each in found for leaf in flat(each)] if isinstance(found, list | tuple) else [found]


@pytest.mark.parametrize(("task", "architecture", "tokenizer", "config", "options", "asked"), CASES)
def test_a_task_on_an_artifact_gives_the_results_of_its_folder(
    task: str,
    architecture: str,
    tokenizer: Any,
    config: dict[str, Any],
    options: dict[str, Any],
    asked: Callable[[LoadedModel], Any],
    tmp_path: Path,
) -> None:
    place, file = tmp_path / "folder", tmp_path / "model.treadle"
    save(place, architecture, tokenizer(), **config)
    wanted = asked(t.load(place, backend="numpy"))
    flags = ["--inputs", ",".join(options["inputs"])] if options else []
    said = CliRunner().invoke(app, ["compile", str(place), "-o", str(file), "--backend", "numpy", *flags])
    assert f"its tokenizer is in the file: `{task}` takes it as MODEL" in said.stdout
    place.rename(tmp_path / "away")  # the file needs no other
    assert flat(asked(t.load(file))) == pytest.approx(flat(wanted), abs=1e-6)
    t.load_artifact(file).save(tmp_path / "copy.treadle")
    assert (tmp_path / "copy.treadle").read_bytes() == file.read_bytes()


def test_the_command_takes_an_artifact_with_the_options_of_a_run(tmp_path: Path) -> None:
    save(tmp_path / "folder", "BertForSequenceClassification", wordpiece(), id2label=NAMES)
    t.compile(tmp_path / "folder", backend="numpy").save(tmp_path / "model.treadle")
    words = ["classify", str(tmp_path / "model.treadle"), *TEXTS[:2]]
    report = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert [len(each["labels"]) for each in report["texts"]] == [1, 1] and report["backend"] == "numpy"
    assert "does not accept --quantize" in CliRunner().invoke(app, [*words, "--quantize", "int8"]).stderr
    refused = CliRunner().invoke(app, ["tag", *words[1:]]).stderr
    assert "has no head to tag tokens" in refused and "BertForSequenceClassification" in refused
    assert "does not embed" in CliRunner().invoke(app, ["embed", *words[1:]]).stderr


def test_pairs_need_the_input_by_which_the_model_distinguishes_texts(tmp_path: Path) -> None:
    """Without it, the scores would be those of one long text. The hint works when it is followed."""
    save(tmp_path / "folder", "BertForSequenceClassification", wordpiece())
    t.compile(tmp_path / "folder", backend="numpy").save(tmp_path / "model.treadle")
    model = t.load(tmp_path / "model.treadle")
    assert model.classify(TEXTS[0]).scores
    with pytest.raises(
        UsageError, match="has no input token_types, by which the model distinguishes two texts"
    ) as caught:
        model.classify([PAIRS[0]])
    assert str(caught.value.hint) == "compile it again, with inputs=['lengths', 'token_types']"
    t.compile(tmp_path / "folder", backend="numpy", **BOTH).save(tmp_path / "model.treadle")
    assert flat(classified_pairs(t.load(tmp_path / "model.treadle"))) == pytest.approx(
        flat(classified_pairs(t.load(tmp_path / "folder", backend="numpy"))), abs=1e-6
    )


def test_an_artifact_without_the_output_of_the_head(tmp_path: Path) -> None:
    save(tmp_path / "folder", "BertForMaskedLM", wordpiece())
    made = t.compile(tmp_path / "folder", backend="numpy", outputs=["logits[:, 0]"])
    assert not made.task_files
    made.save(tmp_path / "model.treadle")
    with pytest.raises(UsageError, match="has no tokenizer"):
        t.load(tmp_path / "model.treadle")
    with pytest.raises(UsageError, match="has no head to fill masks"):
        t.load(tmp_path / "model.treadle", tokenizer=str(tmp_path / "folder")).fill("the [MASK]")


def test_an_artifact_of_a_folder_without_a_tokenizer_takes_another(tmp_path: Path) -> None:
    save(tmp_path / "folder", "BertForTokenClassification", wordpiece(), id2label=NAMES)
    wanted = tagged(t.load(tmp_path / "folder", backend="numpy"))
    (tmp_path / "words").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "folder" / name).rename(tmp_path / "words" / name)
    t.compile(tmp_path / "folder", backend="numpy").save(tmp_path / "model.treadle")
    with pytest.raises(UsageError, match="has no tokenizer") as caught:
        t.load(tmp_path / "model.treadle").tag(TEXTS)
    assert str(caught.value.hint).startswith('tokenizer="FOLDER"')
    found = tagged(t.load(tmp_path / "model.treadle", tokenizer=str(tmp_path / "words")))
    assert flat(found) == pytest.approx(flat(wanted), abs=1e-6)


def test_the_files_of_a_head_hold_no_path_of_the_machine(tmp_path: Path) -> None:
    save(tmp_path / "folder", "BertForMaskedLM", wordpiece())
    place = tmp_path / "folder" / "config.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), "_name_or_path": "/home/someone/model"}))
    made = t.compile(tmp_path / "folder", backend="numpy")
    assert json.loads(made.task_files["config.json"])["architectures"] == ["BertForMaskedLM"]
    assert not any(b"/home/someone" in data for data in made.task_files.values())


@pytest.mark.parametrize("data", [b"", b"[", b"[1]", b"[" * 100_000, b'{"a": 1, "a": 2}', b'{"id2label": {"0": 1}}'])
def test_damaged_settings_in_an_artifact(data: bytes, tmp_path: Path) -> None:
    save(tmp_path / "folder", "BertForTokenClassification", wordpiece(), id2label=NAMES)
    made = t.compile(tmp_path / "folder", backend="numpy")
    files = {**made.task_files, "config.json": data}
    replace(made, _stored_files=lambda graph: files).save(tmp_path / "model.treadle")
    with pytest.raises((CheckpointError, UsageError)):
        t.load(tmp_path / "model.treadle").tag(TEXTS)
    assert t.load_artifact(tmp_path / "model.treadle")(tokens=np.array([[1, 2]]))["logits"].shape == (1, 2, 3)
    assert Program.of(str(tmp_path / "model.treadle")).source.kind == "artifact"

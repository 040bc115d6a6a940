"""The table of docs/text.md: the tasks of each form of MODEL. Each cell is a command, run with a small model."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("tokenizers")

import treadle as t
from tests import first_hour
from tests.command_line import Treadle, commands_in
from treadle.resolving import resolve
from treadle.training.saving import saver_for
from treadle.training.text_data import TextData

PAGE = Path(__file__).resolve().parent.parent / "docs" / "text.md"
MODELS = dict(first_hour.steps())["models.py"]
ENCODER = dict(first_hour.steps())["encoder.py"].replace(
    '"logits": t.unembed(x, tied="wte"), "hidden": x', '"hidden": x'
)
SIZES = {"vocab": 300, "dim": 16, "heads": 2, "layers": 1, "context": 64}
COMMANDS = {
    "generate": "{} the --tokens 1",
    "embed": "{} the",
    "classify": "{} the",
    "perplexity": "{} corpus.txt --tokens 9",
    "translate": "{} the",
    "train": "{} corpus.txt -o new --replace --steps 1 --length 8 --batch 1",
}
FORMS = {
    "declaration": {"generate": "models.py:my_gpt --weights lm", "embed": "encoder.py:my_encoder --weights enc",
                    "classify": "encoder.py:my_classifier --weights cls"},
    "folder that `train` wrote": {"generate": "zoo-lm", "embed": "zoo-enc", "classify": "zoo-cls"},
    "checkpoint folder": {"generate": "hf-lm", "embed": "hf-enc", "classify": "hf-cls"},
    "GGUF file": {"generate": "lm.gguf"},
    "ONNX file": {"generate": "lm.onnx --tokenizer lm"},
    "artifact": {"generate": "lm.treadle", "embed": "enc.treadle", "classify": "cls.treadle"},
}  # fmt: skip
"""The small models of each form by task; other tasks take the one that generates."""
ELSEWHERE = {("checkpoint folder", "translate"), ("artifact", "translate")}
"""Cells that other tests cover, with a larger model."""


def cells() -> Iterator[tuple[str, str, bool]]:
    """Yield each form of the page's table, a task, and True if the page has it."""
    rows = [
        line for line in PAGE.read_text().partition("The tasks of each form of MODEL")[2].split("\n") if line[:1] == "|"
    ]
    header, _, *listed = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[: 2 + len(FORMS)]]
    for form, (name, *answers) in zip(FORMS, listed, strict=True):
        assert name.startswith(form)
        for task, cell in zip(header[1:], answers, strict=True):
            yield form, task.strip("`"), {"yes": True, "no": False}[cell]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model of each form."""
    place = tmp_path_factory.mktemp("forms")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        Path("models.py").write_text(MODELS)
        Path("encoder.py").write_text(ENCODER)
        Path("corpus.txt").write_text(first_hour.CORPUS)
        texts = TextData.open(["corpus.txt"], resolve("models.py:my_gpt"), vocab=300, length=16, batch=2).texts
        assert texts is not None
        saved = {
            "lm": ("models.py:my_gpt", {}),
            "enc": ("encoder.py:my_encoder", {}),
            "cls": ("encoder.py:my_classifier", {}),
            "zoo-lm": ("gpt2", SIZES),
            "zoo-enc": ("gpt2", {**SIZES, "head": "hidden"}),
            "zoo-cls": ("bert", {**SIZES, "hidden": 16, "head": "classifier"}),
        }
        for folder, (model, config) in saved.items():
            resolved = resolve(model, **config)
            saver_for(resolved, folder).with_texts(texts).save(t.compile(model, **config).weights)
        for name, model in {"lm": "models.py:my_gpt", "enc": "encoder.py:my_encoder"}.items():
            t.compile(model, weights=name, backend="numpy").save(f"{name}.treadle")
        t.compile("encoder.py:my_classifier", weights="cls", backend="numpy").save("cls.treadle")
    return place


@pytest.fixture
def treadle_command(models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Treadle:
    run = commands_in(models, capsys, monkeypatch)
    return lambda *lines: run(*shlex.split(" ".join(lines)))


def prepared(form: str, run: Treadle) -> None:
    """Write the models of a form that need another package."""
    if form == "checkpoint folder" and not Path("hf-lm").exists():
        pytest.importorskip("transformers")
        from tests.task_models import save, without_specials, wordpiece

        for name, kind in {"lm": "GPT2LMHeadModel", "enc": "BertModel", "cls": "BertForSequenceClassification"}.items():
            save(Path(f"hf-{name}"), kind, without_specials() if name == "lm" else wordpiece())
    if form == "ONNX file" and not Path("lm.onnx").exists():
        pytest.importorskip("onnx")
        assert run("export models.py:my_gpt --weights lm --outputs logits -o lm.onnx").code == 0
    if form == "GGUF file" and not Path("lm.gguf").exists():
        pytest.importorskip("gguf")
        small = "--set layers=1 --set dim=32 --set heads=2 --set kv_heads=2 --set hidden=32 --set vocab=300"
        options = "--vocab 300 --steps 1 --length 8 --batch 1 --backend numpy"
        assert run(f"train llama corpus.txt -o zoo-llama {options} {small}").code == 0
        assert run("export zoo-llama --to gguf -o lm.gguf").code == 0


@pytest.mark.parametrize("form", FORMS)
def test_the_page_has_the_tasks_of_each_form(form: str, treadle_command: Treadle) -> None:
    prepared(form, treadle_command)
    for name, task, works in cells():
        if name != form or (form, task) in ELSEWHERE:
            continue
        model = FORMS[form].get(task, FORMS[form]["generate"])
        said = treadle_command(f"{task} {COMMANDS[task].format(model)} --backend numpy")
        assert said.code == (0 if works else 2), (task, model, said.err)
        if not works:
            assert "try " in said.err, (task, model, said.err)

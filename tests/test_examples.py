"""The programs of examples/: each runs with small sizes, without the network, and states its cost at real sizes."""

from __future__ import annotations

import ast
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
CORPUS = "\n".join(
    f"the {a} {verb} the {b}." for a in ("cat", "dog", "bird") for verb in ("sees", "hears") for b in ("fox", "tree")
)

Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """A function that runs an example as a script, in a folder of its own, and returns its output."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        capsys.readouterr()
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def save_model(architecture: str) -> str:
    """Save a small random model with a tokenizer in the folder `model`. Return its name."""
    pytest.importorskip("transformers")
    pytest.importorskip("torch")
    from tests.task_models import save, without_specials, wordpiece

    save(Path("model"), architecture, wordpiece() if "Bert" in architecture else without_specials())
    return "model"


def test_there_are_six_and_each_has_at_most_80_lines() -> None:
    assert len(EXAMPLES) == 6
    for path in EXAMPLES:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 80, path.name


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_its_docstring_has_a_command_and_the_cost(path: Path) -> None:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    assert f"python examples/{path.name}" in text
    cost = text.partition("Cost: ")[2]
    assert re.search(r"\d s\b", cost), "the cost in seconds"
    assert re.search(r"\d [MG]B\b", cost), "the cost in memory"
    assert path.name in (ROOT / "docs" / "README.md").read_text(encoding="utf-8"), "the index of docs names it"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
@pytest.mark.parametrize("count", [0, 9])
def test_another_number_of_arguments_prints_the_usage(path: Path, count: int, run: Run) -> None:
    text = path.read_text(encoding="utf-8")
    if count or not re.search(rf"python examples/{path.name} \[", text):  # [ARGUMENT] may be left out
        with pytest.raises(SystemExit, match=f"python examples/{path.name}"):
            run(path.name, *["x"] * count)


def test_a_model_of_ones_own(run: Run) -> None:
    out = run("own_model.py", "tiny", "numpy")
    assert "<compiled my_gpt on numpy: (tokens: i64[B, S]) -> " in out
    assert "S may be stepped" in out
    assert len(re.findall(r"\d+", out.partition("tokens: (")[2].partition(")")[0])) == 11
    assert float(out.rpartition("largest difference: ")[2]) < 1e-5


def test_a_folder_of_the_hub(run: Run) -> None:
    out = run("hub_folder.py", save_model("GPT2LMHeadModel"), "the cat", "numpy")
    plain, quantized = out.split("== ")[1:]
    assert plain.startswith("as stored: ") and "\nthe cat" in plain
    assert quantized.startswith("int8: ")
    found, without = map(float, re.findall(r"tokens: ([\d.]+), ([\d.]+) without", quantized)[0])
    assert 0.5 < found / without < 2


def test_training_from_scratch(run: Run) -> None:
    Path("corpus.txt").write_text(CORPUS * 4, encoding="utf-8")
    out = run("train_from_scratch.py", "corpus.txt", "tiny", "numpy")
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", out)]
    assert len(losses) == 6
    assert losses[0] == pytest.approx(5.54, abs=0.1), "ln 256 for random weights"
    assert losses[-1] < 2.5
    assert out.splitlines()[-1] and "the cat sees the" in out
    assert Path("trained.safetensors").stat().st_size > 100_000


def test_search_by_embeddings(run: Run) -> None:
    model = save_model("BertModel")
    Path("notes.txt").write_text(CORPUS, encoding="utf-8")
    out = run("embedding_search.py", model, "notes.txt", "the dog hears the fox.", "numpy")
    assert "12 texts as 24 numbers each" in out
    assert out.splitlines()[1] == "1.000  the dog hears the fox."
    assert "texts as" not in run("embedding_search.py", model, "notes.txt", "the cat", "numpy"), "cached vectors"
    Path("notes.txt").write_text(CORPUS.replace("fox", "owl"), encoding="utf-8")
    assert "12 texts as" in run("embedding_search.py", model, "notes.txt", "the cat", "numpy"), "other texts"


def test_a_server_with_the_client_of_openai(run: Run) -> None:
    for name in ("openai", "starlette", "uvicorn"):
        pytest.importorskip(name)
    out = run("openai_server.py", save_model("GPT2LMHeadModel"), "the cat", "numpy")
    assert re.search(r"^model at http://127\.0\.0\.1:\d+/v1 after ", out)
    assert "\nthe cat" in out and "\nstreamed: " in out
    assert "equal: True" in out
    assert out.endswith("exit status of the server: 0\n")


def test_a_rewrite_pass_of_ones_own(run: Run) -> None:
    out = run("own_pass.py", "tiny")
    assert "smallest without the pass: -inf" in out
    assert -1e4 < float(re.findall(r"smallest with the pass: (.*)", out)[0]) < -103
    assert re.search(r"^applied: fuse-log-of-softmax at log .*own_pass\.py:\d+$", out, re.MULTILINE)
    assert "refused: fuse-log-of-softmax at log: the softmax is over axis -2, not the last" in out
    assert "certificate: fuse-log-of-softmax" in out

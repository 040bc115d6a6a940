"""`treadle train` with a real trainer: trained models predict better, a run in two parts equals one run, and
transformers reads the saved models.
"""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
pytest.importorskip("treadle.training.trainer")

from tests.command_line import Treadle, commands_in
from tests.task_models import save, texts, without_specials, wordpiece
from treadle.resolving import resolve
from treadle.training.saving import saver_for

pytestmark = pytest.mark.usefixtures("quickly_planned")


@pytest.fixture
def treadle_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Treadle:
    """A function that runs commands in a folder with `gpt2`, `bert` and `texts.txt`."""
    save(tmp_path / "gpt2", "GPT2LMHeadModel", without_specials(), scale=1.0)
    save(tmp_path / "bert", "BertForMaskedLM", wordpiece(), scale=1.0)
    (tmp_path / "texts.txt").write_text("\n".join(texts(60, 5)), encoding="utf-8")
    capsys.readouterr()
    run = commands_in(tmp_path, capsys, monkeypatch)
    return lambda *words: run(*shlex.split(" ".join(words)))


HOW = "--length 16 --batch 4 --learning-rate 0.01 --holdout 0.1 --json"


def held_out(said: Any) -> tuple[float, float]:
    """Return the reported perplexity on held-out blocks before and after training."""
    assert said.code == 0, said.out + said.err
    found = said.json["held_out"]
    return found["before"]["perplexity"], found["after"]["perplexity"]


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_a_run_in_two_parts_is_the_same_as_a_whole_one_to_the_bit(treadle_command: Treadle, backend: str) -> None:
    how = f"train gpt2 texts.txt {HOW} --backend {backend} --gradient-accumulation-steps 2"
    before, after = held_out(treadle_command(how, "--steps 8 -o whole"))
    assert after < 0.8 * before
    held_out(treadle_command(how, "--steps 3 --state half"))
    assert held_out(treadle_command(how, "--steps 8 --resume half -o parts"))[1] == after
    whole, parts = (Path(name, "model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == parts != Path("gpt2", "model.safetensors").read_bytes()


def test_transformers_foretells_as_well_with_what_was_saved(treadle_command: Treadle) -> None:
    """Compare the reported loss on held-out blocks, which are the last blocks of the texts, with the loss that
    transformers computes with the saved model.
    """
    before, after = held_out(treadle_command(f"train gpt2 texts.txt {HOW} --steps 8 -o out"))
    tokenizer = transformers.AutoTokenizer.from_pretrained("out")
    ids = tokenizer(Path("texts.txt").read_text(encoding="utf-8"))["input_ids"]
    blocks = torch.tensor(ids[: len(ids) // 16 * 16]).reshape(-1, 16)
    last = blocks[len(blocks) - round(len(blocks) * 0.1) :]
    for folder, wanted in (("gpt2", before), ("out", after)):
        model = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
        with torch.no_grad():
            assert np.exp(float(model(last, labels=last).loss)) == pytest.approx(wanted, rel=1e-4)


def test_a_masked_model_fills_in_better(treadle_command: Treadle) -> None:
    how = f"train bert texts.txt {HOW} --objective masked-token --steps 40 --backend numpy -o out"
    before, after = held_out(treadle_command(how))
    assert after < 0.9 * before
    said = treadle_command("fill", "out", "[MASK]", "--json")
    assert said.code == 0 and said.json["mask"] == "[MASK]"


def test_weights_that_are_not_trained_stay_as_they_are(treadle_command: Treadle) -> None:
    from safetensors.numpy import load_file

    held_out(treadle_command(f"train gpt2 texts.txt {HOW} --steps 2 --train h.*.mlp.* -o out"))
    before, after = (load_file(Path(name, "model.safetensors")) for name in ("gpt2", "out"))
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed and all(".mlp." in name for name in changed)


def named_at_the_end(said: Any) -> list[str]:
    """Return the words of the command that the last lines of a training run name."""
    assert said.code == 0, said.out + said.err
    line = said.out.partition("load it by treadle ")[2].splitlines()[0]
    return shlex.split(line)


@pytest.mark.parametrize(
    ("model", "options", "command"),
    [("gpt2", "", "generate"), ("bert", "--objective masked-token", "fill"), ("bare", "--tokenizer gpt2", "generate")],
)
def test_the_command_at_the_end_fits_the_model_and_works(
    model: str, options: str, command: str, treadle_command: Treadle
) -> None:
    shutil.copytree("gpt2", "bare")
    Path("bare", "tokenizer.json").unlink()
    how = "--length 16 --batch 4 --steps 1 --backend numpy"
    words = named_at_the_end(treadle_command(f"train {model} texts.txt -o out {how} {options}"))
    assert words[0] == command
    done = treadle_command(shlex.join(words), "--backend numpy")
    assert done.code == 0, done.err


@pytest.mark.parametrize(
    ("architecture", "command"), [("BertForSequenceClassification", "classify"), ("BertModel", "inspect")]
)
def test_the_command_for_a_folder_saved_in_python_fits_its_class(
    architecture: str, command: str, treadle_command: Treadle
) -> None:
    save(Path("from"), architecture, wordpiece())
    resolved = resolve("from")
    loading = saver_for(resolved, "to").save(resolved.weights or {}).loading
    words = getattr(loading, "command", "").removeprefix("treadle ")
    assert words.startswith(f"{command} to")
    done = treadle_command(words)
    assert done.code == 0, done.err


def test_a_folder_without_a_tokenizer_is_inspected(tmp_path: Path) -> None:
    save(tmp_path / "from", "GPT2LMHeadModel", without_specials())
    (tmp_path / "from" / "tokenizer.json").unlink()
    resolved = resolve(tmp_path / "from")
    loading = saver_for(resolved, tmp_path / "to").save(resolved.weights or {}).loading
    assert getattr(loading, "command", "").startswith("treadle inspect ")

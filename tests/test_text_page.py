"""Examples in docs/text.md, run with small random folders under the names on the page."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("torch")
pytest.importorskip("tokenizers")
image_module = pytest.importorskip("PIL.Image")

from tests.task_models import save, wordpiece
from tests.test_image_tasks import labelled
from tests.test_readme import blocks, commands, run
from tests.test_rewriting import TASKS, saved

PAGE = "docs/text.md"


def make_pairs(place: Path) -> None:
    """Write a folder with a random CLIP and a WordPiece vocabulary."""
    tokenizer = wordpiece()
    text = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.sep_token_id, "max_position_embeddings": 40}
    sizes = {"hidden_size": 20, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 30}
    vision = {**sizes, "image_size": 224, "patch_size": 56}
    config = transformers.CLIPConfig(text_config={**text, **sizes}, vision_config=vision, projection_dim=8)
    transformers.CLIPModel(config).save_pretrained(place)
    tokenizer.save_pretrained(place)


def test_its_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "sentiment", "BertForSequenceClassification", wordpiece(), id2label={0: "bad", 1: "good"})
    save(tmp_path / "reader", "BertForQuestionAnswering", wordpiece())
    save(tmp_path / "names", "BertForTokenClassification", wordpiece(), id2label={0: "O", 1: "B-PER", 2: "B-LOC"})
    save(tmp_path / "masked", "BertForMaskedLM", wordpiece())
    labelled(tmp_path / "photos", "ViT", size={"height": 32, "width": 32})
    make_pairs(tmp_path / "pairs")
    saved(tmp_path / "translator", "t5", task_specific_params=TASKS)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)
    image_module.fromarray(pixels).save("cat.png")
    namespace: dict[str, object] = {}
    for code, expected in blocks(PAGE, "python"):
        said = run(code, namespace)
        assert said, code
        assert "\n  received  " not in said, said  # no TreadleError was printed
        if expected is not None:
            assert said == expected, code


def test_its_commands_take_the_options_that_are_shown() -> None:
    import typer

    from treadle.cli import app

    group = typer.main.get_command(app)
    shown = list(commands(PAGE))
    assert len(shown) > 8
    for words in shown:
        command = group.commands[words[0]]  # type: ignore[attr-defined]
        with command.make_context(words[0], list(words[1:])):
            pass

"""Text continued by a model and its tokenizer, as Hugging Face continues it; and the command line over it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from treadle.continuation import TextWriter
from treadle.ir.errors import CheckpointError, UsageError
from treadle.runtime.sampling import Sampling

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

TEXT = ["the cat sat on the mat and the dog sat on the log", "a café is a naïve façade", "what is the name of the cat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 with random weights and a byte-level tokenizer trained on a few lines."""
    place = tmp_path_factory.mktemp("model")
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(TEXT, vocab_size=300, special_tokens=["<end>"])
    made.save(str(place / "tokenizer.json"))
    torch.manual_seed(4)
    config = transformers.GPT2Config(
        vocab_size=made.get_vocab_size(), n_positions=40, n_embd=32, n_layer=2, n_head=4, eos_token_id=0, bos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4)  # far from uniform logits, so that a continuation says something
    model.save_pretrained(place)
    return place


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_greedy_continues_as_hugging_face_does(folder: Path, backend: str) -> None:
    model = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    writer = TextWriter.open(folder, backend=backend)
    assert writer.end == (0,)
    prompts = ["the cat", "a", "what is the name"]
    pieces = list(writer.continued(prompts, most=12))
    for row, prompt in enumerate(prompts):
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        mask = torch.ones_like(ids)
        wanted = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
        new = wanted[0, ids.shape[1] :].tolist()
        assert [p.id for p in pieces if p.row == row] == new
        assert "".join(p.text for p in pieces if p.row == row) == tokenizer.decode(new)


def test_text_streams_in_whole_characters(folder: Path) -> None:
    writer = TextWriter.open(folder)
    for seed in range(5):
        pieces = list(writer.continued(["a caf"], most=20, sampling=Sampling(temperature=2.0, seed=seed)))
        text = writer.tokenizer.text([p.id for p in pieces])
        assert "".join(p.text for p in pieces) == text
        assert not any("\N{REPLACEMENT CHARACTER}" in p.text for p in pieces if not p.last and p.text not in text)


def test_the_same_seed_writes_the_same_text(folder: Path) -> None:
    writer = TextWriter.open(folder)

    def written(seed: int) -> str:
        sampling = Sampling(temperature=1.5, top_k=50, top_p=0.95, seed=seed)
        return "".join(p.text for p in writer.continued(["the"], most=16, sampling=sampling))

    assert written(1) == written(1)
    assert len({written(seed) for seed in range(4)}) > 1


def test_a_prompt_that_fills_the_context_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="the model takes 40"):
        list(TextWriter.open(folder).continued(["the cat sat on the mat " * 20], most=1))


def test_an_end_token_that_is_no_id(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "zero"}')
    with pytest.raises(CheckpointError, match="eos_token_id must be a token's id"):
        TextWriter.open(tmp_path)


def test_the_command_prints_one_object(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from typer.testing import CliRunner

    from treadle.cli import app

    done = CliRunner().invoke(app, ["generate", str(folder), "the cat", "a", "--tokens", "5", "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    writer = TextWriter.open(folder)
    for row, text in enumerate(told["texts"]):
        wanted = [p for p in writer.continued(["the cat", "a"], most=5) if p.row == row]
        assert text["tokens"] == [p.id for p in wanted]
        assert text["text"] == "".join(p.text for p in wanted)
    refused = CliRunner().invoke(app, ["generate", str(folder), "x", "--temperature", "-1"])
    assert refused.exit_code == 2

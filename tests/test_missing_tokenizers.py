"""A folder without a tokenizer: the hint of the error, followed, gives a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
sentencepiece = pytest.importorskip("sentencepiece")

import treadle as t
from tests.task_models import byte_level
from treadle.frontends.text import TextTokenizer
from treadle.ir.errors import CheckpointError

SIZES = {
    "vocab_size": 400, "max_position_embeddings": 40, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16,
    "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": 2,
}  # fmt: skip


def refusal(folder: Path) -> CheckpointError:
    with pytest.raises(CheckpointError, match=r"the folder has no tokenizer\.json") as caught:
        t.load(folder).translate("the cat")
    return caught.value


def test_the_tokenizer_of_the_models_name_is_saved_there(tmp_path: Path) -> None:
    transformers.BartForConditionalGeneration(transformers.BartConfig(**SIZES)).save_pretrained(tmp_path / "model")
    error = refusal(tmp_path / "model")
    assert error.received == "no vocabulary"
    byte_level().save_pretrained(tmp_path / "named")
    assert error.hint is not None
    exec(error.hint.partition("\n")[2].replace("NAME OF THE MODEL", str(tmp_path / "named")))
    assert isinstance(t.load(tmp_path / "model").translate("the cat"), str)


@pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses:UserWarning")
def test_a_kind_that_transformers_cannot_convert(tmp_path: Path) -> None:
    """Marian's files are source.spm, target.spm and vocab.json."""
    folder = tmp_path / "model"
    transformers.MarianMTModel(transformers.MarianConfig(**SIZES)).save_pretrained(folder)
    lines = tmp_path / "lines.txt"
    lines.write_text("the cat sat on the mat\nthe dog sat on the log\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(lines), model_prefix=str(folder / "source"), vocab_size=30, hard_vocab_limit=False, minloglevel=2
    )
    (folder / "source.model").rename(folder / "source.spm")
    (folder / "target.spm").write_bytes((folder / "source.spm").read_bytes())
    pieces = sentencepiece.SentencePieceProcessor(str(folder / "source.spm"))
    names = ["</s>", "<unk>", *(pieces.id_to_piece(i) for i in range(3, len(pieces))), "<pad>"]
    (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"source_lang": "en", "target_lang": "de"}))
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    assert not (folder / "tokenizer.json").exists(), "transformers can write one now: the hint is no longer true"
    error = refusal(folder)
    assert error.received == "vocab.json, source.spm, target.spm"
    assert "put a tokenizer.json of the same model there" in (error.hint or "")
    byte_level().save_pretrained(tmp_path / "export")
    (folder / "tokenizer.json").write_bytes((tmp_path / "export" / "tokenizer.json").read_bytes())
    assert isinstance(t.load(folder).translate("the cat"), str)


def test_an_older_vocabulary_of_another_kind_is_converted(tmp_path: Path) -> None:
    """The hint names the folder itself."""
    byte_level().save_pretrained(tmp_path)
    vocabulary = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(" ".join(pair) for pair in vocabulary["merges"]))
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "config.json").write_text('{"model_type": "whisper"}')
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "WhisperTokenizer"}))
    with pytest.raises(CheckpointError, match=r"the folder has no tokenizer\.json") as caught:
        TextTokenizer.open(tmp_path)
    assert caught.value.hint is not None
    exec(caught.value.hint.partition("\n")[2])
    assert TextTokenizer.open(tmp_path).vocabulary()

"""More tokens than a model has positions are refused, with the maximum; every hint is followed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

from tests.task_models import byte_level
from treadle.cli import app
from treadle.frontends.text import TextTokenizer
from treadle.ir.errors import UsageError
from treadle.program.forms.folder_form import config_positions
from treadle.program.source import ModelSource

POSITIONS = 24
TEXT = "the cat sat on the mat and the dog sat on the log " * 8


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer: positions in a table, or rotary positions, whose number config.json declares."""
    place: Path = tmp_path_factory.mktemp(request.param)
    byte_level().save_pretrained(place)
    vocab = len(TextTokenizer.open(place).vocabulary())
    torch.manual_seed(0)
    if request.param == "gpt2":
        config = transformers.GPT2Config(vocab_size=vocab, n_positions=POSITIONS, n_embd=16, n_layer=1, n_head=2)
        transformers.GPT2LMHeadModel(config).save_pretrained(place)
    else:
        config = transformers.LlamaConfig(
            vocab_size=vocab,
            max_position_embeddings=POSITIONS,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
        transformers.LlamaForCausalLM(config).save_pretrained(place)
    (place / "generation_config.json").write_text("{}")
    (place / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    return place


COMMANDS: dict[str, tuple[list[str], str]] = {
    "generate": (["the cat", "--json"], "--tokens"),
    "chat": (["--json"], "--tokens"),
    "chat, all of it": (["--json"], "--context"),
    "perplexity": (["FILE", "--json"], "--window"),
    "train": (["FILE", "--steps", "1", "--batch", "2", "--backend", "numpy", "--json"], "--length"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_more_tokens_than_positions_are_refused_with_the_maximum(name: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    words, flag = COMMANDS[name]
    command = [name.split(",")[0], str(folder), *(str(tmp_path / "text.txt") if w == "FILE" else w for w in words)]
    run = CliRunner()
    said = run.invoke(app, [*command, flag, str(POSITIONS + 1)], input="the cat\n/quit\n")
    assert said.exit_code == 2, said.output
    error = json.loads(said.stdout)["error"]
    assert f"{POSITIONS}" in error["what"]
    assert error["received"].split()[0] == str(POSITIONS + 1)
    assert error["try"] == f"{flag} {POSITIONS}"
    said = run.invoke(app, [*command, *error["try"].split()], input="/quit\n")
    assert said.exit_code == 0, said.output


def test_defaults_apply_to_small_models(folder: Path) -> None:
    """The defaults are 32 tokens for a text, and 512 for a reply."""
    run = CliRunner()
    said = run.invoke(app, ["generate", str(folder), "the cat", "--json"])
    assert json.loads(said.stdout)["texts"][0]["ending"] in ("context", "end")
    assert run.invoke(app, ["chat", str(folder), "--json"], input="the cat\n").exit_code == 0


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        ({"max_position_embeddings": 2048}, 2048),
        ({"max_position_embeddings": 2048, "rope_scaling": None}, 2048),
        ({"max_position_embeddings": 2048, "rope_scaling": {"type": "linear", "factor": 4.0}}, 8192),
        ({"max_position_embeddings": 2048, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, 4096),
        ({"max_position_embeddings": 2048, "rope_scaling": {"type": "longrope", "long_factor": [1.0]}}, 2048),
        ({"max_position_embeddings": 131072, "rope_parameters": {"rope_type": "llama3", "factor": 32.0}}, 131072),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "su", "factor": 32.0}}, 4096),
        ({"max_position_embeddings": 32768, "rope_scaling": {"type": "yarn", "factor": 4.0}}, 131072),
        (
            {
                "max_position_embeddings": 256,
                "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
            },
            256,
        ),
        ({"max_position_embeddings": 2048, "rope_scaling": {"factor": float("inf")}}, 2048),
        ({"max_position_embeddings": 2048, "rope_scaling": "dynamic"}, 2048),
        ({"max_position_embeddings": "many"}, None),
        ({"max_position_embeddings": True}, None),
        ({"max_position_embeddings": -1}, None),
        ({}, None),
    ],
)
def test_the_positions_that_a_configuration_declares(config: dict[str, object], positions: int | None) -> None:
    assert config_positions(config) == positions


def test_a_declaration_declares_no_positions() -> None:
    assert ModelSource.open("llama").positions is None


def test_an_encoder_decoder_model(tmp_path: Path) -> None:
    import treadle as t

    byte_level().save_pretrained(tmp_path)
    vocab = len(TextTokenizer.open(tmp_path).vocabulary())
    config = transformers.BartConfig(
        vocab_size=vocab, max_position_embeddings=POSITIONS, d_model=16, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
        bos_token_id=0, eos_token_id=1, pad_token_id=2, decoder_start_token_id=1, forced_eos_token_id=1,
    )  # fmt: skip
    transformers.BartForConditionalGeneration(config).save_pretrained(tmp_path)
    model = t.load(tmp_path)
    with pytest.raises(UsageError, match=f"has {POSITIONS} positions") as caught:
        model.summarize("the cat", most=POSITIONS + 1)
    assert caught.value.hint == f"most={POSITIONS}"
    assert isinstance(model.summarize("the cat", most=POSITIONS), str)

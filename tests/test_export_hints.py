"""Hints of `treadle export`, followed on the command line: each leads to a file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("onnx")

import treadle
from tests.command_line import Result, Treadle, commands_in, refused
from tests.quantized_folders import bitsandbytes, compressed, compressed_settings, write_folder
from tests.test_model_exports import with_tokenizer
from treadle.cli import app

PLACES = {"FILE.onnx": "followed.onnx", "FILE.json": "followed.json"}


@pytest.fixture
def treadle_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Treadle:
    return commands_in(tmp_path, capsys, monkeypatch)


def save_llama(folder: str, tokenizer: str = "bytes", **config: object) -> None:
    sizes = {
        "vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **config})).save_pretrained(folder)
    with_tokenizer(Path(folder), tokenizer)


def hint_of(said: Result) -> str:
    (found,) = re.findall(r"^  try {7}(.*)$", said.err, re.MULTILINE)
    return str(found)


def followed(words: list[str], hint: str) -> list[list[str]]:
    """Return the command lines that a hint describes, up to `;`. An option of the hint replaces one of the command."""
    first = hint.partition(";")[0]
    for flag in re.findall(r"(?:leave out|and|without) (--[a-z-]+)", first):
        words = changed(words, flag)
    found = [words]
    for flag, values in re.findall(r"(--?[a-z-]+) ((?!-|and |with)[\w./-]+(?: or [\w./-]+)*)", first):
        found = [changed(each, flag, PLACES.get(value, value)) for each in found for value in values.split(" or ")]
    return found


def changed(words: list[str], flag: str, *value: str) -> list[str]:
    """Return a command line with another value of an option, or without the option."""
    at = words.index(flag) if flag in words else len(words)
    return [*words[:at], *words[at + 2 :], *([flag, *value] if value else [])]


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ("export ll8.treadle -o a.onnx", "encode: rounds computed values to blocks"),
        ("export ll8.treadle --to gguf -o a.gguf", "an artifact cannot be exported to gguf"),
        ("export ll8.treadle --to compressed-tensors -o a", "an artifact cannot be exported to compressed-tensors"),
        ("export ll4.treadle --to gguf -o a.gguf", "an artifact cannot be exported to gguf"),
        ("export q8.treadle -o a.onnx", "encode: rounds computed values to blocks"),
        ("export q8.treadle --to gguf -o a.gguf", "an artifact cannot be exported to gguf"),
        ("export q.gguf --quantize int8 -o a.onnx", "encode: rounds computed values to blocks"),
        ("export q.gguf --quantize int8 --to gguf -o a.gguf", "activations that are quantized at every call"),
        ("export ll --quantize int8 -o a.onnx", "encode: rounds computed values to blocks"),
        ("export ll --quantize int8 --to gguf -o a.gguf", "activations that are quantized at every call"),
        ("export ll --quantize int4-int8 --to compressed-tensors -o a", "activations that are quantized at every call"),
        ("export ll --to compressed-tensors -o a", "no weight is quantized"),
        ("export model.py:small --to gguf -o a.gguf", "only models of the Llama family"),
        ("export model.py:small --to gguf -o a.gguf --quantize int8", "only models of the Llama family"),
        ("export model.py:small --to compressed-tensors -o a --quantize int8", "compressed-tensors is a layout of"),
        ("export gemma2.gguf --to gguf -o a.gguf", "norm_place cannot be written to a GGUF file"),
        ("export gelu --to gguf -o a.gguf", "another activation than silu"),
        ("export narrow --to gguf -o a.gguf --quantize int8-weights", "layer.0.attn.q.weight cannot be written"),
        ("export nf4/quantized --to gguf -o a.gguf", "layer.0.attn.q.weight cannot be written to a GGUF file"),
        ("export groups/quantized --to gguf -o a.gguf", "layer.0.attn.q.weight cannot be written to a GGUF file"),
        (
            "export nf4/quantized --to compressed-tensors -o a",
            "layer.0.attn.q.weight cannot be written to a com",
        ),
        ("export ll --sizes B=1 -o a.onnx", "--backend, --target, --threads, --sizes, --times apply to other formats"),
        (
            "export ll --sizes B=1 --backend numpy --to gguf -o a.gguf",
            "--backend, --target, --threads, --sizes, --times apply",
        ),
        ("export ll --opset 20 --to gguf -o a.gguf", "--opset and --external-above apply to onnx only"),
        ("export ll --external-above 1 --opset 20 --to json -o a.json", "--opset and --external-above apply to onnx"),
        ("export model.py:small --to dot -o a.dot --times t.json", "--times needs --to model-explorer"),
        ("export model.py:small --to web -o page --backend numpy", "a page needs --backend tvm"),
        ("export model.py:small --to web -o page --target cuda", "a page needs --target webgpu"),
        ("export model.py:small -o a.onnx --opset 99", "ONNX export writes opsets"),
    ],
)
def test_the_hint_leads_to_a_file(words: str, what: str, treadle_command: Treadle) -> None:
    if "web" in words or "--times" in words:
        pytest.importorskip("tvm")
    given = words.split()
    model = given[1]
    save(model)
    said = treadle_command(*given)
    refused(said, what)
    hint = hint_of(said)
    if hint.startswith("the model that it was compiled from"):
        given[1] = "ll" if model.startswith("ll") else "q.gguf"
    commands = followed(given, hint)
    assert commands and words.split() not in commands
    for number, each in enumerate(commands):
        place = Path(each[each.index("-o") + 1])
        again = treadle_command(*each)
        assert again.code == 0, (hint, each, again.err)
        place.rename(f"{number}{place.suffix}")


@pytest.mark.parametrize(
    ("words", "command"),
    [
        ("export ll -o o.treadle --opset 20 --external-above 5 --seed 3", "compile ll -o o.treadle --seed 3"),
        ("export ll --to json -o o.treadle --sizes B=1 --dtype f32", "compile ll -o o.treadle --dtype f32"),
        ("export ll -o o.html --opset=18 --set layers=1", "report ll -o o.html --set layers=1"),
        ("report ll -o o.treadle --cache f16 --quantize int4", "compile ll -o o.treadle --quantize int4"),
        ("report ll -o o.onnx --memory 3MB --json", "export ll -o o.onnx --json"),
        ("compile ll -o o.onnx --backend numpy --threads 2 --dtype f32", "export ll -o o.onnx --dtype f32"),
        ("compile ll -o o.dot --memory 3MB --backend numpy --sizes B=1", "export --to dot ll -o o.dot --backend numpy"),
        ("export ll -o o.safetensors", "compile ll -o o.treadle"),
        ("export ll -o o.safetensors --quantize int4 --seed 3", "compile ll -o o.treadle --quantize int4 --seed 3"),
        ("export ll --output=o.bin --opset 18 --dtype f32", "compile ll --output=o.treadle --dtype f32"),
        ("report ll -o o.pt", "compile ll -o o.treadle"),
    ],
)
def test_the_name_of_another_format_leads_to_its_command(words: str, command: str, treadle_command: Treadle) -> None:
    """The command keeps the options that it has with the same meaning."""
    save("ll")
    said = treadle_command(*words.split())
    text = said.out if "--json" in words else said.err
    assert said.code == 2 and "must end in" in text
    (found,) = re.findall(r"treadle ([^:,\"]*)", text)
    assert found.strip() == command
    assert treadle_command(*command.split()).code == 0


def test_an_artifact_is_not_compiled_again(treadle_command: Treadle) -> None:
    refused(treadle_command("export", "a.treadle", "-o", "b.treadle"), "try       b.treadle.onnx")


def save(model: str) -> None:
    """Save one of the models of the commands."""
    if model.startswith("ll"):
        save_llama("ll")
        if model != "ll":
            treadle.compile("ll", quantize=f"int{model[2]}", backend="numpy").save(model)
    elif model.startswith("q"):  # a GGUF file with blocks of its own
        save_llama("ll")
        assert (
            CliRunner().invoke(app, ["export", "ll", "--to", "gguf", "--quantize", "int4", "-o", "q.gguf"]).exit_code
            == 0
        )
        if model != "q.gguf":
            treadle.compile("q.gguf", quantize="int8", backend="numpy").save(model)
    elif model == "gemma2.gguf":
        pytest.importorskip("gguf")
        from tests.test_gguf_families import write

        write(Path(model), "gemma2")
    elif model == "gelu":
        save_llama(model, hidden_act="gelu")
    elif model == "narrow":
        save_llama(model, hidden_size=48)
    elif model == "nf4/quantized":
        write_folder(Path("nf4"), bitsandbytes(), {"quant_method": "bitsandbytes", "load_in_4bit": True})
    elif model == "groups/quantized":
        settings = {"num_bits": 4, "strategy": "group", "group_size": 16}
        write_folder(Path("groups"), compressed(4, 16), compressed_settings("pack-quantized", **settings))


def test_a_folder_without_its_tokenizer_is_written(treadle_command: Treadle) -> None:
    save_llama("pieces", "words")
    said = treadle_command("export", "pieces", "--to", "gguf", "-o", "a.gguf")
    refused(said, "the tokenizer cannot be written to a GGUF file")
    assert hint_of(said).endswith("or a folder without its tokenizer")
    for file in Path("pieces").glob("tokenizer*"):
        file.unlink()
    assert treadle_command("export", "pieces", "--to", "gguf", "-o", "a.gguf").code == 0

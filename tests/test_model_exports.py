"""Export of quantized models to GGUF, compressed-tensors and ONNX: each format holds the model's own integers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import treadle
from treadle.cli import app
from treadle.exporting.gguf_blocks_of import gguf_blocks, gguf_type
from treadle.files.errors import TreadleError
from treadle.frontends.gguf_file import GGUFFile
from treadle.ir.encodings.encoding import Encoding, parse_encoding
from treadle.ir.encodings.plain_integers import integer_parts
from treadle.ir.errors import UsageError
from treadle.program.source import ModelSource

Array = np.ndarray[Any, Any]

VOCAB = 300
TOKENS = np.array([[1, 5, 9, 33, 2, 7]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with grouped heads, and a byte-level BPE tokenizer."""
    made = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(made)
    with_tokenizer(made)
    return made


def with_tokenizer(folder: Path, kind: str = "bytes") -> None:
    tokenizers = pytest.importorskip("tokenizers")
    if kind == "bytes":
        made = tokenizers.Tokenizer(tokenizers.models.BPE())
        made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = tokenizers.decoders.ByteLevel()
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=280, special_tokens=["<s>", "</s>"], initial_alphabet=sorted(alphabet)
        )
    else:
        made = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
        trainer = tokenizers.trainers.WordPieceTrainer(vocab_size=40, special_tokens=["[UNK]"])
    made.train_from_iterator(["the capital of France is Paris", "the cat sat on the mat"] * 4, trainer)
    made.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": "{{ messages[0]['content'] }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings if kind == "bytes" else {}))


def export(model: Path | str, output: Path, *options: str) -> Any:
    result = CliRunner().invoke(app, ["export", str(model), "-o", str(output), *options, "--json"])
    assert result.exit_code == 0, result.output + str(result.exception)
    return json.loads(result.stdout)


def refused(model: Path | str, output: Path, *options: str) -> str:
    result = CliRunner().invoke(app, ["export", str(model), "-o", str(output), *options])
    assert result.exit_code != 0
    assert not output.exists()
    return result.output + (result.stderr if result.stderr_bytes else "")


def logits(model: Path | str, **options: Any) -> Array:
    exe = treadle.compile(model, backend="numpy", **options)
    return np.asarray(exe(tokens=TOKENS).logits)


def integers(model: Path | str, **options: Any) -> dict[str, Array]:
    """Return the integers of each quantized weight, with q and k in Hugging Face's order of rows, by parameter."""
    exe = treadle.compile(model, backend="numpy", **options)
    found = {}
    for name, value in exe.graph.parameters.items():
        if value.type.encoding is not None:
            parts = integer_parts(value.type.encoding, np.asarray(exe.weights[name]))
            assert parts is not None
            found[name] = parts.q
    return found


def apart(name: str, rows: Array) -> Array:
    """Return rows of q and k with the two halves of a head apart, from Llama's order in GGUF files."""
    part = name.split(".")[-2]
    if part not in ("q", "k"):
        return rows
    pairs = rows.reshape({"q": 4, "k": 2}[part], -1, 2, rows.shape[-1])
    return np.swapaxes(pairs, 1, 2).reshape(rows.shape)


# -- GGUF -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["int4", "int8-weights"])
def test_a_gguf_file_holds_the_same_integers(scheme: str, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    report = export(folder, path, "--to", "gguf", "--quantize", scheme)
    assert report["files"] == [str(path)]
    notes = [note for note in report["notes"] if "rounded to float16 (q8_0), the integers are unchanged" in note]
    assert len(notes) == len(report["notes"]) == (1 if scheme == "int4" else 15)
    expected, found = integers(folder, quantize=scheme), integers(path)
    assert expected.keys() == found.keys()
    for name, q in expected.items():
        np.testing.assert_array_equal(apart(name, found[name]), q, err_msg=name)
    np.testing.assert_allclose(logits(path), logits(folder, quantize=scheme), atol=5e-4)
    forms = {record.blocks for record in map(GGUFFile.open(path).record, GGUFFile.open(path).names())}
    assert forms == ({"q4_0", "q8_0", "f32"} if scheme == "int4" else {"q8_0", "f32"})
    again = tmp_path / "again.gguf"
    export(folder, again, "--to", "gguf", "--quantize", scheme)
    assert again.read_bytes() == path.read_bytes()


def test_a_model_without_quantized_weights_is_written_in_float32(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    export(folder, path, "--to", "gguf")
    np.testing.assert_allclose(logits(path), logits(folder), atol=1e-5)


def test_the_library_reads_the_same_blocks(folder: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "m.gguf"
    export(folder, path, "--to", "gguf", "--quantize", "int4")
    read = gguf.GGUFReader(path)
    own = GGUFFile.open(path)
    assert {each.name for each in read.tensors} == set(own.names())
    for each in read.tensors:
        numbers = gguf.dequantize(each.data, each.tensor_type)
        np.testing.assert_array_equal(numbers.reshape(own.record(each.name).shape), own.array(each.name))
    assert read.fields["general.architecture"].contents() == "llama"
    assert read.fields["llama.attention.head_count_kv"].contents() == 2


def test_the_tokenizer_and_the_chat_template_are_carried(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    export(folder, path, "--to", "gguf")
    ours, theirs = ModelSource.open(path), ModelSource.open(folder)
    text = "The cat's capital, 1234 of France </s>"
    ids = [[int(n) for n in source.tokenizer().batch([text]).ids[0]] for source in (ours, theirs)]
    assert ids[0] == ids[1]
    assert ours.chat_template == theirs.chat_template
    assert ours.end_tokens == (1,)
    assert ours.positions == 256


def test_a_gguf_file_is_exported_with_its_own_blocks(folder: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "a.gguf", tmp_path / "b.gguf"
    export(folder, first, "--to", "gguf", "--quantize", "int4")
    assert export(first, second, "--to", "gguf")["notes"] == []
    a, b = GGUFFile.open(first), GGUFFile.open(second)
    assert list(a.names()) == list(b.names())
    for name in a.names():
        np.testing.assert_array_equal(a.array(name), b.array(name))


@pytest.mark.parametrize(
    ("encoding", "type"),
    [
        ("int4_groups(32)", "q4_0"),
        ("int4_groups(128)", "q4_0"),
        ("int8_groups(64)", "q8_0"),
        ("int8_rows", "q8_0"),
        ("uint4_groups(64)", "q4_1"),
        ("uint4_wide_groups(32)", "q4_1"),
        ("q6_k", "q6_k"),
    ],
)
def test_forms_as_gguf_types(encoding: str, type: str) -> None:
    of, rng = parse_encoding(encoding), np.random.default_rng(0)
    held = of.sample(rng, (4, 256))
    if encoding.startswith("uint4"):  # zero points of checkpoints are integers
        record = held.view(of.block.record(of.elements(256)))
        record["zero"] = rng.integers(0, 16, record["zero"].shape)
    assert gguf_type("w", of, 256) == type
    numbers, blocks = of.decode(held), gguf_blocks("w", of, held)
    made = Encoding(type).decode(blocks)
    if encoding.startswith("int4") or type == encoding:
        np.testing.assert_array_equal(made, numbers)
    np.testing.assert_allclose(made, numbers, rtol=2e-3, atol=2e-3 * np.abs(numbers).max())


@pytest.mark.parametrize(
    ("encoding", "why"),
    [
        ("int4_groups(16)", "GGUF's blocks have 32 elements"),
        ("nf4_groups(64)", "GGUF has no such type"),
        ("int8_zero_groups(64)", "GGUF has no such type"),
        ("int4_groups(32, axis=0)", "its blocks are not along its rows"),
    ],
)
def test_forms_that_gguf_lacks_are_refused(encoding: str, why: str) -> None:
    with pytest.raises(UsageError, match="cannot be written to a GGUF file") as error:
        gguf_type("layer.0.attn.q.weight", parse_encoding(encoding), 256)
    assert why in error.value.what


def test_models_that_gguf_cannot_hold_are_refused(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "m.gguf"
    assert "only models of the Llama family" in refused("gpt2", output, "--to", "gguf")
    quantized = refused(folder, output, "--to", "gguf", "--quantize", "int8")
    assert "activations that are quantized at every call" in quantized
    pieces = tmp_path / "pieces"
    pieces.mkdir()
    for file in folder.iterdir():
        (pieces / file.name).write_bytes(file.read_bytes())
    with_tokenizer(pieces, "words")
    assert "it is not byte-level BPE" in refused(pieces, output, "--to", "gguf")
    config = json.loads((pieces / "config.json").read_text())
    (pieces / "config.json").write_text(json.dumps({**config, "hidden_act": "gelu"}))
    assert "another activation than silu" in refused(pieces, output, "--to", "gguf")


def test_llama_cpp_computes_the_same(folder: Path, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    path = tmp_path / "m.gguf"
    export(folder, path, "--to", "gguf", "--quantize", "int4")
    model = llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, verbose=False)
    model.eval(TOKENS[0].tolist())
    theirs, ours = np.asarray(model.scores[: TOKENS.shape[1]], np.float64), logits(folder, quantize="int4")[0]
    cosine = (theirs * ours).sum(axis=-1) / np.sqrt((theirs**2).sum(axis=-1) * (ours.astype(float) ** 2).sum(axis=-1))
    assert cosine.min() >= 0.999


# -- compressed-tensors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["int4", "int8-weights"])
def test_a_compressed_folder_holds_the_same_integers(scheme: str, folder: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    report = export(folder, made, "--to", "compressed-tensors", "--quantize", scheme)
    assert report["files"][-1] == str(made / "config.json")
    assert (made / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    expected, found = integers(folder, quantize=scheme), integers(made)
    assert expected.keys() == found.keys()
    for name, q in expected.items():
        np.testing.assert_array_equal(found[name], q, err_msg=name)
    np.testing.assert_array_equal(logits(made), logits(folder, quantize=scheme))
    settings = json.loads((made / "config.json").read_text())["quantization_config"]
    assert settings["format"] == ("mixed-precision" if scheme == "int4" else "int-quantized")


def test_transformers_reads_the_folder(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    for scheme in ("int4", "int8-weights"):
        made = tmp_path / scheme
        export(folder, made, "--to", "compressed-tensors", "--quantize", scheme)
        model = transformers.AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32)
        with torch.no_grad():
            theirs = model(torch.tensor(TOKENS)).logits.numpy()
        np.testing.assert_allclose(theirs, logits(folder, quantize=scheme), atol=1e-4)


def test_a_tied_table_is_decoded_with_a_note(tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    folder, made = tmp_path / "tied", tmp_path / "made"
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    (note,) = export(folder, made, "--to", "compressed-tensors", "--quantize", "int4")["notes"]
    assert note == "model.embed_tokens.weight is decoded from int8_rows: rows of it are looked up"
    np.testing.assert_allclose(logits(made), logits(folder, quantize="int4"), atol=1e-5)


def test_folders_that_compressed_tensors_cannot_hold_are_refused(folder: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    to = ("--to", "compressed-tensors")
    assert "a layout of Hugging Face folders" in refused("gpt2", made, *to)
    assert "no weight is quantized" in refused(folder, made, *to)
    assert "activations that are quantized" in refused(folder, made, *to, "--quantize", "int8")
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "a").write_text("")
    result = CliRunner().invoke(app, ["export", str(folder), "-o", str(taken), *to, "--quantize", "int4"])
    assert result.exit_code == 2
    assert list(taken.iterdir()) == [taken / "a"]


# -- ONNX -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["int4", "int8-weights"])
def test_an_onnx_file_holds_the_same_integers(scheme: str, folder: Path, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    path = tmp_path / "m.onnx"
    export(folder, path, "--quantize", scheme)
    proto = onnx.load(path)
    onnx.checker.check_model(proto)
    stored = {each.name: onnx.numpy_helper.to_array(each) for each in proto.graph.initializer}
    expected = integers(folder, quantize=scheme)
    for name, q in expected.items():
        np.testing.assert_array_equal(np.asarray(stored[f"{name}_quantized"]).astype(np.int8), q, err_msg=name)
    options = runtime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # float32 sums
    (theirs,) = runtime.InferenceSession(path, options).run(None, {"tokens": TOKENS})
    ours = logits(folder, quantize=scheme)
    np.testing.assert_allclose(theirs, ours, atol=1e-3)
    again = treadle.compile(path, backend="numpy")
    found = {k: v for k, v in integers(path).items() if not k.endswith("scale")}
    assert len(found) == len(expected)
    np.testing.assert_allclose(np.asarray(again(tokens=TOKENS)["logits"]), ours, atol=1e-4)


@pytest.mark.parametrize(("opset", "count"), [(13, 1), (20, 1), (21, 15)])
def test_groups_need_opset_21(opset: int, count: int, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    report = export(folder, tmp_path / "m.onnx", "--quantize", "int4", "--opset", str(opset))
    assert report["operators"]["DequantizeLinear"] == count


def test_an_imported_quantized_model_is_exported_with_its_nodes(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from tests.test_onnx_quantized import I8, rounded_product, unoptimized

    first, second = tmp_path / "a.onnx", tmp_path / "b.onnx"
    onnx.save(rounded_product(I8), first)
    report = export(first, second)
    assert report["operators"]["QuantizeLinear"] == 1
    assert report["operators"]["DequantizeLinear"] == 2
    x = np.random.default_rng(0).standard_normal((2, 3, 64)).astype(np.float32)
    a, b = (unoptimized(onnx.load(path), {"x": x})["y"] for path in (first, second))
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_unknown_formats_and_artifacts_are_refused(folder: Path, tmp_path: Path) -> None:
    assert "unknown format 'ggml'" in refused(folder, tmp_path / "m.ggml", "--to", "ggml")
    assert "must end in .gguf" in refused(folder, tmp_path / "m.bin", "--to", "gguf")
    treadle.compile(folder, backend="numpy").save(tmp_path / "m.treadle")
    with pytest.raises(TreadleError):
        treadle.compile(tmp_path / "m.gguf")
    assert "an artifact cannot be exported to gguf" in refused(
        tmp_path / "m.treadle", tmp_path / "m.gguf", "--to", "gguf"
    )

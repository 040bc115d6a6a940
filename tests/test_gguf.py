"""GGUF files: small models written by the library give Hugging Face's results; damaged files are refused with the
field's name.
"""

from __future__ import annotations

import copy
import io
import struct
import tracemalloc
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from treadle.backends.registry import backend_names
from treadle.files.mapped_files import is_mapped
from treadle.frontends.gguf_file import GGUFFile
from treadle.frontends.gguf_header import GGUFLimits
from treadle.frontends.rotary import Divided, LinearScaling
from treadle.ir.encodings.encoding import Encoding
from treadle.ir.errors import CheckpointError
from treadle.models.reading.llama_gguf import from_gguf
from treadle.resolving import resolve

pytest.importorskip("gguf")
pytest.importorskip("tokenizers")
pytest.importorskip("torch")
pytest.importorskip("transformers")

import gguf
import torch
import transformers

from tests.fuzz.gguf_files import MERGES, Sizes, judge, mutations, tensors, vocabulary, write_model
from tests.test_huggingface_models import TOLERANCE, prepare
from tests.test_sentencepiece import sentences
from treadle.frontends.vocabularies.gguf_tokenizer import build_gguf_tokenizer, gguf_end_tokens, gguf_text_tokenizer

Array = np.ndarray[Any, Any]

SIZES = Sizes()

HF_NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def hugging_face(weights: Mapping[str, Array], sizes: Sizes, kind: str, **options: Any) -> Any:
    """Return Hugging Face's model, and weights under GGUF's names."""
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(vocabulary()), hidden_size=sizes.dim, intermediate_size=sizes.hidden,
        num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads, num_key_value_heads=sizes.kv_heads,
        tie_word_embeddings=True, **options,
    )  # fmt: skip
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    state = {}
    for name, weight in weights.items():
        *block, ours, part = name.split(".")
        if ours in ("attn_q", "attn_k") and kind == "Llama":  # undo llama.cpp's permutation
            pairs = weight.reshape(-1, sizes.head_dim // 2, 2, *weight.shape[1:])
            weight = pairs.swapaxes(1, 2).reshape(weight.shape)
        place = f"model.layers.{block[1]}." if block else ""
        state[f"{place}{HF_NAMES[ours]}.{part}"] = torch.from_numpy(np.array(weight))
    model.load_state_dict({**state, "lm_head.weight": state["model.embed_tokens.weight"]})
    return model


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Return the path of a complete file."""
    path = tmp_path / "small.gguf"
    write_model(path, SIZES, tensors(SIZES), "Q4_1")
    return path


# -- the same numbers ------------------------------------------------------------------------------------------


def assert_same(path: Path, theirs: Any, runner: str) -> None:
    """Compare in float64. If random blocks are ill-conditioned, allow four times the error of Hugging Face's
    model in float32: these errors depend on the CPU's order of summation.
    """
    exact = copy.deepcopy(theirs).double()
    resolved = resolve(path)
    assert resolved.unused == ()
    assert resolved.weights is not None
    run = prepare(runner, resolved.graph, resolved.weights)
    for shape in ((1, 1), (3, 7), (2, 24)):
        tokens = np.random.default_rng(shape).integers(0, len(vocabulary()), shape)
        with torch.no_grad():
            rounded, expected = (m(input_ids=torch.from_numpy(tokens)).logits.numpy() for m in (theirs, exact))
        ours = run(tokens=tokens)["logits"]
        allowed = max(TOLERANCE * np.abs(expected).max(), 4 * np.abs(rounded - expected).max())
        assert np.abs(ours - expected).max() < allowed


@pytest.mark.parametrize("runner", ["interpreter", *backend_names()])
@pytest.mark.parametrize("blocks", ["F32", "F16", "BF16", "Q4_1", "Q8_0"])
def test_llama_equals_hugging_face(tmp_path: Path, blocks: str, runner: str) -> None:
    path = tmp_path / "model.gguf"
    write_model(path, SIZES, tensors(SIZES), blocks)
    file = GGUFFile.open(path)
    stored = {name: file.array(name).astype(np.float32) for name in file.names()}
    assert_same(path, hugging_face(stored, SIZES, "Llama"), runner)


def test_qwen2_equals_hugging_face(tmp_path: Path) -> None:
    """q, k and v have biases, and rows are in Hugging Face's order."""
    sizes = Sizes(architecture="qwen2", base=1e6)
    weights = tensors(sizes)
    for i in range(sizes.layers):
        for n, part in enumerate("qkv"):
            rows = weights[f"blk.{i}.attn_{part}.weight"].shape[0]
            weights[f"blk.{i}.attn_{part}.bias"] = np.random.default_rng([i, n]).normal(size=rows).astype(np.float32)
    path = tmp_path / "model.gguf"
    write_model(path, sizes, weights)
    theirs = hugging_face(weights, sizes, "Qwen2", rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    assert_same(path, theirs, "torch")


def test_frequencies_in_a_tensor(tmp_path: Path) -> None:
    """Llama 3.1 and later: llama.cpp writes the factors of the frequencies to a separate tensor."""
    scaling = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    theirs = hugging_face(tensors(SIZES), SIZES, "Llama", rope_parameters=scaling)
    plain = 10000.0 ** (-np.arange(0, SIZES.head_dim, 2) / SIZES.head_dim)
    factors = (plain / theirs.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
    assert np.unique(factors.round(3)).size == 3  # factors of unchanged, intermediate and slowed frequencies
    path = tmp_path / "model.gguf"
    write_model(path, SIZES, {**tensors(SIZES), "rope_freqs.weight": factors})
    assert_same(path, theirs, "torch")
    model = resolve(path).model
    assert model is not None
    assert model.config["scaling"] == Divided(tuple(factors.tolist()))

    write_model(path.with_stem("wrong"), SIZES, {**tensors(SIZES), "rope_freqs.weight": factors * 0})
    with pytest.raises(CheckpointError, match=r"rope_freqs.weight must be a factor for each pair"):
        resolve(path.with_stem("wrong"))


@pytest.mark.parametrize("runner", ["interpreter", *backend_names()])
def test_blocks_are_kept_as_the_file_has_them(small: Path, runner: str) -> None:
    file, kept, wide = GGUFFile.open(small), resolve(small), resolve(small, widen="blocks")
    assert kept.weights is not None
    assert wide.weights is not None
    for name, value in kept.graph.parameters.items():
        if value.type.rank == 2:
            assert str(value.type).endswith("as q4_1")
            assert kept.weights[name].dtype == np.uint8
            assert is_mapped(kept.weights[name])
            assert not kept.weights[name].flags.writeable
            np.testing.assert_array_equal(Encoding("q4_1").decode(kept.weights[name]), wide.weights[name])
    held = file.block_bytes("blk.0.ffn_down.weight")
    assert np.shares_memory(held, file.raw("blk.0.ffn_down.weight"))
    assert {v.type.encoding for v in wide.graph.parameters.values()} == {None}
    tokens = np.array([[3, 1, 4, 1, 5]])
    runs = [prepare(runner, each.graph, each.weights)(tokens=tokens)["logits"] for each in (kept, wide)]
    np.testing.assert_allclose(runs[0], runs[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("form", "field"), [("q4_1", "d"), ("q4_1", "m"), ("q8_0", "d"), ("q6_k", "d")])
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_a_block_whose_scale_is_no_number_is_named(tmp_path: Path, form: str, field: str, wrong: float) -> None:
    sizes = Sizes(layers=1, dim=256, hidden=512)
    blocks = {
        n: w if w.ndim < 2 else Encoding(form).sample(np.random.default_rng(0), w.shape)
        for n, w in tensors(sizes).items()
    }
    record = Encoding(form).block.record(Encoding(form).elements(256))
    name = "blk.0.attn_q.weight"
    blocks[name].reshape(-1).view(record)[field][7] = wrong
    path = tmp_path / "model.gguf"
    write_model(path, sizes, blocks, held={n: form for n, b in blocks.items() if b.dtype == np.uint8})
    at = GGUFFile.open(path).record(name).begin + 7 * record.itemsize
    with pytest.raises(
        CheckpointError, match=f"scale is NaN or infinite(.|\n)*byte {at}, block 7 of {form}, tensor {name}"
    ):
        resolve(path)


def test_k_quants_of_several_kinds_in_one_file(tmp_path: Path) -> None:
    """llama.cpp's mixtures: layers whose v is stored in more bits are separate functions."""
    sizes = Sizes(layers=2, dim=256, hidden=512)
    rng = np.random.default_rng(1)
    kinds = {"blk.1.attn_v.weight": "q6_k", "blk.0.ffn_down.weight": "q5_k", "token_embd.weight": "q3_k"}
    blocks, numbers = {}, {}
    for name, weight in tensors(sizes).items():
        encoding = Encoding(kinds.get(name, "q4_k")) if weight.ndim == 2 else None
        blocks[name] = weight if encoding is None else encoding.sample(rng, weight.shape)
        numbers[name] = weight if encoding is None else encoding.decode(blocks[name])
    path = tmp_path / "model.gguf"
    held = {name: kinds.get(name, "q4_k") for name, block in blocks.items() if block.dtype == np.uint8}
    write_model(path, sizes, blocks, held=held)
    resolved = resolve(path)
    assert list(resolved.graph.functions) == ["layer", "layer_2", "main"]
    assert str(resolved.graph.parameters["layer.1.attn.v.weight"].type).endswith("as q6_k")
    assert_same(path, hugging_face(numbers, sizes, "Llama"), "interpreter")
    assert_same(path, hugging_face(numbers, sizes, "Llama"), "torch")


def test_types_of_blocks_are_kept(small: Path) -> None:
    resolved = resolve(small)
    assert set(resolved.blocks) == set(resolved.graph.parameters)
    assert resolved.blocks["layer.1.attn.q.weight"] == "q4_1"
    assert resolved.blocks["norm.weight"] == "f32"
    assert str(GGUFFile.open(small).record("blk.0.attn_q.weight")) == "f32[32, 32] stored as q4_1"


# -- the vocabulary --------------------------------------------------------------------------------------------


def test_vocabulary(small: Path) -> None:
    file = GGUFFile.open(small)
    tokenizer = build_gguf_tokenizer(file)
    known = vocabulary()
    assert [known[i] for i in tokenizer.encode("the in<|end|>").ids] == ["t", "he", "Ġ", "in", "<|end|>"]
    assert [known[i] for i in tokenizer.encode(" the").ids] == ["Ġthe"]
    assert tokenizer.decode(tokenizer.encode("naïve 42 你好").ids) == "naïve 42 你好"
    assert gguf_end_tokens(file) == (0,)
    assert gguf_text_tokenizer(file, max_tokens=3).batch(["the the the"]).lengths.tolist() == [3]


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("default", "It|'|S|Ġ12345|,|Ġ(|ok|)|ĊĊĠ|Ġlet|'s"),
        ("gpt-2", "It|'|S|Ġ12345|,|Ġ(|ok|)|ĊĊĠ|Ġlet|'s"),
        ("smollm", "It|'|S|Ġ|1|2|3|4|5|,|Ġ(|ok|)|ĊĊĠ|Ġlet|'s"),
        ("llama-bpe", "It|'S|Ġ|123|45|,|Ġ(|ok|)ĊĊ|Ġ|Ġlet|'s"),
        ("qwen2", "It|'S|Ġ|1|2|3|4|5|,|Ġ(|ok|)ĊĊ|Ġ|Ġlet|'s"),
    ],
)
def test_text_is_cut_as_the_file_names_it(tmp_path: Path, pre: str, pieces: str) -> None:
    write_model(tmp_path / "model.gguf", SIZES, {}, pre=pre)
    made = build_gguf_tokenizer(GGUFFile.open(tmp_path / "model.gguf"))
    found = made.pre_tokenizer.pre_tokenize_str("It'S 12345, (ok)\n\n  let's")
    assert "|".join(piece for piece, _ in found) == pieces


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("h e", b"h_e", "tokenizer.ggml.merges must hold two tokens each"),
        ("h e", b"h \x01", "the vocabulary is damaged"),
        ("smollm", b"smolll", "tokenizer.ggml.pre is not known"),
        ("gpt2", b"gpt3", "tokenizer.ggml.model is a vocabulary that is not supported yet"),
        ("<|end|>", b"<|end|\xff", "a string of tokenizer.ggml.tokens is not UTF-8"),
        ("h", b"e", "tokenizer.ggml.tokens holds a token twice"),
    ],
)  # fmt: skip
def test_damaged_vocabulary(small: Path, old: str, new: bytes, what: str) -> None:
    data = small.read_bytes()
    other = small.with_stem("other")
    other.write_bytes(data.replace(string(old.encode()), string(new), 1))
    assert other.read_bytes() != data
    with pytest.raises(CheckpointError) as caught:
        build_gguf_tokenizer(GGUFFile.open(other))
    assert what in caught.value.what
    assert "key tokenizer.ggml" in (caught.value.within or "")


# -- files that do not fit -------------------------------------------------------------------------------------


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def header(*entries: bytes, keys: int | None = None, count: int = 0, version: int = 3) -> bytes:
    """Return the start of a file; the last `count` entries are tensors."""
    keys = len(entries) - count if keys is None else keys
    return b"GGUF" + struct.pack("<IQQ", version, count, keys) + b"".join(entries)


def tensor(name: bytes, sizes: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


KEY = string(b"k") + struct.pack("<I", 4) + struct.pack("<I", 7)
ALIGNMENT = string(b"general.alignment") + struct.pack("<II", 4, 48)


@pytest.mark.parametrize(
    ("data", "what", "place"),
    [
        (b"", "not a GGUF file", "byte 0, magic"),
        (b"GGML" + bytes(40), "not a GGUF file", "byte 0, magic"),
        (b"GGUF\x03", "the file ends too early", "byte 4, version"),
        (header(version=1), "this version of the format is not supported", "byte 4, version"),
        (header(version=3 << 24), "this version of the format is not supported", "byte 4, version"),
        (header(keys=2**63), "more keys than the limit", "byte 16, number of keys"),
        (header(count=0, keys=5), "the file ends too early", "byte 24, key 0 of 5"),
        (header(KEY, KEY), "a key appears twice", "byte 41, key k"),
        (header(string(b"\xff") + KEY[9:]), "a name is not UTF-8", "byte 32, key 0 of 1"),
        (header(string(b"k") + struct.pack("<I", 99)), "there is no such value type", "byte 33, key k"),
        (header(string(b"k") + struct.pack("<IB", 7, 2)), "a bool is neither 0 nor 1", "byte 37, key k"),
        (header(string(b"k") + struct.pack("<IQ", 8, 2**60)), "the file ends too early", "byte 45, key k"),
        (header(string(b"k") + struct.pack("<IIQ", 9, 0, 2**60)), "the file ends too early", "byte 49, key k"),
        (header(string(b"k") + struct.pack("<IIQ", 9, 8, 2**60)), "the file ends too early", "byte 41, key k"),
        (header(string(b"k") + struct.pack("<IIQ", 9, 9, 1)), "an array holds arrays", "byte 37, key k"),
        (header(ALIGNMENT), "the alignment must be a power of two", "byte 53, key general.alignment"),
        (header(tensor(b"t", ()), count=1), "a tensor has 1 to 4 dimensions", "byte 33, tensor t"),
        (header(tensor(b"t", (1, 1, 1, 1, 1)), count=1), "a tensor has 1 to 4 dimensions", "byte 33, tensor t"),
        (header(tensor(b"t", (0,)), count=1), "a tensor's sizes must be positive", "byte 37, tensor t"),
        (header(tensor(b"t", (2**40, 2**40)), count=1), "their product below 2^60", "byte 45, tensor t"),
        (header(tensor(b"t", kind=99), count=1), "there is no such block type", "byte 45, tensor t"),
        (header(tensor(b"t", (33,), kind=3), count=1), "rows of 33 are not whole blocks of 32", "byte 45, tensor t"),
        (header(tensor(b"t", offset=32), count=1), "not begin where the previous tensor ends", "byte 49, tensor t"),
        (header(tensor(b"t"), tensor(b"t", offset=32), count=2), "a tensor's name appears twice", "byte 57, tensor t"),
        (header(tensor(b"t", (2**50,)), count=1), "the file ends before its tensors do", "byte 49, tensor t"),
        (header(tensor(b"t"), count=1), "the file ends before its tensors do", "byte 49, tensor t"),
    ],
)  # fmt: skip
def test_refusals(tmp_path: Path, data: bytes, what: str, place: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        GGUFFile.open(path)
    assert what in caught.value.what
    assert caught.value.within == f"{path}: {place}"


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("general.architecture", "mamba", "general.architecture is not supported"),
        ("general.type", "adapter", "general.type is that of an adapter, which changes the weights of a model"),
        ("llama.block_count", 3, "llama.block_count is larger than the file's number of tensors allows"),
        ("llama.block_count", 2**31, "llama.block_count must be an integer from 1 to 1000"),
        ("llama.attention.head_count", 5, "llama.attention.head_count_kv must divide"),
        ("llama.attention.head_count_kv", 3, "llama.attention.head_count_kv must divide the number of heads"),
        ("llama.attention.head_count", 6, "llama.attention.head_count must divide the embedding's length"),
        ("llama.attention.value_length", 5, "llama.attention.value_length must equal key_length"),
        ("llama.rope.dimension_count", 7, "llama.rope.dimension_count must be an even number"),
        ("llama.rope.freq_base", float("nan"), "llama.rope.freq_base must be a number"),
        ("llama.attention.layer_norm_rms_epsilon", None, "is missing from the metadata"),
        ("llama.embedding_length", 64, "the checkpoint holds"),
        ("llama.expert_count", 8, "llama.expert_count is not supported"),
        ("llama.rope.scaling.type", "yarn", "llama.rope.scaling.type is not supported"),
        ("llama.rope.scaling.type", "yarn" * 99, "llama.rope.scaling.type is not supported"),
        ("llama.rope.scale_linear", 9e-4, "llama.rope.scale_linear must be a number from 0.001 to 1e+06"),
        ("llama.rope.scale_linear", 1.1e6, "llama.rope.scale_linear must be a number from 0.001 to 1e+06"),
        ("llama.rope.freq_base", 0.5, "llama.rope.freq_base must be a number from 1"),
        ("llama.rope.dimension_count", 10, "llama.rope.dimension_count must be an integer from 1 to 8"),
        ("llama.expert_count", -1.0, "llama.expert_count must be an integer from 0"),
    ],
)  # fmt: skip
def test_metadata_that_does_not_fit(tmp_path: Path, key: str, value: Any, what: str) -> None:
    path = written(tmp_path, {key: value})
    with pytest.raises(CheckpointError) as caught:
        resolve(path)
    assert what in caught.value.what
    assert str(path) in (caught.value.within or "")


def config_of(folder: Path, keys: Mapping[str, Any], architecture: str = "llama") -> Mapping[str, Any]:
    """Return the configuration that is read from a complete file with other metadata; optionally for Gemma or Phi-3."""
    renamed = {f"{architecture}.{key}": value for key, value in keys.items()}
    return from_gguf(GGUFFile.open(written(folder, renamed, replace(SIZES, architecture=architecture)))).config


def test_metadata_that_is_left_out(tmp_path: Path) -> None:
    """A missing key takes llama.cpp's default."""
    left_out = dict.fromkeys(("rope.freq_base", "rope.dimension_count", "attention.key_length"))
    plain = config_of(tmp_path, left_out)
    assert (plain["base"], plain["rotary_dims"], plain["head_dim"], plain["scaling"]) == (10000.0, 8, 8, None)
    assert config_of(tmp_path, {"rope.freq_base": 1.0})["base"] == 1.0
    for key in ("rope.scale_linear", "rope.scaling.factor"):
        more = {"rope.scaling.type": "linear"} if key == "rope.scaling.factor" else {}
        for factor in (1e6, 0.002):
            assert config_of(tmp_path, {key: factor, **more})["scaling"] == LinearScaling(float(np.float32(factor)))
        assert config_of(tmp_path, {key: 1.0, **more})["scaling"] is None

    second = config_of(tmp_path, {}, "gemma2")
    assert (second["softcap"], second["logit_softcap"], second["window"]) == (50.0, 30.0, 4096)
    assert (second["full_layers"], second["embedding_scale"], second["scale"]) == ((1,), 32**0.5, 8**-0.5)
    assert config_of(tmp_path, {"attn_logit_softcapping": 0.0}, "gemma2")["softcap"] is None
    third = config_of(tmp_path, {}, "gemma3")
    assert (third["softcap"], third["logit_softcap"], third["window"]) == (None, None, 4096)
    assert (third["full_layers"], third["window_base"], third["qk_norm"]) == ((), 10000.0, "heads")
    assert config_of(tmp_path, {"attention.sliding_window_pattern": 1}, "gemma3")["full_layers"] == (0, 1)
    assert config_of(tmp_path, {}, "phi3")["window"] is None
    assert config_of(tmp_path, {"attention.sliding_window": 5}, "phi3")["window"] == 5


def test_layers_have_as_many_tensors_as_there_must_be(tmp_path: Path) -> None:
    """A layer has nine tensors, or six if some are joined. A file with fewer is refused before its layers are
    traced.
    """
    for joined, least in ((False, 9), (True, 6)):
        names = ["token_embd.weight", "blk.0.attn_qkv.weight" if joined else "blk.0.attn_q.weight"]
        for count, fits in ((2 * least, True), (2 * least - 1, False)):
            path = tmp_path / "model.gguf"
            more = [f"blk.0.{i}" for i in range(count - len(names))]
            write_model(path, SIZES, {name: np.zeros((4, 32), np.float32) for name in [*names, *more]})
            if fits:
                assert from_gguf(GGUFFile.open(path)).config["layers"] == 2
                continue
            with pytest.raises(
                CheckpointError, match="block_count is larger than the file's number of tensors allows"
            ) as caught:
                from_gguf(GGUFFile.open(path))
            assert caught.value.received == f"2, of {count} tensors"


@pytest.mark.parametrize("factor", [1e-3, 1e6, 9e-4, 1.1e6])
def test_factors_of_frequencies_have_limits(tmp_path: Path, factor: float) -> None:
    path = tmp_path / "model.gguf"
    factors = np.array([1, 1, 1, factor], np.float32)
    write_model(path, SIZES, {**tensors(SIZES), "rope_freqs.weight": factors})
    if 1e-3 <= factors[3] <= 1e6:
        assert from_gguf(GGUFFile.open(path)).config["scaling"] == Divided(tuple(factors.tolist()))
        return
    with pytest.raises(CheckpointError, match=r"from 0\.001 to 1000000") as caught:
        from_gguf(GGUFFile.open(path))
    assert caught.value.received == "f32[4], for 8 dimensions; linear factor 1"


def test_factors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for factors, keys in ((np.ones(3), {}), (np.ones(4), {"rope.scale_linear": 2.0})):
        weights = {**tensors(SIZES), "rope_freqs.weight": factors.astype(np.float32)}
        write_model(path, SIZES, weights, keys=keys)
        with pytest.raises(CheckpointError, match=r"rope_freqs.weight must be a factor for each pair"):
            from_gguf(GGUFFile.open(path))


def test_frequencies_that_change_with_the_length_are_refused(tmp_path: Path) -> None:
    path, sizes = tmp_path / "model.gguf", replace(SIZES, architecture="phi3")
    for name in ("rope_factors_long.weight", "rope_factors_short.weight"):
        write_model(path, sizes, {**tensors(sizes), name: np.ones(4, np.float32)})
        with pytest.raises(CheckpointError, match=f"{name} is not supported: rotary frequencies that change") as caught:
            from_gguf(GGUFFile.open(path))
        at = GGUFFile.open(path).record(name).begin
        assert caught.value.within == f"{path}: byte {at}, tensor {name}"


def written(folder: Path, keys: Mapping[str, Any], sizes: Sizes = SIZES) -> Path:
    """Write a complete file with other metadata and return its path; None leaves a key out."""

    class Writer(gguf.GGUFWriter):
        def write_header_to_file(self, path: Path | None = None) -> None:
            kinds = {str: "STRING", int: "UINT32", float: "FLOAT32", bool: "BOOL", list: "ARRAY"}
            for key, value in keys.items():
                self.kv_data[0].pop(key, None)
                if value is not None:
                    kind = getattr(gguf.GGUFValueType, kinds[type(value)])
                    self.kv_data[0][key] = gguf.gguf_writer.GGUFValue(value=value, type=kind)
            super().write_header_to_file(path)

    path = folder / "model.gguf"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFWriter", Writer)
        write_model(path, sizes, tensors(sizes))
    return path


def test_a_vocabulary_that_begins_texts_with_a_token(tmp_path: Path) -> None:
    keys = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 3}
    file = GGUFFile.open(written(tmp_path, keys))
    known = vocabulary()
    assert [known[i] for i in build_gguf_tokenizer(file).encode("the").ids] == [known[3], "t", "he"]


def test_types_of_tokens_are_as_many_as_they(tmp_path: Path) -> None:
    kinds = "tokenizer.ggml.token_type"
    file = GGUFFile.open(written(tmp_path, {kinds: [1, 3]}))
    with pytest.raises(CheckpointError, match="must have a type for each token") as caught:
        build_gguf_tokenizer(file)
    assert caught.value.received == f"2 types, {len(vocabulary())} tokens"
    plain = build_gguf_tokenizer(GGUFFile.open(written(tmp_path, {kinds: None})))
    assert len(plain.encode("<|end|>").ids) > 1  # not split off as a single token


def test_values_of_metadata_are_of_the_kind_that_is_asked_for(tmp_path: Path) -> None:
    keys = {"a.text": "five", "a.number": 5, "a.flag": True, "a.list": [1, 2]}
    file = GGUFFile.open(written(tmp_path, keys))
    assert file.keys[-4:] == tuple(keys)
    assert repr(file) == f"GGUFFile({str(tmp_path / 'model.gguf')!r}, {len(file.keys)} keys, {len(file)} tensors)"
    assert (file.text("a.text"), file.integer("a.number"), file.flag("a.flag", False)) == ("five", 5, True)
    assert (file.text("b", "x"), file.integer("b", 3), file.number("b", 0.5), file.flag("b", True)) == (
        "x",
        3,
        0.5,
        True,
    )
    assert (file.integer("a.number", most=5), file.number("a.number", least=5.0)) == (5, 5.0)
    wrong: dict[str, Any] = {
        "a.number must be a string": lambda: file.text("a.number"),
        "a.list must be a single value": lambda: file.text("a.list"),
        "a.text must be an integer from 1 to 2147483647": lambda: file.integer("a.text"),
        "a.flag must be an integer from 1 to": lambda: file.integer("a.flag"),
        "a.number must be an integer from 6 to": lambda: file.integer("a.number", least=6),
        "a.number must be an integer from 1 to 4": lambda: file.integer("a.number", most=4),
        "a.text must be a number from 0 to 1e+12": lambda: file.number("a.text"),
        "a.flag must be a number": lambda: file.number("a.flag"),
        "a.number must be true or false": lambda: file.flag("a.number", False),
        "a.number must be an array of strings": lambda: file.texts("a.number"),
        "a.list must be an array of strings": lambda: file.texts("a.list"),
        "a.text must be an array of numbers": lambda: file.numbers("a.text"),
        "tokenizer.ggml.tokens must be an array of numbers": lambda: file.numbers("tokenizer.ggml.tokens"),
        "b is missing from the metadata": lambda: file.numbers("b"),
    }
    for what, asked in wrong.items():
        with pytest.raises(CheckpointError) as caught:
            asked()
        assert caught.value.what.startswith(what)
        place = f"key {what.split()[0]}"
        assert caught.value.within == f"{file.path}: {place}" if what[0] == "b" else place in str(caught.value.within)


def test_limits(small: Path) -> None:
    assert GGUFLimits() == GGUFLimits(32 * 2**20, 10_000, 20_000, 1_000_000, 2**20)
    given = {"keys": 3, "tensors": 3, "strings": 9, "header_bytes": 99, "text_bytes": 6}
    for name, most in given.items():
        with pytest.raises(CheckpointError, match="than the limit") as caught:
            GGUFFile.open(small, {name: most})
        assert caught.value.received == f"limit {most}"
        assert caught.value.hint == f"limits={{'{name}': {4 * most}}}, if you trust the file"


def test_a_limit_is_the_most_that_is_read(tmp_path: Path) -> None:
    path = tmp_path / "two.gguf"
    strings = string(b"s") + struct.pack("<IIQ", 9, 8, 2) + string(b"abc") + string(b"d")
    head = header(KEY, strings, tensor(b"t", (8,)), tensor(b"u", (8,), offset=32), count=2)
    path.write_bytes(head + bytes(-len(head) % 32 + 64))
    needed = {"keys": 2, "tensors": 2, "strings": 2, "text_bytes": 3, "header_bytes": len(head)}
    GGUFFile.open(path, needed)
    for name, most in needed.items():
        with pytest.raises(CheckpointError, match="than the limit"):
            GGUFFile.open(path, {name: most - 1})


@pytest.mark.parametrize(
    ("kind", "code", "value"),
    [
        (0, "B", 200), (1, "b", -7), (2, "H", 60_000), (3, "h", -7), (4, "I", 2**31 - 1), (5, "i", -7), (6, "f", 0.5),
        (10, "Q", 2**31 - 1), (11, "q", -7), (12, "d", 0.1),
    ],
)  # fmt: skip
def test_numbers_of_metadata_have_the_formats_types(tmp_path: Path, kind: int, code: str, value: float) -> None:
    one = string(b"one") + struct.pack(f"<I{code}", kind, value)
    several = string(b"several") + struct.pack(f"<IIQ3{code}", 9, kind, 3, value, 1, value)
    path = tmp_path / "numbers.gguf"
    path.write_bytes(header(one, several))
    file = GGUFFile.open(path)
    found = file.integer("one", least=-9) if isinstance(value, int) else file.number("one")
    assert found == value
    assert file.numbers("several").tolist() == [value, 1, value]


@pytest.mark.parametrize("alignment", [None, 1, 64])
def test_tensors_lie_as_far_apart_as_the_file_says(tmp_path: Path, alignment: int | None) -> None:
    keys = [] if alignment is None else [string(b"general.alignment") + struct.pack("<II", 4, alignment)]
    step = alignment or 32
    second = 16 + -16 % step
    head = header(*keys, tensor(b"t"), tensor(b"u", offset=second), count=2)
    path = tmp_path / "two.gguf"
    path.write_bytes(head + bytes(-len(head) % step + second) + np.arange(4, dtype="<f4").tobytes())
    file = GGUFFile.open(path)
    assert file.array("t").tolist() == [0, 0, 0, 0]
    assert file.array("u").tolist() == [0, 1, 2, 3]
    with pytest.raises(CheckpointError, match="the type of tensor t is not a supported block quantization"):
        file.block_bytes("t")


def test_work_and_memory_of_a_vocabulary(tmp_path: Path) -> None:
    """A string takes at least 8 bytes of a file, and 8 bytes of memory until it is read. After that it takes 49 bytes
    plus its letters.
    """
    count = 100_000
    path = tmp_path / "many.gguf"
    path.write_bytes(header(string(b"k") + struct.pack("<IIQ", 9, 8, count) + string(b"") * count))
    tracemalloc.start()
    file = GGUFFile.open(path)
    opening = tracemalloc.get_traced_memory()[1]
    assert file.texts("k") == [""] * count
    tracemalloc.stop()
    assert opening < 2 * path.stat().st_size + 100_000


@pytest.mark.parametrize("kind", ["Q8_1", "Q8_K"])
def test_blocks_that_the_library_does_not_decode_are_named(tmp_path: Path, kind: str) -> None:
    number = gguf.GGMLQuantizationType[kind]
    elements, length = gguf.GGML_QUANT_SIZES[number]
    path = tmp_path / "blocks.gguf"
    head = header(tensor(b"t", (elements,), kind=int(number)), count=1)
    path.write_bytes(head + bytes(-len(head) % 32 + length))
    with pytest.raises(CheckpointError, match=f"blocks of type {kind.lower()} cannot be dequantized") as caught:
        GGUFFile.open(path).array("t")
    assert caught.value.within == f"{path}: byte {len(head) + -len(head) % 32}, tensor t"


def test_a_tensor_is_a_view_where_it_can_be(small: Path) -> None:
    file = GGUFFile.open(small)
    norm, embedding = file.array("output_norm.weight"), file.array("token_embd.weight")
    assert norm.base is not None
    assert not norm.flags.owndata
    for x in (norm, embedding):
        assert x.dtype == np.float32
        assert not x.flags.writeable
    assert np.array_equal(norm, tensors(SIZES)["output_norm.weight"])
    expected = gguf.quantize(tensors(SIZES)["token_embd.weight"], gguf.GGMLQuantizationType.Q4_1)
    assert np.array_equal(embedding, gguf.dequantize(expected, gguf.GGMLQuantizationType.Q4_1))


def test_mutations(tmp_path: Path) -> None:
    """400 damaged files; tests/fuzz/gguf_files.py does 10,000 of the same kind."""
    outcomes = set()
    for number, (kind, file) in enumerate(mutations(400, seed=7)):
        verdict = judge(file, tmp_path / f"{number}.gguf")
        assert verdict.failure is None, f"mutation {number} ({kind}): {verdict.failure}"
        outcomes.add(verdict.outcome)
    assert outcomes == {"read", "opening", "vocabulary", "model"}


def test_merges_are_of_the_vocabulary() -> None:
    """The fuzzer's seeds are valid: merged tokens are in the vocabulary."""
    known = set(vocabulary())
    assert all(part in known for merge in MERGES for part in [*merge.split(" "), merge.replace(" ", "")])


# -- SentencePiece vocabularies --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pieces() -> Any:
    """Return a small SentencePiece vocabulary of Llama's kind, as its library reads it."""
    library = pytest.importorskip("sentencepiece")
    out = io.BytesIO()
    options = {"byte_fallback": True, "user_defined_symbols": "<fim>", "remove_extra_whitespaces": False}
    options["normalization_rule_name"] = "identity"
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences(400, seed=5)), model_writer=out, model_type="bpe", vocab_size=400,
        minloglevel=2, num_threads=1, **options,
    )  # fmt: skip
    return library.SentencePieceProcessor(model_proto=out.getvalue())


def piece_file(path: Path, pieces: Any, keys: Mapping[str, Any] = MappingProxyType({})) -> GGUFFile:
    """Write the metadata of a SentencePiece vocabulary, as llama.cpp's converters do. `keys` differ; None: left out."""
    ids = range(len(pieces))
    kinds = [2 if pieces.is_unknown(i) else 3 if pieces.is_control(i) else 6 if pieces.is_byte(i) else 1 for i in ids]
    kinds[pieces.piece_to_id("<fim>")] = 4
    found = {
        "model": "llama",
        "tokens": [pieces.id_to_piece(i) for i in ids],
        "scores": [pieces.get_score(i) for i in ids],
        "token_type": kinds,
    }
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {**found, **keys}.items():
        if value is not None:
            writer.add_key_value(f"tokenizer.ggml.{key}", value, gguf.GGUFValueType.get_type(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return GGUFFile.open(path)


def test_a_sentencepiece_vocabulary_gives_the_ids_of_its_library(pieces: Any, tmp_path: Path) -> None:
    tokenizer = gguf_text_tokenizer(piece_file(tmp_path / "a.gguf", pieces))
    hard = ["  two  spaces ", "\u4e2d\u6587 \U0001f642", "a\nb\tc", "\u2581low", "1234 5.6!?"]
    for text in [*sentences(40, seed=1), *hard]:
        wanted = pieces.encode(text)
        assert tokenizer.ids([text], special=False) == [wanted], text
        assert tokenizer.ids([text]) == [[1, *wanted]], text
        assert tokenizer.text(wanted) == pieces.decode(wanted), text
    assert tokenizer.ids(["</s>"], special=False) == [[2]], "a control token is matched as a whole"
    around = [*pieces.encode("cat"), pieces.piece_to_id("<fim>"), *pieces.encode("sits")]
    assert tokenizer.ids(["cat<fim>sits"], special=False) == [around], "as in llama.cpp, a space is added after it"
    keys = {"add_bos_token": False, "add_space_prefix": False}
    plain = gguf_text_tokenizer(piece_file(tmp_path / "b.gguf", pieces, keys))
    assert plain.ids([" cat"]) == [pieces.encode("cat")] and plain.ids(["cat"]) != plain.ids([" cat"])


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ({"scores": None}, "tokenizer.ggml.scores is missing"),
        ({"scores": [0.0]}, "tokenizer.ggml.scores must have a score for each token"),
        ({"scores": [float("nan")] * 400}, "tokenizer.ggml.scores must be finite numbers"),
        ({"token_type": [1, 3]}, "tokenizer.ggml.token_type must have a type for each token"),
        ({"tokens": ["x" * 513, *map(str, range(399))]}, "tokenizer.ggml.tokens must be of at most 512 characters"),
        ({"unknown_token_id": 400}, "tokenizer.ggml.unknown_token_id must be an integer from 0 to 399"),
        ({"tokens": ["a"], "scores": [0.0], "token_type": [1]}, "tokenizer.ggml.bos_token_id is missing"),
    ],
)  # fmt: skip
def test_damaged_sentencepiece_vocabulary(pieces: Any, tmp_path: Path, keys: dict[str, Any], what: str) -> None:
    kinds = {"token_type": [1] * 400} if "x" * 513 in keys.get("tokens", ()) else {}
    file = piece_file(tmp_path / "a.gguf", pieces, {**kinds, **keys})
    with pytest.raises(CheckpointError) as caught:
        build_gguf_tokenizer(file)
    assert what in caught.value.what
    assert "key tokenizer.ggml" in (caught.value.within or "")

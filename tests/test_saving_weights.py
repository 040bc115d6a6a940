"""Trained weights are saved to a folder like the folder they come from. We and transformers can read it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import torch

import treadle as t
from tests.decoder_models import DECODERS
from tests.hf_models import TINY, VOCAB, Tiny, answer
from treadle.frontends.binding import Source
from treadle.frontends.huggingface import open_checkpoint
from treadle.frontends.safetensors_file import SafetensorsFile
from treadle.ir.errors import CheckpointError, UsageError
from treadle.ir.interpreter import interpret
from treadle.program.source import ModelSource
from treadle.resolving import resolve
from treadle.training.saving import FolderSaver, SavedModel, saver_for
from treadle.training.weight_files import write_weights

Array = np.ndarray[Any, Any]

ALL = {**{name: tiny for name, tiny in TINY.items() if name != "biogpt"}, **DECODERS}


def saved(name: str, folder: Path, dtype: Any = None, shard: str = "50GB") -> Tiny:
    """Save a tiny Hugging Face model in a folder."""
    tiny = ALL[name]
    tiny.build().to(dtype).save_pretrained(folder, max_shard_size=shard)
    return tiny


def changed(weights: Mapping[str, Any]) -> dict[str, Array]:
    """Change weights as training would: each by a small and different amount."""
    rng = np.random.default_rng(3)
    moved = {}
    for name, array in weights.items():
        moved[name] = np.asarray(array, np.float32) + rng.standard_normal(array.shape).astype(np.float32) / 8
    return moved


def inputs_of(tiny: Tiny, graph: Any) -> dict[str, Array]:
    rng = np.random.default_rng(1)
    sizes = {"B": 2, "S": 7, "T": 5, "N": 1}
    most = {"tokens": VOCAB, "decoder_tokens": VOCAB, "token_types": 3}
    found: dict[str, Array] = {}
    for value in graph.main.inputs:
        shape = value.type.evaluate(sizes)
        if value.name == "pixels":
            found[value.name] = rng.standard_normal(shape, np.float32)
        else:
            found[value.name] = rng.integers(tiny.first if value.name == "tokens" else 0, most[value.name], shape)
    return found


# -- the inverse of a part -----------------------------------------------------------------------------------------


@st.composite
def parts(draw: st.DrawFn) -> tuple[Source, tuple[int, ...]]:
    """Return the part of a stored tensor that a parameter reads, and the tensor's shape."""
    rank = draw(st.integers(1, 3))
    transpose = rank == 2 and draw(st.booleans())
    groups = draw(st.integers(1, 3))
    shape = [draw(st.integers(1, 5)) * groups, *(draw(st.integers(1, 5)) for _ in range(rank - 1))]

    def cut(size: int) -> tuple[int, int] | None:
        first = draw(st.integers(0, size))
        return draw(st.sampled_from([None, (first, draw(st.integers(first, size)))]))

    rows = cut(shape[0] // groups)
    cols = cut(shape[1]) if rank > 1 else None
    return Source("x", transpose, rows, cols, groups), tuple(shape[::-1] if transpose else shape)


@given(parts())
def test_writes_to_a_part_leave_the_rest(case: tuple[Source, tuple[int, ...]]) -> None:
    source, shape = case
    before = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    after = before.copy()
    part = source.view(before)
    assert part.shape == source.shape(shape)
    source.write(after, -1 - part)
    np.testing.assert_array_equal(source.view(after), -1 - part)
    np.testing.assert_array_equal(after[after >= 0], before[after >= 0])
    assert (after < 0).sum() == part.size


def save_folder(source: Path, weights: Mapping[str, Array], target: Path, *, replace: bool = False) -> SavedModel:
    """Write a folder like a source folder, with these weights."""
    shapes = {name: np.shape(array) for name, array in weights.items()}
    return FolderSaver.open(ModelSource.open(source), shapes, target, replace=replace).save(weights)


# -- round trips ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_saved_files_are_read_again(name: str, tmp_path: Path) -> None:
    """Each parameter's new values are stored at the parameter's place. No tensor is lost, and no tensor without a
    parameter is changed.

    No two parameters have the same part of a tensor, unless the second is stored under another name.
    """
    tiny = saved(name, tmp_path / "from")
    resolved = resolve(tmp_path / "from", **tiny.given)
    assert resolved.weights is not None
    wanted = changed(resolved.weights)
    made = save_folder(tmp_path / "from", wanted, tmp_path / "to")
    assert {path.name for path in made.files} == {*os.listdir(tmp_path / "to")}
    again = resolve(tmp_path / "to", **tiny.given)
    assert again.weights is not None and again.unused == resolved.unused
    for parameter, values in wanted.items():
        np.testing.assert_array_equal(again.weights[parameter], values, parameter)
    shapes = {parameter: values.shape for parameter, values in wanted.items()}
    saver = FolderSaver.open(ModelSource.open(tmp_path / "from"), shapes, tmp_path / "more")
    for of in saver.parts.values():
        alone = [part for parameter, part in of.items() if parameter not in saver.added]
        assert len({*alone}) == len(alone)
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("from", "to"))
    assert before.keys() <= after.keys()
    for tensor in resolved.unused:
        np.testing.assert_array_equal(before[tensor], after[tensor])


FOR_BOTH = ("gpt2", "gpt2-classifier", "bert-masked-lm", "bert-pretraining", "t5", "t5-gated", "vit-classifier", "bart")
FOR_BOTH += (
    "llama",
    "qwen2",
    "modernbert-masked-lm",
    "dinov2-gated",
    "albert-masked-lm",
    "gpt-neox",
    "phi3",
    "opt",
    "siglip",
)


@pytest.mark.parametrize("name", FOR_BOTH)
def test_transformers_reads_the_same_weights(name: str, tmp_path: Path) -> None:
    tiny = saved(name, tmp_path / "from")
    resolved = resolve(tmp_path / "from", **tiny.given)
    assert resolved.weights is not None
    save_folder(tmp_path / "from", changed(resolved.weights), tmp_path / "to")
    theirs = getattr(transformers, tiny.architecture).from_pretrained(tmp_path / "to").eval()
    again = resolve(tmp_path / "to", **tiny.given)
    assert again.weights is not None
    inputs = inputs_of(tiny, again.graph)
    ours, wanted = interpret(again.graph, inputs, again.weights, float64=True), answer(theirs, inputs)
    for output in ours:
        assert np.abs(ours[output] - wanted[output]).max() < 2e-5 * np.abs(wanted[output]).max(), output


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_values_are_rounded_to_the_dtype_of_the_checkpoint(dtype: str, tmp_path: Path) -> None:
    """Values are rounded to nearest, ties to even, as in PyTorch; NaN and infinity stay."""
    kind = {"f16": torch.float16, "bf16": torch.bfloat16}[dtype]
    saved("gpt2", tmp_path / "from", kind)
    resolved = resolve(tmp_path / "from", widen=dtype)
    assert resolved.weights is not None
    wanted = changed(resolved.weights)
    # the last number is halfway between two bf16 numbers
    wanted["wpe.weight"][0, :4] = np.nan, np.inf, -np.inf, 1 + 2**-9
    wanted["wpe.weight"][1, :2] = 1 + 3 * 2**-9, 1 + 2**-12
    save_folder(tmp_path / "from", wanted, tmp_path / "to")
    again = resolve(tmp_path / "to", widen=dtype)
    assert again.weights is not None
    for name, values in wanted.items():
        rounded = torch.from_numpy(values).to(kind).float().numpy()
        np.testing.assert_array_equal(again.weights[name], rounded, name)
    records = SafetensorsFile.open(tmp_path / "to" / "model.safetensors")
    assert {records[name].dtype for name in records} == {dtype}
    assert json.loads((tmp_path / "to" / "config.json").read_text())["dtype"] == str(kind).removeprefix("torch.")


def test_shards_become_one_file(tmp_path: Path) -> None:
    saved("gpt2", tmp_path / "from", shard="20KB")
    assert len(open_checkpoint(tmp_path / "from").files) > 2
    resolved = resolve(tmp_path / "from")
    assert resolved.weights is not None
    wanted = changed(resolved.weights)
    save_folder(tmp_path / "from", wanted, tmp_path / "to")
    assert sorted(os.listdir(tmp_path / "to")) == ["config.json", "generation_config.json", "model.safetensors"]
    again = resolve(tmp_path / "to")
    assert again.weights is not None
    assert all(np.array_equal(again.weights[name], values) for name, values in wanted.items())


def test_files_beside_the_weights_are_copied_and_code_is_not(tmp_path: Path) -> None:
    saved("bert", tmp_path / "from")
    settings = ["tokenizer.json", "vocab.txt", "spiece.model", "chat_template.jinja", "modules.json"]
    for name in [*settings, "modeling.py", "pytorch_model.bin", "pytorch_model.bin.index.json", "README.md"]:
        (tmp_path / "from" / name).write_text(f"of {name}")
    for name in ("1_Pooling", "other"):
        (tmp_path / "from" / name).mkdir()
    (tmp_path / "from" / "1_Pooling" / "config.json").write_text("pooling")
    resolved = resolve(tmp_path / "from")
    assert resolved.weights is not None
    made = save_folder(tmp_path / "from", resolved.weights, tmp_path / "to" / "deep")
    names = [path.relative_to(tmp_path / "to" / "deep").as_posix() for path in made.files]
    assert names == ["model.safetensors", "1_Pooling/config.json", *sorted(settings), "config.json"]
    for name in (*settings, "config.json", "1_Pooling/config.json"):
        assert (made.folder / name).read_bytes() == (tmp_path / "from" / name).read_bytes()
    with safe_open(made.files[0], "np") as file:
        assert file.metadata() == {"format": "pt"}, "which transformers asks for"
    assert made.loading == f"treadle.compile('{made.folder}')"


def test_equal_weights_give_equal_bytes(tmp_path: Path) -> None:
    saved("gpt2", tmp_path / "from")
    resolved = resolve(tmp_path / "from")
    assert resolved.weights is not None
    made = [save_folder(tmp_path / "from", resolved.weights, tmp_path / to).files[0] for to in ("a", "b")]
    assert made[0].read_bytes() == made[1].read_bytes()
    before, after = load_file(tmp_path / "from" / "model.safetensors"), load_file(made[0])
    assert before.keys() == after.keys() and all(np.array_equal(before[name], after[name]) for name in before)


# -- tensors that are stored twice, or once for two ----------------------------------------------------------------


def test_a_stored_copy_follows_the_tensor_that_it_is_a_copy_of(tmp_path: Path) -> None:
    """Older files hold the output matrix in addition to the embedding. Biases that are all zero do not count as
    copies.
    """
    saved("bert-masked-lm", tmp_path / "from")
    path = tmp_path / "from" / "model.safetensors"
    tensors = load_file(path)
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"]
    tensors["cls.predictions.bias"] = np.zeros_like(tensors["cls.predictions.bias"])
    tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"]  # the table lists it as a second name
    tensors["bert.pooler.dense.bias"] = np.zeros(24, np.float32)
    tensors["bert.encoder.layer.0.output.dense.bias"] = np.zeros(24, np.float32)
    save_file(tensors, path, {"format": "pt"})
    resolved = resolve(tmp_path / "from")
    assert resolved.weights is not None
    save_folder(tmp_path / "from", changed(resolved.weights), tmp_path / "to")
    after = load_file(tmp_path / "to" / "model.safetensors")
    assert after.keys() == tensors.keys()
    for copy, of in (
        ("decoder.weight", "bert.embeddings.word_embeddings.weight"),
        ("decoder.bias", "cls.predictions.bias"),
    ):
        np.testing.assert_array_equal(after[f"cls.predictions.{copy}"], after[of])
        assert not np.array_equal(after[of], tensors[of])
    assert not after["bert.pooler.dense.bias"].any() and after["bert.encoder.layer.0.output.dense.bias"].any()


def test_two_parameters_of_one_tensor_get_one_each_where_they_were_trained_apart(tmp_path: Path) -> None:
    saved("mt5", tmp_path / "from")
    resolved = resolve(tmp_path / "from")
    assert resolved.weights is not None
    held = {name: np.array(array) for name, array in resolved.weights.items()}
    np.testing.assert_array_equal(held["lm_head.weight"], held["shared.weight"])
    save_folder(tmp_path / "from", held, tmp_path / "same")
    assert "lm_head.weight" not in load_file(tmp_path / "same" / "model.safetensors")
    held["lm_head.weight"] += 1
    save_folder(tmp_path / "from", held, tmp_path / "apart")
    after = load_file(tmp_path / "apart" / "model.safetensors")
    np.testing.assert_array_equal(after["lm_head.weight"], held["lm_head.weight"])
    np.testing.assert_array_equal(after["shared.weight"], held["shared.weight"])


# -- models without a folder ---------------------------------------------------------------------------------------


def test_a_model_of_the_zoo_gets_a_folder_that_is_read_alone(tmp_path: Path) -> None:
    sizes = {"vocab": 11, "context": 8, "dim": 8, "heads": 2, "layers": 1}
    exe = t.compile("gpt2", **sizes)
    made = saver_for(resolve("gpt2", **sizes), tmp_path / "to").save(exe.weights)
    assert [path.name for path in made.files] == ["weights.safetensors", "config.json"]
    assert made.loading == f"treadle.compile({str(tmp_path / 'to')!r})"
    tokens = np.arange(6).reshape(2, 3)
    for again in (eval(made.loading, {"treadle": t}), t.compile("gpt2", weights=tmp_path / "to")):
        np.testing.assert_array_equal(exe(tokens=tokens)["logits"], again(tokens=tokens)["logits"])


@pytest.mark.parametrize("kind", ["module", "graph"])
def test_a_module_or_a_graph_takes_the_weights_that_were_saved(kind: str, tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 9)).eval()
    imported = t.from_torch(module, (torch.zeros(2, 5, dtype=torch.long),))
    model = imported if kind == "module" else imported.graph
    (name,) = imported.inputs
    tokens = np.arange(10).reshape(2, 5) % 9
    trainer = t.Trainer(model, backend="numpy")
    trainer.step(**{name: tokens}, targets=tokens)
    made = trainer.save(tmp_path / "to")
    exe = eval(made.loading, {"treadle": t, "model": model})
    assert any(np.any(exe.weights[at] != imported.weights[at]) for at in exe.weights)
    for at, weight in trainer.weights.items():
        np.testing.assert_array_equal(exe.weights[at], weight)
    save_file({"0.weight": np.zeros((9, 4), np.float32)}, tmp_path / "part.safetensors")
    with pytest.raises(CheckpointError, match=r"1\.bias"):
        t.compile(model, weights=tmp_path / "part.safetensors")


def test_weights_of_every_element_are_written_as_safetensors_reads_them(tmp_path: Path) -> None:
    held: dict[str, Array] = {
        "flag": np.array([True, False, True]),
        "half": np.arange(3, dtype=np.float16),
        "swapped": np.arange(4, dtype=">f4"),
        "none": np.zeros((0, 3), np.float32),
        "one": np.array(2.5),
        "turned": np.arange(6, dtype=np.int64).reshape(2, 3).T,
    }
    held["swapped"] = held["swapped"].astype("<f4")
    write_weights(tmp_path / "w.safetensors", held)
    theirs = load_file(tmp_path / "w.safetensors")
    file = SafetensorsFile.open(tmp_path / "w.safetensors")
    for found in (theirs, {name: file.array(name) for name in file}):
        assert found.keys() == held.keys()
        for name, array in held.items():
            assert found[name].dtype == array.dtype
            np.testing.assert_array_equal(found[name], array)


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> Path:
    saved("gpt2", tmp_path / "from")
    return tmp_path / "from"


def weights_in(folder: Path) -> dict[str, Array]:
    return dict(resolve(folder).weights or {})


def test_a_folder_that_holds_files_is_left_as_it_is_unless_it_is_asked_for(source: Path, tmp_path: Path) -> None:
    to = tmp_path / "to"
    to.mkdir()
    (to / "notes").write_text("mine")
    (to / "config.json").write_text("old")
    with pytest.raises(UsageError, match="the folder to save in is not empty") as caught:
        save_folder(source, weights_in(source), to)
    assert str(caught.value.hint) == "another folder, or replace=True"
    assert caught.value.hint.command == "another folder, or --replace"  # type: ignore[union-attr]
    assert sorted(os.listdir(to)) == ["config.json", "notes"]
    save_folder(source, weights_in(source), to, replace=True)
    assert (to / "notes").read_text() == "mine" and (to / "config.json").read_text() != "old"


def test_nothing_outside_is_written(source: Path, tmp_path: Path) -> None:
    """A link to a file is replaced, not followed. A link to a folder is refused."""
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "model.safetensors").symlink_to(tmp_path / "theirs")
    save_folder(source, weights_in(source), tmp_path / "to", replace=True)
    assert (tmp_path / "theirs").read_text() == "theirs"
    assert not (tmp_path / "to" / "model.safetensors").is_symlink()
    (source / "modules.json").write_text("[]")
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text("{}")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "to" / "1_Pooling").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="a link leads out of the output folder"):
        save_folder(source, weights_in(source), tmp_path / "to", replace=True)
    assert not os.listdir(tmp_path / "elsewhere")


def test_nothing_outside_is_read(source: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text("{}")
    weights = weights_in(source)
    (source / "vocab.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(CheckpointError, match="leads out of the model's folder"):
        save_folder(source, weights, tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_a_trainer_saves_its_model(source: Path, tmp_path: Path) -> None:
    trainer = t.Trainer(source, backend="numpy")
    batch = inputs_of(ALL["gpt2"], trainer.resolved.graph)
    trainer.step(**batch, targets=np.ones((2, 7), np.int64))
    made = trainer.save(tmp_path / "to")
    assert {path.name for path in made.files} >= {"model.safetensors", "config.json"}
    again = t.compile(tmp_path / "to", backend="numpy")
    for name, array in trainer.weights.items():
        np.testing.assert_array_equal(array, again.weights[name])
    with pytest.raises(UsageError, match="is not empty"):
        trainer.save(tmp_path / "to")
    assert trainer.save(tmp_path / "to", replace=True).files == made.files


def test_unsavable_models_are_refused_before_training(source: Path, tmp_path: Path) -> None:
    resolved = resolve(source)
    with pytest.raises(UsageError, match="the model's own folder cannot be overwritten"):
        saver_for(resolved, source, replace=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="in a folder, but this is a file"):
        saver_for(resolved, tmp_path / "file")
    with pytest.raises(UsageError, match="the folder cannot be written"):
        saver_for(resolved, tmp_path / "file" / "below")
    with pytest.raises(CheckpointError, match="lacks 1 of the"):
        save_folder(source, {"no.such.weight": np.zeros(3, np.float32)}, tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_other_formats_are_refused(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(UsageError, match=r"in the layout of a folder with config\.json") as caught:
        save_folder(path, {}, tmp_path / "to")
    assert (caught.value.received, caught.value.within) == ("model.gguf", str(tmp_path))


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_a_weight_that_would_become_infinite_is_refused(dtype: str, tmp_path: Path) -> None:
    saved("gpt2", tmp_path / "from", {"f16": torch.float16, "bf16": torch.bfloat16}[dtype])
    weights = {"ln_f.bias": np.full(24, {"f16": 65520, "bf16": 3.4e38}[dtype], np.float32)}
    with pytest.raises(UsageError, match=rf"ln_f\.bias is out of the range of {dtype}"):
        save_folder(tmp_path / "from", weights, tmp_path / "to")
    assert not (tmp_path / "to" / "model.safetensors").exists()
    weights["ln_f.bias"][:] = {"f16": 65519, "bf16": 3.38e38}[dtype]
    save_folder(tmp_path / "from", weights, tmp_path / "to", replace=True)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc")
def test_a_folder_in_which_no_user_may_write_is_refused_before_training(source: Path) -> None:
    """Root has all permissions there, and still cannot create a file."""
    with pytest.raises(UsageError, match="the folder cannot be written"):
        saver_for(resolve(source), "/proc/model")


@pytest.mark.parametrize("suffix", [".safetensors", ".onnx", ".gguf", ".treadle", ".pt"])
def test_a_folder_has_no_name_of_a_file(suffix: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=rf"in a folder, but the name has a file's suffix, \{suffix}") as refused:
        saver_for(resolve(source), tmp_path / f"tuned{suffix}")
    assert refused.value.hint == str(tmp_path / "tuned")
    saver_for(resolve(source), refused.value.hint)

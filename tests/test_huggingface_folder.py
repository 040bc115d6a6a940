"""Model folders: plain, sharded and in the hub's cache; no file outside the folder is read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import save_file

import treadle
from tests.error_texts import raises_freely
from treadle.frontends.huggingface import Checkpoint, open_checkpoint, open_weights
from treadle.frontends.safetensors_file import CheckpointLimits
from treadle.ir.errors import CheckpointError

CONFIG = {"model_type": "gpt2", "n_layer": 2, "scale": 1.5e-5, "tied": True, "window": None}
REVISION = "0123456789abcdef0123456789abcdef01234567"
links = pytest.mark.skipif(os.name == "nt", reason="needs symbolic links")


def tensors(count: int = 4) -> dict[str, npt.NDArray[np.float32]]:
    return {f"h.{i}.weight": np.full((2, 3), i, np.float32) for i in range(count)}


def write_model(folder: Path, weights: Mapping[str, npt.NDArray[Any]] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(dict(weights or tensors()), folder / "model.safetensors")
    return folder


def write_sharded(folder: Path, weight_map: object = None) -> Path:
    """Write four tensors to two shards alternately, and return the folder; `weight_map` replaces the true one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    names = [f"model-0000{part}-of-00002.safetensors" for part in (1, 2)]
    true = {name: names[at % 2] for at, name in enumerate(tensors())}
    for part in names:
        save_file({k: v for k, v in tensors().items() if true[k] == part}, folder / part)
    index = {"metadata": {"total_size": 96.0}, "weight_map": true if weight_map is None else weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_cache(root: Path, source: Path, revision: str = REVISION) -> Path:
    """Write a model folder in the form of huggingface_hub's cache, in which files are links to blobs."""
    blobs, snapshot = root / "blobs", root / "snapshots" / revision
    for folder in (blobs, snapshot, root / "refs"):
        folder.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        blob = hashlib.sha256(file.read_bytes()).hexdigest()
        (blobs / blob).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", blob))
    (root / "refs" / "main").write_text(revision)
    return root


def check(checkpoint: Checkpoint) -> None:
    """Check that the checkpoint holds the tensors that the writers above write."""
    assert checkpoint.config == CONFIG
    assert checkpoint.names() == tuple(tensors()) == tuple(checkpoint)
    assert len(checkpoint) == 4
    for name, wanted in tensors().items():
        assert name in checkpoint
        assert str(checkpoint.record(name)) == "f32[2, 3]"
        np.testing.assert_array_equal(checkpoint.array(name), wanted)
        assert checkpoint.raw(name).tobytes() == wanted.tobytes()
    assert "h.9.weight" not in checkpoint


def refusal(folder: Path, limits: CheckpointLimits | None = None) -> CheckpointError:
    """Open a folder and read all tensors; return the error."""

    def read_all() -> None:
        checkpoint = open_checkpoint(folder, limits)
        for name in checkpoint:
            checkpoint.array(name)

    with pytest.raises(CheckpointError) as caught:
        read_all()
    assert caught.value.within is not None
    assert str(folder) in caught.value.within
    return caught.value


# -- layouts -----------------------------------------------------------------------------------------------


def test_one_file(tmp_path: Path) -> None:
    check(open_checkpoint(write_model(tmp_path / "m")))
    check(open_checkpoint(str(tmp_path / "m")))


def test_shards(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_sharded(tmp_path / "m"))
    check(checkpoint)
    assert checkpoint.files == ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    assert repr(checkpoint) == f"Checkpoint({str(tmp_path / 'm')!r})"


def test_shards_in_a_subfolder(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    (folder / "parts").mkdir()
    (folder / "model.safetensors").rename(folder / "parts" / "a.safetensors")
    index = {"weight_map": dict.fromkeys(tensors(), "parts/a.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    check(open_checkpoint(folder))


def test_one_file_goes_before_an_index(tmp_path: Path) -> None:
    write_model(tmp_path / "m", {"only": np.zeros(1, np.float32)})
    assert open_checkpoint(write_sharded(tmp_path / "m")).names() == ("only",)


def test_a_shard_is_opened_when_it_is_asked_for(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path / "m")
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"damaged")
    checkpoint = open_checkpoint(folder)
    assert len(checkpoint) == 4
    assert checkpoint.array("h.0.weight")[0, 0] == 0
    with pytest.raises(CheckpointError, match="too short"):
        checkpoint.array("h.1.weight")


def test_weights_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    (folder / "model.safetensors").write_bytes(b"damaged")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config == CONFIG
    with pytest.raises(CheckpointError, match="too short"):
        checkpoint.names()


@links
def test_hub_cache(tmp_path: Path) -> None:
    for write in (write_model, write_sharded):
        root = write_cache(tmp_path / write.__name__ / "models--org--name", write(tmp_path / f"{write.__name__}-src"))
        check(open_checkpoint(root))
        check(open_checkpoint(root / "snapshots" / REVISION))
        (root / "refs" / "main").unlink()
        check(open_checkpoint(root))


@links
def test_hub_cache_named_from_inside_and_through_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_cache(tmp_path / "hub" / "models--org--name", write_model(tmp_path / "src"))
    (tmp_path / "mine").symlink_to(root)
    (tmp_path / "snap").symlink_to(root / "snapshots" / REVISION)
    check(open_checkpoint(tmp_path / "mine"))
    check(open_checkpoint(tmp_path / "snap"))
    monkeypatch.chdir(root / "snapshots" / REVISION)
    check(open_checkpoint("."))


@links
def test_a_folder_inside_a_snapshot_reads_the_caches_blobs(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "models--org--name", write_model(tmp_path / "src"))
    inner = root / "snapshots" / REVISION / "encoder"
    inner.mkdir()
    for name in ("config.json", "model.safetensors"):
        (inner / name).symlink_to(Path("..", os.readlink(inner.parent / name)))
    check(open_checkpoint(inner))


@links
def test_the_snapshot_is_the_one_that_the_hub_library_gives(tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    root = write_cache(tmp_path / "models--org--name", write_model(tmp_path / "src"))
    write_cache(root, write_model(tmp_path / "other", {"x": np.zeros(1, np.float32)}), revision="f" * 40)
    (root / "refs" / "main").write_text(REVISION)
    wanted = hub.snapshot_download("org/name", cache_dir=tmp_path, local_files_only=True)
    assert open_checkpoint(root).folder.path == Path(wanted).resolve()
    check(open_checkpoint(root))


def test_a_model_that_transformers_saves(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=3, n_head=2)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    for limit in ("10MB", "3KB"):
        folder = tmp_path / limit
        model.save_pretrained(folder, max_shard_size=limit)
        checkpoint = open_checkpoint(folder)
        assert (len(checkpoint.files) > 1) == (limit == "3KB")
        assert checkpoint.config["n_embd"] == 8
        state = model.state_dict()
        for name in checkpoint:
            np.testing.assert_array_equal(checkpoint.array(name), state[name].numpy())
        assert set(state) - set(checkpoint) == {"lm_head.weight"}  # tied, and therefore not stored


# -- missing files -----------------------------------------------------------------------------------------


def test_only_pickles(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    text = str(refusal(folder)).replace(str(folder), "FOLDER")
    assert text.splitlines()[:3] == [
        "the weights are pickles, which can run any code when they are loaded, so none is ever loaded",
        "  received  pytorch_model.bin",
        "  in        FOLDER",
    ]
    assert "save_file" in text


def test_the_code_that_converts_a_pickle_makes_a_model(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    folder = write_model(tmp_path / "m")
    stored = open_checkpoint(folder)
    tensors = {name: torch.from_numpy(np.array(stored.array(name))) for name in stored.names()}
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    torch.save({}, folder / "training_args.bin")  # not weights
    hint = str(refusal(folder).hint)
    exec(hint.partition("convert it:\n")[2], {})
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(open_checkpoint(folder).array(name), tensor.numpy())


def test_an_index_of_pickles(tmp_path: Path) -> None:
    error = refusal(write_sharded(tmp_path / "m", {"w": "pytorch_model-00001-of-00002.bin"}))
    assert "pickle" in error.what


def test_no_config_no_weights_no_folder(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    assert "neither model.safetensors nor" in refusal(folder).what
    (folder / "config.json").unlink()
    assert "no config.json" in refusal(folder).what
    assert "empty folder" in (refusal(folder).received or "")
    refusal(tmp_path / "absent")
    assert "this is a file" in refusal(write_model(tmp_path / "n") / "model.safetensors").what
    cache = write_model(tmp_path / "hub" / "models--org--name").parent
    assert "models--org--name" in (refusal(cache).hint or "")


@pytest.mark.parametrize("has_config", [False, True])
def test_an_adapter_is_merged_into_its_model(tmp_path: Path, has_config: bool) -> None:
    folder = write_model(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    if not has_config:
        (folder / "config.json").unlink()
    settings = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    error = refusal(folder)
    assert error.what == "the folder has an adapter, which changes the weights of a model, and no model"
    assert error.received == "an adapter (LORA) of org/base"
    assert f"AutoPeftModelForCausalLM.from_pretrained({str(folder)!r}).merge_and_unload()" in (error.hint or "")
    with pytest.raises(CheckpointError, match="has an adapter"):
        open_weights(folder)
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "peft_type": "PROMPT_TUNING"}))
    assert (refusal(folder).hint or "").startswith("org/base alone: this kind of adapter cannot be merged")
    (folder / "adapter_config.json").write_text("{}")
    error = refusal(folder)
    assert error.received == "an adapter (unknown kind) of a model that it does not name"
    (folder / "adapter_config.json").write_text("{")
    assert "adapter_config.json" in (refusal(folder).within or "")


def test_the_hint_for_an_adapter_computes_its_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peft, torch, transformers = (pytest.importorskip(name) for name in ("peft", "torch", "transformers"))
    from tests.test_export_hints import save_llama

    monkeypatch.chdir(tmp_path)
    save_llama("base")
    settings = {"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj"], "init_lora_weights": False}
    base = transformers.AutoModelForCausalLM.from_pretrained("base")
    adapted = peft.get_peft_model(base, peft.LoraConfig(**settings)).eval()
    adapted.save_pretrained("adapter")
    with raises_freely(CheckpointError) as caught:
        open_checkpoint("adapter")
    exec((caught.value.hint or "").partition("\n")[2])
    tokens = np.array([[1, 2, 3]])
    expected = adapted(torch.from_numpy(tokens)).logits.detach().numpy()
    found = treadle.compile("merged", backend="numpy")(tokens=tokens)["logits"]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_an_unknown_tensor_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no tensor") as caught:
        open_checkpoint(write_model(tmp_path / "m")).array("h.0.weigth")
    assert (caught.value.hint or "").startswith("did you mean h.0.weight")


@links
def test_an_incomplete_download(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "models--org--name", write_model(tmp_path / "src"))
    (root / "snapshots" / REVISION / "model.safetensors").resolve().unlink()
    assert "the target of a link does not exist" in refusal(root).what


# -- damaged files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "expected a JSON object"),
        (b"[]", "expected a JSON object"),
        (b'{"a": 1, "a": 2}', "an object has a duplicate key"),
        (b'{"a": {"b": 1, "b": 1}}', "an object has a duplicate key"),
        (b'{"a": 1} {}', "expected the end"),
        (b'{"a": 1', "expected '}'"),
        (b'{"a": nul}', "expected a value"),
        (b'{"a": 01}', "expected '}'"),
        (b'{"a": 123456789012345678901}', "at most 64 bits"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b'{"a":' * 5000, "deep"),
        (b'{"a":[' + b"[" * 5000, "deep"),
        (b'{"a": "' + b"x" * 5_000_000 + b'"}', "longer than the limit"),
        (b'{"a": [' + b"0," * 300_000 + b"0]}", "more values than the limit"),
    ],
    ids=lambda value: str(value[:24]),
)
def test_damaged_config(tmp_path: Path, text: bytes, words: str) -> None:
    folder = write_model(tmp_path / "m")
    (folder / "config.json").write_bytes(text)
    error = refusal(folder)
    assert words in error.what
    assert "config.json" in (error.within or "")


def test_config_values(tmp_path: Path) -> None:
    """All values of JSON, and the three words (NaN, Infinity, -Infinity) that Python's writer adds."""
    folder = write_model(tmp_path / "m")
    wanted: dict[str, Any] = {
        "a": [1, -2.5, 1e-12, True, False, None, "\u00e9\n\U0001f642", {}, []],
        "b": {"c": {"d": 2**63}},
    }
    (folder / "config.json").write_text(json.dumps({**wanted, "limit": [float("inf"), float("-inf")]}))
    config = open_checkpoint(folder).config
    assert {k: config[k] for k in wanted} == wanted
    assert config["limit"] == [float("inf"), float("-inf")]


@pytest.mark.parametrize(
    ("index", "words"),
    [
        (b"{}", "has no weight_map"),
        (b'{"weight_map": []}', "expected an object of tensor names"),
        (b'{"weight_map": {"a": 1}}', "expected the name of a file"),
        (b'{"weight_map": {"a": "x.safetensors", "a": "x.safetensors"}}', "an object has a duplicate key"),
        (b'{"weight_map": {"a": "config.json"}}', "must be a .safetensors file"),
        (b'{"weight_map": {"a": "absent.safetensors"}}', "the file does not exist"),
        (b'{"metadata": ' + b"[" * 500 + b"}", "deep"),
    ],
    ids=lambda value: str(value[:40]),
)
def test_damaged_index(tmp_path: Path, index: bytes, words: str) -> None:
    folder = write_sharded(tmp_path / "m")
    (folder / "x.safetensors").write_bytes((folder / "model-00001-of-00002.safetensors").read_bytes())
    (folder / "model.safetensors.index.json").write_bytes(index)
    assert words in refusal(folder).what


@links
@pytest.mark.parametrize("write", [write_model, write_sharded])
def test_a_damaged_file_is_told_by_its_name(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    """The error gives the file's own name also in the hub's cache, where the file is a link to a blob named by its
    hash.
    """
    source = write(tmp_path / "m")
    for file in source.glob("*.safetensors"):
        file.write_bytes(b"damaged")
    snapshot = write_cache(tmp_path / "models--m", source) / "snapshots" / REVISION
    name = sorted(file.name for file in source.glob("*.safetensors"))[0]
    assert (refusal(snapshot).within or "").startswith(f"{snapshot / name}: byte")


def test_an_index_of_other_shards(tmp_path: Path) -> None:
    part = "model-00001-of-00002.safetensors"
    error = refusal(write_sharded(tmp_path / "m", {"h.0.weight": part, "h.7.weight": part, "h.8.weight": part}))
    assert "places 2 tensors" in error.what
    assert error.received == "h.7.weight, h.8.weight"


def test_index_limits(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path / "m")
    assert "more tensors than the limit" in refusal(folder, CheckpointLimits(tensors=3)).what
    assert "longer than the limit" in refusal(folder, CheckpointLimits(header_bytes=50)).what
    assert "more values" in refusal(folder, CheckpointLimits(values=1)).what


# -- paths out of the folder -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shard",
    [
        "../other/model.safetensors",
        "parts/../../other/model.safetensors",
        "./model.safetensors",
        "..",
        "",
        "/etc/model.safetensors",
        "\\\\host\\share\\model.safetensors",
        "C:\\model.safetensors",
        "..\\other\\model.safetensors",
        "a//model.safetensors",
        "a\x00.safetensors",
    ],
)
def test_shard_names_that_lead_out(tmp_path: Path, shard: str) -> None:
    write_model(tmp_path / "other")
    error = refusal(write_sharded(tmp_path / "m", dict.fromkeys(tensors(), shard)))
    assert "must be relative" in error.what or "must be a .safetensors" in error.what


@links
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("relative", [False, True])
def test_links_that_lead_out(tmp_path: Path, name: str, relative: bool) -> None:
    other = write_model(tmp_path / "other")
    folder = write_model(tmp_path / "m")
    (folder / name).unlink()
    (folder / name).symlink_to(Path("..", "other", name) if relative else other / name)
    error = refusal(folder)
    assert "leads out of the model's folder" in error.what
    assert name in (error.within or "")


@links
def test_a_folder_of_shards_that_is_a_link_out(tmp_path: Path) -> None:
    other = write_model(tmp_path / "other")
    folder = write_sharded(tmp_path / "m", dict.fromkeys(tensors(), "parts/model.safetensors"))
    (folder / "parts").symlink_to(other)
    assert "leads out" in refusal(folder).what


@links
def test_links_inside_the_folder_are_followed(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    (folder / "model.safetensors").symlink_to("weights.safetensors")
    check(open_checkpoint(folder))


@links
def test_a_folder_whose_name_begins_like_another(tmp_path: Path) -> None:
    """`/x/m-other` is not inside `/x/m`."""
    other = write_model(tmp_path / "m-other")
    folder = write_model(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(other / "model.safetensors")
    assert "leads out" in refusal(folder).what


@links
def test_links_in_a_circle(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("model.safetensors")
    assert "cannot be opened" in refusal(folder).what


@links
def test_a_cache_reads_nothing_of_its_neighbour(tmp_path: Path) -> None:
    source = write_model(tmp_path / "src")
    neighbour = write_cache(tmp_path / "models--org--other", source)
    root = write_cache(tmp_path / "models--org--name", source)
    link = root / "snapshots" / REVISION / "model.safetensors"
    blob = link.resolve().name
    link.unlink()
    link.symlink_to(Path("..", "..", "..", neighbour.name, "blobs", blob))
    assert "leads out" in refusal(root).what
    assert "leads out" in refusal(root / "snapshots" / REVISION).what


@links
def test_a_snapshot_that_is_a_link_out(tmp_path: Path) -> None:
    source = write_model(tmp_path / "src")
    root = write_cache(tmp_path / "models--org--name", source, revision="abc")
    (root / "snapshots" / "out").symlink_to(source)
    (root / "refs" / "main").write_text("out")
    assert "leads out" in refusal(root).what
    assert "leads out" in refusal(root / "snapshots" / "out").what


@links
@pytest.mark.parametrize("revision", ["../../../src", "..", "", "a/b", "\x1b[2J", "x" * 200, "x" * 5000])
def test_a_ref_that_is_no_revision(tmp_path: Path, revision: str) -> None:
    root = write_cache(tmp_path / "models--org--name", write_model(tmp_path / "src"))
    (root / "refs" / "main").write_text(revision)
    error = refusal(root)
    assert "not the name of a revision" in error.what or "longer than the limit" in error.what
    assert "\x1b" not in str(error)


@links
def test_how_long_a_revision_may_be(tmp_path: Path) -> None:
    source, root = write_model(tmp_path / "src"), tmp_path / "models--org--name"
    write_cache(root, source, revision="r" * 128)
    check(open_checkpoint(root))
    (root / "refs" / "main").write_text("r" * 128 + " " * 128)
    check(open_checkpoint(root))
    (root / "refs" / "main").write_text("r" * 128 + " " * 129)
    assert "longer than the limit" in refusal(root).what
    (root / "refs" / "main").write_text("r" * 129)
    assert "not the name of a revision" in refusal(root).what


def test_a_long_list_is_cut(tmp_path: Path) -> None:
    for count, end in ((8, "f7"), (9, "f7 and 1 more"), (30, "f15 and 22 more")):
        for number in range(count):
            (tmp_path / f"f{number}").touch()
        listed = sorted(f"f{number}" for number in range(count))[:8]
        assert refusal(tmp_path).received == ", ".join(listed) + end.removeprefix(listed[-1])
    part = "model-00001-of-00002.safetensors"
    error = refusal(write_sharded(tmp_path / "m", {f"w.{i}": part for i in range(9)}))
    assert error.received == ", ".join(f"w.{i}" for i in range(8)) + " and 1 more"
    cache = tmp_path / "models--org--name"
    for number in range(9):
        (cache / "snapshots" / f"s{number}").mkdir(parents=True)
    assert refusal(cache).received == "9 snapshots: " + ", ".join(f"s{i}" for i in range(8))


@links
def test_a_cache_with_several_snapshots_and_no_ref(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "models--org--name", write_model(tmp_path / "src"))
    (root / "snapshots" / "other").mkdir()
    (root / "refs" / "main").unlink()
    assert "2 snapshots" in (refusal(root).received or "")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_pipe_in_a_files_place(tmp_path: Path, name: str) -> None:
    folder = write_model(tmp_path / "m")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert "not a regular file" in refusal(folder).what

"""`treadle bench`: a model compared with other tools, each in a separate process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import treadle
from treadle.backends.registry import find_backend
from treadle.benching import benchmark
from treadle.benching.benchmark import bench_model, difference
from treadle.benching.report import report_lines
from treadle.benching.serving import Unfit, compiled, open_eager, open_llama, save_arrays
from treadle.benching.sides import PEERS, Side
from treadle.benching.workload import Workload
from treadle.ir.errors import TreadleError, UsageError
from treadle.reporting.tables import console

CONFIG = {"layers": 1, "dim": 32, "heads": 2, "hidden": 64, "vocab": 100}
NUMPY = {"backend": "numpy"}
SMALL = Workload("bert", keywords={**NUMPY, "config": CONFIG})


@pytest.fixture(autouse=True, scope="module")
def _limits_measured_once() -> Iterator[None]:
    """Measure the machine's limits in the first benchmark alone. `test_the_command` measures them again."""
    measure, limits = benchmark._machine, []

    def once(spec: Mapping[str, Any]) -> benchmark.MachineLimits:
        limits[:] = limits or [measure(spec)]
        return limits[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "_machine", once)
        yield


def test_sides_give_the_same_numbers_and_take_turns(capsys: pytest.CaptureFixture[str]) -> None:
    peers = [n for n in ("eager", "onnxruntime") if n != "eager" or find_backend("torch").available() is None]
    found = bench_model(SMALL, peers, sizes={"B": 2, "S": 9}, rounds=3)
    assert not found.missing
    assert [row.side for row in found.rows] == ["treadle", *peers]
    ours, *theirs = found.rows
    assert ours.ratio == 1 and ours.difference is None
    for row in theirs:
        assert row.difference is not None and row.difference < 1e-5
        assert row.between[0] <= row.ratio <= row.between[1]
        assert row.seconds > 0 and row.peak > 1 << 20
    assert (
        found.sizes["S"] == 9 and found.machine.rates["f32"] > 1e8 and found.machine.read > 1e8 and found.cost.flops > 0
    )
    for line in report_lines(found):
        console().print(line)
    message = capsys.readouterr().out
    assert "bert at B=2, S=9" in message and "ms at NumPy's" in message
    assert json.loads(json.dumps(found.as_dict()))["rows"][1]["side"] == peers[0]


def test_a_peer_that_is_not_installed_is_named(tmp_path: Path) -> None:
    """The Python of the process has only NumPy."""
    bare = tmp_path / "bare.py"
    bare.write_text(
        "import importlib.abc, runpy, sys\n"
        "class Gone(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'openvino': raise ModuleNotFoundError('gone', name=name)\n"
        "sys.meta_path.insert(0, Gone())\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {bare} "$@"\n')
    python.chmod(0o755)
    found = bench_model(SMALL, ["openvino"], sizes={"S": 4}, rounds=1, python=str(python))
    assert found.missing == {"openvino": "openvino is not installed"}
    assert "openvino is missing: openvino is not installed (pip install openvino)" in map(str, report_lines(found))


def test_a_side_that_fails_or_ends_says_so(tmp_path: Path) -> None:
    spec = Workload("none", keywords=NUMPY).as_dict()
    side = Side({**spec, "side": "treadle", "inputs": str(tmp_path / "none.npz")})
    assert "FileNotFoundError" in side.answer["missing"]
    with pytest.raises(UsageError, match="ended while it ran"):
        side.run()
    side.close()


@pytest.mark.parametrize(
    ("theirs", "off"),
    [
        ({"y": [1.0, 4.0]}, 0.0),
        ({"file": [1.0, 3.0]}, 0.25),
        ({"other": [1.0, 3.0], "more": [1.0, 4.0]}, None),
        ({"y": [[1.0, 4.0]]}, None),
    ],
)
def test_outputs_are_matched_by_name_or_by_shape(theirs: dict[str, object], off: float | None, tmp_path: Path) -> None:
    save_arrays(tmp_path / "ours.npz", {"y": [1.0, 4.0]})
    save_arrays(tmp_path / "theirs.npz", theirs)
    assert difference(tmp_path / "ours.npz", tmp_path / "theirs.npz") == off


@pytest.mark.parametrize(
    ("ours", "theirs", "off"),
    [
        ([1.0, np.nan], [1.0, np.nan], 0.0),
        ([4.0, np.inf], [3.0, np.inf], 0.25),
        ([1.0, 4.0], [1.0, np.nan], np.inf),
        ([1.0, np.nan], [1.0, 4.0], np.inf),
        ([1.0, -np.inf], [1.0, np.inf], np.inf),
    ],
)
def test_nan_is_equal_to_nan_or_infinitely_far(ours: object, theirs: object, off: float, tmp_path: Path) -> None:
    save_arrays(tmp_path / "ours.npz", {"y": ours})
    save_arrays(tmp_path / "theirs.npz", {"y": theirs})
    with np.errstate(all="raise"):  # no warning may reach the user
        assert difference(tmp_path / "ours.npz", tmp_path / "theirs.npz") == off


def test_a_python_that_is_not_there_is_named() -> None:
    with pytest.raises(UsageError, match="cannot run the Python interpreter '/nowhere/python': No such file") as error:
        Side({"side": "openvino", "threads": 1}, "/nowhere/python")
    assert sys.executable in str(error.value.hint)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Hugging Face GPT-2."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=20, n_positions=8)
    place = tmp_path_factory.mktemp("bench") / "gpt2"
    transformers.GPT2LMHeadModel(config).save_pretrained(place)
    return place


def spec_of(place: Path, arrays: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Return the specification for a side that runs on these inputs."""
    save_arrays(place / "inputs.npz", arrays)
    return {"threads": 1, "inputs": str(place / "inputs.npz"), "folder": "", "gguf": "", **more}


@pytest.mark.parametrize(
    ("said", "kind", "names"),
    [
        (["GPT2LMHeadModel"], "GPT2LMHeadModel", {"logits"}),
        (["OfNoLibrary"], "AutoModel", {"last_hidden_state"}),
        (None, "AutoModel", {"last_hidden_state"}),
    ],
)
def test_pytorch_runs_the_class_that_a_folder_names(
    said: list[str] | None, kind: str, names: set[str], folder: Path, tmp_path: Path
) -> None:
    """If the folder names no known class, the library chooses one."""
    torch = pytest.importorskip("torch")
    config = json.loads((folder / "config.json").read_text()) | {"architectures": said}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    ids = np.array([[3, 1, 2]])
    run, note = open_eager(spec_of(tmp_path, {"ids": ids}, folder=str(tmp_path), threads=torch.get_num_threads()))
    assert note == f"{kind} of transformers"
    found = run()
    assert names <= found.keys()
    if "logits" in names:
        ours = treadle.compile(folder)(tokens=ids)["logits"]
        np.testing.assert_allclose(found["logits"], ours, rtol=0, atol=1e-5)


def test_llama_cpp_is_given_the_file_and_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class with the same calls stands in for the package's."""
    message: list[Any] = []

    class Llama:
        def __init__(self, path: str, **options: Any) -> None:
            message.append((path, options))
            self.scores = np.arange(4 * 5, dtype=np.float32).reshape(4, 5)

        def reset(self) -> None:
            message.append("reset")

        def eval(self, words: list[int]) -> None:
            message.append(words)

    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace(Llama=Llama))
    spec = spec_of(tmp_path, {"tokens": np.array([[3, 1, 2]])}, gguf="model.gguf", threads=2)
    run, note = open_llama(spec)
    assert note == "the file's own blocks"
    sizes = {"n_ctx": 3, "n_batch": 3, "n_ubatch": 3, "n_threads": 2, "n_threads_batch": 2}
    assert message == [("model.gguf", {**sizes, "logits_all": True, "verbose": False})]
    assert run()["logits"].tolist() == [[[*range(5)], [*range(5, 10)], [*range(10, 15)]]]
    assert message[1:] == ["reset", [3, 1, 2]]


@pytest.mark.parametrize(
    ("arrays", "gguf", "why"),
    [
        ({"tokens": np.ones((1, 3), np.int64)}, "", "llama.cpp can only run a GGUF file"),
        ({"tokens": np.ones((2, 3), np.int64)}, "model.gguf", "llama.cpp can only run one row here"),
        ({"x": np.ones((1, 3))}, "model.gguf", "llama.cpp supports only tokens as input"),
        (dict.fromkeys("ab", np.ones((1, 3), np.int64)), "model.gguf", "llama.cpp supports only tokens as input"),
    ],
)
def test_models_that_llama_cpp_cannot_run(
    arrays: dict[str, Any], gguf: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace(Llama=None))
    with pytest.raises(Unfit, match=why):
        open_llama(spec_of(tmp_path, arrays, gguf=gguf))


def test_peers_that_read_files_of_the_models_own_are_given_them(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A package with the same calls stands in for CTranslate2. Its output is not taken for an answer, and not shown."""
    packages = tmp_path / "packages"
    packages.mkdir()
    (packages / "ctranslate2.py").write_text(STAND_IN)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={packages} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    workload = Workload(str(folder), keywords=NUMPY)
    peers = ["ctranslate2-int8", "llama.cpp"]
    found = bench_model(workload, peers, sizes={"B": 2, "S": 3}, rounds=1, python=str(python))
    assert [row.side for row in found.rows] == ["treadle", "ctranslate2-int8"]
    row = found.rows[1]
    assert row.note == "dynamic int8" and row.difference is not None and row.difference < 1e-5
    assert capfd.readouterr() == ("", "")
    reason = found.missing["llama.cpp"]
    assert reason in ("llama_cpp is not installed", "llama.cpp can only run a GGUF file, and this model is not one")
    declared = bench_model(SMALL, peers[:1], sizes={"S": 3}, python=str(python))
    assert declared.missing == {
        "ctranslate2-int8": "CTranslate2 can only run a folder of Hugging Face's, and this model is not one"
    }


STAND_IN = """
import sys
from types import SimpleNamespace

import torch
import transformers


class TransformersConverter:
    def __init__(self, folder):
        self.folder = folder
        assert transformers.AutoTokenizer.from_pretrained(folder).get_vocab()["w19"] == 19

    def convert(self, place, quantization):
        print("converting")
        print("slowly", file=sys.stderr)
        assert quantization == "int8"
        with open(place, "w") as file:
            file.write(self.folder)


class Generator:
    def __init__(self, place, device, compute_type, inter_threads, intra_threads):
        assert compute_type == "int8" and intra_threads == 1
        with open(place) as file:
            self.module = transformers.GPT2LMHeadModel.from_pretrained(file.read())

    def forward_batch(self, words, lengths):
        assert lengths.tolist() == [3, 3]
        with torch.inference_mode():
            return self.module(torch.from_numpy(words).long()).logits.numpy()


converters = SimpleNamespace(TransformersConverter=TransformersConverter)
StorageView = SimpleNamespace(from_array=lambda array: array)
"""


def test_an_unknown_peer_is_refused() -> None:
    with pytest.raises(UsageError, match="there is no peer 'tensorflow'") as error:
        bench_model(Workload("bert"), ["tensorflow"])
    assert all(name in str(error.value) for name in PEERS)
    for name, meant in {"PyTorch": "eager, or compile", "torch.compile": "compile", "ort": "onnxruntime"}.items():
        with pytest.raises(UsageError) as other:
            bench_model(Workload("bert"), [name])
        assert str(other.value.hint).startswith(meant)


def test_the_command() -> None:
    words = [sys.executable, "-m", "treadle", "bench", "bert", "--backend", "numpy", "--against", "onnxruntime"]
    options = [word for name, value in CONFIG.items() for word in ("--set", f"{name}={value}")]
    done = subprocess.run(
        [*words, *options, "--sizes", "S=5", "--rounds", "1", "--json"], capture_output=True, text=True, check=True
    )
    message = json.loads(done.stdout)
    assert [row["side"] for row in message["rows"]] == ["treadle", "onnxruntime"] and message["sizes"]["S"] == 5


@pytest.mark.parametrize(
    ("workload", "python", "what"),
    [
        (Workload("bert", keywords={"backend": "tvmm"}), sys.executable, "there is no backend 'tvmm'"),
        (Workload("bert", keywords={"dtype": "f16"}), sys.executable, "unknown computation dtype 'f16'"),
        (Workload("bert", keywords={"quantize": "int5"}), sys.executable, "unknown quantization scheme 'int5'"),
        (Workload("bert"), "/no/python", "there is no such Python interpreter"),
    ],
)
def test_missing_peers_are_refused_before_a_side_starts(workload: Workload, python: str, what: str) -> None:
    with pytest.raises(TreadleError, match=what) as error:
        bench_model(workload, ["eager"], python=python)
    assert error.value.hint


def test_rounded_weights_are_told_and_differ() -> None:
    sizes = {"B": 1, "S": 5}
    found = bench_model(replace(SMALL, keywords={**SMALL.keywords, "quantize": "int4"}), [], sizes=sizes, rounds=1)
    assert found.rows[0].note == "the numpy backend, weights in int4"
    assert found.as_dict()["quantize"] == "int4"


def test_an_artifact_with_blocks_is_given_to_peers_as_it_is(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    small = {"layers": 1, "dim": 64, "heads": 4, "vocab": 96}
    treadle.compile("gpt2", quantize="int4", **small).save(tmp_path / "model.treadle")
    workload = Workload(str(tmp_path / "model.treadle"), keywords=NUMPY)
    found = bench_model(workload, ["eager"], sizes={"B": 1, "S": 5}, rounds=1)
    assert not found.missing
    assert found.rows[1].difference is not None and found.rows[1].difference < 1e-4


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_an_artifact_runs_on_the_backend_of_the_benchmark(backend: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    place = str(tmp_path / "model.treadle")
    treadle.compile("gpt2", backend="torch", layers=1, dim=64, heads=4, vocab=96).save(place)
    assert compiled(Workload(place, 1, {"backend": backend}).as_dict()).backend == backend

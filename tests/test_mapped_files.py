"""Arrays in mapped files: released pages are read again, and written pages stay."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from treadle.files.mapped_files import give_back, in_file, is_mapped

COUNT = 1 << 24


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "numbers"
    np.tile(np.arange(256, dtype=np.uint8), COUNT // 256).tofile(path)
    return path


def of_files() -> int:
    """Return the number of bytes of mapped files that are in this process's memory."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssFile"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, which only Linux has")
def test_pages_of_a_view_are_given_back_and_read_again(file: Path) -> None:
    mapped = np.memmap(file, np.uint8, "r")
    view = mapped[128:].reshape(4, -1)
    assert is_mapped(view)
    before = int(view.sum(dtype=np.int64))
    held = of_files()
    give_back(view)
    assert held - of_files() > COUNT * 3 // 4
    assert int(view.sum(dtype=np.int64)) == before


def test_writes_to_a_private_mapping_stay(file: Path) -> None:
    mapped = np.memmap(file, np.uint8, "c")
    mapped[:] = 7
    give_back(mapped)
    assert (mapped == 7).all()


def test_other_arrays_stay_as_they_are() -> None:
    for array in (np.ones(1 << 16), np.frombuffer(b"treadle", np.uint8), np.zeros(0)):
        wanted = array.copy()
        give_back(array)
        np.testing.assert_array_equal(array, wanted)
    assert not is_mapped(np.ones(3)) and is_mapped(np.frombuffer(b"treadle", np.uint8))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, which only Linux has")
def test_an_array_in_a_file_is_equal_and_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TREADLE_CACHE", str(tmp_path / "cache"))
    array = np.arange(COUNT // 4, dtype=np.uint32).reshape(4, -1)
    made = in_file(array)
    assert is_mapped(made)
    assert not made.flags.writeable
    np.testing.assert_array_equal(made, array)
    held = of_files()
    give_back(made)
    assert held - of_files() > COUNT * 3 // 4
    np.testing.assert_array_equal(made, array)
    assert not list((tmp_path / "cache" / "blocks").iterdir())  # the file has no name


@pytest.mark.parametrize("array", [np.ones(8, np.uint8), np.ones(COUNT, np.uint8)], ids=["small", "no room"])
def test_an_array_that_needs_no_file_stays(array: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("treadle.files.mapped_files.private_folder", lambda *parts: Path("/nowhere"))
    assert in_file(array) is array

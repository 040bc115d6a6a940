"""Arrays in mapped files: released pages are read again, and written pages stay."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from treadle.backends.mapped_files import give_back, is_mapped

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

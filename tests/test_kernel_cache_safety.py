"""Safety of the kernel cache: nearly equal kernels are not mixed up, foreign files are not run, and lost threads are
not waited for.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

pytest.importorskip("tvm")

from treadle.backends.registry import find_backend
from treadle.backends.tvm.kernels.host import cache as kernel_cache
from treadle.backends.tvm.kernels.host.cache import KernelCache
from treadle.backends.tvm.kernels.host.calling import bind
from treadle.backends.tvm.kernels.isa import ISAS, host_isa
from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.files.user_cache import is_private
from treadle.files.whole_files import replacing, sweep
from treadle.ir.builder import Builder
from treadle.ir.graph import Graph
from treadle.ir.target import Target
from treadle.ir.types import f32

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter

posix = pytest.mark.skipif(os.name != "posix", reason="owners, modes and fork are POSIX's")


@dataclass(frozen=True)
class Fill(Kernel):
    """y = value"""

    value: float

    def emit(self, k: Emitter) -> None:
        py = k.pointer("y", f32)
        n = k.size("n")
        y = k.view(py, [n])
        with k.parallel(n) as i:
            k.store(y, [i], k.number(self.value, f32))


def filled(kernel: Kernel, folder: Path) -> tuple[list[float], int]:
    """Run the kernel in a process that has loaded nothing. Return the output, and the number of kernels that had to be
    compiled.
    """
    kernel_cache._loaded.clear()
    cache, y = KernelCache(host_isa(), folder), np.full(3, 99.0, np.float32)
    bind(kernel, [y], [3], cache=cache)()
    return y.tolist(), cache.compiled


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_cache, "_loaded", {})


# -- equal kernels ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("one", "other"), [(0.0, -0.0), (1.0, 1), (1, True)])
def test_specs_that_python_calls_equal_are_not(one: float, other: float) -> None:
    assert one == other
    assert Fill(one) != Fill(other)
    assert len({Fill(one), Fill(other), Fill(one)}) == 2


def test_a_spec_with_a_nan_is_equal_to_itself() -> None:
    assert Fill(float("nan")) == Fill(-float("nan") * 0.0)
    assert len({Fill(float("nan")), Fill(float("nan"))}) == 1


def test_zeros_of_either_sign_in_one_program() -> None:
    b = Builder(Graph("zeros"))
    x = b.input("x", "f32[S]")
    b.outputs(plus=1.0 / (x * 0.0), minus=1.0 / (x * -0.0))
    made = find_backend("tvm").compile(b.graph, Target("cpu"), {})(x=np.ones(2, np.float32))
    assert made["plus"].tolist() == [np.inf] * 2
    assert made["minus"].tolist() == [-np.inf] * 2


def test_specs_of_one_name_from_two_modules_are_two_kernels(tmp_path: Path) -> None:
    elsewhere = type("Fill", (Fill,), {"__module__": "elsewhere"})(1.0)
    assert elsewhere.key == Fill(1.0).key
    assert elsewhere != Fill(1.0)
    cache = KernelCache(host_isa(), tmp_path)
    assert cache.path(elsewhere) != cache.path(Fill(1.0))


def test_instruction_sets_share_a_folder(tmp_path: Path) -> None:
    paths = {KernelCache(isa, tmp_path).path(Fill(1.0)) for isa in ISAS.values()}
    assert len(paths) == len(ISAS)


# -- files -----------------------------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize("mode", [0o777, 0o707])
def test_code_that_others_may_have_written_is_not_run(mode: int, tmp_path: Path) -> None:
    folder = tmp_path / "kernels"
    assert filled(Fill(2.0), folder) == ([2.0] * 3, 2)
    assert filled(Fill(2.0), folder) == ([2.0] * 3, 0)
    before = {f.name: f.stat().st_mtime_ns for f in folder.iterdir()}
    folder.chmod(mode)
    assert filled(Fill(2.0), folder) == ([2.0] * 3, 2)
    assert {f.name: f.stat().st_mtime_ns for f in folder.iterdir()} == before  # and no file is stored there


@posix
def test_whose_a_folder_is(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    assert not is_private(mine)
    mine.mkdir(mode=0o700)
    assert is_private(mine)
    link = tmp_path / "link"
    link.symlink_to(mine)
    assert is_private(link)
    (open_to_all := tmp_path / "open").mkdir()
    open_to_all.chmod(0o777)
    assert not is_private(open_to_all)
    (inside := open_to_all / "inside").mkdir(mode=0o700)
    assert not is_private(inside)  # other users may replace it
    open_to_all.chmod(0o1777)
    assert is_private(inside)  # in a sticky folder, other users may not replace it
    assert not is_private(open_to_all)


def test_a_whole_file_that_does_not_load_is_compiled_again(tmp_path: Path) -> None:
    path = KernelCache(host_isa(), tmp_path).path(Fill(3.0))
    assert path is not None
    data = b"no shared object"
    path.write_bytes(data + hashlib.sha256(data).digest())
    assert filled(Fill(3.0), tmp_path)[0] == [3.0] * 3
    assert filled(Fill(3.0), tmp_path) == ([3.0] * 3, 0)


def test_files_of_killed_writers_are_removed_after_a_day(tmp_path: Path) -> None:
    left = []
    for name in ("old.so", "new.so"):
        with replacing(tmp_path / name) as file:
            left.append(Path(file.name))
    for staged in left:  # as if the writer had been killed
        staged.write_bytes(b"")
    os.utime(left[0], (time.time() - 25 * 3600,) * 2)
    other = tmp_path / ".gitignore"
    other.write_text("")
    os.utime(other, (0, 0))
    sweep(tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {"old.so", "new.so", left[1].name, ".gitignore"}
    sweep(tmp_path / "missing")


# -- forks -----------------------------------------------------------------------------------------------------

FORK = """
import os, sys
sys.modules["torch"] = None  # which TVM imports where it can, for seconds
sys.path.insert(0, sys.argv[1])
import numpy as np
from treadle.backends.registry import find_backend
from treadle.backends.tvm.kernels.host import linking
from treadle.ir.builder import Builder
from treadle.ir.graph import Graph
from treadle.ir.target import Target

if sys.argv[2] == "in memory":
    linking.linkers = lambda: ()
b = Builder(Graph("forked"))
b.outputs(y=b.tanh(b.input("x", "f32[N]")))
program = find_backend("tvm").compile(b.graph, Target("cpu"), {})
program.threads = 2
x = np.linspace(-1, 1, 1_000_000, dtype=np.float32)  # enough that threads are worth it
expected = program(x=x)["y"]
child = os.fork()
if child == 0:
    os._exit(0 if (program(x=x)["y"] == expected).all() else 1)
print(os.waitpid(child, 0)[1], (program(x=x)["y"] == expected).all())
"""


@posix
@pytest.mark.parametrize("kernels", ["from files", "in memory"])
def test_a_forked_process_does_not_wait_for_threads_that_stayed_behind(kernels: str, tmp_path: Path) -> None:
    root = str(Path(__file__).resolve().parents[1])
    command = [sys.executable, "-W", "ignore", "-c", FORK, root, kernels]
    own = {"TREADLE_CACHE": str(tmp_path)} if kernels == "in memory" else {}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True, env=os.environ | own)
    try:
        assert process.communicate(timeout=120)[0] == "0 True\n"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, 9)

"""The kernel cache: kernels are looked up by content. The cache stays correct if processes are killed, or if many fill
it at once.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

import numpy as np
import pytest

pytest.importorskip("tvm")

from treadle.backends.tvm.host_machine import _TableRunner
from treadle.backends.tvm.kernels import isa as instruction_sets
from treadle.backends.tvm.kernels.arithmetic.vector_math import ADDED, FUNCTIONS, add_function, formula
from treadle.backends.tvm.kernels.devices.device import DEVICES
from treadle.backends.tvm.kernels.host import cache as kernel_cache
from treadle.backends.tvm.kernels.host import linking, tvm_runtime
from treadle.backends.tvm.kernels.host.cache import KernelCache, assembly, tvm_script
from treadle.backends.tvm.kernels.host.calling import PROTOTYPE, bind
from treadle.backends.tvm.kernels.host.platforms import Platform
from treadle.backends.tvm.kernels.host.runner import RECORD, Runner
from treadle.backends.tvm.kernels.isa import ISAS, host_isa, isa_of, runs_here
from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.backends.tvm.kernels.pointwise import Chain, Instruction, Pointwise
from treadle.ir.errors import BackendError, GraphError
from treadle.ir.hardware import HARDWARE
from treadle.ir.target import Target
from treadle.ir.types import f32

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Scale(Kernel):
    """y = factor x"""

    factor: float

    def emit(self, k: Emitter) -> None:
        px, py = k.pointer("x", f32), k.pointer("y", f32)
        n = k.size("n")
        x, y = k.view(px, [n]), k.view(py, [n])
        with k.parallel(n) as i:
            k.store(y, [i], k.load(x, [i]) * k.number(self.factor, f32))


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the kernels that the process has loaded."""
    monkeypatch.setattr(kernel_cache, "_loaded", {})
    monkeypatch.setattr(kernel_cache, "_launchers", {})


def scaled(cache: KernelCache, kernel: Scale, count: int = 5) -> np.ndarray:
    """Return the kernel's result for 0, 1, 2, ..."""
    x, y = np.arange(count, dtype=np.float32), np.zeros(count, np.float32)
    bind(kernel, [x, y], [count], cache=cache)()
    return y


def test_a_version_is_that_of_every_module_of_the_generators() -> None:
    """Modules in subfolders count too. Otherwise code emitted by an older module would be found under the same key."""
    kernels = ROOT / "backends" / "tvm" / "kernels"
    hashed = [path for path in map(str, kernel_cache._sources()) if "/tvm/kernels/" in path]
    assert sorted(hashed) == sorted(str(path) for path in kernels.rglob("*.py"))
    assert any("/arithmetic/" in path for path in hashed)


def expected(factor: float, count: int = 5) -> np.ndarray:
    return np.arange(count, dtype=np.float32) * np.float32(factor)


@pytest.mark.usefixtures("fresh")
def test_a_kernel_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, kernel = KernelCache(host_isa(), tmp_path), Scale(3.0)
    np.testing.assert_array_equal(scaled(first, kernel), expected(3.0))
    assert first.compiled == 2  # one is the runner, which every process needs
    monkeypatch.setattr(kernel_cache, "_loaded", {})
    again = KernelCache(host_isa(), tmp_path)
    np.testing.assert_array_equal(scaled(again, kernel), expected(3.0))
    assert again.compiled == 0
    np.testing.assert_array_equal(scaled(again, Scale(4.0)), expected(4.0))
    assert again.compiled == 1


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "text"])
@pytest.mark.usefixtures("fresh")
def test_a_damaged_file_is_compiled_again(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Scale(5.0)
    scaled(KernelCache(host_isa(), tmp_path), kernel)
    path = KernelCache(host_isa(), tmp_path).path(kernel)
    assert path is not None
    data = path.read_bytes()
    middle = len(data) // 2
    made = {
        "cut": data[:middle],
        "empty": b"",
        "flipped": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
        "text": b"not a shared object\n" * 100,
    }[damage]
    path.unlink()  # the loaded kernel stays intact
    path.write_bytes(made)
    monkeypatch.setattr(kernel_cache, "_loaded", {})
    again = KernelCache(host_isa(), tmp_path)
    np.testing.assert_array_equal(scaled(again, kernel), expected(5.0))
    assert again.compiled == 1
    assert path.read_bytes() == data


@pytest.mark.usefixtures("fresh")
def test_a_runner_that_is_not_stored_is_compiled_before_kernels_are_loaded(tmp_path: Path) -> None:
    """Another process may have stored a kernel, and kept its runner in memory."""
    cache, kernel = KernelCache(host_isa(), tmp_path), Scale(6.0)
    scaled(cache, kernel)
    path = cache.path(Runner())
    assert path is not None
    path.unlink()
    kernel_cache._loaded.clear()
    kernel_cache._launchers.clear()
    again = KernelCache(host_isa(), tmp_path)
    np.testing.assert_array_equal(scaled(again, kernel), expected(6.0))
    assert again.compiled == 1


FILL = """
import sys
sys.modules["torch"] = None  # which TVM imports where it can, for seconds
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from tests.test_kernel_cache import Scale, scaled, expected
from treadle.backends.tvm.kernels.host.cache import KernelCache
from treadle.backends.tvm.kernels.isa import host_isa
print("ready", flush=True)
for i in range(int(sys.argv[3])):
    assert (scaled(KernelCache(host_isa(), Path(sys.argv[2])), Scale(float(i))) == expected(float(i))).all()
print("done", flush=True)
"""


def filling(folder: Path, count: int) -> subprocess.Popen[str]:
    """Start a process that compiles `count` kernels into a folder; return the process."""
    command = [sys.executable, "-c", FILL, str(ROOT), str(folder), str(count)]
    temporary = {**os.environ, "TMPDIR": str(folder.parent)}  # a killed process leaves its folders there
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder, env=temporary)


def test_processes_that_fill_it_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    processes = [filling(folder, 6) for _ in range(2)]
    outputs = [p.communicate(timeout=120)[0] for p in processes]
    assert [p.returncode for p in processes] == [0, 0]
    assert all(text.endswith("done\n") for text in outputs)
    assert len(list(folder.iterdir())) == 7  # with the runner; no file is incomplete


@pytest.mark.skipif(os.name != "posix", reason="kill -9 is POSIX's")
@pytest.mark.usefixtures("fresh")
def test_processes_killed_at_any_moment_leave_no_wrong_kernel(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for _ in range(3):
        process = filling(folder, 500)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(float(rng.uniform(0.05, 1.0)))  # kill it at any moment
        process.send_signal(signal.SIGKILL)
        process.communicate()
    kernels = [Scale(float(i)) for i in range(8)]
    cache = KernelCache(host_isa(), folder)
    for i, kernel in enumerate(kernels):
        np.testing.assert_array_equal(scaled(cache, kernel), expected(float(i)))
    left = [f.name for f in folder.iterdir() if f.name.startswith(".")]
    assert len(left) <= 3 * (os.cpu_count() or 1)  # at most the files that were being written


@pytest.mark.parametrize(
    ("linkers", "reason"),
    [((), "there is no linker (ld, ld.lld, cc, clang)"),
     ((("/bin/sh", "-c", "echo it is full >&2; echo more; exit 1"),), "sh fails: it is full"),
     ((("/bin/true",),), "true fails: exit status 0"),
     ((("/nowhere/ld",),), "ld fails: [Errno 2] No such file or directory: '/nowhere/ld'")],
    ids=["none", "fails", "writes-nothing", "vanished"],
)  # fmt: skip
@pytest.mark.usefixtures("fresh")
def test_without_a_linker_that_works_kernels_live_in_the_process(
    linkers: tuple[tuple[str, ...], ...], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linking, "linkers", lambda: linkers)
    monkeypatch.setattr(linking, "_failures", {})
    monkeypatch.setattr(linking, "this_platform", lambda: Platform("Linux", "x86_64"))
    cache = KernelCache(host_isa(), tmp_path)
    np.testing.assert_array_equal(scaled(cache, Scale(7.0)), expected(7.0))
    assert list(tmp_path.iterdir()) == []
    assert cache.notes == [f"2 kernels are kept in memory, so every process compiles them: {reason}"]
    again = KernelCache(host_isa(), tmp_path)  # this process has them
    np.testing.assert_array_equal(scaled(again, Scale(7.0)), expected(7.0))
    assert (again.compiled, again.notes) == (0, [])


@pytest.mark.usefixtures("fresh")
def test_another_linker_stands_in_for_one_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = tmp_path / "calls"
    broken = ("/bin/sh", "-c", f"echo . >> {calls}; exit 1")
    installed = linking.linkers()
    if not installed:
        pytest.skip("no linker")
    monkeypatch.setattr(linking, "linkers", lambda: (broken, *installed))
    monkeypatch.setattr(linking, "_failures", {})
    cache = KernelCache(host_isa(), tmp_path / "kernels")
    np.testing.assert_array_equal(scaled(cache, Scale(7.5)), expected(7.5))
    assert calls.read_text() == ".\n"  # it is not tried again
    assert cache.notes == []
    assert len(list((tmp_path / "kernels").iterdir())) == 2


def test_each_call_of_a_table_gets_an_empty_result() -> None:
    """TVM checks it before a call of a kernel in memory, and what a kernel leaves there is not the next one's."""
    seen = []

    def called(handle: int, arguments: int, count: int, result: int) -> int:
        type_index = ctypes.c_int32.from_address(result)
        seen.append(type_index.value)
        type_index.value = 1_375_082_320
        return 0

    function = PROTOTYPE(called)
    table = np.zeros((3, RECORD), np.int64)
    table[:, 0] = ctypes.cast(function, ctypes.c_void_p).value
    assert _TableRunner(KernelCache(host_isa()).entries([])[Runner()])(table) == -1
    assert seen == [0, 0, 0]


@pytest.mark.usefixtures("fresh")
def test_a_folder_that_cannot_be_written_costs_the_file_only(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    np.testing.assert_array_equal(scaled(KernelCache(host_isa(), blocked / "kernels"), Scale(8.0)), expected(8.0))


@pytest.mark.parametrize("name", [name for name, isa in ISAS.items() if runs_here(isa)])
@pytest.mark.usefixtures("fresh")
def test_every_instruction_set_of_this_machine_runs(name: str, tmp_path: Path) -> None:
    np.testing.assert_array_equal(scaled(KernelCache(ISAS[name], tmp_path), Scale(0.5), 100), expected(0.5, 100))


@pytest.mark.parametrize("lacking", ["avx512f", "avx2"])
def test_a_machine_without_a_feature_gets_the_next_best(lacking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ISAS["x86-64-v4"].needs | {"sse4_2", "popcnt"}
    monkeypatch.setattr(instruction_sets.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(instruction_sets, "cpu_flags", lambda: flags - {lacking})
    assert host_isa.__wrapped__().name == {"avx512f": "x86-64-v3", "avx2": "x86-64-v2"}[lacking]


def test_a_machine_of_which_we_know_nothing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instruction_sets.platform, "machine", lambda: "s390x")
    with pytest.raises(BackendError, match="the tvm backend has no kernels for s390x"):
        host_isa.__wrapped__()


def test_messages_of_the_compiler_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    import tvm

    words = "x" * 2500

    def compile_it(*_: object, **__: object) -> None:
        raise ValueError(f"begin{words}end")

    monkeypatch.setattr(tvm, "compile", compile_it)
    with pytest.raises(BackendError, match="does not compile for") as caught:
        assembly(Scale(4.0), ISAS["x86-64-v3"])
    assert caught.value.received == words[: 2000 - len("end")] + "end"


def test_another_machine_can_be_read_and_not_run() -> None:
    other = ISAS["arm64" if host_isa().machine != "aarch64" else "x86-64-v3"]
    text = assembly(Scale(3.0), other)
    assert ("fmul" if other.name == "arm64" else "vmulss") in text
    with pytest.raises(BackendError, match="do not run on this machine"):
        KernelCache(other).entries([Scale(2.0)])


def test_targets_name_instruction_sets() -> None:
    assert {name for name in HARDWARE if Target(name).kind == "isa"} == set(ISAS)
    assert isa_of(Target("cpu")) is host_isa()
    assert isa_of(Target("x86-64-v3")) is ISAS["x86-64-v3"]
    assert isa_of(Target("cuda:1")) is isa_of(Target("h100")) is DEVICES["cuda"]


def test_a_kernel_is_read_as_tvm_script() -> None:
    text = tvm_script(Scale(2.0), host_isa())
    assert text.startswith("@T.prim_func")
    assert "x[i] * T.float32(2.0))" in text.replace("p]", "i]").replace("[p", "[i")


def test_threads_are_the_callers_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TVM_NUM_THREADS", "3")
    for count in (1, 2, 1):
        tvm_runtime.set_threads(count)
        assert tvm_runtime.threads() == count


def test_missing_and_refused_runtime_features_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tvm_runtime, "version", lambda: "the version")
    with pytest.raises(BackendError, match=r"TVM's runtime has no runtime\.Nothing") as caught:
        tvm_runtime._call("runtime.Nothing")
    assert caught.value.received == "the version"
    # A function that counts its arguments: others read beyond the end of too few, which may crash.
    with pytest.raises(BackendError, match=r"TVM's runtime\.NumThreads failed") as caught:
        tvm_runtime._call("runtime.NumThreads", 1)
    assert caught.value.received == "1"


def test_a_pool_that_is_as_asked_or_lost_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    tvm_runtime.set_threads(2)
    monkeypatch.setattr(tvm_runtime, "_call", lambda *_: pytest.fail("it is configured again"))
    tvm_runtime.set_threads(2)
    monkeypatch.setattr(tvm_runtime._configured, "lost", True, raising=False)
    tvm_runtime.set_threads(3)


@pytest.mark.parametrize(("said", "kept"), [(None, "1000"), ("7", "7")])
def test_idle_threads_sleep_before_long(monkeypatch: pytest.MonkeyPatch, said: str | None, kept: str) -> None:
    """Otherwise a process on a busy machine waits for minutes at its end, because idle threads only yield their
    cores.
    """
    monkeypatch.setenv(tvm_runtime.SPINS, said or "")
    if said is None:
        monkeypatch.delenv(tvm_runtime.SPINS)
    thread = Thread(target=tvm_runtime.set_threads, args=(1,))
    thread.start()
    thread.join()
    assert os.environ[tvm_runtime.SPINS] == kept


@pytest.fixture
def _own_function() -> Iterator[None]:
    add_function("halved_sum", formula(lambda x: (x + x.abs()) * 0.5))
    yield
    del FUNCTIONS["halved_sum"]
    ADDED.discard("halved_sum")


@pytest.mark.usefixtures("fresh", "_own_function")
def test_a_kernel_with_a_function_of_another_package_leaves_no_file(tmp_path: Path) -> None:
    """The kernel's key contains only the op's name. A stored file would still be run after the function has changed."""
    chain = Chain(("f64",), (Instruction("halved_sum", (0,), "f64"),))
    kernel, kept = Pointwise(chain, 1, "11"), Scale(7.0)
    cache = KernelCache(host_isa(), tmp_path)
    x, y = np.array([-2.0, 3.0]), np.zeros(2)
    bind(kernel, [x, y], [2, 1, 1], cache=cache)()
    np.testing.assert_array_equal(y, [0.0, 3.0])
    scaled(cache, kept)
    assert cache.path(kernel) is None
    assert cache.path(kept) in list(tmp_path.iterdir())
    assert not [path for path in tmp_path.iterdir() if "halved_sum" in path.name]


@pytest.mark.usefixtures("_own_function")
def test_an_op_has_one_function() -> None:
    for name in ("halved_sum", "exp", "cast"):
        with pytest.raises(GraphError, match=f"op '{name}' has a function in the tvm backend already"):
            add_function(name, formula(lambda x: x))

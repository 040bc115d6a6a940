"""Decisions of the TVM backend that depend on the platform, for platforms that the tests do not run on."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import treadle
from tests.portability import small_models
from treadle.backends.tvm.kernels import isa as instruction_sets
from treadle.backends.tvm.kernels.host import cpu_features, linking, platforms, tvm_runtime
from treadle.backends.tvm.kernels.host.platforms import Platform, this_platform
from treadle.backends.tvm.kernels.isa import ISAS, host_isa
from treadle.ir.errors import BackendError

MAC = Platform("Darwin", "aarch64")
WINDOWS = Platform("Windows", "x86_64")
ARM = Platform("Linux", "aarch64", (2, 36))
INTEL = Platform("Linux", "x86_64", (2, 36))

NAMES = {
    MAC: ("libtvm_ffi.dylib", "arm64-apple-macosx11.0.0", "x86_64-unknown-linux-gnu"),
    WINDOWS: ("tvm_ffi.dll", "aarch64-unknown-linux-gnu", "x86_64-pc-windows-msvc"),
    ARM: ("libtvm_ffi.so", "aarch64-unknown-linux-gnu", "x86_64-unknown-linux-gnu"),
    INTEL: ("libtvm_ffi.so", "aarch64-unknown-linux-gnu", None),
}
"""The name of a library, and the triples of arm64 and x86-64, by platform."""


@pytest.mark.parametrize("here", NAMES, ids=str)
def test_libraries_and_triples(here: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    library, arm, intel = NAMES[here]
    assert here.library("tvm_ffi") == library
    monkeypatch.setattr(instruction_sets, "this_platform", lambda: here)
    for isa in ISAS.values():
        assert isa.llvm.get("mtriple") == (arm if isa.name == "arm64" else intel)


@pytest.mark.parametrize(
    ("system", "machine", "wanted"),
    [("Darwin", "arm64", MAC), ("Windows", "AMD64", WINDOWS), ("Linux", "aarch64", ARM), ("Linux", "x86_64", INTEL)],
)
def test_platforms_are_named_alike(
    system: str, machine: str, wanted: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(os, "confstr", lambda name: "glibc 2.36", raising=False)
    assert this_platform() == wanted


def test_a_c_library_that_is_not_glibc_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> str:
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(os, "confstr", unknown, raising=False)
    assert this_platform().glibc == ()


@pytest.mark.parametrize(
    ("here", "lacks"),
    [(MAC, None), (WINDOWS, None), (ARM, None), (INTEL, None), (Platform("Linux", "x86_64", (2, 27)), None),
     (Platform("Darwin", "x86_64"), "Darwin on x86_64"), (Platform("Windows", "aarch64"), "Windows on aarch64"),
     (Platform("Linux", "x86_64", (2, 17)), "Linux on x86_64 with glibc 2.17"),
     (Platform("Linux", "aarch64"), "Linux on aarch64 without glibc"),
     (Platform("Linux", "riscv64", (2, 36)), "Linux on riscv64")],
    ids=str,
)  # fmt: skip
def test_platforms_without_a_wheel_are_named(
    here: Platform, lacks: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tvm_runtime, "this_platform", lambda: here)
    monkeypatch.setattr(tvm_runtime.importlib.util, "find_spec", lambda name: None)
    if lacks is None:
        assert here.lacks_wheel() is None
        assert tvm_runtime.missing() == "TVM is not installed: pip install '.[tvm]'"
    else:
        assert (tvm_runtime.missing() or "").startswith(f"TVM has no wheel for {lacks}, only for Linux on x86-64")


@pytest.mark.parametrize("here", [MAC, WINDOWS, ARM], ids=str)
def test_libraries_that_are_loaded(here: Platform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test includes the folders in which Windows searches for libraries that the loaded libraries need."""
    loaded, searched = [], []

    def load(path: str, mode: int) -> str:
        loaded.append(Path(path).relative_to(tmp_path).as_posix())
        return path

    for name in ("tvm", "tvm_ffi", "apache_tvm.libs"):
        (tmp_path / name / "lib").mkdir(parents=True)
    monkeypatch.setattr(tvm_runtime, "this_platform", lambda: here)
    monkeypatch.setattr(
        tvm_runtime.importlib.util,
        "find_spec",
        lambda name: type("Spec", (), {"submodule_search_locations": [str(tmp_path / name)]}),
    )
    monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.setattr(os, "add_dll_directory", searched.append, raising=False)
    tvm_runtime._libraries.__wrapped__()
    assert loaded == [f"tvm_ffi/lib/{here.library('tvm_ffi')}", f"tvm/lib/{here.library('tvm_runtime')}"]
    assert searched == [str(tmp_path / name) for name in ("tvm_ffi/lib", "tvm/lib", "apache_tvm.libs")]


def test_a_library_that_does_not_load_where_there_is_no_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Installing it again, the advice elsewhere, would not help."""

    def load(path: str, mode: int) -> str:
        raise OSError("no such file")

    pytest.importorskip("tvm")
    monkeypatch.setattr(ctypes, "CDLL", load)
    for here, hint in ((INTEL, "pip install --force-reinstall"), (Platform("Linux", "x86_64"), 'backend="numpy"')):
        monkeypatch.setattr(tvm_runtime, "this_platform", lambda here=here: here)
        with pytest.raises(BackendError, match="TVM's runtime cannot be loaded") as caught:
            tvm_runtime._libraries.__wrapped__()
        assert hint in (caught.value.hint or "")
        assert ("without glibc" in (caught.value.received or "")) == ("numpy" in hint)


# -- linkers -----------------------------------------------------------------------------------------------------------

COMMANDS = {
    "ld": ["ld", "-shared", "-o", "y", "x"],
    "ld.lld": ["ld.lld", "-shared", "-o", "y", "x"],
    "cc": ["cc", "-shared", "-nostdlib", "-o", "y", "x"],
    "clang": ["clang", "-shared", "-nostdlib", "-o", "y", "x"],
}
APPLE = ["-dynamiclib", "-undefined", "dynamic_lookup", "-o", "y", "x"]


@pytest.mark.parametrize(
    ("here", "installed", "tools", "wanted"),
    [(ARM, [*COMMANDS], True, COMMANDS["ld"]), (ARM, ["cc", "clang"], True, COMMANDS["cc"]),
     (INTEL, ["ld.lld", "clang"], True, COMMANDS["ld.lld"]), (INTEL, [], True, None),
     (MAC, ["ld", "cc", "clang"], True, ["cc", *APPLE]), (MAC, ["clang"], True, ["clang", *APPLE]),
     (MAC, ["ld", "cc", "clang"], False, None), (WINDOWS, ["ld", "cc", "clang"], True, None)],
    ids=str,
)  # fmt: skip
def test_the_command_that_links(
    here: Platform, installed: list[str], tools: bool, wanted: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On macOS without Apple's tools no linker is run: it would open a window."""
    ran = []

    def run(command: tuple[str, ...], **_: object) -> subprocess.CompletedProcess[str]:
        ran.append(list(command))
        return subprocess.CompletedProcess(command, 0 if tools else 2, "", "")

    monkeypatch.setattr(linking, "this_platform", lambda: here)
    monkeypatch.setattr(linking.shutil, "which", lambda name: name if name in installed else None)
    monkeypatch.setattr(linking, "linkers", linking.linkers.__wrapped__)
    monkeypatch.setattr(linking, "_failures", {})
    monkeypatch.setattr(linking.subprocess, "run", run)
    monkeypatch.setattr(Path, "is_file", lambda path: str(path) == "y")
    assert linking.link(Path("x"), Path("y")) is (wanted is not None)
    if here is MAC:
        assert ran.pop(0) == ["xcode-select", "-p"]
    assert ran == ([] if wanted is None else [wanted])
    if wanted is None:
        names = {MAC: "there is no linker (cc, clang)", INTEL: "there is no linker (ld, ld.lld, cc, clang)"}
        assert linking.why_not() == names.get(here, "this platform's libraries are not linked")


# -- features of the CPU -----------------------------------------------------------------------------------------------

V3 = ISAS["x86-64-v3"].needs | {"sse4_2", "popcnt"}
V4 = ISAS["x86-64-v4"].needs | V3


@pytest.fixture
def _intel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend to be a 64-bit x86 machine, whose sources of features a test sets."""
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(instruction_sets, "cpu_flags", cpu_features.cpu_flags.__wrapped__)
    monkeypatch.delenv(instruction_sets.CHOICE, raising=False)


@pytest.mark.parametrize(
    ("cpuid", "listed", "executed", "wanted"),
    [(V4, V4, None, "x86-64-v4"), (V3, V4, V3, "x86-64-v3"), (V4, V3, V4, "x86-64-v4"), (V4, V3, V3, "x86-64-v3"),
     (V4, V4 - {"fma"}, V4 - {"avx2"}, "x86-64-v2"), (None, V3, None, "x86-64-v3"), (V3, None, None, "x86-64-v3"),
     (None, None, None, "x86-64")],
    ids=["agree", "emulator", "masked-list", "false-cpuid", "one-fails", "no-cpuid", "no-list", "neither"],
)  # fmt: skip
@pytest.mark.usefixtures("_intel")
def test_cpuid_counts_if_the_instructions_run(
    cpuid: frozenset[str] | None,
    listed: frozenset[str] | None,
    executed: frozenset[str] | None,
    wanted: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def executes(flags: frozenset[str] | list[str]) -> bool:
        assert executed is not None  # no child is started without need
        return set(flags) <= executed

    monkeypatch.setattr(cpu_features, "read_cpuid", lambda: cpuid)
    monkeypatch.setattr(cpu_features, "read_cpuinfo", lambda: listed)
    monkeypatch.setattr(cpu_features, "executes", executes)
    assert host_isa.__wrapped__().name == wanted


@pytest.mark.usefixtures("_intel")
def test_an_instruction_set_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_features, "read_cpuid", lambda: V3)
    monkeypatch.setattr(cpu_features, "read_cpuinfo", lambda: V3)
    for name in ("x86-64-v2", "x86-64-v3"):
        monkeypatch.setenv(instruction_sets.CHOICE, name)
        assert host_isa.__wrapped__() is ISAS[name]
    for name, hint in (("arm64", "x86-64"), ("v3", "x86-64"), ("x86-64-v4", "x86-64-v3")):
        monkeypatch.setenv(instruction_sets.CHOICE, name)
        monkeypatch.setattr(instruction_sets, "executes", lambda flags: False)
        with pytest.raises(BackendError, match="TREADLE_ISA names") as caught:
            host_isa.__wrapped__()
        assert name in (caught.value.received or "")
        assert hint in (caught.value.hint or "")
        assert caught.value.hint is not None and (name == "v3" or name not in caught.value.hint.split(", "))
    monkeypatch.setattr(instruction_sets, "executes", lambda flags: True)
    assert host_isa.__wrapped__() is ISAS["x86-64-v4"]  # the CPU's own report was wrong


x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="CPUID is x86's")


@x86
def test_the_cpu_executes_what_it_reports() -> None:
    found = cpu_features.read_cpuid()
    if found is None:
        pytest.skip("this system forbids code that a process writes")
    known = {flag for flags in cpu_features._BITS.values() for flag in flags.values()}
    assert found <= known
    listed = cpu_features.read_cpuinfo()
    assert listed is None or found == listed or "hypervisor" in Path("/proc/cpuinfo").read_text()
    assert cpu_features.executes(found) in (True, None)


@x86
@pytest.mark.skipif(os.name != "posix", reason="fork is POSIX's")
def test_a_child_that_an_instruction_ends_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    undefined = "0f0b"  # ud2
    monkeypatch.setattr(cpu_features, "_EXAMPLES", {"good": "90", "bad": undefined})
    if cpu_features.executes(["good"]) is None:
        pytest.skip("this system forbids code that a process writes")
    assert cpu_features.executes(["good"]) is True
    assert cpu_features.executes(["good", "bad"]) is False


@pytest.mark.parametrize("saved", [0, 0b110, 0b1110_0110, (0b11 << 17) | 0b1110_0110])
@x86
def test_registers_that_the_system_does_not_save_are_not_used(saved: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU reports every feature; XGETBV reports the registers."""

    def function(code: str, result: object, *arguments: object) -> object:
        if not arguments:
            return lambda: saved

        def cpuid(leaf: int, subleaf: int, to: int) -> None:
            words = (ctypes.c_uint32 * 4).from_address(to)
            words[:] = [7 if (leaf, subleaf) == (0, 0) else 1 if (leaf, subleaf) == (7, 0) else 0xFFFF_FFFF] * 4
            if (leaf, subleaf) == (7, 0):
                words[1:] = [0xFFFF_FFFF] * 3

        return cpuid

    monkeypatch.setattr(cpu_features, "_function", function)
    found = cpu_features.read_cpuid()
    assert found is not None
    assert {"sse4_2", "popcnt", "movbe", "bmi1", "bmi2"} <= found
    assert ({"avx2", "fma", "f16c"} <= found) == bool(saved & 0b110)
    assert any(flag.startswith("avx512") for flag in found) == bool(saved & 0b1110_0000)
    assert {"amx_tile", "amx_bf16", "amx_int8"}.issubset(found) == bool(saved >> 17)


def test_folders_of_libraries_that_do_not_exist_are_not_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    added: list[str] = []
    monkeypatch.setattr(os, "add_dll_directory", added.append, raising=False)
    platforms.add_folders(tmp_path, tmp_path / "missing")
    assert added == [str(tmp_path)]


def test_the_small_models_that_other_environments_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the NumPy backend; the scripts of tests/portability/ run them on TVM."""
    artifact, numbers = tmp_path / "model.treadle", tmp_path / "numbers.npz"
    treadle.compile("gpt2", backend="numpy", **small_models.SIZES).save(artifact)
    options = ["--backend", "numpy", "--only", "gpt2", "bert", "trained", "--artifact", str(artifact)]
    monkeypatch.setattr(sys, "argv", ["small_models", str(numbers), *options])
    small_models.main()
    with np.load(numbers) as file:
        assert {name.partition(".")[0] for name in file.files} == {"gpt2", "bert", "trained", "loaded"}
        assert np.diff(file["trained.losses"]).max() < 0
        np.testing.assert_array_equal(file["gpt2.2x40"], file["loaded.logits"])

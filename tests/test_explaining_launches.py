"""`treadle explain MODEL device` with the tvm backend: kernels, launches, copies and memory, without a device."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from treadle.backends.registry import find_backend
from treadle.ir.errors import BackendError, UsageError

if find_backend("tvm").available():
    pytest.skip("needs TVM", allow_module_level=True)

from typer.testing import CliRunner

import treadle
from tests.golden import Golden
from tests.support.gpu_emulator.emulation import compiler
from tests.support.gpu_emulator.emulator_runtime import EmulatorRuntime
from treadle.backends.tvm.kernels.devices import cuda_compiler
from treadle.backends.tvm.kernels.devices.device import Device
from treadle.backends.tvm.runtimes.plan_limits import bytes_by_kind
from treadle.cli import app
from treadle.explaining import device_launches
from treadle.explaining.device import explain_device
from treadle.explaining.device_launches import LaunchReport
from treadle.ir.device_limits import LIMITS

SMALL: dict[str, Any] = {"layers": 2, "dim": 64, "heads": 4, "vocab": 100}
needs_compiler = pytest.mark.skipif(
    cuda_compiler.missing_compiler() is not None, reason="needs nvidia-cuda-nvrtc-cu12 and nvidia-cuda-nvcc-cu12"
)


@treadle.model
def tiny(tokens: treadle.i64["B S"]) -> Any:  # type: ignore[valid-type]
    return treadle.layer_norm(treadle.embed(tokens, 10, 32, name="wte"), name="ln")


def explained(model: Any = "gpt2", **options: Any) -> LaunchReport:
    found = explain_device(model, **{"backend": "tvm", **(SMALL if isinstance(model, str) else {}), **options})
    assert isinstance(found, LaunchReport)
    return found


@pytest.mark.parametrize("target", ["opencl", "webgpu"])
def test_launches_and_bytes_are_those_of_the_executable(target: str) -> None:
    exe = treadle.compile("gpt2", backend="tvm", target=target, **SMALL).executable
    sizes = {"B": 2, "S": 9}
    table = exe.launch_table("main", **sizes)  # type: ignore[attr-defined]
    main = explained(target=target, sizes=sizes).entries[0]
    assert sum(main.launches.values()) == len(table.launches)
    assert main.blocks == sum(launch.blocks for launch in table.launches)
    assert main.memory == bytes_by_kind(exe.machine.program.plan("main", sizes))  # type: ignore[attr-defined]
    assert (main.inputs, main.outputs) == (("tokens i64[B, S]",), ("logits f32[B, S, 100]",))
    assert main.reports and main.sizes == sizes


def test_the_step_is_part_of_the_report() -> None:
    found = explained(target="opencl")
    assert [entry.name for entry in found.entries] == ["main", "prefill", "step", "verify"]
    step = found.entries[2]
    assert step.sizes == {"B": 1, "R": 1, "C": 129} and "states" in step.memory
    assert step.memory["states"] == 4 * 129 * 64 * 4 + 4 * (-(-129 * 64 * 4 // 256) * 256 - 129 * 64 * 4)
    assert [entry.name for entry in explained("bert", target="opencl", hidden=64).entries] == ["main"]


def test_a_slow_form_is_named_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    small = Device.of("webgpu", replace(LIMITS["webgpu"], shared=0))
    monkeypatch.setattr(device_launches, "isa_of", lambda target: small)
    slow = [kernel for kernel in explained(target="webgpu").kernels if kernel.why_slow]
    assert {kernel.threads for kernel in slow} == {64} and not any(kernel.shared for kernel in slow)
    norm = next(kernel for kernel in slow if kernel.name == "layer_norm_f32")
    assert "one task for each thread, because of `" in str(norm) and "h: layer_norm (models/gpt2.py:64" in str(norm)


@needs_compiler
def test_registers_and_spills_of_cuda_kernels() -> None:
    found = explained(tiny, target="h100")
    assert found.compiler == "as ptxas reports them for sm_90"
    assert all(kernel.registers and kernel.spilled is not None for kernel in found.kernels)
    other = explained(tiny, target="opencl")
    assert other.compiler == "" and all(kernel.registers is None for kernel in other.kernels)


def test_without_a_compiler_it_says_what_installs_it(monkeypatch: pytest.MonkeyPatch, golden: Golden) -> None:
    monkeypatch.setattr(device_launches, "missing_compiler", lambda: "NVRTC cannot be found: pip install '.[cuda]'")
    found = explained(target="cuda")
    assert "  registers: NVRTC cannot be found: pip install '.[cuda]'" in str(found).splitlines()
    assert all(kernel.registers is None for kernel in found.kernels)
    golden("pages/explain_device_launches.txt", f"{found}\n")


def test_limits_that_a_call_exceeds_are_listed() -> None:
    sizes = {"B": 400, "S": 1024}
    (line,) = [line for line in explained(target="webgpu", sizes=sizes).entries[0].exceeded if "output logits" in line][
        :1
    ]
    assert f"{LIMITS['webgpu'].allocation:,}" in line or f"{LIMITS['webgpu'].largest:,}" in line
    assert not explained(target="opencl", sizes=sizes).entries[0].exceeded


def test_an_arena_on_a_device_keeps_to_its_budget() -> None:
    """Storages of a device are aligned to 256 bytes, those of the host to 64."""
    small, sizes = {"layers": 2, "dim": 36, "heads": 3, "vocab": 31}, {"B": 1, "S": 33}
    with pytest.raises(BackendError, match="does not fit into its memory limit") as caught:
        explain_device("gpt2", target="webgpu", memory=3000, sizes=sizes, **small)
    (least,) = re.findall(r"memory=(\d+)", str(caught.value.hint))
    found = explain_device("gpt2", target="webgpu", memory=int(least), sizes=sizes, **small)
    assert isinstance(found, LaunchReport)
    assert found.entries[0].memory["arena"] <= int(least)


def test_the_command_prints_the_report() -> None:
    words = ["explain", "gpt2", "device", "--set", "layers=1", "--target", "webgpu"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("gpt2 on webgpu, with the tvm backend\n\nkernels:\n")
    facts = json.loads(CliRunner().invoke(app, [*words, "--json", "--sizes", "S=16"]).stdout)
    assert facts["target"] == "webgpu" and facts["entries"][0]["sizes"] == {"B": 1, "S": 16}


def test_other_targets_backends_and_options_are_refused() -> None:
    for target in ("cpu", "arm64"):
        with pytest.raises(UsageError, match=f"{target} is not a device"):
            explain_device("gpt2", target=target)
    with pytest.raises(UsageError, match="programs for devices are those of the torch and the tvm backend"):
        explain_device("gpt2", backend="numpy")
    with pytest.raises(BackendError, match="the torch backend runs on the CPU and NVIDIA GPUs only"):
        explain_device("gpt2", backend="torch", target="webgpu")
    for option, value in (("memory", "1GB"), ("sizes", {"B": 1})):
        with pytest.raises(UsageError, match=f"{option} applies to the tvm backend's program only"):
            explain_device("gpt2", backend="torch", **{option: value})


@needs_compiler
def test_the_assembly_of_a_cuda_kernel_is_ptx() -> None:
    exe = treadle.compile(tiny, backend="tvm", target="h100").executable
    text = exe.assembly("layer_norm_f32")  # type: ignore[attr-defined]
    assert ".target sm_90" in text and ".entry treadle_layer_norm_f32" in text
    with pytest.raises(BackendError, match="there is no kernel 'nothing'"):
        exe.assembly("nothing")  # type: ignore[attr-defined]
    other = treadle.compile(tiny, backend="tvm", target="webgpu").executable
    with pytest.raises(BackendError, match="kernels for webgpu have no assembly"):
        other.assembly("layer_norm_f32")  # type: ignore[attr-defined]


@pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")
def test_a_call_copies_and_launches_what_the_report_lists() -> None:
    exe = treadle.compile(tiny, backend="tvm", target="cuda")
    runtime = EmulatorRuntime()
    exe.executable.machine.open = lambda: runtime  # type: ignore[attr-defined]
    tokens = np.arange(6).reshape(2, 3)
    exe(tokens=tokens)
    runtime.memory.forget_counts()
    before = runtime.launches
    exe(tokens=tokens)
    main = explained(tiny, target="cuda", sizes={"B": 2, "S": 3}).entries[0]
    memory = runtime.memory
    copies = (memory.copies_in, memory.copies_out, memory.waits)
    assert copies == (len(main.inputs), len(main.outputs) + main.reports, 1)
    assert runtime.launches - before == sum(main.launches.values())
    assert memory.used == sum(main.memory.values())

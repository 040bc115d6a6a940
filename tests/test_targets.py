"""`treadle targets`: devices of this machine, compilers, and what the tests prove for each target."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.golden import FOLDER, Golden
from treadle.backends.tvm.runtimes import machine_devices as devices
from treadle.backends.tvm.runtimes.machine_devices import list_devices, what_to_install
from treadle.cli import app
from treadle.ir.hardware import HARDWARE
from treadle.reporting import target_report
from treadle.reporting.target_promises import LEVELS, PROMISES, promise_table
from treadle.reporting.target_report import target_facts, target_lines

START, END = "<!-- levels of targets: written by `make golden` -->\n", "<!-- end of the levels -->\n"


def test_the_page_of_devices_has_the_table(golden: Golden) -> None:
    path = FOLDER / "../../docs/devices.md"
    before, _, rest = path.read_text(encoding="utf-8").partition(START)
    _, end, after = rest.partition(END)
    assert end, "docs/devices.md has the two comments around the table"
    golden("../../docs/devices.md", f"{before}{START}{promise_table()}{END}{after}")


def test_every_kind_of_target_has_a_promise_and_each_level_a_meaning() -> None:
    promised = {name for each in PROMISES for name in each.targets}
    assert {row.kind for row in HARDWARE.values()} - {"isa"} <= promised
    assert {each.level for each in PROMISES} <= set(LEVELS)
    known = {name for each in PROMISES if each.backend for name in each.targets}
    assert known <= set(HARDWARE), "a target that a backend supports is a target of compile"


def test_the_command_prints_the_facts() -> None:
    facts = json.loads(CliRunner().invoke(app, ["targets", "--json"]).stdout)
    assert [each["target"] for each in facts["targets"]] == ["cpu", "cuda", "opencl", "webgpu", "metal"]
    assert all(bool(each["devices"]) == (each["missing"] is None) for each in facts["targets"])
    assert "h100" in facts["described"] and "cuda" not in facts["described"]
    text = CliRunner().invoke(app, ["targets"]).stdout
    assert facts["targets"][0]["devices"][0]["name"] in text
    assert all(f"{level}: " in text for level in LEVELS)


def test_the_report_imports_neither_pytorch_nor_tvm() -> None:
    code = (
        "import sys\nfrom treadle.reporting.target_report import target_facts\ntarget_facts()\n"
        "print([name for name in ('torch', 'tvm') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the packages of devices uninstalled, and hide NVIDIA's driver."""
    for name in ("pyopencl", "wgpu", "torch"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(devices, "cuda_driver", lambda: None)


def test_without_packages_it_says_what_adds_them(bare: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_report, "missing_compiler", lambda: "pip install '.[cuda]'")
    monkeypatch.setattr("shutil.which", lambda name: None)
    facts = target_facts()
    missing = {each["target"]: each["missing"] for each in facts["targets"]}
    assert missing["opencl"].endswith("[opencl]'") and missing["webgpu"].endswith("[webgpu]'")
    assert missing["cuda"] == "NVIDIA's driver"
    assert all(each["missing"] for each in facts["compilers"])
    text = [line for line in target_lines(facts) if isinstance(line, str)]
    assert any(line.lstrip().startswith("the torch backend, for cpu and cuda, needs pip") for line in text)


def test_a_package_without_a_driver_names_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> list[Any]:
        raise RuntimeError("PLATFORM_NOT_FOUND_KHR")

    monkeypatch.setattr(devices, "LISTS", {"opencl": fails, "webgpu": list})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert list_devices("opencl") == list_devices("webgpu") == []
    assert "pocl-opencl-icd" in what_to_install("opencl") and "mesa-vulkan-drivers" in what_to_install("webgpu")


class _Driver:
    """The functions of NVIDIA's driver that list GPUs, for two GPUs."""

    names = (b"NVIDIA H100 80GB HBM3", b"NVIDIA L4")

    def __init__(self, failure: int = 0) -> None:
        self.failure = failure

    def cuInit(self, flags: int) -> int:
        return self.failure

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = len(self.names)
        return 0

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:
        device._obj.value = ordinal
        return 0

    def cuDeviceGetName(self, text: Any, size: int, device: ctypes.c_int) -> int:
        text.value = self.names[device.value]
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: ctypes.c_int) -> int:
        value._obj.value = {75: (9, 8), 76: (0, 9)}[attribute][device.value]
        return 0


def test_gpus_are_listed_by_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "cuda_driver", _Driver)
    assert [str(each) for each in list_devices("cuda")] == [
        "NVIDIA H100 80GB HBM3 (CUDA, compute capability 9.0)",
        "NVIDIA L4 (CUDA, compute capability 8.9)",
    ]
    monkeypatch.setattr(devices, "cuda_driver", lambda: _Driver(failure=100))  # CUDA_ERROR_NO_DEVICE
    assert list_devices("cuda") == []


def test_pytorch_s_build_is_read_from_its_version_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "version.py").write_text(
        "from typing import Optional\n__version__ = '2.13.0+cu128'\ncuda: Optional[str] = '12.8'\nhip = None\n"
    )
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "torch" else find(name))
    facts = target_facts()
    assert facts["torch"] == {"version": "2.13.0+cu128", "cuda": "12.8"}
    assert "\nPyTorch 2.13.0+cu128 is built for CUDA 12.8" in [*target_lines(facts)]

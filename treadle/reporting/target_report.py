"""The report of `treadle targets`: devices of this machine, what can be compiled here, and the level of each target."""

from __future__ import annotations

import ast
import importlib.util
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from treadle.backends.tvm.kernels.devices.cuda_compiler import missing_compiler
from treadle.backends.tvm.kernels.isa import host_isa
from treadle.backends.tvm.runtimes.machine_devices import LISTS, MachineDevice, list_devices, what_to_install
from treadle.files.installation import pip_install
from treadle.ir.errors import TreadleError
from treadle.ir.hardware import HARDWARE
from treadle.ir.target import Target
from treadle.reporting import Facts
from treadle.reporting.tables import plain_table
from treadle.reporting.target_promises import LEVELS, PROMISES


def target_facts() -> Facts:
    """Return this machine's devices by target, the compilers, the hardware that targets describe, and the promises.

    No device is opened, and PyTorch and TVM are not imported.
    """
    return {
        "targets": [_cpu(), *(_devices(kind) for kind in LISTS)],
        "torch": _torch(),
        "compilers": [*_compilers()],
        "described": {name: row.description for name, row in HARDWARE.items() if Target(name).is_elsewhere},
        "promises": [asdict(each) for each in PROMISES],
        "levels": LEVELS,
    }


def _cpu() -> Facts:
    try:
        name, missing = host_isa().name, None
    except TreadleError as error:
        name, missing = "unknown", error.what
    cores = Target("cpu").cores()
    device = MachineDevice(name, f"{cores} cores" if cores != 1 else "1 core")
    return {"target": "cpu", "devices": [asdict(device)], "missing": missing}


def _devices(kind: str) -> Facts:
    """Return the devices of a kind, and what to install if there are none."""
    devices = list_devices(kind)
    return {
        "target": kind,
        "devices": [asdict(each) for each in devices],
        "missing": None if devices else what_to_install(kind),
    }


def _torch() -> Facts:
    """Return the version of PyTorch, and the version of CUDA that it was built with; None for what is missing.

    Both are read from its file `version.py`: importing PyTorch takes seconds.
    """
    spec = importlib.util.find_spec("torch")
    values: dict[str, str | None] = {"__version__": None, "cuda": None}
    if spec is not None and spec.origin is not None:
        for statement in ast.parse((Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")).body:
            targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
            for each in targets:
                if isinstance(each, ast.Name) and each.id in values:
                    values[each.id] = ast.literal_eval(statement.value)  # type: ignore[attr-defined]
    return {"version": values["__version__"], "cuda": values["cuda"]}


def _compilers() -> Iterator[Facts]:
    """Yield each compiler: its use, and what to install if it is missing."""
    yield {
        "compiler": "NVRTC and ptxas",
        "use": "compile kernels for cuda: PTX, registers and spills without a GPU",
        "missing": missing_compiler(),
    }
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
    yield {
        "compiler": "C++ compiler",
        "use": "compiles the emulator of CUDA, for the tests",
        "missing": None if compiler else "a C++ compiler; on Debian, g++",
    }


def target_lines(facts: Facts) -> Iterator[Table | str]:
    """Yield the tables and lines that `treadle targets` prints."""
    devices = plain_table("target", "devices of this machine", "through", numbers=set())
    for target in facts["targets"]:
        for device in target["devices"]:
            through = device["interface"] + ", in software" * device["is_software"]
            devices.add_row(target["target"], device["name"], through)
        if not target["devices"]:
            devices.add_row(target["target"], "none", f"needs {target['missing']}")
    yield devices
    yield f"\n{_torch_line(facts['torch'])}"
    yield f"other targets describe hardware, to compile and inspect programs for it: {', '.join(facts['described'])}\n"
    compilers = plain_table("compiler", "use", "here", numbers=set())
    for each in facts["compilers"]:
        compilers.add_row(each["compiler"], each["use"], each["missing"] or "installed")
    yield compilers
    yield ""
    promises = plain_table(
        "target", "level", "executed by tests", "assembled by tests", "only with hardware", numbers=set()
    )
    for each in facts["promises"]:
        title = ", ".join(each["targets"]) + (f", {each['backend']}" if each["backend"] else "")
        promises.add_row(title, each["level"], each["executed"] or "no", each["assembled"] or "no", each["hardware"])
    yield promises
    yield ""
    yield from (f"{level}: {about}" for level, about in facts["levels"].items())


def _torch_line(torch: Facts) -> str:
    if torch["version"] is None:
        return f"the torch backend, for cpu and cuda, needs {pip_install('torch')}"
    built = f"for CUDA {torch['cuda']}" if torch["cuda"] else "without CUDA: the torch backend runs on the CPU only"
    return f"PyTorch {torch['version']} is built {built}"

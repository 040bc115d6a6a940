"""Models as folders for a browser: a page that runs the model's main entry on WebGPU, at one set of sizes.

    index.html, treadle.js    the page, and the module that loads and runs the model
    model.json                ports, the launch table, its bindings, and the files
    kernel_00.wgsl ...        the kernels, one for each sharing of bindings (`kernels.devices.wgsl_kernel_text`)
    weights_00.bin ...        weights and constants as the device stores them, in files of at most `PIECE` bytes

A browser needs a server, since it reads no files next to a page of a file: `python -m http.server -d FOLDER`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from treadle.backends.protocol import Port
from treadle.backends.tvm.executable import KernelExecutable
from treadle.backends.tvm.kernels.devices.device import Device
from treadle.backends.tvm.kernels.devices.wgsl_kernel_text import Sharing
from treadle.backends.tvm.runtimes.device_machine import DeviceMachine
from treadle.backends.tvm.runtimes.launch_bindings import LaunchBindings, bind_launch
from treadle.backends.tvm.runtimes.launch_table import LaunchTable
from treadle.backends.tvm.runtimes.plan_limits import located, refuse
from treadle.backends.tvm.spaces import Fixed, Input, Output, Space, Status
from treadle.files.whole_files import replacing, reporting_failed_writes
from treadle.ir.analysis.drawn_inputs import draw_inputs
from treadle.ir.errors import UsageError
from treadle.ir.graph import Graph
from treadle.ir.types import bf16, boolean, f16

Array = np.ndarray[Any, Any]

PIECE = 64 << 20
"""Largest file of weights, in bytes. Browsers hold a file in memory, and servers limit its size."""
_EXAMPLE = 4096
"""Largest number of elements of an input for which the page has an example."""


def export_web(
    name: str, graph: Graph, executable: KernelExecutable, sizes: Mapping[str, int], folder: Path
) -> list[Path]:
    """Write the main entry of an executable for target webgpu, which has not run, and return the files.

    sizes  sizes of the entry's symbols

    Raises UsageError for a model whose main entry has states, and BackendError, with every limit, for a model that
    exceeds what each browser supports (`treadle.ir.device_limits`).
    """
    machine, entry = executable.machine, graph.main.name
    assert isinstance(machine, DeviceMachine)
    if executable.program.entries[entry].states:
        raise UsageError("a page runs a model without states", received=f"entry {entry}", hint="the model's main entry")
    program = machine.program
    plan = program.plan(entry, sizes)
    refuse(name, "browsers", program.exceeded(plan))
    numbers = {space: i for i, space in enumerate(plan.table.spaces)}
    launches, texts = _launches(executable, plan.table, program.device, numbers)
    weights = {space: program.stored_weight(space) for space in program.weights if space in numbers}
    pieces = {f"weights_{i:02}.bin": piece for i, piece in enumerate(_pieces(weights))}
    example = draw_inputs(graph, dict(sizes), [0])
    record = {
        "format": 1,
        "name": name,
        "sizes": dict(sizes),
        "inputs": [_port(port, Input(port.name), sizes, numbers, example) for port in executable.inputs],
        "outputs": [_port(port, Output(port.name), sizes, numbers) for port in executable.outputs],
        "table": plan.table.as_dict(),
        "kernels": [
            {
                "file": file,
                "entry": executable.device_kernels[title].group_kernel.name,
                "written": list(sharing.written),
            }
            for file, (title, sharing) in texts.items()
        ],
        "launches": launches,
        "files": [{"name": file, "parts": [each.record(numbers) for each in piece]} for file, piece in pieces.items()],
        "status": [located(step.kernel.title, step) for step in plan.tellers],
        "status_space": numbers.get(Status()),
    }
    with reporting_failed_writes("the folder", folder):
        folder.mkdir(parents=True, exist_ok=True)
    page = files("treadle.exporting") / "web_page"
    written = [
        *(_write(folder / file, (page / file).read_bytes()) for file in ("index.html", "treadle.js")),
        _write(folder / "model.json", json.dumps(record, allow_nan=False).encode()),
    ]
    for file, (title, sharing) in texts.items():
        written.append(_write(folder / file, executable.device_kernels[title].shared_text(sharing).encode()))
    for file, piece in pieces.items():
        written.append(_write(folder / file, *(each.data.data for each in piece)))
    return written


def _launches(
    executable: KernelExecutable, table: LaunchTable, device: Device, numbers: Mapping[Space, int]
) -> tuple[list[dict[str, Any]], dict[str, tuple[str, Sharing]]]:
    """Return the records of the launches, and for each file of a kernel the kernel's title and its shared buffers."""
    kernels: dict[tuple[str, Sharing], int] = {}
    launches = []
    for launch in table.launches:
        device_kernel = executable.device_kernels[launch.kernel]
        bound = bind_launch(launch, device_kernel.group_kernel, device, lambda space: space)
        kernel = kernels.setdefault((launch.kernel, bound.sharing), len(kernels))
        launches.append({"kernel": kernel, "blocks": launch.blocks, **_bound(bound, numbers)})
    return launches, {f"kernel_{i:02}.wgsl": key for key, i in kernels.items()}


def _bound(bound: LaunchBindings, numbers: Mapping[Space, int]) -> dict[str, Any]:
    bindings = [[numbers[each.space], each.begin, each.nbytes] for each in bound.bindings]
    return {"bindings": bindings, "numbers": list(bound.numbers)}


def _port(
    port: Port,
    space: Space,
    sizes: Mapping[str, int],
    numbers: Mapping[Space, int],
    example: Mapping[str, Array] | None = None,
) -> dict[str, Any]:
    """Return a port as JSON values. `space` is None if no launch accesses it."""
    shape = [size.evaluate(sizes) for size in port.type.shape]
    made: dict[str, Any] = {"name": port.name, "dtype": port.dtype.name, "shape": shape, "space": numbers.get(space)}
    if example is not None and example[port.name].size <= _EXAMPLE and port.dtype not in (f16, bf16):
        array = example[port.name].reshape(-1)
        made["example"] = (array.astype(np.uint8) if port.dtype is boolean else array).tolist()
    return made


class _Part(NamedTuple):
    """A part of a space in a file of weights.

    at     the first byte in the space
    begin  the first byte in the file
    data   the bytes, a multiple of 4
    """

    space: Fixed
    at: int
    begin: int
    data: Array

    def record(self, numbers: Mapping[Space, int]) -> dict[str, int]:
        return {"space": numbers[self.space], "at": self.at, "begin": self.begin, "bytes": self.data.size}


def _pieces(weights: Mapping[Fixed, Array]) -> Iterator[list[_Part]]:
    """Divide weights into files, and yield the parts of each file."""
    parts: list[_Part] = []
    begin = 0
    for space, array in weights.items():
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        data = np.concatenate([data, np.zeros(-data.size % 4, np.uint8)])
        at = 0
        while at < data.size:
            if begin == PIECE:
                yield parts
                parts, begin = [], 0
            part = data[at : at + PIECE - begin]
            parts.append(_Part(space, at, begin, part))
            at, begin = at + part.size, begin + part.size
    if parts:
        yield parts


def _write(path: Path, *data: bytes | memoryview) -> Path:
    with reporting_failed_writes("the file", path), replacing(path) as file:
        for each in data:
            file.write(each)
    return path

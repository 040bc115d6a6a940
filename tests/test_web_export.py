"""Pages that run a model in a browser: the files of `treadle export --to web`, and a run in Chromium."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.backend_checks import graph_of, needs_tvm
from tests.report_tour import needs_browser
from treadle.backends.tvm.executable import KernelExecutable
from treadle.backends.tvm.kernels.devices.device import DEVICES, Device
from treadle.backends.tvm.runtimes.device_machine import DeviceMachine
from treadle.backends.tvm.runtimes.launch_table import LaunchTable
from treadle.entry_functions import compile
from treadle.exporting import web_folders
from treadle.exporting.web_folders import export_web
from treadle.ir.analysis.drawn_inputs import draw_inputs
from treadle.ir.builder import Builder
from treadle.ir.errors import BackendError
from treadle.ir.graph import Graph
from treadle.ir.interpreter import interpret

pytestmark = needs_tvm
Array = np.ndarray[Any, Any]
SIZES = {"B": 3, "S": 5}


def _program(b: Builder) -> dict[str, Any]:
    table = b.input("table", "f32[7, 40]")
    x = b.embedding(table, b.input("tokens", "i64[B, S]"))
    return {"y": b.softmax(x), "most": b.argmax(x, axis=-1), "large": b.greater(x, b.input("least", "f32[40]"))}


@pytest.fixture
def graph() -> Graph:
    return graph_of(_program)


def compiled(graph: Graph) -> KernelExecutable:
    executable = compile(graph, backend="tvm", target="webgpu").executable
    assert isinstance(executable, KernelExecutable)
    return executable


def test_a_folder_has_the_table_the_kernels_and_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of weights have at most `PIECE` bytes; a weight may be in several."""
    monkeypatch.setattr(web_folders, "PIECE", 1000)
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((30, 20), np.float32), "v": rng.standard_normal(30, np.float32)}
    graph = graph_of(lambda b: b.gelu(b.linear(b.input("x", "f32[B, 20]"), b.parameter("w", "f32[30, 20]"),
                                               b.parameter("v", "f32[30]"))))  # fmt: skip
    made = compile(graph, backend="tvm", target="webgpu", weights=weights)
    executable = made.executable
    assert isinstance(executable, KernelExecutable)
    written = export_web("linear", graph, executable, {"B": 3}, tmp_path)
    facts = json.loads((tmp_path / "model.json").read_text())
    assert sorted(written) == sorted(tmp_path.iterdir())
    table = LaunchTable.of_dict(facts["table"])
    assert table == executable.launch_table(B=3)
    assert [facts["kernels"][launch["kernel"]]["entry"] for launch in facts["launches"]] == [
        f"treadle_{launch.kernel}" for launch in table.launches
    ]
    for launch in facts["launches"]:
        for space, begin, nbytes in launch["bindings"]:
            assert begin % 256 == 0 == nbytes % 4
            assert begin + nbytes <= facts["table"]["spaces"][space]["bytes"]
    read: dict[int, bytearray] = {}
    for file in facts["files"]:
        data = (tmp_path / file["name"]).read_bytes()
        assert len(data) <= 1000
        for part in file["parts"]:
            bytes = read.setdefault(part["space"], bytearray())
            assert len(bytes) == part["at"]
            bytes += data[part["begin"] : part["begin"] + part["bytes"]]
    spaces = list(table.spaces)
    assert {spaces[number]: np.frombuffer(data, np.uint8).tolist() for number, data in read.items()} == {
        space: np.ascontiguousarray(array).reshape(-1).view(np.uint8).tolist()
        for space, array in executable.stored_weights().items()
    }


def test_a_model_that_exceeds_the_limits_of_browsers_is_refused(graph: Graph, tmp_path: Path) -> None:
    executable = compiled(graph)
    assert isinstance(executable.machine, DeviceMachine)
    executable.machine.program.use(Device.of("webgpu", replace(DEVICES["webgpu"].limits, largest=1024)))
    with pytest.raises(BackendError, match="exceeds the limits of browsers"):
        export_web("embedding", graph, executable, SIZES, tmp_path / "page")
    assert not (tmp_path / "page").exists()


def test_a_page_computes_the_same_in_a_browser(graph: Graph, tmp_path: Path) -> None:
    needs_browser()
    from tests.fuzz.web_pages import run_page

    export_web("embedding", graph, compiled(graph), SIZES, tmp_path)
    inputs = draw_inputs(graph, SIZES, [0])
    wrong = inputs["tokens"].copy()
    wrong[1, 2] = 7
    runs = [
        {name: x.reshape(-1).tolist() for name, x in given.items()} for given in (inputs, {**inputs, "tokens": wrong})
    ]
    (made, error, again), _ = run_page(tmp_path, [*runs, runs[0]])
    for name, expected in interpret(graph, inputs).items():
        np.testing.assert_allclose(made[name], expected.reshape(-1).astype(np.float64), rtol=0, atol=1e-6)
        np.testing.assert_array_equal(made[name], again[name])
    assert re.search("embedding: .*index 7 is outside an axis of size 7", str(error))

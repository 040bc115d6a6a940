"""The search for backends by name, by entry point and for a target. PyTorch is imported only when it is used."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from importlib.machinery import ModuleSpec
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import treadle
from tests.backend_checks import CPU, block_model, compiled, graph_of, message, needs_torch, needs_tvm
from treadle.backends import registry
from treadle.backends.refusals import out_of_memory, refuse_nodes
from treadle.backends.registry import backend_names, find_backend
from treadle.backends.torch.devices import find_device
from treadle.backends.tvm.kernels.host import tvm_runtime
from treadle.ir.builder import Builder
from treadle.ir.errors import BackendError, UsageError
from treadle.ir.graph import Graph
from treadle.ir.hardware import HARDWARE, add_hardware, find_hardware
from treadle.ir.source_lines import SourceLine
from treadle.ir.target import Target

ROOT = Path(__file__).parent.parent


def test_targets() -> None:
    assert str(CPU) == CPU.kind == "cpu"
    assert (CPU.cores() or 0) >= 1
    assert Target("cuda").cores() is None
    with pytest.raises(UsageError, match="unknown target 'tpu'"):
        Target("tpu")
    for threads in (0, -1, 1.5, "2", True, 10**6):
        with pytest.raises(
            UsageError, match="the number of threads of a target must be an integer from 1 to 1024"
        ) as caught:
            Target("cpu", threads=threads)
        assert str(caught.value.received) == f"threads={threads!r}"
    graph, weights = block_model()
    assert "runs on the CPU only" in message(lambda: find_backend("numpy").compile(graph, Target("cuda"), weights))
    with_threads = Target("cpu", threads=2)
    text = message(lambda: find_backend("numpy").compile(graph, with_threads, weights))
    assert "does not choose the number of threads" in text and "received  threads=2" in text


@pytest.mark.parametrize(
    ("name", "rate", "bandwidth"),
    [
        ("cpu", 60e9, 20e9),
        ("cuda", 60e12, 2e12),
        ("x86-64-amx", 150e9, 16e9),
        ("x86-64-v4-bf16", 100e9, 20e9),
        ("x86-64-v4", 100e9, 20e9),
        ("x86-64-v3", 50e9, 20e9),
        ("x86-64-v2", 15e9, 15e9),
        ("x86-64", 15e9, 15e9),
        ("arm64", 30e9, 20e9),
    ],
)
def test_how_long_a_target_takes_at_least(name: str, rate: float, bandwidth: float) -> None:
    assert (Target(name).seconds(2 * rate, bandwidth), Target(name).seconds(rate, 2 * bandwidth)) == (2.0, 2.0)
    if name != "cuda":
        assert Target(name, 4).seconds(2 * rate, 0) == 0.5
    assert Target(name).kind == (name if name in ("cpu", "cuda") else "isa")
    assert Target("cuda:1").index == 1 and Target("cuda").index is None


@pytest.mark.parametrize("name", ["h100", "h200", "b200", "a100", "l4", "rtx4090"])
def test_a_gpu_is_one_record_for_costs_and_sharding(name: str) -> None:
    hardware, target = HARDWARE[name], Target(name)
    assert target.hardware is hardware is find_hardware(name) and target.kind == "cuda" and target.cores() is None
    needed = hardware.memory / hardware.bandwidth
    assert target.seconds(0, hardware.memory) == hardware.seconds(0, hardware.memory) == needed
    assert target.seconds(hardware.rates["f32"], 0) == hardware.seconds(hardware.rates["tf32"], 0) == 1.0
    assert hardware.rates["f32"] <= hardware.rates["tf32"] == hardware.product_rate < hardware.rates["bf16"]
    assert ("fp8" in hardware.rates) == (name != "a100")  # from compute capability 8.9 on


@pytest.mark.parametrize("name", ["cuda:", "cuda:x", "cuda:-1", "cpu:0", "h100:1", "gpu", ""])
def test_a_name_that_is_no_target(name: str) -> None:
    with pytest.raises(UsageError, match="unknown target"):
        Target(name)


def test_hardware_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("treadle.ir.hardware.HARDWARE", dict(HARDWARE))
    add_hardware(replace(HARDWARE["h100"], name="mine", bandwidth=1e12))
    assert Target("mine").seconds(0, 1e12) == 1.0 and "mine" not in HARDWARE
    for wrong in ({"name": "mine"}, {"name": "a:1"}, {"name": "new", "kind": "fpga"}, {"name": "new", "rates": {}}):
        with pytest.raises(UsageError):
            add_hardware(replace(HARDWARE["h100"], **wrong))


def test_cores_are_those_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = {0: {3, 5}, 1: {0, 1, 2}}  # 0: the calling process
    monkeypatch.setattr(os, "sched_getaffinity", allowed.get, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert Target("cpu").cores() == 2
    assert Target("cpu", threads=4).cores() == 4
    monkeypatch.delattr(os, "sched_getaffinity")  # as on other systems
    assert Target("cpu").cores() == 7


def refuse_old_driver() -> None:
    raise RuntimeError("the driver is too old (found version 11040)\nmore lines")


@pytest.mark.parametrize("built", [None, "13.2"])
def test_a_target_that_is_not_here(monkeypatch: pytest.MonkeyPatch, built: str | None) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", refuse_old_driver)
    graph, weights = block_model()
    tokens = np.ones((1, 2), np.int64)
    for name, what in (
        ("cuda", "PyTorch finds no CUDA device"),
        ("h100", "PyTorch finds no CUDA device, h100 is needed"),
    ):
        exe: Any = find_backend("torch").compile(graph, Target(name), weights)
        assert "def main(" in exe.source and "F.scaled_dot_product_attention" in exe.source
        for _ in range(2):
            text = message(lambda exe=exe: exe(tokens=tokens))
            assert text.startswith(what + "\n")
            assert ("without CUDA" in text) is (built is None)
            assert ("for CUDA 13.2: the driver is too old (found version 11040)" in text) is (built is not None)
        assert "input tokens" in message(lambda exe=exe: exe(tokens=tokens[0]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA GeForce RTX 4090")
    for name, missing in (
        ("cuda:1", None),
        ("cuda:2", "this machine has no CUDA device 2"),
        ("rtx4090", None),
        ("h100", "the GPU of this machine is not h100"),
    ):
        device = find_device(Target(name))
        assert (str(device.missing.what) if device.missing else None) == missing
        assert str(device.device) == ("cpu" if missing else "cuda:1" if name == "cuda:1" else "cuda")
    text = message(lambda: find_backend("torch").compile(graph, Target("arm64"), weights))
    assert text.startswith("the torch backend runs on the CPU and NVIDIA GPUs only")


@pytest.mark.parametrize(
    ("backend", "said"),
    [
        pytest.param("torch", "the torch backend has no code for op 'average_pool'", marks=needs_torch),
        pytest.param("tvm", "the tvm backend has no kernel for op 'average_pool'", marks=needs_tvm),
    ],
)
def test_an_op_that_is_left_without_a_form_is_named(backend: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An op that a backend lacks remains only if passes leave it: the backend's own passes decompose such ops."""
    found = find_backend(backend)
    *_, plan = found.pipeline(CPU)  # type: ignore[attr-defined]
    monkeypatch.setattr(type(found), "pipeline", lambda *_: (plan,))
    graph = graph_of(lambda b: b.average_pool(b.input("x", "f32[2, 4, 6]"), kernel=(2,)))
    with pytest.raises(BackendError, match=said):
        found.compile(graph, CPU, {})


def test_unsupported_products_on_a_gpu_are_refused_first(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    said = "PyTorch does not multiply matrices of integers on a GPU"
    graph = graph_of(lambda b: b.matmul(b.input("x", "i64[2, 3]"), b.input("y", "i64[3, 4]")))
    assert said in message(lambda: find_backend("torch").compile(graph, Target("cuda"), {}))
    find_backend("torch").compile(graph, CPU, {})


@pytest.mark.parametrize(("count", "more"), [(20, []), (21, ["and 1 more"])])
def test_twenty_refused_nodes_are_listed(count: int, more: list[str]) -> None:
    b = Builder(Graph("many"))
    x = b.input("x", "f32[2]")
    b.source = SourceLine("model.py", 3)
    b.outputs(**{f"y{n}": b.exp(x, name=f"y{n}") for n in range(count)})
    with pytest.raises(BackendError, match="the odd backend cannot run many") as caught:
        refuse_nodes(b.graph, "odd", lambda node: f"{node.result.name} is odd", hint="another")
    lines = [f"exp: y{n} is odd    (model.py:3)" for n in range(20)]
    assert str(caught.value.received).splitlines() == lines + more
    assert (caught.value.source, caught.value.hint) == ("model.py:3", "another")


def test_memory_that_is_not_there_is_told_in_gib() -> None:
    assert str(out_of_memory(3 << 29, "a run")) == "there is not enough memory\n  received  1.5 GiB for a run"


class Recorded:
    """A third-party backend that records its calls."""

    name = "mine"

    def available(self) -> str | None:
        return "no device"

    def supports(self, node: Any) -> str | None:
        return None

    def compile(self, graph: Graph, target: Target, weights: Mapping[str, Any]) -> Any:
        raise NotImplementedError


@pytest.fixture
def third_parties(monkeypatch: pytest.MonkeyPatch) -> None:
    here = __name__
    monkeypatch.setitem(sys.modules, "a_third_party", sys.modules[here])
    points = [
        EntryPoint("mine", "a_third_party:Recorded", registry.GROUP),
        EntryPoint("broken", "no_such_module:Backend", registry.GROUP),
        EntryPoint("odd", "a_third_party:Path", registry.GROUP),
        EntryPoint("numpy", "a_third_party:Recorded", registry.GROUP),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)


@pytest.mark.usefixtures("third_parties")
def test_third_parties_register_by_entry_point() -> None:
    assert backend_names() == ["numpy", "torch", "tvm", "broken", "mine", "odd"]
    assert find_backend("mine").available() == "no device"
    assert type(find_backend("numpy")).__name__ == "NumpyBackend"
    text = message(lambda: find_backend("broken"))
    assert "backend 'broken' cannot be loaded" in text
    assert "ModuleNotFoundError" in text
    assert "entry point broken = no_such_module:Backend" in text
    assert "backend 'odd' is not a backend" in message(lambda: find_backend("odd"))
    assert "numpy, or another of: " in message(lambda: find_backend("numpi"))


def test_torch_is_imported_only_when_it_is_used() -> None:
    program = (
        "import sys, numpy as np\n"
        "import treadle, treadle.ir.ops\n"
        "from treadle.backends.registry import backend_names, find_backend\n"
        "from treadle.ir.builder import Builder\n"
        "from treadle.ir.graph import Graph\n"
        "from treadle.ir.target import Target\n"
        "b = Builder(Graph('g'))\n"
        "b.outputs(y=b.gelu(b.input('x', 'f32[N]')))\n"
        "find_backend('numpy').compile(b.graph, Target('cpu'), {})(x=np.ones(2, np.float32))\n"
        "torch = find_backend('torch')\n"
        "torch.available(), torch.supports(b.graph.main.nodes[0])\n"
        "print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "False", result.stderr


def test_without_torch_the_backend_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install '.[torch]'" in str(find_backend("torch").available())
    with pytest.raises(BackendError, match="torch backend is not available") as caught:
        compiled("torch", block_model()[0])
    assert caught.value.received == "PyTorch is not installed"
    assert str(caught.value.hint) == "pip install '.[torch]', or backend=\"numpy\""


def test_without_tvm_the_backend_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The three cases are: TVM is not installed, only a folder of its name exists, or its libraries are missing."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install '.[tvm]'" in str(find_backend("tvm").available())
    report = message(lambda: compiled("tvm", block_model()[0]))
    assert "tvm backend is not available" in report and "pip install '.[tvm]'" in report
    tvm_runtime._libraries.cache_clear()
    with pytest.raises(BackendError, match="tvm backend is not available") as caught:
        tvm_runtime.launcher()
    assert caught.value.received == tvm_runtime.missing()
    held = ModuleSpec("tvm", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: held)
    with pytest.raises(BackendError, match="tvm backend is not available"):
        tvm_runtime.launcher()
    held.submodule_search_locations = [str(tmp_path)]
    with pytest.raises(BackendError, match="TVM's runtime cannot be loaded") as caught:
        tvm_runtime.launcher()
    assert str(tmp_path) in str(caught.value.received) and "pip install" in str(caught.value.hint)


def test_a_session_for_a_missing_gpu_is_refused_before_its_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.version, "cuda", None)
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    made = treadle.compile("gpt2", backend="torch", target="cuda", layers=1, dim=32, heads=2, vocab=20)
    with pytest.raises(BackendError, match="PyTorch finds no CUDA device"):
        made.session(rows=1)

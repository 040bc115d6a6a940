"""The backend of `backend="auto"`: the fastest installed one that accepts the graph."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import treadle as t
from treadle import progress
from treadle.backends.refusals import KINDS, refuse_target
from treadle.backends.torch.backend import TorchBackend
from treadle.backends.tvm.backend import TvmBackend
from treadle.benching.workload import Workload
from treadle.comparing.builds import open_build
from treadle.explaining.memory import explain_memory
from treadle.ir.errors import BackendError
from treadle.ir.graph import Graph
from treadle.ir.hardware import HARDWARE
from treadle.ir.target import Target
from treadle.ir.text.parser import parse_graph
from treadle.program.backend_choice import check_backend, choose_backend, fastest_installed
from treadle.training.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
SMALL: dict[str, Any] = {"vocab": 11, "dim": 12, "heads": 3, "layers": 1}


@pytest.fixture(autouse=True)
def auto(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choose as for users: the other tests name a backend in the environment."""
    monkeypatch.delenv("TREADLE_BACKEND")


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines that are shown on a terminal."""
    found: list[str] = []
    monkeypatch.setattr("treadle.program.backend_choice.announce", found.append)
    return found


def without(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """Make packages uninstalled."""
    for name in packages:
        monkeypatch.setitem(sys.modules, name, None)


def small() -> Graph:
    return parse_graph("graph g { symbols B main(x: f32[B, 4]) -> (y: f32[B, 4]) { y = softmax(x) return y = y } }")


def test_it_is_the_fastest_one_that_is_installed(lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("tvm")
    for missing, name in ((), "tvm"), (("tvm",), "torch"), (("torch",), "numpy"):
        without(monkeypatch, *missing)
        assert choose_backend("auto", small(), Target("cpu")).name == fastest_installed() == name
    assert lines == [
        "backend tvm, the fastest installed one that accepts g; the first run of a model compiles its kernels, which "
        "are cached",
        "backend torch, the fastest installed one that accepts g (TVM is not installed)",
        "backend numpy, the fastest installed one that accepts g (TVM is not installed; PyTorch is not installed)",
    ]


def test_a_backend_that_refuses_the_graph_leads_to_the_next(lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TvmBackend, "available", lambda self: None)
    monkeypatch.setattr(TvmBackend, "supports", lambda self, node: f"{node.op.name} has no kernel")
    without(monkeypatch, "torch")
    chosen = choose_backend("auto", small(), Target("cpu"))
    assert (chosen.name, [chosen.why]) == ("numpy", lines)
    assert "(the tvm backend cannot run g: softmax: softmax has no kernel; PyTorch is not installed)" in chosen.why


def test_a_platform_without_a_wheel_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    from treadle.backends.tvm.kernels.host import tvm_runtime
    from treadle.backends.tvm.kernels.host.platforms import Platform

    without(monkeypatch, "tvm", "torch")
    monkeypatch.setattr(tvm_runtime, "this_platform", lambda: Platform("Darwin", "x86_64"))
    assert "(TVM has no wheel for Darwin on x86_64, only for" in choose_backend("auto", small(), Target("cpu")).why


def test_without_any_backend_each_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "tvm", "torch")
    with pytest.raises(BackendError, match="no installed backend accepts g on cuda") as caught:
        choose_backend("auto", small(), Target("cuda"))
    assert str(caught.value.hint).endswith("[torch]'"), "NumPy, the only one that is installed, needs another target"
    monkeypatch.setattr(TorchBackend, "available", lambda self: None)
    monkeypatch.setattr(TorchBackend, "refuse", refuse)
    with pytest.raises(BackendError, match="no installed backend accepts g on cuda") as caught:
        choose_backend("auto", small(), Target("cuda"))
    assert str(caught.value.received).splitlines() == [
        "PyTorch finds no CUDA device: torch 0",
        "TVM is not installed",
        "the numpy backend runs on the CPU only: cuda",
    ]
    assert caught.value.hint == "target 'cpu'", "the fastest installed backend's hint"


def refuse(self: TorchBackend, graph: Graph, target: Target) -> None:
    raise BackendError("PyTorch finds no CUDA device", received="torch 0", hint="target 'cpu'")


def test_targets_choose_backends_that_generate_code_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("opencl", "webgpu", "arm64"):
        assert choose_backend("auto", small(), Target(name)).name == "tvm"
    with monkeypatch.context() as patched:
        patched.setattr(TorchBackend, "refuse", lambda self, graph, target: None)
        assert choose_backend("auto", small(), Target("h100")).name == "torch"
    without(monkeypatch, "tvm")
    with pytest.raises(BackendError, match="no installed backend accepts g on webgpu") as caught:
        choose_backend("auto", small(), Target("webgpu"))
    assert str(caught.value.hint).endswith("[tvm]'")


def test_each_backend_refuses_the_kinds_that_it_lacks() -> None:
    """The hint names the backends that generate code for the target."""
    for row in {row.kind: row for row in HARDWARE.values()}.values():
        for name, kinds in KINDS.items():
            if row.kind in kinds:
                refuse_target(name, Target(row.name))
                continue
            with pytest.raises(BackendError, match=f"the {name} backend runs on ") as caught:
                refuse_target(name, Target(row.name))
            hint = str(caught.value.hint)
            for other, its_kinds in KINDS.items():
                assert (f'backend="{other}"' in hint) == (row.kind in its_kinds), (row.name, hint)


def test_the_environment_names_it(lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TREADLE_BACKEND", "numpy")
    assert choose_backend("auto", small(), Target("cpu")).name == fastest_installed() == "numpy"
    assert choose_backend("tvm", small(), Target("cpu")).name == "tvm", "a name counts over it"
    assert not lines
    monkeypatch.setenv("TREADLE_BACKEND", "numpi")
    with pytest.raises(BackendError, match=r"^TREADLE_BACKEND: there is no backend 'numpi'") as caught:
        check_backend("auto")
    assert str(caught.value.hint).startswith("TREADLE_BACKEND=numpy or torch or tvm")
    with pytest.raises(BackendError, match=r"^there is no backend 'tvn'"):
        check_backend("tvn")
    monkeypatch.setenv("TREADLE_BACKEND", "")
    assert check_backend("auto") == "auto"


@pytest.mark.parametrize("name", ["xyz", "cuda", "gpu", "numpi"])
def test_the_hint_for_the_variable_works(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A target or another backend on the command line would leave the variable as it is."""
    monkeypatch.setenv("TREADLE_BACKEND", name)
    for options in ({}, {"target": "cpu"}):
        with pytest.raises(BackendError, match=rf"^TREADLE_BACKEND: there is no backend '{name}'") as caught:
            t.compile("gpt2", **SMALL, **options)
    set_to, _, rest = str(caught.value.hint).partition(", ")
    variable, _, values = set_to.partition("=")
    for value in values.split(" or "):
        monkeypatch.setenv(variable, value)
        assert check_backend("auto") == value
    assert rest == "or unset it"
    monkeypatch.delenv(variable)
    assert check_backend("auto") == "auto"


def test_everything_that_compiles_takes_it(lines: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without(monkeypatch, "tvm", "torch")
    exe = t.compile("gpt2", **SMALL)
    assert (exe.backend, exe.log[-1].notes[0]) == ("numpy", lines[0])
    assert exe.stepped.backend == "numpy"
    assert Trainer("gpt2", **SMALL).backend == "numpy"
    assert open_build("gpt2", **SMALL).backend == "numpy"
    assert explain_memory("gpt2", **SMALL).backend == "numpy"
    assert Workload("gpt2").options.backend == "numpy"
    assert all("that accepts" in line for line in lines)


def test_an_artifact_prefers_the_backend_that_it_was_compiled_for(
    lines: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    exe = t.compile("gpt2", backend="torch", **SMALL)
    exe.save(tmp_path / "g.treadle")
    assert t.load_artifact(tmp_path / "g.treadle").backend == "torch"
    assert not lines
    tokens = np.array([[1, 2, 3]])
    expected = exe(tokens=tokens)["logits"]
    without(monkeypatch, "tvm", "torch")
    loaded = t.load_artifact(tmp_path / "g.treadle")
    assert loaded.backend == "numpy" and "PyTorch is not installed" in lines[0]
    np.testing.assert_allclose(loaded(tokens=tokens)["logits"], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(BackendError, match="the torch backend is not available"):
        t.load_artifact(tmp_path / "g.treadle", backend="torch")


def test_a_line_is_shown_once_and_only_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_announced", set())
    progress.announce("backend numpy")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(progress, "is_watched", lambda: True)
    with progress.working("compiling"):
        progress.announce("backend numpy")
        progress.announce("backend numpy")
    shown = capsys.readouterr()
    assert (shown.out, shown.err.split("\n")) == ("", ["backend numpy", "", ""])
    assert not progress._shown


def test_a_choice_imports_no_library() -> None:
    """Neither PyTorch nor TVM is imported if it is not chosen, nor to import Treadle."""
    program = (
        "import sys, treadle as t\n"
        "from treadle.program.backend_choice import choose_backend\n"
        "from treadle.ir.target import Target\n"
        "from treadle.ir.text.parser import parse_graph\n"
        "graph = parse_graph('graph g { main(x: f32[4]) -> (y: f32[4]) { y = relu(x) return y = y } }')\n"
        "choose_backend('auto', graph, Target('cpu'))\n"
        "print(sorted({'torch', 'tvm', 'tvm_ffi'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr

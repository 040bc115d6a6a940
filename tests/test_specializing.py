"""ONNX files in which inputs determine shapes. They are compiled for each value; the number of compiled graphs is
limited.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from typer.testing import CliRunner

import treadle
from tests.onnx_models import model, runtime
from treadle.cli import app
from treadle.frontends.onnx_import.errors import StaticArgumentNeeded
from treadle.frontends.onnx_import.file import OnnxFile
from treadle.ir.errors import BackendError, FrontendError, TreadleError, UsageError
from treadle.ir.graph import Graph
from treadle.passes.framework.manager import Pass
from treadle.passes.framework.pass_log import PassRecord
from treadle.program.source import ModelSource
from treadle.specializing import MOST_KEPT, Specializing
from treadle.verifying import verify_model

BACKENDS = ("numpy", "torch", "tvm")
ROWS = np.random.default_rng(0).standard_normal((2, 10)).astype(np.float32)
TOP = model("(float[B,10] x, int64[1] k) => (float values, int64 places)", "values, places = TopK(x, k)")
BOUND = model("(float[B,10] x, int64[1] end) => (float y)", "zero = Constant<value_ints = [0]>() "
              "one = Constant<value_ints = [1]>() y = Slice(x, zero, end, one)")  # fmt: skip
RANGE = model("(int64 n, int64 step) => (int64 y)", "zero = Constant<value_int = 0>() y = Range(zero, n, step)")
TWO = model(
    "(float[2,10] x, int64[1] k, int64[2] shape) => (float y)", "values, places = TopK(x, k) y = Reshape(values, shape)"
)
BRANCH = model(
    "(float[B,10] x, bool some, int64[1] k) => (float y)",
    """y = If(some) <
        then_branch = then() => (float[B,M] most) { most, places = TopK(x, k) },
        else_branch = otherwise() => (float[B,N] all) { wide = Cast<to = 1>(k) all = Add(x, wide) }
    >""",
)


def saved(folder: Path, proto: onnx.ModelProto) -> Path:
    path = folder / "model.onnx"
    onnx.save(proto, path)
    return path


def opened(folder: Path, proto: onnx.ModelProto, **options: Any) -> Specializing:
    made = treadle.compile(saved(folder, proto), **options)
    assert isinstance(made, Specializing)
    return made


RUNS: list[str] = []


@dataclass(frozen=True)
class Counting(Pass):
    """A backend that records each compiled graph with the types of its outputs."""

    gate: ClassVar[threading.Event | None] = None

    def run_graph(self, graph: Graph, log: PassRecord) -> int:
        RUNS.append(", ".join(str(v.type) for v in graph.main.outputs.values()))
        if self.gate is not None:
            assert self.gate.wait(30)
        return 0


@pytest.fixture
def runs() -> list[str]:
    RUNS.clear()
    return RUNS


# -- one compilation a value ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_value_is_compiled_once(tmp_path: Path, runs: list[str], backend: str) -> None:
    exe = opened(tmp_path, TOP, backend=backend, passes=[Counting()])
    assert (exe.static, exe.specializations, runs) == (("k",), (), [])
    assert [str(port) for port in exe.inputs] == ["x: f32[B, 10]", "k: i64[1]"]
    for k in (3, np.int64(5), [3], np.array([5], np.int32)):
        wanted = runtime(TOP, {"x": ROWS, "k": np.array(k, np.int64).reshape(1)})
        got = exe(x=ROWS, k=k)
        np.testing.assert_array_equal(got["values"], wanted["values"])
        np.testing.assert_array_equal(got["places"], wanted["places"])
    assert runs == ["f32[B, 3], i64[B, 3]", "f32[B, 5], i64[B, 5]"]


def test_hints_for_names_that_python_does_not_have(tmp_path: Path) -> None:
    """Names of ONNX files may have dots and hyphens."""
    proto = onnx.ModelProto()
    proto.CopyFrom(TOP)
    for at, name in enumerate(("input.1", "my-k")):
        proto.graph.input[at].name = proto.graph.node[0].input[at] = name
    exe = opened(tmp_path, proto)
    names = {"exe": exe, "x": ROWS, "k": [3]}
    for call, filled in ((exe.at, ["k"]), (partial(exe, ROWS, [3], 1), ["x", "k"])):
        with pytest.raises(TreadleError) as caught:
            call()
        hint = str(caught.value.hint)
        for value in filled:
            hint = hint.replace("...", value, 1)
        eval(hint, names)
    with pytest.raises(BackendError, match="no value for my-k") as caught:
        exe(ROWS)
    eval(f"exe(x, {str(caught.value.hint).replace('...', 'k')})", names)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bounds_of_slices_and_ranges(tmp_path: Path, backend: str) -> None:
    exe = opened(tmp_path, BOUND, backend=backend)
    for end in (1, 2):
        np.testing.assert_array_equal(exe(x=ROWS, end=[end])["y"], ROWS[:, :end])
    exe = opened(tmp_path, RANGE, backend=backend)
    np.testing.assert_array_equal(exe(n=7, step=3)["y"], [0, 3, 6])
    np.testing.assert_array_equal(exe(n=7, step=2)["y"], [0, 2, 4, 6])
    assert exe.at(n=7, step=2).inputs == ()


def test_the_second_input_shows_when_the_first_is_known(tmp_path: Path, runs: list[str]) -> None:
    exe = opened(tmp_path, TWO, passes=[Counting()])
    assert exe.static == ("k",)
    for shape in ([4, 2], [2, 4], [4, 2]):
        assert exe(x=ROWS, k=4, shape=shape)["y"].shape == tuple(shape)
    assert exe.static == ("k", "shape")
    assert len(runs) == 2
    assert [{n: a.tolist() for n, a in each.static.items()} for each in exe.specializations] == [
        {"k": [4], "shape": [2, 4]},
        {"k": [4], "shape": [4, 2]},
    ]
    with pytest.raises(UsageError, match="the value of shape determines a shape") as caught:
        exe.at(k=4)
    assert caught.value.hint == "exe.at(k=..., shape=...)"


def test_an_input_is_static_only_where_it_must_be(tmp_path: Path, runs: list[str]) -> None:
    exe = opened(tmp_path, BRANCH, passes=[Counting()])
    assert exe(x=ROWS, some=True, k=3)["y"].shape == (2, 3)
    for k in (1, 2, 3):
        np.testing.assert_array_equal(exe(x=ROWS, some=False, k=[k])["y"], ROWS + k)
    assert len(runs) == 2
    assert [port.name for port in exe.at(some=False).inputs] == ["x", "k"]
    with pytest.raises(UsageError, match="k does not determine a shape where some = False") as caught:
        exe.at(some=False, k=3)
    assert caught.value.hint == "exe.at(some=...)"


def test_at_gives_what_a_call_runs(tmp_path: Path, runs: list[str]) -> None:
    exe = opened(tmp_path, TOP, passes=[Counting()])
    made = exe.at(k=3)
    np.testing.assert_array_equal(made(x=ROWS)["values"], exe(x=ROWS, k=3)["values"])
    assert exe.at(k=[3]) is made is exe.specializations[0].compiled
    assert len(runs) == 1
    assert [str(port) for port in made.outputs] == ["values: f32[B, 3]", "places: i64[B, 3]"]
    assert made.static == ()
    assert made.at() is made
    with pytest.raises(UsageError, match="no input k that determines a shape"):
        made.at(k=3)
    seal = made.save(tmp_path / "three.treadle")
    assert len(seal) == 64
    np.testing.assert_array_equal(
        treadle.load_artifact(tmp_path / "three.treadle")(x=ROWS)["values"], made(x=ROWS)["values"]
    )


def test_values_given_to_compile_stay(tmp_path: Path) -> None:
    path = saved(tmp_path, TWO)
    whole = treadle.compile(path, k=4, shape=[4, 2])
    assert not isinstance(whole, Specializing)
    some = treadle.compile(path, k=4)
    assert isinstance(some, Specializing)
    assert some.static == ("shape",)
    assert [port.name for port in some.inputs] == ["x", "shape"]
    np.testing.assert_array_equal(some(x=ROWS, shape=[4, 2])["y"], whole(x=ROWS)["y"])
    with pytest.raises(BackendError, match="no input k"):
        some(x=ROWS, k=4, shape=[4, 2])


def test_options_reach_every_specialization(tmp_path: Path) -> None:
    exe = opened(tmp_path, model("(float[B,10] x, int64[1] k) => (float y)", """
        h = Constant<value = float {0.5}>() r = Constant<value = float {0.70710678}>()
        o = Constant<value = float {1.0}>()
        v, places = TopK(x, k) s = Mul(v, r) e = Erf(s) p = Add(e, o) g = Mul(v, p) y = Mul(g, h)"""),
        certify=True)  # fmt: skip
    found = [c for record in exe.at(k=3).log for c in record.certificates]
    assert found, exe.at(k=3).log


# -- sharing, and limits of kept executables -----------------------------------------------------------------------


def weighted() -> onnx.ModelProto:
    proto = model("(float[B,128] x, int64[1] k) => (float v)", "y = MatMul(x, w) v, places = TopK(y, k)")
    weight = np.random.default_rng(1).standard_normal((128, 128)).astype(np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    return proto


@pytest.mark.parametrize("damaged", [False, True])
def test_weights_and_file_are_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: bool) -> None:
    """Weights are shared, also those that follow a weight that cannot be read and is not needed."""
    proto = weighted()
    whole = onnx.ModelProto.FromString(proto.SerializeToString())
    if damaged:
        proto.graph.initializer.insert(0, numpy_helper.from_array(np.ones(4, np.float32), "broken"))
        proto.graph.initializer[0].raw_data = b"\0"
    opened(tmp_path, proto)
    source: Any = ModelSource.open(tmp_path / "model.onnx")
    exe: Any = treadle.compile(source)
    (tmp_path / "model.onnx").unlink()
    monkeypatch.setattr(OnnxFile, "open", None)
    x = np.ones((2, 128), np.float32)
    for k in (2, 3):
        wanted = runtime(whole, {"x": x, "k": np.array([k])})["v"]
        np.testing.assert_allclose(exe(x=x, k=k)["v"], wanted, rtol=0, atol=1e-5)
    first, second = (each.compiled.weights["w"] for each in exe.specializations)
    assert np.shares_memory(first, second)
    assert source.form.file.proto.ByteSize() < first.nbytes  # the message does not contain the weight again


def test_a_damaged_weight_is_refused_as_ever(tmp_path: Path) -> None:
    proto = weighted()
    proto.graph.initializer[0].raw_data = proto.graph.initializer[0].raw_data[:-4]
    with pytest.raises(FrontendError, match="number of bytes does not match its shape"):
        opened(tmp_path, proto)(x=np.ones((2, 128), np.float32), k=2)


def test_the_number_of_kept_entries_is_bounded(tmp_path: Path, runs: list[str]) -> None:
    proto = model("(float[B,1] x, int64[2] shape) => (float y)", "y = Expand(x, shape)")
    exe = opened(tmp_path, proto, passes=[Counting()])
    x = np.ones((2, 1), np.float32)
    for width in range(1, MOST_KEPT + 4):
        assert exe(x=x, shape=[1, width])["y"].shape == (2, width)
        exe(x=x, shape=[1, 1])  # used repeatedly, and therefore kept
    kept = [each.static["shape"][1] for each in exe.specializations]
    assert kept == [*range(5, MOST_KEPT + 4), 1]
    assert MOST_KEPT == 16, "docs/onnx.md says so"
    assert len(runs) == MOST_KEPT + 3
    exe(x=x, shape=[1, 2])
    assert len(runs) == MOST_KEPT + 4


def test_steps_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("treadle.specializing._STEPS_KEPT", 3)
    exe = opened(tmp_path, TWO, passes=[])
    for k in range(1, 6):
        assert exe(x=ROWS, k=k, shape=[k, 2])["y"].shape == (k, 2)
        assert len(exe._needed) <= 3
    assert exe(x=ROWS, k=1, shape=[2, 1])["y"].shape == (2, 1)


def test_threads_wait_for_one_compilation(tmp_path: Path, runs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    exe = opened(tmp_path, TOP, passes=[Counting()])
    exe(x=ROWS, k=2)
    monkeypatch.setattr(Counting, "gate", threading.Event())
    shapes: list[tuple[int, ...]] = []
    threads = [threading.Thread(target=lambda: shapes.append(exe(x=ROWS, k=3)["values"].shape)) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert exe(x=ROWS, k=2)["values"].shape == (2, 2)  # runs while another value is being compiled
    assert shapes == []
    assert Counting.gate is not None
    Counting.gate.set()
    for thread in threads:
        thread.join(30)
    assert shapes == [(2, 3)] * 4
    assert len(runs) == 2


# -- refusals ------------------------------------------------------------------------------------------------------

CALLS: dict[str, tuple[dict[str, Any], type[TreadleError], str]] = {
    "missing": ({"x": ROWS}, BackendError, "no value for k"),
    "unknown": ({"x": ROWS, "k": 3, "q": 1}, BackendError, "no input q"),
    "a fraction": ({"x": ROWS, "k": 2.5}, BackendError, "input k must be i64"),
    "a truth value": ({"x": ROWS, "k": True}, BackendError, "input k must be i64"),
    "two values": ({"x": ROWS, "k": [1, 2]}, BackendError, "dimension 0 must be 1, is 2"),
    "another rank": ({"x": ROWS, "k": [[1]]}, BackendError, "must have rank 1, has rank 2"),
    "out of range": ({"x": ROWS, "k": 11}, FrontendError, "k is 11, but axis 1 has 10"),
}


@pytest.mark.parametrize("case", CALLS)
def test_misfits_are_refused_and_not_cached(tmp_path: Path, case: str) -> None:
    given, kind, words = CALLS[case]
    exe = opened(tmp_path, TOP)
    with pytest.raises(kind, match=words) as caught:
        exe(**given)
    assert exe.specializations == ()
    assert case != "out of range" or str(caught.value.within).endswith("where k = [11]")
    assert exe(x=ROWS, k=1)["values"].shape == (2, 1)


def test_other_inputs_are_checked_as_ever(tmp_path: Path) -> None:
    exe = opened(tmp_path, TOP)
    with pytest.raises(BackendError, match="input x must be f32"):
        exe(x=ROWS.astype(np.int64), k=1)
    with pytest.raises(BackendError, match="input x is passed twice"):
        exe(ROWS, x=ROWS, k=1)


def test_inputs_are_passed_in_order_too(tmp_path: Path) -> None:
    exe = opened(tmp_path, TOP)
    expected = exe(x=ROWS, k=1)
    for outputs in (exe(ROWS, 1), exe(ROWS.astype(np.float64), k=1)):
        np.testing.assert_array_equal(outputs["values"], expected["values"])
    values, places = exe.run(["values", "places"], {"x": ROWS, "k": 1})
    np.testing.assert_array_equal(values, expected["values"])
    np.testing.assert_array_equal(places, expected["places"])


def test_a_value_of_another_shape_is_told_the_shape(tmp_path: Path) -> None:
    exe = opened(tmp_path, TOP)
    for k in ([1, 2], [], [[3]]):
        with pytest.raises(BackendError, match=r"input k (dimension 0 must be 1|must have rank 1)") as caught:
            exe(x=ROWS, k=k)
        assert caught.value.hint == "an array [1]"


def test_configuration_that_the_file_lacks_is_refused(tmp_path: Path) -> None:
    """The error is raised before a call, as for a file that is compiled immediately."""
    for wrong in ({"kk": 3}, {"threads": 2}, {"B": 2.5}):
        with pytest.raises(FrontendError, match=r"no axis and no input|must be an integer"):
            treadle.compile(saved(tmp_path, TOP), **wrong)
    assert opened(tmp_path, TOP, B=2)(x=ROWS, k=1)["values"].shape == (2, 1)


def test_a_long_value_determines_no_shape(tmp_path: Path) -> None:
    exe = opened(tmp_path, model("(float[B,10] x, int64[N] axes) => (float y)", "y = ReduceSum(x, axes)"))
    assert exe(x=ROWS, axes=[1])["y"].shape == (2, 1)
    with pytest.raises(BackendError, match="must have at most 4096 elements"):
        exe(x=ROWS, axes=np.ones(4097, np.int64))
    # the op's own message, without the number of compiled graphs
    with pytest.raises(TreadleError, match="axes") as caught:
        exe(x=ROWS, axes=np.ones(4096, np.int64))
    assert "at most" not in str(caught.value)


ASKED: dict[str, Callable[[treadle.Compiled, Path], object]] = {
    "graph": lambda exe, _: exe.graph,
    "log": lambda exe, _: exe.log,
    "source": lambda exe, _: exe.source,
    "weights": lambda exe, _: exe.weights,
    "outputs": lambda exe, _: exe.outputs,
    "save": lambda exe, folder: exe.save(folder / "any.treadle"),
    "treadle.save": lambda exe, folder: treadle.save(exe, folder / "any.treadle"),
}


@pytest.mark.parametrize("asked", ASKED)
def test_dependence_on_values_is_reported(tmp_path: Path, asked: str) -> None:
    exe = opened(tmp_path, TOP)
    exe(x=ROWS, k=3)
    with pytest.raises(UsageError, match="on the value of k") as caught:
        ASKED[asked](exe, tmp_path)
    assert str(caught.value.hint).startswith(f"exe.at(k=...).{asked if '.' not in asked else ''}")
    assert not (tmp_path / "any.treadle").exists()


def test_declarations_of_the_file_are_kept(tmp_path: Path) -> None:
    path = saved(tmp_path, TOP)
    for given, words in (
        (2.5, "must be of type INT64"),
        (True, "must be of type INT64"),
        ([1, 2], "the declared shape"),
    ):
        with pytest.raises(FrontendError, match=words):
            treadle.compile(path, k=given)
    assert treadle.compile(path, k=3)(x=ROWS)["values"].shape == (2, 3)


def test_callers_that_need_one_graph_request_the_value(tmp_path: Path) -> None:
    with pytest.raises(StaticArgumentNeeded, match="input k determine a shape") as caught:
        verify_model(saved(tmp_path, TOP))
    assert (caught.value.argument, caught.value.hint) == ("k", "k=VALUE as an argument")


# -- the command line ----------------------------------------------------------------------------------------------


def report(*arguments: str) -> tuple[int, Any]:
    done = CliRunner().invoke(app, [*arguments, "--json"])
    return done.exit_code, json.loads(done.stdout)


def test_run_takes_the_value_as_an_input(tmp_path: Path) -> None:
    path = str(saved(tmp_path, TOP))
    x = "x=" + json.dumps(ROWS.tolist())
    code, facts = report("run", path, "--input", x, "--input", "k=3")
    assert (code, facts["outputs"]["values"]["shape"]) == (0, [2, 3])
    assert report("run", path, "--input", x, "--set", "k=3")[1]["outputs"] == facts["outputs"]
    code, facts = report("run", path, "--input", x)
    assert (code, facts["error"]["what"]) == (2, "no value for k")
    code, facts = report("run", path, "--input", x, "--input", "q=3")
    assert (code, facts["error"]["try"]) == (2, "one of its inputs: x, k")


@pytest.mark.parametrize(
    "command", [["compile"], ["inspect"], ["verify"], ["export", "-o", "copy.onnx"], ["explain", "fusion"]]
)
def test_commands_for_one_graph_ask_for_the_value(tmp_path: Path, command: list[str]) -> None:
    first, *rest = command
    code, facts = report(first, str(saved(tmp_path, TOP)), *rest)
    assert (code, facts["error"]["try"]) == (2, "--set k=VALUE")

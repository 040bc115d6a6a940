"""Verification: a right backend passes on drawn inputs. Planted errors are found, and their op and line are named."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import treadle
import treadle.frontends.language as t
from tests.test_models import ZOO
from treadle.backends.numpy import spelling as numpy_spelling
from treadle.backends.numpy.backend import NumpyBackend
from treadle.backends.registry import find_backend
from treadle.backends.tvm.backend import TvmBackend
from treadle.backends.tvm.kernels.host.platforms import this_platform
from treadle.cli import app
from treadle.ir.analysis.drawn_inputs import Range, draw_inputs, index_ranges, small_sizes
from treadle.ir.builder import Builder
from treadle.ir.errors import BackendError, UsageError
from treadle.ir.graph import Function, Graph
from treadle.ir.target import Target
from treadle.ir.types import boolean, f32, i64
from treadle.passes.framework.manager import Pass
from treadle.passes.framework.pass_log import PassRecord
from treadle.runtime import verification
from treadle.runtime.roundings import Moved
from treadle.runtime.verification import compare, terms_of
from treadle.verifying import verify_model


@t.model
def toy(tokens: t.i64["B S"], *, layers=2):
    x = t.embed(tokens, 9, 8, name="table")
    for _ in t.stack("h", layers):
        x = x + t.linear(t.gelu_tanh(t.linear(x, 16, name="up")), 8, name="down")
    return t.softmax(x, axis=-1)


def line_of(text: str) -> str:
    """Return the location in this file of the line of the toy model with this text."""
    lines, first = inspect.getsourcelines(toy.function)
    at = next(number for number, line in enumerate(lines, first) if text in line)
    return f"{Path(__file__).name}:{at}"


# -- right backends --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "bert masked_lm", "t5", "whisper_encoder"])
def test_the_zoo_is_right(name: str) -> None:
    report = verify_model(ZOO[name][0], seed=5)
    ran = [b for b in report.backends if b.refused is None]
    assert report.passed, str(report)
    assert "numpy" in [b.backend for b in ran]
    assert len(report.sizes) == 3
    # Every tolerance is far below the difference that a wrong formula makes, and the measured difference is not 0.
    assert all(0 < b.difference.value < b.difference.tolerance < 1e-3 for b in ran)
    assert json.loads(json.dumps(report.as_dict()))["backends"][0]["first_fault"] is None


def test_the_same_seed_gives_the_same_report() -> None:
    first, second = (verify_model(toy, backends=["numpy"], seed=1).as_dict() for _ in range(2))
    assert first == second
    assert verify_model(toy, backends=["numpy"], seed=2).as_dict() != first


def test_an_artifact_is_verified(tmp_path: Path) -> None:
    treadle.compile(toy).save(tmp_path / "toy.treadle")
    report = verify_model(tmp_path / "toy.treadle", backends=["numpy"])
    assert report.passed, str(report)
    for option, flag in (({"layers": 3}, "--set"), ({"widen": "bf16"}, "--widen"), ({"weights": {}}, "--weights")):
        with pytest.raises(UsageError, match=f"an artifact is already compiled, and does not accept {flag}\\n"):
            verify_model(tmp_path / "toy.treadle", **option)


# -- wrong backends --------------------------------------------------------------------------------------------------


def test_a_wrong_kernel_is_found_with_the_users_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second op of a block is off by one part in ten thousand; the softmax that follows hides most of that."""
    monkeypatch.setitem(numpy_spelling.SPELLINGS, "gelu_tanh", "kernels.gelu_tanh({x}) * np.float32(1.0001)")
    report = verify_model(toy)
    wrong = next(b for b in report.backends if b.backend == "numpy")
    assert not report.passed
    assert wrong.passed is False
    assert wrong.fault is not None
    assert (wrong.fault.op, wrong.fault.scope) == ("activated_linear", "h.0")
    assert wrong.fault.line.endswith(line_of("gelu_tanh"))
    assert wrong.fault.difference is not None
    assert wrong.fault.difference.value == pytest.approx(1e-4, rel=0.01)
    assert all(b.passed is not False for b in report.backends if b is not wrong)
    assert "WRONG" in str(report)
    assert f"first op: {wrong.fault}" in str(report)


def test_the_first_of_two_wrong_kernels_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(numpy_spelling.SPELLINGS, "softmax", lambda line: f"np.exp({line.x})")
    monkeypatch.setitem(
        numpy_spelling.SPELLINGS, "embedding", "kernels.take({table}, {indices}, 0) * np.float32(1.001)"
    )
    (report,) = verify_model(toy, backends=["numpy"]).backends
    assert report.fault is not None
    assert report.fault.op == "embedding"
    assert report.fault.line.endswith(line_of("t.embed"))


def test_a_kernel_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(numpy_spelling.SPELLINGS, "gelu_tanh", "kernels.gelu_tan({x})")
    (report,) = verify_model(toy, backends=["numpy"]).backends
    assert report.failure is not None
    assert "gelu_tan" in report.failure
    assert report.fault is not None
    assert report.fault.op == "activated_linear"
    assert "gelu_tan" in (report.fault.failure or "")


def test_nan_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(numpy_spelling.SPELLINGS, "gelu_tanh", "{x} * np.float32(np.nan)")
    report = verify_model(toy, backends=["numpy"])
    assert not report.passed
    assert json.loads(json.dumps(report.as_dict(), allow_nan=False))["passed"] is False


def test_right_ops_put_together_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend is wrong only if a graph has more than one op. So no single op can be named, and the report states
    this.
    """

    class Careless(NumpyBackend):
        def compile(self, graph: Graph, target: Any, weights: Any) -> Any:
            made = super().compile(graph, target, weights)
            if len(graph.main.nodes) == 1:
                return made
            return lambda **arrays: {name: array * 1.01 for name, array in made(**arrays).items()}

    monkeypatch.setattr(verification, "find_backend", lambda name: Careless())
    report = verify_model(toy, backends=["numpy"])
    assert report.backends[0].passed is False
    assert report.backends[0].fault is None
    assert "every op alone is correct" in str(report)


@dataclass(frozen=True)
class ForgetTheResidual(Pass):
    """x + f(x)   -->   f(x), a wrong rewrite"""

    def run(self, function: Function, graph: Graph, log: PassRecord) -> int:
        adds = [node for node in function.nodes if node.op.name == "add"]
        for node in adds:
            node.operands = (node.operands[1], node.operands[1])
        return len(adds)


def test_a_wrong_rewrite_is_told_from_a_wrong_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TREADLE_CERTIFY", "0")  # a certificate would undo the rewrite
    report = verify_model(toy, backends=["numpy"], passes=[ForgetTheResidual()])
    assert report.rewrites.exceeds
    assert not report.passed
    assert report.backends[0].fault is None  # every op of the rewritten graph is computed correctly


def test_a_refusal_is_not_a_fault() -> None:
    b = Builder(Graph("half"))
    b.outputs(y=-b.input("x", "bf16[S]"))
    report = verify_model(b.graph, backends=["numpy"])
    assert report.backends[0].passed is None
    assert "NumPy has no bf16" in (report.backends[0].refused or "")
    assert not report.passed  # no backend ran, so nothing was verified


def test_a_refusal_of_many_ops_is_one_line() -> None:
    report = verify_model("gpt2", backends=["numpy"], dtype="bf16", layers=1, dim=32, heads=2, vocab=50)
    refused = report.backends[0].refused or ""
    assert "NumPy has no bf16" in refused and refused.endswith(" more") and "\n" not in refused


@t.model
def small_differences(x: t.f32["B 64"]):
    return t.linear(x + 80.0, 64, bias=False, name="w")


def test_rounded_activations_whose_error_grows_are_no_error() -> None:
    """Neighbors are subtracted from each other, so a step of 8 bits is larger than eight of the result's."""
    weight = np.eye(64, dtype=np.float32) - np.roll(np.eye(64, dtype=np.float32), 1, axis=0)
    report = verify_model(small_differences, weights={"w.weight": weight}, backends=["numpy"], quantize="int8")
    assert report.passed, str(report)
    assert report.rewrites.value > 8 / 127


# -- differences -----------------------------------------------------------------------------------------------------


def unmoved(expected: np.ndarray[Any, Any], *others: np.ndarray[Any, Any]) -> Moved:
    return Moved.between(expected, others or [expected])


def test_an_undecided_integer_may_differ() -> None:
    decided, undecided = np.array([1, 2]), unmoved(np.array([1, 2]), np.array([1, 5]))
    assert not compare(np.array([1, 2]), decided, undecided, 0.0, 1, i64[(2,)]).exceeds
    assert not compare(np.array([1, 5]), decided, undecided, 0.0, 1, i64[(2,)]).exceeds
    assert compare(np.array([7, 2]), decided, undecided, 0.0, 1, i64[(2,)]).exceeds
    true, false = np.array([True]), np.array([False])
    assert compare(false, true, unmoved(true), 0.0, 1, boolean[(1,)]).exceeds


def test_masks_do_not_hide_the_rest() -> None:
    """Tolerance next to a masked element (float32's lowest number): it does not change. Infinities must match."""
    least = float(np.finfo(np.float32).min)
    expected = np.array([least, 1.0, -np.inf])
    eps, moved = f32.spacing, unmoved(expected)
    near = compare(np.float32([least, 1 + 2 * eps, -np.inf]), expected, moved, eps, 1, f32[(3,)])
    assert not near.exceeds
    assert near.value == pytest.approx(2 * eps)
    assert compare(np.float32([least, 1.001, -np.inf]), expected, moved, eps, 1, f32[(3,)]).exceeds
    assert compare(np.float32([least, 1, 0]), expected, moved, eps, 1, f32[(3,)]).exceeds
    assert compare(np.float32([0, 1, -np.inf]), expected, moved, eps, 1, f32[(3,)]).exceeds


def test_a_tolerance_is_made_of_the_reference_alone() -> None:
    """The tolerance is 8 (eps max|f| + growth moved), relative to max|f|, whatever the backend's result is."""
    expected = np.array([4.0, -1.0])
    moved = unmoved(expected, np.array([4.0, -1.5]))
    for wrong in (1.0, 1e3, 1e30):
        found = compare(np.float32([4.0, wrong]), expected, moved, 0.125, 2.0, f32[(2,)])
        assert found.tolerance == pytest.approx(8 * (0.125 * 4 + 2.0 * 0.5) / 4)
        assert found.value == pytest.approx((wrong + 1) / 4)


def test_a_result_may_be_off_by_what_goes_into_one_number_of_it() -> None:
    b = Builder(Graph("terms"))
    x, w, k = b.input("x", "f32[3, 5, 7]"), b.input("w", "f32[11, 7]"), b.input("k", "f32[3, 7, 11]")
    made = [b.linear(x, w), b.matmul(x, k), b.softmax(x), x + 1, b.reduce_sum(x, axes=(1,))]
    assert [terms_of(y.value.node) for y in made] == [7, 7, 1, 1, 5]


# -- limits of verification --------------------------------------------------------------------------------------------


def test_a_badly_conditioned_model_is_not_called_wrong() -> None:
    """The model subtracts the mean from numbers that are nearly equal: float32 keeps few digits of the difference, on
    every backend.
    """

    @t.model
    def offset(x: t.f32["B S 64"]):
        return t.layer_norm(t.linear(x, 64, name="up") + 3000.0, name="norm")

    report = verify_model(offset)
    ran = [b for b in report.backends if b.refused is None]
    assert report.passed, str(report)
    assert all(1e-5 < b.difference.value < b.difference.tolerance < 0.1 for b in ran)


def test_nothing_is_claimed_if_roundings_decide_the_result() -> None:
    @t.model
    def chaos(x: t.f32["B 8"]):
        for _ in range(40):
            x = t.sin(x * 7.0)
        return x

    report = verify_model(chaos, backends=["numpy"])
    assert report.backends[0].passed is None
    assert report.backends[0].fault is None
    assert not report.passed
    assert "inconclusive" in str(report)


def test_the_choice_that_roundings_decide_is_named() -> None:
    @t.model
    def routed(x: t.f32["B 8"]):
        scores = t.linear(x, 4, name="gate") * 1e-8 + 1.0
        experts = t.rearrange(t.linear(x, 12, name="experts"), pattern="b (e=4 d) -> b e d")
        chosen = t.top_k(scores, k=1)[1]
        at = t.expand(t.rearrange(chosen, pattern="b k -> b k 1"), shape=(x.shape[0], 1, 3))
        return t.take_along_axis(experts, at, axis=1)

    report = verify_model(routed, backends=["numpy"])
    (backend,) = report.backends
    assert backend.passed is None and backend.choice is not None and backend.choice.op == "top_k"
    assert "an op chooses otherwise after such a change: top_k    tests/test_verify.py:" in str(report)
    assert report.as_dict()["backends"][0]["choice"]["op"] == "top_k"


def test_nan_by_rounding_is_undecided_and_constant_exponents_are_exact() -> None:
    expected = np.array([1.0, 2.0])
    assert list(unmoved(expected, np.array([1.0, np.nan])).by) == [0.0, np.inf]

    @t.model
    def cubes(x: t.f32["B 8"]):
        return x**3

    report = verify_model(cubes, backends=["numpy"])
    assert report.passed, str(report)
    assert 1e-8 < report.backends[0].difference.tolerance < 1e-5


def test_results_that_are_nan_throughout_are_no_agreement() -> None:
    @t.model
    def empty(x: t.f32["B 8"]):
        return t.softmax(t.where(x > 100.0, x, float("-inf"))) + 1.0

    report = verify_model(empty, backends=["numpy"])
    assert not report.passed
    (found,) = report.not_finite
    assert (found.origin, found.kind, found.is_all) == ("softmax of infinite numbers", "NaN", True)
    assert Path(__file__).name in found.line
    assert "no output is finite" in str(report)
    assert str(found) in str(report)
    assert json.loads(json.dumps(report.as_dict(), allow_nan=False))["not_finite"][0]["origin"] == found.origin


def test_a_weight_that_is_nan_is_named() -> None:
    weights = treadle.compile(toy).weights
    broken = {name: np.array(array) for name, array in weights.items()}
    broken["h.1.up.weight"][3, 2] = np.nan
    report = verify_model(toy, weights=broken, backends=["numpy"])
    assert not report.passed
    assert [each.origin for each in report.not_finite] == ["weight h.1.up.weight"]


def test_some_numbers_that_are_not_finite_are_told_and_the_rest_compared() -> None:
    @t.model
    def logarithms(x: t.f32["B 8"]):
        return t.log(x)

    report = verify_model(logarithms, backends=["numpy"], sizes=[{"B": 50}])
    (found,) = report.not_finite
    assert (found.origin, found.kind, found.of) == ("log", "NaN", 400)
    assert 0 < found.count < 400
    assert report.passed, str(report)  # the log of a negative drawn number is not an error of the model


def test_lines_are_told_as_they_are_known() -> None:
    lines: list[str] = []
    report = verify_model(toy, emit=lines.append)
    assert "\n".join(lines) == str(report)


# -- drawn inputs ----------------------------------------------------------------------------------------------------


def test_indices_are_found_through_what_moves_them() -> None:
    b = Builder(Graph("indices"))
    table = b.parameter("table", "f32[10, 4]")
    short = b.parameter("short", "f32[3, 4]")
    direct, shifted, both, moved, free = (
        b.input(n, "i64[B, S]") for n in ("direct", "shifted", "both", "moved", "free")
    )
    joined, padded = b.input("joined", "i64[B, S]"), b.input("padded", "i64[B, S]")
    wrapped, ended = b.input("wrapped", "i64[B, S]"), b.input("ended", "i64[B, S]")
    narrow = b.input("narrow", "i32[B, S]")
    added, taken = b.input("added", "i64[B, S]"), b.input("taken", "i64[B, S]")
    outputs = {
        "a": b.embedding(table, direct),
        "b": b.embedding(table, shifted + 2),
        "c": b.embedding(table, both) + b.gather(short, both, axis=0),
        "d": b.embedding(table, b.slice(b.rearrange(moved, pattern="b s -> s b"), axis=0, start=0, stop=1)),
        "e": b.cast(free, to=f32),
        "f": b.embedding(short, b.cast(narrow, to=i64)),
        "g": b.embedding(short, b.concat(joined, b.pad(padded, axis=1, before=1, value=2), axis=1)),
        "h": b.gather(table, b.where(b.less(wrapped, 0), wrapped + 10, wrapped), axis=0),
        "j": b.embedding(table, b.add(2, added)),
        "k": b.embedding(table, taken - 3),
        "i": b.gather(table, b.where(b.greater_equal(ended, 0), ended, ended + b.size(value=10)), axis=0),
    }
    b.outputs(**outputs)
    ranges = index_ranges(b.graph, {"B": 2, "S": 5})
    assert ranges == {
        "direct": Range(0, 9),
        "shifted": Range(-2, 7),
        "added": Range(-2, 7),
        "taken": Range(3, 12),
        "both": Range(0, 2),
        "moved": Range(0, 9),
        "narrow": Range(0, 2),
        "joined": Range(0, 2),
        "padded": Range(0, 2),
        "wrapped": Range(0, 9),
        "ended": Range(0, 9),
    }


def test_positions_are_not_indices_of_what_they_count() -> None:
    """Positions of tokens index a table of 40 rows; the tokens themselves index a table of 11 rows."""
    graph = ZOO["gpt2"][0].configure(context=40).graph()
    sizes = small_sizes(graph)
    assert all(s["S"] <= 40 for s in sizes)
    assert len({(s["B"], s["S"]) for s in sizes}) == 3
    assert index_ranges(graph, sizes[-1]) == {"tokens": Range(0, 10)}
    drawn = draw_inputs(graph, sizes[-1], [0])["tokens"]
    assert drawn.shape == (sizes[-1]["B"], sizes[-1]["S"])
    assert (drawn.min(), drawn.max()) == (0, 10)


def test_integers_that_index_nothing_are_drawn_as_lengths() -> None:
    b = Builder(Graph("padded"))
    b.outputs(lengths=b.input("lengths", "i64[B]"), real=b.input("real", "bool[B]"))
    drawn = [draw_inputs(b.graph, {"B": 7}, [seed]) for seed in range(100)]
    assert {int(n) for each in drawn for n in each["lengths"]} == set(range(1, 8))
    assert 0.7 < np.mean([each["real"] for each in drawn]) < 0.8


def test_inputs_that_cannot_be_drawn() -> None:
    b = Builder(Graph("never"))
    x = b.input("x", "i64[S]")
    b.outputs(y=b.embedding(b.parameter("a", "f32[3, 4]"), x), z=b.embedding(b.parameter("b", "f32[3, 4]"), x - 7))
    with pytest.raises(UsageError, match="no value of input x is a valid index"):
        verify_model(b.graph, backends=["numpy"])


@pytest.mark.parametrize(("window", "found"), [(2, [7, 18]), (12, [18]), (40, [66]), (200, [258])])
def test_sizes_are_at_least_those_of_windows(window: int, found: list[int]) -> None:
    b = Builder(Graph("patches"))
    images, kernel = b.input("images", "f32[B, 3, S]"), b.parameter("kernel", f"f32[4, 3, {window}]")
    b.outputs(y=b.conv(images, kernel, strides=[window]))
    assert [sizes["S"] for sizes in small_sizes(b.graph)] == found
    assert verify_model(b.graph, backends=["numpy"]).passed


def test_sizes_that_fit_where_no_small_ones_do() -> None:
    """The hint can be followed to the letter, with sizes for every symbol."""
    b = Builder(Graph("long"))
    x = b.input("x", "f32[S]")
    b.outputs(y=b.slice(x, axis=0, stop="S - 1000"))
    with pytest.raises(UsageError, match="no small sizes fit") as error:
        verify_model(b.graph, backends=["numpy"])
    assert "sizes=[{'S': N}]" in str(error.value)
    assert verify_model(b.graph, backends=["numpy"], sizes=[{"S": 1020}]).passed


# -- the command line ------------------------------------------------------------------------------------------------


def test_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["verify", f"{__file__}:toy", "--backend", "numpy", "--sizes", "S=5"]
    output = CliRunner().invoke(app, arguments)
    assert output.exit_code == 0, output.output
    assert "numpy     ok" in output.stdout
    monkeypatch.setitem(numpy_spelling.SPELLINGS, "gelu_tanh", "{x}")
    output = CliRunner().invoke(app, [*arguments, "--json"])
    assert output.exit_code == 1
    facts = json.loads(output.stdout)
    assert facts["backends"][0]["first_fault"]["op"] == "activated_linear"
    assert facts["sizes"][0]["S"] == 5
    refused = CliRunner().invoke(app, ["verify", f"{__file__}:toy", "--sizes", "Q=5"])
    assert refused.exit_code == 2


def test_a_device_that_this_machine_lacks_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(self: object, target: Target) -> BackendError:
        return BackendError("there is no NVIDIA driver on this machine", received="libcuda.so.1")

    monkeypatch.setattr(TvmBackend, "missing_device", lacking)
    monkeypatch.setattr(TvmBackend, "available", lambda self: None)
    report = verify_model("gpt2", target="cuda", layers=1, dim=32, heads=2, vocab=20)
    (made,) = [each for each in report.backends if each.backend == "tvm"]
    assert made.refused == "there is no NVIDIA driver on this machine: libcuda.so.1"
    assert made.failure is None and made.fault is None


def test_each_backend_knows_the_devices_of_this_machine() -> None:
    other = "arm64" if this_platform().machine == "x86_64" else "x86-64"
    lacking = TvmBackend().missing_device(Target(other))
    assert lacking is not None and lacking.what == f"kernels for {other} do not run on this machine"
    assert TvmBackend().missing_device(Target("cpu")) is None
    torch = pytest.importorskip("torch")
    missing = find_backend("torch").missing_device(Target("cuda"))  # type: ignore[attr-defined]
    assert (missing is None) == torch.cuda.is_available()

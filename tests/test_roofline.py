"""`treadle roofline`: every kernel of a run is timed, and its operations and bytes are compared with the machine's
limits.
"""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import treadle
from tests.golden import Golden
from tests.svg_frames import outside
from treadle.backends.registry import find_backend
from treadle.ir.analysis.cost import graph_cost
from treadle.ir.errors import UsageError

if find_backend("tvm").available():
    pytest.skip("needs TVM", allow_module_level=True)

from typer.testing import CliRunner

from treadle.backends.tvm.kernels.isa import ISAS
from treadle.backends.tvm.profiling import TimedCall, time_calls
from treadle.benching import measured_roofline, roofline
from treadle.benching.measured_roofline import measure_roofline
from treadle.benching.roofline import KernelRow, Roofline, _joined
from treadle.benching.roofline_drawing import _Drawing, draw_roofline
from treadle.cli.application import app
from treadle.ir.target import Target

SMALL = {"layers": 2, "dim": 64, "heads": 2, "hidden": 96, "vocab": 100}
SIZES = {"B": 2, "S": 9}


def test_kernels_do_all_of_the_models_work_and_no_more() -> None:
    exe = treadle.compile("bert", backend="tvm", **SMALL)
    found = measure_roofline(exe, SIZES, rounds=2)
    lowered = exe.optimized.lowered
    assert lowered is not None
    assert sum(row.calls * row.flops for row in found.rows) == graph_cost(lowered.graph, SIZES).flops
    assert found.rows == tuple(sorted(found.rows, key=lambda row: -row.total))
    products = [row for row in found.rows if row.what.startswith("linear")]
    assert products and all(row.calls % 2 == 0 for row in products)  # there are two layers
    assert all(row.least > 0 and row.seconds > 0 and row.bytes > 0 for row in found.rows)
    assert found.least == sum(row.calls * row.least for row in found.rows)
    assert found.seconds == sum(row.calls * row.seconds for row in found.rows)
    assert found.rates["f32"] >= max(row.flops / row.seconds for row in found.rows)
    assert any("bert.py" in row.source for row in products)
    report = str(found)
    assert all(row.kernel in report for row in found.rows)
    assert json.loads(json.dumps(found.as_dict()))["sizes"] == SIZES


def test_rows_of_a_table_that_are_not_read_are_no_bytes() -> None:
    exe = treadle.compile("bert", backend="tvm", **{**SMALL, "vocab": 20_000})
    found = measure_roofline(exe, SIZES, rounds=1)
    assert max(row.bytes for row in found.rows if row.what == "embedding") < 20_000 * 64 * 4 / 10


@pytest.mark.parametrize("scheme", ["int8-weights", "int4"])
def test_rows_of_a_table_in_blocks_that_are_not_read_are_neither_bytes_nor_operations(scheme: str) -> None:
    exe = treadle.compile("gpt2", backend="tvm", quantize=scheme, layers=1, dim=64, heads=2, vocab=20_000)
    found = measure_roofline(exe, {"B": 1, "S": 2}, rounds=1)
    (row,) = [row for row in found.rows if "gather_of_blocks" in row.kernel]
    assert row.flops == 0
    assert row.bytes <= 2 * (64 + 4) + 2 * 8 + 2 * 64 * 4
    lowered = exe.optimized.lowered
    assert lowered is not None
    assert sum(row.calls * row.flops for row in found.rows) == graph_cost(lowered.graph, {"B": 1, "S": 2}).flops


def test_a_bf16_product_is_held_to_the_rate_of_bf16() -> None:
    found = measure_roofline(treadle.compile("bert", backend="tvm", dtype="bf16", **SMALL), SIZES, rounds=1)
    assert set(found.rates) == {"f32", "bf16"}
    assert {row.dtype for row in found.rows} == {"f32", "bf16"}


def test_rates_are_those_of_what_products_are_of_and_of_as_many_threads() -> None:
    """Products of integers are compared with the machine's rate for integers, on the same number of threads."""
    exe = treadle.compile("bert", backend="tvm", target=Target("cpu", 1), quantize="int8", dtype="bf16", **SMALL)
    found = measure_roofline(exe, SIZES, rounds=1)
    assert set(found.rates) == {"f32", "bf16", "int8"}
    by_kernel = {row.kernel: row.dtype for row in found.rows}
    products = {dtype for kernel, dtype in by_kernel.items() if "product" in kernel}
    assert products == {"int8"} and any(d == "bf16" for k, d in by_kernel.items() if k.startswith("attention"))
    assert "OP/s in int8" in str(found)


def test_timed_calls_compute_what_a_run_computes() -> None:
    """The calls are timed one by one, in order, on the same memory, and compute the results of a run."""
    exe = treadle.compile("bert", backend="tvm", **SMALL)
    tokens = np.arange(18).reshape(2, 9)
    before = exe(tokens=tokens)
    assert len(time_calls(exe.executable, {"tokens": tokens}, 2)) > 10  # type: ignore[arg-type]
    after = exe(tokens=tokens)
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)
    with pytest.raises(treadle.BackendError, match="index 307 is outside"):
        time_calls(exe.executable, {"tokens": tokens + 290}, 1)  # type: ignore[arg-type]


def test_other_backends_are_refused() -> None:
    with pytest.raises(UsageError, match="the numpy backend calls a library"):
        measure_roofline(treadle.compile("bert", **SMALL), SIZES)


def test_the_drawing_has_a_dot_for_each_kernel_inside_its_frame() -> None:
    found = measure_roofline(treadle.compile("bert", backend="tvm", dtype="bf16", **SMALL), SIZES, rounds=1)
    root = xml.etree.ElementTree.fromstring(draw_roofline(found))
    kind = "{http://www.w3.org/2000/svg}"
    dots = root.findall(f"{kind}circle")
    assert len(dots) == sum(1 for row in found.rows if row.flops)
    for dot in dots:
        assert 84 <= float(dot.attrib["cx"]) <= 970 and 64 <= float(dot.attrib["cy"]) <= 556
        assert "of the run" in str(dot.findtext(f"{kind}title"))


MADE = Roofline(
    "m",
    "cpu",
    1,
    {"B": 2, "S": 9},
    (
        KernelRow("product_1", "linear+gelu", 4, 3e-3, 6_000_000_000, {1 << 20: 2_000_000}, "f32", 2e-3, "m.py:7"),
        KernelRow("product_2", "linear", 2, 1e-3, 1_000_000_000, {1 << 14: 4_000}, "int8", 4e-4, ""),
        KernelRow("moved", "transpose", 1, 1e-5, 0, {1 << 16: 120_000}, "f32", 6e-6, "m.py:9"),
    ),
    {"f32": 3e12, "int8": 9e12},
    {1 << 14: 2e11, 1 << 20: 2e10},
    3_000_000,
)


def test_reports_and_drawings(golden: Golden) -> None:
    golden("roofline/report.txt", f"{MADE}\n\n{replace(MADE, sizes={}, threads=2)}\n")
    golden("roofline/drawn.svg", draw_roofline(MADE))
    assert not outside(draw_roofline(MADE))
    first = {"kernel": "product_1", "what": "linear+gelu", "calls": 4, "seconds": 3e-3, "flops": 6_000_000_000}
    report = MADE.as_dict()
    assert report.pop("kernels")[0] == {**first, "bytes": 2_000_000, "dtype": "f32", "least": 2e-3, "source": "m.py:7"}
    rates = {"rates": {"f32": 3e12, "int8": 9e12}, "read": 2e10, "held": 3_000_000}
    assert report.pop("reads") == {"16384": 2e11, "1048576": 2e10}
    assert report == {"model": "m", "target": "cpu", "threads": 1, "sizes": {"B": 2, "S": 9}, **rates}


def test_rates_that_lie_together_have_two_decades() -> None:
    drawing = _Drawing(replace(MADE, rates={"f32": 1.1e10}, rows=()))
    assert (drawing.low, drawing.high) == (9, 11)


def test_a_kernel_in_two_places_is_counted_together() -> None:
    one, other = replace(MADE.rows[0], source=""), replace(MADE.rows[0], calls=1, seconds=8e-3)
    assert _joined(None, other) is other
    assert _joined(one, other) == replace(one, calls=5, seconds=4e-3, source="m.py:7")


def test_a_kernel_is_held_to_the_longer_of_its_operations_and_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel's limit is the longer of its times for operations and for bytes. A rate is the rate of the machine's
    unit on the same number of threads, or of a kernel that was faster.
    """

    class Kernels:
        nbytes, threads, kernels = 1000, 2, ()

    rows = [
        replace(MADE.rows[0], calls=2, seconds=1.0, flops=100, traffic={1 << 20: 10}, least=0.0),
        replace(MADE.rows[0], calls=1, seconds=1.0, flops=1000, traffic={1 << 20: 8000, 1 << 14: 1000}, least=0.0),
        replace(MADE.rows[1], calls=1, seconds=0.5, flops=900, traffic={1 << 14: 10}, least=0.0),
    ]
    asked: list[Any] = []
    monkeypatch.setattr(measured_roofline, "KernelExecutable", Kernels)
    monkeypatch.setattr(
        measured_roofline, "draw_inputs", lambda graph, sizes, seed: asked.append(("drawn", sizes, seed))
    )
    monkeypatch.setattr(measured_roofline, "time_calls", lambda exe, inputs, rounds: asked.append(("timed", rounds)))
    monkeypatch.setattr(roofline, "rows_of_calls", lambda plan, kernels, calls: iter(rows))
    units = {"f32": 800.0, "int8": 2000.0}
    speeds = {1 << 14: 7000.0, 1 << 20: 90.0}
    monkeypatch.setattr(roofline, "measure_read", lambda *given: asked.append(given) or speeds[given[0]])
    monkeypatch.setattr(roofline, "measure_unit", lambda *given: asked.append(given) or units[given[0]])
    graph, optimized = SimpleNamespace(states={}), SimpleNamespace(last=SimpleNamespace(plan=object()))
    parts = {"executable": Kernels(), "graph": graph, "optimized": optimized, "target": Target("x86-64-v3")}
    model: Any = SimpleNamespace(name="m", backend="tvm", **parts)
    found = measure_roofline(model, {"B": 1})
    isa = ISAS["x86-64-v3"]
    assert asked == [
        ("drawn", {"B": 1}, [0]),
        ("timed", 9),
        ("f32", isa, 2),
        ("int8", isa, 2),
        (1 << 14, isa, 2),
        (1 << 20, isa, 2),
    ]
    assert found.rates == {"f32": 1000.0, "int8": 2000.0}
    assert found.reads == {1 << 14: 9000.0, 1 << 20: 8000.0}, "the second kernel moves 8000 far bytes in a second"
    assert [row.least for row in found.rows] == [100 / 1000, 1.0, 0.45]
    assert (found.seconds, found.least) == (3.5, 2 * 0.1 + 1.0 + 0.45)
    assert (found.model, found.target, found.threads, found.sizes) == ("m", "x86-64-v3", 2, {"B": 1})
    assert (found.read, found.held) == (8000.0, 1000)
    asked.clear()
    assert measure_roofline(model, {"B": 1}, rounds=3, seed=4).rates == found.rates
    assert asked[:2] == [("drawn", {"B": 1}, [4]), ("timed", 3)]


def test_bytes_are_of_each_storage_once_the_largest_view_of_it() -> None:
    def elements(count: int) -> Any:
        return SimpleNamespace(evaluate=lambda sizes: count * sizes["B"])

    def view(storage: Any, shape: list[int] | None) -> Any:
        panels = None if shape is not None else "panels"
        return SimpleNamespace(
            storage=storage, shape=[elements(n) for n in shape or [99]], dtype=SimpleNamespace(bytes=4), panels=panels
        )

    kinds = roofline.StorageKind
    arena, status = (SimpleNamespace(kind=kind, elements=elements(6)) for kind in (kinds.LOCAL, kinds.STATUS))
    weight = SimpleNamespace(kind=kinds.CONSTANT, elements=elements(5))
    pointers = [view(arena, [2]), view(arena, [1, 1]), view(status, [6]), view(weight, None)]

    def touched(addresses: tuple[int, ...]) -> dict[int, int]:
        call = TimedCall(SimpleNamespace(pointers=pointers), 1.0, {"B": 3}, addresses)  # type: ignore[arg-type]
        return roofline.touched_bytes(call, ())

    assert touched((164, 100, 7, 500)) == {100: 4 * 3 * 3, 500: 4 * 5 * 3}
    pointers[:] = [view(arena, [9])]
    assert touched((100,)) == {100: 4 * 6 * 3}, "no more than the storage has"


def test_the_reuse_distance_is_what_a_run_touches_in_between() -> None:
    """Weights come around once a run; a value that was just written is near. Runs follow each other."""
    weights, kib = 1 << 30, 1024
    calls = [
        {0: 16 * kib, weights: 4096 * kib},
        {0: 16 * kib},
        {0: 16 * kib, weights + 4096 * kib: 4096 * kib},
    ]
    first, second, third = roofline.reuse_distances(calls)
    assert first == {16 * kib: 16 * kib, 8192 * kib: 4096 * kib}
    assert second == {16 * kib: 16 * kib}, "the weights of the call before are touched at the same time"
    assert third == {16 * kib: 16 * kib, 8192 * kib: 4096 * kib}
    (alone,) = roofline.reuse_distances([{0: 5}])
    assert alone == {1 << 14: 5}, "the smallest distance that is measured"
    (inside, _, far) = roofline.reuse_distances([{64: 20_000}, {1 << 20: 70_000}, {0: 100_000, 1 << 30: 500_000}])
    assert inside == {1 << 14: 20_000}, "a part of a value that was touched last"
    assert far == {1 << 17: 100_000, 1 << 19: 500_000}


def test_no_kernel_is_faster_than_its_limit() -> None:
    """Most values of a small model are in a cache; at the bandwidth of memory their kernels would be too fast."""
    found = measure_roofline(treadle.compile("bert", backend="tvm", **SMALL), SIZES, rounds=2)
    assert all(row.least <= row.seconds * (1 + 1e-9) for row in found.rows)
    assert all(set(row.traffic) <= set(found.reads) for row in found.rows)
    rates = list(found.reads.values())
    assert rates == sorted(rates, reverse=True), "nearer memory is at least as fast"


def test_calls_know_the_addresses_of_their_pointers() -> None:
    exe = treadle.compile("bert", backend="tvm", **SMALL)
    calls = time_calls(exe.executable, {"tokens": np.ones((2, 9), np.int64)}, 1)  # type: ignore[arg-type]
    assert all(len(call.addresses) == len(call.step.pointers) and all(call.addresses) for call in calls)
    layers: dict[Any, set[tuple[int, ...]]] = {}
    for call in calls:
        layers.setdefault(call.step, set()).add(call.addresses)
    assert any(len(addresses) == 2 for addresses in layers.values()), "each layer has weights of its own"


def test_a_model_with_states_has_no_roofline() -> None:
    made: Any = treadle.compile("bert", backend="tvm", **SMALL)
    stateful: Any = SimpleNamespace(executable=made.executable, name="m", graph=SimpleNamespace(states={"keys": ()}))
    with pytest.raises(UsageError, match="m has states, and a roofline needs a model without states"):
        measure_roofline(stateful, SIZES)


def test_the_command(tmp_path: Path) -> None:
    options = [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]
    words = [sys.executable, "-m", "treadle", "roofline", "bert", *options, "--sizes", "B=2,S=9", "--rounds", "1"]
    words += ["--threads", "1"]
    done = subprocess.run(
        [*words, "--svg", str(tmp_path / "r.svg"), "--json"], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["kernels"] and (tmp_path / "r.svg").read_text().startswith("<svg")


def test_the_command_tells_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    made = treadle.compile("bert", **SMALL)

    def measure(model: Any, sizes: Any, **how: Any) -> Roofline:
        assert model is made
        given.update(how, sizes=sizes)
        return MADE

    monkeypatch.setattr(treadle, "compile", lambda model, **how: given.update(how, model=model) or made)
    monkeypatch.setattr(measured_roofline, "measure_roofline", measure)
    words = (
        "roofline bert --sizes B=2,S=9 --rounds 3 --threads 1 --seed 4 --dtype bf16 --quantize int8 --widen f16 --svg"
    )
    done = CliRunner().invoke(
        app, [*words.split(), str(tmp_path / "r.svg"), "--inputs", "lengths", "--set", "layers=2"]
    )
    assert done.stdout == f"{MADE}\nwrote {tmp_path / 'r.svg'}\n"
    assert (tmp_path / "r.svg").read_text() == draw_roofline(MADE)
    how = {"backend": "tvm", "target": Target("cpu", 1), "dtype": "bf16", "quantize": "int8", "widen": ("f16",)}
    asked = {"model": "bert", "inputs": ("lengths",), "config": {"layers": 2}, "seed": 4, "rounds": 3, "sizes": SIZES}
    assert given == {**how, **asked}
    refused = CliRunner().invoke(app, ["roofline", "m.treadle", "--quantize", "int8"])
    assert refused.exit_code == 2
    assert "an artifact is already compiled, and does not accept --quantize" in refused.stderr


def test_kernels_of_a_step_are_those_of_all_rows() -> None:
    """The keys and values that a step reads are those of the tokens that the rows have."""
    words = ["roofline", "gpt2", "--entry", "step", "--rounds", "1", "--json", "--set", "layers=1", "--set", "dim=32"]
    words += ["--set", "heads=2", "--set", "vocab=60", "--set", "context=300"]
    found: dict[tuple[int, int], dict[str, Any]] = {}
    for rows, past in ((1, 64), (4, 64), (4, 256)):
        done = CliRunner().invoke(app, [*words, "--rows", str(rows), "--past", str(past)])
        assert done.exit_code == 0, done.stderr
        found[rows, past] = json.loads(done.stdout)
        assert found[rows, past]["sizes"] == {"rows": rows, "past": past}

    def total(at: tuple[int, int], what: str, of: str) -> float:
        return float(sum(k["calls"] * k[what] for k in found[at]["kernels"] if of in k["what"]))

    assert total((4, 64), "flops", "linear") == 4 * total((1, 64), "flops", "linear")
    assert total((4, 256), "flops", "linear") == total((4, 64), "flops", "linear")
    assert 2 < total((4, 256), "bytes", "attention") / total((4, 64), "bytes", "attention") < 5
    for more, report in (
        (["--sizes", "B=1"], "--entry step does not accept --sizes"),
        (["--past", "300"], "past=300, and the model takes 300 positions"),
    ):
        refused = CliRunner().invoke(app, [*words, *more])
        assert (refused.exit_code, report in refused.stdout) == (2, True)
    for more in (["--entry", "other"], ["--entry", "main", "--rows", "3"]):
        assert CliRunner().invoke(app, ["roofline", "gpt2", *more]).exit_code == 2

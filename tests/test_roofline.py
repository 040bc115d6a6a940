"""`treadle roofline`: every kernel of a run, timed, with its operations and bytes, beside the machine's limits."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import pytest

import treadle
from treadle.backends.registry import find_backend
from treadle.ir.analysis.cost import graph_cost
from treadle.ir.errors import UsageError

if find_backend("tvm").available():
    pytest.skip("needs TVM", allow_module_level=True)

from treadle.backends.tvm.profiling import time_calls
from treadle.benching.roofline import measure_roofline
from treadle.benching.roofline_drawing import draw_roofline
from treadle.benching.serving import measured_limits
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
    assert products and all(row.calls % 2 == 0 for row in products)  # of two layers
    assert all(row.least > 0 and row.seconds > 0 and row.bytes > 0 for row in found.rows)
    assert found.rates["f32"] >= max(row.flops / row.seconds for row in found.rows)
    assert any("bert.py" in row.source for row in products)
    told = str(found)
    assert all(row.kernel in told for row in found.rows)
    assert json.loads(json.dumps(found.as_dict()))["sizes"] == SIZES


def test_rows_of_a_table_that_are_not_read_are_no_bytes() -> None:
    exe = treadle.compile("bert", backend="tvm", **{**SMALL, "vocab": 20_000})
    found = measure_roofline(exe, SIZES, rounds=1)
    assert max(row.bytes for row in found.rows if row.what == "embedding") < 20_000 * 64 * 4 / 10


def test_a_bf16_product_is_held_to_the_rate_of_bf16() -> None:
    found = measure_roofline(treadle.compile("bert", backend="tvm", dtype="bf16", **SMALL), SIZES, rounds=1)
    assert set(found.rates) == {"f32", "bf16"}
    assert {row.dtype for row in found.rows} == {"f32", "bf16"}


def test_rates_are_those_of_what_products_are_of_and_of_as_many_threads() -> None:
    """Whole numbers are held to their own rate, and one thread to what one thread of a library reaches."""
    exe = treadle.compile("bert", backend="tvm", target=Target("cpu", 1), quantize="int8", dtype="bf16", **SMALL)
    found = measure_roofline(exe, SIZES, rounds=1)
    assert set(found.rates) == {"f32", "bf16", "int8"}
    by_kernel = {row.kernel: row.dtype for row in found.rows}
    products = {dtype for kernel, dtype in by_kernel.items() if "product" in kernel}
    assert products == {"int8"} and any(d == "bf16" for k, d in by_kernel.items() if k.startswith("attention"))
    assert "OP/s in int8" in str(found)
    one, two = (measured_limits(1 << 20, threads)["flops"] for threads in (1, 2))
    assert 1.3 < two / one < 3  # by the processor's time, however many a library takes


def test_timed_calls_compute_what_a_run_computes() -> None:
    """Call by call, in order, on the same memory."""
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
    with pytest.raises(UsageError, match="the numpy backend calls a library's"):
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


def test_the_command(tmp_path: Path) -> None:
    options = [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]
    words = [sys.executable, "-m", "treadle", "roofline", "bert", *options, "--sizes", "B=2,S=9", "--rounds", "1"]
    words += ["--threads", "1"]
    done = subprocess.run(
        [*words, "--svg", str(tmp_path / "r.svg"), "--json"], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["kernels"] and (tmp_path / "r.svg").read_text().startswith("<svg")

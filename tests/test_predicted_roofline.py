"""The roofline of hardware that is not here: counted operations and bytes, and times by the record of the hardware."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.golden import Golden
from treadle.backends.registry import find_backend
from treadle.ir.errors import UsageError

if find_backend("tvm").available():
    pytest.skip("needs TVM", allow_module_level=True)

from typer.testing import CliRunner

import treadle
from treadle.benching.measured_roofline import measure_step_roofline
from treadle.benching.predicted_roofline import PredictedRoofline, predict_roofline, predict_step_roofline
from treadle.cli import app
from treadle.explaining.layouts import lowered_for
from treadle.ir.analysis.cost import graph_cost
from treadle.ir.hardware import HARDWARE
from treadle.program.options import CompileOptions

SMALL: dict[str, Any] = {"layers": 2, "dim": 64, "heads": 4, "vocab": 100}
SIZES = {"B": 2, "S": 9}


def flops(found: PredictedRoofline) -> int:
    return sum(row.calls * row.flops for row in found.rows)


def test_kernels_do_all_of_the_models_work_and_no_more() -> None:
    found = predict_roofline("gpt2", SIZES, target="h100", **SMALL)
    _, _, lowered = lowered_for(
        "gpt2", CompileOptions.of("compile", {"backend": "tvm", "target": "h100", "config": SMALL})
    )
    assert flops(found) == graph_cost(lowered.graph, SIZES).flops
    assert found.rows == tuple(sorted(found.rows, key=lambda row: -row.total))
    assert found.launches == sum(row.calls for row in found.rows) > 10
    products = [row for row in found.rows if row.what.startswith("linear")]
    assert products and any("gpt2.py" in row.source for row in products)


def test_times_follow_from_the_record_of_the_hardware() -> None:
    found = predict_roofline("gpt2", {"B": 8, "S": 512}, target="l4", layers=1, vocab=500)
    rate, bandwidth = HARDWARE["l4"].rates["f32"], HARDWARE["l4"].bandwidth
    for row in found.rows:
        assert row.seconds == row.least == max(row.flops / rate, row.bytes / bandwidth)
        assert found.bound(row) == ("compute" if row.flops / rate > row.bytes / bandwidth else "memory")
    assert {found.bound(row) for row in found.rows} == {"compute", "memory"}
    assert found.seconds == sum(row.calls * row.least for row in found.rows)


def test_a_model_larger_than_this_machine_is_predicted() -> None:
    """No weight is read or drawn."""
    found = predict_roofline("llama", {"B": 1, "S": 1}, target="h100", layers=80, dim=8192, heads=64, hidden=28672)
    weights = 80 * (2 * 8192 * 8192 + 3 * 8192 * 28672) * 4
    assert found.seconds > weights / HARDWARE["h100"].bandwidth


def test_a_step_does_the_work_of_a_measured_step() -> None:
    made = treadle.compile("gpt2", backend="tvm", **SMALL)
    measured = measure_step_roofline(made, rows=3, past=20, rounds=1)
    found = predict_step_roofline("gpt2", rows=3, past=20, target="h100", **SMALL)
    assert flops(found) == sum(row.calls * row.flops for row in measured.rows)
    assert "a step of gpt2 at rows=3, past=20 on h100, predicted, not measured" in str(found)


def test_the_report(golden: Golden) -> None:
    found = predict_roofline("gpt2", SIZES, target="h100", **SMALL)
    golden("pages/predicted_roofline.txt", f"{found}\n\n{predict_roofline('gpt2', target='webgpu', **SMALL)}\n")


def test_other_backends_and_longer_texts_are_refused() -> None:
    with pytest.raises(UsageError, match="the numpy backend calls a library"):
        predict_step_roofline("gpt2", target="h100", backend="numpy")
    with pytest.raises(UsageError, match="a step has one token more"):
        predict_step_roofline("gpt2", past=1024, target="h100", **SMALL)
    with pytest.raises(UsageError, match="a decoding step takes no memory budget"):
        predict_step_roofline("gpt2", memory="1GB", target="h100", **SMALL)


def test_the_command_predicts_for_a_gpu() -> None:
    words = ["roofline", "gpt2", "--set", "layers=1", "--target", "h100", "--sizes", "B=1,S=16"]
    facts = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert facts["predicted"] and facts["target"] == "h100" and facts["sizes"] == {"B": 1, "S": 16}
    assert facts["launches"] == sum(each["calls"] for each in facts["kernels"])
    for more in (["--svg", "x.svg"], ["--rounds", "3"]):
        done = CliRunner().invoke(app, [*words, *more])
        assert done.exit_code == 2 and "a prediction for a device has no measured times" in done.stderr

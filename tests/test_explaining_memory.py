"""`treadle explain MODEL memory`: the reported memory is the memory of a run, and the drawing shows it."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

import treadle
from tests.backend_checks import needs_tvm
from tests.svg_frames import outside
from tests.test_explaining_layouts import SMALL, report
from treadle.explaining.memory import MemoryReport, compare_memory, explain_memory, read_memory
from treadle.explaining.memory_drawing import HEIGHT, WIDTH, _legend, draw_memory, write_drawing
from treadle.explaining.memory_timeline import timeline_of
from treadle.ir.errors import CheckpointError, UsageError
from treadle.ir.sizing.sizes import Size
from treadle.reporting.counts import human

each_backend = pytest.mark.parametrize("backend", ["numpy", pytest.param("tvm", marks=needs_tvm)])
SIZES = {"B": 2, "S": 13}


@cache
def small() -> MemoryReport:
    return gpt2("numpy")


def gpt2(backend: str, **config: int) -> MemoryReport:
    return explain_memory("gpt2", backend=backend, sizes=SIZES, **{**SMALL, **config})


@each_backend
def test_live_values_at_the_peak_add_up_to_the_peak(backend: str) -> None:
    found = gpt2(backend)
    assert sum(each.bytes for each in found.alive) == found.peak > 0
    assert all(0 <= each.saves <= each.bytes for each in found.alive)
    assert any(each.saves for each in found.alive)
    assert all(each.line for each in found.alive)
    assert found.apart["inputs"] == 2 * 13 * 8 and found.apart["outputs"] == 2 * 13 * SMALL["vocab"] * 4
    assert f"{found.peak:,} bytes" in str(found)


def test_the_formula_gives_the_peak_at_every_size() -> None:
    for sizes in ({"B": 1, "S": 1}, {"B": 3, "S": 7}, {"B": 64, "S": 2}, {"B": 1, "S": 64}):
        found = explain_memory("bart", backend="numpy", sizes=sizes, encoder_layers=2, decoder_layers=2)
        assert max(Size.of(size).evaluate(found.sizes) for size in found.formula) == found.peak


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"arena": None}, ["numpy allocates each array by itself: the memory alive at once, and its cache"]),
        ({"arena": 9_000}, ["one arena of 9,000 bytes, equal to the peak, the lower bound"]),
        ({"arena": 9_090}, ["one arena of 9,090 bytes, 1.00% above the peak, the lower bound"]),
        (
            {"arena": 9_000, "host": "logits"},
            [
                "one arena of 9,000 bytes for values that are alive when logits is written, or later",
                "values that die earlier share the memory of logits, which a run allocates anyway",
            ],
        ),
        (
            {"arena": 9_000, "foreign": 1_000},
            [
                "one arena of 9,000 bytes for results that are written at planned offsets",
                "outside it, calls of numpy allocate their results: at most 1,000 bytes at once",
            ],
        ),
    ],
)
def test_the_text_says_where_values_lie(facts: dict[str, Any], expected: list[str]) -> None:
    own = {"peak": 9_000, "arena": None, "foreign": 0, "host": None, "apart": {"weights": 2_000, "states": 0}}
    lines = str(replace(small(), **(own | facts))).splitlines()
    assert lines[1 : len(expected) + 2] == [*expected, "not included: weights 2 kB"]


@pytest.mark.parametrize(
    ("formula", "expected"), [(("8*S",), "8*S bytes"), (("8*S", "64"), "the largest of 8*S, 64 bytes")]
)
def test_the_text_says_of_what_the_peak_is_the_largest(formula: tuple[str, ...], expected: str) -> None:
    lines = str(replace(small(), formula=formula, donated=("lent",), reorders=("moved",))).splitlines()
    at = lines.index(f"at any sizes the peak is {expected}")
    assert lines[at + 1 : at + 4] == ["lent", "moved", ""]


@needs_tvm
def test_the_arena_is_that_of_a_run() -> None:
    exe = treadle.compile("gpt2", backend="tvm", **SMALL)
    exe(tokens=np.ones((2, 13), np.int64))
    (plan,) = exe.executable.machine.plans.values()
    found = gpt2("tvm")
    assert found.arena == plan.arena == found.peak


@each_backend
def test_the_command_says_what_the_function_says(backend: str) -> None:
    settings = [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]
    words = ("explain", "gpt2", "memory", "--backend", backend, *settings)
    found = gpt2(backend)
    assert report(*words, "--set", "B=2", "--set", "S=13").split() == str(found).split()
    assert json.loads(report(*words, "--sizes", "B=2,S=13", "--json")) == json.loads(json.dumps(found.as_dict()))


def test_sizes_outside_their_bounds_are_refused() -> None:
    with pytest.raises(UsageError, match="the size of S cannot be 4000"):
        explain_memory("gpt2", sizes={"S": 4000})
    with pytest.raises(UsageError, match="has no symbolic axis T"):
        explain_memory("gpt2", sizes={"T": 4})


@needs_tvm
def test_the_drawing_shows_every_storage_while_it_lives(tmp_path: Path) -> None:
    found = gpt2("tvm")
    file = tmp_path / "gpt2.svg"
    settings = [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]
    report("explain", "gpt2", "memory", "--backend", "tvm", *settings, "--sizes", "B=2,S=13", "--svg", str(file))
    assert file.read_text(encoding="utf-8") == draw_memory(found)
    with pytest.raises(UsageError, match="the drawing cannot be written") as error:
        write_drawing(tmp_path / "no" / "gpt2.svg", draw_memory(found))
    assert error.value.received == "No such file or directory" and error.value.hint
    root = ElementTree.parse(file).getroot()
    boxes = [
        tuple(float(r.attrib[name]) for name in ("x", "y", "width", "height"))
        for r in root.iter("{http://www.w3.org/2000/svg}rect")
        if (title := r.find("{*}title")) is not None and "bytes" in (title.text or "")
    ]
    calls = {"main": 1, "h": SMALL["layers"]}
    assert len(boxes) == sum(calls[name] * len(frame.lives) for name, frame in found.frames.items())
    assert min(x for x, _, _, _ in boxes) == 84
    assert max(x + w for x, _, w, _ in boxes) == pytest.approx(WIDTH - 24, abs=0.02)
    assert max(y + h for _, y, _, h in boxes) == pytest.approx(HEIGHT - 96, abs=0.02), "the arena's first byte"
    assert min(y for _, y, _, _ in boxes) == pytest.approx(64, abs=0.02), "and its last one"
    line = [tuple(map(float, p.split(","))) for p in root.find("{*}polyline").attrib["points"].split()]  # type: ignore[union-attr]
    assert (line[0][0], line[-1][0]) == (84, pytest.approx(WIDTH - 24, abs=0.02)), "live bytes, from the first step"
    assert min(y for _, y in line) == pytest.approx(64, abs=0.02), "is the whole arena at the peak"
    for i, (x, y, w, h) in enumerate(boxes):
        for x2, y2, w2, h2 in boxes[:i]:
            apart = x + w <= x2 + 0.02 or x2 + w2 <= x + 0.02 or y + h <= y2 + 0.02 or y2 + h2 <= y + 0.02
            assert apart


@pytest.mark.parametrize("model", ["gpt2", "whisper", "t5"])
@each_backend
def test_every_coordinate_of_the_drawing_is_in_its_frame(model: str, backend: str) -> None:
    """This holds even if values share the memory of an output: then most bytes that are alive are not in the arena."""
    found = explain_memory(model, backend=backend)
    assert (found.host is not None) is (backend == "tvm"), "TVM writes these models' logits last"
    assert not outside(draw_memory(found))
    line = timeline_of(found)
    assert max(line.live) <= line.top
    assert max(line.live) >= (found.peak if backend == "tvm" else found.arena or 0)
    assert line.top >= (found.arena or 0)


def test_a_legend_has_the_entries_that_fit_in_a_row() -> None:
    legend = _legend([f"a_rather_long_name_of_an_op_{i}" for i in range(12)])
    assert 0 < len(legend) < 10
    assert max(legend.values()) < WIDTH


@needs_tvm
def test_the_legend_has_the_colour_of_each_ops_boxes() -> None:
    drawn = list(ElementTree.fromstring(draw_memory(gpt2("tvm"))))
    legend = [(r, word) for r, word in pairwise(drawn) if (r.get("width"), r.get("height")) == ("12", "12")]
    boxes = {(title.text, r.get("fill")) for r in drawn if (title := r.find("{*}title")) is not None}
    facts = {(text.rpartition(", for ")[2].split()[0], fill) for text, fill in boxes if text and "bytes)" in text}
    assert {(word.text, r.get("fill")) for r, word in legend} == facts
    end = 0.0
    for square, word in legend:
        at, text = ([float(each.attrib[axis]) for axis in "xy"] for each in (square, word))
        assert at[0] > end and text[0] > at[0] + 12
        assert at[1] + 6 == text[1] - 4, "the square is centered on letters 8 high"
        end = text[0] + 6 * len(word.text or "")


def test_values_outside_the_arena_are_not_drawn() -> None:
    with pytest.raises(UsageError, match="there is no arena to draw"):
        draw_memory(replace(gpt2("numpy"), placed=None))


def test_two_builds_are_compared(tmp_path: Path) -> None:
    before, after = gpt2("numpy").as_dict(), gpt2("numpy", vocab=2 * SMALL["vocab"]).as_dict()
    lines = compare_memory(before, after).splitlines()
    grown = 2 * 13 * SMALL["vocab"] * 4
    assert lines[0].endswith(f"({after['peak'] - before['peak']:+,})")
    assert lines[1:] == [f"  main.logits  {grown:+,} bytes  {grown:,} -> {2 * grown:,}"]
    assert compare_memory(before, before).splitlines() == [
        lines[0].partition(" ->")[0] + f" -> {before['peak']:,} bytes (+0)"
    ]
    with pytest.raises(UsageError, match="at the same sizes"):
        compare_memory(before, {**after, "sizes": {}})
    with pytest.raises(UsageError, match="not the output of explain memory"):
        compare_memory({}, after)
    (tmp_path / "no.json").write_text("[1]")
    with pytest.raises(CheckpointError):
        read_memory(tmp_path / "no.json")


def test_the_memory_of_a_gpu_has_all_that_a_call_needs() -> None:
    """Quantized weights count as they are stored."""
    plain, quantized = (
        explain_memory("gpt2", backend="torch", target="h100", quantize=scheme, layers=2, dim=64, heads=4, vocab=100)
        for scheme in (None, "int4")
    )
    for found in (plain, quantized):
        assert found.total == found.peak + sum(found.apart.values())
        size = f"{human(found.total, 'B')} of its 80 GB ({found.total:,} bytes)"
        assert f"in the memory of h100: {size}" in str(found)
    assert quantized.apart["weights"] < 0.6 * plain.apart["weights"]
    assert "in the memory of" not in str(explain_memory("gpt2", backend="torch", layers=1, dim=64, heads=4, vocab=100))

"""`treadle explain MODEL sharding`: its times, bytes and reasons agree with the ranks' programs, and it draws them."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from pprint import pformat
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.golden import Golden
from tests.svg_frames import outside
from tests.test_explaining_layouts import SMALL, report, without_lines
from treadle.cli.application import app
from treadle.explaining.sharding import ShardingReport, explain_sharding
from treadle.explaining.sharding_changes import Change
from treadle.explaining.sharding_drawing import WIDTH, draw_sharding
from treadle.ir.builder import Builder
from treadle.ir.graph import Function, Graph
from treadle.ir.hardware import Hardware
from treadle.ir.placement.mesh import Mesh
from treadle.passes.sharding.timetable import Busy, Cause, Timetable, timetable_of
from treadle.sharding import device_needs, shard_model, try_in_lab
from treadle.sharding.lab_trials import LabTrial, _difference
from treadle.sharding.needs import DeviceNeeds, milliseconds

SIZES = {"B": 8, "S": 16}
SETTINGS = [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]
SHAPE: dict[str, Any] = {"dim": 16384, "heads": 128, "kv_heads": 8, "layers": 126, "hidden": 53248, "vocab": 128256}


@cache
def plain(recipe: str = "megatron") -> ShardingReport:
    return gpt2(recipe=recipe)


def gpt2(mesh: str = "tp=2,dp=2", recipe: str = "megatron", **options: Any) -> ShardingReport:
    return explain_sharding("gpt2", mesh=mesh, recipe=recipe, **{**SMALL, "sizes": SIZES, **options})


def test_the_text(golden: Golden) -> None:
    text = without_lines(str(plain()))
    golden("explain/sharding_gpt2.txt", text)
    assert max(map(len, text.splitlines())) <= 80


def test_the_text_of_a_large_shape_holds_80_columns_and_says_what_limits() -> None:
    found = explain_sharding(
        "llama", mesh="tp=8,dp=16", recipe="megatron-fsdp", sizes={"B": 16, "S": 4096}, **{**SHAPE, "layers": 8}
    )
    lines = str(found).splitlines()
    assert max(map(len, lines)) <= 80
    assert "links limits, 82% of all times" in lines
    assert "of these overlapped" in str(found)
    assert "    embed.weight is stored in parts and gathered for use" in lines
    full = explain_sharding(
        "llama", mesh="tp=8,dp=16", recipe="megatron", sizes={"B": 16, "S": 4096}, **{**SHAPE, "layers": 64}
    )
    assert any(line.startswith("memory limits: ") for line in str(full).splitlines())
    assert full.best is not None and full.best.description == "recipe megatron-fsdp" and full.best.fits


def test_the_command_says_what_the_function_says(tmp_path: Path) -> None:
    words = ("explain", "gpt2", "sharding", "--mesh", "tp=2,dp=2", "--recipe", "megatron", "--sizes", "B=8,S=16")
    found, file = plain(), tmp_path / "gpt2.svg"
    assert report(*words, *SETTINGS, "--svg", str(file)).split() == [*str(found).split(), "wrote", str(file)]
    assert json.loads(report(*words, *SETTINGS, "--json")) == json.loads(json.dumps(found.as_dict()))
    assert file.read_text(encoding="utf-8") == draw_sharding(found)


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("sharding",), "sharding needs a mesh"),
        (("sharding", "--mesh", "tp=2"), "the split of the model is not specified"),
        (("sharding", "--mesh", "tp=2", "--against", "x"), "--against applies to memory only"),
        (("memory", "--mesh", "tp=2"), "--mesh, --recipe, --axis and --device apply to sharding only"),
        (("fusion", "--sizes", "B=2"), "explain fusion does not take sizes"),
        (("sharding", "--mesh", "tp=2", "--recipe", "dp"), "recipe dp splits over a mesh axis dp"),
    ],
)
def test_ambiguous_arguments_are_refused(words: tuple[str, ...], what: str) -> None:
    result = CliRunner().invoke(app, ["explain", "gpt2", *words, *SETTINGS])
    assert result.exit_code == 2
    assert what in " ".join(result.output.split())


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["megatron", "sequence", "megatron-fsdp"])
def test_collectives_by_cause_are_those_of_the_plan(recipe: str) -> None:
    """At sizes that the mesh divides, all ranks send the average that the plan predicts."""
    found = plain(recipe)
    times, planned = found.needs.times, found.plan.collectives()
    assert sum(c.times for c in times.causes()) == len(planned) > 0
    assert {(c.op, c.over, c.because) for c in times.causes()} == {(c.op, c.over, c.because) for c in planned}
    assert sum(c.sent for c in times.causes()) == pytest.approx(sum(c.sent for c in planned))
    assert times.collectives == pytest.approx(sum(c.seconds for c in planned))
    assert sum(times.by_limit().values()) == pytest.approx(times.work + times.collectives)


def test_bytes_of_a_device_are_those_of_its_parts() -> None:
    found = plain()
    unread = 2 * 2 * SMALL["dim"] * 4  # biases of sums: the first rank of a row adds them, and the last has none
    assert sum(found.weights.values()) == found.needs.weights + unread
    assert set(found.weights) == {"tp", ""}
    inputs, outputs = 8 * 16 * 8, 4 * 16 * SMALL["vocab"] // 2 * 4
    assert found.needs.ports == inputs + outputs
    assert found.needs.held == found.needs.weights + found.needs.values + found.needs.ports


def by_lane(found: ShardingReport) -> dict[str, list[Busy]]:
    lanes: dict[str, list[Busy]] = {}
    for each in found.needs.times.busy:
        lanes.setdefault(each.over, []).append(each)
    return lanes


@pytest.mark.parametrize("recipe", ["megatron", "megatron-fsdp"])
def test_a_lane_does_one_thing_at_a_time_in_the_order_of_the_program(recipe: str) -> None:
    for lane in by_lane(plain(recipe)).values():
        assert all(a.end <= b.start * (1 + 1e-12) for a, b in pairwise(lane))


def test_weights_are_gathered_ahead_by_one_call_and_what_is_summed_is_waited_for() -> None:
    found = gpt2(recipe="megatron-fsdp", sizes={"B": 64, "S": 16}, layers=4)
    work, gathered = by_lane(found)[""], by_lane(found)["dp"]
    begins = [min(each.start for each in work if each.call == call) for call in range(4)]
    first = [next(each for each in gathered if each.call == call) for call in range(4)]
    assert all(each.start < begins[each.call] for each in first)
    assert all(each.start >= begins[each.call - 1] for each in first[1:])
    assert found.needs.times.seconds < found.needs.times.work + found.needs.times.collectives
    alone = plain().needs.times
    last = max(each.end for each in alone.busy if each.over)
    assert any(each.start >= last for each in alone.busy if not each.over)


def test_a_change_is_the_plan_that_it_names() -> None:
    found = plain()
    best = found.best
    assert best is not None
    kind, _, name = best.description.partition(" ")
    options = {"mesh": name} if kind == "mesh" else {"recipe": name}
    needs = device_needs(
        shard_model("gpt2", **{"mesh": "tp=2,dp=2", "recipe": "megatron", **options}, sizes=SIZES, **SMALL)
    )
    assert (needs.times.seconds, needs.held) == (best.seconds, best.held)
    assert best.seconds < found.needs.times.seconds
    assert all(best.seconds <= change.seconds for change in found.changes)


def test_one_axis_alone_is_whole() -> None:
    plan = shard_model("gpt2", "tp=2", recipe="megatron", axes={"vocab": "-"}, **SMALL)
    assert plan.weights["wte.weight"].text(plan.mesh) == "[-, -]"
    assert plan.weights["h.0.mlp.up.weight"].text(plan.mesh) == "[tp, -]"
    assert "vocab" not in plan.axes
    assert try_in_lab(plan).passed


# -- the drawing -------------------------------------------------------------------------------------------------------

SVG = "{http://www.w3.org/2000/svg}"
RECT = f"{SVG}rect"


def test_the_drawing_shows_ranks_and_the_timetable() -> None:
    found = plain()
    root = ElementTree.fromstring(draw_sharding(found))
    bars = [(r, (r.find("{*}title"))) for r in root.iter(RECT)]
    words = [title.text or "" for _, title in bars if title is not None]
    assert sum(w.startswith("rank ") for w in words) == 4
    drawn = [r for r, title in bars if title is not None and "limited by" in (title.text or "")]
    sides = [(float(r.attrib["x"]), float(r.attrib["x"]) + float(r.attrib["width"])) for r in drawn]
    assert min(left for left, _ in sides) == 96
    assert max(right for _, right in sides) == pytest.approx(WIDTH - 24, abs=0.31)
    assert any("the split of ffn is summed" in w and "models/gpt2.py" in w for w in words)
    block = [w for w in words if w.startswith("all_reduce") and "h.1." in w]
    assert len(block) >= 2


def test_a_part_of_a_bar_has_its_name_written_in_it_where_there_is_room() -> None:
    root = ElementTree.fromstring(draw_sharding(plain()))
    written = {text.text for text in root.iter(f"{SVG}text") if text.get("fill") == "#ffffff"}
    parts = [(r.find("{*}title"), float(r.attrib["width"])) for r in root.iter(RECT) if r.get("stroke") == "#ffffff"]
    names = [(title.text or "", wide) for title, wide in parts if title is not None]
    assert all(wide > 5 * len(name) for name, wide in names if name in written)
    assert all(wide < 9 * len(name) + 16 for name, wide in names if name not in written)
    assert {name in written for name, _ in names} == {True, False}


def test_the_legend_has_the_colours_of_the_bars() -> None:
    drawn = list(ElementTree.fromstring(draw_sharding(plain())))
    legend = [(r, word) for r, word in pairwise(drawn) if (r.get("width"), r.get("height")) == ("12.00", "12.00")]
    colours = {word.text or "": r.get("fill") for r, word in legend}
    assert list(colours) == ["work limited by compute", "work limited by memory bandwidth", "all_reduce"]
    bars = [(title.text or "", r) for r in drawn if (title := r.find("{*}title")) is not None]
    for words, bar in bars:
        op, _, limit = words.partition(", limited by ")
        if limit:
            named = "all_reduce" if op.startswith("all_reduce") else f"work limited by {limit.partition('  ')[0]}"
            assert bar.get("fill") == colours[named], words
    end = 0.0
    for square, word in legend:
        at, text = (numbers(each, "x", "y") for each in (square, word))
        assert at[0] > end and text[0] > at[0] + 12
        assert at[1] + 6 == text[1] - 4, "the square is centered on letters 8 high"
        end = text[0] + 6 * len(word.text or "")


def numbers(drawn: ElementTree.Element, *names: str) -> list[float]:
    return [float(drawn.attrib[name]) for name in names]


def test_all_that_is_drawn_lies_in_the_drawing_and_names_beside_what_they_name() -> None:
    root = ElementTree.fromstring(draw_sharding(plain()))
    wide, high = numbers(root, "width", "height")
    words = {(text.text, *numbers(text, "x", "y")) for text in root.iter(f"{SVG}text")}
    for x, y, w, h in (numbers(r, "x", "y", "width", "height") for r in root.iter(RECT)):
        assert 0 <= x <= x + w <= wide + 0.31 and 0 <= y <= y + h <= high
    assert all(0 < x < wide and 8 < y < high for _, x, y in words)
    for box in root.iter(RECT):
        x, y, w, h = numbers(box, "x", "y", "width", "height")
        head = box.findtext("{*}title", "")
        if head.startswith("rank ") and h > 30:
            assert (head.split()[1].rstrip(","), x + w / 2, y + h / 2 + 4) in words
        if box.get("fill") == "#f7f7f8":
            (lane,) = (name for name, left, line in words if (left, line) == (x - 8, y + h / 2 + 4))
            assert lane is not None and lane.startswith(("work", "over "))


def test_a_mesh_with_more_ranks_than_there_is_room_for_is_drawn_in_part() -> None:
    found = gpt2(mesh="dp=512", recipe="dp", sizes={"B": 512, "S": 16})
    text = draw_sharding(found)
    assert "40 x 1 of 512 ranks are drawn" in text
    assert text.count("<title>rank ") == 40


# -- a timetable by hand -----------------------------------------------------------------------------------------------

ROUND = Hardware("round", "cuda", "", 16.0, {"f32": 16.0}, memory=1.0, node=2, fast=8.0, slow=4.0, latency=0.5)


def two_blocks() -> Graph:
    """h(h(x)) w', where each h sums over two ranks, and w' is derived from a weight once."""
    graph, block = Graph("g"), Function("h")
    b = Builder(graph, block)
    y = b.apply("all_reduce", b.exp(b.input("x", "f32[8]")), over="tp", ways=2, because="summed", monoid="sum")
    b.outputs(y=b.exp(y))
    graph.add_function(block)
    b = Builder(graph)
    x = b.input("x", "f32[8]")
    for n in range(2):
        with b.scoped(f"h.{n}"):
            (x,) = b.call(block, [x])
    b.outputs(y=b.exp(b.parameter("w", "f32[8]")) * x)
    return graph


def test_a_timetable_by_hand() -> None:
    """An exp moves 64 bytes and a product 96; an all-reduce of 32 sends 32 bytes in two messages."""
    times = timetable_of(two_blocks(), Mesh.of("tp=2"), ROUND, {})
    rows = [(each.op, each.over, each.scope, each.start, each.end, each.sent, each.call) for each in times.busy]
    assert rows == [
        ("exp", "", "h.0", 0, 4, 0, 0),
        ("all_reduce", "tp", "h.0", 4, 9, 32, 0),
        ("exp", "", "h.0", 9, 13, 0, 0),
        ("exp", "", "h.1", 13, 17, 0, 1),
        ("all_reduce", "tp", "h.1", 17, 22, 32, 1),
        ("exp", "", "h.1", 22, 26, 0, 1),
        ("mul", "", "", 26, 32, 0, -1),
    ]
    assert (times.calls, times.seconds, times.work, times.collectives) == (("h.0", "h.1"), 32, 22, 10)
    assert times.by_limit() == {"compute": 0, "memory bandwidth": 22, "links": 10, "latency": 0}
    (cause,) = times.causes()
    assert (cause.scope, cause.because, cause.times, cause.sent, cause.seconds) == ("h.*", "summed", 2, 64, 10)


@pytest.mark.parametrize(
    ("changed", "limits"),
    [
        ({"rates": {"f32": 1.0}}, {"compute": 40, "memory bandwidth": 0, "links": 10, "latency": 0}),
        ({"rates": {"f32": 2.0}}, {"compute": 0, "memory bandwidth": 22, "links": 10, "latency": 0}),
        ({"latency": 2.0}, {"compute": 0, "memory bandwidth": 22, "links": 0, "latency": 16}),
        ({"node": 1}, {"compute": 0, "memory bandwidth": 22, "links": 18, "latency": 0}),
    ],
    ids=str,
)
def test_limits_of_a_time(changed: dict[str, Any], limits: dict[str, float]) -> None:
    assert timetable_of(two_blocks(), Mesh.of("tp=2"), replace(ROUND, **changed), {}).by_limit() == limits


# -- known numbers -----------------------------------------------------------------------------------------------------


def needing(held: int, memory: float, work: float, meeting: float, seconds: float) -> DeviceNeeds:
    """Return the needs of a device with `held` bytes, 7 of them not for weights, and with these times."""
    limits = {"compute": work * 0.75, "memory bandwidth": work * 0.25, "links": meeting}
    cause = Cause("all_reduce", "tp", "the split of ffn is summed", "h.0", "m.py:3", 2, 4096, meeting)
    times: Any = SimpleNamespace(
        seconds=seconds, work=work, collectives=meeting, by_limit=lambda: limits, causes=lambda: [cause] * (meeting > 0)
    )
    return DeviceNeeds(held - 7, 3, 4, memory, times)


def test_device_needs_of_a_known_case(golden: Golden) -> None:
    """A plan fits to the last byte; overlapping work is reported from a hundredth of the time on."""
    assert needing(100, 100, 1.0, 0.0, 1.0).fits and not needing(101, 100, 1.0, 0.0, 1.0).fits
    assert "overlapped" not in needing(100, 100, 1.0, 0.5, 1.486).run_line()
    assert "overlapped" in needing(100, 100, 1.0, 0.5, 1.485).run_line()
    texts = [
        needing(2000, 80e9, 0.0123456, 0.0, 0.0123456),
        needing(2000, 80e9, 0.01, 0.03, 0.039),
        needing(2000, 1500, 0.01, 0.03, 0.04),
        needing(2000, 80e9, 4.1704, 1.0, 4.5),
    ]
    facts = [pformat(each.facts(), width=118, sort_dicts=False) for each in texts[:3]]
    golden("pages/needs.txt", "\n\n".join([*map(str, texts), *facts]))


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (8.26e-5, "0.0826 ms"),
        (0.99949, "999 ms"),
        (0.9995, "1,000 ms"),
        (1.0, "1,000 ms"),
        (4.17, "4,170 ms"),
        (0.1234, "123 ms"),
    ],
)
def test_a_time_has_three_digits(seconds: float, expected: str) -> None:
    assert milliseconds(seconds) == expected


def test_the_largest_saving_of_a_known_case(golden: Golden) -> None:
    """A change that saves less than half a percent is not reported; if the plan does not fit, a change that fits is."""
    fits, full = needing(2000, 80e9, 1.0, 0.5, 1.0), needing(2000, 1500, 1.0, 0.5, 1.0)

    def report_with(needs: DeviceNeeds, *changes: Change) -> ShardingReport:
        return replace(plain(), needs=needs, changes=changes)

    slow, fast = Change("recipe dp", 0.995, 3000, True), Change("heads whole", 0.99, 1000, True)
    small, large = Change("mesh tp=4", 3.0, 1400, True), Change("recipe dp", 0.5, 1600, False)
    assert report_with(fits, slow).best is None and report_with(fits, fast, slow).best is fast
    assert report_with(full, small).best is small and report_with(full, large).best is large
    assert report_with(fits, large).best is None and report_with(fits).best is None
    many = [replace(fast, description=f"change {n}") for n in range(4)]
    cases = [
        report_with(fits),
        report_with(fits, slow),
        report_with(fits, *many),
        report_with(full, small, large),
        report_with(full, replace(large, seconds=2)),
    ]
    golden("pages/changes.txt", "\n\n".join("\n".join(case._changes()) for case in cases))


def test_lab_results_of_a_known_case() -> None:
    near, far = LabTrial({"y": 1e-11}, {}, 3, 2), LabTrial({"y": 0.0, "z": 1.01e-11}, {"B": 5, "S": 6}, 3, 2)
    assert str(near) == "lab: 2 ranks in float64, 3 collectives\n  y: 1.0e-11 from the whole model\n  equal"
    assert str(far).startswith("lab: 2 ranks in float64 at B=5, S=6, 3 collectives\n  y: 0.0e+00 from")
    assert str(far).endswith("\n  NOT equal")
    assert far.facts() == {
        "passed": False, "ranks": 2, "differences": {"y": 0.0, "z": 1.01e-11}, "sizes": {"B": 5, "S": 6},
        "collectives": 3,
    }  # fmt: skip
    assert _difference(np.array([1.0, 3.0]), np.array([-1.0, 4.0])) == 0.5
    assert _difference(np.array([0.25]), np.array([0.5])) == 0.25  # next to 1, if all are smaller
    assert _difference(np.zeros(0), np.zeros(0)) == 0
    assert _difference(np.array([np.nan, np.inf, 4.0]), np.array([np.nan, np.inf, 2.0])) == 1.0
    assert np.isnan(_difference(np.array([np.nan, 2.0]), np.array([1.0, 2.0])))


def test_a_drawing_of_known_times(golden: Golden) -> None:
    """Narrow bars that are merged and that are not, an op without a color, labels that fit and do not."""
    tiny = [(0.4 + n * 4e-4, 3e-4) for n in range(5)] + [(0.41, 3e-4), (0.4108, 3e-4), (0.4115, 2e-3)]
    rows = [
        ("linear", "", 0.0, 0.25, "compute", 0), ("gelu", "", 0.25, 0.05, "memory bandwidth", 0),
        ("all_reduce", "tp", 0.3, 0.1, "links", 0),
        *(("add", "", start, took, "memory bandwidth", 1) for start, took in tiny),
        ("linear", "", 0.45, 0.3, "compute", 1), ("all_gather", "dp tp", 0.2, 0.3, "links", 1),
        ("sum", "tp", 0.6, 0.002, "links", 1), ("softmax", "", 0.8, 0.1, "latency", -1),
        ("linear", "", 0.9, 0.05, "compute", 2), ("all_reduce", "tp", 0.95, 0.05, "links", 2),
    ]  # fmt: skip
    busy = tuple(
        Busy(op, over, "it is split" * bool(over), f"h.{call}", "m.py:3", start, took, 4096.0 * bool(over), limit, call)
        for op, over, start, took, limit, call in rows
    )
    times = Timetable(busy, ("h.0.mlp", "h.1.mlp", "head"))
    needs = DeviceNeeds(6000, 3000, 1000, 20_000.0, times)
    changes = tuple(
        Change(f"recipe {n}", seconds, 5000 * n, n < 3) for n, seconds in enumerate((0.25, 1.0, 2.0, 3.0, 0.5))
    )
    report = replace(plain(), needs=needs, changes=changes, weights={"tp": 4000.0, "": 1990.0, "dp": 10.0})
    golden("pages/known_times.svg", draw_sharding(report))
    full = replace(report, needs=replace(needs, memory=8000.0, times=Timetable(busy[:2], ())), changes=())
    golden("pages/known_times_too_large.svg", draw_sharding(full))
    assert not [place for each in (report, full, plain()) for place in outside(draw_sharding(each))]

"""The report on two builds: the ops that correspond, the ops that only one build has, and the command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.command_line import Treadle, commands_in
from tests.test_report import Page, unpacked
from treadle.comparing.builds import open_build
from treadle.comparing.differences import compare
from treadle.report.comparison import comparison_report

SIZES: dict[str, Any] = {"layers": 2, "dim": 32, "heads": 2, "vocab": 64}


def sections(a: dict[str, Any], b: dict[str, Any], model: tuple[str, str] = ("gpt2", "gpt2")) -> dict[str, Any]:
    builds = [open_build(name, **{**SIZES, **options}) for name, options in zip(model, (a, b), strict=True)]
    return unpacked(Page(comparison_report(compare(*builds)).html()))


def last_ops(found: dict[str, Any], program: int) -> dict[int, str]:
    """Return the op of each number that the last stage of a program draws, without calls of blocks."""
    graph = found[f"graph:{program}"]
    numbers: dict[int, str] = {}
    at: dict[str, int] = {}
    for stage in graph["stages"]:
        for path, body in stage.items():
            at[path] = body
            if body is None:
                del at[path]
    for body in at.values():
        for kind, *rest in graph["bodies"][body].get("items", []):
            if kind == "op":
                numbers[rest[0]] = graph["nodes"][rest[1]][0]
    return numbers


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[str, str]]] = {
    "equal": ({}, {}, ("gpt2", "gpt2")),
    "quantized": ({}, {"quantize": "int8-weights"}, ("gpt2", "gpt2")),
    "without a fusion": ({}, {"without": ("fuse-activated-linear",)}, ("gpt2", "gpt2")),
    "one more layer": ({}, {"layers": 3}, ("gpt2", "gpt2")),
    "two passes": ({}, {}, ("gpt2@fold-constants", "gpt2@fuse-activated-linear")),
}


@pytest.mark.parametrize("name", CASES)
def test_every_op_corresponds_to_others_or_is_only_in_one_build(name: str) -> None:
    found = sections(*CASES[name])
    data = found["diff"]["data"]
    assert [each.split(":")[0] for each in found["head"]["programs"]] == ["a", "b"]
    assert found["head"]["tabs"][0] == ["diff", "Differences"]
    for side in (0, 1):
        drawn = last_ops(found, side)
        paired = {number for pair in data["pairs"] for number in pair[side]}
        assert paired | set(data["only"][side]) == set(drawn)
    assert (data["only"] == [[], []] and not data["differs"]) == (name in ("equal",))


def test_pairs_of_equal_builds_are_equal_ops() -> None:
    found = sections(*CASES["equal"])
    ops = [last_ops(found, side) for side in (0, 1)]
    pairs = found["diff"]["data"]["pairs"]
    assert len(pairs) == len(ops[0])
    for a, b, _ in pairs:
        assert [ops[0][number] for number in a] == [ops[1][number] for number in b]


def test_the_command_writes_the_report(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    command: Treadle = commands_in(tmp_path, capsys, monkeypatch)
    words = ["diff", "gpt2", "--b", "--quantize int8-weights", "--report", "diff.html"]
    words += [word for name, size in SIZES.items() for word in ("--set", f"{name}={size}")]
    said = command(*words)
    assert said.code == 0
    assert said.out.splitlines()[-1] == "wrote diff.html"
    found = unpacked(Page((tmp_path / "diff.html").read_text(encoding="utf-8")))
    assert found["diff"]["data"]["differs"]
    assert command(*words, "--json").json["differs"]
    said = command(*words[:-10], "--report", "missing/diff.html", *words[-8:])
    assert said.code == 2
    assert "the report cannot be written" in said.err

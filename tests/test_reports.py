"""The command line's output: numbers with prefixes, plurals, abbreviated arrays, and printed tables."""

from __future__ import annotations

import re
import sys
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Annotated, Any

import numpy as np
import pytest

import treadle as t
from treadle.backends.tvm.runtimes.machine_devices import MachineDevice
from treadle.fitting import fit_prose, fitted
from treadle.reporting.arrays import array_facts, array_table, shortest, similarity_tables
from treadle.reporting.compilations import compiled_facts, compiled_lines, pass_table
from treadle.reporting.counts import counted, human
from treadle.reporting.tables import console, print_whole
from treadle.reporting.zoo import zoo_tables


@t.model
def double(x: Annotated[t.Tensor, t.f32["B 2"]]) -> t.Tensor:
    return x * 2


@pytest.mark.parametrize(
    ("count", "report"),
    [
        (0, "0 B"), (999, "999 B"), (999.4, "999 B"), (999.5, "1 kB"), (1000, "1 kB"), (1234, "1.23 kB"),
        (999_499, "999 kB"), (999_500, "1 MB"), (1e9, "1 GB"), (2.5e12, "2.5 TB"), (9.995e14, "1 PB"),
        (1e18, "1e+03 PB"),
    ],
)  # fmt: skip
def test_counts_in_three_digits(count: float, report: str) -> None:
    assert human(count, "B") == report
    assert human(count) == report.removesuffix("B").strip()


@pytest.mark.parametrize(
    ("count", "what", "report"),
    [
        (0, "op", "0 ops"), (1, "op", "1 op"), (2, "op", "2 ops"), (1024, "parameter", "1,024 parameters"),
        (1, "pass", "1 pass"), (2, "pass", "2 passes"), (2, "match", "2 matches"), (3, "box", "3 boxes"),
        (2, "wish", "2 wishes"),
    ],
)  # fmt: skip
def test_plurals(count: int, what: str, report: str) -> None:
    assert counted(count, what) == report


def test_a_small_output_is_told_in_full() -> None:
    assert len(array_facts(np.zeros(64, np.float32))["values"]) == 64
    assert "values" not in array_facts(np.zeros(65, np.float32))
    assert array_facts(np.array([np.nan, np.inf], np.float32)) == {
        "dtype": "float32",
        "shape": [2],
        "min": None,
        "mean": None,
        "max": None,
        "not_finite": 2,
        "values": [None, None],
    }
    facts = array_facts(np.array([[1, 2], [4, 4]], np.int64))
    assert (facts["min"], facts["mean"], facts["max"], facts["not_finite"]) == (1, 2.75, 4, 0)
    assert array_facts(np.array([True, False]))["mean"] == 0.5
    assert shortest(np.float32(0.1)) == 0.1


def printed(*tables: Any) -> str:
    out = console()
    with out.capture() as said:
        for each in tables:
            out.print(each)
    return said.get()


def rows_of(table: Any) -> list[list[str]]:
    """Return the cells of each printed row, without the line below the header."""
    return [row.split() for row in printed(table).splitlines() if "\u2500" not in row]


def test_passes_as_a_table() -> None:
    """For a pass that changed something, the numbers of ops before and after are shown; other passes are dimmed. Zeros
    are empty cells.
    """
    changed = SimpleNamespace(
        name="fuse", before=Counter(add=3, mul=1), after=Counter(add=2, fused=1), changed=True, seconds=0.00126,
        op_changes={"add": -1, "fused": 1}, refusals=[1, 2], near_misses=[1],
    )  # fmt: skip
    idle = SimpleNamespace(
        name="tidy", before=Counter(add=9), after=Counter(add=2), changed=False, seconds=2.0, op_changes={},
        refusals=[], near_misses=[],
    )  # fmt: skip
    log: Any = [changed, idle]
    table = pass_table(log)
    assert rows_of(table) == [
        ["pass", "ops", "change", "refused", "nearly", "ms"],
        ["fuse", "4", "->", "3", "-1", "add,", "+1", "fused", "2", "1", "1.3"],
        ["tidy", "2", "2000.0"],
    ]
    assert [str(row.style) for row in table.rows] == ["", "dim"]


def test_outputs_as_a_table() -> None:
    report = {
        "y": array_facts(np.array([[1, 2.5, np.inf]], np.float32)),
        "n": array_facts(np.int64(7)[()].reshape(())),
        "nothing": array_facts(np.zeros((0, 2), np.float32)),
    }
    assert rows_of(array_table(report)) == [
        ["output", "dtype", "shape", "min", "mean", "max", "not", "finite"],
        ["y", "float32", "1", "x", "3", "1", "1.75", "2.5", "1"],
        ["n", "int64", "scalar", "7", "7", "7"],
        ["nothing", "float32", "0", "x", "2"],
    ]


def test_similarities_as_a_table() -> None:
    """A long sentence is truncated. Similar pairs are marked, but not a sentence with itself."""
    sentences = ["a" * 48, "b" * 49]
    (table,) = similarity_tables(sentences, np.array([[1, 0.51], [0.5, 1]]))
    assert rows_of(table) == [["1", "2"], ["1", "a" * 48, "1.00", "0.51"], ["2", "b" * 45 + "...", "0.50", "1.00"]]
    styles = [[str(cell.style) for cell in column._cells] for column in table.columns[1:]]
    assert styles == [["", ""], ["bold green", ""]]


@pytest.mark.parametrize("width", [None, 200, 80, 20])
@pytest.mark.parametrize("length", [1, 60])
def test_similarities_of_many_sentences_are_all_printed(
    width: int | None, length: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a terminal, a table has the columns that fit. In a pipe, one table has them all, on lines of any length."""
    count = 60
    near = np.linspace(-1, 1, count * count).reshape(count, count)
    if width is not None:
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    printed: list[list[str]] = [[] for _ in range(count)]
    for table in similarity_tables(["a" * length] * count, near, width):
        print_whole(table)
        lines = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
        assert width is None or max(map(len, lines)) <= width
        assert len(lines) == count + 2
        for row, line in zip(printed, lines[2:], strict=True):
            row += line.split()[2:]
    assert printed == [[f"{x:.2f}" for x in row] for row in near]


def test_models_that_are_here_and_that_are_not() -> None:
    fetched = [
        {"name": "one", "about": "a model", "download_bytes": 5000, "path": "/cache/one"},
        {"name": "another", "about": "a model", "download_bytes": 6000, "path": "/cache/two"},
        {"name": "third", "about": "a model", "download_bytes": 7000, "path": None},
    ]
    zoo = [{"name": "tiny", "description": "a model", "parameters": 1234, "defaults": {"layers": 2, "dim": 8}}]
    text = printed(*zoo_tables({"zoo": zoo, "fetched": fetched}))
    assert "1.23 k" in text and "layers=2, dim=8" in text
    assert "one      /cache/one\nanother  /cache/two\n" in text
    assert text.count("fetched") == 2 and text.count("treadle fetch third") == 1
    assert len(list(zoo_tables({"zoo": zoo, "fetched": fetched[2:]}))) == 2


def test_tensors_that_are_not_used() -> None:
    made = t.compile(double)
    assert not any("not used" in line for line in compiled_lines(made, 1.0))
    for count, report in ((1, "1 tensor of the checkpoint not used: t0"), (4, "t0, t1, t2, t3"), (5, "t3, ...")):
        unused = replace(made, unused=tuple(f"t{i}" for i in range(count)))
        assert list(compiled_lines(unused, 1.0))[-1].endswith(report)
        assert compiled_facts(unused, 1.0)["unused"] == [f"t{i}" for i in range(count)]
    unread = replace(made, unread=("rope_parameters.mscale",))
    report = f"1 key of config.json that {made.name} does not know: rope_parameters.mscale"
    assert list(compiled_lines(unread, 1.0))[-1] == report
    assert compiled_facts(unread, 1.0)["unread"] == ["rope_parameters.mscale"]


def test_a_pipe_has_a_width_and_lines_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    assert console().width == console(stderr=True).width == 120
    assert fitted("word " * 50, fit_prose) == "word " * 50
    monkeypatch.setenv("COLUMNS", "70")
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(getattr(sys, stream), "isatty", lambda: True)
    assert console().width == console(stderr=True).width == 70
    assert max(map(len, fitted("word " * 50, fit_prose).split("\n"))) <= 70


@pytest.mark.parametrize(
    ("target", "devices", "line"),
    [
        (
            "cuda",
            0,
            "all of it is compiled in tvm for cuda, an NVIDIA GPU; this machine has none, which needs NVIDIA's",
        ),
        ("cuda", 1, "all of it runs in tvm on cuda, an NVIDIA GPU of this machine"),
        ("cuda:1", 1, "all of it is compiled in tvm for cuda:1, an NVIDIA GPU; this machine has no cuda:1"),
        (
            "metal",
            0,
            "all of it is compiled in tvm for metal, an Apple GPU: kernels as text",
        ),
        ("h100", 1, "all of it is compiled in tvm for h100, NVIDIA H100 SXM with 80 GB"),
        ("arm64", 1, "all of it is compiled in tvm for arm64, a 64-bit Arm CPU, with NEON"),
    ],
)
def test_a_program_runs_on_a_device_that_this_machine_has(
    target: str, devices: int, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tvm")
    monkeypatch.setattr(
        "treadle.reporting.compilations.list_devices", lambda kind: [MachineDevice("GPU", "CUDA")] * devices
    )
    made = t.compile(double, backend="tvm", target=target)
    (found,) = [each for each in compiled_lines(made, 0.0) if each.startswith("all of it")]
    assert found.startswith(line)
    if not line.endswith(("text", "needs", "needs NVIDIA's")):
        assert found == line

"""The mutation tester itself: the drawn changes are mutations, and the reported outcomes are correct."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("cosmic_ray")
pytest.importorskip("coverage")

from cosmic_ray.mutating import mutate_code
from coverage import CoverageData

from tests.line_map import (
    _SETTINGS,
    CONTEXT,
    OF_ALL,
    ROOT,
    LineMap,
    _around,
    _cases_of_op,
    _importing,
    _is_outside,
    _Layer,
    _lines_before,
    _step,
)
from tests.mutation_operators import KINDS, DropKeyword, DropReturned, TurnMembership, _sites, draw
from tests.mutations import Chosen, Mutation, _copy_of_tree, _outcome, append, main, read

OWN = [
    (DropReturned(), "def f(x):\n    return x + 1\n", "def f(x):\n    return None\n"),
    (DropKeyword(), "f(x, eps=1)\n", "f(x)\n"),
    (DropKeyword(), "f(eps=1)\n", "f()\n"),
    (DropKeyword(), "f(eps=1, axis=2)\n", "f( axis=2)\n"),
    (TurnMembership(), "a = x in y\n", "a = x not in y\n"),
    (TurnMembership(), "a = x not in y\n", "a = x in y\n"),
]


@pytest.mark.parametrize(("operator", "before", "after"), OWN)
def test_operators_of_our_own(operator: DropReturned, before: str, after: str) -> None:
    assert mutate_code(before, operator, 0) == after


def test_mutations_without_effect_are_not_drawn() -> None:
    source = """
if TYPE_CHECKING:
    a = 1 + 1
def f(x: int | None, n: Literal[3]) -> int | None:
    y: Literal[3, 4] = 5
    samples = [S("f32[2]", axis=1)]
    _ERRORS = [(S("f32[2]", axis=2), "no axis 2")]
@overload
def g(x: int = 3) -> int: ...
"""
    assert {(line, kind) for line, kind, _, _ in _sites(source)} == {(5, "constant")}


def test_draws_are_mistakes_and_a_seed_draws_the_same_again() -> None:
    drawn = list(draw(6, seed=3))
    assert [text for _, text in drawn] == [text for _, text in draw(6, seed=3)]
    for mutation, text in drawn:
        compile(text, mutation.file, "exec")
        source = (ROOT / mutation.file).read_text()
        assert text != source
        assert mutation.kind in KINDS


def test_the_last_word_on_a_mutation_counts(tmp_path) -> None:
    first = Mutation("1/1", "ir/axes.py", 3, "constant", "-a\n+b", outcome="survived")
    append(tmp_path / "results", first)
    append(tmp_path / "results", Mutation("1/2", "ir/axes.py", 4, "return", "-a\n+b", outcome="noticed"))
    append(tmp_path / "results", Mutation("1/1", "ir/axes.py", 3, "constant", "-a\n+b", outcome="survived", same="why"))
    assert [(m.name, m.same) for m in read(tmp_path / "results").values()] == [("1/1", "why"), ("1/2", "")]


def test_options_may_stand_between_a_command_and_its_words(tmp_path) -> None:
    append(tmp_path / "results.jsonl", Mutation("1/1", "ir/axes.py", 3, "constant", "-a\n+b", outcome="survived"))
    main(["judge", "--place", str(tmp_path), "1/1", "why"])
    assert read(tmp_path / "results.jsonl")["1/1"].same == "why"


def test_the_tests_of_a_line_are_those_of_what_is_around_it() -> None:
    source = "class A:\n    def f(self):\n        return g(\n            1,\n        )\n\n    x = 1\n"
    assert list(dict.fromkeys(_around(source, 4))) == [(4, 4), (3, 4), (2, 4), (2, 5), (1, 4), (1, 7)]


def test_a_line_is_found_where_it_was_when_the_map_was_made() -> None:
    assert _lines_before("a\nb\nc\nd\n", "a\nx\ny\nc\nd\n") == {1: 1, 4: 3, 5: 4}


def test_an_op_has_the_cases_that_the_suite_makes_of_it() -> None:
    source = '@op("tanh", axes="...")\nclass Tanh(Op):\n    x: Operand\n'
    assert _cases_of_op(source, 3) == [
        "tests/test_op_suite.py::test_the_reference_gives_what_the_rules_infer[tanh]",
        "tests/test_op_suite.py::test_the_gradient_equals_finite_differences[tanh]",
        "tests/test_op_suite.py::test_forward[tanh-",
        "tests/test_op_suite.py::test_gradient[tanh-",
    ]


def test_declarations_are_tested_by_all_modules() -> None:
    lines = ["LIMIT = 4", "class A:", "    x: int = 3", "    def f(self, y=2):", "        return y", "async def g("]
    source = "\n".join([*lines, "    z=1,", "):", "    z += 1", "LAST = 5"])
    assert [n for n in range(1, 11) if _is_outside(source, n)] == [1, 2, 3, 4, 6, 7, 8, 10]
    for name in OF_ALL:
        module, _, function = name.partition("::")
        assert f"def {function}(" in (ROOT / module).read_text(), name


def test_modules_that_import_a_file_may_notice_its_mistakes() -> None:
    assert _importing("treadle/fitting.py") == ["tests/test_reports.py", "tests/test_terminal.py"]
    assert "tests/test_onnx_export.py" in _importing("backends/onnx/spelling.py")
    assert "tests/test_backend_ops.py" in _importing("backends/numpy/attention_kernels.py"), "as a name of its package"


@pytest.mark.parametrize(("cases", "kept"), [(1, 1), (9, 9), (20, 10), (100, 20), (5344, 185)])
def test_about_three_roots_of_the_cases_are_mapped(cases: int, kept: int) -> None:
    assert len(range(0, cases, _step(cases))) == kept


def test_chosen_tests_run_in_the_order_they_are_named() -> None:
    class Item:
        def __init__(self, nodeid: str) -> None:
            self.nodeid = nodeid

    items = [Item(f"tests/test_a.py::{name}") for name in ("x", "y", "t[add-0]", "t[add_norm-0]", "u[1]", "z")]
    names = ["tests/test_a.py::z", "tests/test_a.py::x", "tests/test_a.py::u[", "tests/test_a.py::t[add-"]
    chosen = Chosen(names, most=10)
    chosen.pytest_collection_modifyitems(items)  # type: ignore[arg-type]
    assert [item.nodeid.partition("::")[2] for item in items] == ["z", "x", "u[1]", "t[add-0]"]
    for item in items[1:3]:
        chosen.pytest_runtest_setup(item)  # type: ignore[arg-type]
    chosen.until -= 20
    chosen.pytest_runtest_setup(items[0])  # type: ignore[arg-type]
    with pytest.raises(pytest.skip.Exception):
        chosen.pytest_runtest_setup(items[3])  # type: ignore[arg-type]


OF_A_PROCESS = """
import subprocess, sys
def test_a_process_that_starts_elsewhere_imports_the_copy():
    found = subprocess.run([sys.executable, "-c", "import treadle"], cwd="/", check=False).returncode
    assert found == 7
"""


def test_processes_of_tests_import_the_copy(tmp_path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_a.py").write_text(OF_A_PROCESS)
    (tmp_path / "treadle.py").write_text("raise SystemExit(7)")
    names = ["tests/test_a.py::test_a_process_that_starts_elsewhere_imports_the_copy"]
    assert _outcome(tmp_path, Mutation("1/1", "ir/axes.py", 3, "return", ""), names, 10, 60) == ("survived", "", 1)


def test_a_copy_begins_with_the_kernels_of_the_map(tmp_path) -> None:
    kernel = tmp_path / "map" / "layer-000" / "cache" / "kernels" / "one"
    kernel.parent.mkdir(parents=True)
    kernel.write_bytes(b"object")
    tree = _copy_of_tree(tmp_path)
    assert (tree / "cache" / "kernels" / "one").read_bytes() == b"object"
    assert (tree / "ir" / "axes.py").read_text() == (ROOT / "ir" / "axes.py").read_text()


def test_mistakes_are_drawn_from_where_one_asks() -> None:
    drawn = [mutation.file for mutation, _ in draw(6, seed=3, under=["ir/storage", "ir/axes.py"])]
    assert {"ir/axes.py"} < set(drawn)
    assert all(file.startswith("ir/storage/") for file in {*drawn} - {"ir/axes.py"})


def _layer(folder: Path, tests: dict[str, int]) -> None:
    """Write coverage data of a run in which each context, the tests of one module, has run one line of ir/axes.py."""
    folder.mkdir(parents=True)
    data = CoverageData(str(folder / "coverage.1"))
    for context, line in tests.items():
        data.set_context(context)
        data.add_lines({str(ROOT / "ir" / "axes.py"): [line]})
    data.write()
    passed = "".join(f"0.1 passed {context.rpartition('|')[2]}\n" for context in tests if "::" in context)
    (folder / "durations.1").write_text(passed)
    (folder / "kernels.1").write_text("")
    _Layer.gather(folder)


def test_a_module_that_was_mapped_again_is_known_as_it_is_now(tmp_path) -> None:
    last = len((ROOT / "ir" / "axes.py").read_text().splitlines())
    _layer(tmp_path / "layer-000", {"tests/test_a.py::x": last, "tests/test_b.py::y": last, "tests/test_b.py": last})
    _layer(tmp_path / "layer-001", {"tests/test_b.py|tests/test_b.py::z": last})
    assert LineMap(tmp_path).closest("ir/axes.py", last, 10)[:2] == ["tests/test_a.py::x", "tests/test_b.py::z"]


def test_lines_run_by_child_processes_count_for_the_test(tmp_path, monkeypatch) -> None:
    settings = tmp_path / "settings.ini"
    settings.write_text(_SETTINGS.format(folder=tmp_path, sources=ROOT / "ir", context=CONTEXT))
    monkeypatch.setenv("COVERAGE_PROCESS_START", str(settings))
    monkeypatch.setenv(CONTEXT, "tests/test_a.py::x")
    code = "import os, treadle.ir.axes; os.fork() or os._exit(0)"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    _Layer.gather(tmp_path)
    report = json.loads((tmp_path / "tests.json").read_text())
    assert list(report["lines"]) == ["tests/test_a.py::x"]
    assert "ir/axes.py" in report["sources"]

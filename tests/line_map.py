"""A map from source lines to the tests that run them. `tests.mutations` uses it to run only the closest tests of a
mutation.

A pytest plugin. Each test is a context of coverage. Lines that a fixture of a wider scope runs count for its whole
module, lines of an import for no test, and lines of a process that a test starts for that test. A kernel is emitted
once, by the first test that needs it. So each kernel is a context, too, and its lines count for all tests that use it.
Of a test with n cases, about 3 √n cases are mapped, since the union of their lines hardly grows after that. A line of
the log gives the duration of each test. Sources are stored, because lines may move later. Test modules that have
changed since can be mapped again by themselves.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import coverage
import pytest

ROOT = Path(__file__).parents[1]
LEAST = 20  # tests that are run whatever their duration
FOLDERS = ("backends", "files", "frontends", "ir", "models", "passes", "runtime", "treadle")

OF_ALL = (
    "tests/test_signatures.py::test_parameters_of_functions",
    "tests/test_signatures.py::test_data_that_is_not_plain_and_frozen",
    "tests/test_pages.py::test_commands_and_their_options",
)
"""Tests that inspect the declarations of every module. Most tests run none of these lines."""

CONTEXT = "TREADLE_LINE_MAP_CONTEXT"
"""Environment variable with the running test, for the processes that the test starts."""

_place = os.environ.get("TREADLE_LINE_MAP")
_coverage = coverage.Coverage.current()  # started in each process that finds `_settings`, before it imports anything

_SETTINGS = """
[run]
data_file = {folder}/coverage
parallel = true
source = {sources}
context = ${{{context}-}}
patch = _exit, fork
sigterm = true
disable_warnings = no-data-collected, module-not-measured, module-not-imported, couldnt-parse, trace-changed
"""


def set_context(context: str) -> None:
    """Attribute the lines of this process, which is a fork, to that test from now on."""
    own = coverage.Coverage.current()
    if own is not None and context:
        own.switch_context(context)


def _switch(context: str) -> None:
    assert _coverage is not None
    _coverage.switch_context(context)
    os.environ[CONTEXT] = context


def pytest_configure() -> None:
    """Make each kernel a separate context, and record the contexts that use it."""
    from treadle.backends.tvm.kernels.host.cache import KernelCache

    os.register_at_fork(after_in_child=lambda: set_context(os.environ.get(CONTEXT, "")))  # after coverage's own hook
    entries, compiled = KernelCache.entries, KernelCache._compile

    def message(cache: KernelCache, kernels: Iterable[Any]) -> Any:
        kernels = list(kernels)
        with open(f"{_place}/kernels.{os.getpid()}", "a") as log:
            log.writelines(f"{_kernel(cache, kernel)} {os.environ.get(CONTEXT, '')}\n" for kernel in kernels)
        return entries(cache, kernels)

    def one_by_one(cache: KernelCache, kernels: Sequence[Any]) -> None:
        before = os.environ.get(CONTEXT, "")
        for kernel in kernels:
            _switch(_kernel(cache, kernel))
            try:
                compiled(cache, [kernel])
            finally:
                _switch(before)

    KernelCache.entries, KernelCache._compile = message, one_by_one  # type: ignore[method-assign, assignment]


def _kernel(cache: Any, kernel: Any) -> str:
    return "kernel-" + hashlib.sha256("\n".join(cache._key(kernel)).encode()).hexdigest()[:16]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep every k-th case of a test with many cases. k is prime, so that no parameter's values are left out
    periodically.
    """
    sizes = Counter(_function(item.nodeid) for item in items)
    seen: Counter[str] = Counter()
    kept = []
    for item in items:
        function = _function(item.nodeid)
        if seen[function] % _step(sizes[function]) == 0:
            kept.append(item)
        seen[function] += 1
    items[:] = kept


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    _switch(item.nodeid)
    result = yield
    _switch("")
    return result


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[object], request: pytest.FixtureRequest) -> Iterator[None]:
    if fixturedef.scope == "function":
        return (yield)
    _switch(_module(request.node.nodeid))
    result = yield
    _switch(os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0])
    return result


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and not hasattr(report, "node"):  # xdist also passes each report to its own process
        with open(f"{_place}/durations.{os.getpid()}", "a") as log:
            log.write(f"{report.duration:.4f} {report.outcome} {report.nodeid}\n")


def _function(nodeid: str) -> str:
    return nodeid.partition("[")[0]


def _module(nodeid: str) -> str:
    return nodeid.partition("::")[0]


def _step(cases: int) -> int:
    step = math.ceil(math.sqrt(cases) / 3)
    while step > 1 and any(step % divisor == 0 for divisor in range(2, step)):
        step += 1
    return step


class LineMap:
    """The map in a folder: a layer for all test modules, then layers for modules that were mapped again."""

    def __init__(self, folder: Path) -> None:
        self._layers = [_Layer(each) for each in sorted(folder.glob("layer-*"))]
        for n, layer in enumerate(self._layers):
            later = {module for each in self._layers[n + 1 :] for module in each.modules}
            layer.modules -= later

    @staticmethod
    def make(folder: Path, jobs: int, modules: Sequence[str] = ()) -> None:
        """Run the suite, `jobs` tests at a time, without the certificates of rewrites, which are slow.

        modules  modules to map again; if empty, all of them, and the old map is deleted
        """
        if not modules:
            shutil.rmtree(folder, ignore_errors=True)
        layer = folder.absolute() / f"layer-{len(list(folder.glob('layer-*'))):03}"
        layer.mkdir(parents=True)
        sources = ", ".join(str(ROOT / each) for each in FOLDERS)
        settings = layer / "settings.ini"
        settings.write_text(_SETTINGS.format(folder=layer, sources=sources, context=CONTEXT))
        environment = os.environ | {"TREADLE_LINE_MAP": str(layer), "TREADLE_CERTIFY": "0"}
        environment["COVERAGE_PROCESS_START"] = str(settings)
        environment["TREADLE_CACHE"] = str(layer / "cache")  # holds no kernel yet
        words = [sys.executable, "-m", "pytest", "-p", "tests.line_map", "-n", str(jobs), "--dist", "worksteal", "-q"]
        left_out = [f"--ignore=tests/{name}.py" for name in ("test_fuzz", "test_packaging", "test_type_checkers")]
        subprocess.run([*words, *left_out, *modules], cwd=ROOT, env=environment, check=False)
        _Layer.gather(layer)

    def seconds(self, name: str) -> float:
        known = [layer.seconds[name] for layer in self._layers if layer.knows(name)]
        return known[-1] if known else 5.0  # a name that stands for many cases: a guess

    def closest(self, file: str, line: int, most: float) -> list[str]:
        """Return the tests that run a line, up to a total of `most` seconds. Tests that are quick and run few other
        lines come first.

        For a line that runs only during imports, the tests of its function, its class or its file are returned. For a
        file that no mapped test runs, the test modules that name it are returned. For a line outside of functions, the
        tests that inspect all modules are added. Last come prefixes of the names of cases that were not mapped, and the
        test modules that import the file.
        """
        source = (ROOT / file).read_text()
        by_line = [layer.by_line(file, source) for layer in self._layers]
        found: dict[str, float] = {}
        for first, last in _around(source, line):
            for layer, tests in zip(self._layers, by_line, strict=True):
                for n in range(first, last + 1):
                    found |= {name: layer.lines[name] * (0.1 + self.seconds(name)) for name in tests.get(n, ())}
            if found:
                break
        spent = 0.0
        chosen = []
        for name in sorted(found, key=lambda name: (found[name], name)):
            spent += self.seconds(name)
            if spent > most and len(chosen) >= LEAST:
                break
            chosen.append(name)
        others = [f"{_function(name)}[" for name in chosen if "[" in name]
        more = [*_cases_of_op(source, line), *others, *_importing(file), *([] if chosen else _named_by(file))]
        return [*chosen, *dict.fromkeys([*(OF_ALL if _is_outside(source, line) else ()), *more])]


class _Layer:
    """The map of one run; it is the latest map for the test modules `modules`."""

    def __init__(self, folder: Path) -> None:
        self._data = coverage.CoverageData(str(folder / "coverage"))
        self._data.read()
        message = json.loads((folder / "tests.json").read_text())
        self._root, self._kernels, self._sources = Path(message["root"]), message["kernels"], message["sources"]
        self.lines: dict[str, int] = message["lines"]
        self.seconds: dict[str, float] = message["seconds"]
        self.modules = set(map(_module, self.seconds))

    @staticmethod
    def gather(folder: Path) -> None:
        """Merge the files that the processes wrote.

        tests.json holds the root, the lines and seconds of each test, the tests of each kernel, and the sources.
        """
        whole = coverage.Coverage(data_file=str(folder / "coverage"), config_file=False, messages=False)
        whole.combine([str(folder)], keep=True)
        whole.save()
        logs = "".join(log.read_text() for log in folder.glob("durations.*")).splitlines()
        message = [line.split(" ", 2) for line in logs]
        seconds = {name: float(took) for took, outcome, name in message if outcome == "passed"}
        data = whole.get_data()
        files = data.measured_files()
        lines = Counter(
            _test(context)
            for file in files
            for contexts in data.contexts_by_lineno(file).values()
            for context in contexts
        )
        kernels: dict[str, list[str]] = {}
        for line in dict.fromkeys("".join(log.read_text() for log in folder.glob("kernels.*")).splitlines()):
            kernel, _, test = line.partition(" ")
            kernels.setdefault(kernel, []).append(test)
        sources = {os.path.relpath(file, ROOT): Path(file).read_text() for file in sorted(files)}
        message = {"root": str(ROOT), "lines": lines, "seconds": seconds, "kernels": kernels, "sources": sources}
        (folder / "tests.json").write_text(json.dumps(message))

    def knows(self, name: str) -> bool:
        """Return True if a test has passed in this layer, and no later layer has mapped its module."""
        return name in self.seconds and _module(name) in self.modules

    def by_line(self, file: str, source: str) -> dict[int, set[str]]:
        """Return the tests, and modules, that run each line of a file that may have changed since."""
        before = _lines_before(self._sources.get(file, ""), source)
        contexts = self._data.contexts_by_lineno(str(self._root / file))
        return {now: self._tests(contexts.get(then, ())) for now, then in before.items()}

    def _tests(self, contexts: Iterable[str]) -> set[str]:
        names = {test for each in map(_test, contexts) for test in self._kernels.get(each, (each,))}
        return {name for name in names if self.knows(name) or name in self.modules}


def _test(context: str) -> str:
    """Return the test that started a process. Its lines are separate from the parent's other processes."""
    return re.split(r"\|(?=tests/)", context)[-1]


def _lines_before(old: str, new: str) -> dict[int, int]:
    """Map the lines of a file to the lines of an older version; new lines are not in the map."""
    matcher = difflib.SequenceMatcher(None, old.splitlines(), new.splitlines(), autojunk=False)
    return {b + n + 1: a + n + 1 for a, b, size in matcher.get_matching_blocks() for n in range(size)}


def _around(source: str, line: int) -> Iterator[tuple[int, int]]:
    """Yield the line, then ever larger units around it: its statement, function, class, file."""
    yield line, line
    statements = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.stmt) and n.lineno <= line <= _end(n)]
    for statement in sorted(statements, key=lambda n: _end(n) - n.lineno):
        yield statement.lineno, line
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            yield statement.lineno, _end(statement)
    yield 1, len(source.splitlines())


def _end(node: ast.stmt) -> int:
    return node.end_lineno or node.lineno


def _is_outside(source: str, line: int) -> bool:
    """Return True if a line is outside of every function's body: a default, a class's field, a constant."""
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    return not any(n.body[0].lineno <= line <= _end(n) for n in functions)


def _cases_of_op(source: str, line: int) -> list[str]:
    """Return the op suite's cases of the op whose class contains the line, or the common prefixes of their names."""
    classes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ClassDef) and n.lineno <= line <= _end(n)]
    names = [
        each.args[0].value
        for node in classes
        for each in node.decorator_list
        if isinstance(each, ast.Call) and each.args and isinstance(each.args[0], ast.Constant)
    ]
    whole = ("test_the_reference_gives_what_the_rules_infer", "test_the_gradient_equals_finite_differences")
    parts = ("test_forward", "test_gradient")
    return [
        f"tests/test_op_suite.py::{case}"
        for name in names
        for case in (*(f"{test}[{name}]" for test in whole), *(f"{test}[{name}-" for test in parts))
    ]


@cache
def _texts() -> dict[str, str]:
    """Return the texts of the test modules."""
    return {str(path.relative_to(ROOT)): path.read_text() for path in sorted((ROOT / "tests").glob("test_*.py"))}


def _importing(file: str) -> list[str]:
    """Return the test modules that import a name that this file of the package defines."""
    module = ".".join(
        ("treadle", *(part for part in Path(file).with_suffix("").parts if part not in ("treadle", "__init__")))
    )
    package, _, own = module.rpartition(".")
    ways = re.compile(rf"from {module} import|import {module}\b|from {package} import [^\n]*\b{own}\b")
    return [name for name, text in _texts().items() if ways.search(text)]


def _named_by(file: str) -> list[str]:
    """Return the test modules that contain the module's name; if there are none, the test modules that start the
    command.
    """
    texts = _texts()
    named = [name for name, text in texts.items() if re.search(rf"\b{Path(file).stem}\b", text)]
    return named or [name for name, text in texts.items() if "subprocess" in text and "treadle.cli" in text]

"""Mutation testing on the command line: a copy of the tree is mutated in one place at a time, and the tests should
notice.

    python -m tests.mutations map                            record which test runs which line (longer than the suite)
    python -m tests.mutations run --count 200 --seed 1       draw 200 and run the tests that could notice each
    python -m tests.mutations run --under passes/memory --count 40 tests/test_memory_order.py ...
                                                             draw from there, and run these tests: no map is needed
    python -m tests.mutations judge 1/17 "why it is the same program"
    python -m tests.mutations control                        run the tests that noticed on the unmutated tree
    python -m tests.mutations show                           print the figures, and the mutations that no test noticed

docs/testing.md explains the outcomes.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest

from tests.line_map import FOLDERS, LineMap
from tests.mutation_operators import ROOT, Mutation, draw

PLACE = ROOT / "build" / "mutations"
HEAVY = ("numpy", "torch", "tvm", "onnx", "onnxruntime", "transformers", "hypothesis")  # imported once, before forking
FIRST = 20  # tests that are run before all others


class Chosen:
    """A pytest plugin that selects the named tests, in the named order, and records the first failure.

    A name that ends in `[` or `[op-`, or a module's name, selects all tests that begin with it. These tests run after
    the others, and none starts later than `most` seconds after the first of them.
    """

    def __init__(self, names: list[str], most: float) -> None:
        self.order = {name: n for n, name in enumerate(names)}
        self.begins = tuple(name for name in names if name.endswith(("[", "-")) or "::" not in name)
        self.most = most
        self.until = 0.0
        self.failed = ""
        self.ran = 0

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        kept = [i for i in items if i.nodeid in self.order or i.nodeid.startswith(self.begins or "\0")]
        items[:] = sorted(kept, key=lambda item: self._place(item.nodeid))

    def _place(self, name: str) -> int:
        found = self.order.get(name)
        if found is None:
            found = len(self.order) + next(n for n, begin in enumerate(self.begins) if name.startswith(begin))
        return found

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if item.nodeid in self.order:
            return
        self.until = self.until or time.monotonic() + self.most
        if time.monotonic() > self.until:
            pytest.skip("other cases took the time")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.failed = self.failed or f"{report.nodeid} (not collected)"

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.ran += report.when == "call"
        if report.failed:
            self.failed = self.failed or report.nodeid


def run(mutation: Mutation, text: str, place: Path, most: float, modules: Sequence[str] = ()) -> Mutation:
    """Run one mutation in this process's copy of the tree: the closest tests, then others for up to `most` seconds.

    modules  the tests to run instead of the closest ones
    """
    tree = _copy_of_tree(place)
    file = tree / mutation.file
    known = None if modules else LineMap(place / "map")
    names = known.closest(mutation.file, mutation.line, most) if known else list(modules)
    began, ran = time.monotonic(), 0
    outcome, by = ("survived" if names else "unreached"), ""
    source, stamp = file.read_text(), file.stat()
    file.write_text(text)
    try:
        for part in filter(None, (names[:FIRST], names[FIRST:])):
            took = sum(map(known.seconds, part)) if known else 0
            limit = 60 + 10 * (most + took)  # long, since the machine may be busy
            outcome, by, more = _outcome(tree, mutation, part, most, limit)
            ran += more
            if outcome != "survived":
                break
    finally:
        file.write_text(source)
        os.utime(file, (stamp.st_atime, stamp.st_mtime))
    return replace(mutation, outcome=outcome, by=by, tests=ran, seconds=round(time.monotonic() - began, 1))


def _copy_of_tree(place: Path) -> Path:
    tree = place / f"tree-{os.getpid()}"
    if not tree.exists():
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
        for name in filter(None, listed.split("\0")):
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
        for cache in (place / "map").glob("layer-*/cache"):  # kernels, compiled once for all tests
            shutil.copytree(cache, tree / "cache", dirs_exist_ok=True)
    return tree


def _outcome(tree: Path, mutation: Mutation, names: list[str], most: float, limit: float) -> tuple[str, str, int]:
    """Run tests in a fork of a process that has imported the slow libraries but nothing of ours."""
    result = tree / "outcome.json"
    result.unlink(missing_ok=True)
    child = os.fork()
    if not child:
        code = 70
        try:
            code = _run_tests(tree, mutation, Chosen(names, most), result)
        finally:
            os._exit(code)
    until = time.monotonic() + limit
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > until:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "timeout", "", 0
        time.sleep(0.05)
    if not result.exists():
        return "noticed", "(the process died)", 0
    by, ran = json.loads(result.read_text())
    return ("noticed" if by else "survived"), by, ran


def _run_tests(tree: Path, mutation: Mutation, chosen: Chosen, result: Path) -> int:
    gc.freeze()  # pytest collects garbage at its end, and would copy every page that the fork shares
    os.setsid()
    os.chdir(tree)
    log = os.open(tree / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.dont_write_bytecode = False  # the copy's files are compiled once
    sys.path[:] = [str(tree), *(path for path in sys.path if path not in ("", str(ROOT)))]
    for name in [name for name in sys.modules if name.partition(".")[0] in ("tests", "treadle")]:
        del sys.modules[name]
    # A mutation must not leave a wrong kernel in the cache.
    cache = tree / ("cache-of-one" if mutation.file.startswith("backends/") else "cache")
    shutil.rmtree(tree / "cache-of-one", ignore_errors=True)
    os.environ["TREADLE_CACHE"] = str(cache)
    os.environ["PYTHONPATH"] = str(tree)  # processes that tests start import the copy too
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    modules = dict.fromkeys(name.partition("::")[0] for name in chosen.order)
    code = pytest.main(["-x", "-n", "0", "-q", "-p", "no:cacheprovider", *modules], plugins=[chosen])
    failed = chosen.failed or ("" if code in (0, 5) else f"(pytest ended with {int(code)})")
    result.write_text(json.dumps([failed, chosen.ran]))
    return 0


def read(results: Path) -> dict[str, Mutation]:
    """Return the recorded mutations by name; a later line about the same mutation replaces an earlier one."""
    lines = results.read_text().splitlines() if results.exists() else []
    return {each["name"]: Mutation(**each) for each in map(json.loads, lines)}


def append(results: Path, mutation: Mutation) -> None:
    with results.open("a") as file:
        file.write(json.dumps(asdict(mutation)) + "\n")


def run_all(
    place: Path, drawn: Iterable[tuple[Mutation, str]], jobs: int, most: float, modules: Sequence[str] = ()
) -> None:
    """Run every mutation without a recorded outcome, `jobs` at a time; with `modules` alone, if there are any."""
    results = place / "results.jsonl"
    place.mkdir(parents=True, exist_ok=True)
    known = read(results)
    todo = ((mutation, text) for mutation, text in drawn if not _is_known(mutation, known))
    for name in HEAVY:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        for mutation in pool.imap_unordered(partial(_run_pair, place=place, most=most, modules=modules), todo):
            append(results, mutation)
            print(f"{mutation.name:8}{mutation.outcome:10}{mutation.seconds:6.0f} s  {mutation.file}:{mutation.line}")
    for tree in place.glob("tree-*"):
        shutil.rmtree(tree)


def _is_known(mutation: Mutation, known: dict[str, Mutation]) -> bool:
    before = known.get(mutation.name)
    return before is not None and (before.file, before.change) == (mutation.file, mutation.change)


def control(place: Path) -> None:
    """Run the tests that noticed mutations on the unmutated tree. A test that fails there did not notice the
    mutation.
    """
    names = sorted({mutation.by for mutation in read(place / "results.jsonl").values() if "::" in mutation.by})
    tree = _copy_of_tree(place)
    subprocess.run([sys.executable, "-m", "pytest", "-n", "0", "-q", *names], cwd=tree, check=False)
    shutil.rmtree(tree)


def _run_pair(pair: tuple[Mutation, str], place: Path, most: float, modules: Sequence[str]) -> Mutation:
    return run(*pair, place, most, modules)


def show(place: Path) -> None:
    known = read(place / "results.jsonl")
    for mutation in known.values():
        if mutation.outcome in ("survived", "unreached"):
            why = (
                f"the same program: {mutation.same}" if mutation.same else f"{mutation.outcome}, {mutation.tests} tests"
            )
            print(f"{mutation.name}  {mutation.file}:{mutation.line}  {why}\n{mutation.change}\n")
    for seed in sorted({name.partition("/")[0] for name in known}):
        mine = [m for m in known.values() if m.name.startswith(f"{seed}/")]
        outcomes = Counter("the same program" if m.same else m.outcome for m in mine)
        noticed, same = outcomes["noticed"] + outcomes["timeout"], outcomes["the same program"]
        print(f"seed {seed}: {noticed} of {len(mine) - same} noticed; {dict(outcomes)}")


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["map", "run", "judge", "control", "show"])
    parser.add_argument(
        "rest",
        nargs="*",
        help="for judge: the mutation's name, and why it is the same program; for run: test modules, instead of the "
        "map's tests; for map: test modules that have changed since it was made",
    )
    parser.add_argument("--place", type=Path, default=PLACE, help="where the map and the results lie")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--under", action="append", help="a folder or file to draw from, instead of all; may be given more than once"
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--most", type=float, default=60, help="seconds of tests that one mutation may take")
    given = parser.parse_intermixed_args(words)
    if given.command == "map":
        LineMap.make(given.place / "map", given.jobs, given.rest)
    elif given.command == "run":
        run_all(given.place, draw(given.count, given.seed, given.under or FOLDERS), given.jobs, given.most, given.rest)
    elif given.command == "judge":
        name, why = given.rest
        append(given.place / "results.jsonl", replace(read(given.place / "results.jsonl")[name], same=why))
    elif given.command == "control":
        control(given.place)
    else:
        show(given.place)


if __name__ == "__main__":
    main()

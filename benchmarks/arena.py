"""The arena of each model of the zoo, compared with the peak number of live bytes, and the time of planning.

    python benchmarks/arena.py [FAMILY ...] [--backend tvm] [--set layers=2 ...] [--runs 5] [--json]

Each family, with its default options, is lowered for this machine, including the workspaces of kernels. Nothing is
compiled or run. Placement is planned at three sizes. `ratio` is the arena divided by its peak number of live bytes over
the whole run, calls included (the arguments of a call live until it returns), with each storage in units of 64 bytes.

`plan` is the CPU time of the pass that plans storage, order and checks included, the median of several runs, each on a
newly lowered graph; `place` is the CPU time of computing and checking the offsets at these sizes. `buffers` counts each
storage once, `of a run` as often as its function is called; allocations of libraries in addition to the arena count,
too. The time of both together is also given per buffer of either kind.

Exit status 1 if a ratio is above 1, or if planning takes more than 1 ms for each buffer of a run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from treadle.backends.registry import find_backend
from treadle.backends.staged import StagedBackend
from treadle.ir.collector_pause import collection_paused
from treadle.ir.graph import Graph
from treadle.ir.target import Target
from treadle.models.registry import family_names
from treadle.passes.budget.fitted_pipeline import before_planning
from treadle.passes.framework.manager import Optimized
from treadle.passes.framework.pass_log import PassRecord
from treadle.passes.memory.frame_placement import place_frames
from treadle.passes.memory.frames import Frame, parts_of
from treadle.passes.stages import Lower, MergeOps, Recognize, run
from treadle.program.flag_values import parse_config
from treadle.program.option_table import declared_options
from treadle.resolving import resolve

SIZES = ((1, 16), (1, 128), (8, 384))
"""Sizes of a leading axis and of all others, within their bounds."""
BACKENDS = ("numpy", "torch", "tvm")


def of_a_run(frames: Mapping[str, Frame], name: str) -> int:
    """Return the number of storages of a function, and of the functions it calls, once for each call."""
    return len(frames[name].lives) + sum(of_a_run(frames, call.callee) for call in frames[name].calls.values())


def planning_ms(backend: StagedBackend, graph: Graph, target: Target) -> tuple[Optimized, float]:
    """Return a lowered graph, and the CPU time of planning its storage and of checking the plan."""
    before, plan = before_planning(backend.pipeline(target))
    assert plan is not None
    lowered = run(graph, [Lower(tuple(before))], target=target)
    record = PassRecord(plan.name, plan.options, {})
    with collection_paused():  # as in the manager
        started = time.process_time()
        plan.run_graph(lowered.graph, record)
        plan.check_products(lowered.graph, record)
        took = time.process_time() - started
    return Optimized(lowered.source, lowered.graph, lowered.log, products=record.products), took * 1e3


def rows_of(name: str, config: Mapping[str, Any], backend: StagedBackend, runs: int) -> list[dict[str, Any]]:
    """Return a row for each of three sizes."""
    target = Target("cpu")
    graph = run(resolve(name, **config).graph, [Recognize(), MergeOps()]).graph
    leading = {v.type.shape[0].as_symbol for v in graph.main.inputs if v.type.rank}
    planned = [planning_ms(backend, graph, target) for _ in range(runs)]
    lowered, plan_ms = planned[-1][0], statistics.median(took for _, took in planned)
    assert lowered.plan is not None
    frames = backend.frames(lowered.graph, target, lowered.plan)
    inside, _ = parts_of(frames)
    rows: list[dict[str, Any]] = []
    for first, other in SIZES:
        sizes = {}
        for symbol, bounds in graph.symbols.items():
            size = max(bounds.lower, first if symbol in leading else other)
            sizes[symbol] = size if bounds.upper is None else min(size, bounds.upper)
        started = time.process_time()
        placed = place_frames(inside, sizes)["main"]
        place_ms = (time.process_time() - started) * 1e3
        row = {"model": name, "sizes": sizes, "arena": placed.size, "live": placed.bound}
        row |= {"ratio": placed.size / placed.bound if placed.bound else 1.0, "plan_ms": plan_ms, "place_ms": place_ms}
        row |= {"buffers": sum(len(f.lives) for f in frames.values()), "buffers_of_a_run": of_a_run(frames, "main")}
        whole = plan_ms + place_ms
        rows.append(row | {f"ms_by_{kind}": whole / row[kind] for kind in ("buffers", "buffers_of_a_run")})
    return rows


def line(row: Mapping[str, Any]) -> str:
    """Return a row as text."""
    sizes = ", ".join(f"{symbol}={size}" for symbol, size in row["sizes"].items())
    return (
        f"{row['model']:<12} {sizes:<20} {row['arena']:>13,} of {row['live']:>13,} bytes: {row['ratio']:.3f}"
        f"  {row['buffers']:>3} buffers, {row['buffers_of_a_run']:>4} of a run  plan {row['plan_ms']:5.1f} ms"
        f"  place {row['place_ms']:4.1f} ms  {row['ms_by_buffers']:.2f} ms a buffer,"
        f" {row['ms_by_buffers_of_a_run']:.2f} one of a run"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="families of the zoo (all)")
    parser.add_argument("--backend", choices=BACKENDS, default="tvm")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="an option of every family")
    parser.add_argument("--runs", type=int, default=5, help="runs; the median of planning is printed (5)")
    parser.add_argument("--json", action="store_true", help="print a list of rows")
    given = parser.parse_args()
    backend = find_backend(given.backend)
    assert isinstance(backend, StagedBackend)
    rows: list[dict[str, Any]] = []
    for name in given.families or family_names():
        rows += rows_of(name, parse_config(given.set, declared_options()), backend, given.runs)
        if not given.json:
            print(*map(line, rows[-len(SIZES) :]), sep="\n", flush=True)
    if given.json:
        print(json.dumps(rows, indent=1))
    else:
        most = {kind: max(row[f"ms_by_{kind}"] for row in rows) for kind in ("buffers", "buffers_of_a_run")}
        print(f"at most {most['buffers']:.2f} ms a buffer, {most['buffers_of_a_run']:.2f} ms one of a run")
    return any(row["arena"] > row["live"] or row["ms_by_buffers_of_a_run"] > 1 for row in rows)


if __name__ == "__main__":
    sys.exit(main())

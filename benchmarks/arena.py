"""How large the arena of each model of the zoo is beside the most bytes that live at once, and how long planning takes.

    python benchmarks/arena.py [--set layers=2 ...] [--json]

Each family, as it is declared by default, is lowered for TVM on this machine, with the memory that single kernels need;
nothing is compiled or run. Placement is planned at three sizes. `ratio` is the arena by the most bytes that live in it
at once over the whole run, calls followed (what a call is passed lives until it returns), each storage in units of 64
bytes.
`plan` is the time of the pass that plans storage, order and checks included, `place` of the offsets at these sizes.
`buffers` counts each storage once, `of a run` as often as its function is called; `plan` is told by 1,000 of these too.

Exit status 1 if a ratio is above 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from treadle.backends.tvm.backend import TvmBackend
from treadle.backends.tvm.kernels.isa import isa_of
from treadle.backends.tvm.lowering.routine_writer import lower
from treadle.backends.tvm.lowering.rules import RULES
from treadle.ir.target import Target
from treadle.models.registry import family_names
from treadle.option_values import parse_config
from treadle.passes.framework.manager import PassManager
from treadle.passes.memory.frame_placement import place_frames
from treadle.passes.memory.frames import Frame
from treadle.passes.pipelines import DEFAULT
from treadle.resolving import resolve

SIZES = ((1, 16), (1, 128), (8, 384))
"""Of a leading axis and of all others, within their bounds."""


def of_a_run(frames: Mapping[str, Frame], name: str) -> int:
    """Storages of a function, with those of what it calls as often as it does."""
    return len(frames[name].lives) + sum(of_a_run(frames, call.callee) for call in frames[name].calls.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of every family")
    parser.add_argument("--json", action="store_true", help="print a list of rows")
    given = parser.parse_args()
    target, rows = Target("cpu"), []
    for name in family_names():
        resolved = resolve(name, **parse_config(given.set, ()))
        graph = PassManager(DEFAULT).run(resolved.graph).graph
        leading = {v.type.shape[0].as_symbol for v in graph.main.inputs if v.type.rank}
        lowered = TvmBackend().lower(graph, target)
        assert lowered.plan is not None
        program = lower(lowered.graph, lowered.plan, isa_of(target), RULES, target.cores()).entries["main"]
        frames = {routine.name: routine.frame for routine in program.routines}
        for first, other in SIZES:
            sizes = {}
            for symbol, bounds in graph.symbols.items():
                size = max(bounds.lower, first if symbol in leading else other)
                sizes[symbol] = size if bounds.upper is None else min(size, bounds.upper)
            started = time.perf_counter()
            placed = place_frames(frames, sizes)["main"]
            took = time.perf_counter() - started
            live = placed.bound
            row = {"model": name, "sizes": sizes, "arena": placed.size, "live": live, "ratio": placed.size / live}
            row |= {"buffers": sum(len(f.lives) for f in frames.values()), "place_ms": took * 1e3}
            row |= {"buffers_of_a_run": of_a_run(frames, "main")}
            rows.append(row | {"plan_ms": lowered.log[-1].seconds * 1e3})
            if not given.json:
                told = ", ".join(f"{symbol}={size}" for symbol, size in sizes.items())
                print(
                    f"{name:<12} {told:<20} {placed.size:>13,} of {live:>13,} bytes: {placed.size / live:.3f}"
                    f"  {row['buffers']:>3} buffers, {row['buffers_of_a_run']:>4} of a run  plan"
                    f" {rows[-1]['plan_ms']:6.1f} ms, {rows[-1]['plan_ms'] / row['buffers_of_a_run']:4.2f} s by 1,000"
                    f"  place {took * 1e3:5.1f} ms",
                    flush=True,
                )
    if given.json:
        print(json.dumps(rows, indent=1))
    return any(row["arena"] > row["live"] for row in rows)


if __name__ == "__main__":
    sys.exit(main())

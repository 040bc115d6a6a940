"""Memory of our order of steps, compared with the optimum of an integer program.

    python benchmarks/order.py [--small 200] [--large 50] [--seconds 120] [--budget 3600] [--seed 0] [--json]
    python benchmarks/order.py --results order.jsonl --processes 2 --nice 10 --budget 36000

Random graphs of up to 25 steps, and of 26 to 40, are ordered by `treadle.passes.memory.order`, and again by HiGHS
(`scipy.optimize.milp`), with `--seconds` for each. If HiGHS does not finish, ours must be between its bound and the
best order that it found. After `--budget` seconds no further graph is started; the number of compared graphs is
printed.

`--results` appends each row to a file as soon as it is known, and resumes an earlier run: graphs that the file has for
these seeds and seconds are not compared again.

Exit status 1 if ours is ever worse.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from treadle.passes.memory.order import Buffer, OrderProblem, find_order

MOST_SETS = 1_000_000


def random_problem(seed: int, count: int) -> OrderProblem:
    """Return a graph of `count` steps, each of which makes a buffer and reads up to three; the last are outputs."""
    r = Random(seed)
    sizes = [r.choice((1, 2, 4, 8, 8, 16, 32)) * r.choice((1, 1, 3)) for _ in range(count)]
    reach = r.choice((4, 8, count))
    before: list[tuple[int, ...]] = []
    readers: list[set[int]] = [set() for _ in range(count)]
    over: list[tuple[tuple[int, int], ...]] = []
    for step in range(count):
        near = range(max(0, step - reach), step)
        reads = sorted(set(r.choices(near, k=r.choice((0, 1, 1, 2, 2, 3))))) if step else []
        for other in reads:
            readers[other].add(step)
        before.append(tuple(reads))
        over.append(tuple((step, x) for x in reads if sizes[x] == sizes[step] and r.random() < 0.5))
    buffers = [Buffer(size, (step, *sorted(readers[step])), kept=not readers[step]) for step, size in enumerate(sizes)]
    extra = [r.choice((0, 0, 0, 0, 16, 64)) for _ in range(count)]
    return OrderProblem(tuple(before), tuple(buffers), tuple(extra), tuple(over))


def solve(problem: OrderProblem, seconds: float, presolve: bool = True) -> tuple[float, float]:
    """Return a lower bound and the best peak by HiGHS, infinite if none was found.

    ran[s, t] is 1 if step s has run by time t, inclusive. A buffer lives at t if one of its steps has run by t, and one
    had not run before t. Only the buffer's first steps (no other of its steps must run before them) and last steps (no
    other of its steps must run after them) count. If a buffer overwrites another buffer, and the other buffer has no
    step left after t, the first buffer is not counted at t. A step runs after all steps that must precede it. The peak
    of program order is an upper bound of the search.

    All variables are integers: with fewer of these HiGHS (of SciPy 1.17) is slower, and its presolve may lose the
    optimum.
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    count = len(problem.before)
    earlier = [0] * count
    for step, before in enumerate(problem.before):
        for other in before:
            earlier[step] |= earlier[other] | 1 << other
    soonest = [mask.bit_count() for mask in earlier]
    latest = [count - 1 - sum(mask >> step & 1 for mask in earlier) for step in range(count)]
    firsts = [[s for s in {*b.steps} if not any(earlier[s] >> o & 1 for o in b.steps)] for b in problem.buffers]
    lasts = [[s for s in {*b.steps} if not any(earlier[o] >> s & 1 for o in b.steps)] for b in problem.buffers]
    rows: list[dict[int, float]] = []
    least: list[float] = []
    names: dict[tuple[Any, ...], int] = {}

    def number(*name: Any) -> int:
        return names.setdefault(name, len(names))

    def add(terms: list[tuple[float, int]], at_least: float) -> None:
        row: dict[int, float] = {}
        for factor, variable in terms:
            row[variable] = row.get(variable, 0.0) + factor
        rows.append(row)
        least.append(at_least)

    def ran(step: int, time: int, factor: float) -> list[tuple[float, int]]:
        return [(factor, number("ran", step, time))] if time >= 0 else []

    def runs(step: int, time: int, factor: float) -> list[tuple[float, int]]:
        """Return the expression that is 1 if a step runs at this time and no other."""
        return ran(step, time, factor) + ran(step, time - 1, -factor)

    peak = number("peak")
    for step in range(count):
        for t in range(count):
            add(runs(step, t, 1.0), 0.0)
            for other in problem.before[step]:
                add(ran(other, t - 1, 1.0) + ran(step, t, -1.0), 0.0)
    for t in range(count):
        for sign in (1.0, -1.0):
            add([(sign, number("ran", step, t)) for step in range(count)], sign * (t + 1))
        held = [(1.0, peak)]
        for i, buffer in enumerate(problem.buffers):
            alive = number("alive", i, t)
            held.append((-buffer.size, alive))
            for first in firsts[i]:
                if buffer.kept:
                    add([(1.0, alive), *ran(first, t, -1.0)], 0.0)
                else:
                    for last in lasts[i]:
                        add([(1.0, alive), *ran(first, t, -1.0), *ran(last, t - 1, 1.0)], 0.0)
        for step in range(count):
            held += runs(step, t, -problem.extra[step])
            saved = []
            for made, dying in problem.over[step]:
                if problem.buffers[dying].kept:
                    continue
                over = number("over", step, dying, t)
                saved.append((-1.0, over))
                held.append((problem.buffers[made].size, over))
                for last in lasts[dying]:
                    add([(-1.0, over), *ran(last, t, 1.0)], 0.0)
            if saved:
                add([*runs(step, t, 1.0), *saved], 0.0)
        add(held, 0.0)
    at = np.array([[i, variable, factor] for i, row in enumerate(rows) for variable, factor in row.items()])
    matrix = csr_array((at[:, 2], (at[:, 0].astype(int), at[:, 1].astype(int))), shape=(len(rows), len(names)))
    lower, upper = np.zeros(len(names)), np.ones(len(names))
    upper[peak] = problem.peak(range(count))
    for name, variable in names.items():
        if name[0] == "ran":
            upper[variable] = name[2] >= soonest[name[1]]
            lower[variable] = name[2] >= latest[name[1]]
    cost = np.zeros(len(names))
    cost[peak] = 1.0
    found = milp(
        cost,
        constraints=LinearConstraint(matrix, np.array(least), np.inf),
        integrality=np.ones(len(names), int),
        bounds=Bounds(lower, upper),
        options={"time_limit": seconds, "presolve": presolve},
    )
    bound = found.mip_dual_bound if found.mip_dual_bound is not None else 0.0
    return math.ceil(bound - 1e-6), math.inf if found.fun is None else round(found.fun)


def compare(seed: int, least: int, most: int, seconds: float) -> dict[str, Any]:
    """Return a row: our order of a random graph compared with that of the integer program."""
    problem = random_problem(seed, Random(seed).randint(least, most))
    begun = time.perf_counter()
    ours = find_order(problem, MOST_SETS)
    took = time.perf_counter() - begun
    bound, reached = solve(problem, seconds)
    if not bound <= ours.peak <= reached:  # a bug of ours, or of the presolve
        bound, reached = solve(problem, seconds, presolve=False)
    if not bound <= ours.peak <= reached:
        verdict = "wrong" if ours.peak < bound else "worse"
    else:
        verdict = "equal" if bound == reached else "between"
    program = problem.peak(range(len(problem.before)))
    row = {"seed": seed, "steps": len(problem.before), "program": program, "peak": ours.peak, "bound": ours.bound}
    row |= {"ilp_bound": bound, "ilp": None if math.isinf(reached) else reached, "verdict": verdict}
    return row | {"seconds": round(took, 4), "allowed": seconds, "range": [least, most]}


def known_rows(path: Path | None) -> list[dict[str, Any]]:
    """Return the rows of a file of results; the last line may be truncated."""
    rows = []
    for line in path.read_text().splitlines() if path is not None and path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def rows_of(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the rows as they become known; those of the file first."""
    started = time.perf_counter()
    ranges = [(5, 25)] * given.small + [(26, 40)] * given.large
    asked = {(given.seed + i, least, most) for i, (least, most) in enumerate(ranges)}
    known = {(row["seed"], *row["range"]): row for row in known_rows(given.results) if row["allowed"] == given.seconds}
    yield from (row for key, row in sorted(known.items()) if key in asked)
    left = iter(sorted(asked - known.keys()))
    with ProcessPoolExecutor(given.processes, initializer=os.nice, initargs=(given.nice,)) as pool:
        running = {pool.submit(compare, *each, given.seconds) for each in islice(left, given.processes)}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for each in done:
                row = each.result()
                if given.results is not None:
                    with given.results.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                yield row
                if time.perf_counter() - started <= given.budget:
                    running |= {pool.submit(compare, *following, given.seconds) for following in islice(left, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", type=int, default=200, help="graphs of 5 to 25 steps (200)")
    parser.add_argument("--large", type=int, default=50, help="graphs of 26 to 40 steps (50)")
    parser.add_argument("--seconds", type=float, default=120.0, help="time limit of HiGHS for one graph (120)")
    parser.add_argument("--budget", type=float, default=3600.0, help="seconds after which no graph is started (3600)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, metavar="FILE", help="rows as JSON lines; existing rows are kept")
    parser.add_argument("--processes", type=int, default=1, help="number of graphs at once (1)")
    parser.add_argument("--nice", type=int, default=0, help="niceness of these processes (0)")
    parser.add_argument("--json", action="store_true", help="print a list of rows")
    given = parser.parse_args()
    rows = []
    for row in rows_of(given):
        rows.append(row)
        if not given.json:
            print(" ".join(f"{name}={value}" for name, value in row.items()), flush=True)
    if given.json:
        print(json.dumps(rows, indent=1))
    else:
        for low, high in ((5, 25), (26, 40)):
            part = [row for row in rows if low <= int(str(row["steps"])) <= high]
            print(f"{low} to {high} steps: {len(part)} graphs, {dict(Counter(str(row['verdict']) for row in part))}")
    return any(row["verdict"] in ("wrong", "worse") for row in rows)


if __name__ == "__main__":
    sys.exit(main())

"""Placement of published instances: the size of the arena and the time, on one thread.

    python benchmarks/memory.py [FILE.csv ...] [--seconds 60] [--json]

Without files, the instances are those of ../shared/data/memory next to the checkout. A file whose name ends in a
number, as in A.1048576.csv, has that capacity, and the search stops at the first placement below it; for the other
files, it looks for the smallest one. The search is compiled before the first instance, and its compilation is timed
separately.

Exit status 1 if a capacity is exceeded.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from treadle.ir.errors import PassError
from treadle.passes.memory import exact
from treadle.passes.memory.instances import read_instance
from treadle.passes.memory.placement import place


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE.csv")
    parser.add_argument("--seconds", type=float, default=60.0, help="the time for one instance (60)")
    parser.add_argument("--json", action="store_true", help="print a list of rows")
    given = parser.parse_args()
    files = given.files or sorted((ROOT.parent / "shared/data/memory").glob("*.csv"))
    if not files:
        parser.error("no instance: name files, or put them into ../shared/data/memory")
    started = time.perf_counter()
    if exact.available():
        exact.warm_up()
    compiling = time.perf_counter() - started
    rows = []
    for file in files:
        instance = read_instance(file)
        last = file.stem.rpartition(".")[2]
        capacity = int(last) if "." in file.stem and last.isdigit() else None
        row: dict[str, object] = {"name": file.stem.partition(".")[0], "buffers": len(instance.buffers)}
        started = time.perf_counter()
        try:
            found = place(instance.buffers, capacity=capacity, seconds=given.seconds)
            row |= {"size": found.size, "bound": found.bound, "seconds": found.seconds, "method": found.method}
        except PassError as error:
            row |= {"size": None, "bound": None, "seconds": time.perf_counter() - started, "method": str(error)}
        rows.append(row)
        if not given.json:
            print(_line(row), flush=True)
    if given.json:
        print(json.dumps(rows, indent=1))
    else:
        print(f"compiling, or reading what was compiled: {compiling:.1f} s")
    return any(row["size"] is None for row in rows)


def _line(row: dict[str, object]) -> str:
    size, bound, seconds = row["size"], row["bound"], row["seconds"]
    assert isinstance(seconds, float)
    if not isinstance(size, int) or not isinstance(bound, int):
        return f"{row['name']:<12} {seconds:8.2f} s  {row['method']}"
    return (
        f"{row['name']:<12} {row['buffers']:>6} buffers {size:>12} bytes, bound {bound:>12}"
        f" ({size / bound - 1:6.2%} over) {seconds:7.2f} s  {row['method']}"
    )


if __name__ == "__main__":
    sys.exit(main())

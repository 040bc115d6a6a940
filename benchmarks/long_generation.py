"""Ten thousand tokens: in a window their time and memory stay those of the first token; in a full cache they grow with
its contents.

    python benchmarks/long_generation.py [--tokens 10000] [--backend tvm] [--json]

A small Llama-like model with drawn weights, float32, one thread, in thread CPU time. The milliseconds of a token are
printed with the bytes of keys and values that it reads, and the process's memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import treadle as t
from treadle.ir.target import Target

WINDOW = 512
SIZES = {"vocab": 256, "dim": 512, "heads": 8, "kv_heads": 8, "layers": 4, "hidden": 512}
"""Small compared with attention, so that attention's time shows."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=10_000)
    parser.add_argument("--backend", default="tvm")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = [row for window in (WINDOW, None) for row in grow(window, options.tokens, options.backend)]
    if options.json:
        print(json.dumps(rows))
        return 0
    for row in rows:
        print(
            f"{row['cache']:14} {row['length']:6} tokens: {row['milliseconds']:7.3f} ms a token, "
            f"{row['read_mb']:6.1f} MB of keys and values read, {row['resident_mb']:7.1f} MB resident"
        )
    first, *_, last = [row for row in rows if row["cache"] != "full"]
    print(
        f"in the window the last tokens take {last['milliseconds'] / first['milliseconds']:.3f} of the first ones' time"
    )
    return 0


def grow(window: int | None, tokens: int, backend: str) -> list[dict[str, Any]]:
    """Grow a row to `tokens` tokens; return the measurements of the last token of every tenth."""
    exe = t.compile("llama", backend=backend, target=Target("cpu", 1), window=window, **SIZES)
    session = exe.session(rows=1, capacity=tokens, chunk=64)
    row = session.open()
    session.prefill({row: [1] * (WINDOW if window else 1)})
    tenth, found = tokens // 10, []
    seconds: list[float] = []
    while session.length(row) < tokens:
        started = time.thread_time()
        session.step({row: 1})
        seconds.append(time.thread_time() - started)
        if session.length(row) % tenth == 0:
            length = session.length(row)
            read = min(length, window or length) * 2 * SIZES["dim"] * 4 * SIZES["layers"]
            found.append(
                {
                    "cache": f"window of {window}" if window else "full",
                    "length": length,
                    "milliseconds": statistics.median(seconds[-200:]) * 1e3,
                    "read_mb": read / 1e6,
                    "resident_mb": resident() / 1e6,
                }
            )
    return found


def resident() -> int:
    """Return the bytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


if __name__ == "__main__":
    sys.exit(main())

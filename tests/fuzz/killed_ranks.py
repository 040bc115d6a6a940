"""Kill ranks of a running job repeatedly: `python tests/fuzz/killed_ranks.py [TIMES] [RANKS]`.

Each time another rank is killed at another moment. All others must end within 5 seconds, with exit code 2 and an error
that names the rank, printed once; and no process may be left.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

JOB = Path(__file__).resolve().parent.parent / "rank_jobs.py"
ROOT = JOB.parent.parent


def started(ranks: int, mode: str = "killed", **environment: str) -> tuple[subprocess.Popen[str], dict[int, int]]:
    """Start a job; return it, and the process ids of its ranks."""
    command = [sys.executable, "-m", "treadle", "launch", "-n", str(ranks), "--", str(JOB), "turns", mode]
    own = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=own)
    found: dict[int, int] = {}
    assert job.stdout is not None
    while len(found) < ranks:
        line = job.stdout.readline()
        if not line:
            raise SystemExit(f"the job ended before it began: {job.communicate()[1]}")
        for match in re.finditer(r"rank (\d+) is process (\d+)", line):
            found[int(match[1])] = int(match[2])
    return job, found


def is_left(process: int) -> bool:
    """Return True if a process exists."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def main() -> None:
    """Kill `times` ranks, one in each job; the exit code is 0 if all jobs ended as required."""
    times, ranks = (int(text) for text in (sys.argv[1:] + ["20", "2"][len(sys.argv) - 1 :])[:2])
    draw = random.Random(0)
    bad, seconds = 0, []
    for turn in range(times):
        job, processes = started(ranks)
        time.sleep(draw.random() / 2)
        rank = turn % ranks
        began = time.monotonic()
        os.kill(processes[rank], signal.SIGKILL)
        _, errors = job.communicate(timeout=60)
        seconds.append(time.monotonic() - began)
        left = [process for process in processes.values() if is_left(process)]
        right = job.returncode == 2 and errors.count(f"rank {rank} has died") == 1 and not left and seconds[-1] < 5
        bad += not right
        print(f"{turn}: rank {rank}, {seconds[-1]:.2f} s, exit code {job.returncode}, left {left}: {errors.strip()!r}")
    print(f"{times - bad} of {times} ended as they should; {min(seconds):.2f} to {max(seconds):.2f} s")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()

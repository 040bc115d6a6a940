"""A model on several ranks of one core each compared with one rank of one core, and with the predicted time.

    python benchmarks/sharded.py [MODEL] [RUNS] [BACKEND]

The configurations take turns: one rank, two ranks by dp=2, two by tp=2, each time in processes of their own that are
bound to a core each. A run's time is that of its slowest rank; the least of all runs counts, because other processes
may use the machine, and the load is printed. The prediction uses two rates that are measured here: work at the rate of
one rank, and links at the rate of an all-reduce of the run's mean payload.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

SIZES = {"B": 8, "S": 128}
WAYS = (("dp=1", "dp"), ("dp=2", "dp"), ("tp=2", "megatron"))
TURNS = 2


def rank(model: str, mesh: str, recipe: str, runs: int, backend: str) -> None:
    """Run one rank's part: rank 0 prints its measurements."""
    import torch
    import torch.distributed as dist

    from treadle.ir.analysis.drawn_inputs import draw_inputs
    from treadle.ir.target import Target
    from treadle.runtime.distributed.ranks import join
    from treadle.sharding import device_needs
    from treadle.sharding.rank_models import compile_rank

    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ["RANK"]) % len(cores)]})
    torch.set_num_threads(1)
    with join(300) as ranks:
        options: dict[str, Any] = {"device": "cpu", "sizes": SIZES, "backend": backend, "target": Target("cpu", 1)}
        made = compile_rank(model, mesh, ranks, recipe=recipe, **options)
        given = draw_inputs(made.plan.graph, SIZES, [0])
        made(**given)
        times = [_timed(lambda: made(**given)) for _ in range(runs)]
        planned = replace(made.plan, sizes=SIZES)
        collectives = planned.collectives()
        link = 0.0
        if collectives and mesh != "dp=1":
            payload = sum(c.payload for c in collectives) / len(collectives)
            tensor = torch.ones(int(payload) // 4)
            seconds = min(_timed(lambda: dist.all_reduce(tensor)) for _ in range(9))
            link = payload * (ranks.size - 1) / ranks.size * 2 / seconds
        facts = {"seconds": min(times), "median": float(np.median(times)), "link": link}
        predicted = device_needs(planned).times
        sent = sum(c.sent for c in collectives)
        facts |= {"work": predicted.work, "sent": sent, "collectives": len(collectives)}
        if ranks.rank == 0:
            print(json.dumps(facts), flush=True)


def _timed(run: Any) -> float:
    """Return the seconds until the slowest rank is done."""
    import torch
    import torch.distributed as dist

    dist.barrier()
    started = time.perf_counter()
    run()
    took = torch.tensor(time.perf_counter() - started, dtype=torch.float64)
    dist.all_reduce(took, op=dist.ReduceOp.MAX)
    return float(took)


def main() -> None:
    """Run all configurations in turns."""
    model, runs, backend = [*sys.argv[1:], *("bert", "5", "tvm")[len(sys.argv) - 1 :]]
    best: dict[str, dict[str, float]] = {}
    for _ in range(TURNS):
        for mesh, recipe in WAYS:
            count = mesh.partition("=")[2]
            words = [str(Path(__file__)), "--rank", model, mesh, recipe, runs, backend]
            command = [sys.executable, "-m", "treadle", "launch", "-n", count, "--", *words]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            facts = json.loads(done.stdout)
            if mesh not in best or facts["seconds"] < best[mesh]["seconds"]:
                best[mesh] = facts
    one = best["dp=1"]
    print(f"{model}, {SIZES}, {backend}, load {os.getloadavg()[0]:.1f} on {len(os.sched_getaffinity(0))} cores")
    for mesh, facts in best.items():
        line = f"{mesh}: {facts['seconds'] * 1e3:.0f} ms, {one['seconds'] / facts['seconds']:.2f} x one rank"
        if mesh != "dp=1":
            work = facts["work"] * one["seconds"] / one["work"]
            waiting = facts["sent"] / facts["link"] if facts["link"] else 0.0
            line += f"; predicted {(work + waiting) * 1e3:.0f} ms: {work * 1e3:.0f} of work, {waiting * 1e3:.0f} of"
            line += f" {facts['collectives']:.0f} collectives at {facts['link'] / 1e9:.2f} GB/s"
        print(line)


if __name__ == "__main__":
    if "--rank" in sys.argv[1:2]:
        _, _, *words = sys.argv
        rank(words[0], words[1], words[2], int(words[3]), words[4])
    else:
        main()

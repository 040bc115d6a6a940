"""Measure the machine's limits for Treadle's side, in a separate process like each side of a benchmark.

    python limits.py '{"backend": "tvm", "model": "bert", "sizes": {"B": 1, "S": 128}, ...}'

Prints one line of JSON: operations per second by dtype, bytes per second, and the minimum seconds of Treadle's kernels.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import numpy as np

from treadle.benching.serving import Spec, best, compiled, measured_read, say, why_missing

_LARGE = 1536  # size of the square product that measures NumPy's rate


def main() -> None:
    spec = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of packages must not mix with the answer
    try:
        say(answers, machine_limits(spec))
    except Exception as error:
        say(answers, {"missing": why_missing(error)})


def machine_limits(spec: Spec) -> dict[str, Any]:
    """Return operations per second of each dtype, bytes per second of a plain read, and the minimum seconds of the
    model's kernels. If the backend has no kernels, the operations are NumPy's in float32.
    """
    from treadle.benching.workload import Workload

    options = Workload.from_dict(spec).options
    if options.backend == "tvm":
        from treadle.benching.measured_roofline import measure_roofline

        exe = compiled(spec)
        if not exe.graph.states:  # a graph with states has no roofline
            found = measure_roofline(exe, spec["sizes"], seed=options.seed)
            return {"rates": dict(found.rates), "read": found.read, "least": found.least}
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((_LARGE, _LARGE), np.float32) for _ in range(2))
    return {
        "rates": {"f32": 2 * _LARGE**3 / best(lambda: {"": a @ b})},
        "read": measured_read(spec["threads"]),
        "least": None,
    }


if __name__ == "__main__":
    main()

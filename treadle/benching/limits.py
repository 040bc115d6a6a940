"""What the machine allows ours: a process of its own, as each side of a benchmark is.

    python limits.py '{"backend": "tvm", "model": "bert", "sizes": {"B": 1, "S": 128}, ...}'

Prints one line of JSON: operations a second by dtype, bytes a second, and the least seconds of our kernels.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import numpy as np

from treadle.benching.serving import Spec, best, compiled, measured_read, say, why_missing

_LARGE = 1536  # rows, columns and terms of the product that NumPy is measured by


def main() -> None:
    spec = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a package prints is no answer
    try:
        say(answers, machine_limits(spec))
    except Exception as error:
        say(answers, {"missing": why_missing(error)})


def machine_limits(spec: Spec) -> dict[str, Any]:
    """Operations a second of each dtype, bytes a second of a plain read, and where ours is made of kernels the least
    seconds that they could take; without kernels the operations are those in float32 that NumPy reaches.
    """
    if spec["backend"] == "tvm":
        from treadle.benching.roofline import measure_roofline

        exe = compiled(spec)
        if not exe.graph.states:  # of which there is no roofline
            found = measure_roofline(exe, spec["sizes"], seed=spec["seed"])
            return {"rates": dict(found.rates), "read": found.read, "least": found.least}
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((_LARGE, _LARGE), np.float32) for _ in range(2))
    return {"rates": {"f32": 2 * _LARGE**3 / best(lambda: {"": a @ b})}, "read": measured_read(), "least": None}


if __name__ == "__main__":
    main()

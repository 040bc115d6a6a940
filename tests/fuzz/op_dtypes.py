"""Run the gradient of every op on every sample in every dtype: `python -m tests.fuzz.op_dtypes [--only softmax]`.

Each runner of the op suite is compared with the suite's bounds (tests/test_op_suite.py, which runs a part of these
cases). Prints each failure. A few minutes.
"""

from __future__ import annotations

import argparse
import sys

from tests.op_checks import RUNNERS, TESTED
from tests.test_op_suite import gradients, hold


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="only ops whose names contain this text")
    options = parser.parse_args()
    tried = failed = 0
    for name in TESTED:
        for case in gradients(name) if options.only in name else ():
            for run in RUNNERS:
                tried += 1
                try:
                    hold(run, case)
                except Exception as error:
                    failed += 1
                    print(f"{case.what} on {run}: {type(error).__name__}: {str(error)[:600]}", flush=True)
    print(f"{tried} cases, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()

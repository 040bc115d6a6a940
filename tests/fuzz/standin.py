"""Run everything on the stand-in device: `python -m tests.fuzz.standin [--only gpt2] [--ops | --models]`.

Every op on every sample and dtype, forward and gradient, random sessions, and every model of the zoo in float32, bf16
and three quantizations. Prints each failure, and at the end the numbers of cases. A few minutes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial

from tests.op_checks import TESTED
from tests.random_sessions import play
from tests.standin_checks import check_model, check_op, model_cases
from tests.support.standin_device import standin


def check_call(name: str, form: str) -> None:
    counts = check_model(name, form)
    assert counts.waits == 1 and counts.copies_in <= 1, f"waits: {counts.lines('wait')}"


def check_session(seed: int) -> None:
    with standin(kind="cpu"):
        play(seed, "torch", sessions=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="only names that contain this text")
    parser.add_argument("--ops", action="store_true", help="only ops")
    parser.add_argument("--models", action="store_true", help="only models")
    options = parser.parse_args()
    cases: dict[str, Callable[[], object]] = {}
    if not options.models:
        cases |= {f"op {name}": partial(check_op, name) for name in TESTED}
    if not options.ops:
        cases |= {f"session {seed}": partial(check_session, seed) for seed in range(1000, 1020)}
        cases |= {f"{name}, {form}": partial(check_call, name, form) for name, form in model_cases()}
    failed = 0
    for what, check in cases.items():
        if options.only not in what:
            continue
        try:
            check()
        except (Exception, BaseExceptionGroup) as error:
            failed += 1
            print(f"{what}: {type(error).__name__}: {str(error)[:600]}", flush=True)
            for each in list(getattr(error, "exceptions", ()))[:2]:
                print(f"    {type(each).__name__}: {str(each)[:400]}", flush=True)
    print(f"{len(cases)} cases, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()

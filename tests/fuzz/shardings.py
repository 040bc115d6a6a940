"""Draw graphs, meshes and axes to split, and compare the combined results of all ranks with the unsplit graph's.

    python -m tests.fuzz.shardings [--seed N] [--count 2000] [--planted N] [--pipelines]

Every plan is checked by the plan checker and run in the lab; with --pipelines all plans have pipeline stages (recipe
gpipe). In the first N plans (--planted), one error is planted in each collective in turn; the checker must find each
error. Exit status 1 if results differ, or if the checker accepts a wrong plan.
"""

from __future__ import annotations

import argparse
import collections
import sys
import traceback

from tests import wrong_shardings as wrong
from tests.random_shardings import difference, random_case, random_pipeline
from treadle.ir.errors import PassError
from treadle.passes.sharding.checking import check_sharding

NEAR = 1e-10
CHANGES = (wrong.without_terms, wrong.by_another_monoid, wrong.added_everywhere, wrong.not_gathered)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--planted", type=int, default=200)
    parser.add_argument("--pipelines", action="store_true")
    options = parser.parse_args()
    draw = random_pipeline if options.pipelines else random_case
    failures = planted = 0
    met: collections.Counter[str] = collections.Counter()
    for seed in range(options.seed, options.seed + options.count):
        try:
            case = draw(seed)
            plan = case.plan()
            far = difference(case, plan, merged=seed % 2 == 0)
            if far > NEAR:
                raise AssertionError(f"{far} from the whole graph, over {case.mesh} by {case.axes}, {case.recipe}")
            met.update(c.op for c in plan.collectives())
            for change in CHANGES if seed < options.seed + options.planted else ():
                for bad in wrong.wrong_plans(plan, change):
                    planted += 1
                    try:
                        check_sharding(bad)
                    except PassError:
                        continue
                    raise AssertionError(f"a plan that is wrong is taken: {change.__doc__}")
        except Exception:
            failures += 1
            print(f"seed {seed}:\n{traceback.format_exc(limit=-3)}", flush=True)
    text = ", ".join(f"{count} {name}" for name, count in sorted(met.items()))
    print(f"{options.count} cases with {text}; {planted} wrong plans: {failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

"""Compare ONNX models of one node each with ONNX Runtime, over all imported operators, attributes and versions.

    python -m tests.fuzz.onnx_nodes [--count 5000] [--seed 0] [--only Conv] [--backend torch] [--gradients]

`cases(seed)` is endless: each operator in turn, with random operands and attributes, some operands constant, some axes
without a size. `outcome(case)` imports a case with its sizes and without, runs both, and returns the verdict.
With `--gradients`, gradients are compared with difference quotients in float64 instead, also at zeros, equal numbers
and large numbers.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections import Counter
from functools import partial

from tests.fuzz.onnx_nodes.cases import cases, drawn
from tests.fuzz.onnx_nodes.drawing import DRAWN
from tests.fuzz.onnx_nodes.judging import gradient_outcome, outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--count", type=int, default=5000, help="nodes (default 5000)")
    parser.add_argument("--seed", type=int, default=0, help="what they are drawn from (default 0)")
    parser.add_argument("--only", choices=sorted(DRAWN), metavar="OPERATOR", help="this operator alone")
    parser.add_argument("--backend", default="numpy", help="what runs them (default numpy)")
    parser.add_argument("--gradients", action="store_true", help="compare gradients with difference quotients")
    parser.add_argument("--reasons", type=int, default=40, help="how many reasons for refusals are printed")
    asked = parser.parse_args()
    several = cases(asked.seed) if not asked.only else (drawn(asked.only, asked.seed + n) for n in itertools.count())
    verdicts: Counter[str] = Counter()
    symbolic: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    ways = [partial(outcome, backend=asked.backend)]
    if asked.gradients:
        ways = [partial(gradient_outcome, seed=asked.seed, edges=edges) for edges in (False, True)]
    for case, way in itertools.product(itertools.islice(several, asked.count), ways):
        found = way(case)
        verdicts[found.verdict] += 1
        symbolic[found.symbolic] += 1
        if found.verdict == "wrong":
            print(f"{case}\n    {found.why}", flush=True)
        elif "refused" in (found.verdict, found.symbolic) or found.verdict == "left":
            by = found.verdict if found.verdict != "same" else "refused without sizes"
            reasons[f"{by}: {case.operator}: {found.why}"] += 1
    for reason, times in reasons.most_common(asked.reasons):
        print(f"{times:5}  {reason}")
    print(f"seed {asked.seed}, {asked.backend}: {dict(verdicts)}; without sizes: {dict(symbolic)}")
    return 1 if verdicts["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())

"""Draw chains of convolutions and poolings, and compare the imported graphs with ONNX Runtime and PyTorch.

    python -m tests.fuzz.windows [--seed N] [--count 200]

Each chain is run at several sizes of its axes. Refusals are counted by their text. Exit status 1 if a result differs.
"""

from __future__ import annotations

import argparse
import collections
import sys

from tests.window_chains import onnx_verdict, torch_verdict


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=200)
    options = parser.parse_args()
    wrong = 0
    for name, verdict in (("ONNX", onnx_verdict), ("PyTorch", torch_verdict)):
        facts: collections.Counter[str] = collections.Counter()
        for seed in range(options.seed, options.seed + options.count):
            found = verdict(seed)
            kind, _, reason = found.partition(": ")
            facts[f"{kind}: {reason.splitlines()[0]}" if kind == "refused" else kind] += 1
            if kind == "wrong":
                wrong += 1
                print(f"{name}, seed {seed}: {reason}", flush=True)
        print(f"{name}: {options.count} chains")
        for reason, count in facts.most_common():
            print(f"  {count:5d}  {reason}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

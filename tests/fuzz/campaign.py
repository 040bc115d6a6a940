"""Common parts of the fuzzers of damaged files: options, the tally of outcomes, and the final report."""

from __future__ import annotations

import argparse
import collections
import random
import time


def options_of(doc: str, **flags: str) -> argparse.Namespace:
    """Return the options of the command: `count` and `seed`, and `flags` with the meaning of each."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000, help="mutations (default 10000)")
    parser.add_argument("--seed", type=int, default=0)
    for name, meaning in flags.items():
        parser.add_argument(f"--{name}", action="store_true", help=meaning)
    return parser.parse_args()


class Tally:
    """The number of files for each outcome, their reasons, and the failures."""

    def __init__(self) -> None:
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.reasons: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self.failures: list[str] = []
        self.started = time.perf_counter()

    def add(self, mutation: str, outcome: str, reason: str, failure: str | None) -> None:
        """Count one file; record its failure, if it has one, under `mutation`."""
        self.outcomes[outcome] += 1
        if reason:
            self.reasons[outcome][reason] += 1
        if failure:
            self.failures.append(f"{mutation}: {failure}")

    def close(self, options: argparse.Namespace, *notes: str) -> int:
        """Print the outcomes, with notes on measurements; return the command's exit status."""
        print(f"{options.count} mutations, seed {options.seed}, {time.perf_counter() - self.started:.1f} s")
        for outcome, many in sorted(self.outcomes.items()):
            print(f"  {many:6d}  {outcome}")
            for reason, times in self.reasons[outcome].most_common(40):
                print(f"            {times:6d}  {reason}")
        for note in notes:
            print(f"  {note}")
        print(f"  {len(self.failures)} failures")
        for failure in self.failures[:20]:
            print(f"    {failure}")
        return 1 if self.failures else 0


def scrambled(rng: random.Random, file: bytes, head: int, values: bytes) -> tuple[str, bytes]:
    """Flip, set, remove, insert or copy bytes, or cut off the end; mostly in the first `head` bytes."""
    edited = bytearray(file)
    kind = rng.choice(("flip", "set", "remove", "insert", "copy", "cut"))
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        if not edited:
            break
        at = rng.randrange(min(head, len(edited)) if rng.random() < 0.8 else len(edited))
        length = rng.choice((1, 1, 2, 8))
        if kind == "flip":
            edited[at] ^= 1 << rng.randrange(8)
        elif kind == "set":
            edited[at] = rng.choice(values)
        elif kind == "remove":
            del edited[at : at + length]
        elif kind == "insert":
            edited[at:at] = bytes(rng.choice(values) for _ in range(length))
        elif kind == "copy":
            start = rng.randrange(len(edited))
            edited[at:at] = edited[start : start + length * 8]
        else:
            del edited[at:]
    return kind, bytes(edited)

"""Compare drawn tokens with their distribution by a chi-square test, for drawn sampling options and logits.

    python -m tests.fuzz.draws [--count 200] [--seed 0]

Each case draws 20,000 tokens. The statistic of a correct sampler exceeds its bound once in a million cases. Exit status
1 if a case exceeds it, or if a token is drawn that the options exclude.
"""

from __future__ import annotations

import sys

import numpy as np
import scipy.stats

from tests.fuzz.campaign import options_of
from treadle.runtime.sampling import Sampling

DRAWS, LEAST = 20_000, 1e-6


def drawn_sampling(rng: np.random.Generator) -> Sampling:
    """Draw sampling options with a temperature above 0."""
    return Sampling(
        temperature=float(rng.choice([0.3, 0.7, 1.0, 2.0])),
        top_k=int(rng.choice([0, 0, 1, 5, 40, 10**6])),
        top_p=float(rng.choice([1.0, 1.0, 0.95, 0.5, 0.01])),
        min_p=float(rng.choice([0.0, 0.0, 0.05, 0.5])),
        seed=int(rng.integers(1 << 62)),
    )


def drawn_logits(rng: np.random.Generator) -> np.ndarray:
    """Draw logits f32[vocab], some with ties and some with excluded tokens."""
    size = int(rng.choice([3, 50, 3000]))
    logits = (rng.standard_normal(size) * rng.choice([0.1, 1.0, 4.0])).astype(np.float32)
    if rng.random() < 0.3:
        logits = np.round(logits)
    if rng.random() < 0.3:
        logits[rng.integers(0, size, size // 2)] = -np.inf
        logits[int(rng.integers(size))] = 1.0
    return logits


def failure(sampling: Sampling, logits: np.ndarray, draws: int = DRAWS) -> str | None:
    """Return the reason why drawn tokens do not follow the distribution, or None."""
    ids, shares = sampling.distribution(logits)
    counts = np.bincount([sampling.choose(logits, step=i) for i in range(draws)], minlength=len(logits))[ids]
    if counts.sum() != draws:
        return f"{draws - counts.sum()} tokens were drawn that the options exclude"
    rare = shares * draws < 5  # bins with too few draws are merged
    found = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(shares[~rare], shares[rare].sum()) * draws
    if ((wanted == 0) & (found > 0)).any():
        return "a token of probability 0 was drawn"
    found, wanted = found[wanted > 0], wanted[wanted > 0]
    chance = scipy.stats.chisquare(found, wanted * (found.sum() / wanted.sum())).pvalue if len(found) > 1 else 1.0
    return None if chance >= LEAST else f"the chance of these draws is {chance:.2g}"


def main() -> int:
    options = options_of(__doc__ or "")
    options.count = 200 if options.count == 10_000 else options.count
    failures = 0
    for number in range(options.count):
        rng = np.random.default_rng([options.seed, number])
        sampling, logits = drawn_sampling(rng), drawn_logits(rng)
        if (why := failure(sampling, logits)) is not None:
            failures += 1
            print(f"case {number}, {sampling}, {len(logits)} logits: {why}", flush=True)
    print(f"{options.count} cases of {DRAWS} draws, {failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

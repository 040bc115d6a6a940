"""Sharding plans compared with the whole model in the lab, and the programs of their ranks as text."""

from __future__ import annotations

import re

import numpy as np

from tests.sharded_models import numbers
from treadle.ir.graph import Graph
from treadle.passes.sharding.plan import ShardingPlan
from treadle.passes.sharding.rank_programs import rank_program
from treadle.runtime.sharding_lab import run_lab

NEAR = 1e-11
"""Tolerance for a sum of some hundred float64 numbers near 1, added in another order."""


def apart(family: str, plan: ShardingPlan, programs: list[Graph] | None = None) -> float:
    """Return the largest difference between the outputs in the lab and the outputs of the whole model."""
    weights, inputs, wanted = numbers(family)
    found = run_lab(plan, inputs, weights, programs=programs).outputs
    return max(float(np.max(np.abs(found[n] - w) / max(1.0, np.max(np.abs(w))))) for n, w in wanted.items())


def block_text(plan: ShardingPlan, name: str) -> str:
    """Return a block of the program of rank 0."""
    return block_text_of(plan, 0, name)


def block_text_of(plan: ShardingPlan, rank: int, name: str) -> str:
    """Return a block of a rank's program."""
    text = str(rank_program(plan, rank))
    return text[text.index(f"block {name}(") : text.index("  main(")]


def words(text: str) -> list[str]:
    """Return the collectives of a program's text, in order."""
    return re.findall(r"= (all_reduce|all_gather|reduce_scatter|all_to_all)\(", text)

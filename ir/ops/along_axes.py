"""Axis rules and gradients of ops that act along some axes of one operand and map the others."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from treadle.ir.builder import Builder, Expr
from treadle.ir.errors import RuleError
from treadle.ir.operation import Demand
from treadle.ir.ops.axis_names import place
from treadle.ir.types import Type, bf16, f16, f32


def places(axes: Sequence[int], rank: int) -> tuple[int, ...]:
    """Return the positions of `axes` in a tensor of this rank, in the order of `axes`.

    Raises RuleError if there is no such axis, or if an axis is named twice.
    """
    found = sorted(place(axis, rank) for axis in axes)
    for before, after in pairwise(found):
        if before == after:
            raise RuleError(f"axis {after} is named twice in {tuple(axes)}")
    return tuple(found)


def not_empty(x: Type | None, axes: Sequence[int], what: str) -> list[Demand]:
    """Return demands that no axis in `axes` is empty. `what` is the quantity that an empty axis lacks, for the message.
    Raises as `places` does.
    """
    if x is None or not x.rank:
        return []
    return [(x.shape[i] - 1, f"an axis of size 0 has no {what}") for i in places(axes, x.rank)]


def rule_along(axes: Sequence[int], rank: int, read: str, *given: str) -> str:
    """Return the axis rule of an op that acts along `axes` of its operand and maps the others; axis i is named `ai`.

    read    the text of each axis in `axes` in the operand, with `{}` for its name
    given   the text of these axes in each result; empty if the result lacks them

        rule_along([-1], 3, "[{}]", "[{}]")      "... [a2] -> ... [a2]"
        rule_along([1], 3, "{}:max", "")         "... a1:max a2 -> ... a2"

    Raises RuleError as `places` does.
    """
    chosen = places(axes, rank)
    first = min(chosen, default=rank)

    def side(written: str) -> str:
        dims = [written.format(f"a{i}") if i in chosen else f"a{i}" for i in range(first, rank)]
        return " ".join(["...", *filter(None, dims)])

    return f"{side(read)} -> {', '.join(map(side, given))}"


def widened(x: Expr) -> Expr:
    """Return x in the dtype of sums: f32 for 16-bit floats, because their squares and sums may overflow."""
    return x.cast(f32) if x.dtype in (f16, bf16) else x


def wide_array(x: Any) -> Any:
    """Return a NumPy array in the dtype of sums. Arrays of bf16 values are float32 already."""
    return x.astype(np.float32) if x.dtype == np.float16 else x


def with_ones(b: Builder, x: Expr, axes: Sequence[int], rank: int) -> Expr:
    """Reshape the result of a reduction of a tensor of this rank: insert a dimension of size 1 for each dropped axis in
    `axes`.
    """
    chosen = places(axes, rank)
    if x.rank == rank:
        return x
    names = [f"a{i}" for i in range(rank)]
    left = " ".join(n for i, n in enumerate(names) if i not in chosen)
    right = " ".join("1" if i in chosen else n for i, n in enumerate(names))
    return b.rearrange(x, pattern=f"{left} -> {right}")

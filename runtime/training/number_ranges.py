"""Validation of numbers that users choose for a training run."""

from __future__ import annotations

import numpy as np

from treadle.ir.errors import UsageError


def check_number(name: str, value: object, *, positive: bool = False, below: float | None = None, hint: str) -> None:
    """Raise UsageError if a value is not a finite number of 0 or more within the given limits.

    positive  True if 0 is refused too
    below     an upper bound, exclusive
    """
    if isinstance(value, int | float | np.number) and not isinstance(value, bool) and np.isfinite(value):
        number = float(value)
        if (number > 0 or (number == 0 and not positive)) and (below is None or number < below):
            return
    limits = ["above 0" if positive else "of 0 or more", *([] if below is None else [f"below {below:g}"])]
    raise UsageError(f"{name} must be a number {' and '.join(limits)}", received=repr(value), hint=hint)


def check_count(name: str, value: object, *, least: int = 1, hint: str) -> None:
    """Raise UsageError if a value is not an integer of `least` or more."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UsageError(f"{name} must be an integer of {least} or more", received=repr(value), hint=hint)

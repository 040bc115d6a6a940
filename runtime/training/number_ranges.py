"""Validation of numbers that users choose for a training run."""

from __future__ import annotations

import numpy as np

from treadle.ir.errors import UsageError
from treadle.ir.wording.checked_calls import number_of


def check_number(name: str, value: object, *, positive: bool = False, below: float | None = None, hint: str) -> None:
    """Raise UsageError if a value is not a finite number of 0 or more within the given limits.

    positive  True if 0 is refused too
    below     an upper bound, exclusive
    """

    def fits(number: object) -> bool:
        if not isinstance(number, int | float | np.number) or isinstance(number, bool) or not np.isfinite(number):
            return False
        return bool((number > 0 or (number == 0 and not positive)) and (below is None or number < below))

    if fits(value):
        return
    limits = ["above 0" if positive else "of 0 or more", *([] if below is None else [f"below {below:g}"])]
    meant = number_of(value)
    raise UsageError(
        f"{name} must be a number {' and '.join(limits)}",
        received=repr(value),
        hint=repr(meant) if fits(meant) else hint,
    )


def check_count(name: str, value: object, *, least: int = 1, hint: str) -> None:
    """Raise UsageError if a value is not an integer of `least` or more."""

    def fits(number: object) -> bool:
        return isinstance(number, int) and not isinstance(number, bool) and number >= least

    if not fits(value):
        meant = number_of(value)
        raise UsageError(
            f"{name} must be an integer of {least} or more",
            received=repr(value),
            hint=repr(meant) if fits(meant) else hint,
        )

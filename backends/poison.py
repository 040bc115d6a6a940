"""Poison mode: while an executable runs, memory that the storage plan declares dead is filled with NaN.

With TREADLE_POISON=1, code that reads memory after its lifetime, or before anything was written there, computes with
NaN (with -1 in integers, with true in booleans). If a run returns the same numbers with and without poisoning, it read
no memory that the plan declares dead. NumPy and PyTorch read the variable when they compile, TVM at each call.
"""

from __future__ import annotations

from treadle.files.switches import read_switch

BYTE = 0xFF
"""Value of every byte of poisoned memory: NaN in each float dtype, -1 in integers."""


def poisons() -> bool:
    """Return True if TREADLE_POISON is 1. Raises UsageError as `read_switch` does."""
    return read_switch("TREADLE_POISON")

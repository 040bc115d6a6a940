"""Poison mode: while an executable runs, memory that the storage plan declares dead is filled with NaN.

With TREADLE_POISON=1, code that reads memory after its lifetime, or before anything was written there, computes with
NaN (with -1 in integers, with true in booleans). If a run gives the same numbers as without it, it read no memory that
the plan declares dead. NumPy and PyTorch read the variable when they compile, TVM at each call.
"""

from __future__ import annotations

import os

BYTE = 0xFF
"""The value of every byte: NaN in each float dtype, -1 in integers."""


def poisons() -> bool:
    """Return True if TREADLE_POISON is set, and not to 0."""
    return os.environ.get("TREADLE_POISON", "") not in ("", "0")

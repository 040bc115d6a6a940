"""Poison mode: what a storage plan says is dead is filled with NaN while an executable runs.

With TREADLE_POISON=1, whoever reads memory after its life ends, or before anything was written there, computes with NaN
(with -1 in whole numbers, with true in booleans). A run that gives the same numbers as without it has read nothing that
the plan has dead. NumPy and PyTorch read the variable when they compile, TVM at each call.
"""

from __future__ import annotations

import os

BYTE = 0xFF
"""Of what every byte is filled with: NaN in each float dtype, -1 in a whole number."""


def poisons() -> bool:
    """Whether TREADLE_POISON asks for it: set, and not to 0."""
    return os.environ.get("TREADLE_POISON", "") not in ("", "0")

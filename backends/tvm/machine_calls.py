"""Calls of entries, as the machines of the host and of devices run them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from treadle.backends.states import States


class MachineCall(NamedTuple):
    """A call of an entry.

    entry    name of the entry
    sizes    sizes of the symbols
    inputs   arrays by name, in the dtypes and the order in which kernels read them
    states   the states, which are updated in place
    outputs  dtypes in which the outputs are stored, by name
    """

    entry: str
    sizes: Mapping[str, int]
    inputs: Mapping[str, np.ndarray[Any, Any]]
    states: States
    outputs: Mapping[str, np.dtype[Any]]

"""Sampling options of rows as inputs of a step that chooses tokens on the device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from treadle.ir.errors import UsageError
from treadle.passes.stepping.sampled import OPTIONS
from treadle.runtime.sampling import Sampling

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class TokenDraw:
    """The choice of one token: sampling options, and the numbers that select the random draw.

    The draw is `Sampling.draw(row, step)`, the same number as for sampling on the host. The device computes
    probabilities in float32, and the host in float64: if the draw is nearer than their difference to the boundary
    between two tokens, the other token may be chosen.

    sampling  the sampling options
    row       the number of the row or prompt
    step      the number of the row's generated tokens
    """

    sampling: Sampling = Sampling()  # noqa: RUF009  immutable
    row: int = 0
    step: int = 0


def sampling_inputs(how: str, draws: Iterable[TokenDraw]) -> Mapping[str, Array]:
    """Return the inputs of an entry that samples as `how`, "greedy" or "random", for one draw of each row.

    Raises UsageError for a temperature where the entry is greedy.
    """
    chosen = list(draws)
    if how == "greedy":
        if random := [each.sampling for each in chosen if each.sampling.temperature > 0]:
            raise UsageError(
                "this session takes the most likely token",
                received=f"temperature={random[0].temperature}",
                hint='device_sampling="random"',
            )
        return {}
    values = [{**vars(each.sampling), "draw": each.sampling.draw(each.row, each.step)} for each in chosen]
    return {name: np.array([each[name] for each in values], dtype.numpy) for name, dtype in OPTIONS.items()}

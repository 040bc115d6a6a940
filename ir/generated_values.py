"""Values of inputs along the sequence for tokens that a model generates.

    image_index: Annotated[t.Tensor, t.i64["B S"], t.generated(0)]            no generated token stands for an image
    position_ids: Annotated[t.Tensor, t.i64["B S 3"], t.generated("next")]    counts on from the row's largest value

A caller passes such an input for the tokens of a prompt. For later tokens, a session computes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from treadle.ir.errors import GraphError

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class GeneratedValue:
    """The value of an input for generated tokens.

    constant  an integer that all elements of a token have; None: one more than the largest element of all tokens before
              it, 0 for the first token
    """

    constant: int | None

    def __str__(self) -> str:
        return "next" if self.constant is None else str(self.constant)

    def draw(self, count: int, largest: int, like: Array) -> Array:
        """Return the values of `count` tokens, [count, ...], with the dtype and the other sizes of `like` [n, ...].

        largest  the largest element of all tokens before them; -1 if there is none
        """
        if self.constant is not None:
            return np.full((count, *like.shape[1:]), self.constant, like.dtype)
        following = np.arange(largest + 1, largest + 1 + count, dtype=like.dtype)
        return np.broadcast_to(following.reshape(count, *[1] * (like.ndim - 1)), (count, *like.shape[1:])).copy()


def generated(value: int | Literal["next"]) -> GeneratedValue:
    """Return the note, for an input's annotation, of its value for generated tokens: an integer, or "next", one more
    than the largest value of the tokens before it. Raises GraphError for any other value.
    """
    if value == "next":
        return GeneratedValue(None)
    number: object = value
    if isinstance(number, bool) or not isinstance(number, int) or not -(2**31) <= number < 2**31:
        raise GraphError("the value for generated tokens must be an integer, or 'next'", received=repr(value))
    return GeneratedValue(number)

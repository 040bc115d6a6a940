"""The inputs of a text model in addition to the tokens: once per row (the prologue), and along the sequence.

LLaVA: `pixels` [N-1, C, H, W] once per row, `image_index` [n] along the sequence: 0 for a text token, 1 + i for the
token that stands for image feature i; generated tokens have 0.

    session.open(pixels=images, image_index=index)        the index covers the tokens of the prompt
    session.prefill({row: prompt})                        token i has index[i]
    session.step({row: 464})                              the declared value: 0

Qwen2-VL: `patches` and their places once per row, and `position_ids` [n, 3] along the sequence (time, row and column);
all three positions of a generated token are one more than the largest position before it.

A prompt (`RowInputs.prompt`) has the values of all its tokens. A row has the values of its tokens, and those of the
prompt's tokens that are still to be appended. Rows with equal prologue inputs, tokens and values hold equal states, so
a prefix that agrees in all of them may be shared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import numpy as np

from treadle.ir.errors import UsageError
from treadle.ir.generated_values import GeneratedValue
from treadle.ir.graph import Value
from treadle.passes.stepping.derivation import DerivedStep

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class RowPrompt:
    """The tokens of a text, with the checked inputs of its row.

    tokens    token ids
    along     the values of inputs along the sequence, [n, ...] each, for at least all tokens
    prologue  the inputs that are passed once per row, without the first dimension
    key       hash of `prologue`; "" if there are none
    """

    tokens: list[int]
    along: Mapping[str, Array] = field(default_factory=dict)
    prologue: Mapping[str, Array] = field(default_factory=dict)
    key: str = ""

    def equals(self, other: RowPrompt) -> bool:
        """Return True if both texts have the same tokens and inputs."""
        count = len(self.tokens)
        same = self.tokens == other.tokens and self.key == other.key
        return same and first_difference(self.along, other.along, count) == count


def first_difference(values: Mapping[str, Array], others: Mapping[str, Array], count: int) -> int:
    """Return the first of `count` tokens whose values differ; `count` if there is none."""
    for name, value in values.items() if count else ():
        differ = (value[:count] != others[name][:count]).reshape(count, -1).any(1)
        if differ.any():
            count = int(differ.argmax())
    return count


class RowInputs:
    """The inputs of a model's rows in addition to the tokens.

    limits   the sizes of states that a session chose, by symbol: {"C_N": 5}
    """

    def __init__(self, derived: DerivedStep, limits: Mapping[str, int]) -> None:
        entries = derived.graph.functions
        self.derived, self.limits = derived, dict(limits)
        ports = {v.name: v for v in entries["verify"].inputs}
        self.rules: dict[str, GeneratedValue] = dict(derived.generated)
        self._along = {name: ports[name] for name in self.rules}
        taken = entries["prologue"].inputs if derived.has_prologue else ()
        self._prologue = {v.name: v for v in taken if v.name in derived.prologue}

    def prompt(self, tokens: Sequence[int], inputs: Mapping[str, Any]) -> RowPrompt:
        """Check the inputs of a row for a text that begins with these tokens.

        Inputs along the sequence may be left out, or cover fewer tokens: the other tokens have the declared value. An
        input of the prologue may be left out if it may be empty. Raises UsageError for a missing or unknown input, or
        one whose shape does not fit.
        """
        name = self.derived.graph.name
        lacking = [n for n in self._prologue if n not in inputs and n not in self.derived.may_be_empty]
        if lacking or any(n not in self._prologue and n not in self._along for n in inputs):
            known = ", ".join((*self._prologue, *self._along)) or "nothing"
            raise UsageError(f"a row of {name} begins with {known}", received=", ".join(inputs) or "nothing")
        prologue = {n: self._of_row(v, inputs.get(n)) for n, v in self._prologue.items()}
        along = {n: self._of_tokens(v, inputs.get(n), len(tokens)) for n, v in self._along.items()}
        return RowPrompt(list(tokens), along, prologue, _hash(prologue))

    def next_values(self, name: str, values: Array, first: int, count: int) -> Array:
        """Return an input's values for `count` tokens from token `first` on, given its values [n, ...] so far."""
        new = values[first : first + count]
        if len(new) == count:
            return new
        before = values[: first + len(new)]
        largest = int(before.max()) if before.size else -1
        return np.concatenate([new, self.rules[name].draw(count - len(new), largest, values)])

    def _of_tokens(self, port: Value, value: Any, count: int) -> Array:
        sizes = [size.constant for size in port.type.shape[2:]]
        dtype = port.type.dtype.numpy
        array = np.zeros((0, *[size or 0 for size in sizes]), dtype) if value is None else np.asarray(value)
        kinds = "iu" if port.type.dtype.is_int else "iuf"
        if array.ndim != 1 + len(sizes) or list(array.shape[1:]) != sizes or array.dtype.kind not in kinds:
            wanted = "".join(f", {size}" for size in sizes)
            hint = f"{port.type.dtype}[n{wanted}]"
            raise UsageError(f"{port.name} needs a value for each token", received=_shown(array), hint=hint)
        return self.next_values(port.name, array.astype(dtype), 0, max(count, len(array)))

    def _of_row(self, port: Value, value: Any) -> Array:
        shape = port.type.shape[1:]
        if value is None:
            empty = [size.constant if size.constant is not None else 0 for size in shape]
            return np.zeros(empty, port.type.dtype.numpy)
        array = np.asarray(value)
        if array.ndim != len(shape):
            sizes = ", ".join(map(str, shape))
            batched = f"; [0] of an array [{', '.join(map(str, port.type.shape))}]" * (array.ndim == len(shape) + 1)
            raise UsageError(
                f"{port.name} of a row has no axis for the batch",
                received=_shown(array),
                hint=f"{port.type.dtype}[{sizes}]{batched}" if shape else f"a number {port.type.dtype}{batched}",
            )
        for size, have in zip(shape, array.shape, strict=True):
            linear = size.as_linear
            limit = None if linear is None else self.limits.get(f"{self.derived.capacity}_{linear[0]}")
            if linear is not None and limit is not None and have > linear[1] * limit + linear[2]:
                symbol, factor, offset = linear
                raise UsageError(
                    f"a row has room for {factor * limit + offset} along {size} of {port.name}",
                    received=_shown(array),
                    hint=f"a session with memory={{{symbol!r}: {-(-(have - offset) // factor)}}}",
                )
        return array


def _hash(inputs: Mapping[str, Array]) -> str:
    if not inputs:
        return ""
    digest = sha256()
    for name, array in inputs.items():
        digest.update(f"{name} {array.dtype} {array.shape};".encode())
        digest.update(np.ascontiguousarray(array).data.cast("B") if array.size else b"")
    return digest.hexdigest()


def _shown(array: Array) -> str:
    return f"{array.dtype}[{', '.join(map(str, array.shape))}]"

"""The inputs and outputs of a derived decoding step: the token input, the vocabulary size, and the logits output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from treadle.ir.axes import Role
from treadle.ir.composites import body_of
from treadle.ir.errors import Hint, UsageError
from treadle.ir.graph import Function, Value
from treadle.ir.operation import Composite
from treadle.passes.stepping.derivation import DerivedStep, logits_of


@dataclass(frozen=True)
class TokenPorts:
    """The ports of a text model.

    tokens      name of the token input, int [B, S]
    dtype       dtype of the token ids
    vocabulary  number of token ids, from the smallest table that is indexed by tokens; None if there is no table
    logits      name of the output, float [B, S, vocab]
    """

    tokens: str
    dtype: np.dtype[Any]
    vocabulary: int | None
    logits: str


def token_ports(derived: DerivedStep) -> TokenPorts:
    """Return the ports of a derived step.

    The token input is the input along the sequence that has no declared value for generated tokens. Raises UsageError
    if there is no such input, or if there are several, or if the logits cannot be distinguished from other outputs.
    """
    function = derived.graph.functions["verify"]
    given = [v for v in function.inputs if v.name in derived.tokens and v.name not in derived.generated]
    if len(given) != 1:
        raise UsageError(
            "a session needs the value of each input but the tokens for generated tokens",
            received=f"{derived.graph.name} takes {', '.join(v.name for v in given) or 'no tokens'} at every step",
            hint="t.generated(0) in an input's annotation, or inputs=() that leave the others out",
        )
    (tokens,) = given
    dtype = tokens.type.dtype
    if not dtype.is_int or dtype.numpy is None or tokens.type.rank != 2:
        raise UsageError(
            f"a session feeds token ids, and {derived.graph.name} has no input for them",
            received=f"{tokens.name}: {tokens.type}",
            hint=Hint(
                'an input i64["B S"]; for any other model, call the entries of derive_step directly',
                "treadle run, for one call of any model",
            ),
        )
    vocabulary = count_token_ids(function, tokens.name)
    return TokenPorts(tokens.name, dtype.numpy, vocabulary, logits_of(derived.graph.name, function, derived.axis))


def count_token_ids(function: Function, name: str) -> int | None:
    """Return the number of token ids that an input may have: the size of the smallest table that it indexes. Return
    None if there is no such input or no table.
    """
    tokens = {value for value in function.inputs if value.name == name}
    return min(_looked_up(function, tokens), default=None)


def _looked_up(function: Function, ids: set[Value]) -> list[int]:
    """Return the sizes of the table axes that a function indexes with the unchanged values `ids`."""
    same, sizes = set(ids), list[int]()
    for node in function.nodes:
        positions = [i for i, value in enumerate(node.operands) if value in same]
        if not positions or node.op.callee is not None:
            continue
        types = [None if v is None else v.type for v in node.operands]
        if isinstance(node.op, Composite):  # a composite may index several tables with different ids
            body = body_of(node.op, types)
            formals = dict(zip((i for i, v in enumerate(node.operands) if v is not None), body.inputs, strict=True))
            sizes += _looked_up(body, {formals[i] for i in positions})
            continue
        if len(node.operands) == 1 and node.op.only_moves and not node.op.reads_positions:
            same.update(node.results)
        application = node.op.apply(types)
        tables = [dims or () for i, dims in enumerate(application.operands) if i not in positions]
        for name in {name for dims in tables for dim in dims for name in dim.factors}:
            size = application.dims[name].size.constant
            if application.factors[name].role is Role.INDEXED and size is not None:
                sizes.append(size)
    return sizes

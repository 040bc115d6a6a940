"""Attention as both Python backends spell it: one kernel call, with a call inside for each mask and bias.

    kernels.attention(q, k, v, scale=0.125, masks=[kernels.causal(S, T), kernels.padding(lengths, T)])
    out, p = kernels.attention_with_probabilities(q, k, v, scale=0.125)

Every mask and bias is an array that broadcasts against [b, h, s, t]. Both kernel modules define the same
functions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from treadle.backends.python.emission import Line, float_text
from treadle.ir.attention_terms import (
    Alibi,
    BiasTerm,
    BooleanMask,
    Causal,
    Padding,
    Segments,
    T5Relative,
    TensorBias,
    Term,
    Window,
)
from treadle.ir.ops.attention import Attention, AttentionWithProbabilities

_KNOWN = (Causal, Window, Padding, Segments, BooleanMask, TensorBias, T5Relative, Alibi)


def knows(op: Attention | AttentionWithProbabilities) -> bool:
    """Whether all terms of an attention have a spelling; else its body is lowered."""
    return all(type(term) in _KNOWN for term in op.terms)


def attention(line: Line, device: str = "") -> str:
    """The kernel call. device is the argument that says where masks made from nothing but sizes shall lie."""
    masks, biases = _terms_of(line, device)
    arguments = [line.q, line.k, line.v, f"scale={float_text(scale_of(line))}"]
    arguments += [f"masks=[{', '.join(masks)}]"] if masks else []
    arguments += [f"biases=[{', '.join(biases)}]"] if biases else []
    arguments += [f"softcap={float_text(line.op.softcap)}"] if line.op.softcap is not None else []
    return f"kernels.{line.op.name}({', '.join(arguments)})"


def scale_of(line: Line) -> float:
    """What the products are multiplied by."""
    if line.op.scale is not None:
        return float(line.op.scale)
    width = line.type("q").shape[-1].constant
    assert width is not None  # the op refuses it
    return 1 / math.sqrt(width)


def _terms_of(line: Line, device: str) -> tuple[list[str], list[str]]:
    """The masks and the biases as expressions, in the order of the terms."""
    masks: list[str] = []
    biases: list[str] = []
    device = f", {device}" if device else ""
    names = iter(line.op.operand_names(len(line.node.operands))[3:])
    queries, keys = line.type("q").shape[2], line.type("k").shape[2]
    for term in line.op.terms:
        operands = [line.array(next(names)) for _ in term.operands]
        made = _term(term, operands, f"{line.size(queries)}, {line.size(keys)}", line.size(keys), device)
        (biases if isinstance(term, BiasTerm) else masks).append(made)
    return masks, biases


def _term(term: Term, operands: Sequence[str], grid: str, keys: str, device: str) -> str:
    match term:
        case Causal():
            return f"kernels.causal({grid}{device})"
        case Window(size=size):
            return f"kernels.window({grid}, {size}{device})"
        case Padding():
            return f"kernels.padding({operands[0]}, {keys})"
        case Segments():
            return f"kernels.segments({operands[0]}, {operands[1]})"
        case BooleanMask(axes=axes) | TensorBias(axes=axes):
            return operands[0] if axes == "b h s t" else f'kernels.laid_out({operands[0]}, "{axes}")'
        case T5Relative(buckets=buckets, max_distance=far, bidirectional=both):
            return f"kernels.t5_relative({operands[0]}, {grid}, {buckets}, {far}, {both})"
        case Alibi():
            return f"kernels.alibi({operands[0]}, {grid})"
    raise AssertionError(f"{term} has no spelling")

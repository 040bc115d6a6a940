"""Code for attention in NumPy and PyTorch: one kernel call, with an expression as argument for each mask and bias.

    kernels.attention(q, k, v, scale=0.125, masks=[kernels.causal(S, T), kernels.padding(lengths, T)])
    out, p = kernels.attention_with_probabilities(q, k, v, scale=0.125)

Every mask and bias is an array that broadcasts against [b, h, s, t]. The kernel modules of both backends define these
two functions; each backend generates the code of a term.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from treadle.backends.python.spelled_line import Line, float_text
from treadle.ir.attention.attention_terms import BiasTerm, Term

TermSpelling = Callable[[Term, Sequence[str], str, str], str]
"""A function that returns a term as an expression, from the term, its operands, and the numbers of queries and keys."""


def attention(
    line: Line, spelling: TermSpelling, factors: Sequence[str] = (), *, hidden: bool = False, options: str = ""
) -> str:
    """Return the kernel call as text.

    factors  queries, keys and values as expressions; if empty, the operands
    hidden   True if masks are true where a query must not see a key
    options  further arguments, each after a comma
    """
    masks, biases = _terms_of(line, spelling)
    arguments = [*(factors or (line.q, line.k, line.v)), f"scale={float_text(scale_of(line))}"]
    arguments += [f"{'hidden' if hidden else 'masks'}=[{', '.join(masks)}]"] if masks else []
    arguments += [f"biases=[{', '.join(biases)}]"] if biases else []
    arguments += [f"softcap={float_text(line.op.softcap)}"] if line.op.softcap is not None else []
    return f"kernels.{line.op.name}({', '.join(arguments)}{options}{line.out_args})"


def scale_of(line: Line) -> float:
    """Return the factor of the scores."""
    if line.op.scale is not None:
        return float(line.op.scale)
    width = line.type("q").shape[-1].constant
    assert width is not None  # the op refuses a symbolic width without a scale
    return 1 / math.sqrt(width)


def _terms_of(line: Line, spelling: TermSpelling) -> tuple[list[str], list[str]]:
    """Return the masks and the biases as expressions, in the order of the terms."""
    masks: list[str] = []
    biases: list[str] = []
    names = iter(line.op.operand_names(len(line.node.operands))[3:])
    for term in line.op.terms:
        operands = [line.array(next(names)) for _ in term.operands]
        queries, keys = (line.size(line.type(name).shape[2]) for name in ("q", "k"))
        (biases if isinstance(term, BiasTerm) else masks).append(spelling(term, operands, queries, keys))
    return masks, biases

"""Code that NumPy and PyTorch share: reshapes and permutations, letters of einsum, slices, axes."""

from __future__ import annotations

import string
from collections.abc import Sequence

from treadle.backends.python.spelled_line import Line, as_tuple
from treadle.ir.axes import AxisDim


def rearranged(line: Line, permute: str, joined: bool = True) -> str:
    """Return code such as `x.reshape(B, S, 12, 64).transpose(0, 2, 1, 3)`, with only the steps that are needed.

    permute  the name of the method that permutes axes
    joined   True if axes that are one dimension of the result are joined

    Sizes are sizes of the stored array: quantized blocks are moved as bytes.
    """
    application = line.op.apply([line.type("x").storage_type])
    (operand,), (result,) = application.operands, application.results
    before = [name for dim in operand or () for name in dim.factors]
    after = [name for dim in result for name in dim.factors]
    text = line.array("x")
    if _merges(operand or ()):
        text += f".reshape({', '.join(line.size(application.dims[name].size) for name in before)})"
    if before != after:
        text += f".{permute}({', '.join(str(before.index(name)) for name in after)})"
    if joined and _merges(result):
        text += f".reshape({', '.join(line.size(size) for size in line.result.storage_type.shape) or '()'})"
    return text.replace(".reshape()", ".reshape(())")


def _merges(dims: Sequence[AxisDim]) -> bool:
    return any(len(dim.factors) != 1 for dim in dims)


def einsum_letters(equation: str) -> str:
    """Return an equation such as `b heads s d, b heads t d -> b heads s t` with letters: `bhsd,bhtd->bhst`."""
    letters: dict[str, str] = {}

    def letter(name: str) -> str:
        if name not in letters:
            taken = letters.values()
            letters[name] = next(c for c in name + string.ascii_letters if c.isalpha() and c not in taken)
        return letters[name]

    left, _, right = equation.partition("->")
    terms = [[w if w == "..." else letter(w) for w in part.split()] for part in (*left.split(","), right)]
    return ",".join("".join(term) for term in terms[:-1]) + "->" + "".join(terms[-1])


def sliced(line: Line) -> str:
    """Return the code of a slice: `x[:, 1:4]`."""
    x = line.type("x")
    axis = line.op.axis % x.rank
    start, stop = line.op.span(x.shape[axis])
    first = "" if start.constant == 0 else line.size(start)
    last = "" if stop == x.shape[axis] else line.size(stop)
    stride = f":{line.op.stride}" if line.op.stride != 1 else ""
    return f"{line.array('x')}[{':, ' * axis}{first}:{last}{stride}]"


def axes_of(line: Line) -> str:
    """Return the axes of a reduction as a tuple."""
    return as_tuple([str(axis) for axis in line.op.axes])


def keeping(line: Line, word: str) -> str:
    """Return the argument `, keepdims=True` if a reduction keeps its axes; `word` is the argument's name."""
    return f", {word}=True" if line.op.keep else ""

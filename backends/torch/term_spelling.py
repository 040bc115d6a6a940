"""Attention's masks and biases as calls of PyTorch kernels: `kernels.window(S, T, 128, device)`."""

from __future__ import annotations

from collections.abc import Sequence

from treadle.ir.attention.attention_terms import (
    Alibi,
    BooleanMask,
    Causal,
    Padding,
    Segments,
    T5Relative,
    TensorBias,
    Term,
    Window,
)
from treadle.ir.attention.term_visitor import TermVisitor


def spelled_term(term: Term, operands: Sequence[str], queries: str, keys: str) -> str:
    """Return a term as an expression. Raises GraphError for a term that is not standard."""
    return term.accept(_Spelled(queries, keys), *operands)


class _Spelled(TermVisitor[str, str]):
    """Visitor that returns the code of a term. If a tensor depends only on sizes, its device is an argument."""

    def __init__(self, queries: str, keys: str) -> None:
        self.keys, self.grid = keys, f"{queries}, {keys}"

    def causal(self, term: Causal) -> str:
        return f"kernels.causal({self.grid}, device)"

    def window(self, term: Window) -> str:
        return f"kernels.window({self.grid}, {term.size}, device)"

    def padding(self, term: Padding, lengths: str) -> str:
        return f"kernels.padding({lengths}, {self.keys})"

    def segments(self, term: Segments, of_queries: str, of_keys: str) -> str:
        return f"kernels.segments({of_queries}, {of_keys})"

    def boolean_mask(self, term: BooleanMask, mask: str) -> str:
        return _laid_out(mask, term.axes)

    def tensor_bias(self, term: TensorBias, bias: str) -> str:
        return _laid_out(bias, term.axes)

    def t5_relative(self, term: T5Relative, table: str) -> str:
        shape = f"{term.buckets}, {term.max_distance}, {term.bidirectional}"
        return f"kernels.t5_relative({table}, {self.grid}, {shape})"

    def alibi(self, term: Alibi, slopes: str) -> str:
        return f"kernels.alibi({slopes}, {self.grid})"


def _laid_out(x: str, axes: str) -> str:
    return x if axes == "b h s t" else f'kernels.laid_out({x}, "{axes}")'

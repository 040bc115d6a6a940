"""What a backend says of each kind of attention's terms: a visitor with a method a kind.

    class Spelled(TermVisitor[str, str]):          # takes operands as text, gives text
        def causal(self, term): return "j <= i"
        def padding(self, term, lengths): return f"j < {lengths}"
        ...
    term.accept(Spelled(), "n")

Every method is abstract, so that a visitor that lacks a kind fails type checking, and cannot be made. A term that
somebody derives, and that is no kind of these, has `Term.body`: `Term.is_standard` tells.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from treadle.ir.attention.attention_terms import (
        Alibi,
        BooleanMask,
        Causal,
        Padding,
        Segments,
        T5Relative,
        TensorBias,
        Window,
    )

X = TypeVar("X")
"""What stands for an operand."""
Y = TypeVar("Y")
"""What stands for a term."""


class TermVisitor(ABC, Generic[X, Y]):
    """A method for each kind of term, which takes the term and its operands; `Term.accept` calls it."""

    @abstractmethod
    def causal(self, term: Causal) -> Y: ...

    @abstractmethod
    def window(self, term: Window) -> Y: ...

    @abstractmethod
    def padding(self, term: Padding, lengths: X) -> Y: ...

    @abstractmethod
    def segments(self, term: Segments, of_queries: X, of_keys: X) -> Y: ...

    @abstractmethod
    def boolean_mask(self, term: BooleanMask, mask: X) -> Y: ...

    @abstractmethod
    def tensor_bias(self, term: TensorBias, bias: X) -> Y: ...

    @abstractmethod
    def t5_relative(self, term: T5Relative, table: X) -> Y: ...

    @abstractmethod
    def alibi(self, term: Alibi, slopes: X) -> Y: ...

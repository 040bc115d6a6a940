"""Implementations of attention's terms in a backend: a visitor with a method for each kind.

    class Spelled(TermVisitor[str, str]):          # takes operands as text, returns text
        def causal(self, term): return "j <= i"
        def padding(self, term, lengths): return f"j < {lengths}"
        ...
    term.accept(Spelled(), "n")

Every method is abstract, so a visitor without a method for a kind fails type checking and cannot be instantiated. A
term of another, derived kind is lowered by `Term.body`; for it `Term.is_standard` is false.
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
"""The representation of an operand."""
Y = TypeVar("Y")
"""The representation of a term."""


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

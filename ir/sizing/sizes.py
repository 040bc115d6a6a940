"""Sizes: polynomials over bounded symbols and floor-divisions, in one canonical form.

    size   = sum of terms             3*B*S + 1
    term   = coefficient * atoms      atoms multiply
    atom   = symbol | size // size    S, (S + 2)//4

Two sizes are equal if their canonical forms are equal. `2*S` equals `S + S`, and `S//2//3` equals `S//6`. `2*(S//2)`
and `S` are not equal, since they differ for odd S. `bounds` returns an interval that holds for all values of the
symbols.
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from math import gcd
from typing import Any, TypeAlias, overload

from treadle.ir.errors import SizeError
from treadle.ir.sizing.size_bounds import INFINITY, Bounds, atom_bounds, times
from treadle.ir.sizing.size_numbers import SizeNumbers

SizeLike: TypeAlias = "Size | int | str"

VARIABLE = 'a name such as "B", for a size that differs from call to call'
"""The hint for the signs that other libraries have for such a size: None, -1, ? and :."""


class Quotient:
    """The atom `numerator // denominator`, rounded down. Immutable; its text determines its order among atoms."""

    __slots__ = ("_hash", "_text", "denominator", "numerator")

    def __init__(self, numerator: Size, denominator: Size) -> None:
        self.numerator, self.denominator = numerator, denominator
        self._hash = hash((numerator, denominator))
        self._text = f"{_grouped(numerator)}//{_grouped(denominator)}"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Quotient):
            return NotImplemented
        return self is other or (self.numerator == other.numerator and self.denominator == other.denominator)

    def __hash__(self) -> int:
        return self._hash

    def __str__(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return f"Quotient({self._text})"


# Untrusted text may contain any product; these limits bound the work and keep every size printable.
MOST_TERMS = 256
MOST_FACTORS = 64
MOST_DIVIDED = 64
MOST_DIVISOR = 2**31
LARGEST = 2**127

Atom: TypeAlias = str | Quotient
Monomial = tuple[Atom, ...]


def _atom_key(atom: Atom) -> tuple[int, str]:
    return (0, atom) if isinstance(atom, str) else (1, atom._text)


class Size(SizeNumbers):
    """A canonical size expression. Immutable and hashable; arithmetic returns sizes."""

    __slots__ = ("_hash", "_text", "constant", "terms")
    terms: tuple[tuple[Monomial, int], ...]
    constant: int | None
    """The size's value if it contains no symbol, else None."""

    def __init__(self, terms: Iterable[tuple[Monomial, int]]) -> None:
        """Build a size from terms. Prefer `Size.of`, which accepts integers and text, and arithmetic."""
        self.terms = tuple(terms)
        if not self.terms:
            self.constant = 0
        else:
            mono, coeff = self.terms[0]
            self.constant = coeff if len(self.terms) == 1 and not mono else None
        self._hash = hash(self.terms if self.constant is None else self.constant)  # equals the hash of an equal integer
        self._text: str | None = None

    # -- construction ------------------------------------------------------------------------------------------

    @staticmethod
    def of(value: SizeLike) -> Size:
        """Return a size from an integer, from text such as `"2*S + 1"`, or from itself. Raises SizeError."""
        if isinstance(value, Size):
            return value
        if isinstance(value, str):
            from treadle.ir.sizing.size_text import parse_size  # an import cycle: the parser builds sizes

            return parse_size(value)
        try:
            return _constant(operator.index(value))
        except TypeError:
            hint = getattr(value, "label_hint", None)  # of a labelled dimension, whose class is defined above sizes
            given: Any = value
            hint = hint or (VARIABLE if given is None else None)
            raise SizeError(f"a size is an integer or an expression of symbols, not {value!r}", hint=hint) from None

    @staticmethod
    def symbol(name: str) -> Size:
        """Return the size that is one symbol."""
        return _symbol(name)

    @staticmethod
    def _from(table: Mapping[Monomial, int]) -> Size:
        terms = [(mono, coeff) for mono, coeff in table.items() if coeff]
        if len(terms) > 1:
            if len(terms) > MOST_TERMS:
                raise SizeError("a size expression has too many terms", hint=f"at most {MOST_TERMS}")
            terms.sort(key=lambda term: (-len(term[0]), [_atom_key(a) for a in term[0]]))
        for _, coeff in terms:
            _check_magnitude(coeff)
        return Size(terms)

    # -- reading -----------------------------------------------------------------------------------------------

    @property
    def symbols(self) -> frozenset[str]:
        """The names of all symbols in the size."""
        found: set[str] = set()
        for mono, _ in self.terms:
            for atom in mono:
                if isinstance(atom, str):
                    found.add(atom)
                else:
                    found |= atom.numerator.symbols | atom.denominator.symbols
        return frozenset(found)

    @property
    def as_symbol(self) -> str | None:
        """The symbol's name if the size is one bare symbol, else None."""
        if len(self.terms) == 1 and self.terms[0][1] == 1 and len(self.terms[0][0]) == 1:
            atom = self.terms[0][0][0]
            return atom if isinstance(atom, str) else None
        return None

    @property
    def as_linear(self) -> tuple[str, int, int] | None:
        """(S, c, d) if the size is c*S + d for one bare symbol S and numbers c and d, else None."""
        linear = [(mono, coeff) for mono, coeff in self.terms if mono]
        if len(linear) != 1 or len(linear[0][0]) != 1:
            return None
        ((atom,), coeff), offset = linear[0], sum(c for mono, c in self.terms if not mono)
        return (atom, coeff, offset) if isinstance(atom, str) else None

    def evaluate(self, values: Mapping[str, int]) -> int:
        """Return the value for given values of symbols. Raises SizeError for a symbol without a value or a zero
        divisor.
        """
        if self.constant is not None:
            return self.constant
        total = 0
        for mono, coeff in self.terms:
            product = coeff
            for atom in mono:
                if isinstance(atom, str):
                    if atom not in values:
                        raise SizeError(f"size {self} needs a value for {atom}", received=f"{dict(values)}")
                    product *= values[atom]
                else:
                    divisor = atom.denominator.evaluate(values)
                    if divisor == 0:
                        raise SizeError(f"size {self} divides by zero", received=f"{dict(values)}")
                    product *= atom.numerator.evaluate(values) // divisor
            total += product
        return total

    def substitute(self, values: Mapping[str, SizeLike]) -> Size:
        """Return the size with some symbols replaced by sizes."""
        total = ZERO
        for mono, coeff in self.terms:
            product = _constant(coeff)
            for atom in mono:
                if isinstance(atom, str):
                    product = product * (Size.of(values[atom]) if atom in values else _symbol(atom))
                else:
                    product = product * (atom.numerator.substitute(values) // atom.denominator.substitute(values))
            total = total + product
        return total

    def bounds(self, symbols: Mapping[str, Bounds]) -> Bounds:
        """Return an interval that holds every value of the size (interval arithmetic: sound, not always tight).

        A lower bound of -2**62 stands for minus infinity.
        """
        low, high = self.interval(symbols)
        return Bounds(-(2**62) if low == -INFINITY else int(low), None if high == INFINITY else int(high))

    def interval(self, symbols: Mapping[str, Bounds]) -> tuple[float, float]:
        """Return the interval of `bounds`, with ends that may be infinite."""
        if self.constant is not None:
            return self.constant, self.constant
        low: float = 0
        high: float = 0
        for mono, coeff in self.terms:
            lo: float = coeff
            hi: float = coeff
            for atom in mono:
                a_lo, a_hi = atom_bounds(atom, symbols)
                if lo >= 0 and a_lo >= 0:  # true for nearly all sizes
                    lo, hi = times(lo, a_lo), times(hi, a_hi)
                else:
                    corners = [times(x, y) for x in (lo, hi) for y in (a_lo, a_hi)]
                    lo, hi = min(corners), max(corners)
            low, high = low + lo, high + hi
        return low, high

    # -- arithmetic --------------------------------------------------------------------------------------------

    def __add__(self, other: SizeLike) -> Size:
        if not isinstance(other, _OPERANDS):
            return self.beside(operator.add, other)
        other = Size.of(other)
        if self.constant is not None and other.constant is not None:
            return _constant(self.constant + other.constant)
        table = dict(self.terms)
        for mono, coeff in other.terms:
            table[mono] = table.get(mono, 0) + coeff
        return Size._from(table)

    def __neg__(self) -> Size:
        return Size((mono, -coeff) for mono, coeff in self.terms)

    def __sub__(self, other: SizeLike) -> Size:
        if not isinstance(other, _OPERANDS):
            return self.beside(operator.sub, other)
        return self + -Size.of(other)

    @overload
    def __mul__(self, other: SizeLike) -> Size: ...
    @overload
    def __mul__(self, other: float) -> float: ...
    def __mul__(self, other: SizeLike | float) -> Size | float:
        if isinstance(other, float) or not isinstance(other, _OPERANDS):
            return self.beside(operator.mul, other)
        other = Size.of(other)
        if self.terms == ONE_TERMS:
            return other
        if other.terms == ONE_TERMS:
            return self
        value, factor = self.constant, other.constant
        if value is not None and factor is not None:
            return _constant(value * factor)
        if len(self.terms) * len(other.terms) > MOST_TERMS:
            raise SizeError("a size expression has too many terms", hint=f"at most {MOST_TERMS}")
        if self.terms and other.terms and len(self.terms[0][0]) + len(other.terms[0][0]) > MOST_FACTORS:
            raise SizeError("a term of a size has too many factors", hint=f"at most {MOST_FACTORS}")
        table: dict[Monomial, int] = {}
        for left, a in self.terms:
            for right, b in other.terms:
                mono = tuple(sorted(left + right, key=_atom_key))
                table[mono] = table.get(mono, 0) + a * b
        return Size._from(table)

    def divide(self, other: SizeLike) -> Size | None:
        """Return the quotient if `other` divides the size for all values of the symbols, else None."""
        other = Size.of(other)
        if not other.terms:
            return None
        if not self.terms:
            return ZERO
        if other.terms == ONE_TERMS:
            return self
        value, divisor = self.constant, other.constant
        if value is not None and divisor is not None:
            return None if value % divisor else _constant(value // divisor)
        lead_mono, lead_coeff = other.terms[0]
        if len(other.terms) == 1:
            parts = [(_without(mono, lead_mono), *divmod(coeff, lead_coeff)) for mono, coeff in self.terms]
            if any(left is None or rest for left, _, rest in parts):
                return None
            return Size._from({left: whole for left, whole, _ in parts if left is not None})
        if len(self.terms) * len(other.terms) > MOST_DIVIDED:
            raise SizeError("a size expression has too many terms to be divided", hint=f"at most {MOST_DIVIDED}")
        rest, quotient = self, ZERO
        for _ in range(len(self.terms) * (len(other.terms) + 1)):
            if not rest.terms:
                return quotient
            for mono, coeff in rest.terms:
                left = _without(mono, lead_mono)
                if left is not None and coeff % lead_coeff == 0:
                    piece = Size([(left, coeff // lead_coeff)])
                    break
            else:
                return None
            quotient = quotient + piece
            rest = rest - piece * other
        return None if rest.terms else quotient

    def __floordiv__(self, other: SizeLike) -> Size:
        if not isinstance(other, _OPERANDS):
            return self.beside(operator.floordiv, other)
        other = Size.of(other)
        divisor = other.constant
        if divisor == 0:
            raise SizeError(f"size {self} divides by zero")
        exact = self.divide(other)
        if exact is not None:
            return exact
        value = self.constant
        if value is not None and divisor is not None:
            return _constant(value // divisor)
        if divisor is not None and divisor > 1:
            whole, rest = _whole_parts(self, divisor)
            if whole.terms:
                return whole + rest // other
            common = gcd(divisor, *[coeff for mono, coeff in self.terms if mono])
            if common > 1:  # (4*S + 3)//6 is (2*S + 1)//3
                return Size._from({mono: coeff // common for mono, coeff in self.terms}) // (divisor // common)
            at_once = _divided_at_once(self, divisor)
            if at_once is not None:
                return at_once
        return Size([((Quotient(self, other),), 1)])

    __radd__ = __add__
    __rmul__ = __mul__

    def __mod__(self, other: SizeLike) -> Size:
        if not isinstance(other, _OPERANDS):
            return self.beside(operator.mod, other)
        whole: Size = self // other
        return self - whole * Size.of(other)

    def __rsub__(self, other: SizeLike) -> Size:
        return -self + other

    def __rfloordiv__(self, other: SizeLike) -> Size:
        return Size.of(other) // self if isinstance(other, int) else self.beside(_swapped(operator.floordiv), other)

    def __rmod__(self, other: SizeLike) -> Size:
        return Size.of(other) % self if isinstance(other, int) else self.beside(_swapped(operator.mod), other)

    # -- identity and text -------------------------------------------------------------------------------------

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Size):
            return self.terms == other.terms
        return self.constant == other if isinstance(other, int) else NotImplemented

    def __hash__(self) -> int:
        return self._hash

    def __str__(self) -> str:
        """Return compact text that `parse_size` parses: `2*S+1`, `(S+3)//4`."""
        if self._text is None:
            self._text = self._spell()
        return self._text

    def _spell(self) -> str:
        if not self.terms:
            return "0"
        pieces: list[str] = []
        for mono, coeff in self.terms:
            atoms = [
                a if isinstance(a, str) else f"({a})" if len(self.terms) + len(mono) > 2 or coeff != 1 else str(a)
                for a in mono
            ]
            magnitude = abs(coeff)
            factors = ([str(magnitude)] if magnitude != 1 or not atoms else []) + atoms
            sign = "-" if coeff < 0 else "+" if pieces else ""
            pieces.append(sign + "*".join(factors))
        return "".join(pieces)

    def __repr__(self) -> str:
        return f"Size({self})"


def _swapped(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda size, other: function(other, size)


_OPERANDS: tuple[type[Any], ...] = (Size, int, str)


def _without(mono: Monomial, part: Monomial) -> Monomial | None:
    left = list(mono)
    for atom in part:
        if atom not in left:
            return None
        left.remove(atom)
    return tuple(left)


def _whole_parts(size: Size, divisor: int) -> tuple[Size, Size]:
    """Return (whole, rest) for which the size is `whole * divisor + rest`, so that its quotient is whole + rest //
    divisor: (S-1)//2+1 is (S+1)//2.

    The number in the rest is from 0 to divisor - 1. Its other coefficients are smaller than the divisor and keep their
    signs, so that bounds stay as tight.
    """
    whole: dict[Monomial, int] = {}
    rest: dict[Monomial, int] = {}
    for mono, coeff in size.terms:
        out = coeff // divisor if not mono or coeff > 0 else -(-coeff // divisor)
        whole[mono], rest[mono] = out, coeff - out * divisor
    return Size._from(whole), Size._from(rest)


def _divided_at_once(size: Size, divisor: int) -> Size | None:
    """Return the quotient of a quotient as a single quotient: (S//3 + 2)//4 as (S + 6)//12. Return None unless the
    size is one quotient plus terms without quotients.
    """
    quotients = [(mono, coeff) for mono, coeff in size.terms if not all(isinstance(atom, str) for atom in mono)]
    if len(quotients) != 1 or quotients[0][1] != 1 or len(quotients[0][0]) != 1:
        return None
    ((quotient,), _) = quotients[0]
    inner = quotient.denominator.constant if isinstance(quotient, Quotient) else None
    if not isinstance(quotient, Quotient) or inner is None or not 0 < inner * divisor < MOST_DIVISOR:
        return None
    return (quotient.numerator + (size - Size([((quotient,), 1)])) * inner) // (inner * divisor)


def _grouped(size: Size) -> str:
    text = str(size)
    return text if size.as_symbol is not None or text.isdecimal() else f"({text})"


def _check_magnitude(number: int) -> None:
    if abs(number) > LARGEST:
        raise SizeError("a size is too large", hint=f"at most {LARGEST}")


@lru_cache(maxsize=4096)
def _constant(value: int) -> Size:
    _check_magnitude(value)
    return Size([((), value)] if value else [])


@lru_cache(maxsize=4096)
def _symbol(name: str) -> Size:
    if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
        raise SizeError(f"{name!r} is not a symbol's name", hint="letters, digits and _, not starting with a digit")
    return Size([((name,), 1)])


ONE_TERMS: tuple[tuple[Monomial, int], ...] = (((), 1),)
ZERO = _constant(0)
ONE = _constant(1)


def product(sizes: Iterable[SizeLike]) -> Size:
    """Return the product of sizes; 1 if there are none."""
    total = ONE
    for size in sizes:
        total = total * size
    return total


def sum_of_symbols(names: Iterable[str]) -> Size:
    """Return the sum of any number of symbols. The sum is built at once, since adding symbols one by one would sort
    each partial sum.
    """
    return Size(sorted(((name,), count) for name, count in Counter(names).items()))

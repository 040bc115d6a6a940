"""Patterns: expressions over wildcards, written as a graph is written.

    def pattern(self, p, x):                      # x is a wildcard
        return x * p.sigmoid(x)                   # both x must be one value

A pattern is written with the builder's methods, over terms instead of values: every op is a method of `p`, and numbers
are scalar constants. Additional methods express conditions that ops cannot express:

    p.either(a, b, ...)     any of these terms; None stands for an absent operand
    p.constant("scale")     any scalar constant, captured as a Python number
    p.near(0.7978845)       a scalar constant at most one spacing of its dtype from this number
    p.attribute("eps")      any value of an attribute, captured; a wildcard as an attribute does the same
    p.shared(a)             the value of a may be used outside the match: the rewrite does not remove it
    p.named("scores", a)    the value of a, captured under a name, for `check` to read

Commutative ops match in both orders. A number matches only a scalar constant that equals the number rounded to the
constant's dtype. An attribute that the pattern omits must have its default.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import treadle.ir.ops  # noqa: F401  (registers every op)
from treadle.ir.errors import PassError
from treadle.ir.op_registry import find_op
from treadle.passes.framework.op_terms import OpTerms

Number = float | int | bool
TermLike: TypeAlias = "PatternTerm | Number"


# -- terms -----------------------------------------------------------------------------------------------------


class PatternTerm:
    """A part of a pattern. It is used in place of an `Expr` and has the same operators."""

    def __add__(self, other: Any) -> PatternTerm:
        return _term("add", self, other)

    def __radd__(self, other: Any) -> PatternTerm:
        return _term("add", other, self)

    def __sub__(self, other: Any) -> PatternTerm:
        return _term("sub", self, other)

    def __rsub__(self, other: Any) -> PatternTerm:
        return _term("sub", other, self)

    def __mul__(self, other: Any) -> PatternTerm:
        return _term("mul", self, other)

    def __rmul__(self, other: Any) -> PatternTerm:
        return _term("mul", other, self)

    def __truediv__(self, other: Any) -> PatternTerm:
        return _term("div", self, other)

    def __rtruediv__(self, other: Any) -> PatternTerm:
        return _term("div", other, self)

    def __pow__(self, other: Any) -> PatternTerm:
        return _term("pow", self, other)

    def __neg__(self) -> PatternTerm:
        return _term("neg", self)

    def __matmul__(self, other: Any) -> PatternTerm:
        return _term("matmul", self, other)

    def __lt__(self, other: Any) -> PatternTerm:
        return _term("less", self, other)

    def __le__(self, other: Any) -> PatternTerm:
        return _term("less_equal", self, other)

    def __gt__(self, other: Any) -> PatternTerm:
        return _term("greater", self, other)

    def __ge__(self, other: Any) -> PatternTerm:
        return _term("greater_equal", self, other)

    def __and__(self, other: Any) -> PatternTerm:
        return _term("logical_and", self, other)

    def __or__(self, other: Any) -> PatternTerm:
        return _term("logical_or", self, other)

    def __invert__(self) -> PatternTerm:
        return _term("logical_not", self)


@dataclass(frozen=True, eq=False)
class Wildcard(PatternTerm):
    """A term for any value (or, as an attribute, any attribute value). All occurrences of a wildcard match the same
    value.
    """

    name: str

    def __str__(self) -> str:
        return f"the same value as {self.name}"


@dataclass(frozen=True, eq=False)
class ConstantTerm(PatternTerm):
    """A term for a scalar constant: of this value (or `near` it), or of any value, captured under `name`."""

    value: Number | None = None
    name: str | None = None
    near: bool = False

    def __str__(self) -> str:
        return "a scalar constant" if self.value is None else f"constant {self.value:g}"


@dataclass(frozen=True, eq=False)
class OpTerm(PatternTerm):
    """A term for the result of an op on these operands, with these attributes."""

    op: str
    operands: tuple[PatternTerm | None, ...]
    attributes: tuple[tuple[str, Any], ...]
    name: str | None = None
    shared: bool = False

    def __str__(self) -> str:
        return self.op


@dataclass(frozen=True, eq=False)
class EitherTerm(PatternTerm):
    """A term for any of several terms. The first that matches is taken; all are tried before the search fails."""

    options: tuple[PatternTerm | None, ...]

    def __str__(self) -> str:
        return " or ".join("no operand" if o is None else str(o) for o in self.options)


class Vocabulary(OpTerms):
    """The argument `p` of `pattern`: every op as a method, and the methods that only patterns have."""

    def _term(self, op: str, *operands: Any, **attributes: Any) -> PatternTerm:
        return _term(op, *operands, **attributes)

    def either(self, *options: Any) -> PatternTerm:
        """Return a term that matches any of these terms. A capture that the matching term lacks is None."""
        terms = [_as_term(o) for o in options]
        return EitherTerm(tuple(o for t in terms for o in (t.options if isinstance(t, EitherTerm) else (t,))))

    def constant(self, name: str) -> PatternTerm:
        """Return a term for any scalar constant, captured under this name as a Python number."""
        return ConstantTerm(name=name)

    def near(self, number: float) -> PatternTerm:
        """Return a term for a scalar constant at most one spacing of its dtype from the number, since a model may have
        computed the constant in its own dtype.
        """
        return ConstantTerm(number, near=True)

    def attribute(self, name: str) -> Wildcard:
        """Return a term for any value of an attribute, captured under this name."""
        return Wildcard(name)

    def shared(self, term: PatternTerm) -> PatternTerm:
        """Return the term, marked so that its own value (not the values of its operands) may be used outside the
        match.
        """
        if isinstance(term, EitherTerm):
            return EitherTerm(tuple(o and self.shared(o) for o in term.options))
        return dataclasses.replace(term, shared=True) if isinstance(term, OpTerm) else term

    def named(self, name: str, term: PatternTerm) -> PatternTerm:
        """Return the term, captured under a name."""
        if isinstance(term, EitherTerm):
            return EitherTerm(tuple(o and self.named(name, o) for o in term.options))
        return dataclasses.replace(term, name=name) if isinstance(term, OpTerm) else term


def _as_term(x: Any) -> PatternTerm | None:
    if x is None or isinstance(x, PatternTerm):
        return x
    if isinstance(x, (bool, int, float)):
        return ConstantTerm(x)
    raise PassError("a pattern must consist of terms and numbers", received=f"{type(x).__name__}: {x!r}")


def _term(op: str, *operands: Any, **attributes: Any) -> OpTerm:
    cls = find_op(op)
    given = dict(cls.attribute_defaults())
    given.update(attributes)
    fields = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    unsaid = [n for n in fields if n not in given]
    unknown = [n for n in attributes if n not in fields]
    if unsaid or unknown:
        raise PassError(
            f"a pattern with {op} must state its attributes: {', '.join(unsaid or unknown)} is not"
            + ("" if unsaid else " one of them"),
            hint=f'attributes of {op}: {", ".join(fields) or "none"}; p.attribute("name") matches any value',
        )
    return OpTerm(op, tuple(_as_term(x) for x in cls.arrange(operands)), tuple((n, given[n]) for n in fields))


# -- patterns --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pattern:
    """A traced pattern: its root, the possible ops of a root, the names that it captures, and its least number of
    ops.
    """

    root: PatternTerm
    root_ops: tuple[str, ...]
    captures: frozenset[str]
    size: int

    @staticmethod
    def trace(function: Callable[..., Any]) -> Pattern:
        """Call a pattern function with terms. Raises PassError if the result is not a pattern."""
        names = list(inspect.signature(function).parameters)[1:]
        root = _as_term(function(Vocabulary(), *(Wildcard(n) for n in names)))
        roots = root.options if isinstance(root, EitherTerm) else (root,)
        ops = [r.op for r in roots if isinstance(r, OpTerm)]
        if root is None or len(ops) != len(roots):
            raise PassError("a pattern's root must be an op, or p.either of several ops")
        captures = frozenset(names) | frozenset(_captures(root))
        return Pattern(root, tuple(dict.fromkeys(ops)), captures, _least_ops(root))


def _captures(term: PatternTerm | None) -> Iterator[str]:
    if isinstance(term, EitherTerm):
        for option in term.options:
            yield from _captures(option)
    elif isinstance(term, OpTerm):
        if term.name is not None:
            yield term.name
        for operand in term.operands:
            yield from _captures(operand)
        yield from (a.name for _, a in term.attributes if isinstance(a, Wildcard))
    elif isinstance(term, (Wildcard, ConstantTerm)) and term.name is not None:
        yield term.name


def _least_ops(term: PatternTerm | None) -> int:
    if isinstance(term, EitherTerm):
        return min(_least_ops(o) for o in term.options)
    return 1 + sum(map(_least_ops, term.operands)) if isinstance(term, OpTerm) else 0

"""Values of a kernel for threads: scalar expressions of one thread, and vectors whose lanes are threads.

A vector of N lanes is stored in a group of L threads:

    N = 1        a scalar: all threads have the same number
    N = m L      thread t has lanes t, L + t, ..., (m - 1) L + t, as m parts
    N < L        thread t has lane t % N; N divides L

An expression is evaluated where it is used, once for each use; `Emitter.let` evaluates it once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from treadle.ir.errors import BackendError

INDEX = "i64"
"""Type of indices and sizes."""
_INTEGERS = ("i64", "i32", "i16", "i8", "u8", "bf16", "f16")


@dataclass(frozen=True, eq=False)
class ThreadNode:
    """An expression of one thread.

    op     `const`, `variable`, `lane` (the thread's number in its group), `load`, `select`, `cast`, `bits`, `call`,
           `table` (an entry of a constant table by the thread's number), or an operator as in C
    type   name of a dtype; f16 and bf16 numbers are their bits
    data   value of a constant, name of a variable or function, `Access` of a load, entries of a table
    source the value of a variable that `let` binds
    """

    op: str
    type: str
    args: tuple[ThreadNode, ...] = ()
    data: Any = None
    source: ThreadNode | None = None

    def __repr__(self) -> str:
        return f"{self.op}({', '.join(map(repr, self.args))}{'' if self.data is None else self.data})"


def constant(value: float | int | bool, type: str) -> ThreadNode:
    return ThreadNode("const", type, (), value)


LANE = ThreadNode("lane", INDEX)


def is_constant(node: ThreadNode) -> bool:
    return node.op == "const"


ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a // b,
    "%": lambda a, b: a % b,
    "min": min,
    "max": max,
}
COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
}


def operation(op: str, a: ThreadNode, b: ThreadNode) -> ThreadNode:
    """Return a binary operation. Index arithmetic on constants is folded."""
    type = "bool" if op in COMPARISONS or op in ("&&", "||") else a.type
    if a.type == INDEX:
        if is_constant(a) and is_constant(b):
            if op in COMPARISONS:
                return constant(COMPARISONS[op](a.data, b.data), "bool")
            if op in ARITHMETIC and (op not in "/%" or (b.data > 0 and a.data >= 0)):
                return constant(ARITHMETIC[op](a.data, b.data), INDEX)
        if is_constant(b) and (op, b.data) in (("+", 0), ("-", 0), ("*", 1), ("/", 1)):
            return a
        if is_constant(a) and (op, a.data) in (("+", 0), ("*", 1)):
            return b
        if op == "*" and any(is_constant(x) and x.data == 0 for x in (a, b)):
            return constant(0, INDEX)
        if op == "%" and is_constant(b) and b.data == 1:
            return constant(0, INDEX)
    return ThreadNode(op, type, (a, b))


def table(entries: Sequence[int]) -> ThreadNode:
    """Return an index that depends on the thread: a formula if there is a simple one, otherwise a table."""
    first, count = entries[0], len(entries)
    if all(e == first for e in entries):
        return constant(first, INDEX)
    step = entries[1] - first
    if step > 0:
        line = operation("+", constant(first, INDEX), operation("*", constant(step, INDEX), LANE))
        if all(e == first + step * t for t, e in enumerate(entries)):
            return line
        if all(e == (first + step * t) % count for t, e in enumerate(entries)):
            return operation("%", line, constant(count, INDEX))
    return ThreadNode("table", INDEX, (), tuple(entries))


def loads_of(node: ThreadNode) -> list[ThreadNode]:
    """Return every load in an expression, without the values of variables."""
    found = [node] if node.op == "load" else []
    for arg in node.args:
        found += loads_of(arg)
    if node.op == "load":
        found += loads_of(node.data.base)
        if node.data.offset is not None:
            found += loads_of(node.data.offset)
    return found


def expanded(node: ThreadNode) -> ThreadNode:
    """Return the value of a variable that `let` binds to an expression without loads, otherwise the node."""
    while node.op == "variable" and node.source is not None and not loads_of(node.source):
        node = node.source
    return node


def divided(node: ThreadNode, by: int) -> ThreadNode | None:
    """Return an index divided by a constant, or None if it is not known to be a multiple of it."""
    if by == 1:
        return node
    node = expanded(node)
    if is_constant(node):
        return constant(node.data // by, INDEX) if node.data % by == 0 else None
    if node.op == "*":
        for x, y in (node.args, node.args[::-1]):
            quotient = divided(x, by)
            if quotient is not None:
                return operation("*", quotient, y)
    if node.op in "+-":
        parts = [divided(x, by) for x in node.args]
        if parts[0] is not None and parts[1] is not None:
            return operation(node.op, parts[0], parts[1])
    return None


@dataclass(frozen=True)
class Remainder:
    """The terms of an index that are not known to be multiples of a number.

    terms  texts of the terms, each with its factor
    names  the variables in these terms
    """

    terms: frozenset[tuple[str, int]] = frozenset()
    names: frozenset[str] = frozenset()


NOTHING = Remainder()
"""The remainder of a multiple."""


def remainder(node: ThreadNode, by: int) -> Remainder | None:
    """Return the terms of an index that are not known to be multiples of `by`; None if the index contains a load.

    Two indices with equal remainders differ by a multiple of `by`, if their variables have the same values.
    """
    if loads_of(node):
        return None
    terms: dict[str, int] = {}
    names: dict[str, set[str]] = {}

    def add(x: ThreadNode, factor: int) -> None:
        if is_constant(x):
            terms[""] = terms.get("", 0) + factor * x.data
        elif x.op in "+-" and len(x.args) == 2:
            add(x.args[0], factor)
            add(x.args[1], factor if x.op == "+" else -factor)
        elif x.op == "*" and any(map(is_constant, x.args)):
            constants_last = sorted(x.args, key=is_constant)
            add(constants_last[0], factor * constants_last[1].data)
        else:
            terms[repr(x)] = terms.get(repr(x), 0) + factor
            names[repr(x)] = variables_of(x)

    add(node, 1)
    left = frozenset((text, f % by) for text, f in terms.items() if f % by)
    return Remainder(left, frozenset().union(*(names.get(text, set()) for text, _ in left)))


def variables_of(node: ThreadNode) -> set[str]:
    """Return the names of the variables in an expression."""
    found = {node.data} if node.op == "variable" else set()
    return found.union(*map(variables_of, node.args)) if node.args else found


class GroupValue:
    """A scalar or a vector: one expression for each part. Operators work lane by lane, as in specifications."""

    def __init__(self, parts: Sequence[ThreadNode], lanes: int = 1) -> None:
        self._parts, self.lanes = tuple(parts), lanes

    @property
    def parts(self) -> tuple[ThreadNode, ...]:
        return self._parts

    @property
    def type(self) -> str:
        return self.parts[0].type

    @property
    def node(self) -> ThreadNode:
        """The expression of a scalar. Raises BackendError for a vector."""
        if self.lanes != 1:
            raise BackendError("a kernel uses a vector where it needs a scalar", received=f"{self.lanes} lanes")
        return self.parts[0]

    def joined(self, op: str, other: Any, *, swapped: bool = False) -> GroupValue:
        """Return a binary operation on this value and another value or a Python number."""
        if not isinstance(other, GroupValue):
            other = GroupValue([constant(other, self.type)] * len(self.parts), self.lanes)
        if other.lanes != self.lanes or other.type != self.type:
            raise BackendError(
                f"a kernel combines values of two kinds by {op}",
                received=f"{self.type} x {self.lanes}, {other.type} x {other.lanes}",
            )
        x, y = (other, self) if swapped else (self, other)
        return GroupValue([operation(op, a, b) for a, b in zip(x.parts, y.parts, strict=True)], self.lanes)

    def mapped(self, make: Callable[[ThreadNode], ThreadNode]) -> GroupValue:
        """Return the value whose parts are computed from this value's parts."""
        return GroupValue([make(part) for part in self.parts], self.lanes)

    def __add__(self, other: Any) -> GroupValue:
        return self.joined("+", other)

    def __radd__(self, other: Any) -> GroupValue:
        return self.joined("+", other, swapped=True)

    def __sub__(self, other: Any) -> GroupValue:
        return self.joined("-", other)

    def __rsub__(self, other: Any) -> GroupValue:
        return self.joined("-", other, swapped=True)

    def __mul__(self, other: Any) -> GroupValue:
        return self.joined("*", other)

    def __rmul__(self, other: Any) -> GroupValue:
        return self.joined("*", other, swapped=True)

    def __truediv__(self, other: Any) -> GroupValue:
        return self.joined("/", other)

    def __neg__(self) -> GroupValue:
        return self.mapped(lambda x: ThreadNode("neg", x.type, (x,)))

    def __and__(self, other: Any) -> GroupValue:
        return self.joined("&", other)

    def __or__(self, other: Any) -> GroupValue:
        return self.joined("|", other)

    def __xor__(self, other: Any) -> GroupValue:
        return self.joined("^", other)

    def __lshift__(self, other: Any) -> GroupValue:
        return self.joined("<<", other)

    def __rshift__(self, other: Any) -> GroupValue:
        return self.joined(">>", other)

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> GroupValue:  # type: ignore[override]
        return self.joined("==", other)

    def __ne__(self, other: object) -> GroupValue:  # type: ignore[override]
        return self.joined("!=", other)

    def __lt__(self, other: Any) -> GroupValue:
        return self.joined("<", other)

    def __le__(self, other: Any) -> GroupValue:
        return self.joined("<=", other)

    def __gt__(self, other: Any) -> GroupValue:
        return self.joined(">", other)

    def __ge__(self, other: Any) -> GroupValue:
        return self.joined(">=", other)


def index_node(value: Any) -> ThreadNode:
    """Return an index, which is an integer or a scalar of any integer type, as an expression."""
    if not isinstance(value, GroupValue):
        return constant(int(value), INDEX)
    node = value.node
    return node if node.type == INDEX else ThreadNode("cast", INDEX, (node,))

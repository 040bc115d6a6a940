"""A generation step as an op sees it: what `Op.stepped` builds with, and the values that it is given.

A step adds s tokens to each of b rows. Row n of the call lives in slot rows[n] of every cache, and its first new token
stands at position start[n]. An op that does more with the tokens' axis than map it says in `Op.stepped` what it does
at a step: a causal attention appends its keys and values and reads the slot, a cumulative sum goes on from the sum so
far, a count from the position so far.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from treadle.ir.builder import Builder, Expr
from treadle.ir.sizing.sizes import ONE, Size
from treadle.ir.types import Dim, DType, Type, i64

Held = Sequence[frozenset[int]]
"""For each operand of an op the dimensions that are the tokens' axis."""


@dataclass(frozen=True)
class Kept:
    """An operand that does not depend on the tokens: the prologue left it in a state.

    state    [R, ...], a slot a row
    rows     i64[b], the slot of each row of the step
    length   i64[b]: how much is real of the one dimension of the state that has a capacity; None where all sizes are
             those of the operand
    is_flat  the operand is [b], and the state [R, 1]
    """

    state: Expr
    rows: Expr
    length: Expr | None
    is_flat: bool

    def read(self) -> Expr:
        """The rows of the step, [b, ...]."""
        b = self.state.builder
        found: Expr = b.gather(self.state, self.rows, axis=0)
        return b.rearrange(found, pattern="b 1 -> b") if self.is_flat else found


@dataclass(frozen=True)
class Stepping:
    """A step under construction.

    b         adds to the function that is built
    rows      i64[b]: the slot of each row
    start     i64[b]: the position of each row's first new token
    first     i64[b]: the position of each row's first query: start, but where only the last token's result is wanted
    count     i64[b]: how many tokens of each row are real; asked for where what follows a row's end would count
    slots     how many slots a state has
    capacity  how many positions a cache has
    cache     the dtype in which caches hold keys and values; None: their own
    state     a state of the node that is stepped, as it is by then: by its last name, and its type
    """

    b: Builder
    rows: Expr
    start: Expr
    first: Expr
    count: Callable[[], Expr]
    slots: Size
    capacity: Size
    cache: DType | None
    state: Callable[[str, Type], Expr]

    def positions(self, size: Size) -> Expr:
        """i64[b, size]: where each row's tokens stand."""
        b = self.b
        first: Expr = b.rearrange(self.start, pattern="b -> b 1")
        return first if size == ONE else first + b.rearrange(b.iota(size=size, dtype=i64), pattern="s -> 1 s")

    def beside(self, x: Expr, other: Expr, dims: Sequence[int]) -> Expr:
        """x, whose dimensions are these of another value, laid out against it: with 1 for the others."""
        if x.rank == other.rank:
            return x
        names = [f"x{n}" for n in range(x.rank)]
        spread = ["1"] * other.rank
        for name, dim in zip(names, dims, strict=True):
            spread[dim] = name
        made: Expr = self.b.rearrange(x, pattern=f"{' '.join(names)} -> {' '.join(spread)}")
        return made

    def append(self, name: str, x: Expr, axis: int, *, ring: str = "") -> Expr:
        """A cache with x [b, ...] appended along an axis; a ring where the symbol of its capacity is given.

        Its slots are all that was appended: [R, ...].
        """
        capacity = Size.symbol(ring) if ring else self.capacity
        state = self.state(name, _slots(x, self.slots, axis, capacity))
        made: Expr = self.b.append(state, x, self.rows, self.start, axis=axis, ring=bool(ring))
        return made

    def carried(self, name: str, like: Expr, axis: int) -> Expr:
        """What `carry` left for each row, of size 1 along the axis; like [b, ...] says the other sizes."""
        state = self.state(name, _slots(like, self.slots, axis, ONE))
        found: Expr = self.b.gather(state, self.rows, axis=0)
        return found

    def carry(self, name: str, x: Expr, axis: int) -> None:
        """Keep x [b, ...], of size 1 along the axis, for the next step."""
        state = self.state(name, _slots(x, self.slots, axis, ONE))
        self.b.append(state, x, self.rows, self.zeros(), axis=axis)

    def zeros(self) -> Expr:
        """i64[b]: position 0 of each row."""
        found: Expr = self.b.expand(self.b.constant(0, i64), shape=self.rows.shape)
        return found


def _slots(x: Expr, slots: Size, axis: int, size: Size) -> Type:
    """The type of a state with a slot for each row of x, and another size along an axis."""
    dims = [Dim.of(slots), *x.type.dims[1:]]
    dims[axis] = Dim.of(size)
    return Type(x.dtype, tuple(dims))

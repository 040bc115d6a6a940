"""A generation step as an op sees it: the builder for `Op.stepped`, and the values that `Op.stepped` receives.

A step adds s tokens to each of b rows. Row n of the call uses slot rows[n] of every cache, and its first new token has
position start[n]. If an op does more with the tokens' axis than map it, the op defines its step form in `Op.stepped`: a
causal attention appends its keys and values and reads the slot, a cumulative sum continues from the sum so far, and
iota continues from the position so far.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from treadle.ir.builder import Builder, Expr
from treadle.ir.sizing.sizes import ONE, Size
from treadle.ir.types import Dim, DType, Type, i64

Held = Sequence[frozenset[int]]
"""For each operand of an op, its dimensions that are the tokens' axis."""


@dataclass(frozen=True)
class Kept:
    """An operand that does not depend on the tokens, and that the prologue stored in a state.

    state    [R, ...], one slot per row
    rows     i64[b], the slot of each row of the step
    length   i64[b]: the filled length of the one dimension of the state that has a capacity; None if all sizes equal
             the sizes of the operand
    is_flat  True if the operand is [b], and the state [R, 1]
    """

    state: Expr
    rows: Expr
    length: Expr | None
    is_flat: bool

    def read(self) -> Expr:
        """Return the operand for the rows of the step, [b, ...]."""
        b = self.state.builder
        found: Expr = b.gather(self.state, self.rows, axis=0)
        return b.rearrange(found, pattern="b 1 -> b") if self.is_flat else found


@dataclass(frozen=True)
class Stepping:
    """A step under construction.

    b         the builder of the step function
    rows      i64[b]: the slot of each row
    start     i64[b]: the position of each row's first new token
    first     i64[b]: the position of each row's first query: start, unless only the last token's result is wanted
    count     returns i64[b], the number of real tokens of each row; called if tokens after a row's end would count
    slots     the number of slots in a state
    capacity  the number of positions in a cache
    cache     the dtype in which caches hold keys and values; None: the dtype of the keys and values
    state     returns the current version of a state of the node, by the last part of its name, and its type
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
        """Return i64[b, size]: the positions of each row's tokens."""
        b = self.b
        first: Expr = b.rearrange(self.start, pattern="b -> b 1")
        return first if size == ONE else first + b.rearrange(b.iota(size=size, dtype=i64), pattern="s -> 1 s")

    def beside(self, x: Expr, other: Expr, dims: Sequence[int]) -> Expr:
        """Lay out x against another value. The dimensions of x are the dimensions `dims` of that value; each of its
        other dimensions gets size 1.
        """
        if x.rank == other.rank:
            return x
        names = [f"x{n}" for n in range(x.rank)]
        spread = ["1"] * other.rank
        for name, dim in zip(names, dims, strict=True):
            spread[dim] = name
        made: Expr = self.b.rearrange(x, pattern=f"{' '.join(names)} -> {' '.join(spread)}")
        return made

    def append(self, name: str, x: Expr, axis: int, *, ring: str = "") -> Expr:
        """Return a cache with x [b, ...] appended along an axis; a ring if `ring` is the symbol of its capacity.

        The result has all slots of the cache: [R, ...].
        """
        capacity = Size.symbol(ring) if ring else self.capacity
        state = self.state(name, _slots(x, self.slots, axis, capacity))
        made: Expr = self.b.append(state, x, self.rows, self.start, axis=axis, ring=bool(ring))
        return made

    def carried(self, name: str, like: Expr, axis: int) -> Expr:
        """Return the value that `carry` stored for each row, of size 1 along the axis. Its other sizes are those of
        `like` [b, ...].
        """
        state = self.state(name, _slots(like, self.slots, axis, ONE))
        found: Expr = self.b.gather(state, self.rows, axis=0)
        return found

    def carry(self, name: str, x: Expr, axis: int) -> None:
        """Store x [b, ...], of size 1 along the axis, for the next step."""
        state = self.state(name, _slots(x, self.slots, axis, ONE))
        self.b.append(state, x, self.rows, self.zeros(), axis=axis)

    def zeros(self) -> Expr:
        """Return i64[b] of zeros: the first position of each row."""
        found: Expr = self.b.expand(self.b.constant(0, i64), shape=self.rows.shape)
        return found


def _slots(x: Expr, slots: Size, axis: int, size: Size) -> Type:
    """Return the type of a state: the type of x with `slots` rows, and `size` along `axis`."""
    dims = [Dim.of(slots), *x.type.dims[1:]]
    dims[axis] = Dim.of(size)
    return Type(x.dtype, tuple(dims))

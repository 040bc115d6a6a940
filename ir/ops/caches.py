"""Ops on caches: states with slots. Each row writes into its own slot, from its own position on.

    append       "@r h @c d, [b] h [s] d, [b], [b] -> @r h @c d"

Slots and positions are indexed, and the result has both axes: elements that are not written stay unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from treadle.ir.builder import Builder, Expr
from treadle.ir.errors import GraphError, RuleError
from treadle.ir.op_registry import op
from treadle.ir.operation import Demand, Grads, Operand, Primitive
from treadle.ir.ops.axis_names import axis_letters, place
from treadle.ir.ops.shapes import zeros
from treadle.ir.samples import S
from treadle.ir.types import Type


@op("append", dtypes="t, t, i64, i64 -> t", linear="state x", flops=0)
class Append(Primitive):
    """y = state, then y[rows[b], ..., start[b] + i, ...] = x[b, ..., i, ...] for every row b and position i

    state has slots along its first axis and a capacity C along `axis`. x has rows along its first axis, s new positions
    along `axis`, and otherwise the sizes of state. rows[b] is the slot of row b, start[b] the position of its first new
    element. In a ring, positions count modulo C.

    Two rows of one call never write into one slot. Without a ring start[b] + s <= C, in a ring s <= C. The reference
    raises GraphError for other operands; a backend refuses positions outside the state.
    """

    moves_blocks = True
    state = Operand()
    x = Operand()
    rows = Operand()
    start = Operand()
    axis: int
    ring: bool = False
    updates = {0: 0}

    def axis_rule(self, ranks: Sequence[int | None]) -> str:
        rank = ranks[0] or 0
        axis = place(self.axis, rank)
        names = axis_letters(rank + 2)
        b, s = names[rank:]
        state, x = list(names[:rank]), list(names[:rank])
        state[0], x[0] = f"@{names[0]}", f"[{b}]"
        if axis:
            state[axis], x[axis] = f"@{names[axis]}", f"[{s}]"
        kept = " ".join(state)
        return f"{kept}, {' '.join(x)}, [{b}], [{b}] -> {kept}"

    def check(self, types: Sequence[Type | None]) -> None:
        state = types[0]
        if state is not None and place(self.axis, state.rank) == 0:
            raise RuleError("axis 0 of a state holds its slots; positions need another axis", hint="axis=1")

    def demands(self, types: Sequence[Type | None]) -> Sequence[Demand]:
        state, x = types[:2]
        assert state is not None
        assert x is not None
        if x.rank != state.rank:
            return ()
        room = state.shape[self.axis] - x.shape[self.axis]
        return [(room, f"state holds {state.shape[self.axis]} positions, x has {x.shape[self.axis]}")]

    def reference(self, state: Any, x: Any, rows: Any, start: Any) -> Any:
        axis = place(self.axis, state.ndim)
        check_slots(self.name, rows, state.shape[0])
        check_room(self.name, start, x.shape[axis], state.shape[axis], ring=self.ring)
        slots = (start[:, None] + np.arange(x.shape[axis])) % state.shape[axis]
        y = np.array(state)
        np.moveaxis(y, axis, 1)[rows[:, None], slots] = np.moveaxis(x, axis, 1)
        return y

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        """Build the gradient: zero for overwritten elements; x gets the gradient of the positions that it was written
        to.
        """
        (g,), (state, x, rows, start) = grads, inputs
        axis = place(self.axis, state.rank)
        kept = b.append(g, zeros(b, x.type), rows, start, axis=axis, ring=self.ring)
        names = axis_letters(state.rank)
        slots = b.rearrange(start, pattern="b -> b 1") + b.iota(size=x.shape[axis])
        if self.ring:
            slots = slots % state.shape[axis]
        spread = " ".join("b" if n == 0 else "s" if n == axis else "1" for n in range(len(names)))
        slots = b.expand(b.rearrange(slots, pattern=f"b s -> {spread}"), shape=x.shape)
        return [kept, b.take_along_axis(b.gather(g, rows, axis=0), slots, axis=axis), None, None]

    samples = [
        S("f32[3,4]", "f32[2,2]", "i64[2] distinct", "i64[2] < 3", axis=1),
        S("f32[4,2,5,3]", "f32[3,2,2,3]", "i64[3] distinct", "i64[3] < 4", axis=2),
        S("f32[2,5,3]", "f32[2,4,3]", "i64[2] distinct", "i64[2] < 9", axis=1, ring=True),
        S("f32[3,2,4]", "f32[1,2,4]", "i64[1] < 3", "i64[1] < 1", axis=-1),
        S("i64[3,4]", "i64[2,1]", "i64[2] distinct", "i64[2] < 4", axis=1),
    ]
    errors = [
        (S("f32[3,4]", "f32[2,2]", "i64[2]", "i64[2]", axis=0), "axis 0 of a state holds its slots"),
        (S("f32[3,4]", "f32[2,5]", "i64[2]", "i64[2]", axis=1), "state holds 4 positions, x has 5"),
        (S("f32[3,4]", "f32[2,5]", "i64[2]", "i64[2]", axis=1, ring=True), "state holds 4 positions, x has 5"),
        (S("f32[3,4]", "f16[2,2]", "i64[2]", "i64[2]", axis=1), "state is f32, x is f16"),
        (S("f32[3,4]", "f32[2,2]", "i64[3]", "i64[2]", axis=1), "sizes disagree"),
        (S("f32[3,4,2]", "f32[2,2,1]", "i64[2]", "i64[2]", axis=1), "sizes disagree"),
        (S("f32[3,4]", "f32[2,2]", "i64[2]", "i64[2]", axis=2), "there is no axis 2"),
    ]


def check_slots(op: str, rows: Any, slots: int) -> None:
    """Raise GraphError if a row's slot is outside the state, or if two rows have the same slot."""
    outside = np.flatnonzero((rows < 0) | (rows >= slots))
    if outside.size:
        row = int(outside[0])
        raise GraphError(f"{op}: row {row} has slot {rows[row]}, but the state has {slots} slots")
    if len(set(rows.tolist())) < len(rows):
        raise GraphError(f"{op}: two rows have the same slot", received=f"rows {rows.tolist()}"[:200])


def check_room(op: str, start: Any, count: int, capacity: int, *, ring: bool) -> None:
    """Raise GraphError if a row starts below 0 or, without a ring, ends beyond the capacity."""
    for row, first in enumerate(start.tolist()):
        if first < 0 or (not ring and first + count > capacity):
            raise GraphError(f"{op}: row {row} has no room: it starts at {first}, the capacity is {capacity}")

"""Collectives: ops in which the ranks of a mesh axis exchange parts of a value.

Programs of ranks contain them (`treadle.passes.sharding`); models do not use them directly. A collective communicates
among the `ways` ranks that differ along `over`, parts of mesh axes. `because` gives the reason for it. Its meaning is a
function of the operands of all ranks in the group (`combined`); with one rank it is the identity.

    all_reduce        every rank gets the sum (or another reduction) of the operands
    all_gather        every rank gets all parts, concatenated along a dimension
    reduce_scatter    every rank gets its part of the sum
    all_to_all        parts along one dimension become parts along another
    pass_on           every rank sends its part to the next one, and receives the part of the preceding rank
    hand_on           one rank of a line sends a value to another rank
    start_gather      starts an all_gather, which is awaited where its result is read
    start_pass        starts a pass_on in the same way

The number of bytes is the number that each rank sends in a ring, in which each rank sends to the next (Patarasuk & Yuan
2009).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import reduce
from typing import Any

import numpy as np

from treadle.ir.axes import MONOIDS
from treadle.ir.builder import Builder, Expr
from treadle.ir.errors import GraphError, RuleError
from treadle.ir.op_registry import op
from treadle.ir.operation import Grads, Operand, Primitive
from treadle.ir.ops.axis_names import axis_letters, place, resized, sized, symbols_in
from treadle.ir.placement.meeting import begun, exchanged
from treadle.ir.sizing.sizes import Size
from treadle.ir.types import Type

_COMBINE = {
    "sum": np.add,
    "prod": np.multiply,
    "max": np.maximum,
    "min": np.minimum,
    "and": np.logical_and,
    "or": np.logical_or,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective(Primitive):
    """Base of all collectives.

    over     parts of mesh axes, as `Mesh.parts_of` parses them
    ways     the number of ranks that communicate
    because  the reason for the collective: "the split of ffn is summed"
    """

    is_word = False
    meets_ranks = True
    over: str
    ways: int
    because: str = ""

    def check(self, types: Sequence[Type | None]) -> None:
        if self.ways < 1:
            raise RuleError(f"ways must be 1 or more, is {self.ways}")

    def reference(self, x: Any) -> Any:
        return exchanged(self, x)

    def combined(self, ops: Sequence[Any], parts: Sequence[Any]) -> list[Any]:
        """Return the result of each rank in order. `ops` and `parts` are each rank's op and operand; the ops may
        differ in sizes.
        """
        raise GraphError(f"op {self.name} does not define `combined`")

    @property
    def group(self) -> dict[str, Any]:
        """The attributes that define the group of ranks, and the reason for the collective."""
        return {"over": self.over, "ways": self.ways, "because": self.because}

    def among(self, ranks: Sequence[int]) -> tuple[int, ...]:
        """Return the ranks that communicate, in order. `ranks` are the ranks that differ along `over`."""
        return tuple(ranks)

    @property
    def meeting(self) -> tuple[Any, ...]:
        """The properties that must be equal on all ranks of the group: all but the sizes of the ranks' own parts."""
        own = {name: value for name, value in self.attributes.items() if name not in ("size", "whole")}
        return self.name, *own.items()

    def payload(self, taken: int, given: int) -> int:
        """Return the size in bytes of the value that is communicated. `taken` and `given` are the sizes in bytes of a
        rank's operand and result.
        """
        return max(taken, given)

    @property
    def rounds(self) -> float:
        """The number of times that a rank sends its share of the payload, which is 1/ways of the payload: once to each
        other rank.
        """
        return self.ways - 1

    @property
    def messages(self) -> float:
        """The number of messages that a rank waits for, one after the other."""
        return self.rounds


@op("all_reduce", axes="... -> ...", dtypes="t -> t")
class AllReduce(Collective):
    """y = x_0 + x_1 + ..., over the ranks of the group, on every rank

    monoid  the reduction: "sum", "max", ...
    """

    x = Operand()
    monoid: str = "sum"

    @property
    def linear(self) -> tuple[frozenset[str], ...]:
        """The sum is linear in the operands of all ranks together; other reductions are not linear."""
        return (frozenset(["x"]),) if self.monoid == "sum" else ()

    def check(self, types: Sequence[Type | None]) -> None:
        super().check(types)
        if self.monoid not in MONOIDS:
            raise RuleError(f"unknown reduction {self.monoid!r}", hint="one of " + ", ".join(MONOIDS))

    def combined(self, ops: Sequence[Any], parts: Sequence[Any]) -> list[Any]:
        return [reduce(_COMBINE[self.monoid], parts)] * len(parts)

    @property
    def rounds(self) -> float:
        """Twice the number of an all-gather: a reduce-scatter, then an all-gather."""
        return 2 * (self.ways - 1)

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        """Build the gradient of a sum: the sum of all ranks' gradients, since the gradient on each rank is only a
        partial sum.
        """
        if self.monoid != "sum":
            raise GraphError(f"all_reduce by {self.monoid} has no gradient")
        return [b.apply("all_reduce", grads[0], **self.group)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Along(Collective):
    """A collective that changes the size of a dimension.

    axis  the dimension
    size  the size of the dimension in the result
    """

    axis: int
    size: Size

    def axis_rule(self, ranks: Sequence[int | None]) -> str:
        names = axis_letters(ranks[0] or 0, symbols_in([self.size]))
        left, right = resized(names, place(self.axis, len(names)), self.size)
        return f"{left} -> {right}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Awaited(_Along):
    """A collective that another op may have started.

    ahead  True if a `Starting` op has started it: the first op of its kind over the same axes that is not awaited yet
    """

    ahead: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Starting(_Along):
    """An op that starts a collective. The collective has `ahead=True`, reads the same x, and waits for its completion.

    If ranks run in lockstep, the op does nothing.
    """

    stops_gradient = True

    def axis_rule(self, ranks: Sequence[int | None]) -> str:
        names = axis_letters(ranks[0] or 0, symbols_in([self.size]))
        return f"{' '.join(f'[{name}]' for name in names)} -> {' '.join('1' for _ in names)}"

    def reference(self, x: Any) -> Any:
        return begun(self, x)

    @property
    def awaited(self) -> Awaited:
        """The collective that the op starts."""
        raise GraphError(f"op {self.name} does not define `awaited`")


@op("all_gather", dtypes="t -> t", linear="x", flops=0)
class AllGather(Awaited):
    """y = [x_0, x_1, ...] along a dimension, on every rank"""

    moves_blocks = True
    x = Operand()

    def combined(self, ops: Sequence[Any], parts: Sequence[Any]) -> list[Any]:
        return [np.concatenate(parts, axis=self.axis)] * len(parts)

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        (g,), (x,) = grads, inputs
        size = x.shape[place(self.axis, x.rank)]
        return [b.apply("reduce_scatter", g, **self.group, axis=self.axis, size=size)]


@op("reduce_scatter", dtypes="n -> n", linear="x")
class ReduceScatter(_Along):
    """y = the rank's part, along a dimension, of x_0 + x_1 + ..."""

    x = Operand()

    def combined(self, ops: Sequence[Any], parts: Sequence[Any]) -> list[Any]:
        return _parted(reduce(np.add, parts), ops, self.axis)

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        (g,), (x,) = grads, inputs
        size = x.shape[place(self.axis, x.rank)]
        return [b.apply("all_gather", g, **self.group, axis=self.axis, size=size)]


@op("all_to_all", dtypes="t -> t", linear="x", flops=0)
class AllToAll(_Along):
    """y = [the rank's part, along `axis`, of x_0, of x_1, ...] along the dimension `onto`

    onto   the dimension in which x is a part, and y is whole
    whole  the size of that dimension in y
    """

    x = Operand()
    onto: int
    whole: Size

    def axis_rule(self, ranks: Sequence[int | None]) -> str:
        names = list(axis_letters(ranks[0] or 0, symbols_in([self.size, self.whole])))
        left, right = list(names), list(names)
        for axis, size in ((self.axis, self.size), (self.onto, self.whole)):
            left[place(axis, len(names))] = f"[{names[place(axis, len(names))]}]"
            right[place(axis, len(names))] = sized(size)
        return f"{' '.join(left)} -> {' '.join(right)}"

    def payload(self, taken: int, given: int) -> int:
        """Return the size of the operand in bytes. If parts are uneven, the operand and result of a rank may differ in
        size, but their totals over all ranks are equal.
        """
        return taken

    def combined(self, ops: Sequence[Any], parts: Sequence[Any]) -> list[Any]:
        cut = [_parted(part, ops, self.axis) for part in parts]
        return [np.concatenate([pieces[n] for pieces in cut], axis=self.onto) for n in range(len(parts))]

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        (g,), (x,) = grads, inputs
        axis, onto = place(self.axis, x.rank), place(self.onto, x.rank)
        return [b.apply("all_to_all", g, **self.group, axis=onto, size=x.shape[onto], onto=axis, whole=x.shape[axis])]


@op("pass_on", dtypes="t -> t", linear="x", flops=0)
class PassOn(Awaited):
    """y = x of the rank `steps` before, in a ring: each rank sends to one rank, and receives from one rank

    size  the size of the dimension in the received part, if parts are uneven
    """

    x = Operand()
    steps: int = 1

    def combined(self, ops: Sequence[Any], parts: Sequence[Any]) -> list[Any]:
        return [parts[(n - self.steps) % len(parts)] for n in range(len(parts))]

    def payload(self, taken: int, given: int) -> int:
        """Return the size in bytes of the operand, which is sent."""
        return taken

    @property
    def rounds(self) -> float:
        """Number of shares (1/ways of the payload) that a rank sends: `ways`, since it sends its whole part."""
        return self.ways

    @property
    def messages(self) -> float:
        """The number of messages: one."""
        return 1

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        """Build the gradient, which is passed in the opposite direction."""
        (g,), (x,) = grads, inputs
        size = x.shape[place(self.axis, x.rank)]
        return [b.apply("pass_on", g, **self.group, axis=self.axis, size=size, steps=-self.steps)]


@op("hand_on", axes="... -> ...", dtypes="t -> t", linear="x", flops=0)
class HandOn(Collective):
    """y = x of the rank at `source`, on the rank at `target`; zeros on the rank at `source`

    Only these two of the `ways` ranks of a line communicate. The operand on the rank at `target` serves only for its
    type.
    """

    x = Operand()
    source: int
    target: int

    def check(self, types: Sequence[Type | None]) -> None:
        super().check(types)
        if self.source == self.target or not {self.source, self.target} <= set(range(self.ways)):
            raise RuleError(
                f"source and target must be two different ranks below {self.ways}, not {self.source} and {self.target}"
            )

    def among(self, ranks: Sequence[int]) -> tuple[int, ...]:
        return ranks[self.source], ranks[self.target]

    def combined(self, ops: Sequence[Any], parts: Sequence[Any]) -> list[Any]:
        return [np.zeros_like(parts[0]), parts[0]]

    @property
    def rounds(self) -> float:
        """Number of shares (1/ways of the payload) that a rank sends: `ways`, since it sends the whole value."""
        return self.ways

    @property
    def messages(self) -> float:
        """The number of messages: one."""
        return 1

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        """Build the gradient, which is sent back."""
        return [b.apply("hand_on", grads[0], **self.group, source=self.target, target=self.source)]


@op("start_gather", dtypes="t -> t", flops=0)
class StartGather(Starting):
    """y = 0, and the `all_gather` of x with the same attributes starts"""

    x = Operand()

    @property
    def awaited(self) -> AllGather:
        return AllGather(**self.group, axis=self.axis, size=self.size, ahead=True)


@op("start_pass", dtypes="t -> t", flops=0)
class StartPass(Starting):
    """y = 0, and the `pass_on` of x with the same attributes starts"""

    x = Operand()
    steps: int = 1

    @property
    def awaited(self) -> PassOn:
        return PassOn(**self.group, axis=self.axis, size=self.size, steps=self.steps, ahead=True)


def _parted(whole: Any, ops: Sequence[Any], axis: int) -> list[Any]:
    """Split a value along a dimension into parts of the sizes of each rank's op. Return the parts in order."""
    ends = np.cumsum([each.size.evaluate({}) for each in ops])
    if ends[-1] != whole.shape[axis]:
        raise GraphError(f"the parts have {ends[-1]} elements in total, but the dimension has {whole.shape[axis]}")
    return list(np.split(whole, ends[:-1], axis=axis))

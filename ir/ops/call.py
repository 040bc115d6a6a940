"""Call: a function of the graph applied to values and weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from treadle.ir.errors import GraphError, RuleError
from treadle.ir.graph import Function, Value
from treadle.ir.layouts import Layout
from treadle.ir.op_registry import op
from treadle.ir.operation import Operand, Primitive
from treadle.ir.types import Type


@op("call", flops=0)
class Call(Primitive):
    """y, ..., updated states = f(x, ..., weights, states)

    Operands are the function's inputs, its parameters, then its states; results are its outputs, then the states that
    it updates. A call holds the function's signature, so that its types are known without the function; the verifier
    compares it with the function. It has no axis rule: analyses enter the callee.
    """

    is_word = False
    arguments = Operand(optional=True, variadic=True)
    function: str
    takes: tuple[Type, ...]
    gives: tuple[Type, ...]
    takes_in: tuple[Layout | None, ...] = ()
    gives_in: tuple[Layout | None, ...] = ()
    """The layouts of the call's operands and results; empty if all are row-major."""
    updated: tuple[int, ...] = ()
    """The positions of the operands that the call's last results update."""
    meets_ranks: bool = False
    """True if ranks communicate in the function, or in a function that it calls."""

    @staticmethod
    def of(function: Function) -> Call:
        """Return a call with this function's signature."""
        first = len(function.inputs) + len(function.parameters)
        return Call(
            function=function.name,
            takes=tuple([v.type for v in function.arguments]),
            gives=tuple([v.type for v in function.results]),
            takes_in=_layouts(function.arguments),
            gives_in=_layouts(function.results),
            meets_ranks=any(node.op.meets_ranks for node in function.nodes),
            updated=tuple([first + at for at, name in enumerate(function.states) if name in function.updated]),
        )

    @cached_property
    def updates(self) -> Mapping[int, int]:  # type: ignore[override]
        first = len(self.gives) - len(self.updated)
        return {first + number: at for number, at in enumerate(self.updated)}

    @property
    def callee(self) -> str:  # type: ignore[override]
        return self.function

    def result_layout(self, index: int) -> Layout | None:
        return self.gives_in[index] if self.gives_in else None

    def infer(self, types: Sequence[Type | None]) -> tuple[Type, ...]:
        if tuple(types) == self.takes:  # compared as a whole: fast if the types are the same objects
            return self.gives
        if len(types) != len(self.takes):
            raise RuleError(f"{self.function} takes {len(self.takes)} arguments, received {len(types)}")
        position = next(i for i, (wanted, got) in enumerate(zip(self.takes, types, strict=True)) if wanted != got)
        raise RuleError(f"{self.function}: argument {position} must be {self.takes[position]}, is {types[position]}")

    def reference(self, *operands: Any) -> Any:
        raise GraphError("a call has no reference of its own: interpret the graph")


def _layouts(values: Iterable[Value]) -> tuple[Layout | None, ...]:
    """Return the layouts of values, or an empty tuple if all are row-major."""
    found = tuple([v.layout for v in values])
    return found if any(found) else ()

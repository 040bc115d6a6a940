"""Donated inputs: arrays that a caller donates with a call, so that the run may overwrite them.

    exe = treadle.compile(model, donate=("x",))
    x = exe(x=x)["y"]                 # y may be stored in x's memory; the old contents of x are now undefined

The run must be able to use a donated array without a conversion. Otherwise it would overwrite a copy, or memory that
was not donated. So any other array is refused before anything is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from treadle.backends.protocol import Outputs, Port
from treadle.ir.errors import BackendError, Hint
from treadle.ir.graph import Function, Graph
from treadle.passes.memory.storage_plan import StoragePlan

Span = tuple[int, int]
"""The address of the first byte, and the address after the last."""


def check_names(graph: Graph, names: Sequence[str]) -> tuple[str, ...]:
    """Return the names without duplicates. Raises BackendError for a name that is not an input of the last entry."""
    known = [value.name for value in graph.main.inputs]
    unknown = [name for name in names if name not in known]
    if isinstance(names, str) or unknown:
        raise BackendError(
            "donate= must be names of inputs",
            received=repr(names) if isinstance(names, str) else ", ".join(map(repr, unknown)),
            within=f"{graph.name}({', '.join(known)})",
            hint=Hint(f"donate=({known[0]!r},)", f"--donate {known[0]}") if known else None,
        )
    return tuple(dict.fromkeys(names))


class Donated:
    """The donated inputs of an entry.

    names  the names of these inputs
    """

    def __init__(self, plan: StoragePlan | None, entry: Function) -> None:
        planned = None if plan is None else plan.functions[entry.name]
        self.names = frozenset(value.name for value in planned.donated) if planned is not None else frozenset()

    def check(self, ports: Sequence[Port], given: Mapping[str, Any], taken: Sequence[Any], held: Iterable[Any]) -> None:
        """Raise BackendError if the run would not overwrite exactly the donated arrays.

        given  the caller's arguments, by name
        taken  the arrays that the run reads, in the order of the ports
        held   arrays that outlive the call: weights and states
        """
        if not self.names:
            return
        spans = {port.name: span_of(given[port.name]) for port in ports}
        others = [span_of(each) for each in held]
        shared = meeting([*spans.values(), *others])
        for at, (port, array) in enumerate(zip(ports, taken, strict=True)):
            if port.name not in self.names:
                continue
            value, span = given[port.name], spans[port.name]
            why = _unfit(value)
            if span is None or why is not None:
                raise _refused(port, value, why or "it is not an array")
            if array is not value and span[0] < span[1] and span_of(array) != span:
                raise _refused(port, value, "it would be converted, so that only a copy would be overwritten")
            if at in shared:
                alike = [name for name, other in spans.items() if name != port.name and _meet(span, other)]
                whom = f"input {alike[0]}" if alike else "a weight or a state"
                raise _refused(port, value, f"it shares memory with {whom}")

    def returned(self, arguments: Mapping[str, Any], outputs: Outputs) -> Outputs:
        """Return the outputs. If an output is stored in a donated array, the result is the caller's own array.

        A new view of the array would refer to the previous view. A loop of calls would then build a chain of views that
        grows with each call.
        """
        donated = {span_of(arguments[name]): arguments[name] for name in self.names}
        for name, array in outputs.items() if donated else ():
            own = donated.get(span_of(array))
            if own is not None and type(own) is type(array) and (own.dtype, own.shape) == (array.dtype, array.shape):
                outputs[name] = own
        return outputs


def _unfit(value: Any) -> str | None:
    """Return the reason why an array cannot be overwritten, or None."""
    if isinstance(value, np.ndarray):
        if not value.flags.writeable:
            return "it is read-only"
        return None if value.flags.c_contiguous else "it is not contiguous"
    if hasattr(value, "data_ptr"):
        if value.requires_grad:
            return "it needs a gradient"
        return None if value.is_contiguous() else "it is not contiguous"
    return None


def span_of(value: Any) -> Span | None:
    """Return the address range of an array or a tensor. Return None for other objects and opaque layouts (mkldnn)."""
    if isinstance(value, np.ndarray):
        begin, strides, item = value.__array_interface__["data"][0], value.strides, value.itemsize
        if value.flags.c_contiguous:
            return begin, begin + value.nbytes
    elif hasattr(value, "data_ptr") and not value.is_mkldnn:
        item = value.element_size()
        begin, strides = value.data_ptr(), tuple(s * item for s in value.stride())
    else:
        return None
    if 0 in value.shape:
        return begin, begin
    moves = [(n - 1) * s for n, s in zip(value.shape, strides, strict=True)]
    return begin + sum(min(0, m) for m in moves), begin + sum(max(0, m) for m in moves) + item


def meeting(spans: Sequence[Span | None]) -> set[int]:
    """Return the positions of the spans that overlap with another span."""
    order = sorted((*span, at) for at, span in enumerate(spans) if span is not None and span[0] < span[1])
    found, reached, furthest = set[int](), -1, -1
    for begin, end, at in order:
        if begin < reached:
            found |= {at, furthest}
        if end > reached:
            reached, furthest = end, at
    return found


def _meet(one: Span | None, other: Span | None) -> bool:
    return one is not None and other is not None and max(one[0], other[0]) < min(one[1], other[1])


def _refused(port: Port, value: Any, why: str) -> BackendError:
    kind = f"{value.dtype}{list(value.shape)}" if hasattr(value, "shape") else f"a {type(value).__name__}"
    return BackendError(
        f"input {port.name} is donated, and cannot be overwritten: {why}",
        received=f"{port.name}: {kind}",
        within=str(port),
        hint=Hint(
            f"a contiguous array of {port.dtype} that nothing else uses, or compile without donate=",
            "leave out --donate",
        ),
    )

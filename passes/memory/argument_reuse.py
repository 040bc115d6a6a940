"""Arguments of a function whose storage its result may take, if the argument is dead after the call.

    plan.reuses = reused_arguments(plan, plans of callees)

If a caller reads the argument for the last time at the call, argument and result share one storage: a residual stream
through a stack of blocks is one buffer. No kernel may get two pointers to the same memory. So all reads of the argument
must come before the first write of the result. Alternatively, the result is written in parts, each by a call that reads
the same part of the argument and may itself overwrite it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from treadle.ir.graph import Node, Value
from treadle.ir.ops.parts import Concat
from treadle.ir.storage.views import Storage
from treadle.passes.memory.storage_plan import FunctionPlan, How


def reused_arguments(plan: FunctionPlan, callees: Mapping[str, FunctionPlan]) -> tuple[Value, ...]:
    """Return the arguments that the only output of a function may overwrite."""
    if len(plan.function.results) != 1 or plan.copied or len(plan.results) != 1:
        return ()
    (result,) = plan.results.values()
    (output,) = plan.function.results
    found = []
    for argument in plan.function.inputs:
        storage = plan.places[argument].storage
        alike = argument.type.is_held_like(output.type)
        if alike and storage is not None and _may_be_one(storage, result, plan, callees):
            found.append(argument)
    return tuple(found)


def _may_be_one(argument: Storage, result: Storage, plan: FunctionPlan, callees: Mapping[str, FunctionPlan]) -> bool:
    places = plan.places
    written = [v for v, place in places.items() if place.storage is result and place.is_written]
    first = min((places[v].first for v in written), default=plan.end)
    late = False
    for at, step in enumerate(plan.steps):
        if at < first or all(places[v].storage is not argument for v in step.inputs):
            continue
        if all(not places[v].is_written for v in step.root.results):
            continue  # a view reads no elements
        if not _writes_what_it_reads(step.root, argument, result, plan, callees):
            return False
        late = True
    return not late or _are_parts(written, plan)


def _writes_what_it_reads(
    node: Node, argument: Storage, result: Storage, plan: FunctionPlan, callees: Mapping[str, FunctionPlan]
) -> bool:
    """Return True if a step is a call that writes a part of the result over the part of the argument that the call
    reads.
    """
    callee = node.op.called_in(callees)
    if callee is None or len(node.results) != 1:
        return False
    taken = [i for i, v in enumerate(node.operands) if v is not None and plan.places[v].storage is argument]
    if len(taken) != 1 or callee.function.arguments[taken[0]] not in callee.reuses:
        return False
    operand = node.operands[taken[0]]
    assert operand is not None
    read, made = plan.places[operand].view, plan.places[node.result].view
    if read is None or made is None or made.storage is not result:
        return False
    return read.is_contiguous and made.lies_as(replace(read, storage=result))


def _are_parts(written: list[Value], plan: FunctionPlan) -> bool:
    """Return True if values are the operands of one concat and its result: no two operands share an element."""
    joined = {plan.places[v].of for v in written if plan.places[v].how is How.INTO and plan.places[v].of in written}
    if len(joined) != 1:
        return False
    (whole,) = joined
    if not isinstance(whole, Value) or whole.node is None or not isinstance(whole.node.op, Concat):
        return False
    return {*written} == {whole, *whole.node.inputs} and len(whole.node.inputs) == len({*whole.node.inputs})

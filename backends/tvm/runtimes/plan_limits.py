"""The limits of a device that a plan exceeds. They are listed before the first launch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from treadle.backends.refusals import listed
from treadle.backends.tvm.lowering.program import KernelStep
from treadle.backends.tvm.runtimes.device_plans import DevicePlan
from treadle.backends.tvm.runtimes.launch_table import Launch, space_text
from treadle.backends.tvm.spaces import Arena, Constant, Held, Input, Output, Space, State, Status
from treadle.ir.builder import describe_source
from treadle.ir.device_limits import DeviceLimits
from treadle.ir.errors import BackendError

_MOST_INDEX = 2**31 - 1  # of a device whose indices have 32 bits

_PARTS: Mapping[str, tuple[type[Space], ...]] = {
    "weights": (Held, Constant),
    "arena": (Arena,),
    "states": (State,),
    "inputs": (Input,),
    "outputs": (Output,),
    "status words": (Status,),
}


def exceeded_limits(plan: DevicePlan, limits: DeviceLimits) -> list[str]:
    """Return a line for each limit that a plan exceeds, with the op and the user's line: the size of a buffer, the part
    of it that a kernel is bound to, the number of buffers of a launch, and the largest index.
    """
    lines: dict[str, None] = {}
    for space, nbytes in plan.table.spaces.items():
        if limits.allocation and nbytes > limits.allocation:
            lines[f"{space_text(space)}: a buffer of {nbytes:,} bytes, the device allows {limits.allocation:,}"] = None
    seen: set[tuple[str, Space, int]] = set()
    for launch, step in zip(plan.table.launches, plan.steps, strict=True):
        for argument in launch.arguments:
            key = launch.kernel, argument.space, argument.begin
            if limits.largest and argument.nbytes > limits.largest and key not in seen:
                seen.add(key)
                what = f"{argument.nbytes:,} bytes of {space_text(argument.space)} are bound to {launch.kernel}"
                lines[located(f"{what}, the device binds {limits.largest:,}", step)] = None
        if limits.buffers and (count := _buffers(launch, limits.largest)) > limits.buffers:
            lines[located(f"{launch.kernel} is bound to {count} buffers, the device allows {limits.buffers}", step)] = (
                None
            )
        if limits.index == "i32" and max((*launch.sizes, *[a.at for a in launch.arguments], 0)) > _MOST_INDEX:
            lines[located(f"an index of {launch.kernel} exceeds 32 bits, the device's largest", step)] = None
    return list(lines)


def _buffers(launch: Launch, largest: int) -> int:
    """Return the number of buffers that a launch is bound to. Pointers into one buffer share it, if their storages are
    not further apart than the largest part that is bound.
    """
    ranges: dict[Space, list[tuple[int, int]]] = {}
    for argument in launch.arguments:
        ranges.setdefault(argument.space, []).append((argument.begin, argument.begin + argument.nbytes))
    count = 0
    for each in ranges.values():
        first = None
        for begin, end in sorted(each):
            if first is None or (largest and end - first > largest):
                count, first = count + 1, begin
    return count


def exceeded_memory(plan: DevicePlan, required: int, free: int | None) -> list[str]:
    """Return a line if a run needs more memory than is free.

    required  bytes that have to be allocated for the run
    free      bytes that are free; None: unknown
    """
    if free is None or required <= free:
        return []
    sums = {
        name: sum(nbytes for space, nbytes in plan.table.spaces.items() if isinstance(space, kinds))
        for name, kinds in _PARTS.items()
    }
    parts = ", ".join(f"{name} {nbytes:,}" for name, nbytes in sums.items() if nbytes)
    return [f"memory: {required:,} bytes required, {free:,} bytes free (the run uses: {parts})"]


def located(line: str, step: KernelStep) -> str:
    """Return a line with the op of a step and the user's line."""
    if step.node is None:
        return line
    place = describe_source(step.node.source, step.node.scope)
    return f"{step.node.op.name}: {line}" + (f"    ({place})" if place else "")


def refuse(name: str, device: str, lines: Sequence[str]) -> None:
    """Raise BackendError with all lines, if there are any."""
    if lines:
        raise BackendError(
            f"{name} exceeds the limits of {device}",
            received=listed(lines),
            hint="smaller inputs, a smaller or quantized model, or another target",
        )

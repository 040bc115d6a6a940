"""Leftovers: steps that run element by element because no fast kernel supports them, with cost and source line."""

from __future__ import annotations

from collections.abc import Mapping

from treadle.backends.tvm.lowering.program import KernelProgram, KernelStep
from treadle.ir.analysis.cost import node_cost
from treadle.ir.builder import describe_source
from treadle.ir.sizing.size_bounds import Bounds

SIZE = 128  # size of every symbol for which the cost is reported


def find_leftovers(program: KernelProgram, symbols: Mapping[str, Bounds]) -> tuple[str, ...]:
    """Return one line for each such step, in order of decreasing cost.

    An example is `cumsum runs element by element, 1.2 MFLOPs at S=128    model.py:41`.
    """
    found = []
    for routine in program.routines:
        for step in routine.walk():
            if step.kernel.generic:
                found.append(_line(step, symbols))
    ordered = sorted(dict.fromkeys(found), key=lambda line: -line[0])
    return tuple(text for _, text in ordered)


def _line(step: KernelStep, symbols: Mapping[str, Bounds]) -> tuple[int, str]:
    node = step.node
    why = f", {step.note}" if step.note else ""
    if node is None:
        return 0, f"{step.kernel.title} runs element by element{why}"
    sizes = {name: min(SIZE, bounds.upper or SIZE) for name, bounds in symbols.items()}
    cost = node_cost(node, sizes)
    at = f" at {', '.join(f'{s}={n}' for s, n in sizes.items())}" if sizes else ""
    work = max(cost.flops, cost.bytes)
    amount = f"{cost.flops / 1e6:.3g} MFLOPs" if cost.flops else f"{cost.bytes / 1e6:.3g} MB moved"
    place = describe_source(node.source, node.scope)
    return work, f"{node.op.name} runs element by element{why}, {amount}{at}" + (f"    {place}" if place else "")

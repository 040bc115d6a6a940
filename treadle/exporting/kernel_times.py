"""Measured times of kernels on the TVM backend, by node of the lowered graph, for Model Explorer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from treadle.backends.tvm.executable import KernelExecutable
from treadle.backends.tvm.profiling import time_calls
from treadle.comparing.run_nodes import RunNode, run_of
from treadle.compiled import Compiled
from treadle.ir.analysis.drawn_inputs import draw_inputs
from treadle.ir.errors import Hint, UsageError
from treadle.ir.graph import Node

ROUNDS = 9


def node_times(compiled: Compiled, sizes: Mapping[str, int], *, seed: int = 0) -> dict[int, float]:
    """Return milliseconds by the number of a node in a run of the lowered graph: the median of 9 runs on random inputs.

    The time of a kernel that computes several nodes belongs to the last one. Raises UsageError for another backend,
    BackendError as a call does.
    """
    exe, lowered = compiled.executable, compiled.optimized.lowered
    if not isinstance(exe, KernelExecutable) or lowered is None:
        raise UsageError(
            "times are measured on the TVM backend",
            received=repr(compiled),
            hint=Hint('backend="tvm"', "--backend tvm"),
        )
    arrays = draw_inputs(compiled.graph, sizes, [seed])
    places: dict[Node, list[RunNode]] = defaultdict(list)
    for each in run_of(lowered.graph).nodes:
        places[each.node].append(each)
    times: dict[int, float] = defaultdict(float)
    seen: dict[tuple[int, Node], int] = defaultdict(int)  # calls of a step so far; layers come in order
    for call in time_calls(exe, arrays, ROUNDS):
        node = call.step.node
        if node is None or not places[node]:
            continue
        at = seen[id(call.step), node]
        seen[id(call.step), node] += 1
        times[places[node][min(at, len(places[node]) - 1)].number] += 1e3 * call.seconds
    return dict(times)

"""`measure_roofline`: run a model or its decoding step kernel by kernel, and compare it with the machine's limits.

    found = measure_roofline(t.compile("bert", backend="tvm"), {"B": 1, "S": 128})
    print(found)
    found = measure_step_roofline(t.compile("smollm2", backend="tvm"), rows=16, past=128)

`treadle.benching.roofline` describes the limits.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from treadle.backends.staged import needed_plan
from treadle.backends.tvm.executable import KernelExecutable
from treadle.backends.tvm.profiling import time_calls
from treadle.benching.roofline import Roofline, no_kernels, past_of_step, roofline_of
from treadle.compiled import Compiled
from treadle.ir.analysis.drawn_inputs import draw_inputs
from treadle.ir.errors import UsageError


def measure_roofline(model: Compiled, sizes: Mapping[str, int], *, rounds: int = 9, seed: int = 0) -> Roofline:
    """Run a model of the TVM backend kernel by kernel, at sizes for its symbols, on random inputs. Compare with the
    machine.

    Raises UsageError for another backend, and for a model with states.
    """
    exe = model.executable
    if not isinstance(exe, KernelExecutable):
        raise no_kernels(model.backend)
    if model.graph.states:
        raise UsageError(f"{model.name} has states, and a roofline needs a model without states")
    calls = time_calls(exe, draw_inputs(model.graph, sizes, [seed]), rounds)
    plan = needed_plan(model.optimized.last.plan, model.backend)
    return roofline_of(model.name, model.target, plan, exe, sizes, calls)


def measure_step_roofline(
    model: Compiled, *, rows: int = 1, past: int | None = None, rounds: int = 9, seed: int = 0
) -> Roofline:
    """Time the kernels of a model's decoding step on the TVM backend, and compare them with the machine's limits.

    rows    number of rows, each of which gets one token
    past    number of tokens that each row has already; None: see `past_of_step`

    Raises UsageError for another backend, and for more tokens than the model takes.
    """
    stepped = model.stepped
    exe = stepped.executable
    if not isinstance(exe, KernelExecutable):
        raise no_kernels(model.backend)
    past = past_of_step(stepped.derived.context, past)
    session = stepped.session(rows=rows, capacity=past + 1)
    rng = np.random.default_rng(seed)
    texts = {session.open(): rng.integers(0, session.vocabulary or 2, past).tolist() for _ in range(rows)}
    session.prefill(texts)
    names = stepped.derived.port_names
    given = {
        stepped.derived.tokens[0]: np.array([[ids[0]] for ids in texts.values()], np.int64),
        names["rows"]: np.array(list(texts), np.int64),
        names["start"]: np.full(rows, past, np.int64),
    }
    calls = time_calls(exe, given, rounds, entry="step", states=session.states)
    plan = needed_plan(stepped.optimized.plan, model.backend)
    return roofline_of(f"a step of {model.name}", model.target, plan, exe, {"rows": rows, "past": past}, calls)

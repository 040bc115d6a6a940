"""Kernels in the slow form, in which each thread runs a task: arrays that several kernels access keep their layout."""

from __future__ import annotations

import numpy as np
import pytest

from tests.backend_checks import graph_of, needs_tvm
from tests.support.gpu_emulator.emulation import compiler
from treadle.backends.tvm.kernels.devices.device import DEVICES
from treadle.backends.tvm.kernels.devices.statements import Let, Loop
from treadle.backends.tvm.kernels.devices.task_counts import count_tasks
from treadle.backends.tvm.kernels.devices.values import ThreadNode, constant, operation
from treadle.backends.tvm.kernels.isa import ISAS
from treadle.entry_functions import compile
from treadle.ir.analysis.drawn_inputs import draw_inputs
from treadle.ir.attention.attention_terms import T5Relative
from treadle.ir.interpreter import interpret

pytestmark = needs_tvm


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
def test_a_bias_by_distance_is_read_as_it_was_stored() -> None:
    """The row of a head ends with elements that only vectors read, in a number that depends on the device."""
    from tests.support.gpu_emulator.emulator_runtime import EmulatorRuntime, emulated

    graph = graph_of(
        lambda b: b.attention(
            *[b.input(name, "f32[B, 3, S, 8]") for name in "qkv"],
            b.input("table", "f32[8, 3]"),
            terms=(T5Relative(buckets=8, max_distance=16, bidirectional=True),),
        )
    )
    given = draw_inputs(graph, {"B": 2, "S": 5}, [0])
    exe = emulated(compile(graph, backend="tvm", target="cuda"), EmulatorRuntime(DEVICES["cuda"].slow))
    for name, expected in interpret(graph, given).items():
        np.testing.assert_allclose(exe(**given)[name], expected, rtol=0, atol=1e-6)


def test_floats_do_not_count_as_sizes() -> None:
    """A kernel may name an infinite float before its loop over tasks."""
    variable = ThreadNode("variable", "i64", (), "task_0")
    infinite = constant(float("inf"), "f32")
    bound = ThreadNode("select", "f32", (constant(1, "bool"), infinite, infinite))
    most = operation("+", ThreadNode("variable", "i64", (), "n_0"), constant(1, "i64"))
    body = [Let(ThreadNode("variable", "f32", (), "bound_0"), bound), Loop(variable, most, tasks=True)]
    assert count_tasks(body, {"n_0": 4}) == 5


def test_the_widest_vector_is_the_same_in_both_forms() -> None:
    assert DEVICES["opencl"].slow.lanes() == 1
    assert DEVICES["opencl"].slow.widest == DEVICES["opencl"].widest == DEVICES["opencl"].lanes() == 32
    assert all(isa.widest == isa.lanes() for isa in ISAS.values())

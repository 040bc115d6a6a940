"""Every op once on the TVM backend's smaller instruction sets. The op suite runs only on the best one.

`test_tvm_pointwise` tests elementwise functions, for which each instruction set has its own code.
"""

from __future__ import annotations

import pytest

from tests.op_checks import TESTED, Case
from tests.rounding_bounds import assert_within, bounded
from treadle.backends.registry import find_backend
from treadle.backends.tvm.kernels.isa import ISAS, host_isa, runs_here
from treadle.ir.op_registry import OPS
from treadle.ir.target import Target
from treadle.ir.types import f32

pytest.importorskip("tvm")

from treadle.backends.tvm.kernels.arithmetic.vector_math import is_pointwise

LESSER = [n for n in ("x86-64-v3", "x86-64-v2") if runs_here(ISAS[n]) and host_isa().name != n]


def sample_of(name: str) -> int:
    """Return the number of the op's last sample in f32, which is seldom the simplest; for an op without floats, of its
    last sample.
    """
    samples = OPS[name].samples
    single = [
        n for n, sample in enumerate(samples) if sample.types[:1] and sample.types[0] and sample.types[0].dtype is f32
    ]
    return single[-1] if single else len(samples) - 1


@pytest.mark.parametrize("isa", LESSER)
@pytest.mark.parametrize("name", [name for name in TESTED if not is_pointwise(name)])
def test_a_sample_of_every_op(name: str, isa: str) -> None:
    case = Case.of(name, sample_of(name))
    graph = case.forward_graph()
    made = find_backend("tvm").compile(graph, Target(isa), {})(**case.inputs)
    for output, wanted in bounded(graph, case.inputs).items():
        assert_within(made[output], wanted, output)

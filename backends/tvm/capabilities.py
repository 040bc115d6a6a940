"""The capabilities of our kernels on an instruction set."""

from __future__ import annotations

from functools import cache, partial

from treadle.backends.tvm.kernels.isa import Isa
from treadle.backends.tvm.lowering.chains import CHAINS, writes_part, written_over
from treadle.backends.tvm.lowering.encoded_rules import takes_blocks
from treadle.backends.tvm.lowering.rules import keeps
from treadle.backends.tvm.weight_packing import multiplies_rows, wants, wants_blocks
from treadle.passes.capabilities import Capabilities
from treadle.passes.lowering.read_blocks import in_blocks
from treadle.passes.memory.plan_storage import PlanStorage


@cache
def capabilities(isa: Isa) -> Capabilities:
    """Return the ops that the kernels compute, the layouts in which they read operands, and their chains."""
    return Capabilities(
        "tvm",
        keeps=keeps,
        layouts=wants(isa),
        blocks=wants_blocks(isa),
        multiplies=partial(multiplies_rows, isa=isa),
        takes=takes_blocks,
        reads_blocks=in_blocks,
        grouped=CHAINS,
        parts=writes_part,
        over=written_over,
    )


def planning(backend: Capabilities) -> PlanStorage:
    """Return the pass that plans storage for kernels, which read and write by strides."""
    return PlanStorage(backend, strided=True, in_results=True)

"""Kernels of collectives: no code, but a call of this process, which meets other ranks between two kernels."""

from __future__ import annotations

from dataclasses import dataclass

from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.ir.ops.collectives import Collective
from treadle.ir.types import DType


@dataclass(frozen=True)
class Meet(Kernel):
    """y = op(x), of contiguous elements, met with the other ranks. See `treadle.backends.tvm.host_calls`.

    rank     how many dimensions x and y have
    symbols  whose sizes the op needs

    Passed: x, y; the shape of x, the shape of y, the sizes of the symbols.
    """

    op: Collective
    dtype: DType
    rank: int
    symbols: tuple[str, ...]

    @property
    def title(self) -> str:
        return self.op.name

    @property
    def on_host(self) -> bool:
        return True

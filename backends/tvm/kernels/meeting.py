"""Kernels of collectives: host calls between two kernels, which communicate with other ranks."""

from __future__ import annotations

from dataclasses import dataclass

from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.ir.ops.collectives import Collective
from treadle.ir.types import DType


@dataclass(frozen=True)
class Meet(Kernel):
    """y = op(x), a collective on contiguous elements. See `treadle.backends.tvm.host_calls`.

    rank     number of dimensions of x and y
    symbols  the symbols whose sizes the op needs

    Arguments: x, y; the shape of x, the shape of y, the sizes of the symbols.
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

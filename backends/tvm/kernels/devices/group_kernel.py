"""Kernels for threads: their arguments, memory and statements, and the error for what a device cannot express.

`treadle.backends.tvm.kernels.devices.group_emitter` writes them, and the printers beside it print them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from treadle.backends.tvm.kernels.devices.device import Device
from treadle.backends.tvm.kernels.devices.statements import Memory, Statement
from treadle.backends.tvm.kernels.devices.task_counts import count_tasks
from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.ir.builder import describe_source
from treadle.ir.errors import BackendError
from treadle.ir.graph import Node as GraphNode
from treadle.ir.types import DType

_UNKNOWN_TASKS = 1024
"""Number of blocks of a kernel whose number of tasks depends on the content of memory."""


class LackingWord(BackendError):
    """The error for a specification that a device cannot express.

    word  the word of the emitter that the device lacks
    why   the reason
    """

    def __init__(self, word: str, why: str) -> None:
        super().__init__(f"the device lacks the word `{word}`", received=why)
        self.word, self.why = word, why

    def located(self, node: GraphNode | None, title: str, device: Device) -> LackingWord:
        """Return the same error with the op, the kernel and the user's line."""
        found = LackingWord(self.word, self.why)
        op = title if node is None else node.op.name
        found.what = f"{op} does not run on {device}: its kernel {title} uses the word `{self.word}`"
        found.args = (found.what,)
        found.source = describe_source(node.source, node.scope) if node is not None else None
        found.hint = "another target, or another form of the weights"
        return found


def refuse_dtype(device: Device, word: str, dtype: DType) -> None:
    """Raise LackingWord if a device lacks a dtype. A device without 64-bit integers stores them in 32 bits."""
    if dtype.name in device.limits.lacks - {"i64"}:
        raise LackingWord(word, f"a buffer of {dtype} numbers" if word == "pointer" else f"{dtype} numbers")


@dataclass
class GroupKernel:
    """A kernel for threads.

    pointers    the buffers, in the order of the specification's pointers
    sizes       the names of the sizes, in order
    body        the statements
    shared      memory of a block
    functions   the lane functions that the kernel calls, by symbol
    """

    kernel: Kernel
    device: Device
    name: str
    pointers: list[Memory] = field(default_factory=list)
    sizes: list[str] = field(default_factory=list)
    body: list[Statement] = field(default_factory=list)
    shared: list[Memory] = field(default_factory=list)
    functions: dict[str, Any] = field(default_factory=dict)

    @property
    def numbers(self) -> list[str]:
        """The names of the numbers that a launch passes: the offset of each pointer in elements, then the sizes."""
        return [*(f"{memory.name}_at" for memory in self.pointers), *self.sizes]

    @property
    def shared_bytes(self) -> int:
        """Bytes of shared memory of a block. In WGSL, an element of any type has 4 bytes."""
        wgsl = self.device.limits.language == "wgsl"
        return sum(-(-memory.cells * (4 if wgsl else memory.dtype.bytes) // 16) * 16 for memory in self.shared)

    def blocks(self, sizes: Sequence[int]) -> int:
        """Return the number of thread blocks of a launch with these sizes: one for each task of a group, at most as
        many as the device allows. Any number computes the same.
        """
        tasks = count_tasks(self.body, dict(zip(self.sizes, sizes, strict=True)))
        blocks = _UNKNOWN_TASKS if tasks is None else -(-tasks // self.device.tasks)
        return max(1, min(blocks, self.device.limits.groups))

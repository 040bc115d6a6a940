"""Launch tables: a program at one set of sizes as a list of kernel launches.

A table is the same for all runtimes. It has no addresses: a pointer is a place in a memory space
(`treadle.backends.tvm.spaces`), and a run binds a buffer to each space. It prints as text, and it can be stored as
JSON, so that a launcher in another language can run it.

    print(table.text())
    loaded = runtime.load(kernels)
    loaded.prepare(table.launches, buffers).run()
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from treadle.backends.tvm.spaces import Space


@dataclass(frozen=True, slots=True)
class Argument:
    """A pointer of a launch: a storage, and the first element that the kernel sees.

    space   the memory space
    begin   offset of the storage in the space, in bytes
    nbytes  bytes of the storage; a kernel accesses no byte outside of it
    at      index of the kernel's element 0, in elements from the start of the storage
    """

    space: Space
    begin: int
    nbytes: int
    at: int = 0


@dataclass(frozen=True, slots=True)
class Launch:
    """A launch of a kernel.

    kernel     name of the kernel
    blocks     number of thread blocks; 0 for a collective, which the host computes between two launches. Runtimes get
               only launches of kernels
    arguments  one for each pointer of the kernel, in its order
    sizes      one for each size of the kernel, in its order
    """

    kernel: str
    blocks: int
    arguments: tuple[Argument, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class LaunchTable:
    """The launches of an entry at one set of sizes, in the order in which they run.

    launches  the launches
    spaces    bytes of each memory space
    """

    launches: Sequence[Launch]
    spaces: Mapping[Space, int]

    def text(self) -> str:
        """Return the table as text, a line for each launch."""
        raise NotImplementedError

    def as_dict(self) -> dict[str, Any]:
        """Return the table as JSON values."""
        raise NotImplementedError

    @staticmethod
    def of_dict(values: Mapping[str, Any]) -> LaunchTable:
        """Return the table of JSON values. Raises BackendError for values that are not a table."""
        raise NotImplementedError

"""States of an executable: named arrays that calls of its entries read and write in place.

    exe = backend.compile(graph, target, weights)
    states = exe.new_states(R=8, C=2048)          # zeros; `exe.state_bytes(R=8, C=2048)` returns their bytes in advance
    exe.entry("step")(states, tokens=..., rows=..., start=...)

Some symbols, such as the number of slots and the capacity, occur only in states. `new_states` sets their sizes. An
executable may have any number of states at a time; a call works on the states that are passed to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from treadle.backends.protocol import Port
from treadle.ir.errors import BackendError
from treadle.ir.graph import Graph
from treadle.ir.sizing.size_bounds import Bounds
from treadle.ir.types import DType

Allocate = Callable[[tuple[int, ...], DType], Any]
"""A function that allocates an array of zeros in a backend's own memory."""

Index = tuple[int | slice, ...]
"""A part of a state: its slot, and the positions along the other axes. Slices have no step."""


class StateAccess(Protocol):
    """Access to parts of states in a backend's memory."""

    def read(self, parts: Sequence[tuple[Any, Index]]) -> list[Any]:
        """Return a copy of each part in host memory, an array or a tensor."""
        ...

    def write(self, array: Any, index: Index, value: Any) -> None:
        """Write a part, a copy that `read` returned."""
        ...

    def copy(self, array: Any, source: Index, to: Index) -> None:
        """Copy a part to another part of the same shape, which does not overlap with it."""
        ...


class ArrayAccess:
    """Access to NumPy arrays and tensors, which are indexed."""

    def read(self, parts: Sequence[tuple[Any, Index]]) -> list[Any]:
        copies = []
        for array, index in parts:
            part = array[index]
            copies.append(part.copy() if isinstance(part, np.ndarray) else part.to("cpu", copy=True))
        return copies

    def write(self, array: Any, index: Index, value: Any) -> None:
        array[index] = value

    def copy(self, array: Any, source: Index, to: Index) -> None:
        array[to] = array[source]


ARRAYS = ArrayAccess()


class States(Mapping[str, Any]):
    """The states of one executable at one set of sizes. `states[name]` is the array itself, not a copy.

    A state is a NumPy array, or a tensor in the torch backend. The tvm backend stores bf16 as uint16 bits. On a device,
    a state is a `treadle.backends.tvm.runtimes.device_arrays.DeviceArray`, which `read`, `write` and `copy` access.

    kinds   the names and types of the states
    sizes   the sizes of the symbols in their types
    nbytes  the total size in bytes
    """

    def __init__(
        self, kinds: StateKinds, sizes: Mapping[str, int], arrays: Mapping[str, Any], access: StateAccess = ARRAYS
    ) -> None:
        self.kinds, self.sizes, self._arrays, self._access = kinds, dict(sizes), dict(arrays), access
        self.nbytes = kinds.nbytes(sizes)

    def read(self, parts: Sequence[tuple[str, Index]]) -> list[Any]:
        """Return copies of parts of states in host memory, in order."""
        return self._access.read([(self[name], index) for name, index in parts])

    def write(self, name: str, index: Index, value: Any) -> None:
        """Write a part of a state, as `read` returned it."""
        self._access.write(self[name], index, value)

    def copy(self, name: str, source: Index, to: Index) -> None:
        """Copy a part of a state to another part of the same shape, within the backend's memory."""
        self._access.copy(self[name], source, to)

    def __getitem__(self, name: str) -> Any:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name}={size}" for name, size in self.sizes.items())
        return f"<{len(self)} states of {self.kinds.name}, {sizes}: {self.nbytes:,} bytes>"


class StateKinds:
    """The names and types of an executable's states.

    backend  the backend that stores them
    """

    def __init__(self, graph: Graph, backend: str) -> None:
        self.name, self.backend = graph.name, backend
        self.ports = tuple(Port(name, value.type) for name, value in graph.states.items())
        self.symbols = tuple(sorted({s for port in self.ports for s in port.type.symbols}))
        self.bounds: dict[str, Bounds] = {s: graph.symbols[s] for s in self.symbols}
        self._none = None if self.ports else States(self, {}, {})

    def nbytes(self, sizes: Mapping[str, int]) -> int:
        """Return the total bytes of all states at these sizes. Raises BackendError for a size that is missing or
        wrong.
        """
        self.check_sizes(sizes)
        return sum(port.type.bytes_at(sizes) for port in self.ports)

    def new(self, sizes: Mapping[str, int], allocate: Allocate, access: StateAccess = ARRAYS) -> States:
        """Return states of zeros, in a memory with this access. Raises BackendError for a size that is missing or
        wrong, or if there is not enough memory.
        """
        nbytes = self.nbytes(sizes)
        try:
            arrays = {port.name: allocate(port.type.evaluate(sizes), port.dtype) for port in self.ports}
        except (MemoryError, OverflowError, ValueError, RuntimeError) as error:
            sizes_text = ", ".join(f"{name} = {size}" for name, size in sizes.items())
            raise BackendError(
                f"{self.name}: there is not enough memory for its states",
                received=f"{nbytes / 2**30:.3g} GiB, where {sizes_text}",
                hint=f"smaller {' or '.join(self.symbols)}",
            ) from error
        return States(self, sizes, arrays, access)

    def check_sizes(self, sizes: Mapping[str, Any]) -> None:
        """Raise BackendError if a symbol of the states has no size or a size out of bounds, or if another symbol is
        given.
        """
        missing = [s for s in self.symbols if s not in sizes]
        unknown = [s for s in sizes if s not in self.symbols]
        if missing or unknown:
            what = f"need a size for {', '.join(missing)}" if missing else f"have no symbol {', '.join(unknown)}"
            raise BackendError(
                f"the states of {self.name} {what}",
                received=", ".join(f"{name}={size}" for name, size in sizes.items()) or "no sizes",
                within=self._ports_text,
                hint="new_states(" + ", ".join(f"{s}=..." for s in self.symbols) + ")",
            )
        for name, size in sizes.items():
            if isinstance(size, bool) or not isinstance(size, int) or size not in self.bounds[name]:
                bounds = self.bounds[name]
                most = f" and at most {bounds.upper}" if bounds.upper is not None else ""
                raise BackendError(
                    f"{name} must be a size of at least {bounds.lower}{most}, is {size!r}",
                    within=f"the states of {self.name}",
                )

    def check(self, states: States | None) -> States:
        """Return `states` if its types match. Raises BackendError otherwise."""
        if states is None and self._none is not None:
            return self._none
        if not isinstance(states, States):
            raise BackendError(
                f"{self.name} has states, which must be the first argument of a call",
                received=type(states).__name__,
                within=self._ports_text,
                hint="new_states(" + ", ".join(f"{s}=..." for s in self.symbols) + ")",
            )
        if states.kinds is self:
            return states
        if states.kinds.backend != self.backend or states.kinds.ports != self.ports:
            given = states.kinds
            raise BackendError(
                f"these are not states of {self.name} for the {self.backend} backend",
                received=f"states of {given.name} for the {given.backend} backend: "
                + ", ".join(map(str, given.ports))[:400],
                within=self._ports_text,
                hint="new_states of the executable that is called",
            )
        return states

    @property
    def _ports_text(self) -> str:
        return ", ".join(map(str, self.ports))[:400]

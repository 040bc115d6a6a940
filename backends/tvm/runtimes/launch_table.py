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
from dataclasses import dataclass, fields
from typing import Any

from treadle.backends.tvm.spaces import Arena, Constant, Held, Input, Output, Space, State, Status
from treadle.ir.errors import BackendError


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

    def __str__(self) -> str:
        begin = f"+{self.begin}" if self.begin else ""
        return f"{space_text(self.space)}{begin}{f'[{self.at}]' if self.at else ''}"


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
    spaces    bytes of each memory space that they access
    """

    launches: Sequence[Launch]
    spaces: Mapping[Space, int]

    @property
    def nbytes(self) -> int:
        """Bytes of device memory that a run needs: weights, constants, arena, states, inputs, outputs and status
        words.
        """
        return sum(self.spaces.values())

    def text(self) -> str:
        """Return the table as text: a line for each space with its bytes, and a line for each launch.

            0  matmul_32  12 blocks  input x, weight w, arena+256 | 4 768 64 768 64

        A pointer is a space with the offset of the storage in bytes, and `[n]` if it is element n of the storage. The
        sizes follow.
        """
        lines = [f"{space_text(space)}: {nbytes:,} bytes" for space, nbytes in self.spaces.items()]
        rows = [
            (
                str(number),
                launch.kernel,
                f"{launch.blocks} block{'s' * (launch.blocks != 1)}" if launch.blocks else "on the host",
                f"{', '.join(map(str, launch.arguments))} | {' '.join(map(str, launch.sizes))}".rstrip(" |"),
            )
            for number, launch in enumerate(self.launches)
        ]
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
        lines += [
            f"{row[0]:>{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}".rstrip() for row in rows
        ]
        return "\n".join(lines) + "\n"

    def as_dict(self) -> dict[str, Any]:
        """Return the table as JSON values.

            {"spaces": [{"kind": "input", "name": "x", "bytes": 1024}, ...],
             "launches": [{"kernel": "softmax", "blocks": 4, "arguments": [[0, 0, 1024, 0], ...], "sizes": [4]}, ...]}

        An argument is the number of its space, then `begin`, `nbytes` and `at`.
        """
        numbers = {space: number for number, space in enumerate(self.spaces)}
        return {
            "spaces": [{**_space_dict(space), "bytes": nbytes} for space, nbytes in self.spaces.items()],
            "launches": [
                {
                    "kernel": launch.kernel,
                    "blocks": launch.blocks,
                    "arguments": [[numbers[a.space], a.begin, a.nbytes, a.at] for a in launch.arguments],
                    "sizes": list(launch.sizes),
                }
                for launch in self.launches
            ],
        }

    @staticmethod
    def of_dict(values: Mapping[str, Any]) -> LaunchTable:
        """Return the table of JSON values. Raises BackendError for values that are not a table, and for a pointer
        outside of its space.
        """
        try:
            spaces = {_space_of(each): _count(each["bytes"]) for each in values["spaces"]}
            names = list(spaces)
            launches = []
            for each in values["launches"]:
                arguments = []
                for number, *rest in each["arguments"]:
                    begin, nbytes, at = map(_count, rest)
                    space = names[_count(number)]
                    if begin + nbytes > spaces[space]:
                        raise ValueError(f"bytes {begin} to {begin + nbytes} of {space_text(space)}: {spaces[space]}")
                    arguments.append(Argument(space, begin, nbytes, at))
                if not isinstance(each["kernel"], str):
                    raise TypeError(f"the kernel {each['kernel']!r}")
                sizes = tuple(map(_count, each["sizes"]))
                launches.append(Launch(each["kernel"], _count(each["blocks"]), tuple(arguments), sizes))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise BackendError(
                "these values are no launch table", received=f"{type(error).__name__}: {error}"[:200]
            ) from error
        return LaunchTable(launches, spaces)


_KINDS: Mapping[str, type[Space]] = {
    "arena": Arena,
    "input": Input,
    "output": Output,
    "state": State,
    "status": Status,
    "weight": Held,
    "constant": Constant,
}
"""The words for the kinds of spaces, in text and in JSON."""


def _space_dict(space: Space) -> dict[str, Any]:
    kind = next(word for word, each in _KINDS.items() if isinstance(space, each))
    return {"kind": kind, **{field.name: getattr(space, field.name) for field in fields(space)}}


def _space_of(values: Mapping[str, Any]) -> Space:
    kind = _KINDS[values["kind"]]
    named = {field.name: values[field.name] for field in fields(kind)}
    if any(type(value) is not (int if name == "number" else str) for name, value in named.items()):
        raise TypeError(f"the space {dict(values)}")
    return kind(**named)


def space_text(space: Space) -> str:
    """Return a space as text, such as `input x`."""
    return " ".join(map(str, _space_dict(space).values()))


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a count of bytes, blocks or elements")
    return value

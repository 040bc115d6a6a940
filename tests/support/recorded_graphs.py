"""A device of PyTorch that captures runs as a GPU does, on the CPU: the ops of a run are recorded, and run again on the
same memory.

As on a GPU, a capture itself changes no memory that exists before it, and a replay reads the memory of the capture. A
read back to the host during a capture raises RuntimeError.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from tests.support.standin_device import reads_back
from treadle.backends.torch.devices import TorchDevice

X = TypeVar("X")


class _Recording(TorchDispatchMode):
    """The ops of a run, and copies of the memory that they overwrote."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[Any, Any, Any, list[Any]]] = []
        self.before: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if reads_back(func, args):
            raise RuntimeError(f"{func} waits for the device, which is not permitted during a capture")
        for at, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                x = args[at] if at < len(args) else kwargs.get(argument.name)
                if isinstance(x, torch.Tensor):
                    self.before.append((x, x.clone()))
        made = func(*args, **kwargs)
        given, _ = tree_flatten((args, kwargs))
        outputs, _ = tree_flatten(made)
        held = {x.untyped_storage()._cdata for x in given if isinstance(x, torch.Tensor)}
        is_new = [isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in held for x in outputs]
        self.ops.append((func, args, kwargs, [x if new else None for x, new in zip(outputs, is_new, strict=True)]))
        return made

    def undo(self) -> None:
        for x, before in reversed(self.before):
            x.copy_(before)

    def replay(self) -> None:
        for func, args, kwargs, own in self.ops:
            outputs, _ = tree_flatten(func(*args, **kwargs))
            for x, new in zip(own, outputs, strict=True):
                if x is not None:
                    x.copy_(new)


class RecordingDevice(TorchDevice):
    """The CPU as a device that captures runs.

    captures  the number of captured runs; replays: the number of replays
    """

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"), is_asynchronous=True)
        self.captures = self.replays = 0

    @property
    def can_capture(self) -> bool:
        return True

    def capture(self, run: Callable[[], X]) -> tuple[X, Callable[[], None]]:
        recording = _Recording()
        with recording:
            result = run()
        recording.undo()
        self.captures += 1

        def replay() -> None:
            self.replays += 1
            recording.replay()

        return result, replay

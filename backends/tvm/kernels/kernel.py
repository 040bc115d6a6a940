"""Kernels: frozen specs that write their loops.

    @dataclass(frozen=True)
    class Scale(Kernel):
        \"\"\"y[i] = factor * x[i] for i < n\"\"\"
        factor: float

        def emit(self, k):
            x, y = k.pointer("x", f32), k.pointer("y", f32)
            n = k.size("n")
            x, y = k.view(x, [n]), k.view(y, [n])
            with k.parallel(n) as i:
                k.store(y, [i], k.load(x, [i]) * k.number(self.factor, f32))

A spec's fields determine its code completely. Two equal specs on one instruction set are one kernel, which is compiled
once and cached by content (`treadle.backends.tvm.kernels.host.cache`). Specs are equal if they have the same `key`, so
0.0 and -0.0 differ, and so do 1 and True. Values that may differ from call to call (pointers, sizes, strides) are
arguments: first every pointer, then every size, in the order in which `emit` declares them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter


@dataclass(frozen=True)
class Kernel:
    """Base class of all kernel specs. A spec is a frozen dataclass of numbers, strings, dtypes, and tuples of them."""

    def __init_subclass__(cls) -> None:
        # Set before `dataclass` processes the class, so that `dataclass` does not replace them.
        cls.__eq__ = _same  # type: ignore[method-assign, assignment]
        cls.__hash__ = _hash  # type: ignore[method-assign, assignment]

    @property
    def title(self) -> str:
        """Short readable name, such as `matmul_768x3072_gelu`."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()

    @property
    def llvm(self) -> str | None:
        """Text of an LLVM module with a function `__tvm_ffi_kernel`; None if `emit` writes the kernel."""
        return None

    @property
    def generic(self) -> bool:
        """True if the kernel computes element by element. Such a kernel supports every case, and the log reports it as
        slow.
        """
        return False

    @property
    def on_host(self) -> bool:
        """True if a Python function of this process computes the kernel, so that no code is compiled."""
        return False

    @property
    def multiplies(self) -> str:
        """Kind of the kernel's products: f32, bf16 or int8. Each kind has its own peak rate."""
        return "f32"

    def emit(self, k: Emitter) -> None:
        """Write the kernel: declare pointers and sizes, then emit loops."""
        raise NotImplementedError

    def flops(self, sizes: Sequence[int]) -> int:
        """Return the approximate number of operations of a call with these sizes. 0 means that memory traffic
        determines the time.
        """
        return 0

    @cached_property
    def key(self) -> str:
        """Text that contains everything that determines the code."""
        return f"{type(self).__name__}({', '.join(f'{f.name}={_text(getattr(self, f.name))}' for f in fields(self))})"


def _same(kernel: Kernel, other: object) -> bool:
    return isinstance(other, Kernel) and type(kernel) is type(other) and kernel.key == other.key


def _hash(kernel: Kernel) -> int:
    return hash(kernel.key)


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return "(" + ", ".join(map(_text, value)) + ")"
    return value.hex() if isinstance(value, float) else repr(value)

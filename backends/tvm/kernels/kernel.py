"""Kernels: frozen specs that write their loops, and steps that apply them to views.

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

A spec's fields decide its code, all of it: two specs that are equal, on one instruction set, are one kernel, compiled
once and kept by content (`treadle.backends.tvm.kernels.cache`). Equal is what has one `key`, so that 0.0 and -0.0, or 1
and True, are not. What may differ from call to call (pointers, sizes, strides) is passed: first every pointer, then
every size, in the order in which `emit` asks for them.
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
    """Base of all kernel specs. A spec is a frozen dataclass of numbers, text, dtypes, and tuples of such."""

    def __init_subclass__(cls) -> None:
        # Before `dataclass` sees the class, which then leaves them as they are.
        cls.__eq__ = _same  # type: ignore[method-assign, assignment]
        cls.__hash__ = _hash  # type: ignore[method-assign, assignment]

    @property
    def title(self) -> str:
        """A short name for people, an identifier: `matmul_768x3072_gelu`."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()

    @property
    def llvm(self) -> str | None:
        """The kernel as a module of LLVM's, with a function `__tvm_ffi_kernel`; None: `emit` says it."""
        return None

    @property
    def generic(self) -> bool:
        """Whether it computes element by element: right for every case, and named in the log as slow."""
        return False

    @property
    def on_host(self) -> bool:
        """Whether a function of this process computes it, so that there is no code to compile."""
        return False

    @property
    def multiplies(self) -> str:
        """What its products are of: f32, bf16 or int8, each of which the machine multiplies at a rate of its own."""
        return "f32"

    def emit(self, k: Emitter) -> None:
        """Write the kernel: ask for pointers and sizes, then emit loops."""
        raise NotImplementedError

    def flops(self, sizes: Sequence[int]) -> int:
        """About how many operations a call with these sizes takes; 0: its bytes tell how long it takes."""
        return 0

    @cached_property
    def key(self) -> str:
        """All that decides the code, as text."""
        return f"{type(self).__name__}({', '.join(f'{f.name}={_text(getattr(self, f.name))}' for f in fields(self))})"


def _same(kernel: Kernel, other: object) -> bool:
    return isinstance(other, Kernel) and type(kernel) is type(other) and kernel.key == other.key


def _hash(kernel: Kernel) -> int:
    return hash(kernel.key)


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return "(" + ", ".join(map(_text, value)) + ")"
    return value.hex() if isinstance(value, float) else repr(value)

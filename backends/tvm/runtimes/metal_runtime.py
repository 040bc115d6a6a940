"""The runtime of Apple GPUs, which does not exist yet: kernels are text, which tests compile on an emulator."""

from __future__ import annotations

from typing import Never

from treadle.ir.errors import BackendError, Hint
from treadle.ir.target import Target


def open_runtime(target: Target) -> Never:
    """Raise BackendError: nothing launches Metal kernels yet."""
    through = "which runs on Apple GPUs through Metal"
    raise BackendError(
        f"kernels for {target} are not launched yet",
        received="their text is in `source`",
        hint=Hint(f'target="webgpu", {through}', f"--target webgpu, {through}"),
    )

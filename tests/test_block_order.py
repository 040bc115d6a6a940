"""Thread blocks do not wait for each other: what a kernel for a device does after its loop over tasks."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from tests.backend_checks import needs_tvm
from treadle.backends.tvm.kernels.devices.device import DEVICES
from treadle.backends.tvm.kernels.devices.device_kernels import device_kernel
from treadle.backends.tvm.kernels.devices.group_kernel import LackingWord
from treadle.backends.tvm.kernels.emitter import Emitter
from treadle.backends.tvm.kernels.isa import ISAS
from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.entry_functions import compile
from treadle.ir.types import f32
from treadle.models.registry import find_family

pytestmark = needs_tvm


@dataclass(frozen=True)
class SumOfTasks(Kernel):
    """y[i] = i for each task, then y[0] = y[n - 1]"""

    def emit(self, k: Emitter) -> None:
        y, n = k.pointer("y", f32), k.size("n")
        view = k.view(y, [n])
        with k.parallel(n, "i") as i:
            k.store(view, [i], k.cast(i, f32))
        k.store(view, [0], k.load(view, [n - 1]))


def test_a_store_after_the_loop_over_tasks_is_refused() -> None:
    with pytest.raises(
        LackingWord, match=r"the device lacks the word `parallel`\n.*a store follows the loop over tasks"
    ):
        device_kernel(SumOfTasks(), DEVICES["cuda"])


def test_a_step_does_not_merge_parts_after_its_tasks_on_a_device() -> None:
    """Heads of 64 have a kernel for one query per row, which merges the parts of long rows at its end."""
    gpt2 = find_family("gpt2").model.configure(layers=1, dim=64, heads=1, vocab=50, context=64)
    titles = {
        target: list(
            map(str, (k.title for k in compile(gpt2, backend="tvm", target=target).stepped.executable.kernels))
        )
        for target in ("arm64", "cuda")
    }
    assert "cached_attention_64_step" in titles["arm64"]
    assert "cached_attention_64" in titles["cuda"]
    assert "cached_attention_64_step" not in titles["cuda"]
    assert all(isa.joins_tasks for isa in ISAS.values())

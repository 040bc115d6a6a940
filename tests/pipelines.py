"""Every pipeline of the product: of stages, of backends on instruction sets, and of budgets."""

from __future__ import annotations

from treadle.backends.registry import find_backend
from treadle.backends.staged import StagedBackend
from treadle.ir.target import Target
from treadle.passes.budget.fitted_pipeline import with_donated, with_fit
from treadle.passes.budget.memory_fit import Chunk, MemoryFit
from treadle.passes.framework.manager import Pass
from treadle.passes.stages import QUANTIZED, Merge, Overlap, Precision, Quantize, Recognize, passes_of

FIT = MemoryFit(
    *(1_000, {"B": 1, "S": 64}, 2_000, 900, 1.25),
    again=True,
    chunks=(Chunk("block", 2, 7, 1, 4), Chunk("main", 0, 3, 0, 2)),
    host="logits",
)


def _of_backends() -> dict[str, tuple[Pass, ...]]:
    made: dict[str, tuple[Pass, ...]] = {}
    for name, targets in (("numpy", ["cpu"]), ("torch", ["cpu"]), ("tvm", ["x86-64-v4", "x86-64-v2", "arm64"])):
        backend = find_backend(name)
        assert isinstance(backend, StagedBackend)
        if backend.available() is None:
            for target in targets:
                made[f"{name} on {target}"] = tuple(backend.pipeline(Target(target)))
    return made


_BACKENDS = _of_backends()

PIPELINES: dict[str, tuple[Pass, ...]] = {
    "default": passes_of([Recognize(), Merge()]),
    "ranks": passes_of([Merge(), Precision("bf16"), Overlap()]),
    "training": passes_of([Recognize(), Merge(), Precision("bf16", computed=True)]),
    **{f"quantized to {scheme}": passes_of([Quantize(scheme), Precision("f32")]) for scheme in QUANTIZED},
    **_BACKENDS,
    **{f"{name}, with a budget": with_fit(with_donated(passes, ["x"]), FIT) for name, passes in _BACKENDS.items()},
}
"""Pipelines by name."""

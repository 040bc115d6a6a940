"""`compile_model`, the function behind `treadle.compile`."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from treadle.backends.registry import find_backend
from treadle.backends.staged import build
from treadle.compiled import Compiled
from treadle.frontends.declarations import Model
from treadle.frontends.torch_export.model import TorchModel
from treadle.ir.graph import Graph
from treadle.passes.framework.manager import PassManager, debug_level
from treadle.program.budgets import budget_of, parse_bytes
from treadle.program.options import CompileOptions
from treadle.program.weights import weights_of
from treadle.resolving import Resolved, StaticInputNeeded
from treadle.specializing import Specializing

Array = np.ndarray[Any, Any]


def compile_model(model: Model | Graph | TorchModel | str | Path, options: CompileOptions) -> Compiled:
    """Compile a model: see `treadle.compile`.

    If an input of an ONNX file determines shapes and the configuration does not give its value, the file is compiled at
    the first call with each new value: `treadle.specializing`.
    """
    where = options.where
    run, _ = options.precision()
    manager = PassManager(run, certify=options.certify, target=where)
    chosen = find_backend(options.backend)
    parse_bytes(options.memory)  # before anything is read

    def make(resolved: Resolved) -> Compiled:
        optimized = manager.run(resolved.graph)
        bound, drawn = weights_of(resolved, optimized.graph, options.weights, options.seed)
        budget = budget_of(options.memory, options.sizes, optimized.graph)
        executable, lowered = build(
            chosen,
            optimized.graph,
            where,
            bound,
            certify=options.certify,
            budget=budget,
            donate=options.donate,
            verified=True,
        )
        optimized = replace(optimized, lowered=lowered)
        if debug_level() >= 4:
            print(executable.source, file=sys.stderr)
        return Compiled(
            resolved.name,
            optimized,
            executable,
            options.backend,
            where,
            bound,
            resolved.unused,
            drawn,
            resolved.unread,
            options.record(),
        )

    try:
        resolved = options.resolve(model)
    except StaticInputNeeded as needed:
        return Specializing(needed.opened, needed.argument, make, backend=options.backend, target=where)
    return make(resolved)

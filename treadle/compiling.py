"""`compile_model`, the function behind `treadle.compile`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from treadle.backends.staged import build
from treadle.compiled import Compiled
from treadle.frontends.onnx_import.errors import StaticArgumentNeeded
from treadle.passes.framework.manager import PassManager, debug_level
from treadle.program.backend_choice import check_backend, choose_backend
from treadle.program.budgets import budget_of, parse_bytes
from treadle.program.options import CompileOptions
from treadle.program.source import AnyModel
from treadle.program.weights import weights_of
from treadle.specializing import Specializing

Array = np.ndarray[Any, Any]


def compile_model(model: AnyModel, options: CompileOptions) -> Compiled:
    """Compile a model: see `treadle.compile`.

    If an input of an ONNX file determines shapes and the configuration does not give its value, the file is compiled at
    the first call with each new value: `treadle.specializing`.
    """
    where = options.where
    run, _ = options.precision()
    manager = PassManager(run, certify=options.certify, target=where)
    requested = check_backend(options.backend)
    parse_bytes(options.memory)  # before anything is read

    source = options.open(model)

    def make(static: Mapping[str, Any]) -> Compiled:
        resolved = options.resolve(source, **static)
        optimized = manager.run(resolved.graph)
        chosen = choose_backend(options.backend, optimized.graph, where)
        bound, drawn = weights_of(resolved, optimized.graph, options.arrays, options.seed)
        budget = budget_of(options.memory, options.sizes, optimized.graph)
        executable, lowered = build(
            chosen.backend,
            optimized.graph,
            where,
            bound,
            certify=options.certify,
            budget=budget,
            donate=options.donate,
            verified=True,
            why=chosen.why,
        )
        optimized = replace(optimized, lowered=lowered)
        if debug_level() >= 4:
            print(executable.source, file=sys.stderr)
        return Compiled(
            resolved.name,
            optimized,
            executable,
            chosen.name,
            where,
            bound,
            resolved.unused,
            drawn,
            resolved.unread,
            options.record(),
        )

    try:
        return make({})
    except StaticArgumentNeeded as needed:
        _, widen = options.precision()
        inputs = source.inputs(widen, options.config)
        return Specializing(inputs, needed.argument, make, backend=requested, target=where)

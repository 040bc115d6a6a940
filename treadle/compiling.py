"""`compile_model`, the function behind `treadle.compile`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from treadle.backends.registry import find_backend
from treadle.backends.staged import build
from treadle.compiled import Compiled
from treadle.frontends.onnx_import.errors import StaticArgumentNeeded
from treadle.passes.framework.manager import debug_level
from treadle.program.budgets import budget_of, parse_bytes
from treadle.program.options import CompileOptions
from treadle.program.program import Program
from treadle.program.source import AnyModel
from treadle.specializing import Specializing

Array = np.ndarray[Any, Any]


def compile_model(model: AnyModel, options: CompileOptions) -> Compiled:
    """Compile a model: see `treadle.compile`.

    If an input of an ONNX file determines shapes, and the configuration does not set the input's value, the file is
    compiled at the first call with each new value: see `treadle.specializing`.
    """
    where = options.where
    stages = options.stages()
    chosen = find_backend(options.backend)
    parse_bytes(options.memory)  # raises before any file is read

    source = options.open(model)

    def make(static: Mapping[str, Any]) -> Compiled:
        program = Program(source, options).declared(**static).through(*stages)
        resolved, optimized = program.resolved, program.optimized
        bound, drawn = program.weights()
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
        return make({})
    except StaticArgumentNeeded as needed:
        inputs = source.inputs(options.widened, options.config)
        return Specializing(inputs, needed.argument, make, backend=options.backend, target=where)

"""`compile_model`, the function behind `treadle.compile`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from treadle.artifacts.loading import compile_artifact
from treadle.artifacts.tasks import stored_files
from treadle.backends.staged import build
from treadle.compiled import Compiled
from treadle.frontends.onnx_import.errors import StaticArgumentNeeded
from treadle.ir.graph import Graph
from treadle.passes.framework.facts import INITIAL
from treadle.passes.framework.manager import debug_level
from treadle.passes.stages import Lower, check_order
from treadle.program.backend_choice import check_backend, choose_backend
from treadle.program.budgets import budget_of, parse_bytes
from treadle.program.forms.artifact_form import ArtifactForm
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
    check_order((*stages, Lower(())), INITIAL)  # raises before any file is read, as the next two lines do
    requested = check_backend(options.backend)
    parse_bytes(options.memory)

    source = options.open(model)

    def make(static: Mapping[str, Any]) -> Compiled:
        program = Program(source, options).declared(**static).through(*stages)
        resolved, optimized = program.resolved, program.optimized
        chosen = choose_backend(options.backend, optimized.graph, where, torch_compile=options.torch_compile)
        bound, drawn = program.weights()
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
            partial(stored_files, source),
        )

    try:
        return make({})
    except StaticArgumentNeeded as needed:
        inputs = source.inputs(options.widened, options.config)
        return Specializing(inputs, needed.argument, make, backend=requested, target=where)


def compile_program(program: Program, inputs: Sequence[str] = (), outputs: Sequence[str] | None = None) -> Compiled:
    """Compile a program's model as declared, with these optional inputs, and all outputs or these. An artifact has the
    inputs with which it was compiled. Raises as `treadle.compile` and `treadle.load_artifact` do, and UsageError for
    options that cannot change an artifact.
    """
    source, options = program.source, program.options
    if isinstance(source.form, ArtifactForm):
        options.refuse_for_artifact(source.label, also=("tokenizer",))
        chosen = {name: getattr(options, name) for name in ("backend", "target") if name in options.explicit}
        return compile_artifact(
            source.form.content,
            source.label,
            memory=options.memory,
            sizes=options.sizes,
            outputs=outputs,
            **chosen,
        )
    return compile_model(program.source, program.options.but(inputs=inputs, outputs=outputs, cache=None))


def optimized_graph(program: Program) -> Graph:
    """Return the optimized graph of a program's model, which is not compiled. Raises as `Program.optimize` does."""
    form = program.source.form
    held = form.content.optimized if isinstance(form, ArtifactForm) else program.optimize(deferred=True)
    return held.graph

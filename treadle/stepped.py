"""The decoding step of a model: derived, compiled for a backend and target, and run with the model's own weights.

model = open_stepped("smollm2", backend="tvm")
session = model.session(rows=8, capacity=2048)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from treadle.backends.protocol import StatefulExecutable
from treadle.backends.registry import find_backend
from treadle.backends.staged import build
from treadle.files.shown_names import printable
from treadle.frontends.rotary import LongRope
from treadle.ir.errors import UsageError
from treadle.ir.graph import Graph
from treadle.ir.target import Target
from treadle.passes.framework.manager import Optimized
from treadle.passes.stages import Step, run
from treadle.passes.stepping.derivation import DerivedStep
from treadle.program.options import CompileOptions
from treadle.program.program import Program
from treadle.program.source import AnyModel
from treadle.runtime.session import CHUNK, Full, Session

if TYPE_CHECKING:
    from treadle.report.building import Report

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class SteppedModel:
    """The compiled decoding step that sessions of a model share.

    name        the model's name
    derived     the step's graph, with one function per entry
    optimized   the step's graph after the backend's passes
    executable  the compiled entries
    backend     the backend's name
    """

    name: str
    derived: DerivedStep
    optimized: Optimized
    executable: StatefulExecutable
    backend: str

    def session(
        self,
        *,
        rows: int = 8,
        capacity: int | None = None,
        chunk: int = CHUNK,
        full: Full = "error",
        memory: Mapping[str, int] | None = None,
        resumes: bool | None = None,
    ) -> Session:
        """Open a session, whose rows grow token by token; see `treadle.runtime.session.Session`.

        rows      maximum number of open rows
        capacity  maximum number of tokens of each row; None: the model's maximum
        chunk     maximum number of tokens of a row in one call
        full      what happens to a row that is full: "error", or "slide", which drops the older half
        memory    maximum sizes of inputs that are passed once per row, such as a source text, by symbol (`{"S": 512}`)
        resumes   True if rows reuse cached prefixes of slots; None: only if results stay bitwise identical

        Raises UsageError for sizes that the model does not support, BackendError if there is not enough memory.
        """
        return Session(
            self.derived,
            self.executable,
            rows=rows,
            capacity=capacity,
            chunk=chunk,
            full=full,
            memory=memory,
            resumes=resumes,
        )

    def report(self, **options: Any) -> Report:
        """Return the report on the step, as `treadle.compiled.Compiled.report` does for a model."""
        made: Report = import_module("treadle.report.building").report_of(self, **options)  # which imports this module
        return made


def step_of(
    name: str, graph: Graph, backend: str, target: Target, weights: Mapping[str, Array], cache: str | None = None
) -> SteppedModel:
    """Derive the decoding step of an optimized graph, and compile it. `cache` is the dtype of its caches; see
    `derive_step`.

    Raises PassError, with the reasons, if no step can be derived from the model; BackendError if the backend does not
    support states.
    """
    derived = run(graph, [Step(cache)]).products[DerivedStep]
    executable, optimized = build(find_backend(backend), derived.graph, target, weights)
    assert isinstance(executable, StatefulExecutable)  # `build_executable` refuses other backends
    return SteppedModel(name, derived, optimized, executable, backend)


def open_stepped(model: AnyModel, **options: Any) -> SteppedModel:
    """Compile the decoding step of the model that MODEL names. The model must have weights.

    A model whose rotary frequencies change for longer texts (`LongRope`) is compiled up to its full context, unless
    `longest` is passed.

    options  the options of `treadle.compile`, and `cache`, the dtype of the caches

    Raises as `compile` does; UsageError if the model has no weights; PassError if no step can be derived.
    """
    chosen = CompileOptions.of("session", options)
    source = chosen.open(model)
    program = Program(source, chosen).declared()
    resolved = program.resolved
    known = {} if resolved.model is None else {**resolved.model.defaults, **resolved.model.config}
    scaling = known.get("scaling")
    if isinstance(scaling, LongRope) and known.get("longest", 0) is None:
        program = Program(source, chosen).declared(longest=scaling.context)
    if chosen.arrays is None and program.resolved.weights is None:
        raise UsageError(f"{printable(source.label)} has no weights", hint="a folder with a checkpoint, or a GGUF file")
    program = program.through(*chosen.stages())
    weights, _ = program.weights()
    return step_of(resolved.name, program.graph, chosen.backend, chosen.where, weights, chosen.cache)

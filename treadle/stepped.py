"""The decoding step of a model: derived, compiled for a backend and target, and run with the model's own weights.

model = open_stepped("smollm2", backend="tvm")
session = model.session(rows=8, capacity=2048)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from treadle.backends.protocol import StatefulExecutable
from treadle.backends.staged import build
from treadle.frontends.rotary import Dynamic, LongRope
from treadle.ir.graph import Graph
from treadle.ir.target import Target
from treadle.ir.wording.checked_calls import with_checked_call, with_checked_methods
from treadle.passes.framework.facts import INITIAL
from treadle.passes.framework.manager import Optimized
from treadle.passes.stages import DeriveStep, Lower, check_order, run
from treadle.passes.stepping.derivation import DerivedStep
from treadle.program.backend_choice import choose_backend
from treadle.program.forms.artifact_form import ArtifactForm
from treadle.program.other_names import hints_for
from treadle.program.program import Program
from treadle.program.source import AnyModel
from treadle.runtime.session import CHUNK, Full, Session

if TYPE_CHECKING:
    from treadle.report.building import Report

Array = np.ndarray[Any, Any]


SESSION_HINTS = hints_for("rows", "capacity")
"""Hints for options of a session by their names in other libraries."""


@with_checked_methods()
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

    @with_checked_call(SESSION_HINTS)
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

    def report(self, *, sizes: Mapping[str, int] | None = None) -> Report:
        """Return the report on the step at these sizes, as `treadle.compiled.Compiled.report` does for a model."""
        from treadle.report.building import report_of
        from treadle.report.subjects import Subject

        parts = self.name, self.optimized, self.backend, Target("cpu"), self.executable
        return report_of(Subject(*parts, derived=self.derived), sizes=sizes)


def step_of(
    name: str,
    graph: Graph,
    backend: str,
    target: Target,
    weights: Mapping[str, Array],
    cache: str | None = None,
    *,
    before: Sequence[str] = (),
    device_sampling: str | None = None,
    torch_compile: bool = False,
) -> SteppedModel:
    """Derive the decoding step of an optimized graph, and compile it.

    cache   the dtype of its caches; see `derive_step`
    before  backends that "auto" prefers to others
    device_sampling  the tokens that sessions return in place of logits; see `derive_step`
    torch_compile    True for the torch backend with torch.compile

    Raises PassError, with the reasons, if no step can be derived from the model; BackendError if the backend does not
    support states.
    """
    derived = run(graph, [DeriveStep(cache, device_sampling)]).products[DerivedStep]
    chosen = choose_backend(backend, derived.graph, target, before=before, torch_compile=torch_compile)
    executable, optimized = build(chosen.backend, derived.graph, target, weights, why=chosen.why)
    assert isinstance(executable, StatefulExecutable)  # `build_executable` refuses other backends
    return SteppedModel(name, derived, optimized, executable, chosen.name)


def open_stepped(model: AnyModel, **options: Any) -> SteppedModel:
    """Compile the decoding step of the model that MODEL names. The model must have weights.

    A model whose rotary frequencies change for texts beyond a context (`Dynamic`, `LongRope`) is compiled up to this
    context, unless `longest` is given.

    options  the options of `treadle.compile`, `cache`, the dtype of the caches, and `device_sampling`; for an artifact,
             which is compiled already, only `backend`, `target`, `limits`, `cache` and `device_sampling`

    Raises as `compile` does; UsageError if the model has no weights; PassError if no step can be derived.
    """
    return stepped_program(Program.of(model, "session", **options))


def stepped_program(program: Program) -> SteppedModel:
    """Compile the decoding step of a program's model, as `open_stepped` does."""
    chosen, source = program.options, program.source
    if isinstance(source.form, ArtifactForm):
        chosen.refuse_for_artifact(source.label, also=("cache", "device_sampling", "tokenizer"))
        held = source.form.content
        target = chosen.where if "target" in chosen.explicit else Target(held.target)
        graph = held.optimized.graph
        return step_of(
            held.name,
            graph,
            chosen.backend,
            target,
            held.weights,
            chosen.cache,
            before=[held.backend],
            device_sampling=chosen.device_sampling,
        )
    stages = chosen.stages()
    check_order((*stages, DeriveStep(), Lower(())), INITIAL)
    program = Program(source, chosen).declared()
    resolved = program.resolved
    known = {} if resolved.model is None else {**resolved.model.defaults, **resolved.model.config}
    scaling = known.get("scaling")
    if isinstance(scaling, Dynamic | LongRope) and known.get("longest", 0) is None:
        program = Program(source, chosen).declared(longest=scaling.context)
    if chosen.arrays is None and program.resolved.weights is None:
        raise source.without_weights()
    program = program.through(*stages)
    weights, _ = program.weights()
    return step_of(
        resolved.name,
        program.graph,
        chosen.backend,
        chosen.where,
        weights,
        chosen.cache,
        device_sampling=chosen.device_sampling,
        torch_compile=chosen.torch_compile,
    )

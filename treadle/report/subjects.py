"""The subject of a report: the parts of a compiled model, or of a model that is lowered without its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from treadle.backends.staged import StagedBackend
from treadle.ir.analysis.cost import parameter_bytes
from treadle.ir.graph import Graph
from treadle.ir.target import Target
from treadle.passes.framework.manager import Optimized
from treadle.passes.stepping.derivation import DerivedStep
from treadle.program.backend_choice import check_backend, choose_backend
from treadle.program.budgets import budget_of
from treadle.program.options import CompileOptions
from treadle.program.program import Program
from treadle.program.source import AnyModel


@dataclass(frozen=True, eq=False)
class Subject:
    """The parts of a compiled model, or of a compiled decoding step, that a report needs. Weights are not needed.

    optimized   the stages, including the backend's
    executable  the backend's executable, for its code; None if no code was generated
    unused      tensors of the checkpoint that the model does not use
    unread      the keys of config.json that the model's family does not know
    originals   the weights of a checkpoint, before any is encoded; None if they are not at hand
    has_weights  True if the executable has the model's weights, so that its kernels can be timed
    derived     the step's graph before the backend's passes; None for a model
    """

    name: str
    optimized: Optimized
    backend: str
    target: Target
    executable: object = None
    unused: Sequence[str] = ()
    unread: Sequence[str] = ()
    originals: Mapping[str, Any] | None = field(default=None, repr=False)
    has_weights: bool = False
    derived: DerivedStep | None = None


def lowered_subject(model: AnyModel, **options: Any) -> Subject:
    """Optimize the model that MODEL names, and lower it for a backend. No weight is read or drawn here.

    options  as in `treadle.compile`

    Code is generated with zeros as weights. If these take more than `MOST_ZEROS` bytes, the subject has no code. Raises
    as `compile` does.
    """
    asked = CompileOptions.of("compile", options)
    where = asked.where
    check_backend(asked.backend)
    program = Program(model, asked).optimize(deferred=True)
    resolved, optimized = program.resolved, program.optimized
    choice, executable = choose_backend(asked.backend, optimized.graph, where), None
    if isinstance(chosen := choice.backend, StagedBackend):
        budget = budget_of(asked.memory, asked.sizes, optimized.graph)
        lowered = chosen.lower(optimized.graph, where, budget=budget, donate=asked.donate, verified=True)
        optimized = replace(optimized, lowered=lowered)
        if parameter_bytes(optimized.graph) <= MOST_ZEROS:
            executable = chosen.emit(lowered.graph, where, _zeros(optimized.graph), optimized.graph, lowered.plan)
    given = asked.arrays if asked.arrays is not None else resolved.weights
    return Subject(resolved.name, optimized, choice.name, where, executable, resolved.unused, resolved.unread, given)


MOST_ZEROS = 1 << 30
"""Limit on the bytes of zeros that stand for weights."""


def _zeros(graph: Graph) -> dict[str, Any]:
    return {
        name: np.zeros(value.type.storage_type.evaluate({}), value.type.storage_type.dtype.numpy)
        for name, value in graph.parameters.items()
    }

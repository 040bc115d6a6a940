"""The step of a model: derived, compiled for a backend and target, over the same weights as the model itself.

model = open_stepped("smollm2", backend="tvm")
session = model.session(rows=8, capacity=2048)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from treadle.backends.protocol import StatefulExecutable
from treadle.backends.registry import find_backend
from treadle.backends.staged import build
from treadle.computing import computing_in
from treadle.files.shown_names import printable
from treadle.frontends.rotary import LongRope
from treadle.ir.errors import UsageError
from treadle.ir.graph import Graph
from treadle.ir.target import Target
from treadle.ir.transforms.encoded_weights import encode_weights, given_parameters
from treadle.passes.framework.manager import Optimized, PassManager
from treadle.passes.pipelines import DEFAULT
from treadle.passes.stepping.derivation import DerivedStep, derive_step
from treadle.resolving import resolve
from treadle.runtime.session import CHUNK, Full, Session

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class SteppedModel:
    """What sessions of a model share.

    name        the model's
    derived     the graph of entries
    optimized   what the backend's passes made of it
    executable  the entries
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
        """Rows that grow token by token; see `treadle.runtime.session.Session`.

        rows      how many may be open at a time
        capacity  the most tokens of each; None: as many as the model takes
        chunk     the most tokens of a row that one call takes
        full      what happens to a row that is full: "error", or "slide", which forgets the older half
        memory    what rows bring once, such as a source text: its size at most, by name (`{"S": 512}`)
        resumes   whether rows go on from what slots hold of texts that begin alike; None: where no bits change by it

        Raises UsageError for sizes that the model does not take, BackendError where there is not enough memory.
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


def step_of(
    name: str, graph: Graph, backend: str, target: Target, weights: Mapping[str, Array], cache: str | None = None
) -> SteppedModel:
    """Derive the step of an optimized graph, and compile it; `cache` is the dtype of its caches, see `derive_step`.

    Raises PassError where the model has no step, with what stands against it; BackendError where the backend has no
    states.
    """
    derived = derive_step(graph, cache=cache)
    executable, optimized = build(find_backend(backend), derived.graph, target, weights)
    assert isinstance(executable, StatefulExecutable)  # others are refused where they are built
    return SteppedModel(name, derived, optimized, executable, backend)


def open_stepped(
    model: str | Path,
    *,
    backend: str = "numpy",
    target: str | Target = "cpu",
    dtype: str | None = None,
    quantize: str | None = None,
    limits: Mapping[str, int] | None = None,
    cache: str | None = None,
    **config: Any,
) -> SteppedModel:
    """The step of what MODEL names, which must have weights. Raises what `compile` does; PassError for no step.

    A model that turns by other frequencies where texts are longer (`LongRope`) takes them up to its context, unless
    `longest` says otherwise.

    dtype, quantize   as `compile` takes them
    cache             the dtype of its caches: "f32", "bf16" or "f16"; None: the model's own
    """
    passes, widen = computing_in(dtype, DEFAULT, config.pop("widen", ()), quantize)
    resolved = resolve(model, limits=limits, widen=widen, **config)
    options = {} if resolved.model is None else {**resolved.model.defaults, **resolved.model.config}
    scaling = options.get("scaling")
    if isinstance(scaling, LongRope) and options.get("longest", 0) is None:
        resolved = resolve(model, limits=limits, widen=widen, **{**config, "longest": scaling.context})
    if resolved.weights is None:
        raise UsageError(f"{printable(str(model))} has no weights", hint="a folder with a checkpoint, or a GGUF file")
    graph = PassManager(passes).run(resolved.graph).graph
    where = target if isinstance(target, Target) else Target(target)
    weights = encode_weights(graph, {n: resolved.weights[n] for n in given_parameters(graph)})
    return step_of(resolved.name, graph, backend, where, weights, cache)

"""Artifacts: save a compiled model to one `.treadle` file, and load it.

    made = treadle.compile("gpt2")
    made.save("gpt2.treadle")
    exe = treadle.load_artifact("gpt2.treadle")
    exe(tokens=ids)                       # bitwise identical results

The file holds the text of the declared and of the optimized graph, the weights, the pass log, and the chosen backend,
target and passes. The file holds no code: loading passes the optimized graph to a backend, and runs no pass.
docs/artifacts.md describes the layout and the checks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from treadle.artifacts.reading import Artifact, ArtifactLimits, open_artifact
from treadle.backends.staged import build
from treadle.compiled import Compiled
from treadle.files.contained_files import PathLike
from treadle.files.shown_names import printable
from treadle.ir.collector_pause import collection_paused
from treadle.ir.errors import CheckpointError, TreadleError
from treadle.ir.target import Target
from treadle.ir.transforms.chosen_outputs import choose_outputs
from treadle.ir.transforms.widening import narrow_dtypes, widen_graph
from treadle.ir.types import DType
from treadle.ir.wording.checked_calls import with_checked_call
from treadle.passes.cleanup.dead_code import DeadCode
from treadle.passes.framework.manager import Optimized, PassManager
from treadle.program.backend_choice import AUTO, choose_backend
from treadle.program.budgets import budget_of
from treadle.program.option_table import declared_options
from treadle.program.places import refuse_to_save


@with_checked_call()
def save(compiled: Compiled, path: PathLike) -> str:
    """Write a compiled model to the file `path`: see `Compiled.save`."""
    if not isinstance(compiled, Compiled):
        raise refuse_to_save(compiled)
    return compiled.save(path)


_COMPILED = dict.fromkeys(declared_options(), "leave it out, or compile the model again with t.compile, which takes it")


@with_checked_call({**_COMPILED, "device": "target=..."})
@collection_paused()
def load_artifact(
    path: PathLike,
    *,
    backend: str | None = None,
    target: str | Target | None = None,
    limits: ArtifactLimits | Mapping[str, int] | None = None,
    check: bool = True,
    widen: str | Iterable[str] = (),
    memory: int | str | None = None,
    sizes: Mapping[str, int] | None = None,
    donate: Sequence[str] = (),
) -> Compiled:
    """Load a compiled model from `path`, a file written by `save`.

    backend          as in `compile`; by default the one that the model was compiled for, or "auto" if that one is not
                     installed
    target           overrides the target that the model was compiled for
    widen            "bf16", "f16", or both: values of these dtypes are computed in f32, as in `compile`
    limits           limits on the file: `ArtifactLimits`, or a mapping of the limits that differ from the defaults
    check            True to compare every weight with its hash, which reads the whole file once
    memory, sizes    memory budget of a run, and the maximum sizes it applies to, as in `compile`
    donate           inputs that callers donate, as in `compile`

    The file contains no code, and loading runs no pass: the backend lowers the optimized graph. A sharding plan in the
    file is not applied. Raises CheckpointError, ParseError or VerifyError, with section and place, if the file is
    damaged, is not an artifact, or exceeds a limit; PassError for an invalid sharding plan; BackendError as `compile`
    does.
    """
    held = _widened(open_artifact(path, limits=limits, check=check), narrow_dtypes(widen))
    return compile_artifact(held, str(path), backend=backend, target=target, memory=memory, sizes=sizes, donate=donate)


def compile_artifact(
    artifact: Artifact,
    path: str,
    *,
    backend: str | None = None,
    target: str | Target | None = None,
    memory: int | str | None = None,
    sizes: Mapping[str, int] | None = None,
    donate: Sequence[str] = (),
    outputs: Sequence[str] | None = None,
) -> Compiled:
    """Compile the graph of an opened artifact. The options and errors are those of `load_artifact`.

    path     the file's name in errors
    outputs  as in `compile`; None: all
    """
    if outputs is not None:
        artifact = _with_outputs(artifact, outputs)
    where = target if isinstance(target, Target) else Target(artifact.target if target is None else target)
    asked = (AUTO, artifact.backend) if backend is None else (backend,)
    budget = budget_of(memory, sizes, artifact.optimized.graph)
    try:
        chosen = choose_backend(asked[0], artifact.optimized.graph, where, before=asked[1:])
        executable, lowered = build(
            chosen.backend,
            artifact.optimized.graph,
            where,
            artifact.weights,
            budget=budget,
            donate=donate,
            why=chosen.why,
        )
    except TreadleError:
        raise
    except Exception as error:  # our frontends make no such graph, and the backend's own error would not help
        raise CheckpointError(
            f"backend {asked[-1]} cannot lower the graph that the artifact holds",
            received=f"{type(error).__name__}: {printable(str(error))}",
            within=f"{printable(path)}: section graph",
        ) from error
    optimized = replace(artifact.optimized, lowered=lowered)
    return Compiled(
        artifact.name,
        optimized,
        executable,
        chosen.name,
        where,
        artifact.weights,
        seed=artifact.seed,
        options=artifact.options,
        _stored_files=lambda graph: artifact.files,
    )


def _with_outputs(artifact: Artifact, outputs: Sequence[str]) -> Artifact:
    """Return the artifact with these outputs, and without the operations and weights that only other outputs need."""
    declared, graph = (choose_outputs(g, outputs) for g in (artifact.optimized.source, artifact.optimized.graph))
    graph = PassManager([DeadCode()]).run(graph).graph
    weights = {name: artifact.weights[name] for name in graph.parameters}
    return replace(
        artifact, optimized=Optimized(declared, graph, artifact.optimized.log), weights=weights, sharding=None
    )


def _widened(held: Artifact, narrow: frozenset[DType]) -> Artifact:
    """Return the artifact with all values and weights of the dtypes in `narrow` widened to f32."""
    if not narrow:
        return held
    declared, graph = (widen_graph(g, narrow) for g in (held.optimized.source, held.optimized.graph))
    kept = {name: v.type.dtype for name, v in held.optimized.graph.parameters.items()}
    weights = {n: np.asarray(w, np.float32) if kept[n] in narrow else w for n, w in held.weights.items()}
    # the sharding plan is dropped: it refers to the stored graph
    return replace(held, optimized=Optimized(declared, graph, held.optimized.log), weights=weights, sharding=None)

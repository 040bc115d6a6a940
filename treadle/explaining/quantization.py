"""`explain_quantization`: of every weight of a model which encoding it has or would get, and why."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from treadle.artifacts import is_artifact
from treadle.computing import QUANTIZED, computing_in
from treadle.frontends.declarations import Model
from treadle.ir.errors import UsageError
from treadle.ir.graph import Graph
from treadle.passes.framework.manager import Pass, PassManager
from treadle.passes.pipelines import DEFAULT
from treadle.passes.quantization.plan_checking import check_quantization
from treadle.passes.quantization.planning import plan_quantization
from treadle.passes.quantization.quantization_plan import QuantizationPlan
from treadle.resolving import resolve


def explain_quantization(
    model: Model | Graph | str | Path,
    *,
    quantize: str | None = None,
    passes: Sequence[Pass] = DEFAULT,
    inputs: Sequence[str] | None = None,
    dtype: str | None = None,
    widen: str | Iterable[str] = (),
    **config: Any,
) -> QuantizationPlan:
    """The plan that `compile(model, quantize=...)` would follow, checked; by default that of "int8-weights".

    Weights that a file holds in blocks are told as they are. Raises what `compile` does; UsageError for an artifact,
    which is quantized or not already.
    """
    if is_artifact(model):
        hint = "explain the model it is made of"
        raise UsageError("an artifact holds what was compiled, not how", received=str(model), hint=hint)
    scheme = QUANTIZED[0] if quantize is None else quantize
    computing_in(None, (), (), scheme)  # which refuses an unknown one
    pipeline, widen = computing_in(dtype, passes, widen)
    resolved = resolve(model, inputs=inputs, widen=widen, **config)
    graph = PassManager(pipeline).run(resolved.graph).graph
    plan = plan_quantization(graph, scheme)
    check_quantization(plan, graph)
    return plan

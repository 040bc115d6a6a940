"""`explain_quantization`: for every weight of a model, its current or planned encoding, and the reason."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from treadle.artifacts import is_artifact
from treadle.computing import QUANTIZED, computing_in
from treadle.ir.errors import UsageError
from treadle.passes.framework.manager import Pass, PassManager
from treadle.passes.pipelines import DEFAULT
from treadle.passes.quantization.plan_checking import check_quantization
from treadle.passes.quantization.planning import plan_quantization
from treadle.passes.quantization.quantization_plan import QuantizationPlan
from treadle.program.source import AnyModel
from treadle.resolving import resolve


def explain_quantization(
    model: AnyModel,
    *,
    quantize: str | None = None,
    passes: Sequence[Pass] = DEFAULT,
    inputs: Sequence[str] | None = None,
    dtype: str | None = None,
    widen: str | Iterable[str] = (),
    **config: Any,
) -> QuantizationPlan:
    """Return the checked plan of `compile(model, quantize=...)`; by default, quantize is "int8-weights".

    Weights that a file stores in blocks are listed as they are. Raises as `compile` does; UsageError for an artifact,
    whose quantization is already decided.
    """
    if is_artifact(model):
        hint = "explain the model that it was compiled from"
        raise UsageError("an artifact does not record how it was compiled", received=str(model), hint=hint)
    scheme = QUANTIZED[0] if quantize is None else quantize
    computing_in(None, (), (), scheme)  # refuses an unknown scheme
    pipeline, widen = computing_in(dtype, passes, widen)
    resolved = resolve(model, inputs=inputs, widen=widen, **config)
    graph = PassManager(pipeline).run(resolved.graph).graph
    plan = plan_quantization(graph, scheme)
    check_quantization(plan, graph)
    return plan

"""`explain_quantization`: the current or planned encoding of every weight of a model, and the reason."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from treadle.artifacts.reading import is_artifact
from treadle.ir.errors import UsageError
from treadle.passes.quantization.plan_checking import check_quantization
from treadle.passes.quantization.planning import plan_quantization
from treadle.passes.quantization.quantization_plan import QuantizationPlan
from treadle.passes.stages import QUANTIZED, Quantize
from treadle.program.options import CompileOptions
from treadle.program.program import Program
from treadle.program.source import AnyModel


def explain_quantization(model: AnyModel, **options: Any) -> QuantizationPlan:
    """Return the checked plan of `compile(model, quantize=...)`. By default, quantize is "int8-weights".

    Weights that a file stores in blocks are listed in that encoding. The roundings of inputs that a quantized folder
    asks for are listed too. Raises as `compile` does; UsageError for an
    artifact, since its weights are already quantized or not.
    """
    if is_artifact(model):
        hint = "explain the model that it was compiled from"
        raise UsageError("an artifact does not record how it was compiled", received=str(model), hint=hint)
    chosen = CompileOptions.of("explain quantization", options, quantize=QUANTIZED[0])
    chosen.stages()  # refuses an unknown scheme
    scheme = chosen.quantize
    assert scheme is not None
    program = Program(model, chosen).optimize(before=Quantize)
    plan = replace(plan_quantization(program.graph, scheme), stored=program.resolved.rounded)
    check_quantization(plan, program.graph)
    return plan

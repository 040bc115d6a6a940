"""`verify_model`: compare every available backend with the float64 reference of a model.

`treadle.runtime.verification` describes the comparison and its tolerances.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from treadle.artifacts.reading import is_artifact, open_artifact
from treadle.backends.registry import backend_names, find_backend
from treadle.ir.analysis.drawn_inputs import small_sizes
from treadle.ir.transforms.balances import balances_of
from treadle.ir.transforms.encoded_weights import encode_weights, quantized_alike
from treadle.program.budgets import choose_sizes
from treadle.program.options import CompileOptions
from treadle.program.program import Program
from treadle.program.source import AnyModel
from treadle.program.weights import initial_weights
from treadle.runtime.verification import verify_backends
from treadle.runtime.verification_report import VerificationReport

Array = np.ndarray[Any, Any]


def verify_model(
    model: AnyModel,
    *,
    backends: Sequence[str] | None = None,
    sizes: Sequence[Mapping[str, int]] | None = None,
    emit: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> VerificationReport:
    """Run a model on random inputs in every backend, and compare the results with the float64 reference: the outputs,
    and each op.

    model     as in `treadle.compile`, or an artifact, whose own graphs and weights are then verified
    backends  names of backends; default: all registered backends
    sizes     mappings of symbols to sizes; default: a few mappings of small sizes. A missing symbol gets a small
              size.
    emit      called with each line of the report as soon as the line is complete
    options   the options of `treadle.compile`; `seed` also draws the inputs

    The reference computes every op in float64, so a large model takes long. Raises as `compile` does if the model
    cannot be read or traced, and UsageError if no input can be drawn. The failure of a backend is part of the report.
    """
    chosen = CompileOptions.of("verify", options)
    for name in {*(backends or ())} - {*backend_names()}:
        find_backend(name)  # raises the error of an unknown name
    if is_artifact(model):
        chosen.refuse_for_artifact(model, also=("seed",))
        held = open_artifact(str(model), limits=chosen.limits)
        source = quantized_alike(held.optimized.source, held.optimized.graph)  # the file has only the blocks
        optimized, given = replace(held.optimized, source=source), dict(held.weights)
        for name, value in optimized.source.parameters.items():  # parameters that no output needs are not in the file
            given.setdefault(
                name, np.zeros(value.type.storage_type.evaluate({}), value.type.storage_type.dtype.numpy or np.float32)
            )
    else:
        program = Program(model, chosen).optimize()
        resolved, optimized = program.resolved, program.optimized
        found = chosen.arrays if chosen.arrays is not None else resolved.weights
        given = initial_weights(optimized.source, chosen.seed) if found is None else dict(found)
        if chosen.quantize is not None:  # quantized weights are compared with their decoded values
            source = quantized_alike(optimized.source, optimized.graph)
            optimized, given = (
                replace(optimized, source=source),
                encode_weights(source, given, balances_of(optimized.graph)),
            )
    if sizes is not None:
        symbols = set(optimized.source.symbols)
        least = small_sizes(optimized.source)[-1] if any(symbols - set(each) for each in sizes) else {}
        sizes = [choose_sizes(optimized.source, {**least, **each}) for each in sizes]
    return verify_backends(
        optimized, given, backends=backends, target=chosen.where, sizes=sizes, seed=chosen.seed, emit=emit
    )

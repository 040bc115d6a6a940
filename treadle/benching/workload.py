"""The workload of a benchmark: a model by name, with its options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from treadle.artifacts import is_artifact, open_artifact
from treadle.compiling import initial_weights
from treadle.fetch import fetched_model
from treadle.ir.graph import Graph
from treadle.ir.transforms.encoded_weights import quantized_alike
from treadle.option_values import parse_config, parse_limits
from treadle.resolving import resolve
from treadle.wheels.pinned_models import PINNED

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Workload:
    """A model and its options.

    model    a name, as on the command line
    backend  of our side
    chosen   optional inputs to include
    config   NAME=VALUE
    limit    NAME=N
    dtype, widen, seed, quantize  as in `treadle.compile`
    """

    model: str
    backend: str = "tvm"
    threads: int = 1
    chosen: Sequence[str] | None = None
    config: Sequence[str] = ()
    limit: Sequence[str] = ()
    dtype: str | None = None
    widen: Sequence[str] = ()
    seed: int = 0
    quantize: str | None = None


def files_of(model: str) -> tuple[Path | None, Path | None]:
    """Return the model's Hugging Face folder and its GGUF file, None for a file that it does not have."""
    place = Path(model)
    if model in PINNED:
        place = fetched_model(model) or place
    files = [place] if place.is_file() else sorted(place.glob("*.gguf"))
    gguf = files[0] if len(files) == 1 and files[0].suffix == ".gguf" else None
    return place if (place / "config.json").is_file() else None, gguf


def opened(workload: Workload) -> tuple[Graph, Mapping[str, Array]]:
    """Return the graph as declared, and its weights."""
    if is_artifact(workload.model):
        held = open_artifact(workload.model, limits=parse_limits(workload.limit))
        return quantized_alike(held.optimized.source, held.optimized.graph), held.weights
    resolved = resolve(
        workload.model,
        inputs=None if workload.chosen is None else tuple(workload.chosen),
        widen=tuple(workload.widen),
        **parse_config(workload.config, workload.limit),
    )
    graph = resolved.graph
    return graph, initial_weights(graph, workload.seed) if resolved.weights is None else resolved.weights

"""The workload of a benchmark: a model by name, with its options."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from treadle.artifacts.reading import is_artifact, open_artifact
from treadle.fetching import fetched_model
from treadle.hub_models import cached_hub_model, is_hub_name
from treadle.ir.graph import Graph
from treadle.ir.transforms.encoded_weights import quantized_alike
from treadle.program.backend_choice import AUTO, fastest_installed
from treadle.program.flag_values import parse_config
from treadle.program.option_table import declared_options
from treadle.program.options import CompileOptions
from treadle.program.weights import initial_weights
from treadle.wheels.pinned_models import PINNED

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Workload:
    """A model and its options.

    model     a name, as on the command line
    threads   the number of threads of every tool
    keywords  the options that are set, as keyword arguments of `treadle.compile`
    """

    model: str
    threads: int = 1
    keywords: Mapping[str, Any] = field(default_factory=dict)

    @property
    def options(self) -> CompileOptions:
        """The options of Treadle's side. "auto" is the fastest installed backend, which decides the threads."""
        chosen = CompileOptions.of("bench", self.keywords)
        return chosen.but(backend=fastest_installed()) if chosen.backend == AUTO else chosen

    def as_dict(self) -> dict[str, Any]:
        """Return the workload as JSON, with the model's configuration as text: `act=t.relu`."""
        chosen = self.options.keywords() | {"backend": self.options.backend}
        config = chosen.pop("config", {})
        texts = [f"{n}={f't.{v.__name__}' if callable(v) else json.dumps(v)}" for n, v in config.items()]
        return {"model": self.model, "threads": self.threads, "options": chosen, "config": texts}

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> Workload:
        """Return the workload that `as_dict` returned as JSON."""
        config = parse_config(facts["config"], declared_options())
        return cls(facts["model"], facts["threads"], {**facts["options"], "config": config})


def files_of(model: str) -> tuple[Path | None, Path | None]:
    """Return the model's Hugging Face folder and its GGUF file; None for what it does not have."""
    place = Path(model)
    if model in PINNED:
        place = fetched_model(model) or place
    elif is_hub_name(model) and not place.exists():
        place = cached_hub_model(model)
    files = [place] if place.is_file() else sorted(place.glob("*.gguf"))
    gguf = files[0] if len(files) == 1 and files[0].suffix == ".gguf" else None
    return place if (place / "config.json").is_file() else None, gguf


def opened(workload: Workload) -> tuple[Graph, Mapping[str, Array]]:
    """Return the graph as declared, and its weights."""
    chosen = workload.options
    if is_artifact(workload.model):
        chosen.refuse_for_artifact(workload.model, also=("seed", "widen"))
        held = open_artifact(workload.model, limits=chosen.limits)
        return quantized_alike(held.optimized.source, held.optimized.graph), held.weights
    resolved = chosen.but(dtype=None).resolve(workload.model)
    graph = resolved.graph
    given = resolved.weights if chosen.arrays is None else chosen.arrays
    return graph, initial_weights(graph, chosen.seed) if given is None else given

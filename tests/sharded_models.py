"""Small models of every family of the zoo, with weights and inputs, for sharding tests."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np

from treadle.ir.analysis.drawn_inputs import draw_inputs
from treadle.ir.graph import Graph
from treadle.ir.interpreter import interpret
from treadle.models.registry import family_names, find_family
from treadle.passes.framework.manager import PassManager
from treadle.passes.pipelines import RECOGNITION
from treadle.program.weights import initial_weights

FAMILIES = family_names()
Array = np.ndarray[Any, Any]

_SMALL = {"layers": 2, "dim": 32, "heads": 8, "vocab": 37, "hidden": 40, "context": 16, "kv_heads": 4, "head_dim": 4}
"""Small options, by the last part of their name. No mesh divides 37, and some meshes have more ranks than there are key
heads.
"""


def small_options(family: str) -> dict[str, Any]:
    """Return options that make a family's model small."""
    found: dict[str, Any] = {}
    for name, default in find_family(family).model.defaults.items():
        for end, value in _SMALL.items():
            if (name == end or name.endswith(f"_{end}")) and (
                isinstance(default, int) or (family, name) == ("llama", "kv_heads")
            ):
                found[name] = value
    return {**found, **SPECIAL.get(family, {})}


_TEXT = {"vocab": 11, "dim": 12, "heads": 3, "head_dim": 6, "hidden": 20}
_TOWER = {"dim": 32, "heads": 8, "layers": 2, "hidden": 40}
SPECIAL: Mapping[str, dict[str, Any]] = {
    "clip": {
        **{"height": 16, "width": 16, "projection": 24},
        "text": {**_TOWER, "vocab": 37, "context": 16},
        "vision": {**_TOWER, "patch": 8, "height": 16, "width": 16},
    },
    "dinov2": {"height": 16, "width": 16, "patch": 8, "grid": 2, "labels": 8},
    "electra": {"embedding": 24},
    "gpt_neox": {"rotary_dims": 2},
    "idefics3": {
        **{"channels": 2, "height": 8, "width": 12, "shuffle": 1},
        "text": {**_TEXT, "layers": 2},
        "vision": {"dim": 12, "heads": 3, "hidden": 20, "layers": 2, "patch": 4},
    },
    "llava": {
        **{"channels": 2, "height": 8, "width": 12},
        "text": {**_TEXT, "layers": 2},
        "vision": {
            "dim": 12,
            "heads": 3,
            "hidden": 20,
            "layers": 2,
            "channels": 2,
            "height": 8,
            "width": 12,
            "patch": 4,
        },
    },
    "qwen2_vl": {
        **{"width": 24, "sections": (1, 1, 1)},
        "text": {**_TEXT, "layers": 2},
        "vision": {"dim": 12, "heads": 3, "layers": 2, "hidden": 20, "patch": 2},
    },
    "siglip": {
        **{"height": 16, "width": 16},
        "text": {**_TOWER, "vocab": 37, "context": 16, "projection": 32},
        "vision": {**_TOWER, "patch": 8, "height": 16, "width": 16},
    },
    "vit": {"height": 16, "width": 16, "patch": 8},
}


@cache
def recognized(family: str) -> Graph:
    """Return the graph to split, after recognition."""
    return PassManager(RECOGNITION).run(find_family(family).model.configure(**small_options(family)).graph()).graph


@cache
def numbers(family: str) -> tuple[dict[str, Array], dict[str, Array], dict[str, Array]]:
    """Return weights (none of them all zeros or all ones), inputs, and the whole model's outputs in float64."""
    graph = recognized(family)
    rng = np.random.default_rng(0)
    weights = {n: a + 0.05 * rng.standard_normal(a.shape) for n, a in initial_weights(graph).items()}
    sizes = {s: min(11, bounds.upper or 11) for s, bounds in graph.symbols.items()}
    inputs = draw_inputs(graph, sizes, [0])
    return weights, inputs, interpret(graph, inputs, weights, float64=True)

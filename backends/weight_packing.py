"""Weights in the layouts that kernels read: as they are, or in panels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from treadle.backends.bfloat16 import rounded
from treadle.backends.lowering.program import KernelProgram, Panels, Slot
from treadle.backends.python_executable import collect_weights, misfit, shape_fits
from treadle.ir.graph import Graph
from treadle.ir.types import Type

Array = np.ndarray[Any, Any]


def pack_weights(graph: Graph, program: KernelProgram, weights: Mapping[str, Any]) -> dict[Slot, Array]:
    """An array for each parameter in each of its layouts. Raises BackendError for a missing weight or a misfit."""
    arrays = collect_weights(graph, weights, _taken)
    return {slot: _laid_out(arrays[slot.name], slot.layout) for slot in program.weights}


def _taken(name: str, wanted: Type, value: Any) -> Array:
    array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
    if array.dtype != (wanted.dtype.numpy or np.float32) or not shape_fits(wanted, array.shape):
        raise misfit(name, wanted, f"{array.dtype}{list(array.shape)}")
    array = np.ascontiguousarray(array).reshape(array.shape)
    return rounded(array) if wanted.dtype.numpy is None else array


def _laid_out(array: Array, layout: Panels | None) -> Array:
    if layout is None:
        return array
    matrix = array.T if layout.transposed else array
    n, k = matrix.shape
    panels = -(-n // layout.width)
    made = np.zeros((panels, k, layout.width), array.dtype)
    for panel in range(panels):
        rows = matrix[panel * layout.width : (panel + 1) * layout.width]
        made[panel, :, : len(rows)] = rows.T
    return made

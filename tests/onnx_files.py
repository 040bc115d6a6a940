"""Graphs as ONNX files, and their results in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.op_checks import Array
from treadle.backends.onnx.exporter import (
    Exported,
    export_onnx,
)
from treadle.ir.graph import Graph

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")


def session(path: Path) -> Any:
    """Open a file in ONNX Runtime, after ONNX's checker has accepted it, shapes and dtypes included."""
    onnx.checker.check_model(str(path), full_check=True)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(opened: Any, inputs: Mapping[str, Array]) -> dict[str, Array]:
    return dict(zip([o.name for o in opened.get_outputs()], opened.run(None, dict(inputs)), strict=True))


def exported(
    graph: Graph, folder: Path, weights: Mapping[str, Any] | None = None, **options: Any
) -> tuple[Exported, Any]:
    made = export_onnx(graph, weights or {}, folder / "model.onnx", **options)
    return made, onnx.load(str(made.path), load_external_data=False)


def in_runtime(
    graph: Graph, folder: Path, inputs: Mapping[str, Array], weights: Mapping[str, Any] | None = None, **options: Any
) -> dict[str, Array]:
    made = export_onnx(graph, weights or {}, folder / "model.onnx", **options)
    return run(session(made.path), inputs)


def weights_of(graph: Graph, seed: int = 0) -> dict[str, Array]:
    """Return weights that are large enough for every part of a model to affect its outputs."""
    rng = np.random.default_rng(seed)
    drawn = {}
    for name, value in graph.parameters.items():
        shape = value.type.evaluate({})
        drawn[name] = (rng.standard_normal(shape) * (0.3 if len(shape) > 1 else 0.5)).astype(np.float32)
    return drawn

"""The hints of a format that cannot hold a model: ONNX, which holds every model, or another form of its weights."""

from __future__ import annotations

from treadle.backends.onnx.exporter import weights_alone
from treadle.ir.errors import Hint
from treadle.ir.graph import Graph
from treadle.ir.ops.blocks import Encode


def rounds_activations(graph: Graph) -> bool:
    """Return True if a run quantizes activations, which no exported format holds."""
    return any(isinstance(node.op, Encode) for _, node in graph.walk())


def as_onnx(graph: Graph) -> Hint:
    """Return the hint to write the model as ONNX."""
    if rounds_activations(graph):
        form = weights_alone(graph)
        return Hint(f"export_onnx, compiled {_with(form)}", f"--to onnx -o FILE.onnx {_with(form.command)}")
    return Hint("export_onnx", "--to onnx -o FILE.onnx")


def source_of(graph: Graph, *, needs_blocks: bool = False) -> str:
    """Return the hint to export the model from which an artifact was compiled.

    needs_blocks  True if the format holds only models with quantized weights
    """
    form = weights_alone(graph).command if needs_blocks or rounds_activations(graph) else ""
    return "the model that it was compiled from" + f", {_with(form)}" * bool(form)


def _with(form: str) -> str:
    return form if form.startswith("without") else f"with {form}"

"""`explain_device`: the form of a model's program on a GPU, and the reasons for slower forms.

    print(explain_device("gpt2", target="h100", quantize="int4"))

The report covers the model and, if it has one, the derived decoding step. No GPU is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from treadle.explaining.layouts import optimized_for
from treadle.ir.errors import PassError, UsageError
from treadle.ir.graph import Graph
from treadle.ir.target import Target
from treadle.passes.stages import DeriveStep, run
from treadle.passes.stepping.derivation import DerivedStep
from treadle.program.backend_choice import AUTO
from treadle.program.options import CompileOptions
from treadle.program.source import AnyModel


@dataclass(frozen=True)
class DeviceReport:
    """The program of a model for a GPU. Each line names a function or an entry, and the user's line.

    attention  the form of each attention, and what flash attention does not support
    weights    the way in which each quantized weight is read
    capture    for each entry, that it can be captured as a CUDA graph, or what prevents it
    """

    model: str
    target: str
    attention: tuple[str, ...]
    weights: tuple[str, ...]
    capture: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return {name: list(each) if isinstance(each, tuple) else each for name, each in vars(self).items()}

    def __str__(self) -> str:
        lines = [f"{self.model} on {self.target}, with the torch backend"]
        for title, rows in vars(self).items():
            if rows and isinstance(rows, tuple):
                lines += ["", f"{title}:", *(f"  {row}" for row in rows)]
        return "\n".join(lines)


def explain_device(model: AnyModel, **options: Any) -> DeviceReport:
    """Describe the program of a model for a GPU. Options as in `treadle.compile`; the default target is "cuda".

    Raises as `compile` does; UsageError for a backend other than torch, and for a target that is not a GPU.
    """
    chosen = CompileOptions.of("explain device", {"target": "cuda", **options})
    if chosen.backend not in (AUTO, "torch"):
        raise UsageError("programs for GPUs are those of the torch backend", received=f"backend {chosen.backend}")
    if chosen.where.kind != "cuda":
        raise UsageError(f"{chosen.where} is not a GPU", hint="cuda, h100 or the name of another GPU")
    name, graph = optimized_for(model, chosen)
    try:
        step = run(graph, [DeriveStep()]).products[DerivedStep].graph
    except PassError:
        step = None
    programs = [(each, chosen.donate if each is graph else ()) for each in (graph, step) if each is not None]
    found = [_notes(each, chosen.where, donate) for each, donate in programs]
    merged = (tuple(dict.fromkeys(line for notes in found for line in notes[kind])) for kind in range(3))
    return DeviceReport(name, str(chosen.where), *merged)


def _notes(graph: Graph, target: Target, donate: Any) -> tuple[list[str], list[str], list[str]]:
    """Return the lines on attention, on quantized weights and on capture of a graph for a GPU."""
    from treadle.backends.torch.attention_forms import notes_on_attention
    from treadle.backends.torch.backend import TorchBackend
    from treadle.backends.torch.capture_decision import notes_on_capture
    from treadle.backends.torch.weight_reads import notes_on_weights

    lowered = TorchBackend().lower(graph, target, donate=donate)
    final = lowered.graph
    return (
        list(notes_on_attention(final)),
        list(notes_on_weights(final)),
        list(notes_on_capture(final, lowered.plan)),
    )

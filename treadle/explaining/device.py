"""`explain_device`: the form of a model's program on a device, and the reasons for slower forms.

    print(explain_device("gpt2", target="h100", quantize="int4"))
    print(explain_device("gpt2", target="webgpu"))

The report covers the model and, if it has one, the derived decoding step. No device is needed. This module has the
report on the torch backend; `treadle.explaining.device_launches` has the report on the tvm backend.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from treadle.backends.refusals import KINDS, refuse_target
from treadle.explaining.layouts import optimized_for
from treadle.ir.errors import BackendError, Hint, PassError, UsageError
from treadle.ir.graph import Graph
from treadle.ir.target import Target
from treadle.passes.stages import DeriveStep, run
from treadle.passes.stepping.derivation import DerivedStep
from treadle.program.backend_choice import AUTO
from treadle.program.options import CompileOptions
from treadle.program.source import AnyModel

if TYPE_CHECKING:
    from treadle.explaining.device_launches import LaunchReport


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


def explain_device(model: AnyModel, **options: Any) -> DeviceReport | LaunchReport:
    """Describe the program of a model for a device: with the torch backend for a GPU, with the tvm backend also for
    OpenCL and WebGPU. Options as in `treadle.compile`; the default target is "cuda". `sizes` are those of the launches
    of the tvm backend.

    Raises as `compile` does; UsageError for a backend without programs for devices, and for a target that is not a
    device.
    """
    chosen = CompileOptions.of("explain device", {"target": "cuda", **options})
    kind, backend = chosen.where.kind, chosen.backend
    if chosen.where.threads is not None:
        raise UsageError(
            "threads do not apply to a program for a device",
            received=f"threads={chosen.where.threads}",
            hint=Hint('target="cuda"', "leave --threads out"),
        )
    if kind in ("cpu", "isa"):
        others = "h100 or another NVIDIA GPU"
        if backend != "torch":
            others = "opencl, webgpu, metal, h100 or another GPU"
        raise UsageError(
            f"{chosen.where} is not a device", hint=Hint(f'target="cuda", {others}', f"--target cuda, {others}")
        )
    if backend == AUTO:
        backend = "torch" if kind in KINDS["torch"] else "tvm"
    if backend not in ("torch", "tvm"):
        what = "programs for devices are those of the torch and the tvm backend"
        raise UsageError(what, received=f"backend {backend}", hint=Hint('backend="tvm"', "--backend tvm"))
    try:
        refuse_target(backend, chosen.where)
    except BackendError as error:  # whose hint names the CPU, which is no device
        error.hint = Hint('backend="tvm"; or target="cuda"', "--backend tvm; or --target cuda")
        raise
    if backend == "tvm":
        from treadle.explaining.device_launches import explain_launches

        return explain_launches(model, chosen)
    for option in ("memory", "sizes"):
        if getattr(chosen, option) is not None:
            raise UsageError(
                f"{option} applies to the tvm backend's program only", hint=Hint('backend="tvm"', "--backend tvm")
            )
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

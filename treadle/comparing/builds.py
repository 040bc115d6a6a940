"""Builds: models that are optimized and lowered with some options, but neither compiled nor run.

    a = open_build("gpt2", backend="tvm")
    b = open_build("gpt2@fuse-gelu", backend="tvm", quantize="int8-weights")

A build is made from a declaration, a file or an artifact. With `@PASS`, it ends after that pass: `gpt2@fuse-gelu` is
the graph after fuse-gelu. Weights are neither drawn nor read; the weights of an artifact are not checked against their
hashes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from treadle.artifacts.reading import is_artifact, open_artifact
from treadle.backends.registry import find_backend
from treadle.backends.staged import KernelUse, StagedBackend
from treadle.explaining.memory import MemoryReport, memory_of
from treadle.files.nearest_names import NearestNames
from treadle.files.shown_names import printable
from treadle.ir.errors import UsageError
from treadle.ir.graph import Graph, Node
from treadle.ir.target import Target
from treadle.passes.framework.manager import Optimized, Pass
from treadle.passes.quantization.planning import plan_quantization
from treadle.passes.quantization.quantize import QuantizeWeights
from treadle.passes.stages import Custom, Lower, passes_of, run
from treadle.program.backend_choice import check_backend, choose_backend
from treadle.program.options import CompileOptions
from treadle.program.source import AnyModel


@dataclass(frozen=True, eq=False)
class Build:
    """One of two builds that are compared.

    name       the build's name in reports
    optimized  the graph as declared, and the graph after the portable passes (or after the requested one of them)
    backend    the backend's name
    target     the target that the graph was lowered for
    lowered    the graph after the backend's passes (or after the requested one of them); None if the backend has no
               passes, or the requested pass precedes them
    stage      the requested pass; empty: the whole pipeline
    scheme     the quantization scheme of the weights, or None
    recorded   False for an artifact, whose log does not name the nodes that a pass replaced
    is_backend_stage  True if the requested pass is one of the backend's
    """

    name: str
    optimized: Optimized
    backend: str
    target: Target
    lowered: Optimized | None
    stage: str = ""
    scheme: str | None = None
    recorded: bool = True
    is_backend_stage: bool = False

    @property
    def source(self) -> Graph:
        """The graph as declared or imported."""
        return self.optimized.source

    @property
    def graph(self) -> Graph:
        """The graph that is compared: the optimized one, or the graph after the requested pass."""
        if self.is_backend_stage and self.lowered is not None:
            return self.lowered.graph
        return self.optimized.graph

    @property
    def is_unplanned(self) -> bool:
        """True if the requested pass of the backend precedes the plan of storage."""
        return self.is_backend_stage and self.lowered is not None and self.lowered.plan is None

    def origins(self, node: Node) -> frozenset[Node]:
        """Return the nodes of `source` that a node of `graph` computes; empty if no pass recorded them."""
        if self.is_backend_stage and self.lowered is not None:
            return self.optimized.lineage.of(self.lowered.lineage.of((node,)))
        return self.optimized.lineage.of((node,))

    def memory(self, sizes: Mapping[str, int]) -> MemoryReport | None:
        """Return the memory of a run at these sizes, or None if no storage is planned."""
        chosen = find_backend(self.backend)
        if self.lowered is None or self.lowered.plan is None or not isinstance(chosen, StagedBackend):
            return None
        graph, plan = self.lowered.graph, self.lowered.plan
        return memory_of(
            self.name, self.backend, graph, plan, chosen.frames(graph, self.target, plan), sizes, self.target
        )

    @cached_property
    def kernels(self) -> tuple[KernelUse, ...] | None:
        """The kernel calls of each function; None if a library chooses the kernels, or no storage is planned."""
        chosen = find_backend(self.backend)
        if self.lowered is None or self.lowered.plan is None or not isinstance(chosen, StagedBackend):
            return None
        return chosen.kernel_uses(self.lowered.graph, self.target, self.lowered.plan)

    @cached_property
    def encoding_reasons(self) -> Mapping[str, str]:
        """For each weight, the reason why it is quantized or not; empty if quantization was not requested."""
        if self.scheme is None:
            return {}
        log = self.optimized.log
        at = next((at for at, record in enumerate(log) if record.name == QuantizeWeights(self.scheme).name), 0)
        before = self.source if at == 0 else log[at - 1].graph
        plan = None if before is None else plan_quantization(before, self.scheme)
        return {} if plan is None else {weight.name: weight.reason for weight in plan.weights}


def open_build(model: AnyModel, *, name: str | None = None, **options: Any) -> Build:
    """Optimize and lower the model that MODEL names.

    model    as in `treadle.compile`; a string may end in `@PASS`, the last pass to run
    name     the build's name in reports; by default the model's name with these options
    options  as in `treadle.compile`

    Raises as `compile` does; UsageError for an unknown pass, and for options that an artifact does not accept.
    """
    asked = CompileOptions.of("inspect", options)
    where = asked.where
    check_backend(asked.backend)
    model, stage = split_pass(model)
    if is_artifact(model):
        asked.refuse_for_artifact(model)
        held = open_artifact(str(model), limits=asked.limits, check=False)
        optimized, known, ran = held.optimized, held.name, (*[r.name for r in held.optimized.log],)
    else:
        pipeline = passes_of(asked.stages())
        ran = (*[each.name for each in pipeline],)
        resolved = asked.resolve(model)
        until = Custom(_until(pipeline, stage))
        optimized = run(resolved.graph, [until], certify=asked.certify, target=where)
        known = resolved.name
    choice = choose_backend(asked.backend, optimized.graph, where)
    chosen = choice.backend
    own = tuple(chosen.pipeline(where)) if isinstance(chosen, StagedBackend) else ()
    of_backend = bool(stage) and stage not in ran
    if is_artifact(model) and stage in ran and stage not in {each.name for each in own}:
        raise UsageError(
            "an artifact has only the graph after its last pass",
            received=printable(f"{model}@{stage}"),
            hint="the model that it was compiled from",
        )
    if of_backend:
        _refuse_unknown_pass(model, stage, (*ran, *[each.name for each in own]))
    lowered = None
    if isinstance(chosen, StagedBackend):
        if of_backend:
            chosen.refuse(optimized.graph, where)
            lowered = run(optimized.graph, [Lower(_until(own, stage))], target=where, verified=True)
        else:
            lowered = chosen.lower(optimized.graph, where, verified=True)
    if name is None:
        recorded = asked.record()
        recorded |= recorded.pop("config", {})
        shown = ", ".join(f"{option}={value}" for option, value in recorded.items())
        name = f"{known}@{stage}" * bool(stage) or known
        name += f"({shown})" * bool(shown)
    return Build(
        name, optimized, choice.name, where, lowered, stage, asked.quantize, not is_artifact(model), of_backend
    )


def split_pass(model: AnyModel) -> tuple[AnyModel, str]:
    """Split MODEL at its last `@`. Return the model, and the name of the pass: empty if there is no `@`, or if the
    whole string is the path of a file.
    """
    if not isinstance(model, str) or "@" not in model or Path(model[:4096]).exists():
        return model, ""
    name, _, stage = model.rpartition("@")
    if not name or not stage:
        raise UsageError(
            "a build is MODEL or MODEL@PASS",
            received=printable(model),
            hint=f"{printable(name)}, or {printable(name)}@PASS" if name else "MODEL, or MODEL@PASS",
        )
    return name, stage


def _refuse_unknown_pass(model: object, stage: str, passes: Sequence[str]) -> None:
    if stage and stage not in passes:
        near = NearestNames(passes).of(stage, 2)
        one_of = "one of " + ", ".join(dict.fromkeys(passes)) if passes else f"{model}: it has no passes"
        hint = f"did you mean {' or '.join(near)}?" if near else one_of
        raise UsageError(f"there is no pass {printable(stage)}", received=printable(f"{model}@{stage}"), hint=hint)


def _until(passes: Sequence[Pass], stage: str) -> tuple[Pass, ...]:
    """Return the passes up to the last one with this name, or all passes if none has it."""
    last = max((at for at, each in enumerate(passes) if each.name == stage), default=len(passes) - 1)
    return tuple(passes[: last + 1])

"""`report_of`: collect the facts of a compiled model, a decoding step or a sharded model, as one report.

    report = report_of(lowered_subject("llama", backend="tvm"), sizes={"S": 256})
    report.save("llama.html")
    report.sections["fusion"]                # the data of a tab

`Compiled.report` calls it for a compiled model. A report holds facts, not the model.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from html import escape
from pathlib import Path
from types import MappingProxyType
from typing import Any

import treadle
from treadle.backends.registry import find_backend
from treadle.backends.staged import StagedBackend, needed_plan
from treadle.explaining.sharding import ShardingReport
from treadle.explaining.sharding import report_of as sharding_report
from treadle.exporting.file_formats import refuse_other_format
from treadle.files.shown_names import printable
from treadle.files.whole_files import replacing, reporting_failed_writes
from treadle.ir.errors import Hint, PassError, UsageError
from treadle.ir.graph import Node
from treadle.ir.target import Target
from treadle.ir.wording.checked_calls import with_checked_methods
from treadle.passes.sharding.plan import ShardingPlan
from treadle.passes.stages import DeriveStep, run
from treadle.passes.stepping.derivation import DerivedStep
from treadle.program.budgets import choose_sizes
from treadle.report import tabs
from treadle.report.programs import ReportProgram, program_facts
from treadle.report.stages import OPTIMIZED
from treadle.report.subjects import Subject
from treadle.report.tabs import Tab, missing, tab
from treadle.report.writing import page_text
from treadle.sharding.plans import rank_optimized

TABS = {
    "diff": "Differences",
    "overview": "Overview",
    "costs": "Costs",
    "fusion": "Fusion",
    "memory": "Memory",
    "weights": "Weights",
    "storage": "Storage",
    "sharding": "Sharding",
    "step": "Step",
    "roofline": "Roofline",
    "profile": "Profile",
    "attention": "Attention",
    "log": "Pass log",
}
"""The tabs with sections of their own, in order. The page adds tabs for the selected op, the IR text and the source."""

SUFFIXES = (".html", ".htm")
"""The endings of the names of pages."""


@with_checked_methods()
@dataclass(frozen=True)
class Report:
    """The facts of a model for the page.

    name      the model's name
    sections  the data by section: `head`, a section for each tab, and for each program `graph:0`, `details:0`, ...
    """

    name: str
    sections: Mapping[str, Any] = field(repr=False)

    def html(self) -> str:
        """Return the page as the text of an HTML file."""
        return page_text(f"{printable(self.name)}: Treadle report", self.sections)

    def save(self, path: str | Path) -> Path:
        """Write the page to a file, whole or not at all, and return its path. Raises UsageError if that fails, or if
        the name has the suffix of another format.
        """
        refuse_other_format(path, "a report", ".html", ".htm")
        target = Path(path)
        hint = "a file in a folder that exists and is writable"
        with reporting_failed_writes("the report", target, hint=hint), replacing(target) as file:
            file.write(self.html().encode())
        return target

    def _repr_html_(self) -> str:
        """Return the page in an iframe, for notebooks."""
        return (
            f'<iframe title="{escape(self.name)}" sandbox="allow-scripts" srcdoc="{escape(self.html())}"'
            ' style="width: 100%; height: 46em; border: 1px solid #8884; border-radius: 6px"></iframe>'
        )


def report_of(
    model: Subject | ShardingPlan,
    *,
    sizes: Mapping[str, int] | None = None,
    sharding: ShardingReport | None = None,
    cache: str | None = None,
    profile: int = 0,
    seed: int = 0,
    command: str | None = None,
    originals: Mapping[str, Any] | None = None,
) -> Report:
    """Return the report on a model, on a decoding step, or on a sharding plan.

    sizes     sizes of symbolic axes, for operations, bytes and memory; by default 1 for a batch and 128 for other axes
    sharding  a report on the model over a mesh; the page then also has the program of the last rank
    cache     the dtype of the caches of the derived step
    profile   number of timed runs, on inputs drawn from `seed`, of a compiled model on TVM; 0: nothing is run
    command   the command line; tabs without data show it with the options that would add the data
    originals  the weights of a quantized model before quantization, by name: the relative RMS error of each encoding is
               measured against them

    Raises UsageError for sizes outside their bounds, and for a profile of any other model.
    """
    if isinstance(model, ShardingPlan):
        return _of_plan(sharding_report(model, {}), sizes or model.sizes)
    if model.derived is not None:
        return _of_step(model, model.derived, sizes or {})
    subject = model if originals is None else replace(model, originals=originals)
    collected = _Collected(subject, sizes or {}, sharding, cache, command)
    if profile:
        collected.profile(profile, seed)
    return collected.report()


class _Collected:
    """The parts of a report on a compiled model."""

    def __init__(
        self,
        model: Subject,
        sizes: Mapping[str, int],
        sharding: ShardingReport | None,
        cache: str | None,
        command: str | None,
    ) -> None:
        self.model, self.sharding, self.cache = model, sharding, cache
        given = ",".join(f"{name}={size}" for name, size in sizes.items())
        self.command = command or f"treadle report MODEL -o report.html{given and f' --sizes {given}'}"
        self.sizes = choose_sizes(model.optimized.graph, sizes)
        self.program = ReportProgram("model", model.optimized, model.backend, model.executable)
        self.times: dict[Node, float] = {}
        nothing = missing("nothing was run", self._with(backend="tvm", profile=9))
        self.measured: dict[str, Tab] = {"roofline": nothing, "profile": nothing}

    def report(self) -> Report:
        model, program, sizes = self.model, self.program, self.sizes
        programs = [program]
        found: dict[str, Tab] = {
            "overview": tab(self._overview),
            "costs": tab(partial(tabs.cost_facts, program, sizes, self.times)),
            "fusion": self._fusion(),
            "memory": tab(self._memory),
            "weights": tab(self._weights),
            "storage": tab(partial(tabs.storage_facts, program)) if program.last.plan is not None else self._no_plan(),
            "sharding": missing("no mesh was given", self._with(mesh="tp=2", recipe="megatron")),
            "step": tab(partial(self._step, programs)),
            **self.measured,
            "attention": tab(partial(tabs.attention_facts, program, sizes)),
            "log": tab(partial(tabs.log_facts, program)),
        }
        if self.sharding is not None:
            found["sharding"] = tab(partial(tabs.sharding_facts, self.sharding))
            programs.append(_rank(self.sharding.plan))
        return report_of_programs(model.name, model.backend, str(model.target), sizes, programs, found, self.times)

    def _with(self, **flags: object) -> str:
        """Return the command line with these values of flags, each in place of its own value."""
        words: list[str] = []
        given = iter(shlex.split(self.command))
        for word in given:
            flag, _, value = word.partition("=")
            if not flag.startswith("--") or flag[2:] not in flags:
                words.append(word)
            elif not value:
                next(given, None)
        added = (part for flag, value in flags.items() for part in (f"--{flag}", str(value)))
        return shlex.join([*words, *added])

    def _overview(self) -> dict[str, Any]:
        facts = tabs.overview(self.program, self.model.target, self.sizes)
        return facts | {"unused": list(self.model.unused), "unread": list(self.model.unread)}

    def _weights(self) -> dict[str, Any]:
        return tabs.weight_facts(self.program, self.model.originals)

    def _fusion(self) -> Tab:
        if any(stage.name == OPTIMIZED for stage in self.program.stages):
            why = "an artifact does not record which ops a pass replaced"
            return missing(why, f"{self.command}  with the model that it was compiled from")
        return tab(partial(tabs.fusion_facts, self.program))

    def _memory(self) -> dict[str, Any]:
        frames = tabs.frames_of_program(self.program, self.model.target)
        return tabs.memory_tab_facts(self.program, frames, self.sizes, self.model.target)

    def _no_plan(self) -> Tab:
        return missing(f"backend {self.model.backend} does not plan storage", self._with(backend="tvm"))

    def _step(self, programs: list[ReportProgram]) -> dict[str, Any]:
        graph = self.model.optimized.graph
        if graph.entry_names[-1] != "main":
            raise PassError("the graph has entries already", received=", ".join(graph.entry_names))
        derived = run(graph, [DeriveStep(self.cache)]).products[DerivedStep]
        facts = tabs.step_facts(self.model.name, derived, graph)
        programs.append(_step_program(derived, self.model.backend, self.model.target))
        return facts

    def profile(self, rounds: int, seed: int) -> None:
        """Time the kernel calls of a compiled model."""
        from treadle.backends.tvm.executable import KernelExecutable
        from treadle.backends.tvm.profiling import time_calls
        from treadle.benching.roofline import roofline_of
        from treadle.ir.analysis.drawn_inputs import draw_inputs

        model, exe = self.model, self.model.executable
        graph = model.optimized.graph
        if not model.has_weights or not isinstance(exe, KernelExecutable) or graph.states:
            raise UsageError(
                "only a model without states, compiled for the tvm backend, can be profiled",
                received=f"{model.name} on {model.backend}",
                hint=Hint(
                    f't.compile(model, backend="tvm").report(profile={rounds})',
                    self._with(backend="tvm", profile=rounds),
                ),
            )
        calls = time_calls(exe, draw_inputs(graph, self.sizes, [seed]), rounds)
        numbers = self.program.numbers()
        rows = []
        for each in calls:
            node = each.step.node
            if node is not None:
                self.times[node] = self.times.get(node, 0.0) + each.seconds
            where = ("", "", None) if node is None else (node.scope, str(node.source or ""), numbers.get(node))
            rows.append([each.step.kernel.title, each.seconds, *where])
        plan = needed_plan(self.program.last.plan, model.backend)
        profile = {"rounds": rounds, "calls": rows, "seconds": sum(each.seconds for each in calls)}
        self.measured = {
            "roofline": tab(lambda: roofline_of(model.name, model.target, plan, exe, self.sizes, calls).as_dict()),
            "profile": {"data": profile},
        }


def _step_program(derived: DerivedStep, backend: str, target: Target) -> ReportProgram:
    """Return the derived step after the backend's passes, if the backend has any."""
    found = find_backend(backend)
    if isinstance(found, StagedBackend):
        return ReportProgram("step", found.lower(derived.graph, target), backend, None, "derived")
    return ReportProgram("step", run(derived.graph, ()), backend, None, "derived")


def _rank(plan: ShardingPlan) -> ReportProgram:
    """Return the program of the last rank. No other rank has larger parts."""
    rank = plan.devices.ranks - 1
    return ReportProgram(f"rank {rank}", rank_optimized(plan, rank), "", None, "sharded")


def _of_step(model: Subject, derived: DerivedStep, sizes: Mapping[str, int]) -> Report:
    program = ReportProgram("step", model.optimized, model.backend, model.executable, "derived")
    chosen = choose_sizes(program.graph, sizes)
    no_source = missing("the step was derived from another graph", "exe.report()  of the model itself")

    def memory() -> dict[str, Any]:
        return tabs.memory_tab_facts(program, tabs.frames_of_program(program, model.target), chosen, model.target)

    found: dict[str, Tab] = {
        "costs": tab(partial(tabs.cost_facts, program, chosen, {})),
        "memory": tab(memory),
        "weights": tab(partial(tabs.weight_facts, program)),
        "storage": tab(partial(tabs.storage_facts, program)),
        "step": tab(partial(tabs.step_facts, model.name, derived)),
        "attention": tab(partial(tabs.attention_facts, program, chosen)),
        "log": tab(partial(tabs.log_facts, program)),
    }
    others = dict.fromkeys(("fusion", "sharding", "roofline", "profile"), no_source)
    return report_of_programs(model.name, model.backend, str(model.target), chosen, [program], found | others)


def _of_plan(report: ShardingReport, sizes: Mapping[str, int]) -> Report:
    plan = report.plan
    program = _rank(plan)
    chosen = choose_sizes(program.graph, {n: size for n, size in sizes.items() if n in program.graph.symbols})
    compiled = missing(
        "the model was not compiled", "treadle report MODEL --mesh tp=2 --recipe megatron -o report.html"
    )
    found: dict[str, Tab] = dict.fromkeys([key for key in TABS if key != "diff"], compiled)
    found |= {
        "costs": tab(partial(tabs.cost_facts, program, chosen, {})),
        "sharding": tab(partial(tabs.sharding_facts, report)),
        "weights": tab(partial(tabs.weight_facts, program)),
        "attention": tab(partial(tabs.attention_facts, program, chosen)),
        "log": tab(partial(tabs.log_facts, program)),
    }
    return report_of_programs(report.name, "", report.device, chosen, [program], found)


def report_of_programs(
    name: str,
    backend: str,
    target: str,
    sizes: Mapping[str, int],
    programs: Sequence[ReportProgram],
    sections_by_key: Mapping[str, Tab],
    times: Mapping[Node, float] = MappingProxyType({}),
) -> Report:
    """Build the report from its parts. Operations and bytes of a program are evaluated at the sizes of that program."""
    sections: dict[str, Any] = {
        "head": {
            "model": name,
            "backend": backend,
            "target": target,
            "version": treadle.__version__,
            "sizes": dict(sizes),
            "programs": [each.name for each in programs],
            "tabs": [[key, title] for key, title in TABS.items() if key in sections_by_key],
        }
    }
    sections |= {key: sections_by_key[key] for key in TABS if key in sections_by_key}
    for at, program in enumerate(programs):
        own = choose_sizes(program.graph, {n: size for n, size in sizes.items() if n in program.graph.symbols})
        facts = program_facts(program, own, times if at == 0 else {})
        sections |= {f"{part}:{at}": data for part, data in facts.items()}
    return Report(name, sections)

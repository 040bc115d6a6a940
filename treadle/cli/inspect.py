"""`treadle inspect`: print a model's graph, or analyses of it, as text."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from treadle.cli.application import command, print_json
from treadle.cli.options import AsJson, ModelName, OptionKeywords
from treadle.ir.errors import UsageError

if TYPE_CHECKING:
    from treadle.ir.graph import Graph
    from treadle.ir.target import Target
    from treadle.passes.framework.manager import Optimized
    from treadle.program.options import CompileOptions


@command("inspect", takes=["inspect"])
def inspect_graph(
    model: ModelName,
    raw: Annotated[bool, typer.Option("--raw", help="Print the declared graph, before any pass.")] = False,
    after: Annotated[
        str | None,
        typer.Option(
            "--after", metavar="PASS", help="Print the graph after this pass, which may be one of the backend's."
        ),
    ] = None,
    entry: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Print an entry of the derived step: prologue, prefill, step or verify."),
    ] = None,
    unfold: Annotated[bool, typer.Option("--unfold", help="Print every repetition of a block.")] = False,
    sizes: Annotated[
        str | None,
        typer.Option(
            metavar="B=1,S=128",
            help="Sizes for FLOPs and bytes. By default 1 for a leading axis, 128 for others, within bounds.",
        ),
    ] = None,
    follow: Annotated[
        str | None,
        typer.Option(metavar="AXIS", help="Print whether an axis can be stepped, packed and split, and if not, why."),
    ] = None,
    source: Annotated[
        bool, typer.Option("--source", help="Print the code that the backend generates from the graph.")
    ] = False,
    *,
    keywords: OptionKeywords,
    as_json: AsJson = False,
) -> None:
    """Print a model's optimized graph, blocks folded, with its parameters, FLOPs and bytes."""
    from treadle.artifacts.reading import is_artifact
    from treadle.backends.refusals import KINDS, refuse_target
    from treadle.fitting import fit_code, fit_graph, fit_prose, fitted
    from treadle.ir.analysis.following import follow as follow_axis
    from treadle.ir.text.printer import print_graph
    from treadle.passes.memory.storage_plan import StoragePlan
    from treadle.program.backend_choice import check_backend
    from treadle.program.budgets import choose_sizes
    from treadle.program.flag_values import parse_sizes
    from treadle.program.options import CompileOptions
    from treadle.progress import working
    from treadle.reporting.followed_axes import following_facts, following_text
    from treadle.reporting.graphs import backend_source, graph_facts, graph_header

    _refuse_combinations(raw, after, entry, follow, source, unfold)
    options = CompileOptions.of("inspect", {**keywords, **({"passes": ()} if raw else {})})
    backend = check_backend(options.backend)
    if backend in KINDS:
        refuse_target(backend, options.where)
    chosen = any(name in keywords for name in ("backend", "target"))
    if chosen and not (source or after or options.passes or options.certify):
        prints_graph = follow is None and entry is None
        also = ["--source as well, which prints the code"] if prints_graph and not unfold else []
        also += ["--after with a pass of the backend"] if prints_graph and not raw and not is_artifact(model) else []
        raise UsageError(
            "--backend, --target and --threads change neither the optimized graph nor its costs",
            hint=", or ".join([*also, "leave them out"]),
        )
    with working(f"optimizing {model}", shown=not as_json):
        optimized, graph = _optimized(model, options, raw, after)
        if entry is not None:
            graph = stepped_entry(graph, entry)
    stage = "as declared" if raw else f"after {after}" if after else "optimized"
    stage = stage if entry is None else f"{entry}, derived"
    facts = graph_facts(graph, choose_sizes(graph, parse_sizes(sizes)))
    facts["stage"] = stage
    if follow is not None:
        following = follow_axis(graph, follow)
        shown, facts["follow"] = following_text(following), following_facts(following)
    elif source:
        with working(f"compiling {model}", shown=not as_json):
            shown = facts["source"] = backend_source(graph, options.backend, options.where)
    else:
        shown = facts["graph"] = print_graph(graph, unfold=unfold)
        shown = f"{graph_header(facts, stage)}{shown}"
        plan = optimized.products_of(after).get(StoragePlan) if after else None
        if plan is not None:
            facts["plan"] = plan.as_dict()
            shown = f"{shown}\n# storage of each value\n{plan}"
    if as_json:
        print_json(facts)
    else:
        fit = fit_prose if follow is not None else fit_code if source else fit_graph
        sys.stdout.write(fitted(shown.rstrip("\n"), fit) + "\n")


def _refuse_combinations(
    raw: bool, after: str | None, entry: str | None, follow: str | None, source: bool, unfold: bool
) -> None:
    """Raise UsageError for options that select different graphs, or different things to print."""
    if raw and after:
        raise UsageError("--raw and --after select two different stages of the graph", hint="one of them")
    if entry is not None and (raw or after or source or follow):
        raise UsageError("--entry prints a graph derived from the optimized one", hint="--entry alone")
    if follow is not None and (source or unfold):
        raise UsageError("--follow prints neither the graph nor the source", hint="one of them")
    if source and unfold:
        raise UsageError("--unfold unfolds the graph, and --source prints the backend's code", hint="one of them")


def _optimized(model: str, options: CompileOptions, raw: bool, after: str | None) -> tuple[Optimized, Graph]:
    """Return an optimized model or an artifact's graphs, and the graph to be printed: the declared one if `raw`, the
    one after the pass `after`, or else the optimized one.
    """
    from treadle.artifacts.reading import is_artifact, open_artifact
    from treadle.program.program import Program

    if is_artifact(model):
        options.refuse_for_artifact(model, also=("passes",))
        if after is not None:
            raise UsageError(
                "an artifact has no graphs after single passes", hint="the model that it was compiled from"
            )
        optimized = open_artifact(model, limits=options.limits).optimized
        return optimized, optimized.source if raw else optimized.graph
    optimized = Program(model, options).optimize().optimized
    if after is not None:
        optimized = lowered_for(after, options.backend, options.where, optimized)
    return optimized, optimized.after(after) if after else optimized.graph


def lowered_for(name: str, backend: str, target: Target, optimized: Optimized) -> Optimized:
    """Return the optimized graph with its lowering, if pass `name` is one of the backend's; else unchanged."""
    from treadle.backends.staged import StagedBackend
    from treadle.program.backend_choice import choose_backend

    found = choose_backend(backend, optimized.graph, target).backend
    if not isinstance(found, StagedBackend) or name not in {each.name for each in found.pipeline(target)}:
        return optimized
    return replace(optimized, lowered=found.lower(optimized.graph, target))


def stepped_entry(graph: Graph, entry: str) -> Graph:
    """Return one entry of the step derived from a graph."""
    from treadle.explaining.step import entry_alone
    from treadle.passes.stages import DeriveStep, run

    derived = run(graph, [DeriveStep()]).graph
    if entry not in derived.entry_names:
        raise UsageError(f"unknown entry {entry!r}", hint="one of " + ", ".join(derived.entry_names))
    return entry_alone(derived, entry)

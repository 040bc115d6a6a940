"""`treadle export`: write a model as ONNX, or its graph for Graphviz, Model Explorer or a program that reads JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from treadle.cli.application import command, print_json
from treadle.cli.options import (
    AsJson,
    Config,
    GivenOutputs,
    Limit,
    ModelName,
    OptionalInputs,
    Seed,
    Sizes,
    Widen,
    names_of,
    outputs_of,
    refuse_for_artifact,
)
from treadle.ir.errors import UsageError

_SUFFIXES = {"onnx": (".onnx",), "dot": (".dot", ".gv"), "model-explorer": (".json",), "json": (".json",)}
"""The formats, and the suffixes of their files."""

_OPSET, _EXTERNAL_ABOVE = 23, 2**20


@command("export")
def export_model(
    model: ModelName,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="File to write.")],
    to: Annotated[
        str, typer.Option("--to", metavar="FORMAT", help="onnx, dot (Graphviz), model-explorer or json.")
    ] = "onnx",
    opset: Annotated[int, typer.Option("--opset", metavar="N", help="onnx: operator set version.")] = _OPSET,
    external_above: Annotated[
        int, typer.Option(metavar="BYTES", help="onnx: store larger weights in FILE.onnx.data.", min=0)
    ] = _EXTERNAL_ABOVE,
    backend: Annotated[
        str, typer.Option("--backend", metavar="NAME", help="Other formats: the backend whose passes follow.")
    ] = "numpy",
    sizes: Sizes = None,
    times: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            help="model-explorer: measure each kernel on tvm, and write node data.",
            show_default=False,
        ),
    ] = None,
    config: Config = None,
    limit: Limit = None,
    widen: Widen = None,
    inputs: OptionalInputs = None,
    outputs: GivenOutputs = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Write a model's optimized graph and its weights as ONNX, or its graph for other tools.

    Except for onnx, MODEL@PASS is the graph after a pass.
    """
    if to not in _SUFFIXES:
        raise UsageError(f"unknown format {to!r}", hint="--to " + ", ".join(_SUFFIXES))
    if output.suffix not in _SUFFIXES[to]:
        name = {"onnx": "an ONNX model's name"}.get(to, f"the name of a file for {to}")
        suffixes = " or ".join(_SUFFIXES[to])
        raise UsageError(f"{name} must end in {suffixes}", received=str(output), hint=f"{output}{_SUFFIXES[to][0]}")
    if to == "onnx":
        if backend != "numpy" or sizes is not None or times is not None:
            raise UsageError("--backend, --sizes and --times apply to other formats than onnx", hint="--to json")
        shared = {"config": config, "limit": limit, "widen": widen, "inputs": inputs, "outputs": outputs}
        _export_onnx(model, output, opset, external_above, shared, seed, as_json)
        return
    if (opset, external_above) != (_OPSET, _EXTERNAL_ABOVE):
        raise UsageError("--opset and --external-above apply to onnx only", received=f"--to {to}")
    if times is not None and (to != "model-explorer" or backend != "tvm"):
        raise UsageError("--times needs --to model-explorer and --backend tvm", received=f"--to {to}")
    _export_graph(model, output, to, backend, sizes, times, config, limit, widen, inputs, outputs, seed, as_json)


def _export_graph(
    model: str,
    output: Path,
    to: str,
    backend: str,
    sizes: str | None,
    times: Path | None,
    config: list[str] | None,
    limit: list[str] | None,
    widen: str | None,
    inputs: str | None,
    outputs: str | None,
    seed: int,
    as_json: bool,
) -> None:
    from treadle.comparing.builds import open_build
    from treadle.exporting.dot_language import graphviz_text
    from treadle.exporting.graph_records import graph_record
    from treadle.exporting.model_explorer_graphs import model_explorer_record, node_data
    from treadle.exporting.node_facts import NodeFacts
    from treadle.files.shown_names import printable
    from treadle.option_values import choose_sizes, parse_config, parse_sizes
    from treadle.progress import working
    from treadle.reporting.counts import counted, human

    chosen = parse_config(config or (), limit or (), open_build)
    options: dict[str, Any] = {
        "inputs": names_of(inputs),
        "outputs": outputs_of(outputs),
        "widen": names_of(widen) or (),
    }
    with working(f"exporting {model}", shown=not as_json):
        build = open_build(model, backend=backend, name=model, **options, **chosen)
        at = choose_sizes(build.graph, parse_sizes(sizes))
        facts = NodeFacts(build.graph, at, build)
        if to == "dot":
            text = graphviz_text(build.graph, facts)
        elif to == "json":
            text = json.dumps(graph_record(build.graph, facts, build.stage or "optimized"), indent=1, allow_nan=False)
        else:
            record = model_explorer_record(build, at)
            text = json.dumps(record, allow_nan=False)
        files = [(output, text)]
        if times is not None:
            last = record["graphs"][-1]["id"]
            measured = _measured(model, at, seed, {**options, **chosen})
            files.append((times, json.dumps(node_data(last, measured), indent=1, allow_nan=False)))
        for path, content in files:
            _write(path, content)
    nodes = sum(len(function.nodes) for function in build.graph.functions.values())
    if as_json:
        print_json({"model": build.graph.name, "format": to, "files": [str(path) for path, _ in files], "nodes": nodes})
        return
    for path, _ in files:
        print(f"wrote {path}, {human(path.stat().st_size, 'B')}")
    print(f"{counted(nodes, 'node')} of {printable(build.graph.name)}")


def _measured(model: str, sizes: dict[str, int], seed: int, options: dict[str, Any]) -> dict[int, float]:
    import treadle
    from treadle.artifacts import is_artifact, load
    from treadle.comparing.builds import split_pass
    from treadle.exporting.kernel_times import node_times

    if split_pass(model)[1]:
        raise UsageError("--times measures whole models, not the graph after a pass", received=model)
    if is_artifact(model):
        return node_times(load(model, backend="tvm", limits=options.get("limits")), sizes, seed=seed)
    return node_times(treadle.compile(model, backend="tvm", seed=seed, **options), sizes, seed=seed)


def _write(path: Path, text: str) -> None:
    from treadle.files.whole_files import replacing

    try:
        with replacing(path) as file:
            file.write(text.encode("utf-8"))
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        why = getattr(error, "strerror", None) or error
        raise UsageError("the file cannot be written", received=f"{path}: {why}", hint="another path") from error


def _export_onnx(
    model: str, output: Path, opset: int, external_above: int, shared: dict[str, Any], seed: int, as_json: bool
) -> None:
    from treadle.artifacts import is_artifact, open_artifact
    from treadle.backends.onnx.exporter import export_onnx
    from treadle.compiling import initial_weights
    from treadle.files.shown_names import printable
    from treadle.option_values import parse_config, parse_limits
    from treadle.passes.framework.manager import PassManager
    from treadle.passes.pipelines import DEFAULT
    from treadle.progress import working
    from treadle.reporting.counts import counted, human
    from treadle.resolving import resolve

    limit = shared["limit"]
    with working(f"exporting {model}", shown=not as_json):
        if is_artifact(model):
            refuse_for_artifact(**{name: value for name, value in shared.items() if name != "limit"})
            held = open_artifact(model, limits=parse_limits(limit or ()))
            graph, weights = held.optimized.graph, held.weights
        else:
            resolved = resolve(
                model,
                inputs=names_of(shared["inputs"]),
                outputs=outputs_of(shared["outputs"]),
                widen=names_of(shared["widen"]) or (),
                **parse_config(shared["config"] or (), limit or ()),
            )
            graph = PassManager(DEFAULT).run(resolved.graph).graph
            weights = initial_weights(graph, seed) if resolved.weights is None else resolved.weights
        made = export_onnx(graph, weights, output, opset=opset, external_above=external_above)
    files = [path for path in (made.path, made.data) if path is not None]
    if as_json:
        facts = {"model": graph.name, "opset": made.opset, "files": list(map(str, files)), "operators": made.operators}
        print_json({**facts, "inputs": made.inputs, "outputs": made.outputs})
        return
    for name, inside in (*made.inputs.items(), *made.outputs.items()):
        if name != inside:
            print(f"{printable(name)} is called {printable(inside)} in the file")
    for path in files:
        print(f"wrote {path}, {human(path.stat().st_size, 'B')}")
    counts = sorted(made.operators.items(), key=lambda each: -each[1])
    told = ", ".join(f"{count} {name}" for name, count in counts)
    print(f"{counted(sum(made.operators.values()), 'node')} of opset {made.opset}: {told}")

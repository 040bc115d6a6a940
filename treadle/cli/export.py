"""`treadle export`: write a model as ONNX, GGUF, a compressed-tensors folder or a web page, or its graph for Graphviz,
Model Explorer or a program that reads JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from treadle.cli.application import command, print_json
from treadle.cli.options import AsJson, ModelName, OptionKeywords, Sizes, load_with_options
from treadle.files.nearest_names import check_suffix
from treadle.ir.errors import BackendError, UsageError

_FOLDER = "compressed-tensors"
_SUFFIXES = {
    "onnx": (".onnx",),
    "gguf": (".gguf",),
    _FOLDER: (),
    "web": (),
    "dot": (".dot", ".gv"),
    "model-explorer": (".json",),
    "json": (".json",),
}
"""The formats, and the suffixes of their files; none for a folder."""
_MODELS = ("onnx", "gguf", _FOLDER)
"""The formats that hold weights."""

_OPSET, _EXTERNAL_ABOVE = 23, 2**20


@command("export", takes=["export"], defaults={"target": None})  # a page has another default
def export_model(
    model: ModelName,
    output: Annotated[
        Path,
        typer.Option("-o", "--output", metavar="FILE", help="File to write; for compressed-tensors and web a folder."),
    ],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="FORMAT",
            help="onnx, gguf, compressed-tensors, web (a page), dot (Graphviz), model-explorer or json.",
        ),
    ] = "onnx",
    opset: Annotated[int, typer.Option("--opset", metavar="N", help="onnx: operator set version.")] = _OPSET,
    external_above: Annotated[
        int, typer.Option(metavar="BYTES", help="onnx: store larger weights in FILE.onnx.data.", min=0)
    ] = _EXTERNAL_ABOVE,
    sizes: Sizes = None,
    times: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            help="model-explorer: measure each kernel on tvm, and write node data.",
            show_default=False,
        ),
    ] = None,
    *,
    keywords: OptionKeywords,
    as_json: AsJson = False,
) -> None:
    """Write a model's optimized graph and its weights as ONNX, its weights and tokenizer for other programs (gguf,
    compressed-tensors), a page that runs it in a browser by WebGPU at --sizes (web), or its graph for other tools (dot,
    model-explorer, json).

    For dot, model-explorer and json, MODEL@PASS is the graph after a pass.
    """
    from treadle.exporting.file_formats import writing_hint

    if to not in _SUFFIXES:
        raise UsageError(f"unknown format {to!r}", hint="--to " + ", ".join(_SUFFIXES))
    if _SUFFIXES[to]:
        others = [each for each, ends in _SUFFIXES.items() if output.suffix in ends]
        hint = f"--to {' or '.join(others)}" if others else writing_hint(output, model, of="export")
        check_suffix(output, _SUFFIXES[to], {"onnx": "an ONNX model"}.get(to, f"a file for {to}"), hint)
    if times is not None:
        check_suffix(times, [".json"], "a file of times")
    of_programs = {
        "--backend": keywords.get("backend"),
        "--target and --threads": keywords.get("target"),
        "--sizes": sizes,
        "--times": times,
    }
    if to in _MODELS and any(each is not None for each in of_programs.values()):
        options = ", ".join(of_programs).replace(" and", ",")
        what = f"{options} apply to other formats than {', '.join(_MODELS)}"
        flags = {name: each is not None for name, each in of_programs.items()}
        raise UsageError(what, received=f"--to {to}", hint=_without(flags))
    if to == "onnx":
        _export_onnx(model, output, opset, external_above, keywords, as_json)
        return
    if (opset, external_above) != (_OPSET, _EXTERNAL_ABOVE):
        flags = {"--opset": opset != _OPSET, "--external-above": external_above != _EXTERNAL_ABOVE}
        raise UsageError("--opset and --external-above apply to onnx only", received=f"--to {to}", hint=_without(flags))
    if to in _MODELS:
        _export_weights(model, output, to, keywords, as_json)
        return
    if times is not None:
        backend = keywords.get("backend")
        if to != "model-explorer" or backend not in (None, "tvm"):
            received = f"--to {to}" + f" --backend {backend}" * (backend is not None)
            hint = "--to model-explorer --backend tvm" + " -o FILE.json" * (output.suffix != ".json")
            raise UsageError("--times needs --to model-explorer and --backend tvm", received=received, hint=hint)
        keywords["backend"] = "tvm"
    if to == "web":
        _export_web(model, output, sizes, keywords, as_json)
        return
    _export_graph(model, output, to, sizes, times, keywords, as_json)


def _without(flags: Mapping[str, bool]) -> str:
    """Return the hint to leave out options."""
    return f"leave out {' and '.join(flag for flag, is_set in flags.items() if is_set)}"


def _export_graph(
    model: str,
    output: Path,
    to: str,
    sizes: str | None,
    times: Path | None,
    keywords: dict[str, Any],
    as_json: bool,
) -> None:
    from treadle.comparing.builds import open_build
    from treadle.exporting.dot_language import graphviz_text
    from treadle.exporting.graph_records import graph_record
    from treadle.exporting.model_explorer_graphs import model_explorer_record, node_data
    from treadle.exporting.node_facts import NodeFacts
    from treadle.files.shown_names import printable
    from treadle.program.budgets import choose_sizes
    from treadle.program.flag_values import parse_sizes
    from treadle.program.options import CompileOptions
    from treadle.progress import working
    from treadle.reporting.counts import counted, human

    CompileOptions.of("export", keywords)  # refuses options that do not apply
    with working(f"exporting {model}", shown=not as_json):
        build = open_build(model, name=model, **{name: v for name, v in keywords.items() if name != "seed"})
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
            measured = _measured(model, at, keywords)
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


def _measured(model: str, sizes: dict[str, int], keywords: dict[str, Any]) -> dict[int, float]:
    import treadle
    from treadle.artifacts.reading import is_artifact
    from treadle.comparing.builds import split_pass
    from treadle.exporting.kernel_times import node_times

    if split_pass(model)[1]:
        raise UsageError("--times measures whole models, not the graph after a pass", received=model)
    seed = keywords.get("seed", 0)
    if is_artifact(model):
        return node_times(load_with_options(model, keywords, also=("seed",)), sizes, seed=seed)
    return node_times(treadle.compile(model, **keywords), sizes, seed=seed)


def _export_web(model: str, output: Path, sizes: str | None, keywords: dict[str, Any], as_json: bool) -> None:
    """Write a folder with a page that runs a model in a browser."""
    import treadle
    from treadle.artifacts.reading import is_artifact
    from treadle.backends.tvm.executable import KernelExecutable
    from treadle.exporting.web_folders import export_web
    from treadle.files.shown_names import printable
    from treadle.ir.target import Target
    from treadle.program.budgets import choose_sizes
    from treadle.program.flag_values import parse_sizes
    from treadle.progress import working
    from treadle.reporting.compilations import weights_text
    from treadle.reporting.counts import counted, human

    fixed = {"backend": "tvm", "target": "webgpu"}
    for name, value in fixed.items():
        if keywords.get(name, value) != value:
            threads = " and --threads" if isinstance(keywords[name], Target) else ""
            hint = f"leave out --{name}{threads}"
            raise UsageError(f"a page needs --{name} {value}", received=f"--{name} {keywords[name]}", hint=hint)
    with working(f"exporting {model}", shown=not as_json):
        given = {**keywords, **fixed}
        made = load_with_options(model, given) if is_artifact(model) else treadle.compile(model, **given)
        assert isinstance(made.executable, KernelExecutable)
        at = choose_sizes(made.graph, parse_sizes(sizes))
        files = export_web(made.name, made.graph, made.executable, at, output)
    if as_json:
        facts = {"model": made.name, "format": "web", "files": list(map(str, files)), "sizes": at}
        print_json({**facts, "weights": weights_text(made.seed)})
        return
    print(f"wrote {counted(len(files), 'file')} to {output}, {human(sum(f.stat().st_size for f in files), 'B')}")
    _print_drawn(made.seed)
    shown = ", ".join(f"{name}={size}" for name, size in at.items())
    print(f"{printable(made.name)} at {shown or 'its only sizes'}; serve it with: python -m http.server -d {output}")


def _print_drawn(seed: int | None) -> None:
    """Print that the weights are random, if they are."""
    from treadle.reporting.compilations import weights_text

    if seed is not None:
        print(f"weights {weights_text(seed)}: --weights FOLDER names trained ones")


def _write(path: Path, text: str) -> None:
    from treadle.files.whole_files import replacing, reporting_failed_writes

    with reporting_failed_writes("the file", path, hint="another path"), replacing(path) as file:
        file.write(text.encode("utf-8"))


def _export_weights(model: str, output: Path, to: str, keywords: dict[str, Any], as_json: bool) -> None:
    """Write a model's weights and texts as a GGUF file or a compressed-tensors folder."""
    from treadle.artifacts.reading import is_artifact, open_artifact
    from treadle.exporting.compressed_folders import export_compressed
    from treadle.exporting.format_hints import as_onnx, rounds_activations, source_of
    from treadle.exporting.gguf_models import export_gguf
    from treadle.files.shown_names import printable
    from treadle.program.options import CompileOptions
    from treadle.program.program import Program
    from treadle.program.weights import weights_of
    from treadle.progress import working
    from treadle.reporting.compilations import weights_text
    from treadle.reporting.counts import human

    options = CompileOptions.of("export", keywords)
    if is_artifact(model):
        graph = open_artifact(model, limits=options.limits).optimized.graph
        source = source_of(graph, needs_blocks=to == _FOLDER)
        raise UsageError(
            f"an artifact cannot be exported to {to}: it holds an optimized graph, not the model's configuration",
            received=model,
            hint=source if rounds_activations(graph) else f"{as_onnx(graph).command}; or {source}",
        )
    with working(f"exporting {model}", shown=not as_json):
        program = Program(model, options).optimize()
        resolved, graph = program.resolved, program.optimized.graph
        weights, seed = weights_of(resolved, graph, options.arrays, options.seed)
        if to == "gguf":
            files, notes = [output], export_gguf(resolved, graph, weights, output)
        else:
            files, notes = export_compressed(resolved, graph, weights, output)
    if as_json:
        facts = {"model": graph.name, "format": to, "files": list(map(str, files)), "notes": notes}
        print_json({**facts, "weights": weights_text(seed)})
        return
    for path in files:
        print(f"wrote {path}, {human(path.stat().st_size, 'B')}")
    _print_drawn(seed)
    for note in notes:
        print(printable(note))


def _export_onnx(
    model: str, output: Path, opset: int, external_above: int, keywords: dict[str, Any], as_json: bool
) -> None:
    from treadle.artifacts.reading import is_artifact, open_artifact
    from treadle.backends.onnx.exporter import export_onnx, weights_alone
    from treadle.exporting.format_hints import source_of
    from treadle.files.shown_names import printable
    from treadle.program.options import CompileOptions
    from treadle.program.program import Program
    from treadle.program.weights import weights_of
    from treadle.progress import working
    from treadle.reporting.compilations import weights_text
    from treadle.reporting.counts import counted, human

    options = CompileOptions.of("export", keywords)
    with working(f"exporting {model}", shown=not as_json):
        if is_artifact(model):
            options.refuse_for_artifact(model)
            held = open_artifact(model, limits=options.limits)
            graph, weights, seed = held.optimized.graph, held.weights, None
        else:
            program = Program(model, options).optimize()
            resolved, optimized = program.resolved, program.optimized
            graph = optimized.graph
            weights, seed = weights_of(resolved, graph, options.arrays, options.seed)
        try:
            made = export_onnx(graph, weights, output, opset=opset, external_above=external_above)
        except BackendError as error:
            if is_artifact(model) and error.hint == weights_alone(graph):  # an artifact is not quantized again
                error.hint = source_of(graph)
            raise
    files = [path for path in (made.path, made.data) if path is not None]
    if as_json:
        facts = {"model": graph.name, "opset": made.opset, "files": list(map(str, files)), "operators": made.operators}
        print_json({**facts, "weights": weights_text(seed), "inputs": made.inputs, "outputs": made.outputs})
        return
    for name, inside in (*made.inputs.items(), *made.outputs.items()):
        if name != inside:
            print(f"{printable(name)} is called {printable(inside)} in the file")
    for path in files:
        print(f"wrote {path}, {human(path.stat().st_size, 'B')}")
    _print_drawn(seed)
    counts = sorted(made.operators.items(), key=lambda each: -each[1])
    operators = ", ".join(f"{count} {name}" for name, count in counts)
    print(f"{counted(sum(made.operators.values()), 'node')} of opset {made.opset}: {operators}")

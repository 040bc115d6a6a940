"""`treadle export`: write a model as ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from treadle.cli.application import command, print_json
from treadle.cli.options import (
    AsJson,
    Config,
    GivenOutputs,
    Limit,
    ModelName,
    OptionalInputs,
    Quantize,
    Seed,
    Widen,
    names_of,
    outputs_of,
    refuse_for_artifact,
)
from treadle.ir.errors import UsageError


@command("export")
def export_to_onnx(
    model: ModelName,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE.onnx", help="ONNX file to write.")],
    opset: Annotated[int, typer.Option("--opset", metavar="N", help="ONNX operator set version.")] = 23,
    external_above: Annotated[
        int, typer.Option(metavar="BYTES", help="Store larger weights in FILE.onnx.data.", min=0)
    ] = 2**20,
    config: Config = None,
    limit: Limit = None,
    quantize: Quantize = None,
    widen: Widen = None,
    inputs: OptionalInputs = None,
    outputs: GivenOutputs = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Write a model's optimized graph and its weights as ONNX."""
    from treadle.artifacts import is_artifact, open_artifact
    from treadle.backends.onnx.exporter import export_onnx
    from treadle.compiling import weights_of
    from treadle.computing import computing_in
    from treadle.option_values import parse_config, parse_limits
    from treadle.passes.framework.manager import PassManager
    from treadle.passes.pipelines import DEFAULT
    from treadle.progress import working
    from treadle.reporting.counts import counted, human
    from treadle.resolving import resolve

    if output.suffix != ".onnx":
        raise UsageError("an ONNX model's name must end in .onnx", received=str(output), hint=f"{output}.onnx")
    with working(f"exporting {model}", shown=not as_json):
        if is_artifact(model):
            refuse_for_artifact(config=config, inputs=inputs, outputs=outputs, quantize=quantize, widen=widen)
            held = open_artifact(model, limits=parse_limits(limit or ()))
            graph, weights = held.optimized.graph, held.weights
        else:
            chosen = parse_config(config or (), limit or ())
            passes, widened = computing_in(None, DEFAULT, names_of(widen) or (), quantize)
            resolved = resolve(model, inputs=names_of(inputs), outputs=outputs_of(outputs), widen=widened, **chosen)
            graph = PassManager(passes).run(resolved.graph).graph
            weights, _ = weights_of(resolved, graph, None, seed)
        made = export_onnx(graph, weights, output, opset=opset, external_above=external_above)
    files = [path for path in (made.path, made.data) if path is not None]
    if as_json:
        facts = {"model": graph.name, "opset": made.opset, "files": list(map(str, files)), "operators": made.operators}
        print_json({**facts, "inputs": made.inputs, "outputs": made.outputs})
        return
    for name, inside in (*made.inputs.items(), *made.outputs.items()):
        if name != inside:
            print(f"{name} is called {inside} in the file")
    for path in files:
        print(f"wrote {path}, {human(path.stat().st_size, 'B')}")
    counts = sorted(made.operators.items(), key=lambda each: -each[1])
    told = ", ".join(f"{count} {name}" for name, count in counts)
    print(f"{counted(sum(made.operators.values()), 'node')} of opset {made.opset}: {told}")

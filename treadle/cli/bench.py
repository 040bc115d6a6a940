"""`treadle bench`: a model compared with other tools."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from treadle.cli.application import command, print_json
from treadle.cli.completing import complete_backend
from treadle.cli.options import (
    AsJson,
    Config,
    Dtype,
    Limit,
    ModelName,
    OptionalInputs,
    Quantize,
    Seed,
    Sizes,
    Widen,
    names_of,
    refuse_for_artifact,
)


@command("bench")
def bench_beside(
    model: ModelName,
    against: Annotated[
        str,
        typer.Option(
            "--against",
            metavar="NAMES",
            help="Tools to compare with, separated by commas: eager, compile, llama.cpp, onnxruntime, openvino, "
            "ctranslate2; the last three also with -int8; openvino-bf16.",
        ),
    ] = "eager,onnxruntime",
    sizes: Sizes = None,
    backend: Annotated[
        str,
        typer.Option(
            "--backend", metavar="NAME", help="Treadle's backend: tvm, torch or numpy.", autocompletion=complete_backend
        ),
    ] = "tvm",
    threads: Annotated[int, typer.Option("--threads", metavar="N", min=1, help="Threads per tool.")] = 1,
    rounds: Annotated[int, typer.Option("--rounds", metavar="N", min=1, help="Timed rounds.")] = 15,
    python: Annotated[
        str,
        typer.Option(
            "--python",
            metavar="PATH",
            help="Python interpreter with the tools other than PyTorch. By default the current one.",
            show_default=False,
        ),
    ] = sys.executable,
    config: Config = None,
    limit: Limit = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    widen: Widen = None,
    inputs: OptionalInputs = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Compare a model with other tools, each in its own process, in turns."""
    from treadle.artifacts import is_artifact
    from treadle.benching.benchmark import bench_model
    from treadle.benching.report import report_lines
    from treadle.benching.workload import Workload
    from treadle.option_values import parse_sizes
    from treadle.progress import working
    from treadle.reporting.tables import console

    if is_artifact(model):
        refuse_for_artifact(config=config, inputs=inputs, dtype=dtype, quantize=quantize)
    workload = Workload(
        model,
        backend,
        threads,
        names_of(inputs),
        config or (),
        limit or (),
        dtype,
        names_of(widen) or (),
        seed,
        quantize,
    )
    with working(f"benchmarking {model}", shown=not as_json) as tell:
        found = bench_model(
            workload,
            names_of(against) or (),
            sizes=parse_sizes(sizes),
            rounds=rounds,
            python=python,
            emit=(lambda line: None) if as_json else tell,
        )
    if as_json:
        print_json(found.as_dict())
        return
    for line in report_lines(found):
        console().print(line)

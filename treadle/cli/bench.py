"""`treadle bench`: a model compared with other tools."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from treadle.cli.application import command, print_json
from treadle.cli.options import AsJson, ModelName, OptionKeywords, Sizes


@command("bench", takes=["bench"], defaults={"backend": "tvm"})
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
    *,
    keywords: OptionKeywords,
    as_json: AsJson = False,
) -> None:
    """Compare a model with other tools. Each tool runs in its own process; the tools take turns."""
    from treadle.benching.benchmark import bench_model
    from treadle.benching.report import report_lines
    from treadle.benching.workload import Workload
    from treadle.program.flag_values import names_of, parse_sizes
    from treadle.progress import working
    from treadle.reporting.tables import console

    workload = Workload(model, threads, keywords)
    with working(f"benchmarking {model}", shown=not as_json) as tell:
        found = bench_model(
            workload,
            names_of(against),
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

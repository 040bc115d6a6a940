"""`treadle compile`: compile a model and print the changes of each pass."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

import treadle
from treadle.cli.application import command, print_json
from treadle.cli.options import NOTHING_CERTIFIED, AsJson, ModelName, OptionKeywords
from treadle.ir.errors import UsageError


@command("compile", takes=["compile"])
def compile_model(
    model: ModelName,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="FILE.treadle", help="Write an artifact, which `run` loads.", show_default=False
        ),
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Print what each pass refused, and why.")] = False,
    *,
    keywords: OptionKeywords,
    as_json: AsJson = False,
) -> None:
    """Compile a model; print the changes of each pass, the compile time, and the kernels that run."""
    from treadle.artifacts.reading import SUFFIX
    from treadle.artifacts.tasks import tasks_of
    from treadle.exporting.file_formats import writing_hint
    from treadle.files.nearest_names import check_suffix
    from treadle.fitting import fit_prose, fitted
    from treadle.frontends.vocabularies.folder_vocabulary import FILE
    from treadle.progress import working
    from treadle.reporting.compilations import compiled_facts, compiled_lines, pass_table
    from treadle.reporting.counts import human
    from treadle.reporting.tables import console

    if output is not None:
        check_suffix(output, [SUFFIX], "an artifact", writing_hint(output, model))
    started = time.perf_counter()
    certify = keywords.get("certify", False)
    with working(f"{'compiling and certifying' if certify else 'compiling'} {model}", shown=not as_json):
        made = treadle.compile(model, **keywords)
    seconds = time.perf_counter() - started
    if made.static:
        names = ", ".join(made.static)
        raise UsageError(
            f"the compiled graph depends on the value of {names}",
            received=repr(made),
            hint=f"--set {made.static[0]}=VALUE",
        )
    written = {"file": str(output), "seal": made.save(output)} if output is not None else {}
    if as_json:
        print_json({**compiled_facts(made, seconds), **written})
        return
    out = console()
    out.print(pass_table(made.log))
    if explain:
        print("\n" + fitted(made.log.explain() or "no pass refused anything", fit_prose))
    if certify:
        print("\n" + fitted(made.log.certified() or NOTHING_CERTIFIED, fit_prose))
    print("", fitted("\n".join(compiled_lines(made, seconds)), fit_prose), sep="\n")
    if made.memory_fit is not None:
        print("", fitted(str(made.memory_fit), fit_prose), sep="\n")
    if output is not None:
        print(f"wrote {output}, {human(output.stat().st_size, 'B')}, seal {written['seal']}")
        if tasks := tasks_of(made.graph, made.task_files):
            stored = "its tokenizer is" if FILE in made.task_files else "its settings are"
            served = ["serve"] if {"generate", "embed"} & {*tasks} else []
            *others, last = [f"`{task}`" for task in [*tasks, *served]]
            named = f"{', '.join(others)} and {last} take" if others else f"{last} takes"
            print(f"{stored} in the file: {named} it as MODEL")

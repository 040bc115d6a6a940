"""Arguments and options that several commands share."""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer

from treadle.cli.completing import complete_backend, complete_model, complete_target
from treadle.ir.errors import UsageError

NOTHING_CERTIFIED = "no pass changed anything that needs a certificate"

ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="file.py:function, a checkpoint folder, a GGUF, ONNX or .treadle file, a model of the zoo, or a fetched "
        "model (see `models`).",
        show_default=False,
        autocompletion=complete_model,
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
GivenOutputs = Annotated[
    str | None,
    typer.Option(
        "--outputs",
        metavar="NAMES",
        help="Compute only these outputs, or parts of them, such as pooled or 'hidden[:, 0]'; the rest is not "
        "computed.",
        show_default=False,
    ),
]
BackendName = Annotated[
    str,
    typer.Option(
        "--backend",
        metavar="NAME",
        help="numpy, torch, tvm, or another installed backend.",
        autocompletion=complete_backend,
    ),
]
TargetName = Annotated[
    str, typer.Option("--target", metavar="NAME", help="cpu or cuda.", autocompletion=complete_target)
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        metavar="N",
        min=1,
        help="Maximum number of threads, with torch and tvm. By default one per core.",
        show_default=False,
    ),
]
Certify = Annotated[
    bool,
    typer.Option("--certify", help="Test every rewrite on random inputs, undo failing ones, and print certificates."),
]
Dtype = Annotated[
    str | None,
    typer.Option("--dtype", metavar="bf16", help="Compute products with weights in bf16 or f32.", show_default=False),
]
Quantize = Annotated[
    str | None,
    typer.Option(
        "--quantize",
        metavar="SCHEME",
        help="Quantize the weights of products: int8-weights or int4; with int8 or int4-int8 the activations too. int8 "
        "also applies to a GGUF file's own blocks.",
        show_default=False,
    ),
]
Widen = Annotated[
    str | None,
    typer.Option(
        "--widen",
        metavar="bf16",
        help="Compute bf16 or f16 values in f32; blocks: decode the blocks of a GGUF file when loading.",
        show_default=False,
    ),
]
CacheName = Annotated[
    str | None,
    typer.Option(
        "--cache",
        metavar="DTYPE",
        help="Store keys and values in f32, bf16 or f16. By default in the dtype that the model computes.",
        show_default=False,
    ),
]
Sizes = Annotated[
    str | None,
    typer.Option("--sizes", metavar="B=1,S=128", help="Sizes of symbolic axes. By default small ones."),
]
Limit = Annotated[
    list[str] | None,
    typer.Option(
        "--limit", metavar="NAME=N", help="Raise a limit on an input file, as named in its error. Repeatable."
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="300MB",
        help="Memory budget of a run in addition to weights, inputs and outputs, at --sizes and below.",
        show_default=False,
    ),
]
Recipe = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="NAME",
        help="megatron, sequence, context, dp, fsdp, megatron-fsdp or gpipe (see docs/sharding.md).",
        show_default=False,
    ),
]
Axis = Annotated[
    list[str] | None,
    typer.Option(
        "--axis",
        metavar="NAME=AXES",
        help="Split an axis of the model over the mesh, such as heads=tp; vocab=- does not split it. Repeatable.",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device", metavar="NAME", help="Device of each rank: h100, a100 or cpu. By default h100.", show_default=False
    ),
]
Mesh = Annotated[
    str | None,
    typer.Option(
        "--mesh",
        metavar="AXES",
        help="Run as one of the ranks started by treadle launch or torchrun, over this mesh, such as tp=2.",
        show_default=False,
    ),
]
Patience = Annotated[
    float,
    typer.Option("--timeout", metavar="SECONDS", min=1, help="With --mesh: seconds that a rank waits for the others."),
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Seed of the weights if there is no checkpoint.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def refuse_for_artifact(**options: Any) -> None:
    """Raise UsageError for options that cannot change an artifact, which is already configured and optimized."""
    given = [name for name, value in options.items() if value]
    if given:
        flags = [{"config": "--set"}.get(name, f"--{name}") for name in given]
        raise UsageError(
            "an artifact is already compiled, and does not accept " + " or ".join(flags),
            hint="treadle compile MODEL -o FILE.treadle, with other options",
        )


def outputs_of(text: str | None) -> tuple[str, ...] | None:
    """Return the outputs in a list separated by commas; some may have a part in brackets."""
    return None if text is None else tuple(name.strip() for name in re.split(r",(?![^\[]*\])", text) if name.strip())


def names_of(text: str | None) -> tuple[str, ...] | None:
    """Return the names in a list separated by commas."""
    return None if text is None else tuple(name.strip() for name in text.split(",") if name.strip())

"""Arguments and options that several commands share, and what is said of them in one place."""

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
        help="file.py:function, a folder with a checkpoint, a GGUF, ONNX or .treadle file, a name of the zoo, or of a "
        "fetched model (see `models`).",
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
        help="Give these outputs alone, or parts of them, such as pooled or 'hidden[:, 0]'; what no other needs is not "
        "computed.",
        show_default=False,
    ),
]
BackendName = Annotated[
    str,
    typer.Option(
        "--backend",
        metavar="NAME",
        help="numpy, torch, tvm, or another that is installed.",
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
        help="How many threads may work at once, with torch and tvm. By default one a core.",
        show_default=False,
    ),
]
Certify = Annotated[
    bool, typer.Option("--certify", help="Try every rewrite on drawn values, undo what fails, and print certificates.")
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype", metavar="bf16", help="Compute products with weights in bf16, or in f32.", show_default=False
    ),
]
Quantize = Annotated[
    str | None,
    typer.Option(
        "--quantize",
        metavar="SCHEME",
        help="Hold weights that products multiply in blocks: int8-weights, int4. int8, int4-int8: and round what "
        "weights in blocks multiply, those of a GGUF file too.",
        show_default=False,
    ),
]
Widen = Annotated[
    str | None,
    typer.Option(
        "--widen",
        metavar="bf16",
        help="Compute in f32 what is bf16, or f16; blocks: decode those of a GGUF file at once.",
        show_default=False,
    ),
]
CacheName = Annotated[
    str | None,
    typer.Option(
        "--cache",
        metavar="DTYPE",
        help="Hold keys and values in f32, bf16 or f16. By default as the model computes them.",
        show_default=False,
    ),
]
Sizes = Annotated[
    str | None,
    typer.Option("--sizes", metavar="B=1,S=128", help="Sizes of symbolic axes; small ones, if not said."),
]
Limit = Annotated[
    list[str] | None,
    typer.Option(
        "--limit", metavar="NAME=N", help="Let a file ask for more than it may, as its error says. Repeatable."
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="300MB",
        help="What a run may take beside weights, inputs and outputs, at --sizes and below.",
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
        help="Split an axis of the model over the mesh, such as heads=tp; vocab=- leaves it whole. Repeatable.",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device", metavar="NAME", help="What each rank is: h100, a100 or cpu. By default h100.", show_default=False
    ),
]
Mesh = Annotated[
    str | None,
    typer.Option(
        "--mesh",
        metavar="AXES",
        help="Run as one of several ranks that treadle launch or torchrun started, over this mesh, such as tp=2.",
        show_default=False,
    ),
]
Patience = Annotated[
    float,
    typer.Option("--timeout", metavar="SECONDS", min=1, help="With --mesh: how long a rank waits for the others."),
]
Seed = Annotated[
    int, typer.Option("--seed", metavar="N", min=0, help="Draws the weights where no checkpoint gives them.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def refuse_for_artifact(**options: Any) -> None:
    """An artifact is configured, and its passes have run: options that would change that are refused."""
    given = [name for name, value in options.items() if value]
    if given:
        told = [{"config": "--set"}.get(name, f"--{name}") for name in given]
        raise UsageError(
            "an artifact is what was compiled, and takes no " + " or ".join(told),
            hint="treadle compile MODEL -o FILE.treadle, with other options",
        )


def outputs_of(text: str | None) -> tuple[str, ...] | None:
    """The outputs of a list with commas, some with a part in brackets."""
    return None if text is None else tuple(name.strip() for name in re.split(r",(?![^\[]*\])", text) if name.strip())


def names_of(text: str | None) -> tuple[str, ...] | None:
    """The names of a list with commas."""
    return None if text is None else tuple(name.strip() for name in text.split(",") if name.strip())

"""The options of compilation, each declared once: type, default, texts, flag, and the entry functions that take it.

These are derived from the fields: the signature of `treadle.compile`, its stub and docstring, the flags of commands
with their help, the table in docs/cli.md, and the names that `--set` refuses. To add an option, add a field, and read
it where it applies.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treadle.ir.errors import Hint, UsageError
from treadle.ir.hardware import HARDWARE
from treadle.program import flag_values
from treadle.program.option_declarations import Flag, Option, declare, declared

if TYPE_CHECKING:
    import numpy as np

    from treadle.ir.target import Target
    from treadle.passes.framework.manager import Pass

    Array = np.ndarray[Any, Any]

EXPLAINED = ("fusion", "layouts", "storage", "memory", "quantization", "sharding", "step", "device")
"""The subjects of `treadle explain`. Each subject has an entry function."""

_ELSEWHERE = ", ".join(name for name in HARDWARE if name not in ("cpu", "cuda"))
_LOWERED = {f"explain {subject}" for subject in ("layouts", "storage", "memory", "device")}
_EXPLAIN = {f"explain {subject}" for subject in EXPLAINED}
_SHARDED = {"shard", "rank", "explain sharding"}
_ENTRIES = frozenset(
    {
        "compile",
        "load",
        "artifact",
        "session",
        "generate",
        "embed",
        "task",
        "train",
        "verify",
        "inspect",
        "export",
        "bench",
    }
    | _EXPLAIN
    | _SHARDED
)


def _option(default: Any, about: str, help: str = "", flag: Flag | None = None, *, but: Collection[str] = ()) -> Any:
    """Declare an option. `but` has the entry functions that do not take it."""
    assert _ENTRIES.issuperset(but)
    return declare(default, about, help, flag, takers=_ENTRIES.difference(but))


@dataclass(frozen=True)
class ReadingOptions:
    """Options that select the parts of a model to read, and the limits on its files."""

    inputs: Sequence[str] | None = _option(
        None,
        'optional inputs of the declaration to include, such as ("lengths",)',
        "Optional inputs to include, such as lengths or lengths,token_types.",
        Flag("inputs", "NAMES", flag_values.inputs_of),
        but={"load", "artifact", "generate", "task", "embed"},
    )
    outputs: Sequence[str] | None = _option(
        None,
        "names of the outputs to return; operations that only other outputs need are not computed. "
        '"hidden[:, 0]" is a part of an output: a position, or `start:stop`, for each of its first axes. None: all',
        "Compute only these outputs, or parts of them, such as pooled or 'hidden[:, 0]'; the rest is not computed.",
        Flag("outputs", "NAMES", flag_values.outputs_of),
        but={"load", "artifact", "task", "embed", "train", "bench", "session", "generate"},
    )
    widen: str | Iterable[str] = _option(
        (),
        '"bf16", "f16", or both: values of these dtypes become f32, including weights. "blocks": weights that a GGUF '
        "file stores in blocks are decoded to f32 when they are read; otherwise they stay in blocks "
        "(docs/quantization.md)",
        "Compute bf16 or f16 values in f32; blocks: decode the blocks of a GGUF file when loading.",
        Flag("widen", "bf16", flag_values.names_of),
        but={"artifact", "train"},
    )
    limits: Mapping[str, int] | None = _option(
        None,
        'limits on what a file may contain, by name, such as {"tensors": 1_000_000}; errors name the limit',
        "Raise a limit on an input file, as named in its error. Repeatable.",
        Flag("limit", "NAME=N", flag_values.parse_limits, many=True),
    )
    tokenizer: str | Path | None = _option(  # noqa: RUF009
        None,
        "another model, whose tokenizer, chat template and end tokens are used",
        "Use another model's tokenizer.",
        Flag("tokenizer", "MODEL", complete="model"),
        but=_ENTRIES.difference({"load", "session", "rank", "generate", "embed", "task", "train"}),
    )
    mmproj: str | Path | None = _option(  # noqa: RUF009
        None,
        "for a language model in a GGUF file, the GGUF file of its image encoder and projector. None: the file "
        'mmproj*.gguf next to it, if there is one. "none": no image encoder (docs/vision.md)',
        "GGUF file of the image encoder of a GGUF file; none: no images. By default mmproj*.gguf next to MODEL.",
        Flag("mmproj", "FILE"),
        but={"artifact", "embed", "train"},
    )


@dataclass(frozen=True)
class WeightOptions:
    """Options for the values of weights."""

    weights: Mapping[str, Array] | str | Path | None = _option(  # noqa: RUF009
        None,
        "arrays by parameter name, each of the parameter's shape, in place of the checkpoint's; or, for a declaration, "
        "a graph or an imported module, the folder or .safetensors file that holds them. If there are none, initial "
        "values are drawn from `seed`. Arrays are copied, unless they are read-only",
        "For a declaration: the folder or the .safetensors file with its weights.",
        Flag("weights", "FOLDER"),
        but={"artifact"},
    )
    new_weights: Sequence[str] = _option(
        (),
        "patterns of names of weights that are drawn from `seed`, such as a new head on trained weights: "
        '("logits.*",). `weights` has the others, and may be those of another declaration',
        "Draw the weights of these names, such as 'logits.*': a new head on the weights of --weights. Repeatable.",
        Flag("new-weights", "PATTERN", tuple, many=True),
        but=_ENTRIES - {"train"},
    )
    seed: int = _option(
        0,
        "an integer, 0 or more",
        "Seed of the weights if there is no checkpoint.",
        Flag("seed", "N", least=0),
        but={"load", "artifact", "session", "generate", "task", "inspect", *_EXPLAIN},
    )


@dataclass(frozen=True)
class ComputingOptions:
    """Options for the passes, and for the precision of the computation."""

    passes: Sequence[Pass] | str | None = _option(
        None,
        'the pipeline: a list of passes, or its text, such as "fuse-gelu, fuse-linear" (docs/passes.md); []: the graph '
        "as declared; None: `treadle.passes.pipelines.DEFAULT`",
        "Run these passes in place of the default pipeline, such as 'fuse-gelu, fuse-linear'; '': none.",
        Flag("passes", "TEXT"),
        but={"artifact", "train", "bench", *_SHARDED},
    )
    without: Sequence[str] = _option(
        (),
        'names of passes to leave out of the pipeline, such as ("fuse-gelu",)',
        "Leave a pass out of the pipeline, such as fuse-gelu. Repeatable.",
        Flag("without", "PASS", tuple, many=True),
        but={"artifact", "train", "bench", *_SHARDED},
    )
    certify: bool | None = _option(
        None,
        "test every rewrite on random values before it is accepted (docs/passes.md); None: follow TREADLE_CERTIFY",
        "Test every rewrite on random inputs, undo failing ones, and print certificates.",
        Flag("certify"),
        but={"artifact", "train", "bench"},
    )
    dtype: str | None = _option(
        None,
        '"bf16": products with weights have bf16 operands and are summed in f32, everything else is f32 '
        '(docs/decisions/0013-products-in-bf16.md). "f32": everything is f32. None: as the model is declared',
        "Compute products with weights in bf16 or f32.",
        Flag("dtype", "bf16"),
        but={"artifact"},
    )
    quantize: str | None = _option(
        None,
        '"int8-weights": weights that products multiply are stored in 8 bits, with a scale per row; "int4": in 4 bits, '
        'with a scale per 32 neighbors. "int8", "int4-int8": in addition, activations that are multiplied by quantized '
        "weights (including those of a GGUF file) are rounded to 8 bits at every call (docs/quantization.md). "
        '"as-stored": inputs of products are rounded as the settings of a quantized folder ask for it. None: weights '
        "as stored, and inputs not rounded",
        "Quantize the weights of products: int8-weights or int4; with int8 or int4-int8 the activations too. int8 also "
        "applies to a GGUF file's own blocks. as-stored: round inputs as a quantized folder asks for it.",
        Flag("quantize", "SCHEME"),
        but={"artifact", "train"},
    )


@dataclass(frozen=True)
class RunningOptions:
    """Options for the backend, the device, and the memory of a run."""

    backend: str = _option(
        "auto",
        '"auto", the fastest installed backend that accepts the graph; "numpy", "torch" or "tvm", or one that is '
        "registered under the entry point group `treadle.backends`",
        "auto, the fastest installed backend that accepts the model; numpy, torch, tvm, or another installed backend.",
        Flag("backend", "NAME", complete="backend"),
        but={"verify", "shard", *_EXPLAIN.difference(_LOWERED)},
    )
    target: str | Target = _option(  # noqa: RUF009
        "cpu",
        'what to compile for: "cpu", `Target("cpu", threads=4)`, "cuda", "cuda:1", or other hardware by name: '
        + _ELSEWHERE,
        f"cpu, cuda, cuda:1, or other hardware: {_ELSEWHERE}.",
        Flag("target", "NAME", complete="target"),
        but={"bench", "shard", *_EXPLAIN.difference(_LOWERED)},
    )
    memory: int | str | None = _option(
        None,
        'limit on a run\'s memory in addition to weights, inputs and outputs: bytes, or text such as "300MB" '
        "(docs/memory.md)",
        "Memory budget of a run in addition to weights, inputs and outputs, at --sizes and below.",
        Flag("memory", "300MB"),
        but=_ENTRIES.difference({"compile", "artifact", "embed", *_LOWERED}),
    )
    sizes: Mapping[str, int] | None = _option(
        None,
        "the largest sizes of symbolic axes for which the run must stay within `memory`; they become bounds of the "
        "result. Default: 1 for a batch and 128 for other axes",
        "Sizes of symbolic axes. By default 1 for a leading axis, 128 for others, within bounds.",
        Flag("sizes", "B=1,S=128", flag_values.parse_sizes),
        but=_ENTRIES.difference({"compile", "artifact", "embed", *_LOWERED, *_SHARDED}),
    )
    donate: Sequence[str] = _option(
        (),
        "names of inputs that the caller donates with each call: a run may overwrite their memory and return it as "
        "outputs (docs/memory.md). Each must be a contiguous, writable array of the input's dtype",
        "An input that callers donate: a run may overwrite it. Repeatable.",
        Flag("donate", "INPUT", tuple, many=True),
        but=_ENTRIES.difference({"compile", "artifact", *_LOWERED}),
    )
    cache: str | None = _option(
        None,
        'the dtype of keys and values for generation: "f32", "bf16" or "f16"; None: the dtype that the model computes',
        "Store keys and values in f32, bf16 or f16. By default in the dtype that the model computes.",
        Flag("cache", "DTYPE"),
        but=_ENTRIES.difference({"load", "session", "generate", "explain step"}),
    )
    torch_compile: bool = _option(
        False,
        "let torch.compile compile the program that the torch backend emits, at the first calls; off by default, since "
        "the gain has not been measured (docs/gpu.md)",
        "Compile the program of the torch backend with torch.compile.",
        Flag("torch-compile"),
        but=_ENTRIES.difference({"compile", "session", "generate"}),
    )
    device_sampling: str | None = _option(
        None,
        "tokens that a step of generation returns in place of logits, so that only they are copied from the device: "
        '"greedy", or "random" for any sampling options; None: logits (docs/generation.md)',
        but=_ENTRIES.difference({"session", "generate"}),
    )


def declared_options() -> Mapping[str, Option]:
    """Return all options by name, in the order of `--help`."""
    return declared(ReadingOptions, WeightOptions, ComputingOptions, RunningOptions)


def taken_by(*entries: str) -> list[Option]:
    """Return the options that at least one of these entry functions takes."""
    return [each for each in declared_options().values() if each.takers.intersection(entries)]


def not_taken(entry: str, name: str) -> UsageError:
    """Return the error for an option that an entry function does not take."""
    option = declared_options()[name]
    takers = sorted(set(map(entry_text, option.takers)))
    hint: str = f"leave it out; it applies to {', '.join(takers)}"
    if "compile" in option.takers:
        hint = Hint("leave it out; t.compile takes it", "leave it out; treadle compile takes it")
    return UsageError(f"{entry_text(entry)} does not take {name}", hint=hint)


def entry_text(entry: str) -> str:
    """Return the name of an entry function in errors."""
    return _COMMANDS.get(entry, entry)


_COMMANDS = {"artifact": "an artifact", "rank": "a rank", "session": "generation", "task": "a task"}
"""Names of entry functions in errors, if they differ."""

"""Options of compilation. Each option is declared once: type, default, texts, flag, and the entry functions that take
it.

    chosen = CompileOptions.of("verify", {"dtype": "bf16", "layers": 2})
    chosen.dtype, chosen.config                     # "bf16", {"layers": 2}
    program = Program("gpt2", chosen).optimize()  # read, traced, and after the stages

An entry function takes `**options` and passes them to `CompileOptions.of`. A name that is not an option here configures
the model's declaration. These are derived from the fields of `CompileOptions`: the signature of `treadle.compile`, its
stub and docstring, the flags of commands with their help, the table in docs/cli.md, and the names that `--set` refuses.

To add an option, add a field, and read it where it applies.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from treadle.files.nearest_names import NearestNames
from treadle.files.shown_names import printable
from treadle.ir.errors import Hint, TreadleError, UsageError
from treadle.ir.hardware import HARDWARE
from treadle.ir.target import Target
from treadle.ir.transforms.rounded_inputs import AS_STORED
from treadle.ir.types import DType
from treadle.program import flag_values
from treadle.program.option_declarations import Flag, Option, declare, declared

if TYPE_CHECKING:
    import numpy as np

    from treadle.passes.framework.manager import Pass
    from treadle.passes.stages import CompileStage
    from treadle.program.resolved import Resolved
    from treadle.program.source import AnyModel, ModelSource

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


def _dtype_names(value: Any) -> Any:
    """Return the name of a dtype, `bf16` as "bf16", also in a list of dtypes. Other values are unchanged."""
    if isinstance(value, list | tuple):
        return type(value)(map(_dtype_names, value)) if any(isinstance(each, DType) for each in value) else value
    return str(value) if isinstance(value, DType) else value


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
    tokenizer: str | None = _option(
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
        "the folder or .safetensors file that holds them. If there are none, initial values are drawn from `seed`. "
        "Arrays are not copied, so the caller must not modify them afterwards",
        "For a declaration: the folder or the .safetensors file with its weights.",
        Flag("weights", "FOLDER"),
        but={"artifact"},
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


@dataclass(frozen=True)
class CompileOptions(RunningOptions, ComputingOptions, WeightOptions, ReadingOptions):
    """All options of an entry function, with the configuration of the model's declaration.

    entry   the entry function's name, for errors
    config  the configuration by name, such as {"layers": 2}; for an ONNX file, sizes of axes, and values of inputs that
            determine shapes
    """

    entry: str = "compile"
    config: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, entry: str, keywords: Mapping[str, Any], **defaults: Any) -> Self:
        """Sort the keyword arguments of an entry function: options become fields, all others become `config`.

        keywords  `config` is the model's configuration as a mapping, for names that are also options
        defaults  defaults of this function, if they differ from the options' own

        Raises UsageError for an option that the function does not take, and for an unknown target.
        """
        known = declared_options()
        for name in keywords:
            if name in known and entry not in known[name].takers and known[name].is_set(keywords[name]):
                raise not_taken(entry, name)
        chosen = {name: _dtype_names(value) for name, value in keywords.items() if name in known and value is not None}
        config = {name: value for name, value in keywords.items() if name not in known and name != "config"}
        config.update(keywords.get("config") or {})
        made = cls(**{**defaults, **chosen}, entry=entry, config=config)
        made.where  # noqa: B018  an unknown target is refused here
        return made

    def keywords(self) -> dict[str, Any]:
        """Return the options that are set, and the configuration, as keyword arguments of an entry function."""
        found = {
            name: getattr(self, name) for name, each in declared_options().items() if each.is_set(getattr(self, name))
        }
        return {**found, "config": self.config} if self.config else found

    def record(self) -> dict[str, Any]:
        """Return the options that are set as JSON, for the record of an artifact; the configuration is under `config`.
        Weights are left out, and so are passes, backend and target, which an artifact records itself.
        """
        recorded = self.but(weights=None, passes=None, limits=None, tokenizer=None, mmproj=None).keywords()
        return {
            name: flag_values.as_json(value) for name, value in recorded.items() if name not in ("backend", "target")
        }

    def but(self, **changes: Any) -> Self:
        """Return a copy of the options with changes."""
        return dataclasses.replace(self, **changes)

    @property
    def where(self) -> Target:
        """The target to compile for. Raises UsageError for an unknown name."""
        return self.target if isinstance(self.target, Target) else Target(self.target)

    def stages(self, *more: CompileStage) -> tuple[CompileStage, ...]:
        """Return the stages of these options and more, in the order of `treadle.passes.stages`.

        Raises UsageError for an unknown dtype or scheme, for passes that are not passes or are in an order that is not
        possible, and for a pass in `without` that no stage has; ParseError for a text that is not a pipeline.
        """
        from treadle.passes.framework.facts import INITIAL
        from treadle.passes.stages import Custom, MergeOps, Precision, Quantize, Recognize, arranged, left_out
        from treadle.program.precision import checked_passes

        if isinstance(self.without, str):
            raise UsageError(
                "without= is a list of names",
                received=printable(repr(self.without)),
                hint=f"without=[{self.without!r}]",
            )
        given = None if self.passes is None else checked_passes(self.passes, self.where)
        stages = [Recognize(), MergeOps(), *more] if given is None else [Custom(given), *more]
        stages += [] if self.quantize in (None, AS_STORED) else [Quantize(self.quantize)]
        stages += [] if self.dtype is None else [Precision(self.dtype)]
        return arranged(left_out(stages, self.without), INITIAL)

    @property
    def widened(self) -> str | Iterable[str]:
        """The dtypes to widen when the model is read."""
        from treadle.program.precision import widened

        return widened(self.dtype, self.widen)

    @property
    def arrays(self) -> Mapping[str, Array] | None:
        """The weights, if they are given as arrays; else None."""
        return self.weights if isinstance(self.weights, Mapping) else None

    def open(self, model: AnyModel) -> ModelSource:
        """Find the model that MODEL names: see `ModelSource.open`, whose errors it raises."""
        from treadle.program.source import ModelSource

        stored = self.weights if isinstance(self.weights, str | Path) else None
        chosen: dict[str, Any] = {"tokenizer": self.tokenizer, "mmproj": self.mmproj, "limits": self.limits}
        return ModelSource.open(model, weights=stored, **chosen)

    def resolve(self, model: AnyModel, *, deferred: bool = False, **config: Any) -> Resolved:
        """Read and trace the model that MODEL names: see `ModelSource.resolve`, whose errors it raises.

        deferred  True if weights of a file are converted only when a part of them is read
        config    configuration in addition to these options' own
        """
        from treadle.program.source import ModelSource

        reading: dict[str, Any] = {"inputs": self.inputs, "outputs": self.outputs, "deferred": deferred}
        reading["as_stored"] = self.quantize == AS_STORED
        try:
            source = model if isinstance(model, ModelSource) else self.open(model)
            return source.resolve(widen=self.widened, config={**self.config, **config}, **reading)
        except TreadleError as error:
            self._point_to_option(error)
            raise

    def refuse_for_artifact(self, model: object, *, also: Collection[str] = ()) -> None:
        """Raise UsageError for options that cannot change an artifact, which is already configured and optimized.

        also  options that apply nevertheless
        """
        known = declared_options()
        given = [name for name in self.keywords() if name in known and "artifact" not in known[name].takers]
        given = [name for name in given if name not in also]
        if given or self.config:
            flags = [f"--{flag.name}" if (flag := known[name].flag) else f"{name}=" for name in given]
            raise UsageError(
                "an artifact is already compiled, and does not accept "
                + " or ".join([*flags, *["--set"] * bool(self.config)]),
                received=printable(str(model)),
                hint=Hint(
                    "compile the model again, with other options",
                    "treadle compile MODEL -o FILE.treadle, with other options",
                ),
            )

    @property
    def doubtful(self) -> bool:
        """True if a name of the configuration is similar to an option's, so that it may be misspelled."""
        return any(map(self._nearest, self.config))

    def _nearest(self, name: str) -> list[str]:
        """Return the option that has this name in other libraries, or else the most similar name, or an empty list."""
        names = [*_OWN_PARAMETERS.get(self.entry, ()), *[each.name for each in taken_by(self.entry)]]
        other = _OTHER_LIBRARIES.get(name)
        return [other] if other is not None and other in names else list(NearestNames(names).of(name, 1, 0.75))

    def _point_to_option(self, error: TreadleError) -> None:
        """Add an option to the hint of an error about a name that the model's declaration lacks, if the option has a
        similar name.
        """
        if error.option is not None and (near := self._nearest(error.option)):
            command = str(getattr(error.hint, "command", error.hint) or "")
            error.hint = Hint(
                f"did you mean {near[0]}=, an option of {_COMMANDS.get(self.entry, self.entry)}?", command
            )


_OTHER_LIBRARIES = {
    "lr": "learning_rate",
    "device": "target",
    "accumulation_steps": "gradient_accumulation_steps",
    "max_norm": "max_grad_norm",
    "clip_grad_norm": "max_grad_norm",
    "torch_dtype": "dtype",
    "precision": "dtype",
    "quantization": "quantize",
    "loss_fn": "loss",
    "criterion": "loss",
    "optim": "optimizer",
    "state_dict": "weights",
}
"""Options by their names in other libraries, which are not similar enough."""


_OWN_PARAMETERS: dict[str, list[str]] = {}
"""The keyword parameters of an entry function that are not options, such as `learning_rate` of a trainer."""


def declared_options() -> Mapping[str, Option]:
    """Return all options by name, in the order of `--help`."""
    return declared(ReadingOptions, WeightOptions, ComputingOptions, RunningOptions)


def taken_by(*entries: str) -> list[Option]:
    """Return the options that at least one of these entry functions takes."""
    return [each for each in declared_options().values() if each.takers.intersection(entries)]


def not_taken(entry: str, name: str) -> UsageError:
    """Return the error for an option that an entry function does not take."""
    option = declared_options()[name]
    command = _COMMANDS.get(entry, entry)
    takers = sorted({_COMMANDS.get(taker, taker) for taker in option.takers})
    hint: str = f"leave it out; it applies to {', '.join(takers)}"
    if "compile" in option.takers:
        hint = Hint("leave it out; t.compile takes it", "leave it out; treadle compile takes it")
    return UsageError(f"{command} does not take {name}", hint=hint)


_COMMANDS = {"artifact": "an artifact", "rank": "a rank", "session": "generation", "task": "a task"}
"""Names of entry functions in errors, if they differ."""


def documented(entry: str) -> str:
    """Return the text on an entry function's options for its docstring: name and meaning of each option."""
    import textwrap

    width = 10
    lines = []
    for each in taken_by(entry):
        body = textwrap.fill(
            each.about, 116, initial_indent=f"{each.name}  ".ljust(width), subsequent_indent=" " * width
        )
        lines.append(body)
    return "\n".join(lines)


def with_options(function: Callable[..., Any], entry: str) -> inspect.Signature:
    """Return the signature of an entry function in which its options replace `**options`, followed by `**config`, the
    model's configuration.
    """
    keyword = inspect.Parameter.KEYWORD_ONLY
    signature = inspect.signature(function)
    own = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
    _OWN_PARAMETERS[entry] = [each.name for each in own if each.kind is keyword]
    named = [
        inspect.Parameter(each.name, keyword, default=each.default, annotation=each.type)
        for each in taken_by(entry)
        if each.name not in signature.parameters
    ]
    config = inspect.Parameter("config", inspect.Parameter.VAR_KEYWORD, annotation="Any")
    return signature.replace(parameters=[*own, *named, config])


def describe_options(function: Callable[..., Any], entry: str) -> None:
    """Set an entry function's full signature, and replace OPTIONS in its docstring by the text on its options."""
    function.__signature__ = with_options(function, entry)  # type: ignore[attr-defined]
    function.__doc__ = inspect.cleandoc(function.__doc__ or "").replace("OPTIONS", documented(entry))

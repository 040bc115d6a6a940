"""The options of one call of an entry function, with the configuration of the model's declaration.

    chosen = CompileOptions.of("verify", {"dtype": "bf16", "layers": 2})
    chosen.dtype, chosen.config                     # "bf16", {"layers": 2}
    program = Program("gpt2", chosen).optimize()  # read, traced, and after the stages

An entry function takes `**options` and passes them to `CompileOptions.of`. A name that is not an option in
`treadle.program.option_table` configures the model's declaration.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from treadle.files.shown_names import printable
from treadle.frontends.binding_errors import OTHER_MODEL
from treadle.ir.errors import CheckpointError, Hint, TreadleError, UsageError
from treadle.ir.target import Target
from treadle.ir.transforms.rounded_inputs import AS_STORED
from treadle.ir.types import DTYPES, DType
from treadle.program import flag_values
from treadle.program.entry_signatures import own_parameters
from treadle.program.option_table import (
    ComputingOptions,
    ReadingOptions,
    RunningOptions,
    WeightOptions,
    declared_options,
    entry_text,
    not_taken,
    taken_by,
)
from treadle.program.other_names import OTHER_NAMES, meant_option

if TYPE_CHECKING:
    import numpy as np

    from treadle.passes.stages import CompileStage
    from treadle.program.source import AnyModel, ModelSource, Resolved

    Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class CompileOptions(RunningOptions, ComputingOptions, WeightOptions, ReadingOptions):
    """All options of an entry function, with the configuration of the model's declaration.

    entry   the entry function's name, for errors
    config  the configuration by name, such as {"layers": 2}; for an ONNX file, sizes of axes, and values of inputs that
            determine shapes
    explicit  the names of the options that the caller chose, also with their default values
    """

    entry: str = "compile"
    config: Mapping[str, Any] = field(default_factory=dict)
    explicit: frozenset[str] = frozenset()

    @classmethod
    def of(cls, entry: str, keywords: Mapping[str, Any], **defaults: Any) -> Self:
        """Sort the keyword arguments of an entry function: options become fields, all others become `config`.

        keywords  `config` is the model's configuration as a mapping, for names that are also options
        defaults  defaults of this function, if they differ from the options' own

        Raises UsageError for an option that the function does not take, for a value of another type than the option's,
        and for an unknown target.
        """
        known = declared_options()
        keywords = {name: _dtype_names(value) if name in known else value for name, value in keywords.items()}
        for name in keywords:
            if name in known and entry not in known[name].takers and known[name].is_set(keywords[name]):
                raise not_taken(entry, name)
            if name in known:
                known[name].check(keywords[name])
        if not isinstance(keywords.get("config") or {}, Mapping):
            raise UsageError(
                "config= must be a mapping", received=printable(repr(keywords["config"])), hint='config={"layers": 2}'
            )
        chosen = {name: value for name, value in keywords.items() if name in known and value is not None}
        config = {name: value for name, value in keywords.items() if name not in known and name != "config"}
        config.update(keywords.get("config") or {})
        made = cls(**{**defaults, **chosen}, entry=entry, config=config, explicit=frozenset(chosen))
        made.where  # noqa: B018  an unknown target is refused here
        return made

    def keywords(self) -> dict[str, Any]:
        """Return the options that are set or chosen, and the configuration, as arguments of an entry function."""
        chosen = {name: value for name in declared_options() if (value := getattr(self, name)) is not None}
        found = {name: value for name, value in chosen.items() if name in self.explicit or self._is_set(name)}
        return {**found, "config": self.config} if self.config else found

    def _is_set(self, name: str) -> bool:
        """Return True if the value of an option differs from its default."""
        return declared_options()[name].is_set(getattr(self, name))

    def record(self) -> dict[str, Any]:
        """Return the options that are set as JSON, for the record of an artifact; the configuration is under `config`.
        Weights are left out, and so are passes, backend and target, which an artifact records itself.
        """
        recorded = self.but(weights=None, passes=None, limits=None, tokenizer=None, mmproj=None).keywords()
        return {
            name: flag_values.as_json(value)
            for name, value in recorded.items()
            if name == "config" or (self._is_set(name) and name not in ("backend", "target"))
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

        if isinstance(self.without, str) or not all(isinstance(name, str) for name in self.without):
            raise UsageError(
                "without= is a list of names",
                received=printable(repr(self.without)),
                hint=f"without={[self.without] if isinstance(self.without, str) else ['fuse-linear']!r}",
            )
        given = None if self.passes is None else checked_passes(self.passes, self.where)
        stages = [Recognize(), MergeOps(), *more] if given is None else [Custom(given), *more]
        stages += [] if self.quantize in (None, AS_STORED) else [Quantize(self.quantize)]
        stages += [] if self.dtype is None else [Precision(self.dtype)]
        return arranged(left_out(stages, self.without), INITIAL)

    def check_values(self) -> None:
        """Raise the error of a value that no model accepts: BackendError for an unknown backend, UsageError for another
        dtype or scheme, and the errors of `stages`.
        """
        from treadle.passes.stepping.derivation import cache_dtype
        from treadle.program.backend_choice import check_backend
        from treadle.program.source import dtypes_to_widen

        check_backend(self.backend)
        self.stages()
        dtypes_to_widen(self.widened)
        if self.cache is not None:
            cache_dtype(self.cache)

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
        reading |= {"as_stored": self.quantize == AS_STORED, "new_weights": self.new_weights}
        if isinstance(self.new_weights, str):
            what, hint = "new_weights= is a list of patterns", f"new_weights={[self.new_weights]!r}"
            raise UsageError(what, received=printable(repr(self.new_weights)), hint=hint)
        try:
            source = model if isinstance(model, ModelSource) else self.open(model)
            return source.resolve(widen=self.widened, config={**self.config, **config}, **reading)
        except CheckpointError as error:
            is_file = source.kind not in ("declaration", "graph", "safetensors")
            if self.entry == "train" and error.missing and error.hint == OTHER_MODEL and not is_file:
                error.hint = _new_weights_hint(source, error.missing)
            raise
        except TreadleError as error:
            self._point_to_option(error)
            raise

    def refuse_for_artifact(self, model: object, *, also: Collection[str] = ()) -> None:
        """Raise UsageError for options that cannot change an artifact, which is already configured and optimized.

        also  options that apply nevertheless
        """
        known = declared_options()
        given = [name for name in self.keywords() if name in known and "artifact" not in known[name].takers]
        given = [name for name in given if name not in also and self._is_set(name)]
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
        return any(map(self._meant, self.config))

    def _meant(self, name: str) -> str | None:
        """Return the option that may be meant by a name, or None; see `meant_option`."""
        return meant_option(name, [*own_parameters(self.entry), *[each.name for each in taken_by(self.entry)]])

    def _point_to_option(self, error: TreadleError) -> None:
        """Add an option to the hint of an error about a name that the model's declaration lacks, if the option has a
        similar name.
        """
        name = error.option
        if name is None:
            return
        takes_target = any(each.name == "target" for each in taken_by(self.entry))
        command = str(getattr(error.hint, "command", error.hint) or "")
        sizes = self.entry in ("compile", "load", "embed") and self.memory is None and self._meant(name) == "sizes"
        if self.entry == "train" and name in _OF_TRAINING:
            value = printable(repr(self.config.get(name)))[:80]
            error.hint = Hint(_OF_TRAINING[name].replace("VALUE", value), command)
        elif name in _NOT_HERE or sizes:
            what = _NOT_HERE.get(name, _ANY_SIZE)
            error.hint = Hint(f"leave it out: {what}", f"leave it out: {getattr(what, 'command', what)}")
        elif takes_target and "threads" in (name, *OTHER_NAMES.get(name, ())):
            count = printable(repr(self.config[name])) if name in self.config else 2
            error.hint = Hint(f'target=t.Target("cpu", threads={count})', f"--threads {count}")
        elif meant := self._meant(name):
            taker = "Trainer" if self.entry == "train" else entry_text(self.entry)
            error.hint = Hint(f"did you mean {meant}=, an option of {taker}?", command)


def _new_weights_hint(source: ModelSource, missing: Sequence[str]) -> Hint:
    """Return the hint for weights that a checkpoint lacks, to train a model with them: a new head."""
    if source.kind not in ("declaration", "graph"):
        return Hint(f"{OTHER_MODEL}; {source.new_head}", f"{OTHER_MODEL}; {source.new_head.command}")
    patterns = list(dict.fromkeys(f"{name.rpartition('.')[0]}.*" if "." in name else name for name in missing))[:6]
    flags = " ".join(f"--new-weights {shlex.quote(printable(each))}" for each in patterns)
    otherwise = f", if these are new; else {OTHER_MODEL}"
    return Hint(f"new_weights={patterns}{otherwise}", flags + otherwise)


def _dtype_names(value: Any) -> Any:
    """Return the name of a dtype, "bf16" for `t.bf16`, `torch.bfloat16` and `np.dtype`s, also in a list of dtypes.
    Other values are unchanged.
    """
    if isinstance(value, list | tuple) and any(_is_dtype(each) for each in value):
        return type(value)(map(_dtype_names, value))
    if not _is_dtype(value):
        return value
    return next((name for name, each in DTYPES.items() if each == value), value)


def _is_dtype(value: object) -> bool:
    """Return True for a dtype of ours, of PyTorch or of NumPy."""
    if isinstance(value, type):
        return issubclass(value, np.generic)
    return isinstance(value, DType | np.dtype) or type(value).__name__ == "dtype"


_ANY_SIZE = "a model is one graph, and symbolic axes, which dynamic= of t.from_torch names, take every size"
_RANKS = "the command `treadle launch` starts ranks, and `treadle shard` plans them"
_NOT_HERE: dict[str, str] = {
    **dict.fromkeys(("fullgraph", "dynamic"), _ANY_SIZE),
    **dict.fromkeys(("mesh", "recipe", "tensor_parallel_size", "tp", "tp_size"), _RANKS),
    "mode": Hint('torch_compile=True for the torch backend, or backend="tvm"', "no backend has modes of compilation"),
    "trust_remote_code": "no code of a model's folder is run",
    "low_cpu_mem_usage": "the weights of a checkpoint are mapped into memory",
    "use_fast": "the tokenizer of the model's folder is used",
    "task": Hint(
        "the methods of the model that t.load returns are its tasks, such as model.classify",
        "the commands are the tasks, such as treadle classify",
    ),
    "local_files_only": Hint(
        "a model is downloaded only by t.fetch_model", "a model is downloaded only by treadle fetch"
    ),
    "attn_implementation": "the compiler chooses the kernels of attention",
    "use_cache": Hint(
        "t.compile(model).session() has a key/value cache", "treadle generate and serve have a key/value cache"
    ),
    "sess_options": Hint('target=t.Target("cpu", threads=4) sets the threads', "--threads 4 sets the threads"),
}
"""Options of other libraries that have no effect here, with what there is."""


_BATCHES = "leave it out: trainer.step is called with the inputs and targets of each batch"
_SCHEDULE = 'learning_rate=t.Schedule(3e-4, warmup=100, steps=1000, shape="cosine")'
_OF_TRAINING = {
    name: hint
    for names, hint in {
        "warmup warmup_steps num_warmup_steps schedule scheduler lr_scheduler lr_scheduler_type": _SCHEDULE,
        "weight_decay wd": "optimizer=t.AdamW(weight_decay=VALUE)",
        "momentum": "optimizer=t.SGD(momentum=VALUE)",
        "fp16 bf16 amp mixed_precision autocast": 'dtype="bf16"',
        "accumulate accumulation": "gradient_accumulation_steps=VALUE",
        "epochs num_epochs num_train_epochs steps max_steps batch batch_size per_device_train_batch_size": _BATCHES,
        "args data dataset train_dataset eval_dataset dataloader train_dataloader callbacks": _BATCHES,
    }.items()
    for name in names.split()
}
"""Options of trainers of other libraries, with what `t.Trainer` has; VALUE is the value that was passed."""

"""A compiled model: call it, inspect it, save it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn, Self, TypeAlias

import numpy as np

from treadle.artifacts.writing import write_artifact
from treadle.backends.protocol import Executable, Outputs, Port
from treadle.exporting.file_formats import refuse_other_format
from treadle.files.contained_files import PathLike
from treadle.files.shown_names import printable
from treadle.held_weights import HeldWeights, stored_weights
from treadle.ir.analysis.length_inputs import row_lengths
from treadle.ir.errors import BackendError, Hint, UsageError
from treadle.ir.graph import Graph
from treadle.ir.source_lines import user_line
from treadle.ir.target import Target
from treadle.ir.wording.call_spelling import spelled_keywords
from treadle.ir.wording.checked_calls import with_checked_call, with_checked_methods
from treadle.ir.wording.notebook_html import html_code, html_table, html_title
from treadle.ir.wording.other_interfaces import COMPILED_ATTRIBUTES
from treadle.ir.wording.unknown_attributes import with_attribute_hints
from treadle.passes.budget.memory_fit import MemoryFit
from treadle.passes.framework.manager import Optimized
from treadle.passes.framework.pass_log import PassLog
from treadle.program.places import ARTIFACT_SUFFIX
from treadle.runtime.session import CHUNK, Full, Session
from treadle.stepped import SESSION_HINTS, SteppedModel, step_of

if TYPE_CHECKING:
    from treadle.explaining.memory import MemoryReport
    from treadle.explaining.sharding import ShardingReport
    from treadle.report.building import Report

Array = np.ndarray[Any, Any]
OutputNames: TypeAlias = str | Sequence[str] | None
"""Outputs of `Compiled.run`, which checks the names: None for all."""


@with_attribute_hints(
    "a compiled model",
    COMPILED_ATTRIBUTES,
    creation="t.compile(model, {})",
    settings=("weights", "backend", "target", "seed"),
)
@with_checked_methods({"overwrite": "leave it out: an existing file is replaced"})
@dataclass(frozen=True)
class Compiled:
    """A compiled model: call it with arrays, by name or in order, and inspect what the compiler did.

    name        the model's name
    optimized   the graph as declared, the graph after all passes, and the pass log
    executable  the backend's executable
    backend     the backend's name
    target      the target that the model was compiled for
    weights     the weights by name, read-only (`treadle.held_weights`); memory-mapped if they come from a checkpoint
    unused      tensors of the checkpoint that the model does not use
    unread      the keys of config.json that the model's family does not know
    options     the options that were set when the model was compiled (`CompileOptions.record`)
    seed        the seed of random weights, or None if a checkpoint or the caller provided the weights
    _stored_files  returns the files of the model's tokenizer and settings by name, for its graph

    If the values of some inputs determine shapes, `treadle.compile` returns the subclass
    `treadle.specializing.Specializing`, which has a graph for each combination of these values.
    """

    name: str
    optimized: Optimized
    executable: Executable
    backend: str
    target: Target
    weights: Mapping[str, Array]
    unused: tuple[str, ...] = ()
    seed: int | None = None
    unread: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    _stored_files: Callable[[Graph], Mapping[str, bytes]] = field(default=lambda graph: {}, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", HeldWeights(self.weights))

    @property
    def graph(self) -> Graph:
        """The optimized graph."""
        return self.optimized.graph

    @cached_property
    def task_files(self) -> Mapping[str, bytes]:
        """The files that an artifact stores for tasks, by name: the tokenizer, the pooling, and the settings of a head;
        an empty mapping if the model has no task, or none of these files.
        """
        return self._stored_files(self.graph)

    @property
    def log(self) -> PassLog:
        """The log of all passes: their changes, the rewrites that they refused, and the reasons."""
        return self.optimized.stages

    @property
    def inputs(self) -> tuple[Port, ...]:
        """The inputs of a call: name, dtype, axes."""
        return self.executable.inputs

    @property
    def outputs(self) -> tuple[Port, ...]:
        """The outputs of a call: name, dtype, axes."""
        return self.executable.outputs

    @property
    def source(self) -> str:
        """The generated code, as readable text."""
        return self.executable.source

    @property
    def memory_fit(self) -> MemoryFit | None:
        """The result of fitting a run into the budget of `compile(memory=...)`: the regions that are computed in parts,
        and the slowdown. None if there is no budget.
        """
        return next((fit for record in self.optimized.stages if (fit := record.product(MemoryFit)) is not None), None)

    def memory(self, **sizes: int) -> MemoryReport:
        """Return a report on the memory of a call at these sizes of symbolic axes, as `treadle explain MODEL memory`
        prints it. Raises UsageError for a backend that does not plan storage, and for sizes outside their bounds.
        """
        from treadle.explaining.memory import memory_of_lowered

        return memory_of_lowered(self.name, self.backend, self.optimized.lowered, self.target, sizes)

    @property
    def static(self) -> tuple[str, ...]:
        """Names of the inputs whose values determine shapes, so that the model is compiled for each value. Usually
        empty.
        """
        return ()

    def at(self, /, **static: Any) -> Compiled:
        """Return the model compiled for these values of the inputs in `static`. Without such inputs, return the model
        itself. Raises UsageError for any other name.
        """
        if static:
            names = ", ".join(map(printable, static))
            raise UsageError(f"{self.name} has no input {names} that determines a shape", received=repr(self))
        return self

    def __call__(self, /, *ordered: Any, **arrays: Any) -> Outputs:
        """Run the model on arrays by name, or in the order of `inputs`. Return the outputs by name.

        An array of another dtype of the same kind is converted if no value can change (int32 for i64, float16 for f32).
        In addition, a float64 array is rounded to f32, since float64 is NumPy's default. Raises BackendError if arrays
        do not match `inputs`, or if a row's length, as `t.padding` takes it, is not within the row.
        """
        named = self._named(ordered, arrays)
        for lengths, (name, axis) in self._lengths.items():
            given: Any = named.get(lengths)
            rows: Any = named.get(name)
            if _is_on_host(given) and _is_on_host(rows):
                with suppress(ValueError, IndexError):  # another rank, or lists of different lengths: refused below
                    _check_lengths(lengths, np.asarray(given), np.shape(rows)[axis], name)
        return self.executable(**named)

    @cached_property
    def _lengths(self) -> dict[str, tuple[str, int]]:
        """The inputs that are lengths of rows, by name: an input with the axis whose positions they count, and its
        number.
        """
        axes = {size: (port.name, axis) for port in self.inputs for axis, size in enumerate(port.type.shape)}
        return {name: axes[size] for name, size in row_lengths(self.graph).items() if size in axes}

    @with_checked_call({"run_options": "leave it out"})
    def run(self, output_names: OutputNames, input_feed: Any = None) -> list[Array]:
        """Run as ONNX Runtime's `InferenceSession.run` does: return the outputs of these names as a list; None: all.

        input_feed  the inputs by name

        Raises BackendError as a call does, and for a name that is not an output's.
        """
        wrong = [
            value
            for value, kinds in ((output_names, str | Sequence | None), (input_feed, Mapping))
            if not isinstance(value, kinds)
        ]
        if wrong:
            raise BackendError(
                "run takes the names of outputs, then the inputs as a mapping by name",
                received=type(wrong[0]).__name__,
                hint=f"exe.run(None, {{{', '.join(f'{port.name!r}: ...' for port in self.inputs)}}})",
            )
        outputs = self(**{str(name): array for name, array in input_feed.items()})
        chosen = list(outputs) if output_names is None else output_names
        chosen = [chosen] if isinstance(chosen, str) else chosen
        if unknown := [printable(str(name)) for name in chosen if name not in outputs]:
            what = f"{self.name} has no output {', '.join(unknown)}"
            raise BackendError(what, hint=f"None for all, or some of {', '.join(outputs)}")
        return [outputs[name] for name in chosen]

    def _named(self, ordered: Sequence[Any], arrays: Mapping[str, Any]) -> dict[str, Any]:
        """Return the inputs of a call by name. Raises BackendError if there are too many, or one is passed twice."""
        names = [port.name for port in self.inputs]
        wrong = ""
        if len(ordered) == 1 and isinstance(ordered[0], Mapping):
            raise BackendError("an input is an array, not a mapping", within=repr(self), hint="exe(**inputs)")
        if len(ordered) > len(names):
            wrong = f"{self.name} takes {len(names)} input{'s' * (len(names) != 1)}"
        elif twice := [name for name in names[: len(ordered)] if name in arrays]:
            wrong = f"input {', '.join(twice)} is passed twice"
        if wrong:
            received = ", ".join([f"{len(ordered)} by position", *(f"{printable(name)}=..." for name in arrays)])
            hint = f"exe({spelled_keywords(names)})"
            raise BackendError(wrong, received=received, within=repr(self), hint=hint)
        return {**dict(zip(names, ordered, strict=False)), **arrays}

    @cached_property
    def stepped(self) -> SteppedModel:
        """The decoding step, derived from the graph and compiled for the same backend at the first access.

        Raises PassError, with the reason, if no step can be derived from the model.
        """
        return self._stepped_with(None)

    def _stepped_with(self, cache: str | None, device_sampling: str | None = None) -> SteppedModel:
        key = cache, device_sampling
        if key not in self._steps:
            self._steps[key] = step_of(
                self.name,
                self.graph,
                self.backend,
                self.target,
                stored_weights(self.weights),
                cache,
                device_sampling=device_sampling,
                torch_compile=bool(self.options.get("torch_compile")),
            )
        return self._steps[key]

    @cached_property
    def _steps(self) -> dict[tuple[str | None, str | None], SteppedModel]:
        """The compiled decoding steps, by the dtype of their caches and the way of sampling."""
        return {}

    @with_checked_call(SESSION_HINTS)
    def session(
        self,
        *,
        rows: int = 8,
        capacity: int | None = None,
        chunk: int = CHUNK,
        full: Full = "error",
        memory: Mapping[str, int] | None = None,
        resumes: bool | None = None,
        cache: str | None = None,
        device_sampling: str | None = None,
    ) -> Session:
        """Open a session: rows of tokens that grow token by token, with caches for `rows` rows of `capacity` positions.

        cache   dtype of stored keys and values, "f32", "bf16" or "f16"; by default the model's own
        device_sampling  "greedy" or "random": the session chooses tokens on the device, and returns no logits; see
                         `treadle.runtime.session.Session.sample`

        See `treadle.stepped.SteppedModel.session`. Sessions share weights and code, but not caches.
        """
        return self._stepped_with(cache, device_sampling).session(
            rows=rows, capacity=capacity, chunk=chunk, full=full, memory=memory, resumes=resumes
        )

    def report(
        self,
        *,
        sizes: Mapping[str, int] | None = None,
        sharding: ShardingReport | None = None,
        cache: str | None = None,
        profile: int = 0,
        seed: int = 0,
        command: str | None = None,
        originals: Mapping[str, Any] | None = None,
    ) -> Report:
        """Return a report on the model. Notebooks display the report, and its method `save` writes one HTML file.

        The options are those of `treadle.report.building.report_of`. Raises UsageError as `report_of` does.
        """
        from treadle.report.building import report_of
        from treadle.report.subjects import Subject

        parts = self.name, self.optimized, self.backend, self.target, self.executable
        return report_of(
            Subject(*parts, self.unused, self.unread, has_weights=True),
            sizes=sizes,
            sharding=sharding,
            cache=cache,
            profile=profile,
            seed=seed,
            command=command,
            originals=originals,
        )

    def save(self, path: PathLike) -> str:
        """Write the model to one `.treadle` file, which `treadle.load_artifact` reads. Return the file's seal, 64
        hexadecimal digits that identify the content.

        Equal models, options and weights give equal bytes: the file holds no times and no local paths. An existing file
        is replaced atomically. Raises UsageError if the name does not end in .treadle, if the file cannot be written,
        or if the model has a memory budget: a budget applies to one backend, and a file stores none.
        """
        refuse_other_format(path, "an artifact", ARTIFACT_SUFFIX)
        if self.memory_fit is not None:
            raise UsageError(
                "a file cannot hold a memory budget",
                received=f"{self.name} within {self.memory_fit.budget:,} bytes",
                hint=Hint("compile without memory=, save that, and pass memory= to load", "leave out --memory"),
            )
        what = self.name, self.backend, str(self.target), self.optimized, self.weights, self.seed
        return write_artifact(path, *what, options=self.options, files=self.task_files)

    def __repr__(self) -> str:
        takes = ", ".join(str(p) for p in self.inputs)
        gives = ", ".join(str(p) for p in self.outputs)
        return f"<compiled {self.name} on {self.backend}: ({takes}) -> ({gives})>"

    def _repr_html_(self) -> str:
        """Return HTML for notebooks: the inputs and outputs, and, collapsed, the graph, the pass log, and the code."""
        log = self.log.table() + "\n\n" + self.log.explain()
        ops, passes = sum(len(f.nodes) for f in self.graph.functions.values()), len(self.log)
        return "".join(
            [
                html_title(repr(self)[1:-1]),
                self._html_ports(),
                html_code(f"graph, {ops} op{'s' * (ops != 1)}", str(self.graph)),
                html_code(f"log, {passes} pass{'es' * (passes != 1)}", log.strip()),
                html_code("source", self.source),
            ]
        )

    def _html_ports(self) -> str:
        rows = [("input", p) for p in self.inputs] + [("output", p) for p in self.outputs]
        return html_table(
            ("", "name", "dtype", "axes"), [(kind, p.name, str(p.dtype), ", ".join(p.axes)) for kind, p in rows]
        )

    # A compiled model is immutable, so a copy is the model itself. Its code and mapped files cannot be copied.

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Raise UsageError: a compiled model holds code and mapped files, which cannot be pickled."""
        raise UsageError(
            "a compiled model cannot be pickled",
            received=repr(self),
            source=str(user_line() or "") or None,
            hint=f'{self._to_save("model.treadle")}, and treadle.load_artifact("model.treadle") in the other process',
        )

    def _to_save(self, path: str) -> str:
        return f'exe.save("{path}")'


def _is_on_host(x: Any) -> bool:
    """Return True for lists, and for arrays and tensors in the memory of the CPU."""
    return isinstance(x, np.ndarray | list | tuple) or str(getattr(x, "device", "")) == "cpu"


def _check_lengths(name: str, lengths: Array, size: int, of: str) -> None:
    """Raise BackendError for a length of a row that is negative, or greater than the size of the axis."""
    wrong = lengths[(lengths < 0) | (lengths > size)] if lengths.dtype.kind in "iu" else lengths[:0]
    if wrong.size:
        raise BackendError(
            f"input {name} has a length of {wrong.flat[0]}, but rows of {of} have {size} positions",
            received=f"{name}: {lengths.tolist()}"[:80],
            hint=f"lengths from 0 to {size}",
        )

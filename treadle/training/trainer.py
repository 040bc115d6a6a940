"""Train a model: change its weights step by step to lower its loss.

    trainer = t.Trainer("gpt2", learning_rate=3e-4, layers=4, dim=128, vocab=256)
    for tokens in batches:                                          # i64 [B, S]
        result = trainer.step(tokens=tokens, targets=next_token_targets(tokens))
    exe = trainer.compiled(backend="tvm")                           # with the current weights

Training runs two compiled graphs, which can be inspected. `trainer.gradient` computes the loss and its gradients with
respect to the trained weights. `trainer.update` is the optimizer, which updates the weights in place.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from treadle.backends.protocol import Port
from treadle.backends.signature import Signature, numpy_taken
from treadle.compiled import Compiled
from treadle.compiling import compile_model
from treadle.explaining.memory import MemoryReport, explain_memory
from treadle.files.contained_files import PathLike
from treadle.ir.errors import BackendError, Hint, UsageError
from treadle.ir.graph import Graph
from treadle.ir.ops.losses import IGNORED
from treadle.ir.transforms.chosen_outputs import choose_outputs
from treadle.ir.transforms.gradients import GRADIENT
from treadle.ir.transforms.padding_rows import with_padding_rows
from treadle.ir.transforms.training_losses import (
    BUILT_IN,
    COUNTED,
    CROSS_ENTROPY,
    LOSS,
    OWN_LOSS,
    SQUARED_ERROR,
    TARGETS,
    TEACHER,
    with_cross_entropy,
    with_distillation,
    with_own_loss,
    with_squared_error,
)
from treadle.ir.types import f32
from treadle.ir.wording.call_spelling import spelled_keywords
from treadle.ir.wording.checked_calls import with_checked_constructor, with_checked_methods
from treadle.ir.wording.other_interfaces import TRAINER_ATTRIBUTES
from treadle.ir.wording.unknown_attributes import with_attribute_hints
from treadle.passes.stages import Gradient, MergeOps, Precision, Recognize, passes_of, run
from treadle.program.entry_signatures import with_options
from treadle.program.options import CompileOptions
from treadle.program.source import BLOCKS, AnyModel, Resolved
from treadle.program.weights import weights_of
from treadle.reporting.counts import counted
from treadle.runtime.training.optimizers import AdamW, Optimizer, update_graph
from treadle.runtime.training.schedules import Schedule, schedule_of
from treadle.training.interrupts import deferring_signals
from treadle.training.states import DivergedError, TrainingState, read_state, write_state

if TYPE_CHECKING:
    from treadle.training.saving import SavedModel

Array = np.ndarray[Any, Any]

WIDENED = ("bf16", "f16", BLOCKS)
"""Trained weights of these dtypes are converted to float32: an update is too small for a lower precision."""

_OWN_OPS = "the model's own ops: log or sqrt at 0, a division by 0, exp of a large number"
_SMALLER_RATE = Hint(
    "a smaller learning_rate=, a longer warmup of it, or max_grad_norm=; the weights are those of the last update",
    "a smaller --learning-rate, a longer --warmup, or --max-grad-norm",
)


@dataclass(frozen=True)
class StepResult:
    """The result of a call of `step`.

    step      number of updates so far
    updated   True if this call updated the weights: every call, or every `gradient_accumulation_steps`-th
    loss      the mean loss over the counted positions of this call
    norm      the gradient norm over all weights, before clipping; NaN if this call did not update
    learning_rate  the learning rate of the update
    seconds   the duration of the call
    """

    step: int
    updated: bool
    loss: float
    norm: float
    learning_rate: float
    seconds: float


@with_checked_constructor()
@with_attribute_hints("a trainer", TRAINER_ATTRIBUTES, creation="t.Trainer(model, {})")
@with_checked_methods({"overwrite": "replace=True", "set_to_none": "leave it out"})
class Trainer:
    """A model in training: call `step` with a batch, then `compiled` for the trained model, or `save` for a folder.

    gradient   the compiled gradient graph: inputs, targets, trained weights -> loss, number of targets, gradients
    update     the compiled optimizer: weights, gradients, moments -> new weights, new moments, gradient norm
    trained    the names of the trained weights
    resolved   the traced model, with its checkpoint
    """

    def __init__(
        self,
        model: AnyModel,
        *,
        loss: str = "cross-entropy",
        optimizer: Optimizer = AdamW(),  # noqa: B008  # it is frozen
        learning_rate: float | Schedule = 1e-3,
        max_grad_norm: float | None = 1.0,
        trained: Iterable[str] | None = None,
        output: str | None = None,
        teacher: Compiled | None = None,
        temperature: float | None = None,
        distillation_weight: float | None = None,
        gradient_checkpointing: bool = False,
        gradient_accumulation_steps: int = 1,
        **options: Any,
    ) -> None:
        """Compile the graphs of a training step.

        model       as in `compile`. Training begins with the weights of a checkpoint, converted to float32. A model
                    without a checkpoint gets random weights, drawn from `seed`.
        loss        "cross-entropy" over the last axis of an output, with class indices as `targets`, of which -100
                    is not counted; with a teacher, combined with the divergence from the teacher's output. "mse": the
                    mean squared error between an output and `targets` of its shape. Or the name of a scalar output of
                    the model, which is then minimized.
        optimizer   `AdamW(...)` or `SGD(...)`; weight decay applies to weights with two axes or more
        learning_rate  a constant learning rate, or a `Schedule`
        max_grad_norm  clip the gradient norm to this value; None disables clipping
        trained     patterns of names, such as "h.*.mlp.*"; other weights are frozen. None: all weights except buffers;
                    for a module that `from_torch` imported, its parameters that require a gradient
        output      the output that `targets` are compared with; None: "logits", or the only output
        teacher     a compiled model that has an output of the same name. The teacher gets the inputs that both models
                    have.
        temperature, distillation_weight  temperature and weight of the teacher's loss, by default 2 and 0.5; see
                    `treadle.ir.transforms.training_losses`
        gradient_checkpointing  recompute the activations of repeated blocks instead of saving them
        gradient_accumulation_steps  number of calls of `step` whose gradients are accumulated for one update
        tokenizer   another model, whose tokenizer is saved with a checkpoint of the trained weights
        new_weights  patterns of names of weights that are drawn from `seed`, such as a new head: ("logits.*",). The
                    others are read from `weights`, which may be those of another declaration
        options     as in `compile`; with dtype="bf16", matrix products have bf16 operands

        Raises UsageError for an invalid option, and the errors of `compile`.
        """
        _check_options(optimizer, teacher, loss, output, gradient_accumulation_steps)
        asked = CompileOptions.of("train", options)
        where = asked.where
        if where.kind != "cpu":
            raise UsageError(
                f"training runs on the CPU, not on {where.kind}", hint=Hint('target="cpu"', "--target cpu")
            )
        self.resolved: Resolved = asked.but(widen=WIDENED, dtype=None).resolve(model)
        self.optimizer, self.clip, self.accumulate = optimizer, max_grad_norm, gradient_accumulation_steps
        self.schedule = schedule_of(learning_rate)
        self.teacher = teacher
        is_own = loss in self.resolved.graph.main.outputs or loss not in (CROSS_ENTROPY, SQUARED_ERROR)
        self._output = loss if is_own else self._scored_output(output)
        graph = self._with_loss(loss, is_own, temperature, distillation_weight)
        self._signature = Signature(graph)
        scores = self.resolved.graph.main.outputs[self._output].type
        self._classes = scores.shape[-1].constant if loss == CROSS_ENTROPY and not is_own else None
        made = self._with_gradients(graph, trained, gradient_checkpointing)
        held, self.seed = weights_of(self.resolved, self.resolved.graph, asked.arrays, asked.seed)
        frozen = {name: held[name] for name in made.parameters}
        precision = [] if asked.dtype is None else [Precision(asked.dtype, computed=True)]
        passes = passes_of([Recognize(), MergeOps(), *precision])
        compiling = CompileOptions(backend=asked.backend, target=where, passes=passes)
        self.gradient = compile_model(made, compiling.but(weights=frozen))
        self.backend = self.gradient.backend
        self._options = compiling.but(backend=self.backend)
        self._loss_alone = choose_outputs(made, [LOSS, COUNTED])
        self._evaluation: Compiled | None = None
        self._frozen = {n: held[n] for n in held if n not in self.trained}
        self._state, self._torn = self._initial_state(held), False
        self.update = self._compiled_update(self._state)

    __init__.__signature__ = with_options(__init__, "train")  # type: ignore[attr-defined]

    def _with_gradients(self, graph: Graph, trained: Iterable[str] | None, gradient_checkpointing: bool) -> Graph:
        """Return the graph of the loss and its gradients, and decide which weights are trained: the chosen weights that
        have a gradient.
        """
        known = self.resolved.learned if trained is None else None
        chosen = self._chosen(("*",) if trained is None else trained, known)
        recognized = run(graph, [Recognize(differentiated=True)])
        self.trained = tuple([name for name in chosen if name in recognized.graph.parameters])
        made = run(recognized, [Gradient(LOSS, self.trained, gradient_checkpointing)]).graph
        reached = tuple([name for name in self.trained if GRADIENT + name in made.main.outputs])
        if not reached:
            raise UsageError("the loss depends on no trained weight", received=", ".join(self.trained)[:200])
        if reached != self.trained:  # the others, which only floor or comparisons read, have no gradient
            self.trained, made = reached, run(recognized, [Gradient(LOSS, reached, gradient_checkpointing)]).graph
        return choose_outputs(made, [LOSS, COUNTED, *[GRADIENT + name for name in reached]])

    def _initial_state(self, weights: Mapping[str, Array]) -> TrainingState:
        """Return copies of the trained weights, and moments of zeros."""
        copies = {name: np.array(weights[name], np.float32, order="C") for name in self.trained}
        moments = {
            f"{moment}.{name}": np.zeros_like(copies[name])
            for name in self.trained
            for moment in self.optimizer.moments
        }
        return TrainingState(copies, moments)

    def _compiled_update(self, state: TrainingState) -> Compiled:
        """Compile the update of the weights and moments, which overwrites them."""
        types = {name: self.resolved.graph.parameters[name].type for name in self.trained}
        decayed = [name for name, type in types.items() if type.rank > 1]
        updating = update_graph(self.optimizer, types, clip=self.clip, decayed=decayed)
        return compile_model(updating, self._options.but(passes=None, donate=[*state.weights, *state.moments]))

    # -- the loss ----------------------------------------------------------------------------------------------

    def _scored_output(self, output: str | None) -> str:
        outputs = list(self.resolved.graph.main.outputs)
        if output is not None:
            return output
        if "logits" in outputs or len(outputs) == 1:
            return "logits" if "logits" in outputs else outputs[0]
        raise UsageError(
            "the model has several outputs: the output to train is not set",
            received=", ".join(outputs),
            hint=f"output={outputs[0]!r}, or the name of its loss in loss=",
        )

    def _with_loss(self, loss: str, is_own: bool, temperature: float | None, share: float | None) -> Graph:
        graph, output = with_padding_rows(self.resolved.graph, self.resolved.padding), self._output
        if self.teacher is None and (temperature, share) != (None, None):
            name = "temperature" if temperature is not None else "distillation_weight"
            raise UsageError(f"{name}= only applies together with teacher=", hint="teacher=t.compile(MODEL)")
        if loss == CROSS_ENTROPY and not is_own and self.teacher is not None:
            made = with_distillation(
                graph, output, 2.0 if temperature is None else temperature, 0.5 if share is None else share
            )
            types = {port.name: port.type for port in self.teacher.outputs}
            if output not in types:
                raise UsageError(f"the teacher has no output {output}", received=", ".join(types))
            ours, its = graph.main.outputs[output].type, types[output]
            if its.rank != ours.rank or its.shape[-1].constant != ours.shape[-1].constant:
                raise UsageError(
                    "the teacher's classes differ from the model's",
                    received=f"{output}: {its} of the teacher, {ours} of the model",
                    hint="a teacher with the same vocabulary or labels",
                )
            return made
        if self.teacher is not None:
            raise UsageError("a teacher cannot be combined with another loss", received=f"loss={loss!r}")
        if is_own:
            return with_own_loss(graph, loss)
        return with_cross_entropy(graph, output) if loss == CROSS_ENTROPY else with_squared_error(graph, output)

    def _chosen(self, patterns: Iterable[str], learned: Collection[str] | None) -> tuple[str, ...]:
        """Return the names of the f32 weights that match one of the patterns, in the graph's order.

        learned  names of weights to choose from; None: all weights
        """
        given = [patterns] if isinstance(patterns, str) else list(patterns)
        names = [name for name, v in self.resolved.graph.parameters.items() if v.type.dtype is f32]
        names = [name for name in names if learned is None or name in learned]
        if not names:
            raise UsageError("the model has no float32 weight to train", received=repr(self.resolved.graph))
        for pattern in given:
            if not any(fnmatchcase(name, pattern) for name in names):
                hint = f"a pattern of names such as {', '.join(names[:6])}"
                if inside := [name for name in names if fnmatchcase(name, f"*{pattern}*")]:
                    hint = f"'*{pattern}*', which matches {counted(len(inside), 'weight')}, such as {inside[0]}"
                raise UsageError(f"no weight matches {pattern!r}", hint=hint)
        return tuple([name for name in names if any(fnmatchcase(name, pattern) for pattern in given)])

    # -- steps -------------------------------------------------------------------------------------------------

    @property
    def inputs(self) -> tuple[Port, ...]:
        """Inputs of `step` and `evaluate`: the model's inputs, and targets."""
        beside = {*self.trained} | ({TEACHER} if self.teacher is not None else set())
        return tuple([port for port in self.gradient.inputs if port.name not in beside])

    @property
    def steps(self) -> int:
        """The number of updates so far."""
        return self._state.steps

    @property
    def state(self) -> TrainingState:
        """The current weights, moments and gradients. The next update overwrites weights and moments in place.

        If an update failed midway, raises UsageError until `restore` is called.
        """
        if self._torn:
            raise UsageError(
                f"update {self.steps + 1} failed midway: some weights are new, others are old",
                hint="restore(FILE), of a file that save_state wrote",
            )
        return self._state

    def step(self, /, *ordered: Any, **arrays: Any) -> StepResult:
        """Compute the gradients of one batch. In the last of `gradient_accumulation_steps` calls, update the weights.

        A step is a transaction. If it raises or is interrupted, weights, moments and accumulated gradients are either
        as before the step or as after it. The update writes in place, so signals are deferred until it is done. If the
        update itself fails, `step`, `evaluate` and `save_state` raise UsageError until `restore` is called.

        Raises UsageError if no position of the batch is counted, or if the loss or a gradient is NaN or infinite;
        BackendError for arrays that do not match `inputs`.
        """
        began = time.perf_counter()
        state, batch = self.state, self._checked("step", ordered, arrays)
        found = self.gradient(**state.weights, **batch)
        counted = self._count(found, batch)
        loss, rate, norm = float(found[LOSS]) / counted, self.schedule(state.steps + 1), math.nan
        gradients = self._summed(state.gradients, found, batch)
        state = replace(state, gradients=gradients, counted=state.counted + counted, calls=state.calls + 1)
        updated = state.calls >= self.accumulate
        if updated:
            norm = self._update_by(state, rate)
        else:
            self._state = state
        return StepResult(self.steps, updated, loss, norm, rate, time.perf_counter() - began)

    def zero_grad(self) -> None:
        """Drop the gradients accumulated since the last update."""
        self._state = replace(self.state, gradients={}, counted=0.0, calls=0)

    def evaluate(self, /, *ordered: Any, **arrays: Any) -> float:
        """Return the mean loss over the counted positions of a batch. The weights are unchanged. Raises as `step`
        does.
        """
        if self._evaluation is None:
            self._evaluation = compile_model(
                self._loss_alone, self._options.but(weights=self._needed_by(self._loss_alone))
            )
        taken = {port.name for port in self._evaluation.inputs}
        weights = {name: array for name, array in self.state.weights.items() if name in taken}
        batch = self._checked("evaluate", ordered, arrays)
        found = self._evaluation(**weights, **batch)
        return float(found[LOSS]) / self._count(found, batch)

    def _needed_by(self, graph: Graph) -> dict[str, Array]:
        return {name: self._frozen[name] for name in graph.parameters}

    def _checked(self, method: str, ordered: Sequence[Any], arrays: Mapping[str, Any]) -> dict[str, Any]:
        """Return the batch, with the teacher's logits for it. Raises BackendError for arrays that do not match
        `inputs`, UsageError for targets that are not class indices, and for arrays without a name.
        """
        if ordered:
            call = spelled_keywords([port.name for port in self.inputs])
            what, received = f"{method} takes arrays by name", f"{len(ordered)} without a name"
            raise UsageError(what, received=received, hint=f"trainer.{method}({call})")
        given = dict(arrays)
        if self.teacher is not None:
            self._signature.check_names(arrays, later=[TEACHER])
            taken = {port.name: arrays[port.name] for port in self.teacher.inputs if port.name in arrays}
            try:
                given[TEACHER] = self.teacher(**taken)[self._output]
            except BackendError as error:
                error.what = f"the teacher does not accept this batch: {error.what}"
                raise
        if self._classes is not None and TARGETS in given:
            rank = next((port.type.rank for port in self._signature.ports if port.name == TARGETS), 0)
            _refuse_numbers(given[TARGETS], rank, self._classes)
        names = [port.name for port in self._signature.ports]
        held: dict[str, Any] = dict(zip(names, self._signature.bind(given, numpy_taken), strict=True))
        targets = held.get(TARGETS)
        if targets is not None and self._classes is not None:
            wrong = targets[((targets < 0) | (targets >= self._classes)) & (targets != IGNORED)]
            if wrong.size:
                fitting = f"{IGNORED} in place of {wrong[0]}, if these positions do not count"
                if wrong[0] >= 0:
                    fitting = f"an output of {wrong.max() + 1:,} classes or more"
                raise UsageError(
                    f"targets must be classes from 0 to {self._classes - 1}, or {IGNORED}, which is not counted",
                    received=f"{wrong[0]}",
                    hint=f'{fitting}; loss="{SQUARED_ERROR}", if targets are numbers to predict',
                )
        return held

    def _count(self, found: Mapping[str, Any], batch: Mapping[str, Array]) -> float:
        counted = float(found[COUNTED])
        if not counted:
            raise UsageError("no position of the batch is counted", hint="targets that are not all -100")
        if not math.isfinite(float(found[LOSS])):
            raise self._not_finite(f"the loss is {float(found[LOSS])}", batch)
        return counted

    def _summed(
        self, earlier: Mapping[str, Array], found: Mapping[str, Any], batch: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Return the sum of a call's gradients and the earlier gradients. The sums overwrite the call's arrays; the
        earlier arrays are unchanged.
        """
        gradients: dict[str, Array] = {name: array for name, array in found.items() if name.startswith(GRADIENT)}
        for name, array in gradients.items():
            if name in earlier:
                np.add(earlier[name], array, out=array)
            if not math.isfinite(np.vdot(array, array)):
                raise self._not_finite(f"{name} is NaN, infinite or too large", batch)
        return gradients

    def _update_by(self, state: TrainingState, rate: float) -> float:
        """Update weights and moments in place with the gradients of a state, and replace the state. Return the gradient
        norm.
        """
        scalars = {"rate": rate, "share": 1 / state.counted, **self.optimizer.scalars(state.steps + 1)}
        given = {name: np.float32(value) for name, value in scalars.items()}
        with deferring_signals():
            self._torn = True
            found = self.update(**state.weights, **state.moments, **state.gradients, **given)
            weights, moments = ({name: found[name] for name in group} for group in (state.weights, state.moments))
            self._state = TrainingState(weights, moments, state.steps + 1)
            self._torn = False
        return float(found["norm"])

    def _not_finite(self, what: str, batch: Mapping[str, Array]) -> DivergedError:
        """Return the error for a loss or gradient that is NaN or infinite. It names the first input or weight with a
        NaN or infinite value, if any.
        """
        weights = {**self._frozen, **({} if self.steps else self._state.weights)}
        named = {f"input {name}": array for name, array in batch.items()}
        place = _first_not_finite(named | {f"weight {name}": array for name, array in weights.items()})
        hint: str = _SMALLER_RATE if self.steps else _OWN_OPS
        if place is not None:
            hint = "finite inputs and weights"
            if self.steps and "inf at" in place:  # an infinite weight or input may be intended
                hint = Hint(*[f"{hint}; if it is a mask, {rate}" for rate in (_SMALLER_RATE, _SMALLER_RATE.command)])
        received = place or "inputs and weights are finite"
        return DivergedError(f"{what} after {self.steps} updates", received=received, hint=hint)

    def memory(self, **sizes: int) -> MemoryReport:
        """Return a report on the memory of a step at these sizes, in addition to weights, moments and gradients.

        The report has the form of `treadle explain MODEL memory`, for the gradient graph.
        """
        graph = self.gradient.optimized.source
        return explain_memory(graph, **self._options.but(sizes=sizes).keywords())

    # -- results -----------------------------------------------------------------------------------------------

    @property
    def weights(self) -> dict[str, Array]:
        """All current weights of the model by name. The next step overwrites the trained weights in place."""
        held = {**self._frozen, **self.state.weights}
        return {name: held[name] for name in self.resolved.graph.parameters}

    def compiled(self, **options: Any) -> Compiled:
        """Compile the model with the current weights. `options` are passed to `compile`."""
        weights = {name: np.array(array) for name, array in self.weights.items()}
        return compile_model(self.resolved.graph, CompileOptions.of("compile", {**options, "weights": weights}))

    def save(self, folder: PathLike, *, replace: bool = False) -> SavedModel:
        """Write the model with its trained weights to a folder (`treadle.training.saving`), and return the files and
        the code that loads them.

        A model that was read from a folder is written in that folder's layout, with its tokenizer and configuration.
        For a declaration, the folder has the weights, a reference to the declaration, and the tokenizer of
        `tokenizer=`: `treadle.load(MODEL, weights=folder)` loads it.

        replace  True if the folder may contain files; files of the same names are overwritten

        Raises UsageError if the model's format cannot be written (a GGUF or an ONNX file), or if the folder cannot be
        written, is not empty or is the model's own.
        """
        from treadle.training.saving import saver_for

        return saver_for(self.resolved, folder, replace=replace).save(self.weights)

    def save_state(self, path: PathLike, notes: Mapping[str, str] | None = None) -> None:
        """Write trained weights, moments and the number of updates to one file atomically, to resume by `restore`.

        notes  strings by name that `treadle.training.states.read_notes` returns, such as the seed of the batches

        Raises UsageError if the file cannot be written, if its name has the extension of a pickle, or if gradients are
        accumulated that no update has used yet.
        """
        state = self.state
        if state.calls:
            raise UsageError(
                "a state can only be saved after an update",
                received=f"{state.calls} of {self.accumulate} micro-batches accumulated",
                hint="call step for the remaining micro-batches, or discard the gradients with zero_grad()",
            )
        write_state(path, state, repr(self.optimizer), notes or {})

    def restore(self, path: PathLike) -> None:
        """Resume from a file that `save_state` wrote. Raises CheckpointError if the model or the optimizer differs."""
        self._state, self._torn = read_state(path, self._state, repr(self.optimizer)), False

    def __repr__(self) -> str:
        count = sum(array.size for array in self._state.weights.values())
        return (
            f"<trainer of {self.resolved.name}: {count:,} numbers of {len(self.trained)} weights in {self.backend}, "
            f"{self.steps} updates>"
        )


def _refuse_numbers(targets: Any, rank: int, classes: int) -> None:
    """Raise UsageError for targets that are not class indices [...] of a rank: a number for each class, or floats that
    are not all integers.
    """
    try:
        array = np.asarray(targets)
    except (TypeError, ValueError, RuntimeError):  # reported with the other inputs
        return
    for_each_class = array.ndim == rank + 1 and array.shape[-1] == classes
    if not for_each_class and (array.dtype.kind != "f" or (array == np.round(array)).all()):
        return
    is_share = for_each_class and classes > 1 and (array >= 0).all() and np.allclose(array.sum(-1), 1, atol=1e-3)
    regression = f'loss="{SQUARED_ERROR}", to predict numbers; for another loss, {OWN_LOSS}'
    raise UsageError(
        f"targets are class indices, from 0 to {classes - 1}" + ", not a number for each class" * for_each_class,
        received=f"targets of {array.dtype}[{', '.join(map(str, array.shape))}]",
        hint="targets.argmax(-1), for a one-hot array" if is_share else regression,
    )


def _first_not_finite(arrays: Mapping[str, Array]) -> str | None:
    """Return a description of the first NaN in some arrays, or else of the first infinity: "input x has nan at [2, 1]".
    Return None if all values are finite.
    """
    for is_wrong in (np.isnan, np.isinf):
        for name, array in arrays.items():
            wrong: Any = np.argwhere(is_wrong(array)) if array.dtype.kind == "f" else ()
            if len(wrong):
                at = tuple(wrong[0].tolist())
                return f"{name} has {array[at]} at {list(at)}"
    return None


def _check_options(
    optimizer: Optimizer, teacher: Compiled | None, loss: str, output: str | None, gradient_accumulation_steps: int
) -> None:
    """Raise UsageError for an option of a wrong type or value, and for a combination that has no meaning."""
    _expect(optimizer, teacher)
    if not isinstance(loss, str):
        raise UsageError(
            'loss= is "cross-entropy" or "mse", or the name of an output that is the loss',
            received=f"loss={loss!r}"[:80],
            hint=f"{BUILT_IN}; or {OWN_LOSS}",
        )
    if output is not None and loss not in (CROSS_ENTROPY, SQUARED_ERROR):
        raise UsageError("`output=` cannot be combined with a custom loss", received=f"{output=}")
    if type(gradient_accumulation_steps) is not int or gradient_accumulation_steps < 1:
        raise UsageError(
            "gradient_accumulation_steps must be 1 or more",
            received=f"gradient_accumulation_steps={gradient_accumulation_steps!r}",
        )


def _expect(optimizer: object, teacher: object) -> None:
    """Raise UsageError if `optimizer` is not an optimizer, or if `teacher` is not a compiled model."""
    if isinstance(optimizer, type) or not hasattr(optimizer, "scalars"):
        raise UsageError("optimizer= must be an optimizer", received=repr(optimizer)[:80], hint="t.AdamW(), or t.SGD()")
    if teacher is not None and not isinstance(teacher, Compiled):
        hint = "t.compile(MODEL)"
        if isinstance(teacher, str | Path):
            hint = f"t.compile({teacher!r})"
            if Path(teacher).is_dir():
                hint += f"; for weights of a declaration, t.compile(MODEL, weights={str(teacher)!r})"
        raise UsageError("a teacher must be a compiled model", received=repr(teacher)[:80], hint=hint)

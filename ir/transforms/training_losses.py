"""Training losses as outputs of a graph: `loss`, a sum over the positions that count, and `counted`, their number.

    with_cross_entropy(graph, "logits")                     targets: i64[B, S]
    with_squared_error(graph, "y")                          targets: f32[B, 3], as y
    with_distillation(graph, "logits", temperature, share)  targets: i64[B, S], teacher: f32[B, S, V]
    with_own_loss(graph, "loss")                            an output of the model, which counts as one position

The loss is a sum, so that a batch may be split into micro-batches: their losses and gradients are added, and divided by
the total of `counted`.
"""

from __future__ import annotations

from treadle.files.nearest_names import NearestNames
from treadle.ir.builder import Builder, Expr
from treadle.ir.errors import UsageError
from treadle.ir.graph import Graph
from treadle.ir.ops.losses import IGNORED
from treadle.ir.transforms.clone import clone_graph
from treadle.ir.types import Type, f32, i64

LOSS, COUNTED, TARGETS, TEACHER = "loss", "counted", "targets", "teacher"

CROSS_ENTROPY, SQUARED_ERROR = "cross-entropy", "mse"
"""The losses that compare an output with targets."""

OWN_LOSS = 'return {"loss": ...} from the model, computed from its inputs, and pass loss="loss"'
"""The hint for a loss of another kind."""

BUILT_IN = f'loss="{CROSS_ENTROPY}" for classes, loss="{SQUARED_ERROR}" for numbers'


def with_cross_entropy(graph: Graph, output: str) -> Graph:
    """Add the cross-entropy of an output's last axis with `targets`, a new input with one class per position.

    A target of -100 does not count. Raises UsageError for an output without classes.
    """
    b, scores, targets = _scored(graph, output)
    return _given(b, _total(b, b.cross_entropy(scores, targets)), targets)


def with_squared_error(graph: Graph, output: str) -> Graph:
    """Add the squared differences of an output and `targets`, a new input of the output's type. Every element counts,
    so the mean is the mean squared error.

    Raises UsageError for an output that is not float32.
    """
    b = Builder(clone_graph(graph))
    found = _output(b, output)
    if found.dtype is not f32:
        raise UsageError(f"output {output} is not of float32 numbers", received=str(found.type))
    targets = b.input(_free(graph, TARGETS), found.type)
    ones = b.expand(b.constant(1, f32), shape=found.shape)
    b.outputs(**{LOSS: _total(b, (found - targets) * (found - targets)), COUNTED: _total(b, ones) * 1.0})
    return b.graph


def with_distillation(graph: Graph, output: str, temperature: float, share: float) -> Graph:
    """Add `share` times the divergence of an output from a teacher's, at a temperature, plus 1 - share times
    cross-entropy.

    The teacher's scores are a new input, `teacher`. Only positions with a target count (Hinton et al. 2015). Raises
    UsageError for a share outside 0 to 1, a temperature that is not above 0, and as `with_cross_entropy` does.
    """
    if not 0 <= share <= 1:
        raise UsageError("a teacher's share must be from 0 to 1", received=f"share={share!r}")
    if not 0 < temperature < float("inf"):
        raise UsageError("a temperature must be above 0", received=f"temperature={temperature!r}")
    b, scores, targets = _scored(graph, output)
    teacher = b.input(_free(graph, TEACHER), scores.type)
    apart = b.divergence(scores, teacher, temperature=temperature)
    apart = b.where(targets != IGNORED, apart, b.constant(0, f32))
    return _given(b, _total(b, b.cross_entropy(scores, targets) * (1 - share) + apart * share), targets)


def with_own_loss(graph: Graph, output: str) -> Graph:
    """Use an output of the model that is a scalar as the loss. Raises UsageError if there is none of this name, and if
    it is not a scalar.
    """
    b = Builder(clone_graph(graph))
    outputs = b.graph.main.outputs
    scalars = [name for name, value in outputs.items() if not value.type.rank and value.type.dtype is f32]
    if output not in scalars:
        near = NearestNames(scalars).of(output, 1) or scalars
        hint = f"loss={near[0]!r}" if near else "; or ".join([BUILT_IN, OWN_LOSS])
        what = f"output {output} is not a scalar" if output in outputs else f"the model has no output {output}"
        received = ", ".join(f"{name}: {value.type}" for name, value in outputs.items())
        raise UsageError(f"{what}, so it cannot be a loss", received=received, hint=hint)
    value = b.expr(outputs[output])
    b.outputs(**{LOSS: value, COUNTED: b.constant(1, f32) * 1.0})
    return b.graph


def _scored(graph: Graph, output: str) -> tuple[Builder, Expr, Expr]:
    b = Builder(clone_graph(graph))
    scores = _output(b, output)
    if not scores.rank or scores.dtype is not f32 or scores.shape[-1].constant is None:
        numbers = (
            f'loss="{SQUARED_ERROR}" for numbers' if scores.rank else f"loss={output!r} without output=, to minimize it"
        )
        raise UsageError(
            f"output {output} has no classes along its last axis",
            received=str(scores.type),
            hint=numbers if scores.dtype is f32 else OWN_LOSS,
        )
    targets = b.input(_free(graph, TARGETS), Type(i64, scores.type.dims[:-1]))
    return b, scores, targets


def _output(b: Builder, name: str) -> Expr:
    outputs = b.graph.main.outputs
    if name not in outputs:
        near = NearestNames(outputs).of(name, 1)
        hint = f"did you mean {near[0]}?" if near else "one of " + ", ".join(outputs)
        raise UsageError(f"the model has no output {name}", received=", ".join(outputs), hint=hint)
    return b.expr(outputs[name])


def _free(graph: Graph, name: str) -> str:
    if any(v.name == name for v in graph.main.inputs) or name in graph.parameters:
        raise UsageError(f"the model already has an input {name}, which is the name of an input that training adds")
    return name


def _total(b: Builder, losses: Expr) -> Expr:
    return b.reduce_sum(losses, axes=tuple(range(losses.rank))) if losses.rank else losses


def _given(b: Builder, loss: Expr, targets: Expr) -> Graph:
    counted = _total(b, (targets != IGNORED).cast(f32))
    b.outputs(**{LOSS: loss, COUNTED: counted})
    return b.graph

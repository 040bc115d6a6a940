"""Optimizers compared with torch.optim, step by step. New weights overwrite the old ones in place. Schedules at their
ends.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import treadle
from tests.backend_checks import each_backend
from treadle.ir.errors import UsageError
from treadle.ir.graph import Graph
from treadle.ir.interpreter import interpret
from treadle.ir.text.parser import parse_graph
from treadle.ir.text.printer import print_graph
from treadle.ir.types import Type, parse_type
from treadle.ir.verifier import verify
from treadle.passes.memory.frames import frames_of, peaks_of
from treadle.runtime.training.optimizers import SGD, AdamW, Optimizer, update_graph
from treadle.runtime.training.schedules import Schedule, schedule_of

Array = np.ndarray[Any, Any]
Shapes = Mapping[str, tuple[int, ...]]
Steps = Sequence[Mapping[str, Array]]
"""The gradients of each step, by weight."""

SHAPES: Shapes = {"scale": (), "h.0.bias": (5,), "h.0.weight": (5, 7), "h.1.weight": (5, 7), "odd": (2, 1, 33)}
pytestmark = pytest.mark.usefixtures("quickly_planned")

DECAYED = ("h.0.weight", "odd")
OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": AdamW(),
    "adamw that decays fast": AdamW(0.8, 0.95, eps=1e-6, weight_decay=0.5),
    "adamw without a memory": AdamW(0.0, 0.5, weight_decay=0.0),
    "sgd": SGD(),
    "sgd that decays": SGD(weight_decay=0.1),
    "momentum": SGD(0.9),
    "momentum that decays": SGD(0.9, weight_decay=0.1),
    "nesterov": SGD(0.9, nesterov=True),
    "nesterov that decays": SGD(0.5, nesterov=True, weight_decay=0.1),
}
each_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)


def types_of(shapes: Shapes) -> dict[str, Type]:
    return {name: parse_type(f"f32[{', '.join(map(str, shape))}]") for name, shape in shapes.items()}


def kept_by(graph: Graph) -> list[str]:
    """Return the names of the outputs that are the new weights and moments."""
    return [name for name in graph.main.outputs if name != "norm"]


def drawn(shapes: Shapes, steps: int, seed: int = 0, size: float = 1.0) -> tuple[dict[str, Array], Steps]:
    """Draw weights, and gradients of a given magnitude for each step."""
    rng = np.random.default_rng(seed)

    def draw() -> dict[str, Array]:
        return {name: np.asarray(rng.standard_normal(shape), np.float32) for name, shape in shapes.items()}

    return draw(), [{name: array * np.float32(size) for name, array in draw().items()} for _ in range(steps)]


def ours(
    optimizer: Optimizer,
    weights: Mapping[str, Array],
    steps: Steps,
    backend: str,
    *,
    rate: float,
    clip: float | None,
    decayed: Sequence[str] = DECAYED,
    share: float = 1.0,
) -> list[dict[str, Array]]:
    """Return the results of each step; each step overwrites the previous results."""
    types = types_of({name: array.shape for name, array in weights.items()})
    graph = update_graph(optimizer, types, clip=clip, decayed=decayed)
    exe = treadle.compile(graph, backend=backend, donate=kept_by(graph))
    moments = {f"{moment}.{n}": np.zeros_like(w) for moment in optimizer.moments for n, w in weights.items()}
    held = {name: array.copy() for name, array in (weights | moments).items()}
    found = []
    for number, gradients in enumerate(steps, 1):
        given = {f"gradient.{name}": array for name, array in gradients.items()}
        made = exe(**held, **given, rate=rate, share=share, **optimizer.scalars(number))
        held = {name: made[name] for name in held}
        found.append({name: np.array(array) for name, array in made.items()})
    return found


def theirs(
    optimizer: Optimizer,
    weights: Mapping[str, Array],
    steps: Steps,
    *,
    rate: float,
    clip: float | None,
    decayed: Sequence[str] = DECAYED,
    share: float = 1.0,
) -> list[dict[str, Array]]:
    torch = pytest.importorskip("torch")
    tensors = {name: torch.nn.Parameter(torch.tensor(array)) for name, array in weights.items()}
    groups = [
        {"params": [tensors[name] for name in weights if name in decayed]},
        {"params": [tensors[name] for name in weights if name not in decayed], "weight_decay": 0.0},
    ]
    decay = optimizer.weight_decay  # type: ignore[attr-defined]
    if isinstance(optimizer, AdamW):
        betas = (optimizer.beta1, optimizer.beta2)
        stepper = torch.optim.AdamW(groups, lr=rate, betas=betas, eps=optimizer.eps, weight_decay=decay)
        names = {"exp_avg": "mean", "exp_avg_sq": "square"}
    else:
        assert isinstance(optimizer, SGD)
        stepper = torch.optim.SGD(
            groups, lr=rate, momentum=optimizer.momentum, nesterov=optimizer.nesterov, weight_decay=decay
        )
        names = {"momentum_buffer": "velocity"} if optimizer.momentum else {}
    found = []
    for gradients in steps:
        for name, tensor in tensors.items():
            tensor.grad = torch.tensor(gradients[name]) * share
        norm = torch.linalg.vector_norm(torch.cat([tensor.grad.flatten() for tensor in tensors.values()]))
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(tensors.values(), clip)
        stepper.step()
        made = {name: tensor.detach().numpy().copy() for name, tensor in tensors.items()}
        for theirs, moment in names.items():
            made |= {f"{moment}.{name}": stepper.state[t][theirs].numpy().copy() for name, t in tensors.items()}
        found.append(made | {"norm": norm.numpy()})
    return found


def assert_alike(
    found: Sequence[Mapping[str, Array]], wanted: Sequence[Mapping[str, Array]], weights: Mapping[str, Array]
) -> None:
    """Assert equality within rounding.

    Both sides round each operation to float32, in different orders. A step has about 8 roundings of 2^-24 until a
    gradient is clipped; they count twice in the gradient's square.

    A moment is a sum of gradients, so its error is relative to its largest magnitude so far. A weight's error is
    relative to its largest magnitude so far, and to the largest change in a step.
    """
    before: Mapping[str, Array] = weights
    sizes: dict[str, float] = {}
    for number, (mine, other) in enumerate(zip(found, wanted, strict=True), 1):
        assert mine.keys() == other.keys()
        for name, array in other.items():
            moved = float(np.abs(array - before[name]).max(initial=0)) if name in weights else 0.0
            sizes[name] = max(sizes.get(name, 0.0), float(np.abs(array).max(initial=0)), moved)
            within = 16 * number * 2.0**-24 * sizes[name]
            np.testing.assert_allclose(mine[name], array, rtol=0, atol=within, err_msg=f"{name}, step {number}")
        before = other


@each_backend
@each_optimizer
@pytest.mark.parametrize("clip", [None, 2.0, 1e4])
def test_it_steps_as_torch_does(optimizer: Optimizer, clip: float | None, backend: str) -> None:
    """The norm of these gradients is about 13. Clipping to 2 makes them shorter; clipping to 10,000 leaves them
    unchanged.
    """
    weights, steps = drawn(SHAPES, 5)
    options: dict[str, Any] = {"rate": 0.01, "clip": clip, "share": 0.5}
    found = ours(optimizer, weights, steps, backend, **options)
    assert_alike(found, theirs(optimizer, weights, steps, **options), weights)


# Backends compile each drawn case, so few cases are drawn. Shapes are small, because one compiled loop serves all
# sizes.
sizes = st.lists(st.integers(0, 9), max_size=3).map(tuple)


@each_backend
@settings(max_examples=8, deadline=None)
@given(
    shapes=st.lists(sizes, min_size=1, max_size=4),
    beta1=st.floats(0.0, 0.95),
    beta2=st.floats(0.5, 0.999),
    eps=st.sampled_from([1e-8, 1e-3]),
    momentum=st.floats(0.1, 0.95),
    weight_decay=st.floats(0.0, 1.0),
    nesterov=st.booleans(),
    adam=st.booleans(),
    rate=st.sampled_from([0.0, 1e-4, 0.1]),
    size=st.sampled_from([1e-4, 1.0, 1e4]),
    clip=st.none() | st.floats(1e-3, 1e3),
    seed=st.integers(0, 99),
)
def test_any_weights_and_settings(
    backend: str,
    shapes: list[tuple[int, ...]],
    beta1: float,
    beta2: float,
    eps: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
    adam: bool,
    rate: float,
    size: float,
    clip: float | None,
    seed: int,
) -> None:
    optimizer = AdamW(beta1, beta2, eps, weight_decay) if adam else SGD(momentum, nesterov, weight_decay)
    weights, steps = drawn({f"w{n}": shape for n, shape in enumerate(shapes)}, 3, seed, size)
    options: dict[str, Any] = {"rate": rate, "clip": clip, "decayed": list(weights)[::2]}
    assert_alike(
        ours(optimizer, weights, steps, backend, **options), theirs(optimizer, weights, steps, **options), weights
    )


ODD = {"none": 0.0, "an infinity": math.inf, "its negative": -math.inf, "no number": math.nan}


@each_backend
@each_optimizer
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("kind", ODD)
def test_nonfinite_values_propagate_as_in_torch(
    optimizer: Optimizer, kind: str, clip: float | None, backend: str
) -> None:
    """One element that is not finite, and a first step of all zeros; then steps with finite gradients continue from the
    resulting state.
    """
    weights, steps = drawn({"a": (2, 3), "b": (4,)}, 4)
    for array in steps[0].values():
        array[...] = 0.0
    steps[1]["a"][1, 2] = ODD[kind]
    options: dict[str, Any] = {"rate": 0.1, "clip": clip, "decayed": ("b",)}
    found = ours(optimizer, weights, steps, backend, **options)
    wanted = theirs(optimizer, weights, steps, **options)
    for mine, other in zip(found, wanted, strict=True):
        for name, array in other.items():
            np.testing.assert_allclose(mine[name], array, rtol=1e-5, atol=1e-6, equal_nan=True, err_msg=name)


# -- the graph -----------------------------------------------------------------------------------------------------


@each_optimizer
def test_its_text_is_read_back_whatever_weights_are_called(optimizer: Optimizer) -> None:
    names = ("h.0.ln_1.weight", "1", "nan", "return", "a b", 'quo"ted', "two\nlines", "größe", "")
    graph = update_graph(optimizer, dict.fromkeys(names, parse_type("f32[2, 3]")), clip=1.0, decayed=names[:3])
    verify(graph)
    text = print_graph(graph)
    assert parse_graph(text) == graph
    assert print_graph(parse_graph(text)) == text
    assert kept_by(graph) == [n for name in names for n in (name, *(f"{m}.{name}" for m in optimizer.moments))]


@each_backend
@each_optimizer
def test_new_values_lie_where_the_old_ones_did(optimizer: Optimizer, backend: str) -> None:
    """All new values are stored in place. A run needs memory for temporary values of only one weight at a time, for any
    number of weights.
    """
    peaks: list[int] = []
    for count in (2, 12):
        shapes = {f"h.{n}.w": (31 + n % 2, 64) for n in range(count)}
        graph = update_graph(optimizer, types_of(shapes), clip=1.0, decayed=list(shapes)[::2])
        exe = treadle.compile(graph, backend=backend, donate=kept_by(graph))
        given = {v.name: np.full(v.type.static_shape or (), 0.5, np.float32) for v in graph.main.inputs}
        wanted = interpret(graph, given)
        places = {name: given[name].__array_interface__["data"][0] for name in kept_by(graph)}
        made = exe(**given)
        assert {name: made[name].__array_interface__["data"][0] for name in places} == places
        for name, array in wanted.items():
            np.testing.assert_allclose(made[name], array, rtol=1e-5)
        plan = exe.optimized.lowered.plan
        (peak,) = peaks_of(frames_of(plan), graph.symbols)["main"]
        peaks.append(peak.evaluate({}))
    one = 32 * 64 * 4
    assert peaks[0] <= 2 * one + 512, "no more than two temporary values, and sums"
    assert peaks[1] <= peaks[0] + 10 * 8, "of each weight more, scalars"


# -- refusals ------------------------------------------------------------------------------------------------------


def updated(optimizer: Optimizer | None = None, clip: Any = None, decayed: Any = (), **types: str) -> Graph:
    weights = {name.replace("_", "."): parse_type(type) for name, type in types.items()}
    return update_graph(optimizer or AdamW(), weights, clip=clip, decayed=decayed)


REFUSED: dict[str, tuple[Any, str]] = {
    "no number": (lambda: AdamW(beta1=math.nan), "beta1 must be a number of 0 or more and below 1"),
    "a negative one": (lambda: AdamW(beta2=-0.1), "beta2 must be a number of 0 or more and below 1"),
    "no decay of the mean": (lambda: AdamW(beta1=1), "beta1 must be a number of 0 or more and below 1"),
    "a text": (lambda: AdamW(eps="small"), "eps must be a number of 0 or more"),  # type: ignore[arg-type]
    "a truth value": (lambda: AdamW(weight_decay=True), "weight_decay must be a number of 0 or more"),
    "an infinite decay": (lambda: SGD(weight_decay=math.inf), "weight_decay must be a number of 0 or more"),
    "a momentum that grows": (lambda: SGD(1.5), "momentum must be a number of 0 or more and below 1"),
    "nesterov alone": (lambda: SGD(nesterov=True), "nesterov needs momentum"),
    "nesterov of another kind": (lambda: SGD(0.9, nesterov=1), "nesterov must be True or False"),  # type: ignore[arg-type]
    "step 0": (lambda: AdamW().scalars(0), "a step must be an integer of 1 or more"),
    "half a step": (lambda: SGD().scalars(1.5), "a step must be an integer of 1 or more"),  # type: ignore[arg-type]
    "no weights": (lambda: updated(), "the model has no weights to update"),
    "halves": (lambda: updated(w="f16[2]"), "weight w is not f32"),
    "integers": (lambda: updated(w="i64[2]"), "weight w is not f32"),
    "blocks": (lambda: updated(w="f32[2, 32] as q8_0"), "weight w is not f32"),
    "a weight called as a scalar is": (lambda: updated(rate="f32[2]"), "two inputs of the update have the name rate"),
    "a weight called as an output is": (lambda: updated(norm="f32[2]"), "two inputs of the update have the name norm"),
    "a weight called as a moment is": (
        lambda: updated(w="f32[2]", mean_w="f32[2]"),
        "two inputs of the update have the name mean.w",
    ),
    "a clip of 0": (lambda: updated(w="f32[2]", clip=0), "max_grad_norm must be a number above 0"),
    "no clip": (lambda: updated(w="f32[2]", clip=math.inf), "max_grad_norm must be a number above 0"),
    "one that is not there": (lambda: updated(w="f32[2]", decayed=["w", "v"]), "unknown weights in decayed"),
    "a name alone": (lambda: updated(w="f32[2]", decayed="w"), "unknown weights in decayed"),
    "a rate below 0": (lambda: Schedule(-1e-3), "a learning rate must be a number of 0 or more"),
    "a rate that is none": (lambda: schedule_of(math.nan), "a learning rate must be a number of 0 or more"),
    "a rate as text": (lambda: schedule_of("3e-4"), "a learning rate must be a number"),  # type: ignore[arg-type]
    "half a warmup": (lambda: Schedule(1.0, warmup=0.5), "warmup must be an integer"),  # type: ignore[arg-type]
    "a negative warmup": (lambda: Schedule(1.0, warmup=-1), "warmup must be an integer of 0 or more"),
    "no steps": (lambda: Schedule(1.0, steps=0), "steps must be an integer of 1 or more"),
    "another shape": (lambda: Schedule(1.0, steps=9, shape="cosin"), "unknown schedule shape 'cosin'"),  # type: ignore[arg-type]
    "a fall without an end": (
        lambda: Schedule(1.0, shape="cosine"),
        "a cosine schedule needs steps after step 1 to decay",
    ),
    "all warmup": (lambda: Schedule(1.0, 9, 9, "linear"), "a linear schedule needs steps after step"),
    "an end above the peak": (
        lambda: Schedule(1.0, 0, 9, "linear", 1.5),
        "the end of a schedule must be between 0 and 1",
    ),
    "an end of what is constant": (lambda: Schedule(1.0, end=0.5), "end= does not apply to a constant schedule"),
    "before the first step": (lambda: Schedule(1.0)(0), "a step must be an integer of 1 or more"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_contradictory_arguments_are_refused_with_a_hint(kind: str) -> None:
    call, what = REFUSED[kind]
    with pytest.raises(UsageError) as caught:
        call()
    assert caught.value.what.startswith(what)
    assert caught.value.hint


# -- schedules -----------------------------------------------------------------------------------------------------

RATES: dict[str, tuple[Schedule, dict[int, float]]] = {
    "a number": (schedule_of(0.5), {1: 0.5, 2: 0.5, 10**9: 0.5}),
    "none at all": (schedule_of(0), {1: 0.0, 7: 0.0}),
    "warmup": (Schedule(0.8, warmup=4), {1: 0.2, 2: 0.4, 3: 0.6, 4: 0.8, 5: 0.8, 1000: 0.8}),
    "linear": (Schedule(1.0, steps=5, shape="linear"), {1: 1.0, 2: 0.8, 3: 0.6, 4: 0.4, 5: 0.2, 6: 0.0, 7: 0.0}),
    "linear to a quarter": (
        Schedule(1.0, warmup=2, steps=5, shape="linear", end=0.25),
        {1: 0.5, 2: 1.0, 3: 0.8125, 4: 0.625, 5: 0.4375, 6: 0.25, 99: 0.25},
    ),
    "cosine": (Schedule(1.0, steps=4, shape="cosine"), {1: 1.0, 3: 0.5, 5: 0.0, 6: 0.0}),
    "cosine to a tenth": (
        Schedule(3e-4, warmup=100, steps=10_099, shape="cosine", end=0.1),
        {1: 3e-6, 100: 3e-4, 5_100: 3e-4 * 0.55, 10_100: 3e-4 * 0.1, 10_101: 3e-4 * 0.1},
    ),
    "a warmup of one step": (Schedule(1.0, warmup=1, steps=3, shape="linear"), {1: 1.0, 2: 2 / 3, 3: 1 / 3, 4: 0.0}),
    "the shortest fall": (Schedule(1.0, steps=2, shape="cosine", end=0.5), {1: 1.0, 2: 0.75, 3: 0.5}),
}


@pytest.mark.parametrize("kind", RATES)
def test_rates_at_the_edges(kind: str) -> None:
    schedule, rates = RATES[kind]
    assert {step: schedule(step) for step in rates} == pytest.approx(rates, rel=1e-15, abs=1e-17)
    exact = {max(schedule.warmup, 1): schedule.peak, (schedule.steps or 10**6) + 1: rates[max(rates)]}
    assert {step: schedule(step) for step in exact} == exact


@pytest.mark.parametrize("steps", [2, 7])
@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_a_fall_is_that_of_transformers(shape: Any, steps: int) -> None:
    """The schedule is compared without a warmup, since in transformers the first step of a warmup has a rate of 0."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    other = getattr(transformers, f"get_{shape}_schedule_with_warmup")(optimizer, 0, steps)
    schedule = Schedule(0.3, steps=steps, shape=shape)
    for step in range(1, steps + 2):
        assert schedule(step) == pytest.approx(other.get_last_lr()[0], rel=1e-12, abs=1e-15)
        optimizer.step()
        other.step()


@given(
    warmup=st.integers(0, 50),
    more=st.integers(1, 50),
    shape=st.sampled_from(["constant", "cosine", "linear"]),
    end=st.floats(0, 1),
)
def test_a_rate_rises_then_falls(warmup: int, more: int, shape: Any, end: float) -> None:
    steps = max(warmup, 1) + more
    schedule = Schedule(2.0, warmup, steps, shape, 0.0 if shape == "constant" else end)
    rates = [schedule(step) for step in range(1, steps + 5)]
    top = max(warmup, 1) - 1
    assert rates[:top] == sorted(rates[:top]) and rates[top] == 2.0 == max(rates)
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert set(rates[steps:]) == {2.0 if shape == "constant" else 2.0 * end}
    assert rates[steps - 1] > 0, "no step of the run is for nothing"


def test_a_schedule_is_taken_as_it_is() -> None:
    schedule = Schedule(1.0, 2, 3, "linear")
    assert schedule_of(schedule) is schedule
    assert replace(schedule, peak=0.5)(2) == 0.5

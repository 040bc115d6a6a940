"""Optimizers: one graph that updates all weights in place.

    graph = update_graph(AdamW(), {"w": parse_type("f32[8, 4]")}, clip=1.0, decayed=["w"])
    exe = treadle.compile(graph, donate=("w", "mean.w", "square.w"))
    new = exe(w=w, **{"gradient.w": g, "mean.w": m, "square.w": s}, rate=1e-3, share=1.0, **AdamW().scalars(step))

For each weight NAME, the graph takes `NAME`, `gradient.NAME` and the optimizer's moments, such as `mean.NAME`, and
returns the new weight and moments under the same names. Gradients are first multiplied by `share`: 1/4 if they are sums
over 4 micro-batches. The output `norm` is the norm of all gradients together after this multiplication. With `clip`,
the gradients are then scaled to at most this norm.

The caller computes the scalars that depend only on the step number: `optimizer.scalars(step)`. So one compiled graph
serves all steps.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import ClassVar, Protocol

from treadle.ir.builder import Builder, Expr
from treadle.ir.errors import UsageError
from treadle.ir.graph import Graph
from treadle.ir.types import Type, f32
from treadle.ir.wording.checked_calls import with_checked_constructor
from treadle.runtime.training.number_ranges import check_count, check_number

_CLIP_EPS = 1e-6
"""Number added to the norm in the denominator of clipping, as in torch.nn.utils.clip_grad_norm_."""

_RATE = "t.Trainer(model, learning_rate=1e-3): the learning rate is an option of the trainer"
_BETAS = "beta1=0.9, beta2=0.999"
_ADAMW_ELSEWHERE = {"lr": _RATE, "learning_rate": _RATE, "betas": _BETAS}
_SGD_ELSEWHERE = {"lr": _RATE, "learning_rate": _RATE}


class Optimizer(Protocol):
    """A rule that updates weights from their gradients.

    moments  names of the moments of each weight; moments have the weight's type and are zeros at first
    needs    scalar inputs in addition to `rate`, the learning rate
    """

    @property
    def moments(self) -> tuple[str, ...]: ...

    @property
    def needs(self) -> tuple[str, ...]: ...

    def scalars(self, step: int) -> dict[str, float]:
        """Return the scalar inputs of a step; the first step is 1. Raises UsageError for a step below 1."""
        ...

    def factors(self, b: Builder, scale: Expr, rate: Expr, *needs: Expr) -> Mapping[str, Expr]:
        """Return the scalars that the updates of all weights share. `scale` is the factor of all gradients."""
        ...

    def update(
        self, b: Builder, weight: Expr, gradient: Expr, moments: tuple[Expr, ...], by: Mapping[str, Expr], decays: bool
    ) -> tuple[Expr, ...]:
        """Return the new weight and moments; `by` is the result of `factors`."""
        ...


@with_checked_constructor(_ADAMW_ELSEWHERE)
@dataclass(frozen=True)
class AdamW:
    """mean   = beta1 mean + (1 - beta1) g
    square = beta2 square + (1 - beta2) g^2
    w      = w - rate weight_decay w - rate (mean / (1 - beta1^t)) / (sqrt(square / (1 - beta2^t)) + eps)

    Loshchilov & Hutter 2019, as torch.optim.AdamW. Raises UsageError for a value out of range.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01

    moments: ClassVar[tuple[str, ...]] = ("mean", "square")
    needs: ClassVar[tuple[str, ...]] = ("mean_correction", "square_correction")

    def __post_init__(self) -> None:
        check_number("beta1", self.beta1, below=1, hint="0.9")
        check_number("beta2", self.beta2, below=1, hint="0.999")
        check_number("eps", self.eps, hint="1e-8")
        check_number("weight_decay", self.weight_decay, hint="0.01, or 0 for none")

    def scalars(self, step: int) -> dict[str, float]:
        """Return `mean_correction` = 1 / (1 - beta1^step) and the corresponding `square_correction` for beta2."""
        check_count("a step", step, hint="1 for the first one")
        corrections = [1 / (1 - beta**step) for beta in (self.beta1, self.beta2)]
        return dict(zip(self.needs, corrections, strict=True))

    def factors(self, b: Builder, scale: Expr, rate: Expr, *needs: Expr) -> Mapping[str, Expr]:
        mean_correction, square_correction = needs
        return {
            "scale": scale,
            "root_scale": scale * math.sqrt(1 - self.beta2),
            "kept": 1.0 - rate * self.weight_decay,
            "rate": rate * mean_correction,
            "root_correction": b.sqrt(square_correction),
        }

    def update(
        self, b: Builder, weight: Expr, gradient: Expr, moments: tuple[Expr, ...], by: Mapping[str, Expr], decays: bool
    ) -> tuple[Expr, ...]:
        mean, square = moments
        mean = _between(mean, gradient * by["scale"], self.beta1)
        scaled = gradient * by["root_scale"]  # avoids overflow and underflow of the square
        square = square * self.beta2 + scaled * scaled
        kept = weight * by["kept"] if decays and self.weight_decay else weight
        return kept - mean * by["rate"] / (b.sqrt(square) * by["root_correction"] + self.eps), mean, square


@with_checked_constructor(_SGD_ELSEWHERE)
@dataclass(frozen=True)
class SGD:
    """d        = g + weight_decay w
    velocity = momentum velocity + d
    w        = w - rate velocity; with nesterov w - rate (d + momentum velocity)

    Sutskever et al. 2013, as torch.optim.SGD. Raises UsageError for a value out of range.
    """

    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0

    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_number("momentum", self.momentum, below=1, hint="0.9, or 0 for none")
        check_number("weight_decay", self.weight_decay, hint="0.0001, or 0 for none")
        if not isinstance(self.nesterov, bool):
            raise UsageError("nesterov must be True or False", received=repr(self.nesterov), hint="nesterov=True")
        if self.nesterov and not self.momentum:
            raise UsageError("nesterov needs momentum", received=repr(self), hint="SGD(momentum=0.9, nesterov=True)")

    @property
    def moments(self) -> tuple[str, ...]:
        """Names of the moments: `velocity` if momentum is not 0."""
        return ("velocity",) if self.momentum else ()

    def scalars(self, step: int) -> dict[str, float]:
        """Return no scalars: the update does not depend on the step."""
        check_count("a step", step, hint="1 for the first one")
        return {}

    def factors(self, b: Builder, scale: Expr, rate: Expr, *needs: Expr) -> Mapping[str, Expr]:
        return {"scale": scale, "rate": rate}

    def update(
        self, b: Builder, weight: Expr, gradient: Expr, moments: tuple[Expr, ...], by: Mapping[str, Expr], decays: bool
    ) -> tuple[Expr, ...]:
        direction = gradient * by["scale"]
        if decays and self.weight_decay:
            direction = direction + weight * self.weight_decay
        moments = tuple(velocity * self.momentum + direction for velocity in moments)
        for velocity in moments:
            direction = direction + velocity * self.momentum if self.nesterov else velocity
        return weight - direction * by["rate"], *moments


def update_graph(
    optimizer: Optimizer, weights: Mapping[str, Type], *, clip: float | None, decayed: Collection[str]
) -> Graph:
    """Return one optimizer step of all weights as a graph; the module's docstring lists the inputs and outputs.

    weights  types of the weights by name, all f32
    clip     maximum norm of all gradients together; None disables clipping
    decayed  names of the weights with weight decay

    The graph has no calls, since backends do not overwrite donated inputs through calls. Raises UsageError for an empty
    set of weights, weights other than f32, two inputs of the same name, a clip that is not above 0, and unknown names
    in `decayed`.
    """
    _check_weights(optimizer, weights, decayed)
    if clip is not None:
        check_number("max_grad_norm", clip, positive=True, hint="1.0, or None to leave gradients as they are")
    b = Builder(Graph("update"))
    given = {name: [b.input(n, type) for n in _inputs(optimizer, name)] for name, type in weights.items()}
    rate, share, *needs = [b.input(name, f32[()]) for name in ("rate", "share", *optimizer.needs)]
    gradients = [gradient for _, gradient, *_ in given.values()]
    norm = b.sqrt(reduce(add, [_sum(b, g * g) for g in gradients])) * share
    scale = share if clip is None else share * b.minimum(clip / (norm + _CLIP_EPS), 1.0)
    by = optimizer.factors(b, scale, rate, *needs)
    made: dict[str, Expr] = {}
    for name, (weight, gradient, *moments) in given.items():
        with b.scoped(name):
            new = optimizer.update(b, weight, gradient, tuple(moments), by, name in decayed)
        made |= zip(_kept(optimizer, name), new, strict=True)
    b.outputs(**made, norm=norm)
    return b.graph


def _kept(optimizer: Optimizer, name: str) -> list[str]:
    """Return the names of a weight and its moments."""
    return [name, *(f"{moment}.{name}" for moment in optimizer.moments)]


def _inputs(optimizer: Optimizer, name: str) -> list[str]:
    weight, *moments = _kept(optimizer, name)
    return [weight, f"gradient.{name}", *moments]


def _check_weights(optimizer: Optimizer, weights: Mapping[str, Type], decayed: Collection[str]) -> None:
    if not weights:
        raise UsageError("the model has no weights to update", hint="a model with parameters")
    for name, type in weights.items():
        if type.dtype is not f32 or type.encoding is not None:
            raise UsageError(
                f"weight {name} is not f32, so it cannot be trained",
                received=f"{name}: {type}",
                hint="weights in f32; convert them to other types after training",
            )
    names = Counter([*(n for name in weights for n in _inputs(optimizer, name)), "rate", "share", *optimizer.needs])
    twice = [name for name, count in {**names, "norm": 1 + names["norm"]}.items() if count > 1]
    if twice:
        raise UsageError(f"two inputs of the update have the name {twice[0]}", hint="another name for the weight")
    unknown = [decayed] if isinstance(decayed, str) else [name for name in decayed if name not in weights]
    if unknown:
        raise UsageError(
            "unknown weights in decayed",
            received=", ".join(map(repr, unknown)),
            hint=f"decayed=[{next(iter(weights))!r}]",
        )


def _sum(b: Builder, x: Expr) -> Expr:
    """Return the sum of all elements. Each row is summed first, then these sums are added, since one long sum in f32
    loses precision.
    """
    rows = b.reduce_sum(x, axes=(-1,)) if x.rank else x
    return b.reduce_sum(rows, axes=tuple(range(rows.rank))) if rows.rank else rows


def _between(start: Expr, end: Expr, share: float) -> Expr:
    """Return share * start + (1 - share) * end, rounded like torch.lerp. The result is exact for a share of 0 and for
    equal ends.
    """
    return start + (end - start) * (1 - share) if share > 0.5 else end - (end - start) * share

"""Resolve MODEL in one call, for callers that do not need the opened `ModelSource`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from treadle.program.forms.model_form import Limits
from treadle.program.source import AnyModel, ModelSource, Resolved


def resolve(
    model: AnyModel,
    *,
    inputs: Sequence[str] | None = None,
    widen: str | Iterable[str] = (),
    limits: Limits = None,
    deferred: bool = False,
    outputs: Sequence[str] | None = None,
    **config: Any,
) -> Resolved:
    """Trace the model that MODEL names: call `ModelSource.open`, then `ModelSource.resolve`. Raises as these methods
    do.
    """
    source = ModelSource.open(model, limits=limits)
    return source.resolve(inputs=inputs, outputs=outputs, widen=widen, deferred=deferred, **config)

"""The meaning of `dtype=` and `passes=`: the dtypes that are widened when a model is read, and a user's pipeline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from treadle.ir.errors import UsageError
from treadle.ir.target import Target
from treadle.ir.transforms.widening import WIDENED
from treadle.passes.framework.manager import Pass

Widen = str | Iterable[str]


def widened(dtype: str | None, widen: Widen) -> Widen:
    """Return the dtypes to widen when a model is read that is computed in `dtype`.

    dtype  None: as declared. "f32": bf16 and f16 values become f32. "bf16": the same, before the stage `precision`
    """
    if dtype is None:
        return widen
    return tuple(dict.fromkeys([*([widen] if isinstance(widen, str) else widen), *WIDENED]))


def checked_passes(passes: object, target: Target) -> tuple[Pass, ...]:
    """Return the pipeline as a tuple. In its text, `backend=NAME` has the backend's capabilities on the target.

    Raises UsageError if it is neither a sequence of passes nor text, ParseError for text that is not a pipeline.
    """
    if isinstance(passes, str):
        from treadle.backends.staged import capabilities_of
        from treadle.passes.framework.pass_text import parse_pipeline

        return parse_pipeline(passes, lambda name: capabilities_of(name, target))
    if isinstance(passes, Sequence) and all(isinstance(p, Pass) for p in passes):
        return tuple(passes)
    raise UsageError(
        "passes= must be a list of passes, or the text of a pipeline",
        received=f"{passes!r}"[:80],
        hint='"fuse-gelu, fuse-linear", or leave it out for the default pipeline; [] compiles the graph as declared',
    )

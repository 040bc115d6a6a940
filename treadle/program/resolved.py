"""A traced model with its weights and its source."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from treadle.models.checkpoints import ReadModel

if TYPE_CHECKING:
    from treadle.program.source import ModelSource


@dataclass(frozen=True)
class Resolved(ReadModel):
    """A traced model with its weights, and its source: the opened model, which also opens the other files."""

    source: ModelSource = field(kw_only=True)

"""`ChatPrompt`: the prompt of a conversation, as a row of a session reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ChatPrompt:
    """The token ids of a prompt, and the inputs of the row that reads them (`Session.open`): its images, if any."""

    ids: list[int]
    inputs: Mapping[str, Any] = field(default_factory=dict)

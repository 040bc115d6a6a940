"""The error family: every failure that a user can cause is one of these, and reads the same way.

How they read, and those about files and arguments, are of the lowest room (`treadle.files.errors`); all other rooms
import every error from here.
"""

from __future__ import annotations

from treadle.files.errors import CheckpointError, FrontendError, Hint, TreadleError, UsageError

__all__ = [
    "BackendError",
    "CheckpointError",
    "FrontendError",
    "GraphError",
    "Hint",
    "ParseError",
    "PassError",
    "RankError",
    "RuleError",
    "SizeError",
    "TreadleError",
    "UsageError",
    "VerifyError",
]


class SizeError(TreadleError):
    """A size expression cannot be formed, solved or evaluated."""


class RuleError(TreadleError):
    """An axis rule is malformed, or operands disagree with it."""


class GraphError(TreadleError):
    """A graph cannot be built as asked: an unknown op, a wrong operand, a value of another function."""


class ParseError(TreadleError):
    """Text is not a graph; `within` names line and column."""


class VerifyError(TreadleError):
    """A graph breaks an invariant of the IR."""


class PassError(TreadleError):
    """A pass was asked for something it cannot do, or left a graph that does not verify."""


class BackendError(TreadleError):
    """A backend is not available, or refuses a graph, or was called with the wrong inputs."""


class RankError(TreadleError):
    """A rank of a sharded run has failed, has died or does not come; every other rank ends with this."""

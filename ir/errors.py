"""The error family: every failure that a user can cause raises one of these errors, in one form.

The form, and the errors about files and arguments, are defined in the lowest package (`treadle.files.errors`); all
other packages import every error from here.
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
    """A graph cannot be built as requested: an unknown op, a wrong operand, a value of another function."""


class ParseError(TreadleError):
    """Text is not a graph; `within` names line and column."""


class VerifyError(TreadleError):
    """A graph breaks an invariant of the IR."""


class PassError(TreadleError):
    """A pass cannot do what was requested, or its result does not verify."""


class BackendError(TreadleError):
    """A backend is not available, refuses a graph, or was called with wrong inputs."""


class RankError(TreadleError):
    """A rank of a sharded run failed, died or did not arrive; all other ranks end with this error."""

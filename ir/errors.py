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
    """The error for a size expression that cannot be formed, solved or evaluated."""


class RuleError(TreadleError):
    """The error for an axis rule that is malformed, or for operands that do not match the rule."""


class GraphError(TreadleError):
    """The error for a graph that cannot be built: an unknown op, a wrong operand, a value of another function."""


class ParseError(TreadleError):
    """The error for text that is not a graph. `within` names line and column."""


class VerifyError(TreadleError):
    """The error for a graph that breaks an invariant of the IR."""


class PassError(TreadleError):
    """The error for a pass that cannot do what was requested, or whose result does not verify."""


class BackendError(TreadleError):
    """The error for a backend that is not available, refuses a graph, or was called with wrong inputs."""


class RankError(TreadleError):
    """A rank of a sharded run failed, died or did not arrive; all other ranks end with this error."""

"""The format of errors, and the error classes for external input. `treadle.ir.errors` has the full hierarchy.

An error states, in this order: the problem, the received value, the place in the graph or file, the user's source line,
and a suggestion.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence


class Hint(str):
    """A suggestion in Python. `command` is the same suggestion for the command line, if it differs.

    replaces  an argument of the command line: the suggestion is the same command line with `words` in its place
    without   options that this command line leaves out
    before    text before this command line, such as a pipe; after: text that follows it
    renamed   another argument of this command line, and the one in its place
    """

    command: str
    replaces: str | None
    words: tuple[str, ...]
    without: tuple[str, ...]
    before: str
    after: str
    renamed: tuple[str, str] | None

    def __new__(
        cls,
        text: str,
        command: str,
        *,
        replaces: str | None = None,
        words: tuple[str, ...] = (),
        without: tuple[str, ...] = (),
        before: str = "",
        after: str = "",
        renamed: tuple[str, str] | None = None,
    ) -> Hint:
        made = super().__new__(cls, text)
        made.command, made.replaces, made.words = command, replaces, words
        made.without, made.before, made.after, made.renamed = without, before, after, renamed
        return made

    def on_command_line(self, words: Sequence[str]) -> str:
        """Return the suggestion for a command that was started with these words. The first of `self.words` replaces
        every argument, also in `NAME=MODEL`; the others follow the first argument.
        """
        named = [at for at, word in enumerate(words) if self.replaces in (word, word.partition("=")[2])]
        places = [at for at in named if not words[at - 1].startswith("-")] or named[:1]
        if self.replaces is None or not places:
            return self.command
        made = list(words)
        for at in places:
            name = words[at].removesuffix(str(self.replaces))  # "NAME=", or nothing
            made[at] = name + self.words[0]
        if self.renamed is not None:
            old, new = self.renamed
            made = [word.removesuffix(old) + new if old in (word, word.partition("=")[2]) else word for word in made]
        return self.before + shlex.join([*made[: places[0] + 1], *self.words[1:], *made[places[0] + 1 :]]) + self.after


class TreadleError(Exception):
    """Base class of all errors that Treadle raises on purpose.

    what      the problem in one line, without its context
    received  the types, values or bytes that were received
    within    the place in a graph (function, op, neighbors) or in a file (field, byte offset)
    source    the user's source line and scope
    hint      a suggestion for solving the problem
    option    a name that was passed as an option of a model, but is not an option; the command line names the flag that
              was meant

    is_reported  True if another process reports the error to the user, so that this process prints nothing
    """

    is_reported = False

    def __init__(
        self,
        what: str,
        *,
        received: str | None = None,
        within: str | None = None,
        source: str | None = None,
        hint: str | None = None,
        option: str | None = None,
    ) -> None:
        super().__init__(what)
        self.what = what
        self.received = received
        self.within = within
        self.source = source
        self.hint = hint
        self.option = option

    def __str__(self) -> str:
        lines = [self.what]
        for label, text in (
            ("received", self.received),
            ("in", self.within),
            ("from", self.source),
            ("try", self.hint),
        ):
            if text:
                first, *rest = text.splitlines()
                lines.append(f"  {label:<8}  {first}")
                lines.extend(f"            {line}" for line in rest)
        return "\n".join(lines)


class FrontendError(TreadleError):
    """The error for a model that cannot be read or traced."""


class CheckpointError(FrontendError):
    """The error for a checkpoint whose files are damaged or hostile, or lack something that the model needs.

    missing  names of the model's weights that the checkpoint lacks
    """

    missing: tuple[str, ...] = ()


class UsageError(TreadleError):
    """The error for an invalid command line or argument."""

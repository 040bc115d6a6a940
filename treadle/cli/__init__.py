"""The command line: `treadle inspect | compile | explain | diff | run | launch | verify | shard | export | ...`.

docs/cli.md describes each command. Each command has a file of its name in this folder, or in `tasks/` if it applies a
model to a task such as classification.

A TreadleError is printed in the house's form, with exit code 2; so is an error in the options. Any other exception is
reported as a fault of Treadle, with exit code 1. With `--json`, standard output contains one JSON object and nothing
else. Commands import what they need when they run, so that `--help` is fast.
"""

import itertools
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from treadle.cli.application import app as app
from treadle.cli.application import forget_output, print_error, print_json, saying
from treadle.files.whole_files import FULL
from treadle.ir.errors import UsageError

_OWN = (
    *("inspect", "compile", "explain", "report", "diff", "run", "launch", "verify", "shard", "export"),
    *("bench", "roofline", "train", "embed", "generate", "serve", "models", "fetch", "doctor", "targets"),
)
_TASKS = (
    *("chat", "classify", "answer", "tag", "fill", "label", "match", "describe"),
    *("translate", "summarize", "transcribe", "perplexity"),
)
COMMANDS = (*_OWN, *_TASKS)
"""All commands, in the order of `--help`."""

for _name in _OWN:
    import_module(f"{__name__}.{_name}")
for _name in _TASKS:
    import_module(f"{__name__}.tasks.{_name}")


def main() -> None:
    """Run the command line. Exit with 0, 1 for a fault of Treadle, or 2 for an error in the input."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    words = list(itertools.takewhile(lambda word: word != "--", sys.argv[1:]))
    code: str | int | None
    try:
        try:
            code = _run_as_json(words) if "--json" in words else app(prog_name="treadle")
        except SystemExit as ended:
            code = ended.code
            before = list(_chain(ended.__context__))
            if before and isinstance(before[0], BrokenPipeError):  # raised while rich printed help or a usage error
                forget_output()
                code = 2 if any(map(_is_of_usage, before)) else 0
        sys.stdout.flush()
    except BrokenPipeError:
        forget_output()
        code = 0
    except OSError as error:
        if error.errno not in FULL:
            raise
        _report_full_disk(error, as_json="--json" in words)
        code = 2
    sys.exit(code)


def _report_full_disk(error: OSError, *, as_json: bool) -> None:
    """Report a disk without space, on which the output itself may be written."""
    what = UsageError(FULL[error.errno or 0], received=str(error), hint="free space there, or another disk")
    for is_object in (True, False) if as_json else (False,):
        try:
            with saying():
                return print_error(what, as_json=is_object)
        except OSError:
            continue
        finally:
            forget_output()


def _run_as_json(words: list[str]) -> int:
    """Run a command with --json, and return its exit code. A usage error, too, is printed as one JSON object."""
    try:
        return int(app(prog_name="treadle", standalone_mode=False) or 0)
    except Exception as raised:
        error: Any = raised
        if not _is_of_usage(error):
            raise
        named = [word for word in words[:1] if word in COMMANDS]
        what, hint = error.format_message(), " ".join(["treadle", *named, "--help"])
        with saying():
            print_json({"error": {"kind": "UsageError", "what": what, "try": hint}})
        return 2


def _is_of_usage(error: Any) -> bool:
    """Return True if typer raised the error, as it does for options and arguments."""
    return hasattr(error, "format_message")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, and the errors that were being handled when it was raised."""
    while error is not None:
        yield error
        error = error.__context__

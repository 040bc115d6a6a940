"""The command line: `treadle compile | inspect | explain | run | verify | export | embed | generate | models | fetch`.

docs/cli.md describes each; each has a file of its name here.

An error that Treadle raises on purpose is printed in the house's form and ends with exit code 2, as do wrong options;
anything else is a fault of Treadle's, told so, with exit code 1. With `--json` stdout holds one object and nothing
else. What a command needs is imported when it runs, so that `--help` is quick.
"""

import sys
from importlib import import_module

from treadle.cli.application import app as app

COMMANDS = ("inspect", "compile", "explain", "run", "verify", "export", "embed", "generate", "models", "fetch")
"""In the order of `--help`."""

for _name in COMMANDS:
    import_module(f"{__name__}.{_name}")


def main() -> None:
    """The entry point. Ends the process with 0, 1 for a fault of Treadle's, or 2 for an error of what was given."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="treadle")

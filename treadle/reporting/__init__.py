"""The output of the command line: facts as plain data, which `--json` prints, and the same facts as text and tables."""

from typing import Any

Facts = dict[str, Any]
"""The data that `--json` prints."""

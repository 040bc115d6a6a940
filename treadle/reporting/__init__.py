"""What the command line tells: facts as plain data, which `--json` prints, and the same as text and tables."""

from typing import Any

Facts = dict[str, Any]
"""What `--json` prints of something."""

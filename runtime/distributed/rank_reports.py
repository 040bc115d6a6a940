"""Reports of ranks that `treadle launch` started: a text that several ranks report is printed by the first one only.

The launcher makes a folder, in which a rank creates a file for each text that it reports, named with the text's hash.
The system creates a file once, so that only one rank prints the text. Ranks that report other texts print them, too.
"""

from __future__ import annotations

import hashlib
import os
import sys
import traceback
from pathlib import Path
from types import TracebackType

REPORTS = "TREADLE_REPORTS"
"""Environment variable with the path of the launcher's folder."""


def is_first_report(text: str) -> bool:
    """Return True if no other rank has reported this text. True in a process that `treadle launch` did not start."""
    folder = os.environ.get(REPORTS)
    if not folder:
        return True
    try:
        Path(folder, hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()).touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # the launcher has ended
        return True
    return True


def is_launched_after_first() -> bool:
    """Return True if `treadle launch` started this process as another rank than rank 0."""
    return REPORTS in os.environ and os.environ.get("RANK") != "0"


def report_uncaught_once() -> None:
    """Print an uncaught exception of a Python script once, if all ranks raise it. `treadle/__init__.py` calls this."""
    if REPORTS not in os.environ:
        return
    print_traceback = sys.excepthook

    def print_first(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        is_reported = getattr(error, "is_reported", False)  # by another rank
        if not is_reported and is_first_report("".join(traceback.format_exception(kind, error, trace))):
            print_traceback(kind, error, trace)

    sys.excepthook = print_first

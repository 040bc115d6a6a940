"""Small models where only Python and its packages are installed: no linker, no compiler. Kernels stay in memory.

    python -m tests.portability.no_linker        as root, with an interpreter outside of /usr/bin

In a mount namespace of its own, an empty folder hides all folders of programs. With one thread and with two, the
numbers must be bitwise identical to those with a linker, and every model whose kernels are compiled must print a note
that names the missing linkers.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.portability.emulated import ROOT, worst

PROGRAMS = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin")  # /bin and /sbin are links
HIDDEN = 'for folder in $FOLDERS; do mount --bind "$EMPTY" "$folder" || exit 1; done; exec "$@"'
NOTE = "there is no linker"


def run(out: Path, threads: int, empty: Path | None) -> str:
    """Run the small models in a new process with an empty cache and return the printed text. `empty` is an empty folder
    that hides all programs. Raises CalledProcessError if the process fails.
    """
    command = [sys.executable, "-m", "tests.portability.small_models", str(out), "--threads", str(threads)]
    environment = {"PATH": os.pathsep.join(PROGRAMS), "HOME": "/nowhere", "TREADLE_CACHE": f"{out}.cache"}
    environment |= {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    if empty is not None:
        environment |= {"EMPTY": str(empty), "FOLDERS": " ".join(PROGRAMS)}
        command = ["unshare", "--mount", "sh", "-c", HIDDEN, "sh", *command]
    return subprocess.run(command, env=environment, cwd=ROOT, check=True, text=True, stdout=subprocess.PIPE).stdout


def main() -> int:
    failures = 0
    with tempfile.TemporaryDirectory() as place:
        empty = Path(place) / "empty"
        empty.mkdir()
        for threads in (1, 2):
            linked, kept = (Path(place) / f"{name}-{threads}.npz" for name in ("linked", "kept"))
            with_linker, without = run(linked, threads, None), run(kept, threads, empty)
            found = worst(kept, linked)
            noted = [NOTE in line for line in without.splitlines() if " 0 kernels compiled" not in line]
            bad = any(found.values()) or not noted or not all(noted) or NOTE in with_linker
            failures += bad
            print(f"{'FAILS' if bad else 'ok':6}{threads} threads: largest differences {found}")
            print("      " + without.strip().replace("\n", "\n      "), flush=True)
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())

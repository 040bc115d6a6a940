"""The commands of docs/own-models.md, run on a fresh machine: a new clone, a new environment, an empty folder.

    python tests/first_hour.py              # from this folder's commits
    python tests/first_hour.py --keep       # leave the folder for inspection, and print its name

The page is the script: its `python` blocks are saved as the files that it names, and the lines of its `sh` blocks run
in one shell, in order. The run stops at the first command that fails, with its exit status. Packages come from pip's
index, so this is not part of the tests; `tests/test_own_models.py` runs most of the commands in their environment.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "own-models.md"
ANIMALS = ("cat", "dog", "bird", "fox")
CORPUS = (
    "\n".join(f"the {a} {verb} the {b}." for a in ANIMALS for verb in ("sees", "likes", "hears") for b in ANIMALS) * 4
)
FILES = {"python": ("models.py", "encoder.py", "classes.py", "use.py"), "jinja": ("out/chat_template.jinja",)}
PORT = "8080"
"""The port in the page's commands, replaced by a free one."""
SHELL = """\
set -euo pipefail
set -m  # so that a server in the background takes SIGINT
curl() { command curl --silent --show-error --fail-with-body --retry 60 --retry-delay 1 --retry-connrefused "$@"; }
"""


def steps() -> Iterator[tuple[str, str]]:
    """Yield the steps of the page: ("sh", a command line), or (a file's name, its text)."""
    count = dict.fromkeys(FILES, 0)
    for match in re.finditer(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        language, text = match[1], match[2]
        if language == "sh":
            yield from (("sh", line) for line in text.splitlines())
        else:
            yield FILES[language][count[language]], text
            count[language] += 1


def script(port: int) -> str:
    """Return the page as one shell script. A server runs in the background until the next request is answered."""
    lines = [SHELL]
    for kind, text in steps():
        if kind != "sh":
            lines.append(f"cat > {shlex.quote(kind)} <<'END_OF_FILE'\n{text}END_OF_FILE")
            continue
        command = text.replace(f" {PORT}", f" {port}").replace(f":{PORT}", f":{port}")
        if command.startswith(("treadle serve", "curl")) and not shutil.which("curl"):
            lines.append(f"echo {shlex.quote('not run without curl: ' + command)}")
            continue
        lines.append(f"echo {shlex.quote('$ ' + command)}")
        if command.startswith("treadle serve"):
            lines.append(f"{command} & server=$!")
        elif command.startswith("treadle chat"):
            lines.append(f"echo 'the cat' | {command}")
        else:
            lines.append(command)
        if command.startswith("curl"):
            lines.append("kill -INT $server; wait $server")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="leave the folder, and print its name")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="first-hour-"))
    (folder / "corpus.txt").write_text(CORPUS, encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        text = script(free.getsockname()[1])
    outside = ("PYTHONPATH", "VIRTUAL_ENV", "TREADLE_BACKEND")
    environment = {name: value for name, value in os.environ.items() if name not in outside}
    environment["REPOSITORY"] = str(ROOT)
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    start = time.monotonic()
    try:
        done = subprocess.run(["bash", "-c", text], cwd=folder, env=environment)
    finally:
        if options.keep:
            print(folder)
        else:
            shutil.rmtree(folder)
    count = sum(kind == "sh" for kind, _ in steps())
    print(f"{count} commands of docs/{PAGE.name}: exit status {done.returncode} after {time.monotonic() - start:.0f} s")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())

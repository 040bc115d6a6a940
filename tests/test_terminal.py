"""Output as a user sees it, on a terminal of 80 columns and in a pipe.

Most commands are forked from a process that has loaded Treadle (tests/forked_commands.py).
"""

from __future__ import annotations

import ast
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from fcntl import ioctl
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile
from types import SimpleNamespace
from typing import Any

import pytest
from typer.main import get_command

from tests.forked_commands import ForkedPython
from treadle import progress
from treadle.cli import app
from treadle.cli.completing import complete_model
from treadle.fetching import fetched_model
from treadle.fitting import fit_code, fit_error, fit_graph, fit_prose
from treadle.ir.text.parser import parse_graph
from treadle.passes.framework.manager import PassManager
from treadle.passes.pipelines import DEFAULT
from treadle.progress import counting, downloading, working
from treadle.reporting.tables import phrases
from treadle.resolving import resolve

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 80


def environment(**more: str) -> dict[str, str]:
    """Return a user's environment, without variables that set the output's width, colours or buffering."""
    ours = ("COLUMNS", "TREADLE_CERTIFY", "TREADLE_DEBUG", "NO_COLOR", "FORCE_COLOR", "PYTHONUNBUFFERED")
    known = {k: v for k, v in os.environ.items() if k not in ours}
    return {**known, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", **more}


@cache
def forked() -> ForkedPython:
    """Return the process from which commands are forked. It ends with this process."""
    return ForkedPython(environment())


def on_terminal(*words: str, cwd: Path = ROOT, typed: str | None = None) -> tuple[int, str]:
    """Run Python on a terminal of 80 columns; return the exit code and all output.

    typed  text typed on the terminal, which is then standard input, too
    """
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, WIDTH, 0, 0))

    def read() -> bytes:
        said = b""
        with suppress(OSError):  # Linux's error when the other side is closed
            while data := os.read(ours, 1 << 16):
                said += data
        return said

    with ThreadPoolExecutor(1) as pool:
        said = pool.submit(read)
        os.write(ours, (typed or "").encode())
        with open(os.devnull) as nothing:
            stdin = nothing.fileno() if typed is None else theirs
            code = forked().run(words, environment(), cwd, stdin, theirs, theirs)
        os.close(theirs)
    os.close(ours)
    return code, said.result().decode().replace("\r\n", "\n")


def seen(said: str) -> list[str]:
    """Return the lines without colours, and without progress lines that were erased again."""
    left = re.sub(r"[^\n]*\n\x1b\[\?25h\r\x1b\[1A\x1b\[2K", "", said)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", left).split("\n")


def piped(*words: str, cwd: Path = ROOT, **more: str) -> subprocess.CompletedProcess[str]:
    """Run Python with its output in files."""
    with open(os.devnull) as nothing, TemporaryFile("w+b") as out, TemporaryFile("w+b") as errors:
        streams = [file.fileno() for file in (nothing, out, errors)]
        code = forked().run(words, environment(**more), cwd, *streams)
        for file in (out, errors):
            file.seek(0)
        return subprocess.CompletedProcess(words, code, out.read().decode(), errors.read().decode())


# -- width -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [[], ["--source"], ["--follow", "S"]])
def test_inspect_fits_80_columns_and_a_pipe_gets_lines_whole(more: list[str]) -> None:
    words = ["inspect", "bert", *more]
    code, said = on_terminal("-m", "treadle", *words)
    rows = seen(said)
    whole = piped("-m", "treadle", *words)
    assert code == whole.returncode == 0
    assert max(map(len, rows)) <= WIDTH
    assert max(map(len, whole.stdout.split("\n"))) > WIDTH
    assert whole.stderr == ""
    if "--source" in words:
        ast.parse("\n".join(rows))
    elif "--follow" not in words:
        assert parse_graph("\n".join(rows)) == parse_graph(whole.stdout)


def test_explain_fits_80_columns() -> None:
    code, said = on_terminal("-m", "treadle", "explain", "bert", "fusion")
    assert code == 0
    assert max(map(len, seen(said))) <= WIDTH


@pytest.mark.parametrize("name", ["t5", "whisper", "clip"])
@pytest.mark.parametrize("width", [50, 80])
def test_a_graph_that_is_fitted_is_the_same_graph(name: str, width: int) -> None:
    graph = PassManager(DEFAULT).run(resolve(name).graph).graph
    text = fit_graph(str(graph), width)
    assert parse_graph(text) == graph
    if width == WIDTH:
        assert max(map(len, text.split("\n"))) <= WIDTH


def test_scopes_and_lines_give_way_before_types() -> None:
    line = 'x = add(a, "#  b")   # f32[B, S]  model.py:3  h.0.mlp'
    assert fit_code(line, 60) == line
    assert fit_code(line, 45) == 'x = add(a, "#  b")   # f32[B, S]  model.py:3'
    assert fit_code(line, 40) == 'x = add(a, "#  b")   # f32[B, S]'
    assert fit_code(line, 25) == 'x = add(a, "#  b")'
    # at its full width with this many columns; with one column less, one column of the table is dropped
    for width in (53, 44, 32):
        assert len(fit_code(line, width)) == width
        assert len(fit_code(line, width - 1)) < width - 1
    lines = "a = f(x)   # f32[B]  m.py:1\nbbb = g(y)   # f32[B, S]  m.py:2  h.0\nc(z)   # here"
    whole = "a = f(x)     # f32[B]     m.py:1\nbbb = g(y)   # f32[B, S]  m.py:2  h.0\nc(z)         # here"
    assert fit_code(lines, 37) == whole
    assert fit_code(lines, 36) == whole.replace("  h.0", "")
    assert fit_code(lines, 21) == "a = f(x)   # f32[B]\nbbb = g(y)\nc(z)   # here"


def test_lines_are_broken_between_arguments_and_never_in_a_text_or_a_type() -> None:
    assert fit_code("y = f(aaaa, bbbb, g(cccc, dddd))", 20) == "y = f(aaaa, bbbb,\n    g(cccc, dddd))"
    text = 'y = f("a long text, with commas in it")'
    assert fit_code(text, 20) == text
    assert fit_graph("a = f(x: f32[B, S, 8], y: i64[B])", 24) == "a = f(x: f32[B, S, 8],\n    y: i64[B])"
    assert fit_code("x = aaaa + bbbb + cccc", 10) == "x = aaaa + bbbb + cccc"
    assert fit_code("x = f(aaaa + bbbb + cccc)", 14) == "x = f(aaaa +\n    bbbb +\n    cccc)"
    deep = "x = f(g(h(k(aaaa, b))))"
    assert fit_code(deep, 20) == "x = f(g(h(k(aaaa,\n    b))))"
    assert fit_graph(deep, 20) == deep
    assert fit_graph("x = f(g(aaaa, b), c)", 17) == "x = f(g(aaaa, b),\n    c)"
    assert fit_graph("f(aaaa,\n      bbbb)", 13) == "f(aaaa, bbbb)"
    weights = "  weights a: f32[2, 3], b: f32[4]"
    assert fit_graph(weights, 24) == "  weights a: f32[2, 3],\n          b: f32[4]"
    assert fit_graph(weights.replace("weights ", ""), 16) == "  a: f32[2, 3],\n      b: f32[4]"
    assert fit_code("# a comment of words", 14) == "# a comment of\n#   words"
    assert fit_prose("  one two three", 9) == "  one two\n    three"
    assert fit_prose("one a/path/of/files two", 9) == "one\n  a/path/of/files\n  two"
    assert fit_prose("one averylongword a-long-name", 9) == "one\n  averylongword\n  a-long-name"


def test_lines_with_columns_are_broken_between_columns() -> None:
    row = "  h.0  f32[B, S]  read by the loss  models/m.py:3, scope h"
    assert fit_prose(row, 80) == row
    assert fit_prose(row, 40) == "  h.0  f32[B, S]  read by the loss\n    models/m.py:3, scope h"
    assert fit_prose(row, 20) == "  h.0  f32[B, S]\n    read by the loss\n    models/m.py:3,\n    scope h"
    assert fit_prose("one two  three", 9) == "one two\n  three"
    assert fit_prose("one two three  four", 9) == "one two\n  three\n  four"


def test_errors_continue_under_the_text_after_their_label() -> None:
    text = "what is wrong\n  received  x: f32[2]\n              of y\n  try       one of aaa, bbb, ccc, ddd, eee"
    assert fit_error(text, 80) == text
    assert fit_error(text, 32) == text.replace("bbb, ", "bbb,\n            ")
    path = "a/path/of/several/folders/that/is/long"
    assert fit_error(f"wrong\n  in        in {path}", 30) == f"wrong\n  in        in\n            {path}"


def test_errors_fit_80_columns_on_a_terminal_and_a_pipe_gets_lines_whole() -> None:
    words = ["-m", "treadle", "inspect", "gpt3"]
    code, said = on_terminal(*words)
    rows = seen(said)
    assert code == 2
    assert max(map(len, rows)) <= WIDTH
    assert len(rows) > 4, "the list of models takes several lines"
    whole = piped(*words).stderr
    assert max(map(len, whole.split("\n"))) > WIDTH
    assert " ".join(whole.split()) == " ".join(" ".join(rows).split())


def test_cells_are_not_broken_inside_brackets() -> None:
    from rich.console import Console

    out = Console(width=24)
    with out.capture() as said:
        out.print(phrases("hidden states [B, S, dim] of tokens [B, S], or [not closed"))
    rows = said.get().split("\n")
    assert rows[:3] == ["hidden states", "[B, S, dim] of tokens", "[B, S], or [not closed"]


def test_the_table_of_passes_and_of_arrays_break_no_cell() -> None:
    small = [word for each in ("layers=1", "dim=8", "heads=2") for word in ("--set", each)]
    code, said = on_terminal("-m", "treadle", "run", "gpt2", *small, "--backend", "numpy", "--input", "tokens=1,2")
    assert code == 0
    assert any("1 x 2 x 50257" in row for row in seen(said))
    code, said = on_terminal("-m", "treadle", "compile", "gpt2", *small, "--backend", "numpy")
    assert code == 0
    assert any("+1 activated_linear," in row for row in seen(said))


def test_tables_keep_paths_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from treadle.reporting.tables import console
    from treadle.reporting.zoo import zoo_tables

    path = str(tmp_path / ("a-long-folder-" * 12) / "model")
    facts = {"zoo": [], "fetched": [{"name": "minilm", "about": "a model", "download_bytes": 5, "path": path}]}
    for width in (80, 120):
        out = console()
        out.width = width
        with out.capture() as said:
            for each in zoo_tables(facts):
                out.print(each, soft_wrap=not hasattr(each, "columns"))
        assert path in said.get()


def test_a_row_of_items_goes_on_between_two_of_them() -> None:
    from rich.console import Console

    from treadle.reporting.tables import Items

    def rows(width: int, *items: str) -> list[str]:
        out = Console(width=width)
        with out.capture() as said:
            out.print(Items(items))
        return said.get().split("\n")[:-1]

    items = ("layers=12", "dim=768", "x=1", "y=2", "z=3", "last=4")
    assert rows(80, *items) == [", ".join(items)]
    assert rows(20, *items) == ["layers=12, dim=768,", "x=1, y=2, z=3,", "last=4"]
    assert rows(18, *items) == ["layers=12,", "dim=768, x=1, y=2,", "z=3, last=4"]
    assert rows(20) == [""]


def test_models_fits_80_columns_but_for_paths() -> None:
    code, said = on_terminal("-m", "treadle", "models")
    rows = [row for row in seen(said) if "/" not in row or "treadle fetch" in row]
    assert code == 0
    assert max(map(len, rows)) <= WIDTH
    assert any("layers=12," in row or "layers=12" in row for row in rows)
    assert not any(re.search(r"=,?\s*$", row) for row in rows), "a default is broken before its value"


def test_the_demo_fits_80_columns() -> None:
    """tests/test_embedding.py checks its content."""
    for name in ("minilm", "smollm2"):
        if fetched_model(name) is None:
            pytest.skip(f"{name} was not fetched: treadle fetch {name}")
    pytest.importorskip("tokenizers")
    pytest.importorskip("gguf")
    code, said = on_terminal("-m", "treadle.demo")
    rows = [row for row in seen(said) if not row.startswith("/")]  # paths are not shortened
    assert code == 0
    assert max(map(len, rows)) <= WIDTH
    assert not any("…" in row for row in rows if "─" in row), "a heading is cut"


# -- progress --------------------------------------------------------------------------------------------------

SLOW = """
import sys, time
from treadle.progress import working, downloading
with working("thinking hard", shown="--json" not in sys.argv):
    time.sleep(1.2)
with downloading("fetching it", 1000, shown="--json" not in sys.argv) as progress:
    progress(500)
    time.sleep(0.3)
with working("printing", shown="--json" not in sys.argv) as line:
    time.sleep(0.8)
    line("a line")
    line.describe("step 3 of [9]")
    time.sleep(0.3)
with working("never seen"):
    pass
print("done")
"""


def test_work_that_lasts_is_shown_on_a_terminal_and_taken_away() -> None:
    code, said = on_terminal("-c", SLOW)
    assert code == 0
    assert "thinking hard" in said
    assert "step 3 of [9]" in said
    assert "0.5/1.0 kB" in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said)
    assert "never seen" not in said
    assert [row for row in seen(said) if row.strip()] == ["a line", "done"]


def test_progress_is_not_printed_to_pipes_or_with_json() -> None:
    with ThreadPoolExecutor() as pool:
        to_files, as_json = pool.submit(piped, "-c", SLOW), pool.submit(on_terminal, "-c", SLOW, "--json")
    done = to_files.result()
    assert (done.stdout, done.stderr) == ("a line\ndone\n", "")
    assert as_json.result() == (0, "a line\ndone\n")


class Bar:
    """A stand-in for rich's progress bar, which records its updates."""

    def __init__(self, *columns: Any) -> None:
        self.calls: list[Any] = [tuple(type(each).__name__ for each in columns)]

    def add_task(self, what: str, total: int) -> int:
        self.calls.append((what, total))
        return 7

    def update(self, task: int, completed: int) -> None:
        self.calls.append((task, completed))

    def __enter__(self) -> None:
        self.calls.append("shown")

    def __exit__(self, *_: object) -> None:
        self.calls.append("gone")


@pytest.mark.parametrize(
    ("bar", "columns"),
    [
        (downloading, ("TextColumn", "BarColumn", "DownloadColumn", "TimeRemainingColumn")),
        (counting, ("TextColumn", "BarColumn", "MofNCompleteColumn", "TimeRemainingColumn")),
    ],
)
def test_a_bar_is_never_beyond_its_end(bar: Any, columns: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Bar] = []
    monkeypatch.setattr(progress, "_progress", lambda *columns: made.append(Bar(*columns)) or made[-1])
    monkeypatch.setattr(progress, "is_watched", lambda: True)
    with bar("a file", 9) as tell:
        tell(4)
        tell(10)
    assert made.pop().calls == [columns, ("a file", 9), "shown", (7, 4), (7, 9), "gone"]
    with bar("a file", 9, shown=False) as tell:
        tell(4)
    with counting("one thing", 1) as tell:
        tell(1)
    monkeypatch.setattr(progress, "is_watched", lambda: False)
    with bar("a file", 9) as tell:
        tell(4)
    assert not made


@pytest.mark.parametrize(("debug", "terminal", "watched"), [("", True, True), ("0", True, True), ("1", True, False)])
def test_progress_is_for_terminals_to_which_nothing_else_is_written(
    debug: str, terminal: bool, watched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TREADLE_DEBUG", debug)
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: terminal))
    assert progress.is_watched() == watched


def test_progress_is_erased_and_leaves_the_streams_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rich.progress.Progress", lambda *columns, **how: how)
    how: Any = progress._progress()
    assert how.pop("console").stderr
    assert how == {"transient": True, "redirect_stdout": False, "redirect_stderr": False}


def test_a_line_that_is_told_is_out_before_the_work_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    class Piped(io.StringIO):
        out = ""

        def flush(self) -> None:
            self.out = self.getvalue()

    stream = Piped()
    monkeypatch.setattr(sys, "stdout", stream)
    with working("thinking") as tell:
        tell("a line")
        assert stream.out == "a line\n"


def test_compiling_says_so(tmp_path: Path) -> None:
    lines = ["import time", "import treadle as t", "", "@t.model", 'def m(x: t.f32["B 2"]):', "    time.sleep(1.2)"]
    (tmp_path / "m.py").write_text("\n".join([*lines, '    return {"y": x * 2}', ""]), encoding="utf-8")

    wordings = [["compile"], ["inspect"], ["run", "--input", "x=1,2"], ["verify", "--backend", "numpy"]]
    commands = [["-m", "treadle", first, "m.py:m", *more] for first, *more in wordings]
    with ThreadPoolExecutor(3 * len(commands)) as pool:  # each call waits most of the time
        shown = [pool.submit(on_terminal, *command, cwd=tmp_path) for command in commands]
        as_json = [pool.submit(on_terminal, *command, "--json", cwd=tmp_path) for command in commands]
        to_files = [pool.submit(piped, *command, cwd=tmp_path) for command in commands]
    for each in shown:
        assert re.search(r"(compiling|optimizing|verifying) m\.py:m", each.result()[1])
    assert all("ing m.py:m" not in each.result()[1] for each in as_json)
    assert [each.result().stderr for each in to_files] == [""] * len(commands)


# -- readers that leave ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("inspect m.py:m", 0), ("compile m.py:m", 0), ("explain m.py:m fusion", 0), ("models", 0), ("--help", 0),
        ("inspect --help", 0), ("run m.py:m --input x=1,2", 0),
        ("inspect nosuch --json", 2), ("inspect --json", 2),
        ("explain m.py:m fusion --expect attention=1", 141), ("verify m.py:m --backend numpy", 141),
    ],
)  # fmt: skip
def test_a_reader_that_leaves_is_no_error(tmp_path: Path, words: str, code: int) -> None:
    text = 'import treadle as t\n\n\n@t.model\ndef m(x: t.f32["B 2"]):\n    return {"y": x * 2}\n'
    (tmp_path / "m.py").write_text(text, encoding="utf-8")
    reading, writing = os.pipe()
    os.close(reading)
    with open(os.devnull) as nothing, TemporaryFile("w+b") as errors:
        streams = nothing.fileno(), writing, errors.fileno()
        ended = forked().run(["-m", "treadle", *words.split()], environment(), tmp_path, *streams)
        errors.seek(0)
        assert not errors.read()
    os.close(writing)
    assert ended == code


# -- completion ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("treadle ins", {"inspect"}),
        ("treadle inspect --fol", {"--follow"}),
        ("treadle inspect gp", {"gpt2", "gpt_neox"}),
        ("treadle fetch minilm", {"minilm", "minilm-int8"}),
        ("treadle inspect gpt2 --backend to", {"torch"}),
    ],
)
def test_shells_complete(typed: str, expected: set[str], tmp_path: Path) -> None:
    variables = {"_TREADLE_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    done = piped("-c", "from treadle.cli import main; main()", cwd=tmp_path, **variables)
    assert set(done.stdout.split()) == expected, done.stderr


def test_every_model_backend_and_target_is_completed() -> None:
    commands: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
    found = Counter[str]()
    for name, command in commands.items():
        context = command.make_context(name, [], resilient_parsing=True)
        for parameter in command.params:
            known = {"MODEL": ("gpt", "gpt2"), "--backend": ("to", "torch"), "--target": ("cu", "cuda")}
            for key in (str(parameter.metavar).rstrip("."), parameter.opts[0]):
                if key in known:
                    begun, whole = known[key]
                    offered = [each.value for each in parameter.shell_complete(context, begun)]
                    assert whole in offered, f"{name} {parameter.opts[0]}"
                    found[whole] += 1
    assert min(found[name] for name in ("gpt2", "torch", "cuda")) > 10


def test_paths_to_models_are_offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Completion offers names, folders that may lead to a model, and files that are models."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt").mkdir()
    for name in ("gp[1].treadle", "gp.gguf", "gp.onnx", "gp.py", "gp.txt", "other.onnx"):
        (tmp_path / name).touch()
    names = ["gpt2", "gpt_neox"]
    assert complete_model("gp") == [*names, "gp.gguf", "gp.onnx", "gp.py", "gp[1].treadle", "gpt/"]
    assert complete_model("gp[") == ["gp[1].treadle"]


def test_the_script_for_a_shell_can_be_shown() -> None:
    command = f'"{sys.executable}" -m treadle --show-completion; true'  # bash finds its own function above
    done = subprocess.run(["bash", "-c", command], env=environment(), capture_output=True, encoding="utf-8", check=True)
    assert "_TREADLE_COMPLETE=complete_bash" in done.stdout


# -- errors of usage -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "what", "hint"),
    [
        (["inspect", "--json"], "Missing argument 'MODEL'", "treadle inspect --help"),
        (["compile", "gpt2", "--nosuch", "--json"], "No such option: --nosuch", "treadle compile --help"),
        (["nosuch", "--json"], "No such command 'nosuch'", "treadle --help"),
        (["compile", "gpt2", "--seed", "x", "--json"], "Invalid value for '--seed'", "treadle compile --help"),
    ],
)
def test_an_error_of_usage_is_json_too(words: list[str], what: str, hint: str) -> None:
    import json

    done = piped("-m", "treadle", *words)
    assert (done.returncode, done.stderr) == (2, "")
    error = json.loads(done.stdout)["error"]
    assert what in error["what"]
    assert error["try"] == hint
    assert piped("-m", *hint.split()).returncode == 0


def test_a_reader_of_errors_that_leaves_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    for words in (["inspect", "nosuch"], ["inspect"]):
        command = [sys.executable, "-m", "treadle", *words]
        assert subprocess.run(command, stdout=writing, stderr=writing, env=environment(), check=False).returncode == 2
    os.close(writing)

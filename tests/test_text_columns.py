"""Texts in columns of tables: CSV, TSV, Parquet and .jsonl files, their errors, and the commands that read them."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest

from tests.command_line import commands_in
from treadle.ir.errors import CheckpointError, FrontendError, TreadleError, UsageError
from treadle.program import text_files
from treadle.program.given_texts import read_documents, read_sentences
from treadle.program.text_files import read_column

ROWS = ["Plain.", 'Said "so", and left;\nthen came back.', "", "Käse\u2028here", "long " * 40_000]


def write_csv(path: Path, names: list[str], rows: list[list[str]], separator: str = ",") -> str:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=separator).writerows([names, *rows])
    return str(path)


def write_parquet(path: Path, names: list[str], rows: list[list[object]]) -> str:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({name: [row[i] for row in rows] for i, name in enumerate(names)}), path)
    return str(path)


def in_format(path: Path, ending: str, names: list[str], rows: list[list[str]]) -> str:
    """Write a table in the format of a file's ending; return the file's name."""
    file = path / f"table{ending}"
    if ending == ".parquet":
        return write_parquet(file, names, [list(row) for row in rows])
    if ending == ".jsonl":
        lines = [json.dumps(dict(zip(names, row, strict=True))) for row in rows]
        file.write_text("\n".join(lines), encoding="utf-8")
        return str(file)
    return write_csv(file, names, rows, "\t" if ending == ".tsv" else ",")


@pytest.mark.parametrize("ending", [".csv", ".CSV", ".tsv", ".parquet", ".jsonl"])
@pytest.mark.parametrize(
    ("names", "column"), [(["id", "text"], None), (["id", "body"], "body"), (["text", "text 2"], "text 2")]
)
def test_a_row_is_a_text(ending: str, names: list[str], column: str | None, tmp_path: Path) -> None:
    file = in_format(tmp_path, ending, names, [[str(i), text] for i, text in enumerate(ROWS)])
    assert read_column(file, column) == ROWS
    assert read_documents([file], column) == [text for text in ROWS if text]
    assert read_sentences([], file, column) == [text.strip() for text in ROWS if text]


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".parquet"])
def test_an_only_column_needs_no_name(ending: str, tmp_path: Path) -> None:
    assert read_column(in_format(tmp_path, ending, ["review"], [["Good."], ["Bad."]]), None) == ["Good.", "Bad."]


def test_a_byte_order_mark_is_no_part_of_a_column_s_name(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("text,id\nHello,1\n", encoding="utf-8-sig")
    assert read_column(str(file), "text") == ["Hello"]


def test_other_files_are_no_tables(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text,id\nHello,1\n")
    assert read_column(str(tmp_path / "a.txt"), None) is None
    with pytest.raises(UsageError, match="only tables have columns") as caught:
        read_column(str(tmp_path / "a.txt"), "text")
    (tmp_path / "a.txt").rename(tmp_path / "a.csv")
    assert (caught.value.hint or "").startswith("leave column= out") and ".csv" in (caught.value.hint or "")
    assert read_column(str(tmp_path / "a.csv"), "text") == ["Hello"]
    with pytest.raises(UsageError, match="a column is a column of a file"):
        read_sentences(["A sentence."], None, "text")


BAD: dict[str, tuple[str, str | None, type[TreadleError], str, str]] = {
    "no such column": ("id,body\n1,x\n", None, UsageError, "the table has no column text", "id, body"),
    "another name": ("id,body\n1,x\n", "Body", UsageError, "the table has no column Body", "id, body"),
    "two of one name": ("text,text\n1,x\n", None, UsageError, "the table has several columns text", "text, text"),
    "empty": ("", None, UsageError, "the table has no column text", "no columns"),
    "a short row": ("id,text\n1,x\n\n2\n", None, UsageError, "another number of values", "1 values, 2 columns"),
    "a long row": ("id,text\n1,x, y\n", None, UsageError, "another number of values", "3 values, 2 columns"),
    "an open quote": ('id,text\n1,"x\n', None, CheckpointError, "the table is damaged", "end of data"),
    "a stray quote": ('id,text\n1,"x"y\n', None, CheckpointError, "the table is damaged", "expected after"),
    "control characters": ("a\x1b[2J,b\n1,x\n", None, UsageError, "the table has no column text", r"'a\x1b[2J', b"),
}


@pytest.mark.parametrize("name", BAD)
def test_tables_that_have_no_texts(name: str, tmp_path: Path) -> None:
    content, column, kind, what, received = BAD[name]
    file = tmp_path / "a.csv"
    file.write_text(content, newline="")
    before = csv.field_size_limit()
    with pytest.raises(kind, match=what) as caught:
        read_column(str(file), column)
    assert received in (caught.value.received or "")
    assert str(file) in (caught.value.within or "")
    assert csv.field_size_limit() == before


def test_the_column_of_a_hint_is_read(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "a.csv", ["id", "body"], [["1", "Hello"]])
    with pytest.raises(UsageError) as caught:
        read_column(file, None)
    assert getattr(caught.value.hint, "command", "") == "--column with the name of the column of texts"
    (name,) = [each for each in str(caught.value.received).removeprefix("columns ").split(", ") if each != "id"]
    assert read_column(file, name) == ["Hello"]


def test_a_line_break_in_a_value_counts_for_the_line_of_an_error(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text('text,id\n"one\ntwo",1\nthree\n')
    with pytest.raises(UsageError) as caught:
        read_column(str(file), None)
    assert caught.value.within == f"{file}, line 4"


def test_the_limit_on_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Parquet file may be far smaller than its texts: equal texts are stored once."""
    file = write_parquet(tmp_path / "a.parquet", ["text"], [["x" * 1000]] * 10_000)
    assert Path(file).stat().st_size < 100_000
    monkeypatch.setattr(text_files, "TEXT_BYTES", 1_000_000)
    with pytest.raises(UsageError, match="longer than the limit"):
        read_column(file, None)


def test_parquet_files_that_have_no_texts(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", ["id", "body", "nothing"], [[1, "x", None], [2, None, None]])
    assert read_column(file, "body") == ["x", ""]
    with pytest.raises(UsageError, match="the table has no column text") as caught:
        read_column(file, None)
    assert caught.value.received == "columns id, body, nothing"
    with pytest.raises(UsageError, match="the column id has no texts") as caught:
        read_column(file, "id")
    assert caught.value.received == "int64"
    data = Path(file).read_bytes()
    for spoilt in (b"", b"PAR1", data[: len(data) // 2], b"text,id\nHello,1\n"):
        Path(file).write_bytes(spoilt)
        with pytest.raises(CheckpointError, match="the table is damaged"):
            read_column(file, "body")
    with pytest.raises(CheckpointError, match="the file does not exist"):
        read_column(str(tmp_path / "none.parquet"), None)


def test_parquet_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setattr(text_files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FrontendError, match="reading Parquet files needs the package pyarrow") as caught:
        read_column(str(tmp_path / "a.parquet"), None)
    assert "pip install pyarrow" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("classify gpt2 notes.txt --top 2", "treadle classify gpt2 --file notes.txt --top 2"),
        ("embed gpt2 a notes.txt", "--file notes.txt, without other texts"),
        ("generate gpt2 notes.txt --tokens 2", '"$(cat notes.txt)" in its place'),
    ],
)
def test_the_name_of_a_file_is_not_taken_for_a_text(
    words: str, hint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notes.txt").write_text("A text.\n", encoding="utf-8")
    said = commands_in(tmp_path, capsys, monkeypatch)(*words.split())
    assert said.code == 2
    assert "the text is the name of a file" in said.err and hint in " ".join(said.err.split())


def test_a_text_that_looks_like_the_name_of_a_file_is_a_text(tmp_path: Path) -> None:
    texts = [str(tmp_path / "notes.txt"), "Mr. Smith"]
    assert read_sentences(texts, None) == texts

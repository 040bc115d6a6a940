"""Values of command line options: JSON, words of the DSL and texts, sizes and limits, numbers, sentences."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import treadle.frontends.language as t
from treadle.explaining.fusion import parse_expected
from treadle.ir.builder import Builder
from treadle.ir.errors import FrontendError, UsageError
from treadle.ir.graph import Graph
from treadle.ir.sizing.size_bounds import Bounds
from treadle.program import text_files
from treadle.program.budgets import choose_sizes, parse_bytes
from treadle.program.flag_values import (
    input_names,
    parse_axes,
    parse_config,
    parse_inputs,
    parse_limits,
    parse_sizes,
)
from treadle.program.given_texts import read_sentences
from treadle.program.option_table import declared_options


def refusal(call: Callable[[], Any]) -> UsageError:
    with pytest.raises(UsageError) as caught:
        call()
    return caught.value


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("layers=2", 2),
        (" layers = 2 ", 2),
        ("eps=1e-5", 1e-5),
        ("tied=true", True),
        ("mask=null", None),
        ("shape=[1, 2]", [1, 2]),
        ("act=t.relu", t.relu),
        ("head=masked_lm", "masked_lm"),
        ("act=t.relu()", "t.relu()"),
        ("name=a=b", "a=b"),
        ("deep=" + "[" * 100_000, "[" * 100_000),
    ],
)
def test_a_value_is_json_or_a_word_or_else_a_text(assignment: str, value: object) -> None:
    name = assignment.partition("=")[0].strip()
    assert parse_config([assignment], ()) == {name: value}


def test_limits_are_positive_integers() -> None:
    assert parse_limits(["nodes=7", "work=10"]) == {"nodes": 7, "work": 10}
    assert parse_limits([]) is None
    for value in ("0", "00", "-1", "1.5", "x", "1_000", "\u0661"):
        error = refusal(lambda: parse_limits([f"nodes={value}"]))  # noqa: B023
        assert (error.what, error.received) == ("the limit nodes must be a positive integer", value)
    error = refusal(lambda: parse_limits([f"nodes={10**18}"]))
    assert (error.what, error.received) == ("the limit nodes is larger than the maximum", str(10**18))
    assert error.hint == f"--limit nodes={10**18 - 1}, or less"
    assert parse_limits([f"nodes={'9' * 18}"]) == {"nodes": 10**18 - 1}


def test_an_option_of_compilation_is_no_option_of_a_model() -> None:
    for name in declared_options():
        error = refusal(lambda: parse_config([f"{name}=x"], declared_options()))  # noqa: B023
        assert (error.what, error.option) == (f"--set {name}= is not part of a model's configuration", name)
    assert parse_config(["recipe=dp"], declared_options()) == {"recipe": "dp"}


def test_an_unknown_word_names_no_line_of_a_file() -> None:
    with pytest.raises(FrontendError, match="the DSL has no 'relo'") as caught:
        parse_config(["act=t.relo"], ())
    assert caught.value.source is None


@pytest.mark.parametrize(
    ("text", "received", "hint"),
    [
        ("ids", "ids", "--input ids=FILE.npy"),
        ("=2", "=2", "--input NAME=FILE.npy, with the name of an input"),
        ("ids=", "ids=", "--input ids=FILE.npy"),
        ("", "nothing", "--input NAME=FILE.npy, with the name of an input"),
    ],
)
def test_an_assignment_has_two_sides(text: str, received: str, hint: str) -> None:
    error = refusal(lambda: input_names([text]))
    assert (error.what, error.received) == ("an option must be NAME=VALUE", received)
    assert error.hint == hint


def test_a_configuration_has_the_constants_of_python() -> None:
    """`treadle models` prints them."""
    assert parse_config(["head=None", "tied=True", "bias=False", "act=Nones"], ()) == {
        "head": None,
        "tied": True,
        "bias": False,
        "act": "Nones",
    }


# -- sizes ---------------------------------------------------------------------------------------------------------


def test_sizes_are_positive_integers() -> None:
    assert parse_sizes("B=1, S=128") == {"B": 1, "S": 128}
    assert parse_sizes(None) == parse_sizes("") == {}
    for value in ("0", "-3", "x"):
        error = refusal(lambda: parse_sizes(f"S={value}"))  # noqa: B023
        assert (error.what, error.received) == ("the size of S must be a positive integer", value)
        assert parse_sizes(str(error.hint).removeprefix("--sizes ")) == {"S": 1}
    for value in (str(10**12), "9" * 5000):
        error = refusal(lambda: parse_sizes(f"S={value}"))  # noqa: B023
        assert error.what == "the size of S is larger than the maximum"
        assert parse_sizes(str(error.hint).removeprefix("--sizes ").removesuffix(", or less")) == {"S": 10**12 - 1}
    assert parse_sizes("S=08") == {"S": 8}
    assert parse_sizes(f"S={'9' * 12}") == {"S": 10**12 - 1}


def sized(**bounds: Bounds) -> Graph:
    b = Builder(Graph("sized"))
    b.outputs(y=b.input("x", "f32[B, S]") + b.input("z", "f32[S]"))
    for symbol, bound in bounds.items():
        b.graph.bound(symbol, bound)
    return b.graph


def test_a_size_that_is_not_asked_for_lies_within_bounds() -> None:
    """A leading axis gets 1, another 128; both symbols lead an input of `sized`, but only B leads below."""
    assert choose_sizes(sized(), {}) == {"B": 1, "S": 1}
    assert choose_sizes(sized(), {"S": 5}) == {"B": 1, "S": 5}
    assert choose_sizes(sized(B=Bounds(3, 8)), {}) == {"B": 3, "S": 1}
    b = Builder(Graph("g"))
    b.outputs(y=-b.input("x", "f32[B, S]"))
    assert choose_sizes(b.graph, {}) == {"B": 1, "S": 128}
    b.graph.bound("S", Bounds(1, 40))
    assert choose_sizes(b.graph, {}) == {"B": 1, "S": 40}
    b.graph.bound("S", Bounds(20, 40))
    for size in (19, 41):
        error = refusal(lambda: choose_sizes(b.graph, {"S": size}))  # noqa: B023
        assert (error.what, error.within, error.hint) == (f"the size of S cannot be {size}", "g", "20 <= S <= 40")


def test_a_symbol_that_there_is_not() -> None:
    error = refusal(lambda: choose_sizes(sized(), {"B": 1, "Q": 2, "R": 3}))
    assert (error.what, error.hint) == ("sized has no symbolic axis Q, R", "one of B, S")
    b = Builder(Graph("fixed"))
    b.outputs(y=-b.input("x", "f32[2]"))
    assert refusal(lambda: choose_sizes(b.graph, {"Q": 2})).hint == "no sizes: all axes have fixed sizes"


# -- numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "rank", "value"),
    [
        ("1,2,3", 1, [1, 2, 3]),
        ("1,2,3", 2, [[1, 2, 3]]),
        ("7", 3, [[[7]]]),
        ("7", 0, 7),
        ("0.5,-1e3", 2, [[0.5, -1000.0]]),
        ("[1, 2]", 1, [1, 2]),
        ("[[1, 2], [3, 4]]", 2, [[1, 2], [3, 4]]),
    ],
)
def test_numbers_without_brackets_are_a_row(text: str, rank: int, value: object) -> None:
    assert parse_inputs([f"x={text}"], {"x": rank}) == {"x": value}


def test_lists_of_too_few_axes_are_refused_with_the_brackets_that_they_lack() -> None:
    error = refusal(lambda: parse_inputs(["x=[1, 2]"], {"x": 3}))
    assert (error.what, error.hint) == ("input x must have rank 3, has rank 1", "--input x=[[[1, 2]]]")
    assert parse_inputs([str(error.hint).removeprefix("--input ")], {"x": 3}) == {"x": [[[1, 2]]]}


def test_rows_of_different_lengths_lead_to_the_input_of_lengths() -> None:
    error = refusal(lambda: parse_inputs(["x=[[1,2],[3]]"], {"x": 2}))
    assert error.what == "the rows of input x differ in length" and "--input lengths=2,1" in str(error.hint)


@pytest.mark.parametrize("value", ["1,2,3", "[[1,2]]", "some.npy"])
def test_a_value_without_a_name_is_kept_in_the_hint(value: str) -> None:
    assert refusal(lambda: input_names([value])).hint == f"--input NAME={value}, with the name of an input"


def test_a_text_as_an_input_leads_to_the_commands_for_texts() -> None:
    assert "treadle generate" in str(refusal(lambda: parse_inputs(["x=a cat"], {"x": 2})).hint)


def test_an_input_of_unknown_rank_has_one_axis() -> None:
    assert parse_inputs(["x=1,2"], {}) == {"x": [1, 2]}


def test_a_file_of_numbers(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(6).reshape(2, 3))
    made = parse_inputs([f"x={tmp_path / 'x.npy'}", "y=1"], {"x": 2, "y": 1})
    assert made["x"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert made["y"] == [1]


@pytest.mark.parametrize(
    "text", ["1,x", "[1,", "[" * 100_000, "1," * 2**19 + "1"], ids=["word", "open", "deep", "long"]
)
def test_nonnumeric_values_are_shown_in_part(text: str) -> None:
    error = refusal(lambda: parse_inputs([f"x={text}"], {"x": 1}))
    assert error.what == "input x is neither a .npy file nor numbers"
    assert error.hint == "--input x=FILE.npy, x=1,2,3 or x=[[1,2],[3,4]]"
    assert len(str(error)) < 500


@pytest.mark.parametrize("text", ["1 2 3", "[[1 2 3] [3 4 -5]]", "[[1 2], [3 4]]", "1.5  -2"])
def test_spaces_between_numbers_lead_to_commas(text: str) -> None:
    """The hint is followed, also for an input with more axes than a row."""
    for rank in (1, 2) if text[0] != "[" else (2,):
        hint = str(refusal(lambda: parse_inputs([f"x={text}"], {"x": rank})).hint)  # noqa: B023
        flag, value = hint.split()
        made = parse_inputs([value], {"x": rank})
        assert flag == "--input" and np.ndim(made["x"]) == rank
        shown = str(refusal(lambda: parse_inputs([text], {"x": rank})).hint)  # noqa: B023
        named = shown.removeprefix("--input ").removesuffix(", with the name of an input").replace("NAME", "x")
        assert parse_inputs([named], {"x": rank}) == made


def test_numbers_in_the_command_are_at_most_a_mebibyte() -> None:
    text = "1," * (2**19 - 2) + "1"
    assert len(parse_inputs([f"x={text}1"], {"x": 1})["x"]) == 2**19 - 1  # 2**20 characters, brackets included
    assert str(2**20 + 1) in str(refusal(lambda: parse_inputs([f"x={text}11"], {"x": 1})))


# -- sentences -----------------------------------------------------------------------------------------------------


class Input(io.StringIO):
    """A stand-in for standard input: a terminal, or piped bytes."""

    def __init__(self, data: bytes | None) -> None:
        super().__init__()
        self.data = data

    def isatty(self) -> bool:
        return self.data is None

    @property
    def buffer(self) -> io.BytesIO:
        return io.BytesIO(self.data or b"")


def test_sentences_are_given_or_are_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "s.txt"
    file.write_bytes("eins \n\n  zwölf\r\n".encode())
    assert read_sentences(["one", " two "], None) == ["one", " two "]
    assert read_sentences([], str(file)) == ["eins", "zwölf"]
    monkeypatch.setattr(sys, "stdin", Input(b"a\n b \n"))
    assert read_sentences([], None) == read_sentences([], "-") == ["a", "b"]


@pytest.mark.parametrize(
    ("data", "what", "received"),
    [
        (b"", "there is no sentence", "no line of text"),
        (b" \n\n", "there is no sentence", "no line of text"),
        (b"a\xff", "the text is not UTF-8", "byte 1"),
        (b"a" * 11, "the text is longer than the limit", "limit 10 bytes"),
    ],
)
def test_invalid_sentences(data: bytes, what: str, received: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "TEXT_BYTES", 10)
    monkeypatch.setattr(sys, "stdin", Input(data))
    error = refusal(lambda: read_sentences([], None))
    assert (error.what, error.received, error.within) == (what, received, "standard input")


def test_a_terminal_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Input(None))
    error = refusal(lambda: read_sentences([], None))
    assert (error.what, error.hint) == ("there is no sentence", 'treadle embed minilm "A sentence."')
    assert refusal(lambda: read_sentences(["a"], "f")).received == "1 and --file f"


@pytest.mark.parametrize(
    ("memory", "hint"),
    [
        ("300kb", "300kB"),
        ("10K", "10kB"),
        ("2g", "2GB"),
        ("300 mb", "300MB"),
        ("1.5gib", "1.5GiB"),
        ("3tons", "3MB"),
        ("lots", "300MB"),
        (0, "300MB"),
    ],
)
def test_a_refused_memory_names_the_unit_that_was_meant(memory: int | str, hint: str) -> None:
    error = refusal(lambda: parse_bytes(memory))
    assert error.hint is not None and error.hint.startswith(f'memory="{hint}"; units are')
    assert parse_bytes(hint)


@pytest.mark.parametrize(
    ("memory", "count"),
    [
        ("1", 1), (1, 1), (" 2 kB ", 2000), ("10KB", 10_000), ("3 KiB", 3072), ("0.5GiB", 2**29),
        ("1.123456MB", 1_123_456), ("2GB", 2 * 10**9), ("9" * 15, 10**15 - 1), (None, None),
    ],
)  # fmt: skip
def test_memory_in_bytes(memory: int | str | None, count: int | None) -> None:
    assert parse_bytes(memory) == count


@pytest.mark.parametrize("memory", ["0", "9" * 16, "1.1234567MB", "0.1B", -1, True, "-3MB"])
def test_memory_that_is_none(memory: int | str) -> None:
    assert refusal(lambda: parse_bytes(memory)).what == "memory must be a number of bytes"


def test_sizes_of_another_kind_are_refused() -> None:
    b = Builder(Graph("small"))
    b.outputs(y=b.relu(b.input("x", t.f32["B", 4])))
    assert choose_sizes(b.graph, {"B": np.int64(3)}) == {"B": 3}  # type: ignore[dict-item]
    b.graph.bound("B", Bounds(1, 6))
    assert refusal(lambda: choose_sizes(b.graph, {"B": 0})).hint == "1 <= B <= 6"
    error = refusal(lambda: choose_sizes(b.graph, {"B": "3"}))  # type: ignore[dict-item]
    assert (error.received, error.hint) == ("'B': '3'", "sizes={'B': 1}, or memory(B=1)")
    assert refusal(lambda: choose_sizes(b.graph, {"B": True})).received == "'B': True"
    assert refusal(lambda: choose_sizes(b.graph, [("B", 3)])).received == "[('B', 3)]"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "parse",
    [
        lambda texts: parse_config(texts, ()),
        parse_limits,
        parse_axes,
        input_names,
        parse_expected,
        lambda texts: parse_inputs(texts, {}),
        lambda texts: parse_sizes(",".join(texts)),
    ],
)
def test_a_name_has_one_value(parse: Callable[[list[str]], Any]) -> None:
    parse(["n=1", "m=1"])
    error = refusal(lambda: parse(["n=1", "m=1", " n=2"]))
    assert error.what.endswith(" has two values for n") and error.what.startswith("--")
    assert error.received == "n=1 and n=2"


def test_two_rows_of_an_input_are_one_value() -> None:
    hint = str(refusal(lambda: input_names(["tokens=1,2", "tokens=3,4"])).hint)
    assert parse_inputs([hint.partition("--input ")[2]], {"tokens": 2}) == {"tokens": [[1, 2], [3, 4]]}

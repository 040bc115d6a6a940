"""JSON from untrusted sources: accepted texts, and the reason and byte offset of each refusal."""

from __future__ import annotations

import json
import math

import pytest

from treadle.files.errors import CheckpointError
from treadle.files.strict_json import JsonReader, read_json_object

READ = [
    r'{"a": [1, -2, 0.5, 1e3, -0.25E-2, true, false, null], "b": {}, "c": [], " ": [[]]}',
    '\n\t\r {"a" : "x\\n\\u00e9\\ud83d\\ude00\\"" , "é\\\\": ""}\n ',
    f'{{"a": {2**64 - 1}, "b": {-(2**63)}, "c": {2**63 - 1}}}',
]


@pytest.mark.parametrize("text", READ)
def test_json_is_read_as_the_standard_library_reads_it(text: str) -> None:
    found = read_json_object(text.encode(), "a text", nesting=3, values=20)
    assert found == json.loads(text)
    assert str(found) == str(json.loads(text)), "of the same types, in the same order"


def test_words_that_python_writes_are_read() -> None:
    found = read_json_object(b'{"a": Infinity, "b": -Infinity, "c": NaN}', "a text", nesting=1, values=3)
    assert math.isnan(found.pop("c"))
    assert found == {"a": math.inf, "b": -math.inf}


@pytest.mark.parametrize(
    ("text", "what", "byte"),
    [
        (b"", "expected a JSON object", 0),
        (b"  [1]", "expected a JSON object", 2),
        (b'{"a": 1} x', "expected the end of the text", 9),
        (b'{"a": 1', "expected '}' or ',' after a member of an object", 7),
        (b'{"a": [1 2]}', "expected ']' or ',' after an item of an array", 9),
        (b'{"a" 1}', "expected ':' after a key", 5),
        (b"{a: 1}", "expected a key in quotes", 1),
        (b'{"a": 1,}', "expected a key in quotes", 8),
        (b'{"a": [1,]}', "expected a value", 9),
        (b'{"a": +1}', "expected a value", 6),
        (b'{"a": tru}', "expected a value", 6),
        (b'{"a": 01}', "expected '}' or ',' after a member of an object", 7),
        (b'{"a": 18446744073709551616}', "expected an integer of at most 64 bits", 6),
        (b'{"a": -9223372036854775809}', "expected an integer of at most 64 bits", 6),
        (b'{"a": 100000000000000000000000}', "expected an integer of at most 64 bits", 6),
        (b'{"a": 1, "b": 2, "a": 3}', "an object has a duplicate key", 17),
        (b'{"a": "b', "a string is not closed", 8),
        (b'{"a": "b\\', "a string is not closed", 9),
        (b'{"a": "b\tc"}', "a string holds a control character", 8),
        (b'{"a": "b\\x"}', "a string holds an invalid escape", 6),
        (b'{"a": "\\ud83d"}', "a string holds an invalid escape", 6),
        (b'{"a": "\xff"}', "the text is not UTF-8", 7),
        (b'{"a": [[[1]]]}', "objects and arrays are nested more than 3 deep", 8),
        (b'{"a": [1, 2, 3, 4, 5]}', "the text holds more values than the limit", 19),
    ],
)
def test_refusals_name_the_byte_offset(text: bytes, what: str, byte: int) -> None:
    with pytest.raises(CheckpointError) as error:
        read_json_object(text, "a text", nesting=3, values=5)
    assert (error.value.what, error.value.within) == (what, f"a text, byte {byte}")


@pytest.mark.parametrize(("text", "byte"), [(b'{"a": "\xff"}', "0xff"), (b'{"a": "\t"}', "0x09")])
def test_a_byte_that_is_no_character_is_shown(text: bytes, byte: str) -> None:
    with pytest.raises(CheckpointError) as error:
        read_json_object(text, "a text", nesting=1, values=1)
    assert error.value.received == f"byte {byte}"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (b" 0", 0),
        (b"9223372036854775807]", 2**63 - 1),
        *((text, None) for text in (b"9223372036854775808", b"1" * 20, b"-1", b"1.5", b"1e3", b'"1"', b"")),
    ],
)
def test_a_size_is_a_whole_number_in_digits_alone(text: bytes, size: int | None) -> None:
    reader = JsonReader(text, "a header", nesting=1, values=1, base=8)
    reader.place = "tensor w"
    if size is not None:
        assert reader.size("a length") == size
        return
    with pytest.raises(CheckpointError) as error:
        reader.size("a length")
    assert error.value.what.startswith("expected a length")
    assert error.value.within == "a header, byte 8, tensor w"


def test_null_is_passed_over() -> None:
    reader = JsonReader(b" null,nul", "a header", nesting=1, values=1)
    assert [reader.take_null(), reader.take(b","), reader.take_null()] == [True, True, False]
    assert reader.position == 6


def test_items_are_counted_from_0() -> None:
    reader = JsonReader(b"[7, 8, 9]", "a header", nesting=1, values=1)
    assert [(count, reader.size("a size")) for count in reader.items()] == [(0, 7), (1, 8), (2, 9)]

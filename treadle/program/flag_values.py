"""Parsers of command line values: `--set layers=2`, `--sizes B=1,S=128`, `--input tokens=1,2,3`.

A value is parsed as JSON, or else taken as a string. Nothing is evaluated as Python.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from treadle.files.shown_names import printable
from treadle.ir.errors import TreadleError, UsageError

_INLINE_BYTES = 1 << 20
_WORD = re.compile(r"t\.[A-Za-z]\w*")
_VALUE = re.compile(r"[\[\d-][\[\]\d.,\s-]*|[^=]+\.npy")
_MOST_SIZE = 10**12 - 1
_MOST_LIMIT = 10**18 - 1
_OF_PYTHON = {"None": None, "True": True, "False": False}
"""Constants as Python spells them, and as `treadle models` and errors show the values of a configuration."""
_INPUT = ("--input FILE.npy", "an input")
_ROWS = "one value; several rows are a list of lists: --input {name}=[[1,2],[3,4]]"


def inputs_of(text: str) -> tuple[str, ...]:
    """Return the names of optional inputs. Raises UsageError for a value of an input, which another option takes."""
    if "=" in text:
        raise UsageError(
            "--inputs has names of optional inputs", received=printable(text), hint=f"--input {text}, of treadle run"
        )
    return names_of(text)


def names_of(text: str) -> tuple[str, ...]:
    """Return the names in a list separated by commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def outputs_of(text: str) -> tuple[str, ...]:
    """Return the outputs in a list separated by commas. An output may be followed by a part in brackets: `hidden[:,
    0]`.
    """
    return tuple(name.strip() for name in re.split(r",(?![^\[\]]*\])", text) if name.strip())


def parse_config(assignments: Iterable[str], reserved: Collection[str]) -> dict[str, Any]:
    """Parse `layers=2`, `act=t.relu`, `head=masked_lm`. A value is JSON, None, True or False, a name of the DSL after
    `t.`, or else a string.

    reserved  names that are options of compilation

    Raises UsageError for a reserved name; the error's `option` is that name.
    """
    config: dict[str, Any] = {}
    for name, text in parse_assignments(assignments, "--set VALUE", "an option of the model").items():
        if name in reserved:
            raise UsageError(f"--set {name}= is not part of a model's configuration", option=name)
        config[name] = config_value(text if _WORD.fullmatch(text) else _json_or_text(text))
    return config


def config_value(value: Any) -> Any:
    """Return a value of a model's configuration that is stored as JSON: "t.relu" is a word of the DSL. Raises
    FrontendError if there is no such word.
    """
    return _word(value[2:]) if isinstance(value, str) and _WORD.fullmatch(value) else value


def as_json(value: Any) -> Any:
    """Return a value as JSON. A function of the DSL becomes text as on the command line, `t.relu`; other objects become
    their name.
    """
    if isinstance(value, Mapping):
        return {str(name): as_json(each) for name, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [as_json(each) for each in value]
    if value is None or isinstance(value, str | int | bool) or (isinstance(value, float) and math.isfinite(value)):
        return value
    name = getattr(value, "__name__", None)
    return f"t.{name}" if name is not None else str(value) if isinstance(value, float) else type(value).__name__


def config_texts(config: Mapping[str, Any]) -> list[str]:
    """Return a configuration as the values of --set: `layers=2`, `act=t.relu`."""
    values = {name: as_json(value) for name, value in config.items()}
    return [f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in values.items()]


def parse_limits(assignments: Iterable[str]) -> dict[str, int] | None:
    """Parse `nodes=400000`, limits on a file's contents. Raises UsageError for anything but positive integers."""
    limits = {}
    for name, value in parse_assignments(assignments, "--limit 400000", "a limit").items():
        limits[name] = _positive(f"the limit {name}", value, _MOST_LIMIT, f"--limit {name}", 400_000)
    return limits or None


def parse_sizes(text: str | None) -> dict[str, int]:
    """Parse `B=1,S=128`. Raises UsageError for anything but positive integers."""
    sizes = {}
    for name, value in parse_assignments(text.split(",") if text else (), "--sizes 1", "a symbolic axis").items():
        sizes[name] = _positive(f"the size of {name}", value, _MOST_SIZE, f"--sizes {name}", 1)
    return sizes


def _positive(what: str, text: str, most: int, option: str, example: int) -> int:
    """Return a positive integer up to `most`. Raises UsageError for other text, with the reason."""
    if re.fullmatch(r"0*[1-9][0-9]*", text, re.ASCII):
        digits = text.lstrip("0")
        if len(digits) <= len(str(most)) and int(digits) <= most:
            return int(digits)
        raise UsageError(
            f"{what} is larger than the maximum", received=printable(text), hint=f"{option}={most}, or less"
        )
    raise UsageError(f"{what} must be a positive integer", received=printable(text), hint=f"{option}={example}")


def parse_axes(assignments: Iterable[str]) -> dict[str, str]:
    """Parse `heads=tp`, `batch=dp tp`: axes of a model, each with the mesh axes that split it."""
    return parse_assignments(assignments, "--axis tp", "an axis of the model, such as heads")


def parse_inputs(assignments: Sequence[str], ranks: Mapping[str, int]) -> dict[str, Any]:
    """Parse `tokens=ids.npy`, `tokens=[[1, 2], [3, 4]]`, or `tokens=1,2,3`. The last form is one row: if the input has
    more axes, leading axes of size 1 are added.

    ranks  the number of axes of each known input

    Raises UsageError for a value in none of these forms, CheckpointError for a file that cannot be read.
    """
    inputs: dict[str, Any] = {}
    for name, text in parse_assignments(assignments, *_INPUT, _ROWS).items():
        if text.endswith(".npy"):
            from treadle.npy_files import read_npy

            inputs[name] = read_npy(text)
            continue
        leading = ranks.get(name, 1) - 1
        is_row = leading >= 0 and not text.startswith("[")
        value = _numbers(name, text, is_row)
        for _ in range(leading if is_row else 0):
            value = [value]
        shape = _shape(value)
        if shape is None:
            raise UsageError(
                f"the rows of input {name} differ in length",
                received=printable(text, 80),
                hint="shorter rows with any token at their end, and --input lengths=2,1, if the model has this input: "
                "the number of tokens of each row",
            )
        missing = ranks.get(name, 0) - len(shape)
        if missing > 0 and _VALUE.fullmatch(text):
            raise UsageError(
                f"input {name} must have rank {ranks[name]}, has rank {len(shape)}",
                received=printable(text, 80),
                hint=printable(f"--input {name}={'[' * missing}{text}{']' * missing}"),
            )
        inputs[name] = value
    return inputs


def _shape(value: Any) -> tuple[int, ...] | None:
    """Return the sizes of nested lists; None if lists of one level differ in their sizes."""
    if not isinstance(value, list):
        return ()
    inner = [_shape(each) for each in value] or [()]
    return None if inner[0] is None or any(each != inner[0] for each in inner) else (len(value), *inner[0])


def input_names(assignments: Iterable[str]) -> tuple[str, ...]:
    """Return the names to which values are assigned."""
    return tuple(parse_assignments(assignments, *_INPUT, _ROWS))


def parse_assignments(
    texts: Iterable[str], example: str, subject: str, several: str = "one value for each name"
) -> dict[str, str]:
    """Parse texts `NAME=VALUE` into values by name.

    example  the flag with an example of a value, for the hint of an error
    subject  what has such a name: "an input"
    several  the hint of the error for a name with two values; {name} is replaced

    Raises UsageError for any other form, and for a name with two values.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, _, value = (part.strip() for part in text.partition("="))
        if not name or not value:  # an ONNX file may call an axis `?` and an input `input.1`, so any name is accepted
            received = printable(text) if text else "nothing"
            flag, shown = example.split()
            name, shown = ("", _with_commas(text)) if _VALUE.fullmatch(text) else (name, shown)
            hint = f"{flag} {name}={shown}" if name else f"{flag} NAME={shown}, with the name of {subject}"
            raise UsageError("an option must be NAME=VALUE", received=received, hint=printable(hint))
        if name in found:
            raise UsageError(
                f"{example.split()[0]} has two values for {printable(name)}",
                received=" and ".join(printable(f"{name}={each}", 80) for each in (found[name], value)),
                hint=several.replace("{name}", printable(name)),
            )
        found[name] = value
    return found


def _word(name: str) -> Any:
    import treadle.frontends.language as language

    try:
        return getattr(language, name)
    except TreadleError as error:
        error.source = None  # the error does not refer to a line of a file
        raise


def _json_or_text(text: str) -> Any:
    if text in _OF_PYTHON:
        return _OF_PYTHON[text]
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _with_commas(text: str) -> str:
    """Return numbers with commas between them in place of spaces: `1 2 3` as `1,2,3`."""
    return re.sub(r"(?<=[\d.\],])\s+(?=[\d\[-])", ",", text.strip()).replace(",,", ",")


def _numbers(name: str, text: str, is_row: bool) -> Any:
    """Parse a number, nested lists of numbers, or a row of numbers without brackets."""
    content = f"[{text}]" if is_row else text
    try:
        if len(content) > _INLINE_BYTES:
            raise ValueError(f"{len(content)} characters")
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        has_words = re.search("[A-Za-z]{2}", text[:80]) is not None
        others = "; texts and images are for treadle generate, embed, classify, label, ..." if has_words else ""
        separated = _with_commas(text)
        meant = f"--input {name}={separated}" if separated != text and _VALUE.fullmatch(text) else None
        raise UsageError(
            f"input {name} is neither a .npy file nor numbers",
            received=f"{printable(text, 80)}: {error}",
            hint=meant or f"--input {name}=FILE.npy, {name}=1,2,3 or {name}=[[1,2],[3,4]]{others}",
        ) from None
    return value

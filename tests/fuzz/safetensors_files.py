"""Fuzzing the safetensors reader: a damaged file is refused with our error, or read as the library reads it.

    python -m tests.fuzz.safetensors_files [--count 10000] [--seed 0]

Half of the mutations know the format (they edit the header's fields, ranges and text), half flip, cut and
copy bytes at random. Each file is read whole by our reader and by the safetensors library. A mutation fails
the run if our reader raises anything but CheckpointError, accepts a file that the library refuses, reads another
name, shape or byte, or does more work than a multiple of the file's length. Exit status 1 if any fails.
"""

from __future__ import annotations

import json
import random
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.numpy import save

from tests.fuzz.campaign import Tally, options_of, scrambled
from treadle.frontends.safetensors_file import SafetensorsFile
from treadle.ir.errors import CheckpointError

# Limit on the reader's calls (Python and C) for a file: the cost of opening, and a number for each byte.
CALLS_BASE, CALLS_A_BYTE = 400, 3


def seeds() -> list[bytes]:
    """Return valid files, small enough that a mutation hits something: dtypes, scalars, empty tensors, metadata."""
    rng = np.random.default_rng(0)
    kinds = ["f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "c8"]
    every = {f"t.{kind}": rng.integers(0, 100, (2, 3)).astype(kind) for kind in kinds}
    every["mask"] = rng.integers(0, 2, (5,)).astype(bool)
    block = {
        f"h.{i}.{part}": rng.standard_normal(shape).astype(np.float32)
        for i in range(3)
        for part, shape in (("attn.weight", (4, 4)), ("attn.bias", (4,)), ("ln.weight", (4,)))
    }
    edges = {"scalar": np.array(3.5), "none": np.zeros((0, 7), np.float32), "one": np.ones(1, np.uint8)}
    halves = header_and_data({"w": {"dtype": "BF16", "shape": [3], "data_offsets": [0, 6]}}, bytes(range(6)), pad=1)
    return [
        save(every),
        save(block, {"format": "pt", "note": "caf\u00e9 \\ \" \n"}),
        save(edges, {}),
        save({}),
        halves,
    ]  # fmt: skip


def header_and_data(header: object, data: bytes, pad: int = 8) -> bytes:
    """Return a file with this header and these bytes; the header is padded with spaces to a multiple of `pad`."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % pad)
    return struct.pack("<Q", len(text)) + text + data


def split(file: bytes) -> tuple[dict[str, Any], bytes]:
    """Split a valid file into header and data."""
    (length,) = struct.unpack("<Q", file[:8])
    return json.loads(file[8 : 8 + length]), file[8 + length :]


def mutations(count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Yield `count` damaged files, each with a description of its damage; alternately by structure and at random."""
    rng = random.Random(seed)
    valid = seeds()
    for number in range(count):
        file = rng.choice(valid)
        mutate = by_structure if number % 2 == 0 else at_random
        yield mutate(rng, file)


_EDGES = (0, 1, 2**31, 2**32, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30)
ODD_NUMBERS: tuple[Any, ...] = (*_EDGES, -1, 1.0, 1e3, -0.0, float("nan"), float("inf"))
ODD_VALUES: tuple[Any, ...] = (None, True, "1", [], {}, [[]], {"a": {}}, "F32", "", 1, -0.5)
_WIDE = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL", "C64")
DTYPES = (*_WIDE, "F8_E4M3", "F8_E8M0", "F6_E2M3", "F4", "F128", "f32")
_ESCAPES = (b'"\\ud800"', b'"\\u0000"', b'"\\x"', b"\\", b'\\"' * 500, b'"a', b'"' * 50, b"'a'", b"\x00")
_BYTES = (b"\xff", b"\xef\xbb\xbf", b"\xc0\x80", b"[" * 300, b'{"a":' * 300, b"9" * 5000, b"}", b"]", b",,")
ODD_TEXT = (*_ESCAPES, *_BYTES, b"NaN", b"-", b"01", b"1e999", b"//", b" " * 3000)


def by_structure(rng: random.Random, file: bytes) -> tuple[str, bytes]:
    """Damage a field, a range or the header's text; sometimes two in a row."""
    header, data = split(file)
    names = [name for name in header if name != "__metadata__"]
    edits: list[Callable[[], bytes]] = [
        lambda: struct.pack("<Q", odd_length(rng, file)) + file[8:],
        lambda: file[: rng.randrange(len(file))],
        lambda: file + bytes(rng.choice((1, 2, 8, 4096))),
        lambda: header_and_data(insert(rng, json.dumps(header).encode(), rng.choice(ODD_TEXT)), data),
        lambda: header_and_data(rng.choice((b" ", b"\n", b"")) + json.dumps(header).encode() + b"  \n", data),
        lambda: header_and_data({**header, "__metadata__": rng.choice((*ODD_VALUES, {"k": 1}, {"k": "v"}))}, data),
        lambda: header_and_data(rng.choice(ODD_VALUES), data),
    ]
    if names:
        name = rng.choice(names)
        entry = header[name]
        other = rng.choice(names)

        def edited(**fields: Any) -> bytes:
            return header_and_data({**header, name: {**entry, **fields}}, data)

        def nudged(values: list[Any]) -> list[Any]:
            values = list(values)
            if values:
                at = rng.randrange(len(values))
                step = rng.choice((1, -1, 2, 8, -8))
                values[at] = values[at] + step if rng.random() < 0.5 else rng.choice(ODD_NUMBERS)
            return values

        def doubled() -> bytes:
            text = json.dumps({name: rng.choice((entry, header[other]))})[1:-1]
            return header_and_data(f"{json.dumps(header)[:-1]}, {text}}}".encode(), data)

        begin, end = entry["data_offsets"]
        edits += [
            lambda: edited(dtype=rng.choice(DTYPES)),
            lambda: edited(dtype=rng.choice(ODD_VALUES)),
            lambda: edited(shape=nudged(entry["shape"])),
            lambda: edited(shape=[*entry["shape"], rng.choice((*ODD_NUMBERS, *ODD_VALUES))]),
            lambda: edited(shape=[*entry["shape"], *[1] * rng.choice((1, 5, 30, 70))]),
            lambda: edited(shape=list(reversed(entry["shape"]))),
            lambda: edited(shape=[0, *([2**62] * rng.choice((1, 3)))], data_offsets=[begin, begin]),
            lambda: edited(shape=rng.choice(ODD_VALUES)),
            lambda: edited(data_offsets=nudged(entry["data_offsets"])),
            lambda: edited(data_offsets=[end, begin]),
            lambda: edited(data_offsets=[begin, end, end]),
            lambda: edited(data_offsets=rng.choice(ODD_VALUES)),
            lambda: edited(data_offsets=header[other]["data_offsets"]),
            lambda: edited(data_offsets=[begin + len(data), end + len(data)]),
            lambda: edited(strides=[1]),
            lambda: header_and_data(
                {**header, name: {k: v for k, v in entry.items() if k != rng.choice(("dtype", "shape"))}},
                data,
            ),
            lambda: header_and_data({k: v for k, v in header.items() if k != name}, data),
            lambda: header_and_data({**header, name: rng.choice(ODD_VALUES)}, data),
            lambda: header_and_data({**header, name + "\u202e\x1b[2J": entry}, data),
            lambda: header_and_data(dict(reversed(list(header.items()))), data, pad=1),
            doubled,
        ]
    at = rng.randrange(len(edits))
    mutated = edits[at]()
    if rng.random() < 0.2:
        return f"structure {at} and bytes", at_random(rng, mutated)[1]
    return f"structure {at}", mutated


def odd_length(rng: random.Random, file: bytes) -> int:
    (length,) = struct.unpack("<Q", file[:8])
    step = rng.choice((1, -1, 2, -2, 8, -8))
    return int(rng.choice((max(length + step, 0), 0, len(file) - 8, len(file), 2**31, 2**63, 2**64 - 1)))


def insert(rng: random.Random, text: bytes, odd: bytes) -> bytes:
    at = rng.randrange(len(text) + 1)
    return text[:at] + odd + text[at + rng.choice((0, 0, 1, 4)) :]


def at_random(rng: random.Random, file: bytes) -> tuple[str, bytes]:
    """Flip, set, remove, insert or copy bytes, or cut the end off.

    In half of the cases only the header is damaged and its length corrected, so that its text is read at all.
    """
    length = int.from_bytes(file[:8], "little")
    if len(file) > 8 and length and length <= len(file) - 8 and rng.random() < 0.5:
        kind, header = scramble(rng, file[8 : 8 + length])
        return f"header {kind}", header_and_data(header, file[8 + length :], pad=1)
    return scramble(rng, file)


def scramble(rng: random.Random, text: bytes) -> tuple[str, bytes]:
    return scrambled(rng, text, len(text), b'\x00\x7f\x80\xff"{}[],:0189- aeEF\\')


@dataclass(frozen=True)
class Verdict:
    """The outcome of one file.

    outcome     "equal" or "refused"; "stricter" if refused although the library reads it
    reason      the error's first line if it was refused
    calls       number of Python and C calls that our reader made
    failure     a description of our reader's failure, or None
    """

    outcome: str
    reason: str
    calls: int
    failure: str | None = None


def judge(file: bytes, path: Path) -> Verdict:
    """Write the file to `path`, read it with our reader and with the library, and compare."""
    path.write_bytes(file)
    try:
        theirs = dict(deserialize(file))  # type: ignore[no-untyped-call]
    except SafetensorError:
        theirs = None

    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    outcome, reason, failure = "equal", "", None
    sys.setprofile(count)
    try:
        ours = SafetensorsFile.open(path)
        arrays = {name: read(ours, name) for name in ours.names()}
    except CheckpointError as error:
        sys.setprofile(None)
        outcome, reason = "refused" if theirs is None else "stricter", error.what
        if str(path) not in (error.within or ""):
            failure = f"the error does not name the file: {error.within}"
        str(error).encode()
    except Exception as error:
        sys.setprofile(None)
        failure = f"raised {error!r}"
    else:
        sys.setprofile(None)
        failure = difference(ours, arrays, theirs, path)
    finally:
        sys.setprofile(None)
    if failure is None and calls > CALLS_BASE + CALLS_A_BYTE * len(file):
        failure = f"{calls} calls for {len(file)} bytes"
    return Verdict(outcome, reason, calls, failure)


def read(file: SafetensorsFile, name: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any] | None]:
    """Return a tensor's bytes, and its array unless it is a narrow float."""
    narrow = file[name].dtype.startswith(("f8", "f6", "f4"))
    return file.raw(name), None if narrow else file.array(name)


def difference(ours: SafetensorsFile, arrays: dict[str, Any], theirs: dict[str, Any] | None, path: Path) -> str | None:
    """Return the difference between our reading of a file and the library's, or None."""
    if theirs is None:
        return "accepted what the library refuses"
    if set(arrays) != set(theirs):
        return f"other names: {sorted(set(arrays) ^ set(theirs))}"
    with safe_open(path, "np") as opened:
        if dict(ours.metadata) != (opened.metadata() or {}):
            return f"other metadata: {dict(ours.metadata)}"
    for name, spec in theirs.items():
        record, (raw, array) = ours[name], arrays[name]
        if (record.dtype.upper(), list(record.shape)) != (spec["dtype"], spec["shape"]):
            return f"{name}: {record}, not {spec['dtype']}{spec['shape']}"
        if raw.tobytes() != bytes(spec["data"]):
            return f"{name}: other bytes"
        if array is None:
            continue
        if record.dtype == "bf16":
            bits = (array.view(np.uint32) >> np.uint32(16)).astype("<u2")
            same = bits.tobytes() == raw.tobytes() and not (array.view(np.uint32) & np.uint32(0xFFFF)).any()
        else:
            same = array.tobytes() == raw.tobytes()
        if not same or array.shape != record.shape or array.flags.writeable:
            return f"{name}: the array is not what the bytes say"
    return None


def main() -> int:
    options, tally = options_of(__doc__), Tally()
    most = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for number, (kind, file) in enumerate(mutations(options.count, options.seed)):
            # A new name each time: a file that is mapped must not be written over.
            path = Path(folder) / f"{number}.safetensors"
            verdict = judge(file, path)
            path.unlink()
            most = max(most, verdict.calls / (CALLS_BASE + CALLS_A_BYTE * len(file)))
            tally.add(f"mutation {number} ({kind})", verdict.outcome, verdict.reason, verdict.failure)
    return tally.close(options, f"work: at most {most:.0%} of {CALLS_BASE} + {CALLS_A_BYTE} calls a byte")


if __name__ == "__main__":
    sys.exit(main())

"""Fuzzing the artifact reader: a damaged or hostile `.treadle` file is refused with our error, or loads.

    python -m tests.fuzz.artifacts [--count 10000] [--seed 0] [--hostile]

Half of the mutations know the format: they edit graphs, log, fields, weights and layout, and then correct the hashes
and the seal, so that the reader gets past them. The other half flip, cut and copy bytes at random; the reader must
refuse them unless the bytes are unchanged. A mutation fails the run if loading raises anything but our error, accepts
bytes that were changed, runs text of the file as code, takes longer than a second, or needs more memory than twice the
file plus 64 MiB. Exit status 1 if any fails.

First come the files of tests/fuzz/hostile_artifacts.py, designed to cost time: each must have its listed outcome within
a second of CPU time. --hostile runs only these.
"""

from __future__ import annotations

import builtins
import copy
import json
import os
import random
import re
import struct
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

import treadle
from treadle.artifacts.loading import load_artifact, save
from treadle.ir.builder import Builder
from treadle.ir.errors import TreadleError
from treadle.ir.graph import Graph
from treadle.models.gpt2 import gpt2

if __name__ == "__main__":  # run as a file, when only its own folder is on the path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.fuzz.campaign import Tally, options_of
from tests.fuzz.hostile_artifacts import METADATA, SHAPES, Shape
from tests.fuzz.safetensors_files import by_structure, header_and_data, scramble, split

SECONDS = 1.0
MEMORY_BASE, MEMORY_TIMES = 64 << 20, 2

_PWNED = "\\n    import builtins; builtins.treadle_fuzz_ran = 1 #"
ODD_TEXT = (
    *("", " ", "\n", "\x00", "\ud7ff", "0", "-1", "1e999", "nan", '"', "\\", "#", "}", "{", "(((", ")" * 9, "//0"),
    *("$", "none", "f32[]", "f32[9999999999, 9999999999]", "B", "B//S", "S" * 300, "main", "@0", "{0..999999999}.w"),
    *(f'"{_PWNED}"', f'  "{_PWNED}"', "\u2028", "é", "\U0001f600", "[" * 400, "-" * 400 + "1", "9" * 400),
)
ODD_VALUES: tuple[Any, ...] = (None, True, -1, 10**18, 2**70, 1.5, "x", [], {}, [[]], {"a": 1}, "\ud800", "x" * 5000)


@dataclass
class Parts:
    """A file in parts: metadata without hashes, and each section's dtype, shape and bytes."""

    metadata: dict[str, str]
    sections: dict[str, tuple[str, list[int], bytes]]

    @staticmethod
    def of(file: bytes) -> Parts:
        header, data = split(file)
        metadata = header.pop("__metadata__")
        kept = {n: e for n, e in header.items() if n != "seal" and not n.startswith("padding/")}
        sections = {n: (e["dtype"], e["shape"], data[slice(*e["data_offsets"])]) for n, e in kept.items()}
        return Parts({k: v for k, v in metadata.items() if not k.startswith("sha256:")}, sections)

    def file(self) -> bytes:
        """Assemble the file again, with correct hashes and seal."""
        metadata = dict(self.metadata)
        header: dict[str, Any] = {"__metadata__": metadata}
        out = bytearray()
        for name, (dtype, shape, data) in self.sections.items():
            metadata[f"sha256:{name}"] = sha256(data).hexdigest()
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(out), len(out) + len(data)]}
            out += data
            if fill := -len(out) % 64:
                padding = {"dtype": "U8", "shape": [fill], "data_offsets": [len(out), len(out) + fill]}
                header[f"padding/{len(header)}"] = padding
                out += bytes(fill)
        header["seal"] = {"dtype": "U8", "shape": [32], "data_offsets": [len(out), len(out) + 32]}
        return sealed(header_and_data(header, bytes(out) + bytes(32), pad=1))


def hostile_file(shape: Shape) -> bytes:
    """Return the bytes of the hostile file `shape`."""
    return Parts(dict(METADATA), shape.sections()).file()


def sealed(file: bytes) -> bytes:
    """Return the file with its header padded to a multiple of 64 and a correct seal; unchanged if it has no header."""
    length = int.from_bytes(file[:8], "little")
    if len(file) < 48 or length > len(file) - 40:
        return file
    text = file[8 : 8 + length]
    text += b" " * (-(8 + length) % 64)
    head = struct.pack("<Q", len(text)) + text
    return head + file[8 + length : -32] + sha256(head).digest()


@cache
def seeds() -> tuple[bytes, ...]:
    """Return valid files: a model with a block and a log of refusals, and a model with odd names, many dtypes and long
    constants.
    """
    b = Builder(Graph("odd"))
    x = b.input("x y", "f32[B, S, 8]")
    table = b.parameter("wéights.0", "f32[5, 8]")
    ids = b.input("ids", "i64[B, S]")
    half = b.parameter("half", "f16[3]")
    mask = b.parameter("mask", "bool[7]")
    long = b.constant(np.arange(40, dtype=np.float32).reshape(5, 8))
    b.outputs(y=x + b.embedding(table + long, ids), h=half, m=b.logical_not(mask), s=b.softmax(x, axis=-1))
    weights = {
        "wéights.0": np.ones((5, 8), np.float32),
        "half": np.ones(3, np.float16),
        "mask": np.arange(7) % 2 == 0,
    }
    made = [treadle.compile(gpt2, vocab=11, dim=4, heads=2, layers=2), treadle.compile(b.graph, weights=weights)]
    files = []
    with tempfile.TemporaryDirectory() as folder:
        for compiled in made:
            save(compiled, Path(folder) / "seed.treadle")
            files.append((Path(folder) / "seed.treadle").read_bytes())
    return tuple(files)


def mutations(count: int, seed: int) -> Iterator[tuple[str, bytes, bytes | None]]:
    """Yield `count` damaged files: the description, the file, and if its hashes were not corrected, the valid file."""
    rng = random.Random(seed)
    for number in range(count):
        valid = rng.choice(seeds())
        if number % 2:
            kind, file = scramble(rng, valid)
            yield kind, file, valid
        else:
            yield *knowing(rng, valid), None


def knowing(rng: random.Random, valid: bytes) -> tuple[str, bytes]:
    """Damage a graph's text, the log's values, fields, weights or the header, and correct the hashes."""
    parts = Parts.of(valid)
    names = list(parts.sections)
    weight = rng.choice([n for n in names if n.startswith("weight/")])

    def graph() -> None:
        for name in rng.choice((["graph"], ["declared"], ["graph", "declared"])):
            edit_text(rng, parts, name)

    def both() -> None:  # the same edit in both graphs, so that they still agree
        state = rng.getstate()
        for name in ("graph", "declared"):
            rng.setstate(state)
            edit_text(rng, parts, name)

    def log() -> None:
        data = json.loads(parts.sections["log"][2])
        for _ in range(rng.choice((1, 1, 3))):
            edit_value(rng, data)
        put(parts, "log", json.dumps(data).encode())

    def log_text() -> None:
        put(parts, "log", scramble(rng, parts.sections["log"][2])[1])

    def field() -> None:
        key = rng.choice((*parts.metadata, "note"))
        parts.metadata[key] = rng.choice((*ODD_TEXT, "torch", "cuda", "../x", "2", "x" * 10_000))

    def retype() -> None:
        dtype, shape, data = parts.sections[weight]
        dtype = rng.choice((dtype, "F32", "I32", "U8", "F16", "BF16", "BOOL", "F64", "F8_E4M3"))
        shape = rng.choice((shape, list(reversed(shape)), [len(data)], [1, *shape], []))
        parts.sections[weight] = (dtype, shape, data)

    def contents() -> None:
        dtype, shape, data = parts.sections[weight]
        parts.sections[weight] = (dtype, shape, rng.randbytes(len(data)))

    def rename() -> None:
        old = rng.choice(names)
        new = rng.choice((*names, "weight/", "weight/x", "code", "padding/1", "seal", "weight/" + rng.choice(ODD_TEXT)))
        parts.sections = {new if n == old else n: s for n, s in parts.sections.items()}

    def drop() -> None:
        del parts.sections[rng.choice(names)]

    def reorder() -> None:
        rng.shuffle(names)
        parts.sections = {n: parts.sections[n] for n in names}

    def swap() -> None:
        a, b = rng.choice(names), rng.choice(names)
        parts.sections[a], parts.sections[b] = parts.sections[b], parts.sections[a]

    edits: list[Callable[[], None]] = [graph] * 5 + [both] * 5 + [log] * 2
    edits += [log_text, field, retype, contents, rename, drop, reorder, swap]
    if rng.random() < 0.2:
        kind, file = by_structure(rng, valid)
        return f"header, {kind}", sealed(file)
    edit = rng.choice(edits)
    edit()
    return edit.__name__, parts.file()


def put(parts: Parts, name: str, data: bytes) -> None:
    dtype, _, _ = parts.sections[name]
    parts.sections[name] = (dtype, [len(data)], data)


def edit_text(rng: random.Random, parts: Parts, name: str) -> None:
    """Edit a graph's text: lines removed, doubled and swapped, words exchanged, odd text or bytes inserted."""
    data = parts.sections[name][2]
    text = data.decode()
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        lines = text.split("\n")
        at, other = rng.randrange(len(lines)), rng.randrange(len(lines))
        kind = rng.choice(("remove", "double", "swap", "word", "word", "number", "odd", "quote", "bytes"))
        words = list(re.finditer(r"\w+", text))
        if kind == "bytes" or not words:
            put(parts, name, scramble(rng, text.encode(errors="replace"))[1])
            return
        word = rng.choice(words)
        if kind == "remove":
            del lines[at]
        elif kind == "double":
            lines.insert(other, lines[at])
        elif kind == "swap":
            lines[at], lines[other] = lines[other], lines[at]
        if kind in ("remove", "double", "swap"):
            text = "\n".join(lines)
            continue
        numbers = [w for w in words if w[0].isdigit()] or words
        if kind == "number":
            word = rng.choice(numbers)
            new = str(rng.choice((0, 1, 2, 3, 7, 64, 10**6, 10**12, 2**63, 10**30)))
        elif kind == "word":
            new = rng.choice(words)[0]
        elif kind == "quote":
            new = f'"{word[0]}{rng.choice((_PWNED, "", " ", chr(92) + "u2028", chr(92) * 2, chr(92) + chr(34)))}"'
        else:
            new = rng.choice(ODD_TEXT)
        text = text[: word.start()] + new + text[word.end() :]
    put(parts, name, text.encode(errors="replace"))


def edit_value(rng: random.Random, data: Any) -> None:
    """Change one value, or one key, somewhere inside lists and objects."""
    while isinstance(data, dict | list) and data:
        key = rng.choice(list(data)) if isinstance(data, dict) else rng.randrange(len(data))
        inner = data[key]
        if isinstance(inner, dict | list) and inner and rng.random() < 0.8:
            data = inner
        elif isinstance(data, dict) and rng.random() < 0.3:
            data[f"{key}x"] = data.pop(key)
            return
        else:
            odd = copy.deepcopy(rng.choice(ODD_VALUES))
            data[key] = inner + 1 if isinstance(inner, int) and rng.random() < 0.5 else odd
            return


@dataclass(frozen=True)
class Verdict:
    """The outcome of one file: "equal", "loaded" or "refused", with the error's first line; the failure, or None."""

    outcome: str
    reason: str
    failure: str | None = None


def judge(file: bytes, path: Path, valid: bytes | None) -> Verdict:
    """Write the file to `path` and load it. If `valid` is given, any file with other bytes must be refused."""
    path.write_bytes(file)
    try:
        load_artifact(path)
    except TreadleError as error:
        str(error).encode(errors="replace")
        failure = None if error.what else "the error says nothing"
        return Verdict("refused", error.what.partition(":")[0][:60], failure)
    except Exception as error:
        return Verdict("raised", type(error).__name__, f"raised {error!r}")
    if hasattr(builtins, "treadle_fuzz_ran"):
        del builtins.treadle_fuzz_ran
        return Verdict("ran", "", "text of the file was run as code")
    if valid is not None and file != valid:
        return Verdict("loaded", "", "bytes were changed, and it was not noticed")
    return Verdict("equal" if valid is not None else "loaded", "")


def time_hostile() -> list[str]:
    """Load each hostile file twice, to measure its time and its memory, and print both; return the failures."""
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        judge(seeds()[0], Path(folder) / "first.treadle", None)  # the time of imports must not count for a file
        for number, (name, shape) in enumerate(SHAPES.items()):
            path, file = Path(folder) / f"{number}.treadle", hostile_file(shape)
            path.write_bytes(file)
            began = time.process_time()
            what = refusal(path)
            seconds = time.process_time() - began
            tracemalloc.start()
            refusal(path)
            memory = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            sizes = f"{len(file) / 2**20:5.1f} MiB, in {memory / 2**20:5.1f} MiB"
            print(f"  {seconds * 1e3:5.0f} ms  {sizes}  {name}: {(what or 'loads')[:60]}")
            if (what is None) != (shape.refusal is None) or not (what or "").startswith(shape.refusal or ""):
                failures.append(f"{name}: {what}")
            if seconds > SECONDS:
                failures.append(f"{name}: took {seconds:.2f} s")
            if memory > MEMORY_BASE + MEMORY_TIMES * len(file):
                failures.append(f"{name}: took {memory} bytes for a file of {len(file)}")
    return failures


def refusal(path: Path) -> str | None:
    """Return the text of our error when the file is loaded, or None if it loads."""
    try:
        load_artifact(path)
    except TreadleError as error:
        return error.what
    return None


def main() -> int:
    os.environ["TREADLE_BACKEND"] = "numpy"  # for artifacts that name no backend
    options, tally = options_of(__doc__, hostile="the hostile files alone, no mutations"), Tally()
    tally.failures += time_hostile()
    if options.hostile:
        options.count = 0
    slowest, most = 0.0, 0.0
    tracemalloc.start()
    with tempfile.TemporaryDirectory() as folder:
        for number, (kind, file, valid) in enumerate(mutations(options.count, options.seed)):
            # A new name each time: a file that is mapped must not be written over.
            path = Path(folder) / f"{number}.treadle"
            tracemalloc.reset_peak()
            held = tracemalloc.get_traced_memory()[0]
            began = time.perf_counter()
            verdict = judge(file, path, valid)
            seconds = time.perf_counter() - began
            memory = tracemalloc.get_traced_memory()[1] - held
            path.unlink()
            slowest, most = max(slowest, seconds), max(most, memory)
            failure = verdict.failure
            if seconds > SECONDS:
                failure = failure or f"took {seconds:.2f} s"
            if memory > MEMORY_BASE + MEMORY_TIMES * len(file):
                failure = failure or f"took {memory} bytes for a file of {len(file)}"
            tally.add(f"mutation {number} ({kind})", verdict.outcome, verdict.reason, failure)
    return tally.close(options, f"slowest {slowest * 1e3:.0f} ms, most memory {most / 2**20:.1f} MiB")


if __name__ == "__main__":
    sys.exit(main())

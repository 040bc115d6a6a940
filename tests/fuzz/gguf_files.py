"""Fuzzing the GGUF reader: a damaged file is refused with our error, or read as the library reads it.

    python -m tests.fuzz.gguf_files [--count 10000] [--seed 0] [--pairs]

Half of the mutations know the format (they edit counts, types, lengths, sizes and offsets, and copy, drop and move
whole entries), half flip, cut and copy bytes at random. Each file is opened, all its tensors are dequantised, its
vocabulary is built, and the model is traced and bound to its weights. With --pairs, the files are image encoders
(mmproj): each is read together with a valid language model, and the reader of its images is built. A mutation fails the
run if that raises anything but CheckpointError, reads another name, shape or number than the library, makes more calls
than a multiple of the file's length, or takes more than a second; the run fails if its memory ever grows by more than
twice the file plus 64 MiB. Exit status 1 if any fails.
"""

from __future__ import annotations

import random
import resource
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers.pre_tokenizers import ByteLevel

from tests.fuzz.campaign import Tally, options_of, scrambled
from treadle.frontends.gguf_file import GGUFFile
from treadle.frontends.vocabularies.gguf_tokenizer import build_gguf_tokenizer
from treadle.ir.errors import CheckpointError
from treadle.program.source import ModelSource
from treadle.tasks.images.prompts import ImagePrompts

Array = np.ndarray[Any, Any]

# Limit on the number of calls (Python and C) for opening, dequantising and building the vocabulary: a base, and a
# number for each byte of the file.
CALLS_BASE, CALLS_A_BYTE = 2_000, 1
SECONDS = 1.0
MEMORY = 64 << 20

MERGES = ("Ġ t", "h e", "Ġt he", "i n", "Ġ a")
SPECIAL = ("<|end|>", "<|start|>")


# -- valid files -------------------------------------------------------------------------------------------------


def vocabulary() -> list[str]:
    """Return the tokens of a vocabulary: special tokens, every byte, and the results of the merges."""
    return [*SPECIAL, *sorted(ByteLevel.alphabet()), *(m.replace(" ", "") for m in MERGES)]


@dataclass(frozen=True)
class Sizes:
    """The sizes of a small model."""

    dim: int = 32
    heads: int = 4
    kv_heads: int = 2
    layers: int = 2
    hidden: int = 64
    architecture: str = "llama"
    base: float = 10000.0

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


def tensors(sizes: Sizes) -> dict[str, Array]:
    """Draw random weights under GGUF's names."""
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (len(vocabulary()), sizes.dim), "output_norm": (sizes.dim,)}
    for i in range(sizes.layers):
        wide, narrow = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
        block = {
            "attn_norm": (sizes.dim,), "ffn_norm": (sizes.dim,), "attn_q": (wide, sizes.dim),
            "attn_k": (narrow, sizes.dim), "attn_v": (narrow, sizes.dim), "attn_output": (sizes.dim, wide),
            "ffn_gate": (sizes.hidden, sizes.dim), "ffn_up": (sizes.hidden, sizes.dim),
            "ffn_down": (sizes.dim, sizes.hidden),
        }  # fmt: skip
        shapes |= {f"blk.{i}.{name}": shape for name, shape in block.items()}
    drawn = {name: rng.standard_normal(shape).astype(np.float32) * 0.2 for name, shape in shapes.items()}
    return {f"{name}.weight": x + (1 if x.ndim == 1 else 0) for name, x in drawn.items()}


def write_model(
    path: Path,
    sizes: Sizes,
    weights: Mapping[str, Array],
    blocks: str = "F32",
    held: Mapping[str, str] | None = None,
    keys: Mapping[str, int | float] | None = None,
    pre: str = "smollm",
) -> None:
    """Write a GGUF file with the library's writer: metadata, vocabulary and weights, matrices stored in the type
    `blocks`.

    held  the types of weights that are blocks already, u8[rows, bytes], by name
    keys  metadata besides the sizes, without the architecture prefix
    pre   name of the rule that splits text; "": the vocabulary is SentencePiece's
    """
    writer = gguf.GGUFWriter(path, sizes.architecture)
    writer.add_name("caf\u00e9")
    writer.add_block_count(sizes.layers)
    writer.add_context_length(64)
    writer.add_embedding_length(sizes.dim)
    writer.add_feed_forward_length(sizes.hidden)
    writer.add_head_count(sizes.heads)
    writer.add_head_count_kv(sizes.kv_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(sizes.base)
    writer.add_rope_dimension_count((keys or {}).get("attention.key_length", sizes.head_dim))
    for key, value in (keys or {}).items():
        add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
        add(f"{sizes.architecture}.{key}", value)
    if pre:
        tokens = vocabulary()
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
        writer.add_token_merges(list(MERGES))
    else:
        tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "h", "e", "he", "\u2581"]
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * 4])
        writer.add_token_scores([-float(number) for number in range(len(tokens))])
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
    for name, weight in weights.items():
        of = (held or {}).get(name)
        kind = gguf.GGMLQuantizationType[of.upper() if of else blocks if weight.ndim > 1 else "F32"]
        writer.add_tensor(name, weight if of else gguf.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def seeds() -> list[bytes]:
    """Return valid files: a model in several block types, once with a vocabulary of SentencePiece, and a model of
    another architecture.
    """
    made = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        for blocks, architecture in (("F32", "qwen2"), ("Q4_1", "llama"), ("Q8_0", "llama"), ("F16", "llama")):
            sizes = Sizes(architecture=architecture, layers=1)
            write_model(path, sizes, tensors(sizes), blocks, pre="" if blocks == "F16" else "smollm")
            made.append(path.read_bytes())
    return made


# -- mutations ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Field:
    """A field of a valid file's header: its name, and its bytes."""

    kind: str
    at: int
    width: int


_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def fields(file: bytes) -> tuple[list[Field], list[tuple[int, int]]]:
    """Return the fields of a valid file's header, and the range of bytes of each entry of its two tables."""
    found = [Field("magic", 0, 4), Field("version", 4, 4), Field("tensors", 8, 8), Field("keys", 16, 8)]
    entries: list[tuple[int, int]] = []
    at = 24

    def number(kind: str, width: int) -> int:
        nonlocal at
        found.append(Field(kind, at, width))
        at += width
        return int.from_bytes(file[at - width : at], "little")

    def string(kind: str) -> None:
        nonlocal at
        length = number(f"{kind} length", 8)
        found.append(Field(kind, at, length))
        at += length

    for _ in range(int.from_bytes(file[16:24], "little")):
        start = at
        string("key")
        kind = number("type", 4)
        if kind == 8:
            string("string")
        elif kind == 9:
            inner = number("items' type", 4)
            for item in range(number("count", 8)):
                if inner != 8:
                    number("item", _WIDTHS[inner])
                elif item < 40:  # a few elements stand for a long array
                    string("item")
                else:
                    at += 8 + int.from_bytes(file[at : at + 8], "little")
        else:
            number("value", _WIDTHS[kind])
        entries.append((start, at))
    for _ in range(int.from_bytes(file[8:16], "little")):
        start = at
        string("name")
        for _ in range(number("rank", 4)):
            number("size", 8)
        number("block type", 4)
        number("offset", 8)
        entries.append((start, at))
    return found, entries


EDGES = (0, 1, 2, 3, 5, 7, 8, 9, 12, 13, 31, 32, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**62,
         2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1)  # fmt: skip
ODD_TEXT = (b"", b"\x00", b"\xff\xfe", b"\xc0\x80", b"general.alignment", b"llama.block_count", b"token_embd.weight",
            b"general.architecture", b"\x1b[2J\xe2\x80\xae", b"a" * 300, b"llama", b" ")  # fmt: skip


def pair_seeds(folder: Path) -> tuple[Path, list[bytes]]:
    """Return a language model's file, in this folder, and valid image encoders of it: of LLaVA and of SmolVLM."""
    from tests.gguf_pairs import LANGUAGE, PROJECTOR, PairForm, write_pair
    from tests.vision_models import save_vision_model

    made = []
    for kind, wide in (("llava", False), ("smolvlm", True)):
        model = save_vision_model(kind, folder / kind, wide=wide)
        for form in (PairForm("F32", is_older=True), PairForm("F16"), PairForm("Q8_0")):
            made.append((write_pair(model, folder / f"{kind}-pair", form).parent / PROJECTOR).read_bytes())
    return folder / "llava-pair" / LANGUAGE, made


def mutations(count: int, seed: int, files: Sequence[bytes] = ()) -> Iterator[tuple[str, bytes]]:
    """Yield `count` damaged files, each with a description of its damage; alternately by structure and at random.

    files  the valid files; none: `seeds`
    """
    rng = random.Random(seed)
    valid = [(file, *fields(file)) for file in files or seeds()]
    for number in range(count):
        file, known, entries = rng.choice(valid)
        yield by_structure(rng, file, known, entries) if number % 2 == 0 else at_random(rng, file, known[-1].at)


def by_structure(
    rng: random.Random, file: bytes, known: list[Field], entries: list[tuple[int, int]]
) -> tuple[str, bytes]:
    """Damage a field or an entry; sometimes two in a row."""
    wanted = "value" if rng.random() < 0.3 else rng.choice(sorted({f.kind for f in known}))
    field = rng.choice([f for f in known if f.kind == wanted])
    (start, stop), (other, end) = rng.choice(entries), rng.choice(entries)
    before, after = file[: field.at], file[field.at + field.width :]
    value = int.from_bytes(file[field.at : field.at + field.width], "little")
    text = rng.choice((*ODD_TEXT, file[field.at : field.at + field.width] + b"x"))
    written = text if field.kind in ("key", "string", "item", "name") else rng.choice(EDGES).to_bytes(8, "little")

    def nudged() -> bytes:
        moved = (value + rng.choice((1, -1, 2, 8, -8, 32, -32, 256))) % (1 << 8 * max(field.width, 1))
        return before + moved.to_bytes(max(field.width, 1), "little") + after

    def renamed() -> bytes:
        """Replace a string and correct its length."""
        length = struct.pack("<Q", len(text))
        return before[:-8] + length + text + after if field.kind in ("key", "string", "item", "name") else nudged()

    edits: list[tuple[str, Callable[[], bytes]]] = [
        (f"{field.kind} set", lambda: before + written[: field.width].ljust(field.width, b"\0") + after),
        (f"{field.kind} set", lambda: before + rng.choice(EDGES).to_bytes(8, "little")[: field.width] + after),
        (f"{field.kind} nudged", nudged),
        (f"{field.kind} renamed", renamed),
        (f"cut at {field.kind}", lambda: before),
        (f"{field.kind} dropped", lambda: before + after),
        ("entry dropped", lambda: file[:start] + file[stop:]),
        ("entry doubled", lambda: file[:stop] + file[start:stop] + file[stop:]),
        ("entry replaced", lambda: file[:start] + file[other:end] + file[stop:]),
        ("entry added", lambda: counted(file, start, stop)),
        ("tail cut", lambda: file[: -rng.choice((1, 8, 32, 1000))]),
        ("tail added", lambda: file + bytes(rng.choice((1, 32, 4096)))),
    ]
    kind, edit = rng.choice(edits)
    made = edit()
    return (f"{kind} and bytes", at_random(rng, made, len(made))[1]) if rng.random() < 0.1 else (kind, made)


def counted(file: bytes, start: int, stop: int) -> bytes:
    """Duplicate an entry, and correct the number of keys."""
    keys = int.from_bytes(file[16:24], "little") + 1
    return file[:16] + struct.pack("<Q", keys) + file[24:stop] + file[start:stop] + file[stop:]


def at_random(rng: random.Random, file: bytes, header: int) -> tuple[str, bytes]:
    return scrambled(rng, file, header, b"\x00\x01\x08\x7f\x80\xff")


# -- verdicts ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """The outcome of one file.

    outcome  "read", or the stage that refused it: "opening", "tensors", "vocabulary", "model", "images"
    reason   the error's first line if it was refused
    calls    number of Python and C calls while opening, dequantising and building the vocabulary
    seconds  duration of all stages
    failure  a description of our reader's failure, or None
    """

    outcome: str
    reason: str
    calls: int
    seconds: float
    failure: str | None = None


def judge(file: bytes, path: Path, language: Path | None = None) -> Verdict:
    """Write the file to `path`, and read everything in it.

    language  the language model, if the file is an image encoder
    """
    path.write_bytes(file)
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    outcome, reason, failure = "opening", "", None
    opened: GGUFFile | None = None
    arrays: dict[str, Array] = {}
    started = time.perf_counter()
    try:
        sys.setprofile(count)
        opened = GGUFFile.open(path)
        outcome = "tensors"
        arrays = {name: opened.array(name) for name in opened.names()}
        if language is None:
            outcome = "vocabulary"
            build_gguf_tokenizer(opened)
        sys.setprofile(None)
        outcome = "model"
        source = ModelSource.open(path) if language is None else ModelSource.open(language, mmproj=path)
        source.resolve()
        if language is not None:
            outcome = "images"
            ImagePrompts.open(source, source.tokenizer())
        outcome = "read"
    except CheckpointError as error:
        reason = error.what
        if str(path) not in (error.within or ""):
            failure = f"the error does not name the file: {error}"
        str(error).encode()
    except Exception as error:
        failure = f"{outcome}: raised {error!r}"
    finally:
        sys.setprofile(None)
    seconds = time.perf_counter() - started
    if failure is None and calls > CALLS_BASE + CALLS_A_BYTE * len(file):
        failure = f"{calls} calls for {len(file)} bytes"
    if failure is None and opened is not None and outcome != "tensors":
        failure = difference(opened, arrays, path)
    return Verdict(outcome, reason, calls, seconds, failure)


def difference(opened: GGUFFile, arrays: Mapping[str, Array], path: Path) -> str | None:
    """Return the difference between our reading of tensors and the library's, or None."""
    try:
        theirs = gguf.GGUFReader(path)
    except Exception as error:
        return f"read what the library refuses: {error!r}"
    if [tensor.name for tensor in theirs.tensors] != list(arrays):
        return f"other names: {sorted({t.name for t in theirs.tensors} ^ set(arrays))}"
    for tensor in theirs.tensors:
        ours, record = arrays[tensor.name], opened.record(tensor.name)
        if record.blocks != tensor.tensor_type.name.lower() or list(record.shape) != tensor.shape.tolist()[::-1]:
            return f"{tensor.name}: {record}, not {tensor.tensor_type.name} {tensor.shape}"
        with np.errstate(all="ignore"):
            plain = record.dtype != "f32" or record.blocks == "f32"
            expected = tensor.data if plain else gguf.dequantize(tensor.data, tensor.tensor_type)
        if ours.tobytes() != np.ascontiguousarray(expected).tobytes() or ours.flags.writeable:
            return f"{tensor.name}: other numbers"
    return None


def peak() -> int:
    """Return the peak memory of the process, in bytes."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def main() -> int:
    options, tally = options_of(__doc__, pairs="damage image encoders (mmproj)"), Tally()
    slowest, most = 0.0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        language, files = pair_seeds(Path(folder)) if options.pairs else (None, seeds())
        for number, valid in enumerate(files):
            verdict = judge(valid, Path(folder) / f"valid-{number}.gguf", language)
            if verdict.outcome != "read" or verdict.failure:
                tally.failures.append(f"a valid file: {verdict}")
        before, longest = peak(), max(map(len, files))
        for number, (kind, file) in enumerate(mutations(options.count, options.seed, files)):
            # A new name each time: a file that is mapped must not be written over.
            path = Path(folder) / f"{number}.gguf"
            verdict = judge(file, path, language)
            path.unlink()
            slowest = max(slowest, verdict.seconds)
            most = max(most, verdict.calls / (CALLS_BASE + CALLS_A_BYTE * len(file)))
            failure = verdict.failure or (f"{verdict.seconds:.2f} s" if verdict.seconds > SECONDS else None)
            outcome = "read" if verdict.outcome == "read" else f"refused at {verdict.outcome}"
            tally.add(f"mutation {number} ({kind})", outcome, verdict.reason.split(":")[0][:90], failure)
        grown = peak() - before
    if grown > 2 * longest + MEMORY:
        tally.failures.append(f"memory grew by {grown >> 20} MiB, with files of up to {longest >> 10} KiB")
    work = f"work: at most {most:.0%} of {CALLS_BASE} + {CALLS_A_BYTE} calls a byte; slowest {slowest:.2f} s"
    return tally.close(options, work, f"memory: grew by {grown / 2**20:.0f} MiB over the run")


if __name__ == "__main__":
    sys.exit(main())

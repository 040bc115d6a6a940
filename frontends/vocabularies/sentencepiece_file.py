"""A SentencePiece vocabulary as stored in its file: pieces with their scores, and text normalization.

The file is a protocol buffer: nested fields, each with a number, a wire type and a value. Unneeded fields are skipped.
Sources: sentencepiece_model.proto of https://github.com/google/sentencepiece, and
https://protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from treadle.ir.errors import CheckpointError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Kinds of pieces."""

UNIGRAM, BPE = 1, 2
"""Supported kinds of vocabularies."""

_VARINT, _EIGHT, _BYTES, _FOUR = 0, 1, 2, 5
_MOST_PIECES = 4_000_000
MOST_CHARACTERS = 512
"""Maximum length of a normal piece, the limit of SentencePiece's trainer. All splits of such a piece are tried."""


@dataclass(frozen=True)
class VocabularyPiece:
    """A piece of text, its score (a log probability; for BPE, the negative number of the merge that forms it), and its
    kind.
    """

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class SentencePieces:
    """A vocabulary.

    pieces   by number
    kind     UNIGRAM or BPE
    unknown  the number of the unknown piece
    charmap  normalization of characters, in the tokenizers library's format; empty: none
    bytes    True if unknown characters are split into bytes, each of which is a piece
    prefix   True if a space is added before a text
    single   True if several spaces become one, and spaces at the ends are removed
    escaped  True if pieces have a symbol in place of spaces
    """

    pieces: tuple[VocabularyPiece, ...]
    kind: int
    unknown: int
    charmap: bytes
    bytes: bool = False
    prefix: bool = True
    single: bool = True
    escaped: bool = True


def read_sentencepieces(data: bytes, shown: str) -> SentencePieces:
    """Read a file's bytes; `shown` is its name in errors.

    Raises CheckpointError, with the offset, if the bytes are not such a file, are truncated, or hold unsupported
    fields.
    """
    pieces: list[VocabularyPiece] = []
    charmap = b""
    training = {3: UNIGRAM, 35: 0, 40: 0}  # the kind, bytes, the unknown piece
    normalizing = {3: 1, 4: 1, 5: 1}  # the prefix, single spaces, escaped spaces
    for field in _fields(data, 0, len(data), shown):
        if field.number == 1:
            if len(pieces) == _MOST_PIECES:
                raise _damaged("the vocabulary has more pieces than the limit", field.at, shown, str(_MOST_PIECES))
            pieces.append(_piece(data, field, shown))
        elif field.number == 2:
            training |= {p.number: p.integer(shown) for p in _inside(data, field, shown) if p.number in training}
        elif field.number == 3:
            for part in _inside(data, field, shown):
                if part.number == 2:
                    charmap = part.bytes(data, shown)
                    _check_charmap(charmap, part.start, shown)
                elif part.number in normalizing:
                    normalizing[part.number] = part.integer(shown)
    kind, unknown = training[3], training[40]
    if not pieces:
        raise _damaged("the vocabulary has no pieces", len(data), shown)
    if kind not in (UNIGRAM, BPE):
        raise _damaged("a vocabulary is of kind 1 (unigram) or 2 (bpe)", 0, shown, f"kind {kind}")
    if not 0 <= unknown < len(pieces):
        raise _damaged("unk_id must be the id of a piece", 0, shown, f"unk_id {unknown}, {len(pieces)} pieces")
    flags = (bool(value) for value in (training[35], *normalizing.values()))
    return SentencePieces(tuple(pieces), kind, unknown, charmap, *flags)


def _check_charmap(charmap: bytes, at: int, shown: str) -> None:
    """Check that a character table is valid. The library does not check this.

    The table is a length, a double array of this number of bytes (Aoe 1989, as darts-clone stores it), and the strings
    that its leaves refer to, each with a zero at its end. A unit's children are in the block of 256 units at the unit's
    offset.
    """
    if not charmap:
        return
    length = int.from_bytes(charmap[:4], "little")
    texts = charmap[4 + length :]
    if len(charmap) < 4 or length % 1024 or not 0 < length <= len(charmap) - 4 or texts[-1:] != b"\0":
        raise _damaged("the table of characters is damaged", at, shown, f"{len(charmap)} bytes")
    units = np.frombuffer(charmap, np.dtype("<u4"), length // 4, 4).astype(np.int64)
    is_leaf = units >> 31 == 1
    children = np.arange(len(units)) ^ (units >> 10) << ((units & 512) >> 6)
    starts = units[is_leaf] & 0x7FFFFFFF
    inside = np.frombuffer(texts, np.uint8)[np.minimum(starts, len(texts) - 1)] & 0xC0 != 0x80
    if (
        (children[~is_leaf] | 255).max(initial=0) >= len(units)
        or starts.max(initial=0) >= len(texts)
        or not inside.all()
    ):
        raise _damaged("the table of characters is damaged", at, shown, "an offset points outside the table")


@dataclass(frozen=True)
class _Field:
    """A field: its number, its wire type, and its value: an integer, or the offsets of its bytes in the file."""

    number: int
    wire: int
    value: int
    start: int
    end: int
    at: int

    def integer(self, shown: str) -> int:
        if self.wire != _VARINT:
            raise _damaged(f"field {self.number} must be an integer", self.at, shown)
        return self.value

    def bytes(self, data: bytes, shown: str) -> bytes:
        if self.wire != _BYTES:
            raise _damaged(f"field {self.number} must hold bytes", self.at, shown)
        return data[self.start : self.end]


def _piece(data: bytes, field: _Field, shown: str) -> VocabularyPiece:
    text, score, kind = "", 0.0, NORMAL
    for part in _inside(data, field, shown):
        if part.number == 1:
            try:
                text = part.bytes(data, shown).decode("utf-8")
            except UnicodeDecodeError:
                raise _damaged("a piece is not UTF-8", part.at, shown) from None
        elif part.number == 2:
            if part.wire != _FOUR:
                raise _damaged("a score must be a 32-bit number", part.at, shown)
            (score,) = struct.unpack_from("<f", data, part.start)
            if not math.isfinite(score):
                raise _damaged("a score must be a finite number", part.at, shown, str(score))
        elif part.number == 3:
            kind = part.integer(shown)
    if kind == NORMAL and len(text) > MOST_CHARACTERS:
        raise _damaged(f"a piece has more than {MOST_CHARACTERS} characters", field.at, shown, f"{len(text)}")
    return VocabularyPiece(text, score, kind)


def _inside(data: bytes, field: _Field, shown: str) -> Iterator[_Field]:
    if field.wire != _BYTES:
        raise _damaged(f"field {field.number} must be a message", field.at, shown)
    return _fields(data, field.start, field.end, shown)


def _fields(data: bytes, at: int, end: int, shown: str) -> Iterator[_Field]:
    """Yield the fields of a message in data[at:end]."""
    while at < end:
        begun = at
        tag, at = _varint(data, at, end, shown)
        number, wire = tag >> 3, tag & 7
        if number == 0:
            raise _damaged("invalid protobuf field number 0", begun, shown)
        value, start = 0, at
        if wire == _VARINT:
            value, at = _varint(data, at, end, shown)
        elif wire in (_EIGHT, _FOUR):
            at += 8 if wire == _EIGHT else 4
        elif wire == _BYTES:
            length, start = _varint(data, at, end, shown)
            at = start + length
        else:
            raise _damaged("the file is not a SentencePiece vocabulary", begun, shown, f"wire type {wire}")
        if at > end:
            raise _damaged("a field reaches past the end", begun, shown, f"up to byte {at} of {end}")
        yield _Field(number, wire, value, start, at, begun)


def _varint(data: bytes, at: int, end: int, shown: str) -> tuple[int, int]:
    """Return an integer stored as 7 bits per byte, lowest bits first, and the offset of its end."""
    value = 0
    for place in range(10):
        if at + place >= end:
            raise _damaged("the file ends inside a number", at, shown)
        byte = data[at + place]
        value |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return value, at + place + 1
    raise _damaged("a number has more than 10 bytes", at, shown)


def _damaged(what: str, at: int, shown: str, received: str | None = None) -> CheckpointError:
    return CheckpointError(what, received=received, within=f"{shown}, byte {at}")

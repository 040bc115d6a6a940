"""`ModelFolder`: the folder with a model's files, plain or in the hub's cache. Each file is opened once.

    folder/config.json
    folder/tokenizer.json, ...

    models--org--name/refs/main                            names a revision
    models--org--name/snapshots/<revision>/config.json     -> ../../blobs/<hash>
    models--org--name/blobs/<hash>

Source: the cache layout of huggingface_hub, https://huggingface.co/docs/huggingface_hub/guides/manage-cache. No file
outside the model's folder is read: for a snapshot of the hub's cache the folder is its `models--org--name`.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from treadle.files.contained_files import (
    FileState,
    PathLike,
    RegularFile,
    canonical,
    contained,
    open_regular,
    read_regular,
    read_whole,
)
from treadle.files.limits import limits_of
from treadle.files.shown_names import printable, shown_path
from treadle.files.strict_json import read_json_object
from treadle.frontends.safetensors_file import CheckpointLimits, refuse_pickle
from treadle.ir.errors import CheckpointError

CONFIG = "config.json"
CACHED = "models--"
"""The start of the name of a model's folder in the hub's cache."""
LISTED = 8
"""Number of entries of a folder that an error lists."""
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_REVISION_BYTES = 256
_SETTINGS_BYTES, _SETTINGS_NESTING, _SETTINGS_VALUES = 4 << 20, 32, 200_000
_ENTRIES = 10_000  # entries of a folder that are read for an error

T = TypeVar("T")


@dataclass(frozen=True)
class ModelFolder:
    """The folder with a model's files, and the folder outside of which no file is read. All files of a model are opened
    through this class.

    path    the folder with config.json, links followed
    root    no file outside this folder is read: `path` itself, or the `models--org--name` of a cached snapshot
    shown   the folder's name in errors, as the user wrote it
    limits  limits on config.json and on weights

    The parsed form of a file is kept, so that each file is opened once. Files that change between two reads are
    refused.
    """

    path: Path
    root: Path
    shown: str
    limits: CheckpointLimits
    _states: dict[str, FileState] = field(default_factory=dict, compare=False, repr=False)
    _parsed: dict[object, Any] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def find(
        cls, folder: PathLike | ModelFolder, limits: CheckpointLimits | Mapping[str, int] | None = None
    ) -> ModelFolder:
        """Return the model folder for a path: the path itself, or the revision of a hub cache's `models--org--name`. A
        model folder is returned as it is.

        Raises CheckpointError if the path is not a folder, or if the cache has no current revision.
        """
        if isinstance(folder, ModelFolder):
            return folder
        known = limits_of(CheckpointLimits, limits)
        shown = shown_path(folder)
        path = canonical(folder, shown)
        if not os.path.isdir(path):
            refuse_pickle(path.name, shown)
            raise CheckpointError(
                f"this is a file, not a folder with {CONFIG}", within=shown, hint=f"the folder of its {CONFIG}"
            )
        named = Path(os.path.abspath(folder))
        if any(p.name.startswith(CACHED) for p in (named, path)) and os.path.isdir(path / "snapshots"):
            revision = _revision(path, shown)
            shown = os.path.join(shown, "snapshots", revision)
            return cls(contained(path / "snapshots" / revision, path, shown), path, shown, known)
        # The path as given is tried first: a snapshot that is itself a link out of its cache is refused.
        for lies in (named, path):
            for above in lies.parents:
                if above.name == "snapshots" and above.parent.name.startswith(CACHED):
                    root = canonical(above.parent, shown)
                    return cls(contained(path, root, shown), root, shown, known)
        return cls(path, path, shown, known)

    def has(self, name: str) -> bool:
        """Return True if the folder has an entry of this name. A dangling link counts."""
        return os.path.lexists(self.path / name)

    def show(self, name: str) -> str:
        """Return a file's name as errors show it."""
        return os.path.join(self.shown, printable(name))

    def file(self, name: str) -> Path:
        """Return the canonical path of a file that is named relative to the folder.

        Raises CheckpointError for an absolute name, for `..`, for a link out of `root`, and if the file does not exist.
        """
        parts = re.split(r"[/\\]", name)
        if not name or "" in parts or "." in parts or ".." in parts or ":" in name or not name.isprintable():
            raise CheckpointError(
                "a file's name must be relative and stay in the model's folder",
                received=printable(name),
                within=self.shown,
            )
        return contained(self.path / name, self.root, self.show(name))

    def open(self, name: str) -> RegularFile:
        """Open a file that is named relative to the folder.

        Raises CheckpointError as `file` and `check` do, and if it is not a regular file.
        """
        opened = open_regular(self.file(name), self.show(name), self.path / name)
        self._states.setdefault(name, opened.state)
        try:
            self.check(exist=True)
        except CheckpointError:
            opened.close()
            raise
        return opened

    def check(self, *, exist: bool = False) -> None:
        """Raise CheckpointError if a file has changed since it was first opened; with `exist`, also if it is gone."""
        for state in self._states.values():
            state.check(exists=exist)

    def read(self, name: str, limit: int, setting: str | None = None) -> bytes:
        """Return the bytes of a file, at most `limit`; `setting` is the limit's name for the error. Raises
        CheckpointError as `open` does, and for a longer file.
        """
        with self.open(name) as file:
            return read_whole(file, limit, self.show(name), setting)

    def once(self, key: object, parse: Callable[[], T]) -> T:
        """Return the result of `parse`, which is called only for the first request of this key."""
        if key not in self._parsed:
            self._parsed[key] = parse()
        found: T = self._parsed[key]
        return found

    @property
    def config(self) -> dict[str, Any]:
        """The content of config.json, not to be changed. Raises CheckpointError as `open` does, if the file is not one
        JSON object, and if it exceeds `limits`.
        """
        known = self.limits
        return self.once(CONFIG, lambda: self._object(CONFIG, known.config_bytes, known.nesting, known.values))

    def read_settings(self, name: str) -> dict[str, Any]:
        """Return the JSON object of a settings file, such as generation_config.json, not to be changed.

        Raises CheckpointError as `open` does, if the file is not one JSON object, and if it exceeds 4 MiB, 200,000
        values or 32 levels.
        """
        return self.once(name, lambda: self._object(name, _SETTINGS_BYTES, _SETTINGS_NESTING, _SETTINGS_VALUES))

    def _object(self, name: str, limit: int, nesting: int, values: int) -> dict[str, Any]:
        data = self.read(name, limit, "config_bytes" if name == CONFIG else None)
        return read_json_object(data, self.show(name), nesting=nesting, values=values)

    def entries(self) -> list[str]:
        """Return the names in the folder, sorted, for errors."""
        return _entries(self.path)


@dataclass(frozen=True)
class MemoryFolder(ModelFolder):
    """A model folder whose files are in memory, such as the tokenizer in an artifact.

    contents  the files by name
    """

    contents: Mapping[str, bytes] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, contents: Mapping[str, bytes], label: str) -> MemoryFolder:
        """Return a folder of these files; `label` is its name in errors."""
        return cls(Path(label), Path(label), label, CheckpointLimits(), contents=contents)

    def has(self, name: str) -> bool:
        """Return True if there is a file of this name."""
        return name in self.contents

    def file(self, name: str) -> Path:
        """Raise CheckpointError: a file in memory has no path."""
        raise CheckpointError("the files of this model are in memory", received=printable(name), within=self.shown)

    def read(self, name: str, limit: int, setting: str | None = None) -> bytes:
        """Return the bytes of a file, at most `limit`. Raises CheckpointError for a missing or a longer file."""
        if name not in self.contents:
            raise CheckpointError("there is no such file", received=printable(name), within=self.shown)
        data = self.contents[name]
        if len(data) > limit:
            what = "the file is longer than the limit"
            raise CheckpointError(what, received=f"{len(data)} bytes, limit {limit}", within=self.show(name))
        return data

    def entries(self) -> list[str]:
        """Return the names of the files, sorted."""
        return sorted(self.contents)


def _revision(path: Path, shown: str) -> str:
    """Return the current revision of a hub cache's `models--org--name`: the content of refs/main, else the name of its
    only snapshot.
    """
    ref = path / "refs" / "main"
    if os.path.lexists(ref):
        ref_shown = os.path.join(shown, "refs", "main")
        data = read_regular(contained(ref, path, ref_shown), _REVISION_BYTES, ref_shown)
        revision = data.decode("utf-8", "replace").strip()
        if not _REVISION.fullmatch(revision):
            raise CheckpointError("not the name of a revision", received=printable(revision), within=ref_shown)
        return revision
    snapshots = _entries(contained(path / "snapshots", path, os.path.join(shown, "snapshots")))
    if len(snapshots) != 1:
        raise CheckpointError(
            "the cache has no refs/main, and not exactly one snapshot",
            received=f"{len(snapshots)} snapshots: " + ", ".join(map(printable, snapshots[:LISTED])),
            within=shown,
            hint="name a snapshot: " + os.path.join(shown, "snapshots", "<revision>"),
        )
    return snapshots[0]


def _entries(folder: Path) -> list[str]:
    """Return the names in a folder, sorted, up to the number that an error needs; an empty list if the folder is not
    readable.
    """
    try:
        with os.scandir(folder) as found:
            return sorted(entry.name for entry in itertools.islice(found, _ENTRIES))
    except OSError:
        return []

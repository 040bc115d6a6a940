"""A Hugging Face model folder: config.json and safetensors weights, plain or in the hub's cache.

    folder/config.json
    folder/model.safetensors                or  folder/model.safetensors.index.json
                                                folder/model-00001-of-00002.safetensors, ...

    models--org--name/refs/main                            names a revision
    models--org--name/snapshots/<revision>/config.json     -> ../../blobs/<hash>
    models--org--name/blobs/<hash>

Sources: `from_pretrained` of Hugging Face transformers for the names of files; the cache layout of huggingface_hub,
https://huggingface.co/docs/huggingface_hub/guides/manage-cache. No file outside the model's folder is read: for a
snapshot of the hub's cache the folder is its `models--org--name`.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

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
from treadle.files.limits import MORE, limit_hint, limits_of
from treadle.files.nearest_names import NearestNames
from treadle.files.shown_names import printable, shown_path
from treadle.files.strict_json import JsonReader, read_json_object
from treadle.frontends.mapped_tensors import TensorRecord
from treadle.frontends.safetensors_file import (
    CONVERSION,
    PICKLE_SUFFIXES,
    CheckpointLimits,
    SafetensorsFile,
    refuse_pickle,
)
from treadle.ir.errors import CheckpointError

_CONFIG = "config.json"
_CACHED = "models--"
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_TRAINED = "weights.safetensors"  # written by training for a model of a declaration
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_REVISION_BYTES = 256
_SETTINGS_BYTES, _SETTINGS_NESTING, _SETTINGS_VALUES = 4 << 20, 32, 200_000
_LISTED = 8  # entries of a folder that an error lists
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
                f"this is a file, not a folder with {_CONFIG}", within=shown, hint=f"the folder of its {_CONFIG}"
            )
        named = Path(os.path.abspath(folder))
        if any(p.name.startswith(_CACHED) for p in (named, path)) and os.path.isdir(path / "snapshots"):
            revision = _revision(path, shown)
            shown = os.path.join(shown, "snapshots", revision)
            return cls(contained(path / "snapshots" / revision, path, shown), path, shown, known)
        # The path as given is tried first: a snapshot that is itself a link out of its cache is refused.
        for lies in (named, path):
            for above in lies.parents:
                if above.name == "snapshots" and above.parent.name.startswith(_CACHED):
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
        return self.once(_CONFIG, lambda: self._object(_CONFIG, known.config_bytes, known.nesting, known.values))

    def read_settings(self, name: str) -> dict[str, Any]:
        """Return the JSON object of a settings file, such as generation_config.json, not to be changed.

        Raises CheckpointError as `open` does, if the file is not one JSON object, and if it exceeds 4 MiB, 200,000
        values or 32 levels.
        """
        return self.once(name, lambda: self._object(name, _SETTINGS_BYTES, _SETTINGS_NESTING, _SETTINGS_VALUES))

    def _object(self, name: str, limit: int, nesting: int, values: int) -> dict[str, Any]:
        data = self.read(name, limit, "config_bytes" if name == _CONFIG else None)
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


class Checkpoint:
    """A model's configuration and its tensors by name. A file is mapped when one of its tensors is first requested.

    folder    the folder with the files
    """

    folder: ModelFolder

    def __init__(self, folder: ModelFolder, single: str = _SINGLE) -> None:
        """Find the weights of a folder: the file `single`, else the shards of the index."""
        self.folder, self.limits, self._single = folder, folder.limits, single
        self.sharded = not folder.has(single)
        self._files: dict[str, SafetensorsFile] = {}

    @property
    def config(self) -> dict[str, Any]:
        """The content of config.json, not to be changed."""
        return self.folder.config

    @property
    def label(self) -> str:
        """The name, in errors, of the file that lists the tensors."""
        return self.folder.show(_INDEX if self.sharded else self._single)

    @property
    def metadata(self) -> Mapping[str, str]:
        """The metadata of the first weight file."""
        return self._open(self.files[0]).metadata

    def metadata_of(self, name: str) -> Mapping[str, str]:
        """Return the metadata of the weight file that has a tensor. Raises CheckpointError as `record` does."""
        return self._holder(name).metadata

    @property
    def files(self) -> tuple[str, ...]:
        """The weight files' names, relative to the folder, in the order of their first tensors."""
        return tuple(self._tensors_of)

    def names(self) -> tuple[str, ...]:
        """Return the tensors' names, in the order of the file or of the index.

        Raises CheckpointError if the file or the index is damaged; shards are checked when they are first read.
        """
        return tuple(self._file_of)

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    def __len__(self) -> int:
        return len(self._file_of)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def record(self, name: str) -> TensorRecord:
        """Return the dtype, shape and offset of a tensor.

        Raises CheckpointError if there is no tensor of this name (with the nearest names), or its file is damaged.
        """
        return self._holder(name)[name]

    def array(self, name: str) -> npt.NDArray[Any]:
        """Return a tensor as a read-only array, a view of its file if possible: see `SafetensorsFile.array`.

        Raises CheckpointError as `record` does, and if NumPy cannot hold the dtype.
        """
        return self._holder(name).array(name)

    def bits(self, name: str) -> npt.NDArray[np.uint16]:
        """Return the bits of a bf16 tensor: see `SafetensorsFile.bits`. Raises CheckpointError as `record` does."""
        return self._holder(name).bits(name)

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """Return a tensor's bytes in its file, a view u8[nbytes]. Raises CheckpointError as `record` does."""
        return self._holder(name).raw(name)

    def place(self, name: str, element: int = 0) -> str:
        """Return the place of a tensor's element in its file, for errors: the file, the byte and the tensor."""
        file, record = self._holder(name), self.record(name)
        size = record.nbytes // max(1, math.prod(record.shape))
        return f"{file.path}: byte {record.begin + element * size}, tensor {printable(name)}"

    @cached_property
    def _file_of(self) -> Mapping[str, str]:
        if self.sharded:
            return self._read_index()
        return dict.fromkeys(self._open(self._single), self._single)

    @cached_property
    def _tensors_of(self) -> Mapping[str, list[str]]:
        tensors: dict[str, list[str]] = {}
        for name, file in self._file_of.items():
            tensors.setdefault(file, []).append(name)
        return tensors

    def _holder(self, name: str) -> SafetensorsFile:
        shard = self._file_of.get(name)
        if shard is None:
            near = NearestNames(self._file_of).of(name, 3)
            raise CheckpointError(
                f"the checkpoint has no tensor {printable(name)}",
                received=f"{len(self)} tensors",
                within=self.label,
                hint="did you mean " + " or ".join(map(printable, near)) if near else None,
            )
        return self._open(shard)

    def _open(self, name: str) -> SafetensorsFile:
        file = self._files.get(name)
        if file is None:
            refuse_pickle(name, self.folder.show(name))
            with self.folder.open(name) as opened:
                file = SafetensorsFile.read(opened, self.limits)
            if self.sharded:
                self._check_shard(name, file)
            self._files[name] = file
        return file

    def _check_shard(self, shard: str, file: SafetensorsFile) -> None:
        absent = [name for name in self._tensors_of[shard] if name not in file]
        if absent:
            more = f" and {len(absent) - _LISTED} more" if len(absent) > _LISTED else ""
            raise CheckpointError(
                f"the index places {len(absent)} tensors in a shard that does not hold them",
                received=", ".join(map(printable, absent[:_LISTED])) + more,
                within=self.folder.show(shard),
                hint="fetch the index and the shards again: they belong to different checkpoints",
            )

    def _read_index(self) -> dict[str, str]:
        data = self.folder.read(_INDEX, self.limits.header_bytes, "header_bytes")
        reader = JsonReader(data, self.label, nesting=self.limits.nesting, values=self.limits.values)
        places: dict[str, str] | None = None
        for key in reader.members("a JSON object"):
            reader.place = printable(key)
            if key == "weight_map":
                places = self._read_places(reader)
            else:
                reader.value()
            reader.place = ""
        reader.end()
        if places is None:
            reader.fail("the index has no weight_map")
        return places

    def _read_places(self, reader: JsonReader) -> dict[str, str]:
        places: dict[str, str] = {}
        shards: set[str] = set()
        for tensor in reader.members("an object of tensor names and file names"):
            if len(places) == self.limits.tensors:
                reader.fail(
                    "the index lists more tensors than the limit",
                    received=f"limit {self.limits.tensors}",
                    hint=limit_hint("tensors", MORE * self.limits.tensors),
                )
            reader.next_byte()
            at = reader.position
            shard = reader.string("the name of a file")
            if shard not in shards:
                refuse_pickle(shard, self.folder.show(shard))
                if not shard.endswith(".safetensors"):
                    reader.fail("a shard must be a .safetensors file", received=printable(shard), at=at)
                self.folder.file(shard)
                shards.add(shard)
            places[tensor] = shard
        return places

    def __repr__(self) -> str:
        return f"Checkpoint({self.folder.shown!r})"


def open_checkpoint(
    folder: PathLike | ModelFolder, limits: CheckpointLimits | Mapping[str, int] | None = None
) -> Checkpoint:
    """Open the model in a folder, in a hub cache's `models--org--name`, or in one of its snapshots.

    Reads config.json. Weights are `model.safetensors`, else the shards of `model.safetensors.index.json`; they are
    mapped when first requested. No file outside the folder is read, no code is run, and no pickle is loaded.

    Raises CheckpointError if config.json or the weights are missing or damaged, if the weights are pickles, if a path
    or a link leads out of the folder, or if a limit is exceeded.
    """
    place = ModelFolder.find(folder, limits)
    return place.once(Checkpoint, lambda: _open_checkpoint(place))


def _open_checkpoint(place: ModelFolder) -> Checkpoint:
    if not place.has(_CONFIG):
        raise _no_config(place)
    place.config  # noqa: B018 - an error in it comes before one about the weights
    if not place.has(_SINGLE) and not place.has(_INDEX):
        raise _no_weights(place)
    return Checkpoint(place)


def open_weights(path: PathLike, limits: CheckpointLimits | Mapping[str, int] | None = None) -> Checkpoint:
    """Open weights without a configuration: a .safetensors file, or a folder with `weights.safetensors`, or with the
    weights of a checkpoint.

    Raises CheckpointError as `open_checkpoint` does.
    """
    if Path(path).suffix == ".safetensors" and not os.path.isdir(path):
        return Checkpoint(ModelFolder.find(Path(path).parent, limits), Path(path).name)
    if os.path.isfile(path):
        refuse_pickle(Path(path).name, shown_path(path))
        raise CheckpointError(
            "weights are a folder or a .safetensors file",
            received=shown_path(path),
            hint="a folder that `treadle train` wrote, or the file in it that ends in .safetensors",
        )
    place = ModelFolder.find(path, limits)
    single = next((name for name in (_SINGLE, _TRAINED) if place.has(name)), None)
    if single is None and not place.has(_INDEX):
        raise _no_weights(place, is_plain=True)
    return Checkpoint(place, single or _SINGLE)


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
            received=f"{len(snapshots)} snapshots: " + ", ".join(map(printable, snapshots[:_LISTED])),
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


def _no_config(place: ModelFolder) -> CheckpointError:
    entries = place.entries()
    models = [name for name in entries if name.startswith(_CACHED)]
    if models:
        return CheckpointError(
            f"a cache of several models has no {_CONFIG}",
            received=_list(models),
            within=place.shown,
            hint=f"name one of them: {place.show(models[0])}",
        )
    return CheckpointError(
        f"the folder has no {_CONFIG}",
        received=_list(entries),
        within=place.shown,
        hint=f"name the folder of a Hugging Face model: {_CONFIG} and {_SINGLE}",
    )


def _no_weights(place: ModelFolder, *, is_plain: bool = False) -> CheckpointError:
    """Return the error for a folder without weights.

    is_plain  True if the folder may hold the weights of a declaration
    """
    entries = place.entries()
    names = f"{_TRAINED}, {_SINGLE} and {_INDEX}" if is_plain else f"{_SINGLE} nor {_INDEX}"
    pickles = [name for name in entries if Path(name).suffix.lower() in PICKLE_SUFFIXES]
    if pickles:
        return CheckpointError(
            "the weights are pickles, which can run any code when they are loaded, so none is ever loaded",
            received=_list(pickles),
            within=place.shown,
            hint=CONVERSION,
        )
    return CheckpointError(
        f"the folder has {'none of ' if is_plain else 'neither '}{names}",
        received=_list(entries),
        within=place.shown,
        hint="the folder, or the safetensors file, that holds the weights",
    )


def _list(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return (", ".join(map(printable, names[:_LISTED])) or "an empty folder") + more

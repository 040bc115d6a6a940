"""The checkpoint of a Hugging Face model folder: config.json and safetensors weights.

    folder/config.json
    folder/model.safetensors                or  folder/model.safetensors.index.json
                                                folder/model-00001-of-00002.safetensors, ...

Source: `from_pretrained` of Hugging Face transformers for the names of files. Files are opened through
`treadle.frontends.model_folder`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from treadle.files.contained_files import PathLike
from treadle.files.limits import MORE, limit_hint
from treadle.files.nearest_names import NearestNames
from treadle.files.shown_names import printable, shown_path
from treadle.files.strict_json import JsonReader
from treadle.frontends.adapter_folders import adapter_error
from treadle.frontends.mapped_tensors import TensorRecord
from treadle.frontends.model_folder import CACHED, CONFIG, LISTED, ModelFolder
from treadle.frontends.safetensors_file import (
    PICKLE_SUFFIXES,
    CheckpointLimits,
    SafetensorsFile,
    conversion,
    refuse_pickle,
)
from treadle.ir.errors import CheckpointError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_TRAINED = "weights.safetensors"  # written by training for a model of a declaration


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
            more = f" and {len(absent) - LISTED} more" if len(absent) > LISTED else ""
            raise CheckpointError(
                f"the index places {len(absent)} tensors in a shard that does not hold them",
                received=", ".join(map(printable, absent[:LISTED])) + more,
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
    if not place.has(CONFIG):
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


def _no_config(place: ModelFolder) -> CheckpointError:
    entries = place.entries()
    models = [name for name in entries if name.startswith(CACHED)]
    if models:
        return CheckpointError(
            f"a cache of several models has no {CONFIG}",
            received=_list(models),
            within=place.shown,
            hint=f"name one of them: {place.show(models[0])}",
        )
    return adapter_error(place) or CheckpointError(
        f"the folder has no {CONFIG}",
        received=_list(entries),
        within=place.shown,
        hint=f"name the folder of a Hugging Face model: {CONFIG} and {_SINGLE}",
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
            hint=conversion(place.show(next((name for name in pickles if "model" in name), pickles[0]))),
        )
    return adapter_error(place) or CheckpointError(
        f"the folder has {'none of ' if is_plain else 'neither '}{names}",
        received=_list(entries),
        within=place.shown,
        hint="the folder, or the safetensors file, that holds the weights"
        if is_plain
        else f"put {_SINGLE} of the model there, or name the folder that holds it, with its {CONFIG}",
    )


def _list(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return (", ".join(map(printable, names[:LISTED])) or "an empty folder") + more

"""Save trained weights in a folder like the original one, with each tensor's original dtype.

    saver = saver_for(trainer.resolved, Path("trained"))    # raises at once if saving is not possible
    ...
    saver.save(trainer.weights)

    trained/model.safetensors       every tensor of the checkpoint: parameters updated, all others unchanged
    trained/config.json, ...        settings, vocabulary and chat template, byte for byte

Shards become one file. A parameter that a checkpoint stores twice (an embedding that is also the output matrix) is
written to both tensors.

    trained/weights.safetensors     the weights of a declaration, under parameter names
    trained/tokenizer.json, ...     its tokenizer and chat template
    trained/config.json             a reference to the declaration (`treadle.program.trained_folders`), the end of text
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from treadle.exporting.file_formats import writing_hint
from treadle.files.contained_files import PathLike
from treadle.files.shown_names import printable, shown_path
from treadle.files.whole_files import check_writable, replacing, reporting_failed_writes
from treadle.frontends.binding import Source, alternatives, bind
from treadle.frontends.huggingface import Checkpoint, open_checkpoint
from treadle.frontends.mapped_tensors import TensorRecord
from treadle.frontends.model_folder import ModelFolder
from treadle.frontends.quantized.quantized_checkpoint import open_quantized
from treadle.frontends.vocabularies.folder_vocabulary import TOKENIZER_FILES
from treadle.ir.errors import GraphError, Hint, UsageError
from treadle.ir.literals import Literal
from treadle.ir.types import DTYPES
from treadle.models.registry import family_of
from treadle.program.source import ModelSource, Resolved
from treadle.program.trained_folders import DeclarationReference
from treadle.training.saved_uses import SavedUse, use_of_declaration, use_of_folder
from treadle.training.text_data import TextFiles
from treadle.training.weight_files import WrittenTensor, write_tensors, write_weights

Array = npt.NDArray[Any]
Shape = tuple[int, ...]

MODEL, WEIGHTS = "model.safetensors", "weights.safetensors"

_SETTINGS = (".json", ".txt", ".model", ".jinja")
"""Suffixes of the files that a model needs in addition to weights: config.json, vocab.txt, tokenizer.model, ..."""
_WEIGHTS_INDEX = ".index.json"
_CONFIG, _GENERATION, _MODULES = "config.json", "generation_config.json", "modules.json"
_FILE_BYTES = 256 << 20
_ROUNDED = ("f16", "bf16")
_FIRST = 4096  # bytes to compare first: tensors that differ mostly differ here


@dataclass(frozen=True)
class SavedModel:
    """The files that a saver wrote.

    folder   the folder that the caller chose
    files    the files in the folder, the file of weights first
    loading  code and command that load the weights again
    """

    folder: Path
    files: tuple[Path, ...]
    loading: str


class Saver(Protocol):
    """A writer of trained weights to a folder. It can write several times."""

    def save(self, weights: Mapping[str, Array]) -> SavedModel:
        """Write the model with these weights, which are named by parameter.

        Raises UsageError if a file cannot be written, or if a weight is out of the range of the checkpoint's dtype.
        """

    def with_texts(self, texts: TextFiles) -> Saver:
        """Return a saver that writes the files of the tokenizer with which the model is trained."""


def saver_for(resolved: Resolved, target: PathLike, *, replace: bool = False) -> Saver:
    """Return a saver that writes a model's trained weights to a folder.

    replace  True if the folder may contain files; files of the same names are overwritten, others stay

    Raises UsageError if the model's format cannot be written (a GGUF or an ONNX file, CTranslate2's layout), or if the
    target is the model's own folder, is not a folder, cannot be written or is not empty; and CheckpointError as
    `open_checkpoint` does.
    """
    source = resolved.source
    if source.kind == "graph":
        return WeightsSaver(checked_folder(target, replace))
    if source.kind == "declaration":
        assert resolved.model is not None
        path = source.path
        own = path if path is None or path.is_dir() else path.parent
        folder, reference = checked_folder(target, replace, own), source.reference(resolved.model)
        kept = TextFiles({} if source.text_source is source else source.text_files())
        return WeightsSaver(folder, reference, use_of_declaration(resolved), kept)
    shapes = {name: value.type.static_shape or () for name, value in resolved.graph.parameters.items()}
    saver = FolderSaver.open(source, shapes, target, replace=replace)
    saver = dataclasses.replace(saver, use=use_of_folder(resolved))
    return saver if source.text_source is source else saver.with_texts(TextFiles(source.text_files()))


@dataclass(frozen=True)
class WeightsSaver:
    """A writer of the weights of a declaration or a graph, under parameter names.

    reference  the declaration, to which config.json refers; None for a graph, whose folder has weights alone
    use        the use of the model, if it is saved with a tokenizer
    texts      the files of the model's tokenizer
    """

    target: Path
    reference: DeclarationReference | None = None
    use: SavedUse = field(default_factory=SavedUse)
    texts: TextFiles = field(default_factory=lambda: TextFiles({}))

    def save(self, weights: Mapping[str, Array]) -> SavedModel:
        """Write `weights.safetensors`: see `Saver`."""
        make_folder(self.target)
        written = [self.target / WEIGHTS]
        write_weights(written[0], weights)
        files = dict(self.texts.files)
        if self.reference is not None:  # last: without it the folder is weights alone
            end = {"eos_token_id": list(self.texts.end)} if self.texts.end else {}
            files[_CONFIG] = json.dumps({**self.reference.record(), **end}, indent=2).encode() + b"\n"
        for name, data in files.items():
            written.append(self.target / name)
            write_file(written[-1], data)
        return SavedModel(self.target, tuple(written), self._loading())

    def _loading(self) -> str:
        folder = os.fspath(self.target)
        use = self.use.with_texts(self.texts)
        if self.reference is None:
            return f"treadle.compile(model, weights={folder!r})"
        if self.reference.is_family:
            return Hint(f"treadle.compile({folder!r})", use.command(shlex.quote(folder)))
        label = self.reference.label
        return Hint(
            f"treadle.compile({label!r}, weights={folder!r})", use.command(shlex.join([label, "--weights", folder]))
        )

    def with_texts(self, texts: TextFiles) -> WeightsSaver:
        """See `Saver`."""
        return dataclasses.replace(self, texts=texts)


@dataclass(frozen=True)
class FolderSaver:
    """A writer of a folder like the original folder of a model.

    parts   by tensor, the parameters that are stored in the tensor, each with its part of the tensor
    copies  by unused tensor, a used tensor with equal elements; the unused tensor is written with the same new values
    added   by parameter that the checkpoint does not store separately: the name of its own tensor, and the tensor that
            it shares. Its own tensor is written if training gave the sharing parameters different values
    settings  the files that are copied
    texts     the files of another tokenizer, with which the model is trained; None: the folder's own are copied
    use       the use of the model with the tokenizer that is saved
    """

    checkpoint: Checkpoint
    target: Path
    parts: Mapping[str, Mapping[str, Source]]
    copies: Mapping[str, str]
    added: Mapping[str, tuple[str, str]]
    settings: tuple[str, ...]
    texts: TextFiles | None = None
    use: SavedUse = field(default_factory=SavedUse)

    @classmethod
    def open(
        cls, source: ModelSource, parameters: Mapping[str, Shape], target: PathLike, *, replace: bool = False
    ) -> FolderSaver:
        """Return a saver for an opened model: find the tensors that store these parameters. Raises as `saver_for`
        does.
        """
        checkpoint = _opened(source)
        family = family_of(checkpoint.config)
        table = family.read(checkpoint.config).table
        wanted = {name: (shape, "f32") for name, shape in parameters.items()}
        bound = bind(wanted, table, checkpoint, prefixes=family.prefixes, deferred=True)
        known = alternatives(parameters, table, checkpoint, prefixes=family.prefixes)
        parts: dict[str, dict[str, Source]] = {}
        for name, part in bound.sources.items():
            parts.setdefault(part.name, {})[name] = part
        names = {
            name: {each.name for parameter in of for each in known[parameter] if not each.part}
            for name, of in parts.items()
        }
        added = {
            name: (known[name][0].name, part.name)
            for name, part in bound.sources.items()
            if known[name][0].name not in checkpoint and not known[name][0].part and not part.part
        }
        checked = checked_folder(target, replace, checkpoint.folder.path)
        copies = _copies(checkpoint, bound.unused, names)
        return cls(checkpoint, checked, parts, copies, added, tuple(settings_files(checkpoint.folder)))

    def save(self, weights: Mapping[str, Array]) -> SavedModel:
        """Write `model.safetensors` and the settings: see `Saver`."""
        place = self.checkpoint.folder
        make_folder(self.target)
        for below in sorted({name.rpartition("/")[0] for name in self.settings} - {""}):
            if (self.target / below).is_symlink():
                raise UsageError("a link leads out of the output folder", received=below, within=str(self.target))
            make_folder(self.target / below)
        written = [self.target / MODEL]
        write_tensors(written[0], self._tensors(weights), self._metadata())
        for name, data in self.texts.files.items() if self.texts is not None else ():
            written.append(self.target / name)
            write_file(written[-1], data)
        for name in self.settings:  # config.json last: without it the folder is not a model
            written.append(self.target / name)
            write_file(written[-1], place.read(name, _FILE_BYTES))
        shown = os.fspath(self.target)
        return SavedModel(
            self.target, tuple(written), Hint(f"treadle.compile({shown!r})", self.use.command(shlex.quote(shown)))
        )

    def with_texts(self, texts: TextFiles) -> FolderSaver:
        """See `Saver`. Ids of the folder's generation_config.json are of its own tokenizer, and are left out."""
        kept = tuple(name for name in self.settings if name not in (*TOKENIZER_FILES, _GENERATION))
        ends = json.dumps({"eos_token_id": list(texts.end)} if texts.end else {}).encode()
        files = TextFiles({**texts.files, _GENERATION: ends}, texts.end)
        return dataclasses.replace(self, settings=kept, texts=files, use=self.use.with_texts(texts))

    def _tensors(self, weights: Mapping[str, Array]) -> list[WrittenTensor]:
        """Return the tensors to write: the updated tensors, their copies, and all other tensors of the checkpoint."""
        parts = {name: dict(of) for name, of in self.parts.items()}
        apart = {}
        for parameter, (new, shared) in self.added.items():
            same = [name for name, part in parts[shared].items() if part == parts[shared][parameter]]
            if any(not np.array_equal(weights[parameter], weights[name], equal_nan=True) for name in same):
                apart[new] = shared, {parameter: parts[shared].pop(parameter)}
        tensors = []
        for name in self.checkpoint.names():
            record = self.checkpoint.record(name)
            of = parts.get(self.copies.get(name, name), {})
            tensors.append(_written(name, record, partial(self._values, name, record, of, weights)))
        for name, (shared, of) in apart.items():
            record = self.checkpoint.record(shared)
            tensors.append(_written(name, record, partial(self._values, shared, record, of, weights)))
        return tensors

    def _values(
        self, name: str, record: TensorRecord, parts: Mapping[str, Source], weights: Mapping[str, Array]
    ) -> Array:
        """Return a tensor's elements, with the trained parameters written into their parts."""
        raw = self.checkpoint.raw(name)
        if not parts:
            return raw
        stored: Array = raw.copy().view(_element(record.dtype)).reshape(record.shape)
        for parameter, part in parts.items():
            part.write(stored, _rounded(parameter, np.asarray(weights[parameter]), record.dtype))
        return stored

    def _metadata(self) -> dict[str, str]:
        """Return the metadata of the checkpoint's first file, with the `format` that other libraries expect."""
        return {"format": "pt", **self.checkpoint.metadata}


def _opened(source: ModelSource) -> Checkpoint:
    """Return the checkpoint of a folder. Raises UsageError for a model of another format."""
    path, converted = source.place, source.kind == "ctranslate2"
    if source.kind != "safetensors":
        raise UsageError(
            "trained weights can only be saved in the layout of a folder with config.json and model.safetensors",
            received="a folder in CTranslate2's layout" if converted else path.name,
            within=shown_path(path.parent if path.is_file() else path),
            hint="the folder from which it was converted",
        )
    checkpoint = open_checkpoint(source.folder)
    if open_quantized(checkpoint) is not checkpoint:
        raise UsageError(
            "trained weights cannot be saved in the layout of a folder whose weights are quantized",
            received=checkpoint.label,
            hint="the folder of the model before it was quantized",
        )
    return checkpoint


def _copies(checkpoint: Checkpoint, unused: Iterable[str], names: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """Return the copies: by unused tensor, a used tensor with the same dtype, shape and elements.

    names  by used tensor, its alternative names. A tensor with an unrelated name is only a copy if its elements are not
           all the same number, since biases of zeros are equal by accident.
    """
    copies = {}
    for name in unused:
        record = checkpoint.record(name)
        for other, called in names.items():
            their = checkpoint.record(other)
            if (record.dtype, record.shape) != (their.dtype, their.shape):
                continue
            raw, theirs = checkpoint.raw(name), checkpoint.raw(other)
            if not np.array_equal(raw[:_FIRST], theirs[:_FIRST]) or not np.array_equal(raw, theirs):
                continue
            elements = raw.reshape(-1, max(1, record.nbytes // max(1, int(np.prod(record.shape)))))
            if name in called or (len(record.shape) and (elements != elements[:1]).any()):
                copies[name] = other
                break
    return copies


def _written(name: str, record: TensorRecord, values: Any) -> WrittenTensor:
    return WrittenTensor(name, record.dtype, record.shape, record.nbytes, values)


def _element(dtype: str) -> np.dtype[Any]:
    """Return NumPy's dtype for a stored dtype: little-endian, and u16 for bf16."""
    held = DTYPES[dtype].numpy
    return np.dtype("<u2") if held is None else held.newbyteorder("<")


def _rounded(name: str, values: Array, dtype: str) -> Array:
    """Return values converted to a stored dtype, rounded to nearest even.

    Raises UsageError if a finite value would become infinite.
    """
    if dtype not in _ROUNDED:
        return values
    try:
        return np.frombuffer(Literal.of(values, DTYPES[dtype]).data, _element(dtype)).reshape(values.shape)
    except GraphError:
        largest = float(np.abs(values[np.isfinite(values)]).max())
        raise UsageError(
            f"{printable(name)} is out of the range of {dtype}, the checkpoint's dtype",
            received=f"values up to {largest:g}",
            hint=Hint("a lower learning_rate, or max_grad_norm", "a lower --learning-rate, or --max-grad-norm"),
        ) from None


def settings_files(place: ModelFolder) -> list[str]:
    """Return the files that a model needs in addition to weights, as paths relative to the folder; config.json is
    last.
    """
    found = []
    for name in sorted(os.listdir(place.path)):
        path = place.path / name
        if path.is_file() and name.endswith(_SETTINGS) and not name.endswith(_WEIGHTS_INDEX):
            found.append(name)
        elif (
            path.is_dir() and place.has(_MODULES) and (path / _CONFIG).is_file()
        ):  # the layout of sentence-transformers
            found.append(f"{name}/{_CONFIG}")
    for name in found:
        place.file(name)  # raises if the file is a link to another folder
    return sorted(found, key=lambda name: name == _CONFIG)


def checked_folder(target: PathLike, replace: bool, source: Path | None = None) -> Path:
    """Return the folder to write. Raises UsageError as `saver_for` does."""
    path = Path(target)
    shown = shown_path(path)
    with (
        reporting_failed_writes("the folder", path, hint="another name"),  # a name that is too long
        suppress(FileNotFoundError, NotADirectoryError),
    ):
        os.lstat(path)
    if path.exists() and not path.is_dir():
        raise UsageError("weights are saved in a folder, but this is a file", received=shown, hint="another name")
    if writing_hint(path, "MODEL") is not None and not path.exists():
        what = f"weights are saved in a folder, but the name has a file's suffix, {path.suffix}"
        raise UsageError(what, received=shown, hint=shown.removesuffix(path.suffix))
    if source is not None and path.exists() and path.resolve() == source.resolve():
        raise UsageError(
            "the model's own folder cannot be overwritten", received=shown, hint="another folder for the trained model"
        )
    if path.is_dir() and not replace and any(os.scandir(path)):
        raise UsageError(
            "the folder to save in is not empty",
            received=shown,
            hint=Hint("another folder, or replace=True", "another folder, or --replace"),
        )
    above = next(each for each in (path, *path.absolute().parents) if each.exists())
    with reporting_failed_writes("the folder", above, hint="a writable folder"):
        check_writable(above / WEIGHTS)
    return path


def make_folder(folder: Path) -> None:
    """Create a folder unless it exists. Raises UsageError if this fails."""
    with reporting_failed_writes("the folder", folder):
        folder.mkdir(parents=True, exist_ok=True)


def write_file(path: Path, data: bytes) -> None:
    with reporting_failed_writes("the file", path), replacing(path) as file:
        file.write(data)

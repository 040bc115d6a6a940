"""Models as folders of compressed-tensors: a folder like the model's own, with quantized weights in their own integers.

    module.weight_packed, weight_shape     4 bits: i32[N, K/8], the first in the low bits, of q + 8 (or q, with zeros)
    module.weight                          8 bits: i8[N, K]
    module.weight_scale                    f16 or f32 [N, groups]; weight_zero_point if there are zeros

Each distinct form is a group of `config_groups`, with the names of its modules. Source:
https://github.com/vllm-project/compressed-tensors; `treadle.frontends.quantized.compressed_weights` reads such folders.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from treadle.backends.onnx.exporter import weights_alone
from treadle.exporting.format_hints import as_onnx, rounds_activations
from treadle.files.shown_names import printable
from treadle.frontends.binding import Source, alternatives
from treadle.frontends.huggingface import Checkpoint, open_checkpoint
from treadle.frontends.quantized.quantized_checkpoint import open_quantized
from treadle.ir.axes import Role
from treadle.ir.encodings.encoding import Encoding
from treadle.ir.encodings.plain_integers import IntegerParts, integer_parts
from treadle.ir.errors import Hint, UsageError
from treadle.ir.graph import Graph
from treadle.ir.transforms.inline import inline_calls
from treadle.models.registry import family_of
from treadle.program.source import Resolved
from treadle.training.saving import MODEL, checked_folder, make_folder, settings_files, write_file
from treadle.training.weight_files import WrittenTensor, write_tensors

Array = np.ndarray[Any, Any]

_CONFIG, _KEY = "config.json", "quantization_config"
_FILE_BYTES = 256 << 20


@dataclass(frozen=True)
class _Group:
    """The modules of one form, and the settings of its weights."""

    format: str
    weights: dict[str, Any]
    targets: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        common = {"dynamic": False, "observer": "minmax", "observer_kwargs": {}, "actorder": None}
        return {
            "format": self.format,
            "targets": self.targets,
            "weights": {**self.weights, **common, "block_structure": None},
            "input_activations": None,
            "output_activations": None,
        }


def export_compressed(
    resolved: Resolved, graph: Graph, weights: Mapping[str, Any], target: Path
) -> tuple[list[Path], list[str]]:
    """Write a folder. Return its files, and notes on weights that are decoded because the format cannot hold them.

    graph    the optimized graph, whose types have the encodings of the weights

    Raises UsageError for a model that is not a folder, a weight in a form or in a tensor that the format cannot hold,
    and a folder that cannot be written.
    """
    if resolved.source.kind != "safetensors":
        is_trained = resolved.source.kind == "declaration" and resolved.source.path is not None
        kind = "weights of a declaration" if is_trained else resolved.source.kind
        raise UsageError(
            "compressed-tensors is a layout of Hugging Face folders: config.json and safetensors files",
            received=f"{printable(resolved.source.label)}, {kind}",
            hint=as_onnx(graph),
        )
    if rounds_activations(graph):
        raise UsageError(
            "activations that are quantized at every call are not written to a compressed-tensors folder",
            hint=weights_alone(graph),
        )
    checkpoint = open_checkpoint(resolved.source.folder)
    folder = checked_folder(target, False, checkpoint.folder.path)
    groups: dict[tuple[Any, ...], _Group] = {}
    notes: list[str] = []
    tensors = list(_tensors(graph, weights, checkpoint, groups, notes))
    if not groups:
        raise UsageError(
            "no weight is quantized, so there is nothing to write to a compressed-tensors folder",
            received=printable(resolved.source.label),
            hint=Hint("quantize='int8-weights' or 'int4'", "--quantize int8-weights or int4"),
        )
    make_folder(folder)
    files = [folder / MODEL]
    write_tensors(files[0], tensors, {"format": "pt", **checkpoint.metadata})
    for name in settings_files(checkpoint.folder):  # config.json last: without it the folder is not a model
        data = checkpoint.folder.read(name, _FILE_BYTES)
        if name == _CONFIG:
            data = json.dumps({**json.loads(data), _KEY: _settings(list(groups.values()))}, indent=2).encode()
        files.append(folder / name)
        make_folder(files[-1].parent)
        write_file(files[-1], data)
    return files, notes


def _settings(groups: Sequence[_Group]) -> dict[str, Any]:
    formats = {group.format for group in groups}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {f"group_{n}": group.as_dict() for n, group in enumerate(groups)},
        "ignore": [],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _tensors(
    graph: Graph,
    weights: Mapping[str, Any],
    checkpoint: Checkpoint,
    groups: dict[tuple[Any, ...], _Group],
    notes: list[str],
) -> Iterator[WrittenTensor]:
    """Yield the tensors of the folder, and add the quantized modules to `groups`."""
    family = family_of(checkpoint.config)
    store = open_quantized(checkpoint)
    known = alternatives(graph.parameters, family.read(checkpoint.config).table, store, prefixes=family.prefixes)
    tables = _tables(graph)
    written: set[str] = set()
    for name, value in graph.parameters.items():
        source = next((each for each in known[name] if each.name in store), known[name][0])
        encoding = value.type.encoding
        if encoding is not None and name not in tables:
            yield from _quantized(name, encoding, weights[name], source, groups)
            written.add(source.name)
            continue
        if source.name in written:
            continue
        written.add(source.name)
        if encoding is None and source.name in checkpoint:
            record = checkpoint.record(source.name)
            read = partial(checkpoint.raw, source.name)
            yield WrittenTensor(source.name, record.dtype, record.shape, record.nbytes, read)
            continue
        if source.part:
            raise _refusal(name, source, "it is a part of a tensor")
        numbers = np.asarray(weights[name], np.float32) if encoding is None else encoding.decode(weights[name])
        if encoding is not None:
            notes.append(f"{printable(source.name)} is decoded from {encoding}: rows of it are looked up")
        yield _plain(source.name, "f32", numbers)


def _tables(graph: Graph) -> frozenset[str]:
    """Return the names of the weights that are used in other ways than as matrices of products, such as tables of
    embeddings.
    """
    main = inline_calls(graph).main
    uses, found = main.uses(), set[str]()
    for name, value in main.parameters.items():
        decoded = [node.result for node, _ in uses.get(value, ()) if node.op.decodes]
        for reader, at in [use for v in decoded for use in uses.get(v, ())]:
            applied = reader.op.apply([None if v is None else v.type for v in reader.operands])
            names = [n for dim in applied.operands[at] or () for n in dim.factors]
            if any(applied.factors[n].role is Role.INDEXED for n in names):
                found.add(name)
    return frozenset(found)


def _quantized(
    name: str, encoding: Encoding, blocks: Any, source: Source, groups: dict[tuple[Any, ...], _Group]
) -> Iterator[WrittenTensor]:
    """Yield the tensors of a quantized weight of a linear layer."""
    module = source.name.removesuffix(".weight")
    if source.part or module == source.name:
        raise _refusal(name, source, "it is a part of a tensor, or a linear layer is not stored as [outputs, inputs]")
    parts = integer_parts(encoding, np.asarray(blocks)) if encoding.axis == -1 else None
    if parts is None:
        raise _refusal(name, source, f"{encoding} has no form in compressed-tensors that is written here")
    packed = parts.bits == 4
    if packed and (parts.q.shape[1] % 8 or (parts.zero is not None and parts.q.shape[0] % 8)):
        raise _refusal(
            name, source, f"{parts.q.shape[0]} rows of {parts.q.shape[1]} are not an integer number of words"
        )
    settings: dict[str, Any] = {"num_bits": parts.bits, "type": "int", "symmetric": parts.zero is None}
    settings |= {"strategy": "channel" if parts.whole else "group", "group_size": None if parts.whole else parts.block}
    format = "pack-quantized" if packed else "int-quantized"
    group = groups.setdefault((format, *settings.values()), _Group(format, settings))
    group.targets.append(module)
    scale = "f16" if parts.scale.dtype == np.float16 else "f32"
    yield _plain(f"{module}.weight_scale", scale, parts.scale)
    if packed:
        yield _plain(f"{module}.weight_packed", "i32", _words(_nibbles(parts)))
        yield _plain(f"{module}.weight_shape", "i64", np.array(parts.q.shape, np.int64))
    else:
        yield _plain(f"{module}.weight", "i8", _signed(parts.q))
    if parts.zero is not None:
        zero = np.ascontiguousarray(_words(parts.zero.T).T) if packed else _signed(parts.zero)
        yield _plain(f"{module}.weight_zero_point", "i32" if packed else "i8", zero)


def _nibbles(parts: IntegerParts) -> Array:
    """Return 4-bit integers from 0 to 15: 8 more than signed ones."""
    return parts.q if parts.q.dtype == np.uint8 else (parts.q + np.int8(8)).view(np.uint8)


def _signed(q: Array) -> Array:
    """Return 8-bit integers as signed ones: 128 less than unsigned ones, as their zero points are."""
    return q if q.dtype == np.int8 else (q ^ np.uint8(128)).view(np.int8)


def _words(codes: Array) -> Array:
    """Pack 4-bit integers [n, k] into little-endian words i32[n, k / 8], the first in the low bits."""
    held = np.ascontiguousarray(codes)
    made: Array = np.ascontiguousarray(held[:, 0::2] | (held[:, 1::2] << np.uint8(4))).view("<i4")
    return made


def _plain(name: str, dtype: str, values: Array) -> WrittenTensor:
    held = np.ascontiguousarray(values)
    return WrittenTensor(name, dtype, held.shape, held.nbytes, lambda: held)


def _refusal(name: str, source: Source, why: str) -> UsageError:
    return UsageError(
        f"{printable(name)} cannot be written to a compressed-tensors folder: {why}",
        received=f"read from {source}",
        hint=Hint("export_onnx", "--to onnx -o FILE.onnx"),
    )

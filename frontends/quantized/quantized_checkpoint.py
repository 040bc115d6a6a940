"""A model folder whose quantized weights are read as blocks. `open_quantized` chooses the reader of its format."""

from __future__ import annotations

import hashlib
import itertools
import json
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from treadle.files.converted_arrays import ConvertedArray
from treadle.files.shown_names import printable
from treadle.frontends.huggingface import Checkpoint
from treadle.frontends.mapped_tensors import TensorRecord
from treadle.frontends.model_folder import ModelFolder
from treadle.frontends.quantized.awq_weights import read_awq
from treadle.frontends.quantized.bitsandbytes_weights import read_bitsandbytes
from treadle.frontends.quantized.compressed_weights import read_compressed
from treadle.frontends.quantized.fp8_weights import read_fp8
from treadle.frontends.quantized.gptq_weights import read_gptq
from treadle.frontends.quantized.module_parts import ModuleParts
from treadle.frontends.quantized.mxfp4_weights import read_mxfp4
from treadle.frontends.quantized.quantized_weights import QuantizedWeight
from treadle.frontends.quantized.settings import QuantizationSettings, find_settings
from treadle.frontends.quantized.torchao_weights import read_torchao
from treadle.frontends.quantized.weight_components import formats_hint
from treadle.ir.errors import CheckpointError
from treadle.ir.transforms.rounded_inputs import InputSteps

Read = Callable[[QuantizationSettings, ModuleParts], Mapping[str, QuantizedWeight]]
"""A reader of a format. It returns the quantized weights by name, and takes their parts."""

READERS: Mapping[str, Read] = {
    "gptq": read_gptq,
    "awq": read_awq,
    "compressed-tensors": read_compressed,
    "bitsandbytes": read_bitsandbytes,
    "fp8": read_fp8,
    "mxfp4": read_mxfp4,
    "torchao": read_torchao,
}
"""The readers by `quant_method`."""

_CONVERSION = "quantized weights 1"
"""The version of the conversion to blocks, for caches: it changes if equal files would give other blocks."""

_IRRELEVANT = frozenset(
    [
        "damp_percent",
        "damp_auto_increment",
        "static_groups",
        "true_sequential",
        "model_name_or_path",
        "model_file_base_name",
        "dataset",
        "tokenizer",
        "block_name_to_quantize",
        "module_name_preceding_first_block",
        "batch_size",
        "pad_token_id",
        "use_cuda_fp16",
        "model_seqlen",
        "exllama_config",
        "use_exllama",
        "disable_exllama",
        "max_input_length",
        "cache_block_outputs",
        "modules_in_block_to_quantize",
        "backend",
        "meta",
        "lm_head",
        "mse",
        "act_group_aware",
        "hyb_act",
        "desc_act",
        "sym",
        "inference_only",
        "quantizer",
        "offload_to_disk",
        "offload_to_disk_path",
        "do_fuse",
        "fuse_max_seq_len",
        "modules_to_fuse",
        "modules_to_not_convert",
        "actorder",
        "observer",
        "observer_kwargs",
        "block_structure",
        "group_size",
        "strategy",
        "zp_dtype",
        "scale_dtype",
        "quantization_status",
        "global_compression_ratio",
        "version",
        "ignored_layers",
        "bnb_4bit_compute_dtype",
        "bnb_4bit_quant_type",
        "bnb_4bit_use_double_quant",
        "llm_int8_enable_fp32_cpu_offload",
        "llm_int8_has_fp16_weight",
        "llm_int8_skip_modules",
        "llm_int8_threshold",
    ]
)
"""Keys that choose how weights were quantized or which kernels read them, but not their numbers."""


class QuantizedCheckpoint:
    """A checkpoint in which a quantized weight is one tensor, f32[N, K]; the tensors with its parts are not listed.

    checkpoint  the folder as it is stored
    unread      keys of the settings that the reader does not know
    roundings   the roundings of inputs that the settings ask for, by the names of weights
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        weights: Mapping[str, QuantizedWeight],
        parts: ModuleParts,
        settings: QuantizationSettings,
    ) -> None:
        self.checkpoint, self.roundings = checkpoint, parts.roundings
        self.unread = settings.unread(_IRRELEVANT)
        self._weights, self._module_parts, self._parts = dict(weights), parts, parts.names
        self._settings = json.dumps(settings.content, sort_keys=True)
        self._sorted = sorted(self._parts)

    @property
    def folder(self) -> ModelFolder:
        """The folder with the files."""
        return self.checkpoint.folder

    @property
    def config(self) -> dict[str, Any]:
        """The content of config.json, not to be changed."""
        return self.checkpoint.config

    @property
    def label(self) -> str:
        """The name, in errors, of the file that lists the tensors."""
        return self.checkpoint.label

    def names(self) -> tuple[str, ...]:
        """Return the names of the weights and of the tensors that are not quantized."""
        return (*self._weights, *(name for name in self.checkpoint.names() if name not in self._parts))

    def __contains__(self, name: object) -> bool:
        return name in self._weights or (name in self.checkpoint and name not in self._parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def record(self, name: str) -> TensorRecord:
        """Return the dtype, shape and encoding of a tensor. Raises CheckpointError if there is none of this name, and
        for a damaged weight.
        """
        weight = self._weights.get(name)
        return self.checkpoint.record(name) if weight is None else weight.record(name)

    def array(self, name: str) -> npt.NDArray[Any]:
        """Return a tensor, read-only; a quantized weight is decoded to float32. Raises CheckpointError as `record`."""
        weight = self._weights.get(name)
        if weight is None:
            return self.checkpoint.array(name)
        made = weight.numbers()
        made.flags.writeable = False
        return made

    def bits(self, name: str) -> npt.NDArray[np.uint16]:
        """Return the bits of a bf16 tensor: see `SafetensorsFile.bits`."""
        return self.checkpoint.bits(name)

    def block_bytes(self, name: str) -> ConvertedArray:
        """Return a quantized weight's blocks, u8[N, bytes of a row], which are converted when they are read; damaged
        numbers then raise CheckpointError. Raises CheckpointError if the tensor is not stored in blocks of an encoding.
        """
        weight = self._weights.get(name)
        if weight is None or weight.form is None:
            what = f"tensor {printable(name)} has no supported block quantization"
            raise CheckpointError(what, received=str(self.record(name)), within=self.label)
        parts = [self.checkpoint.raw(part) for part in self._parts_of(name)]
        recipe = f"{self._settings} {name} {self.checkpoint.metadata_of(weight.first.name).get(name, '')}"
        text = f"{_CONVERSION} {weight.form} {hashlib.sha256(recipe.encode(errors='replace')).hexdigest()}"
        return ConvertedArray(weight.block_shape, parts, text, weight.reader)

    def _parts_of(self, name: str) -> list[str]:
        """Return the parts of a weight: all parts whose names start with its module's name."""
        stem = name.removesuffix("weight")
        first = bisect_left(self._sorted, stem)
        return list(itertools.takewhile(lambda part: part.startswith(stem), self._sorted[first:]))

    def order(self, name: str) -> npt.NDArray[np.int32] | None:
        """Return the input of each column of a weight's blocks, i32[K]; None if the columns are in order."""
        weight = self._weights.get(name)
        return None if weight is None or weight.form is None else weight.order

    def input_steps(self, name: str) -> InputSteps:
        """Return the steps of the static rounding of a weight's inputs. Raises CheckpointError if they are missing or
        damaged.
        """
        return self._module_parts.input_steps(name)

    def decoded(self) -> dict[str, str]:
        """Return the weights that have no encoding, each with the reason."""
        return {name: w.why_decoded for name, w in self._weights.items() if w.form is None}

    def __repr__(self) -> str:
        return f"QuantizedCheckpoint({self.folder.shown!r}, {len(self._weights)} quantized weights)"


def open_quantized(checkpoint: Checkpoint) -> Checkpoint | QuantizedCheckpoint:
    """Return a checkpoint whose quantized weights are read as blocks; a folder without quantization settings is
    returned as it is.

    Raises CheckpointError for a method or an option that is not supported, and for settings that contradict the
    tensors' names, dtypes or shapes. The numbers are read, and checked, later.
    """
    return checkpoint.folder.once((open_quantized, checkpoint.label), lambda: _opened(checkpoint))


def _opened(checkpoint: Checkpoint) -> Checkpoint | QuantizedCheckpoint:
    settings = find_settings(checkpoint.folder)
    if settings is None:
        return checkpoint
    read = READERS.get(settings.method)
    if read is None:
        raise CheckpointError(
            f"weights quantized by {printable(settings.method)} are not supported",
            received=f"quant_method {printable(settings.method)}",
            within=settings.within,
            hint=formats_hint(),
        )
    parts = ModuleParts(checkpoint)
    weights = read(settings, parts)
    if not weights:
        raise CheckpointError(
            f"the settings say that weights are quantized by {settings.method}, but no tensor is",
            received=f"{len(checkpoint)} tensors",
            within=settings.within,
            hint=f"remove the settings if the weights in {printable(checkpoint.label)} are plain numbers",
        )
    return QuantizedCheckpoint(checkpoint, weights, parts, settings)

"""Names of the tensors in which quantized checkpoints store the parts of a weight, and the error for a weight that no
reader of these formats has read.

A weight without its scales is a matrix of arbitrary numbers, so a model never binds it.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Protocol

from treadle.files.shown_names import printable
from treadle.ir.errors import CheckpointError

READ_FORMATS = (
    "gptq",
    "awq",
    "compressed-tensors (pack-quantized, int-quantized, float-quantized, nvfp4 and mxfp4)",
    "bitsandbytes",
    "fp8",
    "mxfp4 (experts of gpt-oss)",
    "torchao (Int8Tensor, IntxUnpackedToInt8Tensor and Float8Tensor)",
)
"""The formats whose weights are read, in words."""

_MODULE = (
    "qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_shape", "weight_scale", "weight_scale_2",
    "weight_scale_inv", "weight_scales", "weight_zero_point", "weight_g_idx", "weight_global_scale",
    "input_scale", "input_zero_point", "input_global_scale", "activation_scale", "scale_weight", "SCB", "weight_format",
    "_weight_qdata", "_weight_scale", "_weight_zero_point", "W_q", "codes", "codebooks", "qidxs", "trellis",
    "centroids.weight", "weight_quantizer.scale", "weight_quantizer._scale", "q_weight", "q_perm",
    "blocks", "weight_blocks",
)  # fmt: skip
"""Parts of a weight, next to the weight's own name: P.weight and P.weight_scale."""
_WEIGHT = (
    ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".quant_state.bitsandbytes__nf4",
    ".quant_state.bitsandbytes__fp4", "._data", "._scale", "_blocks", "_scales", "_scale", "_scale_inv", "_packed",
)  # fmt: skip
"""Parts of a weight below its name: P.weight.absmax."""


class Named(Protocol):
    """A checkpoint, for errors."""

    @property
    def label(self) -> str:
        """The file's name in errors."""


def components(name: str, names: Container[str]) -> Iterator[str]:
    """Yield the names of a weight's quantized parts, other than the weight itself, that a checkpoint has."""
    found = dict.fromkeys(name + part for part in _WEIGHT)
    if name.endswith("weight"):
        found |= dict.fromkeys(name.removesuffix("weight") + part for part in _MODULE)
    yield from (each for each in found if each in names)


def unread_weight(name: str, parts: list[str], checkpoint: Named) -> CheckpointError:
    """Return the error for a quantized weight whose format is not read."""
    return CheckpointError(
        f"{printable(name)} is stored quantized, in a format that is not read here",
        received="with " + ", ".join(map(printable, parts[:4])),
        within=checkpoint.label,
        hint=formats_hint(),
    )


def formats_hint() -> str:
    """Return the end of an error about an unsupported quantized format."""
    other = (
        "the model's checkpoint before quantization, which `quantize=` (`--quantize`) quantizes, or a GGUF file of it"
    )
    return f"formats that are read: {', '.join(READ_FORMATS)}; else {other}"

"""Weights of 8-bit floats, as DeepSeek and Qwen publish them.

    weight            e4m3[N, K]
    weight_scale_inv  f32, bf16, f16 or e8m0: one number per block of `weight_block_size`, rounded up; or weight_scale,
                      one number of the tensor or of each row

    w[n, k] = weight[n, k] weight_scale_inv[n // 128, k // 128]

`activation_scheme` asks for inputs in e4m3, with a scale per token and group of a block's inputs. Source:
`FineGrainedFP8Config` and `integrations/finegrained_fp8.py` of Hugging Face transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from treadle.frontends.quantized.coded_weights import E4M3, CodedWeight
from treadle.frontends.quantized.module_parts import SCALES, ModuleParts
from treadle.frontends.quantized.quantized_weights import QuantizedWeight
from treadle.frontends.quantized.scale_blocks import groups_of_scales
from treadle.frontends.quantized.settings import QuantizationSettings
from treadle.ir.transforms.rounded_inputs import InputRounding

_POWERS = "f8_e8m0"


def read_fp8(settings: QuantizationSettings, parts: ModuleParts) -> Mapping[str, QuantizedWeight]:
    """Return the weights of a folder of 8-bit floats. Raises CheckpointError: see `open_quantized`."""
    settings.choice("fmt", ("e4m3",), "e4m3")
    settings.choice("scale_fmt", ("float", "ue8m0", "float32"), "float")
    blocks = settings.get("weight_block_size")
    static = settings.choice("activation_scheme", ("dynamic", "static"), "dynamic") == "static"
    made: dict[str, QuantizedWeight] = {}
    for part in (".weight_scale_inv", ".weight_scale"):
        for module in parts.modules(part):
            if f"{module}.weight" not in made:
                made[f"{module}.weight"] = weight = _weight(module, module + part, blocks, parts)
                group = -1 if static else weight.scales.group if blocks is not None else 0
                parts.roundings[f"{module}.weight"] = InputRounding("f8e4m3fn", group, static=static)
                names = f"{module}.activation_scale", f"{module}.input_scale"
                parts.steps[f"{module}.weight"] = names[not parts.has(names[0])], ""
                for name in names:
                    parts.hide(name)
    return made


def _weight(module: str, name: str, blocks: object, parts: ModuleParts) -> CodedWeight:
    weight = parts.take(f"{module}.weight", ("f8_e4m3",), (None, None))
    scales = parts.take(name, (*SCALES, _POWERS))
    powers = partial(parts.powers, name) if scales.dtype == _POWERS else None
    found = groups_of_scales(weight, scales, parts, blocks, powers)
    return CodedWeight(weight, f"fp8, {found}", found.shape, E4M3, found, partial(parts.code_rows, weight.name))

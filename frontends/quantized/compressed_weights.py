"""Weights in the formats of compressed-tensors.

    pack-quantized    weight_packed i32[N, K b / 32]        q + 2^(b - 1), the lowest first; b is 4 or 8
                      weight_shape i64[2]                   N, K
                      weight_zero_point i32[N b / 32, G]    packed along n, with the same offset
                      weight_g_idx i32[K]                   the group of each input
    int-quantized     weight i8[N, K], weight_zero_point of the scales' shape
    float-quantized   weight e4m3[N, K]

    nvfp4-pack-quantized   weight_packed u8[N, K / 2]    e2m1, the even input in the low half
                      weight_scale e4m3[N, K / 16], divided by weight_global_scale f32[1]
    mxfp4-pack-quantized   the same bytes; weight_scale u8[N, K / 32], a power of two: 2^(s - 127)

    weight_scale      [N, G]; [N, 1] for rows; [1] for the whole tensor; one per block of 128 x 128, rounded up

    w[n, k] = weight_scale[n, g] (q[n, k] - weight_zero_point[n, g])

Source: https://github.com/neuralmagic/compressed-tensors, `compressed_tensors/compressors` and `quantization`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from treadle.files.shown_names import printable
from treadle.frontends.mapped_tensors import TensorRecord
from treadle.frontends.quantized.coded_weights import E2M1, E4M3, CodedWeight
from treadle.frontends.quantized.module_parts import SCALES, ModuleParts
from treadle.frontends.quantized.quantized_weights import GroupedIntegers, QuantizedWeight, unpack_low_first
from treadle.frontends.quantized.scale_blocks import ScaleBlocks, groups_of_scales
from treadle.frontends.quantized.settings import QuantizationSettings, matches_pattern
from treadle.ir.encodings.coded_forms import table_of
from treadle.ir.errors import CheckpointError
from treadle.ir.transforms.rounded_inputs import InputRounding

Array = np.ndarray[Any, Any]

_PACKED = ("pack-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized")
_FORMATS = (*_PACKED, "int-quantized", "float-quantized", "naive-quantized")
_GROUP = {"nvfp4-pack-quantized": 16, "mxfp4-pack-quantized": 32}
"""Inputs of a group of 4-bit floats."""
_STRATEGIES = ("tensor", "channel", "group", "block", "tensor_group")
_INPUTS = (".input_scale", ".input_zero_point", ".input_global_scale")
"""Scales of activations, which are not rounded."""


@dataclass(frozen=True)
class _Scheme:
    """The settings of a group of modules.

    format    one of `_FORMATS`, except naive-quantized
    bits      bits of a number
    targets   names, patterns and classes of modules
    settings  the group's `weights`
    rounding  the rounding of the inputs of its modules, or None
    """

    format: str
    bits: int
    targets: Sequence[str]
    settings: QuantizationSettings
    rounding: InputRounding | None


def read_compressed(settings: QuantizationSettings, parts: ModuleParts) -> Mapping[str, QuantizedWeight]:
    """Return the weights of a folder of compressed-tensors. Raises CheckpointError: see `open_quantized`."""
    sparsity = settings.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format") not in (None, "dense"):
        raise settings.error("sparsity_config", sparsity.get("format"), "dense: sparse weights are not supported")
    settings.refuse(transform_config="the inputs of layers are transformed")
    groups, ignored = settings.get("config_groups", {}), _names(settings, "ignore", settings.get("ignore", []))
    if not isinstance(groups, Mapping):
        raise settings.error("config_groups", groups, "an object of groups of modules")
    schemes = [_scheme(settings, str(name)) for name in groups]
    made: dict[str, QuantizedWeight] = {}
    for part in (".weight_packed", ".weight_scale"):
        for module in parts.modules(part):
            if f"{module}.weight" in made:
                continue
            scheme = _scheme_of(module, schemes, ignored, settings)
            if part == ".weight_packed" and scheme.format not in _PACKED:
                received = f"{printable(module)}.weight_packed, format {scheme.format}"
                what = "the format of a weight contradicts its name"
                raise CheckpointError(what, received=received, within=settings.within)
            read = _floats if scheme.format in _GROUP else _packed if scheme.format in _PACKED else _plain
            made[f"{module}.weight"] = read(module, scheme, parts)
            if scheme.rounding is not None:
                parts.roundings[f"{module}.weight"] = scheme.rounding
                parts.steps[f"{module}.weight"] = f"{module}.input_scale", f"{module}.input_zero_point"
            for name in _INPUTS:
                parts.hide(module + name)
    return made


def _names(settings: QuantizationSettings, key: str, value: object) -> Sequence[str]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise settings.error(key, value, "a list of names of modules")
    return value


def _scheme(settings: QuantizationSettings, name: str) -> _Scheme:
    of, weights = settings.inside("config_groups", name), settings.inside("config_groups", name, "weights")
    of.get("weights")
    format = of.choice("format", _FORMATS, settings.choice("format", (*_FORMATS, "mixed-precision"), "pack-quantized"))
    kind = weights.choice("type", ("int", "float"), "int")
    if format == "naive-quantized":
        format = f"{kind}-quantized"
    if (kind == "float") != (format == "float-quantized" or format in _GROUP):
        raise weights.error("type", kind, f"the format is {format}")
    bits = weights.integer("num_bits", (4, 8) if format == "pack-quantized" else (4,) if format in _GROUP else (8,))
    weights.choice("strategy", _STRATEGIES, "tensor")
    if weights.get("dynamic", False) is not False:
        raise weights.error("dynamic", weights.get("dynamic"), "false: weights are rounded once")
    rounding = None
    if of.get("input_activations") is not None:
        rounding = _rounding(settings.inside("config_groups", name, "input_activations"))
    return _Scheme(format, bits, _names(of, "targets", of.get("targets", [])), weights, rounding)


def _rounding(settings: QuantizationSettings) -> InputRounding:
    """Return the rounding of inputs that a group of the settings asks for."""
    bits = settings.integer("num_bits", (4, 8))
    number = {"int": f"int{bits}", "float": {4: "f4e2m1", 8: "f8e4m3fn"}[bits]}[
        settings.choice("type", ("int", "float"), "int")
    ]
    by = settings.choice("strategy", (*_STRATEGIES, "token"), "tensor")
    dynamic = settings.get("dynamic", False)
    if dynamic not in (True, False, "local"):
        raise settings.error("dynamic", dynamic, "true, false or local")
    group = 0 if by == "token" else -1
    if by in ("group", "tensor_group"):
        group = settings.group(settings.integer("group_size"))
    elif settings.get("group_size") is not None:
        settings.integer("group_size")
    return InputRounding(number, group, settings.flag("symmetric", True), static=dynamic is not True)


def _scheme_of(
    module: str, schemes: Sequence[_Scheme], ignored: Sequence[str], settings: QuantizationSettings
) -> _Scheme:
    """Return the scheme of a module: by its name, then by a pattern, then by its class, which is Linear."""
    if any(_matches(target, module, settings.within) for target in ignored):
        received = "ignore"
        what = f"the settings exclude {printable(module)}, which has quantized weights"
        raise CheckpointError(what, received=received, within=settings.within)
    for rank in ("name", "pattern", "class"):
        for scheme in schemes:
            for target in scheme.targets:
                pattern = target.startswith("re:")
                known = "pattern" if pattern else "class" if target == "Linear" else "name"
                if rank == known and (rank == "class" or _matches(target, module, settings.within)):
                    return scheme
    what = f"no group of the settings has {printable(module)}, which has quantized weights"
    raise CheckpointError(
        what, received=f"{len(schemes)} groups", within=settings.within, hint="targets of config_groups"
    )


def _matches(target: str, module: str, within: str) -> bool:
    pattern = target.removeprefix("re:")
    return matches_pattern(pattern, module, within) if pattern != target else target == module


def _packed(module: str, scheme: _Scheme, parts: ModuleParts) -> GroupedIntegers:
    bits, name = scheme.bits, f"{module}.weight_packed"
    words = parts.take(name, ("i32",), (None, None))
    parts.take(f"{module}.weight_shape", ("i64", "i32"), (2,))
    outputs, size = (int(n) for n in parts.array(f"{module}.weight_shape"))
    if (outputs, -(-size * bits // 32)) != words.shape or size < 1:
        raise parts.error(name, f"the packed weight does not have the shape [{outputs}, {size}]", str(words))
    scales = parts.take(f"{module}.weight_scale", SCALES, (outputs, None))
    groups = scales.shape[1]
    _check_groups(module, scheme, size, groups, parts)
    symmetric = scheme.settings.flag("symmetric", True)
    if not symmetric:
        parts.take(f"{module}.weight_zero_point", ("i32",), (-(-outputs * bits // 32), groups))

    def factors() -> tuple[Array, Array]:
        found = parts.scales(f"{module}.weight_scale")
        if symmetric:
            return found, np.full(found.shape, 1 << (bits - 1), np.int32)
        return found, unpack_low_first(parts.array(f"{module}.weight_zero_point").T, bits)[:, :outputs].T

    def pairs(rows: slice) -> Array:
        return parts.array(name)[rows].view(np.uint8)[:, : size // 2]

    def integers(rows: slice) -> Array:
        return np.ascontiguousarray(unpack_low_first(parts.array(name)[rows], bits)[:, :size])

    members = None
    if parts.has(f"{module}.weight_g_idx"):
        parts.take(f"{module}.weight_g_idx", ("i32", "i64"), (size,))
        members = parts.members(f"{module}.weight_g_idx", groups, size // groups, unused=-1)
    stored = f"pack-quantized, {bits} bits in groups of {size // groups}"
    length, in_pairs = size // groups, pairs if bits == 4 else None
    return GroupedIntegers(words, stored, (outputs, size), bits, length, integers, factors, members, in_pairs)


def _floats(module: str, scheme: _Scheme, parts: ModuleParts) -> CodedWeight:
    """Return a weight of 4-bit floats."""
    group, name, scale = _GROUP[scheme.format], f"{module}.weight_packed", f"{module}.weight_scale"
    record = parts.take(name, ("u8",), (None, None))
    outputs, size = record.shape[0], 2 * record.shape[1]
    if not scheme.settings.flag("symmetric", True):
        raise scheme.settings.error("symmetric", False, "true, for weights of floats")
    if size % group:
        raise parts.error(name, f"groups of {group} do not divide the {size} inputs", str(record))
    if scheme.format == "nvfp4-pack-quantized":
        parts.take(scale, ("f8_e4m3",), (outputs, size // group))
        whole = parts.take(f"{module}.weight_global_scale", ("f32",), (1,)).name
        read = partial(_global_scales, scale, whole, parts)
    else:
        parts.take(scale, ("u8", "f8_e8m0"), (outputs, size // group))
        read = partial(parts.powers, scale)
    found = ScaleBlocks(1, group, (outputs, size), read)

    stored = f"{scheme.format}, groups of {group}"
    return CodedWeight(record, stored, (outputs, size), E2M1, found, partial(parts.code_rows, name))


def _global_scales(scale: str, whole: str, parts: ModuleParts) -> Array:
    """Return scales that are e4m3 floats, divided by the scale of the tensor."""
    each = parts.checked_scales(scale, table_of(E4M3)[parts.codes(scale)], zero=True)
    made: Array = each / parts.scales(whole)
    return parts.checked_scales(scale, made, zero=True)


def _check_groups(module: str, scheme: _Scheme, size: int, groups: int, parts: ModuleParts) -> None:
    """Raise CheckpointError if the number of scales in a row is not the settings' number of groups."""
    length = scheme.settings.get("group_size")
    whole = length in (None, -1) or scheme.settings.get("strategy", "tensor") in ("tensor", "channel")
    expected = 1 if whole else -(-size // scheme.settings.group(scheme.settings.integer("group_size")))
    if groups != expected or size % groups:
        what = f"a row of {size} inputs has {groups} groups, but the settings give {expected}"
        raise parts.error(f"{module}.weight_scale", what, f"group_size {length}", "group_size must divide the row")


def _plain(module: str, scheme: _Scheme, parts: ModuleParts) -> QuantizedWeight:
    """Return a weight of integers or floats of 8 bits."""
    floats = scheme.format == "float-quantized"
    weight = parts.take(f"{module}.weight", ("f8_e4m3",) if floats else ("i8",), (None, None))
    name = f"{module}.weight_scale"
    scales = parts.take(name, SCALES)
    strategy = scheme.settings.get("strategy", "tensor")
    blocks = scheme.settings.get("block_structure") if strategy == "block" else None
    found = groups_of_scales(weight, scales, parts, blocks)
    if strategy == "group":
        _check_groups(module, scheme, weight.shape[1], scales.shape[1], parts)
    symmetric = scheme.settings.flag("symmetric", True)
    if not symmetric:
        parts.take(f"{module}.weight_zero_point", ("i8",), scales.shape)
    elif parts.has(f"{module}.weight_zero_point"):
        zeros = parts.take(f"{module}.weight_zero_point", ("i8", "i32", "i64", *SCALES, "f8_e4m3"), scales.shape)
        if zeros.dtype != "f8_e4m3" and np.any(parts.array(zeros.name)):
            raise parts.error(zeros.name, "symmetric weights have zeros other than 0", str(zeros))
    if floats:
        if not symmetric:
            raise scheme.settings.error("symmetric", False, "true, for weights of floats")
        return CodedWeight(
            weight, f"float-quantized, {found}", _pair(weight), E4M3, found, partial(parts.code_rows, weight.name)
        )

    def factors() -> tuple[Array, Array]:
        each = found.factors()
        if symmetric:
            return each, np.full(each.shape, 128, np.int32)
        return each, found.spread(parts.array(f"{module}.weight_zero_point").astype(np.int32)) + 128

    return GroupedIntegers(
        weight,
        f"int-quantized, {found}",
        _pair(weight),
        8,
        found.group,
        partial(_offset, weight.name, parts),
        factors,
        found.members,
    )


def _pair(record: TensorRecord) -> tuple[int, int]:
    rows, size = record.shape
    return rows, size


def _offset(name: str, parts: ModuleParts, rows: slice) -> Array:
    """Return signed integers of 8 bits plus 128."""
    return parts.codes(name)[rows] ^ np.uint8(128)

"""Rotary positions in a config.json: the base, the scaling, and the rotated part of a head."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from treadle.files.shown_names import printable
from treadle.frontends.rotary import Dynamic, LinearScaling, Llama3, LongRope, Scaling, Yarn
from treadle.ir.errors import CheckpointError
from treadle.models.family import Config, choose, read_flag, read_float, read_int, require

SCALINGS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
"""The supported values of `rope_type`."""

_MOST_FACTORS = 1 << 15


def read_rotary(
    config: Config,
    head_dim: int,
    *,
    base: float = 10000.0,
    part: float | None = None,
    kinds: tuple[str, ...] = SCALINGS,
    names: tuple[str, str] = ("rope_theta", "partial_rotary_factor"),
) -> dict[str, Any]:
    """Return `base`, `scaling` and `rotary_dims` of a declaration, from a config with heads of `head_dim`.

    They are in `rope_parameters`, or before transformers 5 in `rope_theta`, `rope_scaling` and `partial_rotary_factor`;
    a class may use other `names` for the first and the last of these. If a file has both objects, `rope_scaling`
    counts, as in the library. `base` and `part` are the defaults of Hugging Face's class; a part of None means that the
    class rotates whole heads, whatever the config says; `kinds` are the values of `rope_type` that it accepts.

    Raises CheckpointError, with the option's name, for an unsupported option.
    """
    options = read_object(config, "rope_scaling") or read_object(config, "rope_parameters")
    base = read_float(options, "rope_theta", read_float(config, names[0], base))
    readers = dict(zip(SCALINGS, (None, read_linear, read_dynamic, read_llama3, read_yarn, read_longrope), strict=True))
    older = options.get("type", "default")  # which counts if rope_type is missing
    key = "rope_type" if "rope_type" in options or "type" not in options else "type"
    read = choose(options, key, {kind: readers[kind] for kind in kinds}, older)
    if part is None:
        require(options, partial_rotary_factor=1.0)
        require(config, partial_rotary_factor=1.0)
        dims = head_dim
    else:
        dims = read_part(options, read_float(config, names[1], part), head_dim)
    scaling = None if read is None else read(options, config)
    if isinstance(scaling, LongRope):
        for name, factors in (("short_factor", scaling.short), ("long_factor", scaling.long)):
            if len(factors) != dims // 2:
                raise CheckpointError(
                    f"config.json: {name} must have a factor for each rotated pair of dimensions",
                    received=f"{len(factors)} for {dims} dimensions",
                )
    return {
        "base": base,
        "scaling": scaling,
        "rotary_dims": None if dims == head_dim else dims,
    }


def read_object(config: Config, name: str) -> Config:
    """Return an object of options, empty if it is missing or null."""
    found = config.get(name)
    if found is not None and not isinstance(found, Mapping):
        raise CheckpointError(f"config.json: {name} must be an object", received=printable(repr(found))[:80])
    return found or {}


def read_part(options: Config, part: float, head_dim: int) -> int:
    """Return the number of a head's rotated dimensions, which must be even; by default the fraction `part`."""
    named = "partial_rotary_factor"
    factor = read_float(options, named, part)
    dims = int(head_dim * min(factor, 2.0))
    if not 2 <= dims <= head_dim or dims % 2:
        raise CheckpointError(
            f"config.json: {named} must give an even number of rotated dimensions of a head",
            received=f"{factor:g} of {head_dim}",
        )
    return dims


def read_linear(options: Config, config: Config) -> Scaling:
    return LinearScaling(read_factor(options, "factor"))


def read_dynamic(options: Config, config: Config) -> Scaling:
    return Dynamic(read_factor(options, "factor"), read_int(config, "max_position_embeddings"))


def read_llama3(options: Config, config: Config) -> Scaling:
    low, high = (read_factor(options, f"{end}_freq_factor") for end in ("low", "high"))
    if low >= high:
        raise CheckpointError(
            "config.json: low_freq_factor must be less than high_freq_factor", received=f"{low} and {high}"
        )
    return Llama3(read_factor(options, "factor"), low, high, read_context(options, config))


def read_yarn(options: Config, config: Config) -> Scaling:
    """Read YaRN; the default temperature is 0.1 ln(factor) + 1, or the ratio of two such terms with the file's
    weights.
    """
    factor = read_factor(options, "factor")
    fast, slow = (read_float(options, f"beta_{end}", 0.0) or usual for end, usual in (("fast", 32.0), ("slow", 1.0)))
    if slow >= fast:
        raise CheckpointError("config.json: beta_slow must be less than beta_fast", received=f"{slow:g} and {fast:g}")

    def warmth(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    weights = [0.0 if options.get(n) is None else read_float(options, n, 0.0) for n in ("mscale", "mscale_all_dim")]
    if options.get("attention_factor") is not None:
        temperature = read_factor(options, "attention_factor")
    elif all(weights):
        temperature = warmth(weights[0]) / warmth(weights[1])
    else:
        temperature = warmth(1.0)
    return Yarn(
        factor,
        read_context(options, config, default=2048),
        fast=fast,
        slow=slow,
        truncate=read_flag(options, "truncate", True),
        temperature=temperature,
    )


def read_longrope(options: Config, config: Config) -> Scaling:
    """Read LongRoPE; the default temperature follows from the ratio of the longest text to the context."""
    short, long = (read_factors(options, f"{kind}_factor") for kind in ("short", "long"))
    context = read_context(options, config)
    if options.get("factor") is not None:
        factor = read_factor(options, "factor")
    else:
        factor = read_int(config, "max_position_embeddings") / context
    if options.get("attention_factor") is not None:
        temperature = read_factor(options, "attention_factor")
    else:
        temperature = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(context))
    return LongRope(short, long, context, temperature)


def read_factors(options: Config, name: str) -> tuple[float, ...]:
    """Return numbers that each satisfy `read_factor`."""
    values = options.get(name)
    if not isinstance(values, list) or not 0 < len(values) <= _MOST_FACTORS:
        raise CheckpointError(f"config.json: {name} must be a list of numbers", received=repr(values)[:80])
    return tuple(read_factor({name: value}, name) for value in values)


def read_context(options: Config, config: Config, default: int | None = None) -> int:
    """Return the length of texts before positions were scaled: 2 tokens or more.

    The config's top-level value takes precedence over the value in the rotary options, as in the library. The default
    is the current length.
    """
    name = "original_max_position_embeddings"
    for given in (config, options):
        if given.get(name) is not None:
            return read_int(given, name, least=2)
    return read_int(config, "max_position_embeddings", default, least=2)


def read_factor(options: Config, name: str) -> float:
    """Return a number from 1e-3 to 1e6, which keeps frequencies finite."""
    value = read_float(options, name, 0.0)
    if not 1e-3 <= value <= 1e6:
        raise CheckpointError(f"config.json: {name} must be a number from 0.001 to 1000000", received=str(value))
    return value

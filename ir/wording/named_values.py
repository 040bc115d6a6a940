"""Hints for unknown values of `dtype` and `quantize`: the value that has this name in other tools."""

from __future__ import annotations

from collections.abc import Sequence

from treadle.files.nearest_names import NearestNames
from treadle.ir.errors import Hint

_OTHERS = {
    "dtype=f32": "float32 fp32 float single tf32",
    "dtype=bf16": "bfloat16 brainfloat16",
    "quantize=int4": "4 4bit int4weights int4weightonly q4 q40 q41 q4k q4km q4ks iq4nl iq4xs nf4 fp4 w4a16 awq gptq "
    "w4 loadin4bit",
    "quantize=int8-weights": "8 8bit int8weightonly q8 q80 w8a16 w8 loadin8bit",
    "quantize=int8": "w8a8 int8dynamic dynamic smoothquant",
    "quantize=int4-int8": "w4a8",
}
"""Names in other tools (llama.cpp, bitsandbytes, vLLM, torchao), without dashes and underscores, by the option here."""
_OF_A_FOLDER = "as-stored"  # it applies to folders with quantized weights
_MEANT = {other: named for named, others in _OTHERS.items() for other in others.split()}


def value_hint(option: str, value: object, values: Sequence[str], *, alone: bool = False) -> Hint:
    """Return the hint for an unknown value of an option, `dtype` or `quantize`: the value with this name in other
    tools, also of the other option; else the most similar one of its values, or all of them.

    alone  the caller does not take the other option
    """
    text = str(value)[:40].lower()
    plain = text.replace("-", "").replace("_", "").replace("torch.", "")
    named = _MEANT.get(plain, f"{'quantize' if option == 'dtype' else 'dtype'}={plain}")
    name, _, meant = named.partition("=")
    if (plain in _MEANT or plain in ("int8", "int4", "bf16", "f32")) and not (alone and name != option):
        return Hint(f"{name}={meant!r}", f"--{name} {meant}")
    near = NearestNames(values).of(text, 1, 0.8) or [each for each in values if each != _OF_A_FOLDER]
    return Hint(f"{option}={' or '.join(map(repr, near))}", f"--{option} {' or '.join(near)}")

"""The DSL's whole vocabulary under one name: `import treadle as t`, or inside the project
`import treadle.frontends.language as t`.

Models, stacks, scopes and parameters; the layers; attention's masks and biases; dtypes. Every op of the IR is here too
under its own name (`t.einsum`, `t.rearrange`, `t.softmax`, ...), so that anything can be spelled by hand; where a layer
has an op's name (`t.layer_norm`), the op itself is `t.ops.layer_norm`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from treadle.frontends.dsl import (
    Model,
    Tensor,
    bound,
    constant,
    model,
    parameter,
    scope,
    shared_parameter,
    size_of,
    stack,
    trace,
)
from treadle.frontends.layers import (
    attention,
    convolution,
    cross_attention,
    embed,
    gated_mlp,
    layer_norm,
    linear,
    merge_heads,
    mlp,
    multi_head_attention,
    rms_norm,
    self_attention,
    sinusoidal_positions,
    split_heads,
    unembed,
)
from treadle.frontends.rotary import rotary_frequencies
from treadle.ir.errors import FrontendError
from treadle.ir.graph import Init
from treadle.ir.masking import (
    alibi,
    boolean_mask,
    causal,
    padding,
    segments,
    t5_relative,
    tensor_bias,
    window,
)
from treadle.ir.operation import OPS, find_op
from treadle.ir.source_lines import user_line
from treadle.ir.types import Dim, Factor, bf16, boolean, f16, f32, f64, i8, i16, i32, i64, u8


class OpFunction:
    """An op as a function of traced values: operands by position, attributes by keyword."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.__doc__ = find_op(name).__doc__

    def __call__(self, *operands: Any, **attributes: Any) -> Any:
        return trace().apply(self.name, *operands, **attributes)

    def __repr__(self) -> str:
        return self.name


class UnknownNameError(FrontendError, AttributeError):
    """The DSL has no layer, op or type of that name. An AttributeError too, so that `hasattr` answers no."""


def _unknown(name: str, known: Iterable[str]) -> UnknownNameError:
    near = difflib.get_close_matches(name, known, n=3)
    return UnknownNameError(
        f"the DSL has no {name!r}",
        source=str(user_line() or "") or None,
        hint="did you mean " + " or ".join(f"t.{n}" for n in near) + "?" if near else "dir(treadle) lists its words",
    )


class Ops:
    """Every op by name, as functions of traced values."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name not in OPS:
            raise _unknown(name, OPS)
        return OpFunction(name)

    def __dir__(self) -> list[str]:
        return sorted(OPS)


ops = Ops()


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(name)
    if name not in OPS:
        raise _unknown(name, __dir__())
    return OpFunction(name)


def __dir__() -> list[str]:
    return sorted({*__all__, *OPS})


__all__ = [
    "Dim",
    "Factor",
    "Init",
    "Model",
    "Tensor",
    "alibi",
    "attention",
    "bf16",
    "boolean",
    "boolean_mask",
    "bound",
    "causal",
    "constant",
    "convolution",
    "cross_attention",
    "embed",
    "f16",
    "f32",
    "f64",
    "gated_mlp",
    "i8",
    "i16",
    "i32",
    "i64",
    "layer_norm",
    "linear",
    "merge_heads",
    "mlp",
    "model",
    "multi_head_attention",
    "ops",
    "padding",
    "parameter",
    "rms_norm",
    "rotary_frequencies",
    "scope",
    "segments",
    "self_attention",
    "shared_parameter",
    "sinusoidal_positions",
    "size_of",
    "split_heads",
    "stack",
    "t5_relative",
    "tensor_bias",
    "trace",
    "u8",
    "unembed",
    "window",
]

"""The DSL's whole vocabulary under one name: `import treadle as t`, or inside the project
`import treadle.frontends.language as t`.

Models, stacks, scopes and parameters; the layers; attention's masks and biases; dtypes. Every op of the IR is here too
under its own name (`t.einsum`, `t.rearrange`, `t.softmax`, ...), so that anything can be spelled by hand; where a layer
has an op's name (`t.layer_norm`), the op itself is `t.ops.layer_norm`.
"""

from __future__ import annotations

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
    split_heads,
    unembed,
)
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
from treadle.ir.graph import Init
from treadle.ir.op import OPS, find_op
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


class Ops:
    """Every op by name, as functions of traced values."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in OPS:
            raise AttributeError(f"there is no op {name!r}")
        return OpFunction(name)

    def __dir__(self) -> list[str]:
        return sorted(OPS)


ops = Ops()


def __getattr__(name: str) -> Any:
    if name in OPS and not name.startswith("_"):
        return OpFunction(name)
    raise AttributeError(f"the DSL has no {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *OPS})


__all__ = [
    "Dim", "Factor", "Init", "Model", "Tensor", "alibi", "attention", "bf16", "boolean", "boolean_mask", "bound",
    "causal", "constant", "convolution", "cross_attention", "embed", "f16", "f32", "f64", "gated_mlp", "i8", "i16",
    "i32", "i64", "layer_norm", "linear", "merge_heads", "mlp", "model", "multi_head_attention", "ops", "padding",
    "parameter", "rms_norm", "scope", "segments", "self_attention", "shared_parameter", "size_of", "split_heads",
    "stack", "t5_relative", "tensor_bias", "trace", "u8", "unembed", "window",
]

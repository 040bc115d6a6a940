"""The DSL's whole vocabulary under one name: `import treadle as t`.

Code of the project itself uses `import treadle.frontends.language as t`.

Models, stacks, scopes and parameters; the layers; attention's masks and biases; dtypes. Every op of the IR is here too
under its own name (`t.einsum`, `t.rearrange`, `t.softmax`, ...), so that anything can be written by hand. If a layer
has an op's name (`t.layer_norm`), the op itself is `t.ops.layer_norm`.

A name that is imported `as` itself is public; a name that begins with _ is not. (An `__all__` could not list the ops.)
"""

from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from treadle.frontends import operations as _operations
from treadle.frontends.attention_layers import attention as attention
from treadle.frontends.attention_layers import cross_attention as cross_attention
from treadle.frontends.attention_layers import merge_heads as merge_heads
from treadle.frontends.attention_layers import multi_head_attention as multi_head_attention
from treadle.frontends.attention_layers import self_attention as self_attention
from treadle.frontends.attention_layers import split_heads as split_heads
from treadle.frontends.call_errors import unknown_word as _unknown_word
from treadle.frontends.declarations import Model as Model
from treadle.frontends.declarations import model as model
from treadle.frontends.dsl import Tensor as Tensor
from treadle.frontends.dsl import TensorLike as TensorLike
from treadle.frontends.dsl import bound as bound
from treadle.frontends.dsl import constant as constant
from treadle.frontends.dsl import parameter as parameter
from treadle.frontends.dsl import scope as scope
from treadle.frontends.dsl import shared_parameter as shared_parameter
from treadle.frontends.dsl import size_of as size_of
from treadle.frontends.dsl import stack as stack
from treadle.frontends.dsl import trace as trace
from treadle.frontends.layers import Activation as Activation
from treadle.frontends.layers import convolution as convolution
from treadle.frontends.layers import embed as embed
from treadle.frontends.layers import gated_mlp as gated_mlp
from treadle.frontends.layers import group_norm as group_norm
from treadle.frontends.layers import layer_norm as layer_norm
from treadle.frontends.layers import linear as linear
from treadle.frontends.layers import mlp as mlp
from treadle.frontends.layers import rms_norm as rms_norm
from treadle.frontends.layers import sinusoidal_positions as sinusoidal_positions
from treadle.frontends.layers import unembed as unembed
from treadle.frontends.rotary import rotary_frequencies as rotary_frequencies
from treadle.ir.attention.masking import Biases as Biases
from treadle.ir.attention.masking import Masks as Masks
from treadle.ir.attention.masking import alibi as alibi
from treadle.ir.attention.masking import boolean_mask as boolean_mask
from treadle.ir.attention.masking import causal as causal
from treadle.ir.attention.masking import padding as padding
from treadle.ir.attention.masking import segments as segments
from treadle.ir.attention.masking import t5_relative as t5_relative
from treadle.ir.attention.masking import tensor_bias as tensor_bias
from treadle.ir.attention.masking import window as window
from treadle.ir.generated_values import generated as generated
from treadle.ir.initial_values import Init as Init
from treadle.ir.op_registry import OPS as _OPS
from treadle.ir.types import Dim as Dim
from treadle.ir.types import Factor as Factor
from treadle.ir.types import bf16 as bf16
from treadle.ir.types import boolean as boolean
from treadle.ir.types import f16 as f16
from treadle.ir.types import f32 as f32
from treadle.ir.types import f64 as f64
from treadle.ir.types import i8 as i8
from treadle.ir.types import i16 as i16
from treadle.ir.types import i32 as i32
from treadle.ir.types import i64 as i64
from treadle.ir.types import u8 as u8

ops = _operations
"""Every op by name, as functions of traced values."""

if _TYPE_CHECKING:
    from treadle.frontends.operations import *  # noqa: F403
else:  # so that type checkers report a misspelt name

    def __getattr__(name: str) -> _Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name not in _OPS or not _OPS[name].is_word:
            raise _unknown_word(name, __dir__())
        return getattr(ops, name)


def __dir__() -> list[str]:
    words = {name for name, op in _OPS.items() if op.is_word}
    return sorted({name for name in globals() if not name.startswith("_")} | words)

"""NumPy code for ops. If an op has no entry, a composite is replaced by its body, and a primitive runs its reference.

float16 is added in float32, see `Op.accumulates`, and functions of several steps are computed in float32.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from itertools import count

from treadle.backends.numpy.written_terms import written_term
from treadle.backends.python.attention_spelling import attention
from treadle.backends.python.axis_spelling import axes_of, einsum_letters, keeping, rearranged, sliced
from treadle.backends.python.spelled_line import Line, Spelling, float_text
from treadle.ir.attention.attention_terms import Term
from treadle.ir.graph import Value
from treadle.ir.op_registry import find_op
from treadle.ir.operation import Op
from treadle.ir.ops.attending import Attending
from treadle.ir.ops.axis_names import place
from treadle.ir.types import DType, Type, f16

# -- 16 bits ---------------------------------------------------------------------------------------------------


class _WideLine(Line):
    """A node whose float16 operands are read in float32."""

    def _read(self, value: Value) -> str:
        text = super()._read(value)
        return f"{text}.astype(np.float32)" if value.type.dtype is f16 else text


def _in_f32(spelling: Spelling) -> Callable[[Line], str]:
    """Return code that computes float16 in float32 and rounds once, for sums and for functions of several steps."""

    def spelled(line: Line) -> str:
        dtypes = {r.type.dtype for r in line.node.results}
        held = line if f16 not in dtypes else line.as_read_by(_WideLine)
        text = spelling.format_map(held) if isinstance(spelling, str) else spelling(held)
        if held is line:
            return text
        is_call = isinstance(ast.parse(text, mode="eval").body, ast.Call)
        return f"{text}.astype(np.float16)" if is_call else f"({text}).astype(np.float16)"

    return spelled


# -- the table -------------------------------------------------------------------------------------------------

SPELLINGS: dict[str, Spelling] = {
    # arithmetic
    "add": "{x} + {y}",
    "sub": "{x} - {y}",
    "mul": "{x} * {y}",
    "div": "{x} / {y}",
    "pow": "np.power({x}, {y})",
    "maximum": "np.maximum({x}, {y})",
    "minimum": "np.minimum({x}, {y})",
    "floor_divide": "np.floor_divide({x}, {y})",
    "mod": "np.mod({x}, {y})",
    "neg": "-{x}",
    # functions
    "exp": "np.exp({x})",
    "log": "np.log({x})",
    "expm1": _in_f32("np.expm1({x}{out_args})"),
    "log1p": _in_f32("np.log1p({x}{out_args})"),
    "sqrt": "np.sqrt({x})",
    "rsqrt": _in_f32("kernels.rsqrt({x}{out_args})"),
    "reciprocal": "1.0 / {x}",
    "tanh": "np.tanh({x})",
    "erf": _in_f32("kernels.erf({x}{out_args})"),
    "sigmoid": _in_f32("kernels.sigmoid({x}{out_args})"),
    "sin": "np.sin({x})",
    "cos": "np.cos({x})",
    "abs": "np.abs({x})",
    "sign": "np.sign({x})",
    "floor": "np.floor({x})",
    "round": "np.rint({x})",
    "relu": "np.maximum({x}, 0.0)",
    "gelu": _in_f32("kernels.gelu({x}{out_args})"),
    "gelu_tanh": _in_f32("kernels.gelu_tanh({x}{out_args})"),
    "silu": _in_f32("kernels.silu({x}{out_args})"),
    "quick_gelu": _in_f32("kernels.quick_gelu({x}{out_args})"),
    "softplus": _in_f32("np.logaddexp({x}, 0.0{out_args})"),
    # logic
    "equal": "{x} == {y}",
    "not_equal": "{x} != {y}",
    "less": "{x} < {y}",
    "less_equal": "{x} <= {y}",
    "greater": "{x} > {y}",
    "greater_equal": "{x} >= {y}",
    "logical_and": "{x} & {y}",
    "logical_or": "{x} | {y}",
    "logical_not": "~{x}",
    "where": "np.where({condition}, {x}, {y})",
    # products
    "matmul": lambda line: f"{_factor(line, 'x')} @ {_factor(line, 'y')}",
    "rotary": Line.by_reference,
    "encoded_linear": Line.by_reference,
    # shapes and positions
    "rearrange": lambda line: rearranged(line, "transpose"),
    "relayout": "{x}",
    "slice": sliced,
    "embedding": "kernels.take({table}, {indices}, 0{out_args})",
    "positions": "np.broadcast_to(np.arange({x}.shape[-1]), {x}.shape)",
}


def _spells(name: str) -> Callable[[Callable[[Line], str]], Callable[[Line], str]]:
    def add(spelling: Callable[[Line], str]) -> Callable[[Line], str]:
        SPELLINGS[name] = spelling
        return spelling

    return add


def dtype_text(dtype: DType) -> str:
    """Return a dtype as text: `np.float32`."""
    assert dtype.numpy is not None
    return "np.bool_" if dtype.name == "bool" else f"np.{dtype.numpy.name}"


def _accumulating(line: Line) -> str:
    """Return the dtype argument of a sum as text. Without it, NumPy adds small integers in int64."""
    return f", dtype={dtype_text(line.result.dtype)}" if line.result.dtype.is_int else ""


@_spells("cast")
def _cast(line: Line) -> str:
    return f"{line.array('x')}.astype({dtype_text(line.op.to)})"


def _factor(line: Line, name: str) -> str:
    """Return an operand of a product as text, converted to the op's accumulation dtype, if it has one."""
    x = line.array(name)
    return x if line.op.to in (None, line.type(name).dtype) else f"{x}.astype({dtype_text(line.op.to)})"


@_spells("linear")
def _linear(line: Line) -> str:
    x, weight = _factor(line, "x"), _factor(line, "weight")
    if line.has("bias"):
        return f"kernels.linear({x}, {weight}, {line.array('bias')}{line.out_args})"
    return f"np.matmul({x}, {weight}.T{line.out_args})" if line.has_destination else f"{x} @ {weight}.T"


@_spells("einsum")
def _einsum(line: Line) -> str:
    return f'kernels.einsum("{einsum_letters(line.op.equation)}", {line.arrays}{line.out_args})'


@_spells("expand")
def _expand(line: Line) -> str:
    return f"np.broadcast_to({line.array('x')}, {line.shape(line.result.shape)})"


@_spells("reshape")
def _reshape(line: Line) -> str:
    return f"{line.array('x')}.reshape({line.shape(line.op.shape)})"


@_spells("concat")
def _concat(line: Line) -> str:
    return f"np.concatenate(({line.arrays},), axis={line.op.axis})"


@_spells("pad")
def _pad(line: Line) -> str:
    widths = f"{line.size(line.op.before)}, {line.size(line.op.after)}"
    axis = place(line.op.axis, line.type("x").rank)
    return f"kernels.pad({line.array('x')}, {axis}, {widths}, {float_text(line.op.value)}{line.out_args})"


@_spells("gather")
def _gather(line: Line) -> str:
    return f"kernels.take({line.array('x')}, {line.array('indices')}, {line.op.axis}{line.out_args})"


@_spells("append")
def _append(line: Line) -> str:
    operands = f"{line.array('state')}, {line.array('x')}, {line.array('rows')}, {line.array('start')}"
    return f"kernels.append({operands}, {place(line.op.axis, line.type('state').rank)}, ring={line.op.ring})"


@_spells("iota")
def _iota(line: Line) -> str:
    return f"np.arange({line.size(line.op.size)}, dtype={dtype_text(line.op.dtype)})"


@_spells("size")
def _size(line: Line) -> str:
    return f"np.asarray({line.size(line.op.value)}, {dtype_text(line.op.dtype)})"


@_spells("reduce_sum")
def _sum(line: Line) -> str:
    return f"np.sum({line.array('x')}, axis={axes_of(line)}{keeping(line, 'keepdims')}{_accumulating(line)})"


@_spells("reduce_max")
def _max(line: Line) -> str:
    return f"np.max({line.array('x')}, axis={axes_of(line)}{keeping(line, 'keepdims')})"


@_spells("reduce_min")
def _min(line: Line) -> str:
    return f"np.min({line.array('x')}, axis={axes_of(line)}{keeping(line, 'keepdims')})"


@_spells("reduce_mean")
def _mean(line: Line) -> str:
    return f"np.mean({line.array('x')}, axis={axes_of(line)}{keeping(line, 'keepdims')})"


@_spells("cumsum")
def _cumsum(line: Line) -> str:
    if line.op.exclusive or line.op.reverse:
        return line.by_reference()
    return f"np.cumsum({line.array('x')}, axis={line.op.axis}{_accumulating(line)})"


@_spells("argmax")
def _argmax(line: Line) -> str:
    return f"np.argmax({line.array('x')}, axis={line.op.axis}{keeping(line, 'keepdims')})"


@_spells("softmax")
def _softmax(line: Line) -> str:
    return f"kernels.softmax({line.array('x')}, {line.op.axis}{line.out_args})"


@_spells("log_softmax")
def _log_softmax(line: Line) -> str:
    return f"kernels.log_softmax({line.array('x')}, {line.op.axis}{line.out_args})"


@_spells("attention")
@_spells("attention_with_probabilities")
def _attention(line: Line) -> str:
    to = getattr(line.op, "to", None)
    factors = () if to is None else [f"{x}.astype({dtype_text(to)})" for x in (line.q, line.k, line.v)]
    return attention(line, _term, factors)


def attention_call(line: Line) -> str:
    """Return a call of attention whose masks and biases are written to the workspace."""
    work, numbers = line.work, count()
    assert work is not None
    return attention(line, lambda term, operands, *_: written_term(term, operands, work, next(numbers)), hidden=True)


@_spells("cached_attention")
def _cached_attention(line: Line) -> str:
    """Return a call of the reference, which reads only the valid part of each row."""
    return line.by_reference(rows=f"kernels.within({line.array('rows')}, {line.size(line.type('k').shape[0])})")


def _term(term: Term, operands: Sequence[str], queries: str, keys: str) -> str:
    """Return a call that evaluates the term by its definition: `kernels.term("window(128)", S, T)`."""
    arguments = [f'"{term}"', queries, keys, *operands]
    return f"kernels.term({', '.join(arguments)})"


@_spells("layer_norm")
def _layer_norm(line: Line) -> str:
    return f"kernels.layer_norm({line.x}, {line.weight}, {line.bias}, {float_text(line.op.eps)}{line.out_args})"


@_spells("rms_norm")
def _rms_norm(line: Line) -> str:
    return f"kernels.rms_norm({line.x}, {line.weight}, {float_text(line.op.eps)}{line.out_args})"


# Attention's kernels sum in float32 themselves.
_SUMMING = [n for n in SPELLINGS if find_op(n).accumulates is not None and not issubclass(find_op(n), Attending)]
SPELLINGS |= {name: _in_f32(SPELLINGS[name]) for name in _SUMMING}


def keeps(op: Op, types: Sequence[Type | None]) -> bool:
    """Return True if an op has its own code; otherwise a composite is replaced by its body."""
    return op.name in SPELLINGS and (not isinstance(op, Attending) or (op.has_standard_terms and not op.begins_later))

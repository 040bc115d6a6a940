"""PyTorch code for ops. If an op has no entry, a composite is replaced by its body, and a primitive is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from treadle.backends.python.axis_spelling import axes_of, einsum_letters, keeping, rearranged, sliced
from treadle.backends.python.spelled_line import Dialect, Line, Spelling, float_text
from treadle.backends.torch.attention_spelling import (
    attention_text,
    attention_with_probabilities_text,
    cached_attention_text,
)
from treadle.backends.torch.dtype_names import dtype_text
from treadle.ir.axes import Role
from treadle.ir.encodings.encoding import Encoding
from treadle.ir.errors import BackendError
from treadle.ir.graph import Value
from treadle.ir.operation import Op
from treadle.ir.ops.attending import Attending
from treadle.ir.ops.axis_names import place
from treadle.ir.ops.convolution import Conv
from treadle.ir.types import Type, bf16, f16

# -- 16 bits ---------------------------------------------------------------------------------------------------


class _WideLine(Line):
    """A node whose 16-bit operands are read in float32."""

    def _read(self, value: Value) -> str:
        text = super()._read(value)
        return f"{text}.float()" if value.type.dtype in (f16, bf16) else text


def rounded_once(template: str) -> Spelling:
    """Return code for a primitive that takes several operations: 16-bit dtypes are computed in float32, and rounded at
    the end.
    """

    def spelled(line: Line) -> str:
        dtype = line.result.dtype
        if dtype not in (f16, bf16):
            return template.format_map(line)
        return f"({template.format_map(line.as_read_by(_WideLine))}).to({dtype_text(dtype)})"

    return spelled


# -- the table -------------------------------------------------------------------------------------------------

SPELLINGS: dict[str, Spelling] = {
    # arithmetic
    "add": "{x} + {y}",
    "sub": "{x} - {y}",
    "mul": "{x} * {y}",
    "div": "{x} / {y}",
    "pow": "torch.pow({x}, {y})",
    "maximum": lambda line: f"torch.maximum({line.array('x')}, {line.array('y')})",
    "minimum": lambda line: f"torch.minimum({line.array('x')}, {line.array('y')})",
    "floor_divide": "{x} // {y}",
    "mod": "torch.remainder({x}, {y})",
    "neg": "-{x}",
    # functions
    "exp": "torch.exp({x})",
    "log": "torch.log({x})",
    "expm1": "torch.expm1({x})",
    "log1p": "torch.log1p({x})",
    "sqrt": "torch.sqrt({x})",
    "rsqrt": rounded_once("torch.rsqrt({x})"),  # PyTorch takes two steps on a CPU
    "reciprocal": "torch.reciprocal({x})",
    "tanh": "torch.tanh({x})",
    "erf": "torch.erf({x})",
    "sigmoid": "torch.sigmoid({x})",
    "sin": "torch.sin({x})",
    "cos": "torch.cos({x})",
    "abs": "torch.abs({x})",
    "floor": "torch.floor({x})",
    "round": "torch.round({x})",
    "relu": "F.relu({x})",
    "gelu": "F.gelu({x})",
    "gelu_tanh": 'F.gelu({x}, approximate="tanh")',
    "silu": "F.silu({x})",
    "quick_gelu": "{x} * torch.sigmoid(1.702 * {x})",
    "softplus": "F.softplus({x}, threshold=40)",  # above 40, softplus(x) is x in float64, too
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
    "where": lambda line: f"torch.where({line.array('condition')}, {line.x}, {line.y})",
    # products
    "matmul": lambda line: _product(line, "y", " @ "),
    # 8-bit numbers in rows or groups: the backend refuses other encodings of values that are not weights
    "encode": lambda line: _in_blocks(
        "encode",
        f"{line.x}{f' * {line.by}' * line.has('by')}{f', {line.scale}, {line.zero}' * line.has('scale')}",
        line.op.attributes["to"],
    ),
    "decode": lambda line: _decoded(line),
    "group_linear": lambda line: (
        f"kernels.group_linear({line.x}, {line.weight}, {line.array('bias')}, {line.op.of.group})"
    ),
    "encoded_linear": lambda line: f"kernels.encoded_linear({line.x}, {line.weight}, {line.array('bias')})",
    # attention
    "attention": attention_text,
    "attention_with_probabilities": attention_with_probabilities_text,
    "cached_attention": cached_attention_text,
    # shapes and positions
    "rearrange": lambda line: rearranged(line, "permute"),
    "slice": sliced,
    "positions": "torch.arange({x}.shape[-1], device=device).expand({x}.shape)",
}


def _spells(name: str) -> Callable[[Callable[[Line], str]], Callable[[Line], str]]:
    def add(spelling: Callable[[Line], str]) -> Callable[[Line], str]:
        SPELLINGS[name] = spelling
        return spelling

    return add


@_spells("cast")
def _cast(line: Line) -> str:
    again = ", copy=True" if line.op.to is line.type("x").dtype else ""  # otherwise PyTorch returns the same tensor
    return f"{line.array('x')}.to({dtype_text(line.op.to)}{again})"


@_spells("sign")
def _sign(line: Line) -> str:
    """Return code for the sign. PyTorch's own function returns 0 for NaN."""
    x = line.array("x")
    return f"torch.where({x} == {x}, torch.sign({x}), {x})" if line.result.dtype.is_float else f"torch.sign({x})"


@_spells("round_to")
def _round_to(line: Line) -> str:
    return f'kernels.round_to({line.array("x")}, "{line.op.format}", saturate={line.op.saturate})'


DECODED = ("int8_rows", "uint8_rows", "int8_groups", "int4_groups")
"""The block forms that kernels decode during a call."""


def _decoded(line: Line) -> str:
    encoding, to = line.op.attributes["of"], line.op.attributes["to"]
    if encoding.form == "int4_groups":
        text = f"kernels.decode_int4_groups({line.x}, {encoding.group})"
    else:
        text = _in_blocks("decode", line.x, encoding)
    return text if to is None else f"{text}.to({dtype_text(to)})"


def _in_blocks(does: str, x: str, encoding: Encoding) -> str:
    if encoding.group:
        return f"kernels.{does}_groups({x}, {encoding.group})"
    return f"kernels.{does}_{encoding.form}({x})"


def _product(line: Line, weight: str, between: str) -> str:
    """Return the text of x, `between`, and a weight. Both are converted to the op's accumulation dtype, if it
    has one.
    """
    factors = [line.array(name) for name in ("x", weight)]
    if line.op.to not in (None, line.type("x").dtype):
        factors = [f"{x}.to({dtype_text(line.op.to)})" for x in factors]
    return between.join(factors)


@_spells("linear")
def _linear(line: Line) -> str:
    bias = f", {line.bias}" if line.has("bias") else ""
    return f"F.linear({_product(line, 'weight', ', ')}{bias})"


@_spells("activated_linear")
def _activated_linear(line: Line) -> str:
    if line.op.weight_axes == "k n":
        product = _product(line, "weight", " @ ") + (f" + {line.bias}" if line.has("bias") else "")
    else:
        product = _linear(line)
    return activated(line.op.activation, product)


def activated(activation: str, x: str) -> str:
    """Return code that applies the activation of this name to an expression."""
    return f"kernels.quick_gelu({x})" if activation == "quick_gelu" else str(SPELLINGS[activation]).format(x=x)


@_spells("einsum")
def _einsum(line: Line) -> str:
    dtype, equation = line.result.dtype, einsum_letters(line.op.equation)
    if line.op.sums_in(dtype) is not dtype and not _is_summed_once(line):
        operands = ", ".join(f"{line.array(name)}.float()" for name in line.names)
        return f'torch.einsum("{equation}", {operands}).to({dtype_text(dtype)})'
    suffix = "" if dtype.is_float else f".to({dtype_text(dtype)})"  # sums of small integers are int64 in PyTorch
    suffix += ".clone()" if len(line.names) == 1 else ""  # PyTorch may return a view, whose memory would be reused
    return f'torch.einsum("{equation}", {line.arrays}){suffix}'


def _is_summed_once(line: Line) -> bool:
    """Return True if PyTorch computes an einsum in one step and rounds once: it has one operand, or is one product of
    two matrices.
    """
    applied = line.op.apply([line.type(name) for name in line.names])
    held = [{f for dim in dims for f in dim.factors} for dims in applied.operands if dims is not None]
    summed = [name for name, factor in applied.factors.items() if factor.role is Role.REDUCED]
    return len(held) == 1 or (len(held) == 2 and all(name in one for one in held for name in summed))


@_spells("expand")
def _expand(line: Line) -> str:
    return f"{line.array('x')}.expand({line.shape(line.result.shape)})"


@_spells("reshape")
def _reshape(line: Line) -> str:
    return f"{line.array('x')}.reshape({line.shape(line.op.shape)})"


@_spells("concat")
def _concat(line: Line) -> str:
    return f"torch.cat(({line.arrays},), dim={line.op.axis})"


@_spells("pad")
def _pad(line: Line) -> str:
    rank = line.type("x").rank
    inner = rank - 1 - line.op.axis % rank  # F.pad counts axes from the last
    widths = "0, 0, " * inner + f"{line.size(line.op.before)}, {line.size(line.op.after)}"
    fill = float_text(line.op.value)
    value = f", value={fill}" if fill != "0.0" else ""
    return f"F.pad({line.array('x')}, ({widths}){value})"


@_spells("windows")
def _windows(line: Line) -> str:
    span = (line.op.size - 1) * line.op.dilation + 1
    every = f"[..., ::{line.op.dilation}]" if line.op.dilation != 1 else ""
    return f"{line.array('x')}.unfold({line.op.axis}, {line.size(span)}, {line.op.stride}){every}"


@_spells("fold_windows")
def _fold_windows(line: Line) -> str:
    op = line.op
    return f"kernels.fold_windows({line.array('x')}, {op.axis}, {line.size(op.size)}, {op.stride}, {op.dilation})"


@_spells("conv")
def _conv(line: Line) -> str:
    spatial = line.type("x").rank - 2
    before, after, strides, dilations = zip(*line.op.spatial(spatial), strict=True)
    x, options = line.x, ""
    if before == after:
        options += f", padding={before}" if any(before) else ""
    else:
        sides = [str(n) for pair in reversed(list(zip(before, after, strict=True))) for n in pair]
        x = f"F.pad({x}, ({', '.join(sides)}))"
    options += f", stride={strides}" if any(n != 1 for n in strides) else ""
    options += f", dilation={dilations}" if any(n != 1 for n in dilations) else ""
    options += f", groups={line.op.groups}" if line.op.groups != 1 else ""
    return f"F.conv{spatial}d({x}, {line.weight}, {line.bias}{options})"


@_spells("embedding")
def _embedding(line: Line) -> str:
    return embedding_call(line)


def embedding_call(line: Line, options: str = "") -> str:
    """Return a call of our kernel. `options` are further arguments, each after a comma."""
    return f"kernels.embedding({index_text(line, 'indices', 'i32')}, {line.array('table')}{options}{line.report_args})"


@_spells("gather")
def _gather(line: Line) -> str:
    return f"kernels.take({line.array('x')}, {index_text(line, 'indices', 'i32')}, {line.op.axis}{line.report_args})"


@_spells("index_add")
def _index_add(line: Line) -> str:
    operands = f"{line.array('target')}, {index_text(line, 'indices', 'i32')}, {line.array('added')}"
    return f"kernels.index_add({operands}, {line.op.axis}{line.report_args})"


@_spells("append")
def _append(line: Line) -> str:
    operands = f"{line.array('state')}, {line.array('x')}, {line.array('rows')}, {line.array('start')}"
    axis = place(line.op.axis, line.type("state").rank)
    return f"kernels.append({operands}, {axis}, ring={line.op.ring}{line.report_args})"


@_spells("take_along_axis")
def _take_along_axis(line: Line) -> str:
    operands = f"{line.array('x')}, {index_text(line, 'indices')}"
    return f"kernels.take_along_axis({operands}, {line.op.axis}{line.report_args})"


@_spells("scatter_add")
def _scatter_add(line: Line) -> str:
    operands = f"{line.array('target')}, {index_text(line, 'indices')}, {line.array('added')}"
    return f"kernels.scatter_add({operands}, {line.op.axis}{line.report_args})"


def index_text(line: Line, name: str, also: str = "i64") -> str:
    """Return indices as text, in a dtype that PyTorch accepts: i64, or the dtype `also`, which some functions
    accept.
    """
    text = line.array(name)
    return text if line.type(name).dtype.name in ("i64", also) else f"{text}.long()"


@_spells("iota")
def _iota(line: Line) -> str:
    return f"torch.arange({line.size(line.op.size)}, dtype={dtype_text(line.op.dtype)}, device=device)"


@_spells("size")
def _size(line: Line) -> str:
    # torch.tensor would copy the number from the host at each call
    return f"torch.full((), {line.size(line.op.value)}, dtype={dtype_text(line.op.dtype)}, device=device)"


def _reduction(function: str) -> Callable[[Line], str]:
    def spelling(line: Line) -> str:
        if not line.op.axes:  # PyTorch would reduce over all axes
            return f"{line.array('x')}.clone()"
        # By default PyTorch adds small integers in int64.
        dtype = line.result.dtype
        dtype_argument = f", dtype={dtype_text(dtype)}" if function == "sum" and dtype.is_int else ""
        return f"torch.{function}({line.array('x')}, dim={axes_of(line)}{keeping(line, 'keepdim')}{dtype_argument})"

    return spelling


SPELLINGS |= {f"reduce_{ours}": _reduction(theirs) for ours, theirs in (("sum", "sum"), ("mean", "mean"))}
SPELLINGS |= {f"reduce_{ours}": _reduction(theirs) for ours, theirs in (("max", "amax"), ("min", "amin"))}


@_spells("cumsum")
def _cumsum(line: Line) -> str:
    if line.op.exclusive or line.op.reverse:
        flags = f"exclusive={line.op.exclusive}, reverse={line.op.reverse}"
        return f"kernels.cumsum({line.array('x')}, {line.op.axis}, {flags})"
    return f"torch.cumsum({line.array('x')}, {line.op.axis}, dtype={dtype_text(line.result.dtype)})"


@_spells("argmax")
def _argmax(line: Line) -> str:
    return f"torch.argmax({line.array('x')}, dim={line.op.axis}{keeping(line, 'keepdim')})"


@_spells("top_k")
def _top_k(line: Line) -> str:
    return f"kernels.top_k({line.array('x')}, {line.op.k}, {line.op.axis})"


@_spells("softmax")
def _softmax(line: Line) -> str:
    last = place(line.op.axis, line.type("x").rank) == line.type("x").rank - 1
    x, axis = line.array("x"), line.op.axis
    return f"torch.softmax({x}, {axis})" if last else _in_f32(line, f"torch.softmax({x}, {axis}%s)")


@_spells("log_softmax")
def _log_softmax(line: Line) -> str:
    return _in_f32(line, f"torch.log_softmax({line.array('x')}, {line.op.axis}%s)")


def _in_f32(line: Line, call: str) -> str:
    """Return a call that computes 16-bit dtypes in float32, by a dtype argument in place of `%s`. PyTorch would
    otherwise round twice.
    """
    dtype = line.result.dtype
    if line.op.sums_in(dtype) is dtype:
        return call % ""
    return f"{call % ', dtype=torch.float32'}.to({dtype_text(dtype)})"


@_spells("rotary")
def _rotary(line: Line) -> str:
    operands = f"{line.array('x')}, {line.array('positions')}, {line.array('frequencies')}"
    return f'kernels.rotary({operands}, "{line.op.layout}")'


@_spells("layer_norm")
def _layer_norm(line: Line) -> str:
    width = line.shape(line.type("x").shape[-1:])
    return f"F.layer_norm({line.x}, {width}, {line.weight}, {line.bias}, {float_text(line.op.eps)})"


@_spells("rms_norm")
def _rms_norm(line: Line) -> str:
    width = line.shape(line.type("x").shape[-1:])
    return f"F.rms_norm({line.x}, {width}, {line.weight}, {float_text(line.op.eps)})"


def _met(line: Line) -> str:
    """Return a call of a collective as its reference; at run time, the reference is a function of tensors that
    communicates.
    """
    if not line.op.meets_ranks:
        raise BackendError(f"the torch backend has no code for op {line.op.name!r}")
    return line.by_reference()


TORCH = Dialect(
    name="torch",
    imports=(
        "import torch",
        "import torch.nn.functional as F",
        "import treadle.backends.torch.kernels as kernels",
    ),
    spellings=SPELLINGS,
    copied="{}.clone()",
    otherwise=_met,
)


def keeps(op: Op, types: Sequence[Type | None]) -> bool:
    """Return True if an op has its own code; otherwise a composite is replaced by its body."""
    if isinstance(op, Attending) and not (op.has_standard_terms and not op.begins_later):
        return False
    if isinstance(op, Conv):
        return types[0] is not None and types[0].rank <= 5  # PyTorch convolves over up to three axes
    return op.name in SPELLINGS

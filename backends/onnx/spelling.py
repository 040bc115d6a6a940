"""ONNX code for ops: the name of an operator, or a function that adds several nodes.

A composite without an operator (`treadle.backends.onnx.kept_composites`) is replaced by its body. A primitive without
code cannot be exported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from treadle.backends.onnx.attention_forms import attention, rotary
from treadle.backends.onnx.kept_composites import EIGHT_BITS
from treadle.backends.onnx.rearrange import rearranged, reshaped
from treadle.backends.onnx.scatters import append, fold_windows, index_add, scatter_add, windows
from treadle.backends.onnx.schemas import NARROW
from treadle.backends.onnx.spelled_line import OnnxLine, Tensor
from treadle.backends.python.axis_spelling import einsum_letters
from treadle.ir.builder import Builder, Expr
from treadle.ir.graph import Graph
from treadle.ir.ops.axis_names import place
from treadle.ir.ops.rounding import FORMATS
from treadle.ir.sizing.sizes import Size
from treadle.ir.types import DType, bf16, boolean, f16, f32, i64, u8

Spelling = str | Callable[[OnnxLine], Tensor | Sequence[Tensor]]
"""The name of an operator, which is applied to the operands that are present; or a function that returns the tensors of
the results.
"""


def in_ops(make: Callable[..., Expr]) -> Spelling:
    """Express a primitive on floats by other ops of ours: `in_ops(lambda b, x: x / (b.abs(x) + 1.0))`.

    16-bit dtypes are computed in f32 and rounded at the end, as in our backends.
    """

    def spelled(line: OnnxLine) -> Tensor:
        b = Builder(Graph(line.op.name))
        operands = [b.input(name, line.type(name)) for name in line.names if line.has(name)]
        narrow = (f16, bf16)
        y = make(b, *[x.cast(f32) if x.dtype in narrow else x for x in operands])
        b.outputs(y=y.cast(line.result.dtype))
        return line.expanded(b.graph, line.present)["y"]

    return spelled


def _log1p(b: Builder, x: Expr) -> Expr:
    """ln(1 + x), accurate near 0, where 1 + x loses digits of x: ln(u) x / (u - 1) with u = 1 + x        (Kahan)"""
    u = x + 1.0
    kept = u - 1.0
    near = b.where(b.equal(kept, 0.0), x, b.log(u) * (x / kept))
    made: Expr = b.where(b.abs(x) < 1.0, near, b.log(u))
    return made


def _expm1(b: Builder, x: Expr) -> Expr:
    """e^x - 1, near 0 as 2 t / (1 - t) with t = tanh(x / 2), which keeps all digits of x."""
    half = b.tanh(x * 0.5)
    made: Expr = b.where(b.abs(x) < 1.0, 2.0 * half / (1.0 - half), b.exp(x) - 1.0)
    return made


SPELLINGS: dict[str, Spelling] = {
    # arithmetic
    "add": "Add",
    "sub": "Sub",
    "mul": "Mul",
    "div": "Div",
    "pow": "Pow",
    "maximum": "Max",
    "minimum": "Min",
    "neg": "Neg",
    # functions
    "exp": "Exp",
    "log": "Log",
    "expm1": in_ops(lambda b, x: _expm1(b, x)),
    "log1p": in_ops(lambda b, x: _log1p(b, x)),
    "sqrt": "Sqrt",
    "rsqrt": lambda line: line.add("Reciprocal", line.add("Sqrt", line.x)),
    "reciprocal": "Reciprocal",
    "tanh": "Tanh",
    "erf": "Erf",
    "sigmoid": "Sigmoid",
    "sin": "Sin",
    "cos": "Cos",
    "abs": "Abs",
    "sign": "Sign",
    "floor": "Floor",
    "round": "Round",
    "relu": "Relu",
    "cast": lambda line: line.w.cast(line.x, line.op.to),
    # activations
    "gelu": lambda line: line.add("Gelu", line.x),
    "gelu_tanh": lambda line: line.add("Gelu", line.x, approximate="tanh"),
    "softplus": lambda line: line.add("Softplus", line.x),
    # logic
    "equal": "Equal",
    "not_equal": lambda line: line.add("Not", line.add("Equal", line.x, line.y)),
    "less": "Less",
    "less_equal": "LessOrEqual",
    "greater": "Greater",
    "greater_equal": "GreaterOrEqual",
    "logical_and": "And",
    "logical_or": "Or",
    "logical_not": "Not",
    "where": "Where",
    # products
    "matmul": lambda line: line.add("MatMul", _factor(line, "x"), _factor(line, "y")),
    # reductions and indices
    "softmax": lambda line: line.add("Softmax", line.x, axis=line.op.axis),
    "log_softmax": lambda line: line.add("LogSoftmax", line.x, axis=line.op.axis),
    "reduce_sum": lambda line: _reduced(line, "ReduceSum", line.x),
    "reduce_max": lambda line: _reduced(line, "ReduceMax", line.x),
    "reduce_min": lambda line: _reduced(line, "ReduceMin", line.x),
    "reduce_mean": lambda line: line.w.cast(_reduced(line, "ReduceMean", _wide(line, line.x)), line.x.dtype),
    "argmax": lambda line: line.add("ArgMax", line.x, axis=line.op.axis, keepdims=int(line.op.keep)),
    # shapes and positions
    "rearrange": rearranged,
    "reshape": lambda line: reshaped(line.w, line.x, line.type("x").shape, line.op.shape),
    "concat": lambda line: line.add("Concat", *line.present, axis=line.op.axis),
    "gather": lambda line: line.add("Gather", line.x, line.indices, axis=line.op.axis),
    "take_along_axis": lambda line: line.add(
        "GatherElements", line.x, line.indices, axis=place(line.op.axis, line.type("x").rank)
    ),
    "embedding": lambda line: line.add("Gather", line.table, line.indices, axis=0),
    "iota": lambda line: line.w.cast(line.w.counted(line.op.size), line.op.dtype),
    "size": lambda line: line.w.scalar(line.op.value, line.op.dtype),
    # windows, sums at indices, caches
    "windows": windows,
    "fold_windows": fold_windows,
    "index_add": index_add,
    "scatter_add": scatter_add,
    "append": append,
    # attention
    "attention": attention,
    "attention_with_probabilities": attention,
    "rotary": rotary,
}


def spell(line: OnnxLine) -> list[Tensor]:
    """Emit the ONNX nodes of one of our nodes. Return the tensors of its results. Raises BackendError if ONNX cannot
    express the op.
    """
    spelling = SPELLINGS.get(line.op.name)
    if spelling is None:
        place = "a line in SPELLINGS of backends/onnx/spelling.py (docs/adding-an-op.md)"
        raise line.w.refusal("cannot be expressed in ONNX", f"to add a form for {line.op.name}: {place}")
    made = line.add(spelling, *line.present) if isinstance(spelling, str) else spelling(line)
    return [made] if isinstance(made, Tensor) else list(made)


def _spells(name: str) -> Callable[[Callable[[OnnxLine], Any]], Callable[[OnnxLine], Any]]:
    def add(spelling: Callable[[OnnxLine], Any]) -> Callable[[OnnxLine], Any]:
        SPELLINGS[name] = spelling
        return spelling

    return add


# -- arithmetic ------------------------------------------------------------------------------------------------


@_spells("mod")
def _mod(line: OnnxLine) -> Tensor:
    """Emit mod. For integers, ONNX's result has the sign of y, as ours. For floats, it has the sign of x, as in C, so
    y is added if the signs differ.
    """
    if not line.x.dtype.is_float:
        return _tensor(line.add("Mod", line.x, line.y))
    rest, mend = _float_rest(line)
    return _tensor(line.add("Where", mend, line.add("Add", rest, line.y), rest))


def _float_rest(line: OnnxLine) -> tuple[Tensor, Tensor]:
    """Return the remainder as in C, and a condition that is true if the remainder is not 0 and its sign differs from
    the sign of y.
    """
    zero = line.w.constant(0.0, line.x.dtype)
    rest = line.add("Mod", line.x, line.y, fmod=1)
    signs_differ = line.add("Xor", line.add("Less", rest, zero), line.add("Less", line.y, zero))
    return rest, line.add("And", signs_differ, line.add("Not", line.add("Equal", rest, zero)))


@_spells("floor_divide")
def _floor_divide(line: OnnxLine) -> Tensor:
    """Emit NumPy's floor division: (x - rest) / y, which is an integer up to rounding, minus one where y was added to
    the remainder.
    """
    quotient = line.add("Div", line.x, line.y)
    if line.x.dtype is u8:
        return _tensor(quotient)
    if not line.x.dtype.is_float:
        zero = line.w.constant(0, line.x.dtype)
        inexact = line.add("Not", line.add("Equal", line.add("Mul", quotient, line.y), line.x))
        signs_differ = line.add("Xor", line.add("Less", line.x, zero), line.add("Less", line.y, zero))
        down = line.w.cast(line.add("And", inexact, signs_differ), line.x.dtype)
        return _tensor(line.add("Sub", quotient, down))
    rest, mend = _float_rest(line)
    whole = line.add("Div", line.add("Sub", line.x, rest), line.y)
    whole = line.add("Round", line.add("Sub", whole, line.w.cast(mend, line.x.dtype)))
    by_zero = line.add("Equal", line.y, line.w.constant(0.0, line.x.dtype))
    return _tensor(line.add("Where", by_zero, quotient, whole))


def _tensor(made: Any) -> Tensor:
    assert isinstance(made, Tensor)
    return made


@_spells("round_to")
def _round_to(line: OnnxLine) -> Tensor:
    """Emit a cast to the format and back. A cast to bf16 does not saturate, since no f16 number is too large
    for bf16.
    """
    w, x = line.w, line.x
    if line.op.format == "bf16":
        if line.op.saturate and x.dtype is not f16:
            most = FORMATS["bf16"].largest
            x = w.add("Min", w.add("Max", x, w.constant(-most, x.dtype)), w.constant(most, x.dtype))
        return w.cast(w.cast(x, bf16), line.x.dtype)
    code, dtype = NARROW[line.op.format]
    narrow = w.add("Cast", x, dtype=dtype, to=code, saturate=int(line.op.saturate))
    return w.cast(narrow, x.dtype)


@_spells("decode")
def _decode(line: OnnxLine) -> Tensor:
    """Emit DequantizeLinear. All other encoded weights were decoded before."""
    stored = line.w.quantized[line.node.inputs[0]]
    zero = () if stored.zero is None else (stored.zero,)
    numbers = line.add("DequantizeLinear", stored.q, stored.scale, *zero, dtype=f32, **stored.attributes)
    return line.w.cast(numbers, line.result.dtype)


@_spells("fake_quantize")
def _fake_quantize(line: OnnxLine) -> Tensor:
    dtype = EIGHT_BITS[line.op.least, line.op.greatest]
    zero = line.w.cast(line.zero, dtype)
    steps = line.add("QuantizeLinear", line.x, line.scale, zero, dtype=dtype)
    return _tensor(line.add("DequantizeLinear", steps, line.scale, zero, dtype=f32))


# -- products --------------------------------------------------------------------------------------------------


def _factor(line: OnnxLine, name: str) -> Tensor:
    """Return an operand of a product, converted to the op's accumulation dtype, if it has one."""
    x: Tensor = getattr(line, name)
    return x if line.op.to is None else line.w.cast(x, line.op.to)


@_spells("linear")
def _linear(line: OnnxLine) -> Tensor:
    """Emit Gemm, which transposes the weight itself, if the operand is a matrix. Otherwise emit a MatMul."""
    bias = [line.bias] if line.has("bias") else []
    x, weight = _factor(line, "x"), _factor(line, "weight")
    if line.type("x").rank == 2:
        return _tensor(line.add("Gemm", x, weight, *bias, transB=1))
    made = line.add("MatMul", x, line.add("Transpose", weight, perm=[1, 0]))
    return _tensor(line.add("Add", made, *bias) if bias else made)


@_spells("einsum")
def _einsum(line: OnnxLine) -> Tensor:
    """Emit Einsum. Every axis gets a letter, also axes of `...`. Dimensions of size 1 that broadcast are removed from
    an operand.
    """
    application = line.op.apply([v.type for v in line.node.inputs])
    terms, operands = [], []
    for x, value, dims in zip(line.present, line.node.inputs, application.operands, strict=True):
        held = [at for at, dim in enumerate(dims or ()) if dim.factors]
        operands.append(reshaped(line.w, x, value.type.shape, [value.type.shape[at] for at in held]))
        terms.append(" ".join(name for dim in dims or () for name in dim.factors))
    result = " ".join(name for dim in application.results[0] for name in dim.factors)
    equation = f"{', '.join(terms)} -> {result}".replace("...", "_")
    return _tensor(line.add("Einsum", *operands, equation=einsum_letters(equation)))


@_spells("conv")
def _conv(line: OnnxLine) -> Tensor:
    befores, afters, strides, dilations = zip(*line.op.spatial(line.type("x").rank - 2), strict=True)
    bias = [line.bias] if line.has("bias") else []
    return _tensor(
        line.add(
            "Conv",
            line.x,
            line.weight,
            *bias,
            pads=[*befores, *afters],
            strides=list(strides),
            dilations=list(dilations),
            group=line.op.groups,
        )
    )


# -- reductions and indices ------------------------------------------------------------------------------------


def _wide(line: OnnxLine, x: Tensor) -> Tensor:
    """Return x. 16-bit dtypes are converted to f32, in which our backends compute them."""
    return line.w.cast(x, f32) if x.dtype in (f16, bf16) else x


def _reduced(line: OnnxLine, op_type: str, x: Tensor) -> Tensor:
    """Emit a reduction. The axes are an input: for sums at all our opsets, for other reductions from opset 18 on."""
    axes = [place(axis, line.type("x").rank) for axis in line.op.axes]
    if not axes:
        return x
    keep = int(line.op.keep)
    if op_type == "ReduceSum" or line.w.opset >= 18:
        return _tensor(line.add(op_type, x, line.w.integers(*axes), keepdims=keep))
    return _tensor(line.add(op_type, x, axes=axes, keepdims=keep))


@_spells("cumsum")
def _cumsum(line: OnnxLine) -> Tensor:
    axis = line.w.constant(line.op.axis, i64)
    return _tensor(line.add("CumSum", line.x, axis, exclusive=int(line.op.exclusive), reverse=int(line.op.reverse)))


@_spells("top_k")
def _top_k(line: OnnxLine) -> tuple[Tensor, ...]:
    return line.w.add_all("TopK", line.x, line.w.integers(line.op.k), results=2, axis=line.op.axis)


@_spells("layer_norm")
def _layer_norm(line: OnnxLine) -> Tensor:
    return _normalized(line, "LayerNormalization", [line.bias] if line.has("bias") else [])


@_spells("rms_norm")
def _rms_norm(line: OnnxLine) -> Tensor:
    return _normalized(line, "RMSNormalization", [])


def _normalized(line: OnnxLine, op_type: str, bias: Sequence[Tensor]) -> Tensor:
    x = _wide(line, line.x)
    if line.has("weight"):
        weight = _wide(line, line.weight)
    else:
        weight = line.w.constant(np.ones(line.type("x").shape[-1].constant), x.dtype)
    made = line.add(op_type, x, weight, *[_wide(line, b) for b in bias], axis=-1, epsilon=line.op.eps)
    return line.w.cast(made, line.x.dtype)


# -- shapes and positions --------------------------------------------------------------------------------------


@_spells("expand")
def _expand(line: OnnxLine) -> Tensor:
    """Emit Expand. A 1 in the shape keeps the size of x."""
    have, want = line.type("x").shape, line.result.shape
    if have == want:
        return _tensor(line.x)
    new = len(want) - len(have)
    kept = [at >= new and have[at - new] == size for at, size in enumerate(want)]
    shape = [1 if keep else size for keep, size in zip(kept, want, strict=True)]
    return _tensor(line.add("Expand", line.x, line.w.vector(shape)))


@_spells("positions")
def _positions(line: OnnxLine) -> Tensor:
    shape = line.type("x").shape
    made = line.w.counted(shape[-1])
    return made if len(shape) == 1 else _tensor(line.add("Expand", made, line.w.vector(shape)))


@_spells("slice")
def _slice(line: OnnxLine) -> Tensor:
    size = line.type("x").shape[line.op.axis]
    start, stop = line.op.span(size)
    starts, stops = (
        line.w.vector([edge if edge is not None and _from_end(edge) else position])
        for edge, position in ((line.op.start, start), (line.op.stop, stop))
    )
    if stop == size:
        stops = line.w.integers(2**63 - 1)
    steps = [line.w.integers(line.op.stride)] if line.op.stride != 1 else []
    return _tensor(line.add("Slice", line.x, starts, stops, line.w.integers(line.op.axis), *steps))


def _from_end(edge: Size) -> bool:
    """Return True if an edge counts from the end, as in ONNX, for any size of the axis."""
    return edge.constant is not None and edge.constant < 0


@_spells("pad")
def _pad(line: OnnxLine) -> Tensor:
    rank = line.type("x").rank
    axis = place(line.op.axis, rank)
    before = [line.op.before if at == axis else 0 for at in range(rank)]
    after = [line.op.after if at == axis else 0 for at in range(rank)]
    value = _filling(line, line.op.value, line.x.dtype)
    return _tensor(line.add("Pad", line.x, line.w.vector([*before, *after]), value, mode="constant"))


def _filling(line: OnnxLine, value: float, dtype: DType) -> Tensor:
    """Return the constant with which a tensor of this dtype is filled. The op has checked that the dtype represents
    it.
    """
    return line.w.constant(value if dtype.is_float else bool(value) if dtype is boolean else int(value), dtype)

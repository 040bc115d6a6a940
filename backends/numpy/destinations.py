"""NumPy code for ops that write their result to a planned destination, with `out=`.

Calls of our own kernels always have this argument (`treadle.backends.numpy.spelling`); this module has the code for
NumPy's operators and methods. Ops that run their reference, or that have float16 or several results, allocate their
results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from treadle.backends.numpy.spelling import SPELLINGS, attention_call, dtype_text
from treadle.backends.numpy.workspaces import is_product_of_two
from treadle.backends.python.axis_spelling import axes_of, keeping, rearranged
from treadle.backends.python.spelled_line import Dialect, Line, Spelling
from treadle.ir.graph import Node, Value
from treadle.ir.ops.attention import Attention
from treadle.ir.ops.indexing import Iota, TakeAlongAxis
from treadle.ir.ops.products import Einsum, Linear, MatMul
from treadle.ir.ops.reductions import CumSum
from treadle.ir.ops.rotary import Rotary
from treadle.ir.types import f16, f32
from treadle.passes.memory.storage_plan import Step


def _of_operands(function: str) -> Callable[[Line], str]:
    return lambda line: f"np.{function}({', '.join(line[name] for name in line.names)}{line.out_args})"


_FUNCTIONS = {
    **{"add": "add", "sub": "subtract", "mul": "multiply", "div": "divide", "pow": "power"},
    **{name: name for name in ("maximum", "minimum", "floor_divide", "mod")},
    **{name: name for name in ("exp", "log", "sqrt", "tanh", "sin", "cos", "sign", "floor")},
    **{"neg": "negative", "abs": "absolute", "round": "rint"},
    **{name: name for name in ("equal", "not_equal", "less", "less_equal", "greater", "greater_equal")},
    **{"logical_and": "bitwise_and", "logical_or": "bitwise_or", "logical_not": "invert"},
}
"""Names of ops, and NumPy functions that compute the same numbers."""

_ELEMENTWISE: dict[str, Spelling] = {
    **{ours: _of_operands(theirs) for ours, theirs in _FUNCTIONS.items()},
    "reciprocal": "np.divide(1.0, {x}{out_args})",
    "relu": "np.maximum({x}, 0.0{out_args})",
}


def _reduction(function: str) -> Callable[[Line], str]:
    def spelled(line: Line) -> str:
        dtype = f", dtype={dtype_text(line.result.dtype)}" if function == "np.sum" and line.result.dtype.is_int else ""
        return f"{function}({line.array('x')}, {axes_of(line)}{keeping(line, 'keepdims')}{dtype}{line.out_args})"

    return spelled


def _copied(text: str, line: Line) -> str:
    return f"kernels.copied({text}, {line.shape(line.result.storage_type.shape)}{line.out_args})"


def _rearranged(line: Line) -> str:
    """Return code that permutes the axes. Axes that form one dimension are joined afterwards, which is a view."""
    return _copied(rearranged(line, "transpose", joined=False), line)


def _iota(line: Line) -> str:
    return f"kernels.iota({line.size(line.op.size)}, {dtype_text(line.op.dtype)}{line.out_args})"


_WRITTEN: dict[str, Spelling] = {
    **_ELEMENTWISE,
    "where": "kernels.where({condition}, {x}, {y}{out_args})",
    "cast": lambda line: f"kernels.cast({line.array('x')}, {dtype_text(line.op.to)}{line.out_args})",
    "matmul": "np.matmul({x}, {y}{out_args})",
    "concat": lambda line: f"np.concatenate(({line.arrays},), {line.op.axis}{line.out_args})",
    "rearrange": _rearranged,
    "reshape": lambda line: _copied(line.array("x"), line),
    "positions": "kernels.positions({x}{out_args})",
    "iota": _iota,
    "cumsum": lambda line: (
        f"np.cumsum({line.array('x')}, {line.op.axis}, dtype={dtype_text(line.result.dtype)}{line.out_args})"
    ),
    "argmax": lambda line: f"np.argmax({line.array('x')}, {line.op.axis}{keeping(line, 'keepdims')}{line.out_args})",
    "rotary": lambda line: f'kernels.rotary({line.arrays}, "{line.op.layout}"{line.out_args})',
    "take_along_axis": lambda line: f"kernels.take_along_axis({line.arrays}, {line.op.axis}{line.out_args})",
    "attention": attention_call,
    **{f"reduce_{name}": _reduction(f"np.{name}") for name in ("sum", "max", "min")},
    "reduce_mean": _reduction("kernels.mean"),
}

_KERNELS = (
    *("linear", "einsum", "embedding", "gather", "pad", "softmax", "log_softmax", "layer_norm", "rms_norm"),
    *("erf", "gelu", "gelu_tanh", "sigmoid", "silu", "quick_gelu", "rsqrt", "expm1", "log1p", "softplus"),
)
"""Ops whose only code is a kernel with a destination."""

NUMPY = Dialect(
    name="numpy",
    imports=("import numpy as np", "import treadle.backends.numpy.kernels as kernels"),
    spellings=SPELLINGS,
    copied="{}.copy()",
    otherwise=Line.by_reference,
    into=_WRITTEN,
)

_MOVES = ("rearrange", "reshape", "concat", "pad", "cast")
"""Ops without additions, which therefore have a destination in float16, too."""


def is_placed(node: Node) -> bool:
    """Return True if a node's code writes its result to a given destination."""
    op, types = node.op, [v.type for v in (*node.inputs, *node.results)]
    if op.name not in {*_WRITTEN, *_KERNELS} or op.updates or len(node.results) != 1:
        return False
    if any(each.dtype is f16 for each in types) and op.name not in _MOVES:
        return False
    if isinstance(op, (MatMul, Linear)):
        return op.to in (None, types[0].dtype)
    if isinstance(op, Einsum):
        return is_product_of_two(node)
    if isinstance(op, CumSum):
        return not (op.exclusive or op.reverse)
    if isinstance(op, (Attention, Rotary)):
        return all(each.dtype is f32 for each in types if each.dtype.is_float)
    if op.name in ("erf", "gelu"):
        return types[0].dtype is f32
    if isinstance(op, Iota):
        return types[-1].dtype.name in ("i64", "i32", "f32")
    if isinstance(op, TakeAlongAxis):
        return types[1].dtype.name == "i64"
    return True


def written_over(step: Step) -> Sequence[Value]:
    """Return the operands that a step may overwrite: NumPy's elementwise functions accept one as `out`."""
    node = step.root
    if node.op.name not in _ELEMENTWISE or node.result.type.dtype is f16:
        return ()
    return [v for v in node.inputs if v.literal is None and v.type == node.result.type]

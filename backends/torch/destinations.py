"""PyTorch code for ops that write their result to a planned destination, with `out=`.

Only ops for which this takes no extra time are included. All others allocate their results: ops without `out=`
(oneDNN's products with packed weights, attention, norms, convolutions), ops that compute elsewhere and copy, and ops
that would take a slower path (linear would add its bias afterwards).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from treadle.backends.python.axis_spelling import axes_of, keeping
from treadle.backends.python.spelled_line import Line, Spelling
from treadle.backends.torch.dtype_names import dtype_text
from treadle.backends.torch.spelling import embedding_call
from treadle.ir.graph import Node, Value
from treadle.ir.ops.axis_names import place
from treadle.ir.ops.normalization import Softmax
from treadle.ir.ops.products import MatMul
from treadle.ir.types import bf16, f16
from treadle.passes.memory.storage_plan import Step


def _binary(function: str) -> Callable[[Line], str]:
    """Return code for a binary function. PyTorch accepts a Python number only as the second operand."""
    return lambda line: f"torch.{function}({line.array('x')}, {line.y}, out={line.out})"


def _of_arrays(function: str) -> Callable[[Line], str]:
    return lambda line: f"torch.{function}({line.arrays}, out={line.out})"


def _reduction(function: str) -> Callable[[Line], str]:
    def spelling(line: Line) -> str:
        dtype = line.result.dtype
        dtype_argument = f", dtype={dtype_text(dtype)}" if function == "sum" and dtype.is_int else ""
        keep = keeping(line, "keepdim")
        return f"torch.{function}({line.array('x')}, dim={axes_of(line)}{keep}{dtype_argument}, out={line.out})"

    return spelling


_BINARY = {
    **{name: name for name in ("add", "sub", "mul", "div", "pow", "floor_divide")},
    **{"mod": "remainder", "equal": "eq", "not_equal": "ne", "less": "lt", "less_equal": "le"},
    **{"greater": "gt", "greater_equal": "ge", "logical_and": "bitwise_and", "logical_or": "bitwise_or"},
}
_UNARY = {
    **{name: name for name in ("neg", "exp", "log", "sqrt", "reciprocal", "tanh", "erf", "sigmoid", "sin", "cos")},
    **{name: name for name in ("expm1", "log1p")},
    **{"abs": "abs", "floor": "floor", "round": "round", "logical_not": "bitwise_not"},
}
_ELEMENTWISE: dict[str, Spelling] = {
    **{ours: _binary(theirs) for ours, theirs in _BINARY.items()},
    **{ours: _of_arrays(theirs) for ours, theirs in _UNARY.items()},
    **{name: _of_arrays(name) for name in ("maximum", "minimum", "where")},
    "relu": "torch.clamp_min({x}, 0, out={out})",
    "gelu": "F.gelu({x}, out={out})",
    "gelu_tanh": 'F.gelu({x}, approximate="tanh", out={out})',
    "silu": "torch._C._nn.silu({x}, out={out})",
}

DESTINATIONS: dict[str, Spelling] = {
    **_ELEMENTWISE,
    "matmul": _of_arrays("matmul"),
    "concat": lambda line: f"torch.cat(({line.arrays},), dim={line.op.axis}, out={line.out})",
    "softmax": lambda line: f"torch.softmax({line.array('x')}, {line.op.axis}, out={line.out})",
    "embedding": lambda line: embedding_call(line, f", out={line.out}"),
    **{f"reduce_{ours}": _reduction(theirs) for ours, theirs in (("sum", "sum"), ("mean", "mean"))},
    **{f"reduce_{ours}": _reduction(theirs) for ours, theirs in (("max", "amax"), ("min", "amin"))},
}
"""Names of ops, and expressions that write to `{out}`."""


def is_placed(node: Node) -> bool:
    """Return True if a node's code writes its result to a given destination."""
    if node.op.name not in DESTINATIONS or node.op.updates or len(node.results) != 1:
        return False
    op, x = node.op, node.inputs[0].type
    if isinstance(op, MatMul):
        return node.inputs[1].layout is None and op.to in (None, x.dtype)
    if isinstance(op, Softmax):
        return place(op.axis, x.rank) == x.rank - 1 or x.dtype not in (f16, bf16)
    return op.attributes.get("axes") != ()  # a reduction over no axes is a copy


def written_over(step: Step) -> Sequence[Value]:
    """Return the operands that a step may overwrite: PyTorch's elementwise functions accept one as `out`."""
    node = step.root
    if node.op.name not in _ELEMENTWISE:
        return ()
    return [v for v in node.inputs if v.literal is None and v.type == node.result.type]

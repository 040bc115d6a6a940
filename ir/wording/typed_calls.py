"""Replacements of calls of other libraries that keep the arguments that the user typed.

`t.cat([a, b], dim=-1)` is `t.concat(a, b, axis=-1)`. A hint with an example's axis or size would compute something else
when followed. The arguments are read in the user's line.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np

from treadle.ir.source_lines import user_call
from treadle.ir.wording.other_spellings import DIFFERENT, OTHER_FUNCTIONS, dtype_word

_METHODS: dict[str, tuple[str, ...]] = {
    "swapdims": ("transpose",),
    "expand_dims": ("unsqueeze",),
    "tile": ("repeat",),
    "broadcast_to": ("expand",),
    "average": ("mean",),
    "gather": (),
}
"""The methods for functions of PyTorch and NumPy of another name, whose first argument is the tensor. Empty: none is
the replacement.
"""

_NUMPYS_METHODS: dict[str, tuple[str, ...]] = {
    "transpose": ("permute",),
    "repeat": ("repeat_interleave",),
    "max": ("amax",),
    "min": ("amin",),
    "split": (),
    "var": (),
    "std": (),
}
"""The methods for functions of NumPy that are not PyTorch's functions of the same name."""

_KEYWORDS = {"axis": ("dim", "dims"), "axes": ("dims", "dim"), "keepdims": ("keepdim",)}
"""The possible names in PyTorch of an argument of NumPy."""


def _joined(tensors: str, dim: str = "0") -> str:
    node = ast.parse(tensors, mode="eval").body
    parts = map(ast.unparse, node.elts) if isinstance(node, ast.List | ast.Tuple) else [f"*{tensors}"]
    return f"t.concat({', '.join(parts)}, axis={dim})"


def _stacked(tensors: str, dim: str = "0") -> str:
    node = ast.parse(tensors, mode="eval").body
    if not isinstance(node, ast.List | ast.Tuple):
        return f"t.concat(*[each.unsqueeze({dim}) for each in {tensors}], axis={dim})"
    parts = [f"{_operand(each)}.unsqueeze({dim})" for each in node.elts]
    return f"t.concat({', '.join(parts)}, axis={dim})"


def _along(dim: str, keepdim: str = "False", *further: str) -> str:
    """Return the arguments of a reduction that differ from the defaults."""
    over = [f"dim={dim}"] if dim != "None" else []
    kept = [f"keepdim={keepdim}"] if keepdim != "False" else []
    return ", ".join([*over, *kept, *further])


def _norm(x: str, p: str = "2", dim: str = "None", keepdim: str = "False") -> str | None:
    return f"t.sqrt(({x} * {x}).sum({_along(dim, keepdim)}))" if p in ("2", "2.0") else None


def _numpys_norm(x: str, ord: str = "2", dim: str = "None", keepdim: str = "False") -> str | None:
    return _norm(x, ord, dim, keepdim)


def _filled(value: str) -> Callable[..., str]:
    def filled(*size: str, dtype: str = "float32") -> str:
        is_shape = size[0].startswith(("(", "[")) or size[0].endswith("shape")
        shape = f"({', '.join(size)})" if len(size) > 1 else size[0] if is_shape else f"({size[0]},)"
        return f"t.expand(t.constant({value}, {_dtype(dtype)}), shape={shape})"

    return filled


def _dtype(typed: str) -> str:
    """Return the dtype of Treadle for the text of a dtype, such as torch.float16, "float16", "f2", np.int64 and int."""
    name = typed.strip("'\"")
    if name != typed or typed in ("float", "int", "bool"):
        with contextlib.suppress(TypeError):
            name = np.dtype(name).name
    return dtype_word(name) or typed


def _counted(*bounds: str, dtype: str = "t.i64") -> str | None:
    kind = f", dtype={_dtype(dtype)}" if dtype != "t.i64" else ""
    if len(bounds) == 1 or (len(bounds) == 2 and bounds[0] == "0"):
        return f"t.iota(size={bounds[-1]}{kind})"
    return f"{bounds[0]} + t.iota(size={bounds[1]} - {bounds[0]}{kind})" if len(bounds) == 2 else None


def _each(size: str, axes: int) -> str:
    """Return an argument of a pooling or a convolution for each axis."""
    if size.startswith(("(", "[", "'")):  # a text: padding='same'
        return size
    return f"({size},)" if axes == 1 else f"({', '.join([size] * axes)})"


_SIGNS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "sub": "-"}
"""The operators of PyTorch's functions and methods."""


def _between(sign: str) -> Callable[..., str]:
    return lambda x, y: f"{x} {sign} {_operand(ast.parse(y, mode='eval').body)}"


def _pooled(op: str, axes: int) -> Callable[..., str]:
    def pooled(x: str, kernel_size: str, stride: str = "None", padding: str = "0") -> str:
        strides = _each(kernel_size if stride == "None" else stride, axes)
        further = "" if padding == "0" else f", padding={_each(padding, axes)}"
        return f"t.{op}({x}, kernel={_each(kernel_size, axes)}, strides={strides}{further})"

    return pooled


def _convolved(axes: int) -> Callable[..., str]:
    def convolved(_: str, channels: str, kernel_size: str, stride: str = "1", padding: str = "0") -> str:
        further = "" if stride == "1" else f", strides={_each(stride, axes)}"
        if padding != "0":
            further += f", padding={_each(padding, axes)}"
        return f't.convolution(x, {channels}, {_each(kernel_size, axes)}{further}, name="conv")'

    return convolved


_CALLS: dict[str, Callable[..., str | None]] = {
    **{f"max_pool{n}d": _pooled("max_pool", n) for n in (1, 2)},
    **{f"avg_pool{n}d": _pooled("average_pool", n) for n in (1, 2)},
    **{f"Conv{n}d": _convolved(n) for n in (1, 2)},
    **{f"MaxPool{n}d": partial(_pooled("max_pool", n), "x") for n in (1, 2)},
    **{f"AvgPool{n}d": partial(_pooled("average_pool", n), "x") for n in (1, 2)},
    "cat concatenate": _joined,
    "hstack": lambda tensors: _joined(tensors, "1"),
    "vstack": lambda tensors: _joined(tensors, "0"),
    "stack": _stacked,
    "gather": lambda x, dim, index: f"t.take_along_axis({x}, {index}, axis={dim})",
    "unfold": lambda x, dim, size, step: f"t.windows({x}, axis={dim}, size={size}, stride={step})",
    "scatter_add": lambda x, dim, index, src: f"t.scatter_add({x}, {index}, {src}, axis={dim})",
    "index_add": lambda x, dim, index, source: f"t.index_add({x}, {index}, {source}, axis={dim})",
    "astype": lambda x, dtype: f"{x}.cast({_dtype(dtype)})",
    "var": lambda x, dim="None", keepdim="False": f"{x}.var({_along(dim, keepdim, 'correction=0')})",
    "std": lambda x, dim="None", keepdim="False": f"{x}.std({_along(dim, keepdim, 'correction=0')})",
    "norm": _norm,
    "normalize": lambda x, p="2", dim="1", eps="1e-12": (
        f"{x} / t.maximum({norm}, {eps})" if (norm := _norm(x, p, dim, "True")) else None
    ),
    "logsumexp": lambda x, dim, keepdim="False": (
        f"t.log(t.exp({x} - {x}.amax({_along(dim, 'True')})).sum({_along(dim, keepdim)}))"
        f" + {x}.amax({_along(dim, keepdim)})"
    ),
    "sort": lambda x, dim="-1": f"-(-{x}).topk({x}.shape[{dim}], {dim}).values",
    "argsort": lambda x, dim="-1": f"(-{x}).topk({x}.shape[{dim}], {dim}).indices",
    "glu": lambda x, dim="-1": f"{x}.chunk(2, {dim})[0] * t.sigmoid({x}.chunk(2, {dim})[1])",
    "take_along_dim": lambda x, index, dim: f"t.take_along_axis({x}, {index}, axis={dim})",
    "index_select": lambda x, dim, index: f"t.gather({x}, {index}, axis={dim})",
    "narrow": lambda x, dim, start, length: f"t.slice({x}, axis={dim}, start={start}, stop={start} + {length})",
    "select": lambda x, dim, index: f"{x}.movedim({dim}, 0)[{index}]",
    "lerp": lambda x, end, weight: f"{x} + {weight} * ({end} - {x})",
    "leaky_relu": lambda x, negative_slope="0.01": f"t.where({x} > 0, {x}, {negative_slope} * {x})",
    "hardtanh": lambda x, min_val="-1.0", max_val="1.0": f"{x}.clamp({min_val}, {max_val})",
    "clamp_min": lambda x, min: f"{x}.clamp(min={min})",
    "clamp_max": lambda x, max: f"{x}.clamp(max={max})",
    "one_hot": lambda x, num_classes: f"({x}[..., None] == t.iota(size={num_classes})).long()",
    "arange": _counted,
    "zeros empty": _filled("0.0"),
    "ones": _filled("1.0"),
    "full": lambda size, fill_value, dtype="float32": _filled(fill_value)(size, dtype=dtype),
    "eye": lambda n: f"(t.iota(size={n})[:, None] == t.iota(size={n})).cast(t.f32)",
    "Linear": lambda _, out_features, bias="True": _CALLS["Dense"](out_features, bias),
    "Dense": lambda out, bias="True": f't.linear(x, {out}{", bias=False" * (bias == "False")}, name="f")',
    "Embedding": lambda num_embeddings, embedding_dim: (
        f't.embed(tokens, {num_embeddings}, {embedding_dim}, name="wte")'
    ),
    "embedding": lambda x, num_embeddings, embedding_dim, name='"wte"': (
        f"t.embed({x}, {num_embeddings}, {embedding_dim}, name={name})"
    ),
    "GroupNorm": lambda num_groups, _, eps="1e-05": f't.group_norm(x, {num_groups}, eps={eps}, name="norm")',
    "swiglu SwiGLU": lambda x, hidden: f't.gated_mlp({x}, {hidden}, act=t.silu, name="mlp")',
    "geglu GEGLU GeGLU": lambda x, hidden: f't.gated_mlp({x}, {hidden}, act=t.gelu, name="mlp")',
    "matmul mm bmm dot": _between("@"),
    **{name: _between(sign) for name, sign in _SIGNS.items()},
}
_REPLACED = {word: call for words, call in _CALLS.items() for word in words.split()}


def typed_replacement(
    word: str, tensor: type = object, trace: TracebackType | None = None, *, of_tensor: bool = False
) -> str | None:
    """Return the call that replaces the call of a function of another library on the user's line, with its arguments.
    None if the line calls no function of this name, or if no replacement takes the arguments.

    tensor     the class that has the methods of tensors
    trace      where the line raised an error, if its frame is no longer on the stack
    of_tensor  the function is a method of a tensor
    """
    call = user_call(trace)
    if call is None or (call.func.attr if isinstance(call.func, ast.Attribute) else ast.unparse(call.func)) != word:
        return None
    owner = call.func.value if isinstance(call.func, ast.Attribute) else None
    nodes = [owner, *call.args] if of_tensor and owner else call.args
    arguments = [*map(_operand, nodes[:1]), *map(ast.unparse, nodes[1:])]
    options = {each.arg: ast.unparse(each.value) for each in call.keywords if each.arg}
    if len(options) < len(call.keywords) or not arguments or arguments[0].startswith(("np.", "numpy.")):
        return None
    module = ast.unparse(owner).partition(".")[0] if owner else ""
    is_numpys = module in ("np", "numpy") or not options.keys().isdisjoint(_KEYWORDS)
    names = _NUMPYS_METHODS.get(word) if is_numpys else None
    for name in _METHODS.get(word, (word,)) if names is None else names:
        method = fixed_method(tensor, name)
        bound = None if method is None else _bound(method, arguments, options)
        if bound is not None:
            rest = [*bound[0][1:], *[f"{option}={value}" for option, value in bound[1].items()]]
            return f"{arguments[0]}.{name}({', '.join(rest)})"
    function = _numpys_norm if is_numpys and word == "norm" else _REPLACED.get(word)
    bound = None if function is None else _bound(function, arguments, options)
    return None if function is None or bound is None else function(*bound[0], **bound[1])


def other_meaning(name: str, trace: TracebackType | None = None) -> str:
    """Return the beginning of a hint for a function that does something else than PyTorch's function of the same name;
    empty for other functions.
    """
    if name not in DIFFERENT:
        return ""
    call = user_call(trace)
    if call is not None and call.args and isinstance(call.args[0], ast.Constant):  # t.stack("h"): no tensors
        return ""
    spelled = typed_replacement(name, trace=trace) or OTHER_FUNCTIONS[name]
    return f"PyTorch's {name} is {spelled}, and this {DIFFERENT[name]}: "


def fixed_method(tensor: type, name: str) -> Callable[..., Any] | None:
    """Return a method of tensors. A class with `__getattr__` adds methods on first use: with them, a hint would depend
    on earlier calls.
    """
    fixed = [vars(base) for base in tensor.__mro__ if "__getattr__" not in vars(base)]
    found = next((methods[name] for methods in fixed if name in methods), None)
    return found if inspect.isfunction(found) else None


def _operand(node: ast.expr) -> str:
    """Return the text of an argument, in parentheses if a method cannot follow it."""
    text = ast.unparse(node)
    return f"({text})" if isinstance(node, ast.BinOp | ast.Compare | ast.BoolOp | ast.IfExp | ast.Lambda) else text


def _bound(
    function: Callable[..., Any], arguments: list[str], options: dict[str, str]
) -> tuple[list[str], dict[str, str]] | None:
    """Return the arguments with the names that a function has for them, or None if it does not take them."""
    signature = inspect.signature(function)
    named = {
        next((name for name in _KEYWORDS.get(option, ()) if name in signature.parameters), option): value
        for option, value in options.items()
    }
    try:
        signature.bind(*arguments, **named)
    except TypeError:
        return None
    return arguments, named

"""The checks of a backend before it compiles: unsupported nodes, and weights that are missing or have another type."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from treadle.files.converted_arrays import ConvertedArray
from treadle.ir.builder import describe_source
from treadle.ir.errors import BackendError, Hint
from treadle.ir.graph import Graph, Node, Value
from treadle.ir.target import Target
from treadle.ir.types import Type


def refuse_misfit(name: str, wanted: Type, value: Any) -> None:
    """Raise BackendError for a weight of another shape or dtype. A bf16 weight may be a tensor, or a float32 array."""
    dtype, shape = wanted.storage_type.dtype.numpy, wanted.storage_type.static_shape
    if dtype is not None and isinstance(value, np.ndarray) and value.dtype == dtype and value.shape == shape:
        return  # the usual case; computing a dtype's name would be slow
    array = value if hasattr(value, "detach") or isinstance(value, ConvertedArray) else np.asarray(value)
    found = str(array.dtype).removeprefix("torch.")
    known = ("bfloat16", "float32") if dtype is None else (dtype.name,)
    if found not in known or not shape_fits(wanted.storage_type, tuple(array.shape)) or layout_of(array) != "strided":
        raise misfit(name, wanted, array)


def layout_of(value: Any) -> str:
    """Return the layout of a PyTorch tensor: `strided` for dense tensors, and also for arrays."""
    return str(getattr(value, "layout", "strided")).removeprefix("torch.")


def shown(array: Any) -> str:
    """Return a string such as `float32[8, 8]`, with the layout of a tensor that is not dense."""
    layout = layout_of(array)
    dense = "" if layout == "strided" else f", {layout}"
    return f"{str(array.dtype).removeprefix('torch.')}{list(array.shape)}{dense}"


_LISTED = 20
"""Maximum number of problems that an error lists; it states the number of further ones."""


def listed(lines: Sequence[str]) -> str:
    """Return lines as text: the first ones, and the number of the others."""
    more = len(lines) - _LISTED
    return "\n".join([*lines[:_LISTED], *([f"and {more} more"] if more > 0 else [])])


def refuse_missing(title: str, wanted: Mapping[str, Value], weights: Mapping[str, Any]) -> None:
    """Raise one BackendError that lists all weights that are missing for the graph `title`."""
    missing = [f"{name}: {value.type}" for name, value in wanted.items() if name not in weights]
    if missing:
        raise BackendError(
            f"{title} lacks weights",
            received=f"{len(weights)} weight{'s' * (len(weights) != 1)}",
            within=listed(missing),
        )


def misfit(name: str, wanted: Type, array: Any) -> BackendError:
    """Return the error for a weight of another shape or dtype. Its hint is the conversion, if there is one."""
    held = f", stored as {wanted.storage_type}" if wanted.encoding is not None else ""
    dtype, shape, hint = wanted.dtype.numpy, tuple(array.shape), None
    is_plain = wanted.encoding is None and dtype is not None and layout_of(array) == "strided"
    if is_plain and shape == wanted.static_shape and wanted.dtype.is_float:
        hint = f"w.to(torch.{dtype})" if hasattr(array, "detach") else f"w.astype({str(dtype)!r})"
    elif is_plain and len(shape) == 2 and shape[::-1] == wanted.static_shape:
        hint = "w.T, if it is stored as [inputs, outputs]"
    return BackendError(f"weight {name} must be {wanted}{held}", received=f"{name}: {shown(array)}", hint=hint)


def out_of_memory(count: int, purpose: str) -> BackendError:
    """Return the error for an allocation of `count` bytes that failed."""
    return BackendError("there is not enough memory", received=f"{count / 2**30:.3g} GiB for {purpose}")


def other_gpu(target: Target, name: str) -> BackendError | None:
    """Return the error for a target that names another GPU than the machine's, whose name is `name`; None if it names
    this one, or any.
    """
    if not target.is_elsewhere or target.name.upper() in name.upper().replace(" ", ""):
        return None
    hint = Hint('target="cuda"', "--target cuda")
    return BackendError(f"the GPU of this machine is not {target}", received=name, hint=hint)


def shape_fits(wanted: Type, shape: Sequence[int]) -> bool:
    """Return True if a shape matches a type; symbolic dimensions match any size."""
    sizes = [size.constant for size in wanted.shape]
    return len(sizes) == len(shape) and all(n is None or n == m for n, m in zip(sizes, shape, strict=True))


def unavailable(name: str, missing: str, target: Target | None = None) -> BackendError:
    """Return the error for an unavailable backend. `missing` is the result of `Backend.available`: the reason, and the
    command that installs the backend. The hint names NumPy, too, if it runs on the target.
    """
    reason, _, remedy = missing.partition(": ")
    hint: str | None = remedy or None
    if target is None or target.kind in KINDS["numpy"]:
        first = f"{remedy}, or " if remedy else ""
        hint = Hint(f'{first}backend="numpy"', f"{first}--backend numpy")
    return BackendError(f"the {name} backend is not available", received=reason, hint=hint)


KINDS: Mapping[str, frozenset[str]] = {
    "tvm": frozenset({"cpu", "isa", "cuda", "opencl", "webgpu", "metal"}),
    "torch": frozenset({"cpu", "cuda"}),
    "numpy": frozenset({"cpu"}),
}
"""The kinds of targets for which each of our backends generates code."""

_KIND_NAMES = {"cpu": "the CPU", "cuda": "NVIDIA GPUs"}


def refuse_target(name: str, target: Target) -> None:
    """Raise BackendError if a backend of ours generates no code for a target, or for a number of threads that the
    backend does not choose. The hint names a backend that does.
    """
    kinds = KINDS[name]
    if target.kind in kinds:
        if name == "numpy" and target.threads is not None:
            libraries = "the variable of NumPy's own library, such as OPENBLAS_NUM_THREADS"
            raise BackendError(
                "the numpy backend does not choose the number of threads",
                received=f"threads={target.threads}",
                hint=Hint(f'backend="torch" or "tvm"; or {libraries}', f"--backend torch or tvm; or {libraries}"),
            )
        return
    own = [kind for kind in _KIND_NAMES if kind in kinds]
    others = [other for other, takes in KINDS.items() if target.kind in takes]
    ways = [("target", kind) for kind in own] + [("backend", other) for other in others]
    raise BackendError(
        f"the {name} backend runs on {' and '.join(_KIND_NAMES[kind] for kind in own)} only",
        received=str(target),
        hint=Hint(
            ", or ".join(f'{option}="{value}"' for option, value in ways),
            ", or ".join(f"--{option} {value}" for option, value in ways),
        ),
    )


def code_hint(op: str, place: str) -> Hint:
    """Return the hint for an op that a backend has no code for. `place` is the table that lists the code of ops."""
    added = f"to add code for {op}: {place} (docs/adding-an-op.md)"
    return Hint(f'backend="numpy" runs every op by its reference; {added}', f"--backend numpy; {added}")


def refuse_nodes(
    graph: Graph,
    backend: str,
    supports: Callable[[Node], str | None],
    *,
    hint: str | Callable[[Node], Hint | None] | None = None,
) -> None:
    """Raise one BackendError that lists every unsupported node with its source line. Also raise for states in a
    quantized encoding, which none of our backends supports.

    hint  the error's hint, or a function that returns it for the first unsupported node
    """
    if encoded := [f"%{name}: {v.type}" for name, v in graph.states.items() if v.type.encoding is not None]:
        what = f"the {backend} backend does not support quantized states"
        raise BackendError(what, received=listed(encoded), hint="states of numbers")
    refused = [(node, why) for _, node in graph.walk() if (why := supports(node)) is not None]
    if not refused:
        return
    lines = []
    for node, why in refused:
        place = describe_source(node.source, node.scope)
        lines.append(f"{node.op.name}: {why}" + (f"    ({place})" if place else ""))
    raise BackendError(
        f"the {backend} backend cannot run {graph.name}",
        received=listed([line if n == 1 else f"{line}, {n} times" for line, n in Counter(lines).items()]),
        source=describe_source(refused[0][0].source, refused[0][0].scope),
        hint=hint(refused[0][0]) if callable(hint) else hint,
    )

"""The check of a call: names, dtypes and shapes of the arguments must match the types of a graph's inputs."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from treadle.backends.protocol import Port
from treadle.backends.refusals import layout_of
from treadle.ir.builder import describe_source
from treadle.ir.errors import BackendError, Hint
from treadle.ir.graph import Function, Graph, Node
from treadle.ir.interpreter import solve_sizes
from treadle.ir.naming import free_name
from treadle.ir.sizing.size_bounds import Bounds
from treadle.ir.sizing.sizes import Size
from treadle.ir.wording.call_spelling import spelled_keywords
from treadle.ir.wording.fixed_sizes import named_sizes_hint

Array = np.ndarray[Any, Any]
Convert = Callable[[Port, Any], Any]
"""A function that converts an argument to an array of the port's dtype, of any shape. Raises BackendError."""


_REMEMBERED = 256  # number of sets of shapes that are cached as valid


class Signature:
    """The inputs of an entry of a graph, by default the last entry. A signature is built once; `bind` checks each call.

    States determine the sizes of some symbols before a call: these sizes are passed as `known`.
    """

    def __init__(self, graph: Graph, entry: Function | None = None) -> None:
        entry = entry or graph.main
        self.name = graph.name if len(graph.later_entries) == 1 else f"{graph.name}.{entry.name}"
        self.ports = tuple(Port(v.name, v.type) for v in entry.inputs)
        self.bounds = dict(graph.symbols)
        self.state_symbols = frozenset(s for v in graph.states.values() for s in v.type.symbols)
        self.derived = _sizes_that_may_be_negative(graph, entry)
        self._fitting: dict[tuple[Any, ...], dict[str, int]] = {}

    def __str__(self) -> str:
        return f"{self.name}({', '.join(map(str, self.ports))})"

    def bind(self, given: Mapping[str, Any], convert: Convert, known: Mapping[str, int] | None = None) -> list[Any]:
        """Return the arrays in the order of the inputs. Raises BackendError if names, dtypes or shapes do not fit."""
        return self.bind_sized(given, convert, known)[0]

    def bind_sized(
        self, given: Mapping[str, Any], convert: Convert, known: Mapping[str, int] | None = None
    ) -> tuple[list[Any], dict[str, int]]:
        """Return the result of `bind`, and the sizes of the symbols. Raises BackendError as `bind` does."""
        self.check_names(given)
        arrays = [convert(port, given[port.name]) for port in self.ports]
        return arrays, self.sizes([tuple(array.shape) for array in arrays], known)

    def sizes(self, shapes: Sequence[tuple[int, ...]], known: Mapping[str, int] | None = None) -> dict[str, int]:
        """Return the sizes of the symbols for these shapes of inputs. Raises BackendError if a shape does not match."""
        key = (*shapes, *sorted((known or {}).items()))
        found = self._fitting.get(key)  # read once, since another thread may clear the cache
        if found is None:
            named = {port.name: tuple(map(int, shape)) for port, shape in zip(self.ports, shapes, strict=True)}
            found = self._check_shapes(named, known or {})
            if len(self._fitting) >= _REMEMBERED:
                self._fitting.clear()
            self._fitting[key] = found
        return found

    def check_names(self, given: Mapping[str, Any], later: Sequence[str] = ()) -> None:
        """Raise BackendError if a name is unknown or missing.

        later  inputs that the caller computes from the others, and adds
        """
        names = [port.name for port in self.ports if port.name not in later]
        unknown = [name for name in given if name not in names]
        missing = [name for name in names if name not in given]
        if not unknown and not missing:
            return
        what = f"{self.name} has no input {', '.join(unknown)}" if unknown else f"no value for {', '.join(missing)}"
        near = difflib.get_close_matches(unknown[0], missing, n=1) if unknown else []
        raise BackendError(
            what,
            received=", ".join(given) or "no inputs",
            within=str(self),
            hint=_to_give(near or missing or names),
        )

    def _check_shapes(self, shapes: Mapping[str, tuple[int, ...]], known: Mapping[str, int]) -> dict[str, int]:
        sizes: dict[str, int] = dict(known)
        first_in: dict[str, Port] = {}
        for again in (False, True):  # a size such as 2*S may precede the input that determines S
            for port in self.ports:
                shape = shapes[port.name]
                wrong = solve_sizes(port.type, shape, sizes)
                if len(shape) != port.type.rank:
                    raise self._refusal(port, f" {wrong}", shapes, f"an array [{', '.join(port.axes)}]")
                if wrong is not None and again:
                    sources = [f"{s} is {sizes[s]} in {first_in[s].name}" for s in first_in if f"{s} = " in wrong]
                    sources += [f"{s} is {sizes[s]} in the states" for s in known if f"{s} = " in wrong]
                    hint = ", ".join(sources) or _transposed(port, shape, known) or _fixed_size(port, shape)
                    raise self._refusal(port, f": {wrong}", shapes, hint)
                for symbol in sizes:
                    if symbol not in known:
                        first_in.setdefault(symbol, port)
        for symbol, port in first_in.items():
            size, bounds = sizes[symbol], self.bounds.get(symbol, Bounds())
            if size not in bounds:
                bare = [s.as_symbol for s in port.type.shape]
                what = f"dimension {bare.index(symbol)}" if symbol in bare else symbol
                limit = f"at least {bounds.lower}" if size < bounds.lower else f"at most {bounds.upper}"
                wrong = f": {what} must be {limit}, is {size}"
                raise self._refusal(
                    port, wrong, shapes, f"{bounds.around(symbol)}" if size else f"{symbol} of 1 or more"
                )
        for extent, otherwise, node in self.derived:
            if extent.symbols <= sizes.keys() and extent.evaluate(sizes) < 0:
                where = ", ".join(f"{s} = {sizes[s]}" for s in sorted(extent.symbols))
                raise BackendError(
                    f"{node.op.name}: {otherwise}, where {where}",
                    received=_shown(shapes, self.ports),
                    within=str(self),
                    source=describe_source(node.source, node.scope),
                    hint=f"sizes for which {extent} is 0 or more",
                )
        return sizes

    def refuse_undetermined(self, needed: Iterable[str]) -> None:
        """Raise BackendError if no dimension of an input or a state determines a needed symbol."""
        determined, sizes = set(self.state_symbols), {s for port in self.ports for s in port.type.shape if s.symbols}
        known = -1
        while known < len(determined):  # a size such as S*T determines T if another input determines S
            known = len(determined)
            for size in sizes:
                linear = size.substitute({s: 1 for s in size.symbols if s in determined}).as_linear
                if linear is not None:
                    determined.add(linear[0])
        undetermined = sorted(set(needed) - determined)
        if undetermined:
            raise BackendError(
                f"{self.name} needs the size of {', '.join(undetermined)}, which no input's dimensions determine",
                received=", ".join(map(str, self.ports)),
                hint=f"an input with a dimension {undetermined[0]}",
            )

    def _refusal(self, port: Port, wrong: str, shapes: Mapping[str, tuple[int, ...]], hint: str | None) -> BackendError:
        return BackendError(
            f"input {port.name}{wrong}",
            received=_shown(shapes, self.ports),
            within=str(self),
            hint=hint or None,
        )


def _transposed(port: Port, shape: Sequence[int], sizes: Mapping[str, int]) -> str:
    """Return the call that gives an array the input's shape, if its channels are the last axis in place of axis 1, or
    the reverse; empty if neither fits.
    """
    axes = [*range(len(shape))]
    for order in ([0, axes[-1], *axes[1:-1]], [0, *axes[2:], 1]) if len(shape) > 2 else ():
        if solve_sizes(port.type, tuple(shape[axis] for axis in order), dict(sizes)) is None:
            return f"{port.name}.transpose({', '.join(map(str, order))}), if the axes of the array are in another order"
    return ""


def _fixed_size(port: Port, shape: Sequence[int]) -> Hint | None:
    """Return the hint for another number of rows or positions than the fixed number in the input's type, or None. The
    other sizes mostly are those of weights.
    """
    pairs = zip(port.type.shape, shape, strict=True)
    wrong = [n for n, (size, given) in enumerate(pairs) if size.constant not in (None, given)]
    positions = 1 if port.type.dtype.is_int or port.type.rank == 3 else 0
    if not wrong or wrong[0] > positions:
        return None
    axes = list(port.axes)
    axes[wrong[0]] = free_name("BS"[wrong[0]], axes)
    return named_sizes_hint(port.name, port.type.dtype, " ".join(axes))


def _to_give(names: Sequence[str]) -> Hint | None:
    return Hint(spelled_keywords(names), " ".join(f"--input {n}=..." for n in names)) if names else None


def _shown(shapes: Mapping[str, tuple[int, ...]], ports: tuple[Port, ...]) -> str:
    return ", ".join(f"{p.name}: {p.dtype}[{', '.join(map(str, shapes[p.name]))}]" for p in ports)


def _sizes_that_may_be_negative(graph: Graph, entry: Function) -> list[tuple[Size, str, Node]]:
    """Return the sizes, such as S - 4, that ops require or that results have and that may be negative. Each has a
    message and the first node with this size.
    """
    found: dict[Size, tuple[str, Node]] = {}
    for node in (node for function in graph.needed_by(entry) for node in function.nodes):
        demanded = [*node.op.demands([None if v is None else v.type for v in node.operands])]
        made = [(s, f"it would create a dimension of size {s}") for v in node.results for s in v.type.shape]
        for size, otherwise in (*demanded, *made):
            if size.symbols and size not in found and size.bounds(graph.symbols).lower < 0:
                found[size] = otherwise, node
    return [(size, otherwise, node) for size, (otherwise, node) in found.items()]


# -- dtypes --------------------------------------------------------------------------------------------------


def refuse_dtype(port: Port, found: str, hint: str, shape: Sequence[int] | None = None) -> BackendError:
    """Return the error for an input of another dtype. `shape` is the array's shape, if the input is an array."""
    received = found if shape is None else f"{found}[{', '.join(map(str, shape))}]"
    return BackendError(
        f"input {port.name} must be {port.dtype}, is {found}",
        received=f"{port.name}: {received}",
        within=str(port),
        hint=hint,
    )


def refuse_overflow(port: Port, shape: Sequence[int]) -> BackendError:
    """Return the error for a float64 array with a finite number that float32 cannot represent."""
    limit = float(np.finfo(np.float32).max)
    return refuse_dtype(port, f"float64 with a number beyond {limit:.2g}", "numbers that float32 represents", shape)


def as_numpy(port: Port, value: Any) -> Array:
    """Convert an argument to a NumPy array of the port's dtype, which must be a dtype of NumPy.

    An array of that dtype is returned unchanged. Another dtype of the same kind is converted if each of its values is
    representable (int32 for i64, float16 for f32). A float64 array, NumPy's default, is rounded to f32. Python numbers
    and lists have no dtype: integers are converted to any integer or float dtype that represents them exactly, floats
    are rounded to a float dtype. Raises BackendError for anything else, and if rounding would make a number infinite.
    """
    wanted = port.dtype.numpy
    assert wanted is not None
    if hasattr(value, "__array__"):
        array = np.asarray(value)
        if array.dtype == wanted and array.dtype.isnative:
            return array
        if _kind(array.dtype) == _kind(wanted) and np.can_cast(array.dtype, wanted, "safe"):
            return array.astype(wanted)
        if array.dtype == np.float64 and wanted == np.float32:
            with np.errstate(over="ignore"):
                rounded = array.astype(wanted)
            if _overflows(array, rounded):
                raise refuse_overflow(port, array.shape)
            return rounded
        array_of = port.name if hasattr(value, "astype") else f"np.asarray({port.name})"
        cast = f"{array_of}.astype({wanted.name!r})"
        cast = f"{port.name}.to(torch.{wanted.name})" if hasattr(value, "detach") else cast
        hint = Hint(cast, f"a .npy file of {wanted.name} for --input {port.name}=")
        raise refuse_dtype(port, str(array.dtype), hint, array.shape)
    given, an_array = f"a {type(value).__name__}", f"an array of {port.dtype}"
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise refuse_dtype(port, f"{given} whose rows differ in length", an_array) from error
    held_by = {"b": "b", "i": "if", "f": "f"}.get(_kind(array.dtype), "")
    if array.size and _kind(wanted) not in held_by:
        raise refuse_dtype(port, f"{given} of {array.dtype}", an_array)
    with np.errstate(all="ignore"):
        converted = array.astype(wanted)
        exact = _kind(array.dtype) != "i" or np.array_equal(converted.astype(array.dtype), array)
    if _kind(array.dtype) == "f" and _overflows(array, converted):
        raise refuse_dtype(port, f"{given} of numbers beyond {port.dtype}", an_array)
    if not exact:
        raise refuse_dtype(port, f"{given} of numbers that {port.dtype} cannot represent exactly", an_array)
    return converted


def _overflows(array: Array, rounded: Array) -> bool:
    """Return True if a finite number became infinite."""
    return bool((np.isinf(rounded) & np.isfinite(array)).any())


def numpy_taken(port: Port, value: Any) -> Array:
    """Convert a caller's argument with `as_numpy`. If NumPy cannot read it, the error's hint says how to convert it."""
    try:
        return as_numpy(port, value)
    except (TypeError, RuntimeError) as error:  # a PyTorch tensor on a device, or one that needs a gradient
        raise BackendError(
            f"input {port.name} is not an array that NumPy can read",
            received=f"{type(value).__name__}: {error}",
            within=str(port),
            hint=port.name + _readable(port, value),
        ) from error


def gives_tensors(kinds: Iterable[type]) -> bool:
    """Return True if a caller passed tensors of PyTorch, whose types are `kinds`: then the results are tensors, too."""
    return any(kind.__module__.partition(".")[0] == "torch" and hasattr(kind, "data_ptr") for kind in kinds)


def _readable(port: Port, value: Any) -> str:
    """Return a hint that converts a PyTorch tensor to one that NumPy can read: dense, of a NumPy dtype, in
    CPU memory.
    """
    dense = "" if layout_of(value) == "strided" else ".to_dense()"
    lacking = str(getattr(value, "dtype", "")).startswith(("torch.bfloat16", "torch.float8"))
    return dense + (f".to(torch.{port.dtype.numpy})" if lacking else "") + ".detach().cpu()"


def _kind(dtype: np.dtype[Any]) -> str:
    return "i" if dtype.kind == "u" else dtype.kind

"""ONNX files in which an input determines shapes: compiled at the first call with each new value.

    exe = treadle.compile("best.onnx", backend="torch")      # k, an input, determines a shape
    exe(x=rows, k=3)                                         # compiled for k = 3
    exe(x=rows, k=5)                                         # for k = 5
    exe(x=rows, k=3)                                         # runs the first compilation
    exe.at(k=3).graph                                        # properties that depend on the value

These inputs are found while the file is imported. The import stops at the first input whose value it needs. When the
value is known, the import starts again, and may stop at another input. An input may be needed only for some values of
another input (a branch of an If). So a specialization is reached by a path of values: at (), k is needed; at (k = 3), n
is needed; (k = 3, n = 2) is compiled.

The file is parsed once, and its weights are read once. The cache of specializations has a fixed maximum size.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from math import prod
from typing import Any, NamedTuple, NoReturn, TypeVar

import numpy as np

from treadle.backends.protocol import Executable, Outputs, Port
from treadle.backends.signature import Signature, numpy_taken
from treadle.compiled import Compiled
from treadle.files.contained_files import PathLike
from treadle.files.shown_names import printable
from treadle.frontends.onnx_import.errors import StaticArgumentNeeded
from treadle.ir.errors import BackendError, TreadleError, UsageError
from treadle.ir.graph import Graph
from treadle.ir.interpreter import solve_sizes
from treadle.ir.target import Target
from treadle.ir.wording.call_spelling import spelled_keywords
from treadle.ir.wording.checked_calls import with_checked_methods
from treadle.ir.wording.notebook_html import html_code, html_table, html_title
from treadle.passes.framework.manager import Optimized
from treadle.passes.framework.pass_log import PassLog

Array = np.ndarray[Any, Any]
Held = TypeVar("Held")

MOST_KEPT = 16
"""Maximum number of cached specializations. A new one replaces the least recently used one."""
MOST_ELEMENTS = 4096
"""Maximum number of elements of an input that determines shapes."""
_STEPS_KEPT = 16 * MOST_KEPT  # limit for cached prefixes of paths, each with the input needed next


class StaticValue(NamedTuple):
    """The value of an input, hashable. Two values are equal if their elements have equal bytes in the input's dtype."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @property
    def array(self) -> Array:
        return np.frombuffer(self.data, self.dtype).reshape(self.shape)

    def __str__(self) -> str:
        return f"{printable(self.name)} = {printable(str(self.array.tolist()), 60)}"


Way = tuple[StaticValue, ...]
"""A path: values of inputs, in the order in which the import needs them."""


class Specialization(NamedTuple):
    """A compilation for values of the inputs that determine shapes.

    static    the values by name; these inputs are constants in the compiled model
    compiled  the compiled model
    """

    static: Mapping[str, Array]
    compiled: Compiled


@with_checked_methods()
class Specializing(Compiled):
    """A model in which inputs determine shapes. It is called like any compiled model; `treadle.compile` returns it for
    such a file.

    static           names of the inputs that are known so far to determine shapes
    specializations  the cached specializations
    backend          the backend of the latest specialization; "auto" before the first, if it was not named
    target           as in `compile`

    A call, or `at`, compiles the model for new values, and caches up to `MOST_KEPT` specializations, the most recently
    used ones. `graph`, `log`, `optimized`, `executable`, `source`, `outputs`, `weights` and `save` depend on a value:
    they raise UsageError on this object, and are available on the result of `at`. Threads may share the object: one
    thread compiles at a time, while others run. docs/decisions/0007-static-arguments.md explains why this class is a
    subclass of `Compiled`.
    """

    def __init__(
        self,
        inputs: Graph,
        static: str,
        make: Callable[[Mapping[str, Any]], Compiled],
        *,
        backend: str,
        target: Target,
    ) -> None:
        """Create the model without compiling it.

        inputs  a graph that has only the model's inputs
        static  the name of the input at which the import of the file stopped
        make    a function that imports the file with these values of inputs, and compiles it
        """
        for name, value in (("name", inputs.name), ("backend", backend), ("target", target)):
            object.__setattr__(self, name, value)
        self._make = make
        self._signature = Signature(inputs)
        self._ports = {port.name: port for port in self._signature.ports}
        self._needed: OrderedDict[Way, str] = OrderedDict({(): static})
        self._kept: OrderedDict[Way, Compiled] = OrderedDict()
        self._static = {static: None}
        self._lock = threading.Lock()  # guards the cache
        self._making = threading.Lock()

    # -- properties ------------------------------------------------------------------------------------------------

    @property
    def inputs(self) -> tuple[Port, ...]:
        """Inputs of a call (name, dtype, axes), including the inputs that determine shapes."""
        return self._signature.ports

    @property
    def static(self) -> tuple[str, ...]:
        with self._lock:
            return tuple(self._static)

    @property
    def specializations(self) -> tuple[Specialization, ...]:
        """Cached specializations, the most recently used last."""
        with self._lock:
            kept = list(self._kept.items())
        return tuple(Specialization({c.name: c.array for c in way}, compiled) for way, compiled in kept)

    def __repr__(self) -> str:
        takes = ", ".join(map(str, self.inputs))
        return f"<compiled {self.name} on {self.backend}, for each {', '.join(self.static)}: ({takes})>"

    def _repr_html_(self) -> str:
        """Return HTML for notebooks: the inputs and the cached specializations."""
        rows = [("input", p.name, str(p.dtype), ", ".join(p.axes)) for p in self.inputs]
        kept = "\n".join(
            f"{', '.join(f'{name} = {value.tolist()}' for name, value in each.static.items())}: {each.compiled!r}"
            for each in self.specializations
        )
        ports = html_table(("", "name", "dtype", "axes"), rows)
        return html_title(repr(self)[1:-1]) + ports + (html_code("specializations", kept) if kept else "")

    def _to_save(self, path: str) -> str:
        return f'exe.at({spelled_keywords(self.static)}).save("{path}")'

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    # -- running ---------------------------------------------------------------------------------------------------

    def __call__(self, /, *ordered: Any, **arrays: Any) -> Outputs:
        """Run the model on arrays by name or in order. It is compiled first if the values that determine shapes are
        new.

        Raises BackendError if arrays do not match `inputs`, and the errors of `compile` if the model does not accept
        the values; a failed compilation is not cached.
        """
        arrays = self._named(ordered, arrays)
        self._signature.check_names(arrays)
        way, compiled = self._found(arrays)
        chosen = {c.name for c in way}
        return compiled(**{name: array for name, array in arrays.items() if name not in chosen})

    def at(self, /, **static: Any) -> Compiled:
        """Return the model compiled for these values. It is compiled now unless it is in the cache.

        Raises UsageError if a value is missing, or if an input in `static` does not determine a shape; and the errors
        of a call.
        """
        way, compiled = self._found(static)
        more = [name for name in static if name not in {c.name for c in way}]
        if more:
            where = ", ".join(map(str, way))
            raise UsageError(
                f"{', '.join(map(printable, more))} does not determine a shape where {where}",
                received=", ".join(map(printable, static)),
                hint=f"exe.at({spelled_keywords([c.name for c in way])})",
            )
        return compiled

    def _found(self, given: Mapping[str, Any]) -> tuple[Way, Compiled]:
        way: Way = ()
        while True:
            found = self._look(way) or self._made(way)
            if isinstance(found, Compiled):
                return way, found
            if found not in given:
                names = [c.name for c in way] + [found]
                raise UsageError(
                    f"the value of {printable(found)} determines a shape",
                    received=", ".join(map(printable, given)) or "no value",
                    hint=f"exe.at({spelled_keywords(names)})",
                )
            way = (*way, self._chosen(self._ports[found], given[found]))

    def _look(self, way: Way) -> Compiled | str | None:
        """Return the cache entry at the end of a path: a compiled model, or the name of the input that is needed next.
        Return None if there is no entry.
        """
        with self._lock:
            for known in (self._kept, self._needed):
                if way in known:
                    known.move_to_end(way)
                    return known[way]
        return None

    def _made(self, way: Way) -> Compiled | str:
        with self._making:
            known = self._look(way)  # another thread may have added it
            if known is not None:
                return known
            try:
                compiled = self._make({c.name: c.array for c in way})
            except StaticArgumentNeeded as error:
                if error.argument not in self._ports or error.argument in {c.name for c in way}:
                    raise
                with self._lock:
                    self._static.setdefault(error.argument)
                    _keep(self._needed, way, error.argument, _STEPS_KEPT)
                return error.argument
            except TreadleError as error:
                error.within = ", ".join(filter(None, [error.within, f"where {', '.join(map(str, way))}"]))
                raise
            with self._lock:
                _keep(self._kept, way, compiled, MOST_KEPT)
                object.__setattr__(self, "backend", compiled.backend)
            return compiled

    def _chosen(self, port: Port, given: Any) -> StaticValue:
        """Return the value that a caller passed for an input, checked. Raises BackendError if it does not match the
        input.
        """
        if port.dtype.numpy is None:
            raise BackendError(f"{port.dtype} cannot determine a shape", within=str(port))
        array = numpy_taken(port, given)
        if not array.ndim and all(size.constant == 1 for size in port.type.shape):
            array = array.reshape([1] * port.type.rank)  # a scalar is accepted for a tensor of one element
        wrong = solve_sizes(port.type, array.shape, {})
        hint = f"an array [{', '.join(port.axes)}]" if port.axes else "a number"
        if wrong is None and prod(array.shape) > MOST_ELEMENTS:
            wrong, hint = f"determines a shape, and must have at most {MOST_ELEMENTS} elements", "fewer elements"
        if wrong is not None:
            received = f"{port.name}: {port.dtype}[{', '.join(map(str, array.shape))}]"
            raise BackendError(f"input {port.name} {wrong}", received=received, within=str(self._signature), hint=hint)
        return StaticValue(port.name, port.dtype.numpy.str, array.shape, array.tobytes())

    # -- properties that depend on the value -----------------------------------------------------------------------

    @property
    def optimized(self) -> Optimized:
        self._refuse("the graph depends", "graph")

    @property
    def log(self) -> PassLog:
        self._refuse("the log of passes depends", "log")

    @property
    def executable(self) -> Executable:
        self._refuse("the generated code depends", "source")

    @property
    def weights(self) -> Mapping[str, Array]:
        self._refuse("the set of used weights depends", "weights")

    @property
    def outputs(self) -> tuple[Port, ...]:
        self._refuse("the axes of outputs depend", "outputs")

    def save(self, path: PathLike) -> str:
        self._refuse("the saved artifact depends", f"save({os.fspath(path)!r})")

    def _refuse(self, what: str, asked: str) -> NoReturn:
        names = self.static
        raise UsageError(
            f"{what} on the value of {', '.join(map(printable, names))}",
            received=repr(self),
            hint=f"exe.at({spelled_keywords(names)}).{asked}",
        )


def _keep(known: OrderedDict[Way, Held], way: Way, value: Held, most: int) -> None:
    known[way] = value
    if len(known) > most:
        known.popitem(last=False)

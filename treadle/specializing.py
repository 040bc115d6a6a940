"""ONNX files of which an input determines shapes: compiled for each value, when a call brings it.

    exe = treadle.compile("best.onnx", backend="torch")      # k, an input, determines a shape
    exe(x=rows, k=3)                                         # compiled for k = 3
    exe(x=rows, k=5)                                         # for k = 5
    exe(x=rows, k=3)                                         # runs what was compiled first
    exe.at(k=3).graph                                        # what depends on the value is asked of the one

Which inputs these are is found as the file is imported: the import stops at the first value that it needs, and goes on
when it has it, perhaps to the next. An input may be needed for some values of another one only (a branch of an If).
So the way to a specialization is walked: (), where k is needed; (k = 3), where n is needed; (k = 3, n = 2), which is
compiled.

The file is parsed once, and its weights are read once. What is kept is bounded, whatever values callers bring.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import numpy as np

from treadle.backends.protocol import Executable, Outputs, Port
from treadle.backends.signature import Signature, numpy_taken
from treadle.compiled import Compiled
from treadle.files.shown_names import printable
from treadle.frontends.onnx_import.errors import StaticArgumentNeeded
from treadle.ir.errors import BackendError, TreadleError, UsageError
from treadle.ir.interpreter import solve_sizes
from treadle.ir.target import Target
from treadle.ir.wording.notebook_html import html_code, html_table, html_title
from treadle.passes.framework.manager import Optimized
from treadle.passes.framework.pass_log import PassLog
from treadle.resolving import OpenedOnnx, Resolved

Array = np.ndarray[Any, Any]
Held = TypeVar("Held")

MOST_KEPT = 16
"""The most specializations that are kept; one more takes the place of that which was not used for longest."""
MOST_ELEMENTS = 4096
"""The most elements that an input may have which determines shapes."""
_STEPS_KEPT = 16 * MOST_KEPT  # on the ways to them: values, and the input that is needed next


class StaticValue(NamedTuple):
    """The value of an input, so that equal ones are equal: its elements' bytes in the dtype of the input."""

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
"""Values in the order in which they are needed."""


class Specialization(NamedTuple):
    """What was compiled for values of the inputs that determine shapes.

    static    the values by name; they are no inputs of what was compiled
    compiled  for them
    """

    static: Mapping[str, Array]
    compiled: Compiled


class Specializing(Compiled):
    """A model of which inputs determine shapes. Call it as any other; `treadle.compile` gives it for such a file.

    static           the inputs known to determine shapes, so far
    specializations  what is kept

    A call, or `at`, compiles for values that are new, and keeps up to `MOST_KEPT` specializations, those that were used
    last. `graph`, `log`, `optimized`, `executable`, `source`, `outputs`, `weights` and `save` are of one value: here
    they raise UsageError, and `at` gives them. Threads may share it: one compiles at a time, and others run.
    docs/decisions/0007-static-arguments.md says why it is a `Compiled`.
    """

    def __init__(
        self, opened: OpenedOnnx, needed: str, make: Callable[[Resolved], Compiled], *, backend: str, target: Target
    ) -> None:
        """needed: the input at which the import of the file stopped. make: compiles what a further import gives.

        Raises what the import does for inputs that it does not take.
        """
        opened.file.hold_weights()
        inputs = opened.inputs()
        for name, value in (("name", inputs.name), ("backend", backend), ("target", target)):
            object.__setattr__(self, name, value)
        self._opened, self._make = opened, make
        self._signature = Signature(inputs)
        self._ports = {port.name: port for port in self._signature.ports}
        self._needed: OrderedDict[Way, str] = OrderedDict({(): needed})
        self._kept: OrderedDict[Way, Compiled] = OrderedDict()
        self._static = {needed: None}
        self._lock = threading.Lock()  # of what is kept
        self._making = threading.Lock()

    # -- what it is ------------------------------------------------------------------------------------------------

    @property
    def inputs(self) -> tuple[Port, ...]:
        """What a call takes: name, dtype, axes; those that determine shapes among them."""
        return self._signature.ports

    @property
    def static(self) -> tuple[str, ...]:
        with self._lock:
            return tuple(self._static)

    @property
    def specializations(self) -> tuple[Specialization, ...]:
        """What is kept, what was used last at the end."""
        with self._lock:
            kept = list(self._kept.items())
        return tuple(Specialization({c.name: c.array for c in way}, compiled) for way, compiled in kept)

    def __repr__(self) -> str:
        takes = ", ".join(map(str, self.inputs))
        return f"<compiled {self.name} on {self.backend}, for each {', '.join(self.static)}: ({takes})>"

    def _repr_html_(self) -> str:
        """For notebooks: what it takes, and what is kept."""
        rows = [("input", p.name, str(p.dtype), ", ".join(p.axes)) for p in self.inputs]
        kept = "\n".join(
            f"{', '.join(f'{name} = {value.tolist()}' for name, value in each.static.items())}: {each.compiled!r}"
            for each in self.specializations
        )
        ports = html_table(("", "name", "dtype", "axes"), rows)
        return html_title(repr(self)[1:-1]) + ports + (html_code("specializations", kept) if kept else "")

    def _to_save(self, path: str) -> str:
        return f'exe.at({_assigned(self.static)}).save("{path}")'

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    # -- running ---------------------------------------------------------------------------------------------------

    def __call__(self, /, *unnamed: Any, **arrays: Any) -> Outputs:
        """Run on arrays by name, compiled for the values of those that determine shapes.

        Raises BackendError where arrays are not what `inputs` says, and what `compile` raises where the values are none
        that the model can have; nothing is kept then.
        """
        self._refuse_unnamed(unnamed)
        self._signature.check_names(arrays)
        way, compiled = self._found(arrays)
        chosen = {c.name for c in way}
        return compiled(**{name: array for name, array in arrays.items() if name not in chosen})

    def at(self, /, **static: Any) -> Compiled:
        """What is compiled for these values, now or before.

        Raises UsageError where one is missing, or is given that determines no shape; else as a call does.
        """
        way, compiled = self._found(static)
        more = [name for name in static if name not in {c.name for c in way}]
        if more:
            where = ", ".join(map(str, way))
            raise UsageError(
                f"{', '.join(map(printable, more))} does not determine a shape where {where}",
                received=", ".join(map(printable, static)),
                hint=f"exe.at({_assigned([c.name for c in way])})",
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
                    hint=f"exe.at({_assigned(names)})",
                )
            way = (*way, self._chosen(self._ports[found], given[found]))

    def _look(self, way: Way) -> Compiled | str | None:
        """What is known at the end of a way: what was compiled, or the input that is needed next."""
        with self._lock:
            for known in (self._kept, self._needed):
                if way in known:
                    known.move_to_end(way)
                    return known[way]
        return None

    def _made(self, way: Way) -> Compiled | str:
        with self._making:
            known = self._look(way)  # by another thread, meanwhile
            if known is not None:
                return known
            try:
                compiled = self._make(self._opened.resolve({c.name: c.array for c in way}))
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
            return compiled

    def _chosen(self, port: Port, given: Any) -> StaticValue:
        """A value that a caller gave, checked. Raises BackendError."""
        if port.dtype.numpy is None:
            raise BackendError(f"{port.dtype} cannot determine a shape", within=str(port))
        array = numpy_taken(port, given)
        if not array.ndim and all(size.constant == 1 for size in port.type.shape):
            array = array.reshape([1] * port.type.rank)  # a number for a tensor of one
        wrong = solve_sizes(port.type, array.shape, {})
        hint = f"an array [{', '.join(port.axes)}]" if port.axes else "a number"
        if wrong is None and prod(array.shape) > MOST_ELEMENTS:
            wrong, hint = f"determines a shape, and must have at most {MOST_ELEMENTS} elements", "fewer elements"
        if wrong is not None:
            received = f"{port.name}: {port.dtype}[{', '.join(map(str, array.shape))}]"
            raise BackendError(f"input {port.name} {wrong}", received=received, within=str(self._signature), hint=hint)
        return StaticValue(port.name, port.dtype.numpy.str, array.shape, array.tobytes())

    # -- what depends on the value ---------------------------------------------------------------------------------

    @property
    def optimized(self) -> Optimized:
        self._refuse("the graph depends", "graph")

    @property
    def log(self) -> PassLog:
        self._refuse("what passes did depends", "log")

    @property
    def executable(self) -> Executable:
        self._refuse("the code that runs depends", "source")

    @property
    def weights(self) -> Mapping[str, Array]:
        self._refuse("which weights are used depends", "weights")

    @property
    def outputs(self) -> tuple[Port, ...]:
        self._refuse("the axes of outputs depend", "outputs")

    def save(self, path: str | Path) -> str:
        self._refuse("what is saved depends", f"save({os.fspath(path)!r})")

    def _refuse(self, what: str, asked: str) -> NoReturn:
        names = self.static
        raise UsageError(
            f"{what} on the value of {', '.join(map(printable, names))}",
            received=repr(self),
            hint=f"exe.at({_assigned(names)}).{asked}",
        )


def _keep(known: OrderedDict[Way, Held], way: Way, value: Held, most: int) -> None:
    known[way] = value
    if len(known) > most:
        known.popitem(last=False)


def _assigned(names: list[str] | tuple[str, ...]) -> str:
    return ", ".join(f"{printable(name)}=..." for name in names)

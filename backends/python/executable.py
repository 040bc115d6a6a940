"""Executables of emitted Python modules: load the weights, execute the module once, then check and run each call."""

from __future__ import annotations

import hashlib
import linecache
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import count
from typing import Any, NamedTuple, Protocol

from treadle.backends.donation import Donated
from treadle.backends.entries import EntryExecutable
from treadle.backends.made_weights import Recipe
from treadle.backends.outside_axis import NoRoom, OutsideAxis, error_of
from treadle.backends.protocol import Outputs, Port, ports
from treadle.backends.python.arena import PythonArena
from treadle.backends.python.emission import EmittedProgram
from treadle.backends.refusals import refuse_misfit, refuse_missing
from treadle.backends.signature import Signature
from treadle.backends.states import StateKinds, States
from treadle.files.shown_names import on_one_line
from treadle.ir.builder import describe_source
from treadle.ir.errors import BackendError, RankError, TreadleError
from treadle.ir.graph import Function, Graph
from treadle.ir.types import DType, Type
from treadle.passes.memory.storage_plan import StoragePlan

Failure = tuple[int, Sequence[int]]
"""The number of a line among the program's `reporters`, and its status words (`treadle.backends.outside_axis`)."""


class Settings(ABC):
    """A context in which a library has other settings. At its end, the previous settings are restored."""

    @abstractmethod
    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None:
        self.restore()

    @abstractmethod
    def restore(self) -> None:
        """Restore the previous settings. A second call does nothing.

        Ctrl-C may interrupt entering or leaving the context. So call this method in a `finally` around it: otherwise
        the process would keep the other settings.
        """


class EntryCall(NamedTuple):
    """A call of an entry of an emitted module.

    entry      the entry's name
    sizes      the sizes of its symbols
    function   the entry's function: inputs, weights, states, memory, status -> results
    arguments  the inputs
    weights    all weights, by name
    states     the states, and True if the function takes them
    memory     the arena's memory in a tuple, which is empty if the function takes none
    reports    True if the function takes a list of records
    """

    entry: str
    sizes: Mapping[str, int]
    function: Callable[..., Mapping[str, Any]]
    arguments: Sequence[Any]
    weights: Mapping[str, Any]
    states: tuple[States, bool]
    memory: tuple[Any, ...]
    reports: bool

    def run(self, status: list[Any]) -> Mapping[str, Any]:
        """Run the function. It adds records to `status`."""
        states, takes = self.states
        more = (*((states,) if takes else ()), *self.memory, *((status,) if self.reports else ()))
        return self.function(*self.arguments, self.weights, *more)


class Arrays(Protocol):
    """The operations of a backend's arrays that an executable needs."""

    def take(self, port: Port, value: Any) -> Any:
        """Convert a caller's argument to an array of the port's dtype. Raises BackendError."""
        ...

    def enter(self, arguments: Sequence[Any]) -> Sequence[Any]:
        """Copy checked arguments to the device on which the program runs."""
        ...

    def settings(self) -> Settings:
        """Return the library's settings under which the program runs."""
        ...

    def storage(self, array: Any) -> int:
        """Return a number that is equal for two arrays exactly if they share memory."""
        ...

    def zeros(self, shape: tuple[int, ...], dtype: DType) -> Any:
        """Return a new array of zeros, for a state."""
        ...

    def give(self, array: Any, given: Collection[type], shared: bool) -> Any:
        """Return a result for the caller, as the kind of array of the arguments, whose types are `given`. If the
        memory is `shared`, return a copy.
        """
        ...

    def run(self, call: EntryCall, status: list[Any]) -> Mapping[str, Any]:
        """Run an entry. A program for a device adds records to `status`."""
        ...

    def leave(self, outputs: Outputs, kinds: Collection[type], status: list[Any]) -> tuple[Outputs, Failure | None]:
        """Copy outputs to the host, if they belong there. Also return the first failure that the program recorded."""
        ...


class PythonExecutable(EntryExecutable):
    """A graph compiled to Python source. See `treadle.backends.protocol.Executable`.

    Results belong to the caller: if a result is stored in the memory of an input, a weight, a state, a constant or
    another result, it is copied before it is returned.
    """

    def __init__(
        self,
        graph: Graph,
        program: EmittedProgram,
        weights: Mapping[str, Any],
        namespace: Mapping[str, Any],
        arrays: Arrays,
        backend: str,
        arena: PythonArena | None = None,
        plan: StoragePlan | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        """Execute the module.

        weights    the parameters by name, as arrays of the backend
        namespace  the names that the text uses in addition to its imports
        arena      the destinations of planned values; None if no value is planned
        plan       determines the donated inputs; None: no input is donated
        notes      lines for the log
        """
        super().__init__(graph, backend, arrays.zeros)
        self.source, self.program, self.notes = program.text, program, notes
        module = _Module(graph.name, program, weights, namespace, arrays, arena)
        self.called |= {f.name: _PythonEntry(module, self.state_kinds, graph, f, plan) for f in graph.later_entries}
        self.function: Callable[..., Mapping[str, Any]] = module.scope[program.entries[graph.main.name]]
        """The function of the last entry. Its arguments are the inputs in order, as arrays of the backend, then
        `weights`, and `memory` if values are planned.
        """
        self.weights, self.arena = module.weights, arena

    def transform(self, transformation: Callable[[Any], Any]) -> None:
        """Replace the function of each entry, for example by its compiled form."""
        for entry in self.called.values():
            assert isinstance(entry, _PythonEntry)
            entry.function = transformation(entry.function)


class _Module:
    """An emitted module after its execution, with its weights."""

    def __init__(
        self,
        name: str,
        program: EmittedProgram,
        weights: Mapping[str, Any],
        namespace: Mapping[str, Any],
        arrays: Arrays,
        arena: PythonArena | None,
    ) -> None:
        self.name, self.program, self.arrays, self.arena = name, program, arrays, arena
        self.weights = {
            **weights,
            **{key: tuple(weights[n] for n in names) for key, names in program.bundles.items()},
        }
        self.arrays_held = (*weights.values(), *namespace["constants"])
        self.held = frozenset(map(arrays.storage, self.arrays_held))
        self.file, self.scope = _load(name, program.text, namespace)
        weakref.finalize(self, linecache.cache.pop, self.file, None)

    def exclusive(self, entry: str) -> AbstractContextManager[object]:
        """Return the lock under which an entry runs, if the entry has a parameter `memory`; else a context without
        effect.
        """
        return nullcontext() if self.arena is None else self.arena.exclusive(entry)

    def memory(self, entry: str, sizes: Mapping[str, int]) -> tuple[Any, ...]:
        """Return the argument `memory` of an entry in a tuple, which is empty if the entry has no such parameter."""
        return () if self.arena is None else self.arena.memory(entry, sizes)

    def explained(self, error: Exception) -> TreadleError:
        """Return the error with the node that caused it, its line of the emitted source, and the user's source line."""
        line, trace = 0, error.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code.co_filename == self.file:
                line = trace.tb_lineno
            trace = trace.tb_next
        node = self.program.nodes.get(line)
        if isinstance(error, RankError):  # the error concerns all ranks, not one line
            return error
        if isinstance(error, (OutsideAxis, NoRoom)):
            return error.located(node, self.name)
        return BackendError(
            f"{node.op.name if node else self.name}: failed while running",
            received=error.what if isinstance(error, TreadleError) else _said(error),
            within=self.program.text.splitlines()[line - 1].partition("  # ")[0].strip(),
            source=describe_source(node.source, node.scope) if node else None,
        )


class _PythonEntry:
    """An entry as a function of the module. See `treadle.backends.protocol.Entry`."""

    def __init__(
        self, module: _Module, kinds: StateKinds, graph: Graph, function: Function, plan: StoragePlan | None
    ) -> None:
        self._module, self._kinds, self._name = module, kinds, function.name
        self.function = module.scope[module.program.entries[function.name]]
        self.signature = Signature(graph, function)
        self.inputs = self.signature.ports
        self.outputs = ports(function.outputs)
        self._has_states = bool(function.states)
        self._donated = Donated(plan, function)
        self._makers = {name: value.node for name, value in function.outputs.items()}

    def __call__(self, states: States | None = None, /, **given: Any) -> Outputs:
        module, arrays = self._module, self._module.arrays
        held = self._kinds.check(states)
        arguments, sizes = self.signature.bind_sized(given, arrays.take, held.sizes)
        settings = arrays.settings()
        try:
            with settings, module.exclusive(self._name):
                entered = arrays.enter(arguments)
                self._donated.check(self.inputs, given, entered, (*module.arrays_held, *held.values()))
                return self._called(given, entered, sizes, held)
        finally:
            settings.restore()

    def _called(
        self, given: Mapping[str, Any], arguments: Sequence[Any], sizes: Mapping[str, int], held: States
    ) -> Outputs:
        """Run the function on checked arguments, and return the results for the caller."""
        module, arrays = self._module, self._module.arrays
        places = module.memory(self._name, sizes)
        status: list[Any] = []
        reports = self._name in module.program.reporting
        try:
            states = held, self._has_states
            call = EntryCall(self._name, sizes, self.function, arguments, module.weights, states, places, reports)
            results = arrays.run(call, status)
        except Exception as error:
            raise module.explained(error) from error
        named = zip(self.inputs, arguments, strict=True)
        lent = [array for port, array in named if port.name not in self._donated.names]
        taken = set(module.held.union(map(arrays.storage, (*lent, *held.values()))))
        types, outputs = set(map(type, given.values())), Outputs()
        for name, array in results.items():
            memory = arrays.storage(array)
            try:
                outputs[name] = arrays.give(array, types, memory in taken)
            except Exception as error:  # there is no memory for the copy
                raise self._not_given(name, error) from error
            taken.add(memory)
        outputs, failure = arrays.leave(outputs, types, status)
        if failure is not None:
            line, words = failure
            raise error_of(words).located(module.program.reporters[line], module.name)
        return self._donated.returned(given, outputs)

    def _not_given(self, name: str, error: Exception) -> BackendError:
        """Return the error for an output that could not be copied, with the line of the node that produced it."""
        node = self._makers[name]
        return BackendError(
            f"{node.op.name if node else self._module.name}: output {name} could not be copied",
            received=_said(error),
            source=describe_source(node.source, node.scope) if node else None,
        )

    def __repr__(self) -> str:
        takes, gives = (", ".join(map(str, p)) for p in (self.inputs, self.outputs))
        return f"<entry {self._name}({takes}) -> {gives}>"


def _said(error: Exception) -> str:
    """Return the message of a library's error, without the C++ stack that PyTorch appends."""
    first, _, _ = str(error).partition("\n")
    return f"{type(error).__name__}: {first}"


_numbers = count()  # tracebacks show lines by file name, so each module needs its own


def _load(name: str, text: str, namespace: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Execute a module's text under a unique file name for tracebacks. Return that file name, and the module's
    namespace.
    """
    file = f"<treadle {on_one_line(name)} {hashlib.sha256(text.encode()).hexdigest()[:8]} {next(_numbers)}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    scope: dict[str, Any] = dict(namespace)
    exec(compile(text, file, "exec"), scope)
    return file, scope


def collect_weights(
    graph: Graph, made: Mapping[str, Recipe], weights: Mapping[str, Any], take: Callable[[str, Type, Any], Any]
) -> dict[str, Any]:
    """Return every parameter that entries read, including parameters that `bind` derives, as row-major arrays of the
    backend.

    Raises one BackendError that lists all missing weights.
    """
    refuse_missing(graph.name, graph.parameters, weights)
    given = {}  # kept until all are converted: a backend may identify a weight by its address, which must stay unique
    found = {}
    # A derived weight is not kept: on a device, all of them together would take as much memory as the model again.
    for name, value in graph.entry_parameters.items():
        recipe = made.get(name)
        if recipe is None:
            weight = given[name] = weights[name]
        else:
            for source, wanted in recipe.sources.items():
                refuse_misfit(source, wanted.type, weights[source])
            weight = recipe.make(weights)
            if not recipe.nodes:
                given[name] = weight
        found[name] = take(name, value.type, weight)
    return found

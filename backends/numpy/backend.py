"""The NumPy backend: readable source that runs on every machine and needs only NumPy. It is not optimized for speed."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from treadle.backends.made_weights import as_numpy_weight, notes_on, recipes_of, refuse_large
from treadle.backends.numpy.destinations import NUMPY, is_placed, written_over
from treadle.backends.numpy.spelling import keeps
from treadle.backends.numpy.workspaces import workspace
from treadle.backends.poison import BYTE, poisons
from treadle.backends.protocol import Executable, Outputs, Port
from treadle.backends.python.arena import PythonArena
from treadle.backends.python.emission import emit
from treadle.backends.python.executable import EntryCall, Failure, PythonExecutable, Settings, collect_weights
from treadle.backends.refusals import out_of_memory, refuse_misfit, refuse_nodes, refuse_target
from treadle.backends.signature import gives_tensors, numpy_taken
from treadle.backends.staged import StagedBackend, needed_plan
from treadle.ir.errors import Hint
from treadle.ir.graph import Graph, Node
from treadle.ir.target import Target
from treadle.ir.types import DType, Type, bf16
from treadle.passes.capabilities import Capabilities
from treadle.passes.framework.manager import Pass
from treadle.passes.lowering.decode_last import DecodeLast
from treadle.passes.lowering.hoist_weights import HoistWeights
from treadle.passes.lowering.legalize import Legalize
from treadle.passes.lowering.multiply_blocks import MultiplyBlocks, OpenBlockProducts
from treadle.passes.memory.frames import ALIGNMENT
from treadle.passes.memory.plan_storage import PlanStorage
from treadle.passes.memory.storage_plan import StoragePlan

Array = np.ndarray[Any, Any]

_WITHOUT_BF16 = Hint(
    'backend="torch", or widen="bf16" and no dtype="bf16" to compute in f32',
    "--backend torch, or --widen bf16 and no --dtype bf16 to compute in f32",
)


_WITHOUT_BF16_CACHES = Hint('cache="f16", or backend="torch"', "--cache f16, or --backend torch")

_CAPABILITIES = Capabilities("numpy", keeps=keeps, placed=is_placed, over=written_over, workspaces=workspace)


class NumpyBackend(StagedBackend):
    """The NumPy backend. It supports every op of the registry, and every dtype except bf16, which NumPy lacks.

    A call accepts NumPy arrays, and PyTorch tensors in CPU memory, and returns NumPy arrays.
    """

    name = "numpy"

    def available(self) -> str | None:
        """Return None: NumPy is always available."""
        return None

    def supports(self, node: Node) -> str | None:
        """Return None if the node can be run, else the reason."""
        lacking = {v.type.dtype.name for v in (*node.inputs, *node.results) if v.type.dtype.numpy is None}
        return f"NumPy has no {', '.join(sorted(lacking))}" if lacking else None

    def refuse(self, graph: Graph, target: Target) -> None:
        """Raise BackendError for a target that is not a CPU, for a number of threads, or a refused node."""
        refuse_target(self.name, target)
        held = any(value.type.dtype is bf16 for value in graph.states.values())
        refuse_nodes(graph, self.name, self.supports, hint=_WITHOUT_BF16_CACHES if held else _WITHOUT_BF16)

    def capabilities(self, target: Target) -> Capabilities:
        """Return the ops that NumPy computes, and the places that they can write to."""
        return _CAPABILITIES

    def pipeline(self, target: Target) -> Sequence[Pass]:
        """Return the passes: legalize, compute derived weights once, and plan storage and lifetime of each array."""
        mine = self.capabilities(target)
        products = (OpenBlockProducts(), Legalize(mine), DecodeLast(), MultiplyBlocks(mine))
        return (*products, HoistWeights(mine), PlanStorage(mine, copies=True))

    def emit(
        self,
        graph: Graph,
        target: Target,
        weights: Mapping[str, Any],
        declared: Graph,
        plan: StoragePlan | None,
    ) -> Executable:
        """Generate the module and return its executable. Raises BackendError for a missing weight."""
        made = recipes_of(graph)
        refuse_large(graph, made)
        poison = poisons()
        plan = needed_plan(plan, self.name)
        program = emit(graph, NUMPY, plan, tuple(notes_on(made)), poison)
        references = {name: _Reference(node) for name, node in program.references.items()}
        namespace = {
            "constants": tuple(literal.array for literal in program.constants),
            "reference": SimpleNamespace(**references),
            "poison": _poison,
        }
        arrays = collect_weights(graph, made, weights, _weight)
        if poison:
            arrays = {name: _read_only(array) for name, array in arrays.items()}
        donated = frozenset(value.name for each in plan.functions.values() for value in each.donated)
        ours = _NumpyArrays(poison, donated)
        arena = PythonArena(plan, program, ours, _poison if poison else None)
        return PythonExecutable(declared, program, arrays, namespace, ours, self.name, arena, plan)


class _Reference:
    """An op that is run by its own NumPy reference."""

    def __init__(self, node: Node) -> None:
        self.op = node.op
        self.dtypes = [v.type.storage_type.dtype.numpy for v in node.results]

    def __call__(self, *operands: Any, **sizes: int) -> Any:
        made = self.op.at(sizes).reference(*[None if x is None else np.asarray(x) for x in operands])
        results = made if isinstance(made, tuple) else (made,)
        cast = tuple(np.asarray(x, dtype) for x, dtype in zip(results, self.dtypes, strict=True))
        return cast if isinstance(made, tuple) else cast[0]


def _read_only(array: Array) -> Array:
    """Return a read-only view of the same memory; views of it are read-only, too."""
    view = array.view()
    view.flags.writeable = False
    return view


def _poison(*arrays: Any) -> None:
    """Fill arrays, and so all values in their memory. Read-only arrays (scalars and broadcast arrays) are unchanged."""
    for array in arrays:
        if isinstance(array, np.ndarray) and array.flags.writeable:
            array[...] = np.frombuffer(bytes([BYTE]) * array.itemsize, array.dtype)[0]


class _NoWarnings(Settings):
    """Settings without NumPy's warnings about overflows, divisions by zero and invalid values."""

    def __init__(self) -> None:
        self._before = np.geterr()

    def __enter__(self) -> None:
        np.seterr(all="ignore")

    def restore(self) -> None:
        np.seterr(**self._before)


class _NumpyArrays:
    """NumPy arrays; see `treadle.backends.python.executable.Arrays` and `...arena.ArenaArrays`.

    kept     True if the caller's arrays are read-only during the run
    donated  names of donated inputs, which stay writable
    """

    def __init__(self, kept: bool, donated: frozenset[str]) -> None:
        self._kept, self._donated = kept, donated

    def take(self, port: Port, value: Any) -> Array:
        array = numpy_taken(port, value)
        return _read_only(array) if self._kept and port.name not in self._donated else array

    def settings(self) -> _NoWarnings:
        return _NoWarnings()

    def storage(self, array: Any) -> int:
        while isinstance(getattr(array, "base", None), np.ndarray):
            array = array.base
        return id(array)

    def zeros(self, shape: tuple[int, ...], dtype: DType) -> Array:
        return np.zeros(shape, dtype.numpy)

    def allocated(self, count: int) -> Array:
        try:
            held = np.empty(count + ALIGNMENT, np.uint8)
        except MemoryError as error:
            raise out_of_memory(count, "a run") from error
        begin = -held.__array_interface__["data"][0] % ALIGNMENT
        return held[begin : begin + count]

    def laid(self, arena: Array, offset: int, shape: tuple[int, ...], dtype: DType) -> Array:
        assert dtype.numpy is not None
        return arena[offset : offset + math.prod(shape) * dtype.numpy.itemsize].view(dtype.numpy).reshape(shape)

    def give(self, array: Any, given: Collection[type], shared: bool) -> Any:
        result = np.asarray(array)
        result = result.copy() if shared or not result.flags.writeable else result
        if gives_tensors(given):
            import torch

            return torch.from_numpy(result)
        return result

    def enter(self, arguments: Sequence[Any]) -> Sequence[Any]:
        return arguments

    def run(self, call: EntryCall, status: list[Any]) -> Mapping[str, Any]:
        return call.run(status)

    def leave(self, outputs: Outputs, kinds: Collection[type], status: list[Any]) -> tuple[Outputs, Failure | None]:
        return outputs, None


def _weight(name: str, wanted: Type, value: Any) -> Array:
    refuse_misfit(name, wanted, value)
    return as_numpy_weight(value)

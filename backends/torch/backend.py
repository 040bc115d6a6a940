"""The PyTorch backend, for every device that PyTorch supports. torch is imported only when the backend is used."""

from __future__ import annotations

import importlib.util
import math
import warnings
import weakref
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from treadle.backends.made_weights import is_decoded_once, notes_on, recipes_of, refuse_large
from treadle.backends.poison import BYTE, poisons
from treadle.backends.protocol import Executable, Outputs, Port
from treadle.backends.python.arena import PythonArena
from treadle.backends.python.emission import emit
from treadle.backends.python.executable import EntryCall, Failure, PythonExecutable, Settings, collect_weights
from treadle.backends.refusals import (
    code_hint,
    layout_of,
    misfit,
    out_of_memory,
    refuse_nodes,
    shape_fits,
    shown,
    unavailable,
)
from treadle.backends.signature import as_numpy, refuse_dtype, refuse_overflow
from treadle.backends.staged import StagedBackend, needed_plan
from treadle.backends.torch.attention_forms import notes_on_attention
from treadle.backends.torch.capture_decision import capture_obstacles, notes_on_capture
from treadle.backends.torch.destinations import is_placed, written_over
from treadle.backends.torch.devices import TorchDevice, find_device
from treadle.backends.torch.int4_groups import packed_groups, refuses_groups, weights_in_groups
from treadle.backends.torch.packing import PACKED, can_pack, pack, wants
from treadle.backends.torch.spelling import DECODED, DTYPES, SPELLINGS, keeps
from treadle.backends.torch.weight_reads import notes_on_weights
from treadle.files.installation import pip_install
from treadle.ir.analysis.weight_only import is_made_of_weights
from treadle.ir.errors import BackendError, Hint
from treadle.ir.graph import Graph, Node
from treadle.ir.literals import Literal
from treadle.ir.operation import Op
from treadle.ir.ops.blocks import GROUPS, ROWS, STEPS
from treadle.ir.ops.products import Einsum, MatMul
from treadle.ir.target import Target
from treadle.ir.types import DType, Type, f32, f64
from treadle.passes.capabilities import Capabilities
from treadle.passes.framework.manager import Pass
from treadle.passes.lowering.assign_layouts import AssignLayouts
from treadle.passes.lowering.decode_last import DecodeLast, DecodeNarrow
from treadle.passes.lowering.hoist_weights import HoistWeights
from treadle.passes.lowering.legalize import Legalize, primitives
from treadle.passes.lowering.multiply_blocks import MultiplyBlocks, OpenBlockProducts
from treadle.passes.lowering.multiply_groups import MultiplyGroups
from treadle.passes.memory.plan_storage import PlanStorage
from treadle.passes.memory.storage_plan import StoragePlan

if TYPE_CHECKING:
    import torch

    from treadle.backends.torch.captured_graphs import CapturedGraphs

_INTEGER_PRODUCTS = (MatMul, Einsum)  # PyTorch has these for integers on the CPU only


_KNOWN = 4096
"""Maximum number of integers of an input that the host keeps besides the device."""

_REDUCED = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")

_CAPABILITIES = Capabilities("torch", keeps=keeps, layouts=wants, placed=is_placed, over=written_over)


def _reads_blocks(node: Node, position: int) -> bool:
    """Return True if a quantized weight is decoded directly before a node of a device's program, at every call.

    Memory then holds the numbers of one weight at a time. A node that itself depends on weights alone is computed once.
    """
    value = node.operands[position]
    made = value.node if value is not None else None
    is_decoded = made is not None and made.op.decodes and made.op.attributes["of"].form in DECODED
    return is_decoded and not all(map(is_made_of_weights, node.results))


class TorchBackend(StagedBackend):
    """The PyTorch backend. It runs graphs on the CPU or a GPU, in inference mode.

    A call accepts NumPy arrays or tensors, which are moved to the target's device, and arrays of other libraries with
    `__dlpack__`, whose memory is used without a copy. If an argument is a tensor, or an array of another library on a
    GPU, the call returns tensors on the target's device, else NumPy arrays. A bf16 result then becomes a float32 array,
    since NumPy has no bf16. A bf16 input may be a float32 array whose values bf16 represents.
    """

    name = "torch"

    def __init__(self, *, torch_compile: bool = False) -> None:
        """`torch_compile`: True to compile emitted programs with torch.compile, whole and without reads by the host."""
        self.torch_compile = torch_compile

    def with_torch_compile(self) -> TorchBackend:
        """Return this backend with torch.compile."""
        return type(self)(torch_compile=True)

    def _device(self, target: Target) -> TorchDevice:
        """Return the device of a target. With torch.compile, a program for the CPU is also one that reads nothing back:
        a read would split the captured graph.
        """
        device = find_device(target)
        if self.torch_compile and not device.is_asynchronous:
            return TorchDevice(device.device, is_asynchronous=True)
        return device

    def available(self) -> str | None:
        """Return None if PyTorch is installed, else a message."""
        if importlib.util.find_spec("torch") is None:
            return f"PyTorch is not installed: {pip_install('torch')}"
        return None

    def supports(self, node: Node) -> str | None:
        """Return None if the node can be run, else the reason."""
        if node.op.callee is not None or is_decoded_once(node):
            return None
        given = [v.type.encoding for v in (*node.inputs, *node.results)]
        for encoding in [each for each in given if each not in (None, ROWS, STEPS, GROUPS)]:
            return f"PyTorch supports {encoding} blocks only as weights, which are decoded once"
        op = _without_code(node)
        if op is None:
            return None
        inside = "" if op is node.op else f", which is in the body of {node.op.name}"
        return f"PyTorch cannot express {op.name}{inside}"

    def where_to_add(self, node: Node) -> Hint | None:
        """Return a hint with the table of PyTorch's code."""
        op = _without_code(node)
        return None if op is None else code_hint(op.name, "a line in SPELLINGS of backends/torch/spelling.py")

    def refuse(self, graph: Graph, target: Target) -> None:
        """Raise BackendError if PyTorch is not installed, or does not support the target or a node."""
        missing = self.available()
        if missing is not None:
            raise unavailable(self.name, missing)
        on_gpu = self._device(target).is_asynchronous and target.kind != "cpu"

        def refusal(node: Node) -> str | None:
            integers = isinstance(node.op, _INTEGER_PRODUCTS) and not node.results[0].type.dtype.is_float
            on_device = "PyTorch does not multiply matrices of integers on a GPU" if integers and on_gpu else None
            return self.supports(node) or on_device

        refuse_nodes(graph, self.name, refusal, hint=self.where_to_add)

    def capabilities(self, target: Target) -> Capabilities:
        """Return the ops that PyTorch computes, and the places that they can write to."""
        device = self._device(target)
        if not device.is_asynchronous:
            return _CAPABILITIES
        return replace(
            _CAPABILITIES, reads_blocks=_reads_blocks, refuses_groups=partial(refuses_groups, device.capability)
        )

    def pipeline(self, target: Target) -> Sequence[Pass]:
        """Return the passes: legalize, use oneDNN's layout for weights that only products read, compute derived weights
        once, and plan the lifetime of each tensor.
        """
        mine, on_cpu = self.capabilities(target), not self._device(target).is_asynchronous
        layouts = (AssignLayouts(mine, alone=True),) if on_cpu and can_pack() else ()
        narrow = () if on_cpu else (DecodeNarrow(),)
        groups = () if on_cpu else (MultiplyGroups(mine),)
        decoding = (*narrow, DecodeLast(gathered=not on_cpu))
        products = (OpenBlockProducts(), Legalize(mine), *decoding, MultiplyBlocks(mine), *groups)
        # torch.compile plans memory itself, and does not support writes to views of one arena in several dtypes
        storage = PlanStorage() if self.torch_compile else PlanStorage(mine)
        return (*products, *layouts, HoistWeights(mine), storage)

    def emit(
        self,
        graph: Graph,
        target: Target,
        weights: Mapping[str, Any],
        declared: Graph,
        plan: StoragePlan | None,
    ) -> Executable:
        """Generate the module and return its executable. On the CPU, weights in their original layout share memory with
        the caller's arrays or the mapped file. Raises BackendError for a missing weight.
        """
        device = self._device(target)
        made, plan, poison = recipes_of(graph), needed_plan(plan, self.name), poisons()
        dialect = replace(PACKED, reports=device.is_asynchronous)
        program = emit(graph, dialect, plan, tuple(notes_on(made)), poison)
        arrays = _TorchArrays(device, target.threads, knows_values=not self.torch_compile)
        constants = tuple(map(arrays.constant, program.constants))
        _check_room(graph, device)
        if device.device.type == "cpu":  # on another device, a derived weight is in memory only until it is moved
            refuse_large(graph, made)
        tensors = collect_weights(graph, made, weights, arrays.weight)
        for name, group in weights_in_groups(graph).items() if device.missing is None else ():
            tensors[name] = packed_groups(tensors[name], group)
        laid = {name: v.layout for name, v in graph.entry_parameters.items()}
        tensors |= {name: pack(tensors[name], layout) for name, layout in laid.items() if layout is not None}
        held = frozenset(map(arrays.storage, (*tensors.values(), *constants)))
        arena = PythonArena(plan, program, arrays, _fill if poison else None)
        met = {name: _Met(node.op) for name, node in program.references.items()}
        namespace = {"constants": constants, "device": device.device, "reference": SimpleNamespace(**met)}
        namespace["poison"] = partial(_poison, arena, arrays, held)
        entries = [entry for entry in graph.later_entries if capture_obstacles(graph, entry, plan)]
        arrays.not_captured = frozenset(entry.name for entry in entries)
        notes: tuple[str, ...] = ()
        if device.is_asynchronous:
            notes = (*notes_on_attention(graph), *notes_on_weights(graph), *notes_on_capture(graph, plan))
        made_executable = PythonExecutable(declared, program, tensors, namespace, arrays, self.name, arena, plan, notes)
        if self.torch_compile:
            import torch

            made_executable.transform(torch.compile)
        return made_executable


def _check_room(graph: Graph, device: TorchDevice) -> None:
    """Raise BackendError if the device's free memory is less than the weights need."""
    free = device.free_bytes()
    fixed = [v.type for v in graph.entry_parameters.values() if v.type.elements.constant is not None]
    needed = sum(type.storage_type.bytes_at({}) for type in fixed)
    if free is not None and needed > free:
        numbers = sum(type.elements.evaluate({}) for type in fixed)
        raise BackendError(
            f"{device.device} has too little free memory for the weights of {graph.name}",
            received=f"{needed:,} bytes are required, {free:,} are free",
            hint=_smaller_weights(numbers, free),
        )


_BITS = {"int8-weights": 9, "int4": 5}
"""Upper limits of the bits of a number in quantized weights, by scheme."""


def _smaller_weights(numbers: int, free: int) -> Hint | str:
    """Return a hint for weights of `numbers` elements that do not fit into `free` bytes."""
    scheme = next((name for name, bits in _BITS.items() if numbers * bits <= 8 * free), None)
    if scheme is None:
        return "a device with more memory, or a mesh of several"
    return Hint(f'quantize="{scheme}"', f"--quantize {scheme}")


def _without_code(node: Node) -> Op | None:
    """Return the first op of a node's body that the backend has no code for, or None."""
    if node.op.callee is not None or is_decoded_once(node):
        return None
    opened = primitives(node.op, [None if v is None else v.type for v in node.operands], keeps)
    return next((op for op, _ in opened if op.name not in SPELLINGS and not op.meets_ranks), None)


class PlainTorch(TorchBackend):
    """The PyTorch backend without packed layouts, for measuring a model that uses PyTorch's own functions."""

    def pipeline(self, target: Target) -> Sequence[Pass]:
        mine = self.capabilities(target)
        return (Legalize(mine), HoistWeights(mine), PlanStorage())


def _fill(array: torch.Tensor) -> None:
    """Fill a tensor with NaN, -1 or true."""
    array.fill_(math.nan if array.is_floating_point() else -1 if array.dtype.is_signed else BYTE)


def _poison(arena: PythonArena, arrays: _TorchArrays, held: frozenset[int], array: torch.Tensor) -> None:
    """Fill a tensor, and all of its memory if a library call allocated it. Weights and constants are unchanged."""
    memory = arrays.storage(array)
    if arena.array is not None and memory == arrays.storage(arena.array):
        _fill(array)
    elif memory not in held:
        array.untyped_storage().fill_(BYTE)  # type: ignore[attr-defined]


class _Met:
    """A collective as a function of tensors."""

    def __init__(self, op: Op) -> None:
        self.op = op

    def __call__(self, x: torch.Tensor, **sizes: int) -> torch.Tensor:
        made: torch.Tensor = self.op.at(sizes).reference(x)
        return made


class _TorchSettings(Settings):
    """Inference mode, with the target's number of threads. On a GPU, 16-bit products are accumulated in float32; by
    default, PyTorch would let cuBLAS accumulate in 16 bits.
    """

    def __init__(self, device: TorchDevice, threads: int | None) -> None:
        import torch

        self._torch, self._matmul = torch, torch.backends.cuda.matmul
        self._threads, self._before = threads, torch.get_num_threads()
        self._reduced = {name: getattr(self._matmul, name) for name in _REDUCED if device.device.type == "cuda"}
        is_needed = device.has_inference_mode and not torch.is_inference_mode_enabled()
        self._mode = torch.inference_mode() if is_needed else None

    def __enter__(self) -> None:
        if self._threads is not None and self._threads != self._before:
            self._torch.set_num_threads(self._threads)
        for name in self._reduced:
            setattr(self._matmul, name, False)
        if self._mode:
            self._mode.__enter__()

    def restore(self) -> None:
        if self._mode and self._torch.is_inference_mode_enabled():
            self._mode.__exit__(None, None, None)
        if self._torch.get_num_threads() != self._before:
            self._torch.set_num_threads(self._before)
        for name, value in self._reduced.items():
            setattr(self._matmul, name, value)


class _TorchArrays:
    """Tensors on one device; see `treadle.backends.python.executable.Arrays` and `...arena.ArenaArrays`."""

    def __init__(self, device: TorchDevice, threads: int | None, *, knows_values: bool = True) -> None:
        """`knows_values`: True if kernels get the values of short vectors of integers, and not only their limits."""
        import torch

        self._knows_values = knows_values
        self.torch, self.on, self.device, self.threads = torch, device, device.device, threads
        self.graphs: CapturedGraphs | None = None
        if device.can_capture:
            from treadle.backends.torch.captured_graphs import CapturedGraphs

            self.graphs = CapturedGraphs(device)
        self.not_captured: frozenset[str] = frozenset()
        """Entries that cannot be captured."""
        self._weights: dict[tuple[Any, ...], tuple[weakref.ref[np.ndarray[Any, Any]], torch.Tensor]] = {}
        """Tensors of weights by the address of their array, and the array: after its end, another has the address."""

    @cached_property
    def _dtypes(self) -> dict[torch.dtype, DType]:
        from treadle.ir.types import DTYPES as ours

        return {getattr(self.torch, theirs): ours[name] for name, theirs in DTYPES.items()}

    def _dtype(self, dtype: DType) -> torch.dtype:
        return getattr(self.torch, DTYPES[dtype.name])  # type: ignore[no-any-return]

    # -- inputs and outputs ----------------------------------------------------------------------------------

    def take(self, port: Port, value: Any) -> torch.Tensor:
        if self._is_borrowed(type(value)):
            value = self.on.borrow(value)
        if not isinstance(value, self.torch.Tensor):
            if port.dtype.name == "bf16":
                return self._rounded(port, value)
            return self._shared(as_numpy(port, value))
        if layout_of(value) != "strided":
            raise BackendError(
                f"input {port.name} is not a dense tensor",
                received=f"layout {layout_of(value)}",
                within=str(port),
                hint=f"{port.name}.to_dense()",
            )
        wanted = self._dtype(port.dtype)
        if value.dtype != wanted:
            held = self._dtypes.get(value.dtype)
            if held is f64 and port.dtype is f32:
                rounded = value.detach().to(self.device, wanted)
                if bool((rounded.isinf() & value.detach().to(self.device).isfinite()).any()):
                    raise refuse_overflow(port, value.shape)
                return rounded
            if held is None or not _widens(held, port.dtype):
                shown = str(value.dtype).removeprefix("torch.")
                raise refuse_dtype(port, shown, f"{port.name}.to(torch.{DTYPES[port.dtype.name]})", value.shape)
        if not self._is_near(value):
            raise BackendError(
                f"input {port.name} is on another device",
                received=f"{port.name}: a tensor on {value.device}; the program runs on {self.device}",
                within=str(port),
                hint=f'{port.name}.to("{self.device}")',
            )
        return value.detach().to(wanted)

    def _is_near(self, value: torch.Tensor) -> bool:
        """Return True if a tensor is in the memory of the CPU or of the device."""
        own, other = self.device, value.device
        if other.type == "cpu" or own.type != other.type:
            return other.type == "cpu"
        return other.index == (self.torch.cuda.current_device() if str(own) == "cuda" else own.index)

    def _rounded(self, port: Port, value: Any) -> torch.Tensor:
        wide = self.torch.from_numpy(as_numpy(Port(port.name, port.type.with_dtype(f32)), value).copy())
        narrow = wide.to(self.torch.bfloat16)
        back = narrow.to(self.torch.float32)
        if not bool(((back == wide) | wide.isnan()).all()):
            raise refuse_dtype(
                port, "a float32 that bf16 cannot represent", f"a tensor, {port.name}.to(torch.bfloat16)"
            )
        return narrow

    def enter(self, arguments: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Copy arguments that are in the CPU's memory to the device, in one copy. Short vectors of integers keep their
        values on the host, too: kernels that read slots and positions need not read them back.
        """
        if not self.on.is_asynchronous:
            return arguments
        if self.on.missing is not None:
            raise self.on.missing.with_traceback(None)
        from treadle.backends.torch.captured_graphs import bounds_around

        entered = list(arguments)
        outside = [at for at, array in enumerate(arguments) if array.device.type == "cpu"]
        for at, moved in zip(outside, self.on.to_device([arguments[at] for at in outside]), strict=True):
            entered[at] = moved
            if moved.dim() == 1 and moved.dtype == self.torch.int64 and moved.numel() <= _KNOWN:
                values = arguments[at].tolist()
                if self._knows_values:
                    moved.on_host = values  # type: ignore[attr-defined]
                if values:
                    moved.bounds = bounds_around(values)  # type: ignore[attr-defined]
        return entered

    def settings(self) -> _TorchSettings:
        return _TorchSettings(self.on, self.threads)

    def storage(self, array: Any) -> int:
        return self.on.storage(array) if isinstance(array, self.torch.Tensor) else id(array)

    def zeros(self, shape: tuple[int, ...], dtype: DType) -> torch.Tensor:
        return self.torch.zeros(shape, dtype=self._dtype(dtype), device=self.device)

    def allocated(self, count: int) -> torch.Tensor:
        try:
            return self.torch.empty(count, dtype=self.torch.uint8, device=self.device)
        except RuntimeError as error:
            raise out_of_memory(count, "a run") from error

    def laid(self, arena: torch.Tensor, offset: int, shape: tuple[int, ...], dtype: DType) -> torch.Tensor:
        count = math.prod(shape) * dtype.bytes
        return arena[offset : offset + count].view(self._dtype(dtype)).view(shape)

    def give(self, array: torch.Tensor, given: Collection[type], shared: bool) -> Any:
        array = array.clone() if shared else array
        array = array.contiguous() if 0 in array.stride() else array  # an expanded axis: one element repeated
        return array if self.on.is_asynchronous or self._gives_tensors(given) else self._as_numpy(array)

    def run(self, call: EntryCall, status: list[Any]) -> Mapping[str, Any]:
        if self.graphs is None or call.entry in self.not_captured:
            return call.run(status)
        return self.graphs.run(call, status)

    def leave(self, outputs: Outputs, kinds: Collection[type], status: list[Any]) -> tuple[Outputs, Failure | None]:
        """Copy outputs and status words to the host, with one wait. Outputs stay on the device if the caller passed
        tensors.
        """
        if not self.on.is_asynchronous:
            return outputs, None
        from treadle.backends.torch.status import first_failure, packed

        leaving = {} if self._gives_tensors(kinds) else dict(outputs)
        words = [packed(status)] if status else []
        copies = self.on.to_host([*leaving.values(), *words])
        failure = first_failure(status, copies.pop().tolist()) if words else None
        for name, copy in zip(leaving, copies, strict=True):
            outputs[name] = self._as_numpy(copy)
        return outputs, failure

    def _gives_tensors(self, kinds: Collection[type]) -> bool:
        """Return True if the caller gets tensors: one of the arguments is a tensor, or an array of another library on
        the device.
        """
        return any(
            issubclass(each, self.torch.Tensor) or (self.on.is_asynchronous and self._is_borrowed(each))
            for each in kinds
        )

    def _is_borrowed(self, kind: type) -> bool:
        """Return True if an argument's memory is used through DLPack: the array of another library, which for the CPU
        has no form in NumPy.
        """
        if not hasattr(kind, "__dlpack__") or issubclass(kind, (np.ndarray, np.generic, self.torch.Tensor)):
            return False
        return self.on.is_asynchronous or not hasattr(kind, "__array__")

    def _as_numpy(self, array: torch.Tensor) -> np.ndarray[Any, Any]:
        wide = array.float() if array.dtype == self.torch.bfloat16 else array
        return wide.numpy()

    # -- weights and constants -------------------------------------------------------------------------------

    def lifted(self, array: np.ndarray[Any, Any], dtype: DType) -> torch.Tensor:
        """Return an array as a tensor on the device. On the CPU, it may share memory with the array."""
        return self.on.load(self._shared(array), self._dtype(dtype), array)

    def _shared(self, array: np.ndarray[Any, Any]) -> torch.Tensor:
        """Return an array as a tensor of the CPU. It shares memory with the array if PyTorch supports the strides."""
        tileable = all(s >= 0 and s % array.itemsize == 0 for s in array.strides)
        if not (tileable and array.flags.aligned and array.dtype.isnative):
            # ascontiguousarray would leave a negative stride along an axis of one element
            array = array.astype(array.dtype.newbyteorder("="), order="C")
        with warnings.catch_warnings():
            # Nothing writes to arguments, weights or constants: results that share their memory are copied.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return self.torch.from_numpy(array)

    def constant(self, literal: Literal) -> torch.Tensor:
        """Return a constant as a tensor; NumPy stores bf16 constants in float32, which is exact."""
        return self.lifted(literal.array, literal.dtype)

    def weight(self, name: str, wanted: Type, value: Any) -> torch.Tensor:
        """Return a weight as a tensor. If one array is passed under several names, it becomes one tensor."""
        wanted, declared = wanted.storage_type, wanted
        if not isinstance(value, self.torch.Tensor):
            array = np.asarray(value)
            key = (
                array.__array_interface__["data"][0],
                array.shape,
                array.strides,
                array.dtype,
                wanted.dtype,
            )
            if not shape_fits(wanted, array.shape) or array.dtype != (wanted.dtype.numpy or np.float32):
                raise misfit(name, declared, shown(array))
            owner, tensor = self._weights.get(key, (None, None))
            if owner is None or tensor is None or owner() is None:
                # A checkpoint's bf16 weight is passed as float32.
                tensor = self.lifted(array, wanted.dtype)
                self._weights[key] = weakref.ref(array), tensor
            return tensor
        dense = layout_of(value) == "strided"
        if not dense or not shape_fits(wanted, value.shape) or value.dtype != self._dtype(wanted.dtype):
            raise misfit(name, declared, shown(value))
        return value.detach().to(self.device)


def _widens(held: DType, wanted: DType) -> bool:
    """Return True if every value of dtype `held` is representable in dtype `wanted` of the same kind."""
    if held.kind != wanted.kind:
        return False
    if held.numpy is None or wanted.numpy is None:
        return held.numpy is None and wanted.name in ("f32", "f64")
    return bool(np.can_cast(held.numpy, wanted.numpy, "safe"))

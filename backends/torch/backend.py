"""The PyTorch backend, for every device that PyTorch supports. torch is imported only when the backend is used."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from treadle.backends.made_weights import is_decoded_once, notes_on, recipes_of, refuse_large
from treadle.backends.poison import BYTE, poisons
from treadle.backends.protocol import Executable
from treadle.backends.python.arena import PythonArena
from treadle.backends.python.emission import emit
from treadle.backends.python.executable import PythonExecutable, collect_weights
from treadle.backends.refusals import (
    code_hint,
    refuse_nodes,
    refuse_target,
    unavailable,
)
from treadle.backends.staged import StagedBackend, needed_plan
from treadle.backends.torch.attention_forms import notes_on_attention
from treadle.backends.torch.capture_decision import capture_obstacles, notes_on_capture
from treadle.backends.torch.destinations import is_placed, written_over
from treadle.backends.torch.devices import TorchDevice, find_device
from treadle.backends.torch.int4_groups import packed_groups, refuses_groups, weights_in_groups
from treadle.backends.torch.packing import PACKED, can_pack, pack, wants
from treadle.backends.torch.spelling import DECODED, SPELLINGS, keeps
from treadle.backends.torch.torch_arrays import TorchArrays
from treadle.backends.torch.weight_reads import notes_on_weights
from treadle.files.installation import pip_install
from treadle.ir.analysis.weight_only import is_made_of_weights
from treadle.ir.errors import BackendError, Hint
from treadle.ir.graph import Graph, Node
from treadle.ir.operation import Op
from treadle.ir.ops.blocks import GROUPS, ROWS, STEPS
from treadle.ir.ops.products import Einsum, MatMul
from treadle.ir.target import Target
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


_INTEGER_PRODUCTS = (MatMul, Einsum)  # PyTorch has these for integers on the CPU only
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

    def missing_device(self, target: Target) -> BackendError | None:
        """Return the error of a call if this machine lacks the target's GPU, else None."""
        return self._device(target).missing

    def where_to_add(self, node: Node) -> Hint | None:
        """Return a hint with the table of PyTorch's code."""
        op = _without_code(node)
        return None if op is None else code_hint(op.name, "a line in SPELLINGS of backends/torch/spelling.py")

    def refuse(self, graph: Graph, target: Target) -> None:
        """Raise BackendError if PyTorch is not installed, or does not support the target or a node."""
        refuse_target(self.name, target)
        missing = self.available()
        if missing is not None:
            raise unavailable(self.name, missing, target)
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
        arrays = TorchArrays(device, target.threads, knows_values=not self.torch_compile)
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
        made_executable.captures_calls = arrays.graphs is not None
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


def _poison(arena: PythonArena, arrays: TorchArrays, held: frozenset[int], array: torch.Tensor) -> None:
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

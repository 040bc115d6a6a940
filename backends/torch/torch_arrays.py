"""Tensors of the PyTorch backend: inputs that enter a call, outputs that leave it, weights, and settings of PyTorch."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from treadle.backends.protocol import Outputs, Port
from treadle.backends.python.executable import EntryCall, Failure, Settings
from treadle.backends.refusals import (
    layout_of,
    misfit,
    out_of_memory,
    shape_fits,
)
from treadle.backends.signature import as_numpy, refuse_dtype, refuse_overflow
from treadle.backends.torch.devices import TorchDevice
from treadle.backends.torch.dtype_names import DTYPES
from treadle.ir.errors import BackendError
from treadle.ir.literals import Literal
from treadle.ir.types import DType, Type, f32, f64

if TYPE_CHECKING:
    import torch

    from treadle.backends.torch.captured_graphs import CapturedGraphs


_KNOWN = 4096
"""Maximum number of integers of an input that the host keeps besides the device."""

_REDUCED = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")


class TorchSettings(Settings):
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


class TorchArrays:
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

    def settings(self) -> TorchSettings:
        return TorchSettings(self.on, self.threads)

    def storage(self, array: Any) -> int:
        return self.on.storage(array) if isinstance(array, self.torch.Tensor) else id(array)

    def zeros(self, shape: tuple[int, ...], dtype: DType) -> torch.Tensor:
        if self.on.missing is not None:  # states are of no use before the first call, which would raise it
            raise self.on.missing.with_traceback(None)
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
                raise misfit(name, declared, array)
            owner, tensor = self._weights.get(key, (None, None))
            if owner is None or tensor is None or owner() is None:
                # A checkpoint's bf16 weight is passed as float32.
                tensor = self.lifted(array, wanted.dtype)
                self._weights[key] = weakref.ref(array), tensor
            return tensor
        dense = layout_of(value) == "strided"
        if not dense or not shape_fits(wanted, value.shape) or value.dtype != self._dtype(wanted.dtype):
            raise misfit(name, declared, value)
        return value.detach().to(self.device)


def _widens(held: DType, wanted: DType) -> bool:
    """Return True if every value of dtype `held` is representable in dtype `wanted` of the same kind."""
    if held.kind != wanted.kind:
        return False
    if held.numpy is None or wanted.numpy is None:
        return held.numpy is None and wanted.name in ("f32", "f64")
    return bool(np.can_cast(held.numpy, wanted.numpy, "safe"))

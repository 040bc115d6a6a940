"""Devices of PyTorch: the one place that maps a target to a device, and the operations that differ by device.

On an asynchronous device, the host may not read a value back in the middle of a program: the device would finish all
pending work first, and a CUDA graph could not be captured. So inputs are copied to the device in one copy, and outputs
and status words (`treadle.backends.torch.status`) are copied back together, with one wait.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from treadle.backends.refusals import other_gpu, refuse_target
from treadle.files.mapped_files import give_back
from treadle.ir.errors import BackendError, Hint
from treadle.ir.target import Target

if TYPE_CHECKING:
    import numpy as np
    import torch

X = TypeVar("X")
_ALIGNMENT = 64
"""Alignment in bytes of each array in a buffer of several arrays."""

PIECE = 64 << 20
"""Maximum number of bytes of a weight that one copy moves to the device, except for a longer row of its first axis."""


class TorchDevice:
    """A device of PyTorch.

    device           the device itself
    is_asynchronous  True if reading a value on the host waits for the device
    missing          the error of a call if this machine lacks the device; `device` is then the CPU, which holds weights
    capability       compute capability of an NVIDIA GPU; None if it is unknown
    """

    has_inference_mode = True
    """True if programs run in PyTorch's inference mode."""

    def __init__(
        self,
        device: torch.device,
        *,
        is_asynchronous: bool | None = None,
        missing: BackendError | None = None,
        capability: tuple[int, int] | None = None,
    ) -> None:
        """`is_asynchronous` is by default True for all devices except the CPU."""
        self.device, self.missing, self.capability = device, missing, capability
        self.is_asynchronous = device.type != "cpu" if is_asynchronous is None else is_asynchronous

    def storage(self, array: torch.Tensor) -> int:
        """Return a number that is equal for two tensors exactly if they share memory."""
        if array.is_mkldnn or not array.numel():  # a result is never in oneDNN's layout
            return id(array)
        return self.storage_of(array)

    def storage_of(self, array: torch.Tensor) -> int:
        """Return the address of a tensor's memory. A device without addresses returns another unique number."""
        return array.untyped_storage().data_ptr()

    def to_device(self, arrays: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copy tensors of the CPU to the device, in one copy. The results are views of one buffer."""
        import torch

        if not arrays:
            return []
        arrays = [array.contiguous() for array in arrays]
        offsets, end = [], 0
        for array in arrays:
            offsets.append(end)
            end += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        buffer = self._host_memory(end, torch.uint8)
        for array, at in zip(arrays, offsets, strict=True):
            buffer[at : at + array.nbytes].view(array.dtype).view(array.shape).copy_(array)
        moved = buffer.to(self.device, non_blocking=True)
        places = zip(arrays, offsets, strict=True)
        return [moved[at : at + x.nbytes].view(x.dtype).view(x.shape) for x, at in places]

    def load(self, array: torch.Tensor, dtype: torch.dtype, source: np.ndarray[Any, Any]) -> torch.Tensor:
        """Return a weight or a constant of the CPU on the device, in another dtype if it differs. `source` is the array
        whose memory it may share.

        On an asynchronous device, it is copied in pieces of at most `PIECE` bytes along its first axis. The pages of a
        mapped file are released after each piece, so that the host's memory does not grow by the model's size.
        """
        import torch

        if not self.is_asynchronous or self.missing is not None or not array.dim() or not array.numel():
            return array.to(self.device).to(dtype)
        loaded = torch.empty(array.shape, dtype=dtype, device=self.device)
        step = max(1, PIECE // (array.nbytes // array.shape[0]))
        for at in range(0, array.shape[0], step):
            loaded[at : at + step].copy_(array[at : at + step])
            give_back(source[at : at + step])
        return loaded

    def borrow(self, value: Any) -> torch.Tensor:
        """Return an array of another library as a tensor that shares its memory, through DLPack. On a GPU, the array's
        library makes the current stream wait for its own work.
        """
        import torch

        borrowed: torch.Tensor = torch.utils.dlpack.from_dlpack(value)
        return borrowed

    def free_bytes(self) -> int | None:
        """Return the number of free bytes of the device's memory; None if it is unknown, as for the CPU."""
        import torch

        if self.device.type != "cuda" or self.missing is not None:
            return None
        free, _ = torch.cuda.mem_get_info(self.device)
        return free + torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)

    @property
    def can_capture(self) -> bool:
        """True if `capture` is supported."""
        return self.device.type == "cuda" and self.missing is None

    def capture(self, run: Callable[[], X]) -> tuple[X, Callable[[], None]]:
        """Capture the kernels of a run as a graph. Return the run's result, and a function that launches the kernels
        again, on the same memory. The run is not executed here.

        Raises RuntimeError if the run waits for the device.
        """
        import torch

        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = run()
        return result, graph.replay

    def to_host(self, arrays: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copy tensors of the device to the CPU, with one wait for all of them. This waits for all pending work."""
        copies = []
        for array in arrays:
            copy = self._host_memory(array.numel(), array.dtype).view(array.shape)
            copies.append(copy.copy_(array, non_blocking=True))
        if copies:
            self.wait()
        return copies

    def wait(self) -> None:
        """Wait for the work that has been submitted on the current stream."""
        import torch

        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def _host_memory(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """Return `count` new elements in the CPU's memory, pinned if the device copies such memory asynchronously."""
        import torch

        return torch.empty(count, dtype=dtype, pin_memory=self.device.type == "cuda")


def find_device(target: Target) -> TorchDevice:
    """Return the device of a target. If this machine lacks the device, programs for it can be inspected but not called.

    Raises BackendError for a target for which PyTorch does not generate code: a CPU by its instruction set, and devices
    of OpenCL and WebGPU.
    """
    import torch

    refuse_target("torch", target)
    if target.kind == "cpu":
        return TorchDevice(torch.device("cpu"))
    missing = _missing(target)
    if missing is not None:
        capability = target.hardware.capability
        return TorchDevice(torch.device("cpu"), is_asynchronous=True, missing=missing, capability=capability)
    device = torch.device("cuda") if target.index is None else torch.device("cuda", target.index)
    return TorchDevice(device, capability=torch.cuda.get_device_capability(device))


def _missing(target: Target) -> BackendError | None:
    """Return the error of a call for a GPU that this machine lacks; None if it has the GPU."""
    import torch

    hint = Hint('target="cpu"', "--target cpu")
    if not torch.cuda.is_available():
        what = "PyTorch finds no CUDA device"
        what = what if not target.is_elsewhere else f"{what}, {target} is needed"
        return BackendError(what, received=f"torch {torch.__version__}, {_reason()}", hint=hint)
    count = torch.cuda.device_count()
    if target.index is not None and target.index >= count:
        return BackendError(f"this machine has no CUDA device {target.index}", received=f"{count} devices", hint=hint)
    return other_gpu(target, torch.cuda.get_device_name()) if target.is_elsewhere else None


def _reason() -> str:
    """Return the reason why PyTorch has no CUDA device: its build, no driver, or a driver that is too old."""
    import torch

    if not torch.version.cuda:
        return "without CUDA"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        return f"for CUDA {torch.version.cuda}: {str(error).strip().partition(chr(10))[0]}"
    return f"for CUDA {torch.version.cuda}"

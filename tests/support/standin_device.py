"""A device of PyTorch that every machine has: tensors of their own kind, which the CPU computes.

    with standin() as counts:
        exe = treadle.compile("gpt2", backend="torch", target="cuda")
        exe(tokens=tokens)
    counts.waits, counts.copies_in, counts.by_line

A program for a GPU runs on it with the GPU's rules: an op on tensors of two devices raises MixedDevices. Each wait of
the host for the device, each copy and each allocation is counted, by line of the emitted source.

It registers PyTorch's dispatch key PrivateUse1 from Python, with an experimental function of torch 2.9 and later;
tested with torch 2.13. PyTorch's inference mode refuses views of such tensors, so programs run without it.
"""

from __future__ import annotations

import linecache
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import treadle.backends.torch.backend as torch_backend
from treadle.backends.torch.devices import TorchDevice
from treadle.ir.target import Target

_setup_privateuseone_for_python_backend("standin")
DEVICE = torch.device("standin", 0)
HOST = "host"
"""The line of events outside of emitted source."""


class MixedDevices(RuntimeError):
    """An op got tensors of two devices."""


@dataclass
class Counts:
    """Events on the device.

    by_line  the number of events by kind ("wait", "copy in", "copy out", "allocation") and line of the emitted source
    ops      the number of ops
    nbytes   bytes of all tensors that were copied in
    nbytes_out  bytes of all tensors that were copied out
    """

    by_line: Counter[tuple[str, str]] = field(default_factory=Counter)
    ops: int = 0
    nbytes: int = 0
    nbytes_out: int = 0

    def clear(self) -> None:
        self.by_line.clear()
        self.ops = self.nbytes = self.nbytes_out = 0

    def of(self, kind: str) -> int:
        """Return the number of events of a kind."""
        return sum(count for (each, _), count in self.by_line.items() if each == kind)

    def lines(self, kind: str) -> dict[str, int]:
        """Return the number of events of a kind, by line of the emitted source."""
        return {line: count for (each, line), count in self.by_line.items() if each == kind}

    @property
    def waits(self) -> int:
        return self.of("wait")

    @property
    def copies_in(self) -> int:
        return self.of("copy in")


COUNTS = Counts()


def _count(kind: str) -> None:
    frame: Any = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.startswith("<treadle "):
        frame = frame.f_back
    line = HOST if frame is None else linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    COUNTS.by_line[kind, line.partition("  # ")[0].strip()] += 1


class StandInTensor(torch.Tensor):
    """A tensor on the device. `inner` holds its elements on the CPU."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> StandInTensor:
        made: StandInTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        made.inner = inner
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"StandInTensor({self.inner})"

    def tolist(self) -> Any:
        _count("wait")
        return self.inner.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("a tensor on a device cannot be converted to NumPy")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        COUNTS.ops += 1
        if func._overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            return _copy(func, args, kwargs)
        given, _ = tree_flatten((args, kwargs))
        tensors = [x for x in given if isinstance(x, torch.Tensor)]
        if any(not isinstance(x, StandInTensor) and x.dim() for x in tensors):
            raise MixedDevices(f"{func}: " + ", ".join(f"{x.device}{list(x.shape)}" for x in tensors))
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu") if _is_own(kwargs["device"]) else kwargs["device"]
        if func._overloadpacket in _OF_GPUS:
            return StandInTensor(_OF_GPUS[func._overloadpacket](*map(_inner, args)))
        if reads_back(func, args):
            _count("wait")
        inner_args, inner_kwargs = tree_map_only(StandInTensor, lambda x: x.inner, (args, kwargs))
        made = func(*inner_args, **inner_kwargs)
        if not func._schema.is_mutable and not func.is_view and isinstance(made, torch.Tensor | tuple | list):
            _count("allocation")
        for x in tensors if func._schema.is_mutable else ():
            assert x.shape == _inner(x).shape, f"{func} resized a result, which the stand-in cannot show"
        wrapped = tree_map_only(torch.Tensor, StandInTensor, made)
        return return_and_correct_aliasing(func, args, kwargs, wrapped)


def reads_back(func: Any, args: Any) -> bool:
    """Return True if the host needs values of the device to run an op: for its result, or for the result's shape."""
    if torch.Tag.data_dependent_output in func.tags:
        return True
    if func._overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put_, torch.ops.aten._index_put_impl_):
        return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    return torch.Tag.dynamic_output_shape in func.tags


def _is_own(device: Any) -> bool:
    return torch.device(device).type == DEVICE.type


def _inner(x: torch.Tensor) -> torch.Tensor:
    return x.inner if isinstance(x, StandInTensor) else x


def _copy(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Copy within the device, or between it and the host."""
    if func._overloadpacket is torch.ops.aten.copy_:
        target, source = args[:2]
        _count_copy(source, into=isinstance(target, StandInTensor), waits=not (len(args) > 2 and args[2]))
        _inner(target).copy_(_inner(source))
        return target
    (source,) = args
    into = _is_own(kwargs.pop("device", None) or source.device)
    _count_copy(source, into=into, waits=not kwargs.pop("non_blocking", False))
    made = func(_inner(source), **kwargs)
    return StandInTensor(made) if into else made


def _count_copy(source: torch.Tensor, *, into: bool, waits: bool) -> None:
    if isinstance(source, StandInTensor) != into:
        _count("copy in" if into else "copy out")
        COUNTS.nbytes += source.nbytes if into else 0
        COUNTS.nbytes_out += 0 if into else source.nbytes
        if waits and not into:
            _count("wait")


def _pack_int4(pairs: torch.Tensor, tiles: int) -> torch.Tensor:
    """Return the bytes in an order of our own, in the shape of PyTorch's result on a GPU."""
    n, k = pairs.shape[0], 2 * pairs.shape[1]
    assert n % 8 == 0 and k % (16 * tiles) == 0 and pairs.dtype == torch.uint8 and pairs.is_contiguous()
    return pairs.clone().view(torch.int32).view(n // 8, k // (16 * tiles), 32, tiles // 2)


def _multiply_int4(x: torch.Tensor, packed: torch.Tensor, group: int, scales: torch.Tensor) -> torch.Tensor:
    """Multiply as `aten::_weight_int4pack_mm` does on a GPU, with the packing of `_pack_int4`."""
    assert x.dtype == scales.dtype == torch.bfloat16 and x.dim() == 2 and x.is_contiguous()
    n, k = 8 * packed.shape[0], x.shape[1]
    assert scales.shape == (k // group, n, 2)
    pairs = packed.reshape(-1).view(torch.uint8).view(n, k // 2)
    q = torch.stack((pairs >> 4, pairs & 15), dim=-1).view(n, k // group, group).float() - 8
    scale, zero = (each.float().t()[..., None] for each in scales.unbind(-1))
    return (x.float() @ (q * scale + zero).view(n, k).bfloat16().float().t()).bfloat16()


_OF_GPUS = {
    torch.ops.aten._convert_weight_to_int4pack: _pack_int4,
    torch.ops.aten._weight_int4pack_mm: _multiply_int4,
}
"""Ops that PyTorch has on GPUs only."""


def _empty(size: Any, *, dtype: Any = None, layout: Any = None, device: Any = None, **_: Any) -> torch.Tensor:
    _count("allocation")
    return StandInTensor(torch.empty(size, dtype=dtype, device="cpu"))


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> torch.Tensor:
    _count("allocation")
    return StandInTensor(torch.empty_strided(size, stride, dtype=dtype, device="cpu"))


def _arange(*bounds: Any, dtype: Any = None, **_: Any) -> torch.Tensor:
    _count("allocation")
    return StandInTensor(torch.arange(*bounds, dtype=dtype))


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    _count_copy(source, into=isinstance(target, StandInTensor), waits=not non_blocking)
    _inner(target).copy_(_inner(source))
    return target


_LIBRARY = torch.library.Library("aten", "IMPL", "PrivateUse1")
_LIBRARY.impl("empty.memory_format", _empty)
_LIBRARY.impl("empty_strided", _empty_strided)
for _name in ("arange", "arange.start", "arange.start_step"):  # PyTorch's own resize their result
    _LIBRARY.impl(_name, _arange)
_LIBRARY.impl("_copy_from", _copy_from)


def _undivided(name: str) -> None:
    """Compute a product as one op. PyTorch's own decomposition for a vector resizes a result in place."""
    packet = getattr(torch.ops.aten, name).default
    _LIBRARY.impl(name, lambda *args: StandInTensor.__torch_dispatch__(packet, (), args))


_undivided("linear")
_undivided("matmul")


class StandInDevice(TorchDevice):
    """The device for the torch backend. Its tensors have no addresses."""

    has_inference_mode = False

    def __init__(self) -> None:
        super().__init__(DEVICE, capability=(9, 0))

    def storage_of(self, array: torch.Tensor) -> int:
        return array.untyped_storage()._cdata

    def wait(self) -> None:
        _count("wait")

    def borrow(self, value: Any) -> torch.Tensor:
        """Return the tensor of a `tests.standin_checks.Foreign`: a capsule of DLPack would need an address."""
        borrowed: torch.Tensor = value.tensor
        return borrowed


def moved(states: Mapping[str, Any]) -> dict[str, Any]:
    """Return the elements of states or outputs on the CPU, uncounted."""
    return {name: _inner(x).clone() for name, x in states.items()}


@contextmanager
def standin(device: TorchDevice | None = None, *, kind: str = "cuda") -> Iterator[Counts]:
    """Let the torch backend use this device, by default the stand-in, for targets of this kind. Yield new counts."""
    chosen, real = device or StandInDevice(), torch_backend.find_device

    def find_device(target: Target) -> TorchDevice:
        return chosen if target.kind == kind else real(target)

    COUNTS.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_backend, "find_device", find_device)
        yield COUNTS

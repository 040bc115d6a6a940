"""Devices of this machine, listed without opening one.

    for each in opencl_devices():
        print(each.name, each.interface)

Each function imports the package of its interface alone, and only if it is installed. A driver that fails counts as no
device. `what_to_install` names what is missing.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from treadle.backends.tvm.runtimes.cuda_driver import MAJOR, MINOR, driver_library
from treadle.files.installation import pip_install
from treadle.ir.errors import BackendError


@dataclass(frozen=True)
class MachineDevice:
    """A device of this machine.

    name         name of the hardware, as its driver reports it
    interface    the interface, with the driver's name, such as `OpenCL: Portable Computing Language`
    is_software  True if the CPU computes what the device is asked for
    """

    name: str
    interface: str
    is_software: bool = False

    def __str__(self) -> str:
        return f"{self.name} ({self.interface}{', in software' * self.is_software})"


def cuda_devices() -> list[MachineDevice]:
    """Return the GPUs that NVIDIA's driver lists. PyTorch is not needed."""
    driver = cuda_driver()
    if driver is None:
        return []
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return []
    return [_cuda_device(driver, ordinal) for ordinal in range(count.value)]


def cuda_driver() -> Any | None:
    """Return NVIDIA's driver library, or None if this machine has none."""
    with suppress(BackendError):
        return driver_library()
    return None


def _cuda_device(driver: Any, ordinal: int) -> MachineDevice:
    device, name, words = ctypes.c_int(), ctypes.create_string_buffer(256), []
    driver.cuDeviceGet(ctypes.byref(device), ordinal)
    driver.cuDeviceGetName(name, len(name), device)
    for attribute in (MAJOR, MINOR):
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        words.append(str(value.value))
    return MachineDevice(name.value.decode(errors="replace"), f"CUDA, compute capability {'.'.join(words)}")


def opencl_devices() -> list[MachineDevice]:
    """Return the devices of all OpenCL platforms; none without pyopencl."""
    if importlib.util.find_spec("pyopencl") is None:
        return []
    pyopencl = import_module("pyopencl")
    return [
        MachineDevice(
            device.name.strip(), f"OpenCL: {platform.name.strip()}", bool(device.type & pyopencl.device_type.CPU)
        )
        for platform in pyopencl.get_platforms()
        for device in platform.get_devices()
    ]


def webgpu_devices() -> list[MachineDevice]:
    """Return the adapters of WebGPU; none without wgpu."""
    if importlib.util.find_spec("wgpu") is None:
        return []
    adapters = [adapter.info for adapter in import_module("wgpu").gpu.enumerate_adapters_sync()]
    return [
        MachineDevice(info["device"], f"WebGPU: {info['backend_type']}", info["adapter_type"] == "CPU")
        for info in adapters
    ]


LISTS: Mapping[str, Callable[[], list[MachineDevice]]] = {
    "cuda": cuda_devices,
    "opencl": opencl_devices,
    "webgpu": webgpu_devices,
    "metal": list,
}
"""For each kind of device, the function that lists this machine's. Nothing launches kernels on Metal yet."""


def list_devices(kind: str) -> list[MachineDevice]:
    """Return this machine's devices of a kind. A driver that fails counts as no device."""
    try:
        return LISTS[kind]()
    except Exception:  # drivers and their packages raise errors of many classes
        return []


_PACKAGES = {"opencl": "pyopencl", "webgpu": "wgpu"}
_DRIVERS = {
    "cuda": "NVIDIA's driver",
    "opencl": "an OpenCL driver; on Debian, pocl-opencl-icd runs OpenCL on the CPU",
    "webgpu": "a driver for Vulkan, Direct3D 12 or Metal; on Debian, mesa-vulkan-drivers runs Vulkan on the CPU",
    "metal": "a launcher, which Treadle does not have yet: programs can be compiled and inspected",
}


def what_to_install(kind: str) -> str:
    """Return what devices of a kind need on a machine that has none: pip's command, or a driver."""
    package = _PACKAGES.get(kind)
    if package is not None and importlib.util.find_spec(package) is None:
        return pip_install(kind)
    return _DRIVERS[kind]

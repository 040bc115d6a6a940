"""Compiling kernel texts for the emulator, and launching them on arrays."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from treadle.backends.tvm.kernels.cpu_features import cpu_flags
from treadle.backends.tvm.kernels.devices.device_kernels import DeviceKernel, lane_functions_text
from treadle.backends.tvm.kernels.devices.kernel_text import stored_type
from treadle.ir.types import i64

HERE = Path(__file__).parent
Array = np.ndarray[Any, Any]


class EmulatorError(Exception):
    """A fault that the emulator found: an access outside its array, or threads that wait at different places."""


@dataclass(frozen=True)
class Region:
    """An argument of a launch: an array, and the index of the first element that the kernel sees."""

    array: Array
    at: int = 0


def compiler() -> str | None:
    """Return the path of the C++ compiler, or None."""
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")


class EmulatedKernel:
    """A kernel's text, compiled for the emulator.

    text  the kernel's text as it is compiled; a test may change it, to plant a fault
    """

    def __init__(self, kernel: DeviceKernel, text: str | None = None) -> None:
        self.kernel, self.text = kernel, kernel.body if text is None else text

    @property
    def source(self) -> str:
        """The whole translation unit: the emulator's names, lane functions, the kernel, and a function to launch it.

        If the device's indices have 32 bits, 64-bit integers are stored in 32 bits.
        """
        written, given = self.kernel.group_kernel, []
        narrow, text = written.device.limits.index == "i32", self.text
        if narrow:
            text = re.sub(r"TREADLE_GLOBAL\((const )?treadle_i64\)", r"TREADLE_GLOBAL(\1int)", text)
        for n, memory in enumerate(written.pointers):
            const = "" if memory.is_written else "const "
            stored = "int" if narrow and memory.dtype is i64 else stored_type(memory)
            given.append(f'emulator::global<{const}{stored}>(a->buffers[{n}], "{memory.name}")')
            given.append(f"a->numbers[{n}]")
        count = len(written.pointers)
        given += [f"a->numbers[{count + n}]" for n in range(len(written.sizes))]
        return f"""#include "emulator.h"
{lane_functions_text(written, "c")}
#line 1 "{written.name}"
{text}
namespace emulator {{ const char* launch(void (*)(void*), void*, Index, int, unsigned); }}
struct Arguments {{ const emulator::Buffer* buffers; const long long* numbers; }};
static void call(void* given) {{
  const Arguments* a = (const Arguments*)given;
  {written.name}({", ".join(given)});
}}
extern "C" const char* run(const emulator::Buffer* buffers, const long long* numbers, long long blocks, unsigned seed)
{{
  Arguments given = {{buffers, numbers}};
  return emulator::launch(call, &given, blocks, {written.device.threads}, seed);
}}
"""

    def launch(self, regions: Sequence[Region], sizes: Sequence[int], *, blocks: int = 3, seed: int = 1) -> None:
        """Run the kernel, in an order of threads and blocks that the seed determines. Raises EmulatorError."""
        written = self.kernel.group_kernel
        assert len(regions) == len(written.pointers), (len(regions), len(written.pointers))
        assert len(sizes) == len(written.sizes), (len(sizes), written.sizes)
        pairs = [(r.array.ctypes.data, r.array.nbytes) for r in regions]
        buffers = (ctypes.c_longlong * (2 * len(pairs)))(*[n for pair in pairs for n in pair])
        numbers = (ctypes.c_longlong * (len(regions) + len(sizes)))(*[r.at for r in regions], *sizes)
        error = _library(self.source).run(buffers, numbers, ctypes.c_longlong(blocks), ctypes.c_uint(seed))
        if error:
            raise EmulatorError(f"{written.name}: {error.decode()}")


def build(kernels: Sequence[EmulatedKernel]) -> None:
    """Compile several kernels at once."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        list(pool.map(lambda kernel: _library(kernel.source), kernels))


@cache
def _folder() -> Path:
    """Return the folder of compiled kernels, by content: one that is kept if TREADLE_EMULATOR_CACHE names it."""
    kept = os.environ.get("TREADLE_EMULATOR_CACHE")
    folder = Path(kept) if kept else Path(_temporary().name)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="treadle-emulator-")


@cache
def _library(source: str) -> Any:
    content = source + "".join((HERE / name).read_text() for name in ("emulator.h", "emulator.cpp"))
    path = _folder() / f"{hashlib.sha256(content.encode()).hexdigest()[:24]}.so"  # dlopen reuses a library by its path
    if not path.exists():
        unit, part = path.with_suffix(".cpp"), path.with_suffix(f".{os.getpid()}.part")
        unit.write_text(source)
        _compile([str(unit), str(_runtime()), "-shared", "-o", str(part)])
        part.replace(path)
    library = ctypes.CDLL(str(path))
    library.run.restype = ctypes.c_char_p
    return library


@cache
def _runtime() -> Path:
    """Return the object file of the scheduler."""
    text = "".join((HERE / name).read_text() for name in ("emulator.h", "emulator.cpp"))
    path = _folder() / f"runtime-{hashlib.sha256(text.encode()).hexdigest()[:24]}.o"
    if not path.exists():
        part = path.with_suffix(f".{os.getpid()}.part")
        _compile([str(HERE / "emulator.cpp"), "-c", "-o", str(part)])
        part.replace(path)
    return path


def _compile(arguments: Sequence[str]) -> None:
    optimization = os.environ.get("TREADLE_EMULATOR_FLAGS", "-O0")  # a few calls take less time than optimizing
    flags = ["-std=c++17", *optimization.split(), "-w", "-fPIC", "-fwrapv", "-ffp-contract=off", f"-I{HERE}"]
    flags += ["-mfma"] if "fma" in cpu_flags() else []
    path = compiler()
    assert path is not None, "the emulator needs a C++ compiler: install g++"
    made = subprocess.run([path, *flags, *arguments], capture_output=True, text=True)
    if made.returncode:
        raise ValueError(f"the C++ compiler refuses a kernel\n{made.stderr[:3000]}")

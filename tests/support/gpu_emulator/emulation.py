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

from treadle.backends.tvm.kernels.devices.device_kernels import DeviceKernel, lane_functions_text
from treadle.backends.tvm.kernels.devices.kernel_text import stored_type
from treadle.backends.tvm.kernels.devices.preludes import PRELUDES
from treadle.backends.tvm.kernels.host.cpu_features import cpu_flags
from treadle.ir.types import i64

HERE = Path(__file__).parent
FILES = ("emulator.h", "emulator.cpp", "checked_memory.h", "metal_stdlib")
Array = np.ndarray[Any, Any]


class EmulatorError(Exception):
    """A fault that the emulator found: an access outside its array, a race between blocks, or threads that wait at
    different places.
    """


@dataclass(frozen=True)
class Region:
    """An argument of a launch.

    array    an array
    at       index of the first element that the kernel sees
    checked  False if several blocks may write to an element: the status words
    """

    array: Array
    at: int = 0
    checked: bool = True


def compiler() -> str | None:
    """Return the path of the C++ compiler, or None."""
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")


class EmulatedKernel:
    """A kernel's text, compiled for the emulator.

    text    the kernel's text as it is compiled; a test may change it, to plant a fault
    counts  True if accesses to memory are counted: see `counters`
    """

    def __init__(self, kernel: DeviceKernel, text: str | None = None, *, counts: bool = False) -> None:
        self.kernel, self.text, self.counts = kernel, kernel.body if text is None else text, counts

    @property
    def source(self) -> str:
        """The whole translation unit: the emulator's names, lane functions, the kernel, and a function to launch it.

        Of Metal, only buffers and registers are replaced, so that accesses are checked; the rest of the text is the
        device's own. `metal_stdlib` defines its names. If the device's indices have 32 bits, 64-bit integers are stored
        in 32 bits.
        """
        written = self.kernel.group_kernel
        narrow, text, buffers = written.device.limits.index == "i32", self.text, []
        parameters: list[str] = []
        if narrow:
            text = re.sub(r"TREADLE_GLOBAL\((const )?treadle_i64\)", r"TREADLE_GLOBAL(\1int)", text)
        if self.counts:
            text = re.sub(r"(?m)^( *for \(.*\{)$", r"\1 emulator::tick();", text)
        for n, memory in enumerate(written.pointers):
            const = "" if memory.is_written else "const "
            stored = "int" if narrow and memory.dtype is i64 else stored_type(memory)
            buffers.append(f"emulator::global<{const}{stored}>(regions[{n}])")
            parameters.append(f'{{"{memory.name}", sizeof({stored}), {str(memory.is_written).lower()}}}')
        numbers = [f"numbers[{n}]" for n in range(len(written.numbers))]
        count = len(buffers)
        if written.device.limits.language == "metal":
            start = f'{PRELUDES["metal"]}\n#include "checked_memory.h"\n{lane_functions_text(written, "metal")}'
            given = [*buffers, f"{written.name}_numbers{{{', '.join(numbers)}}}"]
            given += [f"(unsigned)emulator::{name}" for name in ("block", "blocks", "thread")]
        else:
            start = lane_functions_text(written, "c")
            pairs = zip(buffers, numbers[:count], strict=True)
            given = [*(each for pair in pairs for each in pair), *numbers[count:]]
        return f"""{"#define EMULATOR_COUNTS" if self.counts else ""}
#include "emulator.h"
{start}
#line 1 "{written.name}"
{text}
namespace emulator {{
const char* launch(void (*)(const Index*, const Region*), const Index*, const Buffer*, const Parameter*, int,
                   const Launch&);
const char* counters();
}}
static void call(const long long* numbers, const emulator::Region* regions) {{
  {written.name}({", ".join(given)});
}}
static const emulator::Parameter parameters[] = {{{", ".join(parameters)}}};
extern "C" const char* run(const emulator::Buffer* buffers, const long long* numbers, long long blocks, unsigned seed,
                           int together, const int* checked) {{
  const emulator::Launch how = {{blocks, {written.device.threads}, together, {str(written.device.tasks > 1).lower()},
                                seed, checked}};
  return emulator::launch(call, numbers, buffers, parameters, {count}, how);
}}
extern "C" const char* counters() {{ return emulator::counters(); }}
"""

    @property
    def library(self) -> Any:
        """The compiled kernel, with the function `run`."""
        return _library(self.source)

    def launch(
        self,
        regions: Sequence[Region],
        sizes: Sequence[int],
        *,
        blocks: int = 3,
        seed: int = 1,
        together: int = 1,
        races: bool = True,
    ) -> None:
        """Run the kernel, in an order of threads and blocks that the seed determines.

        together  number of blocks that are alive at once, at most 8, and run in turns
        races     True if an access to what another block writes in the same launch is an error

        Raises EmulatorError.
        """
        written = self.kernel.group_kernel
        assert len(regions) == len(written.pointers), (len(regions), len(written.pointers))
        assert len(sizes) == len(written.sizes), (len(sizes), written.sizes)
        assert together == 1 or not self.counts, "accesses of blocks in turns are not counted"
        pairs = [(r.array.ctypes.data, r.array.nbytes) for r in regions]
        buffers = (ctypes.c_longlong * (2 * len(pairs)))(*[n for pair in pairs for n in pair])
        numbers = (ctypes.c_longlong * (len(regions) + len(sizes)))(*[r.at for r in regions], *sizes)
        checked = (ctypes.c_int * len(regions))(*[r.checked for r in regions]) if races else None
        how = ctypes.c_longlong(blocks), ctypes.c_uint(seed), ctypes.c_int(together), checked
        error = self.library.run(buffers, numbers, *how)
        if error:
            raise EmulatorError(f"{written.name}: {error.decode()}")

    def counters(self) -> list[Counter]:
        """Return the accesses of all launches since the last call, in the order of the lines."""
        lines = [line.split() for line in self.library.counters().decode().splitlines()]
        text = ["", *self.text.splitlines()]
        found = [
            Counter(text[int(line)].strip(), name, shared == "1", *map(int, numbers))
            for shared, line, name, *numbers in sorted(lines, key=lambda words: int(words[1]))
        ]
        return found


@dataclass(frozen=True)
class Counter:
    """The accesses to an array at a line of a kernel.

    line          the line's text
    name          the array
    shared        True for shared memory
    instructions  number of instructions, each of up to 32 threads
    accesses      number of accesses of single threads
    units         sectors of 32 bytes of global memory, or cycles of shared memory, in which a bank delivers one word
    least         number of units that the same words need at least
    """

    line: str
    name: str
    shared: bool
    instructions: int
    accesses: int
    units: int
    least: int


def build(kernels: Sequence[EmulatedKernel]) -> None:
    """Compile several kernels at once."""
    _runtime()  # once, before several threads need it
    with ThreadPoolExecutor(max_workers=2) as pool:
        list(pool.map(lambda kernel: _library(kernel.source), kernels))


def built(source: Path) -> Path:
    """Compile a source file of the tests as a shared library, and return its path."""
    path = _folder() / f"{source.stem}-{hashlib.sha256(source.read_bytes()).hexdigest()[:24]}.so"
    if not path.exists():
        part = path.with_suffix(f".{os.getpid()}.part")
        _compile([str(source), "-shared", "-o", str(part)])
        part.replace(path)
    return path


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
    path = (
        _folder() / f"{hashlib.sha256((source + _emulator()).encode()).hexdigest()[:24]}.so"
    )  # dlopen reuses a library by its path
    if not path.exists():
        unit, part = path.with_suffix(".cpp"), path.with_suffix(f".{os.getpid()}.part")
        unit.write_text(source)
        _compile([str(unit), str(_runtime()), "-shared", "-o", str(part)])
        part.replace(path)
    library = ctypes.CDLL(str(path))
    library.run.restype = library.counters.restype = ctypes.c_char_p
    return library


@cache
def _emulator() -> str:
    """Return the text of the emulator, on which every compiled kernel depends."""
    return "".join((HERE / name).read_text() for name in FILES)


@cache
def _runtime() -> Path:
    """Return the object file of the scheduler."""
    path = _folder() / f"runtime-{hashlib.sha256(_emulator().encode()).hexdigest()[:24]}.o"
    if not path.exists():
        part = path.with_suffix(f".{os.getpid()}.part")
        _compile([str(HERE / "emulator.cpp"), "-O2", "-c", "-o", str(part)])
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

"""The compilers of CUDA text: NVRTC translates it to PTX, and ptxas assembles PTX for an architecture.

    kernel = compile_cuda(device_kernel(Softmax(False, "f32"), DEVICES["cuda"]).text, "sm_90")
    print(kernel.resources)                                  # 32 registers, 256 bytes of shared memory, ...

Both come from NVIDIA's packages on PyPI, the extra `cuda`, and need no GPU. Results are stored in the user's cache
folder by the content of the text.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from treadle.backends.tvm.kernels.host.stored_kernels import read_stored, version_folder, write_stored
from treadle.files.installation import pip_install
from treadle.ir.errors import BackendError, Hint

OPTIONS = ("--std=c++17", "--fmad=false")
"""Options of NVRTC. A product and a sum are one operation only where the text says so."""

_NVRTC, _PTXAS = "nvidia-cuda-nvrtc-cu12", "nvidia-cuda-nvcc-cu12"
_LIBRARIES = ("nvidia/cuda_nvrtc/lib/libnvrtc.so.12", "nvidia/cuda_nvrtc/bin/nvrtc64_120_0.dll")
_PROGRAMS = ("nvidia/cuda_nvcc/bin/ptxas", "nvidia/cuda_nvcc/bin/ptxas.exe")
_MESSAGE = 2000
"""Maximum number of characters of a compiler's message in an error."""


@dataclass(frozen=True)
class Resources:
    """The resources that a kernel takes, as ptxas reports them.

    registers  registers of a thread
    shared     bytes of shared memory of a block
    spilled    bytes that a thread stores to or loads from memory because it has too few registers
    """

    registers: int
    shared: int
    spilled: int

    def __str__(self) -> str:
        return f"{self.registers} registers, {self.shared} bytes of shared memory, {self.spilled} bytes spilled"


@dataclass(frozen=True)
class CudaKernel:
    """A kernel that is compiled for an architecture.

    ptx        its PTX text
    cubin      its machine code, which runs on GPUs of this major version with the same or a later minor version
    resources  the resources that it takes
    """

    ptx: str
    cubin: bytes
    resources: Resources


def missing_compiler() -> str | None:
    """Return None if NVRTC and ptxas are installed, else a message with the command that installs them."""
    absent = [name for name, paths in ((_NVRTC, _LIBRARIES), (_PTXAS, _PROGRAMS)) if _file(name, paths) is None]
    return f"{' and '.join(absent)} cannot be found: {pip_install('cuda')}" if absent else None


_ASSUMED = (8, 0)
"""The compute capability of a GPU that is not known: since it, GPUs have bf16."""


def architecture_of(capability: tuple[int, int] | None) -> str:
    """Return the architecture, as `sm_90`, for a GPU of a compute capability: the latest one that NVRTC supports and
    that such a GPU runs. For None, a GPU that is not known, return `sm_80`. Raises BackendError if there is none, or if
    NVRTC is missing.
    """
    capability = capability or _ASSUMED
    number = 10 * capability[0] + capability[1]
    fitting = [each for each in _architectures() if each <= number]
    if not fitting:
        raise BackendError(
            f"NVRTC compiles no kernels for GPUs of compute capability {capability[0]}.{capability[1]}",
            received=f"NVRTC {_version(_NVRTC)}, for {_architectures()[0] / 10} and later",
            hint=Hint('target="cpu", or a newer GPU', "--target cpu, or a newer GPU"),
        )
    return f"sm_{fitting[-1]}"


def compile_cuda(text: str, architecture: str) -> CudaKernel:
    """Compile CUDA text with one kernel, for an architecture such as `sm_90`.

    Raises BackendError, with the compiler's message, if it is refused, and if a compiler is not installed.
    """
    ptx = compile_ptx(text, architecture)
    path = _path(ptx, architecture, "cubin")
    stored = None if path is None else read_stored(path)
    if stored is None:
        cubin, report = _assemble(ptx, architecture)
        resources = _resources(report)
        if path is not None:
            write_stored(path, json.dumps(asdict(resources)).encode() + b"\n" + cubin)
        return CudaKernel(ptx, cubin, resources)
    line, _, cubin = stored.partition(b"\n")
    return CudaKernel(ptx, cubin, Resources(**json.loads(line)))


def compile_ptx(text: str, architecture: str) -> str:
    """Return CUDA text as PTX. A GPU's driver compiles it, so that GPUs of later architectures run it, too.

    Raises BackendError, with the compiler's message, if the text is refused, and if NVRTC is not installed.
    """
    path = _path(text, architecture, "ptx")
    stored = None if path is None else read_stored(path)
    if stored is not None:
        return stored.decode()
    made = _translate(text, architecture)
    if path is not None:
        write_stored(path, made.encode())
    return made


def _path(text: str, architecture: str, ending: str) -> Path | None:
    """Return the path of a result in the cache; None without a cache."""
    folder = version_folder(f"cuda-{_generation()}")
    digest = hashlib.sha256(f"{architecture}\n{text}".encode()).hexdigest()[:32]
    return None if folder is None else folder / f"{digest}.{ending}"


@cache
def _generation() -> str:
    """Return a hash of everything besides the text and the architecture that determines the code."""
    return hashlib.sha256(f"{_version(_NVRTC)} {_version(_PTXAS)} {OPTIONS}".encode()).hexdigest()[:16]


def _version(package: str) -> str:
    try:
        return distribution(package).version
    except PackageNotFoundError:
        return ""


def _file(package: str, paths: Sequence[str]) -> Path | None:
    """Return the first of several files of a package that exists."""
    try:
        found = distribution(package)
    except PackageNotFoundError:
        return None
    return next((path for path in (Path(str(found.locate_file(each))) for each in paths) if path.is_file()), None)


def _needed(package: str, paths: Sequence[str]) -> Path:
    path = _file(package, paths)
    if path is None:
        raise BackendError(
            "the compilers of CUDA kernels are not installed",
            received=f"no {Path(paths[os.name == 'nt']).name} of the package {package}",
            hint=pip_install("cuda"),
        )
    return path


# -- NVRTC -------------------------------------------------------------------------------------------------------------


@cache
def _nvrtc() -> ctypes.CDLL:
    path = _needed(_NVRTC, _LIBRARIES)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise BackendError("NVRTC cannot be loaded", received=str(error), hint=pip_install("cuda")) from error
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    return library


@cache
def _architectures() -> tuple[int, ...]:
    """Return the architectures that NVRTC supports, as 90 for sm_90."""
    library, count = _nvrtc(), ctypes.c_int()
    library.nvrtcGetNumSupportedArchs(ctypes.byref(count))
    numbers = (ctypes.c_int * count.value)()
    library.nvrtcGetSupportedArchs(numbers)
    return tuple(sorted(numbers))


def _translate(text: str, architecture: str) -> str:
    library, program = _nvrtc(), ctypes.c_void_p()
    options = [f"--gpu-architecture={architecture.replace('sm_', 'compute_')}", *OPTIONS]
    encoded = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
    _require(library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernel.cu", 0, None, None))
    try:
        failed = library.nvrtcCompileProgram(program, len(options), encoded)
        if failed:
            message = _text_of(library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog, program)
            raise BackendError(f"NVRTC does not compile a kernel for {architecture}", received=message[:_MESSAGE])
        return _text_of(library.nvrtcGetPTXSize, library.nvrtcGetPTX, program)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _text_of(size_of: ctypes._NamedFuncPointer, read: ctypes._NamedFuncPointer, program: ctypes.c_void_p) -> str:
    size = ctypes.c_size_t()
    _require(size_of(program, ctypes.byref(size)))
    text = ctypes.create_string_buffer(size.value)
    _require(read(program, text))
    return text.value.decode()


def _require(result: int) -> None:
    if result:
        raise BackendError("NVRTC failed", received=_nvrtc().nvrtcGetErrorString(result).decode())


# -- ptxas -------------------------------------------------------------------------------------------------------------


def _assemble(ptx: str, architecture: str) -> tuple[bytes, str]:
    """Return the machine code of PTX, and ptxas's report."""
    program = _needed(_PTXAS, _PROGRAMS)
    with tempfile.TemporaryDirectory(prefix="treadle-") as folder:
        source, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx)
        command = [str(program), f"-arch={architecture}", "-v", str(source), "-o", str(cubin)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise BackendError("ptxas does not start", received=str(error), hint=pip_install("cuda")) from error
        if done.returncode:
            message = (done.stderr or done.stdout)[:_MESSAGE]
            raise BackendError(f"ptxas does not assemble a kernel for {architecture}", received=message)
        return cubin.read_bytes(), done.stderr + done.stdout


_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")
_SPILLED = re.compile(r"(\d+) bytes spill (?:stores|loads)")


def _resources(report: str) -> Resources:
    registers, shared = _USED.search(report), _SHARED.search(report)
    if registers is None:
        raise BackendError("ptxas reports no registers", received=report[:_MESSAGE])
    spilled = sum(map(int, _SPILLED.findall(report)))
    return Resources(int(registers[1]), int(shared[1]) if shared else 0, spilled)

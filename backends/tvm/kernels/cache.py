"""The kernel cache: compiled kernels in memory, and as shared objects in the user's cache folder, by content.

    entries = KernelCache(isa).entries([Matmul(48), ...])

A kernel is compiled if the cache has no file under its key. The key is a hash of the spec, the instruction set, TVM's
version and the source of the generators, so it identifies the code completely. Files are written atomically
(`treadle.files.whole_files`) and contain a hash of their bytes, which is checked before the loader sees them. Even if
processes are killed at any moment, or several processes fill the cache at once, a file is either correct or compiled
again.

If the machine has no linker, or no writable folder that is private to the user, kernels are kept in memory only. Files
in a folder that others can write are never executed.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.resources
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treadle.backends.tvm.kernels import tvm_runtime
from treadle.backends.tvm.kernels.arithmetic.vector_math import ADDED
from treadle.backends.tvm.kernels.isa import Isa, runs_here
from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.backends.tvm.kernels.runner import LAUNCH, POOL, Runner
from treadle.files.user_cache import cache_folder, forget_unused, is_private, mark_used
from treadle.files.whole_files import replacing, sweep
from treadle.ir.errors import BackendError, UsageError

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter

_SYMBOL = "kernel"
_LINKERS = (("ld", "-shared"), ("ld.lld", "-shared"), ("cc", "-shared", "-nostdlib"), ("clang", "-shared", "-nostdlib"))
_OPTIONS = {"tirx.disable_storage_rewrite": True}  # the pass merges register tiles, which then spill
_ELSEWHERE = (
    ("treadle.backends", "bfloat16.py"),
    ("treadle.ir", "layouts.py"),
    ("treadle.ir.ops", "rounding.py"),
)  # modules that generators compute with
_OBJECT_HEADER = 24  # bytes before a function object's first field, its address (TVMFFIObject)
_DIGEST = hashlib.sha256().digest_size

Entry = tuple[int, int]
"""Address and first argument of compiled code, which is called through TVM's interface."""

_loaded: dict[tuple[str, str], Entry] = {}
_alive: list[Any] = []  # owners of the addresses
_launchers: dict[
    str, int
] = {}  # by instruction set, the runner's function that loaded kernels call for a parallel loop
_lock = threading.Lock()


class KernelCache:
    """Kernels of one instruction set.

    folder   where shared objects are stored, by default a folder of the user's cache; None: in memory only
    compiled number of kernels that this object compiled
    """

    def __init__(self, isa: Isa, folder: Path | str | None = "") -> None:
        self.isa = isa
        self.compiled = 0
        self.folder = _default_folder(isa) if isinstance(folder, str) else folder

    def entries(self, kernels: Iterable[Kernel]) -> Mapping[Kernel, Entry]:
        """Return the entry of each kernel: from memory, from a file, or compiled now.

        Raises BackendError if the instruction set is another machine's, or if a kernel does not compile.
        """
        self.refuse_other_machine()
        wanted = list(
            dict.fromkeys([Runner(), *kernels])
        )  # the runner first: other kernels launch their loops through it
        with _lock:
            absent = [k for k in wanted if self._key(k) not in _loaded and not self._found(k)]
            for group in (absent[:1], absent[1:]):
                if group:
                    self._compile(group)
        return {kernel: _loaded[self._key(kernel)] for kernel in wanted}

    def refuse_other_machine(self) -> None:
        """Raise BackendError if this machine does not have the instruction set."""
        if not runs_here(self.isa):
            raise BackendError(
                f"kernels for {self.isa} do not run on this machine",
                hint="read them (`source`, `assembly`), or compile for Target('cpu')",
            )

    def path(self, kernel: Kernel) -> Path | None:
        """Return the path of a kernel's file, which may not exist. None if the kernel is kept in memory only."""
        if any(f"op={op!r}" in kernel.key for op in ADDED):  # the key does not cover the code of added ops
            return None
        digest = hashlib.sha256("\n".join(self._key(kernel)).encode()).hexdigest()[:32]
        return None if self.folder is None else self.folder / f"{kernel.title[:48]}-{digest}.so"

    # -- files -----------------------------------------------------------------------------------------------

    def _key(self, kernel: Kernel) -> tuple[str, str]:
        return self.isa.name, f"{type(kernel).__module__}.{kernel.key}"

    def _found(self, kernel: Kernel) -> bool:
        """Load a kernel's file if it exists, is complete, and was written by this user."""
        path = self.path(kernel)
        if path is None or not path.is_file() or not is_private(path.parent):
            return False
        try:
            data = path.read_bytes()
        except OSError:
            return False
        if len(data) <= _DIGEST or hashlib.sha256(data[:-_DIGEST]).digest() != data[-_DIGEST:]:
            return False
        return self._load(kernel, path)

    def _load(self, kernel: Kernel, path: Path) -> bool:
        """Load a shared object. Return False on failure, for example from a disk mounted noexec."""
        try:
            library = ctypes.CDLL(str(path))
            entry = getattr(library, f"__tvm_ffi_{_SYMBOL}")
        except (OSError, AttributeError):
            return False
        if isinstance(kernel, Runner):
            _variable(library, POOL).value = tvm_runtime.launcher()
            _launchers[self.isa.name] = ctypes.cast(getattr(library, LAUNCH), ctypes.c_void_p).value or 0
        if hasattr(library, "__TVMBackendParallelLaunch"):
            launch = _launchers.get(self.isa.name) or tvm_runtime.launcher()
            _variable(library, "__TVMBackendParallelLaunch").value = launch
        _alive.append(library)
        _loaded[self._key(kernel)] = ctypes.cast(entry, ctypes.c_void_p).value or 0, 0
        return True

    # -- compiling -------------------------------------------------------------------------------------------

    def _compile(self, kernels: list[Kernel]) -> None:
        self.compiled += len(kernels)
        linker = _linker()
        if linker is None:
            for kernel in kernels:
                self._compile_in_memory(kernel)
            return
        if self.folder is not None:
            sweep(self.folder)
        with tempfile.TemporaryDirectory(prefix="treadle-") as scratch:
            with ThreadPoolExecutor(max_workers=min(len(kernels), os.cpu_count() or 1)) as pool:
                made = list(pool.map(lambda k: self._shared_object(k, linker, Path(scratch)), kernels))
            for kernel, (data, built) in zip(kernels, made, strict=True):
                kept = self._kept(kernel, data)
                if not (kept is not None and self._load(kernel, kept)) and not self._load(kernel, built):
                    self._compile_in_memory(kernel)

    def _shared_object(self, kernel: Kernel, linker: tuple[str, ...], scratch: Path) -> tuple[bytes, Path]:
        stem = scratch / hashlib.sha256(kernel.key.encode()).hexdigest()[:16]
        module = compile_module(kernel, self.isa)
        module.write_to_file(str(stem.with_suffix(".o")), "o")
        built = stem.with_suffix(".so")
        done = subprocess.run(
            [*linker, "-o", str(built), str(stem.with_suffix(".o"))], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise BackendError(f"kernel {kernel.title} does not link", received=done.stderr.strip()[:500])
        return built.read_bytes(), built

    def _kept(self, kernel: Kernel, data: bytes) -> Path | None:
        """Write the kernel's file and return its path. None if the folder is not writable, or others can write it."""
        path = self.path(kernel)
        if path is None:
            return None
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not is_private(path.parent):
                return None
            with replacing(path) as file:
                file.write(data + hashlib.sha256(data).digest())
        except OSError:
            return None
        return path

    def _compile_in_memory(self, kernel: Kernel) -> None:
        """Compile without a linker: the entry is the address and handle of the function object from TVM's loader."""
        compiled = _executable(kernel, self.isa).jit() if kernel.llvm is None else compile_module(kernel, self.isa)
        function = compiled[_SYMBOL]
        _alive.append(function)
        handle = int(function.__chandle__())
        safe_call = ctypes.c_void_p.from_address(handle + _OBJECT_HEADER).value or 0
        _loaded[self._key(kernel)] = safe_call, handle


def _variable(library: ctypes.CDLL, name: str) -> ctypes.c_void_p:
    return ctypes.c_void_p.in_dll(library, name)


def compile_module(kernel: Kernel, isa: Isa) -> Any:
    """Compile a kernel with TVM and return its module: `write_to_file(path, "o" | "s" | "ll")`."""
    if kernel.llvm is None:
        return _executable(kernel, isa).mod
    import tvm

    with tempfile.TemporaryDirectory(prefix="treadle-") as folder:
        path = Path(folder) / "kernel.ll"
        path.write_text(_machine_lines(isa) + kernel.llvm)
        return tvm.runtime.load_module(str(path))


def _machine_lines(isa: Isa) -> str:
    """Return the lines of an LLVM module that describe its target, as TVM writes them."""
    text = str(_executable(_Nothing(), isa).mod.inspect_source("ll"))
    return "".join(f"{line}\n" for line in text.splitlines() if line.startswith("target "))


@dataclass(frozen=True)
class _Nothing(Kernel):
    """An empty kernel."""

    def emit(self, k: Emitter) -> None:
        k.size("n")
        with k.loop(1):
            pass


def assembly(kernel: Kernel, isa: Isa) -> str:
    """Return a kernel's assembly for any instruction set."""
    return str(compile_module(kernel, isa).inspect_source("s"))


def tvm_script(kernel: Kernel, isa: Isa, name: str | None = None) -> str:
    """Return a kernel as TVMScript, under its title or another name."""
    from treadle.backends.tvm.kernels.emitter import primfunc

    text = str(primfunc(kernel, isa, name or kernel.title).script(show_meta=False))
    return text[text.index("@T.prim_func") :].rstrip() + "\n"


def _executable(kernel: Kernel, isa: Isa) -> Any:
    import tvm

    from treadle.backends.tvm.kernels.emitter import primfunc

    module = tvm.IRModule({_SYMBOL: primfunc(kernel, isa, _SYMBOL)})
    try:
        with tvm.transform.PassContext(opt_level=3, config=_OPTIONS):
            return tvm.compile(module, target=tvm.target.Target(isa.llvm))
    except Exception as error:  # TVM raises many types
        raise BackendError(f"kernel {kernel.title} does not compile for {isa}", received=str(error)[-2000:]) from error


@cache
def _linker() -> tuple[str, ...] | None:
    for name, *options in _LINKERS:
        found = shutil.which(name)
        if found is not None:
            return (found, *options)
    return None


def _default_folder(isa: Isa) -> Path | None:
    try:
        folder = cache_folder() / "kernels" / f"{isa.name}-{_version(isa)}"
    except UsageError:
        return None
    if folder.is_dir():
        mark_used(folder)
    else:  # a new version: older ones may be unused
        forget_unused(folder.parent, _VERSIONS)
    return folder


_VERSIONS = re.compile(r"[\w-]+-[0-9a-f]{16}")


@cache
def _version(isa: Isa) -> str:
    """Return a hash of everything besides the spec that determines the code: TVM, the options, the generators."""
    digest = hashlib.sha256(f"{tvm_runtime.version()} {sorted(isa.llvm.items())} {_OPTIONS}".encode())
    for file in _sources():
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def _sources() -> list[Traversable]:
    """Return the generators' modules, in the same order on every machine."""

    def below(folder: Traversable) -> Iterator[Traversable]:
        for entry in sorted(folder.iterdir(), key=lambda e: e.name):
            if entry.is_dir():
                yield from below(entry)
            elif entry.name.endswith(".py"):
                yield entry

    elsewhere = [importlib.resources.files(package) / name for package, name in _ELSEWHERE]
    return [*below(importlib.resources.files("treadle.backends.tvm.kernels")), *elsewhere]

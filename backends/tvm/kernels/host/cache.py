"""The kernel cache: compiled kernels in memory, and as shared objects in the user's cache folder, by content.

    entries = KernelCache(isa).entries([Matmul(48), ...])

A kernel is compiled if the cache has no file under its key. The key is a hash of the spec, the instruction set, TVM's
version and the source of the generators, so it identifies the code completely. Files are written atomically and
contain a hash of their bytes, which is checked before the loader sees them (`stored_kernels`). Even if processes are
killed at any moment, or several processes fill the cache at once, a file is either correct or compiled again.

If the machine has no linker, a linker that fails, or no folder that is private to the user, kernels are kept in memory
only, and every process compiles them: `notes` has the reason. Files in a folder that others can write are never
executed.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.resources
import os
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treadle.backends.tvm.kernels.arithmetic.vector_math import ADDED
from treadle.backends.tvm.kernels.devices.device import Device
from treadle.backends.tvm.kernels.host import linking, tvm_runtime
from treadle.backends.tvm.kernels.host.runner import CONNECT, Runner
from treadle.backends.tvm.kernels.host.stored_kernels import read_stored, usual_folder, version_folder, write_stored
from treadle.backends.tvm.kernels.isa import Isa, runs_here
from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.files.whole_files import sweep
from treadle.ir.errors import BackendError, Hint

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter

_SYMBOL = "kernel"
_OPTIONS = {"tirx.disable_storage_rewrite": True}  # the pass merges register tiles, which then spill
_ELSEWHERE = (
    ("treadle.backends", "bfloat16.py"),
    ("treadle.ir", "layouts.py"),
    ("treadle.ir.ops", "rounding.py"),
)  # modules that generators compute with
_OBJECT_HEADER = 24  # bytes before a function object's first field, its address (TVMFFIObject)

Entry = tuple[int, int]
"""Address and first argument of compiled code, which is called through TVM's interface."""

_loaded: dict[tuple[str, str], Entry] = {}
_alive: list[Any] = []  # owners of the addresses
_launchers: dict[str, int] = {}  # the runner's function for parallel loops, by instruction set
_lock = threading.Lock()


class KernelCache:
    """Kernels of one instruction set.

    folder   where shared objects are stored, by default a folder of the user's cache; None: in memory only
    compiled number of kernels that this object compiled
    """

    def __init__(self, isa: Isa, folder: Path | str | None = "") -> None:
        self.isa = isa
        self.compiled = 0
        self._folder = folder
        self._unstored: Counter[str] = Counter()  # numbers of kernels that no file has, by the reason

    @cached_property
    def folder(self) -> Path | None:
        """The folder of shared objects; None: kernels are in memory only."""
        return version_folder(_folder_name(self.isa)) if isinstance(self._folder, str) else self._folder

    @property
    def notes(self) -> list[str]:
        """Descriptions of kernels that this object compiled and could not store in the usual place."""
        made = [
            f"{count} kernel{'s are' if count > 1 else ' is'} kept in memory, so every process compiles them: {reason}"
            for reason, count in self._unstored.items()
        ]
        if self.compiled and self.folder is not None and isinstance(self._folder, str):
            usual = usual_folder(_folder_name(self.isa))
            if self.folder != usual:
                made.append(f"kernels are stored in {self.folder}, since {usual} is not private to this user")
        return made

    def entries(self, kernels: Iterable[Kernel]) -> Mapping[Kernel, Entry]:
        """Return the entry of each kernel: from memory, from a file, or compiled now.

        Raises BackendError if the instruction set is another machine's, or if a kernel does not compile.
        """
        self.refuse_other_machine()
        runner = Runner()  # the first, since a library cannot be loaded before it: its loops are launched through it
        wanted = [runner, *(k for k in dict.fromkeys(kernels) if k != runner)]
        with _lock:
            for group in (wanted[:1], wanted[1:]):
                absent = [k for k in group if self._key(k) not in _loaded and not self._found(k)]
                if absent:
                    self._compile(absent)
        return {kernel: _loaded[self._key(kernel)] for kernel in wanted}

    def refuse_other_machine(self) -> None:
        """Raise BackendError if this machine does not have the instruction set."""
        if not runs_here(self.isa):
            readable = "`source`" if isinstance(self.isa, Device) else "`source`, `assembly`"
            raise BackendError(
                f"kernels for {self.isa} do not run on this machine",
                hint=Hint(
                    f'target="cpu"; or read them ({readable})',
                    f"--target cpu; or `treadle inspect MODEL --source --target {self.isa}`, which prints the program",
                ),
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
        return path is not None and read_stored(path) is not None and self._load(kernel, path)

    def _load(self, kernel: Kernel, path: Path) -> bool:
        """Load a shared object. Return False on failure, for example from a disk mounted noexec."""
        try:
            library = ctypes.CDLL(str(path))
            entry = _address(library, _SYMBOL)
            if isinstance(kernel, Runner):
                self._connect(_address(library, CONNECT), 0)
        except (OSError, AttributeError):
            return False
        if hasattr(library, "__TVMBackendParallelLaunch"):
            launch = _launchers[self.isa.name]
            ctypes.c_void_p.in_dll(library, "__TVMBackendParallelLaunch").value = launch
        _alive.append(library)
        _loaded[self._key(kernel)] = entry, 0
        return True

    def _connect(self, address: int, handle: int) -> None:
        """Connect the runner with TVM's pool, and the kernels that are loaded after it with the runner."""
        _launchers[self.isa.name] = tvm_runtime.call(address, handle, tvm_runtime.launcher())

    # -- compiling -------------------------------------------------------------------------------------------

    def _compile(self, kernels: list[Kernel]) -> None:
        self.compiled += len(kernels)
        if self.folder is not None:
            sweep(self.folder)
        with (
            tempfile.TemporaryDirectory(prefix="treadle-") as scratch,
            ThreadPoolExecutor(max_workers=min(len(kernels), os.cpu_count() or 1)) as pool,
        ):
            for kernel, (module, built) in zip(
                kernels, pool.map(lambda k: self._built(k, Path(scratch)), kernels), strict=True
            ):
                stored = None if built is None else self._stored(kernel, built.read_bytes())
                if stored is not None and self._load(kernel, stored):
                    continue
                self._unstored[self._why_unstored(built, stored)] += 1
                if built is None or not self._load(kernel, built):
                    self._load_from_memory(kernel, module)

    def _built(self, kernel: Kernel, scratch: Path) -> tuple[Any, Path | None]:
        """Return a kernel's module, and its shared object in a folder; None if it cannot be linked."""
        module = compile_module(kernel, self.isa)
        stem = scratch / hashlib.sha256(f"{type(kernel).__module__}.{kernel.key}".encode()).hexdigest()[:16]
        compiled, library = stem.with_suffix(".o"), stem.with_suffix(".so")
        module.write_to_file(str(compiled), "o")
        return module, library if linking.link(compiled, library) else None

    def _stored(self, kernel: Kernel, data: bytes) -> Path | None:
        """Write the kernel's file and return its path. None if the folder is not writable, or others can write it."""
        path = self.path(kernel)
        return path if path is not None and write_stored(path, data) else None

    def _why_unstored(self, built: Path | None, stored: Path | None) -> str:
        if built is None:
            return linking.why_not()
        if stored is not None:
            return f"the system loads no library from {stored.parent}"
        if self.folder is None:
            return "there is no cache folder of this user's: TREADLE_CACHE can name one"
        return f"{self.folder} cannot be written, or others can write it"

    def _load_from_memory(self, kernel: Kernel, module: Any) -> None:
        """Load a compiled module with TVM's loader: entries are the addresses and handles of its function objects."""
        launch = tvm_runtime.launcher() if isinstance(kernel, Runner) else _launchers[self.isa.name]
        with tvm_runtime.loops_through(launch):
            function = module[_SYMBOL]
        if isinstance(kernel, Runner):
            self._connect(*_entry(module[CONNECT]))
        _loaded[self._key(kernel)] = _entry(function)


def _address(library: ctypes.CDLL, name: str) -> int:
    return ctypes.cast(getattr(library, f"__tvm_ffi_{name}"), ctypes.c_void_p).value or 0


def _entry(function: Any) -> Entry:
    """Return the entry of a function object of TVM's, which is kept alive."""
    _alive.append(function)
    handle = int(function.__chandle__())
    return ctypes.c_void_p.from_address(handle + _OBJECT_HEADER).value or 0, handle


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
    from treadle.backends.tvm.kernels.host.llvm_emitter import primfunc

    text = str(primfunc(kernel, isa, name or kernel.title).script(show_meta=False))
    return text[text.index("@T.prim_func") :].rstrip() + "\n"


def _executable(kernel: Kernel, isa: Isa) -> Any:
    import tvm

    from treadle.backends.tvm.kernels.host.llvm_emitter import primfunc

    module = tvm.IRModule({_SYMBOL: primfunc(kernel, isa, _SYMBOL)})
    try:
        with tvm.transform.PassContext(opt_level=3, config=_OPTIONS):
            return tvm.compile(module, target=tvm.target.Target(isa.llvm))
    except Exception as error:  # TVM raises many types
        raise BackendError(f"kernel {kernel.title} does not compile for {isa}", received=str(error)[-2000:]) from error


def _folder_name(isa: Isa) -> str:
    return f"{isa.name}-{_version(isa)}"


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

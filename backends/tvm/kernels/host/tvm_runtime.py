"""The part of TVM that runs kernels, through its C interface: without importing the package, which takes seconds.

address = launcher()          the function that kernels call for a parallel loop
set_threads(2)                number of threads for kernels called from this thread
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from treadle.backends.tvm.kernels.host.platforms import add_folders, this_platform
from treadle.backends.tvm.kernels.host.woken_threads import WokenThreads, thread_numbers
from treadle.files.installation import pip_install
from treadle.ir.errors import BackendError, Hint

SPINS = "TVM_THREAD_POOL_SPIN_COUNT"
"""Number of times that an idle thread of TVM's pool yields its core before it sleeps. The default is 300,000, which
takes minutes on a busy machine, and the end of the process waits for it.
"""

_INT = 1  # the type index of an integer in an argument of the interface


def missing() -> str | None:
    """Return None if TVM is installed, else the reason why it cannot be used."""
    if importlib.util.find_spec("tvm") is None or importlib.util.find_spec("tvm_ffi") is None:
        return this_platform().lacks_wheel() or f"TVM is not installed: {pip_install('tvm')}"
    return None


def version() -> str:
    """Return the version of the installed package, read from its metadata."""
    from importlib.metadata import version as installed

    return f"{installed('apache-tvm')}/{installed('apache-tvm-ffi')}"


def launcher() -> int:
    """Return the address of the function that runs a parallel loop on TVM's thread pool."""
    return ctypes.cast(_libraries()[1].TVMBackendParallelLaunch, ctypes.c_void_p).value or 0


@contextmanager
def loops_through(launch: int) -> Iterator[None]:
    """A context in which kernels that TVM loads into memory get this function's address for parallel loops."""
    register, name = _libraries()[0].TVMFFIEnvModRegisterContextSymbol, b"__TVMBackendParallelLaunch"
    register(name, ctypes.c_void_p(launch))
    try:
        yield
    finally:
        register(name, ctypes.c_void_p(launcher()))


def call(address: int, handle: int, number: int) -> int:
    """Call compiled code, by its address and first argument, on an integer. Return its result, an integer."""
    prototype = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 2, ctypes.c_int32, ctypes.c_void_p)
    argument, result = _Any(_INT, 0, number), _Any()
    if prototype(address)(handle, ctypes.addressof(argument), 1, ctypes.addressof(result)):
        raise BackendError("a function of a kernel's module failed", received=str(number))
    return int(result.value)


def set_threads(count: int) -> None:
    """Let kernels called from this thread use `count` threads. Each calling thread has its own pool.

    TVM reads its maximum from the environment, each time that it needs it; the default is half of the cores. Therefore
    this function sets the environment variable. The caller's count overrides a value set by the user.
    """
    if getattr(_configured, "count", None) == count or pool_is_lost():
        return
    os.environ.setdefault(SPINS, "1000")
    os.environ["TVM_BIND_THREADS"] = "0"  # the system schedules the threads: a fixed core may be busy
    most = max(count, os.cpu_count() or 1)
    os.environ["TVM_NUM_THREADS"] = str(most)
    before = thread_numbers()
    if not hasattr(_configured, "count") and count < most:
        _call("runtime.config_threadpool", 1, most)  # a pool that starts smaller never uses its other threads
    _call("runtime.config_threadpool", 1, count)
    if not hasattr(_configured, "count"):
        _configured.others = WokenThreads(sorted(thread_numbers() - before))
    _configured.count = count


@contextmanager
def at_work() -> Iterator[None]:
    """A context in which the calling thread runs kernels."""
    if getattr(_configured, "count", 1) == 1 or pool_is_lost():
        yield
        return
    with _configured.others.apart():
        yield


def pool_is_lost() -> bool:
    """Return True if this process was forked and the calling thread's pool exists only in the parent process.

    A parallel loop would wait forever for missing threads, so it must run on the calling thread alone.
    """
    return getattr(_configured, "lost", False)


def threads() -> int:
    """Return the number of threads that kernels called from this thread use."""
    return _call("runtime.NumThreads")


_configured = threading.local()


def _forked() -> None:
    """Mark the pool as lost in a forked process, on its only thread."""
    _configured.lost = hasattr(_configured, "count")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


class _Any(ctypes.Structure):
    """An argument of the interface: a type index, padding, and eight bytes."""

    _fields_ = [("type_index", ctypes.c_int32), ("padding", ctypes.c_int32), ("value", ctypes.c_int64)]


class _Bytes(ctypes.Structure):
    _fields_ = [("data", ctypes.c_char_p), ("size", ctypes.c_size_t)]


@cache
def _libraries() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    """Load the interface and the runtime, so that kernels find the functions they refer to."""
    folders = {}
    for name in ("tvm_ffi", "tvm"):
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise BackendError("the tvm backend is not available", received=missing())
        folders[name] = Path(next(iter(spec.submodule_search_locations)))
    add_folders(*(folder / "lib" for folder in folders.values()))
    add_folders(*(folder.with_name(f"apache_{name}.libs") for name, folder in folders.items()))
    platform = this_platform()
    try:
        interface, runtime = (
            ctypes.CDLL(str(folders[package] / "lib" / platform.library(name)), mode=ctypes.RTLD_GLOBAL)
            for package, name in (("tvm_ffi", "tvm_ffi"), ("tvm", "tvm_runtime"))
        )
    except OSError as error:
        hint = pip_install("tvm", options="--force-reinstall")
        if platform.lacks_wheel():
            hint = Hint('backend="numpy" or "torch"', "--backend numpy or torch")
        received = "\n".join(filter(None, (str(error), platform.lacks_wheel())))
        raise BackendError("TVM's runtime cannot be loaded", received=received, hint=hint) from error
    return interface, runtime


@cache
def _function(name: str) -> ctypes.c_void_p:
    interface, _ = _libraries()
    encoded, found = name.encode(), ctypes.c_void_p()
    key = _Bytes(encoded, len(encoded))
    if interface.TVMFFIFunctionGetGlobal(ctypes.byref(key), ctypes.byref(found)) or not found.value:
        raise BackendError(f"TVM's runtime has no {name}", received=version())
    return found


def _call(name: str, *numbers: int) -> int:
    arguments = (_Any * len(numbers))(*[_Any(_INT, 0, n) for n in numbers])
    result = _Any()
    if _libraries()[0].TVMFFIFunctionCall(_function(name), arguments, len(numbers), ctypes.byref(result)):
        raise BackendError(f"TVM's {name} failed", received=", ".join(map(str, numbers)))
    return int(result.value)

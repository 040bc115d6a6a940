"""Platforms: an operating system on a machine, and the names by which TVM, LLVM and linkers know it."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}  # by the names of Windows and macOS
_LIBRARIES = {"Linux": "lib{}.so", "Darwin": "lib{}.dylib", "Windows": "{}.dll"}
_WHEELS = {("Linux", "x86_64"), ("Linux", "aarch64"), ("Darwin", "aarch64"), ("Windows", "x86_64")}
_OLDEST_GLIBC = (2, 27)
_HAVE_WHEELS = "Linux on x86-64 and arm64 with glibc 2.27 or newer, macOS on arm64, Windows on x86-64"
_ELF = ("ld", "-shared", "-o"), ("ld.lld", "-shared", "-o")
_DRIVERS = ("cc", "-shared", "-nostdlib", "-o"), ("clang", "-shared", "-nostdlib", "-o")
_MACH = ("-dynamiclib", "-undefined", "dynamic_lookup", "-o")
_LINKERS: dict[str, tuple[tuple[str, ...], ...]] = {
    "Linux": (*_ELF, *_DRIVERS),
    "Darwin": (("cc", *_MACH), ("clang", *_MACH)),
    "Windows": (),  # a DLL needs an import library of TVM's and a C runtime, which no default installation has
}


@dataclass(frozen=True)
class Platform:
    """An operating system, as `platform.system()` names it, and a machine, as Linux names it.

    glibc   the version of the C library, () if it is another one
    """

    system: str
    machine: str
    glibc: tuple[int, ...] = ()

    def library(self, name: str) -> str:
        """Return the file name of a shared library: `libtvm_ffi.so`, `libtvm_ffi.dylib` or `tvm_ffi.dll`."""
        return _LIBRARIES.get(self.system, _LIBRARIES["Linux"]).format(name)

    def triple(self, machine: str) -> str | None:
        """Return LLVM's triple for code of a machine; None: the default of TVM's LLVM.

        Code for this machine is in the system's object format. Code for any other machine can only be read, and is
        Linux's, so that every platform prints the same.
        """
        if machine == self.machine and self.system == "Darwin":
            return f"{'arm64' if machine == 'aarch64' else machine}-apple-macosx11.0.0"
        if machine == self.machine and self.system == "Windows":
            return f"{machine}-pc-windows-msvc"
        return None if machine == self.machine == "x86_64" else f"{machine}-unknown-linux-gnu"

    @property
    def linkers(self) -> tuple[tuple[str, ...], ...]:
        """Commands that link a shared library, in the order of preference: the file to write and the objects follow.

        On Linux they link no C library, since the process has loaded one. macOS requires one.
        """
        return _LINKERS.get(self.system, ())

    @property
    def linker_check(self) -> tuple[str, ...]:
        """A command that fails if no linker is installed; (): none is needed.

        Without Apple's command line tools, `cc` exists on macOS, and opens a window that offers to install them.
        """
        return ("xcode-select", "-p") if self.system == "Darwin" else ()

    def lacks_wheel(self) -> str | None:
        """Return None if TVM has a wheel for this platform, else a message that names the platforms that have one."""
        here = f"{self.system} on {self.machine}"
        if (self.system, self.machine) in _WHEELS:
            if self.system != "Linux" or self.glibc >= _OLDEST_GLIBC:
                return None
            version = ".".join(map(str, self.glibc))
            here += f" with glibc {version}" if version else " without glibc"
        return f"TVM has no wheel for {here}, only for {_HAVE_WHEELS}"


def this_platform() -> Platform:
    """Return the platform that this process runs on."""
    machine, version = platform.machine().lower(), ""
    if platform.system() == "Linux":
        with suppress(AttributeError, ValueError, OSError):  # another C library does not know this name
            version = (os.confstr("CS_GNU_LIBC_VERSION") or "").removeprefix("glibc ")
    numbers = tuple(int(part) for part in version.split(".") if part.isdigit())
    return Platform(platform.system(), _MACHINES.get(machine, machine), numbers)


def add_folders(*folders: Path) -> None:
    """Let Windows find the libraries that a library in these folders needs; other systems find them by themselves."""
    if hasattr(os, "add_dll_directory"):
        for folder in folders:
            if folder.is_dir():
                os.add_dll_directory(str(folder))

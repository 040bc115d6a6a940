"""Features of an x86-64 CPU, read from the CPU itself: CPUID, and the registers that the system saves, XGETBV.

Linux lists features in /proc/cpuinfo too. Under an emulator, and in some containers, that is another CPU's list. Where
the two disagree, a child process executes one instruction of each feature.

Sources: Intel's Software Developer's Manual, volume 2 (CPUID, XGETBV) and volume 1, chapter 13 (the bits of XCR0);
AMD64 Architecture Programmer's Manual, volume 3, appendix E.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path

_BITS: Mapping[tuple[int, int], Mapping[tuple[int, int], str]] = {
    (1, 0): {(2, 12): "fma", (2, 20): "sse4_2", (2, 22): "movbe", (2, 23): "popcnt", (2, 29): "f16c"},
    (7, 0): {
        (1, 3): "bmi1",
        (1, 5): "avx2",
        (1, 8): "bmi2",
        (1, 16): "avx512f",
        (1, 17): "avx512dq",
        (1, 28): "avx512cd",
        (1, 30): "avx512bw",
        (1, 31): "avx512vl",
        (2, 11): "avx512_vnni",
        (3, 22): "amx_bf16",
        (3, 24): "amx_tile",
        (3, 25): "amx_int8",
    },
    (7, 1): {(0, 5): "avx512_bf16"},
}
"""Features, as Linux names them, by leaf and subleaf of CPUID: their register (eax, ebx, ecx, edx) and bit."""

_OSXSAVE = 2, 27  # register and bit of leaf 1: XGETBV exists
_YMM, _ZMM, _TILES = 0b110, 0b1110_0110, 0b11 << 17  # bits of XCR0: registers that the system saves

_EXAMPLES: Mapping[str, str] = {
    "popcnt": "f30fb8c0",  # popcnt eax, eax
    "sse4_2": "f20f38f0c0",  # crc32 eax, al
    "avx2": "c5fdfec0",  # vpaddd ymm0, ymm0, ymm0
    "fma": "c4e27db8c0",  # vfmadd231ps ymm0, ymm0, ymm0
    "f16c": "c4e27d13c0",  # vcvtph2ps ymm0, xmm0
    "bmi1": "c4e278f2c0",  # andn eax, eax, eax
    "bmi2": "c4e279f7c0",  # shlx eax, eax, eax
    "movbe": "0f38f04424f8",  # movbe eax, [rsp - 8]
    "avx512f": "62f17d48fec0",  # vpaddd zmm0, zmm0, zmm0
    "avx512bw": "62f17d48fcc0",  # vpaddb zmm0, zmm0, zmm0
    "avx512dq": "62f2fd4840c0",  # vpmullq zmm0, zmm0, zmm0
    "avx512cd": "62f27d48c4c0",  # vpconflictd zmm0, zmm0
    "avx512vl": "62f2fd281fc0",  # vpabsq ymm0, ymm0
    "avx512_bf16": "62f27e4852c0",  # vdpbf16ps zmm0, zmm0, zmm0
    "avx512_vnni": "62f27d4850c1",  # vpdpbusd zmm0, zmm0, zmm1
    "amx_tile": "c4e27849c0",  # tilerelease
}
"""One instruction of each feature, in hexadecimal. Products of tiles need configured tiles, so they have none here."""

_STORE = "418900 41895804 41894808 4189500c"  # mov [r8], eax; [r8 + 4], ebx; [r8 + 8], ecx; [r8 + 12], edx
_ARGUMENTS = {
    "posix": "4989d0 89f8 89f1",  # mov r8, rdx; mov eax, edi; mov ecx, esi
    "nt": "89c8 89d1",  # mov eax, ecx; mov ecx, edx; r8 is the third argument already
}
_CPUID = "53 {} 0fa2 {} 5b c3"  # push rbx; ARGUMENTS; cpuid; STORE; pop rbx; ret
_XGETBV = "31c9 0f01d0 48c1e220 4809d0 c3"  # xor ecx, ecx; xgetbv; shl rdx, 32; or rax, rdx; ret
_WIDE_END = "c5f877"  # vzeroupper
_RETURN = "c3"


@cache
def cpu_flags() -> frozenset[str]:
    """Return the features of this machine that kernels may use, as Linux names them; empty if they cannot be read."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return frozenset()
    found, listed = read_cpuid(), read_cpuinfo()
    if found is None or listed is None:
        return found or listed or frozenset()
    if found == listed or executes(found) is not False:
        return found
    return frozenset(flag for flag in found if executes([flag]))


def read_cpuinfo() -> frozenset[str] | None:
    """Return the features of ours that Linux lists; None if there is no such list."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return None
    lines = (line.partition(":") for line in text.splitlines())
    listed = next((value.split() for name, _, value in lines if name.strip() == "flags"), None)
    known = frozenset(flag for flags in _BITS.values() for flag in flags.values())
    return None if listed is None else known & frozenset(listed)


def read_cpuid() -> frozenset[str] | None:
    """Return the features of ours that the CPU reports and whose registers the system saves.

    None if this process cannot execute code that it writes.
    """
    query = _function(_CPUID.format(_ARGUMENTS.get(os.name, ""), _STORE), None, ctypes.c_uint32, ctypes.c_uint32)
    saved = _function(_XGETBV, ctypes.c_uint64)
    if query is None or saved is None:
        return None

    def registers(leaf: int, subleaf: int) -> list[int]:
        words = (ctypes.c_uint32 * 4)()
        query(leaf, subleaf, ctypes.addressof(words))
        return list(words)

    def has(words: list[int], place: tuple[int, int]) -> bool:
        return bool(words[place[0]] >> place[1] & 1)

    last, last_of_7 = registers(0, 0)[0], 0
    if last >= 7:
        last_of_7 = registers(7, 0)[0]
    leaves = [leaf for leaf in _BITS if leaf[0] <= last and (leaf[0] != 7 or leaf[1] <= last_of_7)]
    words = {leaf: registers(*leaf) for leaf in leaves}
    flags = {flag for leaf in leaves for place, flag in _BITS[leaf].items() if has(words[leaf], place)}
    state = saved() if has(words[1, 0], _OSXSAVE) else 0
    return frozenset(flag for flag in flags if state & _needs(flag) == _needs(flag))


def _needs(flag: str) -> int:
    """Return the bits of XCR0 without which a feature cannot be used."""
    if flag.startswith("avx512"):
        return _ZMM
    if flag.startswith("amx"):
        return _TILES
    return _YMM if flag in ("avx2", "fma", "f16c") else 0


def executes(flags: Iterable[str]) -> bool | None:
    """Execute an instruction of each feature in a child process; return False if it ends the child.

    None if this system cannot fork, or this process cannot execute code that it writes.
    """
    wanted = sorted(flags)
    wide = _WIDE_END if any(_needs(flag) & _YMM for flag in wanted) else ""
    code = _function("".join(_EXAMPLES.get(flag, "") for flag in wanted) + wide + _RETURN, None)
    if code is None or sys.platform == "win32":
        return None
    library = ctypes.PyDLL(None)  # the child has one thread and no Python hooks: it runs the code and ends
    child = library.fork()
    if child == 0:
        library.signal(_SIGILL, None)  # a handler of the parent would print a traceback
        code()
        os._exit(0)
    return child > 0 and os.waitpid(child, 0)[1] == 0


_SIGILL = 4
_pages: list[object] = []  # code that functions point to


def _function(code: str, result: type | None, *arguments: type) -> Callable[..., int] | None:
    """Return machine code, in hexadecimal, as a function; None if the system forbids it."""
    data = bytes.fromhex(code)
    if sys.platform == "win32":
        kernel = ctypes.windll.kernel32
        kernel.VirtualAlloc.restype = ctypes.c_void_p
        commit_and_reserve, executable = 0x3000, 0x40
        address = kernel.VirtualAlloc(None, len(data), commit_and_reserve, executable)
        if not address:
            return None
        ctypes.memmove(address, data, len(data))
    else:
        try:
            page = mmap.mmap(
                -1,
                len(data),
                flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS,
                prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC,
            )
        except OSError:
            return None
        page.write(data)
        address = ctypes.addressof(ctypes.c_char.from_buffer(page))
        _pages.append(page)
    pointer = [ctypes.c_void_p] if arguments else []
    return ctypes.CFUNCTYPE(result, *arguments, *pointer)(address)

"""The report of `treadle doctor`: installed packages, the machine, and the packages that commands lack."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.table import Table

import treadle
from treadle.backends.registry import backend_names, find_backend
from treadle.backends.tvm.kernels.host.linking import linkers, why_not
from treadle.backends.tvm.kernels.host.platforms import this_platform
from treadle.backends.tvm.kernels.isa import host_isa
from treadle.backends.tvm.runtimes.machine_devices import LISTS, list_devices
from treadle.extras import OPTIONAL_PACKAGES
from treadle.files.installation import pip_install
from treadle.files.user_cache import cache_folder
from treadle.ir.errors import TreadleError
from treadle.ir.target import Target
from treadle.program.backend_choice import fastest_installed
from treadle.reporting import Facts
from treadle.reporting.counts import human
from treadle.reporting.tables import plain_table

_REQUIRED = ("numpy", "networkx", "rich", "typer")


def installation_facts() -> Facts:
    """Return the versions of packages, each backend's state, the machine, and for each command the missing packages.

    Sizes are in bytes. A version is None for a package that is not installed. A package that is installed but broken is
    reported as installed; PyTorch alone is imported, to look for GPUs.
    """
    return {
        "treadle": treadle.__version__,
        "python": platform.python_version(),
        "packages": [*_packages()],
        "backends": [_backend(name) for name in backend_names()],
        "auto": fastest_installed(),
        "machine": _machine(),
        "missing": [*_missing()],
    }


def _packages() -> Iterator[Facts]:
    for name in _REQUIRED:
        yield {"package": name, "version": _version(name), "extra": None, "use": "required"}
    for each in OPTIONAL_PACKAGES:
        installed = _version(each.distribution) if each.is_installed else None
        yield {"package": each.distribution, "version": installed, "extra": each.extra, "use": each.use}


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _backend(name: str) -> Facts:
    """Return a backend's name, and the reason why it cannot be used, or None."""
    try:
        return {"name": name, "reason": find_backend(name).available()}
    except TreadleError as error:  # another package's
        return {"name": name, "reason": error.what}


def _machine() -> Facts:
    here = this_platform()
    found: Facts = {
        "system": f"{here.system} on {here.machine}",
        "cores": Target("cpu").cores(),
        "memory": _memory_bytes(),
        "gpus": _gpus(),
        "devices": {kind: [each.name for each in list_devices(kind)] for kind in LISTS},
    }
    looks: dict[str, Callable[[], str]] = {"isa": lambda: host_isa().name, "cache": lambda: str(cache_folder())}
    for name, look in looks.items():
        try:
            found[name], found[f"{name}_error"] = look(), None
        except TreadleError as error:
            found[name], found[f"{name}_error"] = None, error.what
    found["cache_is_writable"] = found["cache"] is not None and _is_writable(Path(found["cache"]))
    found["linker"] = linkers()[0][0] if linkers() else None
    found["linker_error"] = None if found["linker"] else f"{why_not()}: kernels are compiled again in each process"
    return found


def _memory_bytes() -> int | None:
    """Return the machine's memory, or None if the system does not report it."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _gpus() -> list[str] | None:
    """Return the names of the GPUs that PyTorch finds, or None without PyTorch."""
    try:
        import torch

        return [str(torch.cuda.get_device_properties(i).name) for i in range(torch.cuda.device_count())]
    except (ImportError, OSError, RuntimeError):  # not installed, a library is missing, or a driver fails
        return None


def _is_writable(folder: Path) -> bool:
    """Return True if files can be written in a folder, which need not exist yet."""
    existing = next(each for each in (folder, *folder.parents) if each.exists())
    return os.access(existing, os.W_OK | os.X_OK)


def _missing() -> Iterator[Facts]:
    """Yield for each extra that lacks packages: the packages, their use, the commands, and pip's command."""
    absent = [each for each in OPTIONAL_PACKAGES if not each.is_installed]
    for extra in dict.fromkeys(each.extra for each in absent):
        of_extra = [each for each in absent if each.extra == extra]
        reason = this_platform().lacks_wheel() if extra == "tvm" else None
        yield {
            "packages": [each.distribution for each in of_extra],
            "use": "; ".join(dict.fromkeys(each.use for each in of_extra)),
            "commands": [*dict.fromkeys(name for each in of_extra for name in each.commands)],
            "install": None if reason else pip_install(extra),
            "reason": reason,
        }


def installation_lines(facts: Facts) -> Iterator[Table | str]:
    """Yield the tables and lines that `treadle doctor` prints."""
    yield f"treadle {facts['treadle']}, Python {facts['python']} ({sys.executable})\n"
    packages = plain_table("package", "version", "use", "extra", numbers=set())
    for each in facts["packages"]:
        packages.add_row(each["package"], each["version"] or "not installed", each["use"], each["extra"] or "")
    yield packages
    yield ""
    for each in facts["backends"]:
        default = "  (the default)" if each["name"] == facts["auto"] else ""
        yield f"backend {each['name']}: {each['reason'] or 'can be used'}{default}"
    machine = facts["machine"]
    memory = "unknown" if machine["memory"] is None else human(machine["memory"], "B")
    yield f"\nsystem   {machine['system']}, {machine['cores']} cores, {memory} of memory"
    yield f"kernels  for {machine['isa']}" if machine["isa"] else f"kernels  {machine['isa_error']}"
    yield f"linker   {machine['linker'] or machine['linker_error']}"
    writable = "" if machine["cache_is_writable"] else " (cannot be written; TREADLE_CACHE names another folder)"
    yield f"cache    {machine['cache'] or machine['cache_error']}{writable}"
    gpus = machine["gpus"]
    yield f"GPU      {'unknown without PyTorch' if gpus is None else ', '.join(gpus) or 'PyTorch finds none'}"
    shown = "; ".join(f"{kind}: {', '.join(names) or 'none'}" for kind, names in machine["devices"].items())
    yield f"devices  {shown}  (treadle targets)"
    if not facts["missing"]:
        yield "\nevery command has its packages"
        return
    missing = plain_table("missing", "for", "commands", "to add it", numbers=set())
    for each in facts["missing"]:
        commands = ", ".join(each["commands"])
        missing.add_row(", ".join(each["packages"]), each["use"], commands, each["install"] or each["reason"])
    yield ""
    yield missing

"""Modules beside a user's Python file, which the file imports as `python file.py` would: `from blocks import mlp`.

Only the file that the user names, and what it imports, is run. A neighbor takes precedence over installed packages, as
in Python, but not over the standard library. No bytecode is read or written (`treadle.frontends.declaration_files`).
After the import the neighbors leave `sys.modules`: two files in different folders may each have a `blocks.py`, and a
file that is loaded again reads its neighbors again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

_NAME = "__neighbors__"
"""The global variable of a loaded file that holds its `Neighbors`."""


class _SourceOnly(SourceFileLoader):
    """A loader that compiles a module's source at each import."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        code: CodeType = self.source_to_code(self.get_data(path), path)
        return code


class Neighbors:
    """The importable modules and packages of one folder: an entry of `sys.meta_path`.

    files    the files that were imported, in order
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.files: dict[Path, None] = {}
        self._modules: dict[str, ModuleType] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of a neighbor, or of a module in a package that is one."""
        top, _, _ = fullname.partition(".")
        if top in sys.stdlib_module_names or top == "treadle":
            return None
        within = [self.folder] if path is None else [Path(each) for each in path]
        stem = fullname.rpartition(".")[2]
        for folder in (each for each in within if each.is_relative_to(self.folder)):
            inside = folder / stem
            for file, locations in ((inside / "__init__.py", [str(inside)]), (folder / f"{stem}.py", None)):
                if file.is_file():
                    self.files[file] = None
                    loader = _SourceOnly(fullname, str(file))
                    return spec_from_file_location(fullname, file, loader=loader, submodule_search_locations=locations)
            if inside.is_dir() and PathFinder.find_spec(fullname, path) is None:
                spec = ModuleSpec(fullname, None, is_package=True)
                spec.submodule_search_locations = [str(inside)]
                return spec
        return None

    @contextmanager
    def importable(self) -> Iterator[None]:
        """Make the neighbors importable within the context."""
        before = set(sys.modules)
        sys.modules.update(self._modules)
        sys.meta_path.insert(0, self)
        try:
            yield
        finally:
            sys.meta_path.remove(self)
            for name in set(sys.modules) - before:
                if self._is_neighbor(sys.modules[name]):
                    self._modules[name] = sys.modules.pop(name)

    def _is_neighbor(self, module: Any) -> bool:
        """Return True for a module, or a folder without `__init__.py`, that this object found."""
        spec = getattr(module, "__spec__", None)
        if spec is None:
            return False
        if isinstance(spec.loader, _SourceOnly):
            return Path(spec.origin) in self.files
        places = spec.submodule_search_locations or ()
        return spec.origin is None and any(Path(each).is_relative_to(self.folder) for each in places)


def keep_neighbors(module: ModuleType, neighbors: Neighbors) -> None:
    """Store a file's neighbors with its module, for code that imports them later, or compares their files."""
    setattr(module, _NAME, neighbors)


def neighbors_of(function: Any) -> Neighbors | None:
    """Return the neighbors of the file that defines a function, if the file was loaded by its name."""
    found = getattr(function, "__globals__", {}).get(_NAME)
    return found if isinstance(found, Neighbors) else None


def importing_neighbors(function: Any) -> AbstractContextManager[None]:
    """Return a context in which a function may import the neighbors of its file."""
    found = neighbors_of(function)
    return nullcontext() if found is None else found.importable()

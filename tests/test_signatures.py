"""Golden texts of the parameters of functions with their defaults, and of dataclasses that can be changed or
compared.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tests.golden import Golden
from treadle.ir.op_registry import op

ROOT = Path(__file__).parents[1]
LAYERS = ("files", "ir", "frontends", "passes", "backends", "models", "runtime", "treadle")


def imported(dotted: str) -> Any:
    """Return a module of ours; skip if it needs a package that is not installed."""
    try:
        return import_module(dotted)
    except ImportError as error:
        pytest.skip(f"{dotted} needs {error.name}")


def test_parameters_of_functions(golden: Golden) -> None:
    """Every public function, class and method of the package's own folder, with its defaults."""
    lines: list[str] = []
    for path in sorted((ROOT / "treadle").rglob("*.py")):
        dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if "cli" in path.parts or path.name.startswith("__"):
            continue  # a page documents their options
        module = imported(dotted)
        for name, value in sorted(vars(module).items()):
            if getattr(value, "__module__", "") == dotted and not name.startswith("_") and callable(value):
                lines += signatures(f"{dotted}.{name}", value)
    golden("pages/signatures.txt", "\n".join(lines).replace(sys.executable, "PYTHON"))


def signatures(name: str, value: Any) -> Iterator[str]:
    """Yield the signature of a function, or of a class and its methods, if it has defaults."""
    with suppress(TypeError, ValueError):
        plain = [p.replace(annotation=p.empty) for p in inspect.signature(value).parameters.values()]
        if any(p.default is not p.empty for p in plain):
            yield re.sub(r" at 0x\w+", "", f"{name}{inspect.Signature(plain)}")
    for inner, method in sorted(vars(value).items()) if inspect.isclass(value) else ():
        function = getattr(method, "__func__", method)
        if inspect.isfunction(function) and not inner.startswith("_"):
            yield from signatures(f"{name}.{inner}", function)


def test_data_that_is_not_plain_and_frozen(golden: Golden) -> None:
    """Each dataclass that can be changed or is compared by identity, and each field that is excluded from a comparison
    or a text.
    """
    lines: list[str] = []
    for layer in LAYERS:
        for path in sorted((ROOT / layer).rglob("*.py")):
            dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            if path.name.startswith("__"):
                continue
            with suppress(ImportError):  # a third-party package that is not installed
                module = import_module(dotted if layer == "treadle" else f"treadle.{dotted}")
                lines += [
                    line for name, value in sorted(vars(module).items()) for line in exceptions(name, value, module)
                ]
    golden("pages/data.txt", "\n".join(lines))


def exceptions(name: str, value: Any, module: Any) -> Iterator[str]:
    if not (inspect.isclass(value) and "__dataclass_params__" in vars(value) and value.__module__ == module.__name__):
        return
    params = vars(value)["__dataclass_params__"]
    plain = {"frozen": True, "eq": True, "repr": True, "order": False, "unsafe_hash": False}
    other = [f"{key}={getattr(params, key)}" for key, usual in plain.items() if getattr(params, key) != usual]
    if other:
        yield f"{module.__name__}.{name}: {', '.join(other)}"
    for field in dataclasses.fields(value):
        if field.name in vars(value).get("__annotations__", {}):
            other = [key for key in ("init", "repr", "compare") if not getattr(field, key)]
            if other:
                yield f"{module.__name__}.{name}.{field.name}: without {', '.join(other)}"


def test_type_checkers_are_told_that_ops_are_frozen_and_take_keywords() -> None:
    report = op.__dataclass_transform__  # type: ignore[attr-defined]
    assert report["kw_only_default"]
    assert {**report, **report["kwargs"]}["frozen_default"]  # before Python 3.12, an unknown keyword

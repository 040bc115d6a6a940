"""Lists of PyTorch's exporters that are the same for each export of a process, and that are built once here.

PyTorch builds them for every export, because a caller may register operators in between. Tests register none. With
them, an export of a small module to ONNX takes a third of the time.
"""

from __future__ import annotations

from contextlib import suppress
from copy import copy
from functools import cache
from typing import Any


def remember_operators() -> None:
    """Let this process look up the composite operators once, which torch.export decomposes."""
    with suppress(ImportError, AttributeError):  # they are not public
        from torch._export import utils

        if not hasattr(utils._materialize_cpp_cia_ops, "cache_info"):
            utils._materialize_cpp_cia_ops = cache(utils._materialize_cpp_cia_ops)  # type: ignore[assignment]


def remember_functions() -> None:
    """Let this process read the ONNX functions of operators once, which torch.onnx.export writes; also
    `remember_operators`.
    """
    remember_operators()
    with suppress(ImportError, AttributeError):  # they are not public
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        if not hasattr(ONNXRegistry.from_torchlib, "remembers"):
            registry = _copied(cache(ONNXRegistry.from_torchlib))
            ONNXRegistry.from_torchlib = staticmethod(registry)  # type: ignore[method-assign,assignment]


def _copied(registry: Any) -> Any:
    """Return a function that returns a copy of a registry, because an export may add functions to its own."""

    def copied(*version: int, **options: int) -> Any:
        known = registry(*version, **options)
        made = copy(known)
        made.functions = {name: list(functions) for name, functions in known.functions.items()}
        return made

    copied.remembers = True  # type: ignore[attr-defined]
    return copied

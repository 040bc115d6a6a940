"""Every op as a method of patterns: `p.sigmoid(x)` is a term.

Type checkers and editors read op_terms.pyi, which declares the methods; `make golden` writes that file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from treadle.ir.op_registry import find_op


class OpTerms:
    """The ops as methods. The subclass `Vocabulary` adds the methods that only patterns have."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(name)
        find_op(name)
        return lambda *operands, **attributes: self._term(name, *operands, **attributes)

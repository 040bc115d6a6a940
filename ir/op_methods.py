"""Every op as a method: `b.softmax(x, axis=-1)`, looked up on first use.

Type checkers and editors read op_methods.pyi, which lists the methods; `make golden` writes that file.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from treadle.ir.errors import GraphError
from treadle.ir.op_registry import find_op


class OpMethods:
    """The ops as methods of `Builder`."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """Return an op as a method. The method is added to the class on first use, so that later lookups are cheap."""
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            cls = find_op(name)
        except GraphError as error:
            error.source = self.place()
            raise

        def method(self: Any, *operands: Any, name: str | None = None, **attributes: Any) -> Any:
            return self._add(cls, operands, name, attributes)

        setattr(OpMethods, name, method)
        return partial(method, self)

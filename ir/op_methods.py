"""Every op as a method: `b.softmax(x, axis=-1)`, looked up when it is first asked for.

Type checkers and editors read op_methods.pyi instead, where each method is spelled out; `make golden` writes it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from treadle.ir.errors import GraphError
from treadle.ir.op_registry import find_op


class OpMethods:
    """What a `Builder` has beside its own methods."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """An op as a method. It becomes one of the class when it is first asked for: looking it up is then cheap."""
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

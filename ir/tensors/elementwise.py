"""Elementwise ops as methods of a model's tensors: `x.exp()`, `x.maximum(y)`.

Type checkers and editors read elementwise.pyi, which lists the methods; `make golden` writes that file.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from treadle.ir.errors import GraphError
from treadle.ir.op_registry import OPS, find_op
from treadle.ir.operation import Op
from treadle.ir.rules.axis_rule_text import parse_rule
from treadle.ir.wording.op_signatures import op_signature
from treadle.ir.wording.python_protocols import PythonProtocols


def is_method(cls: type[Op]) -> bool:
    """Return True if an op is a method of tensors: it is elementwise, and has one or two operands and no required
    attribute.
    """
    return (
        cls.is_word
        and cls.arity[1] in (1, 2)
        and cls.rule_text is not None
        and parse_rule(cls.rule_text).is_elementwise
        and all(field.default is not dataclasses.MISSING for field in dataclasses.fields(cls))  # type: ignore[arg-type]
    )


class ElementwiseMethods(PythonProtocols):
    """Base of `Expr` with the elementwise ops."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        """Return an op as a method. The method is added to the class on first use, so that later lookups are cheap."""
        if name.startswith("__"):
            raise AttributeError(name)
        try:
            cls = find_op(name)
        except GraphError:
            raise self._no_such_method(name) from None
        if not is_method(cls):
            raise self._no_such_method(name)

        def method(self: Any, *operands: Any, **attributes: Any) -> Any:
            return self.builder._add(cls, (self, *operands), attributes.pop("name", None), attributes)

        method.__name__ = method.__qualname__ = name
        method.__doc__ = cls.__doc__
        method.__signature__ = op_signature(cls)  # type: ignore[attr-defined]
        setattr(ElementwiseMethods, name, method)
        return getattr(self, name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *(name for name, cls in OPS.items() if is_method(cls))})

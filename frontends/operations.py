"""Every op of the IR as a function of traced values: `t.softmax(x, axis=-1)`, also `t.ops.softmax`.

A function is built from the op's class on first access. Type checkers and editors read operations.pyi instead, which
lists every signature; `make golden` writes it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from treadle.frontends.call_errors import unknown_word
from treadle.frontends.dsl import trace
from treadle.ir.op_registry import OPS
from treadle.ir.operation import Op
from treadle.ir.wording.op_signatures import op_signature, text_attribute


@cache
def _function(cls: type[Op]) -> Callable[..., Any]:
    text = text_attribute(cls)

    def function(*operands: Any, **attributes: Any) -> Any:
        texts = [x for x in operands if isinstance(x, str)]
        if text is not None and len(texts) == 1 and attributes.get(text) is None:
            attributes[text] = texts[0]
            operands = tuple([x for x in operands if not isinstance(x, str)])
        return trace().apply(cls, *operands, **attributes)

    function.__name__ = function.__qualname__ = cls.name
    function.__doc__ = cls.__doc__
    function.__signature__ = op_signature(cls)
    return function


def __getattr__(name: str) -> Callable[..., Any]:
    if name.startswith("_"):
        raise AttributeError(name)
    if name not in OPS or not OPS[name].is_word:
        raise unknown_word(name, __dir__())
    return _function(OPS[name])


def __dir__() -> list[str]:
    return sorted(name for name, op in OPS.items() if op.is_word)

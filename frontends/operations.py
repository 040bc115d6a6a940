"""Every op of the IR as a function of traced values: `t.softmax(x, axis=-1)`, also `t.ops.softmax`.

A function is built from the op's class on first access. Type checkers and editors read operations.pyi instead, which
lists every signature; `make golden` writes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import cache
from typing import Any

from treadle.frontends.call_errors import unknown_word
from treadle.frontends.dsl import trace
from treadle.ir.errors import GraphError
from treadle.ir.op_registry import OPS
from treadle.ir.operation import Op
from treadle.ir.wording.op_signatures import op_signature, text_attribute
from treadle.ir.wording.other_spellings import DIFFERENT, OTHER_OPTIONS


@cache
def _function(cls: type[Op]) -> Callable[..., Any]:
    text = text_attribute(cls)
    aliases = _method_names(cls)

    def function(*operands: Any, **attributes: Any) -> Any:
        if aliases and not aliases.keys().isdisjoint(attributes):
            attributes = _renamed(cls, attributes, aliases)
        texts = [x for x in operands if isinstance(x, str)]
        if text is not None and len(texts) == 1 and attributes.get(text) is None:
            attributes[text] = texts[0]
            operands = tuple([x for x in operands if not isinstance(x, str)])
        return trace().apply(cls, *operands, **attributes)

    function.__name__ = function.__qualname__ = cls.name
    function.__doc__ = cls.__doc__
    function.__signature__ = op_signature(cls)
    return function


_METHOD_NAMES = ("dim", "keepdim")
"""Options of the methods of tensors, `x.softmax(dim=-1)`, which ops take as well. Their own names are in the stubs."""


def _method_names(cls: type[Op]) -> dict[str, str]:
    """Return the op's attributes by the names that methods of tensors have for them. A name that means something else
    for PyTorch's function of this name, as in `gather`, is left out: the error has the call that computes the same.
    """
    own = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    found = {name: next((each for each in OTHER_OPTIONS[name] if each in own), None) for name in _METHOD_NAMES}
    different = cls.name in DIFFERENT
    return {name: each for name, each in found.items() if each is not None and name not in own and not different}


def _renamed(cls: type[Op], attributes: dict[str, Any], aliases: Mapping[str, str]) -> dict[str, Any]:
    """Return the attributes by the op's own names. Raises GraphError if one of them is passed by both names."""
    made: dict[str, Any] = {}
    for name, value in attributes.items():
        own = aliases.get(name, name)
        if own in made:
            raise GraphError(f"{cls.name} got {own} twice", received=", ".join(attributes), source=trace().place())
        made[own] = (value,) if name != own == "axes" and isinstance(value, int) else value
    return made


def __getattr__(name: str) -> Callable[..., Any]:
    if name.startswith("_"):
        raise AttributeError(name)
    if name not in OPS or not OPS[name].is_word:
        raise unknown_word(name, __dir__())
    return _function(OPS[name])


def __dir__() -> list[str]:
    return sorted(name for name, op in OPS.items() if op.is_word)

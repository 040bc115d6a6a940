"""The table of ops: a decorator registers a class by the op's name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, dataclass_transform

from treadle.ir.errors import GraphError
from treadle.ir.operation import Op, Operand


def _arity(operands: Mapping[str, Operand]) -> tuple[tuple[tuple[int, str], ...], int | None]:
    variadic = any(o.variadic for o in operands.values())
    required = tuple((i, n) for i, (n, o) in enumerate(operands.items()) if not o.optional and not o.variadic)
    return required, None if variadic else len(operands)


def _remembered(compute: Callable[[Any], int]) -> Callable[[Any], int]:
    """Return a hash function that computes the hash once per object: ops are dictionary keys wherever graphs are
    compared.
    """

    def remembered(self: Op) -> int:
        found = self.__dict__.get("_hash")
        if found is None:
            found = self.__dict__["_hash"] = compute(self)
        return int(found)

    return remembered


OPS: dict[str, type[Op]] = {}
"""Every registered op by name."""

_OpClass = TypeVar("_OpClass", bound=type[Op])


@dataclass_transform(frozen_default=True, kw_only_default=True)
def op(
    name: str, *, axes: str | None = None, dtypes: str | None = None, linear: str = "", flops: int = 1
) -> Callable[[_OpClass], _OpClass]:
    """Register an op class under `name`.

    axes    the axis rule, or None if the class defines the method `axis_rule`
    dtypes  the dtype rule, or None if the class defines the method `dtypes`
    linear  groups of operands that the op is linear in: `"a | b"` is linear in each alone, `"a b"` in both together
    flops   floating-point operations per point of the op's iteration space (0 for ops that only move data)
    """

    def register(cls: _OpClass) -> _OpClass:
        if name in OPS:
            raise GraphError(f"op {name!r} is registered already, by {OPS[name].__qualname__}")
        cls.name = name
        cls.operands = {k: v for k, v in vars(cls).items() if isinstance(v, Operand)}
        cls.arity = _arity(cls.operands)
        if axes is not None:
            cls.rule_text = axes
        if dtypes is not None:
            cls.dtype_text = dtypes
        cls.linear_text = linear
        cls.flops = flops
        made = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
        made.__hash__ = _remembered(made.__hash__)  # type: ignore[assignment, method-assign]
        OPS[name] = made
        return made  # type: ignore[return-value]  # the decorated class is the class

    return register


def find_op(name: str) -> type[Op]:
    """Return the op class of that name. If there is none, raises GraphError with the nearest names as a hint."""
    found = OPS.get(name)
    if found is None:
        import treadle.ir.ops  # noqa: F401  (registers them all; here, since the op files import this one)

        found = OPS.get(name)
    if found is None:
        import difflib

        near = difflib.get_close_matches(name, OPS, n=3, cutoff=0.5)
        raise GraphError(f"unknown op {name!r}", hint=f"did you mean {' or '.join(near)}?" if near else None)
    return found

"""The inputs of a model, read from its function's parameters.

    tokens: Annotated[t.Tensor, t.i64["B S"]]                      type checkers see a tensor
    tokens: t.i64["B S"]                                           the short form
    lengths: Annotated[t.Tensor, t.i64["B"]] | None = None         optional
    index: Annotated[t.Tensor, t.i64["B S"], t.generated(0)]       0 for generated tokens

docs/decisions/0009-types-that-checkers-read.md explains the first form.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Union, get_args, get_origin

from treadle.ir.errors import FrontendError
from treadle.ir.generated_values import GeneratedValue
from treadle.ir.sizing.sizes import VARIABLE
from treadle.ir.types import DType, OptionalType, Type


@dataclass(frozen=True)
class DeclaredInput:
    """A declared input.

    optional   True if the model may be traced without it
    generated  its value for generated tokens, if it is declared
    """

    name: str
    type: Type
    optional: bool
    generated: GeneratedValue | None = None


def read_input(parameter: inspect.Parameter, model: str, sizes: Mapping[str, int]) -> DeclaredInput:
    """Return a model parameter as a declared input. A symbol named like a configuration size is replaced by that size.

    Raises FrontendError for an input without a type, with a default, or with a negative size.
    """
    name, what = parameter.name, f"input {parameter.name} of model {model}"
    declared, optional = _read(parameter.annotation)
    if declared is None or parameter.kind is not parameter.POSITIONAL_OR_KEYWORD:
        raise _without_type(parameter, what)
    if parameter.default is not parameter.empty and not (parameter.default is None and optional):
        raise FrontendError(
            f"{what} has a default, which an input cannot have",
            received=f"{parameter.default!r}"[:80],
            hint="*, before configuration; or `| None = None`, for an optional input",
        )
    sized = declared.substitute(sizes)
    if any(size.constant is not None and size.constant < 0 for size in sized.shape):
        raise FrontendError(f"{what} has a negative size", received=str(sized), hint=VARIABLE)
    return DeclaredInput(name, sized, optional, _generated(parameter.annotation))


def _without_type(parameter: inspect.Parameter, what: str) -> FrontendError:
    """Return the error for a parameter whose annotation is no type of a tensor."""
    name, annotation = parameter.name, parameter.annotation
    notes = get_args(annotation) if get_origin(annotation) is Annotated else (annotation,)
    dtype = next((note for note in notes if isinstance(note, DType)), None)
    if dtype is not None:
        form = f'{dtype.declared_name}["B S{" 16" * dtype.is_float}"]'
        hint = f"{name}: Annotated[t.Tensor, {form}], with a name or a number for each axis"
        return FrontendError(f"the type of {what} has no axes", received=dtype.declared_name, hint=hint)
    types = 't.i64["B S"]] for an input of token ids, t.f32["B S 16"] for one of vectors'
    return FrontendError(
        f"{what} needs a type", hint=f"{name}: Annotated[t.Tensor, {types}; or *, before configuration"
    )


def _generated(annotation: object) -> GeneratedValue | None:
    """Return the value for generated tokens in an annotation, or None if there is none."""
    if get_origin(annotation) is Annotated:
        return next((note for note in get_args(annotation)[1:] if isinstance(note, GeneratedValue)), None)
    if get_origin(annotation) in (Union, UnionType):
        return next((note for each in get_args(annotation) if (note := _generated(each)) is not None), None)
    return None


def _read(annotation: object) -> tuple[Type | None, bool]:
    """Return a pair: the type in an annotation, or None if there is none; and True if the input is optional."""
    if isinstance(annotation, OptionalType):
        return annotation.type, True
    if isinstance(annotation, Type):
        return annotation, False
    if get_origin(annotation) is Annotated:
        inner, *notes = get_args(annotation)
        _, optional = _read(inner)
        return next((note for note in notes if isinstance(note, Type)), None), optional
    if get_origin(annotation) in (Union, UnionType):
        members = get_args(annotation)
        found = [type for type, _ in map(_read, members) if type is not None]
        return found[0] if len(found) == 1 else None, NoneType in members
    return None, False

"""Signatures of ops, derived from their classes: for `help`, and for the stubs that type checkers and editors read.

    softmax(x: TensorLike, /, *, axis: int = -1, name: str | None = None) -> Tensor

Operands are positional, attributes keyword-only. In the DSL, a text without a default may be positional, too: the
pattern of `rearrange`, and the equation of `einsum`, before or after the operands. The number of an op's results
follows from its dtype rule.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from inspect import Parameter, Signature

from treadle.ir.attribute_values import accepted_annotation
from treadle.ir.operation import Op
from treadle.ir.rules.dtype_rules import count_results
from treadle.ir.sizing.sizes import Size


@dataclass(frozen=True)
class Spelling:
    """The annotations of operands, results and attributes in one place where ops are functions: the builder, the DSL,
    or patterns.

    attribute  the annotation of attributes; None: each attribute's own annotation
    """

    operand: str
    result: str
    attribute: str | None = None


BUILDER = Spelling("ExprLike", "Expr")
LANGUAGE = Spelling("TensorLike", "Tensor")
PATTERN = Spelling("TermLike", "PatternTerm", "Any")


class Annotation(str):
    """An annotation that a signature prints as is, without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def op_signature(cls: type[Op], spelling: Spelling = LANGUAGE) -> Signature:
    """Return the op's signature as a function."""
    found = [_operand(name, o.optional, o.variadic, spelling) for name, o in cls.operands.items()]
    text = text_attribute(cls) if spelling is LANGUAGE else None
    is_variadic = any(operand.kind is Parameter.VAR_POSITIONAL for operand in found)
    if text is not None and is_variadic:
        found[-1] = found[-1].replace(annotation=Annotation(f"{spelling.operand} | str"))
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        kind = spelling.attribute or accepted_annotation(str(field.type))
        default = field.default.constant if isinstance(field.default, Size) else field.default
        default = Parameter.empty if default is dataclasses.MISSING else default
        is_text = field.name == text
        if is_text and is_variadic:
            default, kind = None, f"{kind} | None"
        form = Parameter.POSITIONAL_OR_KEYWORD if is_text and not is_variadic else Parameter.KEYWORD_ONLY
        found.append(Parameter(field.name, form, default=default, annotation=Annotation(kind)))
    if spelling is not PATTERN:  # patterns name captures with p.named
        found.append(Parameter("name", Parameter.KEYWORD_ONLY, default=None, annotation=Annotation("str | None")))
    return Signature(found, return_annotation=Annotation(_results(cls, spelling.result)))


def text_attribute(cls: type[Op]) -> str | None:
    """Return the name of the op's first attribute, if it is a text without a default; else None."""
    first = next(iter(dataclasses.fields(cls)), None)  # type: ignore[arg-type]
    is_text = first is not None and str(first.type) == "str" and first.default is dataclasses.MISSING
    return first.name if first is not None and is_text else None


def _operand(name: str, optional: bool, variadic: bool, spelling: Spelling) -> Parameter:
    annotation = Annotation(f"{spelling.operand} | None" if optional else spelling.operand)
    if variadic:
        return Parameter(name, Parameter.VAR_POSITIONAL, annotation=annotation)
    default = None if optional else Parameter.empty
    return Parameter(name, Parameter.POSITIONAL_ONLY, default=default, annotation=annotation)


def _results(cls: type[Op], result: str) -> str:
    """Return the annotation of the results: of one result, a tuple of a fixed number, or a tuple of any number if it
    depends on attributes.
    """
    rules = [cls.dtype_text] if cls.dtype_text else [cls.make(**s.attributes).dtypes() for s in cls.samples]
    counts = {count_results(rule) for rule in rules}
    if counts == {1}:
        return result
    return f"tuple[{', '.join([result] * counts.pop() if len(counts) == 1 else [result, '...'])}]"

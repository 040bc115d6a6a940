"""The stubs of ops. Type checkers and editors read them instead of modules that look up ops by name."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from inspect import Parameter, Signature

import treadle.ir.ops  # noqa: F401  (registers every op)
from treadle.frontends import attention_layers, layers
from treadle.ir.builder import Builder
from treadle.ir.op_registry import OPS
from treadle.ir.operation import Op
from treadle.ir.tensors.elementwise import is_method
from treadle.ir.wording.op_signatures import BUILDER, LANGUAGE, PATTERN, Spelling, op_signature

WIDTH = 120

METHODS = '''\
"""Every op as a method, from its class: op_methods.py as type checkers see it. Written by `make golden`."""

from collections.abc import Sequence

from treadle.ir.attention.attention_terms import Term
from treadle.ir.builder import Expr, ExprLike
from treadle.ir.sizing.sizes import SizeLike
from treadle.ir.types import DType, i64

class OpMethods:
'''

FUNCTIONS = '''\
"""Every op as a function, from its class: operations.py as type checkers see it. Written by `make golden`.

`from ... import *` leaves out the ops that have the name of a layer.
"""

from collections.abc import Sequence

from treadle.frontends.dsl import Tensor, TensorLike
from treadle.ir.attention.attention_terms import Term
from treadle.ir.sizing.sizes import SizeLike
from treadle.ir.types import DType, i64

'''

ENTRIES = '''\
"""The public entry functions with their options, from `program.option_table`: entry_functions.py as type checkers see
it. Written by `make golden`.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from treadle.compiled import Compiled
from treadle.files.contained_files import PathLike
from treadle.ir.target import Target
from treadle.passes.framework.manager import Pass
from treadle.program.source import AnyModel
from treadle.runtime.training.optimizers import Optimizer
from treadle.runtime.training.schedules import Schedule
from treadle.tasks.loaded import LoadedModel
from treadle.training.trainer import Trainer as _Trainer

Array = np.ndarray[Any, Any]

'''

TERMS = '''\
"""Every op as a word of patterns, from its class: op_terms.py as type checkers see it. Written by `make golden`."""

from typing import Any

from treadle.ir.types import i64
from treadle.passes.framework.pattern import PatternTerm, TermLike

class OpTerms:
'''


TENSORS = '''\
"""The elementwise ops as methods of tensors, from their classes: elementwise.py as type checkers see it. Written by
`make golden`.
"""

from treadle.ir.expressions import Expr, ExprLike
from treadle.ir.wording.python_protocols import PythonProtocols

class ElementwiseMethods(PythonProtocols):
'''


def stubs() -> dict[str, str]:
    """Return the text of each stub, by its path in the tree."""
    return {
        "ir/op_methods.pyi": METHODS + _methods(BUILDER),
        "passes/framework/op_terms.pyi": TERMS + _methods(PATTERN),
        "ir/tensors/elementwise.pyi": TENSORS + "\n".join(_tensor_methods()),
        "frontends/operations.pyi": FUNCTIONS + _functions(),
        "treadle/entry_functions.pyi": _entry_functions(),
    }


def _entry_functions() -> str:
    from treadle.entry_functions import compile
    from treadle.loading import load
    from treadle.training.trainer import Trainer

    trainer = inspect.signature(Trainer.__init__)
    own = [p for p in trainer.parameters.values() if p.name != "self"]
    own = [p if p.name != "optimizer" else p.replace(default=...) for p in own]
    made = _spelled(
        "__init__", trainer.replace(parameters=own), indent="    ", doc=inspect.getdoc(Trainer.__init__) or ""
    )
    functions = [_spelled(f.__name__, inspect.signature(f), doc=f.__doc__ or "") for f in (compile, load)]
    return ENTRIES + "\n".join(functions) + f"\nclass Trainer(_Trainer):\n{made}"


def _ops() -> list[type[Op]]:
    """Return the ops of the compiler, without those for which `Builder` defines its own method."""
    own = vars(Builder)
    ours = [cls for _, cls in sorted(OPS.items()) if cls.__module__.startswith("treadle.ir.") and cls.is_word]
    return [cls for cls in ours if cls.name not in own]


def _methods(spelling: Spelling) -> str:
    return "".join(_spelled(cls.name, op_signature(cls, spelling), indent="    ") for cls in _ops())


def _tensor_methods() -> Iterator[str]:
    for cls in filter(is_method, _ops()):
        signature = op_signature(cls, BUILDER)
        own = list(signature.parameters.values())[1:]
        doc = inspect.cleandoc(cls.__doc__ or "").partition("\n")[0]
        yield _spelled(cls.name, signature.replace(parameters=own), indent="    ", doc=doc)


def _functions() -> str:
    layer_names = {
        name
        for module in (layers, attention_layers)
        for name, function in vars(module).items()
        if inspect.isfunction(function)
    }
    exported = "".join(f'    "{cls.name}",\n' for cls in _ops() if cls.name not in layer_names)
    made = [_spelled(cls.name, op_signature(cls, LANGUAGE), doc=inspect.cleandoc(cls.__doc__ or "")) for cls in _ops()]
    return f"__all__ = [\n{exported}]\n\n" + "\n".join(made)


def _spelled(name: str, signature: Signature, *, indent: str = "", doc: str = "") -> str:
    """Return the stub of one function, formatted as ruff does."""
    parts = [*(["self"] if indent else []), *_parameters(signature)]
    end = f") -> {signature.return_annotation}:" + ("" if doc else " ...")
    text = f"{indent}def {name}({', '.join(parts)}{end}\n"
    if len(text) > WIDTH + 1:
        text = f"{indent}def {name}(\n" + "".join(f"{indent}    {part},\n" for part in parts) + f"{indent}{end}\n"
    if doc:
        first, *rest = doc.splitlines()
        lines = [f'{indent}    """{first}', *(f"{indent}    {line}".rstrip() for line in rest)]
        text += "\n".join(lines) + (f'\n{indent}    """\n' if rest else '"""\n')
    return text


def _parameters(signature: Signature) -> Iterator[str]:
    found = list(signature.parameters.values())
    for i, parameter in enumerate(found):
        before = found[i - 1].kind if i else None
        behind = found[i + 1].kind if i + 1 < len(found) else None
        if parameter.kind is Parameter.KEYWORD_ONLY and before not in (parameter.kind, Parameter.VAR_POSITIONAL):
            yield "*"
        stars = {Parameter.VAR_POSITIONAL: "*", Parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        default = "" if parameter.default is Parameter.empty else f" = {_value(parameter.default)}"
        yield f"{stars}{parameter.name}: {parameter.annotation}{default}"
        if parameter.kind is Parameter.POSITIONAL_ONLY and behind is not parameter.kind:
            yield "/"


def _value(value: object) -> str:
    return "..." if value is ... else f'"{value}"' if isinstance(value, str) else repr(value)

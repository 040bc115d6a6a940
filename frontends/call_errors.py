"""Errors for unknown names and wrong calls of layers. Hints give the DSL's names and the layer's options."""

from __future__ import annotations

import difflib
import inspect
import linecache
import re
import sys
from collections.abc import Iterable
from types import TracebackType

import numpy as np

from treadle.ir.errors import FrontendError
from treadle.ir.op_registry import OPS
from treadle.ir.source_lines import user_line
from treadle.ir.wording.call_spelling import option_guess, spelled_call
from treadle.ir.wording.other_interfaces import entry_word
from treadle.ir.wording.other_spellings import OTHER_WORDS
from treadle.ir.wording.typed_calls import other_meaning, typed_replacement

_CALL = re.compile(r"(?:(\w+)\.)*(\w+)\(\) (missing|got an unexpected keyword argument|takes)(.*)")

_SIMILAR = (
    0.75  # difflib's ratio of names of which one is misspelled: `rlu` and `relu` have 0.86, `rand` and `round` 0.67
)
_KNOWN_SIZE = ("linear", "layer_norm", "rms_norm", "self_attention", "mlp", "gated_mlp")
"""Layers whose classes in PyTorch have the input's size as their first argument."""
_NOT_CALLED = "'Type' object is not callable"


class UnknownNameError(FrontendError, AttributeError):
    """The error for a name that is not a layer, an op or a type of the DSL. The class is also an AttributeError, so
    that `hasattr` returns False.
    """


def unknown_word(name: str, known: Iterable[str]) -> UnknownNameError:
    """Return the error for a name that the DSL lacks. The hint gives the DSL's word for another library's name, or
    similar names. For a name that PyTorch or NumPy has, only the same name in another spelling is similar.
    """
    import treadle.frontends.language as language

    known = [each for each in known if not each.startswith("_")]
    if _is_elsewhere(name):
        near = [n for n in known if _without_form(n) == _without_form(name)]
    else:
        near = next(filter(None, (difflib.get_close_matches(n, known, 3, _SIMILAR) for n in (name, name.lower()))), [])
    guess = "did you mean " + " or ".join(f"t.{n}" for n in near) + "?" if near else "dir(treadle) lists its names"
    return UnknownNameError(
        f"the DSL has no {name!r}",
        source=str(user_line() or "") or None,
        hint=typed_replacement(name, language.Tensor) or OTHER_WORDS.get(name) or entry_word(name) or guess,
    )


def _is_elsewhere(name: str) -> bool:
    """Return True if NumPy has the name, or PyTorch, if it is imported: then it is not misspelt."""
    places: list[object] = [np]
    if (torch := sys.modules.get("torch")) is not None:
        places += [torch, torch.Tensor, torch.nn, torch.nn.functional]
    return any(name in dir(place) for place in places)


def _without_form(name: str) -> str:
    """Return a name without case, underscores and ranks, in which spellings of one function differ: MaxPool2d."""
    return re.sub(r"[123]d$|loss$|_", "", name.lower())


def nearest_op(name: str) -> str | None:
    """Return the op that has this name in other libraries, or the op with the most similar name, or None."""
    if (word := re.fullmatch(r"t\.(\w+)\(x\)", OTHER_WORDS.get(name.strip(), ""))) is not None:
        return word[1]
    return next(iter(difflib.get_close_matches(name.strip(), OPS, n=1)), None)


def call_hint(error: BaseException) -> str | None:
    """Return the hint for a TypeError of a DSL call or a tensor's method: the nearest option, and the signature. For a
    function of PyTorch or NumPy, return the DSL's equivalent.

    None for any other error, and if the called function is the user's own function under a DSL name.
    """
    import treadle.frontends.language as language

    if isinstance(error, TypeError) and str(error) == _NOT_CALLED:
        return "x.to(t.f32)  # or another dtype; t.f32 is a dtype, and x.type a type"
    match = _CALL.match(str(error)) if isinstance(error, TypeError) else None
    if match is None:
        return None
    owner, name, problem, rest = match.groups()
    of_tensors = any(owner == base.__name__ for base in language.Tensor.__mro__)
    function = getattr(language.Tensor, name, None) if of_tensors else vars(language).get(name)
    if function is None and re.search(rf"\b(torch|numpy|np)\.{name}\(", _line(error)):  # torch.ones(x.shape[1], 8)
        return typed_replacement(name, trace=_innermost(error)) or OTHER_WORDS.get(name)
    if not inspect.isfunction(function) or not (of_tensors or _called(name, error) in (None, function)):
        return None
    signature = inspect.signature(function)
    wanted = re.search(r"'(\w+)'", rest) if problem.startswith("got") else None
    guess = option_guess(wanted[1], signature) if wanted else ""
    guess = guess if of_tensors else other_meaning(name, _innermost(error)) + guess
    numbers = re.match(r" (\d+) positional arguments? but (\d+)", rest) if name in _KNOWN_SIZE else None
    if numbers is not None and int(numbers[2]) == int(numbers[1]) + 1:
        guess = "leave out the size of x, which is known: "
    if of_tensors:
        signature = signature.replace(parameters=list(signature.parameters.values())[1:])
    return f"{guess}{'x' if of_tensors else 't'}.{spelled_call(name, signature)}"


def _called(name: str, error: BaseException) -> object:
    """Return the object that a bare name refers to on the line that raised an error. Return None if the name is
    undefined, or has a module before it there: `t.mlp(`.
    """
    trace = _innermost(error)
    if trace is None or re.search(rf"\.{name}\(", _line(error)):
        return None
    return trace.tb_frame.f_locals.get(name, trace.tb_frame.f_globals.get(name))


def _line(error: BaseException) -> str:
    """Return the source line that raised an error; empty if it is unknown."""
    trace = _innermost(error)
    return "" if trace is None else linecache.getline(trace.tb_frame.f_code.co_filename, trace.tb_lineno)


def _innermost(error: BaseException) -> TracebackType | None:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace

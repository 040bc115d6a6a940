"""Checks of the keyword arguments of tasks: unknown names, with a hint if another library has them, and values of
another type.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from treadle.ir.errors import UsageError
from treadle.ir.wording.checked_calls import check_call

Method = TypeVar("Method", bound=Callable[..., Any])

_SAMPLING = "sampling=t.Sampling(temperature=0.7, top_k=50, top_p=0.9, seed=1)"
_RULES = "rules=t.TokenRules(repetition_penalty=1.2, no_repeat_ngram=3, fewest=5)"
_ELSEWHERE = {
    **dict.fromkeys(("max_new_tokens", "max_tokens", "num_predict", "tokens"), "most=64"),
    "max_length": "most=64, which does not include the prompt's tokens",
    **dict.fromkeys(("do_sample", "temperature", "top_k", "top_p", "min_p", "seed"), _SAMPLING),
    **dict.fromkeys(
        ("num_beams", "length_penalty", "num_return_sequences"), "search(prompts, beams=t.Beams(4, best=2))"
    ),
    **dict.fromkeys(("repetition_penalty", "no_repeat_ngram_size", "min_new_tokens", "bad_words_ids"), _RULES),
    **dict.fromkeys(("stop_strings", "stop_sequences", "stop_words"), 'stop=["."]'),
}
"""Hints for generation options that have another name in other libraries, mostly in Hugging Face's, by that name."""


_EXAMPLES = {"Sampling": _SAMPLING, "TokenRules": _RULES, "Beams": "beams=t.Beams(4, best=2)"}
"""A value for each class of options."""


def with_option_hints(method: Method) -> Method:
    """Decorate a method. If a call does not fit the method's signature, the error is as in
    `treadle.ir.wording.checked_calls`. If a value has another type than the annotation, the error says so, and has an
    example for the classes of `_EXAMPLES`.
    """
    signature = inspect.signature(method)

    @functools.wraps(method)
    def checked(self: Any, /, *ordered: Any, **options: Any) -> Any:
        check_call(method.__name__, signature, ordered, options, _ELSEWHERE)
        for name, value in options.items():
            _check_type(signature.parameters[name], value)
        return method(self, *ordered, **options)

    return checked  # type: ignore[return-value]


def _check_type(option: inspect.Parameter, value: object) -> None:
    """Raise UsageError if the value of an option has another type than the option's annotation."""
    types = str(option.annotation).split(" | ")
    if value is option.default or ("int" in types and isinstance(value, int) and not isinstance(value, bool)):
        return
    received = f"{option.name}={value!r}"[:80]
    if types[0] in _EXAMPLES and type(value).__name__ != types[0]:
        raise UsageError(f"{option.name} must be t.{types[0]}(...)", received=received, hint=_EXAMPLES[types[0]])
    if types[0] == "int":
        raise UsageError(f"{option.name} must be an integer", received=received)
    if types[0] == "Sequence[str]" and not isinstance(value, Sequence):
        raise UsageError(f"{option.name} must be a list of strings", received=received, hint=f'{option.name}=["."]')

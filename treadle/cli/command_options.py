"""Options of commands: their names, errors for unknown ones and for several values, and those of two commands."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from itertools import takewhile
from typing import Any

import typer

from treadle.ir.wording.other_spellings import MODEL_NAMES
from treadle.program.other_names import OTHER_NAMES, meant_option

_SHORT = {
    "o": "output",
    "n": "tokens",
    "c": "context",
    "t": "threads",
    "b": "batch",
    "f": "file",
    "m": "model",
    "p": "prompts",
}
"""Options of llama.cpp, and -o of compilers, that have one letter."""

_SIMILAR, _SIMILAR_AND_ELSEWHERE = 0.75, 0.85
"""The least similarity of the names of options; with an option of exactly this name in another command, it is higher.
"""

_FEW = 6
"""The largest number of commands that an error names."""

_NUMBERS = re.compile(r"[\[\d.,\]-]+")
_TEXTS = "treadle generate, embed and classify take texts"
_VERBOSE = ("v", "verbose", "debug", "log_level", "verbosity")


def options_by_name(params: Sequence[Any]) -> Mapping[str, str]:
    """Return the flags of a command by name, `learning_rate: --learning-rate`, and its arguments, `model: MODEL`."""
    flags = [flag for param in params for flag in (*param.opts, *param.secondary_opts) if flag.startswith("--")]
    arguments = {p.name: p.metavar or p.name.upper() for p in params if p.param_type_name == "argument"}
    return {**arguments, **{flag[2:].replace("-", "_"): flag for flag in flags}}


def point_to_meant(
    error: Any, name: str, params: Sequence[Any], words: Sequence[str], commands: Mapping[str, Any]
) -> None:
    """Complete typer's error for an unknown option of the command `name`: name the option that is meant, with its help,
    if there is one. A name of the model's configuration is set with --set.

    words     the arguments of the command
    commands  all commands by name
    """
    known = options_by_name(params)
    given = _typed_name(error.option_name, words, known)
    if "set" in known and (option := _model_option(given, words)) is not None:
        error.possibilities = None
        error.message += f"; {option} is an option of the model: --set {option}=..."
        return
    error.possibilities = None
    flags = [each for each, flag in known.items() if flag.startswith("--")]
    elsewhere = [each for each, other in sorted(commands.items()) if error.option_name in _flags(other.params)]
    meant = given if given in known else next((each for each in OTHER_NAMES.get(given, ()) if each in known), None)
    meant = meant or meant_option(given, flags, _SIMILAR_AND_ELSEWHERE if elsewhere else _SIMILAR)
    if "output" in (given, *OTHER_NAMES.get(given, ())) and "json" in known and meant not in ("output", "svg"):
        error.message += f"; treadle {name} prints its result: --json > FILE writes it to a file"
        return
    if meant is None and "texts" in OTHER_NAMES.get(given, ()):
        error.message += f"; {_TEXTS}"
        return
    if 0 < len(elsewhere) <= _FEW and given not in known and meant not in OTHER_NAMES.get(given, ()):
        error.message += f"; it is an option of treadle {', '.join(elsewhere)}"
    if meant is None and given in _VERBOSE:
        error.message += "; the environment variable TREADLE_DEBUG=1 prints more"
        return
    if meant is None:
        alike = [flag for flag in known.values() if flag.startswith(f"-{error.option_name}")]
        if len(error.option_name) == 2 and alike:
            error.message += f"; treadle {name} has {', '.join(alike)}"
        return
    if meant == "sizes" and not {"TEXTS", "SENTENCES"}.isdisjoint(known.values()):
        error.message += "; leave it out: texts are batched by length, and the model determines the longest text"
        return
    if meant == "sizes" and given != "sizes" and takes_every_size(name):
        error.message += "; leave it out: a compiled model takes every size of its symbolic axes"
        return
    flag = known[meant]
    if not flag.startswith("--"):
        error.message += f"; {flag} is an argument of treadle {name}, without an option"
        return
    param = next(each for each in params if flag in (*each.opts, *each.secondary_opts))
    error.message += f"; treadle {name} has {flag}: {param.help}"


def takes_every_size(command: str) -> bool:
    """Return True for a command whose --sizes are those of a memory budget alone, since it takes every size."""
    return command in ("compile", "run")


def point_to_place(error: Any, name: str, params: Sequence[Any], words: Sequence[str]) -> None:
    """Complete typer's error for arguments that the command `name` does not take: name the option that they may be
    values of, or the function of a Python file.

    words  the arguments of the command
    """
    from treadle.program.places import declared_in

    known = options_by_name(params)
    extra = next((word for word in words if f"({word}" in error.message), "")
    before = words[words.index(extra) - 1] if extra else ""
    models = [word for word in words if extra in declared_in(word)]
    name_of, _, value = extra.partition("=")
    option = _model_option(name_of if value else before, words)
    if models:
        error.message += f"; {models[0]}:{extra} names the function"
    elif "set" in known and option is not None:
        error.message += f"; {option} is an option of the model: --set {option}={value or extra}"
    elif "input" in known and value:
        given = ",".join([extra, *takewhile(_NUMBERS.fullmatch, words[words.index(extra) + 1 :])])
        error.message += f"; a value of an input follows --input: --input {given}"
    elif "input" in known and (_NUMBERS.fullmatch(extra) or extra.endswith(".npy")):
        given = ",".join(words[words.index(extra) :])
        error.message += (
            f"; --input {f'{before},{given}' if '=' in before else f'NAME={given}'}, with the name of an input"
        )
    elif "input" in known:
        error.message += f"; treadle {name} takes arrays, --input NAME=1,2,3; {_TEXTS}"


def _model_option(name: str, words: Sequence[str]) -> str | None:
    """Return the option of a model among the arguments that has this name, here or in other libraries, or None."""
    from treadle.program.places import options_of

    names = (name, *MODEL_NAMES.get(name, ()))
    return next((each for word in words for each in names if each in options_of(word)), None)


def _flags(params: Sequence[Any]) -> list[str]:
    return [flag for param in params for flag in param.opts]


def _typed_name(option: str, words: Sequence[str], options: Collection[str]) -> str:
    """Return the name of an unknown option: "lr" for -lr, of which the parser reports -l, and "output" for -o."""
    name = option.lstrip("-").replace("-", "_")
    if option.startswith("--"):
        return name
    typed = [word[1:].partition("=")[0].replace("-", "_") for word in words if word.startswith(option)]
    return next((each for each in typed if len(each) > 1 and each in {*options, *OTHER_NAMES}), _SHORT.get(name, name))


def refuse_several_values(order: Sequence[Any], context: Any) -> None:
    """Raise typer.BadParameter for an option with one value that is given several times.

    order  the parameters in the order of the command line
    """
    for param in dict.fromkeys(order):
        has_value = not getattr(param, "is_flag", True) or param.secondary_opts
        if param.param_type_name == "option" and has_value and not param.multiple and order.count(param) > 1:
            raise typer.BadParameter(f"it is given {order.count(param)} times, and has one value", context, param)


def without_other_options(
    words: Sequence[str], params: Sequence[Any], others: Sequence[Any], without: Collection[str]
) -> list[str]:
    """Return the words of a command without the options that another command lacks, or has with another meaning.

    params, others  the parameters of the command, and of the other command
    without         further options to leave out
    """
    meanings = {param.name: param.help for param in others if param.param_type_name == "option"}
    by_flag = {flag: param for param in params for flag in (*param.opts, *param.secondary_opts)}
    kept, left = [], list(words)
    while left:
        flag, has_value, _ = (word := left.pop(0)).partition("=")
        param = by_flag.get(flag)
        spelled = [word]
        if param is not None and not param.is_flag and not has_value and left:
            spelled.append(left.pop(0))
        if param is None or param.name == "output" or (meanings.get(param.name) == param.help and flag not in without):
            kept += spelled
    return kept

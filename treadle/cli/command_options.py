"""Options of commands: their names, errors for unknown ones and for several values, and those of two commands."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import typer

from treadle.program.other_names import meant_option

_SHORT = {"n": "tokens", "c": "context", "t": "threads", "b": "batch", "f": "file", "m": "model", "p": "prompts"}
"""Options of llama.cpp that have one letter."""


def options_by_name(params: Sequence[Any]) -> Mapping[str, str]:
    """Return the flags of a command by name, `learning_rate: --learning-rate`, and its arguments, `model: MODEL`."""
    flags = [flag for param in params for flag in (*param.opts, *param.secondary_opts) if flag.startswith("--")]
    arguments = {p.name: p.metavar or p.name.upper() for p in params if p.param_type_name == "argument"}
    return {**arguments, **{flag[2:].replace("-", "_"): flag for flag in flags}}


def point_to_meant(error: Any, name: str, params: Sequence[Any], words: Sequence[str]) -> None:
    """Complete typer's error for an unknown option of the command `name`: name the option that is meant, with its help,
    if there is one. A name of the model's configuration is set with --set.

    words  the arguments of the command
    """
    from treadle.program.places import options_of

    known = options_by_name(params)
    given = error.option_name.lstrip("-").replace("-", "_")
    if "set" in known and any(given in options_of(word) for word in words):
        error.possibilities = None
        error.message += f"; {given} is an option of the model: --set {given}=..."
        return
    meant = given if given in known else meant_option(_SHORT.get(given, given), known, 0.6)
    error.possibilities = None
    if meant is None:
        return
    flag = known[meant]
    if not flag.startswith("--"):
        error.message += f"; {flag} is an argument of treadle {name}, without an option"
        return
    param = next(each for each in params if flag in (*each.opts, *each.secondary_opts))
    error.message += f"; treadle {name} has {flag}: {param.help}"


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

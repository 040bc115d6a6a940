"""Hints that depend on the module: a mode, a setting or an argument with which it can be imported.

module.eval()                                       layers in training mode
module.config.use_cache = False                     transformers returns no cache
module.set_experts_implementation("batched_mm")     transformers computes experts without sizes that depend on data
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_BATCHED = "batched_mm"
_UNKNOWN_OUTPUT = re.compile(r"Found <class '([^']+)'> in output, which is not a known type")


def training_hint(module: torch.nn.Module, scope: str, argument: str) -> str:
    """Return the hint for an operator that runs as in training.

    scope     the path of the module that calls it
    argument  the argument of the call that makes it heed the module's mode
    """
    caller = list(_parts(module, scope).values())[-1]
    if not caller.training:
        return f"pass {argument}: this call ignores eval()"
    if type(caller).__module__.startswith("torch."):
        return "module.eval()"
    return f"module.eval(), and pass {argument} if the call ignores eval()"


def mutation_hint(module: torch.nn.Module) -> str:
    """Return the hint for a module that writes to an argument or to its own tensors."""
    new = "compute a new tensor in place of writing to it"
    return f"module.eval(), if these are running statistics; else {new}" if module.training else new


def output_hint(module: torch.nn.Module, arguments: Mapping[str, Any], text: str) -> str | None:
    """Return the hint for an output whose class torch.export does not know; None if `text`, torch's message, is about
    something else.

    arguments  the example's arguments by name
    """
    found = _UNKNOWN_OUTPUT.search(text)
    if found is None:
        return None
    if arguments.get("use_cache") is True:
        return "use_cache=False in the example: a graph returns tensors, and no cache"
    configs: dict[int, str] = {}
    for path, part in module.named_modules():
        config = getattr(part, "config", None)
        if getattr(config, "use_cache", False) is True:
            configs.setdefault(id(config), _expression(path, "config"))
    if found[1].endswith("Cache") and configs:
        settings = "; ".join(f"{config}.use_cache = False" for config in configs.values())
        return f"{settings}: a graph returns tensors, and no cache"
    return "return tensors, or tuples, lists and dicts of them"


def experts_hint(module: torch.nn.Module, scope: str) -> str | None:
    """Return the hint for an operator of an experts module of transformers that sorts tokens by their experts; None for
    another module.

    scope  the path of the module that calls the operator
    """
    parts = _parts(module, scope)
    if not any(map(_sorts_tokens, parts.values())):
        return None
    setter = next((path for path, part in parts.items() if hasattr(part, "set_experts_implementation")), None)
    return None if setter is None else _expression(setter, f'set_experts_implementation("{_BATCHED}")')


def _expression(path: str, last: str) -> str:
    """Return the Python expression for an attribute of the module at a path: module.layers[0].config."""
    return re.sub(r"\.(\d+)(?=\.)", r"[\1]", ".".join(filter(None, ("module", path, last))))


def _sorts_tokens(part: Any) -> bool:
    """Return True for a class with the decorator `use_experts_implementation` of transformers, unless its computation
    has no sizes that depend on data.
    """
    set_to = getattr(getattr(part, "config", None), "_experts_implementation", None)
    return hasattr(part, "has_gate") and hasattr(part, "is_transposed") and set_to not in (None, _BATCHED)


def scope_within(module: torch.nn.Module, error: BaseException) -> str:
    """Return the path of the innermost module whose code an exception passed through."""
    paths = {id(part): path for path, part in module.named_modules()}
    trace: TracebackType | None = error.__traceback__
    found = ""
    while trace is not None:
        found = paths.get(id(trace.tb_frame.f_locals.get("self")), found)
        trace = trace.tb_next
    return found


def _parts(module: torch.nn.Module, scope: str) -> dict[str, torch.nn.Module]:
    """Return the modules along a path by their own paths, the outermost first."""
    names, named = scope.split("."), dict(module.named_modules(remove_duplicate=False))
    paths = ["", *(".".join(names[: i + 1]) for i in range(len(names)))]
    return {path: named[path] for path in paths if path in named}

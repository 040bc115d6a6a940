"""Hints that depend on the module: a mode, a setting or an argument with which it can be imported.

module.eval()                                       layers in training mode
x.float()                                           an example of NumPy's default, float64
module.config.use_cache = False                     transformers returns no cache
module.set_experts_implementation("batched_mm")     transformers computes experts without sizes that depend on data
decoder(x, memory, tgt_mask=mask, tgt_is_causal=True)     torch does not compare the mask with a causal one
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
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


def dtype_hint(module: torch.nn.Module, arguments: Mapping[str, Any]) -> str | None:
    """Return the hint for an error about dtypes, if a tensor of the example has another float dtype than the module's
    weights, which torch.export does not refuse; None if all agree.

    arguments  the example's arguments by name
    """
    weights = {str(x.dtype) for x in module.parameters() if x.is_floating_point()}
    if len(weights) != 1:
        return None
    (dtype,) = weights
    other = [name for name, x in arguments.items() if hasattr(x, "is_floating_point") and x.is_floating_point()]
    other = [name for name in other if str(arguments[name].dtype) != dtype]
    return f"{other[0]}.to({dtype}), the dtype of the module's weights" if other else None


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


_MASK_CHECK = "_detect_is_causal_mask"


def mask_hint(error: BaseException) -> str | None:
    """Return the hint for an error in torch's check that the mask of a transformer is causal; None for another error.

    torch.nn.TransformerEncoder, TransformerDecoder and Transformer compare the elements of a mask with those of a
    causal one, unless an argument of the call says if the mask is causal.
    """
    callers: list[str] = []
    trace: TracebackType | None = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if code.co_name == _MASK_CHECK:
            argument = _mask_argument(callers)
            return f"{argument}=True in this call, for a causal mask, or {argument}=False: torch then skips its check"
        if code.co_name == "forward":
            classes = type(trace.tb_frame.f_locals.get("self")).__mro__
            callers += [each.__name__ for each in classes if each.__module__ == "torch.nn.modules.transformer"]
        trace = trace.tb_next
    return None


def _mask_argument(callers: Sequence[str]) -> str:
    """Return the argument that says if a mask is causal.

    callers  torch's classes of the modules whose calls led to the check, outermost first
    """
    of_encoder = callers[-1:] == ["TransformerEncoder"]
    if "Transformer" in callers:
        return "src_is_causal" if of_encoder else "tgt_is_causal"
    return "is_causal" if of_encoder else "tgt_is_causal"


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

"""Running torch.export on a module, with symbolic dimensions that the caller names.

Symbolic dimensions may be 0 or 1. PyTorch's default assumes that they are not, and then its export may be wrong for
these sizes.
"""

from __future__ import annotations

import inspect
import io
import logging
import os
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from treadle.files.shown_names import printable
from treadle.frontends.torch_export.lines import guarded_at, raised_at, source_in, within_operator
from treadle.frontends.torch_export.model import expect_dense, named_tensors
from treadle.frontends.torch_export.module_hints import experts_hint, mask_hint, output_hint, scope_within
from treadle.frontends.torch_export.sizes import Symbols, depends_on_data
from treadle.ir.errors import FrontendError, UsageError
from treadle.ir.sizing.sizes import Size

if TYPE_CHECKING:
    import torch

Example = tuple[Any, ...] | Mapping[str, Any]
Dynamic = Mapping[str, "str | Mapping[int, str]"]


def check_module(module: Any) -> None:
    """Raise UsageError for anything but a module of PyTorch with Python code."""
    import torch

    if isinstance(module, torch.nn.Module) and not isinstance(module, torch.jit.ScriptModule):
        return
    received, hint = type(module).__name__, None
    if isinstance(module, torch.jit.ScriptModule):
        hint = "the module that was given to torch.jit.script or torch.jit.trace"
    elif isinstance(module, type) and issubclass(module, torch.nn.Module):
        received, hint = f"the class {module.__name__}", f"an instance: {module.__name__}(...)"
    elif isinstance(module, str | os.PathLike | Mapping):
        hint = "a module of your class, with these weights: module.load_state_dict(...)"
    elif callable(module):
        hint = "an instance of a subclass of torch.nn.Module, whose forward calls the function"
    raise UsageError("from_torch takes a torch.nn.Module", received=received, hint=hint)


def check_example(example: Any) -> None:
    """Raise UsageError for anything but a tuple or a dict of arguments."""
    if not isinstance(example, tuple | Mapping):
        what = "the example must be a tuple of arguments, or a dict of them"
        hint = "a tuple of tensors, (x,) for one argument, or a dict of them by name"
        raise UsageError(what, received=type(example).__name__, hint=hint)


def named_arguments(module: Any, example: Example) -> dict[str, Any]:
    """Return the example's arguments by the module's parameter names. Raises UsageError if they do not fit."""
    try:
        signature = inspect.signature(module.forward)
        bound = signature.bind(*example) if isinstance(example, tuple) else signature.bind(**example)
    except TypeError as error:
        what, hint = "the example does not fit the module's forward", _fitting_example(signature, example)
        raise UsageError(what, received=str(error), hint=hint) from None
    except ValueError:
        return dict(example) if isinstance(example, Mapping) else {}
    found: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        match signature.parameters[name].kind:
            case inspect.Parameter.VAR_KEYWORD:
                found |= value
            case inspect.Parameter.VAR_POSITIONAL:
                found |= {f"{name}_{i}": x for i, x in enumerate(value)}
            case _:
                found[name] = value
    return found


def _fitting_example(signature: inspect.Signature, example: Example) -> str:
    """Return the hint for an example that does not fit: the required arguments of the module's forward, as a tuple."""
    taken = f"its forward takes {', '.join(signature.parameters) or 'no arguments'}"
    if isinstance(example, tuple) and example and all(type(size) is int for size in example):  # the shape of one
        return f"(torch.zeros({', '.join(map(str, example))}),): {taken}"
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p.name for p in signature.parameters.values() if p.kind in kinds and p.default is p.empty]
    return f"({', '.join(needed)}{',' * (len(needed) == 1)}): {taken}"


@contextmanager
def _one_parameter_each(module: Any, names: Sequence[str]) -> Iterator[None]:
    """Give a module whose forward takes *args or **kwargs a parameter for each argument while it is traced.

    torch.export takes dynamic shapes by parameter. In a dict of the shapes of the arguments in *args or **kwargs, it
    would read the arguments' names as names of parameters.
    """
    signature, own, forward = inspect.signature(module.forward), vars(module).get("forward"), module.forward
    gathering = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    if not any(p.kind in gathering for p in signature.parameters.values()):
        yield
        return

    def each(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    each.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    )
    vars(module)["forward"] = each
    try:
        yield
    finally:
        del vars(module)["forward"]
        if own is not None:
            vars(module)["forward"] = own


def open_dimensions(arguments: Mapping[str, Any], dynamic: Mapping[str, Any] | None) -> dict[str, dict[int, str]]:
    """Return the names of the symbolic dimensions of each argument. Raises UsageError for wrong names in `dynamic`."""
    import torch

    found: dict[str, dict[int, str]] = {}
    sizes: dict[str, int] = {}
    tensors = [name for name, x in arguments.items() if isinstance(x, torch.Tensor)]
    if dynamic is not None and not isinstance(dynamic, Mapping):
        raise _not_by_argument(dynamic, {name: tuple(arguments[name].shape) for name in tensors})
    for name, given in (dynamic or {}).items():
        tensor = arguments.get(name)
        if not isinstance(tensor, torch.Tensor):
            raise UsageError(
                f"dynamic= names {name!r}, which is not a tensor of the example",
                received=f"tensors: {', '.join(tensors)}" if tensors else None,
                hint="the names of arguments that are tensors; tensors in containers keep their sizes",
            )
        dims = _dims(name, given, tensor.shape)
        for axis, symbol in dims.items():
            size = int(tensor.shape[axis])
            if sizes.setdefault(symbol, size) != size:
                raise UsageError(f"{symbol} has the sizes {sizes[symbol]} and {size} in the example", received=name)
        found[name] = dims
    return found


def _not_by_argument(dynamic: object, shapes: Mapping[str, tuple[int, ...]]) -> UsageError:
    """Return the error for a `dynamic` without names of arguments; its hint has the text for each tensor that it fits.

    shapes  the shape of each tensor of the example
    """
    given = dynamic.split() if isinstance(dynamic, str) else dynamic if isinstance(dynamic, list | tuple) else []
    words = [] if any(each in shapes for each in given) else [str(each) for each in given]
    fitting = [name for name, shape in shapes.items() if len(shape) == len(words)]
    batch = next((shape[:1] for shape in shapes.values() if shape), ())
    rows = {name: _rows(len(shape)) for name, shape in shapes.items() if shape and shape[:1] == batch}
    texts = dict.fromkeys(fitting, " ".join(words)) if words and fitting else rows
    return UsageError(
        "dynamic= must be a mapping by argument",
        received=printable(repr(dynamic)),
        hint=f"dynamic={texts}" if texts else "leave dynamic= out: tensors in containers keep their sizes",
    )


def _rows(rank: int) -> str:
    """Return the text of `dynamic` for a tensor whose first dimension is the batch: `B _ _`."""
    return " ".join(["B", *["_"] * (rank - 1)])


def _dims(name: str, given: Any, shape: Sequence[int]) -> dict[int, str]:
    rank = len(shape)
    if isinstance(given, str):
        words = given.split()
        if len(words) != rank:
            example = " ".join([*words, *["_"] * rank][:rank])
            raise UsageError(
                f"dynamic= specifies {len(words)} dimensions for {name}, but it has {rank}",
                received=given,
                hint=f"{{{name!r}: {example!r}}}, where _ leaves a dimension as it is",
            )
        for axis, word in enumerate(words):
            if word.isdigit() and int(word) != shape[axis]:
                raise UsageError(
                    f"dimension {axis} of {name} is {shape[axis]}, dynamic= specifies {word}", received=given
                )
        dims: dict[Any, Any] = {axis: word for axis, word in enumerate(words) if not word.isdigit() and word != "_"}
    elif isinstance(given, Mapping):
        dims = dict(given)
    else:
        raise UsageError(
            f"dynamic= for {name} is {given!r}"[:120],
            hint=f"{{{name!r}: {_rows(rank)!r}}}, or {{{name!r}: {{0: 'B'}}}}",
        )
    for axis, symbol in list(dims.items()):
        if not isinstance(axis, int) or not -rank <= axis < rank:
            raise UsageError(f"{name} has no dimension {axis}", received=f"rank {rank}")
        if not isinstance(symbol, str) or not symbol.isidentifier() or not symbol.isascii():
            known = getattr(symbol, "__name__", "BS"[axis != 0])  # of torch.export.Dim("B")
            hint = f"{{{name!r}: {{{axis}: {known!r}}}}}"
            raise UsageError(f"the name of a dimension must be an identifier, not {symbol!r}", hint=hint)
        dims[axis % rank] = dims.pop(axis)
    return dims


def exported(module: Any, example: Any, opened: Mapping[str, dict[int, str]]) -> torch.export.ExportedProgram:
    """Return the module's program. Raises FrontendError, with the module's own line, if it cannot be traced."""
    import torch

    arguments = named_arguments(module, example)
    arrays = [name for name, x in arguments.items() if isinstance(x, np.ndarray)]
    if arrays:
        raise UsageError(
            "tensors of an example must be PyTorch's",
            received=", ".join(f"{name}: a NumPy array" for name in arrays),
            hint=f"torch.from_numpy({arrays[0]})" + ".float()" * (arguments[arrays[0]].dtype == np.float64),
        )
    for name, x in named_tensors(arguments):
        expect_dense(name, x, f"torch.zeros({name}.shape, dtype={name}.dtype): an example's values do not matter")
    shapes: dict[str, Any] | None = None
    plain: AbstractContextManager[Any] = nullcontext()
    if opened:
        shapes = dict.fromkeys(arguments)
        shapes |= {name: dict.fromkeys(dims, torch.export.Dim.AUTO) for name, dims in opened.items()}
        plain = _one_parameter_each(module, list(arguments))
    args, kwargs = (example, {}) if isinstance(example, tuple) else ((), dict(example))
    with _quietly(), torch.no_grad(), _any_size(), plain:
        try:
            return torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)
        except RecursionError:
            raise FrontendError("the module nests too deep for torch.export") from None
        except Exception as error:
            for name, x in _held(module):  # tensors that torch.export cannot trace, without naming them
                expect_dense(name, x)
            made = _refused(error)
            made.hint = (
                output_hint(module, arguments, str(error))
                or experts_hint(module, scope_within(module, error))
                or made.hint
            )
            raise made from error


def _held(module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the tensors of a module: parameters, buffers, and plain attributes."""
    import torch

    yield from module.named_parameters()
    yield from module.named_buffers()
    for path, part in module.named_modules():
        for name, x in vars(part).items():
            if isinstance(x, torch.Tensor):
                yield f"{path}.{name}" if path else name, x


def _any_size() -> AbstractContextManager[Any]:
    """Trace symbolic dimensions as possibly 0 or 1. A version of PyTorch without this option assumes 2 or more."""
    from torch.fx.experimental import _config

    config: Any = _config
    patched: AbstractContextManager[Any] = nullcontext()
    if hasattr(config, "backed_size_oblivious"):
        patched = config.patch(backed_size_oblivious=True)
    return patched


@contextmanager
def _quietly() -> Iterator[None]:
    """Suppress PyTorch's log of a failure, because the error contains it."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):  # torch prints the graph so far there
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _refused(error: Exception) -> FrontendError:
    text = str(error)
    first = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    marked = text.partition("The following call raised this error:")[2]
    at = source_in(marked) or raised_at(error)
    where = str(at) if at is not None else None
    if "data-dependent" in text:
        if "Could not guard" not in text or within_operator(error):
            made = depends_on_data(first[:200])
            made.source = where
            return made
        return FrontendError(
            "the module branches on data, which a graph cannot do",
            received=first[:200],
            source=where,
            hint=mask_hint(error) or "torch.where, which selects element by element",
        )
    return FrontendError(
        "torch.export cannot trace the module", received=f"{type(error).__name__}: {first}"[:300], source=where
    )


def decomposed(program: torch.export.ExportedProgram, kept: Collection[Any]) -> torch.export.ExportedProgram:
    """Return the program without writes into tensors, in which operators outside `kept` are decomposed into core ATen
    operators.

    Raises FrontendError.
    """
    import torch

    with _quietly(), torch.no_grad(), _any_size():
        try:
            made: torch.export.ExportedProgram = program.run_decompositions(_decompositions(program, frozenset(kept)))
            return made
        except Exception as error:
            raise _refused(error) from error


def _decompositions(program: torch.export.ExportedProgram, ours: frozenset[Any]) -> dict[Any, Any]:
    """Return PyTorch's table of decompositions without the operators that we support.

    Building the table takes as long as tracing a small module, so it is built once for programs of PyTorch's own
    operators. Others may be registered at any time.
    """
    namespaces = {getattr(node.target, "namespace", "aten") for node in program.graph.nodes}
    return dict(_own_decompositions(ours)) if namespaces <= {"aten"} else _all_decompositions(ours)


@cache
def _own_decompositions(ours: frozenset[Any]) -> dict[Any, Any]:
    return _all_decompositions(ours)


def _all_decompositions(ours: frozenset[Any]) -> dict[Any, Any]:
    import torch

    table: Any = torch.export.default_decompositions()
    for target in ours:
        table.pop(target, None)
    return dict(table.items())


def _specialized_at(val: Any, size: int) -> str | None:
    """Return the line that fixed a dynamic dimension of an argument to a size."""
    env: Any = getattr(getattr(val, "fake_mode", None), "shape_env", None)
    for guard in getattr(env, "guards", ()):
        symbols = guard.expr.free_symbols
        if symbols and all(env.replacements.get(symbol) == size for symbol in symbols):
            return guarded_at(guard)
    return None


def _user_inputs(program: torch.export.ExportedProgram) -> Collection[str]:
    return {name for name in program.graph_signature.user_inputs if isinstance(name, str)}


def _has_fixed(x: Any, size: int) -> bool:
    """Return True if a dimension of a tensor of the example is fixed to a size."""
    return any(isinstance(each, int) and each == size for each in getattr(x, "shape", ()))


def name_symbols(
    program: torch.export.ExportedProgram, opened: Mapping[str, dict[int, str]]
) -> tuple[Symbols, dict[str, Size]]:
    """Return our names for PyTorch's symbols, and the size for each name of `dynamic`.

    Raises FrontendError for a dimension that the module fixes.
    """
    symbols, sizes = Symbols(), dict[str, Size]()
    dims = []
    inputs = {node.name: node.meta["val"] for node in program.graph.nodes if node.name in _user_inputs(program)}
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in opened:
            val = node.meta["val"]
            dims += [(node.name, axis, name, val.shape[axis], val) for axis, name in opened[node.name].items()]
    for argument, axis, name, size, val in dims:
        if isinstance(size, int) or size.node.expr.is_Integer:
            needed = "write x.shape[0] for len(x); a layer of that size and range(n) need a fixed size"
            equal = [each for each, x in inputs.items() if each != argument and _has_fixed(x, int(size))]
            if equal:
                needed = f"call the dimension of size {int(size)} of {equal[0]} {name} too, if they are one; {needed}"
            raise FrontendError(
                f"torch.export specialized dimension {axis} of {argument} to {int(size)}",
                received=f"dynamic= calls it {name}",
                source=_specialized_at(val, int(size)),
                hint="leave it out of dynamic=, or "
                + ("give an example where it is 2 or more" if int(size) < 2 else needed),
            )
        symbols.env = size.node.shape_env
        if size.node.expr.is_Symbol:
            symbols.names.setdefault(size.node.expr.name, name)
    for _, _, name, size, _ in dims:
        for symbol in sorted(size.node.expr.free_symbols, key=str):
            symbols.names.setdefault(symbol.name, f"{name}_{symbol.name}")
        made = symbols.size(size)
        if sizes.setdefault(name, made) != made:
            raise FrontendError(f"{name} would be both {sizes[name]} and {made}", hint="use two names in dynamic=")
    return symbols, sizes

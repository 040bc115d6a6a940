"""Model declarations in a user's Python file: `file.py:function`. The file is run as it is: no bytecode is read or
written, since a stale one (of equal size and time) is other code than the file that the user names. It may import its
neighbors (`treadle.frontends.neighbor_modules`).
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
from collections.abc import Callable
from importlib.abc import SourceLoader
from pathlib import Path
from typing import Any

from treadle.files.nearest_names import NearestNames, argument_hint, nearest_path_hint
from treadle.frontends.declarations import Model
from treadle.frontends.neighbor_modules import Neighbors, keep_neighbors
from treadle.ir.errors import FrontendError, TreadleError, UsageError
from treadle.ir.source_lines import raising_line


def python_file(model: Model) -> Path | None:
    """Return the file in which a model is declared; None for a declaration in a notebook or an interactive session."""
    try:
        found = inspect.getsourcefile(model.function)
    except TypeError:
        return None
    return Path(found) if found is not None and Path(found).is_file() else None


def declared_models(path: Path) -> dict[str, list[str]]:
    """Return the names of the configuration of each model that a file declares, without running it. A file that cannot
    be read declares none.
    """
    try:
        body = ast.parse(path.read_text(encoding="utf-8")).body
    except (OSError, SyntaxError, ValueError):
        return {}
    functions = [node for node in body if isinstance(node, ast.FunctionDef)]
    decorators = {each.name: [ast.unparse(d).rpartition(".")[2] for d in each.decorator_list] for each in functions}
    return {each.name: [a.arg for a in each.args.kwonlyargs] for each in functions if "model" in decorators[each.name]}


def load_declaration(path: Path, function: str) -> Model:
    """Import a user's file and return a model that it declares.

    Raises UsageError if there is no such file or model, FrontendError if the file cannot be imported.
    """
    if not path.is_file():
        raise UsageError(f"there is no file {path}", hint=nearest_path_hint(path, rest=f":{function}"))
    name = f"treadle_model_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or not isinstance(spec.loader, SourceLoader):
        raise UsageError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    keep_neighbors(module, neighbors := Neighbors(path.parent))
    try:
        code = spec.loader.source_to_code(spec.loader.get_data(str(path)), str(path))
        with neighbors.importable():
            exec(code, vars(module))
    except TreadleError:
        raise
    except SyntaxError as error:
        at = f"{Path(error.filename or path).name}:{error.lineno}"
        raise FrontendError(f"{path.name} is not Python: {error.msg}", source=at) from error
    except SystemExit as error:
        raise FrontendError(
            f"{path.name} ends when it is imported: SystemExit: {error}",
            source=str(raising_line(error) or path.name),
            hint='put the code that ends the script under: if __name__ == "__main__":',
        ) from error
    except Exception as error:
        raise FrontendError(
            f"{path.name} cannot be imported: {type(error).__name__}: {error}",
            source=str(raising_line(error) or path.name),
            hint=_import_hint(path, error),
        ) from error
    models = {n: v for n, v in vars(module).items() if isinstance(v, Model)}
    if function not in models:
        near = NearestNames(models).of(function) or NearestNames(models).of(function.lower())
        meant: Any = vars(module).get(function)
        hint = "one of " + ", ".join(models) if models else f"{path}:FUNCTION, a function with the decorator @t.model"
        if _is_torch_module(meant):
            made = f"{function}({'...' if _required(meant) else ''})" if inspect.isclass(meant) else function
            names = [name for name in _required(meant.forward) if name != "self"]
            example = f"({', '.join(names)}{',' * (len(names) == 1)})"
            hint = f"in Python: treadle.compile(treadle.from_torch({made}, {example})), with tensors for its forward"
        elif inspect.isfunction(meant):
            hint = "decorate it with @t.model"
        elif near:
            hint = argument_hint(f"{path}:{function}", f"{path}:{near[0]}")
        raise UsageError(f"{path.name} declares no model {function!r}", hint=hint)
    return models[function]


def _required(function: Callable[..., Any]) -> list[str]:
    """Return the parameters without defaults that can be passed by position; ... if they are unknown."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        found = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a function without Python code
        return ["..."]
    return [each.name for each in found if each.kind in kinds and each.default is each.empty]


def _is_torch_module(value: object) -> bool:
    """Return True for a module of PyTorch or a class of modules, without an import of PyTorch."""
    kind = value if isinstance(value, type) else type(value)
    return any((each.__module__, each.__name__) == ("torch.nn.modules.module", "Module") for each in kind.__mro__)


def _import_hint(path: Path, error: Exception) -> str | None:
    """Return a hint for a module that is not found beside a file."""
    if isinstance(error, ImportError) and "relative import" in str(error):
        return f"the import without the dot, of a module beside {path.name}"
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"a file {error.name.partition('.')[0]}.py beside {path.name}, or its folder in PYTHONPATH"
    return None

"""The number of tasks of a kernel for threads, computed on the host from the sizes of a launch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from treadle.backends.tvm.kernels.devices.statements import Let, Loop, Statement, When, walk
from treadle.backends.tvm.kernels.devices.values import ARITHMETIC, COMPARISONS, ThreadNode

_OPERATIONS: Mapping[str, Callable[[int, int], int]] = {
    **ARITHMETIC,
    **COMPARISONS,
    "&&": lambda a, b: a and b,
    "||": lambda a, b: a or b,
}

_INDICES = ("i64", "i32", "bool")


def count_tasks(body: list[Statement], sizes: Mapping[str, int]) -> int | None:
    """Return the largest number of tasks of the loops over tasks.

    sizes  the sizes of the launch, by the names of the kernel's arguments

    Return None if a number depends on the content of memory.
    """
    numbers, most = dict(sizes), 0
    for statement in body:
        match statement:
            case Let(variable, value):
                result = _evaluate(value, numbers)
                if result is not None:
                    numbers[str(variable.data)] = result
            case Loop(_, count, inner, _, tasks) if tasks or _has_tasks(inner):
                found = _evaluate(count, numbers) if tasks else count_tasks(inner, numbers)
                if found is None:
                    return None
                most = max(most, found)
            case When(_, inner) if _has_tasks(inner):
                found = count_tasks(inner, numbers)
                if found is None:
                    return None
                most = max(most, found)
    return most


def _has_tasks(body: list[Statement]) -> bool:
    return any(isinstance(statement, Loop) and statement.tasks for statement in walk(body))


def _evaluate(node: ThreadNode, numbers: Mapping[str, int]) -> int | None:
    """Return the value of an expression of sizes, or None."""
    match node.op:
        case "const":
            return None if isinstance(node.data, float) else int(node.data)
        case "variable":
            return numbers.get(node.data)
        case "cast":
            return _evaluate(node.args[0], numbers) if node.type in _INDICES else None
        case "select":
            condition = _evaluate(node.args[0], numbers)
            return None if condition is None else _evaluate(node.args[1 if condition else 2], numbers)
    if node.op not in _OPERATIONS:
        return None
    a, b = (_evaluate(arg, numbers) for arg in node.args)
    if a is None or b is None:
        return None
    if node.op in "/%" and not b:  # in a branch that is not taken
        return 0
    return int(_OPERATIONS[node.op](a, b))

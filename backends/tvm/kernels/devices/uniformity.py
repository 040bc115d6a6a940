"""Uniform control flow for WGSL: the counts and conditions that decide about barriers are the same in all threads.

WGSL requires that all threads of a group reach a barrier, and that a compiler can see it: a loop or a branch with a
barrier inside may depend on constants, sizes, the block's number, and what these index in read-only buffers. In our
kernels every scalar is the same in all threads, also if it was read from other memory. `with_uniform_control` passes
such a scalar to the compiler as the result of `workgroupUniformLoad`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from treadle.backends.tvm.kernels.devices.statements import GLOBAL, Barrier, Let, Loop, Memory, Statement, When, walk
from treadle.backends.tvm.kernels.devices.values import INDEX, ThreadNode, constant, operation


@dataclass(frozen=True)
class UniformLet(Statement):
    """Bind an integer, which is the same in all threads, to a variable that is known to be uniform."""

    variable: ThreadNode
    value: ThreadNode


def with_uniform_control(
    statements: Sequence[Statement], sizes: Sequence[str], is_constant: Callable[[Memory], bool]
) -> list[Statement]:
    """Return the statements, in which uniform variables control the loops and branches with barriers.

    is_constant  returns True for a buffer that the kernel's text binds as read-only
    """
    return _Walk(set(sizes), is_constant).block(statements)


class _Walk:
    def __init__(self, uniform: set[str], is_constant: Callable[[Memory], bool]) -> None:
        self.uniform, self.is_constant, self.count = uniform, is_constant, 0

    def block(self, statements: Sequence[Statement]) -> list[Statement]:
        made: list[Statement] = []
        for statement in statements:
            match statement:
                case Let(variable, value) if self._is_uniform(value):
                    self.uniform.add(variable.data)
                case Loop():
                    if not self._is_uniform(statement.count) and _waits(statement.body):
                        statement = replace(statement, count=self._read(statement.count, made))
                    if self._is_uniform(statement.count):
                        self.uniform.add(statement.variable.data)
                    statement = replace(statement, body=self.block(statement.body))
                case When(condition, body):
                    if not self._is_uniform(condition) and _waits(body):
                        number = ThreadNode("cast", INDEX, (condition,))
                        condition = operation("!=", self._read(number, made), constant(0, INDEX))
                    statement = When(condition, self.block(body))
            made.append(statement)
        return made

    def _read(self, value: ThreadNode, made: list[Statement]) -> ThreadNode:
        variable = ThreadNode("variable", value.type, (), f"uniform_{self.count}")
        self.count += 1
        self.uniform.add(variable.data)
        made.append(UniformLet(variable, value))
        return variable

    def _is_uniform(self, node: ThreadNode) -> bool:
        match node.op:
            case "const":
                return True
            case "variable":
                return node.data in self.uniform
            case "load":
                memory = node.data.memory
                return memory.place == GLOBAL and self.is_constant(memory) and self._is_uniform(node.data.index)
            case "lane" | "table" | "call":  # a lane function may read a variable of the module
                return False
        return all(map(self._is_uniform, node.args))


def _waits(body: list[Statement]) -> bool:
    return any(isinstance(s, Barrier) for s in walk(body))

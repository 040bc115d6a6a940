"""Kernels for threads as text in C dialects: CUDA, OpenCL C, the Metal Shading Language.

The statements are the same text in all dialects. What differs is in the prelude of a dialect (`preludes`): macros for
memory and for the numbers of threads and blocks. The emulator compiles the CUDA text with a prelude of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np

from treadle.backends.tvm.kernels.devices.group_kernel import GroupKernel
from treadle.backends.tvm.kernels.devices.statements import (
    SHARED,
    Access,
    Barrier,
    Declare,
    Exchange,
    Let,
    Loop,
    Memory,
    Statement,
    Store,
    When,
)
from treadle.backends.tvm.kernels.devices.values import ThreadNode
from treadle.ir.types import boolean

C_TYPES: Mapping[str, str] = {
    "f64": "double",
    "f32": "float",
    "f16": "unsigned short",
    "bf16": "unsigned short",
    "i64": "treadle_i64",
    "i32": "int",
    "i16": "short",
    "i8": "signed char",
    "u8": "unsigned char",
    "bool": "bool",
}
"""C types of values. 16-bit floats are their bits."""

_PRECEDENCE = {"||": 1, "&&": 2, "|": 3, "^": 4, "&": 5, "==": 6, "!=": 6, "<": 7, "<=": 7, ">": 7, ">=": 7}
_PRECEDENCE |= {"<<": 8, ">>": 8, "+": 9, "-": 9, "*": 10, "/": 10, "%": 10}
_FLOATS = ("f32", "f64")
_NARROW = ("i8", "i16", "u8", "bf16", "f16")
_PRELUDE = {"is_nan", "rint", "floor", "sqrt", "abs"}


def stored_type(memory: Memory) -> str:
    """Return the C type of an array's elements. A bool is stored as a byte."""
    return "unsigned char" if memory.dtype is boolean else C_TYPES[memory.dtype.name]


class KernelPrinter:
    """The printer of C dialects.

    block, blocks, thread  the index of the block, the number of blocks, and the thread's index in its block
    """

    block, blocks, thread = "TREADLE_BLOCK", "TREADLE_BLOCKS", "TREADLE_THREAD"

    def __init__(self, kernel: GroupKernel) -> None:
        self.kernel = kernel
        self.tables: dict[tuple[int, ...], str] = {}

    def text(self) -> str:
        kernel = self.kernel
        body = "\n".join([*self._first_lines(), *self._lines(kernel.body, 1)])
        tables = [
            f"TREADLE_CONSTANT unsigned char {name}[{len(entries)}] = {{{', '.join(map(str, entries))}}};\n"
            for entries, name in self.tables.items()
        ]
        return f"{''.join(tables)}{self._signature()} {{\n{body}\n}}\n"

    def _first_lines(self) -> list[str]:
        """Return the lines before the statements: memory of a block, and the number of the thread."""
        lines = [f"  TREADLE_SHARED({stored_type(m)}, {m.name}, {m.cells});" for m in self.kernel.shared]
        if self.kernel.device.group > 1:
            lines.append(f"  const treadle_i64 lane = {self.thread};")
        return lines

    def _signature(self) -> str:
        kernel = self.kernel
        arguments = []
        for memory in kernel.pointers:
            const = "" if memory.is_written else "const "
            arguments += [
                f"TREADLE_GLOBAL({const}{stored_type(memory)}) {memory.name}",
                f"treadle_i64 {memory.name}_at",
            ]
        arguments += [f"treadle_i64 {name}" for name in kernel.sizes]
        return f"TREADLE_KERNEL({kernel.device.threads}) {kernel.name}(\n    " + ",\n    ".join(arguments) + ")"

    # -- statements ------------------------------------------------------------------------------------------

    def _lines(self, statements: list[Statement], depth: int) -> Iterator[str]:
        """Yield the lines of statements. What has the same form in all languages stands here."""
        pad = "  " * depth
        for statement in statements:
            match statement:
                case Store(access, _, first):
                    line, place = self._store(statement), access.memory.place
                    if first is not None and self.kernel.device.group > 1 and place not in ("scalars", "vectors"):
                        line = f"if (lane < {first}) {{ {line} }}"
                    yield pad + line
                case When(condition, body):
                    yield f"{pad}if ({self.expression(condition)}) {{"
                    yield from self._lines(body, depth + 1)
                    yield f"{pad}}}"
                case Loop():
                    yield from (pad + line for line in self._loop_head(statement))
                    yield from self._lines(statement.body, depth + 1)
                    yield f"{pad}}}"
                case _:
                    yield from (pad + line for line in self._simple(statement))

    def _simple(self, statement: Statement) -> list[str]:
        """Return the lines of a statement that contains no others."""
        match statement:
            case Let(variable, value):
                return [f"const {C_TYPES[variable.type]} {variable.data} = {self.expression(value)};"]
            case Exchange(variable, value, thread):
                c = C_TYPES[variable.type]
                word = "int" if variable.type in (*_NARROW, "bool") else c
                sent = self.expression(value)
                sent = f"({word})({sent})" if word != c else sent
                received = f"TREADLE_SHUFFLE({sent}, (int)({self.expression(thread)}))"
                return [f"const {c} {variable.data} = {f'({c})' if word != c else ''}{received};"]
            case Declare(memory):
                if memory.place == SHARED:
                    return []
                return [f"TREADLE_PRIVATE({stored_type(memory)}, {memory.name}, {max(1, memory.cells)});"]
            case Barrier():
                return ["TREADLE_BARRIER;"]
            case _:
                raise AssertionError(type(statement))

    def _store(self, store: Store) -> str:
        """Return the statement that stores a value in an array."""
        made = self.expression(store.value)
        made = f"(unsigned char)({made})" if store.access.memory.dtype is boolean else made
        return f"{self._place(store.access)} = {made};"

    def _loop_head(self, loop: Loop) -> list[str]:
        """Return the lines that begin a loop."""
        name, (begin, step) = loop.variable.data, self._range(loop)
        advance = f"++{name}" if step == "1" else f"{name} += {step}"
        head = f"for (treadle_i64 {name} = {begin}; {name} < {self.expression(loop.count)}; {advance}) {{"
        return ["TREADLE_UNROLL", head] if loop.unrolled and not loop.tasks else [head]

    def _range(self, loop: Loop) -> tuple[str, str]:
        """Return the first value of a loop's variable, and the step to its next value."""
        tasks = self.kernel.device.tasks
        if not loop.tasks:
            return "0", "1"
        if tasks == 1:
            return self.block, self.blocks
        return f"{self.block} * {tasks} + {self.thread}", f"{self.blocks} * {tasks}"

    # -- expressions -----------------------------------------------------------------------------------------

    def _place(self, access: Access) -> str:
        memory = access.memory
        at = self.expression(access.index)
        if memory.place == "global":
            at = f"{memory.name}_at" if at == "0" else f"{memory.name}_at + {at}"
        return f"{memory.name}[{at}]"

    def _load(self, access: Access) -> str:
        memory = access.memory
        if access.wide is not None:
            at = self.expression(access.index)
            if memory.place == "global":
                at = f"{memory.name}_at + {at}"
            return f"TREADLE_WIDE({C_TYPES[access.wide]}, {memory.name}, {at})"
        return f"({self._place(access)} != 0)" if memory.dtype is boolean else self._place(access)

    def expression(self, node: ThreadNode, above: int = 0) -> str:
        """Return an expression as text, in parentheses if its operator binds less than `above`."""
        match node.op:
            case "const":
                return literal(node.data, node.type)
            case "variable":
                return str(node.data)
            case "lane":
                return "lane"
            case "load":
                return self._load(node.data)
            case "table":
                name = self.tables.setdefault(node.data, f"{self.kernel.name}_table_{len(self.tables)}")
                return f"(treadle_i64){name}[lane]"
            case "neg":
                if node.type == "i32":
                    return f"(int)(0u - (unsigned int){self.expression(node.args[0], 20)})"
                return f"-{self.expression(node.args[0], 20)}"
            case "not":
                return f"!{self.expression(node.args[0], 20)}"
            case "select":
                c, a, b = (self.expression(x, 1) for x in node.args)
                return f"({c} ? {a} : {b})"
            case "cast":
                return f"({C_TYPES[node.type]}){self.expression(node.args[0], 20)}"
            case "bits":
                return self._bits(node)
            case "call":
                return f"{node.data}({', '.join(map(self.expression, node.args))})"
            case "math":
                return self._math(node)
        return self._operation(node, above)

    def _math(self, node: ThreadNode) -> str:
        given = ", ".join(map(self.expression, node.args))
        of = node.args[0].type
        if node.data in _PRELUDE:
            return f"TREADLE_{node.data}_{of}".upper() + f"({given})"
        overloaded = self.kernel.device.limits.language == "opencl"  # which has no `fmodf`
        return f"{node.data}{'f' if of == 'f32' and not overloaded else ''}({given})"

    def _bits(self, node: ThreadNode) -> str:
        (x,) = node.args
        given = self.expression(x)
        if x.type in _FLOATS or node.type in _FLOATS:
            f = node.type if node.type in _FLOATS else x.type
            unsigned = "unsigned int" if f == "f32" else "treadle_u64"
            if node.type in _FLOATS:
                return f"TREADLE_OF_BITS_{f.upper()}(({unsigned})({given}))"
            return f"({C_TYPES[node.type]})TREADLE_BITS_OF_{f.upper()}({given})"
        return f"({C_TYPES[node.type]})({given})"

    def _operation(self, node: ThreadNode, above: int) -> str:
        a, b = node.args
        type, op = a.type, node.op
        if op in ("min", "max"):
            return f"treadle_{op}_{type}({self.expression(a)}, {self.expression(b)})"
        if type in _FLOATS:
            if op in "+-" and self.kernel.device.fused and "*" in (a.op, b.op):
                return self._fused(node)
            if op in "*/":
                name = {"*": "MUL", "/": "DIV"}[op]
                return f"TREADLE_{name}_{type.upper()}({self.expression(a)}, {self.expression(b)})"
        if type == "i32" and op in ("+", "-", "*", "<<"):  # wraps around
            right = self.expression(b, 20)
            right = right if op == "<<" else f"(unsigned int){right}"
            return f"(int)((unsigned int){self.expression(a, 20)} {op} {right})"
        if type in _NARROW and op in ("+", "-", "*", "<<", ">>", "&", "|", "^"):
            return f"({C_TYPES[type]})({self.expression(a, 20)} {op} {self.expression(b, 20)})"
        if type == "i64" and op in "/%":
            return f"TREADLE_{'DIVIDE' if op == '/' else 'MODULO'}({self.expression(a)}, {self.expression(b)})"
        rank = _PRECEDENCE[op]
        text = f"{self.expression(a, rank)} {op} {self.expression(b, rank + 1)}"
        return f"({text})" if rank < above or (rank <= 8 and above) else text

    def _fused(self, node: ThreadNode) -> str:
        """Return a sum with a product, rounded once. Of two products, the first is fused."""
        a, b = node.args
        first, type = a.op == "*", a.type
        product, rest = (a, b) if first else (b, a)
        x, y, z = self.expression(product.args[0]), self.expression(product.args[1]), self.expression(rest)
        if node.op == "-":
            x, z = (x, f"-({z})") if first else (f"-({x})", z)
        return f"TREADLE_FMA_{type.upper()}({x}, {y}, {z})"


def literal(value: float | int | bool, type: str) -> str:
    """Return a constant in C."""
    if type == "bool":
        return "true" if value else "false"
    if type in _FLOATS:
        if not math.isfinite(value):
            bits = 0x7FC00000 if math.isnan(value) else 0x7F800000 if value > 0 else 0xFF800000
            return ("" if type == "f32" else "(double)") + f"TREADLE_OF_BITS_F32({bits:#x}u)"
        number = repr(float(value)) if type == "f64" else f"{np.float32(value)!s}f"
        number = number if any(c in number for c in ".e") else number.replace("f", ".0f")
        return f"({number})" if number.startswith("-") else number
    if type == "i32" and value == -(2**31):
        return "(-2147483647 - 1)"
    if type == "i64" and not -(2**31) < value < 2**31:
        return "(-9223372036854775807 - 1)" if value == -(2**63) else f"({value})"
    return f"({value})" if value < 0 else str(value)

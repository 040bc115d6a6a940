"""Kernels for threads as text in WGSL, the language of WebGPU.

Buffers are bound in the order of the pointers. The next binding is a uniform buffer of 32-bit integers: the element
offset of each pointer, then the sizes, padded to a multiple of four. Indices and 64-bit integers are stored in 32 bits.
Buffers of 8- and 16-bit elements are refused, since WGSL has no types to store them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from treadle.backends.tvm.kernels.devices.group_emitter import GroupKernel
from treadle.backends.tvm.kernels.devices.kernel_text import KernelPrinter
from treadle.backends.tvm.kernels.devices.statements import (
    SHARED,
    Access,
    Barrier,
    Declare,
    Let,
    Loop,
    Memory,
    Statement,
)
from treadle.backends.tvm.kernels.devices.values import ThreadNode
from treadle.ir.errors import BackendError

_TYPES: Mapping[str, str] = {"f32": "f32", "i32": "i32", "i64": "i32", "bool": "bool"}
_FUNCTIONS = {"rint": "round", "floor": "floor", "sqrt": "sqrt", "abs": "abs", "is_nan": "TREADLE_IS_NAN_F32"}


class WgslPrinter(KernelPrinter):
    """The printer of WGSL."""

    block, blocks, thread = "i32(block.x)", "i32(blocks.x)", "i32(thread)"

    def text(self) -> str:
        kernel, device = self.kernel, self.kernel.device
        numbers = [f"{memory.name}_at" for memory in kernel.pointers] + kernel.sizes
        lines = [f"  let {name}: i32 = numbers[{i // 4}].{'xyzw'[i % 4]};" for i, name in enumerate(numbers)]
        if device.group > 1:
            lines.append(f"  let lane: i32 = {self.thread};")
        lines += self._lines(kernel.body, 1)
        globals = [
            f"@group(0) @binding({i}) var<storage, {'read_write' if m.is_written else 'read'}> {m.name}: "
            f"array<{self._type(m.dtype.name)}>;\n"
            for i, m in enumerate(kernel.pointers)
        ]
        count = max(1, -(-len(numbers) // 4))
        globals.append(f"@group(0) @binding({len(kernel.pointers)}) var<uniform> numbers: array<vec4<i32>, {count}>;\n")
        globals += [f"var<workgroup> {m.name}: array<{self._type(m.dtype.name)}, {m.cells}>;\n" for m in kernel.shared]
        globals += [
            f"var<private> {name}: array<i32, {len(entries)}> = array<i32, {len(entries)}>"
            f"({', '.join(map(str, entries))});\n"
            for entries, name in self.tables.items()
        ]
        body = "\n".join(lines)
        return f"""{"".join(globals)}@compute @workgroup_size({device.threads})
fn {kernel.name}(
    @builtin(workgroup_id) block: vec3<u32>,
    @builtin(num_workgroups) blocks: vec3<u32>,
    @builtin(local_invocation_index) thread: u32) {{
{body}
}}
"""

    def _type(self, name: str) -> str:
        if name not in _TYPES:
            raise BackendError(f"kernel {self.kernel.kernel.title} has {name} numbers, which WGSL lacks")
        return _TYPES[name]

    # -- statements ------------------------------------------------------------------------------------------

    def _simple(self, statement: Statement) -> list[str]:
        match statement:
            case Let(variable, value):
                return [f"let {variable.data}: {self._type(variable.type)} = {self.expression(value)};"]
            case Declare(memory):
                if memory.place == SHARED:
                    return []
                return [f"var {memory.name}: array<{self._type(memory.dtype.name)}, {max(1, memory.cells)}>;"]
            case Barrier():
                return ["workgroupBarrier();", "storageBarrier();"]
            case _:
                raise AssertionError(type(statement))

    def _stored(self, to: Memory, value: ThreadNode) -> str:
        return self.expression(value)

    def _loop_head(self, loop: Loop) -> list[str]:
        name, (begin, step) = loop.variable.data, self._range(loop)
        return [f"for (var {name}: i32 = {begin}; {name} < {self.expression(loop.count)}; {name} += {step}) {{"]

    # -- expressions -----------------------------------------------------------------------------------------

    def _load(self, access: Access) -> str:
        if access.wide is not None:
            raise BackendError(f"kernel {self.kernel.kernel.title} reads words of bytes, which WGSL lacks")
        return self._place(access)

    def expression(self, node: ThreadNode, above: int = 0) -> str:
        """Return an expression as text; an operation is in parentheses."""
        match node.op:
            case "const":
                return _literal(node.data, self._type(node.type))
            case "table":
                return f"{self.tables.setdefault(node.data, f'{self.kernel.name}_table_{len(self.tables)}')}[lane]"
            case "neg" | "not":
                return f"({'-' if node.op == 'neg' else '!'}{self.expression(node.args[0])})"
            case "select":
                condition, then, otherwise = map(self.expression, node.args)
                return f"select({otherwise}, {then}, {condition})"
            case "cast":
                return f"{self._type(node.type)}({self.expression(node.args[0])})"
            case "bits":
                return f"bitcast<{self._type(node.type)}>({self.expression(node.args[0])})"
            case "math":
                return f"{_FUNCTIONS[node.data]}({self.expression(node.args[0])})"
        return super().expression(node, above)

    def _operation(self, node: ThreadNode, above: int) -> str:
        a, b = node.args
        if a.type == "f32" and node.op in "+-" and "*" in (a.op, b.op):
            return self._fused(node)
        x, y = self.expression(a), self.expression(b)
        if node.op in ("min", "max"):
            return f"{node.op}({x}, {y})"
        if a.type == "f32" and node.op == "*":
            return f"TREADLE_MUL_F32({x}, {y})"
        return f"({x} {node.op} u32({y}))" if node.op in ("<<", ">>") else f"({x} {node.op} {y})"


def _literal(value: float | int | bool, type: str) -> str:
    """Return a constant."""
    if type == "bool":
        return "true" if value else "false"
    if type == "i32":
        return "i32(-2147483648)" if value == -(2**31) else f"({value})" if value < 0 else str(value)
    if not math.isfinite(value):
        name = "TREADLE_NAN_F32()" if math.isnan(value) else "TREADLE_INFINITY_F32()"
        return f"(-{name})" if value < 0 else name
    return f"({np.float32(value)!s}f)"


def wgsl_text(kernel: GroupKernel) -> str:
    """Return a kernel in WGSL, without the prelude and the lane functions."""
    return WgslPrinter(kernel).text()

"""Kernels for threads as text in WGSL, the language of WebGPU.

**Buffers are arrays of 32-bit words.** WGSL has no types of 8 and 16 bits to store, and a word can be read as any type.
A number of 8 or 16 bits is a part of a word; a bool is a byte. The other parts of the word belong to other threads, so
a thread that stores one changes its bits by an atomic exclusive or. Integers of 64 bits are stored in 32 bits.

**Pointers share bindings.** WebGPU allows only 8 buffers in a kernel, binds them at multiples of 256 bytes, and refuses
a launch that binds one buffer twice, once to be read and once to be written. The arguments of a launch are mostly parts
of one buffer, the arena. Therefore pointers into one buffer share a binding, and the text depends on the `Sharing` of a
launch. A kernel has one text for each sharing in which it is launched. `treadle.backends.tvm.runtimes.launch_bindings`
finds the sharing of a launch, and docs/decisions/0027-bindings-of-webgpu.md has the reasons.

Bindings are numbered from 0. The next binding is a uniform buffer of 32-bit integers: for each pointer the number of
elements from the start of its binding to element 0, then the sizes, then 0, padded to a multiple of four.

**Loops on a CPU.** Drivers unroll loops with constant counts, as a GPU's registers require. A driver that runs kernels
on a CPU then compiles for seconds. With `keeps_loops`, the text adds the 0 of the uniform buffer to these counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from treadle.backends.tvm.kernels.arithmetic.wgsl_text import FMOD, narrowed
from treadle.backends.tvm.kernels.devices.group_kernel import GroupKernel
from treadle.backends.tvm.kernels.devices.kernel_text import KernelPrinter
from treadle.backends.tvm.kernels.devices.statements import (
    GLOBAL,
    SHARED,
    Access,
    Barrier,
    Declare,
    Let,
    Loop,
    Memory,
    Statement,
    Store,
)
from treadle.backends.tvm.kernels.devices.uniformity import UniformLet, with_uniform_control
from treadle.backends.tvm.kernels.devices.values import ThreadNode, is_constant
from treadle.ir.errors import BackendError
from treadle.ir.types import DType, boolean

_TYPES: Mapping[str, str] = {
    **dict.fromkeys(("i64", "i32", "i16", "i8"), "i32"),
    **dict.fromkeys(("u8", "f16", "bf16"), "u32"),
    "f32": "f32",
    "bool": "bool",
}
_FUNCTIONS = {"rint": "round", "floor": "floor", "sqrt": "sqrt", "abs": "abs", "is_nan": "TREADLE_IS_NAN_F32"}
_FUNCTIONS |= {"fmod": "TREADLE_FMOD_F32"}
_BITS = {"i8": 8, "u8": 8, "i16": 16, "f16": 16, "bf16": 16}
"""Widths of the types whose values are 32-bit integers in the range of the type."""


def stored_bytes(dtype: DType) -> int:
    """Return the number of bytes of an element in a buffer."""
    return min(dtype.bytes, 4)


@dataclass(frozen=True)
class Sharing:
    """The bindings of a kernel's pointers.

    numbers  number of the binding of each pointer, in the order of the pointers: (0, 0, 1) if the first two share one
    written  for each binding, True if it is `read_write`
    """

    numbers: tuple[int, ...]
    written: tuple[bool, ...]

    @staticmethod
    def apart(kernel: GroupKernel) -> Sharing:
        """Return the sharing of a launch whose pointers are in buffers of their own."""
        written = tuple(memory.is_written for memory in kernel.pointers)
        return Sharing(tuple(range(len(written))), written)


class WgslPrinter(KernelPrinter):
    """The printer of WGSL."""

    block, blocks, thread = "i32(block.x)", "i32(blocks.x)", "i32(thread)"

    def __init__(self, kernel: GroupKernel, sharing: Sharing | None = None, *, keeps_loops: bool = False) -> None:
        super().__init__(kernel)
        self.sharing, self.keeps_loops = sharing or Sharing.apart(kernel), keeps_loops
        self.cells: list[str] = []
        self.functions: dict[str, str] = {}
        """Functions of this kernel by name, most of which read or write an element of less than a word."""

    @cached_property
    def bindings(self) -> list[list[Memory]]:
        """The pointers of each binding."""
        pairs = list(zip(self.sharing.numbers, self.kernel.pointers, strict=True))
        return [[memory for n, memory in pairs if n == number] for number in range(len(self.sharing.written))]

    @cached_property
    def _words(self) -> Mapping[Memory, str]:
        """The name of each pointer's array of words."""
        return {
            memory: members[0].name if len(members) == 1 else f"words_{number}"
            for number, members in enumerate(self.bindings)
            for memory in members
        }

    @cached_property
    def _atomic(self) -> set[str]:
        """The names of the arrays of which a thread writes parts of words."""
        return {self._words[m] for m in self.kernel.pointers if m.is_written and stored_bytes(m.dtype) < 4}

    def _is_constant(self, memory: Memory) -> bool:
        return not self.sharing.written[self.sharing.numbers[self.kernel.pointers.index(memory)]]

    def text(self) -> str:
        kernel, device = self.kernel, self.kernel.device
        numbers = [*(f"{memory.name}_at" for memory in kernel.pointers), *kernel.sizes, "zero"]
        body: Sequence[Statement] = kernel.body
        if device.group > 1:
            body = with_uniform_control(body, numbers, self._is_constant)
        lines = [f"  let {name}: i32 = numbers[{i // 4}].{'xyzw'[i % 4]};" for i, name in enumerate(numbers)]
        if device.group > 1:
            lines.append(f"  let lane: i32 = {self.thread};")
        lines += self._lines(list(body), 1)
        globals = []
        for i, members in enumerate(self.bindings):
            name, access = self._words[members[0]], "read_write" if self.sharing.written[i] else "read"
            word = "atomic<u32>" if name in self._atomic else "u32"
            globals.append(f"@group(0) @binding({i}) var<storage, {access}> {name}: array<{word}>;\n")
        count = -(-len(numbers) // 4)
        globals.append(f"@group(0) @binding({len(self.bindings)}) var<uniform> numbers: array<vec4<i32>, {count}>;\n")
        globals += [f"var<workgroup> {m.name}: array<{self._type(m.dtype.name)}, {m.cells}>;\n" for m in kernel.shared]
        globals += [f"var<workgroup> {name}: i32;\n" for name in self.cells]
        globals += [
            f"var<private> {name}: array<i32, {len(entries)}> = array<i32, {len(entries)}>"
            f"({', '.join(map(str, entries))});\n"
            for entries, name in self.tables.items()
        ]
        written = "\n".join(lines)
        return f"""{"".join(globals)}{"".join(self.functions.values())}@compute @workgroup_size({device.threads})
fn {kernel.name}(
    @builtin(workgroup_id) block: vec3<u32>,
    @builtin(num_workgroups) blocks: vec3<u32>,
    @builtin(local_invocation_index) thread: u32) {{
{written}
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
            case UniformLet(variable, value):
                cell = f"{variable.data}_cell"
                self.cells.append(cell)
                return [
                    f"if (lane < 1) {{ {cell} = {self.expression(value)}; }}",
                    f"let {variable.data}: i32 = workgroupUniformLoad(&{cell});",
                ]
            case Declare(memory):
                if memory.place == SHARED:
                    return []
                return [f"var {memory.name}: array<{self._type(memory.dtype.name)}, {max(1, memory.cells)}>;"]
            case Barrier():
                return ["workgroupBarrier();", "storageBarrier();"]
            case _:
                raise AssertionError(type(statement))

    def _store(self, store: Store) -> str:
        access, value = store.access, self.expression(store.value)
        memory = access.memory
        if memory.place != GLOBAL:
            return f"{self._place(access)} = {value};"
        words, at = self._words[memory], self.expression(access.index)
        if stored_bytes(memory.dtype) < 4:
            return f"{self._part_function('put', memory)}({memory.name}_at + {at}, {_bits_of(value, memory.dtype)});"
        place, bits = f"{words}[{memory.name}_at + {at}]", f"bitcast<u32>({value})"
        return f"atomicStore(&{place}, {bits});" if words in self._atomic else f"{place} = {bits};"

    def _loop_head(self, loop: Loop) -> list[str]:
        name, (begin, step), count = loop.variable.data, self._range(loop), self.expression(loop.count)
        if self.keeps_loops and is_constant(loop.count) and loop.count.data > 1:
            count += " + zero"
        return [f"for (var {name}: i32 = {begin}; {name} < {count}; {name} += {step}) {{"]

    # -- expressions -----------------------------------------------------------------------------------------

    def _load(self, access: Access) -> str:
        memory = access.memory
        if access.wide is not None:
            return self._wide(access)
        if memory.place != GLOBAL:
            return self._place(access)
        if stored_bytes(memory.dtype) < 4:
            made = f"{self._part_function('get', memory)}({memory.name}_at + {self.expression(access.index)})"
            return f"({made} != 0u)" if memory.dtype is boolean else made
        return _of_word(self._word(memory, f"{memory.name}_at + {self.expression(access.index)}"), memory.dtype.name)

    def _word(self, memory: Memory, at: str) -> str:
        words = self._words[memory]
        return f"atomicLoad(&{words}[{at}])" if words in self._atomic else f"{words}[{at}]"

    def _wide(self, access: Access) -> str:
        """Return several elements, which are aligned to their size, as one wider number."""
        memory, width = access.memory, 8 * access.memory.dtype.bytes
        type, at = access.wide, self.expression(access.index)
        assert type is not None
        if memory.place == GLOBAL and width * access.factor == 32:
            elements = access.factor.bit_length() - 1
            return _of_word(self._word(memory, f"({memory.name}_at + {at}) >> {elements}u"), type)
        if memory.place == GLOBAL:  # two bytes
            return _in_range(self._part_function("get", memory, 16) + f"({memory.name}_at + {at})", type)
        low = 2**width - 1
        parts = [f"(({memory.name}[{at} + {i}] & {low}) << {width * i}u)" for i in range(access.factor)]
        word = "(" + " | ".join(parts) + ")"
        return f"bitcast<{self._type(type)}>({word})" if width * access.factor == 32 else _in_range(word, type)

    def _part_function(self, verb: str, memory: Memory, width: int = 0) -> str:
        """Return the name of a function that reads (`get`) or writes (`put`) an element of 8 or 16 bits."""
        element = 8 * memory.dtype.bytes
        width = width or element
        name = f"{memory.name}_{verb}" + (f"_{width}" if width != element else "")
        shift, words = f"u32(at & {32 // element - 1}) * {element}u", self._words[memory]
        at = f"at >> {(32 // element).bit_length() - 1}u"
        if verb == "get":
            signed = memory.dtype.name in ("i8", "i16") and width == element
            word = self._word(memory, at)
            word, type = (f"bitcast<i32>({word})", "i32") if signed else (word, "u32")
            self.functions[name] = (
                f"fn {name}(at: i32) -> {type} {{ return extractBits({word}, {shift}, {width}u); }}\n"
            )
        else:
            mask, word = f"{2**width - 1}u", f"{words}[{at}]"
            self.functions[name] = (
                f"fn {name}(at: i32, bits: u32) {{\n  let shift: u32 = {shift};\n"
                f"  let changed: u32 = ((atomicLoad(&{word}) >> shift) ^ bits) & {mask};\n"
                f"  atomicXor(&{word}, changed << shift);\n}}\n"
            )
        return name

    def expression(self, node: ThreadNode, above: int = 0) -> str:
        """Return an expression as text; an operation is in parentheses."""
        match node.op:
            case "const":
                value = narrowed(node.data) if node.type == "i64" else node.data
                assert value is not None  # the emitter refuses it
                return _literal(value, self._type(node.type))
            case "table":
                return f"{self.tables.setdefault(node.data, f'{self.kernel.name}_table_{len(self.tables)}')}[lane]"
            case "not":
                return f"(!{self.expression(node.args[0])})"
            case "neg":
                zero = "" if node.type == "f32" else "0" if self._type(node.type) == "i32" else "0u "
                return _in_range(f"({zero}-{self.expression(node.args[0])})", node.type)
            case "select":
                condition, then, otherwise = map(self.expression, node.args)
                return f"select({otherwise}, {then}, {condition})"
            case "cast":
                return self._converted(node, self._type(node.type))
            case "bits":
                return self._converted(node, f"bitcast<{self._type(node.type)}>")
            case "math":
                if node.data == "fmod":
                    self.functions["fmod"] = FMOD
                return f"{_FUNCTIONS[node.data]}({', '.join(map(self.expression, node.args))})"
        return super().expression(node, above)

    def _converted(self, node: ThreadNode, made_of: str) -> str:
        (x,) = node.args
        text = self.expression(x)
        if self._type(x.type) != self._type(node.type):
            text = f"{made_of}({text})"
        return text if x.type == node.type or x.type == "bool" else _in_range(text, node.type)

    def _operation(self, node: ThreadNode, above: int) -> str:
        a, b = node.args
        if a.type == "f32" and node.op in "+-" and "*" in (a.op, b.op):
            return self._fused(node)
        x, y = self.expression(a), self.expression(b)
        if node.op in ("min", "max"):
            return f"{node.op}({x}, {y})"
        if a.type == "f32" and node.op == "*":
            return f"TREADLE_MUL_F32({x}, {y})"
        if a.type == "f32" and node.op == "!=":  # `!=` is false for a NaN in naga's SPIR-V
            return f"(!({x} == {y}))"
        if node.op in ("<<", ">>"):
            return _in_range(f"({x} {node.op} u32({y}))", node.type)
        return _in_range(f"({x} {node.op} {y})", node.type if node.op in ("+", "-", "*") else "i32")


def _of_word(word: str, type: str) -> str:
    made = _TYPES[type]
    return word if made == "u32" else f"bitcast<{made}>({word})"


def _bits_of(value: str, dtype: DType) -> str:
    """Return a value of less than a word as a u32."""
    type = _TYPES[dtype.name]
    return value if type == "u32" else f"u32({value})" if type == "bool" else f"bitcast<u32>({value})"


def _in_range(text: str, type: str) -> str:
    """Return a 32-bit integer, reduced to the low bits of a narrower type."""
    rest = 32 - _BITS.get(type, 32)
    return f"(({text} << {rest}u) >> {rest}u)" if rest else text


def _literal(value: float | int | bool, type: str) -> str:
    """Return a constant."""
    if type == "bool":
        return "true" if value else "false"
    if type == "u32":
        return f"{value}u"
    if type == "i32":
        return "i32(-2147483648)" if value == -(2**31) else f"({value})" if value < 0 else str(value)
    if not math.isfinite(value):
        name = "TREADLE_NAN_F32()" if math.isnan(value) else "TREADLE_INFINITY_F32()"
        return f"(-{name})" if value < 0 else name
    return f"({np.float32(value)!s}f)"


def wgsl_text(kernel: GroupKernel, sharing: Sharing | None = None, *, keeps_loops: bool = False) -> str:
    """Return a kernel in WGSL, without the prelude and the lane functions. Without a sharing, each pointer has its own
    binding.
    """
    return WgslPrinter(kernel, sharing, keeps_loops=keeps_loops).text()

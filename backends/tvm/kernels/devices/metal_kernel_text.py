"""Kernels for threads as text in the Metal Shading Language.

Buffers are arguments of their own, in the kernel's order. Numbers (offsets of buffers, then sizes) are the fields of
one structure, in the buffer after them: Metal has at most 31 buffers for a kernel.
"""

from __future__ import annotations

from treadle.backends.tvm.kernels.devices.kernel_text import C_TYPES, KernelPrinter, stored_type
from treadle.backends.tvm.kernels.devices.statements import Exchange, Statement


class MetalPrinter(KernelPrinter):
    """The printer of Metal."""

    def _signature(self) -> str:
        kernel = self.kernel
        numbers = "".join(f"  treadle_i64 {name};\n" for name in kernel.numbers)
        arguments = []
        for place, memory in enumerate(kernel.pointers):
            const = "" if memory.is_written else "const "
            arguments.append(f"TREADLE_GLOBAL({const}{stored_type(memory)}) {memory.name} [[buffer({place})]]")
        arguments.append(f"constant {kernel.name}_numbers& numbers [[buffer({len(kernel.pointers)})]]")
        arguments.append("unsigned int treadle_block [[threadgroup_position_in_grid]]")
        arguments.append("unsigned int treadle_blocks [[threadgroups_per_grid]]")
        arguments.append("unsigned int treadle_thread [[thread_position_in_threadgroup]]")
        head = f"TREADLE_KERNEL({kernel.device.threads}) {kernel.name}(\n    " + ",\n    ".join(arguments) + ")"
        return f"struct {kernel.name}_numbers {{\n{numbers}}};\n{head}"

    def _first_lines(self) -> list[str]:
        unpacked = [f"  const treadle_i64 {name} = numbers.{name};" for name in self.kernel.numbers]
        return [*unpacked, *super()._first_lines()]

    def _simple(self, statement: Statement) -> list[str]:
        if isinstance(statement, Exchange) and statement.variable.type == "i64":  # an instruction exchanges 32 bits
            value, thread = self.expression(statement.value, 20), self.expression(statement.thread)
            low, high = (f"TREADLE_SHUFFLE((int)({part}), (int)({thread}))" for part in (value, f"{value} >> 32"))
            return [f"const {C_TYPES['i64']} {statement.variable.data} = TREADLE_JOINED({low}, {high});"]
        return super()._simple(statement)

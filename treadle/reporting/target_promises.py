"""The level of proof of each target: what the tests execute, what they assemble, and what only hardware can show.

`PROMISES` is the one table. `treadle targets` prints it, and docs/devices.md contains it.
"""

from __future__ import annotations

from dataclasses import dataclass

ON_DEVICE, IN_SOFTWARE, ASSEMBLED, EMITTED, NONE = (
    "executed on the device",
    "executed in software",
    "assembled",
    "emitted",
    "not supported",
)

LEVELS = {
    ON_DEVICE: "tests run programs on the hardware",
    IN_SOFTWARE: "tests run programs on an emulator, or on a driver that computes on the CPU: this proves arithmetic, "
    "not a hardware's driver or its speed",
    ASSEMBLED: "the device's assembler accepts the code; it has not run",
    EMITTED: "the text is printed; no compiler has read it",
    NONE: "no code is generated",
}
"""Each level and its meaning, the strongest first."""


@dataclass(frozen=True)
class Promise:
    """The level of a target with a backend.

    targets    names of targets
    backend    names of backends; empty if none supports the targets
    level      the strongest level that tests reach
    executed   what tests execute, and on what
    assembled  what tests assemble, and with what
    hardware   what only hardware can show
    """

    targets: tuple[str, ...]
    backend: str
    level: str
    executed: str
    assembled: str
    hardware: str

    @property
    def title(self) -> str:
        """The targets, and the backend."""
        return ", ".join(self.targets) + (f", {self.backend}" if self.backend else "")


PROMISES = (
    Promise(
        ("cpu",),
        "numpy, torch and tvm backends",
        ON_DEVICE,
        "on this machine's CPU; other instruction sets on an emulator (docs/portability.md)",
        "kernels of the tvm backend for every instruction set",
        "speed on CPUs that were not measured",
    ),
    Promise(
        ("cuda",),
        "torch backend",
        IN_SOFTWARE,
        "on a stand-in device of PyTorch",
        "Dynamo: one graph, on the CPU",
        "numbers on a GPU, CUDA graphs, the choice of the attention kernel",
    ),
    Promise(
        ("cuda",),
        "tvm backend",
        IN_SOFTWARE,
        "on an emulator of CUDA, which the tests compile with a C++ compiler",
        "NVRTC and ptxas: registers and spills",
        "numbers and speed on a GPU",
    ),
    Promise(
        ("webgpu",),
        "tvm backend",
        IN_SOFTWARE,
        "on wgpu with lavapipe, Mesa's Vulkan driver for the CPU",
        "naga, wgpu's compiler, validates the kernels that run",
        "GPUs of laptops and phones: Vulkan, Direct3D 12, Metal",
    ),
    Promise(
        ("opencl",),
        "tvm backend",
        IN_SOFTWARE,
        "on PoCL, which computes on the CPU, with one lane",
        "",
        "drivers of vendors",
    ),
    Promise(
        ("metal",),
        "tvm backend",
        IN_SOFTWARE,
        "kernels on the emulator of CUDA, which compiles Metal's text; no launcher yet",
        "",
        "Metal's compiler, and runs on Apple GPUs",
    ),
    Promise(("rocm", "trn", "hexagon"), "", NONE, "", "", "everything"),
)
"""The promise of each target with each backend."""


def promise_table() -> str:
    """Return the promises and the levels as two tables in Markdown."""
    lines = [
        "",
        "| target | level | executed by tests | assembled by tests | only with hardware |",
        "|---|---|---|---|---|",
    ]
    for each in PROMISES:
        names = ", ".join(f"`{name}`" for name in each.targets) + (f", {each.backend}" if each.backend else "")
        lines.append(
            f"| {names} | *{each.level}* | {each.executed or 'no'} | {each.assembled or 'no'} | {each.hardware} |"
        )
    lines += [
        "",
        "| level | meaning |",
        "|---|---|",
        *(f"| *{name}* | {about} |" for name, about in LEVELS.items()),
        "",
    ]
    return "\n".join(lines) + "\n"

"""AMX instructions in a kernel. There are eight tiles, which have numbers; each has 16 rows of 64 bytes.

    with k.parallel(n):
        configure(k)             # in the thread that uses tiles; all eight have their full size
        ...
        release(k)

Integers: a tile of 16 times 64 bytes is multiplied by a tile of 16 times 16 groups of four bytes. The products are
added to 16 times 16 sums of 32 bits, which is exact.

bf16: a tile of 16 times 32 numbers is multiplied by a tile of 16 times 16 pairs. The products are added to 16 times 16
float32 sums. Pairs are added to a sum one after the other, in order, so a row's sums depend on that row alone.
Subnormal float32 numbers count as zero.

LLVM takes the tiles of these instructions by number, and neither moves nor merges them. A process may use them after
the system allows it: `treadle.backends.tvm.kernels.isa.may_use_tiles`. Source: Intel's manual, volume 1, chapter 18.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.emitter import Emitter, Expr

ROWS = 16
"""Number of rows of a tile."""
ROW_BYTES = 64

FULL = ((ROWS, ROW_BYTES),) * 8
"""Shapes of all eight tiles at their full size: the number of rows, and the bytes of a row."""


def configure(k: Emitter, shapes: Sequence[tuple[int, int]] = FULL) -> None:
    """Set the shapes of all eight tiles (the number of rows, and the bytes of a row), and fill them with zeros."""
    name = "@treadle_tile_shapes"
    # Palette 1, start row 0, 14 reserved bytes of zero; 16 row lengths of 2 bytes each; 16 row counts.
    lengths = [byte for _, length in shapes for byte in (length, 0)]
    table = bytes([1, 0, *[0] * 14, *lengths, *[0] * 16, *[rows for rows, _ in shapes], *[0] * 8])
    text = ", ".join(f"i8 {byte}" for byte in table)
    shapes_line = f"{name} = private unnamed_addr constant [{len(table)} x i8] [{text}], align 64"
    declared, called = "void @llvm.x86.ldtilecfg(ptr)", f"void @llvm.x86.ldtilecfg(ptr {name})"
    k.effect("treadle_configure_tiles", declared, called, constant=shapes_line)


def release(k: Emitter) -> None:
    """Release the tiles, since context switches take longer for a thread that uses tiles."""
    k.effect("treadle_release_tiles", "void @llvm.x86.tilerelease()", "void @llvm.x86.tilerelease()")


def clear(k: Emitter, tile: int) -> None:
    """Fill a tile with zeros."""
    k.effect(f"treadle_clear_tile_{tile}", "void @llvm.x86.tilezero(i8 immarg)", f"void @llvm.x86.tilezero(i8 {tile})")


def load(k: Emitter, tile: int, view: Any, index: list[Expr], apart: Expr = ROW_BYTES) -> None:
    """Load 16 rows of 64 bytes into a tile. The first row is at an element of a view; rows are `apart` bytes apart."""
    name = "@llvm.x86.tileloadd64"
    k.effect(
        f"treadle_load_tile_{tile}",
        f"void {name}(i8 immarg, ptr, i64)",
        f"void {name}(i8 {tile}, ptr %x0, i64 %x1)",
        k.address(view, index),
        k.index(apart),
    )


def store(k: Emitter, tile: int, view: Any, index: list[Expr], apart: Expr = ROW_BYTES) -> None:
    """Store a tile's 16 rows of 64 bytes. The first row is at an element of a view; rows are `apart` bytes apart."""
    name = "@llvm.x86.tilestored64"
    k.effect(
        f"treadle_store_tile_{tile}",
        f"void {name}(i8 immarg, ptr, i64)",
        f"void {name}(i8 {tile}, ptr %x0, i64 %x1)",
        k.address(view, index),
        k.index(apart),
    )


def multiply(k: Emitter, sums: int, left: int, right: int) -> None:
    """Emit sums += left right, for a tile of bf16 numbers and a tile of pairs of bf16 numbers."""
    name = "@llvm.x86.tdpbf16ps"
    k.effect(
        f"treadle_multiply_tiles_{sums}_{left}_{right}",
        f"void {name}(i8 immarg, i8 immarg, i8 immarg)",
        f"void {name}(i8 {sums}, i8 {left}, i8 {right})",
    )


def multiply_bytes(k: Emitter, sums: int, left: int, right: int, *, signed: bool) -> None:
    """Emit sums += left right, for a tile of bytes (signed or not) and a tile of groups of four signed bytes."""
    name = "@llvm.x86.tdpbssd" if signed else "@llvm.x86.tdpbusd"
    k.effect(
        f"treadle_multiply_{'signed' if signed else 'byte'}_tiles_{sums}_{left}_{right}",
        f"void {name}(i8 immarg, i8 immarg, i8 immarg)",
        f"void {name}(i8 {sums}, i8 {left}, i8 {right})",
    )

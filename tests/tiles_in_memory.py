"""A matrix unit in memory: what stands in for AMX's tiles where a machine has none.

`stand_in(monkeypatch)` gives an instruction set whose kernels keep their eight tiles in an array, and do with them what
Intel's manual says of each instruction, rows and bytes of a tile as they were configured. It tests what kernels do with
tiles, on one thread, and not the processor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from tvm import tirx
from tvm.tirx.script import builder as T

from treadle.backends.tvm.kernels import isa as isa_module
from treadle.backends.tvm.kernels.isa import ISAS, Isa
from treadle.backends.tvm.kernels.narrow import tiles

_TILE = tiles.ROWS * tiles.ROW_BYTES


@dataclass(frozen=True)
class InMemory(Isa):
    """An instruction set with AVX-512 and VNNI, as which tiles are read and written in memory."""

    @property
    def multiplies_tiles(self) -> bool:
        return True


class _Tiles:
    """The words of `tiles`, as LLVM's text."""

    def __init__(self) -> None:
        self.shapes: Sequence[tuple[int, int]] = tiles.FULL

    def configure(self, k: Any, shapes: Sequence[tuple[int, int]] = tiles.FULL) -> None:
        self.shapes = shapes

    def release(self, k: Any) -> None:
        pass

    def clear(self, k: Any, tile: int) -> None:
        body = f"call void @llvm.memset.p0.i64(ptr {_at(tile)}, i8 0, i64 {_TILE}, i1 false)"
        _call(k, f"clear_{tile}", "", body)

    def load(self, k: Any, tile: int, view: Any, index: list[Any], apart: Any = tiles.ROW_BYTES) -> None:
        rows, length = self.shapes[tile]
        _call(
            k,
            f"load_{tile}",
            "ptr %x, i64 %apart",
            _copies(tile, rows, length, "to"),
            k.address(view, index),
            k.index(apart),
        )

    def store(self, k: Any, tile: int, view: Any, index: list[Any], apart: Any = tiles.ROW_BYTES) -> None:
        rows, length = self.shapes[tile]
        _call(
            k,
            f"store_{tile}",
            "ptr %x, i64 %apart",
            _copies(tile, rows, length, "from"),
            k.address(view, index),
            k.index(apart),
        )

    def multiply_bytes(self, k: Any, sums: int, left: int, right: int, *, signed: bool) -> None:
        (rows, length), (fours, _) = self.shapes[left], self.shapes[right]
        assert fours * 4 == length
        names = {"SUMS": _at(sums), "LEFT": _at(left), "RIGHT": _at(right), "ROWS": str(rows), "FOURS": str(fours)}
        body = _bytes(signed)
        for name, value in names.items():
            body = body.replace(name, value)
        _call(k, f"multiply_{'signed' if signed else 'unsigned'}_{sums}_{left}_{right}_{rows}", "", body)

    def multiply(self, k: Any, sums: int, left: int, right: int) -> None:
        """Of each sum one pair after the other, in float32."""
        body = _BF16.replace("SUMS", _at(sums)).replace("LEFT", _at(left)).replace("RIGHT", _at(right))
        _call(k, f"multiply_bf16_{sums}_{left}_{right}", "", body)


def _bytes(signed: bool) -> str:
    """Of each sum four products after the other, in 32 bits."""
    steps = []
    for b in range(4):
        steps += [
            f"%l{b} = shl i32 %a, {24 - 8 * b}",
            f"%w{b} = {'ashr' if signed else 'lshr'} i32 %l{b}, 24",
            f"%e{b} = insertelement <16 x i32> poison, i32 %w{b}, i64 0",
            f"%v{b} = shufflevector <16 x i32> %e{b}, <16 x i32> poison, <16 x i32> zeroinitializer",
            f"%u{b} = shl <16 x i32> %q, splat (i32 {24 - 8 * b})",
            f"%y{b} = ashr <16 x i32> %u{b}, splat (i32 24)",
            f"%p{b} = mul <16 x i32> %v{b}, %y{b}",
            f"%t{b} = add <16 x i32> {f'%t{b - 1}' if b else '%s'}, %p{b}",
        ]
    return _BYTES.replace("STEPS", "\n  ".join(steps))


_BYTES = f"""br label %rows
rows:
  %i = phi i64 [ 0, %0 ], [ %i1, %stored ]
  %place = mul i64 %i, {tiles.ROW_BYTES}
  %of_sums = getelementptr i8, ptr SUMS, i64 %place
  %of_left = getelementptr i8, ptr LEFT, i64 %place
  %s0 = load <16 x i32>, ptr %of_sums, align 1
  br label %fours
fours:
  %r = phi i64 [ 0, %rows ], [ %r1, %fours ]
  %s = phi <16 x i32> [ %s0, %rows ], [ %t3, %fours ]
  %at = mul i64 %r, 4
  %row = mul i64 %r, {tiles.ROW_BYTES}
  %of_four = getelementptr i8, ptr %of_left, i64 %at
  %of_right = getelementptr i8, ptr RIGHT, i64 %row
  %a = load i32, ptr %of_four, align 1
  %q = load <16 x i32>, ptr %of_right, align 1
  STEPS
  %r1 = add i64 %r, 1
  %more = icmp ult i64 %r1, FOURS
  br i1 %more, label %fours, label %stored
stored:
  store <16 x i32> %t3, ptr %of_sums, align 1
  %i1 = add i64 %i, 1
  %again = icmp ult i64 %i1, ROWS
  br i1 %again, label %rows, label %done
done:"""


_BF16 = f"""br label %rows
rows:
  %i = phi i64 [ 0, %0 ], [ %i1, %stored ]
  %place = mul i64 %i, {tiles.ROW_BYTES}
  %of_sums = getelementptr i8, ptr SUMS, i64 %place
  %of_left = getelementptr i8, ptr LEFT, i64 %place
  %s0 = load <16 x float>, ptr %of_sums, align 1
  br label %pairs
pairs:
  %r = phi i64 [ 0, %rows ], [ %r1, %pairs ]
  %s = phi <16 x float> [ %s0, %rows ], [ %s2, %pairs ]
  %at = mul i64 %r, 4
  %row = mul i64 %r, {tiles.ROW_BYTES}
  %of_pair = getelementptr i8, ptr %of_left, i64 %at
  %of_right = getelementptr i8, ptr RIGHT, i64 %row
  %a = load i32, ptr %of_pair, align 1
  %i0 = insertelement <16 x i32> poison, i32 %a, i64 0
  %x = shufflevector <16 x i32> %i0, <16 x i32> poison, <16 x i32> zeroinitializer
  %y = load <16 x i32>, ptr %of_right, align 1
  %x0 = shl <16 x i32> %x, splat (i32 16)
  %y0 = shl <16 x i32> %y, splat (i32 16)
  %x1 = and <16 x i32> %x, splat (i32 -65536)
  %y1 = and <16 x i32> %y, splat (i32 -65536)
  %u0 = bitcast <16 x i32> %x0 to <16 x float>
  %v0 = bitcast <16 x i32> %y0 to <16 x float>
  %u1 = bitcast <16 x i32> %x1 to <16 x float>
  %v1 = bitcast <16 x i32> %y1 to <16 x float>
  %p0 = fmul <16 x float> %u0, %v0
  %p1 = fmul <16 x float> %u1, %v1
  %s1 = fadd <16 x float> %s, %p0
  %s2 = fadd <16 x float> %s1, %p1
  %r1 = add i64 %r, 1
  %more = icmp ult i64 %r1, 16
  br i1 %more, label %pairs, label %stored
stored:
  store <16 x float> %s2, ptr %of_sums, align 1
  %i1 = add i64 %i, 1
  %again = icmp ult i64 %i1, {tiles.ROWS}
  br i1 %again, label %rows, label %done
done:"""


def stand_in(monkeypatch: pytest.MonkeyPatch) -> Isa:
    """An instruction set whose tiles are in memory, for one test."""
    base, made = ISAS["x86-64-v4-bf16"], _Tiles()
    for name in ("configure", "release", "clear", "load", "store", "multiply", "multiply_bytes"):
        monkeypatch.setattr(tiles, name, getattr(made, name))
    monkeypatch.setattr(isa_module, "may_use_tiles", lambda: True)
    fields = {name: getattr(base, name) for name in base.__dataclass_fields__}
    isa = InMemory(**fields | {"name": "tiles-in-memory"})
    monkeypatch.setitem(ISAS, isa.name, isa)  # type: ignore[index]
    return isa


def _at(tile: int, row: int = 0, byte: int = 0) -> str:
    return f"getelementptr (i8, ptr @tiles_in_memory, i64 {tile * _TILE + row * tiles.ROW_BYTES + byte})"


def _copies(tile: int, rows: int, length: int, way: str) -> str:
    lines = ["%row0 = getelementptr i8, ptr %x, i64 0"]
    for i in range(rows):
        if i:
            lines.append(f"%row{i} = getelementptr i8, ptr %row{i - 1}, i64 %apart")
        ends = (_at(tile, i), f"%row{i}") if way == "to" else (f"%row{i}", _at(tile, i))
        lines.append(f"call void @llvm.memcpy.p0.p0.i64(ptr {ends[0]}, ptr {ends[1]}, i64 {length}, i1 false)")
    return "\n  ".join(lines)


def _call(k: Any, name: str, taken: str, body: str, *operands: Any) -> None:
    """A statement that calls a function of LLVM's text."""
    held = f"@tiles_in_memory = internal thread_local global [{8 * _TILE} x i8] zeroinitializer, align 64"
    k.imported.setdefault("tiles", held)
    for declared in ("memset.p0.i64(ptr, i8, i64, i1)", "memcpy.p0.p0.i64(ptr, ptr, i64, i1)"):
        k.imported.setdefault(declared, f"declare void @llvm.{declared}")
    name = f"in_memory_{name}"
    k.imported.setdefault(name, f"define i32 @{name}({taken}) noinline {{\n  {body}\n  ret i32 0\n}}")
    T.evaluate(tirx.call_extern("int32", name, *operands))

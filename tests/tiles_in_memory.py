"""A matrix unit in memory: a stand-in for AMX's tiles on machines without one.

`stand_in(monkeypatch)` returns an instruction set whose kernels keep their eight tiles in an array, and execute each
instruction on them as in Intel's manual, with the configured rows and bytes of a tile. It tests the kernels' use of
tiles on one thread; it does not test the CPU.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
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
    """An instruction set with AVX-512 and VNNI, whose tiles are read and written in memory."""

    @property
    def multiplies_tiles(self) -> bool:
        return True


class _Tiles:
    """Emit LLVM's text for the variables of `tiles`."""

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
        (rows, length), (words, _) = self.shapes[left], self.shapes[right]
        assert length == 4 * words
        body = _added("i32", [*_fours(signed)], "%t3", (sums, left, right), rows, words)
        _call(k, f"multiply_{'signed' if signed else 'unsigned'}_{sums}_{left}_{right}", "", body)

    def multiply(self, k: Any, sums: int, left: int, right: int) -> None:
        """Add the products of one pair after the other to each sum, in float32."""
        body = _added("float", [*_pairs()], "%t1", (sums, left, right), tiles.ROWS, tiles.ROWS)
        _call(k, f"multiply_bf16_{sums}_{left}_{right}", "", body)


def _added(element: str, steps: Sequence[str], total: str, of: tuple[int, int, int], rows: int, words: int) -> str:
    """Return LLVM text for sums += left right, on three tiles: word j of a row of `left` times row j of `right`.

    steps  the operations on a word in every lane, %x, a row %y, and the sums so far, %s; their result is `total`
    """
    sums, left, right = of
    vector = f"<16 x {element}>"
    return f"""br label %rows
rows:
  %i = phi i64 [ 0, %0 ], [ %i1, %stored ]
  %place = mul i64 %i, {tiles.ROW_BYTES}
  %of_sums = getelementptr i8, ptr {_at(sums)}, i64 %place
  %of_left = getelementptr i8, ptr {_at(left)}, i64 %place
  %s0 = load {vector}, ptr %of_sums, align 1
  br label %words
words:
  %r = phi i64 [ 0, %rows ], [ %r1, %words ]
  %s = phi {vector} [ %s0, %rows ], [ {total}, %words ]
  %at = mul i64 %r, 4
  %row = mul i64 %r, {tiles.ROW_BYTES}
  %of_word = getelementptr i8, ptr %of_left, i64 %at
  %of_right = getelementptr i8, ptr {_at(right)}, i64 %row
  %a = load i32, ptr %of_word, align 1
  %e = insertelement <16 x i32> poison, i32 %a, i64 0
  %x = shufflevector <16 x i32> %e, <16 x i32> poison, <16 x i32> zeroinitializer
  %y = load <16 x i32>, ptr %of_right, align 1
  {
        '''
  '''.join(steps)
    }
  %r1 = add i64 %r, 1
  %more = icmp ult i64 %r1, {words}
  br i1 %more, label %words, label %stored
stored:
  store {vector} {total}, ptr %of_sums, align 1
  %i1 = add i64 %i, 1
  %again = icmp ult i64 %i1, {rows}
  br i1 %again, label %rows, label %done
done:"""


def _fours(signed: bool) -> Iterator[str]:
    """Yield the operations for four products of bytes in 32 bits; the bytes of `right` are signed."""
    for b in range(4):
        yield f"%u{b} = shl <16 x i32> %x, splat (i32 {24 - 8 * b})"
        yield f"%v{b} = {'ashr' if signed else 'lshr'} <16 x i32> %u{b}, splat (i32 24)"
        yield f"%w{b} = shl <16 x i32> %y, splat (i32 {24 - 8 * b})"
        yield f"%z{b} = ashr <16 x i32> %w{b}, splat (i32 24)"
        yield f"%p{b} = mul <16 x i32> %v{b}, %z{b}"
        yield f"%t{b} = add <16 x i32> {f'%t{b - 1}' if b else '%s'}, %p{b}"


def _pairs() -> Iterator[str]:
    """Yield the operations for two products of bf16 numbers, one after the other, in float32."""
    for b, upper in enumerate(("shl <16 x i32> {}, splat (i32 16)", "and <16 x i32> {}, splat (i32 -65536)")):
        yield f"%u{b} = {upper.format('%x')}"
        yield f"%w{b} = {upper.format('%y')}"
        yield f"%v{b} = bitcast <16 x i32> %u{b} to <16 x float>"
        yield f"%z{b} = bitcast <16 x i32> %w{b} to <16 x float>"
        yield f"%p{b} = fmul <16 x float> %v{b}, %z{b}"
        yield f"%t{b} = fadd <16 x float> {f'%t{b - 1}' if b else '%s'}, %p{b}"


def stand_in(monkeypatch: pytest.MonkeyPatch) -> Isa:
    """Return an instruction set whose tiles are in memory, for one test. Its name contains a hash of this file, since
    its kernels are stored as other kernels are.
    """
    base, made = ISAS["x86-64-v4-bf16"], _Tiles()
    for name in ("configure", "release", "clear", "load", "store", "multiply", "multiply_bytes"):
        monkeypatch.setattr(tiles, name, getattr(made, name))
    monkeypatch.setattr(isa_module, "may_use_tiles", lambda: True)
    fields = {name: getattr(base, name) for name in base.__dataclass_fields__}
    source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]
    isa = InMemory(**fields | {"name": f"tiles-in-memory-{source}"})
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
    """Emit a call of a function of LLVM's text."""
    held = f"@tiles_in_memory = internal thread_local global [{8 * _TILE} x i8] zeroinitializer, align 64"
    k.imported.setdefault("tiles", held)
    for declared in ("memset.p0.i64(ptr, i8, i64, i1)", "memcpy.p0.p0.i64(ptr, ptr, i64, i1)"):
        k.imported.setdefault(declared, f"declare void @llvm.{declared}")
    name = f"in_memory_{name}"
    k.imported.setdefault(name, f"define i32 @{name}({taken}) noinline {{\n  {body}\n  ret i32 0\n}}")
    T.evaluate(tirx.call_extern("int32", name, *operands))

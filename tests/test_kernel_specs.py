"""Properties of kernel specs and instruction sets: names in listings, counts in explanations, limits of registers."""

from __future__ import annotations

import re
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tvm")

from tests.backend_checks import graph_of
from tests.op_checks import TESTED, Case
from treadle.backends.tvm.kernel_abilities import capabilities, planning
from treadle.backends.tvm.kernels import isa as instruction_sets
from treadle.backends.tvm.kernels.appending import Append
from treadle.backends.tvm.kernels.attention.cached_attention import CachedFlashAttention
from treadle.backends.tvm.kernels.attention.flash_attention import FlashAttention
from treadle.backends.tvm.kernels.contraction import Contraction
from treadle.backends.tvm.kernels.encoded.block_product import BlockProduct
from treadle.backends.tvm.kernels.encoded.block_words import word_form
from treadle.backends.tvm.kernels.encoded.pair_block_product import PairBlockProduct
from treadle.backends.tvm.kernels.encoded.quad_block_product import QuadBlockProduct
from treadle.backends.tvm.kernels.encoded.take_blocks import TakeBlocks, TakeWords
from treadle.backends.tvm.kernels.encoded.tile_block_product import TileBlockProduct
from treadle.backends.tvm.kernels.encoded.unpacking import packed_form
from treadle.backends.tvm.kernels.encoded.wide_block_product import WideBlockProduct
from treadle.backends.tvm.kernels.gathering import Take
from treadle.backends.tvm.kernels.host.cache import tvm_script
from treadle.backends.tvm.kernels.host.runner import Runner
from treadle.backends.tvm.kernels.isa import ISAS
from treadle.backends.tvm.kernels.kernel import Kernel
from treadle.backends.tvm.kernels.matmul import Matmul, panel_width, tile_rows
from treadle.backends.tvm.kernels.meeting import Meet
from treadle.backends.tvm.kernels.narrow.byte_product import ByteTileProduct, QuadProduct
from treadle.backends.tvm.kernels.narrow.encode_groups import EncodeGroups
from treadle.backends.tvm.kernels.narrow.encode_rows import DecodeRows, EncodeRows
from treadle.backends.tvm.kernels.narrow.packing import PackBlocks, PackPairs, PackQuads
from treadle.backends.tvm.kernels.narrow.pair_product import PairProduct
from treadle.backends.tvm.kernels.narrow.register_tiles import narrow_width, pairs_for, quads_for, tile_of
from treadle.backends.tvm.kernels.narrow.round_rows import RoundRows
from treadle.backends.tvm.kernels.narrow.round_squares import RoundSquares
from treadle.backends.tvm.kernels.narrow.tile_product import TileProduct
from treadle.backends.tvm.kernels.normalization import Normalize
from treadle.backends.tvm.kernels.pointwise import Chain, Instruction, Pointwise
from treadle.backends.tvm.kernels.reduction import Reduce, RunningSum
from treadle.backends.tvm.kernels.rotary import Rotary
from treadle.backends.tvm.kernels.selection import ArgMax, TopK
from treadle.backends.tvm.kernels.shaping import FoldWindows, Iota
from treadle.backends.tvm.kernels.softmax import Softmax
from treadle.backends.tvm.lowering.routine_writer import lower, steps_of
from treadle.backends.tvm.lowering.rules import RULES, keeps
from treadle.backends.tvm.output_memory import OutputMemory, _Given
from treadle.backends.tvm.panel_memory import Panels, _room, finish_writing, through_file
from treadle.ir.builder import Builder, Expr
from treadle.ir.encodings.encoding import parse_encoding
from treadle.ir.graph import Graph
from treadle.ir.op_registry import OPS
from treadle.ir.ops.attention import Attention
from treadle.ir.ops.blocks import EncodedLinear
from treadle.ir.ops.collectives import AllReduce
from treadle.ir.types import f32
from treadle.passes.capabilities import Capabilities
from treadle.passes.framework.manager import PassManager
from treadle.passes.lowering.legalize import Legalize

PLAN = planning(capabilities(ISAS["x86-64-v3"]))

ADDED = Chain(("f32", "f32"), (Instruction("add", (0, 1), "f32"), Instruction("relu", (2,), "f32")))
BYTE_ROWS = packed_form(parse_encoding("int8_rows"))
WORDS = word_form(parse_encoding("q4_k"))
assert BYTE_ROWS is not None and WORDS is not None

SPECS: list[tuple[Kernel, str, str]] = [
    # the kernel, its title, and facts: the dtype that it multiplies if that is not f32, `slow` for element by element
    (Matmul(48), "matmul_48", "counted"),
    (Matmul(48, ADDED, ("n",), batch=True), "matmul_batch_48_add_relu", "counted"),
    (BlockProduct(48, ADDED, ("n",), form=BYTE_ROWS), "block_product_8_bits_48_add_relu", "counted"),
    (PairProduct(), "pair_product", "bf16 counted"),
    (QuadProduct(ADDED, ("n",)), "quad_product_add_relu", "int8 counted"),
    (TileProduct(), "tile_product", "bf16 counted"),
    (TileProduct(ADDED, ("n",), tiled=True), "tile_product_add_relu_tiled", "bf16 counted"),
    (ByteTileProduct(tiled=True), "byte_tile_product_tiled", "int8 counted"),
    (TileBlockProduct(ADDED, ("n",), form=BYTE_ROWS), "tile_product_add_relu_of_8_bits", "bf16 counted"),
    (PairBlockProduct(ADDED, ("n",), form=BYTE_ROWS), "pair_product_add_relu_of_8_bits", "bf16 counted"),
    (PairBlockProduct(form=WORDS), "pair_product_of_q4_k", "bf16 counted"),
    (QuadBlockProduct(WORDS), "quad_block_product_q4_k", "int8 counted"),
    (WideBlockProduct(WORDS, ADDED, ("n",)), "wide_block_product_q4_k_add_relu", "counted"),
    (FlashAttention(64, 64, 0.125), "attention_64", ""),
    (FlashAttention(8, 4, 1.0, padded=2, terms=("near offsets",), operands="bf16"),
     "attention_8_padding_padding_offsets_bf16", "bf16"),
    (CachedFlashAttention(8, 4, 1.0), "cached_attention_8", ""),
    (CachedFlashAttention(8, 4, 1.0, cache="f16", ring=True, shared=4), "cached_attention_8_f16_ring_step", ""),
    (Softmax(False, "f32"), "softmax_f32", ""),
    (Softmax(True, "f32"), "log_softmax_f32", ""),
    (Softmax(False, "f16", True), "masked_softmax_f16", ""),
    (Normalize(True, True, True, 1e-5, "f32"), "layer_norm_f32", ""),
    (Normalize(False, True, False, 1e-5, "bf16"), "rms_norm_bf16", ""),
    (Reduce("sum", "f32", "rows"), "sum_rows_f32", ""),
    (RunningSum("f32", False, False, True), "running_sum_f32", ""),
    (RunningSum("f32", False, False, False), "running_sum_f32", "slow"),
    (ArgMax("f32", True), "argmax_f32", ""),
    (ArgMax("f32", False), "argmax_f32", "slow"),
    (TopK(5, "f32", True), "top_5_f32", ""),
    (TopK(5, "f32", False), "top_5_f32", "slow"),
    (Contraction("f32", ("f32",), 1, 1), "contraction", "slow"),
    (FoldWindows("f32"), "fold_windows", "slow"),
    (PackPairs(32), "pack_pairs", "slow"),
    (PackQuads(32), "pack_quads", "slow"),
    (PackBlocks(16, 34, 2), "pack_blocks", "slow"),
    (Pointwise(ADDED, 1, "111"), "add_relu", ""),
    (Pointwise(ADDED, 1, "111", 0), "add_relu_over", ""),
    (Pointwise(Chain(("f32",), ()), 1, "11"), "copy", ""),
    (Rotary(True, 4, "f32", "i64"), "rotary_f32", ""),
    (Iota("f32"), "iota", ""),
    (Take(4, "i64", True), "gather_rows", ""),
    (Take(4, "i64", False, 48), "gather_of_panels", ""),
    (TakeBlocks(BYTE_ROWS, "i64", 48), "gather_of_blocks_8_bits", ""),
    (TakeBlocks(BYTE_ROWS, "i64", 48, twos=True), "gather_of_blocks_8_bits", ""),
    (TakeWords(WORDS, "i64"), "gather_of_blocks_q4_k", ""),
    (Append(4, False, False), "append", ""),
    (Append(4, True, True), "append_rows_ring", ""),
    (RoundRows("f32", "tiles"), "round_rows_tiles", ""),
    (RoundSquares("f32", True, 48, True), "round_right_by_rows", ""),
    (RoundSquares("bf16", False, 0, False), "round_left_by_columns", ""),
    (EncodeRows("held"), "encode_rows_held", ""),
    (EncodeRows("filled", True, True), "encode_scaled_signed_rows_filled", ""),
    (EncodeRows("quads", again=True), "copy_rows_quads", ""),
    (DecodeRows(), "decode_signed_rows", ""),
    (DecodeRows(False), "decode_rows", ""),
    (EncodeGroups("filled", 8), "encode_groups_filled", ""),
    (EncodeGroups("quads", 0, 2, again=True), "copy_groups_quads", ""),
    (Meet(AllReduce(over="tp", ways=2), f32, 1, ()), "all_reduce", "host"),
    (Runner(), "runner", ""),
]  # fmt: skip


def test_descriptions_of_kernels() -> None:
    """The name in a listing, the numbers that the kernel multiplies, the element-by-element flag, and the number of
    operations.
    """
    for kernel, title, facts in SPECS:
        of = next((word for word in ("bf16", "int8") if word in facts), "f32")
        assert (kernel.title, kernel.multiplies) == (title, of)
        assert (kernel.generic, kernel.on_host) == ("slow" in facts, "host" in facts), title
        assert kernel.flops([3, 5, 7, 1, 1]) == (2 * 3 * 5 * 7 if "counted" in facts else 0), title


def test_kernels_are_equal_by_what_decides_their_code() -> None:
    same, other = Matmul(48, ADDED, ("n",)), Matmul(48, ADDED, ("m",))
    assert same == Matmul(48, ADDED, ("n",)) != other
    assert len({same, other, Matmul(48, ADDED, ("n",))}) == 2
    assert Matmul(48) != PairProduct() and Matmul(48) != "Matmul"
    assert Softmax(False, "f32").key == "Softmax(log=False, dtype='f32', zeros=False)"
    assert "eps=0x1.0000000000000p-1," in Normalize(True, True, True, 0.5, "f32").key


def test_a_panel_leaves_the_fewest_empty_columns() -> None:
    for isa in ISAS.values():
        lanes, most = isa.lanes(), 4 if isa.registers >= 32 else 2
        assert panel_width(None, isa) == lanes * min(most, 3)
        for columns in range(1, 6 * lanes):
            width = panel_width(columns, isa)
            empty = {n: -columns % (n * lanes) for n in range(1, most + 1)}
            assert width % lanes == 0 and empty[width // lanes] == min(empty.values()), (isa, columns)


def test_a_tile_of_sums_fits_into_the_registers() -> None:
    """The registers hold the accumulators, a vector of each column of the panel, and one vector of the left side."""
    for isa in ISAS.values():
        for vectors in range(1, 5 if isa.registers >= 32 else 3):
            rows = tile_rows(vectors * isa.lanes(), isa)
            assert rows >= 6 and rows * vectors + vectors + 1 <= isa.registers, (isa, vectors)
        rows, columns = tile_of(isa)
        assert rows * columns // isa.lanes() + 4 <= isa.registers, isa
        assert narrow_width(isa) % columns == 0


def test_only_a_matrix_unit_reads_squares() -> None:
    widths = {"x86-64-v4-bf16": 48, "x86-64-v4": 48}
    for name, isa in ISAS.items():
        flat = name != "x86-64-amx"
        for layout in (pairs_for(isa), quads_for(isa), pairs_for(isa, transposed=True)):
            assert (layout.width, layout.flat) == (widths.get(name, 32), flat), name
        assert pairs_for(isa, transposed=True).transposed and not pairs_for(isa).transposed


INSTRUCTION_SETS = {  # of the psABI's levels and of arm64: bytes of a vector, vectors, fused multiply-add, machine
    "x86-64-amx": (64, 32, True, "x86_64"),
    "x86-64-v4-bf16": (64, 32, True, "x86_64"),
    "x86-64-v4": (64, 32, True, "x86_64"),
    "x86-64-v3": (32, 16, True, "x86_64"),
    "x86-64-v2": (16, 16, False, "x86_64"),
    "x86-64": (16, 16, False, "x86_64"),
    "arm64": (16, 32, True, "aarch64"),
}


def test_instruction_sets_are_what_their_names_say() -> None:
    assert list(ISAS) == list(INSTRUCTION_SETS)
    for name, isa in ISAS.items():
        assert (isa.vector, isa.registers, isa.fused, isa.machine) == INSTRUCTION_SETS[name]
        assert isa.lanes() * 4 == isa.lanes(8) * 8 == isa.vector
        assert isa.multiplies_tiles == (name == "x86-64-amx")
        assert isa.multiplies_pairs == isa.multiplies_quads == (name in ("x86-64-amx", "x86-64-v4-bf16"))
        assert (isa.llvm.get("mtriple") is not None) == (name == "arm64")


@pytest.mark.parametrize(
    ("system", "machine", "answer", "may"),
    [("Linux", "x86_64", 0, True), ("Linux", "x86_64", -1, False), ("Darwin", "x86_64", 0, False),
     ("Linux", "aarch64", 0, False)],
)  # fmt: skip
def test_tiles_are_asked_for_where_linux_has_them(
    system: str, machine: str, answer: int, may: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    class Library:
        def syscall(self, *words: int) -> int:
            asked.append(words)
            return answer

    monkeypatch.setattr(instruction_sets.platform, "system", lambda: system)
    monkeypatch.setattr(instruction_sets.platform, "machine", lambda: machine)
    monkeypatch.setattr(instruction_sets.ctypes, "CDLL", lambda name: Library())
    assert instruction_sets.may_use_tiles.__wrapped__() is may
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18  # numbers of asm/prctl.h and asm/fpu/types.h
    assert asked in ([], [(arch_prctl, request_permission, tile_data)])
    assert bool(asked) == (system == "Linux" and machine == "x86_64")


# -- limits ------------------------------------------------------------------------------------------------------------


def steps(graph: Graph) -> int:
    """Return the number of kernel calls for a graph; nothing is compiled."""
    lowered = PassManager((Legalize(Capabilities(keeps=keeps)), PLAN)).run(graph)
    assert lowered.plan is not None
    return len(lower(lowered.graph, lowered.plan, ISAS["x86-64-v3"], RULES).main.steps)


def test_the_widest_heads_and_the_longest_sums_that_kernels_take() -> None:
    def attends(d: int, e: int) -> bool:
        return keeps(Attention(), [f32["B", 2, "S", d], f32["B", 2, "S", d], f32["B", 2, "S", e]])

    assert [attends(512, 1), attends(1, 512), attends(513, 1), attends(1, 513)] == [True, True, False, False]

    def multiplies(size: int) -> bool:
        row = replace(f32[2, size], encoding=parse_encoding("int8_rows"))
        return keeps(EncodedLinear(of=parse_encoding("int8_rows")), [row, row, None])

    assert multiplies(1 << 16) and not multiplies((1 << 16) + 1)
    assert (1 << 16) * 255 * 127 < 2**31  # sums are 32-bit integers


def test_a_chain_reads_eight_values_and_does_forty_eight_ops() -> None:
    def summed(count: int) -> Graph:
        return graph_of(lambda b: sum([b.input(f"x{n}", "f32[S]") for n in range(1, count)], b.input("x0", "f32[S]")))

    def repeated(count: int) -> Graph:
        def build(b: Builder) -> Expr:
            x = b.input("x", "f32[S]")
            for _ in range(count):
                x = b.exp(x)
            return x

        return graph_of(build)

    assert [steps(summed(count)) for count in (8, 9)] == [1, 8]  # otherwise each op runs separately
    assert [steps(repeated(count)) for count in (48, 49)] == [1, 2]


def test_from_a_megabyte_on_the_memory_of_two_outputs_is_remembered() -> None:
    outputs = OutputMemory()
    f4 = np.dtype(np.float32)
    assert outputs.array("y", (2**18 - 1,), f4).base is not None and outputs._given == {}
    place = outputs.array("y", (2**18,), f4).ctypes.data
    assert outputs.array("y", (2**18,), f4).ctypes.data == place  # the first output is unused
    held = [outputs.array("y", (2**18,), f4) for _ in range(4)]
    assert len(outputs._given["y"]) == 2 and len({array.ctypes.data for array in held}) == 4
    assert all(array.ctypes.data % 64 == 0 for array in held)
    assert outputs.array("z", (3,), f4, aligned=True).ctypes.data % 64 == 0


@pytest.mark.parametrize(("count", "suits"), [(900, True), (901, False), (800, True), (799, False)])
def test_memory_suits_what_is_as_large_or_an_eighth_smaller(count: int, suits: bool) -> None:
    held = np.zeros(1)
    given = _Given(np.empty(900, np.uint8), weakref.ref(held))
    assert not given.suits(count)
    del held
    assert given.suits(count) is suits


def test_from_a_megabyte_on_panels_have_a_file(tmp_path: Path) -> None:
    def fill(name: str, to: np.ndarray) -> None:
        to[...] = 7

    with ThreadPoolExecutor(1) as pool:
        for name, count, files in (("small", (1 << 20) - 64, 0), ("large", 1 << 20, 1)):
            kinds = {name: ((count,), np.dtype(np.uint8))}
            made = through_file(Panels(kinds, fill), lambda name=name: [name], pool, tmp_path / name)
            finish_writing()
            assert (made[name] == 7).all() and made[name].ctypes.data % 64 == 0
            assert len(list((tmp_path / name).glob("*.panels"))) == files
    for size, page in (((2 << 20) - 1, 64), (2 << 20, 2 << 20)):
        assert _room(size).ctypes.data % page == 0 and len(_room(size)) == size


# -- steps and their kernels -------------------------------------------------------------------------------------------


def stored_by(kernel: Kernel) -> set[int]:
    """Return the indices of a kernel's pointers that its text stores to; nothing is compiled."""
    text = tvm_script(kernel, ISAS["x86-64-v3"])
    stored = set(re.findall(r"^ *(\w+)\[.*\] = ", text, re.MULTILINE))
    pointers = {pointer for view, pointer in re.findall(r"(\w+) = T\.\w+\(.*data=(\w+)", text) if view in stored}
    return {at for at, name in enumerate(re.findall(r"(\w+): T\.handle", text)) if name in pointers}


def test_a_step_writes_what_its_kernel_stores_to() -> None:
    """If a step writes over a buffer, values derived from the buffer are forgotten. A listing separates reads from
    writes.
    """
    looked_at: dict[tuple[type[Kernel], int, int], Kernel] = {}
    for name in TESTED:
        for sample in range(len(OPS[name].samples)):
            lowered = PassManager((Legalize(Capabilities(keeps=keeps)), PLAN), certify=False).run(
                Case.of(name, sample).forward_graph()
            )
            assert lowered.plan is not None
            for step in steps_of(lower(lowered.graph, lowered.plan, ISAS["x86-64-v3"], RULES)):
                if not step.kernel.on_host:
                    looked_at.setdefault((type(step.kernel), len(step.pointers), step.writes), step.kernel)
    assert len({kind for kind, _, _ in looked_at}) >= 20
    for (kind, count, writes), kernel in looked_at.items():
        assert stored_by(kernel) == set(range(count - writes, count)), kind.__name__

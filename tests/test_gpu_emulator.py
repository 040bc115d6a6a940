"""The emulator of CUDA: races between blocks, blocks in turns, and asynchronous copies, with planted faults."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from tests.backend_checks import needs_tvm
from tests.support.gpu_emulator.emulation import EmulatedKernel, EmulatorError, Region, compiler
from tests.support.gpu_emulator.emulator_runtime import emulated
from tests.support.gpu_emulator.faults import HIDDEN, REPEATED, Fault, observed
from tests.support.gpu_emulator.hand_written import cuda_text, hand_written
from tests.support.gpu_emulator.programs import program_inputs
from tests.test_device_kernels import CUDA, launched
from treadle.backends.tvm.kernels.appending import Append
from treadle.backends.tvm.kernels.devices.cuda_compiler import compile_cuda, compile_ptx, missing_compiler
from treadle.backends.tvm.kernels.devices.device_kernels import device_kernel
from treadle.entry_functions import compile
from treadle.ir.errors import BackendError
from treadle.ir.types import DTYPES, f32

pytestmark = [needs_tvm, pytest.mark.skipif(compiler() is None, reason="no C++ compiler")]

Array = np.ndarray[Any, Any]
i32 = DTYPES["i32"]


# -- races between blocks ----------------------------------------------------------------------------------------------

SUMS = """
  // each block sums 32 numbers
  for (treadle_i64 task = TREADLE_BLOCK; task < n; task += TREADLE_BLOCKS) {
    if (lane == 0) {
      int sum = 0;
      for (treadle_i64 i = 0; i < 32; ++i) sum += x[x_at + task * 32 + i];
      parts[parts_at + task] = sum;
    }
  }
"""
RACES = {
    # the block that ends last merges the parts of all, without a second launch
    "merge": """
  if (lane == 0) {
    ended[ended_at] = ended[ended_at] + 1;
    if (ended[ended_at] == TREADLE_BLOCKS) {
      int sum = 0;
      for (treadle_i64 i = 0; i < n; ++i) sum += parts[parts_at + i];
      total[total_at] = sum;
    }
  }
""",
    # all blocks add to one element
    "sum": """
  if (lane == 0) {
    for (treadle_i64 task = TREADLE_BLOCK; task < n; task += TREADLE_BLOCKS) {
      total[total_at] = total[total_at] + parts[parts_at + task];
    }
  }
""",
    # all blocks use the same scratch memory
    "scratch": """
  for (treadle_i64 task = TREADLE_BLOCK; task < n; task += TREADLE_BLOCKS) {
    TREADLE_BARRIER;
    ended[ended_at + lane] = parts[parts_at + task];
    TREADLE_BARRIER;
    if (lane == 0) { total[total_at + task] = ended[ended_at + 31]; }
  }
""",
}


@pytest.mark.parametrize("name", RACES)
def test_a_race_between_blocks_is_found_in_turns_and_by_the_record_of_accesses(name: str) -> None:
    """Any order in which blocks run one after another gives the right sums."""
    kernel = hand_written(SUMS + RACES[name], {"x": i32}, {"parts": i32, "ended": i32, "total": i32}, "n")
    x = np.random.default_rng(0).integers(0, 100, (6, 32)).astype(np.int32)
    parts = x.sum(1, dtype=np.int32)

    def effect(**how: Any) -> str:
        """Return the first error of some orders, or `wrong` for a wrong sum, or an empty text."""
        for seed in range(1, 25):
            made = [np.zeros(6, np.int32), np.zeros(32, np.int32), np.zeros(6, np.int32)]
            try:
                kernel.launch([Region(x), *map(Region, made)], [6], seed=seed, **how)
            except EmulatorError as error:
                return str(error)
            if not np.array_equal(made[2], parts) and made[2][0] != x.sum():
                return "wrong"
        return ""

    assert effect(races=False) == ""
    assert effect(races=False, together=3) == "wrong"
    fault = r"hand_written: a (read of|write to) an element that block (\d) (read|wrote) in the same launch: "
    fault += r"(parts|ended|total), \d+ of \d+, in thread \d+ of block (\d)"
    match = re.fullmatch(fault, effect())
    assert match and match[2] != match[5]
    assert effect(blocks=1) == ""


def test_a_read_of_what_another_block_writes_is_found_whichever_is_first() -> None:
    """Each block reads the sum of the next one, which changes no result."""
    reads = "if (lane == 0 && parts[parts_at + (TREADLE_BLOCK + 1) % n] == -1) { total[total_at] = 1; }"
    kernel = hand_written(SUMS + reads, {"x": i32}, {"parts": i32, "total": i32}, "n")
    arrays = [np.ones((3, 32), np.int32), np.zeros(3, np.int32), np.zeros(1, np.int32)]
    messages = []
    for seed in range(1, 9):
        kernel.launch(list(map(Region, arrays)), [3], seed=seed, races=False)
        with pytest.raises(EmulatorError) as caught:
            kernel.launch(list(map(Region, arrays)), [3], seed=seed)
        messages.append(str(caught.value))
    for fault in (r"a read of an element that block (\d) wrote", r"a write to an element that block (\d) read"):
        pattern = rf"hand_written: {fault} in the same launch: parts, (\d) of 3, in thread 0 of block (\d)"
        found = [match for match in (re.fullmatch(pattern, message) for message in messages) if match]
        assert found
        for match in found:
            other, element, block = map(int, match.groups())
            reader, writer = (block, other) if "wrote" in fault else (other, block)
            assert element == writer == (reader + 1) % 3


@pytest.mark.parametrize("slow", [False, True])
def test_scratch_memory_that_tasks_share_is_found(slow: bool) -> None:
    """In the slow form, each thread is a task of its own."""
    scratch, y = np.zeros(1, np.float32), np.zeros(7, np.float32)
    who = r"block 0, thread \d," if slow else r"block \d"
    with pytest.raises(
        EmulatorError, match=rf"an element that {who} (read|wrote) in the same launch: scratch_0, 0 of 1"
    ):
        launched("shared_scratch", np.ones(7, np.float32), scratch, y, sizes=(7,), device=CUDA.slow if slow else CUDA)


@pytest.mark.parametrize("fault", [*HIDDEN[::3], *REPEATED[::4]], ids=str)
def test_planted_races_that_no_order_of_blocks_shows(fault: Fault) -> None:
    """`python -m tests.support.gpu_emulator.faults` plants them all."""
    assert observed(fault, together=1, races=False) == ""
    assert bool(observed(fault, together=8, races=False)) == (fault in HIDDEN)
    assert "in the same launch: " in observed(fault, together=1)


def test_any_block_may_report_an_error() -> None:
    exe = emulated(compile(program_inputs("embedding")[0], backend="tvm", target="cuda"))
    given = dict(program_inputs("embedding")[1])
    given["i"] = np.full_like(given["i"], 7) + np.arange(given["i"].size)
    with pytest.raises(BackendError, match=r"index \d+ is outside an axis of size 5"):
        exe(**given)


def test_the_report_of_a_row_without_room_is_that_of_the_first_one() -> None:
    """Several blocks write it: parts of two rows must not be mixed."""
    x, y = np.zeros((4, 2, 3, 8), np.int32), np.zeros((4, 2, 10, 8), np.int32)
    sizes = [*x.shape, 4, 10, 48, 24, 8, 1, 1, 160, 80, 8]
    kernel = EmulatedKernel(device_kernel(Append(4, rows=True, ring=False), CUDA))
    for rows, start, report in (
        ([0, 1, 2, 3], [0, 11, 12, 13], [2, 11, 10, 1]),
        ([0, 1, 9, 8], [0, 0, 12, 13], [1, 9, 4, 2]),
        ([0, 1, 2, 7], [0, 0, -1, 0], [2, -1, 10, 2]),
    ):
        for seed in range(1, 13):
            status = np.zeros(4, np.int64)
            regions = [
                Region(x),
                Region(np.array(rows)),
                Region(np.array(start)),
                Region(y),
                Region(status, checked=False),
            ]
            kernel.launch(regions, sizes, blocks=24, seed=seed, together=8)
            assert status.tolist() == report


# -- asynchronous copies -----------------------------------------------------------------------------------------------

STAGED = """
  // reverse each tile of 128 numbers; one tile is copied while the one before it is read
  TREADLE_SHARED(float, tile, 256);
  const treadle_i64 first = TREADLE_BLOCK * n * 128;
  __pipeline_memcpy_async(&tile[lane * 4], &x[x_at + first + lane * 4], 16);
  __pipeline_commit();
  for (treadle_i64 t = 0; t < n; ++t) {
    TREADLE_BARRIER;  // before the copy
    if (t + 1 < n) {
      __pipeline_memcpy_async(&tile[(t + 1) % 2 * 128 + lane * 4], &x[x_at + first + (t + 1) * 128 + lane * 4], 16);
    }
    __pipeline_commit();
    __pipeline_wait_prior(1);
    TREADLE_BARRIER;  // after the wait
    for (treadle_i64 j = 0; j < 4; ++j) {
      y[y_at + first + t * 128 + j * 32 + lane] = tile[t % 2 * 128 + 127 - (j * 32 + lane)];
    }
  }
"""
COPY = re.compile(r"__pipeline_memcpy_async\(&(.*?) \+ lane \* 4\], &(.*?) \+ lane \* 4\], 16\);")


def effect_of(text: str, *, races: bool = True) -> str:
    """Return the effect of a text that copies: an error, or `wrong`, or nothing."""
    kernel = hand_written(text, {"x": f32}, {"y": f32}, "n")
    x = np.random.default_rng(0).standard_normal((2, 5, 128)).astype(np.float32)
    for seed in range(1, 9):
        y = np.full_like(x, np.nan)
        try:
            kernel.launch([Region(x), Region(y)], [5], blocks=2, seed=seed, together=1 + seed % 2, races=races)
        except EmulatorError as error:
            return str(error)
        if not np.array_equal(y, x[:, :, ::-1]):
            return "wrong"
    return ""


@pytest.mark.parametrize("bytes", [4, 8, 16])
def test_copies_of_each_size_take_effect_when_their_group_is_waited_for(bytes: int) -> None:
    assert effect_of(copying(bytes)) == ""


@pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))
@pytest.mark.parametrize("bytes", [4, 8, 16])
def test_nvidias_compilers_take_the_text(bytes: int) -> None:
    text = cuda_text(hand_written(copying(bytes), {"x": f32}, {"y": f32}, "n"))
    for architecture in ("sm_80", "sm_90"):
        ptx = compile_ptx(text, architecture)
        assert re.search(rf"cp\.async\.c[ag]\.shared\.global \[%r\d+\], \[%rd\d+\], {bytes},", ptx)
        assert compile_cuda(text, architecture).resources.spilled == 0


def copying(bytes: int) -> str:
    """Return the text with copies of this size."""
    n = bytes // 4
    place = [f"{first} + lane * {n}" for first in range(0, 128, 32 * n)]
    copies = " ".join(rf"__pipeline_memcpy_async(&\1 + {at}], &\2 + {at}], {bytes});" for at in place)
    return COPY.sub(copies, STAGED)


WAIT, COMMIT = "    __pipeline_wait_prior(1);\n", "    __pipeline_commit();\n"
BEFORE, AFTER = "    TREADLE_BARRIER;  // before the copy\n", "    TREADLE_BARRIER;  // after the wait\n"
LAST = "    }\n  }\n"
READ, WRITE = (f"a {access} what an asynchronous copy writes: tile" for access in ("read of", "write to"))
FAULTS_OF_COPIES = {
    "no wait": (STAGED.replace(WAIT, ""), READ),
    "a wait after the read": (STAGED.replace(WAIT, "").replace(LAST, "    }\n" + WAIT + "  }\n"), READ),
    "a wait for another group": (STAGED.replace(WAIT, WAIT.replace("1", "2")), READ),
    "no group": (STAGED.replace(COMMIT, ""), READ),
    "no barrier after the wait": (STAGED.replace(AFTER, ""), READ),
    "no barrier before the copy": (STAGED.replace(BEFORE, ""), READ),
    "no stage of its own": (STAGED.replace("(t + 1) % 2", "t % 2"), WRITE),
}


@pytest.mark.parametrize("name", FAULTS_OF_COPIES)
def test_faults_of_copies_are_found(name: str) -> None:
    text, message = FAULTS_OF_COPIES[name]
    assert text != STAGED and message in effect_of(text)


def test_before_the_wait_a_read_sees_the_old_bytes() -> None:
    """Without a check of the access itself, a result is wrong, or the end of a thread shows the copy in flight. The
    copy that overwrites what others still read takes effect too late to be seen.
    """
    effects = {name: effect_of(text, races=False) for name, (text, _) in FAULTS_OF_COPIES.items()}
    assert [name for name, each in effects.items() if not each] == ["no barrier before the copy"]
    assert effects["no wait"].startswith("hand_written: asynchronous copies for which no one waits")
    assert effects["a wait after the read"] == effects["no barrier after the wait"] == "wrong"


COPIED = """
  TREADLE_SHARED(float, tile, 128);
  COPY
  __pipeline_commit();
  BETWEEN
  __pipeline_wait_prior(0);
  TREADLE_BARRIER;
  for (treadle_i64 j = 0; j < 4; ++j) { y[y_at + j * 32 + lane] = tile[j * 32 + lane]; }
"""


def copied(copy: str, between: str = "", count: int = 128) -> Array:
    """Return what a kernel copies through shared memory, in 8 orders; its buffer x has `count` numbers from 0 on."""
    kernel = hand_written(COPIED.replace("COPY", copy).replace("BETWEEN", between), {}, {"x": f32, "y": f32})
    y = np.full(128, np.nan, np.float32)
    for seed in range(1, 9):
        kernel.launch([Region(np.arange(count, dtype=np.float32)), Region(y)], [], blocks=1, seed=seed)
    return y


def test_the_last_bytes_of_a_copy_become_zero() -> None:
    """A tail: 41 numbers in copies of four, of which the last has one number and three zeros."""
    count = "const int zeros = lane < 10 ? 0 : lane == 10 ? 12 : 16;"
    copy = "__pipeline_memcpy_async(&tile[lane * 4], &x[x_at + (lane < 11 ? lane * 4 : 0)], 16, zeros);"
    np.testing.assert_array_equal(copied(count + copy, count=41), [*range(41), *[0] * 87])


COPY_4 = "__pipeline_memcpy_async(&tile[lane * 4], &x[x_at + lane * 4], 16);"


@pytest.mark.parametrize(
    ("copy", "between", "message"),
    [
        (
            COPY_4,
            "TREADLE_BARRIER; if (lane == 3) { x[x_at + 17] = 0; }",
            "a write to what an asynchronous copy reads: x, 17 of 128",
        ),
        (COPY_4, "tile[lane * 4] = 0.0f;", "a write to what an asynchronous copy writes: tile, "),
        (COPY_4 + COPY_4, "", "a write to what an asynchronous copy writes: tile, "),
        (COPY_4.replace("16", "12"), "", "an asynchronous copy of this size: tile, 12 "),
        (COPY_4.replace("&x[x_at", "&x[x_at + 1"), "", "address not aligned: x, "),
        (COPY_4.replace("&tile[", "&tile[1 + "), "", "address not aligned: tile, |index out of range: tile, "),
        (COPY_4.replace("x_at + lane * 4", "x_at + lane * 4 + 4"), "", "index out of range: x, 128 of 128"),
        (COPY_4.replace("&x[x_at", "&tile["), "", "a copy that is not from global to shared memory: tile"),
    ],
)
def test_other_accesses_to_what_is_copied_and_wrong_operands_are_found(copy: str, between: str, message: str) -> None:
    with pytest.raises(EmulatorError, match=message):
        copied(copy, between)

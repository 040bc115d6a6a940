"""Weights for kernels: they are laid out in panels, and packed once into a file that later processes read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import pytest

from tests.backend_checks import needs_tvm
from tests.many_cases import every_case
from treadle.backends.made_weights import recipes_of
from treadle.backends.tvm import panel_memory, weight_packing
from treadle.backends.tvm.backend import TvmBackend
from treadle.backends.tvm.kernels.isa import ISAS, runs_here
from treadle.backends.tvm.kernels.matmul import panel_width
from treadle.backends.tvm.panel_memory import LARGE_PAGE, finish_writing
from treadle.backends.tvm.weight_packing import pack, pack_weights, wants
from treadle.ir.builder import Builder
from treadle.ir.errors import BackendError
from treadle.ir.graph import Graph
from treadle.ir.layouts import Layout, blocks, pairs, panels, quads
from treadle.ir.target import Target
from treadle.passes.capabilities import Capabilities
from treadle.passes.framework.manager import PassManager
from treadle.passes.lowering.assign_layouts import AssignLayouts
from treadle.passes.lowering.hoist_weights import HoistWeights
from treadle.passes.memory.frames import ALIGNMENT

ISA = ISAS["x86-64-v4"]
SHAPE = (530, 500)  # a megabyte, and the last panel is not full


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("columns", [1, 47, 48, 100])
def test_element_n_k_lies_where_panels_say(columns: int, transposed: bool) -> None:
    matrix = np.arange(columns * 5, dtype=np.float32).reshape(columns, 5)
    layout = panels(48, transposed)
    flat = pack(np.ascontiguousarray(matrix.T) if transposed else matrix, layout).ravel()
    n, k = np.indices(matrix.shape)
    np.testing.assert_array_equal(flat[((n // 48) * 5 + k) * 48 + n % 48], matrix)
    assert flat.size == layout.elements([*map(_size, matrix.T.shape if transposed else matrix.shape)]).constant
    assert flat.sum() == matrix.sum()  # the padding of the last panel is zero


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("rows", "bytes"), [(1, 2), (48, 20), (50, 36), (100, 7)])
def test_bytes_by_twos_lie_without_gaps(rows: int, bytes: int, transposed: bool) -> None:
    held = np.random.default_rng(0).integers(1, 256, (rows, bytes)).astype(np.uint8)
    layout = panels(48, transposed, twos=True)
    flat = pack(np.ascontiguousarray(held.T) if transposed else held, layout).ravel()
    n, k = np.indices(held.shape)
    twos = (bytes + 1) // 2
    np.testing.assert_array_equal(flat[(((n // 48) * twos + k // 2) * 48 + n % 48) * 2 + k % 2], held)
    assert flat.size == layout.elements([*map(_size, held.T.shape if transposed else held.shape)]).constant
    assert flat.sum() == held.sum()


@needs_tvm
def test_kernels_lay_a_computed_matrix_out_as_a_weight_is() -> None:
    """The numbers of rows, and the depths, are not multiples of a panel or a step. Memory around the matrix is not
    copied.
    """
    from treadle.backends.tvm.kernels.host.calling import bind
    from treadle.backends.tvm.kernels.matmul import Pack
    from treadle.backends.tvm.kernels.narrow.packing import PackBlocks, PackPairs, PackQuads

    runs = ((4, 8), (0, 4))
    kernels: list[tuple[Any, Layout, Any, int]] = [
        (PackPairs(32), pairs(32), np.uint16, 70),
        (PackPairs(48, flat=True), pairs(48, flat=True), np.uint16, 71),
        (PackQuads(32), quads(32), np.uint8, 4 + 70),
        (PackQuads(48, flat=True), quads(48, flat=True), np.uint8, 4 + 71),
        (PackBlocks(16, 34, 2), blocks(16, 34, 2), np.uint8, 3 * 34),
        (PackBlocks(32, 34, 2, True, runs), blocks(32, 34, 2, runs, tail=True), np.uint8, 3 * 34),
        (Pack(48), panels(48), np.float32, 70),
        (Pack(48, near=True), panels(48), np.float32, 70),
    ]
    with every_case() as case:
        for kernel, layout, dtype, depth in kernels:
            with case(kernel.title):
                held = np.random.default_rng(0).integers(1, 256, (130, 130)).astype(dtype)
                x = (held.T if getattr(kernel, "near", False) else held)[:70, :depth]
                wanted = pack(np.ascontiguousarray(x), layout)
                made = np.full_like(wanted, 77)
                batches = [1, 1, 0, 0] if layout.kind == "panels" else []
                strides = [stride // x.itemsize for stride in x.strides]
                bind(kernel, [x, made], [*x.shape, *strides, *batches], ISA if runs_here(ISA) else None)()
                np.testing.assert_array_equal(made, wanted)


@pytest.mark.parametrize("rows", [80, 83, 96])
def test_blocks_that_are_laid_out_in_parts_lie_as_all_at_once(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = blocks(16, 34, 2, ((4, 8), (0, 4)), tail=True)
    held = np.random.default_rng(0).integers(0, 256, (rows, 3 * 34)).astype(np.uint8)
    whole = pack(held, layout)
    monkeypatch.setattr(weight_packing, "_PANELS_AT_ONCE", 2)
    np.testing.assert_array_equal(pack(held, layout), whole)


def test_a_file_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the file becomes shorter during the read, the panels are packed again."""
    graph, weights = linear_graph(), mapped_weights(tmp_path)
    right = packed(graph, weights, tmp_path / "cache").copy()
    monkeypatch.setattr(panel_memory, "_PART", 200_000)
    np.testing.assert_array_equal(packed(graph, weights, tmp_path / "cache"), right)
    (file,) = (tmp_path / "cache").iterdir()
    read = panel_memory._read_part

    def shorter(path: Path, at: int, part: Any) -> bool:
        os.truncate(path, 300_000)
        return read(path, at, part)

    monkeypatch.setattr(panel_memory, "_read_part", shorter)
    np.testing.assert_array_equal(packed(graph, weights, tmp_path / "cache"), right)
    assert file.stat().st_size == panel_memory._HEADER.size + right.nbytes


def test_weights_of_a_file_are_packed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = linear_graph()
    weights = mapped_weights(tmp_path)
    first = packed(graph, weights, tmp_path / "cache")
    np.testing.assert_array_equal(first, pack(np.asarray(weights["w"]), panels(panel_width(SHAPE[0], ISA))))
    (file,) = (tmp_path / "cache").iterdir()
    monkeypatch.setattr(weight_packing, "_fill", None)  # must not be called to pack
    monkeypatch.setattr(panel_memory, "_held", WeakValueDictionary())
    second = packed(graph, weights, tmp_path / "cache")
    assert [f.name for f in (tmp_path / "cache").iterdir()] == [file.name]
    np.testing.assert_array_equal(first, second)
    assert first.ctypes.data % ALIGNMENT == second.ctypes.data % ALIGNMENT == 0
    assert not first.flags.writeable and not second.flags.writeable


def test_a_set_of_panels_lies_once_in_a_process(tmp_path: Path) -> None:
    graph, weights = linear_graph(), mapped_weights(tmp_path)
    first, second = (packed(graph, weights, tmp_path / "cache") for _ in range(2))
    assert np.shares_memory(first, second)
    del first, second
    assert not panel_memory._held  # holds no reference
    third = packed(graph, weights, tmp_path / "cache")
    np.testing.assert_array_equal(third, pack(np.asarray(weights["w"]), panels(panel_width(SHAPE[0], ISA))))


def test_another_content_is_another_file(tmp_path: Path) -> None:
    graph = linear_graph()
    weights = mapped_weights(tmp_path)
    before = packed(graph, weights, tmp_path / "cache").copy()
    changed = mapped_weights(tmp_path, "other.bin", seed=1)
    assert not np.array_equal(before, packed(graph, changed, tmp_path / "cache"))
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_file_of_another_length_is_packed_again(tmp_path: Path) -> None:
    graph = linear_graph()
    weights = mapped_weights(tmp_path)
    right = packed(graph, weights, tmp_path / "cache").copy()  # the copied array is released
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(file.read_bytes()[:-64])
    np.testing.assert_array_equal(packed(graph, weights, tmp_path / "cache"), right)


@pytest.mark.parametrize("at", [0, 20, 36, -1], ids=["format", "name", "size", "longer"])
def test_a_file_whose_header_does_not_fit_is_packed_again(at: int, tmp_path: Path) -> None:
    graph, cache = linear_graph(), tmp_path / "cache"
    weights = mapped_weights(tmp_path)
    right = packed(graph, weights, cache).copy()
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    damaged = bytearray(whole if at >= 0 else whole + bytes(1))
    damaged[at] ^= 1
    file.write_bytes(damaged)
    np.testing.assert_array_equal(packed(graph, weights, cache), right)
    assert file.read_bytes() == whole


def test_the_bytes_of_a_file_are_checked_on_demand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, cache = linear_graph(), tmp_path / "cache"
    weights = mapped_weights(tmp_path)
    right = packed(graph, weights, cache).copy()
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:-64] + bytes(64))
    assert not np.array_equal(packed(graph, weights, cache), right)
    monkeypatch.setenv(panel_memory.CHECK, "1")
    np.testing.assert_array_equal(packed(graph, weights, cache), right)
    assert file.read_bytes() == whole
    monkeypatch.setattr(weight_packing, "_fill", None)  # would be called to pack
    np.testing.assert_array_equal(packed(graph, weights, cache), right)


def test_unused_cache_files_are_removed(tmp_path: Path) -> None:
    graph = linear_graph()
    cache = tmp_path / "cache"
    packed(graph, mapped_weights(tmp_path), cache)
    (old,) = cache.iterdir()
    note = cache / "note.txt"
    note.write_text("not ours")
    for path in (old, note):
        os.utime(path, (0, 0))
    packed(graph, mapped_weights(tmp_path), cache)  # used again, so it must stay
    os.utime(note, (0, 0))
    packed(graph, mapped_weights(tmp_path, "second.bin", seed=1), cache)
    assert old.exists()
    os.utime(old, (0, 0))
    packed(graph, mapped_weights(tmp_path, "third.bin", seed=2), cache)
    assert not old.exists()
    assert note.exists()
    assert len(list(cache.iterdir())) == 3


def test_weights_in_memory_make_no_file(tmp_path: Path) -> None:
    graph = linear_graph()
    weights = {"w": np.ones(SHAPE, np.float32)}
    packed(graph, weights, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_panels_in_memory_share_an_array_that_begins_with_a_large_page(tmp_path: Path) -> None:
    b = Builder(Graph("two"))
    x, names = b.input("x", f"f32[N, {SHAPE[1]}]"), ("v", "w", "z")
    b.outputs(**{n: b.linear(x, b.parameter(n, f"f32[{SHAPE[0] + i}, {SHAPE[1]}]")) for i, n in enumerate(names)})
    graph = PassManager((AssignLayouts(Capabilities(layouts=wants(ISA))), HoistWeights())).run(b.graph).graph
    weights = {n: np.full((SHAPE[0] + i, SHAPE[1]), i + 1, np.float32) for i, n in enumerate(names)}
    made = pack_weights(graph, recipes_of(graph), weights, folder=tmp_path)
    starts = sorted(array.ctypes.data for array in made.values())
    assert starts[0] % LARGE_PAGE == 0
    assert all(start % ALIGNMENT == 0 for start in starts)
    assert starts[-1] - starts[0] < sum(array.nbytes for array in made.values())
    assert sorted({float(array.max()) for array in made.values()}) == [1, 2, 3]


def test_a_turned_view_of_a_file_is_packed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.random.default_rng(0).standard_normal(SHAPE[::-1], np.float32).tofile(tmp_path / "weights.bin")
    turned = {"w": np.memmap(tmp_path / "weights.bin", np.float32, "r", shape=SHAPE[::-1]).T}
    graph = linear_graph()
    first = packed(graph, turned, tmp_path / "cache")
    np.testing.assert_array_equal(first, pack(np.asarray(turned["w"]), panels(panel_width(SHAPE[0], ISA))))
    monkeypatch.setattr(weight_packing, "_fill", None)  # must not be called to pack
    monkeypatch.setattr(panel_memory, "_held", WeakValueDictionary())
    np.testing.assert_array_equal(packed(graph, turned, tmp_path / "cache"), first)


def test_a_matrix_and_its_transpose_are_no_one_file(tmp_path: Path) -> None:
    square = (600, 600)
    np.random.default_rng(0).standard_normal(square, np.float32).tofile(tmp_path / "weights.bin")
    matrix = np.memmap(tmp_path / "weights.bin", np.float32, "r", shape=square)
    b = Builder(Graph("one"))
    b.outputs(y=b.linear(b.input("x", "f32[N, 600]"), b.parameter("w", "f32[600, 600]")))
    graph = PassManager((AssignLayouts(Capabilities(layouts=wants(ISA))), HoistWeights())).run(b.graph).graph
    one, other = (packed(graph, {"w": each}, tmp_path / "cache") for each in (matrix, matrix.T))
    np.testing.assert_array_equal(one, pack(matrix, panels(panel_width(600, ISA))))
    np.testing.assert_array_equal(other, pack(matrix.T, panels(panel_width(600, ISA))))


def test_a_folder_that_cannot_be_written_costs_the_file_only(tmp_path: Path) -> None:
    graph = linear_graph()
    (tmp_path / "cache").write_text("a file where the folder should be")
    weights = mapped_weights(tmp_path)
    made = packed(graph, weights, tmp_path / "cache")
    np.testing.assert_array_equal(made, pack(np.asarray(weights["w"]), panels(panel_width(SHAPE[0], ISA))))


def test_a_misfit_is_named(tmp_path: Path) -> None:
    graph = linear_graph()
    with pytest.raises(BackendError, match=r"weight w must be f32\[530, 500\]"):
        pack_weights(graph, recipes_of(graph), {"w": np.ones((500, 530), np.float32)}, folder=tmp_path)


def _size(n: int) -> Any:
    from treadle.ir.sizing.sizes import Size

    return Size.of(n)


def linear_graph() -> Graph:
    """Return a product with one weight, after the backend's passes."""
    b = Builder(Graph("one"))
    x, w = b.input("x", f"f32[N, {SHAPE[1]}]"), b.parameter("w", f"f32[{SHAPE[0]}, {SHAPE[1]}]")
    b.outputs(y=b.linear(x, w))
    return PassManager((AssignLayouts(Capabilities(layouts=wants(ISA))), HoistWeights())).run(b.graph).graph


def mapped_weights(folder: Path, name: str = "weights.bin", seed: int = 0) -> dict[str, Any]:
    np.random.default_rng(seed).standard_normal(SHAPE, np.float32).tofile(folder / name)
    return {"w": np.memmap(folder / name, np.float32, "r", shape=SHAPE)}


def packed(graph: Graph, weights: dict[str, Any], folder: Path) -> np.ndarray[Any, Any]:
    ((_, array),) = pack_weights(graph, recipes_of(graph), weights, folder=folder).items()
    finish_writing()
    return array


@needs_tvm
def test_windows_that_do_not_overlap_read_a_weight_that_is_packed_once() -> None:
    """A run makes no copy of the weight, so it needs less memory."""
    b, target = Builder(Graph("patches")), Target("cpu")
    weight = b.parameter("weight", "f32[64, 3, 16, 16]")
    b.outputs(y=b.exp(b.conv(b.input("x", "f32[B, 3, 32, 32]"), weight, None, strides=(16, 16))))
    lowered = TvmBackend().lower(b.graph, target)
    assert lowered.plan is not None
    assert [value.layout.kind for value in lowered.graph.derived_weights.values() if value.layout is not None] == [
        "panels"
    ]
    lives = TvmBackend().frames(lowered.graph, target, lowered.plan)["main"].lives
    assert max(life.storage.nbytes.evaluate({"B": 1}) for life in lives) < 64 * 3 * 16 * 16 * 4

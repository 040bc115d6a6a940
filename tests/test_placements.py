"""Meshes and placements: the text parses back to the same placement, and the parts of a value cover each element
once.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treadle.ir.errors import ParseError, PassError, UsageError
from treadle.ir.hardware import Hardware, find_hardware
from treadle.ir.placement.mesh import Mesh
from treadle.ir.placement.placements import (
    MeshPlacement,
    Split,
    held_placement,
    lies_between_blocks,
    local_type,
    parse_placement,
    span,
    taken_part,
)
from treadle.ir.sizing.sizes import Size
from treadle.ir.types import f32, parse_type
from treadle.passes.sharding.conversions import (
    bytes_of,
    conversion,
    payload_of,
    seconds_of,
    seconds_to_pass,
    sent_by,
)

MESHES = ("tp=2", "tp=8", "tp=2,dp=2", "tp=4,dp=3", "a=6,b=1,c=5")


def test_ranks_count_through_the_first_axis_fastest() -> None:
    mesh = Mesh.of("tp=2,dp=3")
    tp, dp = mesh.parts
    assert [(mesh.coordinate(r, tp), mesh.coordinate(r, dp)) for r in range(mesh.ranks)] == [
        (0, 0),
        (1, 0),
        (0, 1),
        (1, 1),
        (0, 2),
        (1, 2),
    ]
    assert mesh.group(3, (tp,)) == (2, 3)
    assert mesh.group(3, (dp,)) == (1, 3, 5)


def test_a_part_of_an_axis_is_named_by_what_lies_outside_it() -> None:
    mesh = Mesh.of("tp=8")
    outer, inner = mesh.parts_of("tp:(1)4"), mesh.parts_of("tp:(4)2")
    assert outer + inner == mesh.parts_of("tp") == mesh.parts
    assert mesh.text_of(outer) == "tp:(1)4"
    assert mesh.text_of(mesh.parts) == "tp"
    assert mesh.group(5, inner) == (4, 5)
    assert mesh.group(5, outer) == (1, 3, 5, 7)


@pytest.mark.parametrize("text", MESHES)
def test_a_mesh_reads_back(text: str) -> None:
    assert Mesh.of(str(Mesh.of(text))) == Mesh.of(text)


@pytest.mark.parametrize(
    ("text", "report"),
    [
        ("tp", "not a mesh"),
        ("tp=0", "axes of 1 or more"),
        ("tp=2,tp=2", "two axes tp"),
        ("tp=9999999,dp=9999999", "ranks"),
        ("", "not a mesh"),
    ],
)
def test_invalid_meshes_are_refused(text: str, report: str) -> None:
    with pytest.raises(UsageError, match=report):
        Mesh.of(text)


@pytest.mark.parametrize("text", ["ep", "tp:(1)3", "tp:(3)2", "tp:(1)16"])
def test_unknown_mesh_axes_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="has no"):
        Mesh.of("tp=8").parts_of(text)


@pytest.mark.parametrize(
    "text",
    ["[]", "[-, -]", "[dp, -, tp*64]", "[tp:(1)4, tp:(4)2]", "[dp tp, -] sum(ep)", "[-] max(tp:(4)2 dp)", "[tp*(2*S)]"],
)
def test_a_placement_reads_back(text: str) -> None:
    mesh = Mesh.of("tp=8,dp=2,ep=2")
    placed = parse_placement(text, mesh)
    assert parse_placement(placed.text(mesh), mesh) == placed
    # the axes of partial sums are printed in their own order
    assert placed.text(mesh) == text or "dp" in placed.text(mesh)


def test_text_that_is_no_placement_is_refused() -> None:
    with pytest.raises(ParseError, match="not a placement"):
        parse_placement("dp, tp", Mesh.of("dp=2,tp=2"))
    with pytest.raises(ParseError, match="unknown reduction 'mean'"):
        parse_placement("[-] mean(tp)", Mesh.of("tp=2"))
    with pytest.raises(ParseError, match="a dimension is split over no axis") as error:
        parse_placement("[tp, *2]", Mesh.of("tp=2"))
    assert error.value.hint == "- for a whole dimension"
    with pytest.raises(ParseError, match="not a placement"):  # quickly, because each digit is parsed in only one way
        parse_placement("[-] sum(" + "(1)" + "1" * 10 + "(1)1111111111" * 40 + "!", Mesh.of("tp=2"))


@pytest.mark.parametrize(
    "part", ["tp:(2)1", "tp:(9)1", "tp:(1)3", "tp:(0)2", f"tp:({'9' * 5000})2", f"tp:(1){'9' * 5000}"]
)
def test_a_part_that_an_axis_has_not_is_refused(part: str) -> None:
    with pytest.raises(UsageError, match=r"has no (part|axis)"):
        Mesh.of("tp=8").parts_of(part)


def test_uneven_parts_differ_by_one_unit() -> None:
    mesh = Mesh.of("tp=8")
    split = Split(mesh.parts, Size.of(64))
    sizes = [span(Size.of(12 * 64), split, mesh, rank)[1].constant for rank in range(8)]
    assert sizes == [64, 128, 64, 128, 64, 128, 64, 128]


def test_a_split_that_is_known_lies_between_blocks_or_cuts_them() -> None:
    """For 12 * 64 elements over 8 ranks, parts begin at multiples of 64; without a grain, at multiples of 96."""
    parts = Mesh.of("tp=8").parts
    of_64, even = Split(parts, Size.of(64)), Split(parts)
    size, symbol = Size.of(12 * 64), Size.symbol("S")
    assert lies_between_blocks(size, of_64, 64)
    assert not lies_between_blocks(size, of_64, 128)
    assert lies_between_blocks(size, even, 96)
    assert not lies_between_blocks(size, even, 64)
    for unknown, split in ((symbol, even), (64 * symbol, of_64), (size, Split(parts, symbol)), (Size.of(65), of_64)):
        assert not lies_between_blocks(unknown, split, 1), f"{unknown} in {split}"
    assert not lies_between_blocks(12 * symbol, Split(parts, symbol), 1)


def test_equal_parts_need_no_grain() -> None:
    mesh = Mesh.of("tp=4")
    assert Split(mesh.parts, Size.of(64)).normal(Size.of(768)) == Split(mesh.parts)
    assert Split(mesh.parts, Size.of(64)).normal(Size.of(640)) == Split(mesh.parts, Size.of(64))


def test_a_grain_that_could_be_less_has_no_way_to_it() -> None:
    mesh = Mesh.of("tp=2")
    now, target = (MeshPlacement((Split(mesh.parts, Size.of(grain)),)) for grain in (1, 2))
    with pytest.raises(PassError, match="no step leads to a placement whose grain could be smaller"):
        conversion([Size.of(8)], now, target)
    assert conversion([Size.of(6)], now, target)  # 2 and 4 elements, not 3 and 3


def test_the_type_of_a_part_keeps_labels_and_says_sizes_in_the_symbols_of_the_whole() -> None:
    mesh = Mesh.of("tp=2,dp=2")
    placed = parse_placement("[dp, -, tp]", mesh)
    whole = parse_type("f32[B, S, (heads=12 64)]")
    assert str(local_type(whole, placed, mesh, 0)) == "f32[B//2, S, (heads=6 64)]"
    assert str(local_type(whole, placed, mesh, 2)) == "f32[B-(B//2), S, (heads=6 64)]"


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(MESHES), st.data())
def test_ranks_together_hold_every_element_and_no_part_is_empty(text: str, data: st.DataObject) -> None:
    mesh = Mesh.of(text)
    parts = data.draw(st.permutations(mesh.parts))
    cut = data.draw(st.integers(0, len(parts)))
    over = tuple(parts[:cut])
    grain = data.draw(st.integers(1, 3))
    ways = np.prod([p.size for p in over], dtype=int)
    units = data.draw(st.integers(int(ways), int(ways) + 9))
    placed = MeshPlacement((Split(over, Size.of(grain)) if over else None, None))
    shape = f32[units * grain, 2].shape
    whole = np.arange(units * grain * 2).reshape(units * grain, 2)
    held = np.zeros(len(whole), int)
    for rank in range(mesh.ranks):
        part = taken_part(whole, shape, placed, mesh, rank, {})
        assert part.size
        held[part[:, 0] // 2] += 1
    assert set(held) == {mesh.ranks // ways}


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(MESHES), st.integers(30, 60), st.data())
def test_without_the_last_axis_a_split_is_the_split_over_the_others(text: str, size: int, data: st.DataObject) -> None:
    mesh = Mesh.of(text)
    parts = tuple(data.draw(st.permutations(mesh.parts)))
    for rank in range(mesh.ranks):
        start, length = (n.constant or 0 for n in span(Size.of(size), Split(parts[:-1]), mesh, rank))
        group = [span(Size.of(size), Split(parts), mesh, other) for other in mesh.group(rank, parts[-1:])]
        ends = [((a.constant or 0), (a.constant or 0) + (n.constant or 0)) for a, n in group]
        assert ends[0][0] == start
        assert ends[-1][1] == start + length
        assert all(before[1] == after[0] for before, after in itertools.pairwise(ends))


@pytest.mark.parametrize(
    ("mesh", "over", "is_fast"),
    [
        ("tp=8,dp=2", "tp", True),
        ("tp=8,dp=2", "dp", False),
        ("tp=4,dp=2", "tp dp", True),
        ("tp=9", "tp", False),
        ("tp=16", "tp:(8)2", True),
        ("tp=16", "tp:(2)8", True),
        ("tp=16", "tp:(1)2", False),
        ("tp=2,dp=8", "dp:(4)2", True),
        ("tp=2,dp=8", "dp:(1)2", False),
    ],
)
def test_a_group_that_reaches_beyond_its_node_has_the_slow_link(mesh: str, over: str, is_fast: bool) -> None:
    """The group needs two of eight devices: the distance between its ranks decides about the link."""
    machine, laid = find_hardware("h100"), Mesh.of(mesh)
    assert machine.link(laid.reach(laid.parts_of(over))) == (machine.fast if is_fast else machine.slow)


def test_machines_that_are_planned_for() -> None:
    figures = {
        "cpu": (60e9, 20e9, 16e9, 1, 5e9, 5e9, 30e-6),
        "a100": (156e12, 2.039e12, 80e9, 8, 300e9, 25e9, 5e-6),
        "h100": (495e12, 3.35e12, 80e9, 8, 450e9, 50e9, 5e-6),
    }
    for name, expected in figures.items():
        h = find_hardware(name)
        assert (h.product_rate, h.bandwidth, h.memory, h.node, h.fast, h.slow, h.latency) == expected
    assert find_hardware("cpu").seconds(60e9, 10e9) == 1.0
    assert find_hardware("cpu").seconds(30e9, 40e9) == 2.0
    with pytest.raises(UsageError, match="unknown device 'tpu'"):
        find_hardware("tpu")


def test_containers_of_blocks_are_split_by_bytes() -> None:
    mesh = Mesh.of("tp=2,dp=2")
    blocks = parse_type("f32[8, 128] as int8_groups(32)")  # 36 bytes a block
    assert blocks.storage_type == parse_type("u8[8, 144]")
    for text, held in (("[-, tp*32]", "[-, tp*36]"), ("[dp, tp*64]", "[dp, tp*72]"), ("[dp, -]", "[dp, -]")):
        placed = parse_placement(text, mesh)
        assert held_placement(blocks, placed).text(mesh) == held
        assert held_placement(blocks.decoded, placed) == placed
    even = parse_placement("[-, tp] max(dp)", mesh)
    assert held_placement(blocks, even) == even, "equal parts of either"
    assert held_placement(blocks, parse_placement("[-, tp*32] max(dp)", mesh)).text(mesh) == "[-, tp*36] max(dp)"
    columns = parse_type("f32[128, 8] as int8_groups(32, axis=0)")
    assert held_placement(columns, parse_placement("[tp*32, dp*2]", mesh)).text(mesh) == "[tp*36, dp*2]"


def test_an_axis_in_its_prime_parts() -> None:
    assert [(part.axis, part.outer, part.size) for part in Mesh.of("tp=12,one=1,ep=7").parts] == [
        ("tp", 1, 2),
        ("tp", 2, 2),
        ("tp", 4, 3),
        ("ep", 1, 7),
    ]
    assert [part.size for part in Mesh.of("tp=2310").parts] == [2, 3, 5, 7, 11]
    mesh = Mesh.of("tp=4,dp=3")
    assert [mesh.index(rank, mesh.parts_of("dp tp")) for rank in range(12)] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert [mesh.index(rank, mesh.parts_of("tp:(2)2")) for rank in range(4)] == [0, 1, 0, 1]
    assert str(mesh) == "tp=4,dp=3"
    with pytest.raises(UsageError) as caught:
        mesh.parts_of("tp:(1)3")
    assert (caught.value.what, caught.value.hint) == (
        "axis tp of tp=4,dp=3 has no part tp:(1)3",
        "tp:(1)2, if the axis has an even size",
    )


def test_terms_lie_in_an_order_of_their_own() -> None:
    mesh = Mesh.of("tp=4,dp=2")
    first, second = (MeshPlacement((), mesh.parts_of(text)) for text in ("tp dp", "dp tp"))
    assert first == second and first.monoid == "sum" and first.text(mesh) == "[] sum(dp tp)"
    assert MeshPlacement.whole(2) == MeshPlacement((None, None))
    assert len(parse_placement("[tp:(1)2, -] max(dp)", mesh).used) == 2


# -- costs -------------------------------------------------------------------------------------------------------------

ROUND = Hardware("round", "cuda", "", 128.0, {"f32": 1.0}, memory=1.0, node=4, fast=64.0, slow=16.0, latency=0.5)
"""A machine for round numbers: four ranks with an f32[8, 16] of 512 bytes."""


@pytest.mark.parametrize(
    ("source", "target", "payload", "sent", "seconds", "far"),
    [
        ("[tp, -]", "[-, -]", 512, 384, 384 / 64 + 3 * 0.5, 384 / 16 + 3 * 0.5),
        ("[-, -] sum(tp)", "[-, -]", 512, 768, 768 / 64 + 6 * 0.5, 768 / 16 + 6 * 0.5),
        ("[-, -] sum(tp)", "[tp, -]", 512, 384, 384 / 64 + 3 * 0.5, 384 / 16 + 3 * 0.5),
        ("[tp, -]", "[-, tp]", 128, 96, 96 / 64 + 3 * 0.5, 96 / 16 + 3 * 0.5),
        ("[-, -]", "[tp, -]", 0, 0, 0, 0),
        ("[-, -]", "[-, -] sum(tp)", 0, 0, 512 / 128, 512 / 128),
    ],
    ids=["gather", "reduce", "reduce and scatter", "all to all", "take", "keep on one"],
)
def test_a_step_takes_what_its_bytes_and_messages_do(
    source: str, target: str, payload: float, sent: float, seconds: float, far: float
) -> None:
    mesh, type = Mesh.of("tp=4"), f32["B", 16]
    (step,) = conversion(type.shape, parse_placement(source, mesh), parse_placement(target, mesh))
    report = type, step, {"B": 8}
    assert (payload_of(*report), sent_by(*report) if step.sends else 0) == (payload, sent)
    assert seconds_of(*report, mesh, ROUND) == pytest.approx(seconds)
    assert seconds_of(*report, mesh, replace(ROUND, node=3)) == pytest.approx(far)


def test_a_part_that_is_passed_on_takes_its_bytes_and_a_message() -> None:
    mesh = Mesh.of("tp=4")
    report = f32["B", 16], parse_placement("[tp, -]", mesh), {"B": 8}
    assert bytes_of(*report) == 128
    assert seconds_to_pass(*report, mesh.parts, mesh, ROUND) == 128 / 64 + 0.5
    assert seconds_to_pass(*report, mesh.parts, mesh, replace(ROUND, node=3)) == 128 / 16 + 0.5

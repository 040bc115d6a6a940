"""Values that die before a result is written share its storage, also under a budget, if they always fit in it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Annotated, Any

import numpy as np
import pytest

import treadle as t
from tests.backend_checks import needs_tvm
from treadle.backends.registry import find_backend
from treadle.backends.staged import StagedBackend
from treadle.compiled import Compiled
from treadle.explaining.memory import explain_memory
from treadle.ir.builder import Builder, Expr
from treadle.ir.errors import BackendError
from treadle.ir.graph import Function, Graph
from treadle.ir.sizing.size_bounds import Bounds
from treadle.ir.sizing.sizes import Size
from treadle.ir.storage.views import Storage, StorageKind
from treadle.ir.target import Target
from treadle.ir.transforms.fixing import bounded
from treadle.ir.types import f32
from treadle.passes.budget.fitted_pipeline import search_of
from treadle.passes.budget.fitting import Fitting
from treadle.passes.budget.partitions import FunctionTable
from treadle.passes.framework.manager import PassManager
from treadle.passes.memory import frame_placement
from treadle.passes.memory.frame_placement import PlacedFrame, place_frames
from treadle.passes.memory.frames import Frame, FrameCall, aligned
from treadle.passes.memory.hosting import Hosting, hostings
from treadle.passes.memory.storage_plan import Life
from treadle.passes.pipelines import DEFAULT

ALONE = Target("cpu", 1)
WIDE: dict[str, Any] = {"layers": 2, "dim": 64, "heads": 4, "vocab": 50_000}
MOST = {"B": 2, "S": 60}
BOUNDS = {"B": Bounds(1, 6), "S": Bounds(1, 50)}


# -- the proof -----------------------------------------------------------------------------------------------------


def storage(name: str, elements: str, kind: StorageKind = StorageKind.LOCAL) -> Storage:
    return Storage(name, f32, Size.of(elements), kind)


def drawn_size(r: Random) -> str:
    return r.choice(("{}*B*S", "{}*S", "{}*(S//2)", "{}*B*(S-S//3)", "{}")).format(r.choice((3, 16, 40)))


def drawn_frames(seed: int) -> dict[str, Frame]:
    """Two functions that are called, and an entry of ten steps whose result is written from the eighth step on."""
    r = Random(seed)

    def lives(count: int, steps: int) -> tuple[Life, ...]:
        found = []
        for i in range(count):
            first = r.randrange(steps)
            found.append(Life(storage(f"s{i}", drawn_size(r)), first, r.randrange(first, min(first + 4, steps))))
        return tuple(found)

    wide = storage(
        "out", r.choice(("{}*B*S", "{}*S*S + 20*B", "{}*B*S + 900")).format(r.randint(20, 150)), StorageKind.RESULT
    )
    blocks = {name: Frame(name, (None,) * 4, lives(5, 4), {}) for name in ("block", "other")}
    calls = {at: FrameCall(name) for at, name in zip(r.sample(range(8), 2), blocks, strict=True)}
    return blocks | {"main": Frame("main", (None,) * 10, lives(9, 10), calls, (Life(wide, 7, 10),))}


def bytes_of(life: Life, sizes: dict[str, int]) -> int:
    return life.storage.nbytes.evaluate(sizes)


def needs(all_placed: dict[str, PlacedFrame], frame: Frame, sizes: dict[str, int]) -> int:
    """Return the end of the values that are stored in the result."""
    placed = all_placed["main"]
    ends = [placed.offsets[x.storage] + bytes_of(x, sizes) for x in frame.lives if x.storage in placed.hosted]
    calls = {at: all_placed[call.callee].size for at, call in frame.calls.items() if at in placed.hosted}
    return max([*ends, *(placed.callees[at] + size for at, size in calls.items())], default=0)


def test_proofs_hold_at_every_size() -> None:
    """A run takes the values that live when the result is written, placed by themselves, or at most the reported
    bound.
    """
    proven = 0
    for seed in range(30):
        frames = drawn_frames(seed)
        frame = frames["main"]
        (hosting,) = hostings(frames, "main")
        apart = place_frames(frames | {"main": replace(frame, handed_out=())}, {"B": 6, "S": 50})["main"].size
        report = hosting.most_apart(BOUNDS, 0, apart)
        proven += report < apart
        late = tuple([x for x in frame.lives if x.last >= hosting.result.first])
        kept = {at: call for at, call in frame.calls.items() if at >= hosting.result.first}
        for b in (1, 2, 6):
            for s in (1, 2, 3, 7, 31, 50):
                sizes = {"B": b, "S": s}
                placed = place_frames(frames, sizes)
                if placed["main"].host is not None:
                    assert needs(placed, frame, sizes) <= bytes_of(hosting.result, sizes)
                left = place_frames(frames | {"main": Frame("main", frame.steps, late, kept)}, sizes)["main"].size
                assert placed["main"].size <= max(left, report), (seed, sizes)
    assert 5 < proven < 25


def test_reports_of_some_frames() -> None:
    """The search visits a limited number of boxes of sizes; more boxes would not change most bounds."""
    found = [hostings(drawn_frames(seed), "main")[0].most_apart(BOUNDS, 64, 200_000) for seed in range(10)]
    assert found == [19200, 122176, 124224, 165568, 2112, 29120, 144448, 17984, 135744, 6976]


def one_early(early: str, result: str, *beside: Life) -> tuple[dict[str, Frame], Hosting]:
    own = (Life(storage("x", early), 0, 0), *beside)
    made = Life(storage("out", result, StorageKind.RESULT), 2, 3)
    frames = {"main": Frame("main", (None,) * 3, own, {}, (made,))}
    (hosting,) = hostings(frames, "main")
    return frames, hosting


@pytest.mark.parametrize(
    ("early", "result", "smallest"),
    [
        ("64*B*S", "100*B*S", None),
        ("64*S", "100*B*S", None),  # at B=1, too
        ("64*B*S", "64*B*S", None),
        ("2*S*S", "101*S", None),
        ("64*B*(S - S//2)", "100*B*S", None),
        ("16*S", "17*S", None),
        ("64*B*S", "100*S", {"B": 2, "S": 1}),
        ("3*S*S", "100*S", {"B": 1, "S": 34}),
        ("300 + S", "16*S", {"B": 1, "S": 1}),
        ("5*S", "5*S", {"B": 1, "S": 1}),  # 20 bytes, and units are of 64
    ],
)
def test_a_result_hosts_where_it_is_no_smaller(early: str, result: str, smallest: dict[str, int] | None) -> None:
    """The bound for sizes at which the result is too small is the need of a run there, or little more."""
    frames, hosting = one_early(early, result)
    report, taken = hosting.most_apart(BOUNDS, 0, 1 << 40), {}
    for b in range(1, 7):
        for s in range(1, 51):
            placed = place_frames(frames, {"B": b, "S": s})["main"]
            taken[b, s] = placed.size
            assert placed.size == 0 or placed.host is None
    if smallest is None:
        assert report == 0 == max(taken.values())
    else:
        assert taken[smallest["B"], smallest["S"]] > 0
        assert max(taken.values()) <= report <= 1.3 * max(taken.values()) + 64


def test_of_sizes_that_take_less_than_is_kept_at_the_largest_nothing_is_asked() -> None:
    """At S=1 the result has one unit, and cannot hold x, but everything there takes less than y at S=50."""
    frames, hosting = one_early("17*S + 9", "18*S", Life(storage("y", "20*S"), 0, 2))
    left = place_frames(frames, {"S": 50})["main"]
    assert left.host is hosting.result.storage and place_frames(frames, {"S": 1})["main"].host is None
    assert hosting.most_apart(BOUNDS, left.size, 1 << 40) == left.size
    assert hosting.most_apart(BOUNDS, 0, 1 << 40) > 0


def test_buffers_of_one_size_share_a_place_unless_they_live_at_once() -> None:
    for first, report in ((1, 0), (0, 8064)):
        _, hosting = one_early("16*S", "30*S", Life(storage("again", "16*S"), first, 1))
        hosting = replace(hosting, whole=(Size.of("16*S"), Size.of("160*S + 64")))
        assert hosting.most_apart(BOUNDS, 0, 1 << 40) == report


def test_symbols_without_an_end() -> None:
    _, hosting = one_early("64*S", "200*S", Life(storage("y", "16*B*S"), 0, 1))
    assert hosting.most_apart({}, 0, 1 << 40) == 1 << 40
    assert hosting.most_apart({"B": Bounds(1, 8)}, 0, 1 << 40) == 0


def test_no_function_takes_more_than_places_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the greedy order, buffers of one size share a place, and calls share a place."""

    def apart(lives: Any, alignment: int) -> list[int]:
        ends = np.cumsum([aligned(life.size, alignment) for life in lives])
        return [int(end) - aligned(life.size, alignment) for end, life in zip(ends, lives, strict=True)]

    monkeypatch.setattr(frame_placement, "plan_arena", apart)
    block = Frame("block", (None,) * 2, (Life(storage("a", "16*S"), 0, 0), Life(storage("b", "16*S"), 1, 1)), {})
    own = *(Life(storage(f"x{i}", "32*S"), i, i + 1) for i in range(6)), Life(storage("z", "48*S"), 0, 6)
    main = Frame("main", (None,) * 8, own, {2: FrameCall("block"), 5: FrameCall("block")})
    placed = place_frames({"block": block, "main": main}, {"S": 10})
    assert placed["block"].size == 640
    assert placed["main"].size == 2 * 1280 + 1920 + 640


# -- within a budget -----------------------------------------------------------------------------------------------


def needs_of(exe: Compiled, **sizes: int) -> int:
    """Return the arena of a run at some sizes, as the backend places it."""
    backend, lowered = find_backend("tvm"), exe.optimized.lowered
    assert isinstance(backend, StagedBackend) and lowered is not None and lowered.plan is not None
    return place_frames(backend.frames(lowered.graph, exe.target, lowered.plan), sizes)[lowered.graph.main.name].size


def searched(graph: Graph, sizes: dict[str, int]) -> Fitting:
    backend = find_backend("tvm")
    assert isinstance(backend, StagedBackend)
    return search_of(backend, bounded(graph, sizes), ALONE, sizes)[0]


def measured(exe: Compiled, **inputs: Any) -> int:
    """Return the number of bytes of its arena that a run changes, up to the last changed byte."""
    arena = exe.executable.machine._arena  # type: ignore[attr-defined]
    arena.fill(0xA5)
    exe(**inputs)
    changed = np.flatnonzero(arena[-arena.ctypes.data % 64 :] != 0xA5)
    return int(changed[-1]) + 1 if len(changed) else 0


def tokens(b: int, s: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(b * s).integers(0, 50_000, (b, s))


@needs_tvm
def test_a_model_over_a_vocabulary_keeps_as_it_is_to_what_a_run_takes_anyway(tmp_path: Path) -> None:
    free = t.compile("gpt2", backend="tvm", target=ALONE, seed=1, **WIDE)
    report = explain_memory("gpt2", backend="tvm", target=ALONE, sizes=MOST, **WIDE)
    assert report.arena is not None and report.arena < report.peak / 2
    kept = t.compile("gpt2", backend="tvm", target=ALONE, seed=1, memory=report.arena, sizes=MOST, **WIDE)
    assert kept.memory_fit is not None and kept.memory_fit.ratio == 1.0 and not kept.memory_fit.chunks
    assert kept.memory_fit.peak == kept.memory_fit.before == report.arena and kept.memory_fit.host == "logits"
    assert "temporaries that are dead before logits is written use the memory of logits" in str(kept.memory_fit)
    r = Random(0)
    drawn = [(r.randint(1, MOST["B"]), r.randint(1, MOST["S"])) for _ in range(4)]
    for b, s in [(MOST["B"], MOST["S"]), (1, 1), (2, 1), (1, MOST["S"]), *drawn]:
        assert np.array_equal(free(tokens=tokens(b, s))["logits"], kept(tokens=tokens(b, s))["logits"])
        assert report.arena - 64 < measured(kept, tokens=tokens(b, s)) <= report.arena if (b, s) == (2, 60) else True
        assert measured(kept, tokens=tokens(b, s)) <= report.arena
    free.save(tmp_path / "free.treadle")
    loaded = t.load_artifact(tmp_path / "free.treadle", target=ALONE, memory=report.arena, sizes=MOST)
    assert loaded.memory_fit == kept.memory_fit
    sizes = [{"B": b, "S": s} for b in (1, 2) for s in range(1, MOST["S"] + 1)]
    assert max(needs_of(kept, **each) for each in sizes) == report.arena


@needs_tvm
def test_less_than_that_is_refused_with_what_is_true() -> None:
    """The last norm is alive when the logits are written, so none of its bytes can be in them."""
    most = {"B": 1, "S": 60}
    arena = explain_memory("gpt2", backend="tvm", target=ALONE, sizes=most, **WIDE).arena
    with pytest.raises(BackendError, match="does not fit") as refused:
        t.compile("gpt2", backend="tvm", target=ALONE, memory=arena - 1, sizes=most, **WIDE)
    assert refused.value.within == (
        f"gpt2: {arena:,} bytes without a budget; the least that was reached is {arena:,}; "
        f"no plan of this kind needs less than {arena:,}"
    )
    assert arena == 60 * 64 * 4
    graph = t.compile("gpt2", backend="tvm", target=ALONE, **WIDE).optimized.graph
    assert searched(graph, most).bound == arena


@needs_tvm
def test_parts_of_what_comes_before_lie_in_the_output_too() -> None:
    """At many positions a block needs more than an output of 600 words; a block in parts fits into it."""
    config, most = WIDE | {"vocab": 600}, {"B": 1, "S": 256}
    kept = t.compile("gpt2", backend="tvm", target=ALONE, seed=1, memory=100_000, sizes=most, **config)
    assert kept.memory_fit is not None and kept.memory_fit.host == "logits" and kept.memory_fit.chunks
    assert all(needs_of(kept, B=1, S=s) <= kept.memory_fit.peak <= 100_000 for s in range(1, 257, 15))
    free = t.compile("gpt2", backend="tvm", target=ALONE, seed=1, **config)
    for s in (1, 29, 256):
        given = tokens(1, s) % 600
        assert np.array_equal(free(tokens=given)["logits"], kept(tokens=given)["logits"])
        assert measured(kept, tokens=given) <= kept.memory_fit.peak


@needs_tvm
def test_values_stored_in_an_output_are_not_split() -> None:
    """The softmax of 700 needs more than the softmax of 600. Only the latter runs after y is written, and is split."""

    @t.model
    def two(x: Annotated[t.Tensor, t.f32["S 64"]]) -> dict[str, t.Tensor]:
        y = t.linear(t.linear(t.softmax(t.linear(x, 700, name="one")), 64, name="two"), 1600, name="wide")
        return {"y": y, "z": t.linear(t.softmax(t.linear(y, 600, name="three")), 32, name="four")}

    search = searched(PassManager(DEFAULT).run(two.graph()).graph, {"S": 64})
    fit = search.fit(search.whole.bytes * 9 // 10)
    assert fit is not None and fit.host == "y" and 1 < fit.ratio < 1.005
    assert [chunk.source.rpartition(" ")[2] for chunk in fit.chunks] == ["four"]


@t.model
def looked_up(x: Annotated[t.Tensor, t.f32["S 64"]], y: Annotated[t.Tensor, t.f32["T 8"]]) -> t.Tensor:
    """A model that needs all of S for each position of T, so at T=1 the output is smaller than the values before it."""
    whole = t.reduce_max(t.softmax(t.linear(t.softmax(t.linear(x, 256, name="one")), 64, name="two")), axes=(0,))
    return t.linear(t.linear(y, 64, name="three") + whole, 800, name="wide")


@needs_tvm
def test_an_output_that_is_too_small_at_smaller_sizes_hosts_nothing_there() -> None:
    most = {"S": 64, "T": 64}
    arena = explain_memory(looked_up, backend="tvm", target=ALONE, sizes=most).arena
    assert arena is not None
    kept = t.compile(looked_up, backend="tvm", target=ALONE, memory="1MB", sizes=most)
    assert kept.memory_fit is not None and not kept.memory_fit.chunks
    assert arena == needs_of(kept, **most) < needs_of(kept, S=64, T=1) <= kept.memory_fit.peak == kept.memory_fit.before
    assert max(needs_of(kept, S=s, T=n) for s in (1, 31, 64) for n in range(1, 65)) <= kept.memory_fit.peak
    tight = t.compile(looked_up, backend="tvm", target=ALONE, memory=kept.memory_fit.peak, sizes=most)
    assert tight.memory_fit is not None and not tight.memory_fit.chunks
    kept(x=np.ones((64, 64), np.float32), y=np.ones((1, 8), np.float32))
    (plan,) = kept.executable.machine.plans.values()  # type: ignore[attr-defined]
    assert plan.host is None and arena < plan.arena <= kept.memory_fit.peak
    with pytest.raises(BackendError, match="does not fit") as refused:
        t.compile(looked_up, backend="tvm", target=ALONE, memory=arena, sizes=most)
    report = f"{kept.memory_fit.peak:,} bytes without a budget, {arena:,} at these sizes alone"
    assert report in str(refused.value.within)


@needs_tvm
def test_an_output_that_comes_back_in_a_donated_input_hosts_nothing() -> None:
    @t.model
    def refined(x: Annotated[t.Tensor, t.f32["S 64"]]) -> t.Tensor:
        return x + t.softmax(t.softmax(x))

    needed = []
    for donate in ((), ("x",)):
        report = explain_memory(refined, backend="tvm", target=ALONE, sizes={"S": 9}, donate=donate)
        assert report.arena is not None
        needed.append(report.arena)
        kept = t.compile(refined, backend="tvm", target=ALONE, memory=report.arena, sizes={"S": 9}, donate=donate)
        assert kept.memory_fit is not None and kept.memory_fit.peak == kept.memory_fit.before == report.arena
        x = np.ones((9, 64), np.float32)
        (made,) = kept(x=x).values()
        assert np.shares_memory(x, made) is bool(donate)
    assert needed[0] < needed[1]


def wide_program(seed: int) -> Graph:
    """A block that is called twice, and one or two products of its result, narrow or wide."""
    r, graph = Random(seed), Graph("wide")
    main, block = Builder(graph), Function("block")
    graph.add_function(block)
    inside = Builder(graph, block)

    def chain(b: Builder, x: Expr) -> Expr:
        for i in range(r.randint(1, 4)):
            w = b.parameter(f"w{i}", f32[r.choice((8, 32)), x.type.shape[-1].constant])
            y = b.linear(x, w)
            x = r.choice((b.softmax, b.gelu, b.relu))(y)
            x = x + y if r.random() < 0.5 else x
        return b.linear(x, b.parameter("back", f32[8, x.type.shape[-1].constant]))

    inside.outputs(y=chain(inside, inside.input("x", "f32[B, S, 8]")))
    x = main.input("x", "f32[B, S, 8]")
    for i in range(2):
        weights = [main.parameter(f"h.{i}.{name}", v.type) for name, v in block.parameters.items()]
        (x,) = main.call(block, [x, *weights])
    made = {"y": main.linear(x, main.parameter("head", f32[r.choice((8, 24, 200)), 8]))}
    if r.random() < 0.4:
        made["pooled"] = main.reduce_max(r.choice((x, made["y"])), axes=(1,))
    main.outputs(**made)
    return graph


@needs_tvm
@pytest.mark.parametrize("seed", range(10))
def test_no_candidate_needs_less_than_the_bound(seed: int) -> None:
    search = searched(wide_program(seed), {"B": 1 + 3 * (seed % 2), "S": 12})
    reached = {each: search.peak(each) for each in search.candidates}
    assert search.bound <= min(reached.values())
    whole = next(each for each in reached if not each.chunks)
    assert reached[whole] >= search.whole.here
    fit = search.fit(reached[whole])
    assert fit is not None and fit.ratio == 1.0 and not fit.chunks  # a plan that fits whole is not split


def test_before_a_result_is_written_what_will_lie_in_it_may_be_used() -> None:
    """If 30 of 100 bytes are in use, and the host takes 80 with 50 in use next to it, at least 130 exist anyway."""
    host = SimpleNamespace(first=2, bytes=80)
    table: Any = SimpleNamespace(host=host, live=[30, 30, 30], _kept=lambda given, first, last: 50)
    assert [FunctionTable.room(table, at, 100) for at in (0, 1, 2)] == [100, 100, 70]
    table.host = None
    assert FunctionTable.room(table, 0, 100) == 70

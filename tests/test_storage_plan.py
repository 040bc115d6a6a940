"""Storage plans: the layout of values, and the independent checker, which finds every planted error."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.backend_checks import graph_of
from tests.golden import Golden
from tests.random_graphs import random_graphs
from tests.random_programs import random_program
from tests.stateful_graphs import blocks
from treadle.backends.numpy.backend import NumpyBackend
from treadle.backends.staged import StagedBackend
from treadle.backends.tvm.kernel_abilities import capabilities, planning
from treadle.backends.tvm.kernels.isa import ISAS
from treadle.ir.builder import Builder, Expr
from treadle.ir.errors import PassError, UsageError
from treadle.ir.graph import Function, Graph, Value
from treadle.ir.layouts import parse_layout
from treadle.ir.sizing.sizes import Size
from treadle.ir.storage.views import Storage, View
from treadle.ir.target import Target
from treadle.ir.text.parser import parse_graph
from treadle.ir.types import f32
from treadle.passes.capabilities import Capabilities, every_part, over_nothing
from treadle.passes.framework.manager import Optimized, PassManager
from treadle.passes.lowering.hoist_weights import HoistWeights
from treadle.passes.lowering.legalize import Legalize
from treadle.passes.memory import write_checking
from treadle.passes.memory.plan_storage import PlanStorage
from treadle.passes.memory.storage_checking import check_storage
from treadle.passes.memory.storage_plan import BEFORE, FunctionPlan, How, Life, Step, StoragePlan, ValuePlace
from treadle.passes.memory.strided_places import StridedPlanning
from treadle.passes.memory.value_places import Over, PlacedFunction

PLAN = planning(capabilities(ISAS["x86-64-v3"]))

Values = dict[str, Expr]
STRIDED = PlanStorage(strided=True)


def planned(graph: Graph, plan: PlanStorage = STRIDED) -> StoragePlan:
    found = PassManager((plan,)).run(graph).plan
    assert found is not None
    return found


def main_of(plan: StoragePlan) -> FunctionPlan:
    return plan.functions["main"]


def places_of(plan: FunctionPlan) -> dict[str, ValuePlace]:
    names = plan.names
    return {names[value]: place for value, place in plan.places.items()}


def joined_block() -> Graph:
    """Return a block with heads, a concat and a residual, which is called twice; main returns its result, and a slice
    of it.
    """
    graph = Graph("joined")
    block = Function("block")
    graph.add_function(block)
    b = Builder(graph, block)
    x, w = b.input("x", "f32[B, S, 8]"), b.parameter("w", "f32[8, 8]")
    heads = b.rearrange(b.linear(x, w, name="q"), pattern="b s (h=2 d) -> b h s d", name="heads")
    soft = b.softmax(heads, name="soft")
    merged = b.rearrange(soft, pattern="b h s d -> b s (h d)", name="merged")
    half = b.linear(merged, b.parameter("v", "f32[4, 8]"), name="half")
    other = b.tanh(b.linear(x, b.parameter("u", "f32[4, 8]"), name="up"), name="other")
    b.outputs(y=b.add(b.concat(half, other, name="both"), x, name="sum"))
    main = Builder(graph)
    y = main.input("y", "f32[B, S, 8]")
    for i in range(2):
        weights = [main.parameter(f"{i}.{name}", v.type) for name, v in block.parameters.items()]
        (y,) = main.call(block, [y, *weights])
    main.outputs(y=y, first=main.slice(y, axis=1, stop=1, name="first"), again=y)
    return graph


# -- planning ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["strided", "chains", "library"])
def test_the_text_of_a_plan(name: str, golden: Golden) -> None:
    made = {"strided": STRIDED, "chains": PLAN, "library": PlanStorage()}[name]
    golden(f"storage/{name}.txt", re.sub(r" +tests/test_storage_plan.py:\d+", "", str(planned(joined_block(), made))))


def plans_of(backend: StagedBackend) -> PlanStorage:
    *_, plan = backend.pipeline(Target("cpu"))
    assert isinstance(plan, PlanStorage)
    return plan


@pytest.mark.parametrize("name", ["strided", "numpy"])
def test_the_text_of_plans_of_programs(name: str, golden: Golden) -> None:
    """Programs of many ops, in program order and in other orders, with donated inputs."""
    plan, shown = PLAN if name == "strided" else plans_of(NumpyBackend()), []
    for seed in range(6):
        graph = random_program(seed, f32)
        donated = tuple(v.name for v in graph.main.inputs) if seed % 2 else ()
        planned = PassManager((Legalize(), replace(plan, donated=donated))).run(graph)
        shown += [f"# {seed}: {planned.log[-1].options}", *planned.log[-1].notes, str(planned.plan)]
    golden(f"storage/programs_{name}.txt", re.sub(r" +tests/\w+\.py:\d+", "", "\n".join(shown)))


def test_a_concat_is_written_by_those_who_make_its_parts() -> None:
    places = places_of(planned(joined_block()).functions["block"])
    both, half, other = (places[name] for name in ("both", "half", "other"))
    assert half.how is other.how is How.INTO and half.storage is other.storage is both.storage
    assert half.view is not None and other.view is not None
    assert (half.view.offset, other.view.offset) == (0, 4)
    assert half.view.strides == other.view.strides == (Size.of("8*S"), Size.of(8), Size.of(1))
    plan = planned(joined_block()).functions["block"]
    (life,) = [life for life in plan.lives if life.storage.name == "both"]
    steps = [step.root.op.name for step in plan.steps]
    assert (life.first, life.last) == (steps.index("linear", 2), steps.index("add"))


def test_the_reader_says_in_which_order_a_value_is_written() -> None:
    """Merged values are row-major, so each head is written separately; no strides could merge q's heads."""
    places = places_of(planned(joined_block()).functions["block"])
    assert (places["soft"].form, places["merged"].form) == ("strides [8*S, 4, 8, 1]", "row-major")
    assert (places["soft"].how, places["merged"].how) == (How.OWN, How.VIEW)
    assert (places["q"].form, places["heads"].form) == ("row-major", "strides [8*S, 4, 8, 1]")
    assert places["soft"].is_written and not places["merged"].is_written and not places["heads"].is_written


def test_outputs_are_written_where_the_caller_has_them() -> None:
    main = main_of(planned(joined_block()))
    places = places_of(main)
    assert list(main.results) == ["y", "first", "again"] and main.copied == ("again",)
    assert places["first"].how is How.INTO and places["first"].is_written  # y, which it views, is an output itself
    assert {place.how for name, place in places.items() if place.storage is main.results["y"]} == {How.INTO}


def test_values_with_two_readers_have_their_own_storage() -> None:
    def build(b: Builder) -> Expr:
        x = b.exp(b.input("x", "f32[S, 4]"), name="x")
        return b.concat(x, x, b.tanh(x), axis=0)

    places = places_of(main_of(planned(graph_of(build))))
    assert places["x_1"].how is How.OWN
    assert places["tanh"].how is How.INTO


def test_a_library_counts_a_view_as_alive_and_deletes_names_at_their_last_reader() -> None:
    plan = planned(joined_block(), PlanStorage()).functions["block"]
    places, steps = places_of(plan), [step.root.results[0].name for step in plan.steps]
    assert places["heads"].storage is places["q"].storage and places["q"].how is How.OWN
    lives = {life.storage.name: life for life in plan.lives}
    assert lives["q"].last == steps.index("soft")
    dead = {at: [v.name for v in values] for at, values in plan.dead_after().items()}
    assert dead[steps.index("heads")] == ["q"] and dead[steps.index("soft")] == ["heads"]
    assert all("sum" not in names for names in dead.values())


def test_a_library_gives_back_what_a_callee_was_given() -> None:
    graph = Graph("shared")
    block = Function("block")
    graph.add_function(block)
    b = Builder(graph, block)
    x = b.input("x", "f32[S, 4]")
    made = b.exp(x)
    b.outputs(same=b.rearrange(x, pattern="s d -> d s"), made=made, again=b.slice(made, axis=0, stop=1))
    main = Builder(graph)
    main.outputs(**dict(zip("abc", main.call(block, [main.tanh(main.input("x", "f32[S, 4]"))]), strict=True)))
    places = places_of(main_of(planned(graph, PlanStorage())))
    same, made, again = (places[name].storage for name in ("block", "block_1", "block_2"))
    assert same is places["tanh"].storage
    assert again is made is not same


def test_positions_are_one_row() -> None:
    def build(b: Builder) -> Values:
        x = b.input("x", "i64[B, S]")
        return {"y": b.positions(x) + x}

    (storage,) = [life.storage for life in main_of(planned(graph_of(build))).lives if life.storage.name == "positions"]
    assert storage.elements == Size.of("S")


def test_no_pass_may_follow_the_plan() -> None:
    graph = graph_of(lambda b: b.gelu(b.input("x", "f32[S]")))
    assert PassManager((Legalize(), STRIDED)).run(graph).plan is not None
    with pytest.raises(UsageError, match="legalize needs a graph without a storage plan") as no:
        PassManager((STRIDED, Legalize())).run(graph)
    assert no.value.hint == "legalize before plan-storage, or a pipeline without plan-storage"


# -- every plan passes its checker, which runs after the pass ----------------------------------------------------------


@pytest.mark.parametrize("plan", [STRIDED, PLAN, PlanStorage()], ids=["strided", "chains", "library"])
@settings(deadline=None)
@given(graph=random_graphs())
def test_any_graph_has_a_plan(plan: PlanStorage, graph: Graph) -> None:
    PassManager((plan,)).run(graph)


@pytest.mark.parametrize("plan", [STRIDED, PLAN, PlanStorage()], ids=["strided", "chains", "library"])
@settings(deadline=None)
@given(seed=st.integers(0, 2**32))
def test_any_program_has_a_plan(plan: PlanStorage, seed: int) -> None:
    PassManager((Legalize(), HoistWeights(), plan)).run(random_program(seed, f32))


@pytest.mark.parametrize("seed", [1, 9])
def test_shared_prefixes_of_orders_change_no_plan(seed: int) -> None:
    """A function's second plan equals the plan that it would have had as its first."""

    def planned_as(of: PlacedFunction, over: Over) -> str:
        return str(StridedPlanning(of, PLAN.backend.grouped(function), every_part, over).plan())

    function = random_program(seed, f32).functions["block" if seed % 3 == 0 else "main"]
    shared, fresh = (PlacedFunction(function, {}, False, ()) for _ in range(2))
    other = planned_as(shared, PLAN.backend.over)
    assert planned_as(shared, over_nothing) == planned_as(fresh, over_nothing) != other


# -- planted faults ------------------------------------------------------------------------------------------------


class Plant:
    """A changed plan. Its methods find functions and values by name."""

    def __init__(self, graph: Graph, plan: PlanStorage = STRIDED) -> None:
        self.made: Optimized = PassManager((plan,)).run(graph)
        assert self.made.plan is not None
        self.plan = self.made.plan

    def value(self, name: str, function: str = "main") -> Value:
        (found,) = [v for v, n in self.plan.functions[function].names.items() if n == name]
        return found

    def function(self, name: str, **changes: Any) -> None:
        changed = replace(self.plan.functions[name], **changes)
        self.plan = replace(self.plan, functions={**self.plan.functions, name: changed})

    def place(self, value: str, function: str = "main", **changes: Any) -> None:
        plan, at = self.plan.functions[function], self.value(value, function)
        self.function(function, places={**plan.places, at: replace(plan.places[at], **changes)})

    def lies(self, value: str, function: str = "main", **changes: Any) -> None:
        """Change the view of a value."""
        view = self.plan.functions[function].places[self.value(value, function)].view
        assert view is not None
        changed = replace(view, **changes)
        self.place(value, function, view=changed, storage=changed.storage)

    def over(self, value: str, other: str, function: str = "main", **changes: Any) -> None:
        """Store a value at the place of another value of the same shape."""
        view = self.plan.functions[function].places[self.value(other, function)].view
        assert view is not None
        self.place(value, function, view=view, storage=view.storage, **changes)
        self.live_long(view.storage.name, function)

    def live_long(self, storage: str, function: str = "main") -> None:
        self.life(storage, function, first=BEFORE, last=len(self.plan.functions[function].steps))

    def life(self, storage: str, function: str = "main", **changes: int) -> None:
        plan = self.plan.functions[function]
        lives = [replace(life, **changes) if life.storage.name == storage else life for life in plan.lives]
        assert any(life.storage.name == storage for life in plan.lives)
        self.function(function, lives=tuple(lives))

    def smaller(self, storage: str, elements: str, function: str = "main") -> None:
        """Give a storage fewer elements, in every place that states their number."""
        plan = self.plan.functions[function]
        (old,) = [life.storage for life in plan.lives if life.storage.name == storage]
        new: Storage = replace(old, elements=Size.of(elements))

        def moved(place: ValuePlace) -> ValuePlace:
            if place.storage is not old:
                return place
            view = None if place.view is None else replace(place.view, storage=new)
            return replace(place, storage=new, view=view)

        self.function(
            function,
            places={v: moved(p) for v, p in plan.places.items()},
            lives=tuple(Life(new, x.first, x.last) if x.storage is old else x for x in plan.lives),
            results={n: new if s is old else s for n, s in plan.results.items()},
        )

    def refused(self) -> str:
        with pytest.raises(PassError) as caught:
            check_storage(self.made.graph, self.plan)
        return str(caught.value)


def chained(b: Builder, width: int = 4) -> Values:
    """Return a graph that reads x at the beginning and at the end."""
    x = b.tanh(b.input("given", f"f32[S, {width}]"), name="x")
    y = b.exp(x, name="y")
    z = b.softmax(y, name="z")
    return {"out": b.add(b.matmul(z, b.rearrange(x, pattern="s d -> d s", name="turned")), 1.0, name="out")}


def over_a_value_read_later(p: Plant) -> None:
    p.over("y", "x", how=How.OVER, of=p.value("x"))


def over_what_it_reads_elsewhere(p: Plant) -> None:
    p.over("z", "y", how=How.OVER, of=p.value("y"))


def one_storage_for_two(p: Plant) -> None:
    p.over("z", "x")


def a_view_the_wrong_way_round(p: Plant) -> None:
    p.lies("turned", strides=(Size.of("S"), Size.of(1)))


def a_view_of_another(p: Plant) -> None:
    y = main_of(p.plan).places[p.value("y")].view
    assert y is not None
    p.lies("turned", storage=y.storage)
    p.live_long("y")


def a_view_that_begins_too_late(p: Plant) -> None:
    p.lies("turned", offset=Size.of(1))


def a_destination_too_small(p: Plant) -> None:
    p.smaller("y", "4*S-1")


def a_destination_too_small_at_large_sizes(p: Plant) -> None:
    p.smaller("y", "12*4")


def elements_on_one_another(p: Plant) -> None:
    p.lies("y", strides=(Size.of(3), Size.of(1)))


def a_storage_that_dies_too_soon(p: Plant) -> None:
    p.life("x", last=1)


def a_storage_that_is_born_too_late(p: Plant) -> None:
    p.life("y", first=2)


def a_value_that_dies_too_soon(p: Plant) -> None:
    p.place("turned", last=3)


def an_output_that_nobody_writes(p: Plant) -> None:
    p.lies("out", storage=replace(main_of(p.plan).results["out"], name="elsewhere"))
    (life,) = [x for x in main_of(p.plan).lives if x.storage.name == "out_out"]
    place = main_of(p.plan).places[p.value("out")]
    assert place.storage is not None
    p.function("main", lives=(*main_of(p.plan).lives, replace(life, storage=place.storage)))


def a_write_into_what_is_given(p: Plant) -> None:
    p.over("y", "given")


def a_place_that_is_missing(p: Plant) -> None:
    gone = p.value("z")
    p.function("main", places={v: place for v, place in main_of(p.plan).places.items() if v is not gone})


def in_registers_and_read(p: Plant) -> None:
    p.place("y", storage=None, view=None, how=How.INSIDE, of=p.value("z"), is_written=False)


def steps_in_another_order(p: Plant) -> None:
    first, second, *rest = main_of(p.plan).steps
    p.function("main", steps=(second, first, *rest))


def a_step_left_out(p: Plant) -> None:
    p.function("main", steps=main_of(p.plan).steps[:-1])


def donated_and_created_by_the_callee(p: Plant) -> None:
    p.place("given", how=How.OWN)


def what_is_given_and_written(p: Plant) -> None:
    p.function("main", donated=(p.value("given"),))
    p.place("given", is_written=True)


def a_value_made_at_another_step(p: Plant) -> None:
    p.place("y", first=0)


def an_output_that_dies_too_soon(p: Plant) -> None:
    p.place("out", last=5)


def steps_as_one(p: Plant, first: int) -> None:
    steps = main_of(p.plan).steps
    one = Step((*steps[first].nodes, *steps[first + 1].nodes))
    p.function("main", steps=(*steps[:first], one, *steps[first + 2 :]))


def in_registers_and_read_by_a_later_step(p: Plant) -> None:
    steps_as_one(p, 0)


def in_registers_and_in_a_storage(p: Plant) -> None:
    steps_as_one(p, 4)
    p.place("out", first=4)
    p.live_long("out_out")


def a_result_over_an_input_that_is_kept(p: Plant) -> None:
    p.function("main", reuses=(p.value("given"),))


def a_place_without_a_view(p: Plant) -> None:
    p.place("y", view=None)


def a_view_of_another_shape(p: Plant) -> None:
    p.lies("y", shape=p.value("turned").type.shape)


def a_view_of_another_storage(p: Plant) -> None:
    p.place("y", storage=main_of(p.plan).places[p.value("z")].storage)
    p.live_long("z")


def in_an_order_that_is_not_its_own(p: Plant) -> None:
    storage = main_of(p.plan).places[p.value("y")].storage
    assert storage is not None
    panels = replace(storage, layout=parse_layout("panels(16)"))
    p.function("main", lives=(*main_of(p.plan).lives, Life(panels, 0, 6)))
    p.lies("y", storage=panels)


def an_output_without_a_storage(p: Plant) -> None:
    p.function("main", results={})


def an_output_in_what_is_kept(p: Plant) -> None:
    p.function("main", given_back={"out": p.value("given")})


def an_output_beside_what_is_given_away(p: Plant) -> None:
    p.function("main", donated=(p.value("given"),), given_back={"out": p.value("given")})


def a_part_of_what_is_not_made_of_it(p: Plant) -> None:
    p.place("y", how=How.INTO, of=p.value("out"))


FAULTS: dict[Callable[[Plant], None], str] = {
    donated_and_created_by_the_callee: "an argument's storage is not marked as given by the caller",
    what_is_given_and_written: "an argument is marked as written by a step",
    a_value_made_at_another_step: "it is computed at step 1, but the plan has another step",
    an_output_that_dies_too_soon: "output out is dead at the end",
    in_registers_and_read_by_a_later_step: "reads a value that no earlier step computes",
    in_registers_and_in_a_storage: "a value in registers has a storage",
    a_result_over_an_input_that_is_kept: "its result overwrites an input that is not donated",
    a_place_without_a_view: "it has a storage but no view",
    a_view_of_another_shape: "a view has another shape, dtype or storage than its value",
    a_view_of_another_storage: "a view has another shape, dtype or storage than its value",
    in_an_order_that_is_not_its_own: "it is stored in panels(16), not row-major",
    an_output_without_a_storage: "each output must have a storage from the caller",
    an_output_in_what_is_kept: "output out is stored in an input that is not donated",
    an_output_beside_what_is_given_away: "output out is not in the storage of given",
    a_part_of_what_is_not_made_of_it: "out does not read it",
    over_a_value_read_later: "reads a value that another step has overwritten",
    over_what_it_reads_elsewhere: "its step overwrites y, which it reads",
    one_storage_for_two: "reads a value that another step has overwritten",
    a_view_the_wrong_way_round: "does not refer to the elements of x",
    a_view_of_another: "it is not a view of its operand",
    a_view_that_begins_too_late: "a destination is too small",
    a_destination_too_small: "a destination is too small",
    a_destination_too_small_at_large_sizes: "a destination is too small",
    elements_on_one_another: "two elements are written to one address",
    a_storage_that_dies_too_soon: "needs a storage that is dead",
    a_storage_that_is_born_too_late: "needs a storage that is dead",
    a_value_that_dies_too_soon: "reads a value that is dead by then",
    an_output_that_nobody_writes: "no step writes output out",
    a_write_into_what_is_given: "a step writes to <argument",
    a_place_that_is_missing: "the plan has no place for the value",
    in_registers_and_read: "has no storage",
    steps_in_another_order: "reads a value that no earlier step computes",
    a_step_left_out: "its steps do not contain each node exactly once",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_found(fault: Callable[[Plant], None]) -> None:
    plant = Plant(graph_of(chained))
    check_storage(plant.made.graph, plant.plan)
    fault(plant)
    assert FAULTS[fault] in plant.refused()


WIDE = [over_a_value_read_later, over_what_it_reads_elsewhere, one_storage_for_two, a_view_the_wrong_way_round]


@pytest.mark.parametrize("fault", WIDE, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_found_among_very_many_elements(fault: Callable[[Plant], None]) -> None:
    """Only a sample of the elements is checked, and rows are cells."""
    plant = Plant(graph_of(lambda b: chained(b, 4096)))
    check_storage(plant.made.graph, plant.plan)
    fault(plant)
    assert FAULTS[fault] in plant.refused()


@pytest.mark.parametrize("mode", ["concat", "pad"])
def test_a_part_of_very_many_elements_lies_where_it_belongs(mode: str) -> None:
    def joined(b: Builder) -> Values:
        x = b.input("x", "f32[S, 4096]")
        one = b.softmax(x, name="one")
        if mode == "pad":
            return {"y": b.softmax(b.pad(one, axis=1, before=4096, value=-1e9, name="both"))}
        return {"y": b.softmax(b.concat(b.softmax(x * 2.0), one, axis=1, name="both"))}

    plant = Plant(graph_of(joined))
    assert places_of(main_of(plant.plan))["one"].how is How.INTO
    for offset in (4095, 1, 0):
        plant.lies("one", offset=Size.of(offset))
        assert "it is not stored at its position in both" in plant.refused()


def parts_on_one_another(p: Plant) -> None:
    p.lies("other", "block", offset=Size.of(0))


def a_part_where_it_does_not_belong(p: Plant) -> None:
    p.lies("half", "block", offset=Size.of(4))
    p.lies("other", "block", offset=Size.of(0))


def a_result_too_small_for_its_caller(p: Plant) -> None:
    p.smaller("out_y", "4*B*S", "block")


def a_callee_that_writes_its_argument(p: Plant) -> None:
    p.over("sum", "x", "block")


def a_result_over_the_argument(p: Plant) -> None:
    p.over("block_1", "block")


def an_argument_that_dies_before_its_call(p: Plant) -> None:
    p.life("block", last=0)


def a_callee_that_is_given_away_what_it_takes(p: Plant) -> None:
    p.function("block", donated=(p.value("x", "block"),))


def in_registers_and_handed_out(p: Plant) -> None:
    steps_as_one(p, 1)


ACROSS: dict[Callable[[Plant], None], str] = {
    in_registers_and_handed_out: "an output is only in registers",
    a_callee_that_is_given_away_what_it_takes: "only the caller of an entry can donate arguments",
    parts_on_one_another: "it is not stored at its position in both",
    a_part_where_it_does_not_belong: "it is not stored at its position in both",
    a_result_too_small_for_its_caller: "a destination is too small",
    a_callee_that_writes_its_argument: "a step writes to <argument",
    a_result_over_the_argument: "no step writes output y",
    an_argument_that_dies_before_its_call: "needs a storage that is dead",
}


@pytest.mark.parametrize("fault", ACROSS, ids=lambda fault: fault.__name__)
def test_a_fault_across_calls_is_found(fault: Callable[[Plant], None]) -> None:
    plant = Plant(joined_block())
    fault(plant)
    assert ACROSS[fault] in plant.refused()


def test_a_call_may_not_write_over_what_it_is_given() -> None:
    graph = joined_block()
    plant = Plant(graph)
    kept = plant.value("block")
    view = main_of(plant.plan).places[kept].view
    assert view is not None
    plant.function("main", copied=("y", "first", "again"))
    plant.place("first", view=View.contiguous(main_of(plant.plan).results["first"], plant.value("first").type.shape))
    plant.over("block_1", "block", how=How.OVER, of=kept)
    assert "its step overwrites block, which it reads" in plant.refused()


def a_copy_for_a_view(p: Plant) -> None:
    place = main_of(p.plan).places[p.value("turned")]
    assert place.storage is not None
    p.place("turned", storage=replace(place.storage, name="copied"), how=How.OWN)
    storage = main_of(p.plan).places[p.value("turned")].storage
    assert storage is not None
    p.function("main", lives=(*main_of(p.plan).lives, Life(storage, 0, 9)))


def a_library_that_writes_over(p: Plant) -> None:
    p.place("z", storage=main_of(p.plan).places[p.value("x")].storage)


LIBRARY: dict[Callable[[Plant], None], str] = {
    a_copy_for_a_view: "it is a view of x, but has another storage",
    a_library_that_writes_over: "two values have the same storage, and neither is a view",
    a_storage_that_dies_too_soon: "needs a storage that is dead",
    a_value_that_dies_too_soon: "reads a value that is dead by then",
}


@pytest.mark.parametrize("fault", LIBRARY, ids=lambda fault: fault.__name__)
def test_a_fault_in_a_librarys_plan_is_found(fault: Callable[[Plant], None]) -> None:
    plant = Plant(graph_of(chained), PlanStorage())
    fault(plant)
    assert LIBRARY[fault] in plant.refused()


def test_a_plan_of_another_graph_is_refused() -> None:
    ours, other = Plant(graph_of(chained)), Plant(graph_of(chained))
    ours.plan = other.plan
    assert "it belongs to another graph" in ours.refused()
    ours.plan = Plant(joined_block()).plan
    assert "is for other functions than" in ours.refused()


# -- plans too large to enumerate ----------------------------------------------------------------------------------


def test_oversized_values_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elements that are adjacent in all views form one cell: halves of 2 times 3 rows, at the drawn sizes."""
    plant = Plant(joined_block())
    assert check_storage(plant.made.graph, plant.plan) == []
    monkeypatch.setattr(write_checking, "MOST_CELLS", 12)
    assert check_storage(plant.made.graph, plant.plan) == []
    monkeypatch.setattr(write_checking, "MOST_CELLS", 11)
    assert check_storage(plant.made.graph, plant.plan) == ["block: both is too large to be replayed"]


def test_no_sampled_size_is_valid() -> None:
    """The slice needs S >= 2000. The sampled sizes are at most 257, and the large size is 1009."""

    def cut(b: Builder) -> Expr:
        return b.exp(b.slice(b.input("x", "f32[S]"), axis=0, start=2000))

    plant = Plant(graph_of(cut))
    assert check_storage(plant.made.graph, plant.plan) == ["no sizes were found at which to check views"]


# -- states --------------------------------------------------------------------------------------------------------

LATE = """graph late {
  symbols B, R, C
  states {
    k: f32[R, C]
  }

  main(x: f32[B, 1], rows: i64[B], start: i64[B]) -> (y: f32[R, C]) {
    old = add(%k, 1.0)                                # f32[R, C]
    %k = append(%k, x, rows, start, axis=1)           # f32[R, C]
    y = mul(old, 2.0)                                 # f32[R, C]
    return y = y
  }
}
"""


@pytest.mark.parametrize("plan", [STRIDED, PLAN, PlanStorage()], ids=["strided", "chains", "library"])
def test_an_update_lies_where_its_state_does(plan: PlanStorage) -> None:
    made = planned(blocks(), plan)
    assert list(made.functions) == ["h", "prefill", "step"]
    block, prefill = (places_of(made.functions[name]) for name in ("h", "prefill"))
    assert block["mem.k"].how is How.STATE and block["append"].how is How.UPDATE
    assert block["append"].storage is block["mem.k"].storage
    for layer in ("h.0", "h.1"):
        versions = [p for p in prefill.values() if p.storage is prefill[f"{layer}.mem.k"].storage]
        assert [p.how for p in versions] == [How.STATE, How.UPDATE]
    (life,) = [life for life in made.functions["h"].lives if life.storage.name == "mem.k"]
    assert (life.first, life.last) == (BEFORE, made.functions["h"].end)
    assert all("append" not in v.name for values in made.functions["h"].dead_after().values() for v in values)


def test_readers_of_a_state_are_not_moved_past_its_update() -> None:
    steps = main_of(planned(parse_graph(LATE), PLAN)).steps
    assert [[node.op.name for node in step.nodes] for step in steps] == [["add"], ["append"], ["mul"]]

    def grouped(function: Function) -> list[Step]:
        add, append, mul = function.nodes
        return [Step((append,)), Step((add, mul))]

    for strided in (True, False):
        with pytest.raises(PassError, match="a step reads a state's old value after its update"):
            planned(parse_graph(LATE), PlanStorage(Capabilities(grouped=grouped), strided=strided))


def test_an_update_beside_its_state_is_found() -> None:
    for plan in (STRIDED, PlanStorage()):
        plant = Plant(parse_graph(LATE), plan)
        place = main_of(plant.plan).places[plant.value("append")]
        assert place.storage is not None
        beside = replace(place.storage, name="beside")
        view = None if place.view is None else replace(place.view, storage=beside)
        plant.place("append", storage=beside, view=view)
        plant.function("main", lives=(*main_of(plant.plan).lives, Life(beside, BEFORE, 9)))
        report = plant.refused()
        assert (
            "the update of a state is not in the state's storage" in report
            or "it is a view of k, but has another" in report
        )

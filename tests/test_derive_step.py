"""Derived steps: the entries, run in float64, return the same logits as a run over the whole text, however the text is
split.
"""

from __future__ import annotations

import linecache
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from tests.backend_checks import graph_of
from tests.random_steps import drawn_model
from tests.stepped_models import (
    AS_IT_IS_BUILT,
    MODELS,
    REFUSED,
    Graph,
    Model,
    captioned,
    count_of_rows,
    mean_of_rows,
    optimized,
    row_numbers,
    rows_last,
    shifted,
    two_texts,
)
from treadle.ir.builder import Builder
from treadle.ir.entry_order import ENTRIES
from treadle.ir.errors import PassError
from treadle.ir.interpreter import interpret, interpret_entry
from treadle.ir.naming import free_name
from treadle.ir.text.parser import parse_graph
from treadle.ir.transforms.chosen_outputs import choose_outputs
from treadle.passes.cleanup.dead_code import DeadCode
from treadle.passes.framework.manager import PassManager
from treadle.passes.stepping.derivation import DerivedStep, derive_step

Array = np.ndarray[Any, Any]
Run = Callable[..., Mapping[str, Array]]

SLOTS, CAPACITY, CHUNK, MEMORY = 5, 16, 4, 9
ROWS, LENGTH = 3, 11


def drawn_inputs(graph: Graph, axis: str, rng: np.random.Generator, rows: int = ROWS) -> dict[str, Array]:
    """Draw inputs of a run over whole texts: LENGTH tokens a row, and up to 6 positions of the other inputs."""
    sizes = dict.fromkeys(graph.symbols, 6) | {axis: LENGTH, "B": rows}
    made: dict[str, Array] = {}
    for value in graph.main.inputs:
        shape = value.type.evaluate(sizes)
        if value.name == "lengths":
            made[value.name] = rng.integers(3, 7, shape)
        elif value.type.dtype.kind == "bool":
            made[value.name] = rng.random(shape) < 0.7
        elif value.type.dtype.is_int:
            made[value.name] = rng.integers(0, 4, shape)
        else:
            made[value.name] = rng.standard_normal(shape)
    return made


def drawn_weights(graph: Graph, rng: np.random.Generator) -> dict[str, Array]:
    return {name: rng.standard_normal(v.type.evaluate({})) * 0.4 for name, v in graph.parameters.items()}


def state_sizes(derived: DerivedStep) -> dict[str, int]:
    """Return sizes of states: CAPACITY positions, chunks of CHUNK tokens, MEMORY positions of the other per-row
    inputs.
    """
    rings = {symbol: window + CHUNK for symbol, window in derived.windows.items()}
    sizes = {derived.slots: SLOTS, derived.capacity: CAPACITY, **dict.fromkeys(derived.memories, MEMORY), **rings}
    return {s: size for s, size in sizes.items() if any(s in v.type.symbols for v in derived.graph.states.values())}


class InFloat64:
    """A derived graph, run in float64 by the interpreter. States are not cleared, so they contain values of earlier
    rows.
    """

    def __init__(self, derived: DerivedStep, weights: Mapping[str, Array], rng: np.random.Generator) -> None:
        self.graph, self.weights = derived.graph, weights
        sizes = state_sizes(derived)
        self.states: Mapping[str, Array] = {
            name: np.asarray(
                rng.integers(-3, 3, v.type.evaluate(sizes)), np.float64 if v.type.dtype.is_float else np.int64
            )
            for name, v in derived.graph.states.items()
        }

    def __call__(self, entry: str, **inputs: Array) -> Mapping[str, Array]:
        found, self.states = interpret_entry(self.graph, entry, inputs, self.weights, self.states, float64=True)
        return found


class Schedule:
    """A random schedule: rows are split into calls of drawn sizes, in drawn order, with some rows in each call."""

    def __init__(self, derived: DerivedStep, inputs: Mapping[str, Array], rng: np.random.Generator) -> None:
        self.derived, self.inputs, self.rng = derived, inputs, rng
        rows = len(inputs[derived.tokens[0]])
        self.slots = rng.permutation(SLOTS)[:rows]
        self.done = np.zeros(rows, np.int64)
        self.begun = np.zeros(rows, np.bool_)

    def run(self, call: Run, check: Callable[[str, Array, int, int, int], None]) -> None:
        """Call entries until all tokens are processed. For each output, call `check` with the name, the array [n, ...]
        for the tokens of one row, the row, and the first and the end position of these tokens.
        """
        names, rng = self.derived.tokens, self.rng
        while (self.done < LENGTH).any():
            rows = rng.permutation(np.flatnonzero(self.done < LENGTH))[: rng.integers(1, len(self.done) + 1)]
            self._begin(call, rows)
            start = self.done[rows]
            left = LENGTH - start
            entry = rng.choice(["prefill", "step", "verify"])
            counts = (
                np.minimum(rng.integers(1, CHUNK + 1, len(rows)), left) if entry == "prefill" else np.ones_like(rows)
            )
            if entry == "verify":
                counts[:] = min(int(rng.integers(1, CHUNK + 1)), int(left.min()))
            width = int(counts.max())
            given = {
                name: np.zeros((len(rows), width, *x.shape[2:]), x.dtype)
                for name, x in self.inputs.items()
                if name in names
            }
            for name in names:
                for n, (row, count) in enumerate(zip(rows, counts, strict=True)):
                    given[name][n, :count] = self.inputs[name][row, start[n] : start[n] + count]
            takes = {v.name for v in self.derived.graph.functions[entry].inputs}
            report = {"rows": self.slots[rows], "start": start, "last": counts - 1}
            report = {name: report[as_given] for as_given, name in self.derived.port_names.items() if name in takes}
            for name, array in call(entry, **given, **report).items():
                for n, row in enumerate(rows):
                    end = int(start[n] + counts[n])
                    check(name, array[n], int(row), end - 1 if entry == "prefill" else int(start[n]), end)
            self.done[rows] += counts

    def _begin(self, call: Run, rows: Array) -> None:
        """Run the prologue of the rows that begin."""
        new = rows[~self.begun[rows]]
        if len(new) and self.derived.has_prologue:
            given = {name: self.inputs[name][new] for name in self.derived.prologue}
            call("prologue", **{self.derived.port_names["rows"]: self.slots[new]}, **given)
        self.begun[new] = True


@pytest.mark.parametrize("name", MODELS)
def test_steps_give_what_the_whole_gives(name: str) -> None:
    hold_to_the_whole(optimized(MODELS[name]), np.random.default_rng(3), runs=4)


@pytest.mark.parametrize("name", [name for name in ENTRIES if name != "main"])
def test_blocks_may_be_called_as_entries_are(name: str) -> None:
    graph = optimized(captioned.configure(blocks=name))
    assert name in graph.functions
    assert derive_step(graph).graph.entry_names == ("prologue", "prefill", "step", "verify")
    hold_to_the_whole(graph, np.random.default_rng(0), runs=1)


@pytest.mark.parametrize("seed", range(16))
def test_steps_of_drawn_models_give_what_the_whole_gives(seed: int) -> None:
    rng = np.random.default_rng(seed)
    hold_to_the_whole(optimized(drawn_model(rng)), rng, runs=2)


def hold_to_the_whole(graph: Graph, rng: np.random.Generator, *, runs: int) -> None:
    """Compare the entries of a graph's step, over drawn schedules, with a run of the graph over all tokens."""
    derived = derive_step(graph)
    weights = drawn_weights(graph, rng)
    inputs = drawn_inputs(graph, derived.axis, rng)
    whole = interpret(graph, inputs, weights, float64=True)
    seen: list[int] = []

    def check(output: str, found: Array, row: int, first: int, end: int) -> None:
        wanted = whole[output][row, first:end]
        seen.append(len(wanted))
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-11 * np.abs(whole[output]).max())

    for _ in range(runs):
        Schedule(derived, inputs, rng).run(InFloat64(derived, weights, rng), check)
    assert sum(seen) >= runs * ROWS


@pytest.mark.parametrize("name", MODELS)
def test_a_derived_graph_is_read_back_as_it_is_printed(name: str) -> None:
    graph = derive_step(optimized(MODELS[name])).graph
    assert parse_graph(str(graph)) == graph


@pytest.mark.parametrize("name", REFUSED)
def test_other_token_mixing_ops_are_refused_by_name_and_line(name: str) -> None:
    model, op, words = REFUSED[name]
    with pytest.raises(PassError) as caught:
        derive_step(optimized(model), "S")
    assert op in str(caught.value)
    assert words in linecache.getline("tests/stepped_models.py", line_of(caught.value))


def line_of(error: PassError) -> int:
    """Return the line of the models that an error names."""
    found = re.search(r"stepped_models\.py:([0-9]+)", str(error))
    assert found
    return int(found[1])


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (mean_of_rows, "reduce_mean: the axis is whole"),
        (row_numbers, "iota: the axis is generated"),
        (count_of_rows, "size: the axis is"),
    ],
)
def test_rows_that_read_each_other_are_refused(model: Model, what: str) -> None:
    with pytest.raises(PassError, match="rows, B, are not independent") as caught:
        derive_step(optimized(model))
    assert what in str(caught.value)


@pytest.mark.parametrize("name", AS_IT_IS_BUILT)
def test_models_too_large_for_a_step_are_refused_when_it_is_built(name: str) -> None:
    model, why, received, words = AS_IT_IS_BUILT[name]
    with pytest.raises(PassError) as caught:
        derive_step(optimized(model))
    assert caught.value.what == f"no step can be derived: {why}"
    assert caught.value.received == received
    assert words in linecache.getline("tests/stepped_models.py", line_of(caught.value))


def test_a_model_of_two_texts_needs_to_be_told_the_axis() -> None:
    with pytest.raises(PassError, match="two_texts may be stepped along several axes") as caught:
        derive_step(optimized(two_texts))
    assert caught.value.hint == "a number in place of all but one of S, T, in the types of the inputs"
    with_number = re.sub(r"\bT\b", "7", str(optimized(two_texts)).replace("S, T", "S"))
    assert derive_step(parse_graph(with_number)).axis == "S"


def test_a_derived_graph_has_no_step_of_its_own() -> None:
    derived = derive_step(optimized(MODELS["windows"])).graph
    with pytest.raises(PassError, match="a graph with one entry and no states") as caught:
        derive_step(derived)
    assert caught.value.received == repr(derived)


@pytest.mark.parametrize("symbol", ["R", "C", "C_3"])
@pytest.mark.parametrize("name", ["windows", "bart"])
def test_a_model_may_name_its_axes_like_the_sizes_of_states(symbol: str, name: str) -> None:
    graph = parse_graph(re.sub(r"\bS\b", symbol, str(optimized(MODELS[name]))))
    hold_to_the_whole(graph, np.random.default_rng(5), runs=1)


def test_a_shift_of_tokens_is_named_though_rows_are_expanded() -> None:
    with pytest.raises(PassError, match="shifted has no axis that may be stepped") as caught:
        derive_step(optimized(shifted))
    assert "slice: the axis is sliced" in str(caught.value)


def test_tokens_without_rows_first_are_refused() -> None:
    with pytest.raises(PassError, match="the first dimension of its tokens is not the rows"):
        derive_step(optimized(rows_last), "S")


@pytest.mark.parametrize(
    ("types", "name", "axes"),
    [
        (["i64[S, B]"], "t0", "B S"),
        (["i64[1, S]"], "t0", "B S"),
        (["i64[B, S]", "i64[1, S]"], "t1", "B S"),
        (["f32[S, 4]"], "t0", "B S 4"),
    ],
)
def test_tokens_without_rows_are_refused_with_the_axes_that_they_need(types: list[str], name: str, axes: str) -> None:
    graph = graph_of(lambda b: {f"y{i}": b.input(f"t{i}", text) * 1 for i, text in enumerate(types)})
    with pytest.raises(PassError, match="is not the rows") as refused:
        derive_step(graph, "S")
    dtype = types[-1][:3]
    assert (refused.value.hint or "").startswith(f'names of the sizes, as "{axes}": {name}: t.{dtype}["{axes}"]')
    named = [f"{dtype}[{axes.replace(' ', ', ')}]" for _ in types]
    derive_step(graph_of(lambda b: {f"y{i}": b.input(f"t{i}", text) * 1 for i, text in enumerate(named)}), "S")


def test_prefill_computes_one_row_of_logits() -> None:
    graph = derive_step(optimized(MODELS["gpt2"])).graph
    prefill = graph.functions["prefill"]
    assert str(prefill.outputs["logits"].type) == "f32[B, 1, 11]"
    (last,) = [f for name, f in graph.functions.items() if name == "h_last"]
    wide = {n.op.name for n in last.nodes if any("S" in v.type.symbols for v in n.results)}
    assert "activated_linear" not in wide
    assert "cached_attention" not in wide


@pytest.mark.parametrize(
    ("pattern", "prefill", "step"),
    [
        ("b s d -> s b d", "f32[1, B, 4]", "f32[1, B, 4]"),
        ("b s d -> b (d s)", "f32[B, (4 S)]", "f32[B, (4 1)]"),
        ("b s d -> b (s d)", "f32[B, (S 4)]", "f32[B, (1 4)]"),
        ("b s d -> (b s) d", "f32[(B S), 4]", "f32[(B 1), 4]"),
        ("b s d -> (s b) d", "f32[(S B), 4]", "f32[(1 B), 4]"),
    ],
)
def test_the_last_token_is_picked_where_tokens_and_rows_are_a_dimension_each(
    pattern: str, prefill: str, step: str
) -> None:
    b = Builder(Graph("joined"))
    x = b.embedding(b.parameter("w", "f32[9, 4]"), b.input("tokens", "i64[B, S]"))
    b.outputs(y=b.rearrange(b.exp(x), pattern=pattern))
    given = {entry.name: str(entry.outputs["y"].type) for entry in derive_step(b.graph).graph.entries}
    assert given == {"prefill": prefill, "step": step, "verify": prefill.replace("[1,", "[S,")}


def test_a_name_that_is_taken_is_numbered_from_two_on() -> None:
    taken: set[str] = set()
    for name in ("k", "k_2", "k_3"):
        assert free_name("k", taken) == name
        taken.add(name)


def test_an_output_that_can_be_stepped_alone_is_proposed() -> None:
    """Multi-token prediction: another output joins each token with the next one."""
    text = """graph m {
      symbols B, S
      main(tokens: i64[B, S]) -> (logits: f32[B, S], next: f32[B, S-1]) {
        x = cast(tokens, to=f32)
        y = slice(x, axis=1, start=1)
        return logits = x, next = y
      }
    }"""
    with pytest.raises(PassError, match="no axis that may be stepped") as caught:
        derive_step(parse_graph(text))
    assert str(caught.value.hint) == "outputs=['logits'] of t.compile"
    derive_step(PassManager([DeadCode()]).run(choose_outputs(parse_graph(text), ["logits"])).graph)

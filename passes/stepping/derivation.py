"""The generation step, derived from a model that is declared over a whole sequence.

    main(tokens[B, S]) -> logits[B, S, V]   -->   prefill(tokens[B, S], rows[B], start[B], last[B]) -> logits[B, 1, V]
                                                  step(tokens[B, 1], rows[B], start[B]) -> logits[B, 1, V]
                                                  verify(tokens[B, S], rows[B], start[B]) -> logits[B, S, V]

Row n of a call uses slot rows[n] of every state, and the position of its first new token is start[n]. The logits equal
the logits of `main` over all tokens of a row, however the tokens are split into calls. `prefill` takes a chunk of
tokens. A row may have fewer tokens than the chunk's width, last[n] + 1 of them, and `prefill` returns the logits of the
row's last token. `step` takes one token per row; `verify` returns the logits of all tokens of a chunk. Values that do
not depend on the tokens are computed by `prologue`, once per row, before its first token.

Ops may mix tokens only by attention to earlier tokens, or if they define their form at a step. All other ops that mix
tokens are refused, with the op and the author's line: for example a convolution over time, a mean over the sequence, or
attention to later tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from treadle.ir.analysis.causality import is_causal
from treadle.ir.analysis.encounters import Generated
from treadle.ir.analysis.following import follow
from treadle.ir.builder import Builder
from treadle.ir.errors import Hint, PassError, UsageError
from treadle.ir.generated_values import GeneratedValue
from treadle.ir.graph import Function, Graph, Value, needed_nodes
from treadle.ir.naming import free_name
from treadle.ir.ops.reductions import SizeOf
from treadle.ir.sizing.size_bounds import Bounds
from treadle.ir.sizing.sizes import Size
from treadle.ir.transforms.clone import clone_graph
from treadle.ir.transforms.text_signature import without_padding
from treadle.ir.types import DTYPES, DType, bf16, f16, f32
from treadle.ir.verifier import verify
from treadle.ir.wording.fixed_sizes import named_sizes_hint
from treadle.passes.framework.manager import PassManager
from treadle.passes.pipelines import RECOGNITION
from treadle.passes.stepping.demands import Extent
from treadle.passes.stepping.functions import CAPACITY, SLOTS, StepFunctions, unused_symbol
from treadle.passes.stepping.kept_values import StepStates
from treadle.passes.stepping.last_position import with_all_positions
from treadle.passes.stepping.prologue import Prologue
from treadle.passes.stepping.sampled import OPTIONS, SAMPLED, SAMPLING, TokenChooser
from treadle.passes.stepping.survey import Kind, Survey
from treadle.passes.stepping.table_rows import context_of

CACHE_DTYPES = (f32, bf16, f16)
"""The dtypes in which keys and values may be stored."""


class NoStep(PassError):
    """The error for a model without an axis that may be stepped.

    is_causal  True if an output is causal along an axis nevertheless
    is_fixed   True if tokens have a number in place of a symbol for their length
    """

    is_causal = False
    is_fixed = False


@dataclass(frozen=True)
class DerivedStep:
    """A graph of entries, and the information needed to call them.

    graph     the graph with the entries `prologue` if there is one, `prefill`, `step`, `verify`
    axis      the symbol along which tokens are added
    tokens    the names of the inputs that are passed at every step
    prologue  the names of the inputs that are passed once per row
    port_names  the entries' names for `rows`, `start`, `last` and the inputs and the output of sampling, numbered if
                the model has an input of that name
    context   the greatest number of positions of the model, or None
    slots     the symbol of the number of slots of a state
    capacity  the symbol of the number of positions of a cache
    windows   by the symbol of a ring's capacity: the number of positions that the ring must hold in addition to a chunk
    memories  by the symbol of the number of positions that a slot holds: the name of the size, which each row has of
              its own
    generated the values, for generated tokens, of inputs that are passed at every step
    may_be_empty  the names of prologue inputs of which a row may have none: an axis of theirs may be empty
    carries   True if a sum over the tokens is carried along, so that a token cannot be taken back
    sampling  the tokens that `prefill` and `step` return in place of logits, as their output `sampled`, i32[B]; see
              `derive_step`. None: they return logits.
    """

    graph: Graph
    axis: str
    tokens: tuple[str, ...]
    prologue: tuple[str, ...]
    port_names: Mapping[str, str]
    context: int | None
    slots: str
    capacity: str
    windows: Mapping[str, int]
    memories: Mapping[str, str]
    generated: Mapping[str, GeneratedValue]
    may_be_empty: tuple[str, ...]
    carries: bool
    sampling: str | None = None

    @property
    def has_prologue(self) -> bool:
        """True if a row must begin with a call of `prologue`."""
        return "prologue" in self.graph.entry_names


def derive_step(
    graph: Graph,
    axis: str | None = None,
    *,
    cache: str | DType | None = None,
    sampling: str | None = None,
) -> DerivedStep:
    """Return the entries of generation, derived from a graph whose only entry is `main`.

    axis   the symbol along which tokens are added; by default the only symbol that may be stepped
    cache  the dtype in which caches store keys and values, f32, bf16 or f16; by default the dtype in the model
    sampling  the tokens that `prefill` and `step` return in place of logits: "greedy", the greatest logit of each row;
              "random", the op `sample_token` with options and a draw for each row, which become inputs

    Raises PassError, with the reason, if the model has no step; UsageError for another cache dtype or way of sampling,
    and if there are no logits to sample from.
    """
    held = None if cache is None else cache_dtype(cache)
    if sampling not in (None, *SAMPLING):
        raise UsageError(f"unknown sampling {str(sampling)[:40]!r} on the device", hint=" or ".join(SAMPLING))
    if graph.bind is not None or graph.states:
        raise PassError("a step can only be derived from a graph with one entry and no states", received=repr(graph))
    graph = for_step(graph)
    graph, axis = (graph, axis) if axis is not None else _stepped(graph)
    verdict = follow(graph, axis).step()
    if not verdict:
        raise PassError(f"{graph.name} has no step along {axis}: {verdict}")
    rows = _rows(graph, axis)
    _refuse_mixed_rows(graph, axis, rows)
    survey = Survey(graph, axis, rows)
    made = Graph(graph.name)
    made.symbols, made.initial = dict(graph.symbols), dict(graph.initial)
    # Rows are independent, and tokens of the following ones: one row or token has the results that it has among more.
    made.symbols |= {s: Bounds(1, graph.symbols[s].upper) for s in (rows, axis) if graph.symbols[s].lower > 1}
    context = context_of(graph, axis)
    slots, capacity = unused_symbol(SLOTS, graph.symbols), unused_symbol(CAPACITY, graph.symbols)
    made.bound(slots, Bounds())
    made.bound(capacity, Bounds(1, context))
    states = StepStates(Size.symbol(slots), capacity)
    functions = StepFunctions(survey, made, states, held)
    chooser = None
    if sampling is not None:
        chooser = TokenChooser(logits_of(graph.name, graph.main, axis), is_random=sampling == "random")
    functions.entry("prefill", Extent.LAST, chooser=chooser)
    functions.entry("step", Extent.ALL, single=True, chooser=chooser)
    functions.entry("verify", Extent.ALL)
    main = survey.main
    kept = [v.name for v in graph.main.inputs if main.kind(v) is Kind.KEPT]
    if kept:
        Prologue(survey, made, states).build(made.add_entry("prologue"))
    for symbol, size in states.capacities.items():
        made.bound(symbol, Bounds(1, size.bounds(graph.symbols).upper))
    verify(made)
    start = f"{capacity}_"
    symbols = sorted({s for value in made.states.values() for s in value.type.symbols})
    ends = {s: s.removeprefix(start) for s in symbols if s.startswith(start)}
    windows = {s: int(end) - 1 for s, end in ends.items() if end.isdigit()}
    memories = {s: end for s, end in ends.items() if s not in windows}
    tokens = tuple(v.name for v in graph.main.inputs if main.kind(v) is Kind.STEPPED)
    inputs = {v.name for v in graph.main.inputs}
    port_names = {name: free_name(name, inputs) for name in ("rows", "start", "last", *OPTIONS, SAMPLED)}
    made.generated = {name: value for name, value in graph.generated.items() if name in tokens}
    empty = tuple(v.name for v in graph.main.inputs if v.name in kept and may_be_empty(v, graph))
    return DerivedStep(
        graph=made,
        axis=axis,
        tokens=tokens,
        prologue=tuple(kept),
        port_names=port_names,
        context=context,
        slots=slots,
        capacity=capacity,
        windows=windows,
        memories=memories,
        generated=made.generated,
        may_be_empty=empty,
        carries=functions.carries,
        sampling=sampling,
    )


def for_step(graph: Graph) -> Graph:
    """Return the graph from which a step is derived: without the inputs that `without_padding` replaces."""
    made = without_padding(graph)
    return graph if made is graph else PassManager(RECOGNITION).run(made).graph


def logits_of(name: str, function: Function, axis: str) -> str:
    """Return the output of a model's function that has the logits [B, S, vocab], where `axis` is S.

    Raises UsageError if there is none, or if it cannot be distinguished from other outputs.
    """
    found = [
        output
        for output, value in function.outputs.items()
        if value.type.rank == 3 and value.type.dtype.is_float and value.type.shape[1].as_symbol == axis
    ]
    if len(found) == 1:
        return found[0]
    if "logits" in found:
        return "logits"
    if found:
        raise UsageError(
            f"{name} returns {', '.join(found)} for each token, and none is named logits",
            hint="name one of them logits",
        )
    raise UsageError("a session needs a model with logits [B, S, vocab]", received=name)


def may_be_empty(value: Value, graph: Graph) -> bool:
    """Return True if a dimension of an input may have size 0, such as N-1."""
    return any(size.constant is None and size.bounds(graph.symbols).lower < 1 for size in value.type.shape)


def cache_dtype(name: str | DType) -> DType:
    """Return the dtype of a cache by its name. Raises UsageError for a dtype in which a cache cannot store values."""
    found = DTYPES.get(str(name))
    if found not in CACHE_DTYPES:
        raise UsageError(f"a cache cannot store {name}", hint="one of " + ", ".join(map(str, CACHE_DTYPES)))
    return found


def _stepped(graph: Graph) -> tuple[Graph, str]:
    """Return a model and the symbol along which it may be stepped. A model that returns only the last position of a
    symbol is returned with all positions. Raises PassError if there is no such symbol, or more than one.
    """
    try:
        return graph, _stepped_axis(graph)
    except NoStep:
        for symbol in _input_symbols(graph):
            whole = with_all_positions(graph, symbol)
            if whole is not None and follow(whole, symbol).step():
                return whole, _stepped_axis(whole)
        raise


def _input_symbols(graph: Graph) -> Sequence[str]:
    sizes = [size.as_symbol for v in graph.main.inputs for size in v.type.shape]
    return list(dict.fromkeys(symbol for symbol in sizes if symbol is not None))


def _stepped_axis(graph: Graph) -> str:
    """Return the only symbol of the inputs along which the model may be stepped and an output extends."""
    symbols = _input_symbols(graph)
    found: list[str] = []
    mapped: list[str] = []
    against: list[str] = []
    measured: list[str] = []
    first = {s for v in graph.main.inputs if v.type.rank for s in v.type.shape[0].symbols}
    fixed = next((v for v in graph.main.inputs if v.type.dtype.is_int and v.type.rank == 2), None)
    if fixed is not None and fixed.type.shape[1].constant is not None and first.issuperset(symbols):
        raise _fixed_sizes(graph, fixed.name)
    for symbol in symbols:
        following = follow(graph, symbol)
        verdict = following.step()
        if verdict and following.outputs and symbol not in first:
            (found if following.encounters else mapped).append(symbol)
        elif not verdict:
            against.append(str(verdict))
            if any(isinstance(each.node.op, SizeOf) for each in following.encounters):
                measured.append(symbol)
    found = found or mapped
    if len(found) == 1:
        return found[0]
    if found:
        sizes = f"a number in place of all but one of {', '.join(found)}, in the types of the inputs"
        raise PassError(f"{graph.name} may be stepped along several axes", hint=sizes)
    bound = "an option of the model that bounds {}: for rotary positions that are scaled by the length, {}N, up to the "
    bound += "number of positions before scaling"
    hint = Hint(*(bound.format(measured[0], each) for each in ("longest=", "--set longest="))) if measured else None
    others = [symbol for symbol in symbols if symbol not in first]
    alone = _stepped_alone(graph, others) if len(graph.main.outputs) > 1 else None
    if alone is not None:
        hint = hint or Hint(f"outputs={[alone]!r} of t.compile", f"--outputs {alone}")
    causal = [
        symbol
        for symbol in others
        for output, value in graph.main.outputs.items()
        if symbol in value.type.symbols and is_causal(graph, symbol, output)
    ]
    what = f"{graph.name} has no axis that may be stepped"
    if causal:
        what += f": {causal[0]} is causal, but a step keeps no state of earlier positions for these ops"
        again = "which computes all positions again"
        hint = hint or Hint(f"for each token, a call of t.compile(MODEL), {again}", f"treadle run MODEL, {again}")
    error = NoStep("\n".join([what, *against]), hint=hint)
    error.is_causal = bool(causal)
    raise error


def _stepped_alone(graph: Graph, symbols: Sequence[str]) -> str | None:
    """Return the first output along which the model may be stepped if it returns that output alone."""
    for name in graph.main.outputs:
        alone = clone_graph(graph)
        b = Builder(alone)
        b.outputs(**{name: b.expr(alone.main.outputs[name])})
        alone.main.nodes = needed_nodes(alone.main.nodes, alone.main.results)
        for symbol in symbols:
            following = follow(alone, symbol)
            if following.outputs and following.step():
                return name
    return None


def _fixed_sizes(graph: Graph, name: str) -> NoStep:
    error = NoStep(
        f"{graph.name} has no axis that may be stepped: the length of its inputs is fixed",
        received=", ".join(f"{v.name}: {v.type}" for v in graph.main.inputs),
        hint=named_sizes_hint(name, "i64", "B S"),
    )
    error.is_fixed = True
    return error


def _refuse_mixed_rows(graph: Graph, axis: str, rows: str) -> None:
    """Raise PassError if a row's results depend on other rows, on the row's index, or on the number of rows.

    A step computes different rows together than the whole model does, and in a different order.
    """
    met = [e for e in follow(graph, rows).encounters if not isinstance(e.kind, Generated) or e.node.op.reads_positions]
    if met:
        message = f"{graph.name} has no step along {axis}: its rows, {rows}, are not independent"
        raise PassError("\n".join([message, *(f"  {e}" for e in met)]))


def _rows(graph: Graph, axis: str) -> str:
    """Return the symbol of the batch: the first dimension of the inputs that extend along the tokens."""
    tokens: list[Value] = [v for v in graph.main.inputs if axis in v.type.symbols]
    rows = {v.type.shape[0].as_symbol for v in tokens}
    if len(rows) != 1 or None in rows or axis in rows:
        named = next((row for row in rows if row not in (None, axis)), None) or unused_symbol("B", graph.symbols)
        wrong = next((v for v in tokens if v.type.shape[0].as_symbol != named), tokens[0])
        first, *others = map(str, wrong.type.dims)
        if first == axis and wrong.type.rank > 1 and wrong.type.shape[1].as_symbol is not None:
            named = others.pop(0)  # the tokens are [S, B]
        leading = [named, axis] if first == axis else [named]
        raise PassError(
            f"{graph.name} has no step: the first dimension of its tokens is not the rows of a batch",
            received=", ".join(f"{v.name}: {v.type}" for v in tokens),
            hint=named_sizes_hint(wrong.name, wrong.type.dtype, " ".join([*leading, *others])),
        )
    return str(next(iter(rows)))

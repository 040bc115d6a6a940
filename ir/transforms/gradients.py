"""Gradients of a whole graph: of one output with respect to some weights. Repeated blocks stay functions.

    main(tokens) -> loss                         main(tokens, h.0.up.weight, ...) -> loss, gradient.h.0.up.weight, ...
      x1 = h(x) with h.0         -->               x1, a, b = h(x, h.0.up.weight, ...)
      x2 = h(x1) with h.1                          x2, a1, b1 = h(x1, h.1.up.weight, ...)
                                                   g1, gradient.h.1.up.weight = h_gradient(x1, ..., a1, b1, g2)
                                                   g, gradient.h.0.up.weight = h_gradient(x, ..., a, b, g1)

Trained weights become inputs, since they change: no derived weights are computed from them. Other weights stay weights.
A function returns its results, then the intermediate values that its gradient reads (`a`, `b`). With `recompute` it
returns only its results, and the gradient recomputes the intermediate values from the function's arguments (gradient
checkpointing, Chen et al. 2016). Results of ops that only move elements, or that have no operands, are never saved.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from treadle.ir.builder import Builder, Expr
from treadle.ir.errors import GraphError
from treadle.ir.graph import Function, Graph, Node, Value, needed_nodes
from treadle.ir.naming import free_name
from treadle.ir.operation import Grads
from treadle.ir.ops.shapes import zeros
from treadle.ir.transforms.clone import clone_node, clone_value, copied_value
from treadle.ir.transforms.differentiate import backward

GRADIENT = "gradient."
"""The prefix of a weight's name in the name of its gradient."""

Copies = dict[Value | None, Value | None]


def gradient_graph(graph: Graph, loss: str, weights: Collection[str], *, recompute: bool = False) -> Graph:
    """Return a graph with the same outputs, and the gradient of each of these weights that the loss depends on.

    loss       the output to differentiate, a scalar
    weights    names of weights in plain f32 or f64; they become inputs of the same names, in the order of the graph
    recompute  True if blocks save only their arguments, and are recomputed for their gradients

    Raises GraphError if the output is not a scalar, if a weight is unknown or encoded, and for a graph that has states,
    derived weights or several entries: differentiate the graph before a step is derived from it, and before weights are
    bound.
    """
    value = graph.main.outputs.get(loss)
    if value is None or value.type.rank or not value.type.dtype.is_float:
        given = ", ".join(f"{name}: {v.type}" for name, v in graph.main.outputs.items())
        raise GraphError(f"the loss {loss} must be an output that is a scalar", received=given)
    if graph.states or len(graph.entry_names) > 1:
        received = f"entries {', '.join(graph.entry_names)}; {len(graph.states)} states"
        raise GraphError("only a graph with one entry and without states can be differentiated", received=received)
    for name in weights:
        weight = graph.parameters.get(name)
        if weight is None:
            raise GraphError(f"the graph has no weight {name}")
        if not weight.type.dtype.is_float or weight.type.encoding is not None:
            raise GraphError(f"weight {name} has no gradient", received=str(weight.type))
        if any(name == value.name for value in graph.main.inputs):
            raise GraphError(f"an input has the name of the trained weight {name}, which becomes an input")
    return _Differentiation(graph, recompute).of_main(loss, set(weights))


@dataclass(frozen=True)
class _Read:
    """An operand of a gradient function: an "argument" or a "result" of the original function, or the "gradient" of a
    result.
    """

    kind: str
    at: int


@dataclass(frozen=True)
class _Variant:
    """A version of a function in which some of its arguments count (their gradients are wanted), with its gradient.

    forward   a function that returns the original's results, then the values saved for the gradient
    order     the positions of the original's arguments, in the order of `forward`
    counting  for each of the original's results, True if it depends on arguments that count
    gradient  the gradient function; None if no result depends on arguments that count
    takes     the operands of the gradient; gives: the original's argument for each result of the gradient
    needs     for each result of the gradient, the original's results through which the argument's gradient flows
    """

    forward: Function
    order: tuple[int, ...]
    counting: tuple[bool, ...]
    gradient: Function | None = None
    takes: tuple[_Read, ...] = ()
    gives: tuple[int, ...] = ()
    needs: tuple[frozenset[int], ...] = ()


@dataclass(frozen=True)
class _Traced:
    """A copy of a function, followed by the nodes of its gradient."""

    original: Function
    function: Function
    order: tuple[int, ...]
    own: int
    copies: Copies
    counting: set[Value]
    seeds: dict[int, Value]
    found: dict[Value, Expr]


class _Differentiation:
    def __init__(self, graph: Graph, recompute: bool) -> None:
        self.graph, self.recompute = graph, recompute
        self.made = Graph(graph.name)
        self.made.symbols = dict(graph.symbols)
        self.variants: dict[tuple[str, tuple[bool, ...], bool], _Variant] = {}
        self.calls: dict[Node, _Variant] = {}
        self.linear: dict[str, tuple[frozenset[int], ...]] = {}
        """For each result of a gradient function, by the function's name: the positions of the gradients in which the
        result is linear.
        """

    def of_main(self, loss: str, trained: set[str]) -> Graph:
        main = self.graph.main
        counts = [v.kind == "parameter" and v.name in trained for v in main.arguments]
        traced = self._traced(main, counts, self.made.main, loss=loss, recompute=self.recompute)
        made = self.made.main
        made.outputs = {name: copied_value(v, traced.copies, main) for name, v in main.outputs.items()}
        for name in main.parameters:
            copy = traced.copies[main.parameters[name]]
            if name in trained and copy in traced.found:
                made.outputs[GRADIENT + name] = traced.found[copy].value
        self.made.initial = {n: init for n, init in self.graph.initial.items() if n not in trained}
        return self.made

    # -- one function ------------------------------------------------------------------------------------------

    def _traced(
        self, original: Function, counts: Sequence[bool], made: Function, *, loss: str | None, recompute: bool
    ) -> _Traced:
        """Return a copy of the function, followed by the nodes of the gradients of its arguments that count."""
        b = Builder(self.made, made)
        copies: Copies = {None: None}
        order = self._arguments(original, counts, made, copies)
        counting = {copied_value(v, copies, original) for v, one in zip(original.arguments, counts, strict=True) if one}
        for node in original.nodes:
            self._copy(b, node, original, copies, counting, recompute)
        own = len(made.nodes)
        seeds: dict[int, Value] = {}
        given: dict[Value, Expr] = {}
        for at, (name, result) in enumerate(original.outputs.items()):
            copy = copied_value(result, copies, original)
            if copy not in counting:
                continue
            if loss is None:
                seed = Value("input", copy.type, "gradient")
                seeds[at] = seed
                seeded: Expr = b.expr(seed)
            elif name == loss:
                seeded = b.constant(1, copy.type.dtype)
            else:
                continue
            given[copy] = given[copy] + seeded if copy in given else seeded
        found = backward(b, list(made.nodes[:own]), given, counting=counting, through=self._through)
        return _Traced(original, made, order, own, copies, counting, seeds, found)

    def _arguments(self, original: Function, counts: Sequence[bool], made: Function, copies: Copies) -> tuple[int, ...]:
        """Add arguments to the copy, and return their order: weights that count become inputs, after the original's
        inputs.
        """
        names = {v.name for v in original.inputs}
        inputs: list[int] = []
        weights: list[int] = []
        trained: list[int] = []
        for at, (value, is_one) in enumerate(zip(original.arguments, counts, strict=True)):
            copy = copies[value] = clone_value(value)
            if value.kind == "input":
                inputs.append(at)
                made.inputs.append(copy)
            elif is_one:
                trained.append(at)
                copies[value] = copy = Value("input", value.type, free_name(value.name, names))
                names.add(copy.name)
                made.inputs.append(copy)
            else:
                weights.append(at)
                made.parameters[value.name] = copy
        return (*inputs, *trained, *weights)

    def _copy(
        self,
        b: Builder,
        node: Node,
        original: Function,
        copies: Copies,
        counting: set[Value],
        recompute: bool,
    ) -> None:
        """Copy a node. If the node is a call, the copy calls the variant of the callee that computes gradients of the
        arguments that need gradients here.
        """
        if node.op.callee is None:
            copy = clone_node(node, copies, original)
            b.function.nodes.append(copy)
            if any(v in counting for v in copy.operands if v is not None):
                counting.update(v for v in copy.results if v.type.dtype.is_float)
            return
        operands = [copied_value(v, copies, original) for v in node.inputs]
        variant = self._variant(node.op.callee, tuple([v in counting for v in operands]), recompute)
        with b.placed_as(node):
            b.call(variant.forward, [operands[at] for at in variant.order])
        call = b.function.nodes[-1]
        for old, new, is_one in zip(node.results, call.results, variant.counting, strict=False):
            new.name, copies[old] = old.name, new
            if is_one:
                counting.add(new)
        self.calls[call] = variant

    def _through(self, b: Builder, call: Node, grads: Grads) -> Grads:
        """Return the gradient of a call: a call of the gradient of its function."""
        variant = self.calls[call]
        read = {at for at, grad in enumerate(grads) if grad is not None}
        reached = {at for at, needs in zip(variant.gives, variant.needs, strict=True) if needs & read}
        if variant.gradient is None or not reached:  # gradients would flow only through floor, or an unused result
            return [None] * len(variant.order)
        operands: list[Value] = [v for v in call.operands if v is not None]
        by_original = {at: operands[place] for place, at in enumerate(variant.order)}
        arguments: list[Value] = []
        for each in variant.takes:
            if each.kind == "argument":
                arguments.append(by_original[each.at])
            elif each.kind == "result":
                arguments.append(call.results[each.at])
            else:
                grad = grads[each.at]
                arguments.append((zeros(b, call.results[each.at].type) if grad is None else grad).value)
        results = dict(zip(variant.gives, b.call(variant.gradient, arguments), strict=True))
        return [results[at] if at in reached else None for at in variant.order]

    # -- a function that is called ------------------------------------------------------------------------------

    def _variant(self, name: str, counts: tuple[bool, ...], recompute: bool) -> _Variant:
        key = name, counts, recompute
        if key not in self.variants:
            self.variants[key] = self._made(self.graph.functions[name], counts, recompute)
        return self.variants[key]

    def _made(self, original: Function, counts: tuple[bool, ...], recompute: bool) -> _Variant:
        traced = self._traced(original, counts, Function(original.name), loss=None, recompute=False)
        results = [copied_value(v, traced.copies, original) for v in original.outputs.values()]
        counting = tuple([v in traced.counting for v in results])
        wanted = {
            at: traced.found[copy].value
            for at, value in enumerate(original.arguments)
            if counts[at] and (copy := traced.copies[value]) in traced.found
        }
        own, later = traced.function.nodes[: traced.own], traced.function.nodes[traced.own :]
        later = needed_nodes(later, wanted.values())
        inside: list[Value] = []
        if recompute:
            later = needed_nodes([*own, *later], wanted.values())
        else:
            later, inside = _split(own, later, wanted.values())
        kept = [*results, *[v for v in inside if v not in results]]
        forward = self._forward(traced, own, kept)
        if not wanted:
            return _Variant(forward, traced.order, counting)
        gradient, takes = self._gradient(traced, forward.name, later, wanted, [] if recompute else kept)
        seeds = self._seeds_of(later, traced.seeds)
        needs = tuple([seeds.get(value, frozenset()) for value in wanted.values()])
        places = {each.at: place for place, each in enumerate(takes) if each.kind == "gradient"}
        self.linear[gradient.name] = tuple([frozenset(places[at] for at in each) for each in needs])
        return _Variant(forward, traced.order, counting, gradient, takes, tuple(wanted), needs)

    def _seeds_of(self, nodes: Sequence[Node], seeds: dict[int, Value]) -> dict[Value, frozenset[int]]:
        """Return, for each value of a gradient, the positions of the seeds in which it is linear."""
        found = {seed: frozenset({at}) for at, seed in seeds.items()}
        for node in nodes:
            read = [found.get(v, frozenset[int]()) if v is not None else frozenset[int]() for v in node.operands]
            among = self.linear.get(node.op.callee or "", (range(len(read)),) * len(node.results))
            for result, places in zip(node.results, among, strict=True):
                found[result] = frozenset().union(*[read[place] for place in places])
        return found

    def _forward(self, traced: _Traced, own: Sequence[Node], results: Sequence[Value]) -> Function:
        """Return the function without its gradient: the original's results, then the saved values."""
        forward = Function(self._free(traced.original.name))
        forward.inputs, forward.parameters = list(traced.function.inputs), dict(traced.function.parameters)
        forward.nodes = needed_nodes(own, results)
        names = list(traced.original.outputs)
        for at, value in enumerate(results):
            name = names[at] if at < len(names) else free_name(value.name, [*forward.outputs, *names])
            forward.outputs[name] = value
        self.made.add_function(forward)
        return forward

    def _gradient(
        self,
        traced: _Traced,
        of: str,
        nodes: Sequence[Node],
        wanted: dict[int, Value],
        kept: Sequence[Value],
    ) -> tuple[Function, tuple[_Read, ...]]:
        """Return the function that computes the gradients, and the operands of that function."""
        function = Function(self._free(f"{of}_gradient"))
        read = {v for node in nodes for v in node.inputs} | set(wanted.values())
        copies: Copies = {None: None}
        names: set[str] = set()
        inputs: list[_Read] = []
        weights: list[_Read] = []

        def take(value: Value, what: _Read, name: str) -> None:
            copy = copies[value] = Value(value.kind, value.type, value.name)
            if value.kind == "parameter":
                function.parameters[value.name] = copy
                weights.append(what)
                return
            copy.kind, copy.name = "input", free_name(name, names)
            names.add(copy.name)
            function.inputs.append(copy)
            inputs.append(what)

        arguments = [traced.copies[v] for v in traced.original.arguments]
        for at, argument in enumerate(arguments):
            if argument in read and argument is not None:
                take(argument, _Read("argument", at), argument.name)
        own = {v for node in nodes for v in node.results}
        for number, value in enumerate(kept):
            if value in read and value not in copies and value not in own:
                take(value, _Read("result", number), value.name)
        for at, seed in traced.seeds.items():
            if seed in read:
                take(seed, _Read("gradient", at), f"{GRADIENT}{list(traced.original.outputs)[at]}")
        for node in nodes:
            copy = clone_node(node, copies, traced.function)
            function.nodes.append(copy)
        for at, value in wanted.items():
            name = GRADIENT + traced.original.arguments[at].name
            function.outputs[free_name(name, function.outputs)] = copied_value(value, copies, traced.function)
        self.made.add_function(function)
        return function, (*inputs, *weights)

    def _free(self, name: str) -> str:
        """Return the original's name for its first variant, else an unused name."""
        if name in self.graph.functions and name not in self.made.functions:
            return name
        return free_name(name, {*self.made.functions, *self.graph.functions})


def _split(own: Sequence[Node], later: Sequence[Node], wanted: Iterable[Value]) -> tuple[list[Node], list[Value]]:
    """Return the nodes of the gradient, which begin with the nodes that it recomputes, and the values that the function
    saves for the gradient.

    Nodes are recomputed if they only move elements, or have no operands.
    """
    read = {v for node in later for v in node.inputs} | set(wanted)
    again: list[Node] = []
    kept: list[Value] = []
    for node in reversed(own):
        found = [v for v in node.results if v in read]
        if found and node.op.callee is None and (node.op.is_view or not node.inputs):
            again.append(node)
            read.update(node.inputs)
        else:
            kept += found
    return [*reversed(again), *later], kept[::-1]

"""Causal models of tokens: their logits depend on no later tokens, as next-token training and a perplexity need.

causality_of(resolved)  # True; False for an encoder; None for a large model that no rule shows to be causal
"""

from __future__ import annotations

from collections.abc import Sequence

from treadle.ir.analysis.causal_runs import causality_in_runs
from treadle.ir.analysis.causality import is_causal
from treadle.ir.errors import Hint
from treadle.ir.graph import Graph, Value
from treadle.ir.types import i64
from treadle.ir.wording.fixed_sizes import named_sizes_hint
from treadle.passes.stages import Recognize, run
from treadle.program.source import Resolved


def logits_of(graph: Graph) -> str:
    """Return the name of the output with logits: `logits`, or the only output."""
    outputs = graph.main.outputs
    return "logits" if "logits" in outputs or len(outputs) != 1 else next(iter(outputs))


def causality_of(resolved: Resolved) -> bool | None:
    """Return True if the logits of a model of tokens [B, S] depend on no later tokens, by the rules of the ops or in
    runs, and False if they do. Return None if no rule shows it, and the model is too large to run in a moment.
    """
    graph = resolved.graph
    tokens, logits = next(iter(graph.main.inputs), None), graph.main.outputs.get(logits_of(graph))
    axis = None if tokens is None or tokens.type.rank != 2 else tokens.type.shape[-1].as_symbol
    if axis is None or logits is None or axis not in logits.type.symbols:
        return False
    if is_causal(run(graph, [Recognize()]).graph, axis, logits_of(graph)):
        return True
    return causality_in_runs(graph, axis, logits_of(graph), resolved.weights)


def fixed_length(inputs: Sequence[Value]) -> Hint | None:
    """Return the hint for a model of tokens alone that takes one number of them; None for another model."""
    if len(inputs) != 1 or inputs[0].type.dtype is not i64 or inputs[0].type.rank != 2:
        return None
    tokens = inputs[0]
    return None if tokens.type.shape[-1].constant is None else named_sizes_hint(tokens.name, "i64", "B S")

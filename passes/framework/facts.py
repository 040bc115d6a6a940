"""Facts about a graph: what a pass or a stage needs, and what holds after it.

    facts = initial_facts(graph)
    facts = facts_after(passes, facts)        # raises UsageError if a pass stands where its requirement does not hold

A pass and a stage (`treadle.passes.stages`) declare three sets of facts: `requires` must hold before it, `ensures` hold
after it, and `ends` hold no longer. So the order of a pipeline is checked before anything runs. A fact that can be read
from the graph is also checked after each pass that ensures it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from treadle.ir.errors import UsageError
from treadle.ir.graph import Graph


@dataclass(frozen=True)
class Fact:
    """A property of a graph.

    name     the name, as docs and errors print it
    meaning  a phrase that completes "the pass needs ..."
    initial  True if the fact holds for every graph that a frontend builds
    refutes  returns the reason why the fact does not hold for a graph, None if it holds or cannot be read from it
    """

    name: str
    meaning: str
    initial: bool = True
    refutes: Callable[[Graph], str | None] = field(default=lambda graph: None, repr=False, compare=False)

    def __str__(self) -> str:
        return self.name


class Declares(Protocol):
    """A pass or a stage, as `facts_after` reads it."""

    @property
    def requires(self) -> frozenset[Fact]: ...

    @property
    def ensures(self) -> frozenset[Fact]: ...

    @property
    def ends(self) -> frozenset[Fact]: ...

    @property
    def name(self) -> str: ...

    @property
    def advice(self) -> str: ...


def _stateful(graph: Graph) -> str | None:
    if graph.states:
        return f"the graph has {len(graph.states)} states"
    entries = [entry.name for entry in graph.later_entries]
    return f"the graph has the entries {', '.join(entries)}" if len(entries) > 1 else None


RECOGNIZED = Fact("recognized", "a graph in which ops have been recognized", initial=False)
UNMERGED = Fact("unmerged", "a graph in which ops have not been merged into ops that one kernel computes")
UNSHARDED = Fact("unsharded", "a graph of the whole model, not of one rank")
FULL_PRECISION = Fact("full-precision", "products in the dtypes that the model declares")
STATELESS = Fact("stateless", "a graph with one entry and no states", refutes=_stateful)
UNLIMITED = Fact("unlimited", "a graph without a memory limit")
PORTABLE = Fact("portable", "a graph before the passes of a backend")
UNBOUND = Fact("unbound", "a graph in which computations on weights have not been moved to `bind`")
LEGAL = Fact("legal", "a graph of ops that the backend emits", initial=False)
UNPLANNED = Fact("unplanned", "a graph without a storage plan, since a plan holds for one graph")

FACTS = (RECOGNIZED, UNMERGED, UNSHARDED, FULL_PRECISION, STATELESS, UNLIMITED, PORTABLE, UNBOUND, LEGAL, UNPLANNED)
"""All facts, in the order in which errors name them."""

Facts = frozenset[Fact]

BEFORE_LOWERING: Facts = frozenset({PORTABLE, UNPLANNED})
"""Requirements of a pass that may create ops which a backend then has to lower."""

INITIAL: Facts = frozenset(each for each in FACTS if each.initial)
"""Facts that hold for a graph with one entry and without states, as a frontend builds it."""


def initial_facts(graph: Graph) -> Facts:
    """Return the facts that hold for a graph, as far as it shows them. A fact that it does not show holds if it is
    initial.
    """
    return frozenset(each for each in INITIAL if each.refutes(graph) is None)


def facts_after(passes: Sequence[Declares], facts: Facts, others: Iterable[Declares] = ()) -> Facts:
    """Return the facts that hold after passes or stages, given those that hold before.

    others  passes or stages that an error may suggest

    Raises UsageError if one stands where its requirement does not hold, with the one that must come before it, or after
    it.
    """
    for at, each in enumerate(passes):
        refuse_misplaced(each, facts, passes[:at], [*passes[at + 1 :], *others])
        facts = (facts - each.ends) | each.ensures
    return facts


def refuse_misplaced(each: Declares, facts: Facts, before: Sequence[Declares], others: Iterable[Declares] = ()) -> None:
    """Raise UsageError if a pass or a stage requires a fact that does not hold.

    before  passes or stages that run before it; others: those that the error may suggest
    """
    fact = next((fact for fact in FACTS if fact in each.requires and fact not in facts), None)  # the first, in order
    if fact is None:
        return
    ended = next((other.name for other in reversed(before) if fact in other.ends), None)
    if ended is not None:
        hint = each.advice.format(ended) or f"{each.name} before {ended}, or a pipeline without {ended}"
    else:
        makers = [other.name for other in others if fact in other.ensures] or _makers(fact)
        hint = f"{' or '.join(dict.fromkeys(makers))} before {each.name}" if makers else f"leave {each.name} out"
    raise UsageError(
        f"{each.name} needs {fact.meaning}",
        received=", ".join([*(other.name for other in before), each.name]),
        hint=hint,
    )


def _makers(fact: Fact) -> list[str]:
    """Return the names of passes that ensure a fact."""
    from treadle.passes.framework.pass_text import pass_classes

    return [name for name, kind in pass_classes().items() if fact in kind.ensures]

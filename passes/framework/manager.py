"""Passes and the manager, which runs a flat list of them, verifies the graph after each, and keeps a record of each.

    optimized = PassManager(DEFAULT).run(graph)
    optimized.graph                          # the result; the input graph is unchanged
    optimized.after("fuse-gelu")             # the graph after that pass
    print(optimized.log)                     # a table, one line per pass

TREADLE_DEBUG=1 prints the table to stderr, 2 also the graph after each pass that changed it, 3 also the refusals.
TREADLE_CERTIFY=1 turns certification on where the `certify` argument is not set: see `PassManager`.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from treadle.files.nearest_names import NearestNames
from treadle.files.switches import read_switch
from treadle.ir.collector_pause import collection_paused
from treadle.ir.errors import Hint, PassError, TreadleError, UsageError, VerifyError
from treadle.ir.graph import Function, Graph, Node
from treadle.ir.target import Target
from treadle.ir.transforms.clone import clone_graph
from treadle.ir.verifier import verify
from treadle.passes.certificates.regions import Recorded
from treadle.passes.certificates.same_expressions import Expressions, Numbers, check_same_expressions
from treadle.passes.framework.facts import UNPLANNED, Facts, facts_after, initial_facts
from treadle.passes.framework.lineage import Lineage, NodeNumbers
from treadle.passes.framework.option_text import options_text
from treadle.passes.framework.pass_log import PassLog, PassRecord, Product, count_ops
from treadle.passes.framework.rolling_back import undo_what_fails

if TYPE_CHECKING:
    from treadle.passes.memory.storage_plan import StoragePlan


@dataclass(frozen=True)
class Pass:
    """One transformation of a graph; its fields are its options.

    A pass changes its input graph in place. It visits each distinct function once, callees first, so its work does not
    grow with the number of times that a block is repeated.
    """

    rewrites: ClassVar[bool] = True
    """True if the pass changes what is computed, so that certificates apply to it. For a pass that only changes when
    and where something is computed, the manager always compares all outputs as expressions.
    """

    changes_numbers: ClassVar[bool] = False
    """True if the pass is meant to change numbers, as quantization of weights is; such a pass is not certified."""

    advice: ClassVar[str] = ""
    """The hint if an earlier pass ended a fact that this pass requires; {} is that pass. Empty: the usual hint."""

    requires: ClassVar[Facts] = frozenset({UNPLANNED})
    """Facts that must hold before the pass; see `treadle.passes.framework.facts`."""

    ensures: ClassVar[Facts] = frozenset()
    """Facts that hold after the pass."""

    ends: ClassVar[Facts] = frozenset()
    """Facts that no longer hold after the pass."""

    @property
    def name(self) -> str:
        """The class's name in lower case: `fuse-gelu`."""
        return hyphenated(type(self).__name__)

    @property
    def rule_names(self) -> tuple[str, ...]:
        """The names of the rewrites that the pass tries, if it has several."""
        return ()

    @property
    def options(self) -> str:
        """The fields that differ from their default, as text; see `treadle.passes.framework.pass_text`."""
        return options_text(self)

    def run(self, function: Function, graph: Graph, log: PassRecord) -> int:
        """Transform one function, and log what was matched or refused. Return the number of changes."""
        return 0

    def check_products(self, graph: Graph, log: PassRecord) -> Sequence[str]:
        """Check what the pass made in addition to the graph, independently of how it was made. Return notes.

        Raises PassError for a product that is wrong.
        """
        return ()

    def run_graph(self, graph: Graph, log: PassRecord) -> int:
        """Transform the whole graph: by default every function, callees first."""
        log.touched = set()
        total = 0
        for function in list(graph.functions.values()):
            signature = () if function in graph.entries else _signature(function)  # unused functions
            changes = self.run(function, graph, log)
            if changes:
                log.touched.add(function.name)
                if signature and _signature(function) != signature:
                    log.touched.update(graph.functions)  # including its callers
            total += changes
        return total


@cache  # read at every site
def hyphenated(name: str) -> str:
    """Return a class's name in lower case, with hyphens between its words."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", name).lower()


def _signature(function: Function) -> tuple[object, ...]:
    return (*[v.type for v in (*function.arguments, *function.results)], *function.updated)


class BrokenPassError(PassError):
    """A pass failed, or left a graph that does not verify. `graph` is the graph before that pass."""

    graph: Graph


@dataclass(frozen=True)
class Optimized:
    """The result of a pipeline: the source graph, the optimized graph, and the log with every stage.

    lineage  for each node of the result, the nodes of the source whose work it does, where passes recorded it
    lowered  the result after a backend's own passes; None if the backend has none
    products  what passes made for the result in addition to the graph, by type
    facts    the facts that hold for the result
    """

    source: Graph
    graph: Graph
    log: PassLog = field(repr=False)  # displayed as a table
    lineage: Lineage = field(default_factory=Lineage, repr=False, compare=False)
    lowered: Optimized | None = field(default=None, repr=False, compare=False)
    products: Mapping[type[Any], Any] = field(default_factory=dict, repr=False, compare=False)
    facts: Facts = field(default=frozenset(), repr=False, compare=False)

    def product(self, kind: type[Product]) -> Product | None:
        """Return what a pass made of this type for the result, or None."""
        return self.products.get(kind)

    @property
    def plan(self) -> StoragePlan | None:
        """The storage of each value of the result, if a pass planned it."""
        from treadle.passes.memory.storage_plan import StoragePlan

        return self.product(StoragePlan)

    @property
    def last(self) -> Optimized:
        """The result of the last pipeline: the backend's, if the backend has passes."""
        return self if self.lowered is None else self.lowered

    @cached_property
    def covered(self) -> frozenset[Node]:
        """The nodes of the source whose work is done by some node of the result."""
        return self.lineage.of(node for _, node in self.graph.walk())

    @property
    def stages(self) -> PassLog:
        """The log, followed by the log of the backend's passes."""
        return PassLog([*self.log, *(self.lowered.log if self.lowered is not None else ())])

    def after(self, name: str) -> Graph:
        """Return the graph after the (last) pass of that name. Raises UsageError if no such pass was run."""
        stages = self.stages
        for record in reversed(stages):
            if record.name == name and record.graph is not None:
                return record.graph
        for record in stages:
            events = (*record.matches, *record.refusals, *record.near_misses)
            if name in record.rules or name in {event.rule for event in events}:
                raise UsageError(
                    f"{name} is a rule of the pass {record.name}, not a pass",
                    hint=Hint(f"after({record.name!r})", f"--after {record.name}"),
                )
        known = list(dict.fromkeys(r.name for r in stages))
        near = NearestNames(known).of(name)
        one_of = f"one of {', '.join(known)}" if known else None
        raise UsageError(f"no pass {name!r} was run", hint=f"{near[0]}?" if near else one_of)

    def products_of(self, name: str) -> Mapping[type[Any], Any]:
        """Return what the (last) pass of that name made in addition to the graph, by type."""
        return next((record.products for record in reversed(self.stages) if record.name == name), {})


class PassManager:
    """Run passes in order, and verify the graph after each pass that changed something.

    certify   evaluate each change before and after, on drawn values (`treadle.passes.certificates.certifying`). A
              change that fails is undone and reported as a refusal, and the other passes continue. None: the value of
              TREADLE_CERTIFY
    target    the hardware that the graph is compiled for; a rewrite may be refused because it is slower there
    differentiated  True if the graph will be differentiated: rewrites then keep its gradients, and certificates
              compare them
    """

    def __init__(
        self,
        passes: Sequence[Pass],
        *,
        certify: bool | None = None,
        target: Target | None = None,
        differentiated: bool = False,
    ) -> None:
        self.passes, self.differentiated = tuple(passes), differentiated
        self.certify = read_switch("TREADLE_CERTIFY") if certify is None else certify
        self.target = target or Target("cpu")

    def run(self, graph: Graph, *, verified: bool = False, facts: Facts | None = None) -> Optimized:
        """Optimize a copy of the graph.

        verified  True if another manager has just verified the whole graph; it is not verified again
        facts     the facts that hold for the graph; None: those that the graph shows

        Raises UsageError, before any pass runs, if a pass stands where its requirement does not hold; VerifyError if
        the input graph is already broken, UsageError if a pass's options do not fit the model, and BrokenPassError (a
        PassError) if a pass fails.
        """
        after = facts_after(self.passes, initial_facts(graph) if facts is None else facts)
        with collection_paused():
            return dataclasses.replace(self._run(graph, verified), facts=after)

    def _run(self, graph: Graph, verified: bool) -> Optimized:
        debug = debug_level()
        if not verified:
            verify(graph)
        run = _Run(self, graph)
        for each in self.passes:
            record = run.add(each)
            if debug >= 2 and record.changed:
                print(f"# {record.summary}\n{record.graph}", file=sys.stderr)
        optimized = run.finished()
        if debug >= 1:
            print(optimized.log, file=sys.stderr)
        if debug >= 3:
            print(optimized.log.explain(), optimized.log.certified(), sep="\n", file=sys.stderr)
        return optimized


class _Run:
    """A run of a manager over a copy of a graph, pass by pass.

    working   the copy, which passes change
    snapshot  the copy as the last pass left it, with which a change is compared
    """

    def __init__(self, manager: PassManager, graph: Graph) -> None:
        self.manager, self.source = manager, graph
        self.snapshot, self.working = graph, clone_graph(graph)
        self.records: list[PassRecord] = []
        self._ops = count_ops(self.working)
        self._lineage, self._numbering = Lineage(graph, self.working), NodeNumbers(self.working)
        self._expressions = Expressions()
        self._numbers: Numbers | None = None  # of the last snapshot, if known
        self._is_verified = True  # the whole current graph is verified
        self._products: dict[type[Any], Any] = {}

    def add(self, each: Pass) -> PassRecord:
        """Run a pass, check its result, and return its record."""
        certify = self.manager.certify and each.rewrites and not each.changes_numbers
        record = PassRecord(
            *(each.name, each.options, self._ops),
            certifying=certify,
            differentiated=self.manager.differentiated,
            target=self.manager.target,
            lineage=self._lineage,
            rules=each.rule_names,
        )
        started = time.perf_counter()
        recorded = {name: Recorded.of(f) for name, f in self.working.functions.items()} if certify else {}
        try:
            record.changes = each.run_graph(self.working, record)
            record.after = count_ops(self.working)
            self._is_verified = record.changed and (certify or record.touched is None)
            if record.changed:
                self._check_change(each, record, recorded)
            self._check_claims(each, record)
        except UsageError:  # the pass's options do not fit the model
            raise
        except Exception as error:
            raise _broken(each, error, self.snapshot) from error
        record.seconds = time.perf_counter() - started
        self._save(record)
        return record

    def _check_change(self, each: Pass, record: PassRecord, recorded: dict[str, Recorded]) -> None:
        """Verify the changed graph. If the pass only changes when and where values are computed, compare it with the
        snapshot. If the pass is certified, undo what fails.
        """
        verify(self.working, None if record.certifying else record.touched)
        self._numbers = (
            None
            if each.rewrites
            else check_same_expressions(self.snapshot, self.working, self._expressions, self._numbers)
        )
        if self._numbers is None and not each.rewrites:
            record.notes.append("the graph is too large to be compared with the graph before this pass")
        if record.certifying and undo_what_fails(each.name, record, recorded, self.snapshot, self.working):
            record.after = count_ops(self.working)
            verify(self.working)
        self._products = {}  # made for the graph before this change

    def _check_claims(self, each: Pass, record: PassRecord) -> None:
        """Check what the pass made in addition to the graph, and the facts that it ensures."""
        self._products |= record.products
        record.notes += each.check_products(self.working, record)
        for fact in each.ensures:
            if (reason := fact.refutes(self.working)) is not None:
                raise PassError(f"afterwards, the graph is not {fact}", received=reason)

    def _save(self, record: PassRecord) -> None:
        """Complete a record with the graph after its pass, and the numbers of the nodes."""
        record.display_values.clear()
        record.lineage = Lineage()  # the old one holds removed nodes
        record.history = self._numbering.unchanged
        if record.changed:
            touched = None if record.certifying else record.touched
            record.history = self._numbering.after(self.working, self._lineage, touched)
            same = {} if record.certifying or self.snapshot is self.source else _untouched(self.snapshot, record)
            self.snapshot = clone_graph(self.working, same)
        record.graph = self.snapshot
        self.records.append(record)
        self._ops = record.after

    def finished(self) -> Optimized:
        """Return the result of all passes."""
        if not (self._is_verified or self.manager.certify):
            try:
                verify(self.working)  # even if the pass reports no change
            except VerifyError as error:
                raise _broken(self.manager.passes[-1], error, self.snapshot) from error
        lineage = self._lineage.restricted(node for _, node in self.working.walk())
        return Optimized(self.source, self.working, PassLog(self.records), lineage, products=self._products)


def _untouched(snapshot: Graph, record: PassRecord) -> dict[str, Function]:
    """Return the functions of the last snapshot that the pass left unchanged."""
    touched = snapshot.functions if record.touched is None else record.touched
    return {name: function for name, function in snapshot.functions.items() if name not in touched}


def _broken(each: Pass, error: Exception, before: Graph) -> BrokenPassError:
    known = error if isinstance(error, TreadleError) else None
    broken = BrokenPassError(
        f"pass {each.name} failed: {known.what if known else f'{type(error).__name__}: {error}'}",
        received=known.received if known else None,
        within=known.within if known else None,
        source=known.source if known else None,
        hint=f"this is a bug in the pass, not in the model; a pipeline without {each.name} avoids it",
    )
    broken.graph = before
    return broken


def debug_level() -> int:
    """Return the value of TREADLE_DEBUG, 0 if it is unset; README has the table. Raises UsageError unless it is 0 to
    4.
    """
    text = os.environ.get("TREADLE_DEBUG", "") or "0"
    if text not in {"0", "1", "2", "3", "4"}:
        raise UsageError(
            "TREADLE_DEBUG must be a number from 0 to 4",
            received=repr(text)[:80],
            hint="TREADLE_DEBUG=4, which prints everything that the other levels print and the generated source",
        )
    return int(text)

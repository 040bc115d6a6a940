"""Undo changes of a pass whose certificates fail."""

from __future__ import annotations

import dataclasses

from treadle.ir.graph import Graph, Value
from treadle.ir.transforms.clone import clone_graph
from treadle.passes.certificates.certificate import Counterexample
from treadle.passes.certificates.regions import Claim, Reader, Recorded
from treadle.passes.framework.pass_log import Event, PassRecord


def undo_what_fails(rule: str, record: PassRecord, recorded: dict[str, Recorded], before: Graph, working: Graph) -> int:
    """Certify the changes of a pass to every function, and revert the changes that fail. Return the number of reverted
    changes.
    """
    undone = 0
    formals = {name: known.arguments for name, known in recorded.items()}
    for known in [known for known in recorded.values() if known.function in working.functions.values()]:
        failed: list[tuple[Claim, list[Reader], Counterexample]] = []
        for claim, edges in list(known.claims(working, formals)):
            against = None if _is_shown(claim, record) else record.certify(rule, claim, (before, working))
            if against is None:
                continue
            wrong = [e for e in edges if not _holds_at(e, known, rule, record, (before, working))]
            if wrong:
                failed.append((claim, wrong, against))
        for claim, edges, against in failed:
            event = Event.at(rule, known.function, claim.at, original_nodes=record.lineage.of((claim.at,)))
            others = [m for m in record.matches if dataclasses.replace(m, rule=rule, reason="") != event]
            record.matches[:] = others
            reason = f"rolled back, since its certificate failed: {against}"
            record.refusals.append(dataclasses.replace(event, reason=reason))
            record.changes = max(record.changes - 1, 0)
            undone += 1
            if not known.revert(edges, claim.before):
                copy = clone_graph(before)
                working.functions, working.symbols, working.initial = copy.functions, copy.symbols, copy.initial
                record.matches.clear()
                record.changes = 0
                record.notes.append("all changes of this pass were rolled back")
                return undone
    return undone


def _holds_at(edge: Reader, known: Recorded, rule: str, record: PassRecord, graphs: tuple[Graph, Graph]) -> bool:
    """Return True if a consumer computes the same after its operand changed: abs(x), after x became -x."""
    if edge.node is None or edge.where is None:
        return False
    return record.certify(rule, known.claim_of_reader(edge.node), graphs) is None


def _is_shown(claim: Claim, record: PassRecord) -> bool:
    """Return True if certified rewrites led from the one value to the other."""
    if len(claim.before) != 1:
        return False
    value: Value | None = claim.before[0]
    while value is not None and value is not claim.after[0]:
        value = record.display_values.get(value)
    return value is not None and claim.before[0] is not claim.after[0]

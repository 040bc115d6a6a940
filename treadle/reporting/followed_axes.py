"""The result of following an axis, with the obstacles, as facts and as text."""

from __future__ import annotations

from treadle.ir.analysis.encounters import Encounter, Verdict
from treadle.ir.analysis.following import Following
from treadle.reporting import Facts


def following_facts(following: Following) -> Facts:
    """Return the values that have an axis, and if the axis can be stepped, packed and split, with the reasons."""
    verdicts = {"step": following.step(), "pack": following.pack(), "split": following.split()}
    return {
        "axis": following.axis,
        "parameters": following.parameters,
        "outputs": following.outputs,
        **{name: _verdict_facts(verdict) for name, verdict in verdicts.items()},
    }


def _verdict_facts(verdict: Verdict) -> Facts:
    return {
        "may": bool(verdict),
        "against": [_encounter_facts(e) for e in verdict.against],
        "combine": [{"by": c.by, **_encounter_facts(c.encounter), "why": str(c)} for c in verdict.combine],
    }


def _encounter_facts(e: Encounter) -> Facts:
    return {"op": e.node.op.name, "why": str(e), "source": e.line, "scope": e.scope, "times": e.count}


def following_text(following: Following) -> str:
    return "\n".join(map(str, (following.step(), following.pack(), following.split())))

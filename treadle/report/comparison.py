"""The report on two builds: both graphs side by side, with one selection, and the differences.

    comparison_report(compare(open_build("gpt2"), open_build("gpt2", quantize="int8-weights"))).save("diff.html")

The page's programs are the builds a and b. A pair of the section `diff` has the numbers of ops of a and of b that
correspond; an op without a pair is only in one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from treadle.comparing.builds import Build
from treadle.comparing.differences import QUANTITIES, BuildComparison
from treadle.report import tabs
from treadle.report.building import Report, report_of_programs
from treadle.report.programs import ReportProgram
from treadle.report.tabs import tab

Place = Sequence[Any]
"""A function, and the position of a node there."""


def comparison_report(comparison: BuildComparison) -> Report:
    """Return the report on a comparison."""
    programs = [_program(f"{side}: {build.name}", build) for side, build in (("a", comparison.a), ("b", comparison.b))]
    sections = {"diff": tab(partial(diff_facts, comparison, programs))}
    sections["log"] = tab(partial(tabs.log_facts, programs[0]))
    name = f"{comparison.a.name} and {comparison.b.name}"
    return report_of_programs(
        name, comparison.b.backend, str(comparison.b.target), comparison.sizes, programs, sections
    )


def diff_facts(comparison: BuildComparison, programs: Sequence[ReportProgram]) -> dict[str, Any]:
    """Return the comparison, with the numbers of the ops that correspond, and of those that only one build has."""
    facts = comparison.as_dict()
    numbers = [each.stages[-1].numbers for each in programs]

    def of(side: int, places: Sequence[Place]) -> list[int]:
        return [numbers[side][function][index] for function, index in places]

    matches, unmatched = facts.pop("matches"), facts.pop("unmatched")
    facts["pairs"] = [[of(0, match["a"]), of(1, match["b"]), match["by"]] for match in matches]
    facts["only"] = [sorted(set(of(side, unmatched[name]))) for side, name in enumerate("ab")]
    facts["about"] = dict(QUANTITIES)
    facts["text"] = str(comparison).splitlines()
    return facts


def _program(name: str, build: Build) -> ReportProgram:
    """Return the stages of a build up to the graph that is compared."""
    lowered = build.lowered if build.is_backend_stage else None
    return ReportProgram(name, replace(build.optimized, lowered=lowered), build.backend)

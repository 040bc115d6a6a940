"""On any program, every pass of the default pipeline leaves a graph that verifies and computes the same numbers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from tests.pass_programs import numbers
from tests.random_programs import random_program
from treadle.ir.transforms.chosen_outputs import choose_outputs
from treadle.ir.verifier import verify
from treadle.passes.framework.manager import Optimized, PassManager
from treadle.passes.framework.rewrite import RewriteSet
from treadle.passes.pipelines import DEFAULT

PROGRAMS = 150
# Some hundred roundings, which a normalization of equal numbers multiplies by 1 / sqrt(1e-5), about 300.
TOLERANCE = 1000 * 300 * 2.0**-52


ASKED = ("y", "y[:, 0]", "y", "y[:, -1:]", "y[:, 1:3]")
"""The requested parts of a program's output; "y" requests the whole output."""


def optimized(seed: int) -> Optimized:
    return PassManager(DEFAULT).run(choose_outputs(random_program(seed), [ASKED[seed % len(ASKED)]]))


@pytest.mark.parametrize("start", range(0, PROGRAMS, 10))
def test_every_pass_keeps_the_graph_sound_and_its_numbers(start: int) -> None:
    for seed in range(start, start + 10):
        made = optimized(seed)
        wanted = numbers(made.source)["y"]
        scale = max(1.0, float(np.abs(wanted).max()))
        for record in made.log:
            if record.changed and record.graph is not None:
                verify(record.graph)
                got = numbers(record.graph)["y"]
                what = f"seed {seed}, after {record.name}:\n{record.graph}"
                np.testing.assert_allclose(got, wanted, rtol=0, atol=TOLERANCE * scale, err_msg=what)


def rules() -> Iterator[str]:
    """Yield every rewrite of the pipeline that keeps numbers, by its name in the log."""
    for each in DEFAULT:
        if each.changes_numbers:
            continue
        for rule in each.rules if isinstance(each, RewriteSet) else (each,):
            yield rule.name


def test_the_programs_leave_no_rewrite_idle() -> None:
    """Otherwise the test above would say nothing about a rewrite that never applied."""
    logs = [optimized(seed).log for seed in range(PROGRAMS)]
    at_work = {event.rule for log in logs for record in log for event in record.matches}
    at_work |= {record.name for log in logs for record in log if record.changed}
    assert [rule for rule in rules() if rule not in at_work] == []
    assert any(record.refusals for log in logs for record in log)

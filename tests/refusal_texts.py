"""A check that the texts of refusals stay the same: the refusals of passes are stored in tests/golden/refusals/.

The pass manager's log after a run is compared with the file of the test's module: the rule, the reason, the extent of
the partial match, and the hint. `make golden` writes the files.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from hypothesis import currently_in_test_context

from tests.error_texts import KnownTexts, current_module, shortened
from tests.golden import Golden
from treadle.passes.framework.manager import Optimized
from treadle.passes.framework.pass_log import Event

_FUSION = ("attention_chains", "attention_probabilities", "refine_attention")
_FUSING = ("activated_linear", "attention", "embedding_sum", "gated_linear", "residual_norm", "rotary")
_OTHERS = ("merge_projections", "narrow_attention", "narrow_products", "pass_manager", "passes", "site_rewrite")
MODULES = {f"test_{name}" for name in (*_FUSION, *(f"fuse_{each}" for each in _FUSING), *_OTHERS)}
"""Modules about passes that refuse; the refusals of other compilations in them are recorded too."""


def refusals(golden: Golden) -> KnownTexts:
    """Return the golden refusals of all modules."""
    return KnownTexts(golden, "refusals")


def text_of(event: Event) -> str:
    """Return `rule at op: reason; matched: ...` with the hint below it.

    In the text of a failed certificate, numbers are left out.
    """
    hint = f"\n  try  {event.hint}" if event.hint else ""
    text = f"{event.rule} at {event.op}: {event.description}{hint}"
    return shortened(text) if "certificate" in event.reason else re.sub(r"(\.py):\d+", r"\1", text)


def comparing(run: Callable[..., Optimized], texts: KnownTexts) -> Callable[..., Optimized]:
    """Return a `PassManager.run` that compares its log with the golden texts."""

    def compared(*given: Any, **more: Any) -> Optimized:
        optimized = run(*given, **more)
        module = current_module()
        if module in MODULES and not currently_in_test_context():
            for record in optimized.log:
                for event in (*record.refusals, *record.near_misses):
                    texts.compare(module, text_of(event))
        return optimized

    return compared

"""The results of verification, as text (`str`) and as JSON (`as_dict`)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LOOSEST = 0.5
"""If a tolerance, relative to the largest element, is above this value, the comparison is inconclusive."""
CLOSE = 1 / 16
"""Results that differ by no more, relative to the largest element, agree, whatever the tolerance is."""

_MARKS = {True: "ok", False: "WRONG", None: "-"}


@dataclass(frozen=True)
class Difference:
    """The distance of results from the reference, max|a - b| / max|b|, and its tolerance."""

    value: float = 0.0
    tolerance: float = 0.0

    @property
    def exceeds(self) -> bool:
        return not self.value <= self.tolerance  # True for a NaN, too

    @property
    def shows_nothing(self) -> bool:
        """True if the tolerance is so large that nearly any result would be within it, and the results differ."""
        close = self.value <= CLOSE and self.tolerance < math.inf
        return not self.exceeds and self.tolerance > LOOSEST and not close

    def worse(self, other: Difference) -> Difference:
        """Return the difference that is larger relative to its tolerance."""
        return max(other, self, key=lambda d: (d.exceeds, d.value / d.tolerance if d.tolerance else d.value))

    def __str__(self) -> str:
        return f"{self.value:.2g} (at most {self.tolerance:.2g})"


@dataclass(frozen=True)
class OpFault:
    """The first op, in program order, whose own error exceeds its tolerance.

    op          its name; `scope` and `line`: its place in the user's model
    difference  distance from the reference on correct operands; None if the op failed
    failure     the error if it failed
    sizes       the sizes of the run
    """

    op: str
    scope: str
    line: str
    difference: Difference | None
    failure: str | None
    sizes: Mapping[str, int]

    def __str__(self) -> str:
        how = self.failure or f"differs by {self.difference}"
        return f"{self.op} {how}" + _placed(self.line, self.scope)

    def as_dict(self) -> dict[str, Any]:
        facts = {"op": self.op, "scope": self.scope, "source": self.line, "failure": self.failure}
        return {**facts, **(_facts(self.difference) if self.difference else {}), "sizes": dict(self.sizes)}


@dataclass(frozen=True)
class UndecidedOp:
    """An op whose integers or booleans change if ops round, such as `top_k`; `scope` and `line`: its place in the
    user's model.
    """

    op: str
    scope: str
    line: str

    def __str__(self) -> str:
        return self.op + _placed(self.line, self.scope)

    def as_dict(self) -> dict[str, Any]:
        return {"op": self.op, "scope": self.scope, "source": self.line}


@dataclass(frozen=True)
class NotFinite:
    """An output that is NaN or infinite in the reference itself, and the origin of the NaN or infinity.

    output         name of the output
    kind           "NaN" or "infinite"
    count, of      number of such elements, and of all elements
    origin         the op, the weight, the constant or the input; `scope` and `line`: its place in the user's model
    sizes          the sizes of the run
    from_a_weight  True if the origin is a weight
    """

    output: str
    kind: str
    count: int
    of: int
    origin: str
    scope: str
    line: str
    sizes: Mapping[str, int]
    from_a_weight: bool = False

    @property
    def is_all(self) -> bool:
        return self.count == self.of

    @property
    def is_fatal(self) -> bool:
        """True if the model cannot be verified: all numbers of the output are NaN or infinite, or a weight is NaN."""
        return self.is_all or (self.from_a_weight and self.kind == "NaN")

    def __str__(self) -> str:
        many = f"all {self.of}" if self.is_all else f"{self.count} of {self.of}"
        return f"output {self.output}: {many} are {self.kind}, from {self.origin}" + _placed(self.line, self.scope)

    def as_dict(self) -> dict[str, Any]:
        facts = {"output": self.output, "kind": self.kind, "count": self.count, "of": self.of, "origin": self.origin}
        return {**facts, "scope": self.scope, "source": self.line, "sizes": dict(self.sizes)}


def _placed(line: str, scope: str) -> str:
    where = ", ".join(part for part in (line, f"scope {scope}" if scope else "") if part)
    return f"    {where}" if where else ""


@dataclass(frozen=True)
class BackendReport:
    """The results of one backend.

    refused     the reason if the backend was not run: it is not installed, or does not support the graph
    difference  the largest difference of an output, over all sizes
    failure     the error if a run failed
    fault       the first op whose error exceeds its tolerance
    choice      if the comparison is inconclusive: the first op that chooses otherwise if ops round
    """

    backend: str
    refused: str | None = None
    difference: Difference = Difference()
    failure: str | None = None
    fault: OpFault | None = None
    choice: UndecidedOp | None = None

    @property
    def passed(self) -> bool | None:
        """True if all errors are within tolerance; None if the backend was not run, or if the comparison is
        inconclusive.
        """
        if self.refused:
            return None
        if self.difference.exceeds or self.failure or self.fault:
            return False
        return None if self.difference.shows_nothing else True

    def lines(self, width: int) -> Iterator[str]:
        """Yield the report as lines of text, with names padded to a width."""
        outcome = str(self.difference)
        if self.refused:
            outcome = f"not run: {self.refused}"
        elif self.failure:
            outcome = f"failed: {self.failure}"
        elif self.passed is None and math.isinf(self.difference.tolerance):
            outcome = "inconclusive: no output is finite in the reference itself; every op alone is correct"
        elif self.passed is None:
            outcome = (
                f"inconclusive: a change of the last bits changes the outputs by {outcome}; every op alone is correct"
            )
        yield f"  {self.backend:<{width}}  {_MARKS[self.passed]:<5}  {outcome}"
        if self.fault is not None:
            yield f"  {'':<{width}}         first op: {self.fault}"
        elif self.choice is not None:
            yield f"  {'':<{width}}         an op chooses otherwise after such a change: {self.choice}"
        elif self.passed is False:
            yield f"  {'':<{width}}         every op alone is correct: the error is in their composition"

    def as_dict(self) -> dict[str, Any]:
        facts = {"backend": self.backend, "passed": self.passed, "refused": self.refused, "failure": self.failure}
        measured = _facts(self.difference) if not self.refused else {}
        choice = {} if self.choice is None else {"choice": self.choice.as_dict()}
        return {**facts, **measured, "first_fault": self.fault.as_dict() if self.fault else None, **choice}


@dataclass(frozen=True)
class VerificationReport:
    """The results of `treadle.runtime.verification.verify_backends`. `str(report)` is the text that the command
    prints.
    """

    model: str
    target: str
    seed: int
    sizes: tuple[Mapping[str, int], ...]
    not_finite: tuple[NotFinite, ...]
    rewrites: Difference
    backends: tuple[BackendReport, ...]

    @property
    def passed(self) -> bool:
        """True if the rewrites and all backends that ran are within tolerance, and at least one backend was
        conclusive.
        """
        found = [b.passed for b in self.backends]
        right = True in found and False not in found and not self.rewrites.exceeds
        return right and not any(each.is_fatal for each in self.not_finite)

    def as_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "target": self.target,
            "seed": self.seed,
            "sizes": [dict(s) for s in self.sizes],
            "passed": self.passed,
            "not_finite": [each.as_dict() for each in self.not_finite],
            "rewrites": _facts(self.rewrites),
            "backends": [b.as_dict() for b in self.backends],
        }

    def __str__(self) -> str:
        layout = ReportLayout([b.backend for b in self.backends])
        lines = [layout.heading(self.model, self.target, self.seed, self.sizes)]
        lines += layout.not_finite(self.not_finite)
        lines += layout.rewrites(self.rewrites)
        for b in self.backends:
            lines += layout.backend(b)
        return "\n".join(lines)


class ReportLayout:
    """The lines of a report. Each line can be printed before the next one is known."""

    def __init__(self, backends: Sequence[str]) -> None:
        self.width = max(len(name) for name in ("rewrites", *backends))

    def heading(self, model: str, target: str, seed: int, sizes: Sequence[Mapping[str, int]]) -> str:
        sizes_text = "; ".join(", ".join(f"{k}={v}" for k, v in s.items()) for s in sizes if s)
        return f"{model} on {target}, seed {seed}" + (f", at {sizes_text}" if sizes_text else "")

    def not_finite(self, found: Sequence[NotFinite]) -> list[str]:
        return [f"  {'meaning':<{self.width}}  {_MARKS[False] if each.is_fatal else '-':<5}  {each}" for each in found]

    def rewrites(self, difference: Difference) -> list[str]:
        return [f"  {'rewrites':<{self.width}}  {_MARKS[not difference.exceeds]:<5}  {difference}"]

    def backend(self, report: BackendReport) -> list[str]:
        return list(report.lines(self.width))


def _facts(difference: Difference) -> dict[str, Any]:
    numbers = {"difference": difference.value, "tolerance": difference.tolerance}
    return {name: number if math.isfinite(number) else None for name, number in numbers.items()}

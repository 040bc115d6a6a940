"""The certificate of one distinct rewrite, and the counterexample to a wrong rewrite."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

INCONCLUSIVE = "roundings alone may change the results by as much"


@dataclass(frozen=True)
class Certificate:
    """The cases tried for one distinct rewrite, and the largest difference between the two sides.

    rule       the name of the rewrite or the pass
    instance   12 hexadecimal digits that identify the two sides, with all attributes and constants
    seed       the seed that drew the cases
    cases      the number of cases
    sizes      the sizes at which the cases ran
    error      the largest difference, relative to the largest number of the result
    tolerance  the bound on that error
    note       the reason if there are no cases; or "large axes made small", if the cases ran at reduced sizes
    refused    the reason if an op refused some sizes, which were not tried
    undecided  the number of further, inconclusive cases: roundings alone may change their results by as much
    """

    rule: str
    instance: str
    seed: int
    cases: int
    sizes: tuple[tuple[tuple[str, int], ...], ...]
    error: float = 0.0
    tolerance: float = 0.0
    note: str = ""
    refused: str = ""
    undecided: int = 0

    @property
    def is_whole(self) -> bool:
        """True if no size was refused and no case was inconclusive."""
        return not self.refused and not self.undecided

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "sizes": [dict(each) for each in self.sizes]}

    @staticmethod
    def read(facts: Mapping[str, Any]) -> Certificate:
        """Build a certificate from the result of `as_dict`. Raises Python's own errors for any other data."""
        sizes = tuple(tuple((str(k), int(v)) for k, v in each.items()) for each in facts["sizes"])
        return Certificate(
            rule=str(facts["rule"]),
            instance=str(facts["instance"]),
            seed=int(facts["seed"]),
            cases=int(facts["cases"]),
            sizes=sizes,
            error=float(facts["error"]),
            tolerance=float(facts["tolerance"]),
            note=str(facts["note"]),
            refused=str(facts.get("refused", "")),
            undecided=int(facts.get("undecided", 0)),
        )

    def __str__(self) -> str:
        if not self.cases:
            return f"{self.rule} {self.instance}: {self.note}"
        sizes = "; ".join(", ".join(f"{s}={n}" for s, n in each) for each in self.sizes if each)
        near = f"largest error {self.error:.2g} (at most {self.tolerance:.2g})"
        others = f"other sizes refused ({self.refused})" if self.refused else ""
        more = f"{self.undecided} more not certified: {INCONCLUSIVE}" if self.undecided else ""
        parts = [f"{self.cases} cases", near, f"at {sizes}" if sizes else "", more, others, self.note]
        parts.append(f"seed {self.seed}")
        return f"{self.rule} {self.instance}: {', '.join(each for each in parts if each)}"


@dataclass(frozen=True)
class Counterexample:
    """A case in which the two sides disagree: its name, the sizes, the seed that drew it, and the disagreement.

    doubt   the reason why the two sides may still agree
    """

    case: str
    sizes: tuple[tuple[str, int], ...]
    seed: int
    what: str
    doubt: str = ""

    def __str__(self) -> str:
        at = ", ".join(f"{s}={n}" for s, n in self.sizes)
        return f"{self.what} (case {self.case}, {f'at {at}, ' if at else ''}seed {self.seed})"

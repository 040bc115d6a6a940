"""What a certificate says of one distinct rewrite, and what a counterexample does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NOTHING_TOLD = "roundings alone may move the results as far as they differ"


@dataclass(frozen=True)
class Certificate:
    """What was tried of one distinct rewrite, and how near the two sides were.

    rule       the rewrite's or the pass's name
    instance   12 hexadecimal digits that name the two sides, with all attributes and constants
    seed       drew the cases
    cases      how many
    sizes      at which
    error      the largest difference, relative to the largest number of the result
    tolerance  what that error had to be below
    note       why there are no cases; "large axes made small" where they were
    refused    why not all sizes were tried, where an op refuses some
    undecided  how many cases more told nothing, since roundings alone may move their results as far
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
        """Whether no size was refused, and no case told nothing."""
        return not self.refused and not self.undecided

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "sizes": [dict(each) for each in self.sizes]}

    @staticmethod
    def read(said: Mapping[str, Any]) -> Certificate:
        """From what `as_dict` gave. Raises what Python does where it is something else."""
        sizes = tuple(tuple((str(k), int(v)) for k, v in each.items()) for each in said["sizes"])
        return Certificate(
            rule=str(said["rule"]),
            instance=str(said["instance"]),
            seed=int(said["seed"]),
            cases=int(said["cases"]),
            sizes=sizes,
            error=float(said["error"]),
            tolerance=float(said["tolerance"]),
            note=str(said["note"]),
            refused=str(said.get("refused", "")),
            undecided=int(said.get("undecided", 0)),
        )

    def __str__(self) -> str:
        if not self.cases:
            return f"{self.rule} {self.instance}: {self.note}"
        sizes = "; ".join(", ".join(f"{s}={n}" for s, n in each) for each in self.sizes if each)
        near = f"largest error {self.error:.2g} (at most {self.tolerance:.2g})"
        others = f"other sizes refused ({self.refused})" if self.refused else ""
        more = f"{self.undecided} more not certified: {NOTHING_TOLD}" if self.undecided else ""
        told = [f"{self.cases} cases", near, f"at {sizes}" if sizes else "", more, others, self.note]
        told.append(f"seed {self.seed}")
        return f"{self.rule} {self.instance}: {', '.join(each for each in told if each)}"


@dataclass(frozen=True)
class Counterexample:
    """The case in which the two sides disagree: its name, the sizes, the seed that drew it, and how they disagree.

    doubt   why they may agree nevertheless
    """

    case: str
    sizes: tuple[tuple[str, int], ...]
    seed: int
    what: str
    doubt: str = ""

    def __str__(self) -> str:
        at = ", ".join(f"{s}={n}" for s, n in self.sizes)
        return f"{self.what} (case {self.case}, {f'at {at}, ' if at else ''}seed {self.seed})"

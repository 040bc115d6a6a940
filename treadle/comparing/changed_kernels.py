"""The kernels of two builds: the number of calls, and the ops that run element by element in one build only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from treadle.backends.staged import KernelUse
from treadle.comparing.builds import Build
from treadle.comparing.folded_names import few_names
from treadle.comparing.run_nodes import RunNode, run_of
from treadle.comparing.scope_alignment import ScopeAlignment


@dataclass(frozen=True)
class SlowKernel:
    """Equal ops that run element by element in b, but not in a.

    op      the op of the lowered graph
    kernel  the kernel in b
    before  the kernels of the same op in the same scope of a; empty if a has no such op there
    why     the reason why no faster kernel runs it
    scopes  the scope of each op, and `lines`, the distinct lines of user code
    """

    op: str
    kernel: str
    before: tuple[str, ...]
    why: str
    scopes: tuple[str, ...]
    lines: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the kernel as JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    def __str__(self) -> str:
        places = f"{', '.join(self.lines)}  {few_names(self.scopes)}"
        before = f", before in {', '.join(self.before)}" if self.before else ""
        why = f": {self.why}" if self.why else ""
        return f"{len(self.scopes)} {self.op} in {self.kernel}{before}{why}  {places.strip()}".rstrip()


@dataclass(frozen=True)
class KernelCounts:
    """The number of kernel calls in a run.

    kernels             the number of calls of each kernel
    element_by_element  the number of calls of kernels that run element by element
    """

    kernels: Mapping[str, int]
    element_by_element: int


@dataclass(frozen=True, eq=False)
class _Use:
    """A kernel call of a run: the kernel, and the op, scope and line that it computes."""

    use: KernelUse
    op: str
    scope: str
    line: str


def kernel_counts(build: Build) -> KernelCounts | None:
    """Count the kernel calls of a run. Return None if a library chooses the kernels."""
    if build.kernels is None:
        return None
    uses = _uses(build)
    counts = Counter(each.use.kernel for each in uses)
    return KernelCounts(counts, sum(each.use.element_by_element for each in uses))


def slow_kernels(a: Build, b: Build, scopes: ScopeAlignment) -> tuple[SlowKernel, ...]:
    """Return the ops that run element by element in b only. Equal ops of several layers share an entry."""
    if a.kernels is None or b.kernels is None:
        return ()
    before: dict[tuple[str | None, str], list[KernelUse]] = {}
    for each in _uses(a):
        before.setdefault((each.scope, each.op), []).append(each.use)
    left = Counter({key: sum(use.element_by_element for use in uses) for key, uses in before.items()})
    groups: dict[tuple[str, str, tuple[str, ...], str], list[_Use]] = {}
    for each in _uses(b):
        key = scopes.in_a(each.scope), each.op
        if not each.use.element_by_element:
            continue
        if left[key]:
            left[key] -= 1
            continue
        fast = dict.fromkeys(use.kernel for use in before.get(key, ()) if not use.element_by_element)
        groups.setdefault((each.op, each.use.kernel, tuple(fast), each.use.why), []).append(each)
    return tuple(
        [
            SlowKernel(*key, tuple([e.scope for e in of]), tuple(dict.fromkeys(e.line for e in of if e.line)))
            for key, of in groups.items()
        ]
    )


def _uses(build: Build) -> Sequence[_Use]:
    """Return the kernel calls of a run. A call in a repeated function is listed once for each run of that function."""
    assert build.lowered is not None
    places: dict[object, list[RunNode]] = {}
    for each in run_of(build.lowered.graph).nodes:
        places.setdefault(each.node, []).append(each)
    found = []
    for use in build.kernels or ():
        if use.node is None:
            continue
        found += [_Use(use, each.op, each.scope, each.line) for each in places.get(use.node, ())]
    return found

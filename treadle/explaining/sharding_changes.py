"""Sharding plans that differ from a given plan in one choice, with their savings.

A change is another recipe, an axis of the model that is no longer split, or a mesh with the same number of ranks in
another shape or order. No change affects the results.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from treadle.ir.errors import PassError, UsageError
from treadle.ir.placement.mesh import Mesh
from treadle.passes.sharding.plan import ShardingPlan
from treadle.passes.sharding.rank_programs import refuse_small_sizes
from treadle.passes.sharding.recipes import RECIPES, shard
from treadle.sharding.needs import device_needs


@dataclass(frozen=True)
class Change:
    """A plan that differs in one choice.

    description  the change: "recipe sequence"
    seconds      the minimum time of a run
    held         bytes that a device holds
    fits         True if the device has enough memory
    """

    description: str
    seconds: float
    held: int
    fits: bool

    def as_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


def changes_of(plan: ShardingPlan, axes: Mapping[str, str]) -> list[Change]:
    """Return all changes that can be planned at the plan's sizes: first plans that fit, and among these, the fastest
    first.

    axes   the axes that the caller split by name, in addition to the recipe
    """
    found: list[Change] = []
    known = {_identity(plan)}
    for label, mesh, recipe, asked in _asked(plan, axes):
        try:
            made = shard(plan.graph, mesh, recipe=recipe, axes=asked, sizes=plan.sizes, device=plan.machine)
            refuse_small_sizes(made, plan.sizes)
        except (PassError, UsageError):
            continue  # a rank would have no part, or nothing is split
        if _identity(made) in known:
            continue
        known.add(_identity(made))
        needs = device_needs(made)
        found.append(Change(label, needs.times.seconds, needs.held, needs.fits))
    return sorted(found, key=lambda change: (not change.fits, change.seconds, change.held))


def _identity(plan: ShardingPlan) -> tuple[Any, ...]:
    """Return a key of a plan. Requests that lead to the same plan have equal keys."""
    weights = tuple(placed.text(plan.mesh) for placed in plan.weights.values())
    return str(plan.mesh), weights, tuple(sorted(plan.axes.items())), plan.stored


_Asked = tuple[str, Mesh, str | None, Mapping[str, str]]


def _asked(plan: ShardingPlan, axes: Mapping[str, str]) -> Iterator[_Asked]:
    recipe = plan.recipe if plan.recipe in RECIPES else None
    for other in RECIPES:
        if other != recipe:
            yield f"recipe {other}", plan.devices, other, axes
    for axis in plan.axes:
        yield f"{axis} whole", plan.mesh, recipe, {**axes, axis: "-"}
    for mesh in _meshes(plan.devices, plan.machine.node):
        yield f"mesh {mesh}", mesh, recipe, axes


def _meshes(mesh: Mesh, node: int) -> Iterator[Mesh]:
    """Yield the mesh with the smallest factor of one axis moved to another axis, and with two neighboring axes
    swapped.
    """
    sizes = dict(mesh.axes)
    for axis in RECIPES["megatron-fsdp"].needs:
        sizes.setdefault(axis, 1)
    for name, size in sizes.items():
        least = next((part.size for part in mesh.parts if part.axis == name), None)
        for other in sizes if least is not None else ():
            if other != name and least is not None:
                moved = {**sizes, name: size // least, other: sizes[other] * least}
                yield Mesh(tuple((n, k) for n, k in moved.items() if k > 1 or n in dict(mesh.axes)))
    if mesh.ranks > node:
        for at, (first, second) in enumerate(zip(mesh.axes, mesh.axes[1:], strict=False)):
            if first[1] > 1 and second[1] > 1:
                yield Mesh((*mesh.axes[:at], second, first, *mesh.axes[at + 2 :]))

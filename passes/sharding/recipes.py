"""Recipes: named splits for any model.

    megatron   heads, the hidden axis of feed-forward networks and the vocabulary over tp: two all-reduces a layer
               (Shoeybi et al. 2019)
    sequence   the same, and tokens over tp between them: an all-gather and a reduce-scatter for each all-reduce, of the
               same bytes, and norms and residuals in parts (Korthikanti et al. 2022)
    dp         the batch over dp
    fsdp       the batch over dp, and every weight stored in parts over dp, gathered where it is used (ZeRO 3,
               Rajbhandari et al. 2020)
    context    tokens over cp everywhere, with ring attention (Liu et al. 2023); the batch over dp, and
               heads, ffn and vocab over tp, if the mesh has them
    megatron-fsdp    both: each rank's megatron part of a weight is stored in parts over dp
    gpipe      layers in stages over pp, through which micro-batches pass one after another (Huang et al. 2019);
               megatron's axes over tp, and the batch over dp, if the mesh has them

`gpipe` adds an axis `micro` of micro-batches to the mesh as its last axis: four per stage, unless the mesh gives their
number. A mesh may have more axes than a recipe needs: `megatron` splits the batch over dp if the mesh has dp.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from treadle.ir.errors import Hint, UsageError
from treadle.ir.graph import Graph
from treadle.ir.hardware import Hardware, find_hardware
from treadle.ir.placement.mesh import MOST_RANKS, Mesh, SubAxes, ways
from treadle.ir.placement.placements import MeshPlacement, Split
from treadle.ir.sizing.sizes import Size
from treadle.ir.types import Type
from treadle.passes.sharding.plan import ShardingPlan
from treadle.passes.sharding.planning import plan_sharding
from treadle.passes.sharding.stages import TURNS, cut_in_stages
from treadle.passes.sharding.wanted import blocked_dim, has_axis, wanted_splits


@dataclass(frozen=True)
class SplitRecipe:
    """Axes by name, each with the mesh axis that splits it if the model has the axis and the mesh has the mesh axis.

    needs   mesh axes without which the recipe splits nothing
    stored  the mesh axis over which weights are stored in parts and gathered for use
    staged  the mesh axis of the stages of a pipeline
    """

    axes: Mapping[str, str]
    needs: tuple[str, ...]
    stored: str = ""
    staged: str = ""


_TENSOR = {"heads": "tp", "ffn": "tp", "vocab": "tp", "batch": "dp"}
RECIPES: dict[str, SplitRecipe] = {
    "megatron": SplitRecipe(_TENSOR, ("tp",)),
    "sequence": SplitRecipe({**_TENSOR, "sequence": "tp"}, ("tp",)),
    "context": SplitRecipe({**_TENSOR, "sequence": "cp"}, ("cp",)),
    "dp": SplitRecipe({"batch": "dp"}, ("dp",)),
    "fsdp": SplitRecipe({"batch": "dp"}, ("dp",), stored="dp"),
    "megatron-fsdp": SplitRecipe(_TENSOR, ("tp", "dp"), stored="dp"),
    "gpipe": SplitRecipe(_TENSOR, ("pp",), staged="pp"),
}

FOR_EACH_STAGE = 4
"""Default number of micro-batches per stage. With it, stages wait for each other at most a fifth of the time."""


def shard(
    graph: Graph,
    mesh: Mesh | str,
    *,
    recipe: str | None = None,
    axes: Mapping[str, str] | None = None,
    sizes: Mapping[str, int] | None = None,
    device: str | Hardware = "h100",
) -> ShardingPlan:
    """Return the sharding plan of a graph over a mesh, by a recipe, by named axes, or both. Named axes take precedence
    over the recipe's axes.

    axes    mesh axes by the name of the axis that they split, or "-": the axis stays whole, even if the recipe splits
            it
    sizes   sizes of the symbols, at which costs are compared; by default 128, for a batch the number of its parts
    device  the device of each rank: a name in `treadle.ir.hardware.HARDWARE`, or a `Hardware`

    Raises UsageError for an unknown recipe, axis, mesh axis or device, and for an axis in `axes` that is too short to
    be split; PassError for a graph with several entries.
    """
    if not isinstance(mesh, Mesh | str):
        raise UsageError("mesh must be a string or a Mesh", received=repr(mesh)[:80], hint='"tp=2,dp=2"')
    if axes is not None and not isinstance(axes, Mapping):
        raise UsageError("axes must be a mapping", received=repr(axes)[:80], hint='axes={"heads": "tp"}')
    mesh = Mesh.of(mesh) if isinstance(mesh, str) else mesh
    machine = find_hardware(device) if isinstance(device, str) else device
    chosen = dict(axes or {})
    stored: SubAxes = ()
    staged = ""
    if recipe is not None:
        known = _find(recipe, mesh)
        names = {name for name, _ in mesh.axes}
        for axis, over in known.axes.items():
            if axis not in chosen and over in names and has_axis(graph, axis):
                chosen[axis] = over
        stored = mesh.parts_of(known.stored) if known.stored else ()
        staged = known.staged
    elif not chosen:
        sizes_of = dict(mesh.axes)
        fitting = " or ".join(name for name, each in RECIPES.items() if sizes_of.keys() >= set(each.needs))
        hint = Hint(f"recipe={fitting}", f"--recipe {fitting}")
        if not fitting:
            over = next(iter(sizes_of))
            hint = Hint(f"axes={{'batch': {over!r}}}, or another axis", f"--axis batch={over}, or another axis")
        raise UsageError("the split of the model is not specified", hint=hint)
    chosen = {axis: over for axis, over in chosen.items() if over != "-"}
    if staged:
        if not has_axis(graph, "batch"):
            raise UsageError(f"{graph.name} has no batch to split into micro-batches", received=f"recipe {recipe}")
        mesh = _with_turns(graph, mesh, staged, chosen.get("batch", ""), sizes or {})
        chosen["batch"] = f"{chosen.get('batch', '')} {TURNS}".strip()
    wanted = wanted_splits(graph, mesh, chosen, asked=axes or ())
    if stored:
        types = {name: value.type for name, value in graph.parameters.items()}
        weights = {name: _stored(types[name], placed, stored) for name, placed in wanted.weights.items()}
        wanted = replace(wanted, weights=weights)
    given = _default_sizes(graph, ways(mesh.parts_of(chosen.get("batch", "")))) | dict(sizes or {})
    recipe_name = recipe or "by hand"
    plan = plan_sharding(graph, mesh, wanted, machine, given, recipe=recipe_name, axes=chosen, stored=stored)
    plan = cut_in_stages(plan, staged) if staged else plan
    return replace(plan, notes=(*plan.notes, *(_idle_note(plan, name) for name in plan.idle_axes)))


def _idle_note(plan: ShardingPlan, name: str) -> str:
    """Describe a mesh axis over which nothing is split, with the axes that the recipe would split over it."""
    missing = (
        [axis for axis, over in RECIPES[plan.recipe].axes.items() if over == name] if plan.recipe in RECIPES else []
    )
    missing = [axis for axis in missing if axis not in plan.axes]
    reason = f"; {plan.graph.name} has no axis {' or '.join(missing)}" if missing else ""
    return f"nothing is split over {name}: its {dict(plan.mesh.axes)[name]} ranks compute the same{reason}"


def _with_turns(graph: Graph, mesh: Mesh, staged: str, batch: str, sizes: Mapping[str, int]) -> Mesh:
    """Return the mesh with an axis of micro-batches as its last axis. Their number is the number in the mesh, or
    `FOR_EACH_STAGE` per stage, but at most the number of rows.
    """
    axes = dict(mesh.axes)
    count = axes.pop(TURNS, None)
    if count is None:
        rows = [n for v in graph.main.inputs if v.type.rank for n in _known(graph, v.type.shape[0], sizes)]
        most = max(min(rows, default=MOST_RANKS) // ways(mesh.parts_of(batch)), 1)
        count = min(FOR_EACH_STAGE * axes[staged], most)
    return Mesh.of(",".join(f"{name}={size}" for name, size in {**axes, TURNS: count}.items()))


def _known(graph: Graph, size: Size, sizes: Mapping[str, int]) -> list[int]:
    """Return a size at these sizes of symbols, or its upper bound, as a list. Return an empty list if neither is
    known.
    """
    upper = {s: sizes.get(s, graph.symbols[s].upper) for s in size.symbols}
    known = {s: n for s, n in upper.items() if n is not None}
    return [size.evaluate(known)] if len(known) == len(upper) else []


def mesh_for(recipe: str | None, axes: Iterable[str], ranks: int | None = None) -> str:
    """Return a mesh, `tp=2`, that has the mesh axes of a recipe and of named axes.

    axes   mesh axes of named axes: `tp`, `dp tp`, `-`
    ranks  the number of ranks; None: 2 along each mesh axis
    """
    needs = RECIPES[recipe].needs if recipe in RECIPES else ()
    named = [name for each in axes for name in re.findall(r"[A-Za-z_]\w*", each)]
    first, *others = dict.fromkeys([*needs, *named] or ["tp"])
    return ",".join([f"{first}={ranks or 2}", *(f"{name}={2 if ranks is None else 1}" for name in others)])


def _find(name: str, mesh: Mesh) -> SplitRecipe:
    found = RECIPES.get(name)
    if found is None:
        raise UsageError(f"unknown recipe {name!r}", hint="one of " + ", ".join(RECIPES))
    missing = [axis for axis in found.needs if axis not in dict(mesh.axes)]
    if missing:
        others = [f"{axis}=2" for axis in found.needs[1:]]
        fitting = ",".join([f"{found.needs[0]}={max(mesh.ranks // 2 ** len(others), 2)}", *others])
        raise UsageError(
            f"recipe {name} splits over a mesh axis {missing[0]}, which the mesh does not have",
            received=str(mesh),
            hint=Hint(f'mesh="{fitting}"', f"--mesh {fitting}"),
        )
    return found


def _default_sizes(graph: Graph, batch: int) -> dict[str, int]:
    """Return 128 for every symbol, and for the symbols of inputs' first dimensions the number of the batch's parts. All
    sizes are within their bounds.
    """
    leading = {s for v in graph.main.inputs if v.type.rank for s in v.type.shape[0].symbols}
    found = {}
    for symbol, bounds in graph.symbols.items():
        size = max(bounds.lower, max(batch, 1) if symbol in leading else 128)
        found[symbol] = size if bounds.upper is None else min(size, bounds.upper)
    return found


def _stored(type: Type, placed: MeshPlacement, over: SubAxes) -> MeshPlacement:
    """Return a weight's placement, further split over parts of the mesh along the dimension with the most even parts.

    A weight without a dimension that is long enough is stored whole.
    """
    over = tuple(p for p in over if p not in placed.used)
    best: tuple[tuple[bool, int], int, Split] | None = None
    for d, size in enumerate(type.shape):
        now = placed.dims[d]
        split = Split(over) if now is None else Split((*now.over, *over), now.grain)
        units = size.divide(split.grain)
        count = None if units is None else units.constant
        if not over or count is None or count < ways(split.over) or d == blocked_dim(type):
            continue
        quality = (count % ways(split.over) == 0, count)
        if best is None or quality > best[0]:
            best = quality, d, split.normal(size)
    if best is None:
        return placed
    _, d, split = best
    return MeshPlacement((*placed.dims[:d], split, *placed.dims[d + 1 :]))

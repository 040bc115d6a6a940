"""`treadle run --mesh` and `generate --mesh`: this process runs one rank of a model, and rank 0 prints the result."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treadle.cli.application import print_json
from treadle.cli.options import mesh_flags
from treadle.files.shown_names import printable
from treadle.ir.errors import UsageError

if TYPE_CHECKING:
    from treadle.stepped import SteppedModel


def refuse_without_mesh(recipe: str | None, axis: Sequence[str]) -> None:
    """Raise UsageError for sharding options without a mesh."""
    if recipe is not None or axis:
        hint = f"{mesh_flags(recipe, axis)} as well"
        raise UsageError("sharding options need a mesh", received=recipe or ", ".join(axis), hint=hint)


def refuse_artifact(model: str) -> None:
    """Raise UsageError for an artifact: each rank compiles its part from the model."""
    from treadle.artifacts.reading import is_artifact

    if is_artifact(model):
        shown = printable(model)
        raise UsageError(
            "ranks run a model, not an artifact",
            received=shown,
            hint=f"the model that it was made from; treadle shard {shown} --lab, if `treadle shard` made it",
        )


@contextmanager
def opened_on_ranks(
    mesh: str | None, recipe: str | None, axis: Sequence[str], timeout: float, asked: str
) -> Iterator[Callable[..., SteppedModel]]:
    """Yield a function that opens the step of a model: this rank's part if there is a mesh. Only rank 0 prints.

    asked  the request, which must be equal on all ranks
    """
    from treadle.stepped import open_stepped

    if mesh is None:
        refuse_without_mesh(recipe, axis)
        yield open_stepped
        return
    from treadle.ir.placement.mesh import Mesh
    from treadle.program.flag_values import parse_axes
    from treadle.runtime.distributed.ranks import join
    from treadle.sharding.rank_models import open_rank_stepped

    options: dict[str, Any] = {"recipe": recipe, "axes": parse_axes(axis), "agree": {"texts and options": asked}}
    with join(timeout, command="generate MODEL TEXTS", count=Mesh.of(mesh).ranks) as ranks, ExitStack() as quiet:
        if ranks.rank:
            nowhere = quiet.enter_context(open(os.devnull, "w", encoding="utf-8"))
            quiet.enter_context(redirect_stdout(nowhere))
            quiet.enter_context(redirect_stderr(nowhere))
        yield lambda model, **given: open_rank_stepped(model, mesh, ranks, **options, **given)


def run_rank(
    model: str,
    values: Sequence[str],
    *,
    mesh: str,
    recipe: str | None,
    axis: Sequence[str],
    timeout: float,
    output: Path | None,
    keywords: Mapping[str, Any],
    as_json: bool,
) -> None:
    """Run a model as one rank. Raises the errors of `compile_rank` and of a run, and UsageError for an artifact."""
    import hashlib

    import numpy as np

    from treadle.ir.placement.mesh import Mesh
    from treadle.npy_files import write_npy
    from treadle.program.flag_values import input_names, parse_axes, parse_inputs
    from treadle.program.options import CompileOptions
    from treadle.reporting.arrays import array_facts, array_table
    from treadle.reporting.counts import counted, human
    from treadle.reporting.tables import console
    from treadle.runtime.distributed.ranks import join
    from treadle.sharding.rank_models import compile_rank

    options = CompileOptions.of("rank", keywords)
    with join(timeout, count=Mesh.of(mesh).ranks) as ranks:
        refuse_artifact(model)
        made = compile_rank(
            model,
            mesh,
            ranks,
            recipe=recipe,
            axes=parse_axes(axis),
            agree={"inputs": " ".join(values)},
            **{"inputs": input_names(values), **keywords},
        )
        arrays = parse_inputs(values, {p.name: p.type.rank for p in made.inputs})
        known = {name: np.asarray(a) for name, a in arrays.items()}
        digest = hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in known.values())).hexdigest()
        types = ", ".join(f"{name} {a.dtype}{list(a.shape)}" for name, a in known.items())
        ranks.agree({"inputs": f"{types}, sha256:{digest[:16]}"})
        started = time.perf_counter()
        parts = made(**arrays)
        seconds = time.perf_counter() - started
        outputs = made.gathered(parts, **arrays)
    if outputs is None:
        return
    files = write_npy(output, outputs) if output is not None else []
    facts = {name: array_facts(array) for name, array in outputs.items()}
    moved = sorted(made.communicator.traffic.items())
    traffic = [{"op": op, "over": over, "times": each.times, "bytes": each.bytes} for (op, over), each in moved]
    weights = f"drawn from seed {made.seed}" if made.seed is not None else f"{human(made.loaded, 'B')} of a checkpoint"
    if as_json:
        print_json(
            {
                "model": made.name,
                "mesh": str(made.plan.mesh),
                "ranks": ranks.size,
                "backend": made.backend,
                "target": str(options.where),
                "weights": weights,
                "loaded": made.loaded,
                "seconds": seconds,
                "collectives": traffic,
                "notes": list(made.plan.notes),
                "outputs": facts,
                "files": list(map(str, files)),
            }
        )
        return
    console().print(array_table(facts))
    for name, shown in facts.items():
        if "values" in shown:
            print(f"\n{name} = {json.dumps(shown['values'])}")
    where = f"in {made.backend} on {counted(ranks.size, 'rank')}, {made.plan.mesh}"
    print(f"\n{made.name} ran in {seconds * 1e3:.1f} ms {where}")
    print(f"weights of rank 0: {weights}")
    for note in made.plan.notes:
        print(f"note: {note}")
    for (op, over), each in moved:
        print(f"  {each.times} x {op} over {over}, {human(each.bytes, 'B')} together")
    for file in files:
        print(f"wrote {file}")

"""What ranks do in tests, as a script under `treadle launch` or torchrun: `rank_jobs.py JOB ARGUMENTS...`.

models MESH BACKENDS FOLDER  run small models in several ways; rank 0 writes what came out, and all what they counted;
                             over tp=2, continue texts as well
turns MODE                   run one model again and again, each rank having told its process; rank 1 does MODE in the
                             end: "killed" (from outside), "raises", "stops", "sleeps", "leaves"
differ                       rank 1 has another plan than rank 0
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

import treadle
from tests.sharded_models import small_options
from treadle.ir.analysis.drawn_inputs import draw_inputs
from treadle.ir.errors import TreadleError, UsageError
from treadle.rank_models import RankModel, compile_rank, open_rank_stepped
from treadle.runtime.distributed.ranks import Ranks, join
from treadle.runtime.generation import generate
from treadle.runtime.session import Session

KINDS = ("gpt2", "t5", "vit", "llama")
FORMS: dict[str, dict[str, Any]] = {
    "f32": {},
    "bf16": {"dtype": "bf16"},
    "int8": {"quantize": "int8-weights"},
}
SMALL = {"layers": 1, "dim": 16, "heads": 4, "vocab": 37, "context": 16}


def inputs_of(made: RankModel, uneven: bool) -> dict[str, Any]:
    """Drawn arrays; of sizes that the mesh does not divide, if so asked."""
    graph = made.plan.graph
    size = made.plan.mesh.ranks + 3 if uneven else 8
    return draw_inputs(graph, {s: min(size, b.upper or size) for s, b in graph.symbols.items()}, [0])


def models(ranks: Ranks, mesh: str, backends: str, folder: str) -> None:
    found: list[dict[str, Any]] = []
    for backend, kind, recipe, form in cases(mesh, backends.split(",")):
        chosen = {**small_options(kind), "layers": 1, **FORMS[form]}
        made = compile_rank(kind, mesh, ranks, recipe=recipe, backend=backend, **chosen)
        given = inputs_of(made, uneven=form == "f32")
        parts = made(**given)
        planned = replace(made.plan, sizes=made.sizes(**given)).collectives()
        counted = sum(each.bytes for each in made.communicator.traffic.values())
        whole = made.gathered(parts, **given)
        facts = {"case": f"{backend} {kind} {recipe} {form}", "form": form, "counted": counted}
        facts |= {"planned": sum(each.payload for each in planned), "collectives": len(planned)}
        facts |= {"met": sum(each.times for each in made.communicator.traffic.values())}
        if whole is not None:
            wanted = treadle.compile(kind, backend=backend, **chosen)(**given)
            facts["apart"] = max(float(np.max(np.abs(whole[n] - a))) for n, a in wanted.items())
            facts["largest"] = max(float(np.max(np.abs(a))) for a in wanted.values())
        found.append(facts)
    Path(folder, f"{ranks.rank}.json").write_text(json.dumps(found))
    if mesh == "tp=2":
        generates(ranks, folder)


def cases(mesh: str, backends: list[str]) -> Iterator[tuple[str, str, str, str]]:
    """Backend, kind, recipe and form of each model that is run; the first backend runs all."""
    first, *others = backends
    stored = "megatron-fsdp" if "dp" in mesh else "sequence"
    for kind in KINDS:
        for form in FORMS if first == "torch" else ("f32", "int8"):
            yield first, kind, "megatron", form
        yield first, kind, stored, "f32"
    for backend in others:
        yield backend, KINDS[0], stored, "f32"


def generates(ranks: Ranks, folder: str) -> None:
    """Continue texts by sessions with a cache in every rank, and write what came out."""
    found: list[dict[str, Any]] = []
    for kind, backend, form in (
        ("gpt2", "numpy", "f32"),
        ("llama", "numpy", "int8"),
        ("llama", "torch", "bf16"),
        ("gpt2", "tvm", "f32"),
    ):
        chosen = {**small_options(kind), "layers": 1, **FORMS[form]}
        made = open_rank_stepped(kind, f"tp={ranks.size}", ranks, recipe="megatron", backend=backend, **chosen)
        session = made.session(rows=2, capacity=16)
        tokens, logits = written(session)
        facts = {"case": f"{backend} {kind} {form}", "form": form, "tokens": tokens}
        facts["bytes"] = sum(state.nbytes for state in session.states.values())
        if ranks.rank == 0:
            whole = treadle.compile(kind, backend=backend, **chosen).session(rows=2, capacity=16)
            facts["wanted"], wanted = written(whole)
            facts["apart"] = float(np.max(np.abs(logits - wanted)))
            facts["whole bytes"] = sum(state.nbytes for state in whole.states.values())
        found.append(facts)
    Path(folder, f"generated-{ranks.rank}.json").write_text(json.dumps(found))


def written(session: Session) -> tuple[list[list[int]], Any]:
    """Two rows of other lengths, continued together, and the logits of a prompt."""
    tokens: list[list[int]] = [[], []]
    for token in generate(session, [[1, 2, 3], [4]], most=6):
        tokens[token.row].append(token.id)
    row = session.open()
    return tokens, np.asarray(session.prefill({row: [5, 6, 7]})[row], np.float32)


def turns(ranks: Ranks, mode: str) -> None:
    made = compile_rank("gpt2", f"tp={ranks.size}", ranks, recipe="megatron", **SMALL)
    given = inputs_of(made, uneven=False)
    for turn in range(100_000):
        if turn == 3:
            print(f"rank {ranks.rank} is process {os.getpid()}", flush=True)
        if turn == 5 and ranks.rank == 1:
            if mode == "raises":
                raise UsageError("the disk is full")
            if mode == "stops":
                os.kill(os.getpid(), signal.SIGSTOP)
            if mode == "sleeps":
                ranks.doing("sleeping")
                time.sleep(60)
            if mode == "leaves":
                os._exit(0)
        made(**given)


def differ(ranks: Ranks) -> None:
    mesh, recipe = ("dp=2", "dp") if ranks.rank == 1 else ("tp=2", "megatron")
    compile_rank("gpt2", mesh, ranks, recipe=recipe, **SMALL)


JOBS = {"models": models, "turns": turns, "differ": differ}


def main() -> None:
    """Do a job as a rank; an error is told as a command does it."""
    job, *arguments = sys.argv[1:]
    try:
        with join(timeout=float(os.environ.get("TIMEOUT", "60"))) as ranks:
            JOBS[job](ranks, *arguments)
    except TreadleError as error:
        if not error.told_elsewhere:
            print(error, file=sys.stderr, flush=True)
        sys.exit(2)


if __name__ == "__main__":
    main()

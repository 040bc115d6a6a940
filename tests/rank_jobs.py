"""Jobs of ranks in tests, as a script under `treadle launch` or torchrun: `rank_jobs.py JOB ARGUMENTS...`.

models MESH BACKENDS FOLDER  run small models of all kinds and forms in several ways; rank 0 writes the results,
                             and every rank writes its counts; with two ranks, weights are gathered early, and keys
                             are passed on during computation; all ranks continue texts over tp
turns MODE                   run one model repeatedly, after each rank has written its process id; finally rank 1 does
                             MODE: "killed" (from outside), "raises", "stops", "sleeps", "leaves"; "lingers": all
                             ranks leave, write their process ids, and do not end
differ WHAT FOLDER           rank 1 has another plan, version, weights or inputs than rank 0, or lacks
                             a part of the checkpoint in FOLDER
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

import treadle
from tests.sharded_models import small_options
from treadle.backends.registry import find_backend
from treadle.backends.staged import build
from treadle.ir.analysis.drawn_inputs import draw_inputs
from treadle.ir.errors import TreadleError, UsageError
from treadle.ir.graph import Graph
from treadle.ir.ops.collectives import Awaited, Starting
from treadle.ir.target import Target
from treadle.passes.framework.manager import PassManager
from treadle.passes.pipelines import MERGING
from treadle.passes.sharding.plan import PlannedCollective
from treadle.passes.sharding.rank_programs import rank_program, rank_weights
from treadle.program.weights import initial_weights
from treadle.runtime.distributed.ranks import Ranks, join
from treadle.runtime.generation import generate
from treadle.runtime.session import Session
from treadle.sharding.rank_models import RankModel, compile_rank, open_rank_stepped

KINDS = ("gpt2", "t5", "vit", "llama")
FORMS: dict[str, dict[str, Any]] = {
    "f32": {},
    "bf16": {"dtype": "bf16"},
    "int8": {"quantize": "int8-weights"},
}
SMALL = {"layers": 1, "dim": 16, "heads": 4, "vocab": 37, "context": 16}


def inputs_of(made: RankModel, uneven: bool) -> dict[str, Any]:
    """Draw inputs; if `uneven`, of sizes that are not divisible by the mesh."""
    graph = made.plan.graph
    size = made.plan.devices.ranks + 3 if uneven else 8
    return draw_inputs(graph, {s: min(size, b.upper or size) for s, b in graph.symbols.items()}, [0])


def models(ranks: Ranks, mesh: str, backends: str, folder: str) -> None:
    found: list[dict[str, Any]] = []
    for backend, kind, recipe, form, over in cases(mesh, backends.split(",")):
        chosen = {**small_options(kind), "layers": 1, **FORMS[form]}
        made = compile_rank(kind, over, ranks, recipe=recipe, backend=backend, **chosen)
        given = inputs_of(made, uneven=form == "f32")
        parts = made(**given)
        planned = replace(made.plan, sizes=made.sizes(**given)).collectives()
        counted = sum(each.bytes for each in made.communicator.traffic.values())
        whole = made.gathered(parts, **given)
        facts = {"case": f"{backend} {kind} {over} {recipe} {form}", "form": form, "counted": counted}
        facts |= {"planned": sum(each.payload * each.ranks for each in planned)}
        # The receiving rank of a `hand_on` counts the transfer too.
        facts |= {"collectives": sum(each.ranks * (2 if each.op == "hand_on" else 1) for each in planned)}
        facts |= {"met": sum(each.times for each in made.communicator.traffic.values())}
        if whole is not None:
            wanted = treadle.compile(kind, backend=backend, **chosen)(**given)
            facts["apart"] = max(float(np.max(np.abs(whole[n] - a))) for n, a in wanted.items())
            facts["largest"] = max(float(np.max(np.abs(a))) for a in wanted.values())
        found.append(facts)
    Path(folder, f"{ranks.rank}.json").write_text(json.dumps(found))
    if ranks.size == 2:
        backend = backends.split(",")[-1]
        report = {"gather": runs_ahead(ranks, "gpt2", "fsdp", "dp=2", backend)}
        report |= {"pass": runs_ahead(ranks, "llama", "context", "cp=2", backend)}
        Path(folder, f"ahead-{ranks.rank}.json").write_text(json.dumps(report))
    generates(ranks, folder)


def cases(mesh: str, backends: list[str]) -> Iterator[tuple[str, str, str, str, str]]:
    """Yield backend, kind, recipe, form and mesh of each model to run; the first backend runs every case that it
    supports.
    """
    first, *others = backends
    stored = "megatron-fsdp" if "dp" in mesh else "sequence"
    for kind, form in paired(KINDS, 4 if "dp" in mesh else 2):
        yield able(first, form), kind, "megatron", form, mesh
    for kind in KINDS:
        yield first, kind, stored, "f32", mesh
    for backend in others:
        yield backend, KINDS[0], stored, "f32", mesh
    ring, line = ("tp=2,cp=2", "pp=2,tp=2,micro=3") if "dp" in mesh else ("cp=2", "pp=2,micro=3")
    for backend in backends if "dp" not in mesh else (first,):
        yield backend, "llama", "context", "f32", ring
        yield backend, "gpt2", "gpipe", "f32", line
    if "dp" in mesh:
        yield first, "gpt2", "context", "f32", "cp=4"
        yield "numpy", "gpt2", "gpipe", "f32", "pp=4,micro=5"


def paired(kinds: Sequence[str], ranks: int) -> list[tuple[str, str]]:
    """Return pairs of kinds and forms: each kind in one form on four ranks, and in the other forms on two."""
    forms = list(FORMS)
    return [
        (kind, form)
        for k, kind in enumerate(kinds)
        for f, form in enumerate(forms)
        if (ranks == 4) == (f == k % len(forms))
    ]


def able(backend: str, form: str) -> str:
    """Return the backend, or a backend that supports bf16 if the case needs bf16."""
    return "torch" if (backend, form) == ("numpy", "bf16") else backend


def runs_ahead(ranks: Ranks, kind: str, recipe: str, mesh: str, backend: str) -> dict[str, Any]:
    """Run a model that starts collectives early, and report the order of its collectives; then run it without early
    starts.
    """
    chosen = {**small_options(kind), "layers": 3 if recipe == "fsdp" else 1}
    made = compile_rank(kind, mesh, ranks, recipe=recipe, backend=backend, **chosen)
    given = inputs_of(made, uneven=True)
    met, order = made.communicator, []
    begin, finished = met.begin, met._finished

    def begun(op: Any, part: Any) -> None:
        order.append("start")
        begin(op, part)

    def waited(op: Any) -> Any:
        order.append("wait")
        return finished(op)

    met.begin, met._finished = begun, waited  # type: ignore[method-assign]
    ahead = made(**given)
    before = dict(met.traffic)
    program = PassManager(MERGING).run(rank_program(made.plan, ranks.rank)).graph
    parts = rank_weights(made.plan, ranks.rank, initial_weights(made.plan.graph, 0))
    plain, _ = build(find_backend(backend), at_once(program), Target("cpu"), {n: parts[n] for n in program.parameters})
    met.traffic.clear()
    with met.running("plain"):
        later = plain(**given)
    same = all(np.array_equal(np.asarray(ahead[name]), np.asarray(array)) for name, array in later.items())
    return {"order": order, "same": same, "counted alike": before == met.traffic}


def at_once(program: Graph) -> Graph:
    """Return the same program without early starts: each collective starts at the point where it was awaited."""
    for function in program.functions.values():
        function.nodes[:] = [node for node in function.nodes if not isinstance(node.op, Starting)]
        for node in function.nodes:
            if isinstance(node.op, Awaited):
                node.op = replace(node.op, ahead=False)
    return program


def generates(ranks: Ranks, folder: str) -> None:
    """Continue texts in sessions with a cache in every rank; write the texts and the bytes that the steps moved."""
    found: list[dict[str, Any]] = []
    pairs = paired([kind for kind in KINDS if kind != "vit"], ranks.size)
    cases = [(able("numpy", form), kind, form) for kind, form in pairs]
    for backend, kind, form in [*cases, ("tvm", "gpt2", "f32")] if ranks.size == 2 else cases:
        chosen = {**small_options(kind), "layers": 1, **FORMS[form]}
        made = open_rank_stepped(kind, f"tp={ranks.size}", ranks, recipe="megatron", backend=backend, **chosen)
        met = made.executable._communicator  # type: ignore[attr-defined]
        session = made.session(**roomy(kind))
        tokens, logits = written(session)
        facts = {"case": f"{backend} {kind} {form}", "form": form, "tokens": tokens}
        facts["bytes"] = cached(session)
        facts["counted bytes"] = made.executable.state_bytes(**session.states.sizes)
        facts["all bytes"] = sum(state.nbytes for state in session.states.values())
        met.traffic.clear()
        opened = [session.open(**brought) for brought in inputs_for(session)]
        session.prefill({row: [7] for row in opened})
        before = sum(each.bytes for each in met.traffic.values())
        session.step(dict.fromkeys(opened, 8))
        facts["counted"] = sum(each.bytes for each in met.traffic.values()) - before
        step = replace(met.plan, sizes={**met.plan.sizes, **dict.fromkeys(met.plan.graph.symbols, 1), "B": len(opened)})
        facts["planned"] = sum(each.payload * each.ranks for each in after_the_encoder(step.collectives()))
        if ranks.rank == 0:
            whole = treadle.compile(kind, backend=backend, **chosen).session(**roomy(kind))
            facts["wanted"], wanted = written(whole)
            facts["apart"] = float(np.max(np.abs(logits - wanted)))
            facts["whole bytes"] = cached(whole)
        found.append(facts)
    Path(folder, f"generated-{ranks.rank}.json").write_text(json.dumps(found))


def cached(session: Session) -> int:
    """Return the size in bytes of the cached keys and values, without the lengths."""
    return sum(state.nbytes for state in session.states.values() if "int" not in str(state.dtype))


def after_the_encoder(planned: list[PlannedCollective]) -> list[PlannedCollective]:
    """Return the collectives that run in every step, not only in the encoder."""
    first = max((at + 1 for at, each in enumerate(planned) if each.scope.startswith("encoder")), default=0)
    return planned[first:]


def roomy(kind: str) -> dict[str, Any]:
    """Return a session's sizes."""
    return {"rows": 2, "capacity": 16, **({"memory": {"S": 8}} if kind == "t5" else {})}


def inputs_for(session: Session) -> list[dict[str, Any]]:
    """Return the inputs that each of two rows begins with: a source text, if the model has an encoder."""
    names = session.derived.prologue
    return [dict.fromkeys(names, np.array(source)) for source in ([1, 2, 3, 4], [5, 6])]


def written(session: Session) -> tuple[list[list[int]], Any]:
    """Return two rows of different lengths, continued together, and the logits of a prompt."""
    tokens: list[list[int]] = [[], []]
    given = inputs_for(session)
    for token in generate(session, [[1, 2, 3], [4]], most=6, inputs=given if given[0] else None):
        tokens[token.row].append(token.id)
    row = session.open(**given[0])
    logits = np.asarray(session.prefill({row: [5, 6, 7]})[row], np.float32)
    session.close(row)
    return tokens, logits


def turns(ranks: Ranks, mode: str) -> None:
    if mode == "lingers":
        return
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


def differ(ranks: Ranks, what: str, folder: str = "") -> None:
    other = ranks.rank == 1
    axis, recipe = ("dp", "dp") if what == "plan" and other else ("tp", "megatron")
    options: dict[str, Any] = {**SMALL, "recipe": recipe}
    if what == "version" and other:
        treadle.__version__ = "0.0"
    if what == "weights":
        options["seed"] = ranks.rank
    if what == "inputs":
        options["agree"] = {"inputs": f"tokens of {3 + ranks.rank}"}
    if what == "part":
        options = {"recipe": recipe}
    compile_rank(Path(folder, str(ranks.rank)) if folder else "gpt2", f"{axis}={ranks.size}", ranks, **options)


JOBS = {"models": models, "turns": turns, "differ": differ}


def main() -> None:
    """Run a job as a rank; errors are printed as the commands print them."""
    job, *arguments = sys.argv[1:]
    try:
        with join(timeout=float(os.environ.get("TIMEOUT", "60"))) as ranks:
            JOBS[job](ranks, *arguments)
        if arguments == ["lingers"]:
            print(f"rank {ranks.rank} is process {os.getpid()}", flush=True)
            time.sleep(600)
    except TreadleError as error:
        if not error.is_reported:
            print(error, file=sys.stderr, flush=True)
        sys.exit(2)


if __name__ == "__main__":
    main()

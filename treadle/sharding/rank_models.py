"""`compile_rank`: compile this rank's part of a model with any backend, and load its part of the weights.

    with join() as ranks:
        part = compile_rank("gpt2", "tp=2", ranks, recipe="megatron", backend="torch")
        logits = part(tokens=ids)["logits"]           # this rank's part of the logits
        whole = part.gathered(part(tokens=ids))       # all of them, on rank 0

Every rank computes the plan by itself. Ranks compare versions, plans, weights and inputs before anything runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

import treadle
from treadle.backends.protocol import Entry, Executable, Outputs, Port, StatefulExecutable
from treadle.backends.registry import find_backend
from treadle.backends.signature import Signature
from treadle.backends.staged import build
from treadle.backends.states import States
from treadle.frontends.deferred_arrays import stored_bytes
from treadle.ir.errors import Hint, PassError, RankError, UsageError
from treadle.ir.graph import Graph
from treadle.ir.hardware import Hardware
from treadle.ir.placement.mesh import Mesh
from treadle.ir.placement.placements import MeshPlacement, taken_part
from treadle.ir.target import Target
from treadle.ir.transforms.balances import balances_of
from treadle.ir.transforms.encoded_weights import encode_weights
from treadle.passes.sharding.checking import check_sharding
from treadle.passes.sharding.plan import ShardingPlan
from treadle.passes.sharding.plan_printing import plan_hash
from treadle.passes.sharding.rank_programs import rank_weights, refuse_small_sizes
from treadle.passes.sharding.whole_outputs import with_whole_outputs
from treadle.program.backend_choice import choose_backend
from treadle.program.options import CompileOptions
from treadle.program.program import Program
from treadle.program.source import AnyModel
from treadle.program.weights import InitialWeights
from treadle.runtime.distributed.communicator import Communicator
from treadle.runtime.distributed.ranks import Ranks, refuse_other_mesh
from treadle.sharding.plans import plan_graph, program_to_shard, rank_graph
from treadle.stepped import SteppedModel, step_of

Array = np.ndarray[Any, Any]

_SAMPLE = 8  # number of elements at each end of a weight that ranks compare by a hash


@dataclass(frozen=True)
class RankModel:
    """A rank's part of a sharded model. All ranks call it with the same whole arrays, by name.

    executable    the compiled program of the rank
    communicator  runs its collectives, and counts the bytes that they moved
    loaded        bytes that the rank's parts of the weights have in the checkpoint; 0 if they are drawn
    seed          the seed of drawn weights
    backend       the backend's name
    """

    name: str
    plan: ShardingPlan
    ranks: Ranks
    executable: Executable
    communicator: Communicator
    loaded: int
    seed: int | None
    backend: str

    @property
    def inputs(self) -> tuple[Port, ...]:
        """The inputs of a call."""
        return self.executable.inputs

    def sizes(self, **arrays: Any) -> dict[str, int]:
        """Return the symbols' sizes in a call. Raises BackendError for an invalid input, PassError for sizes that are
        too small.
        """
        signature = Signature(self.plan.graph, self.plan.main.function)
        _, sizes = signature.bind_sized(arrays, lambda port, value: np.asarray(value), {})
        refuse_small_sizes(self.plan, sizes)
        return sizes

    def __call__(self, /, **arrays: Any) -> Outputs:
        """Return this rank's parts of the outputs. Raises as an executable does, and RankError if other ranks fail."""
        sizes = self.sizes(**arrays)
        self.ranks.doing("running")
        with self.communicator.running(tuple(sorted(sizes.items()))):
            return self.executable(**arrays)

    def gathered(self, parts: Mapping[str, Any], **arrays: Any) -> Outputs | None:
        """Return the whole outputs on rank 0, joined from all ranks' parts; None on other ranks. All ranks must call
        it.

        parts   this rank's parts, which a call returned
        arrays  the inputs of that call
        """
        sizes, plan, met = self.sizes(**arrays), self.plan, self.communicator
        made = Outputs()
        for (name, value), placed in zip(plan.graph.main.outputs.items(), plan.gives, strict=True):
            whole = None
            if self.ranks.rank == 0:
                dtype = _array(parts[name]).dtype if name in parts else value.type.dtype.numpy
                whole = np.zeros(value.type.evaluate(sizes), dtype)
            for rank in _holders(plan, name, placed):
                if whole is not None:
                    part = taken_part(whole, value.type.shape, placed, plan.devices, rank, sizes)
                    own = rank == 0
                    part[...] = (
                        _array(parts[name]) if own else met.received(part, rank, f"receiving {name} from rank {rank}")
                    )
                elif rank == self.ranks.rank:
                    met.send(parts[name], 0, f"sending {name} to rank 0")
            if whole is not None:
                made[name] = whole
        return made if self.ranks.rank == 0 else None


def compile_rank(model: AnyModel, mesh: Mesh | str, ranks: Ranks, **options: Any) -> RankModel:
    """Plan a model over a mesh, and compile this rank's part. All ranks call it with the same arguments.

    options  the options of `RankPart.of`

    Raises as `RankPart.of` does, and BackendError if the backend refuses the rank's program.
    """
    part = RankPart.of(model, mesh, ranks, **options)
    executable, _ = build(find_backend(part.backend), part.program, part.target, part.weights)
    return RankModel(part.name, part.plan, ranks, executable, part.communicator, part.loaded, part.seed, part.backend)


def open_rank_stepped(
    model: AnyModel, mesh: Mesh | str, ranks: Ranks, *, cache: str | None = None, **options: Any
) -> SteppedModel:
    """Compile the step of generation for this rank. Sessions hold caches of this rank's heads, and return whole logits.

    All ranks must make the same calls. Raises as `compile_rank` and `treadle.stepped.open_stepped` do; UsageError for a
    recipe that splits tokens, or rows of a batch, and PassError for axes that do.
    """
    part = RankPart.of(model, mesh, ranks, whole=True, **options)
    try:
        made = step_of(part.name, part.program, part.backend, part.target, part.weights, cache)
    except PassError as error:
        recipe, count = options.get("recipe"), part.plan.devices.ranks
        if recipe in (None, "megatron"):
            raise
        raise UsageError(
            f"{part.name} has no decoding step if it is split by the recipe {recipe}",
            received=error.what,
            hint=Hint(f'"tp={count}", recipe="megatron"', f"--mesh tp={count} --recipe megatron"),
        ) from error
    return replace(made, executable=_MetExecutable(made.executable, part.communicator))


@dataclass(frozen=True)
class RankPart:
    """The program of a rank and its parts of the weights, before compilation.

    loaded  bytes that these parts have in the checkpoint; seed: the seed of drawn weights
    """

    name: str
    plan: ShardingPlan
    program: Graph
    weights: Mapping[str, Any]
    communicator: Communicator
    backend: str
    target: Target
    loaded: int
    seed: int | None

    @classmethod
    def of(
        cls,
        model: AnyModel,
        mesh: Mesh | str,
        ranks: Ranks,
        *,
        recipe: str | None = None,
        axes: Mapping[str, str] | None = None,
        device: str | Hardware = "h100",
        agree: Mapping[str, str] | None = None,
        whole: bool = False,
        **options: Any,
    ) -> RankPart:
        """Plan the model, compare with the other ranks, start torch.distributed, and load this rank's weights.

        agree   further values that ranks compare, in addition to versions, plans and weights
        whole   True if every rank gets the whole of each output

        Other arguments are as in `treadle.sharding.shard_model` and `treadle.compile`. Raises as these do; UsageError,
        on all ranks, if ranks differ or if their number differs from the mesh's; RankError if another rank fails.
        """
        chosen = CompileOptions.of("rank", options)
        source = chosen.open(model)
        ranks.doing(f"planning {source}")
        program = program_to_shard(Program(source, chosen), recipe, deferred=True)
        resolved, arrays = program.resolved, program.options.arrays
        plan = plan_graph(program.graph, mesh, recipe=recipe, axes=axes, sizes=chosen.sizes, device=device)
        if whole:
            if plan.pipeline is not None:
                raise PassError(
                    "a pipeline has no step of generation: its stages run whole batches, split into micro-batches",
                    received=f"recipe {plan.recipe}",
                    hint="a recipe without stages: megatron",
                )
            plan = with_whole_outputs(plan)
            check_sharding(plan)
        refuse_other_mesh(plan, ranks.size)
        held = arrays if arrays is not None else resolved.weights
        where, seed = chosen.where, chosen.seed
        backend = choose_backend(chosen.backend, plan.graph, where).name
        facts = {"version": treadle.__version__, "backend": f"{backend} on {where.kind}", "plan": plan_hash(plan)[:16]}
        facts |= {"computing": f"dtype {chosen.dtype}", "weights": _weights_text(held, seed)}
        ranks.agree({**facts, **(agree or {})})
        communicator = ranks.start(plan, where.kind)
        ranks.doing("reading its part of the weights")
        own, loaded = load_part(plan, ranks.rank, held, InitialWeights(plan.graph, seed, resolved.divided))
        source.check()  # weights were read long after their files were opened
        ranks.doing("compiling")
        own_program = rank_graph(plan, ranks.rank, chosen)
        given = {name: own[name] for name in own_program.parameters}
        drawn = None if held is not None else seed
        return cls(resolved.name, plan, own_program, given, communicator, backend, where, loaded, drawn)


class _MetExecutable:
    """The entries of a rank's program, run with collectives; see `treadle.backends.protocol.StatefulExecutable`."""

    exact_rows = False  # the order of additions in a collective depends on the size

    def __init__(self, executable: StatefulExecutable, communicator: Communicator) -> None:
        self._executable, self._communicator = executable, communicator

    @property
    def entries(self) -> tuple[str, ...]:
        return self._executable.entries

    def entry(self, name: str) -> Entry:
        return _MetEntry(name, self._executable.entry(name), self._communicator)

    def new_states(self, **sizes: int) -> States:
        return self._executable.new_states(**sizes)

    def state_bytes(self, **sizes: int) -> int:
        return self._executable.state_bytes(**sizes)


class _MetEntry:
    def __init__(self, name: str, entry: Entry, communicator: Communicator) -> None:
        self._name, self._entry, self._communicator = name, entry, communicator
        self.inputs, self.outputs = entry.inputs, entry.outputs

    def __call__(self, states: States | None = None, /, **arrays: Any) -> Outputs:
        shapes = tuple((name, np.shape(array)) for name, array in sorted(arrays.items()))
        with self._communicator.running((self._name, shapes)):
            return self._entry(states, **arrays)


def load_part(
    plan: ShardingPlan, rank: int, held: Mapping[str, Any] | None, initial: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], int]:
    """Return a rank's parts of the weights, and the number of bytes that these have in their files.

    held  arrays by name, mapped or deferred (`treadle.frontends.deferred_arrays`); only the rank's parts are read, but
          weights that the plan quantizes are read whole. None: weights are drawn
    initial  the weights to draw; None: those of seed 0
    """
    numbers = held if held is not None else InitialWeights(plan.graph, 0) if initial is None else initial
    own = rank_weights(plan, rank, _Weights(plan.graph, numbers))
    if held is None:
        return own, 0
    read = {name: held[name] for name in own if name in held}  # a vector that balances quantized weights is derived
    encoded = {name for name, array in read.items() if isinstance(array, np.ndarray) and own[name].dtype != array.dtype}
    return own, sum(stored_bytes(array, array if name in encoded else own[name]) for name, array in read.items())


class _Weights(Mapping[str, Any]):
    """Weights of a graph, each created on access: mapped, drawn, or quantized."""

    def __init__(self, graph: Graph, held: Mapping[str, Any]) -> None:
        self.graph, self.held = graph, held
        self._balances = balances_of(graph)

    def __getitem__(self, name: str) -> Any:
        balances = [b for b in self._balances if name in (b.vector, *b.weights)]
        if not balances:
            return encode_weights(self.graph, {name: self._number(name)}, ())[name]
        return encode_weights(self.graph, {n: self._number(n) for n in balances[0].read}, balances)[name]

    def _number(self, name: str) -> Any:
        """Return a weight before quantization: the given array, or drawn."""
        if name not in self.held:
            raise UsageError(f"weights= lacks {name}")
        return self.held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.graph.parameters)

    def __len__(self) -> int:
        return len(self.graph.parameters)


def _weights_text(held: Mapping[str, Any] | None, seed: int) -> str:
    """Return a text that ranks compare: a hash of the shapes, the dtypes, and some elements of each weight."""
    if held is None:
        return f"drawn from {seed}"
    digest = hashlib.sha256()
    for name in sorted(held):
        array = held[name]
        flat = (slice(0, _SAMPLE),) * len(array.shape), (slice(-_SAMPLE, None),) * len(array.shape)
        digest.update(f"{name} {array.shape} {array.dtype}\n".encode())
        for where in flat:
            digest.update(np.ascontiguousarray(array[where]).tobytes())
    return f"sha256:{digest.hexdigest()[:16]}"


def _holders(plan: ShardingPlan, name: str, placed: MeshPlacement) -> list[int]:
    """Return the ranks that together hold all parts of an output, each part once. Of several copies, the first rank's
    counts.
    """
    mesh = plan.devices
    if placed.partial:
        raise RankError("an output is left as a partial sum", received=placed.text(mesh))
    used = set(placed.used) | set(() if plan.pipeline is None else mesh.parts_of(plan.pipeline.over))
    unused = [part for part in mesh.parts if part not in used]
    holding = [rank for rank in range(mesh.ranks) if plan.holds_output(rank, name)]
    return [rank for rank in holding if not any(mesh.coordinate(rank, part) for part in unused)]


def _array(part: Any) -> Array:
    """Return an array or a tensor as an array in CPU memory."""
    return np.ascontiguousarray(part.cpu().numpy() if hasattr(part, "cpu") else part)
